"""Recipes and settings, whether they come from the environment or are assigned.

`test_notebook.py` has the settings and the training cell with an invalid MODEL, EPOCHS and BATCH_SIZE.
"""

import pytest
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import utils
from model import MODELS, Model2, create_model

LOWEST = dict(model="Model4", epochs=1, batch_size=1, seed=0, resume=1, checkpoints="a")  # all valid


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [
        pytest.param("3", None, 3, id="literal"),
        pytest.param("three", 15, "three", id="invalid"),
        pytest.param("5", "checkpoints", "5", id="text"),
        pytest.param("", 15, 15, id="empty"),
    ],
)
def test_setting_is_that_of_the_environment_if_there_is_one(monkeypatch, text, default, expected):
    monkeypatch.setenv("S7_NAME", text)
    assert utils.setting("NAME", default) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", True),
        ("seed", -1),
        ("seed", 10**9),
        ("resume", "yes"),
        ("checkpoints", ""),
        ("checkpoints", None),
    ],
)
def test_invalid_setting_is_named(name, value):
    utils.check_settings(**LOWEST)
    with pytest.raises(ValueError, match=f"^{name.upper()} is {value!r}: "):
        utils.check_settings(**LOWEST | {name: value})


def test_new_network_needs_an_entry_in_both_tables(monkeypatch):
    with pytest.raises(ValueError, match="MODELS .*model.py.* RECIPES .*utils.py"):
        utils.check_settings(**LOWEST | {"model": "New"})
    monkeypatch.setitem(MODELS, "New", Model2)
    monkeypatch.setitem(utils.RECIPES, "New", utils.RECIPES["Model2"])
    utils.check_settings(**LOWEST | {"model": "New", "batch_size": None})
    assert isinstance(create_model("New"), Model2)


def test_recipes_of_the_published_models_are_the_published_ones():
    assert list(utils.RECIPES) == list(MODELS)
    sgd = dict(lr=0.01, momentum=0.9)
    step = utils.Recipe(sgd, StepLR, dict(step_size=6, gamma=0.1), batch_size=128)
    assert utils.RECIPES["Model1"] == step
    assert utils.RECIPES["Model2"] == step
    plateau_args = dict(mode="min", factor=0.1, patience=10, threshold=1e-4, threshold_mode="abs")
    assert utils.RECIPES["Model3"] == utils.Recipe(sgd, ReduceLROnPlateau, plateau_args, batch_size=128)

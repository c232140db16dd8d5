"""Recipes and settings, whether they come from the environment or are assigned."""

import pytest
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import utils
from model import MODELS

VALID = dict(model="Model4", epochs=15, batch_size=None, seed=1, resume=False)


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [
        pytest.param("3", 15, 3, id="integer"),
        pytest.param("64", None, 64, id="integer instead of None"),
        pytest.param("True", False, True, id="bool"),
        pytest.param("three", 15, "three", id="invalid"),
        pytest.param("5", "checkpoints", "5", id="text"),
        pytest.param("", 15, 15, id="empty"),
        pytest.param(None, 15, 15, id="unset"),
    ],
)
def test_setting_is_that_of_the_environment_if_there_is_one(monkeypatch, text, default, expected):
    if text is not None:
        monkeypatch.setenv("S7_NAME", text)
    assert utils.setting("NAME", default) == expected


@pytest.mark.parametrize("change", [{}, dict(seed=0), dict(batch_size=1), dict(resume=1)], ids=str)
def test_valid_settings_are_accepted(change):
    utils.check_settings(**(VALID | change))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "model4"),
        ("epochs", "3"),
        ("epochs", 0),
        ("batch_size", 2.5),
        ("seed", -1),
        ("seed", 10**9),
        ("resume", "yes"),
    ],
)
def test_invalid_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name.upper()} is {value!r}: "):
        utils.check_settings(**(VALID | {name: value}))


def test_unknown_network_names_both_tables():
    with pytest.raises(ValueError, match="MODELS .*model.py.* RECIPES .*utils.py"):
        utils.check_settings(**(VALID | dict(model="Model6")))


def test_recipes_of_the_published_models_are_the_published_ones():
    assert list(utils.RECIPES) == list(MODELS)
    sgd = dict(lr=0.01, momentum=0.9)
    step = utils.Recipe(sgd, StepLR, dict(step_size=6, gamma=0.1), batch_size=128)
    assert utils.RECIPES["Model1"] == step
    assert utils.RECIPES["Model2"] == step
    plateau_args = dict(mode="min", factor=0.1, patience=10, threshold=1e-4, threshold_mode="abs")
    assert utils.RECIPES["Model3"] == utils.Recipe(sgd, ReduceLROnPlateau, plateau_args, batch_size=128)

"""Recipes and settings: environment variables, learning rates and augmentation per epoch."""

import pytest
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import utils
from model import MODELS

PUBLISHED_SGD = {"lr": 0.01, "momentum": 0.9}
PUBLISHED_PLATEAU = {
    "mode": "min",
    "factor": 0.1,
    "patience": 10,
    "threshold": 1e-4,
    "threshold_mode": "abs",
}


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [
        pytest.param("3", 15, 3, id="integer"),
        pytest.param("64", None, 64, id="integer without default"),
        pytest.param("a", "b", "a", id="text"),
        pytest.param("", "b", "", id="empty text"),
        pytest.param("1", False, True, id="bool as 1"),
        pytest.param("0", True, False, id="bool as 0"),
        pytest.param("True", False, True, id="bool as True"),
        pytest.param("False", True, False, id="bool as False"),
        pytest.param("true", False, True, id="bool in lowercase"),
    ],
)
def test_environment_variable_overrides_the_default(monkeypatch, text, default, expected):
    monkeypatch.setenv("S7_NAME", text)
    value = utils.setting_from_env("NAME", default)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("default", [15, None, "text", False, True])
def test_setting_without_environment_variable_is_the_default(monkeypatch, default):
    monkeypatch.setenv("S7_OTHER", "2")
    value = utils.setting_from_env("NAME", default)
    assert value == default
    assert type(value) is type(default)


def test_setting_among_the_choices_is_accepted(monkeypatch):
    monkeypatch.setenv("S7_NAME", "C")
    assert utils.setting_from_env("NAME", "A", choices=["A", "C"]) == "C"


@pytest.mark.parametrize("text", ["many", "-1", "0", "1.5", ""])
@pytest.mark.parametrize("default", [15, None])
def test_environment_variable_that_is_not_a_positive_integer_is_rejected(monkeypatch, text, default):
    monkeypatch.setenv("S7_NAME", text)
    message = f"^NAME is '{text}': it must be a positive integer, here or in S7_NAME$"
    with pytest.raises(ValueError, match=message):
        utils.setting_from_env("NAME", default)


@pytest.mark.parametrize("text", ["yes", "2", ""])
def test_environment_variable_that_is_no_bool_is_rejected(monkeypatch, text):
    monkeypatch.setenv("S7_NAME", text)
    with pytest.raises(ValueError, match=f"^NAME is '{text}': choose one of 0, 1, True, False$"):
        utils.setting_from_env("NAME", False)


def test_environment_variable_outside_the_choices_is_rejected(monkeypatch):
    monkeypatch.setenv("S7_NAME", "B")
    with pytest.raises(ValueError, match="^NAME is 'B': choose one of A, C$"):
        utils.setting_from_env("NAME", "A", choices=["A", "C"])


def test_default_outside_the_choices_is_rejected():
    with pytest.raises(ValueError, match="^MODEL is 'Model9': choose one of Model1, Model2, "):
        utils.setting_from_env("MODEL", "Model9", choices=MODELS)


@pytest.mark.parametrize("default", [0, -3])
def test_default_that_is_no_positive_integer_is_rejected(default):
    with pytest.raises(ValueError, match=f"^EPOCHS is {default}: it must be a positive integer"):
        utils.setting_from_env("EPOCHS", default)


def test_every_model_has_a_recipe():
    assert list(utils.RECIPES) == list(MODELS)


@pytest.mark.parametrize(
    ("model", "scheduler", "scheduler_args"),
    [
        pytest.param("Model1", StepLR, {"step_size": 6, "gamma": 0.1}, id="Model1"),
        pytest.param("Model2", StepLR, {"step_size": 6, "gamma": 0.1}, id="Model2"),
        pytest.param("Model3", ReduceLROnPlateau, PUBLISHED_PLATEAU, id="Model3"),
    ],
)
def test_recipes_of_the_published_models_are_the_published_ones(model, scheduler, scheduler_args):
    published = utils.Recipe(PUBLISHED_SGD, scheduler, scheduler_args, batch_size=128)
    assert utils.get_recipe(model) == published


def test_batch_size_can_be_changed():
    recipe = utils.get_recipe("Model4", batch_size=32)
    assert recipe.batch_size == 32
    assert recipe.augmentation == utils.RECIPES["Model4"].augmentation


def test_changed_batch_size_leaves_the_recipes_alone():
    utils.get_recipe("Model4", batch_size=32)
    assert utils.get_recipe("Model4").batch_size == 128


def test_unknown_recipe_is_rejected():
    with pytest.raises(ValueError, match="^no recipe for model 'Model9': choose one of Model1, Model2, "):
        utils.get_recipe("Model9")


def test_last_epochs_are_not_augmented():
    augmentation = {"degrees": 10, "shift": 0.1, "scale": 0.1}
    recipe = utils.Recipe(PUBLISHED_SGD, StepLR, {}, augmentation=augmentation, clean_epochs=2)
    used = []
    for epoch in range(1, 6):
        used.append(recipe.augmentation_for(epoch, epochs=5))
    assert used == [augmentation, augmentation, augmentation, None, None]


def test_all_epochs_are_augmented_without_clean_epochs():
    augmentation = {"degrees": 10, "shift": 0.1, "scale": 0.1}
    recipe = utils.Recipe(PUBLISHED_SGD, StepLR, {}, augmentation=augmentation)
    assert recipe.augmentation_for(5, epochs=5) == augmentation


def test_run_of_clean_epochs_only_is_not_augmented():
    assert utils.get_recipe("Model4").augmentation_for(1, epochs=3) is None


def test_recipe_without_augmentation_has_none_in_any_epoch():
    assert utils.get_recipe("Model1").augmentation_for(1, epochs=15) is None


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param("Model1", [0.01] * 6 + [0.001] * 6 + [0.0001] * 3, id="StepLR"),
        pytest.param("Model3", [0.01] * 15, id="ReduceLROnPlateau"),
        pytest.param("Model4", [0.1, 0.075, 0.05625, 0.0421875], id="StepLR in every epoch"),
    ],
)
def test_planned_learning_rates_follow_the_scheduler(recwarn, model, expected):
    rates = utils.planned_learning_rates(utils.get_recipe(model), len(expected))
    assert rates == pytest.approx(expected)
    assert len(recwarn) == 0  # PyTorch warns if optimizer and scheduler are stepped in the wrong order

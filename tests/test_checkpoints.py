"""Runs that are interrupted, killed, resumed or rejected: the checkpoint is always a completed epoch's."""

import contextlib
import errno
import multiprocessing
import os
import random
import re
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import train_model
from helpers import assert_identical
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import utils
from model import create_model

STEP = utils.Recipe(  # uses every option
    sgd={"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    scheduler=StepLR,
    scheduler_args={"step_size": 2, "gamma": 0.1},
    batch_size=20,
    augmentation={"degrees": 10, "shift": 0.05, "scale": 0.05},
    clean_epochs=2,
)
PLATEAU = replace(STEP, scheduler=ReduceLROnPlateau, scheduler_args={"patience": 0})
RECIPES = {"StepLR": STEP, "ReduceLROnPlateau": PLATEAU}
EPOCHS = 6
IMAGES = 100
BATCHES = 5  # per epoch

# The fork server has already imported what takes long, so a child starts within milliseconds and a kill
# hits training rather than imports.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "matplotlib.pyplot", "torchinfo", "torchvision", "utils"])


def train(path, dataset, recipe=STEP, model="Model3", data="digits", epochs=EPOCHS, seed=1):
    """Train with the benchmarks' loop, resuming from `path` if it exists; return the model."""
    settings = utils.run_settings(model, data, epochs, seed, recipe)
    torch.manual_seed(seed)
    network = create_model(model)
    train_model(network, recipe, dataset, dataset, settings, path)
    return network


def train_in_child(path, dataset, recipe, written):
    """Train in a child process.

    With `written`, the process kills itself during its third save, after writing that share of the file.
    """
    torch.set_num_threads(1)  # as in this process: results depend, in the last bits, on the thread count
    saves = []
    real_replace = os.replace

    def kill_during_third_save(partial, target):
        saves.append(target)
        if written is not None and len(saves) == 3:
            os.truncate(partial, int(written * os.path.getsize(partial)))
            os.kill(os.getpid(), signal.SIGKILL)
        real_replace(partial, target)

    os.replace = kill_during_third_save
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    train(path, dataset, recipe)


def start(path, dataset, recipe=STEP, written=None):
    process = processes.Process(target=train_in_child, args=(path, dataset, recipe, written))
    process.start()
    return process


def completed_epochs(path):
    return len(utils.read_checkpoint(path)["history"]["test_acc"])


class Parts:
    """Everything that a `Run` needs."""

    def __init__(self, epochs=2, recipe=STEP):
        torch.manual_seed(1)
        self.model = create_model("Model3")
        self.optimizer = torch.optim.SGD(self.model.parameters(), **recipe.sgd)
        self.scheduler = recipe.scheduler(self.optimizer, **recipe.scheduler_args)
        self.settings = utils.run_settings("Model3", "digits", epochs, 1, recipe)

    def run(self, path, resume=False):
        return utils.Run(path, self.settings, self.model, self.optimizer, self.scheduler, resume)

    def use(self):
        """Take one step of the optimizer."""
        self.model(torch.rand(2, 1, 28, 28)).sum().backward()
        self.optimizer.step()


def fresh_run(path):
    return Parts().run(path)


def record_epoch(run, accuracy=50.0):
    """Complete the next epoch of a run, without training."""
    next(run.epochs())
    run.record(1.0, accuracy, 1.0, accuracy)


# ---- interruptions ----


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small):
    """Return the checkpoints of uninterrupted runs, one per scheduler, and the time that one run takes."""
    states = {}
    for name, recipe in RECIPES.items():
        path = tmp_path_factory.mktemp("uninterrupted") / "run.pt"
        start_time = time.perf_counter()
        start(path, small(IMAGES), recipe).join()
        states["seconds"] = time.perf_counter() - start_time
        states[name] = utils.read_checkpoint(path)
        assert completed_epochs(path) == EPOCHS
    return states


@pytest.mark.parametrize("scheduler", RECIPES)
def test_run_killed_at_random_moments_completes_bit_identically(uninterrupted, small, tmp_path, scheduler):
    """Send SIGKILL five times at random moments, then let the run finish."""
    generator = random.Random(1)
    kills = 0
    while kills < 5:
        path = tmp_path / f"run{kills}.pt"
        interrupted = True
        while interrupted:
            process = start(path, small(IMAGES), RECIPES[scheduler])
            process.join(generator.uniform(0.02, uninterrupted["seconds"]))
            interrupted = process.is_alive()
            if interrupted:
                kills += 1
            process.kill()
            process.join()
        assert_identical(utils.read_checkpoint(path), uninterrupted[scheduler])


@pytest.mark.parametrize("written", [0.5, 1.0])
def test_checkpoint_survives_a_kill_during_saving(uninterrupted, small, tmp_path, written):
    path = tmp_path / "run.pt"
    for epochs in (1, 3, 5):  # the first process also saves the initial state
        process = start(path, small(IMAGES), written=written)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert completed_epochs(path) == epochs
    start(path, small(IMAGES)).join()
    assert_identical(utils.read_checkpoint(path), uninterrupted["StepLR"])


@pytest.mark.parametrize(
    ("epoch", "batch"),
    [
        pytest.param(1, 2, id="first epoch"),
        pytest.param(3, 3, id="training"),
        pytest.param(3, BATCHES + 4, id="evaluation"),
    ],
)
def test_run_resumes_bit_identically_after_ctrl_c(uninterrupted, small, tmp_path, monkeypatch, epoch, batch):
    """Interrupt the loop in a batch and run it again; an epoch has as many test as training batches."""
    path = tmp_path / "run.pt"
    batches = []
    real_count = utils.GetCorrectPredCount

    def interrupt(pred, target):
        batches.append(len(target))
        if len(batches) == (epoch - 1) * 2 * BATCHES + batch:
            signal.raise_signal(signal.SIGINT)
        return real_count(pred, target)

    monkeypatch.setattr(utils, "GetCorrectPredCount", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(path, small(IMAGES))
    assert completed_epochs(path) == epoch - 1
    train(path, small(IMAGES))
    assert_identical(utils.read_checkpoint(path), uninterrupted["StepLR"])


def test_ctrl_c_during_saving_keeps_the_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    run = fresh_run(path)
    before = path.read_bytes()

    def interrupt(partial, target):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        record_epoch(run)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["train", "test"])
def test_non_finite_loss_keeps_the_last_good_checkpoint(small, tmp_path, monkeypatch, function):
    """The weights become NaN in epoch 3, before training or before evaluation."""
    path = tmp_path / "run.pt"
    states = []
    real_function = getattr(utils, function)

    def poison(model, *args):
        states.append(utils.read_checkpoint(path))
        if len(states) == 3:
            next(model.parameters()).data.fill_(float("nan"))
        return real_function(model, *args)

    monkeypatch.setattr(utils, function, poison)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        train(path, small(40))
    state = utils.read_checkpoint(path)
    assert completed_epochs(path) == 2
    assert_identical(state, states[2])
    for value in state["model"].values():
        assert value.isfinite().all()


def test_epoch_of_a_non_finite_loss_is_printed_before(small, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise FloatingPointError("the test loss is nan")

    monkeypatch.setattr(utils, "test", fail)
    with pytest.raises(FloatingPointError):
        train(tmp_path / "run.pt", small(40))
    assert "EPOCH: 1\n" in capsys.readouterr().out


# ---- the loop ----


def test_plateau_scheduler_uses_the_test_loss(small, tmp_path, monkeypatch):
    """With a patience of 1, PyTorch reduces the rate after epoch 4."""
    losses = iter([3.0, 2.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(utils, "test", lambda *args: (next(losses), 50.0))
    recipe = replace(PLATEAU, scheduler_args={"patience": 1, "factor": 0.1})
    train(tmp_path / "run.pt", small(40), recipe, epochs=5)
    history = utils.read_checkpoint(tmp_path / "run.pt")["history"]
    assert history["learning_rates"] == pytest.approx([0.05, 0.05, 0.05, 0.05, 0.005])


def test_scheduler_is_stepped_after_every_epoch(small, tmp_path):
    train(tmp_path / "run.pt", small(40), epochs=5)
    history = utils.read_checkpoint(tmp_path / "run.pt")["history"]
    assert history["learning_rates"] == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005])


def test_last_epochs_are_not_augmented(small, tmp_path, monkeypatch):
    calls = []

    def collect(data, **augmentation):
        calls.append(augmentation)
        return data

    monkeypatch.setattr(utils, "random_affine", collect)
    train(tmp_path / "run.pt", small(40), epochs=5)
    assert calls == [STEP.augmentation] * 6  # three epochs of two batches


def test_equal_settings_give_bit_identical_runs(small, tmp_path):
    train(tmp_path / "first.pt", small(40), epochs=2)
    train(tmp_path / "second.pt", small(40), epochs=2)
    first = utils.read_checkpoint(tmp_path / "first.pt")
    second = utils.read_checkpoint(tmp_path / "second.pt")
    assert_identical(first, second)


def test_another_seed_gives_another_run(small, tmp_path):
    train(tmp_path / "first.pt", small(40), epochs=2)
    train(tmp_path / "second.pt", small(40), epochs=2, seed=2)
    first = utils.read_checkpoint(tmp_path / "first.pt")
    second = utils.read_checkpoint(tmp_path / "second.pt")
    assert first["history"]["train_losses"] != second["history"]["train_losses"]


def test_completed_run_is_not_retrained(small, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    model = train(path, small(40), epochs=2)
    before = path.read_bytes()
    monkeypatch.setattr(utils, "train", lambda *args: pytest.fail("training began"))
    restored = train(path, small(40), epochs=2)
    assert path.read_bytes() == before
    assert_identical(dict(restored.state_dict()), dict(model.state_dict()))


# ---- run and history ----


def test_every_epoch_is_announced(tmp_path, capsys):
    run = fresh_run(tmp_path / "run.pt")
    for _ in run.epochs():
        run.record(1.0, 50.0, 1.0, 50.0)
    assert capsys.readouterr().out == "EPOCH: 1\nEPOCH: 2\n"


def test_every_epoch_has_its_own_seed(tmp_path):
    numbers = []
    for path in (tmp_path / "first.pt", tmp_path / "second.pt"):
        run = fresh_run(path)
        for _ in run.epochs():
            numbers.append(torch.rand(1).item())
            run.record(1.0, 50.0, 1.0, 50.0)
    assert numbers[0] != numbers[1]
    assert numbers[2:] == numbers[:2]


def test_results_are_appended_to_the_history(tmp_path):
    run = fresh_run(tmp_path / "run.pt")
    next(run.epochs())
    run.record(0.4, 91.0, 0.3, 92.0)
    assert run.history == utils.History([0.4], [91.0], [0.3], [92.0], [0.05])
    assert run.history.epochs == 1
    assert run.history.seconds[0] > 0


def test_history_has_the_rate_of_the_start_of_the_epoch(tmp_path):
    parts = Parts()
    run = parts.run(tmp_path / "run.pt")
    next(run.epochs())
    parts.optimizer.param_groups[0]["lr"] = 0.001
    run.record(0.4, 91.0, 0.3, 92.0)
    assert run.history.learning_rates == [0.05]


def test_times_do_not_count_when_histories_are_compared():
    assert utils.History(test_acc=[90.0], seconds=[1.0]) == utils.History(test_acc=[90.0], seconds=[2.0])
    assert utils.History(test_acc=[90.0]) != utils.History(test_acc=[91.0])


def test_runs_have_separate_histories(tmp_path):
    record_epoch(fresh_run(tmp_path / "first.pt"))
    assert fresh_run(tmp_path / "second.pt").history.epochs == 0


def test_title_names_model_and_data(tmp_path):
    assert fresh_run(tmp_path / "run.pt").title == "Model3 on digits"


def test_resumed_run_restores_the_history_with_its_times(tmp_path):
    path = tmp_path / "run.pt"
    run = fresh_run(path)
    record_epoch(run)
    resumed = Parts().run(path, resume=True)
    assert resumed.history == run.history
    assert resumed.history.seconds == run.history.seconds


def test_resumed_run_restores_a_used_optimizer(tmp_path):
    """The state comes from the checkpoint, so what the parts did before does not matter."""
    path = tmp_path / "run.pt"
    record_epoch(fresh_run(path))
    parts = Parts()
    parts.use()
    parts.run(path, resume=True)
    assert len(parts.optimizer.state) == 0
    assert_identical(dict(parts.model.state_dict()), dict(Parts().model.state_dict()))


def test_resumed_run_says_after_which_epoch(tmp_path, capsys):
    path = tmp_path / "run.pt"
    record_epoch(fresh_run(path))
    capsys.readouterr()
    Parts().run(path, resume=True)
    assert capsys.readouterr().out == "Resuming after epoch 1\n"


def test_resuming_without_a_checkpoint_says_so(tmp_path, capsys):
    path = tmp_path / "none.pt"
    run = Parts().run(path, resume=True)
    assert capsys.readouterr().out == f"No checkpoint at {path}: training starts from scratch\n"
    assert run.history.epochs == 0


def test_new_run_prints_nothing(tmp_path, capsys):
    fresh_run(tmp_path / "run.pt")
    assert capsys.readouterr().out == ""


def test_tilde_in_the_path_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    record_epoch(fresh_run("~/runs/run.pt"))
    assert (tmp_path / "runs" / "run.pt").exists()
    assert completed_epochs("~/runs/run.pt") == 1


def test_missing_folders_are_created(tmp_path):
    path = tmp_path / "a" / "b" / "run.pt"
    fresh_run(path)
    assert path.exists()


# ---- earlier checkpoints ----


def test_new_run_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    record_epoch(fresh_run(path))
    old = path.read_bytes()
    fresh_run(path)
    assert completed_epochs(path) == 0
    assert (tmp_path / "run.previous-1.pt").read_bytes() == old


def test_finished_run_survives_two_new_runs(tmp_path):
    path = tmp_path / "run.pt"
    finished = fresh_run(path)
    record_epoch(finished)
    record_epoch(finished)
    old = path.read_bytes()
    record_epoch(fresh_run(path))  # stopped early
    record_epoch(fresh_run(path))
    assert (tmp_path / "run.previous-1.pt").read_bytes() == old
    assert completed_epochs(tmp_path / "run.previous-2.pt") == 1
    assert completed_epochs(path) == 1


def test_previous_checkpoint_can_be_read(tmp_path):
    path = tmp_path / "run.pt"
    record_epoch(fresh_run(path))
    state = utils.read_checkpoint(path)
    fresh_run(path)
    assert_identical(utils.read_checkpoint(tmp_path / "run.previous-1.pt"), state)


def test_resumed_run_keeps_no_previous_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    record_epoch(fresh_run(path))
    record_epoch(Parts().run(path, resume=True))
    assert list(tmp_path.iterdir()) == [path]


def test_rejected_new_run_leaves_the_checkpoint_alone(tmp_path):
    path = tmp_path / "run.pt"
    record_epoch(fresh_run(path))
    before = path.read_bytes()
    parts = Parts()
    parts.use()
    with pytest.raises(ValueError, match="has been used"):
        parts.run(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_simultaneous_new_runs_keep_the_finished_checkpoint(tmp_path):
    """Several threads start a run at the same moment."""
    for attempt in range(10):
        path = tmp_path / str(attempt) / "run.pt"
        record_epoch(fresh_run(path))
        finished = path.read_bytes()
        barrier = threading.Barrier(4)
        threads = []
        for _ in range(4):
            threads.append(threading.Thread(target=start_at_barrier, args=(Parts(), path, barrier)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        kept = [file.read_bytes() for file in path.parent.glob("run.previous-*.pt")]
        assert finished in kept


def start_at_barrier(parts, path, barrier):
    """Start a run when all threads are ready; one of them may find that the file is gone."""
    barrier.wait()
    with contextlib.suppress(OSError):
        parts.run(path)


# ---- parts that do not belong together ----


def test_used_optimizer_is_rejected(tmp_path):
    parts = Parts()
    parts.use()
    with pytest.raises(ValueError, match="^the optimizer or the scheduler has been used: .*RESUME = True"):
        parts.run(tmp_path / "run.pt")


def test_used_optimizer_is_rejected_if_there_is_nothing_to_resume(tmp_path):
    parts = Parts()
    parts.use()
    with pytest.raises(ValueError, match="^the optimizer or the scheduler has been used: "):
        parts.run(tmp_path / "none.pt", resume=True)


@pytest.mark.filterwarnings("ignore")  # PyTorch expects a step of the optimizer before
def test_used_scheduler_is_rejected(tmp_path):
    parts = Parts()
    parts.scheduler.step()
    with pytest.raises(ValueError, match="^the optimizer or the scheduler has been used: "):
        parts.run(tmp_path / "run.pt")


@pytest.mark.parametrize("resume", [False, True])
def test_optimizer_of_another_model_is_rejected(tmp_path, resume):
    """This is what happens if only the cell of the network is run again."""
    record_epoch(fresh_run(tmp_path / "run.pt"))
    parts = Parts()
    parts.model = create_model("Model3")
    with pytest.raises(ValueError, match="^the optimizer does not belong to this model: create a new one$"):
        parts.run(tmp_path / "run.pt", resume)


def test_optimizer_with_one_foreign_parameter_is_rejected(tmp_path):
    parts = Parts()
    parts.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="^the optimizer does not belong to this model: "):
        parts.run(tmp_path / "run.pt")


@pytest.mark.parametrize("resume", [False, True])
def test_scheduler_of_another_optimizer_is_rejected(tmp_path, resume):
    record_epoch(fresh_run(tmp_path / "run.pt"))
    parts = Parts()
    parts.scheduler = Parts().scheduler
    with pytest.raises(ValueError, match="^the scheduler does not belong to this optimizer: "):
        parts.run(tmp_path / "run.pt", resume)


@pytest.mark.parametrize("name", ["epochs", "seed"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "many"])
def test_number_of_epochs_and_seed_must_be_positive_integers(tmp_path, name, value):
    parts = Parts()
    parts.settings[name] = value
    with pytest.raises(ValueError, match=f"^{name.upper()} is .*{value}.*: it must be a positive integer"):
        parts.run(tmp_path / "run.pt")


def test_number_of_epochs_can_be_text(tmp_path):
    parts = Parts(epochs="2")
    run = parts.run(tmp_path / "run.pt")
    for _ in run.epochs():
        run.record(1.0, 50.0, 1.0, 50.0)
    assert run.history.epochs == 2


# ---- settings of a run ----


def test_settings_are_plain_values():
    assert utils.run_settings("Model3", "MNIST", 15, 1, PLATEAU) == {
        "model": "Model3",
        "data": "MNIST",
        "epochs": 15,
        "seed": 1,
        "sgd": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        "scheduler": "ReduceLROnPlateau",
        "scheduler_args": {"patience": 0},
        "batch_size": 20,
        "augmentation": {"degrees": 10, "shift": 0.05, "scale": 0.05},
        "clean_epochs": 2,
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(np.float64(0.5), 0.5, id="numpy float"),
        pytest.param(np.int64(3), 3, id="numpy integer"),
        pytest.param(np.bool_(True), True, id="numpy bool"),
        pytest.param(torch.tensor(0.5), 0.5, id="tensor"),
        pytest.param(StepLR, "StepLR", id="class"),
        pytest.param((1, np.int64(2)), [1, 2], id="tuple"),
        pytest.param({"a": {"b": torch.tensor(3)}}, {"a": {"b": 3}}, id="nested dictionary"),
        pytest.param(None, None, id="None"),
    ],
)
def test_setting_becomes_a_plain_value(value, expected):
    plain = utils.plain_value(value)
    assert plain == expected
    assert type(plain) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        pytest.param(np.zeros(2), "ndarray", id="array"),
        pytest.param(torch.zeros(2), "Tensor", id="tensor with two elements"),
        pytest.param(object(), "object", id="object"),
    ],
)
def test_setting_that_cannot_be_stored_is_rejected(value, kind):
    message = f"^a setting is of type {kind}: use text, a number or a dictionary$"
    with pytest.raises(ValueError, match=message):
        utils.plain_value({"name": value})


NUMPY_SGD = {"lr": np.float64(0.05), "momentum": np.float32(0.5)}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"sgd": NUMPY_SGD}, id="numpy rate and momentum"),
        pytest.param({"sgd": {"lr": torch.tensor(0.05), "momentum": 0.9}}, id="tensor as rate"),
        pytest.param(
            {"scheduler_args": {"step_size": np.int64(1), "gamma": np.float64(0.5)}}, id="numpy schedule"
        ),
        pytest.param(
            {"scheduler": ReduceLROnPlateau, "scheduler_args": {"factor": np.float64(0.5)}},
            id="numpy plateau",
        ),
        pytest.param({"batch_size": np.int64(20)}, id="numpy batch size"),
        pytest.param(
            {"augmentation": {"degrees": np.int64(5), "shift": 0.1, "scale": 0.1}}, id="numpy angle"
        ),
    ],
)
def test_recipe_with_numpy_or_tensor_numbers_can_be_resumed(small, tmp_path, monkeypatch, change):
    path = tmp_path / "run.pt"
    recipe = replace(STEP, **change)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "test", interrupt_in_call(2))
        with pytest.raises(KeyboardInterrupt):
            train(path, small(40), recipe, epochs=2)
    train(path, small(40), recipe, epochs=2)
    assert completed_epochs(path) == 2


def interrupt_in_call(number):
    """Return `utils.test`, interrupted in one of its calls."""
    calls = []
    real_test = utils.test

    def test(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real_test(*args)

    return test


@pytest.mark.parametrize("number", [np.int64(2), torch.tensor(2)], ids=["numpy", "tensor"])
def test_seed_and_epochs_can_be_numpy_or_tensor_numbers(small, tmp_path, number):
    path = tmp_path / "run.pt"
    train(path, small(40), epochs=number, seed=number)
    train(path, small(40), epochs=2, seed=2)  # equal settings
    assert completed_epochs(path) == 2


@pytest.mark.parametrize(
    ("change", "recipe_change", "differences"),
    [
        pytest.param(
            {"model": "Model1", "data": "MNIST"},
            {},
            "model: checkpoint Model3, current Model1; data: checkpoint digits, current MNIST",
            id="model and data",
        ),
        pytest.param(
            {"epochs": 4},
            {"batch_size": 9},
            "epochs: checkpoint 2, current 4; batch_size: checkpoint 20, current 9",
            id="epochs and batch size",
        ),
        pytest.param(
            {"seed": 2},
            {"augmentation": None},
            "seed: checkpoint 1, current 2; augmentation: checkpoint {.*}, current None",
            id="seed and augmentation",
        ),
        pytest.param(
            {},
            {"sgd": {"lr": 1}, "clean_epochs": 1},
            "sgd: checkpoint {.*}, current {'lr': 1}; clean_epochs: checkpoint 2, current 1",
            id="optimizer and clean epochs",
        ),
        pytest.param(
            {},
            {"scheduler": ReduceLROnPlateau, "scheduler_args": {"patience": 0}},
            "scheduler: checkpoint StepLR, current ReduceLROnPlateau; "
            "scheduler_args: checkpoint {.*}, current {'patience': 0}",
            id="scheduler",
        ),
    ],
)
def test_checkpoint_with_different_settings_is_rejected(small, tmp_path, change, recipe_change, differences):
    path = tmp_path / "run.pt"
    train(path, small(40), epochs=2)
    before = path.read_bytes()
    settings = {"epochs": 2} | change
    remedy = "use the checkpoint's settings, or set RESUME = False"
    message = f"run.pt was created with different settings .{differences}.: {remedy}$"
    with pytest.raises(ValueError, match=f"^.*{message}"):
        train(path, small(40), replace(STEP, **recipe_change), **settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("here", "there"),
    [
        pytest.param({"note": 1}, {}, id="not in the file"),
        pytest.param({}, {"note": 1}, id="only in the file"),
    ],
)
def test_setting_that_only_one_side_has_is_a_difference(tmp_path, here, there):
    path = tmp_path / "run.pt"
    old = Parts()
    old.settings |= there
    old.run(path)
    new = Parts()
    new.settings |= here
    message = f"note: checkpoint {there.get('note')}, current {here.get('note')}"
    with pytest.raises(ValueError, match=message):
        new.run(path, resume=True)


def test_checkpoint_of_another_version_of_the_code_is_rejected(tmp_path):
    """The settings are equal, but the network has other layers."""
    path = tmp_path / "run.pt"
    fresh_run(path)
    before = path.read_bytes()
    parts = Parts()
    parts.model.extra = nn.Linear(3, 3)
    message = r"^.*run.pt was created by a different version of the code \(.*\): set RESUME = False$"
    with pytest.raises(ValueError, match=message):
        parts.run(path, resume=True)
    assert path.read_bytes() == before


# ---- corrupted and foreign files ----


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def assert_rejected(path):
    """Check that a file is not resumed from, and that the message names it and the remedy."""
    before = path.read_bytes()
    name = re.escape(str(path))
    message = rf"^{name} is not a valid checkpoint \(\w+\): delete it, or train first$"
    with pytest.raises(ValueError, match=message):
        Parts().run(path, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>", id="an HTML page"),
        pytest.param(b"PK\x03\x04", id="start of a ZIP file"),
    ],
)
def test_file_of_another_kind_is_rejected(tmp_path, content):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    assert_rejected(path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_checkpoint_is_rejected(tmp_path, share):
    path = tmp_path / "run.pt"
    fresh_run(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_rejected(path)


def test_checkpoint_with_a_changed_byte_is_rejected(tmp_path):
    """Change a byte in the weights of the first layer."""
    path = tmp_path / "run.pt"
    parts = Parts()
    parts.run(path)
    content = path.read_bytes()
    weights = next(parts.model.parameters()).detach().numpy().tobytes()
    position = content.index(weights) + 2
    changed = content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]
    path.write_bytes(changed)
    assert_rejected(path)


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"model": {}}, id="weights only"),
        pytest.param([1, 2], id="a list"),
    ],
)
def test_foreign_checkpoint_is_rejected(tmp_path, state):
    path = tmp_path / "run.pt"
    torch.save(state, path)
    assert_rejected(path)


@pytest.mark.parametrize("name", ["model", "optimizer", "scheduler", "settings", "history"])
@pytest.mark.parametrize("value", [1, None, [1], "text"], ids=["number", "None", "list", "text"])
def test_checkpoint_with_a_foreign_entry_is_rejected(tmp_path, name, value):
    path = tmp_path / "run.pt"
    fresh_run(path)
    state = utils.read_checkpoint(path)
    state[name] = value
    torch.save(state, path)
    assert_rejected(path)


@pytest.mark.parametrize("name", ["model", "optimizer", "scheduler", "settings", "history"])
def test_checkpoint_without_an_entry_is_rejected(tmp_path, name):
    path = tmp_path / "run.pt"
    fresh_run(path)
    state = utils.read_checkpoint(path)
    del state[name]
    torch.save(state, path)
    assert_rejected(path)


def test_checkpoint_with_a_foreign_history_is_rejected(tmp_path):
    path = tmp_path / "run.pt"
    fresh_run(path)
    state = utils.read_checkpoint(path)
    state["history"] = {"losses": []}
    torch.save(state, path)
    assert_rejected(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the code would create its folder
    path = tmp_path / "run.pt"
    torch.save(Malicious(), path)
    assert_rejected(path)
    assert not (tmp_path / "made").exists()


def test_code_in_an_entry_of_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.pt"
    fresh_run(path)
    state = utils.read_checkpoint(path)
    state["settings"]["data"] = Malicious()
    torch.save(state, path)
    assert_rejected(path)
    assert not (tmp_path / "made").exists()


def test_checkpoint_is_read_to_the_cpu(tmp_path):
    path = tmp_path / "run.pt"
    fresh_run(path)
    state = utils.read_checkpoint(path)
    assert list(state) == ["model", "optimizer", "scheduler", "settings", "history"]
    for value in state["model"].values():
        assert value.device.type == "cpu"


# ---- errors of the file system ----


def test_missing_checkpoint_is_reported(tmp_path):
    path = tmp_path / "none.pt"
    message = f"^there is no checkpoint at {re.escape(str(path))}: train first$"
    with pytest.raises(FileNotFoundError, match=message):
        utils.read_checkpoint(path)


def test_folder_in_place_of_a_checkpoint_names_the_problem(tmp_path):
    path = tmp_path / "run.pt"
    path.mkdir()
    message = f"^cannot read the checkpoint {re.escape(str(path))} .Is a directory.: "
    with pytest.raises(OSError, match=message) as error:
        Parts().run(path, resume=True)
    assert "delete" not in str(error.value)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(errno.EACCES, id="no permission"),
        pytest.param(errno.EIO, id="I/O error"),
        pytest.param(errno.ENOTCONN, id="lost mount"),
    ],
)
def test_checkpoint_that_cannot_be_read_names_the_problem(tmp_path, monkeypatch, number):
    """The superuser may read every file, so the error is simulated."""
    path = tmp_path / "run.pt"
    fresh_run(path)
    reason = os.strerror(number)

    def fail(self):
        raise OSError(number, reason, str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    message = f"^cannot read the checkpoint {re.escape(str(path))} .{reason}.: .*$"
    with pytest.raises(OSError, match=message) as error:
        Parts().run(path, resume=True)
    assert "delete" not in str(error.value)


def test_lack_of_memory_is_no_fault_of_the_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    fresh_run(path)

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(utils.torch, "load", fail)
    with pytest.raises(MemoryError):
        utils.read_checkpoint(path)


@contextlib.contextmanager
def file_size_limit(size):
    """Limit the files that this process writes to size bytes, so that a write fails midway.

    The limit holds for pytest's own output too, where that goes to a file. It must end before the test does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_failed_save_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    run = fresh_run(path)
    before = path.read_bytes()
    message = f"^cannot write the checkpoint {re.escape(str(path))} .File too large.: free disk space, .*$"
    with file_size_limit(len(before) // 2), pytest.raises(OSError, match=message):
        record_epoch(run)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]  # without the partial file


def test_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    run = fresh_run(path)
    before = path.read_bytes()

    def fail(partial, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))

    monkeypatch.setattr(os, "replace", fail)
    message = f"^cannot write the checkpoint {re.escape(str(path))} .No space left on device.: .*$"
    with pytest.raises(OSError, match=message):
        record_epoch(run)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_at_the_start_of_a_new_run_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    record_epoch(fresh_run(path))
    before = path.read_bytes()
    with file_size_limit(len(before) // 2), pytest.raises(OSError, match="^cannot write the checkpoint "):
        fresh_run(path)
    contents = [file.read_bytes() for file in tmp_path.iterdir()]
    assert contents == [before]


def test_run_can_be_resumed_after_a_failed_save(uninterrupted, small, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    calls = []
    real_test = utils.test
    full_disk = contextlib.ExitStack()

    def fill_disk_in_epoch_3(*args):
        calls.append(args)
        if len(calls) == 3:
            full_disk.enter_context(file_size_limit(10_000))
        return real_test(*args)

    with monkeypatch.context() as patch, full_disk:
        patch.setattr(utils, "test", fill_disk_in_epoch_3)
        with pytest.raises(OSError, match="^cannot write the checkpoint "):
            train(path, small(IMAGES))
    train(path, small(IMAGES))
    assert_identical(utils.read_checkpoint(path), uninterrupted["StepLR"])


def test_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    path = tmp_path / "file" / "run.pt"
    message = (
        f"^cannot write the checkpoint {re.escape(str(path))} .*or set S7_CHECKPOINTS to another folder$"
    )
    with pytest.raises(OSError, match=message):
        fresh_run(path)


def test_checkpoint_that_cannot_be_moved_is_reported(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    record_epoch(fresh_run(path))
    before = path.read_bytes()

    def fail(*args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="^cannot write the checkpoint .*run.pt .Permission denied.: "):
        fresh_run(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- two processes and one path ----


def test_save_of_another_run_in_the_midst_of_a_save_does_no_damage(tmp_path, monkeypatch):
    """One run saves completely between the other's writing and its renaming of the partial file."""
    path = tmp_path / "run.pt"
    first = fresh_run(path)
    second = Parts().run(path, resume=True)
    record_epoch(second, accuracy=60.0)
    real_replace = os.replace

    def save_second_before(partial, target):
        monkeypatch.setattr(os, "replace", real_replace)
        record_epoch(second, accuracy=70.0)
        real_replace(partial, target)

    monkeypatch.setattr(os, "replace", save_second_before)
    record_epoch(first, accuracy=80.0)
    assert utils.read_checkpoint(path)["history"]["test_acc"] == [80.0]
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_that_save_to_one_path_do_no_damage(uninterrupted, small, tmp_path):
    """Read the checkpoint again and again while both train."""
    path = tmp_path / "run.pt"
    fresh_run_of_full_length = Parts(EPOCHS)
    fresh_run_of_full_length.run(path)
    running = [start(path, small(IMAGES)), start(path, small(IMAGES))]
    reads = 0
    while any(process.is_alive() for process in running):
        utils.read_checkpoint(path)
        reads += 1
    for process in running:
        process.join()
        assert process.exitcode == 0
    assert reads > 0
    assert_identical(utils.read_checkpoint(path), uninterrupted["StepLR"])

"""Runs that are interrupted, killed, resumed or refused: the checkpoint is always a completed epoch's."""

import contextlib
import copy
import itertools
import multiprocessing
import os
import random
import re
import resource
import signal
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_identical
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop, lr_scheduler

import utils

MOMENTUM = partial(SGD, lr=0.1, momentum=0.9)
HALVING = partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)
PLATEAU = partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=9)  # reduces the rate in every epoch
ROTATION = partial(utils.random_affine, degrees=10, shift=0, scale=0)
SHIFT = partial(utils.random_affine, degrees=0, shift=0.1, scale=0)


class Parts:
    """What a training cell creates: a network that trains within milliseconds, and what it trains with."""

    def __init__(
        self,
        dropout=0.2,
        optimizer=MOMENTUM,
        scheduler=HALVING,
        criterion=F.nll_loss,
        images=40,
        batch_size=20,
        shuffle=True,
        augmentation=None,
        augmented_epochs=1,
        seed=1,
    ):
        torch.manual_seed(seed)
        layers = [nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        self.model = nn.Sequential(*layers, nn.Linear(8, 10), nn.LogSoftmax(dim=1))
        self.optimizer = optimizer(self.model.parameters())
        self.scheduler = scheduler(self.optimizer)
        self.criterion = criterion
        torch.manual_seed(0)
        pixels = torch.randint(256, (images, 28, 28), dtype=torch.uint8)
        digits = utils.DigitSet("digits", pixels, torch.arange(images) % 10)
        self.train_loader = utils.BatchLoader(
            digits, batch_size, "cpu", shuffle, augmentation, augmented_epochs
        )
        self.test_loader = utils.BatchLoader(digits, batch_size, "cpu")
        self.seed = seed

    def run(self, path, epochs=2, resume=False):
        trained = (self.model, self.optimizer, self.scheduler, self.train_loader, self.criterion)
        return utils.Run(path, *trained, epochs, self.seed, resume)

    def train(self, run, epochs=None):
        """Train as the notebook does, for at most `epochs` of the remaining epochs."""
        for epoch in itertools.islice(run.remaining_epochs(), epochs):
            self.train_loader.set_epoch(epoch)
            train_loss, train_acc = utils.train(
                self.model, "cpu", self.train_loader, self.optimizer, self.criterion
            )
            test_loss, test_acc = utils.test(self.model, "cpu", self.test_loader, self.criterion)
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(test_loss)
            else:
                self.scheduler.step()
            run.record(train_loss, train_acc, test_loss, test_acc)

    def state(self):
        """Return a copy of all that a checkpoint restores, except for the history."""
        state = [self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()]
        return copy.deepcopy(state)


def train(path, epochs=2, **options):
    """Train a run to its end, resuming from `path` if it exists; return its parts."""
    parts = Parts(**options)
    parts.train(parts.run(path, epochs, resume=True))
    return parts


def train_in_pieces(path, epochs, **options):
    """Train a run that is resumed, with new parts, after every epoch."""
    for _ in range(epochs):
        parts = Parts(**options)
        parts.train(parts.run(path, epochs, resume=True), epochs=1)


def record_epoch(run):
    """Complete the next epoch of a run, without training."""
    next(run.remaining_epochs())
    run.record(1.0, 50.0, 1.0, 50.0)


def completed_epochs(path):
    return len(utils.load_checkpoint(path)["history"]["test_acc"])


# ---- interruptions ----

EPOCHS = 6
BATCHES = 30  # per epoch
STEP_RUN = dict(images=20 * BATCHES, augmentation=SHIFT, augmented_epochs=4)
PLATEAU_RUN = STEP_RUN | dict(scheduler=PLATEAU)
RUNS = {"StepLR": STEP_RUN, "ReduceLROnPlateau": PLATEAU_RUN}

# The fork server has already imported what takes long, so a child starts within milliseconds and a kill
# hits training rather than imports.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "matplotlib.pyplot", "torchinfo", "torchvision", "utils"])


def train_in_child(path, options, written):
    """Train in a child process.

    With `written`, the process kills itself during its third save, after writing that share of the file.
    """
    torch.set_num_threads(1)  # as in this process: results depend, in the last bits, on the thread count
    saves = []
    real_replace = os.replace

    def kill_during_third_save(unfinished, target):
        saves.append(target)
        if written is not None and len(saves) == 3:
            os.truncate(unfinished, int(written * os.path.getsize(unfinished)))
            os.kill(os.getpid(), signal.SIGKILL)
        real_replace(unfinished, target)

    os.replace = kill_during_third_save
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    train(path, EPOCHS, **options)


def start(path, options=STEP_RUN, written=None):
    process = processes.Process(target=train_in_child, args=(path, options, written))
    process.start()
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the checkpoints of uninterrupted runs, one per scheduler, and the time that one run takes."""
    states = {}
    for name, options in RUNS.items():
        path = tmp_path_factory.mktemp("uninterrupted") / "run.pt"
        start_time = time.perf_counter()
        start(path, options).join()
        states["seconds"] = time.perf_counter() - start_time
        states[name] = utils.load_checkpoint(path)
        assert completed_epochs(path) == EPOCHS
    return states


@pytest.mark.parametrize("scheduler", RUNS)
def test_run_killed_at_random_moments_completes_bit_identically(uninterrupted, tmp_path, scheduler):
    """Send SIGKILL ten times at random moments, then let the run finish."""
    generator = random.Random(1)
    kills = 0
    while kills < 10:
        path = tmp_path / f"run{kills}.pt"
        interrupted = True
        while interrupted:
            process = start(path, RUNS[scheduler])
            process.join(generator.uniform(0.02, uninterrupted["seconds"]))
            interrupted = process.is_alive()
            if interrupted:
                kills += 1
            process.kill()
            process.join()
        assert_identical(utils.load_checkpoint(path), uninterrupted[scheduler])


@pytest.mark.parametrize("written", [0.5, 1.0])
def test_checkpoint_survives_a_kill_during_saving(uninterrupted, tmp_path, written):
    path = tmp_path / "run.pt"
    for epochs in (1, 3, 5):  # the first process also saves the initial state
        process = start(path, written=written)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert completed_epochs(path) == epochs
    start(path).join()
    assert_identical(utils.load_checkpoint(path), uninterrupted["StepLR"])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("module", "function", "call", "completed"),
    [
        pytest.param(utils, "GetCorrectPredCount", 2, 0, id="first epoch"),
        pytest.param(utils, "GetCorrectPredCount", 4 * BATCHES + 3, 2, id="training"),
        pytest.param(utils, "GetCorrectPredCount", 5 * BATCHES + 4, 2, id="evaluation"),
        pytest.param(os, "replace", 3, 1, id="saving"),
    ],
)
def test_run_resumes_bit_identically_after_ctrl_c(
    uninterrupted, tmp_path, monkeypatch, module, function, call, completed
):
    """Interrupt the loop in a call of a function and run it again.

    A batch is one call of `GetCorrectPredCount`; an epoch has as many test as training batches.
    """
    path = tmp_path / "run.pt"
    calls = []
    real_function = getattr(module, function)

    def interrupt(*args):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return real_function(*args)

    monkeypatch.setattr(module, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(path, EPOCHS, **STEP_RUN)
    assert completed_epochs(path) == completed
    assert list(tmp_path.iterdir()) == [path]
    train(path, EPOCHS, **STEP_RUN)
    assert_identical(utils.load_checkpoint(path), uninterrupted["StepLR"])


@pytest.mark.parametrize("function", ["train", "test"])
def test_non_finite_loss_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, function):
    """The weights become NaN in epoch 3, before training or before evaluation."""
    path = tmp_path / "run.pt"
    states = []
    real_function = getattr(utils, function)

    def poison(model, *args):
        states.append(utils.load_checkpoint(path))
        if len(states) == 3:
            next(model.parameters()).data.fill_(float("nan"))
        return real_function(model, *args)

    monkeypatch.setattr(utils, function, poison)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        train(path, EPOCHS)
    state = utils.load_checkpoint(path)
    assert completed_epochs(path) == 2
    assert_identical(state, states[2])
    for value in state["model"].values():
        assert value.isfinite().all()


# ---- any optimizer and scheduler ----


def inverse_decay(epoch):
    return 1 / (1 + epoch)


def exponential_decay(epoch):
    return 0.5**epoch


def numpy_decay(epoch):
    return np.exp(-epoch)


def power(base, epoch):
    return base**epoch


def warm_up_then_step(optimizer):
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
    step = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, step], milestones=[2])


def product(optimizer):
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
    return lr_scheduler.ChainedScheduler([warm_up, HALVING(optimizer)], optimizer)


def two_groups(parameters):
    """Return an optimizer with another learning rate for the last layer."""
    parameters = list(parameters)
    groups = [{"params": parameters[:-2]}, {"params": parameters[-2:], "lr": 0.01}]
    return SGD(groups, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(optimizer=partial(SGD, lr=0.1)), id="SGD without momentum"),
        pytest.param(dict(optimizer=two_groups), id="two parameter groups"),
        pytest.param(dict(optimizer=partial(Adam, lr=0.01)), id="Adam"),
        pytest.param(dict(optimizer=partial(AdamW, lr=0.01, amsgrad=True)), id="AdamW"),
        pytest.param(dict(optimizer=partial(RMSprop, lr=0.01, momentum=0.5)), id="RMSprop"),
        pytest.param(dict(optimizer=partial(Adagrad, lr=0.1)), id="Adagrad"),
        pytest.param(dict(scheduler=HALVING), id="StepLR"),
        pytest.param(
            dict(scheduler=partial(lr_scheduler.CosineAnnealingLR, T_max=5)), id="CosineAnnealingLR"
        ),
        pytest.param(dict(scheduler=PLATEAU), id="plateau"),
        pytest.param(dict(scheduler=partial(lr_scheduler.LambdaLR, lr_lambda=inverse_decay)), id="LambdaLR"),
        pytest.param(
            dict(scheduler=partial(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=5)), id="OneCycleLR"
        ),
        pytest.param(dict(scheduler=warm_up_then_step), id="SequentialLR"),
        pytest.param(dict(scheduler=product), id="ChainedScheduler"),
        pytest.param(dict(scheduler=partial(lr_scheduler.LambdaLR, lr_lambda=numpy_decay)), id="NumPy rates"),
        pytest.param(dict(augmentation=SHIFT, augmented_epochs=2), id="augmentation"),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, options):
    train(tmp_path / "whole.pt", epochs=4, **options)
    train_in_pieces(tmp_path / "pieces.pt", epochs=4, **options)
    pieces = utils.load_checkpoint(tmp_path / "pieces.pt")
    assert_identical(pieces, utils.load_checkpoint(tmp_path / "whole.pt"))
    assert len(pieces["history"]["seconds"]) == 4


def test_finished_run_restores_its_network_and_trains_no_more(tmp_path):
    path = tmp_path / "run.pt"
    finished = train(path)
    before = path.read_bytes()
    parts = Parts()
    run = parts.run(path, resume=True)
    assert list(run.remaining_epochs()) == []
    assert_identical(parts.state(), finished.state())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_finished_run_continues_with_more_epochs(tmp_path):
    train(tmp_path / "whole.pt", epochs=4)
    train(tmp_path / "run.pt", epochs=2)
    parts = Parts()
    parts.train(parts.run(tmp_path / "run.pt", epochs=4, resume=True))
    longer = utils.load_checkpoint(tmp_path / "run.pt")
    assert_identical(longer, utils.load_checkpoint(tmp_path / "whole.pt"))


def test_fewer_epochs_than_completed_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    train(path, epochs=3)
    with pytest.raises(ValueError, match=re.escape(str(path)) + " has 3 .* EPOCHS"):
        Parts().run(path, epochs=2, resume=True)


# ---- a run is what is really trained ----

ADAM = dict(optimizer=partial(Adam, lr=0.1))
ADAMW = dict(optimizer=partial(AdamW, lr=0.1))
COSINE_2 = dict(scheduler=partial(lr_scheduler.CosineAnnealingLR, T_max=2))
COSINE_4 = dict(scheduler=partial(lr_scheduler.CosineAnnealingLR, T_max=4))
INVERSE = dict(scheduler=partial(lr_scheduler.LambdaLR, lr_lambda=inverse_decay))
EXPONENTIAL = dict(scheduler=partial(lr_scheduler.LambdaLR, lr_lambda=exponential_decay))
POWER = dict(scheduler=partial(lr_scheduler.LambdaLR, lr_lambda=partial(power, 0.5)))
OTHER_POWER = dict(scheduler=partial(lr_scheduler.LambdaLR, lr_lambda=partial(power, 0.7)))
SMOOTH = dict(criterion=partial(F.cross_entropy, label_smoothing=0.1))
SMOOTHER = dict(criterion=partial(F.cross_entropy, label_smoothing=0.2))
ROTATED = dict(augmentation=ROTATION)
SHIFTED = dict(augmentation=SHIFT)
SHIFTED_LONGER = dict(augmentation=SHIFT, augmented_epochs=2)


@pytest.mark.parametrize(
    ("saved", "edited", "there", "here"),
    [
        pytest.param({}, dict(optimizer=partial(MOMENTUM, lr=0.2)), "lr=0.1", "lr=0.2", id="learning rate"),
        pytest.param({}, ADAM, "SGD(", "Adam(", id="SGD to Adam"),
        pytest.param(ADAM, {}, "Adam(", "SGD(", id="Adam to SGD"),
        pytest.param(ADAMW, {}, "AdamW(", "SGD(", id="AdamW to SGD"),
        pytest.param(dict(optimizer=two_groups), {}, "lr=0.01", "SGD(lr=0.1", id="two groups to one"),
        pytest.param({}, COSINE_2, "StepLR(", "CosineAnnealingLR(", id="scheduler"),
        pytest.param(COSINE_2, COSINE_4, "T_max=2", "T_max=4", id="length of the schedule"),
        pytest.param(INVERSE, EXPONENTIAL, "inverse_decay", "exponential_decay", id="function of a schedule"),
        pytest.param(POWER, OTHER_POWER, "power(0.5)", "power(0.7)", id="argument of a schedule's function"),
        pytest.param({}, dict(criterion=F.cross_entropy), "nll_loss", "cross_entropy", id="loss"),
        pytest.param(SMOOTH, SMOOTHER, "label_smoothing=0.1", "label_smoothing=0.2", id="option of the loss"),
        pytest.param(dict(dropout=0), {}, "network", "Dropout(p=0.2", id="dropout added"),
        pytest.param({}, dict(images=38), "40 images", "38 images", id="fewer images"),
        pytest.param(dict(shuffle=False), {}, "batches of 20", "shuffled", id="order"),
        pytest.param({}, dict(batch_size=10), "batches of 20", "batches of 10", id="batch size"),
        pytest.param(ROTATED, SHIFTED, "degrees=10", "shift=0.1", id="augmentation"),
        pytest.param(SHIFTED, SHIFTED_LONGER, "epoch 1", "epoch 2", id="end of the augmentation"),
        pytest.param({}, dict(seed=2), "seed: checkpoint 1", "2", id="seed"),
    ],
)
def test_edited_run_is_refused_before_anything_changes(tmp_path, saved, edited, there, here):
    path = tmp_path / "run.pt"
    train(path, **saved)
    file_before = path.read_bytes()
    parts = Parts(**edited)
    before = parts.state()
    with pytest.raises(ValueError) as error:
        parts.run(path, resume=True)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "RESUME" in message
    assert "\n" not in message
    in_checkpoint, current = message.split(", current ")  # a single difference
    assert there in in_checkpoint
    assert here in current
    assert_identical(parts.state(), before)
    assert path.read_bytes() == file_before


def test_line_that_occurs_more_often_is_named():
    saved = {"network": "(a): block(\n  ReLU()\n)\n(b): block(\n)"}
    current = {"network": "(a): block(\n  ReLU()\n)\n(b): block(\n  ReLU()\n)"}
    assert utils.list_differences(saved, current) == ["network: checkpoint , current ReLU()"]


def test_all_differences_are_named(tmp_path):
    train(tmp_path / "run.pt")
    parts = Parts(batch_size=10, criterion=F.cross_entropy, seed=2)
    with pytest.raises(ValueError, match="data: .*; loss: .*; seed: "):
        parts.run(tmp_path / "run.pt", resume=True)


class Negative:
    """An augmentation that Python prints with its address in memory."""

    def __call__(self, data):
        return -data


def test_address_in_memory_is_no_difference(tmp_path):
    first = Negative()
    second = Negative()
    train(tmp_path / "run.pt", augmentation=first)
    run = Parts(augmentation=second).run(tmp_path / "run.pt", resume=True)
    assert repr(first) != repr(second)
    assert run.history.completed == 2


def test_what_is_trained_is_printed_before_the_first_epoch(tmp_path, capsys):
    train(tmp_path / "run.pt", augmentation=ROTATION, augmented_epochs=1)
    before, *_ = capsys.readouterr().out.partition("EPOCH: 1\n")
    parameters = 784 * 8 + 8 + 2 * 8 + 8 * 10 + 10
    assert f"{parameters:,} parameters" in before
    assert "digits, 40 images in batches of 20" in before
    assert "random_affine(degrees=10) until epoch 1" in before
    assert "SGD(lr=0.1, momentum=0.9)" in before
    assert "StepLR(step_size=1, gamma=0.5)" in before
    assert "nll_loss, seed 1, until epoch 2" in before


@pytest.mark.parametrize("optimizer", [MOMENTUM, partial(Adam, lr=0.01)], ids=["SGD", "Adam"])
@pytest.mark.parametrize("resume", [False, True])
def test_used_optimizer_is_refused(tmp_path, optimizer, resume):
    path = tmp_path / "run.pt"
    train(path, optimizer=optimizer)
    before = path.read_bytes()
    parts = Parts(optimizer=optimizer)
    utils.train(parts.model, "cpu", parts.train_loader, parts.optimizer, parts.criterion)
    with pytest.raises(ValueError, match="optimizer .* used: .* again"):
        parts.run(path, resume=resume)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore")  # PyTorch expects a step of the optimizer before
def test_used_scheduler_is_refused(tmp_path):
    parts = Parts()
    parts.scheduler.step()
    with pytest.raises(ValueError, match="scheduler .* used: .* again"):
        parts.run(tmp_path / "run.pt")


# ---- epochs and history ----


def test_every_epoch_has_its_own_seed(tmp_path):
    numbers = []
    for seed in (1, 1, 2):
        run = Parts(seed=seed).run(tmp_path / "run.pt")
        for _ in run.remaining_epochs():
            numbers.append(torch.rand(1).item())
            run.record(1.0, 50.0, 1.0, 50.0)
    assert numbers[0:2] == numbers[2:4]
    assert len(set(numbers)) == 4


def test_results_are_appended_to_the_history(tmp_path, capsys):
    """The learning rate is that of the start of the epoch."""
    parts = Parts()
    run = parts.run(tmp_path / "run.pt")
    capsys.readouterr()
    for epoch in run.remaining_epochs():
        parts.optimizer.param_groups[0]["lr"] = 0.01
        run.record(4.0 / epoch, 90.0 + epoch, 2.0 / epoch, 95.0 + epoch)
    assert capsys.readouterr().out == "EPOCH: 1\nEPOCH: 2\n"
    assert run.history == utils.History([4.0, 2.0], [91.0, 92.0], [2.0, 1.0], [96.0, 97.0], [0.1, 0.01])
    assert run.history.completed == 2
    assert min(run.history.seconds) > 0


def test_resuming_without_a_checkpoint_starts_from_scratch_and_says_so(tmp_path, capsys):
    path = tmp_path / "none.pt"
    run = Parts().run(path, resume=True)
    assert str(path) in capsys.readouterr().out
    assert list(run.remaining_epochs()) == [1, 2]


def test_missing_folders_are_created(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    Parts().run("~/a/b/run.pt")
    assert (tmp_path / "a" / "b" / "run.pt").exists()
    assert completed_epochs("~/a/b/run.pt") == 0


# ---- earlier checkpoints ----


def test_finished_run_survives_new_runs(tmp_path):
    path = tmp_path / "run.pt"
    train(path)
    finished = path.read_bytes()
    record_epoch(Parts().run(path))  # stopped early
    Parts().run(path)  # stopped in its first epoch
    record_epoch(Parts().run(path))
    assert (tmp_path / "run.previous-1.pt").read_bytes() == finished
    assert completed_epochs(tmp_path / "run.previous-2.pt") == 1
    assert completed_epochs(tmp_path / "run.previous-3.pt") == 0
    assert completed_epochs(path) == 1


# ---- damaged and foreign files ----


def assert_refused(path):
    """Check that a file is not resumed from, that nothing changes, and that the message is one line."""
    file_before = path.read_bytes()
    parts = Parts()
    before = parts.state()
    message = rf"^{re.escape(str(path))} is not a checkpoint.*RESUME = False$"
    with pytest.raises(ValueError, match=message) as error:
        parts.run(path, resume=True)
    assert "\n" not in str(error.value)
    assert_identical(parts.state(), before)
    assert path.read_bytes() == file_before


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04"])
def test_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    assert_refused(path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "run.pt"
    Parts().run(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(path)


def flip(content, position):
    """Return bytes with one bit changed."""
    return content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]


def test_changed_byte_never_changes_what_is_loaded(tmp_path):
    """The file contains padding, where a change does no harm."""
    path = tmp_path / "run.pt"
    train(path)
    content = path.read_bytes()
    state = utils.load_checkpoint(path)
    refused = 0
    for position in range(0, len(content), len(content) // 200):
        path.write_bytes(flip(content, position))
        try:
            assert_identical(utils.load_checkpoint(path), state)
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("state", [{"weight": torch.zeros(2)}, [1, 2]], ids=["weights only", "a list"])
def test_foreign_checkpoint_is_refused(tmp_path, state):
    path = tmp_path / "run.pt"
    torch.save(state, path)
    assert_refused(path)


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the code would create its folder
    path = tmp_path / "run.pt"
    Parts().run(path)
    state = utils.load_checkpoint(path)
    state["description"]["data"] = Malicious()
    torch.save(state, path)
    assert_refused(path)
    assert not (tmp_path / "made").exists()


def test_checkpoint_of_a_gpu_is_read_to_the_cpu(tmp_path):
    """The place of every tensor is text in the file: turn the CPU into a GPU there."""
    path = tmp_path / "run.pt"
    parts = train(tmp_path / "cpu.pt")
    cpu = b"X\x03\x00\x00\x00cpu"  # a text of three characters in a pickle
    gpu = b"X\x06\x00\x00\x00cuda:0"
    with zipfile.ZipFile(tmp_path / "cpu.pt") as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert cpu in content
                content = content.replace(cpu, gpu)
            target.writestr(name, content)
    assert_identical(utils.load_checkpoint(path), utils.load_checkpoint(tmp_path / "cpu.pt"))
    resumed = Parts()
    resumed.run(path, resume=True)
    assert_identical(resumed.state(), parts.state())


# ---- errors of the file system ----


@contextlib.contextmanager
def file_size_limit(size):
    """Limit the files that this process writes to `size` bytes, so that a write fails midway.

    The limit holds for pytest's own output too, where that goes to a file: nothing is printed meanwhile.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


real_save = utils.save_checkpoint


def save_on_a_full_disk(path, state):
    with file_size_limit(10_000):
        real_save(path, state)


def test_run_resumes_bit_identically_after_the_disk_was_full(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    parts = Parts()
    run = parts.run(path)
    parts.train(run, epochs=1)
    before = path.read_bytes()
    message = f"^cannot write .*{re.escape(str(path))} .*disk.*CHECKPOINTS.*$"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
        patch.setattr(utils, "save_checkpoint", save_on_a_full_disk)
        parts.train(run)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]  # without the unfinished file

    train(path)
    train(tmp_path / "whole.pt")
    assert_identical(utils.load_checkpoint(path), utils.load_checkpoint(tmp_path / "whole.pt"))


def test_full_disk_at_the_start_of_a_new_run_keeps_the_finished_one(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    train(path)
    before = path.read_bytes()
    monkeypatch.setattr(utils, "save_checkpoint", save_on_a_full_disk)
    with pytest.raises(OSError, match="^cannot write "):
        Parts().run(path)
    contents = [file.read_bytes() for file in tmp_path.iterdir()]
    assert contents == [before]


def test_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    path = tmp_path / "file" / "run.pt"
    with pytest.raises(OSError, match=f"^cannot write .*{re.escape(str(path))} .*CHECKPOINTS.*$"):
        Parts().run(path)

"""Runs that are interrupted, killed, resumed or refused: the checkpoint is always a completed epoch's."""

import contextlib
import copy
import errno
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
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_identical
from torch import nn
from torch.optim.lr_scheduler import StepLR

import utils

SHIFT = partial(utils.random_affine, degrees=0, shift=0.1, scale=0)


class Parts:
    """What a training cell creates: a network that trains within milliseconds, and what it trains with."""

    def __init__(self, images=40, lr=0.1):
        torch.manual_seed(1)
        layers = [nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)]
        self.model = nn.Sequential(*layers, nn.Linear(8, 10), nn.LogSoftmax(dim=1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.scheduler = StepLR(self.optimizer, step_size=1, gamma=0.5)
        pixels = torch.randint(256, (images, 28, 28), dtype=torch.uint8)
        digits = utils.DigitSet("digits", pixels, torch.arange(images) % 10)
        self.train_loader = utils.BatchLoader(digits, 20, "cpu", shuffle=True, augmentation=SHIFT)
        self.test_loader = utils.BatchLoader(digits, 20, "cpu")

    def run(self, path, epochs=2, seed=1, resume=False):
        return utils.Run(
            path,
            self.model,
            self.optimizer,
            self.scheduler,
            self.train_loader,
            self.test_loader,
            F.nll_loss,
            epochs,
            seed,
            augmented_epochs=4,
            resume=resume,
        )

    def train(self, run, epochs=None):
        """Train as the notebook does, for at most `epochs` of the remaining epochs."""
        for epoch in itertools.islice(run.remaining_epochs(), epochs):
            if epoch > 4:
                self.train_loader.augmentation = None
            results = utils.train(self.model, "cpu", self.train_loader, self.optimizer, F.nll_loss)
            test_results = utils.test(self.model, "cpu", self.test_loader, F.nll_loss)
            self.scheduler.step()
            run.record(*results, *test_results)

    def state(self):
        """Return a copy of all that a checkpoint restores, except for the history."""
        return copy.deepcopy(
            [self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()]
        )


def train(path, epochs=2, images=40):
    """Train a run to its end, resuming from `path` if it exists; return its parts."""
    parts = Parts(images)
    parts.train(parts.run(path, epochs, resume=True))
    return parts


def record_epoch(run):
    """Complete the next epoch of a run, without training."""
    next(run.remaining_epochs())
    run.record(1.0, 50.0, 1.0, 50.0)


def completed_epochs(path):
    return len(utils.load_checkpoint(path)["history"]["test_acc"])


# ---- interruptions ----

EPOCHS = 6
BATCHES = 30  # per epoch

# The fork server has already imported what takes long, so a child starts within milliseconds and a kill
# hits training rather than imports.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "torchvision", "utils"])


def train_in_child(path, written):
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
    train(path, EPOCHS, images=20 * BATCHES)


def start(path, written=None):
    process = processes.Process(target=train_in_child, args=(path, written))
    process.start()
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the checkpoint of an uninterrupted run."""
    path = tmp_path_factory.mktemp("uninterrupted") / "run.pt"
    start(path).join()
    assert completed_epochs(path) == EPOCHS
    return utils.load_checkpoint(path)


def test_run_killed_at_random_moments_completes_bit_identically(uninterrupted, tmp_path):
    """Send SIGKILL at random moments until ten have hit, then let the run finish."""
    generator = random.Random(1)
    seconds = sum(uninterrupted["history"]["seconds"])
    kills = 0
    while kills < 10:
        path = tmp_path / f"run{kills}.pt"
        interrupted = True
        while interrupted:
            process = start(path)
            process.join(generator.uniform(0.02, 2 * seconds))
            interrupted = process.is_alive()
            if interrupted:
                kills += 1
            process.kill()
            process.join()
        assert_identical(utils.load_checkpoint(path), uninterrupted)


@pytest.mark.parametrize("written", [0.5, 1.0])
def test_checkpoint_survives_a_kill_during_saving(uninterrupted, tmp_path, written):
    path = tmp_path / "run.pt"
    for epochs in (2, 4):
        process = start(path, written=written)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert completed_epochs(path) == epochs
    start(path).join()
    assert_identical(utils.load_checkpoint(path), uninterrupted)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("module", "function", "call", "completed"),
    [
        pytest.param(utils, "GetCorrectPredCount", 2, 0, id="first epoch"),
        pytest.param(utils, "GetCorrectPredCount", 4 * BATCHES + 3, 2, id="training"),
        pytest.param(utils, "GetCorrectPredCount", 5 * BATCHES + 4, 2, id="evaluation"),
        pytest.param(os, "replace", 2, 1, id="saving"),
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
        train(path, EPOCHS, images=20 * BATCHES)
    assert len(list(tmp_path.iterdir())) == min(completed, 1)  # nothing is saved before an epoch is complete
    train(path, EPOCHS, images=20 * BATCHES)
    assert_identical(utils.load_checkpoint(path), uninterrupted)


@pytest.mark.parametrize("function", ["train", "test"])
def test_non_finite_loss_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, function):
    """The weights become NaN in epoch 3, before training or before evaluation."""
    path = tmp_path / "run.pt"
    models = []
    real_function = getattr(utils, function)

    def poison(model, *args):
        models.append(model)
        if len(models) == 3:
            next(model.parameters()).data.fill_(float("nan"))
        return real_function(model, *args)

    monkeypatch.setattr(utils, function, poison)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        train(path, EPOCHS)
    train(tmp_path / "good.pt", epochs=2)
    assert_identical(utils.load_checkpoint(path), utils.load_checkpoint(tmp_path / "good.pt"))


# ---- resumed or refused ----


def test_finished_run_restores_its_state_and_trains_no_more(tmp_path):
    path = tmp_path / "run.pt"
    finished = train(path)
    before = path.read_bytes()
    assert_identical(train(path).state(), finished.state())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_finished_run_continues_with_more_epochs_and_refuses_fewer(tmp_path):
    path = tmp_path / "run.pt"
    train(tmp_path / "whole.pt", epochs=3)
    train(path, epochs=2)
    train(path, epochs=3)
    assert_identical(utils.load_checkpoint(path), utils.load_checkpoint(tmp_path / "whole.pt"))
    with pytest.raises(ValueError, match=re.escape(str(path)) + " has 3 .* EPOCHS"):
        train(path, epochs=2)


def test_different_run_is_refused_before_anything_changes(tmp_path):
    path = tmp_path / "run.pt"
    train(path)
    file_before = path.read_bytes()
    parts = Parts(lr=0.2)
    before = parts.state()
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*RESUME = False$"):
        parts.run(path, resume=True)
    assert_identical(parts.state(), before)
    assert path.read_bytes() == file_before


def test_all_differences_are_counted_and_three_are_named():
    saved = {"a": "1", "b": "1", "c": "1", "d": "1", "e": "1"}
    current = {"a": "2", "b": "2", "c": "1", "d": "2", "e": "2"}
    text = utils.list_differences(saved, current)
    assert text == (
        "a: checkpoint 1, current 2; b: checkpoint 1, current 2; d: checkpoint 1, current 2; and 1 more"
    )


def test_address_in_memory_is_not_described():
    generators = [torch.Generator(), torch.Generator()]
    assert repr(generators[0]) != repr(generators[1])
    assert utils.describe({"generator": generators[0]}) == utils.describe({"generator": generators[1]})


def test_what_is_trained_is_printed_before_the_first_epoch(tmp_path, capsys):
    train(tmp_path / "run.pt")
    before, *_ = capsys.readouterr().out.partition("EPOCH: 1\n")
    parameters = 784 * 8 + 8 + 2 * 8 + 8 * 10 + 10
    assert f"Sequential with {parameters:,} parameters on digits, 2 batches" in before
    assert "random_affine(degrees=0, shift=0.1, scale=0) until epoch 4" in before
    assert (
        "SGD(lr=0.1, momentum=0.9), StepLR(step_size=1, gamma=0.5), nll_loss, seed 1, until epoch 2" in before
    )


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.Adam], ids=["SGD", "Adam"]
)
def test_used_optimizer_is_refused(tmp_path, optimizer):
    parts = Parts()
    parts.optimizer = optimizer(parts.model.parameters())
    parts.scheduler = None
    utils.train(parts.model, "cpu", parts.train_loader, parts.optimizer, F.nll_loss)
    with pytest.raises(ValueError, match="optimizer .* used: .* again"):
        parts.run(tmp_path / "run.pt")


@pytest.mark.filterwarnings("ignore")  # PyTorch expects a step of the optimizer before
def test_used_scheduler_is_refused(tmp_path):
    parts = Parts()
    parts.scheduler.step()
    with pytest.raises(ValueError, match="scheduler .* used: .* again"):
        parts.run(tmp_path / "run.pt")


# ---- epochs and history ----


def draw_torch():
    return torch.rand(1).item()


@pytest.mark.parametrize(
    "draw", [draw_torch, random.random, np.random.rand], ids=["torch", "random", "numpy"]
)
def test_every_epoch_has_its_own_seed(tmp_path, draw):
    numbers = []
    for seed in (1, 1, 2, 10**9 - 1):
        run = Parts().run(tmp_path / "run.pt", seed=seed)
        for _ in run.remaining_epochs():
            numbers.append(draw())
            run.record(1.0, 50.0, 1.0, 50.0)
    assert numbers[0:2] == numbers[2:4]
    assert len(set(numbers)) == 6


def test_results_are_appended_to_the_history(tmp_path, capsys):
    """The learning rate is that of the start of the epoch."""
    parts = Parts()
    run = parts.run(tmp_path / "run.pt")
    capsys.readouterr()
    for epoch in run.remaining_epochs():
        parts.optimizer.param_groups[0]["lr"] = 0.01
        run.record(4.0 / epoch, 90.0 + epoch, 2.0 / epoch, 95.0 + epoch)
    assert list(run.remaining_epochs()) == []
    assert capsys.readouterr().out == "EPOCH: 1\nEPOCH: 2\nAll 2 epochs are completed\n"
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
    record_epoch(Parts().run("~/a/b/run.pt"))
    assert (tmp_path / "a" / "b" / "run.pt").exists()
    assert completed_epochs("~/a/b/run.pt") == 1


# ---- earlier checkpoints ----


def test_finished_run_survives_new_runs(tmp_path):
    path = tmp_path / "run.pt"
    train(path)
    finished = path.read_bytes()
    Parts().run(path)  # stopped in its first epoch
    assert path.read_bytes() == finished
    record_epoch(Parts().run(path))  # stopped after its first epoch
    parts = Parts()
    parts.train(parts.run(path))
    assert (tmp_path / "run.previous-1.pt").read_bytes() == finished
    assert completed_epochs(tmp_path / "run.previous-2.pt") == 1
    assert completed_epochs(path) == 2
    assert len(list(tmp_path.iterdir())) == 3


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


@pytest.mark.parametrize("content", [b"", b"<html>"])
def test_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    assert_refused(path)


@pytest.mark.parametrize("state", [{"weight": torch.zeros(2)}, [1, 2]], ids=["weights only", "a list"])
def test_foreign_checkpoint_is_refused(tmp_path, state):
    path = tmp_path / "run.pt"
    torch.save(state, path)
    assert_refused(path)


def flip(content, position):
    """Return bytes with one bit changed."""
    return content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]


def test_changed_byte_or_missing_end_never_changes_what_is_loaded(tmp_path):
    """The file contains padding, where a change does no harm."""
    path = tmp_path / "run.pt"
    train(path)
    content = path.read_bytes()
    state = utils.load_checkpoint(path)
    path.write_bytes(content[:-100])
    assert_refused(path)
    refused = 0
    for position in range(0, len(content), len(content) // 100):
        path.write_bytes(flip(content, position))
        try:
            assert_identical(utils.load_checkpoint(path), state)
        except ValueError:
            refused += 1
    assert refused > 50


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the code would create its folder
    path = tmp_path / "run.pt"
    train(path)
    state = utils.load_checkpoint(path)
    state["description"]["network"] = Malicious()
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


def save_on_a_full_disk(*args, **options):
    with file_size_limit(10_000):
        real_save(*args, **options)


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
    parts.train(run)
    train(tmp_path / "whole.pt")
    assert_identical(utils.load_checkpoint(path), utils.load_checkpoint(tmp_path / "whole.pt"))


def test_full_disk_at_the_start_of_a_new_run_keeps_the_finished_one(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    train(path)
    before = path.read_bytes()
    monkeypatch.setattr(utils, "save_checkpoint", save_on_a_full_disk)
    with pytest.raises(OSError, match="^cannot write "):
        record_epoch(Parts().run(path))
    contents = [file.read_bytes() for file in tmp_path.iterdir()]
    assert contents == [before]


@pytest.mark.parametrize(("refusals", "completed"), [(1, 2), (99, 1)], ids=["once", "always"])
def test_file_that_another_program_has_open_is_replaced_later(tmp_path, monkeypatch, refusals, completed):
    path = tmp_path / "run.pt"
    run = Parts().run(path)
    record_epoch(run)
    calls = []
    real_replace = os.replace

    def refuse(source, target):
        calls.append(target)
        if len(calls) <= refusals:
            raise PermissionError(errno.EACCES, "in use")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    expected = contextlib.nullcontext()
    if refusals > 1:
        expected = pytest.raises(OSError, match="^cannot write .*in use.*copy the last checkpoint there$")
    with expected:
        record_epoch(run)
    assert completed_epochs(path) == completed


@pytest.mark.parametrize(("owner", "function"), [(Path, "read_bytes"), (os, "listdir")])
def test_folder_that_fails_for_a_moment_does_not_look_empty(tmp_path, monkeypatch, owner, function):
    """The first is how a run is resumed, the second how an earlier one is kept."""
    path = tmp_path / "run.pt"
    train(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(errno.ESTALE, "stale file handle")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="stale file handle"):
        patch.setattr(owner, function, fail)
        record_epoch(Parts().run(path, resume=function == "read_bytes"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

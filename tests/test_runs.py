"""Runs that are interrupted, killed, resumed or refused: the checkpoint is always a completed epoch's."""

import errno
import os
import random
import re
from copy import deepcopy
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_identical, interrupt
from torch import nn
from torch.optim.lr_scheduler import StepLR

import utils

EPOCHS = 3


class Parts:
    """What a training cell creates: a network that trains within milliseconds, and what it trains with."""

    def __init__(self):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = StepLR(self.optimizer, step_size=1, gamma=0.5)
        self.batches = [(torch.randn(20, 9), torch.arange(20) % 10)] * 2

    def run(self, path, epochs=EPOCHS, seed=1, resume=False):
        trained = (self.model, self.optimizer, self.scheduler, self.batches, self.batches, F.cross_entropy)
        return utils.Run(path, *trained, epochs, seed, resume=resume)

    def train(self, run):
        """Train as the notebook does."""
        for _ in run.remaining_epochs():
            results = utils.train(self.model, "cpu", self.batches, self.optimizer, F.cross_entropy)
            test_results = utils.test(self.model, "cpu", self.batches, F.cross_entropy)
            self.scheduler.step()
            run.record(*results, *test_results)

    def state(self):
        """Return a copy of all that a checkpoint restores, except for the history."""
        return deepcopy([self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()])


def train(path, epochs=EPOCHS):
    """Train a run to its end, resuming from `path` if it exists; return its parts."""
    parts = Parts()
    parts.train(parts.run(path, epochs, resume=True))
    return parts


def record_epoch(run):
    """Complete the next epoch of a run, without training."""
    next(run.remaining_epochs())
    run.record(1.0, 50.0, 1.0, 50.0)


def completed_epochs(path):
    return len(utils.load_checkpoint(path)["history"]["test_acc"])


# ---- interruptions ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the checkpoint of a run that is not interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run.pt"
    train(path)
    return utils.load_checkpoint(path)


@pytest.mark.parametrize(
    ("function", "call", "completed"),
    [
        pytest.param("utils.GetCorrectPredCount", 2, 0, id="training"),  # the second batch
        pytest.param("utils.test", 3, 2, id="test"),
        pytest.param("os.replace", 2, 1, id="saving"),
    ],
)
def test_run_continues_bit_identically_after_ctrl_c(whole, tmp_path, capsys, function, call, completed):
    path = tmp_path / "run.pt"
    parts = Parts()
    run = parts.run(path)
    with interrupt(function, call), pytest.raises(KeyboardInterrupt):
        parts.train(run)
    assert path.exists() == (completed > 0)
    (tmp_path / "run.pt.partial").write_bytes(b"half")  # is left by a process that is killed
    train(path)  # in a new kernel
    assert list(tmp_path.iterdir()) == [path]
    assert_identical(utils.load_checkpoint(path), whole)
    path.unlink()
    parts.train(run)  # in the same kernel
    assert f"Back to the state after epoch {completed}\n" in capsys.readouterr().out
    assert_identical(utils.load_checkpoint(path), whole)


def test_run_continues_bit_identically_after_the_disk_was_full(whole, tmp_path):
    """The disk is full when the first epoch of a new run is saved: the finished run is kept."""
    path = tmp_path / "run.pt"
    train(path, epochs=1)
    before = path.read_bytes()
    parts = Parts()
    run = parts.run(path)

    def write_half(file, content):
        with open(file, "wb") as opened:
            opened.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "disk full")

    disk = mock.patch.object(Path, "write_bytes", write_half)
    with disk, pytest.raises(OSError, match=f"{re.escape(str(path))} .disk full"):
        parts.train(run)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]  # without the unfinished file
    parts.train(run)
    assert_identical(utils.load_checkpoint(path), whole)


# ---- resumed or refused ----


def test_finished_run_is_restored_and_continues_with_more_epochs_but_not_with_fewer(whole, tmp_path):
    path = tmp_path / "run.pt"
    finished = train(path, epochs=2)
    before = path.read_bytes()
    assert_identical(train(path, epochs=2).state(), finished.state())
    assert path.read_bytes() == before
    train(path)
    assert_identical(utils.load_checkpoint(path), whole)
    with pytest.raises(ValueError, match="has 3 .* EPOCHS"):
        train(path, epochs=2)


def assert_refused(path, message, seed=1):
    """Check that a file is not resumed from, that it is named, and that nothing changes."""
    before = path.read_bytes()
    parts = Parts()
    state = parts.state()
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is {message}.*RESUME = False$"):
        parts.run(path, seed=seed, resume=True)
    assert_identical(parts.state(), state)
    assert path.read_bytes() == before


def test_different_run_is_refused_before_anything_changes(tmp_path):
    path = tmp_path / "run.pt"
    train(path)
    assert_refused(path, "the checkpoint of a different run .*seed", seed=2)


def test_all_differences_are_counted_and_three_are_named():
    """An option that only one of two versions of PyTorch has is no difference."""
    saved = {"a": "1", "b": "1", "c": "1", "d": "1", "e": "1", "old": "1"}
    current = {"new": "1", "a": "2", "b": "2", "c": "1", "d": "2", "e": "2"}
    assert utils.list_differences(saved, current) == (
        "a: checkpoint 1, current 2; b: checkpoint 1, current 2; d: checkpoint 1, current 2; and 1 more"
    )


def test_other_indices_of_a_subset_have_another_description():
    assert utils.describe({"indices": [*range(200)]}) != utils.describe({"indices": [*range(1, 201)]})


def test_address_in_memory_is_not_described():
    generators = [torch.Generator(), torch.Generator()]
    assert repr(generators[0]) != repr(generators[1])
    assert utils.describe({"generator": generators[0]}) == utils.describe({"generator": generators[1]})


# ---- epochs and history ----


def test_every_epoch_has_its_own_seed(tmp_path):
    numbers = []
    for seed in (1, 1, 2, 10**9 - 1):
        run = Parts().run(tmp_path / "run.pt", epochs=2, seed=seed)
        for _ in run.remaining_epochs():
            numbers.append([torch.rand(1).item(), random.random(), np.random.rand()])
            run.record(1.0, 50.0, 1.0, 50.0)
    for column in zip(*numbers, strict=True):
        assert column[0:2] == column[2:4]
        assert len(set(column)) == 6


def test_results_are_appended_to_the_history(tmp_path, capsys):
    """The learning rate is that of the start of the epoch; NumPy's numbers can be saved."""
    path = tmp_path / "run.pt"
    parts = Parts()
    run = parts.run(path, epochs=2)
    capsys.readouterr()
    for epoch in run.remaining_epochs():
        parts.optimizer.param_groups[0]["lr"] = 0.01
        run.record(*np.float64([4.0 / epoch, 90.0 + epoch, 2.0 / epoch, 95.0 + epoch]))
    assert list(run.remaining_epochs()) == []
    assert capsys.readouterr().out == "EPOCH: 1\nEPOCH: 2\nAll 2 epochs are completed\n"
    assert run.history == utils.History([4.0, 2.0], [91.0, 92.0], [2.0, 1.0], [96.0, 97.0], [0.1, 0.01])
    assert run.history.completed == completed_epochs(path) == 2
    assert min(run.history.seconds) > 0


def test_run_without_a_checkpoint_starts_from_scratch_and_creates_missing_folders(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    path = tmp_path / "a" / "b" / "run.pt"
    run = Parts().run("~/a/b/run.pt", resume=True)
    assert f"No checkpoint at {path}: training starts from scratch\n" in capsys.readouterr().out
    record_epoch(run)
    assert path.exists()
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
    assert completed_epochs(path) == 3
    assert len(list(tmp_path.iterdir())) == 3


# ---- corrupted and foreign files ----


def test_corrupted_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    parts = train(path)
    content = path.read_bytes()
    weight = parts.model[0].weight.detach().numpy().tobytes()
    assert weight in content
    path.write_bytes(content.replace(weight, bytes(len(weight))))
    assert_refused(path, "not a checkpoint")
    path.write_bytes(content[:-100])
    assert_refused(path, "not a checkpoint")
    torch.save(parts.model.state_dict(), path)
    assert_refused(path, "not a checkpoint")


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the code would create its folder
    path = tmp_path / "run.pt"
    torch.save(Malicious(), path)
    assert_refused(path, "not a checkpoint")
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_of_a_gpu_is_read_to_the_cpu(tmp_path):
    path = tmp_path / "run.pt"
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        parts = train(path)
    assert b"cuda:0" in path.read_bytes()
    assert_identical(train(path).state(), parts.state())


# ---- errors of the file system ----


@pytest.mark.parametrize(("function", "resume"), [("pathlib.Path.read_bytes", True), ("os.listdir", False)])
def test_folder_that_fails_for_a_moment_does_not_look_empty(tmp_path, function, resume):
    """The first is how a run is resumed, the second how an earlier one is kept."""
    path = tmp_path / "run.pt"
    train(path)
    before = path.read_bytes()
    error = OSError(errno.ESTALE, "stale file handle")
    with mock.patch(function, side_effect=error), pytest.raises(OSError, match="stale file handle"):
        record_epoch(Parts().run(path, resume=resume))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

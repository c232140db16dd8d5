"""Runs that are interrupted, killed, resumed or refused: the checkpoint is always a completed epoch's."""

import errno
import os
import random
import re
import zipfile
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

import runs
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
        return runs.Run(
            path,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            criterion=F.cross_entropy,
            train_loader=self.batches,
            epochs=epochs,
            seed=seed,
            resume=resume,
        )

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
    return len(runs.load_checkpoint(path)["history"]["test_acc"])


# ---- interruptions ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the checkpoint of a run that is not interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run.pt"
    train(path)
    return runs.load_checkpoint(path)


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
    (tmp_path / f"run.pt.{os.getpid()}.partial").write_bytes(b"half")  # is left by a process that is killed
    train(path)  # in a new kernel
    assert list(tmp_path.iterdir()) == [path]
    assert_identical(runs.load_checkpoint(path), whole)
    path.unlink()
    parts.train(run)  # in the same kernel
    assert capsys.readouterr().out.count("was repeated: identical") == 2 * (completed > 0)
    assert_identical(runs.load_checkpoint(path), whole)


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
    with disk, pytest.raises(OSError, match="disk full"):
        parts.train(run)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]  # without the unfinished file
    parts.train(run)
    assert_identical(runs.load_checkpoint(tmp_path / "run-2.pt"), whole)


# ---- resumed or refused ----


def test_finished_run_is_restored_and_continues_with_more_epochs_but_not_with_fewer(whole, tmp_path):
    path = tmp_path / "run.pt"
    finished = train(path, epochs=2)
    before = path.read_bytes()
    assert_identical(train(path, epochs=2).state(), finished.state())
    assert path.read_bytes() == before
    train(path)
    assert_identical(runs.load_checkpoint(path), whole)
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


def test_equal_values_are_no_difference_and_others_are_named():
    """An option that only one of two versions of PyTorch has is no difference."""
    saved = {"lr": 1.0, "milestones": {3: 1}, "old": 1}
    assert runs.list_differences(saved, {"lr": 1, "milestones": {3: 1}, "new": 1}) == ""
    assert runs.list_differences(saved, {"lr": 2, "milestones": {4: 1}}) == (
        "lr: 1.0, now 2; milestones: {3: 1}, now {4: 1}"
    )


def train_one_epoch(path):
    """Stop after the first epoch; return the content of the checkpoint."""
    record_epoch(Parts().run(path))
    return path.read_bytes()


def repeat_epoch(path, train_loss=1.0):
    """Resume in a new kernel, and record the repeated epoch with a loss."""
    run = Parts().run(path, resume=True)
    next(run.remaining_epochs())
    run.record(train_loss, 50.0, 1.0, 50.0)
    return run


def test_repeated_epoch_that_differs_is_refused_with_the_changed_lines(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.pt"
    monkeypatch.setattr(runs, "read_sources", lambda: {"model.py": "old\n" * 12 + "same"})
    before = train_one_epoch(path)
    monkeypatch.setattr(runs, "read_sources", lambda: {"model.py": "same\nnew", "the training cell": "cell"})
    with pytest.raises(ValueError, match="^epoch 1 gave train loss 1.00001 instead of 1: .*RESUME"):
        repeat_epoch(path, train_loss=1.00001)
    text = capsys.readouterr().out
    assert "model.py has changed since the checkpoint (- before, + now):\n" + "-old\n" * 10 in text
    assert "and 3 more lines\nthe training cell has changed" in text
    assert path.read_bytes() == before
    run = repeat_epoch(path)
    assert capsys.readouterr().out.endswith("Epoch 1 was repeated: identical\n")
    assert path.read_bytes() == before
    assert run.history.seconds == runs.load_checkpoint(path)["history"]["seconds"]


def test_repeated_epoch_with_other_weights_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    train_one_epoch(path)
    parts = Parts()
    run = parts.run(path, resume=True)
    next(run.remaining_epochs())
    parts.model[0].bias.data += 1
    with pytest.raises(ValueError, match="^epoch 1 gave another state of the model: something"):
        run.record(1.0, 50.0, 1.0, 50.0)


def test_on_another_machine_a_repeated_epoch_may_differ_a_little(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.pt"
    train_one_epoch(path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    run = repeat_epoch(path, train_loss=1.01)
    assert "another machine or a GPU: train loss 1.01 instead of 1\n" in capsys.readouterr().out
    assert run.history.train_losses == [1.01]
    with pytest.raises(ValueError, match="train loss 1.04 instead of 1: "):
        repeat_epoch(path, train_loss=1.04)


def test_scheduler_stepped_after_record_is_resumed_bit_identically(tmp_path):
    """What counts is the state in which the next epoch begins."""

    def train(path, stop=False):
        parts = Parts()
        run = parts.run(path, resume=True)
        for epoch in run.remaining_epochs():
            results = utils.train(parts.model, "cpu", parts.batches, parts.optimizer, F.cross_entropy)
            run.record(*results, *results)
            if stop and epoch == 2:
                return
            parts.scheduler.step()

    train(tmp_path / "whole.pt")
    train(tmp_path / "run.pt", stop=True)
    train(tmp_path / "run.pt")
    assert_identical(runs.load_checkpoint(tmp_path / "run.pt"), runs.load_checkpoint(tmp_path / "whole.pt"))


def test_record_without_an_epoch_says_what_to_iterate_over(tmp_path):
    with pytest.raises(RuntimeError, match="iterate over run.remaining_epochs"):
        Parts().run(tmp_path / "run.pt").record(1.0, 50.0, 1.0, 50.0)


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
    assert run.history == runs.History([4.0, 2.0], [91.0, 92.0], [2.0, 1.0], [96.0, 97.0], [0.1, 0.01])
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


def test_finished_run_survives_new_runs_and_the_last_one_is_resumed(tmp_path):
    path = tmp_path / "run.pt"
    train(path)
    finished = path.read_bytes()
    Parts().run(path)  # stopped in its first epoch
    record_epoch(Parts().run(path))  # stopped after its first epoch
    parts = Parts()
    parts.train(parts.run(path))
    assert path.read_bytes() == finished
    assert completed_epochs(tmp_path / "run-2.pt") == 1
    assert completed_epochs(tmp_path / "run-3.pt") == 3
    assert len(list(tmp_path.iterdir())) == 3
    assert Parts().run(path, resume=True).path == tmp_path / "run-3.pt"


def test_two_runs_at_the_same_time_keep_all_their_epochs(tmp_path):
    path = tmp_path / "run.pt"
    one = Parts().run(path, seed=1)
    two = Parts().run(path, seed=2)
    one_epochs = one.remaining_epochs()
    two_epochs = two.remaining_epochs()
    next(one_epochs)
    next(two_epochs)
    with mock.patch("os.listdir", return_value=[]):  # both save at the same moment
        one.record(1.0, 50.0, 1.0, 50.0)
        two.record(1.0, 50.0, 1.0, 50.0)
    for run, epochs in [(one, one_epochs), (two, two_epochs)] * 2:
        next(epochs)
        run.record(1.0, 50.0, 1.0, 50.0)
    assert len(list(tmp_path.iterdir())) == 2
    for run in (one, two):
        state = runs.load_checkpoint(run.path)
        assert len(state["history"]["test_acc"]) == 3
        assert state["summary"]["seed"] == str(run.seed)


def test_checkpoint_that_is_a_link_stays_one(tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    link = tmp_path / "run.pt"
    try:
        link.symlink_to(drive / "run.pt")
    except OSError:
        pytest.skip("links need a permission on Windows")
    train(link)
    assert link.is_symlink()
    assert completed_epochs(drive / "run.pt") == 3
    drive.rename(tmp_path / "elsewhere")  # a drive that is not mounted
    with pytest.raises(FileNotFoundError, match=f"directory: '{drive}'"):
        Parts().run(link)


# ---- corrupted and foreign files ----


def test_corrupted_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    parts = train(path)
    content = path.read_bytes()
    weight = parts.model[0].weight.detach().numpy().tobytes()
    assert weight in content
    path.write_bytes(content.replace(weight, bytes(len(weight))))
    assert_refused(path, "not a checkpoint")
    torch.save({"history": {}, "model": {}}, path)  # of an earlier version
    assert_refused(path, "not a checkpoint of this version")
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
    with open(path, "wb") as file:
        torch.save(Malicious(), file)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(runs.REPORT, "{}")  # the rest of a checkpoint
    assert_refused(path, r"not a checkpoint .*\(UnpicklingError\)")
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
    """The first is how a run is resumed, the second how an earlier one is found."""
    path = tmp_path / "run.pt"
    train(path)
    before = path.read_bytes()
    error = OSError(errno.ESTALE, "stale file handle")
    with mock.patch(function, side_effect=error), pytest.raises(OSError, match="stale file handle"):
        record_epoch(Parts().run(path, resume=resume))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- earlier runs ----


def test_runs_are_listed_oldest_first_and_what_cannot_be_read_is_named(tmp_path, capsys):
    (tmp_path / "broken.pt").write_bytes(b"half")
    os.utime(tmp_path / "broken.pt", (1, 1))
    train(tmp_path / "finished.pt")
    train_one_epoch(tmp_path / "interrupted.pt")
    os.utime(tmp_path / "interrupted.pt", (2, 2))
    capsys.readouterr()
    interrupted, finished = runs.list_runs(tmp_path)
    assert f"Left out: {tmp_path / 'broken.pt'} is not a checkpoint" in capsys.readouterr().out
    assert interrupted.name == "interrupted.pt"
    assert [interrupted.history.completed, finished.history.completed] == [1, 3]
    assert finished.summary["optimizer"] == "SGD(lr=0.1, momentum=0.9)"

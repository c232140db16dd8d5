"""The programs in benchmarks/: nothing is trained twice or lost, and the tables' arithmetic."""

import signal
import sys

import pytest

import accuracy
import utils


@pytest.fixture
def start(small, tmp_path, monkeypatch):
    """A function that runs accuracy.py on a small set for 3 epochs and returns its rows."""
    monkeypatch.setenv("S7_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.setattr(utils, "load_data", lambda standin: (small(600), small(200, train=False)))
    path = tmp_path / "accuracy.csv"

    def run(*flags):
        command = ["accuracy.py", "--csv", str(path), "--epochs", "3", "--seeds", "1", *flags]
        monkeypatch.setattr(sys, "argv", command)
        accuracy.main()
        return accuracy.read_rows(path)

    return run


@pytest.fixture
def epochs_trained(monkeypatch):
    """The epochs that `train` is called for; `stop_at` interrupts the nth as Ctrl-C does."""
    calls, real = [], utils.train

    def train(*args):
        calls.append(len(calls) + 1)
        if calls[-1] == train.stop_at:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    train.stop_at = None
    monkeypatch.setattr(utils, "train", train)
    return calls, train


def test_a_row_an_epoch_with_what_a_reader_must_know(start):
    rows = start("--models", "Model2", "--schedules", "described")
    assert list(rows[0]) == accuracy.COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {(row["model"], row["schedule"], row["seed"]) for row in rows} == {("Model2", "described", "1")}
    assert all(0 <= float(row["test_acc"]) <= 100 and float(row["seconds"]) > 0 for row in rows)


def test_stopped_and_started_again_nothing_is_trained_twice(start, epochs_trained):
    calls, train = epochs_trained
    train.stop_at = 5  # in the second epoch of the second run
    with pytest.raises(SystemExit, match="the same command goes on"):
        start("--models", "Model2", "--schedules", "constant", "described")
    train.stop_at = None
    rows = start("--models", "Model2", "--schedules", "constant", "described")
    assert len(calls) == 7  # 3 + 1, the one cut off, 2
    keys = [(row["schedule"], row["epoch"]) for row in rows]
    assert keys == [(s, e) for s in ("constant", "described") for e in "123"]
    assert start("--models", "Model2") == rows and len(calls) == 7


def test_model3_under_a_constant_rate_is_model2s_run(start, tmp_path):
    rows = start("--models", "Model2", "Model3")
    assert {(r["model"], r["schedule"]) for r in rows} == {
        ("Model2", "constant"),
        ("Model2", "described"),
        ("Model3", "described"),
    }
    runs = accuracy.recorded_runs(tmp_path / "accuracy.csv")
    assert runs["Model3", "constant"] == runs["Model2", "constant"]


def test_the_tables_arithmetic(tmp_path):
    """Two seeds of seven epochs, worked out by hand."""
    path = tmp_path / "accuracy.csv"
    for seed, test_acc in (
        (1, [97, 98.9, 99.0, 99.2, 98.8, 99.1, 99.0]),
        (2, [97, 99.0, 99.4, 99.1, 99.2, 99.3, 99.2]),
    ):
        rows = [
            dict.fromkeys(accuracy.COLUMNS, 1)
            | dict(model="Model2", schedule="constant", seed=seed, epoch=i, train_acc=99.5, test_acc=a)
            for i, a in enumerate(test_acc, 1)
        ]
        accuracy.append_rows(rows, path)
    table = accuracy.model_table("Model2", accuracy.recorded_runs(path)).splitlines()
    # best 99.2 and 99.4, last 99.0 and 99.2, worst of the last five 98.8 and 99.1
    cells = [cell.strip() for cell in table[-1].strip("|").split("|")]
    assert cells[1:] == [
        "test",
        "99.30 ± 0.14",
        "99.10 ± 0.14",
        "98.95 ± 0.21",
        "99.20 to 99.40",
        "99.11, outside",
    ]
    assert table[-2].endswith("| 99.50 to 99.50 | 99.50, inside |")

"""The programs in benchmarks/: nothing is trained twice or lost, and the tables' arithmetic."""

import signal
import sys

import pytest

import accuracy
import search
import utils


def test_stopped_and_started_again_nothing_is_trained_twice(small, tmp_path, monkeypatch):
    """Two runs of Model1 of three epochs, Ctrl-C in the second epoch of the second."""
    monkeypatch.setenv("S7_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.setattr(utils, "load_data", lambda standin: (small(600), small(200, train=False)))
    monkeypatch.setattr(accuracy, "CSV", tmp_path / "accuracy.csv")
    monkeypatch.setattr(accuracy, "EPOCHS", 3)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--seeds", "1", "--models", "Model1"])
    calls, real = [], utils.train

    def train(*args):
        calls.append(args)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(utils, "train", train)
    with pytest.raises(KeyboardInterrupt):
        accuracy.main()
    for _ in range(2):
        accuracy.main()
        assert len(calls) == 7  # 3 + 1, the one cut off, 2
    rows = accuracy.read_rows(accuracy.CSV)
    assert list(rows[0])[4:] == [*accuracy.NUMBERS, "device", "threads", "torch"]
    keys = [(row["model"], row["schedule"], row["seed"], row["epoch"]) for row in rows]
    assert keys == [("Model1", s, "1", e) for s in ("described", "constant") for e in "123"]
    assert all(0 <= float(row["test_acc"]) <= 100 and float(row["seconds"]) > 0 for row in rows)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A function that puts runs whose test accuracies are given into a file, and reads it."""
    monkeypatch.setattr(accuracy, "CSV", tmp_path / "accuracy.csv")

    def write_runs(key, *seeds, rate=0.01):
        columns = dict.fromkeys(["model", "schedule", "seed", "epoch", *accuracy.NUMBERS], 1)
        run = columns | dict(model=key[0], schedule=key[1], learning_rate=rate, train_acc=99.5)
        for seed, values in enumerate(seeds, 1):
            rows = [run | dict(seed=seed, epoch=e, test_acc=value) for e, value in enumerate(values, 1)]
            accuracy.append_rows(rows, accuracy.CSV)
        return accuracy.recorded_runs()

    return write_runs


ONE, TWO = [97, 98.9, 99.0, 99.2, 98.8, 99.1, 99.0], [97, 99.0, 99.4, 99.1, 99.2, 99.3, 99.2]


def test_model2_and_model3_are_one_run_until_the_rate_falls(small, tmp_path):
    """What lets the constant-rate runs of both be made once: the same bits."""
    data, histories = (small(300), small(100, train=False)), []
    constant = utils.RECIPES["Model2"] | dict(StepLR=dict(step_size=1, gamma=1.0))
    for number, recipe in enumerate([constant, utils.RECIPES["Model3"]]):
        utils.torch.manual_seed(1)
        model, settings = accuracy.create_model("Model2"), dict(epochs=3, seed=1)
        histories.append(accuracy.train_model(model, recipe, *data, settings, tmp_path / f"{number}.pt"))
    assert histories[0] == histories[1]


def test_the_tables_arithmetic(recorded):
    """Two seeds of seven epochs, worked out by hand."""
    runs = recorded(("Model3", "described"), ONE, TWO)
    lines = [line.strip("| ").split(" | ") for line in accuracy.model_table("Model3", runs).splitlines()[2:]]
    # best 99.2 and 99.4, last 99.0 and 99.2, worst of the last five 98.8 and 99.1
    cells = ["99.50 ± 0.00 (99.50 to 99.50)", "99.30 ± 0.14 (99.20 to 99.40)", "99.10 ± 0.14"]
    cells.append("98.95 ± 0.21")
    assert lines[0] == ["constant, 0.01", *cells] and lines[1] == ["as described", *cells]
    assert lines[2][:3] == ["published", "99.50", "99.28"]
    assert runs["Model2", "constant"] == runs["Model3", "described"]
    assert ("Model2", "constant") not in recorded(("Model3", "described"), ONE, rate=0.001)  # it fell


def test_the_overviews_arithmetic(recorded):
    """Held from the third epoch by the one seed, from the second by the other: the worst is 3."""
    high = [98, 99.3, 99.5, 99.4, 99.6, 99.5, 99.5], [98, 99.4, 99.5, 99.7, 99.6, 99.5, 99.5]
    runs = recorded(("Model4", "described"), *high)
    line = accuracy.overview(runs).splitlines()[-1]
    assert line.startswith("| Model4 | 7,808 | 789,712 | 28 | 99.50 ± 0.00 | 99.65 ± 0.07 |")
    assert line.endswith(" | 99.53 ± 0.04 | 99.40 | 3 |")
    runs = recorded(("Model5", "described"), ONE, high[0])
    assert accuracy.overview(runs).splitlines()[-1].endswith("| 98.80 | not held |")


def test_the_validation_split_is_of_the_training_set_alone():
    class Numbered:
        data = targets = utils.torch.arange(60_000)

    parts = search.split(Numbered)
    assert [len(part.targets) for part in parts] == [50_000, 10_000]
    assert len(set(parts[0].targets.tolist()) | set(parts[1].targets.tolist())) == 60_000


def test_a_configuration_of_the_search_is_model4_with_its_changes(small, tmp_path, monkeypatch):
    monkeypatch.setenv("S7_CHECKPOINTS", str(tmp_path))
    row = search.run({"plain": 0, "before": [8, 8, 8]}, 1, (small(200), small(100)), epochs=2)
    assert row["changes"] == '{"plain": 0, "before": [8, 8, 8]}' and row["parameters"] < 7808
    assert len(row["val_acc_by_epoch"].split()) == 2
    assert search.run({}, 1, (small(200), small(100)), 1)["parameters"] == 7808

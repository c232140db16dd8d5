"""The programs in benchmarks/: no run is repeated or lost, and what they compute is correct."""

import ast
import signal
import sys
from dataclasses import replace

import accuracy
import common
import dropout_ablation
import epoch_time
import pytest
import search
import torch
from conftest import ROOT
from torch.optim.lr_scheduler import StepLR

import utils
from model import Model1, Model4, create_model

FILES = sorted((ROOT / "benchmarks").glob("*.py"))


def imported_modules(path):
    """Return the names of the modules that a program imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_imports_a_benchmark_program(path):
    programs = set()
    for file in FILES:
        if "__main__" in file.read_text(encoding="utf-8"):
            programs.add(file.stem)
    assert len(programs) >= 5
    assert imported_modules(path) & programs == set()


# ---- accuracy.py ----


@pytest.fixture
def accuracy_program(small, tmp_path, monkeypatch):
    """Prepare `accuracy.main()` for two runs of Model1, of three epochs each."""
    monkeypatch.setenv("S7_CHECKPOINTS", str(tmp_path / "checkpoints"))
    data = (small(300), small(100, train=False))
    monkeypatch.setattr(utils, "load_data", lambda standin: data)
    monkeypatch.setattr(accuracy, "CSV", tmp_path / "accuracy.csv")
    monkeypatch.setattr(accuracy, "EPOCHS", 3)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--seeds", "1", "--models", "Model1"])
    return accuracy


@pytest.fixture
def trained_epochs(monkeypatch):
    """Count the epochs that are trained, as the length of a list; Ctrl-C interrupts the fifth."""
    calls = []
    real_train = utils.train

    def train(*args):
        calls.append(args)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return real_train(*args)

    monkeypatch.setattr(utils, "train", train)
    return calls


def test_interrupted_benchmark_resumes_without_repeating_an_epoch(accuracy_program, trained_epochs):
    with pytest.raises(KeyboardInterrupt):
        accuracy_program.main()
    accuracy_program.main()
    assert len(trained_epochs) == 3 + 1 + 1 + 2  # the first run, one epoch, the interrupted one, the rest
    accuracy_program.main()
    assert len(trained_epochs) == 7


def test_benchmark_records_each_epoch_of_each_run_once(accuracy_program, trained_epochs):
    with pytest.raises(KeyboardInterrupt):
        accuracy_program.main()
    accuracy_program.main()
    recorded = []
    for row in common.read_rows(accuracy.CSV):
        recorded.append((row["model"], row["schedule"], row["seed"], row["epoch"]))
    expected = []
    for schedule in ("described", "constant"):
        for epoch in ("1", "2", "3"):
            expected.append(("Model1", schedule, "1", epoch))
    assert recorded == expected


def test_recorded_rows_have_the_columns_of_the_committed_file(accuracy_program):
    accuracy_program.main()
    rows = common.read_rows(accuracy.CSV)
    committed = common.read_rows(ROOT / "benchmarks" / "accuracy.csv")
    assert list(rows[0]) == list(committed[0])
    for row in rows:
        assert 0 <= float(row["test_acc"]) <= 100
        assert float(row["seconds"]) > 0


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [{"name": 'a, "b"', "value": "1"}, {"name": "σ", "value": ""}]
    common.append_rows(rows[:1], path)
    common.append_rows(rows[1:], path)
    assert common.read_rows(path) == rows
    common.write_rows(rows[1:], path)
    assert common.read_rows(path) == rows[1:]


def test_missing_csv_file_has_no_rows(tmp_path):
    assert common.read_rows(tmp_path / "missing.csv") == []


def test_model3_equals_model2_at_a_constant_rate_until_the_rate_drops(small, tmp_path):
    """The constant-rate runs of both models are therefore recorded only once."""
    train_set = small(300)
    test_set = small(100, train=False)
    constant = replace(utils.RECIPES["Model2"], scheduler_args={"step_size": 1, "gamma": 1.0})
    histories = []
    for name, recipe in (("Model2", constant), ("Model3", utils.RECIPES["Model3"])):
        settings = utils.run_settings(name, "digits", 3, 1, recipe)
        torch.manual_seed(1)
        model = create_model(name)
        path = tmp_path / f"{name}.pt"
        histories.append(common.train_model(model, recipe, train_set, test_set, settings, path))
    assert histories[0] == histories[1]


def accuracy_rows(model, seed, test_acc, rate=0.01):
    """Return the rows of a run in accuracy.csv, as strings."""
    rows = []
    for epoch, value in enumerate(test_acc, 1):
        row = dict.fromkeys(common.ACCURACY_COLUMNS, "1")
        row.update(model=model, schedule="described", seed=str(seed), epoch=str(epoch))
        row.update(test_acc=str(value), learning_rate=str(rate))
        rows.append(row)
    return rows


def test_recorded_runs_are_ordered_by_seed():
    rows = accuracy_rows("Model4", 10, [3.0]) + accuracy_rows("Model4", 2, [1.0, 2.0])
    runs = common.recorded_runs(rows)["Model4", "described"]
    assert [history.test_acc for history in runs] == [[1.0, 2.0], [3.0]]


def test_runs_of_model3_count_as_constant_rate_runs():
    runs = common.recorded_runs(accuracy_rows("Model3", 1, [98.0, 99.0]))
    assert runs["Model2", "constant"] == runs["Model3", "described"]
    assert runs["Model3", "constant"] == runs["Model3", "described"]


def test_runs_of_model3_do_not_count_as_constant_if_one_rate_dropped():
    rows = accuracy_rows("Model3", 1, [98.0, 99.0]) + accuracy_rows("Model3", 2, [98.0], rate=0.001)
    assert list(common.recorded_runs(rows)) == [("Model3", "described")]


# ---- search.py ----


def test_validation_split_divides_the_training_set():
    numbers = torch.arange(60_000)
    parts = search.split(utils.DigitSet("numbers", numbers, numbers))
    assert [len(part) for part in parts] == [50_000, 10_000]
    assert torch.equal(torch.cat([part.labels for part in parts]).sort().values, numbers)
    assert torch.equal(parts[0].images, parts[0].labels)


def test_validation_split_is_the_one_of_the_recorded_runs():
    numbers = torch.arange(60_000)
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    train_set, validation_set = search.split(utils.DigitSet("numbers", numbers, numbers))
    assert torch.equal(train_set.labels, order[:50_000])
    assert torch.equal(validation_set.labels, order[50_000:])


def model4_channels():
    """Return the output channels of Model4's blocks before and after the pool."""
    before = []
    after = []
    channels = before
    for name, block in Model4().named_children():
        if name == "pool":
            channels = after
        elif name.startswith("block"):
            channels.append([layer for layer in block if isinstance(layer, torch.nn.Conv2d)][-1].out_channels)
    return before, after


def test_candidate_with_model4s_channels_is_model4():
    before, after = model4_channels()
    torch.manual_seed(1)
    expected = create_model("Model4")
    torch.manual_seed(1)
    candidate = common.Candidate(before, after)
    assert candidate.memory_format == expected.memory_format
    state = candidate.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value)
    data = torch.randn(4, 1, 28, 28)
    expected = expected.to(memory_format=torch.contiguous_format)
    assert torch.equal(candidate(data), expected(data))


@pytest.fixture
def recipes(monkeypatch, tmp_path):
    """Collect the recipes and networks that `search` trains, instead of training them."""
    monkeypatch.setenv("S7_CHECKPOINTS", str(tmp_path / "checkpoints"))
    collected = []

    def train_model(model, recipe, train_set, test_set, settings, path):
        collected.append((model, recipe))
        values = [1.0] * settings["epochs"]
        return utils.History(values, values, values, values, values, values)

    monkeypatch.setattr(search, "train_model", train_model)
    return collected


def test_search_applies_the_changes_to_model4s_recipe(small, recipes):
    changes = {"clean_epochs": 0, "scheduler_args": {"step_size": 3, "gamma": 0.5}}
    configuration = search.Configuration([8, 8], [8, 16], changes)
    search.train_and_describe(configuration, 1, small(10), small(10))
    expected = replace(utils.RECIPES["Model4"], **changes)
    assert recipes[0][1] == expected
    assert expected.scheduler is StepLR


def test_search_builds_the_network_of_the_configuration(small, recipes):
    configuration = search.Configuration([8, 12], [8, 16, 24], {})
    row = search.train_and_describe(configuration, 1, small(10), small(10))
    model = recipes[0][0]
    layers = [name for name, _ in model.named_children()]
    assert layers == ["block1", "block2", "pool", "block3", "block4", "block5", "gap", "logits"]
    assert model.logits[0].in_channels == 24
    assert (row["before"], row["after"]) == ("8 12", "8 16 24")
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_search_records_a_trained_configuration(small, tmp_path, monkeypatch):
    monkeypatch.setenv("S7_CHECKPOINTS", str(tmp_path))
    configuration = search.Configuration([8], [8], {"clean_epochs": 0})
    row = search.train_and_describe(configuration, 1, small(200), small(100), epochs=2)
    committed = common.read_rows(ROOT / "benchmarks" / "search.csv")
    assert list(row) == list(committed[0])
    assert row["changes"] == '{"clean_epochs": 0}'
    assert len(row["val_acc_by_epoch"].split()) == 2


def test_search_trains_what_is_missing(small, recipes, tmp_path, monkeypatch):
    configuration = search.Configuration([8], [8], {"clean_epochs": 0}, seeds=(1, 2))
    train_set = utils.DigitSet("digits", torch.zeros(60_000), torch.zeros(60_000))
    monkeypatch.setattr(utils, "load_data", lambda standin: (train_set, None))
    monkeypatch.setattr(search, "CSV", tmp_path / "search.csv")
    monkeypatch.setattr(search, "CONFIGURATIONS", [configuration])
    search.main()
    search.main()
    assert len(recipes) == 2
    assert [row["seed"] for row in common.read_rows(search.CSV)] == ["1", "2"]


def test_every_recorded_configuration_can_be_run_again():
    """The rows of search.csv are those of the list in the program."""
    known = []
    for configuration in search.CONFIGURATIONS:
        for seed in configuration.seeds:
            known.append(search.identity(configuration, seed))
    for row in common.read_rows(search.CSV):
        columns = {name: row[name] for name in ("before", "after", "changes", "seed")}
        assert columns in known


# ---- dropout_ablation.py ----


@pytest.mark.parametrize(
    ("setting", "active"),
    [
        pytest.param("no dropout", "", id="none"),
        pytest.param("dropout in blocks 1 to 6", "12456", id="all but the last"),
        pytest.param("dropout in block 7, on the logits", "7", id="last"),
        pytest.param("all dropout, as in training", "124567", id="all"),
    ],
)
def test_dropout_is_active_in_the_chosen_blocks_only(setting, active):
    model = Model1().train()
    dropout_ablation.activate_dropout(model, dropout_ablation.SETTINGS[setting])
    in_training_mode = []
    for name, layer in model.named_modules():
        if layer.training:
            assert isinstance(layer, torch.nn.Dropout)
            in_training_mode.append(name.split(".")[0])
    assert in_training_mode == [f"convblock{number}" for number in active]


def test_accuracy_without_dropout_is_that_of_the_test_function(small, capsys):
    model = create_model("Model1").eval()
    loader = utils.BatchLoader(small(300), 100, "cpu")
    measured = dropout_ablation.measure_accuracy(model, loader)
    _, expected = utils.test(model, "cpu", loader, torch.nn.functional.nll_loss)
    assert measured == expected


# ---- epoch_time.py ----

SECONDS = {
    epoch_time.Variant("Model3", "train", "DataLoader, 0 workers"): [4.0, 9.0, 5.0],
    epoch_time.Variant("Model3", "train", "this repository"): [3.0, 1.0, 2.0],
    epoch_time.Variant("Model3", "train", "compute only"): [1.0, 1.0, 1.6],
}


def test_epoch_times_are_medians_with_ratios():
    row = epoch_time.summarize(SECONDS, "cpu")[1]
    assert row["variant"] == "this repository"
    assert row["rounds"] == 3
    assert (row["seconds"], row["fastest"], row["slowest"]) == ("2.000", "1.000", "3.000")
    assert (row["vs_dataloader"], row["vs_compute_only"]) == ("0.400", "2.000")


def test_epoch_time_without_a_baseline_has_no_ratio():
    previous = epoch_time.Variant(epoch_time.PREVIOUS_MODEL4, "train", "this repository")
    row = epoch_time.summarize({**SECONDS, previous: [2.0, 4.0, 3.0]}, "cpu")[-1]
    assert row["seconds"] == "3.000"
    assert row["vs_dataloader"] == ""
    assert row["vs_compute_only"] == ""


def test_epoch_times_have_the_columns_of_the_committed_file():
    committed = common.read_rows(epoch_time.CSV)
    assert list(epoch_time.summarize(SECONDS, "cpu")[0]) == list(committed[0])


def test_epoch_times_replace_those_of_the_same_model_and_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_time, "CSV", tmp_path / "epoch_time.csv")
    rows = epoch_time.summarize(SECONDS, "cpu")
    others = []
    for row in rows:
        others.append({**row, "threads": 7})
        others.append({**row, "model": "Model2"})
    common.write_rows(others + [{**row, "seconds": "100"} for row in rows], epoch_time.CSV)
    epoch_time.save(rows)
    saved = common.read_rows(epoch_time.CSV)
    assert len(saved) == 3 * len(rows)
    assert "100" not in [row["seconds"] for row in saved]


def test_only_models_in_another_memory_format_are_measured_without_it():
    contiguous = epoch_time.Variant("Model4", "train", epoch_time.CONTIGUOUS)
    assert epoch_time.list_variants("Model4", "cpu").count(contiguous) == 1
    assert contiguous._replace(model="Model3") not in epoch_time.list_variants("Model3", "cpu")

"""The programs in benchmarks/: no run is repeated or lost, and what they compute is correct."""

import itertools
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial

import accuracy
import common
import dropout_ablation
import epoch_time
import exercises
import own_digits
import pytest
import search
import tables
import torch
from conftest import ROOT

import plots
import utils
from model import MODELS, Model1, Model5, create_model

SEED_1 = [97, 98.9, 99.0, 99.2, 98.8, 99.1, 99.0]  # test accuracies per epoch
SEED_2 = [97, 99.0, 99.4, 99.1, 99.2, 99.3, 99.2]
ABOVE_FROM_3 = [98, 99.3, 99.5, 99.4, 99.6, 99.5, 99.5]
ABOVE_FROM_2 = [98, 99.4, 99.5, 99.7, 99.6, 99.5, 99.5]


@pytest.fixture(autouse=True)
def folder(small, tmp_path, monkeypatch):
    """Give the programs stand-in digits, and a temporary folder for checkpoints and results."""
    data = (small(300), small(100, train=False))
    monkeypatch.setattr(utils, "load_data", lambda standin: data)
    monkeypatch.setenv("S7_CHECKPOINTS", str(tmp_path / "checkpoints"))
    for program in (accuracy, dropout_ablation, epoch_time, exercises, own_digits, plots, search):
        monkeypatch.setattr(program, "CSV", tmp_path / program.CSV.name)
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(tables, "PAGES", [tmp_path / "README.md"])
    return tmp_path


def run(monkeypatch, program, *arguments):
    """Run a program in this process."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
    program.main()


def committed_columns(name):
    """Return the columns of a committed CSV file."""
    return list(common.read_rows(ROOT / "benchmarks" / name)[0])


def history(test_acc):
    """Return a run with the given test accuracies."""
    return utils.History(test_acc=test_acc, train_acc=[99.5] * len(test_acc))


def cells(table, row):
    """Return the cells of a row of a table in Markdown, numbered from 0 below the header."""
    return [cell.strip() for cell in table.splitlines()[row + 2].strip("|").split("|")]


# ---- common.py ----


@pytest.mark.parametrize(
    "name", ["accuracy", "search", "dropout_ablation", "epoch_time", "exercises", "own_digits"]
)
def test_libgomp_gets_its_spin_count_before_torch_is_imported(name):
    source = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    assert source.index("import common") < source.index("import torch")


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [{"name": 'a, "b"', "value": "1"}, {"name": "σ", "value": ""}]
    assert common.read_rows(path) == []
    common.append_rows(rows[:1], path)
    common.append_rows(rows[1:], path)
    assert common.read_rows(path) == rows
    common.write_rows(rows[1:], path)
    assert common.read_rows(path) == rows[1:]


def test_candidate_with_model4s_channels_is_model4():
    torch.manual_seed(1)
    expected = create_model("Model4").state_dict()
    torch.manual_seed(1)
    state = common.Candidate([16, 16], [32, 32, 32, 32, 40]).state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value)


def accuracy_rows(model, seed, test_acc, rate=0.01, device="CPU"):
    """Return the rows of a run in accuracy.csv, as strings."""
    rows = []
    for epoch, value in enumerate(test_acc, 1):
        row = dict.fromkeys(common.ACCURACY_COLUMNS, "1")
        row.update(model=model, schedule="described", seed=str(seed), epoch=str(epoch))
        row.update(test_acc=str(value), learning_rate=str(rate), device=device)
        rows.append(row)
    return rows


def test_recorded_runs_are_ordered_by_seed():
    rows = accuracy_rows("Model4", 10, [3.0]) + accuracy_rows("Model4", 2, [1.0, 2.0])
    runs = common.recorded_runs(rows)["Model4", "described"]
    assert [run.test_acc for run in runs] == [[1.0, 2.0], [3.0]]


def test_runs_of_model3_are_constant_rate_runs_unless_a_rate_dropped():
    rows = accuracy_rows("Model3", 1, [98.0, 99.0])
    runs = common.recorded_runs(rows)
    assert runs["Model2", "constant"] == runs["Model3", "constant"] == runs["Model3", "described"]
    rows += accuracy_rows("Model3", 2, [98.0], rate=0.001)
    assert list(common.recorded_runs(rows)) == [("Model3", "described")]


def test_model3_equals_model2_at_a_constant_rate_until_the_rate_drops(small, tmp_path):
    """The constant-rate runs of both models are therefore recorded only once."""
    constant = replace(utils.RECIPES["Model2"], scheduler_args=accuracy.CONSTANT_RATE)
    histories = []
    for name, recipe in (("Model2", constant), ("Model3", utils.RECIPES["Model3"])):
        torch.manual_seed(1)
        model = create_model(name)
        path = tmp_path / f"{name}.pt"
        histories.append(common.train_model(model, recipe, small(300), small(100), path, epochs=3))
    assert histories[0] == histories[1]


# ---- accuracy.py ----


def test_interrupted_accuracy_run_is_resumed_and_recorded_once(monkeypatch):
    trained = []
    real_train = utils.train

    def train(*args):
        trained.append(args)
        if len(trained) == 4:  # the second epoch of the second run
            signal.raise_signal(signal.SIGINT)
        return real_train(*args)

    monkeypatch.setattr(utils, "train", train)
    monkeypatch.setattr(common, "train_model", partial(common.train_model, epochs=2))
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, accuracy, "--models", "Model1", "--seeds", "1")
    run(monkeypatch, accuracy, "--models", "Model1", "--seeds", "1")
    run(monkeypatch, accuracy, "--models", "Model1", "--seeds", "1")
    assert len(trained) == 5
    rows = common.read_rows(accuracy.CSV)
    assert list(rows[0]) == committed_columns("accuracy.csv")
    recorded = [(row["schedule"], row["epoch"]) for row in rows]
    assert recorded == list(itertools.product(["described", "constant"], ["1", "2"]))


# ---- search.py ----


def test_validation_split_is_the_one_of_the_recorded_runs():
    numbers = torch.arange(60_000)
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    train_set, validation_set = search.split(utils.DigitSet("numbers", numbers, numbers))
    assert torch.equal(train_set.labels, order[:50_000])
    assert torch.equal(validation_set.images, order[50_000:])


def test_search_applies_the_changes_to_the_base_recipe():
    recipe = search.changed_recipe({"clean_epochs": 8, "augmentation": {"degrees": 7, "scale": 0.04}})
    assert (recipe.clean_epochs, recipe.sgd) == (8, search.BASE.sgd)
    assert recipe.augmentation.func is utils.random_affine
    assert recipe.augmentation.keywords == {"degrees": 7, "scale": 0.04}
    assert search.changed_recipe({}).clean_epochs == 5  # as in the recorded rows


def test_every_recorded_configuration_can_be_run_again():
    known = []
    for configuration in search.CONFIGURATIONS:
        for seed in configuration.seeds:
            known.append(search.identity(configuration, seed))
    for row in common.read_rows(ROOT / "benchmarks" / "search.csv"):
        assert {name: row[name] for name in ("before", "after", "changes", "seed")} in known


def test_search_trains_and_records_what_is_missing(monkeypatch):
    changes = {"augmentation": {"degrees": 7, "shift": 0.04, "scale": 0.04}}
    configuration = search.Configuration([8], [8, 12], changes, seeds=(1, 2))
    monkeypatch.setattr(search, "CONFIGURATIONS", [configuration])
    monkeypatch.setattr(search, "IMAGES", 300)
    monkeypatch.setattr(search, "TRAIN_IMAGES", 200)
    run(monkeypatch, search)
    rows = common.read_rows(search.CSV)
    assert list(rows[0]) == committed_columns("search.csv")
    recorded = [(row["before"], row["after"], row["seed"]) for row in rows]
    assert recorded == [("8", "8 12", "1"), ("8", "8 12", "2")]
    assert len(rows[0]["val_acc_by_epoch"].split()) == common.EPOCHS
    monkeypatch.setattr(common, "train_model", None)  # would fail if it were called
    run(monkeypatch, search)


# ---- dropout_ablation.py ----


def test_dropout_is_active_in_the_chosen_block_only():
    model = Model1().train()
    dropout_ablation.activate_dropout(model, dropout_ablation.LAST_BLOCK)
    active = [name for name, layer in model.named_modules() if layer.training]
    assert active == ["convblock7.3"]


def test_dropout_ablation_evaluates_the_recorded_networks(small, monkeypatch):
    monkeypatch.setattr(common, "SEEDS", (1,))
    model = create_model("Model1")
    path = common.checkpoint_path("accuracy-Model1-described-1")
    common.train_model(model, utils.RECIPES["Model1"], small(300), small(100), path, epochs=1)
    run(monkeypatch, dropout_ablation)
    rows = common.read_rows(dropout_ablation.CSV)
    assert list(rows[0]) == committed_columns("dropout_ablation.csv")
    assert [row["dropout"] for row in rows] == list(dropout_ablation.SETTINGS)
    loader = utils.BatchLoader(small(300), 100, "cpu")
    _, expected = utils.test(model, "cpu", loader, torch.nn.functional.nll_loss)
    assert float(rows[0]["train_acc"]) == pytest.approx(expected, abs=1e-3)


# ---- exercises.py and own_digits.py ----


def test_exercises_are_measured_once(monkeypatch):
    measure = exercises.measure

    def measure_one_epoch(variant, train_set, test_set, epochs):
        return measure(variant, train_set, test_set, epochs=1)

    monkeypatch.setattr(exercises, "measure", measure_one_epoch)
    for _ in range(2):
        run(monkeypatch, exercises)
    variants = [row["variant"] for row in common.read_rows(exercises.CSV)]
    assert variants == [exercises.PER_BATCH, exercises.PER_EPOCH, exercises.ADAMW]


def test_own_digits_has_a_row_for_every_kind_of_picture(small, monkeypatch):
    path = common.checkpoint_path("run")
    model = create_model("Model3")
    common.train_model(model, utils.RECIPES["Model3"], small(300), small(100), path, epochs=1)
    run(monkeypatch, own_digits, str(path), "--images", "1")
    rows = common.read_rows(own_digits.CSV)
    assert [row["pictures"] for row in rows] == list(own_digits.KINDS)
    for row in rows:
        assert row["model"] == "Model3"
        assert float(row["accuracy"]) in (0, 100)


# ---- epoch_time.py ----


@pytest.fixture
def mnist_files(small, folder):
    """Write stand-in digits in MNIST's format, which the DataLoader variant reads with torchvision."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, dataset in (("train", small(300)), ("t10k", small(100, train=False))):
        images = struct.pack(">4i", 0x803, len(dataset), 28, 28) + dataset.images.numpy().tobytes()
        labels = struct.pack(">2i", 0x801, len(dataset)) + dataset.labels.byte().numpy().tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)


def test_epoch_times_are_measured_idle_and_beside_a_busy_process(mnist_files, monkeypatch):
    started = []

    class Process(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Process)
    options = ["--models", "Model4", "--threads", "1", "--rounds", "1"]
    run(monkeypatch, epoch_time, *options, "--tenth")
    run(monkeypatch, epoch_time, *options)
    assert started == []
    run(monkeypatch, epoch_time, *options, "--busy")
    assert started[0].returncode is not None
    rows = common.read_rows(epoch_time.CSV)
    assert [row["busy"] for row in rows] == ["0"] * 6 + ["1"] * 2
    assert [row["images"] for row in rows] == ["30"] * 3 + ["300"] * 5
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert list(rows[0]) == committed_columns("epoch_time.csv")


def test_every_round_measures_every_variant_in_another_order(mnist_files, monkeypatch):
    run(monkeypatch, epoch_time, "--models", "Model3", "Model5", "--rounds", "5")
    run(monkeypatch, epoch_time, "--models", "Model3", "--rounds", "1")
    rows = common.read_rows(epoch_time.CSV)
    variants = [row["variant"] for row in rows if row["model"] == "Model3"]
    orders = [tuple(variants[i : i + 3]) for i in range(0, 18, 3)]
    assert len(set(orders[:5])) == 5
    for order in orders:
        assert sorted(order) == ["DataLoader", "compute only", "this repository"]


# ---- plots.py ----


def test_plots_show_the_models_that_are_recorded(figures, monkeypatch):
    rows = accuracy_rows("Model3", 1, SEED_1) + accuracy_rows("Model3", 2, SEED_2)
    rows += accuracy_rows("Model1", 1, SEED_1)
    common.write_rows(rows, plots.CSV)
    run(monkeypatch, plots)
    assert [len(shown.figure.axes) for shown in figures] == [1, 1, 1]
    curves = figures[1].figure.axes[0]
    assert curves.get_title() == "Model3"
    assert list(curves.lines[-1].get_ydata()) == pytest.approx([97, 98.95, 99.2, 99.15, 99.0, 99.2, 99.1])
    labels = [text.get_text() for text in figures[2].figure.axes[0].texts]
    assert labels == ["Model1: 99.02 %", "Model3: 99.13 %"]


# ---- tables.py ----


def test_what_is_not_recorded_is_left_out(monkeypatch):
    """There are no other CSV files, and a network was added but not trained yet."""
    monkeypatch.setitem(MODELS, "Model6", Model5)
    common.write_rows(accuracy_rows("Model4", 1, SEED_1), accuracy.CSV)
    current = tables.create_tables()
    assert len(current["overview"].splitlines()) == 3
    assert cells(current["overview"], 0)[0] == "Model4"
    assert len(current["search"].splitlines()) == 2
    assert cells(current["Model1 schedules"], 0)[0] == "published"


def test_page_is_checked_and_updated(folder, monkeypatch):
    page = folder / "README.md"
    page.write_text("# Title\n\n<!-- table: steps -->\n<!-- /table -->\n\nEnd.\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="the table 'steps' is stale"):
        run(monkeypatch, tables, "--check")
    run(monkeypatch, tables, "--write")
    run(monkeypatch, tables, "--check")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- table: steps -->\n\n| step |")
    assert text.endswith("|\n\n<!-- /table -->\n\nEnd.\n")


def test_overview_has_hand_computed_values():
    """The first epoch with at least 99.4 % from there on is 3 and 2: the later one is reported."""
    runs = {
        ("Model1", "described"): [history(ABOVE_FROM_3), history(ABOVE_FROM_2)],
        ("Model2", "described"): [history(SEED_1), history(ABOVE_FROM_3)],
    }
    table = tables.overview_table(runs)
    assert cells(table, 0) == ["Model1", "4,312", "99.53 ± 0.04", "99.40", "3"]
    assert cells(table, 1)[3:] == ["98.80", "never"]


def test_schedules_that_are_the_same_runs_share_a_row():
    """Best 99.2 and 99.4, last 99.0 and 99.2, lowest of the last five 98.8 and 99.1."""
    histories = [history(SEED_1), history(SEED_2)]
    runs = {("Model3", "described"): histories, ("Model3", "constant"): histories}
    table = tables.schedules_table("Model3", runs)
    expected = [
        "99.50 ± 0.00 (99.50 to 99.50)",
        "99.30 ± 0.14 (99.20 to 99.40)",
        "99.10 ± 0.14",
        "98.95 ± 0.21",
    ]
    assert cells(table, 0) == ["constant, 0.01 = as described", *expected]
    assert cells(table, 1) == ["published", "99.50", "99.28", "", ""]
    runs["Model3", "constant"] = histories[:1]
    table = tables.schedules_table("Model3", runs)
    assert [cells(table, row)[0] for row in (0, 1)] == ["constant, 0.01", "as described"]


def test_seeds_table_has_hand_computed_values():
    runs = {("Model4", "described"): [history(ABOVE_FROM_3), history(ABOVE_FROM_2)]}
    table = tables.seeds_table("Model4", runs)
    assert cells(table, 0) == ["1", "99.50", "99.50", "99.40", "3"]
    assert cells(table, 1) == ["2", "99.50", "99.56", "99.50", "2"]
    assert cells(table, 2) == ["all", "99.50 ± 0.00", "99.53 ± 0.04", "99.40", "3"]


def test_steps_table_has_hand_computed_gains():
    """The means of the last five epochs are 99.02, 99.24 and 99.50; no gain skips a missing step."""
    runs = {
        ("Model1", "described"): [history(SEED_1)],
        ("Model2", "described"): [history(SEED_2)],
        ("Model4", "described"): [history(ABOVE_FROM_3)],
    }
    table = tables.steps_table(runs)
    assert cells(table, 0)[1:] == ["99.02", "98.80", ""]
    assert cells(table, 1)[1:] == ["99.24", "99.10", "+0.22"]
    assert cells(table, 2)[1:] == ["99.50", "99.40", ""]


def test_search_table_has_hand_computed_values():
    changes = '{"batch_size": 64, "sgd": {"lr": 0.07, "nesterov": true}}'
    row = {"before": "8 8", "after": "16", "changes": changes, "parameters": "1234"}
    rows = [
        {**row, "mean_last_five": "99.1", "worst_last_five": "98.9", "loss_last_five": "0.02"},
        {**row, "mean_last_five": "99.2", "worst_last_five": "99.0", "loss_last_five": "0.03"},
    ]
    recipe = "batch size 64, lr 0.07, nesterov True"
    expected = ["8 8 → 16", "1,234", recipe, "2", "99.150", "98.90", "0.0250"]
    assert cells(tables.search_table(rows), 0) == expected
    assert tables.recipe_text({}) == "base"


def test_devices_table_compares_the_runs_of_a_gpu_with_those_of_the_cpu():
    rows = accuracy_rows("Model4", 1, SEED_1) + accuracy_rows("Model4", 2, SEED_2)
    assert len(tables.devices_table(rows).splitlines()) == 2
    rows += accuracy_rows("Model4", 1, ABOVE_FROM_2, device="A GPU")
    assert cells(tables.devices_table(rows), 0) == ["Model4", "A GPU", "99.56", "99.02 to 99.24"]
    assert len(common.recorded_runs(rows)["Model4", "described"]) == 2


def test_layers_table_sums_the_parameters_of_a_block():
    table = tables.layers_table("Model2")
    assert cells(table, 5) == ["convblock5", "16×8×8", "1,472", "92,192", "14"]  # 10·9·16 + 32
    assert len(table.splitlines()) == 2 + 10


def epoch_time_rows(model, variant, *seconds, busy="0", spincount="5000", images="60000"):
    """Return rows of epoch_time.csv, one per round."""
    row = {"model": model, "busy": busy, "variant": variant, "images": images, "spincount": spincount}
    return [{**row, "seconds": str(value), "device": "CPU", "threads": "2"} for value in seconds]


def test_epoch_time_table_compares_this_repository_round_by_round():
    """The ratios are 0.75, 0.111 and 0.4, and 3, 1 and 1.25."""
    rows = epoch_time_rows("Model3", "this repository", 3, 1, 2)
    rows += epoch_time_rows("Model3", "this repository", 2.5, busy="1")
    rows += epoch_time_rows("Model3", "compute only", 1, 1, 1.6)
    rows += epoch_time_rows("Model3", "DataLoader", 4, 9, 5)
    rows += epoch_time_rows("Model3", "DataLoader", 0.5, images="6000")
    table = tables.epoch_time_table(rows)
    ratios = ["0.40 (0.11 to 0.75)", "1.25 (1.00 to 3.00)"]
    assert cells(table, 0) == ["Model3", "CPU, 2 threads", "5.0", "", "2.0", "1.0", *ratios]
    assert cells(table, 1) == ["Model3", "CPU, 2 threads, busy", "", "", "2.5", "", "", ""]


def test_spincount_table_compares_idle_and_busy_epochs():
    rows = epoch_time_rows("Model4", "this repository", 1.5, 1.25, 1, spincount="1000", images="6000")
    rows += epoch_time_rows("Model4", "this repository", 9, spincount="1000")
    rows += epoch_time_rows("Model3", "this repository", 9, spincount="1000", images="6000")
    rows += epoch_time_rows("Model4", "this repository", 1, spincount="300000", images="6000")
    rows += epoch_time_rows("Model4", "this repository", 3, busy="1", spincount="1000", images="6000")
    rows += epoch_time_rows("Model4", "DataLoader", 7, busy="1", spincount="1000", images="6000")
    table = tables.spincount_table(rows)
    assert cells(table, 0) == ["1000", "1.25", "3.00"]
    assert cells(table, 1) == ["300000", "1.00", ""]

"""README.md and benchmarks/README.md: their tables are the recorded results, and their links exist."""

import re
import sys

import common
import pytest
import tables
from conftest import ROOT

import utils

SEED_1 = [97, 98.9, 99.0, 99.2, 98.8, 99.1, 99.0]  # test accuracies per epoch
SEED_2 = [97, 99.0, 99.4, 99.1, 99.2, 99.3, 99.2]
ABOVE_FROM_3 = [98, 99.3, 99.5, 99.4, 99.6, 99.5, 99.5]
ABOVE_FROM_2 = [98, 99.4, 99.5, 99.7, 99.6, 99.5, 99.5]


@pytest.fixture(scope="module")
def current_tables():
    return tables.create_tables()


def history(test_acc):
    """Return a run with the given test accuracies."""
    return utils.History(test_acc=test_acc, train_acc=[99.5] * len(test_acc))


def cells(table, row):
    """Return the cells of a row of a table in Markdown, numbered from 0 below the header."""
    return [cell.strip() for cell in table.splitlines()[row + 2].strip("|").split("|")]


# ---- the pages ----


@pytest.mark.parametrize("path", tables.PAGES, ids=["README.md", "benchmarks/README.md"])
def test_tables_are_up_to_date(path, current_tables):
    stale = tables.stale_tables(path.read_text(encoding="utf-8"), current_tables)
    assert stale == [], "run python benchmarks/tables.py --write"


@pytest.mark.parametrize("path", tables.PAGES, ids=["README.md", "benchmarks/README.md"])
def test_linked_files_exist(path):
    page = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", page)
    links += re.findall(r'src="([^"]+)"', page)
    for link in links:
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("name", ["Model1", "Model2", "Model3", "Model4", "Model5"])
def test_five_seeds_of_15_epochs_are_recorded(name):
    runs = common.recorded_runs(common.read_rows(ROOT / "benchmarks" / "accuracy.csv"))
    schedules = ["described"]
    if name in common.PUBLISHED:
        schedules.append("constant")
    for schedule in schedules:
        epochs = [run.epochs for run in runs[name, schedule]]
        assert epochs == [15] * 5


def test_converted_test_images_lose_at_most_one_point():
    accuracy = {}
    for row in common.read_rows(ROOT / "benchmarks" / "own_digits.csv"):
        if row["images"] == "1000":
            accuracy[row["pictures"]] = float(row["accuracy"])
    assert len(accuracy) >= 9
    assert min(accuracy.values()) >= accuracy["unchanged"] - 1


# ---- tables.py ----


@pytest.fixture
def page(tmp_path, monkeypatch, current_tables):
    """Return the path of a page with two current tables, which is the only page of `tables.main()`."""
    path = tmp_path / "PAGE.md"
    overview = tables.marked_table("overview", current_tables)
    steps = tables.marked_table("steps", current_tables)
    path.write_text(f"# Title\n\n{overview}\n\nText.\n\n{steps}\n\nEnd.\n", encoding="utf-8")
    monkeypatch.setattr(tables, "PAGES", [path])
    monkeypatch.setattr(tables, "create_tables", lambda: current_tables)
    return path


def run_tables(monkeypatch, option):
    monkeypatch.setattr(sys, "argv", ["tables.py", option])
    tables.main()


def change(path, old, new):
    """Replace the first occurrence of a text in a file."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_check_passes_for_current_tables(page, monkeypatch):
    run_tables(monkeypatch, "--check")


def test_check_names_the_table_with_a_changed_number(page, monkeypatch):
    change(page, "4,312", "4,313")
    with pytest.raises(SystemExit) as error:
        run_tables(monkeypatch, "--check")
    message = str(error.value)
    assert "PAGE.md: the table 'overview' is stale" in message
    assert "run python benchmarks/tables.py --write" in message
    assert "steps" not in message


def test_write_restores_a_table_and_nothing_else(page, monkeypatch):
    before = page.read_text(encoding="utf-8")
    change(page, "4,312", "4,313")
    run_tables(monkeypatch, "--write")
    assert page.read_text(encoding="utf-8") == before


def test_write_fills_an_empty_table(page, monkeypatch, current_tables):
    page.write_text("<!-- table: steps -->\n<!-- /table -->\n", encoding="utf-8")
    run_tables(monkeypatch, "--write")
    assert page.read_text(encoding="utf-8") == tables.marked_table("steps", current_tables) + "\n"


def test_table_without_end_is_rejected_and_the_page_kept(page, monkeypatch):
    change(page, "<!-- /table -->", "")
    before = page.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="a table has no end: add the line <!-- /table -->"):
        run_tables(monkeypatch, "--write")
    assert page.read_text(encoding="utf-8") == before


def test_unknown_table_is_rejected(page, monkeypatch):
    change(page, "table: steps", "table: stairs")
    with pytest.raises(ValueError, match="there is no table 'stairs': choose one of overview, "):
        run_tables(monkeypatch, "--check")


def test_overview_has_hand_computed_values():
    """The first epoch with at least 99.4 % from there on is 3 and 2: the later one is reported."""
    runs = {("Model1", "described"): [history(ABOVE_FROM_3), history(ABOVE_FROM_2)]}
    row = cells(tables.overview_table(runs), 0)
    assert row == ["Model1", "4,312", "99.53 ± 0.04", "99.40", "3"]


def test_overview_says_never_if_one_seed_falls_below_the_target():
    runs = {("Model1", "described"): [history(SEED_1), history(ABOVE_FROM_3)]}
    row = cells(tables.overview_table(runs), 0)
    assert row[3:] == ["98.80", "never"]


def test_overview_has_at_most_five_columns(current_tables):
    assert len(cells(current_tables["overview"], 0)) == 5


def test_schedules_table_has_hand_computed_values():
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
    assert cells(table, 0) == ["constant, 0.01", *expected]
    assert cells(table, 1) == ["as described", *expected]
    assert cells(table, 2) == ["published", "99.50", "99.28", "", ""]


def test_seeds_table_has_hand_computed_values():
    runs = {("Model4", "described"): [history(ABOVE_FROM_3), history(ABOVE_FROM_2)]}
    table = tables.seeds_table("Model4", runs)
    assert cells(table, 0) == ["1", "99.50", "99.50", "99.40", "3"]
    assert cells(table, 1) == ["2", "99.50", "99.56", "99.50", "2"]
    assert cells(table, 2) == ["all", "99.50 ± 0.00", "99.53 ± 0.04", "99.40", "3"]


def test_steps_table_has_hand_computed_gains():
    runs = {
        ("Model1", "described"): [history(SEED_1)],  # mean of the last five epochs: 99.02
        ("Model2", "described"): [history(SEED_2)],  # 99.24
    }
    table = tables.steps_table(runs)
    assert cells(table, 0)[1:] == ["99.02", "98.80", ""]
    assert cells(table, 1)[1:] == ["99.24", "99.10", "+0.22"]


def test_search_table_has_hand_computed_values():
    row = {"before": "8 8", "after": "16", "changes": "{}", "parameters": "1234"}
    rows = [
        {**row, "mean_last_five": "99.1", "worst_last_five": "98.9", "loss_last_five": "0.02"},
        {**row, "mean_last_five": "99.2", "worst_last_five": "99.0", "loss_last_five": "0.03"},
    ]
    expected = ["8 8 → 16", "1,234", "Model4's", "2", "99.150", "98.90", "0.0250"]
    assert cells(tables.search_table(rows), 0) == expected


def test_layers_table_sums_the_parameters_of_a_block():
    table = tables.layers_table("Model2")
    assert cells(table, 5) == ["convblock5", "16×8×8", "1,472", "92,192", "14"]  # 10·9·16 + 32
    assert len(table.splitlines()) == 2 + 10


def test_columns_table_shows_every_column_that_is_not_hidden():
    rows = [{"pictures": "inverted", "vs_original": "0.5", "model": "Model4", "device": "CPU"}]
    table = tables.columns_table(rows, hidden=["model", "device"])
    assert table.splitlines()[0] == "| pictures | vs original |"
    assert cells(table, 0) == ["inverted", "0.5"]


def time_row(model, variant, seconds):
    return {
        "model": model,
        "pass": "train",
        "variant": variant,
        "seconds": seconds,
        "device": "CPU",
        "threads": "2",
    }


def test_epoch_time_table_has_a_column_per_variant():
    rows = [
        time_row("Model3", "this repository", "9.25"),
        time_row("Model3", "compute only", "8.66"),
        time_row("previous Model4", "this repository", "20.0"),
    ]
    table = tables.epoch_time_table(rows)
    assert cells(table, 0) == ["Model3", "CPU", "2", "", "9.2", "8.7", "", ""]
    assert len(table.splitlines()) == 3


def test_networks_are_compared_with_the_previous_model4():
    rows = [
        time_row("Model4", "this repository", "15.0"),
        time_row("previous Model4", "this repository", "20.0"),
    ]
    table = tables.networks_time_table(rows)
    assert cells(table, 0) == ["Model4", "CPU", "2", "15.0", "0.75"]
    assert cells(table, 1) == ["previous Model4", "CPU", "2", "20.0", "1.00"]

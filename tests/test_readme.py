"""README.md and benchmarks/README.md against the files that their numbers come from."""

import re
import statistics

import pytest

import accuracy
from conftest import ROOT

README = (ROOT / "README.md").read_text()
DETAILS = (ROOT / "benchmarks" / "README.md").read_text()


def rows_of(name):
    return accuracy.read_rows(ROOT / "benchmarks" / name)


def grouped(rows, *columns):
    """`{the rows' values in these columns: the rows}`."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def mean(rows, column):
    return statistics.mean(float(row[column]) for row in rows)


def choice_table():
    """Each configuration that was compared, on the validation split."""
    lines = []
    for (changes,), rows in grouped(rows_of("search.csv"), "changes").items():
        worst = min(float(row["worst_last_five"]) for row in rows)
        numbers = f"{mean(rows, 'mean_last_five'):.3f}", f"{worst:.2f}", f"{mean(rows, 'loss_last_five'):.4f}"
        lines.append([f"`{changes}`", len(rows), *numbers])
    return accuracy.markdown(["changes", "seeds", "mean of last five", "worst", "loss"], lines)


def last_block_table():
    groups = grouped(rows_of("model1_last_block.csv"), "dropout")
    lines = [[key[0], accuracy.spread([float(r["train_acc"]) for r in rows])] for key, rows in groups.items()]
    return accuracy.markdown(["dropout left on", "train accuracy"], lines)


def plain_table(name, *columns):
    return accuracy.markdown(columns, [[row[column] for column in columns] for row in rows_of(name)])


digits_table = lambda: plain_table("own_digits.csv", "pictures", "accuracy", "to_plain")
TIMES = "model", "pass", "variant", "seconds", "fastest", "slowest", "to_usual", "to_floor"
times_table = lambda: plain_table("epoch_time.csv", *TIMES)


def short_times_table():
    """Training passes of the models, a row each."""
    rows = [row for row in rows_of("epoch_time.csv") if row["pass"] == "train"]
    variants = ["A usual, 0 workers", "B ours", "C floor"]
    variants += ["B ours, freed memory not kept", "B ours, usual memory order"]
    lines = []
    for (model,), timed in grouped(rows, "model").items():
        seconds = {row["variant"]: f"{float(row['seconds']):.1f}" for row in timed}
        lines.append([model, *(seconds.get(variant, "") for variant in variants)])
    return accuracy.markdown(["seconds", *(variant[2:] for variant in variants)], lines)


def by_seed(name):
    """The sentence on one model's last five epochs."""
    runs = accuracy.recorded_runs()[name, "described"]
    means = [accuracy.last_five(run) for run in runs]
    worst = min(min(run["test_acc"][-5:]) for run in runs)
    seeds = ", ".join(f"{value:.2f}" for value in means)
    total = f"Mean of the last five epochs {statistics.mean(means):.3f} %"
    return f"{total}, by seed {seeds}; the worst of all {worst:.2f} %."


@pytest.mark.parametrize("title", accuracy.tables())
def test_accuracies_are_those_of_the_csv(title):
    assert accuracy.tables()[title] in README + DETAILS


@pytest.mark.parametrize("name", ["Model1", "Model2", "Model4", "Model5"])
def test_layers_are_those_of_the_networks(name):
    assert accuracy.layers(name) in README


def test_five_seeds_of_15_epochs_with_the_code_as_it_stands():
    runs = accuracy.recorded_runs()
    keys = [(name, "described") for name in accuracy.utils.RECIPES]
    for key in keys + [(name, "constant") for name in accuracy.PUBLISHED]:
        assert [len(run["test_acc"]) for run in runs[key]] == [15] * 5, key


@pytest.mark.parametrize("table", [choice_table, last_block_table, digits_table, times_table])
def test_the_other_tables_are_those_of_their_files(table):
    assert table() in DETAILS


def test_sentences_and_times_are_those_of_their_files():
    assert short_times_table() in README
    assert by_seed("Model4") in README and by_seed("Model5") in README
    assert max(-float(row["to_plain"]) for row in rows_of("own_digits.csv")) <= 1


@pytest.mark.parametrize("page", [README, DETAILS])
def test_every_number_in_the_text_stands_in_a_table(page):
    """Numbers with two decimals and more; those of the recipe and the published ones apart."""
    given = {"3.10", "99.54", "99.45", "99.46", "99.38", "0.75", "0.01", "99.11", "99.28", "0.05", "0.06"}
    lines = (README + DETAILS).splitlines()
    tables = " ".join(line for line in lines if line.startswith("|")) + by_seed("Model4") + by_seed("Model5")
    text = " ".join(line for line in page.splitlines() if not line.startswith("|"))
    numbers = set(re.findall(r"(?<![\d.])\d+\.\d\d+(?![\d.])", text))
    assert numbers <= given | set(re.findall(r"\d+\.\d\d+", tables)), numbers


def test_it_is_short_and_its_links_exist():
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 16_000
    for page, folder in ((README, ROOT), (DETAILS, ROOT / "benchmarks")):
        for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", page):
            assert (folder / link).exists(), link

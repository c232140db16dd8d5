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


def grouped(name, column):
    """Pairs of a value of the column and the rows that have it."""
    groups = {}
    for row in rows_of(name):
        groups.setdefault(row[column], []).append(row)
    return groups.items()


def plain_table(name, columns):
    rows = [[row[column] for column in columns.split()] for row in rows_of(name)]
    return accuracy.markdown(columns.split(), rows)


def choice_table():
    """Each configuration that was compared, on the validation split."""
    lines = []
    for changes, rows in grouped("search.csv", "changes"):
        columns = [[float(row[f"{k}_last_five"]) for row in rows] for k in ("mean", "worst", "loss")]
        mean, worst, loss = statistics.mean(columns[0]), min(columns[1]), statistics.mean(columns[2])
        lines.append([f"`{changes}`", len(rows), f"{mean:.3f}", f"{worst:.2f}", f"{loss:.4f}"])
    return accuracy.markdown(["changes", "seeds", "mean of last five", "worst", "loss"], lines)


def last_block_table():
    groups = grouped("model1_last_block.csv", "dropout")
    lines = [[key, accuracy.spread([float(row["train_acc"]) for row in rows])] for key, rows in groups]
    return accuracy.markdown(["dropout left on", "train accuracy"], lines)


def short_times_table():
    """Training passes of the models, a row each."""
    rows = [row for row in rows_of("epoch_time.csv") if row["pass"] == "train"]
    seconds = {(row["model"], row["variant"]): f"{float(row['seconds']):.1f}" for row in rows}
    variants = ["A usual, 0 workers", "B ours", "C floor"]
    variants += ["B ours, freed memory not kept", "B ours, usual memory order"]
    lines = [[model, *(seconds.get((model, v), "") for v in variants)] for model in ("Model3", "Model4")]
    return accuracy.markdown(["seconds", *(variant[2:] for variant in variants)], lines)


def by_seed(name):
    """The sentence on one model's last five epochs."""
    runs = accuracy.recorded_runs()[name, "described"]
    means = [accuracy.last_five(run) for run in runs]
    worst = min(min(run["test_acc"][-5:]) for run in runs)
    seeds = ", ".join(f"{value:.2f}" for value in means)
    total = f"Mean of the last five epochs {statistics.mean(means):.3f} %"
    return f"{total}, by seed {seeds}; the worst of all {worst:.2f} %."


TABLES = {
    **accuracy.tables(),
    **{f"{name}'s layers": accuracy.layers(name) for name in ("Model1", "Model2", "Model4", "Model5")},
    **{f"{name} by seed": by_seed(name) for name in ("Model4", "Model5")},
    "choice": choice_table(),
    "last block": last_block_table(),
    "digits": plain_table("own_digits.csv", "pictures accuracy to_plain"),
    "times": plain_table("epoch_time.csv", "model pass variant seconds fastest slowest to_usual to_floor"),
    "times in short": short_times_table(),
}


@pytest.mark.parametrize("title", TABLES)
def test_the_pages_have_what_the_files_say(title):
    assert TABLES[title] in README + DETAILS


def test_five_seeds_of_15_epochs_with_the_code_as_it_stands():
    runs = accuracy.recorded_runs()
    keys = [(name, "described") for name in accuracy.utils.RECIPES]
    for key in keys + [(name, "constant") for name in accuracy.PUBLISHED]:
        assert [len(run["test_acc"]) for run in runs[key]] == [15] * 5, key


def test_no_kind_of_picture_costs_a_point():
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

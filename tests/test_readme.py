"""README.md against the files that its numbers come from."""

import csv
import json
import re
import statistics

import pytest

import accuracy
from conftest import ROOT
from model import create_model
import search
import utils

README = (ROOT / "README.md").read_text()


def rows_of(name):
    with open(ROOT / "benchmarks" / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("title", accuracy.tables())
def test_accuracies_are_those_of_the_csv(title):
    assert accuracy.tables()[title] in README


@pytest.mark.parametrize("name", ["Model1", "Model2", "Model4", "Model5"])
def test_layer_tables_are_those_of_the_networks(name):
    assert utils.summarise(create_model(name)) in README


def test_published_figures_and_seeds_are_complete():
    """Five seeds of 15 epochs for every model and schedule that the README has a row for."""
    runs = accuracy.recorded_runs()
    wanted = [(name, "described") for name in utils.RECIPES]
    wanted += [(name, "constant") for name in accuracy.PUBLISHED]
    for key in wanted:
        assert [len(run["test_acc"]) for run in runs[key]] == [15] * 5, key


def test_times_are_those_of_the_csv():
    for row in rows_of("epoch_time.csv"):
        cells = [row["model"], row["pass"], row["variant"], f"{float(row['seconds']):.2f}"]
        line = " | ".join([*cells, row["to_usual"], row["to_floor"]])
        assert f"| {line} |" in README, line


def test_schedules_are_those_of_the_search():
    """Model4's row for each schedule tried: its settings, and the mean of its seeds."""
    by_schedule = {}
    for row in rows_of("search.csv"):
        changes = json.loads(row["changes"])
        name, step, gamma = (
            changes.pop(key, search.BASE[key]) for key in ("scheduler", "step_size", "gamma")
        )
        if changes == search.CHOSEN:
            cells = {"StepLR": (step, gamma), "ReduceLROnPlateau": ("", gamma)}.get(name, ("", ""))
            by_schedule.setdefault((name, *cells), []).append(row)
    assert len(by_schedule) == 8
    for schedule, rows in by_schedule.items():
        mean, loss = (
            statistics.mean(float(row[column]) for row in rows)
            for column in ("mean_last_five", "loss_last_three")
        )
        line = " | ".join([*map(str, schedule), str(len(rows)), f"{mean:.2f}", f"{loss:.4f}"])
        assert f"| {line} |" in README, line


def test_own_digits_are_those_of_the_csv():
    for row in rows_of("own_digits.csv"):
        line = f"| {row['pictures'].replace('_', ' ')} | {row['accuracy']} | {float(row['to_plain']):+.1f} |"
        assert line in README, line
        assert abs(float(row["to_plain"])) <= 2


def test_the_last_block_is_that_of_the_csv():
    by_setting = {}
    for row in rows_of("model1_last_block.csv"):
        by_setting.setdefault(row["dropout"], []).append(float(row["train_acc"]))
    for setting, values in by_setting.items():
        assert f"| {setting} | {accuracy.spread(values)} |" in README


def test_links_to_images_exist():
    for link in re.findall(r"\]\((images/[^)]+)\)", README):
        assert (ROOT / link).exists(), link

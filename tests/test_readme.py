"""README.md and benchmarks/README.md: their tables are the recorded results, and their links exist."""

import re

import accuracy
import pytest
import tables

from runs import recorded_runs

PAGES = pytest.mark.parametrize("path", tables.PAGES, ids=["README.md", "benchmarks/README.md"])


@PAGES
def test_tables_are_up_to_date(path):
    page = path.read_text(encoding="utf-8")
    assert tables.update_tables(page, tables.create_tables()) == page, "run python benchmarks/tables.py"


@PAGES
def test_linked_files_exist(path):
    page = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", page)
    links += re.findall(r'src="([^"]+)"', page)
    for link in links:
        assert link == "https" or (path.parent / link).exists(), link


def test_five_seeds_of_15_epochs_are_recorded():
    runs = recorded_runs()
    for experiment in accuracy.EXPERIMENTS.keys() & runs.keys():
        completed = {seed: history.completed for seed, history in runs[experiment].items()}
        assert completed == {1: 15, 2: 15, 3: 15, 4: 15, 5: 15}, experiment


def test_learning_rate_of_model3_never_dropped():
    for history in recorded_runs()["Model3", "described"].values():
        assert set(history.learning_rates) == {0.01}

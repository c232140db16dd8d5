"""README.md and benchmarks/README.md: their tables are the recorded results, and their links exist."""

import re

import accuracy
import tables

from runs import recorded_runs


def test_tables_are_up_to_date():
    created = tables.create_tables()
    for path in tables.PAGES:
        page = path.read_text(encoding="utf-8")
        assert tables.update_tables(page, created) == page, f"{path}: run python benchmarks/tables.py"


def test_linked_files_exist():
    for path in tables.PAGES:
        page = path.read_text(encoding="utf-8")
        links = re.findall(r"\]\((?!https:)([^)#]+)[^)]*\)", page)
        links += re.findall(r'src="([^"]+)"', page)
        for link in links:
            assert (path.parent / link).exists(), link


def test_five_seeds_of_15_epochs_are_recorded():
    for experiment in accuracy.EXPERIMENTS:
        runs = recorded_runs()[experiment]
        completed = {seed: history.completed for seed, history in runs.items()}
        assert completed == {1: 15, 2: 15, 3: 15, 4: 15, 5: 15}, experiment


def test_learning_rate_of_model3_never_dropped():
    for history in recorded_runs()["Model3", "described"].values():
        assert set(history.learning_rates) == {0.01}

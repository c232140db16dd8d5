"""README.md and benchmarks/README.md: their tables are the recorded results, and their links exist."""

import re

import common
import pytest
import tables
from conftest import ROOT

PAGES = pytest.mark.parametrize("path", tables.PAGES, ids=["README.md", "benchmarks/README.md"])


@PAGES
def test_tables_are_up_to_date(path):
    stale = tables.stale_tables(path.read_text(encoding="utf-8"), tables.create_tables())
    assert stale == [], "run python benchmarks/tables.py --write"


@PAGES
def test_linked_files_exist(path):
    page = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", page)
    links += re.findall(r'src="([^"]+)"', page)
    for link in links:
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("Model1", "constant"),
        ("Model1", "described"),
        ("Model2", "constant"),
        ("Model2", "described"),
        ("Model3", "described"),
        ("Model4", "described"),
        ("Model5", "described"),
    ],
)
def test_five_seeds_of_15_epochs_are_recorded(name, schedule):
    runs = common.recorded_runs(common.read_rows(ROOT / "benchmarks" / "accuracy.csv"))
    assert [history.completed for history in runs[name, schedule]] == [15] * 5

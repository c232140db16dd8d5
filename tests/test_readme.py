"""README.md against the files that its numbers come from."""

import re

import pytest

import accuracy
from conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("title", accuracy.tables())
def test_tables_are_those_of_the_csv(title):
    assert accuracy.tables()[title] in README


def test_the_committed_notebooks_image_links_exist():
    for link in re.findall(r"\]\((images/[^)]+)\)", README):
        assert (ROOT / link).exists(), link

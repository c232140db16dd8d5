"""The programs in benchmarks/: no run is lost or repeated, and what they compute is correct."""

import sys
from unittest import mock

import accuracy
import common
import pytest
import tables
from helpers import interrupt

import plots
import runs
import utils

SEED_1 = [97, 98.9, 99.0, 99.2, 98.8, 99.1, 99.0]  # test accuracies per epoch; mean of the last five: 99.02
SEED_2 = [97, 99.0, 99.4, 99.1, 99.2, 99.3, 99.2]  # 99.24
ABOVE_FROM_3 = [98, 99.3, 99.5, 99.4, 99.6, 99.5, 99.5]  # 99.50
ABOVE_FROM_2 = [98, 99.4, 99.5, 99.7, 99.6, 99.5, 99.5]  # 99.56


def histories(*accuracies):
    """Return runs with the given test accuracies, as a dictionary from seed."""
    recorded = {}
    for seed, test_acc in enumerate(accuracies, 1):
        recorded[seed] = runs.History(test_acc=test_acc)
    return recorded


def test_interrupted_run_is_resumed_and_recorded_once(small, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "EXPERIMENTS", {("Model4", "constant"), ("Model4", "described")})
    monkeypatch.setattr(accuracy, "CSV", tmp_path / "accuracy.csv")
    monkeypatch.setattr(common, "EPOCHS", 3)
    monkeypatch.setattr(utils, "load_data", lambda standin: (small(300), small(100, train=False)))
    monkeypatch.setenv("S7_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["accuracy", "--seeds", "1"])
    with interrupt("utils.train", call=6), pytest.raises(KeyboardInterrupt):
        accuracy.main()
    with mock.patch("utils.train", wraps=utils.train) as train:
        accuracy.main()
        accuracy.main()
    assert train.call_count == 2  # the second epoch was repeated, and the third one trained
    rows = common.read_rows(accuracy.CSV)
    committed = common.read_rows(runs.ROOT / "benchmarks" / "accuracy.csv")
    assert list(rows[0]) == list(committed[0])
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "1", "2", "3"]
    assert [row["learning_rate"] for row in rows] == ["0.1", "0.1", "0.1", "0.1", "0.075", "0.05625"]


@pytest.mark.parametrize(
    ("model", "parameters", "layers"),
    [
        ("Model2", 7524, "crb crb c m crb crb crb crb crb c"),
        ("Model2 with ReLU and BatchNorm in convblock3", 7524 + 20, "crb crb crb m crb crb crb crb crb c"),
        ("Model2 with an average", 7524 - 300, "crb crb c m crb crb crb crb crb a c"),
        ("Model2 with BatchNorm before ReLU", 7524, "cbr cbr c m cbr cbr cbr cbr cbr c"),
        ("Model2 with growing widths", 7736, "crb crb m crb crb crb crb crb c"),
    ],
)
def test_networks_between_model2_and_model4_differ_in_one_part(model, parameters, layers):
    """Layers are given by the first letters of their classes."""
    network = accuracy.NETWORKS[model]()
    assert common.count_parameters(network) == parameters
    letters = ""
    for module in network.modules():
        if not list(module.children()):
            letters += type(module).__name__[0].lower()
    assert letters == layers.replace(" ", "")


def test_results_are_hand_computed_values():
    """The first epoch with at least 99.4 % from there on is 3 and 2: the later one is reported."""
    both = histories(ABOVE_FROM_3, ABOVE_FROM_2)
    assert plots.result_cells(both.values()) == ["99.53 ± 0.04", "99.40", 3]
    one = histories(SEED_1, ABOVE_FROM_3)
    assert plots.result_cells(one.values())[1:] == ["98.80", "never"]


def test_gains_are_paired_by_seed():
    """Of differences of 0.54 and 0.26 the mean is 0.40, and the standard error half of 0.28."""
    recorded = {"a": histories(SEED_1, SEED_2), "b": histories(ABOVE_FROM_2, ABOVE_FROM_3, SEED_1)}
    changes = {"first": "a", "second": "b", "third": "b"}
    _, _, first, second, third = tables.changes_table(changes, recorded).splitlines()
    assert first == "| first | 99.13 ± 0.16 | 98.80 | 0 of 2 |  |"
    assert second.endswith("| 98.80 | 2 of 3 | +0.40 ± 0.14 |")
    assert third.endswith("| +0.40 ± 0.14 |")
    *_, third = tables.changes_table(changes, recorded, step_by_step=True).splitlines()
    assert third.endswith("| +0.00 ± 0.00 |")
    assert tables.gain_cell([0.1, 0.2, -0.3]) == "+0.00 ± 0.15, not distinguishable"


def test_tables_of_a_page_are_replaced():
    page = "# Title\n\n<!-- table: a -->\n\n| old |\n\n<!-- /table -->\n\nText.\n"
    page += "<!-- table: b -->\n\n| b |\n\n<!-- /table -->\n\nEnd.\n"
    updated = tables.update_tables(page, {"a": "| new |", "b": "| b |"})
    assert updated == page.replace("old", "new")

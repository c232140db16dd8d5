"""The programs in benchmarks/: no run is lost or repeated, and what they compute is correct."""

import signal
import sys
from functools import partial

import accuracy
import common
import pytest
import search
import tables
import torch
from conftest import ROOT

import plots
import utils
from model import create_model

SEED_1 = [97, 98.9, 99.0, 99.2, 98.8, 99.1, 99.0]  # test accuracies per epoch; mean of the last five: 99.02
SEED_2 = [97, 99.0, 99.4, 99.1, 99.2, 99.3, 99.2]  # 99.24
ABOVE_FROM_3 = [98, 99.3, 99.5, 99.4, 99.6, 99.5, 99.5]  # 99.50
ABOVE_FROM_2 = [98, 99.4, 99.5, 99.7, 99.6, 99.5, 99.5]  # 99.56


def history(test_acc):
    """Return a run with the given test accuracies."""
    return utils.History(test_acc=test_acc, train_acc=[99.5] * len(test_acc))


def cells(table, row):
    """Return the cells of a row of a table in Markdown, numbered from 0 below the header."""
    return [cell.strip() for cell in table.splitlines()[row + 2].strip("|").split("|")]


def test_interrupted_run_is_resumed_and_recorded_once(small, tmp_path, monkeypatch):
    trained = []
    real_train = utils.train

    def train(*args):
        trained.append(args)
        if len(trained) == 4:  # the second epoch of the second run
            signal.raise_signal(signal.SIGINT)
        return real_train(*args)

    for key in list(accuracy.EXPERIMENTS):
        if key not in (("Model1", "described"), ("Model1", "constant")):
            monkeypatch.delitem(accuracy.EXPERIMENTS, key)
    monkeypatch.setattr(accuracy, "CSV", tmp_path / "accuracy.csv")
    train_and_describe = partial(accuracy.train_and_describe, epochs=2)
    monkeypatch.setattr(accuracy, "train_and_describe", train_and_describe)
    monkeypatch.setattr(utils, "load_data", lambda standin: (small(300), small(100, train=False)))
    monkeypatch.setattr(utils, "train", train)
    monkeypatch.setenv("S7_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["accuracy", "--models", "Model1", "--seeds", "1"])
    with pytest.raises(KeyboardInterrupt):
        accuracy.main()
    accuracy.main()
    accuracy.main()
    assert len(trained) == 5
    rows = common.read_rows(accuracy.CSV)
    committed = common.read_rows(ROOT / "benchmarks" / "accuracy.csv")
    assert list(rows[0]) == list(committed[0])
    recorded = [(row["schedule"], row["epoch"]) for row in rows]
    assert recorded == [("described", "1"), ("described", "2"), ("constant", "1"), ("constant", "2")]


def test_validation_split_is_the_one_of_the_recorded_runs():
    numbers = torch.arange(60_000)
    train_set, validation_set = utils.split(utils.DigitSet("numbers", numbers.byte(), numbers))
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(train_set.labels, order[:50_000])
    assert torch.equal(validation_set.labels, order[50_000:])


def test_average_is_evaluated_and_the_network_trained():
    """With a decay of 0.5, the average after two steps is the mean of the weights after each of them."""
    network = create_model("Model5")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    model = search.Averaged(network, optimizer, decay=0.5).train()
    weights = []
    for _ in range(2):
        model(torch.randn(8, 1, 28, 28)).max().backward()
        optimizer.step()
        weights.append(network.logits[0].weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    data = torch.randn(8, 1, 28, 28)
    expected = model.average.module.eval()
    torch.testing.assert_close(expected.logits[0].weight, (weights[0] + weights[1]) / 2)
    assert torch.equal(model.eval()(data), expected(data))


def test_student_learns_from_labels_and_teacher_half_and_half():
    """At temperature 2, scores of ±ln 9 give probabilities of 9/10 and 1/10, scores of ±ln 4 4/5 and 1/5."""
    student = torch.nn.Identity()
    teacher_scores = torch.tensor([[4.0, 1 / 4]]).log()
    criterion = search.TeacherLoss(student, torch.nn.Linear(2, 2), temperature=2)
    criterion.teacher = lambda batch: teacher_scores
    output = student(torch.tensor([[9.0, 1 / 9]]).log().log_softmax(dim=1).requires_grad_())
    target = torch.tensor([0])
    label_loss = torch.tensor(82 / 81).log()
    assert criterion(output.detach(), target) == pytest.approx(label_loss)
    divergence = 0.8 * torch.tensor(0.8 / 0.9).log() + 0.2 * torch.tensor(0.2 / 0.1).log()
    assert criterion(output, target).item() == pytest.approx(0.5 * label_loss + 0.5 * 4 * divergence)


def test_overview_has_hand_computed_values():
    """The first epoch with at least 99.4 % from there on is 3 and 2: the later one is reported."""
    runs = {
        ("Model1", "described"): {1: history(ABOVE_FROM_3), 2: history(ABOVE_FROM_2)},
        ("Model2", "described"): {1: history(SEED_1), 2: history(ABOVE_FROM_3)},
    }
    table = tables.overview_table(runs)
    assert cells(table, 0) == ["Model1", "4,312", "99.53 ± 0.04", "99.40", "3"]
    assert cells(table, 1)[3:] == ["98.80", "never"]


def test_gains_are_paired_by_seed():
    """Of differences of 0.54 and 0.26 the mean is 0.40, and the standard error half of 0.28."""
    runs = {
        ("Model1", "described"): {1: history(SEED_1), 2: history(SEED_2)},
        ("Model1", "no_dropout"): {2: history(ABOVE_FROM_3), 1: history(ABOVE_FROM_2), 3: history(SEED_1)},
        ("Model2", "rate"): {1: history(SEED_1)},  # there is no step before it
    }
    table = tables.steps_table(runs)
    assert cells(table, 0) == ["Model1", "99.13 ± 0.16", "98.80", ""]
    assert cells(table, 1)[3] == "+0.40 ± 0.14"
    assert cells(table, 2)[1:] == ["99.02", "98.80", ""]
    assert tables.gain_cell([0.1, 0.2, -0.3]) == "+0.00 ± 0.15, not distinguishable"


def test_calculated_receptive_fields_are_the_measured_ones():
    layers = plots.layer_table(create_model("Model4"))
    for layer, (_, field) in zip(layers, tables.calculate_fields(layers), strict=True):
        assert field == layer.receptive_field


def test_page_is_checked_and_updated(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("# Title\n\n<!-- table: steps -->\n<!-- /table -->\n\nEnd.\n", encoding="utf-8")
    monkeypatch.setattr(tables, "PAGES", [page])
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    with pytest.raises(SystemExit, match="the table 'steps' is stale"):
        tables.main()
    monkeypatch.setattr(sys, "argv", ["tables", "--write"])
    tables.main()
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    tables.main()
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- table: steps -->\n\n| step |")
    assert text.endswith("|\n\n<!-- /table -->\n\nEnd.\n")

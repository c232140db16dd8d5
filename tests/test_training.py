"""Training and evaluation against plain PyTorch loops and losses by hand; the progress bar."""

import copy
import re
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_identical
from torch import nn
from torch.utils.data import DataLoader

import utils
from model import create_model


def train(model, loader, lr=0.01):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return utils.train(model, "cpu", loader, optimizer, F.nll_loss)


# ---- plain PyTorch loops ----


def test_train_matches_a_plain_pytorch_loop(small, capsys):
    """The last batch is smaller, and the model is in the other mode before."""
    loader = DataLoader(small(190), batch_size=20)
    model = create_model("Model3")
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9)
    loss_sum = 0
    correct = 0
    for data, target in loader:
        optimizer.zero_grad()
        output = reference(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(data)
        correct += (output.argmax(dim=1) == target).sum().item()
    mean_loss, accuracy = train(model.eval(), loader)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    assert mean_loss == pytest.approx(loss_sum / 190, rel=1e-5)
    assert accuracy == pytest.approx(100 * correct / 190)
    text = f"Train: Loss={loss:.4f} Batch_id=9 Accuracy={accuracy:.2f}: 100%"  # the loss of the last batch
    assert text in capsys.readouterr().out


def test_test_matches_one_batch_of_all_images_and_changes_no_state(small, capsys):
    """The last batch is smaller, and the model has dropout and is in the other mode before."""
    loader = utils.BatchLoader(small(130), 50, "cpu")
    model = create_model("Model1")
    before = copy.deepcopy(model.state_dict())
    loss, accuracy = utils.test(model, "cpu", loader, F.nll_loss)
    assert_identical(model.state_dict(), before)
    with torch.no_grad():
        output = model.eval()(loader.data)
    assert loss == pytest.approx(F.nll_loss(output, loader.target).item(), rel=1e-5)
    correct = (output.argmax(dim=1) == loader.target).sum().item()
    assert accuracy == pytest.approx(100 * correct / 130)
    text = f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/130 ({accuracy:.2f}%)\n"
    assert capsys.readouterr().out == text


# ---- losses by hand ----


class Echo(nn.Module):
    """A network whose output is its input."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, data):
        return data + self.zero


def test_sum_of_losses_is_exact():
    """In float32, 1,000 times 0.1 would be 100 exactly, but the float32 number is larger than 0.1."""
    predictions = torch.tensor([[-0.1, -3.0]])
    loss, _ = train(Echo(), [(predictions, torch.tensor([0]))] * 1000, lr=0.0)
    assert loss == pytest.approx(0.10000000149011612, rel=1e-12)


@pytest.mark.parametrize(("batch", "value"), [(0, "nan"), (1, "inf"), (2, "nan")])
def test_loss_that_is_not_finite_stops_the_training_at_its_batch(batch, value):
    losses = [1.0, 1.0, 1.0]
    losses[batch] = float(value)
    batches = []
    for loss in losses:
        batches.append((torch.tensor([[-loss, 0.0]]), torch.tensor([0])))
    with pytest.raises(FloatingPointError, match=f"batch {batch}: .*{value}.*learning rate"):
        train(Echo(), batches, lr=0.0)


def test_test_loss_that_is_not_finite_raises():
    batches = [(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))]
    with pytest.raises(FloatingPointError, match="test loss.*nan.*learning rate"):
        utils.test(Echo(), "cpu", batches, F.nll_loss)


# ---- the progress bar ----


def test_progress_is_one_notebook_output_updated_in_place(monkeypatch):
    display = mock.Mock()
    monkeypatch.setattr(utils, "display", display)
    monkeypatch.setattr(utils, "get_ipython", lambda: SimpleNamespace(kernel=None))
    train(Echo(), [(torch.zeros(1, 10), torch.tensor([0]))] * 2)
    display.assert_called_once_with(mock.ANY, raw=True, display_id=True)
    update = display.return_value.update
    update.assert_called_with(mock.ANY, raw=True)
    text = update.call_args.args[0]["text/plain"]
    assert re.search(r"^Train: Loss=\S+ Batch_id=1 Accuracy=\S+: 100%\|█+\| 2/2", text)


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["no IPython", "IPython in a terminal"])
def test_progress_goes_to_stdout_outside_a_notebook(monkeypatch, shell):
    monkeypatch.setattr(utils, "get_ipython", lambda: shell)
    assert utils.progress_file() is sys.stdout

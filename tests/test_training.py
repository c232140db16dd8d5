"""Training and evaluation by hand.

`test_notebook.py` compares the weights after the training cell with those of a plain PyTorch loop.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import utils


def echo():
    """Return a network with one weight, whose output is its input."""
    return nn.PReLU(init=1.0)


def train(model, batches):
    """Train without a change of the weight."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return utils.train(model, "cpu", batches, optimizer, F.nll_loss)


def batches_with(losses):
    """Return one batch per loss, each of one sample."""
    return [(torch.tensor([[-loss, 0.0]]), torch.tensor([0])) for loss in losses]


def test_loss_is_the_mean_per_sample_and_each_function_sets_its_mode(capsys):
    """The losses are 1, 3 and 5, and only the first prediction is correct. The last batch is smaller."""
    batches = [
        (torch.tensor([[-1.0, -3.0], [-1.0, -3.0]]), torch.tensor([0, 1])),
        (torch.tensor([[-5.0, -2.0]]), torch.tensor([0])),
    ]
    model = echo().eval()
    assert train(model, batches) == (3, pytest.approx(100 / 3))
    assert model.training
    assert utils.test(model, "cpu", batches, F.nll_loss) == (3, pytest.approx(100 / 3))
    assert not model.training
    text = capsys.readouterr().out
    assert "Train: Loss=5.0000 Batch_id=1 Accuracy=33.33: 100%" in text  # the loss of the last batch
    assert text.endswith("Test set: Average loss: 3.0000, Accuracy: 1/3 (33.33%)\n")


def test_sum_of_losses_is_exact():
    """In float32, 1,000 times 0.1 would be 100 exactly, but the float32 number is larger than 0.1."""
    loss, _ = train(echo(), batches_with([0.1] * 1000))
    assert loss == pytest.approx(0.10000000149011612, rel=1e-12)


def test_loss_that_is_not_finite_raises():
    with pytest.raises(FloatingPointError, match="^batch 1: the loss is inf: lower the learning rate"):
        train(echo(), batches_with([1.0, float("inf")]))
    with pytest.raises(FloatingPointError, match="^the test loss is nan: lower the learning rate"):
        utils.test(echo(), "cpu", batches_with([float("nan")]), F.nll_loss)


def test_loader_without_batches_is_named():
    with pytest.raises(ValueError, match="the loader has no batches"):
        train(echo(), [])
    with pytest.raises(ValueError, match="the loader has no batches"):
        utils.test(echo(), "cpu", [], F.nll_loss)


def test_probabilities_as_target_count_by_their_largest():
    """As many images as classes, as with CutMix and MixUp in a small batch."""
    target = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    assert utils.GetCorrectPredCount(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), target) == 1

"""Training and testing, against plain loops written with torch alone, and every refused argument."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from model import create_model
import utils


@pytest.fixture
def model():
    return create_model("Model3")


def train(model, loader, lr=0.01):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return utils.train(model, "cpu", loader, optimizer, F.nll_loss)


def test_fifty_steps_give_the_weights_of_the_usual_loop(small, model):
    """`DataLoader` with per-image transforms, against the tensor on the device."""
    dataset = small(50 * 128)
    normalise = transforms.Normalize((0.1307,), (0.3081,))
    dataset.transform = transforms.Compose([transforms.ToTensor(), normalise])
    usual = create_model("Model3")
    usual.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(usual.parameters(), lr=0.01, momentum=0.9)
    for data, target in DataLoader(dataset, batch_size=128):
        optimizer.zero_grad()
        F.nll_loss(usual(data), target).backward()
        optimizer.step()
    train(model, utils.BatchLoader(dataset, 128, "cpu"))
    for ours, theirs in zip(model.parameters(), usual.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ordinary", [False, True])
def test_both_return_the_mean_over_samples(small, model, capsys, ordinary):
    """With a rate of 0 and no dropout, each batch's loss can be had from the model itself."""
    loader = utils.BatchLoader(small(130), 50, "cpu")  # the last batch has 30
    if ordinary:
        loader = DataLoader(TensorDataset(loader.data, loader.target), batch_size=50)

    def by_hand():
        outputs, target = torch.cat([model(data) for data, _ in loader]), torch.cat([t for _, t in loader])
        right = sum(output.argmax() == t for output, t in zip(outputs, target)).item()
        return pytest.approx(F.nll_loss(outputs, target).item(), rel=1e-5), right

    expected, right = by_hand()
    loss, accuracy = train(model, loader, lr=0.0)
    assert loss == expected and accuracy == pytest.approx(100 * right / 130)
    text = rf"Train: Loss=\d\.\d{{4}} Batch_id=2 Accuracy={accuracy:.2f}: 100%"
    assert re.search(text, capsys.readouterr().out)
    model.eval()
    expected, right = by_hand()
    loss, accuracy = utils.test(model, "cpu", loader, F.nll_loss)
    assert loss == expected and accuracy == 100 * right / 130
    line = f"Test set: Average loss: {loss:.4f}, Accuracy: {right}/130 ({accuracy:.2f}%)\n"
    assert capsys.readouterr().out == line


def test_correct_predictions_are_counted():
    pred = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert utils.GetCorrectPredCount(pred, torch.tensor([1, 0, 0])) == 2


def test_learning_is_possible(small, model):
    """A network that cannot reach 90 % on drawn digits in three epochs is broken somewhere."""
    loader = utils.BatchLoader(small(6000), 50, "cpu", shuffle=True)
    losses = [train(model, loader, lr=0.05)[0] for _ in range(3)]
    test_loader = utils.BatchLoader(small(1000, train=False), 50, "cpu")
    assert utils.test(model, "cpu", test_loader, F.nll_loss)[1] > 90 and losses[-1] < losses[0]


@pytest.mark.parametrize("batch, value", [(0, "nan"), (2, "nan"), (2, "inf")])
def test_a_loss_that_is_not_finite_is_named(small, model, batch, value):
    loader = utils.BatchLoader(small(200), 50, "cpu")
    loader.data[50 * batch] = float(value)
    with pytest.raises(FloatingPointError, match=f"batch {batch}: the loss is nan"):
        train(model, loader)
    with pytest.raises(FloatingPointError, match="testing: the loss is nan"):  # the weights are by now
        utils.test(model, "cpu", utils.BatchLoader(small(100), 50, "cpu"), F.nll_loss)


def test_a_model_of_another_width_stops_at_its_first_batch(small):
    """By torch itself, in one line."""
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.LogSoftmax(1))
    with pytest.raises(IndexError, match="Target [5-9] is out of bounds"):
        train(narrow, utils.BatchLoader(small(100), 50, "cpu"))


@pytest.mark.parametrize("platform, count", [("linux", 2), ("darwin", 0)])
def test_freed_memory_is_kept_on_linux(monkeypatch, platform, count):
    calls = []
    library = type("Library", (), {"mallopt": lambda self, *numbers: calls.append(numbers)})
    monkeypatch.setattr(utils.ctypes, "CDLL", lambda name: library())
    monkeypatch.setattr(utils.sys, "platform", platform)
    utils.keep_freed_memory()
    assert calls == [(-3, 33_554_432), (-1, 2_147_483_647)][:count]


SETTINGS = [("3", 15, 3), ("a", "b", "a"), ("1", False, True), ("0", True, False), (None, 1, 1)]


@pytest.mark.parametrize("text, default, value", SETTINGS)
def test_settings_come_from_the_environment(monkeypatch, text, default, value):
    if text is not None:
        monkeypatch.setenv("S7_NAME", text)
    assert utils.setting("NAME", default) == value and type(utils.setting("NAME", default)) is type(value)

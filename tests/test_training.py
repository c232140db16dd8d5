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


def test_fifty_steps_give_the_weights_of_the_usual_loop(small):
    """`DataLoader` with per-image transforms, against the tensor on the device."""
    dataset = small(50 * 128)
    normalise = transforms.Normalize((0.1307,), (0.3081,))
    dataset.transform = transforms.Compose([transforms.ToTensor(), normalise])
    usual, fast = create_model("Model3"), create_model("Model3")
    fast.load_state_dict(usual.state_dict())

    optimizer = torch.optim.SGD(usual.parameters(), lr=0.01, momentum=0.9)
    for data, target in DataLoader(dataset, batch_size=128):
        optimizer.zero_grad()
        F.nll_loss(usual(data), target).backward()
        optimizer.step()

    optimizer = torch.optim.SGD(fast.parameters(), lr=0.01, momentum=0.9)
    utils.train(fast, "cpu", utils.BatchLoader(dataset, 128, "cpu"), optimizer, F.nll_loss)
    for ours, theirs in zip(fast.parameters(), usual.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_train_returns_the_mean_over_samples(small):
    """With a rate of 0 and no dropout, each batch's loss can be had from the model itself."""
    loader = utils.BatchLoader(small(130), 50, "cpu")  # the last batch has 30
    model = create_model("Model3").train()
    losses, right = [], 0
    for data, target in loader:
        output = model(data)
        losses += F.nll_loss(output, target, reduction="none").tolist()
        right += sum(output.argmax(1) == target).item()
    loss, accuracy = utils.train(
        model, "cpu", loader, torch.optim.SGD(model.parameters(), lr=0.0), F.nll_loss
    )
    assert loss == pytest.approx(sum(losses) / 130, rel=1e-5)
    assert accuracy == pytest.approx(100 * right / 130)


def test_test_prints_and_returns_loss_and_accuracy(small, capsys):
    dataset = small(130)
    model = create_model("Model3").eval()
    data = utils.BatchLoader(dataset, 130, "cpu").data
    output = model(data)
    expected = F.nll_loss(output, dataset.targets).item()
    right = sum(output.argmax(1) == dataset.targets).item()
    loss, accuracy = utils.test(model, "cpu", utils.BatchLoader(dataset, 50, "cpu"), F.nll_loss)
    assert loss == pytest.approx(expected, rel=1e-5) and accuracy == 100 * right / 130
    line = f"Test set: Average loss: {loss:.4f}, Accuracy: {right}/130 ({accuracy:.2f}%)\n"
    assert capsys.readouterr().out == line


def test_both_work_with_an_ordinary_loader(small):
    dataset = small(130)
    data = utils.BatchLoader(dataset, 130, "cpu").data
    loader = DataLoader(TensorDataset(data, dataset.targets), batch_size=50)
    model = create_model("Model3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    assert utils.train(model, "cpu", loader, optimizer, F.nll_loss)[0] > 0
    assert 0 <= utils.test(model, "cpu", loader, F.nll_loss)[1] <= 100


def test_progress_text(small, capsys):
    model = create_model("Model3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    _, accuracy = utils.train(model, "cpu", utils.BatchLoader(small(100), 50, "cpu"), optimizer, F.nll_loss)
    text = capsys.readouterr().out
    assert re.search(rf"Train: Loss=\d\.\d{{4}} Batch_id=1 Accuracy={accuracy:.2f}: 100%", text)


def test_correct_predictions_are_counted():
    pred = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert utils.GetCorrectPredCount(pred, torch.tensor([1, 0, 0])) == 2


def test_learning_is_possible(small):
    """A network that cannot reach 90 % on drawn digits in three epochs is broken somewhere."""
    model = create_model("Model3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = utils.BatchLoader(small(6000), 50, "cpu", shuffle=True)
    losses = [utils.train(model, "cpu", loader, optimizer, F.nll_loss)[0] for _ in range(3)]
    test_loader = utils.BatchLoader(small(1000, train=False), 50, "cpu")
    assert utils.test(model, "cpu", test_loader, F.nll_loss)[1] > 90 and losses[-1] < losses[0]


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_train_loss_that_is_not_finite_names_the_batch(small, batch, value):
    loader = utils.BatchLoader(small(200), 50, "cpu")
    loader.data[50 * batch] = float(value)
    model = create_model("Model3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(FloatingPointError, match=f"batch {batch}: the loss is nan"):
        utils.train(model, "cpu", loader, optimizer, F.nll_loss)


def test_a_test_loss_that_is_not_finite_is_refused(small):
    """The last step of an epoch can break the weights when every train loss was still finite."""
    model = create_model("Model3")
    model.convblock9[0].weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="testing: the loss is nan"):
        utils.test(model, "cpu", utils.BatchLoader(small(100), 50, "cpu"), F.nll_loss)


def test_a_model_of_another_width_stops_at_its_first_batch(small):
    """By torch itself, in one line."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.LogSoftmax(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(IndexError, match="Target [5-9] is out of bounds"):
        utils.train(model, "cpu", utils.BatchLoader(small(100), 50, "cpu"), optimizer, F.nll_loss)


def test_freed_memory_is_kept_only_when_asked(monkeypatch):
    calls = []
    library = type("Library", (), {"mallopt": lambda self, *numbers: calls.append(numbers)})
    monkeypatch.setattr(utils.ctypes, "CDLL", lambda name: library())
    monkeypatch.setattr(utils.sys, "platform", "linux")
    utils.keep_freed_memory()
    assert calls == [(-3, 33_554_432), (-1, 2_147_483_647)]
    monkeypatch.setattr(utils.sys, "platform", "darwin")
    utils.keep_freed_memory()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "name, text, default, value",
    [
        ("EPOCHS", "3", 15, 3),
        ("MODEL", "Model1", "Model3", "Model1"),
        ("RESUME", "1", False, True),
        ("RESUME", "0", True, False),
        ("SEED", None, 1, 1),
    ],
)
def test_settings_come_from_the_environment(monkeypatch, name, text, default, value):
    if text is not None:
        monkeypatch.setenv(f"S7_{name}", text)
    assert utils.setting(name, default) is value or utils.setting(name, default) == value


@pytest.mark.parametrize(
    "name, text, default, choices, message",
    [
        ("EPOCHS", "many", 15, None, "EPOCHS is 'many': give a whole number"),
        ("EPOCHS", "-1", 15, None, "EPOCHS is '-1': give a whole number"),
        ("EPOCHS", "0", 15, None, "EPOCHS is '0': give a whole number from 1 up"),
        ("RESUME", "yes", False, None, "RESUME is 'yes': choose one of 0, 1"),
        (
            "MODEL",
            "Model0",
            "Model3",
            ["Model1", "Model3"],
            "MODEL is 'Model0': choose one of Model1, Model3",
        ),
    ],
)
def test_a_bad_setting_gives_one_line(monkeypatch, name, text, default, choices, message):
    monkeypatch.setenv(f"S7_{name}", text)
    with pytest.raises(ValueError, match=message) as error:
        utils.setting(name, default, choices)
    assert "\n" not in str(error.value)

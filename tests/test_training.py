"""Training and testing, against plain loops written with torch alone; settings."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from model import create_model
import utils


def train(model, loader, lr=0.01):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return utils.train(model, "cpu", loader, optimizer, F.nll_loss)


def test_fifty_steps_give_the_weights_of_the_usual_loop(small):
    """`DataLoader` with per-image transforms, against the tensor on the device."""
    dataset = small(50 * 128)
    model, usual = create_model("Model3"), create_model("Model3")
    usual.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(usual.parameters(), lr=0.01, momentum=0.9)
    for data, target in DataLoader(dataset, batch_size=128):
        optimizer.zero_grad()
        F.nll_loss(usual(data), target).backward()
        optimizer.step()
    train(model, utils.BatchLoader(dataset, 128, "cpu"))
    torch.testing.assert_close(list(model.parameters()), list(usual.parameters()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ordinary", [False, True])
def test_both_return_the_mean_over_samples(small, capsys, ordinary):
    """With a rate of 0 and no dropout, what is right can be had from the model itself."""
    model, loader = create_model("Model3"), utils.BatchLoader(small(130), 50, "cpu")  # the last batch has 30
    if ordinary:
        loader = DataLoader(TensorDataset(loader.data, loader.target), batch_size=50)
    for training in (True, False):
        model.train(training)
        outputs, target = torch.cat([model(data) for data, _ in loader]), torch.cat([t for _, t in loader])
        right = sum(output.argmax() == t for output, t in zip(outputs, target)).item()
        if training:
            loss, accuracy = train(model, loader, lr=0.0)
            text = rf"Train: Loss=\d\.\d{{4}} Batch_id=2 Accuracy={accuracy:.2f}: 100%"
        else:
            loss, accuracy = utils.test(model, "cpu", loader, F.nll_loss)
            text = rf"^Test set: Average loss: {loss:.4f}, Accuracy: {right}/130 \({accuracy:.2f}%\)\n$"
        assert loss == pytest.approx(F.nll_loss(outputs, target).item(), rel=1e-5)
        assert accuracy == pytest.approx(100 * right / 130)
        assert re.search(text, capsys.readouterr().out)


@pytest.mark.parametrize("batch, value", [(0, "nan"), (2, "nan"), (2, "inf")])
def test_a_loss_that_is_not_finite_is_named(small, batch, value):
    model, loader = create_model("Model3"), utils.BatchLoader(small(200), 50, "cpu")
    loader.data[50 * batch] = float(value)
    with pytest.raises(FloatingPointError, match=f"batch {batch}: the loss is nan"):
        train(model, loader)
    with pytest.raises(FloatingPointError, match="testing: the loss is nan"):  # the weights are by now
        utils.test(model, "cpu", utils.BatchLoader(small(100), 50, "cpu"), F.nll_loss)


def test_freed_memory_is_kept_on_linux_only(monkeypatch):
    calls = []
    library = type("Library", (), {"mallopt": lambda self, *numbers: calls.append(numbers)})
    monkeypatch.setattr(utils.ctypes, "CDLL", lambda name: library())
    for platform in ("darwin", "linux"):
        assert not calls
        monkeypatch.setattr(utils.sys, "platform", platform)
        utils.keep_freed_memory()
    assert calls == [(-3, 33_554_432), (-1, 2_147_483_647)]


SETTINGS = [("3", 15, 3), ("a", "b", "a"), ("1", False, True), ("0", True, False), (None, 1, 1)]


@pytest.mark.parametrize("text, default, value", SETTINGS)
def test_settings_come_from_the_environment(monkeypatch, text, default, value):
    monkeypatch.setenv("S7_NAME" if text else "S7_OTHER", text or "2")
    assert repr(utils.setting("NAME", default)) == repr(value)

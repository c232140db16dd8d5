"""Training and evaluation against plain PyTorch loops and numbers by hand; the progress bar."""

import copy
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_identical
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

import utils
from model import create_model


def train(model, loader, lr=0.01):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return utils.train(model, "cpu", loader, optimizer, F.nll_loss)


def loader_of(small, count):
    """Return a loader of the first stand-in digits in batches of 50."""
    return utils.BatchLoader(small(count), 50, "cpu")


# ---- numbers by hand ----


class Echo(nn.Module):
    """A network whose output is its input."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, data):
        return data + self.zero


def three_predictions():
    """Return predictions for three images in batches of one and two, as input of `Echo`.

    The losses are 1, 2 and 3 times ln 2. Only the first prediction is correct.
    """
    first = torch.tensor([[0.5, 0.3, 0.2]]).log()
    second = torch.tensor([[0.25, 0.6, 0.15], [0.125, 0.125, 0.75]]).log()
    return [(first, torch.tensor([0])), (second, torch.tensor([0, 1]))]


def test_train_returns_and_shows_mean_loss_per_sample_and_accuracy(capsys):
    """The bar shows the loss of the last batch, 2.5 ln 2."""
    loss, accuracy = train(Echo(), three_predictions(), lr=0.0)
    assert loss == pytest.approx(2 * math.log(2), rel=1e-6)
    assert accuracy == pytest.approx(100 / 3)
    assert "Train: Loss=1.7329 Batch_id=1 Accuracy=33.33: 100%" in capsys.readouterr().out


def test_test_returns_and_prints_mean_loss_per_sample_and_accuracy(capsys):
    loss, accuracy = utils.test(Echo(), "cpu", three_predictions(), F.nll_loss)
    assert loss == pytest.approx(2 * math.log(2), rel=1e-6)
    assert accuracy == pytest.approx(100 / 3)
    assert capsys.readouterr().out == "Test set: Average loss: 1.3863, Accuracy: 1/3 (33.33%)\n"


def test_sum_of_losses_is_exact():
    """In float32, 1,000 times 0.1 would be 100 exactly, but the float32 number is larger than 0.1."""
    predictions = torch.tensor([[-0.1, -3.0]])
    loss, _ = train(Echo(), [(predictions, torch.tensor([0]))] * 1000, lr=0.0)
    assert loss == pytest.approx(0.10000000149011612, rel=1e-12)


# ---- plain PyTorch loops ----


def test_steps_match_a_plain_pytorch_loop(small):
    """The reference is a `DataLoader` with per-image transforms; the last batch is smaller."""
    dataset = small(190)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    samples = []
    for image, label in zip(dataset.images, dataset.labels, strict=True):
        samples.append((transform(Image.fromarray(image.numpy())), label))
    model = create_model("Model3")
    reference = create_model("Model3")
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9)
    loss_sum = 0
    correct = 0
    for data, target in DataLoader(samples, batch_size=20):
        optimizer.zero_grad()
        output = reference(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(data)
        correct += (output.argmax(dim=1) == target).sum().item()
    mean_loss, accuracy = train(model, utils.BatchLoader(dataset, 20, "cpu"))
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()), atol=1e-5, rtol=0)
    assert mean_loss == pytest.approx(loss_sum / 190, rel=1e-4)
    assert accuracy == pytest.approx(100 * correct / 190, abs=0.6)  # one image


def test_test_matches_one_batch_of_all_images(small):
    """Dropout is off, and each image counts once although the last batch is smaller."""
    loader = loader_of(small, 130)
    model = create_model("Model1").eval()
    with torch.no_grad():
        output = model(loader.data)
    expected = F.nll_loss(output, loader.target).item()
    loss, accuracy = utils.test(model.train(), "cpu", loader, F.nll_loss)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy == pytest.approx(100 * (output.argmax(dim=1) == loader.target).sum().item() / 130)


def test_train_and_test_set_the_mode_and_test_changes_nothing_else(small):
    model = create_model("Model1").eval()
    train(model, loader_of(small, 50))
    assert model.training
    before = copy.deepcopy(model.state_dict())
    utils.test(model, "cpu", loader_of(small, 50), F.nll_loss)
    assert not model.training
    assert_identical(model.state_dict(), before)


# ---- losses that are not finite ----


@pytest.mark.parametrize(("batch", "value"), [(0, "nan"), (1, "inf"), (2, "nan")])
def test_loss_that_is_not_finite_stops_the_training_at_its_batch(batch, value):
    losses = [1.0, 1.0, 1.0]
    losses[batch] = float(value)
    batches = []
    for loss in losses:
        batches.append((torch.tensor([[-loss, 0.0]]), torch.tensor([0])))
    with pytest.raises(FloatingPointError, match=f"batch {batch}: .*{value}.*learning rate"):
        train(Echo(), batches, lr=0.0)


def test_test_loss_that_is_not_finite_raises(small):
    model = create_model("Model3")
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="test loss.*nan.*learning rate"):
        utils.test(model, "cpu", loader_of(small, 100), F.nll_loss)


# ---- the progress bar ----


class Output:
    """A notebook output that records what it shows."""

    def __init__(self, data):
        self.shown = [data["text/plain"]]

    def update(self, data, raw):
        assert raw
        self.shown.append(data["text/plain"])


@pytest.fixture
def outputs(monkeypatch):
    """Collect the notebook outputs, in place of `display`."""
    created = []

    def display(data, raw, display_id):
        assert raw
        assert display_id
        created.append(Output(data))
        return created[-1]

    monkeypatch.setattr(utils, "display", display)
    return created


def test_progress_is_one_notebook_output_updated_in_place(outputs):
    line = utils.ProgressLine()
    for text in ("\n", "\r 10%", "\r   ", "\r100%"):
        line.write(text)
    assert len(outputs) == 1
    assert outputs[0].shown == ["10%", "100%"]


def test_train_uses_one_output_in_a_notebook(small, outputs, monkeypatch):
    monkeypatch.setattr(utils, "get_ipython", lambda: SimpleNamespace(kernel=None))
    train(create_model("Model3"), loader_of(small, 130))
    assert len(outputs) == 1
    assert re.search(r"Train: Loss=\S+ Batch_id=2 Accuracy=\S+: 100%\|█+\| 3/3", outputs[0].shown[-1])


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["no IPython", "IPython in a terminal"])
def test_progress_goes_to_stdout_outside_a_notebook(monkeypatch, shell):
    monkeypatch.setattr(utils, "get_ipython", lambda: shell)
    assert utils.progress_file() is sys.stdout


# ---- the device ----


def test_gpu_that_cannot_be_used_is_named_with_the_way_to_the_cpu(monkeypatch):
    def fail(*args, device):
        raise RuntimeError(f"{device}: no kernel image is available\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fail)
    message = (
        '^PyTorch cannot use the GPU .cuda: no kernel image is available.: set CUDA_VISIBLE_DEVICES="" .*$'
    )
    with pytest.raises(RuntimeError, match=message):
        utils.choose_device()

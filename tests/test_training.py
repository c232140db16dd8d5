"""Training and evaluation against plain PyTorch loops and numbers by hand; the progress bar."""

import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
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


def test_train_returns_mean_loss_per_sample_and_accuracy():
    loss, accuracy = train(Echo(), three_predictions(), lr=0.0)
    assert loss == pytest.approx(2 * math.log(2), rel=1e-6)
    assert accuracy == pytest.approx(100 / 3)


def test_test_returns_mean_loss_per_sample_and_accuracy():
    loss, accuracy = utils.test(Echo(), "cpu", three_predictions(), F.nll_loss)
    assert loss == pytest.approx(2 * math.log(2), rel=1e-6)
    assert accuracy == pytest.approx(100 / 3)


def test_progress_bar_shows_the_last_loss_the_batch_and_the_accuracy(capsys):
    train(Echo(), three_predictions(), lr=0.0)
    text = capsys.readouterr().out
    assert "Train: Loss=1.7329 Batch_id=1 Accuracy=33.33: 100%" in text  # 2.5 ln 2


def test_test_prints_loss_and_accuracy(capsys):
    utils.test(Echo(), "cpu", three_predictions(), F.nll_loss)
    text = capsys.readouterr().out
    assert text == "Test set: Average loss: 1.3863, Accuracy: 1/3 (33.33%)\n"  # 2 ln 2


def test_sum_of_many_losses_is_exact():
    """In float32, the sum of 3,000 losses of 0.1 would be wrong in the fifth digit."""
    predictions = torch.tensor([[-0.1, -3.0]])
    loss, _ = train(Echo(), [(predictions, torch.tensor([0]))] * 3000, lr=0.0)
    assert loss == pytest.approx(0.1, rel=1e-7)


def test_correct_predictions_are_counted_as_a_tensor():
    pred = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.2, 0.5, 0.3]])
    count = utils.GetCorrectPredCount(pred, torch.tensor([1, 2, 2, 1]))
    assert isinstance(count, torch.Tensor)
    assert count == 3


# ---- plain PyTorch loops ----


def test_fifty_steps_match_a_plain_pytorch_loop(small):
    """The reference is a `DataLoader` with per-image transforms; the last batch is smaller."""
    dataset = small(990)
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
    assert mean_loss == pytest.approx(loss_sum / 990, rel=1e-4)
    assert accuracy == pytest.approx(100 * correct / 990, abs=0.11)  # one image


def test_pytorchs_dataloader_gives_the_same_results(small):
    loader = loader_of(small, 130)
    pytorchs = DataLoader(TensorDataset(loader.data, loader.target), batch_size=50)
    model = create_model("Model3")
    other = create_model("Model3")
    other.load_state_dict(model.state_dict())
    assert train(model, loader) == train(other, pytorchs)
    assert utils.test(model, "cpu", loader, F.nll_loss) == utils.test(other, "cpu", pytorchs, F.nll_loss)


def test_test_matches_one_batch_of_all_images(small):
    loader = loader_of(small, 130)
    model = create_model("Model1").eval()
    with torch.no_grad():
        output = model(loader.data)
    expected_loss = F.nll_loss(output, loader.target).item()
    expected_correct = (output.argmax(dim=1) == loader.target).sum().item()
    model.train()  # its dropout must not be active in the evaluation
    loss, accuracy = utils.test(model, "cpu", loader, F.nll_loss)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert accuracy == pytest.approx(100 * expected_correct / 130)


def test_train_puts_the_model_in_training_mode(small):
    model = create_model("Model1").eval()
    train(model, loader_of(small, 50))
    assert model.training


def test_test_changes_neither_weights_nor_statistics(small):
    model = create_model("Model3").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    utils.test(model, "cpu", loader_of(small, 130), F.nll_loss)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# ---- losses that are not finite ----


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("batch", [0, 1, 2])
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

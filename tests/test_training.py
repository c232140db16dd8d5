"""Training and evaluation, checked against plain PyTorch loops; the progress line; memory tuning."""

import io
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

COUNT = 130
BATCH_SIZE = 50  # so the last batch has 30 images


@pytest.fixture(params=["BatchLoader", "DataLoader"])
def loader(request, small):
    """Return a loader of 130 images in batches of 50, either this project's or PyTorch's."""
    loader = utils.BatchLoader(small(COUNT), BATCH_SIZE, "cpu")
    if request.param == "DataLoader":
        return DataLoader(TensorDataset(loader.data, loader.target), batch_size=BATCH_SIZE)
    return loader


def train(model, loader, lr=0.01):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return utils.train(model, "cpu", loader, optimizer, F.nll_loss)


class Expected:
    """Mean loss, number of correct predictions and accuracy of a model on all images of a loader."""

    def __init__(self, model, loader):
        outputs = torch.cat([model(data) for data, _ in loader])
        target = torch.cat([target for _, target in loader])
        self.loss = F.nll_loss(outputs, target).item()
        self.correct = 0
        for output, label in zip(outputs, target, strict=True):
            if output.argmax() == label:
                self.correct += 1
        self.accuracy = 100 * self.correct / COUNT


# ---- training ----


def test_fifty_steps_match_a_plain_pytorch_loop(small):
    """The reference is a `DataLoader` with per-image transforms."""
    dataset = small(50 * 20)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    samples = []
    for image, label in zip(dataset.images, dataset.labels, strict=True):
        samples.append((transform(Image.fromarray(image.numpy())), label))
    model = create_model("Model3")
    reference = create_model("Model3")
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9)
    for data, target in DataLoader(samples, batch_size=20):
        optimizer.zero_grad()
        F.nll_loss(reference(data), target).backward()
        optimizer.step()
    train(model, utils.BatchLoader(dataset, 20, "cpu"))
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()), atol=1e-5, rtol=0)


def test_train_returns_per_sample_means(loader):
    """With learning rate 0 and no dropout, the expected values follow from the model itself."""
    model = create_model("Model3").train()
    expected = Expected(model, loader)
    loss, accuracy = train(model, loader, lr=0.0)
    assert loss == pytest.approx(expected.loss, rel=1e-5)
    assert accuracy == pytest.approx(expected.accuracy)


def test_train_measures_each_batch_before_its_step():
    """The first batch's loss is that of the untrained model, the second's that after one step."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(dim=1))
    data = torch.rand(2, 1, 28, 28)
    target = torch.tensor([3, 5])
    reference = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(dim=1))
    reference.load_state_dict(model.state_dict())
    first = F.nll_loss(reference(data[:1]), target[:1])
    first.backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= 0.01 * parameter.grad
    second = F.nll_loss(reference(data[1:]), target[1:])
    loss, _ = train(model, [(data[:1], target[:1]), (data[1:], target[1:])])
    assert loss == pytest.approx((first.item() + second.item()) / 2, rel=1e-5)


def test_train_puts_the_model_in_training_mode(small):
    model = create_model("Model1").eval()
    train(model, utils.BatchLoader(small(50), BATCH_SIZE, "cpu"))
    assert model.training


def test_train_shows_loss_batch_and_accuracy(loader, capsys):
    model = create_model("Model3")
    _, accuracy = train(model, loader, lr=0.0)
    text = capsys.readouterr().out
    assert re.search(rf"Train: Loss=\d\.\d{{4}} Batch_id=2 Accuracy={accuracy:.2f}: 100%", text)


def test_shown_loss_is_that_of_the_last_batch(small, capsys):
    loader = utils.BatchLoader(small(COUNT), BATCH_SIZE, "cpu")
    model = create_model("Model3").train()
    for data, target in loader:
        last_loss = F.nll_loss(model(data), target).item()
    train(model, loader, lr=0.0)
    assert f"Train: Loss={last_loss:.4f} Batch_id=2 " in capsys.readouterr().out


# ---- evaluation ----


def test_test_returns_per_sample_means(loader):
    model = create_model("Model3").eval()
    expected = Expected(model, loader)
    loss, accuracy = utils.test(model, "cpu", loader, F.nll_loss)
    assert loss == pytest.approx(expected.loss, rel=1e-5)
    assert accuracy == pytest.approx(expected.accuracy)


def test_test_prints_loss_and_accuracy(loader, capsys):
    model = create_model("Model3").eval()
    expected = Expected(model, loader)
    utils.test(model, "cpu", loader, F.nll_loss)
    results = f"Accuracy: {expected.correct}/130 ({expected.accuracy:.2f}%)"
    assert capsys.readouterr().out == f"Test set: Average loss: {expected.loss:.4f}, {results}\n"


def test_test_ignores_dropout(small):
    """Model1 has dropout; in eval mode, two evaluations are equal."""
    model = create_model("Model1").train()
    loader = utils.BatchLoader(small(COUNT), BATCH_SIZE, "cpu")
    first = utils.test(model, "cpu", loader, F.nll_loss)
    second = utils.test(model, "cpu", loader, F.nll_loss)
    assert first == second


def test_test_changes_neither_weights_nor_statistics(small):
    model = create_model("Model3").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    utils.test(model, "cpu", utils.BatchLoader(small(COUNT), BATCH_SIZE, "cpu"), F.nll_loss)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_correct_predictions_are_counted_as_a_tensor():
    pred = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.2, 0.5, 0.3]])
    count = utils.GetCorrectPredCount(pred, torch.tensor([1, 2, 2, 1]))
    assert isinstance(count, torch.Tensor)
    assert count == 3


def test_labels_beyond_the_outputs_raise_pytorchs_error(small):
    dataset = small(99)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.LogSoftmax(dim=1))
    with pytest.raises(IndexError, match="Target [5-9] is out of bounds"):
        utils.test(narrow, "cpu", utils.BatchLoader(dataset, 50, "cpu"), F.nll_loss)


# ---- losses that are not finite ----


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_non_finite_loss_raises_and_names_the_batch(small, batch, value):
    loader = utils.BatchLoader(small(200), BATCH_SIZE, "cpu")
    loader.data[BATCH_SIZE * batch] = float(value)  # BatchNorm makes NaN of infinity
    with pytest.raises(
        FloatingPointError, match=f"^batch {batch}: the loss is nan: lower the learning rate$"
    ):
        train(create_model("Model3"), loader)


def test_infinite_loss_raises_and_names_the_batch(small):
    """Two batches; the criterion gives infinity for the second."""
    losses = iter([1.0, float("inf")])

    def criterion(output, target):
        return output.sum() * 0 + next(losses)

    model = create_model("Model3")
    loader = utils.BatchLoader(small(100), BATCH_SIZE, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(FloatingPointError, match="^batch 1: the loss is inf: lower the learning rate$"):
        utils.train(model, "cpu", loader, optimizer, criterion)


def test_first_of_several_non_finite_losses_is_named():
    """If the device is read only occasionally, several losses can be non-finite."""
    losses = torch.tensor([1.0, float("inf"), float("nan")])
    with pytest.raises(FloatingPointError, match="^batch 1: the loss is inf: lower the learning rate$"):
        utils.check_finite(losses)


def test_finite_losses_pass():
    utils.check_finite(torch.tensor([1.0, 0.0, 1e30]))


def test_non_finite_test_loss_raises(small):
    model = create_model("Model3")
    next(model.parameters()).data.fill_(float("nan"))
    loader = utils.BatchLoader(small(100), BATCH_SIZE, "cpu")
    with pytest.raises(FloatingPointError, match="^the test loss is nan: lower the learning rate$"):
        utils.test(model, "cpu", loader, F.nll_loss)


# ---- the progress line ----


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


def test_progress_line_is_one_output_updated_in_place(outputs):
    line = utils.ProgressLine()
    line.write("\r 10%")
    line.write("\r100%")
    assert len(outputs) == 1
    assert outputs[0].shown == ["10%", "100%"]


def test_progress_line_ignores_blank_text(outputs):
    line = utils.ProgressLine()
    line.write("\n")
    line.write("\r 10%")
    line.write("\r   ")
    assert len(outputs) == 1
    assert outputs[0].shown == ["10%"]


def test_train_uses_a_progress_line_in_a_notebook(small, outputs, monkeypatch):
    monkeypatch.setattr(utils, "get_ipython", lambda: SimpleNamespace(kernel=None))
    train(create_model("Model3"), utils.BatchLoader(small(COUNT), BATCH_SIZE, "cpu"))
    assert len(outputs) == 1
    assert re.search(r"Train: Loss=\S+ Batch_id=2 Accuracy=\S+: 100%\|█+\| 3/3", outputs[0].shown[-1])


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["no IPython", "IPython in a terminal"])
def test_progress_goes_to_stdout_outside_a_notebook(monkeypatch, shell):
    monkeypatch.setattr(utils, "get_ipython", lambda: shell)
    assert utils.progress_file() is sys.stdout


def test_progress_line_is_a_text_file():
    line = utils.ProgressLine()
    assert isinstance(line, io.TextIOBase)
    assert line.encoding == "utf-8"  # makes tqdm use block characters


# ---- memory tuning ----


@pytest.fixture
def mallopt_calls(monkeypatch):
    """Collect the calls of glibc's `mallopt`."""
    calls = []

    def mallopt(*numbers):
        calls.append(numbers)

    monkeypatch.setattr(utils.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    return calls


def test_malloc_is_tuned_on_linux(mallopt_calls, monkeypatch):
    monkeypatch.setattr(utils.sys, "platform", "linux")
    utils.keep_freed_memory()
    assert mallopt_calls == [(-3, 33_554_432), (-1, 2_147_483_647)]


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_malloc_is_not_tuned_elsewhere(mallopt_calls, monkeypatch, platform):
    monkeypatch.setattr(utils.sys, "platform", platform)
    utils.keep_freed_memory()
    assert mallopt_calls == []


def test_c_library_without_mallopt_is_accepted(monkeypatch):
    monkeypatch.setattr(utils.sys, "platform", "linux")
    monkeypatch.setattr(utils.ctypes, "CDLL", lambda name: SimpleNamespace())
    utils.keep_freed_memory()

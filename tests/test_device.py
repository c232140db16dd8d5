"""On a CUDA GPU: the results of the CPU, and no wait for the device but for the progress bar."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plots
import utils
from model import MODELS, create_model

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def default_mode():
    """Allow waits for the device again, also after a failure."""
    yield
    torch.cuda.set_sync_debug_mode("default")


class WatchedLoader(utils.BatchLoader):
    """A loader in whose epochs a wait for the device raises RuntimeError, except in some batches."""

    may_wait = ()  # the numbers of these batches

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):  # before the first, the order is copied
            if number in self.may_wait:
                torch.cuda.set_sync_debug_mode("default")
            else:
                torch.cuda.set_sync_debug_mode("error")
            yield batch
        torch.cuda.set_sync_debug_mode("default")


def train(model, device, loader):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    utils.train(model, device, loader, optimizer, F.nll_loss)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_gives_the_weights_of_the_cpu(small, monkeypatch, name):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it rounds to ten bits
    model = create_model(name)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0  # the GPU draws other random numbers
    other = copy.deepcopy(model).to("cuda")
    train(model, "cpu", utils.BatchLoader(small(100), 100, "cpu"))
    train(other, "cuda", utils.BatchLoader(small(100), 100, "cuda"))
    for parameter, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.cpu(), expected, atol=1e-4, rtol=0)


def test_an_epoch_waits_only_to_refresh_the_progress_bar(small):
    augmentation = partial(utils.random_affine, degrees=10, shift=0.06, scale=0.06)
    loader = WatchedLoader(small(530), 10, "cuda", shuffle=True, augmentation=augmentation)
    model = create_model("Model4").to("cuda")
    loader.may_wait = (0, 50, 52)
    train(model, "cuda", loader)
    loader.may_wait = ()
    utils.test(model, "cuda", loader, F.nll_loss)


def test_reports_arrive_on_the_cpu(small):
    model = create_model("Model4")
    table = plots.summarize_model(model).data
    model.to("cuda")
    assert plots.summarize_model(model).data == table
    confusion, mistakes = plots.find_mistakes(model, "cuda", utils.BatchLoader(small(100), 50, "cuda"))
    assert confusion.device.type == "cpu"
    assert mistakes[0].image.device.type == "cpu"
    plots.plot_features(model, mistakes[0].image, "title")

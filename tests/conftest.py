"""Shared set-up: tests see stand-in digits, and never the network or the caller's settings."""

import os
from pathlib import Path
import signal
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from model import create_model
import utils

signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, Ctrl-C is ignored

RECIPE = dict(  # all that a recipe can have
    optimizer=dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    StepLR=dict(step_size=2, gamma=0.1),
    augment=dict(degrees=10, shift=0.05, scale=0.05),
    plain=2,
)


def make_parts(settings, recipe=RECIPE):
    """A network, its optimizer and a StepLR, as the notebook makes them."""
    torch.manual_seed(settings["seed"])
    model = create_model(settings["model"])
    optimizer = torch.optim.SGD(model.parameters(), **recipe["optimizer"])
    return model, optimizer, StepLR(optimizer, **recipe["StepLR"])


@pytest.fixture(scope="session")
def digits():
    """The stand-in train and test sets."""
    return utils.StandIn(), utils.StandIn(train=False)


@pytest.fixture
def small(digits):
    """A function that cuts the first images off a stand-in set: `small(200, train=True)`."""

    def cut(count, train=True):
        dataset = utils.StandIn.__new__(utils.StandIn)
        whole = digits[0 if train else 1]
        dataset.data, dataset.targets = whole.data[:count].clone(), whole.targets[:count].clone()
        dataset.transform = dataset.target_transform = None
        return dataset

    return cut


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """The figures that a test shows, still open, with their alternative texts; closed after it."""
    shown = []
    monkeypatch.setattr(utils, "display", lambda figure, metadata: shown.append((figure, metadata)))
    monkeypatch.setattr(utils.plt, "close", lambda figure: None)
    yield shown
    monkeypatch.undo()
    plt.close("all")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """No setting of the caller's environment reaches a test, and no file of the working folder."""
    for name in [name for name in os.environ if name.startswith("S7_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path))
    torch.manual_seed(0)

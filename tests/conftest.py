"""Shared set-up: tests see stand-in digits, and never the network or the caller's settings."""

import os
from pathlib import Path
import signal
import sys

import matplotlib

matplotlib.use("agg")
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import utils

signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, Ctrl-C is ignored
torch.set_num_threads(1)  # the bits of a run depend on their number


@pytest.fixture(scope="session")
def digits():
    """The stand-in train and test sets."""
    return utils.StandIn(), utils.StandIn(train=False)


@pytest.fixture(scope="session")
def small(digits):
    """A function that cuts the first images off a stand-in set: `small(200, train=True)`."""

    def cut(count, train=True):
        whole, dataset = digits[0 if train else 1], utils.StandIn.__new__(utils.StandIn)
        dataset.data, dataset.targets = whole.data[:count].clone(), whole.targets[:count].clone()
        dataset.transform = dataset.target_transform = None
        return dataset

    return cut


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """The figures that a test shows, each with its metadata."""
    shown = []
    monkeypatch.setattr(utils, "display", lambda figure, metadata: shown.append((figure, metadata)))
    return shown


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """No setting of the caller's environment reaches a test, and no file of the working folder."""
    for name in [name for name in os.environ if name.startswith("S7_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path))
    torch.manual_seed(0)

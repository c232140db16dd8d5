"""Shared set-up: tests see stand-in digits, and never the network or the caller's settings."""

import copy
import os
from pathlib import Path
import signal
import sys

import matplotlib

matplotlib.use("agg")
import pytest
import torch
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import utils

signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, Ctrl-C is ignored
torch.set_num_threads(1)  # the bits of a run depend on their number


@pytest.fixture(scope="session")
def small():
    """A function that cuts the first images off a stand-in set: `small(200, train=True)`."""
    whole = {train: utils.StandIn(train) for train in (True, False)}
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])

    def cut(count, train=True):
        dataset = copy.copy(whole[train])
        dataset.data, dataset.targets = dataset.data[:count].clone(), dataset.targets[:count].clone()
        dataset.transform = normalise
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

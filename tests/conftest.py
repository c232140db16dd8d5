"""Shared set-up: tests see stand-in digits in a folder of their own, and never the network."""

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

import utils

signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, Ctrl-C is ignored


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A data folder that holds the stand-in digits, drawn once for all tests."""
    folder = tmp_path_factory.mktemp("data")
    utils.StandIn(folder)
    return folder


@pytest.fixture(scope="session")
def digits(data_folder):
    """The stand-in train and test sets."""
    return utils.StandIn(data_folder), utils.StandIn(data_folder, train=False)


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
def no_figures_left():
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No setting of the caller's environment reaches a test."""
    for name in [name for name in os.environ if name.startswith("S7_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    torch.manual_seed(0)

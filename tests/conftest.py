"""Shared fixtures. Tests use stand-in digits and see neither the network nor the user's settings."""

import os
import signal
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

matplotlib.use("agg")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores Ctrl-C
torch.set_num_threads(1)  # results depend, in the last bits, on the thread count


@pytest.fixture(autouse=True, scope="module")
def without_settings():
    """Remove the user's settings. A notebook that is tested in the same session keeps them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("S7_") or name.lower().endswith("_proxy"):
                patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def isolation(monkeypatch, tmp_path):
    """Isolate a test from ./data and from the network."""
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])  # refused
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Show figures as in a notebook, and collect them with their alternative texts `alt`."""
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    shown = []

    def display(figure, metadata):
        shown.append(SimpleNamespace(figure=figure, alt=metadata["image/png"]["alt"]))

    monkeypatch.setattr("plots.get_ipython", lambda: shell)
    monkeypatch.setattr("plots.display", display)
    return shown


@pytest.fixture(scope="session")
def small():
    """Return a function that copies the first images of a stand-in set, e.g. `small(200, train=True)`."""
    from utils import DigitSet, draw_standin

    whole = {True: draw_standin(train=True), False: draw_standin(train=False)}

    def take(count, train=True):
        dataset = whole[train][:count]
        return DigitSet(dataset.name, dataset.images.clone(), dataset.labels.clone())

    return take

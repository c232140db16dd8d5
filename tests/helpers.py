"""Helpers that several test files share."""

import atexit
import pkgutil
from pathlib import Path
from unittest import mock

import torch
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent


def new_shell():
    """Return the shell of a new kernel; errors of a cell are raised by its result."""
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))  # no file
    shell.showtraceback = lambda *args, **options: None
    atexit.unregister(shell.atexit_operations)  # collects garbage, once per shell
    return shell


def interrupt(function, call):
    """Return a context in which Ctrl-C is pressed in one of the calls of a function."""
    effects = [mock.DEFAULT] * (call - 1) + [KeyboardInterrupt]
    return mock.patch(function, wraps=pkgutil.resolve_name(function), side_effect=effects)


def assert_identical(one, two):
    """Check that nested dictionaries and lists are bit-identical, ignoring wall-clock times."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one.keys() - {"seconds"}:
            assert_identical(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_identical(first, second)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two

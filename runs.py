"""Runs: what is trained, its history, its checkpoint, resuming, and the list of earlier runs.

A checkpoint belongs to the run that wrote it; no run replaces another's.
"""

import contextlib
import csv
import difflib
import functools
import io
import itertools
import json
import os
import platform
import random
import re
import time
import weakref
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from IPython import get_ipython
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils import BatchLoader, brief, unwrap

ROOT = Path(__file__).resolve().parent
SOURCES = ("model.py", "utils.py", "runs.py")  # files that determine a run, next to the notebook's cell
# Relative differences that a repeated epoch may have on another machine or on a GPU. With another order of
# sums, train losses differed by up to 0.9 % and test losses by up to 25 % (Models 2 and 4, epochs 1 to 3).
LIMITS = {"train_losses": 0.03, "test_losses": 0.4, "learning_rates": 0}
RECORDED = {  # columns of benchmarks/accuracy.csv, and words of messages, with the fields of `History`
    "train_loss": "train_losses",
    "train_acc": "train_acc",
    "test_loss": "test_losses",
    "test_acc": "test_acc",
    "learning_rate": "learning_rates",
    "seconds": "seconds",
}
REPORT = "archive/run.json"  # what `list_runs` reads: an entry added to the zip archive of `torch.save`
NO_CHECKPOINT = "not a checkpoint of this version, or corrupted"
_trained = weakref.WeakSet()  # models that a run has trained

# ---- what is trained, and where ----


def describe_machine(device):
    """Return what the bits of a result depend on besides the code, as a dictionary of texts and numbers."""
    hardware = "CPU"
    if torch.device(device).type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return {
        "device": hardware,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "processor": processor(),
    }


def processor():
    """Return the processor's name, with its model and stepping on Linux.

    The name alone does not tell the generations of a cloud provider's processors apart.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    entries = dict(re.findall(r"^(.+?)\s*: (.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE))
    parts = [entries.get("model name", platform.machine())]
    for name in ("model", "stepping"):
        if name in entries:
            parts.append(f"{name} {entries[name]}")
    return ", ".join(parts)


def data_name(train_loader):
    """Return the name of the data set of a loader, or its class."""
    dataset = getattr(train_loader, "dataset", train_loader)
    return getattr(dataset, "name", type(dataset).__name__)


def is_identical(one, two):
    """Return whether nested dictionaries and lists have the same numbers and bit-identical tensors."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(is_identical(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(is_identical, one, two))
    if isinstance(one, torch.Tensor):
        return torch.equal(one.cpu(), two.cpu())
    return one == two


def list_options(state):
    """Return the options in a state of a run, by name: of the optimizer's groups and of the scheduler."""
    options = {}
    for number, group in enumerate(state["optimizer"]["param_groups"], 1):
        for name, value in group.items():
            options[f"optimizer group {number} {name}"] = value
    for name, value in state["scheduler"].items():
        options[f"scheduler {name}"] = value
    return options


def list_differences(there, here):
    """Return the values in which two dictionaries differ, as a text.

    An entry that only one of them has is no difference: options come and go with PyTorch's versions.
    """
    differences = []
    for name, value in here.items():
        if there.get(name, value) != value:
            differences.append(f"{name}: {there[name]}, now {value}")
    return "; ".join(differences)


def check_objects(model, optimizer, scheduler):
    """Raise an error if the optimizer or the scheduler does not belong to the model, or if one was used."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: a run has one torch.optim.Optimizer")
    parameters = set(model.parameters())
    trained = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    if parameters.isdisjoint(trained):
        raise ValueError("the optimizer has no parameters of the model: create it again")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("the scheduler belongs to another optimizer: create it again")
    # A new Adagrad has a state, with step 0. A new SGD has none, and a used one has no step in it.
    was_stepped = any(state.get("step", 1) > 0 for state in optimizer.state.values())
    if model in _trained or was_stepped or getattr(scheduler, "last_epoch", 0) > 0:
        raise ValueError("the model has been trained: create model, optimizer and scheduler again")


def read_sources():
    """Return the texts of the files and, in a notebook, of the running cell, by name."""
    sources = {}
    for name in SOURCES:
        sources[name] = (ROOT / name).read_text(encoding="utf-8")
    shell = get_ipython()
    if shell is not None:
        sources["the training cell"] = shell.history_manager.input_hist_raw[-1]
    return sources


def print_changes(there, here):
    """Print the lines, at most ten per text, in which the texts of two dictionaries differ."""
    for name in there | here:
        before = there.get(name, "").splitlines()
        now = here.get(name, "").splitlines()
        lines = []
        for line in difflib.unified_diff(before, now, n=0, lineterm=""):
            if not line.startswith(("---", "+++", "@@")):
                lines.append(line)
        if len(lines) > 10:
            lines[10:] = [f"and {len(lines) - 10} more lines"]
        if lines:
            print(f"{name} has changed since the checkpoint (- before, + now):", *lines, sep="\n")


# ---- runs ----


@dataclass
class History:
    """One value per completed epoch."""

    train_losses: list = field(default_factory=list)  # means per sample
    train_acc: list = field(default_factory=list)  # percent
    test_losses: list = field(default_factory=list)
    test_acc: list = field(default_factory=list)
    learning_rates: list = field(default_factory=list)  # at the start of the epoch
    seconds: list = field(default_factory=list, compare=False)  # wall-clock time

    @property
    def completed(self):
        """The number of completed epochs."""
        return len(self.test_acc)


@dataclass(repr=False)
class Run:
    """A training run: what is trained, its history, and the checkpoint from which it can be resumed.

    The checkpoint has the states of model, optimizer and scheduler in which the last completed epoch began
    and in which it ended. A resumed run starts from the first and repeats that epoch. On the same machine,
    results and states must be identical to the saved ones. On a GPU, or on another machine, the losses may
    differ as much as `LIMITS` allows. A finished run is restored to its end. The number of epochs may change,
    unless the schedule or the end of the augmentation depends on it.

    A run is saved at `path` or, if another run's checkpoint is there, under the next free name (`run-2.pt`
    for `run.pt`). The last of these is the one that is resumed.

    Raise TypeError or ValueError if the optimizer or the scheduler does not belong to the model or was used,
    if the file is not a checkpoint, or if the run differs from the saved one. Raise OSError if a file cannot
    be read or written.
    """

    path: str  # of the checkpoint
    _: KW_ONLY
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    criterion: Callable
    train_loader: BatchLoader  # or a DataLoader, or a list of batches
    epochs: int
    seed: int
    augmented_epochs: int | None = None  # in which the loop uses the loader's augmentation; None: in all
    resume: bool = False  # if there is no checkpoint, start from scratch

    def __post_init__(self):
        self.path = prepare_path(self.path)
        self.model = unwrap(self.model)
        check_objects(self.model, self.optimizer, self.scheduler)
        self.history = History()
        self.summary = self._summarize()
        self.title = f"{type(self.model).__name__} on {data_name(self.train_loader)}"
        self._options = list_options(self._state())
        self._first_path = self.path
        self._content = None  # of the checkpoint that this run read or wrote last
        self._began = None  # the state in which the running epoch began
        self._repeated = None  # the checkpoint with which that epoch is compared
        print(self)
        if self.resume:
            self._resume()

    def __str__(self):
        what = f"{self.summary['network']} on {self.summary['data']}"
        if self.summary["augmentation"] != "none":
            what += f", {self.summary['augmentation']} until epoch {self.summary['augmented epochs']}"
        how = f"{self.summary['optimizer']}, {self.summary['scheduler']}, {self.summary['loss']}"
        return f"{what}\n{how}, seed {self.seed}, until epoch {self.epochs}"

    def _state(self):
        """Return a copy of the states of the model, the optimizer and the scheduler."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scheduler": {}}
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        return deepcopy(without_numpy(state))

    def _machine(self):
        return describe_machine(next(self.model.parameters()).device)

    def _load(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.model.load_state_dict(state["model"])

    def _summarize(self):
        """Return what is trained, as a dictionary of short texts."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        augmentation = getattr(self.train_loader, "augmentation", None)
        augmented_epochs = self.epochs
        if self.augmented_epochs is not None:
            augmented_epochs = max(self.augmented_epochs, 0)
        if augmentation is None or augmented_epochs == 0:
            augmentation = "none"
            augmented_epochs = 0
        return {
            "network": f"{type(self.model).__name__} with {parameters:,} parameters",
            "data": f"{data_name(self.train_loader)}, {len(self.train_loader)} batches",
            "augmentation": brief(augmentation),
            "augmented epochs": str(augmented_epochs),
            "optimizer": brief(self.optimizer),
            "scheduler": brief(self.scheduler),
            "loss": brief(self.criterion),
            "seed": str(self.seed),
            "epochs": str(self.epochs),
        }

    def remaining_epochs(self):
        """Start the epochs that are not completed, up to `epochs`, one after another; yield their numbers.

        After an interruption, the last completed epoch is repeated first.
        """
        if self._began is not None and self._content is None:
            self._load(self._began)
            self.history = History()
        elif self._began is not None:
            self._restore(parse_checkpoint(self._content))
        if self.history.completed >= self.epochs:
            print(f"All {self.epochs} epochs are completed")
        for epoch in range(self.history.completed + 1, self.epochs + 1):
            self._start_epoch(epoch)
            yield epoch

    def _start_epoch(self, epoch):
        """Seed all random numbers, set the training mode, and note the state, the learning rate and the time.

        Each epoch has its own seed, so that a resumed run draws the same random numbers.
        """
        print(f"EPOCH: {epoch}")
        self._began = self._state()
        _trained.add(self.model)
        self.model.train()  # a user's own `train` may not do it
        seed = 1000 * self.seed + epoch
        torch.manual_seed(seed)
        for owner in (self.train_loader, getattr(self.train_loader, "sampler", None)):
            generator = getattr(owner, "generator", None)  # of a DataLoader or of its sampler
            if generator is not None:
                generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # NumPy takes no larger ones
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.start_time = time.perf_counter()

    def record(self, train_loss, train_acc, test_loss, test_acc):
        """Append the results of an epoch to the history and save a checkpoint.

        A repeated epoch is compared with the saved one instead. Raise ValueError if they differ.
        """
        if self._began is None:
            raise RuntimeError("no epoch was started: iterate over run.remaining_epochs()")
        results = History(
            [float(train_loss)],
            [float(train_acc)],
            [float(test_loss)],
            [float(test_acc)],
            [self.learning_rate],
            [time.perf_counter() - self.start_time],
        )
        if self._repeated is not None:
            self._compare(results)
            results.seconds = self._repeated["history"]["seconds"][-1:]
        for name, values in vars(results).items():
            getattr(self.history, name).extend(values)
        if self._repeated is None:
            self._save()
        self._repeated = None
        self._began = None

    def _compare(self, results):
        """Print whether a repeated epoch gave the saved results; raise ValueError if it did not."""
        epoch = self.history.completed + 1
        differences = []
        is_close = True
        for column, name in RECORDED.items():
            if name == "seconds":
                continue
            (now,) = getattr(results, name)
            before = self._repeated["history"][name][-1]
            if now != before:
                differences.append(f"{column.replace('_', ' ')} {now:.6g} instead of {before:.6g}")
            if name in LIMITS and abs(now - before) > LIMITS[name] * abs(before):
                is_close = False
        here = self._machine()
        is_same_machine = here == self._repeated["machine"] and here["device"] == "CPU"
        for part, state in self._state().items():
            if is_same_machine and not is_identical(state, self._repeated[part]):
                differences.append(f"another state of the {part}")
        if not differences:
            print(f"Epoch {epoch} was repeated: identical")
        elif is_close and not is_same_machine:
            print(f"Epoch {epoch} was repeated on another machine or a GPU: {', '.join(differences)}")
        else:
            print_changes(self._repeated["sources"], read_sources())
            raise ValueError(
                f"epoch {epoch} gave {', '.join(differences)}: something that determines the results has"
                " changed or is not restored, such as a generator of your own or a second optimizer: undo"
                " it, or set RESUME = False"
            )

    def _resume(self):
        """Restore the state from the last checkpoint, if there is one and it is that of this run."""
        number = last_number(self._first_path)
        if number == 0:
            print(f"No checkpoint at {self.path}: training starts from scratch")
            return
        self.path = numbered(self._first_path, number)
        state = load_checkpoint(self.path)
        same_epochs = {"epochs": self.summary["epochs"]}  # their number may change
        differences = list_differences(state["summary"] | same_epochs, self.summary)
        differences = differences or list_differences(state["options"], self._options)
        if differences:
            raise ValueError(
                f"{self.path} is the checkpoint of a different run ({differences}): undo these changes, or"
                " set RESUME = False"
            )
        completed = len(state["history"]["test_acc"])
        if completed > self.epochs:
            raise ValueError(
                f"{self.path} has {completed} completed epochs: set EPOCHS to at least that number, or"
                " RESUME = False"
            )
        self._content = self.path.read_bytes()
        self._restore(state)

    def _restore(self, state):
        """Restore the beginning of the last completed epoch, or the end of a finished run."""
        self.history = History(**deepcopy(state["history"]))
        self._repeated = None
        completed = self.history.completed
        if completed >= self.epochs:
            self._load(state)
            return
        for values in vars(self.history).values():
            values.pop()
        self._load(state["began"])
        self._repeated = state
        print(f"Resuming from {self.path}: epoch {completed} is repeated, to show that the run is the same")

    def _save(self):
        """Write a checkpoint; if another run's is at the path, under the next free name of the series."""
        state = {
            **self._state(),
            "began": self._began,
            "options": self._options,
            "machine": self._machine(),
        }
        report = {"summary": self.summary, "history": vars(self.history), "sources": read_sources()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(REPORT, json.dumps(report))
        content = buffer.getvalue()
        if self.path.name in os.listdir(self.path.parent) and self.path.read_bytes() != self._content:
            self.path = numbered(self._first_path, last_number(self._first_path) + 1)
        write_file(self.path, content)
        self._content = content


# ---- checkpoints ----


def prepare_path(path):
    """Return the path of a checkpoint without links and `~`, and create its folder.

    A link to a file stays a link. Raise OSError if the folder cannot be used, before anything is trained.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    os.listdir(path.parent)  # fails where a link leads to a drive that is not mounted
    return path


def numbered(path, number):
    """Return the name of the checkpoint with a number: `run.pt`, `run-2.pt`, `run-3.pt` and so on."""
    if number == 1:
        return path
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def last_number(path):
    """Return the highest number of the checkpoints `run.pt`, `run-2.pt` and so on; 0 if there are none."""
    pattern = re.compile(rf"{re.escape(path.stem)}(?:-(\d+))?{re.escape(path.suffix)}")
    last = 0
    for name in os.listdir(path.parent):
        match = pattern.fullmatch(name)
        if match:
            last = max(last, int(match[1] or 1))
    return last


def write_file(path, content):
    """Write a file; at any moment, the old or the new one is there, complete."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()  # is still there if writing failed or was interrupted


def without_numpy(value):
    """Return nested dictionaries and lists with Python's numbers in place of NumPy's.

    `np.logspace` gives such learning rates, and `torch.load` would reject them in a checkpoint.
    """
    if isinstance(value, dict):
        return {key: without_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_numpy(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    return value


def load_checkpoint(path):
    """Return the state that a `Run` saved at `path`: a dictionary, with its tensors on the CPU.

    The states after the last completed epoch are `model`, `optimizer` and `scheduler`; those before it are in
    `began`. The other keys are `history`, `summary`, `options`, `machine` and `sources`. Code that the file
    may contain is not run. Raise OSError if the file cannot be read, ValueError if it is not a checkpoint.
    """
    content = Path(path).expanduser().read_bytes()
    try:
        return parse_checkpoint(content)
    except Exception as error:  # what torch.load raises depends on where the file is corrupted
        raise ValueError(f"{path} is {NO_CHECKPOINT} ({type(error).__name__}): set RESUME = False") from None


def parse_checkpoint(content):
    """Return the state in the content of a checkpoint."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        corrupted = archive.testzip()  # torch.load ignores the CRCs
        if corrupted is not None:
            raise ValueError(f"{corrupted} has another CRC")
        report = json.loads(archive.read(REPORT))
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True) | report


# ---- earlier runs ----


class SavedRun(NamedTuple):
    """What a checkpoint tells about its run."""

    name: str  # of the file
    summary: dict  # see `Run`
    history: History
    sources: dict  # texts by name
    recorded: list  # histories of the recorded runs of the same network


def list_runs(folder):
    """Return the runs whose checkpoints are in a folder, oldest first, as a list of `SavedRun`.

    A file that cannot be read is named in a line, and left out.
    """
    paths = sorted(Path(folder).expanduser().glob("*.pt"), key=lambda path: path.stat().st_mtime)
    runs = []
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                report = json.loads(archive.read(REPORT))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            print(f"Left out: {path} is {NO_CHECKPOINT} ({type(error).__name__})")
            continue
        summary = report["summary"]
        history = History(**report["history"])
        runs.append(SavedRun(path.name, summary, history, report["sources"], recorded_seeds(summary)))
    return runs


def recorded_seeds(summary):
    """Return the recorded runs of the network of a run, as a list of `History`, if it was tested on MNIST."""
    network = summary["network"].split()[0]
    if summary["data"].split(",")[0] != "MNIST":
        return []
    return list(recorded_runs().get((network, "described"), {}).values())


@functools.cache
def recorded_runs():
    """Return the runs on a CPU that benchmarks/accuracy.csv contains.

    They are a dictionary from (model, schedule) to a dictionary from seed to `History`.
    Models 2 and 3 are the same network, and Model3's learning rate never dropped: its runs are bit-identical
    to runs of both models at a constant rate, and are returned under those keys too. The file is read once:
    callers share the result and must not change it.
    """
    with open(ROOT / "benchmarks" / "accuracy.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {}
    for row in rows:
        if row["device"] == "CPU":
            histories = runs.setdefault((row["model"], row["schedule"]), {})
            history = histories.setdefault(int(row["seed"]), History())
            for column, name in RECORDED.items():
                getattr(history, name).append(float(row[column]))
    runs["Model2", "constant"] = runs["Model3", "described"]
    runs["Model3", "constant"] = runs["Model3", "described"]
    return runs

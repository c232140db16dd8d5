"""What the notebook trains with: training and test, data, recipes and settings, runs and checkpoints.

The networks are in `model.py`; the layer table, plots and reports are in `plots.py`.
"""

import ast
import contextlib
import difflib
import inspect
import io
import itertools
import math
import os
import random
import re
import socket
import sys
import tempfile
import textwrap
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from IPython import get_ipython
from IPython.display import display
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

DIGITS = 10
SIDE = 28  # pixels
MEAN = 0.1307  # of the 60,000 training images, with pixels scaled to [0, 1]
STD = 0.3081
BLACK = -MEAN / STD  # a black pixel after normalization

# ---- training and test ----


def GetCorrectPredCount(pred, target):
    """Return the number of correct predictions of `pred` `(B, 10)` for `target` `(B,)`.

    The number is a tensor, so that nothing waits for the device.
    """
    return pred.argmax(dim=1).eq(target).sum()


def train(model, device, train_loader, optimizer, criterion):
    """Train for one epoch; return the mean loss per sample and the accuracy in percent.

    `train_loader` is iterated and has a length; `criterion(output, target)` is the mean over a batch.
    Loss and accuracy are measured on the fly, in training mode. Raise FloatingPointError if the loss is
    not finite.
    """
    model.train()
    refresh_every = 50  # batches, because reading the loss waits for the device
    if torch.device(device).type == "cpu":
        refresh_every = 1
    losses = []
    correct = 0
    count = 0
    with tqdm(train_loader, file=progress_file()) as bar:
        for batch_id, (data, target) in enumerate(bar):
            data = data.to(device)
            target = target.to(device)
            optimizer.zero_grad()
            output = model(data)
            loss = criterion(output, target)
            loss.backward()
            optimizer.step()

            losses.append(loss.detach() * len(data))
            correct += GetCorrectPredCount(output, target)
            count += len(data)
            if batch_id % refresh_every == 0 or batch_id == len(train_loader) - 1:
                loss = loss.item()
                if not math.isfinite(loss):
                    raise FloatingPointError(f"batch {batch_id}: the loss is {loss}: lower the learning rate")
                accuracy = 100 * correct.item() / count
                text = f"Train: Loss={loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}"
                bar.set_description(text, refresh=False)
    return sum_exactly(losses) / count, 100 * correct.item() / count


@torch.no_grad()
def test(model, device, test_loader, criterion):
    """Evaluate a model; print and return the mean loss per sample and the accuracy in percent.

    The arguments are those of `train`. Raise FloatingPointError if the loss is not finite, and ValueError
    if `nll_loss` is given scores that are not log-probabilities.
    """
    model.eval()
    losses = []
    correct = 0
    count = 0
    for data, target in test_loader:
        data = data.to(device)
        target = target.to(device)
        output = model(data)
        losses.append(criterion(output, target) * len(data))
        correct += GetCorrectPredCount(output, target)
        count += len(data)
    loss = sum_exactly(losses) / count
    correct = correct.item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the test loss is {loss}: lower the learning rate")
    if loss < 0 and brief(criterion).startswith(("nll_loss", "NLLLoss")):
        raise ValueError(
            f"the test loss is {loss:.4f}, but a negative log-likelihood cannot be negative: end the network"
            " in log_softmax, or use F.cross_entropy"
        )
    accuracy = 100 * correct / count
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/{count} ({accuracy:.2f}%)")
    return loss, accuracy


def sum_exactly(losses):
    """Return the sum of a list of scalar tensors as a number; float32 would lose digits."""
    return torch.stack(losses).cpu().double().sum().item()


def choose_device():
    """Return "cuda" if there is a GPU, otherwise "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


class ProgressLine(io.TextIOBase):
    """A file for tqdm that shows its text as one notebook output, updated in place.

    With plain printing, every refresh would remain in the saved notebook as a line of its own.
    """

    encoding = "utf-8"  # makes tqdm use block characters

    def __init__(self):
        self.output = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text):
        if text.strip():
            self.output.update({"text/plain": text.strip()}, raw=True)


def progress_file():
    """Return the file that tqdm writes to: a `ProgressLine` in a notebook, stdout elsewhere."""
    if hasattr(get_ipython(), "kernel"):
        return ProgressLine()
    return sys.stdout


def unwrap(model):
    """Return the module inside of `torch.compile` or `nn.DataParallel`, and any other model as it is."""
    if isinstance(model, nn.DataParallel):
        return unwrap(model.module)
    return getattr(model, "_orig_mod", model)  # set by torch.compile


# ---- data ----

MNIST_MD5 = {  # of the four uncompressed original files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MIRROR_TIMEOUT = 15  # seconds


@dataclass  # not frozen: where IPython 7 reloads this file, it assigns a new class to each instance
class DigitSet(torch.utils.data.Dataset):
    """A data set in memory: uint8 images `(N, 28, 28)` and int64 labels `(N,)`.

    A number as index gives a normalized image `(1, 28, 28)` and its label, so that a `DataLoader` and
    `random_split` work. A slice or an index tensor gives a smaller set of the same name.

    Raise TypeError if the images are not uint8.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self):
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images are {self.images.dtype}: give them as torch.uint8, from 0 to 255")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if isinstance(index, int):
            return normalize(self.images[index]), self.labels[index].item()
        return DigitSet(self.name, self.images[index], self.labels[index])


def split(train_set):
    """Return five sixths of a `DigitSet` to train on and one sixth to validate on.

    The images are chosen at random, but are the same in every run: 50,000 and 10,000 of MNIST's.
    """
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))
    validation_count = len(train_set) // 6
    return train_set[order[:-validation_count]], train_set[order[-validation_count:]]


class BatchLoader:
    """An iterable over the batches of a `DigitSet`, which is kept on `device` as one normalized tensor.

    Yields `(data, target)`: float32 `(B, 1, 28, 28)` and int64 `(B,)`; the last batch may be smaller.
    `shuffle` draws a new order for every epoch. `augmentation`, if there is one, is a function of `data`;
    it can be replaced or set to None at any time.

    Raise TypeError if the data set is not a `DigitSet`, and for transforms of torchvision: they draw one
    set of random numbers per call. Both work with a `DataLoader`, which calls transforms for each image.
    """

    def __init__(self, dataset, batch_size, device, shuffle=False, augmentation=None):
        if not isinstance(dataset, DigitSet):
            raise TypeError(
                f"BatchLoader needs a DigitSet, not {type(dataset).__name__}: create one from images and"
                " labels, such as DigitSet(name, mnist.data, mnist.targets), or use a DataLoader"
            )
        if type(augmentation).__module__.startswith("torchvision."):
            raise TypeError(
                f"{type(augmentation).__name__} would change all images of a batch alike: use it in the"
                " transform of a torchvision data set with a DataLoader, before Normalize"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.data = normalize(dataset.images).to(device)
        self.target = dataset.labels.to(device)

    def __len__(self):
        return math.ceil(len(self.target) / self.batch_size)

    def __iter__(self):
        if self.shuffle:
            order = torch.randperm(len(self.target))
        else:
            order = torch.arange(len(self.target))
        for index in order.to(self.data.device).split(self.batch_size):
            data = self.data[index]
            if self.augmentation is not None:
                data = self.augmentation(data)
            yield data, self.target[index]


def normalize(images):
    """Return uint8 images `(..., H, W)` as float32 `(..., 1, H, W)`, normalized with MNIST's mean and std.

    The values are those of torchvision's `ToTensor` and `Normalize((0.1307,), (0.3081,))`.
    """
    return images.unsqueeze(-3).float().div_(255).sub_(MEAN).div_(STD)


def random_affine(data, degrees, shift, scale):
    """Rotate, shift and scale each image of a normalized batch `(B, 1, H, W)` at random.

    The amounts are uniform: rotation within ± `degrees`, shift within ± `shift` of the side length
    in each direction, size within 1 ± `scale`.
    """
    amounts = torch.rand(4, len(data), device=data.device) * 2 - 1
    return affine(data, amounts[0] * degrees, amounts[1:3].T * shift, 1 + amounts[3] * scale)


def affine(data, angle, shift, size):
    """Rotate, shift and scale each image of a normalized batch `(B, 1, H, W)` by the given amounts.

    `angle` `(B,)` is in degrees, clockwise; `shift` `(B, 2)` is right and down, as fractions of the side
    length; `size` `(B,)` is the scale factor. Interpolation is bilinear, the outside is black, and the
    transformation is that of torchvision's `functional.affine`.
    """
    angle = angle.deg2rad()
    cos = angle.cos() / size
    sin = angle.sin() / size
    rotation = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    translation = -2 * rotation @ shift.unsqueeze(2)  # grid coordinates run from -1 to 1
    grid = F.affine_grid(torch.cat([rotation, translation], 2), data.shape, align_corners=False)
    return F.grid_sample(data - BLACK, grid, align_corners=False) + BLACK


def load_data(standin=True):
    """Return the training and the test set: MNIST or, with a prominent warning, the stand-in.

    MNIST is read from the folder `MNIST_ROOT` (default `./data`), and downloaded if it is missing there.
    With `standin=False` or `S7_STANDIN=0`, raise RuntimeError if MNIST is not available; with
    `S7_STANDIN=1`, use the stand-in without trying MNIST.
    """
    wanted = os.environ.get("S7_STANDIN", "").strip()
    if wanted not in ("", "0", "1"):
        raise ValueError(f"S7_STANDIN is {wanted!r}: choose 0 or 1")
    if standin and wanted == "1":
        return load_standin("the stand-in was requested with S7_STANDIN=1")
    root = Path(os.environ.get("MNIST_ROOT") or "./data").expanduser()
    folder = root / "MNIST" / "raw"
    try:
        if not all(check_integrity(folder / name, md5) for name, md5 in MNIST_MD5.items()):
            download_mnist(folder)
    except RuntimeError as error:
        if not standin or wanted == "0":
            raise
        return load_standin(error)
    return read_mnist(folder, "train"), read_mnist(folder, "t10k")


def read_mnist(folder, part):
    """Return the `DigitSet` of one part of MNIST, "train" or "t10k", from its two files in a folder."""
    images = read_image_file(folder / f"{part}-images-idx3-ubyte")
    return DigitSet("MNIST", images, read_label_file(folder / f"{part}-labels-idx1-ubyte"))


def download_mnist(folder):
    """Download MNIST's files into a folder, with a timeout of 15 seconds per mirror.

    They are moved there when they are complete, so that several processes can download at the same time.
    Raise RuntimeError, naming the remedy, if that fails.
    """
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(MIRROR_TIMEOUT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            complete = Path(datasets.MNIST(temporary, download=True).raw_folder)
            for name in MNIST_MD5:
                os.replace(complete / name, folder / name)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise RuntimeError(
            f"MNIST in {folder} is missing or corrupted and could not be downloaded ({reason}): check the"
            " network connection and rerun, place the four original files there, or set MNIST_ROOT"
        ) from None
    finally:
        socket.setdefaulttimeout(previous_timeout)


def load_standin(reason):
    """Warn prominently that the data is not MNIST, and why; return the synthetic training and test set."""
    print(f"*** THIS IS NOT MNIST: {reason}.")
    print(
        "*** Using stand-in digits: the results below are not MNIST results. To use MNIST, rerun with"
        " network access, or set MNIST_ROOT to the folder that contains MNIST/raw."
    )
    return draw_standin(train=True), draw_standin(train=False)


def draw_standin(train):
    """Return synthetic digits in MNIST's format: 6,000 training or 1,000 test images.

    They are glyphs of Pillow's default font, randomly rotated, shifted and scaled, and identical in
    every run. They are used if MNIST is not available, and in the tests.
    """
    font = ImageFont.load_default(24)
    glyphs = []
    for digit in range(DIGITS):
        image = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(image).text((14, 14), str(digit), fill=255, font=font, anchor="mm")
        glyphs.append(pil_to_tensor(image))
    count = 1000
    if train:
        count = 6000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(train))
        labels = torch.randint(DIGITS, (count,))
        data = normalize(torch.cat(glyphs)[labels])
        data = random_affine(data, degrees=20, shift=0.1, scale=0.2)
    images = ((data * STD + MEAN) * 255).round().byte().squeeze(1)
    return DigitSet("stand-in digits (not MNIST)", images, labels)


# ---- recipes and settings ----


@dataclass
class Recipe:
    """The hyperparameters of a model's training."""

    sgd: dict  # arguments of torch.optim.SGD
    scheduler: type  # a class of torch.optim.lr_scheduler
    scheduler_args: dict  # its arguments
    batch_size: int = 128
    augmentation: partial | None = None  # a function of a batch
    clean_epochs: int = 0  # number of final epochs without augmentation

    def __str__(self):
        return "\n".join(f"{item.name}: {brief(getattr(self, item.name))}" for item in fields(self))


PUBLISHED_SGD = dict(lr=0.01, momentum=0.9)
PUBLISHED_STEP = Recipe(PUBLISHED_SGD, StepLR, dict(step_size=6, gamma=0.1))
PUBLISHED_PLATEAU = Recipe(
    PUBLISHED_SGD,
    ReduceLROnPlateau,
    dict(mode="min", factor=0.1, patience=10, threshold=1e-4, threshold_mode="abs"),
)
AUGMENTED = Recipe(
    sgd=dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    scheduler=StepLR,
    scheduler_args=dict(step_size=1, gamma=0.75),
    augmentation=partial(random_affine, degrees=10, shift=0.06, scale=0.06),
    clean_epochs=6,
)
RECIPES = {
    "Model1": PUBLISHED_STEP,
    "Model2": PUBLISHED_STEP,
    "Model3": PUBLISHED_PLATEAU,
    "Model4": AUGMENTED,
    "Model5": AUGMENTED,
}


def setting(name, default):
    """Return the environment variable `S7_<name>`, or `default` if it is not set or empty.

    Unless the default is text, the variable is read as a Python literal, such as 3, True or None.
    """
    text = os.environ.get(f"S7_{name}", "").strip()
    if not text:
        return default
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text  # `check_settings` rejects it by name


def check_settings(model, epochs, batch_size, seed, resume):
    """Raise ValueError, naming the setting and its valid values, if a setting is invalid."""
    if model not in RECIPES:
        raise ValueError(
            f"MODEL is {model!r}: choose one of {', '.join(RECIPES)}; a new network needs an entry in MODELS"
            " (model.py) and in RECIPES (utils.py)"
        )
    if batch_size is None:
        batch_size = RECIPES[model].batch_size
    for name, value, lowest in (("EPOCHS", epochs, 1), ("BATCH_SIZE", batch_size, 1), ("SEED", seed, 0)):
        if type(value) is not int or not lowest <= value < 10**9:
            raise ValueError(f"{name} is {value!r}: it must be an integer from {lowest} to 999,999,999")
    if resume not in (True, False):
        raise ValueError(f"RESUME is {resume!r}: choose True or False")


# ---- runs and checkpoints ----


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

    The run is described by the objects that it is given (see `describe`). Before it is resumed, its
    description is compared with that in the checkpoint. The number of epochs is no part of it, so a
    finished run can be resumed with more epochs, unless the schedule or the end of the augmentation depends
    on that number and therefore differs.

    The checkpoint always contains the state after a completed epoch. If an earlier run has left one, it is
    kept under another name when the first epoch of a new run is saved.

    Raise ValueError if the optimizer or the scheduler has been used or belongs to another model, if the
    file is not a checkpoint, or if it is that of a different run, naming the differences. Raise OSError if
    a file cannot be read or written.
    """

    path: str  # of the checkpoint
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    train_loader: BatchLoader  # or a DataLoader, or a list of batches
    test_loader: BatchLoader
    criterion: Callable
    epochs: int
    seed: int
    augmented_epochs: int | None = None  # in which the loop uses the augmentation of the loader
    resume: bool = False  # restore the state from the checkpoint; if there is none, start from scratch

    def __post_init__(self):
        self.path = Path(self.path).expanduser()
        self.model = unwrap(self.model)
        self.history = History()
        reject_used(self.model, self.optimizer, self.scheduler)
        trained = {"network": self.model}
        for name in ("train_loader", "test_loader", "optimizer", "scheduler", "criterion", "seed"):
            trained[name] = getattr(self, name)
        augmentation = getattr(self.train_loader, "augmentation", None)
        dataset = getattr(self.train_loader, "dataset", self.train_loader)
        data_name = getattr(dataset, "name", type(dataset).__name__)
        data = f"{data_name}, {len(self.train_loader)} batches"
        if augmentation is None:
            self.augmented_epochs = None
        else:
            trained["augmented_epochs"] = self.augmented_epochs
            if self.augmented_epochs != 0:
                data += f", {brief(augmentation)} until epoch {self.augmented_epochs}"
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.title = f"{type(self.model).__name__} on {data_name}"
        self.summary = (
            f"{type(self.model).__name__} with {parameters:,} parameters on {data}\n{brief(self.optimizer)},"
            f" {brief(self.scheduler)}, {brief(self.criterion)}, seed {self.seed}, until epoch {self.epochs}"
        )
        print(self)
        self.description = describe(trained)
        self.sources = read_sources()
        if self.resume:
            self._resume()
        self._saved = self._pack()  # the state after the last completed epoch
        self._is_in_epoch = False

    def __str__(self):
        return self.summary

    def remaining_epochs(self):
        """Start the epochs that are not completed, up to `epochs`, one after another; yield their numbers.

        If the last one was interrupted, the state after the last completed epoch is restored first.
        """
        if self._is_in_epoch:
            self._restore(load_state(self._saved))
            print(f"Back to the state after epoch {self.history.completed}")
        if self.history.completed >= self.epochs:
            print(f"All {self.epochs} epochs are completed")
        for epoch in range(self.history.completed + 1, self.epochs + 1):
            self._start_epoch(epoch)
            yield epoch

    def _start_epoch(self, epoch):
        """Seed all random numbers, set the training mode, and note the learning rate and the time.

        Each epoch has its own seed, so that a resumed run draws the same random numbers.
        """
        print(f"EPOCH: {epoch}")
        self._is_in_epoch = True
        self.model.train()  # a user's own `train` may not do it
        seed = 1000 * self.seed + epoch
        torch.manual_seed(seed)
        generator = getattr(self.train_loader, "generator", None)  # of a DataLoader
        if generator is not None:
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # NumPy takes no larger ones
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.start_time = time.perf_counter()

    def record(self, train_loss, train_acc, test_loss, test_acc):
        """Append the results of an epoch to the history and save a checkpoint."""
        self.history.seconds.append(time.perf_counter() - self.start_time)
        self.history.train_losses.append(float(train_loss))
        self.history.train_acc.append(float(train_acc))
        self.history.test_losses.append(float(test_loss))
        self.history.test_acc.append(float(test_acc))
        self.history.learning_rates.append(self.learning_rate)
        content = self._pack()
        save_checkpoint(self.path, content, keep=self.history.completed == 1)
        self._saved = content
        self._is_in_epoch = False

    def _pack(self):
        """Return the content of a checkpoint with the current state."""
        scheduler_state = {}
        if self.scheduler is not None:
            scheduler_state = self.scheduler.state_dict()
        state = {
            "model": self.model.state_dict(),
            "optimizer": without_numpy(self.optimizer.state_dict()),
            "scheduler": without_numpy(scheduler_state),
            "description": self.description,
            "sources": self.sources,
            "history": vars(self.history),
        }
        content = io.BytesIO()
        torch.save(state, content)
        return content.getvalue()

    def _resume(self):
        """Restore the state from the checkpoint, if there is one and it is that of this run."""
        try:
            state = load_checkpoint(self.path)
        except FileNotFoundError:  # any other error does not mean that there is no checkpoint
            print(f"No checkpoint at {self.path}: training starts from scratch")
            return
        differences = list_differences(state["description"], self.description)
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
        for name in state["sources"] | self.sources:
            print_changes(name, state["sources"].get(name, ""), self.sources.get(name, ""))
        self._restore(state)
        print(f"Resuming after epoch {completed} of {self.epochs}")

    def _restore(self, state):
        self.optimizer.load_state_dict(state["optimizer"])  # first, because other parameters do not fit
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.model.load_state_dict(state["model"])
        self.history = History(**state["history"])


def reject_used(model, optimizer, scheduler):
    """Raise ValueError if the optimizer or the scheduler has been used or belongs to another model."""
    parameters = set(model.parameters())
    for group in optimizer.param_groups:
        if not parameters.issuperset(group["params"]):
            raise ValueError("the optimizer has parameters that are not the model's: create it again")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("the scheduler belongs to another optimizer: create it again")
    # A new Adagrad has a state, with step 0. A new SGD has none, and a used one has no step in it.
    was_stepped = any(state.get("step", 1) > 0 for state in optimizer.state.values())
    if was_stepped or getattr(scheduler, "last_epoch", 0) > 0:
        raise ValueError("the optimizer or the scheduler has been used: create the model and both again")


# ---- what is trained, as text ----


def brief(item):
    """Return an object in short: a function by its name, others as the call that creates them."""
    if isinstance(item, dict):
        return ", ".join(f"{name}={value}" for name, value in item.items())
    if isinstance(item, partial):
        return f"{brief(item.func)}({', '.join([*map(str, item.args), brief(item.keywords)])})"
    if inspect.isroutine(item) or isinstance(item, type):
        return item.__name__
    if not hasattr(item, "__dict__"):
        return str(item)
    values = getattr(item, "defaults", vars(item))  # an optimizer keeps its options in `defaults`
    options = {}
    for name in inspect.signature(type(item)).parameters:
        if isinstance(values.get(name), (int, float, str)) and values[name] != 0:
            options[name] = values[name]
    return f"{type(item).__name__}({brief(options)})"


# Attributes that repeat others, or that do not determine what is trained
NOT_DESCRIBED = {"training", "optimizer", "base_lrs", "_last_lr", "root"}


def describe(parts):
    """Return what determines the behavior of objects, given by name, as a flat dictionary of texts.

    Objects are described by class and attributes; functions by their source and by what it uses;
    parameters by shape, and whether they are trained; other tensors by shape and checksum; containers by
    their keys.
    """
    description = {}
    seen = {}
    waiting = list(parts.items())
    for name, value in waiting:
        description[name], parts = dissect(value)
        if id(value) in seen:
            continue
        seen[id(value)] = value  # a reference, so that no other object gets the same id
        for key, part in parts.items():
            if key not in NOT_DESCRIBED and "hook" not in str(key):
                waiting.append((f"{name}.{key}", part))
    return description


def dissect(value):
    """Return an object as text, without what its parts say, and its parts as a dictionary."""
    if isinstance(value, nn.Parameter):
        return f"{tuple(value.shape)}, requires_grad={value.requires_grad}", {}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        content = torch.as_tensor(value).detach().cpu().contiguous().flatten().view(torch.uint8)
        return f"{tuple(value.shape)}, checksum {zlib.crc32(content.numpy())}", {}
    if isinstance(value, dict):
        return ", ".join(map(str, value)), value
    if isinstance(value, (list, tuple)):
        if len(value) > 100 and isinstance(value[0], int):  # the indices of a Subset
            return f"{len(value)} numbers, checksum {zlib.crc32(repr(value).encode())}", {}
        return f"{len(value)} items", dict(enumerate(value))
    if isinstance(value, partial):
        return "partial", {"func": value.func, "args": value.args, "keywords": value.keywords}
    if inspect.isfunction(value) and is_own(value):
        variables = inspect.getclosurevars(value)
        return source_of(value), {"defaults": value.__defaults__, **variables.globals, **variables.nonlocals}
    if inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value):
        return value.__name__, {}
    if not hasattr(value, "__dict__"):
        return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value)), {}
    return type(value).__qualname__, attributes_of(value)


def attributes_of(value):
    """Return the attributes of an object, and the methods of a class of the user's own."""
    parts = {}
    for name, part in vars(value).items():
        parts[name] = part
        if name in ("_modules", "_parameters", "_buffers"):
            parts[name] = ", ".join(part)
            parts.update(part)
    if isinstance(value, Optimizer):
        parts = {}
        for number, group in enumerate(value.param_groups, 1):
            for name, option in group.items():
                parts[f"group {number} {name}"] = option
    for base in type(value).__mro__:
        if is_own(base) and base.__module__ not in ("model", "utils"):  # see `read_sources` for these
            parts.update({name: part for name, part in vars(base).items() if inspect.isfunction(part)})
    return parts


def is_own(item):
    """Return whether a function or class comes from a cell or a file of the user, not from a library."""
    name = getattr(item, "__module__", None) or "__main__"
    if name == "__main__":
        return True
    file = getattr(sys.modules.get(name), "__file__", None) or "site-packages"
    return name.split(".")[0] not in sys.stdlib_module_names and "-packages" not in file


def source_of(function):
    """Return the source of a function without comments, or its code if there is no source."""
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(function))))
    except (OSError, SyntaxError):
        code = function.__code__
        return re.sub(" at 0x[0-9a-fA-F]+", "", f"{code.co_names} {code.co_consts} {code.co_code.hex()}")


def list_differences(saved, current):
    """Return the entries in which two descriptions differ, three of them with both texts.

    An entry that only one of the two has is no difference: containers list their keys, and the attributes
    of PyTorch's objects come and go with its versions.
    """
    differences = []
    for name, here in current.items():
        there = saved.get(name, here)
        lines = itertools.zip_longest(there.splitlines(), here.splitlines(), fillvalue="nothing")
        for before, now in lines:
            if before != now:
                before = textwrap.shorten(before, 90)
                now = textwrap.shorten(now, 90)
                differences.append(f"{name}: checkpoint {before}, current {now}")
                break
    if len(differences) > 3:
        differences[3:] = [f"and {len(differences) - 3} more"]
    return "; ".join(differences)


def read_sources():
    """Return the texts that determine a run beyond its description, by name: files, and the running cell."""
    sources = {}
    for name in ("model.py", "utils.py"):
        sources[name] = Path(__file__).with_name(name).read_text(encoding="utf-8")
    shell = get_ipython()
    if shell is not None:
        cell = shell.user_ns["In"][-1]
        sources["the training cell"] = cell
        for name in sorted(set(re.findall(r"\w+", cell))):
            item = shell.user_ns.get(name)
            if inspect.isfunction(item) and item.__module__ == "__main__":
                sources[name] = source_of(item)
    return sources


def print_changes(name, there, here):
    """Print a warning with the lines, at most ten, in which a source text differs from the checkpoint's."""
    lines = []
    for line in difflib.unified_diff(there.splitlines(), here.splitlines(), n=0, lineterm=""):
        if not line.startswith(("---", "+++", "@@")):
            lines.append(line)
    if len(lines) > 10:
        lines[10:] = [f"and {len(lines) - 10} more lines"]
    if lines:
        print(f"Warning: {name} has changed since the checkpoint (- before, + now):")
        print("\n".join(lines))


# ---- files ----


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


def save_checkpoint(path, content, keep=False):
    """Write a checkpoint; at any moment, the old or the new one is there, complete.

    Missing folders are created. With `keep=True`, the old one is kept under another name. Raise OSError,
    naming the remedy, if the file cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        if keep:
            keep_previous(path)
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(
            f"cannot write the checkpoint {path} ({error.strerror}): free disk space, fix the permissions, or"
            " set CHECKPOINTS to another folder and copy the last checkpoint there"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()  # is still there if writing failed or was interrupted


def keep_previous(path):
    """Rename the file at `path`, if there is one, to `*.previous-1.pt`, `*.previous-2.pt` and so on."""
    names = os.listdir(path.parent)
    if path.name not in names:
        return
    for number in itertools.count(1):
        previous = f"{path.stem}.previous-{number}{path.suffix}"
        if previous not in names:
            os.replace(path, path.with_name(previous))
            return


def load_checkpoint(path):
    """Return the state that a `Run` saved at `path`: a dictionary, with its tensors on the CPU.

    Its keys are `model`, `optimizer`, `scheduler`, `description`, `sources` and `history`. Code that the
    file may contain is not run. Raise OSError if the file cannot be read, ValueError if it is not a
    checkpoint.
    """
    content = Path(path).expanduser().read_bytes()
    try:
        corrupted = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch.load ignores the CRCs
        if corrupted is not None:
            raise ValueError(f"{corrupted} has another CRC")
        return load_state(content)
    except Exception as error:  # what torch.load raises depends on where the file is corrupted
        reason = type(error).__name__
        raise ValueError(
            f"{path} is not a checkpoint of this notebook, or corrupted ({reason}): set RESUME = False"
        ) from None


def load_state(content):
    """Return the state in the content of a checkpoint."""
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    names = ("model", "optimizer", "scheduler", "description", "sources", "history")
    return {name: dict(state[name]) for name in names}

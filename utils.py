"""Everything except the networks, in the notebook's order.

Sections: recipes and settings, data, training, runs, plots and reports, own digit, drawing field.
Error messages about invalid input are a single line that says what is wrong and what to do.
"""

import base64
import contextlib
import ctypes
import html
import io
import itertools
import json
import math
import os
import socket
import statistics
import sys
import time
import uuid
import warnings
import zipfile
from dataclasses import dataclass, field, fields, replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchinfo
from IPython import get_ipython
from IPython.core.pylabtools import select_figure_formats
from IPython.display import display
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

# ---- recipes and settings ----


def plain_value(value):
    """Return a setting as a string, number, bool or None, or as a list or dictionary of these.

    A class becomes its name, and a NumPy or PyTorch scalar becomes a Python number: a checkpoint is
    loaded without running code, so it can contain nothing else. Raise ValueError for any other type.
    """
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, type):
        return value.__name__
    if value is None or type(value) in (str, bool, int, float):
        return value
    if hasattr(value, "item"):
        try:
            return value.item()
        except (RuntimeError, ValueError):
            pass  # more than one element
    raise ValueError(f"a setting is of type {type(value).__name__}: use text, a number or a dictionary")


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a model's training.

    Numbers of numpy or torch are converted to Python's (see `plain_value`).
    """

    sgd: dict  # arguments of torch.optim.SGD
    scheduler: type  # a class of torch.optim.lr_scheduler
    scheduler_args: dict  # its arguments
    batch_size: int = 128
    augmentation: dict | None = None  # arguments of random_affine
    clean_epochs: int = 0  # number of final epochs without augmentation

    def __post_init__(self):
        for item in fields(self):
            if item.name != "scheduler":
                number = plain_value(getattr(self, item.name))
                object.__setattr__(self, item.name, number)  # the class is frozen

    def augmentation_for(self, epoch, epochs):
        """Return the augmentation of epoch number `epoch`, from 1 to `epochs`, or None."""
        if epoch > epochs - self.clean_epochs:
            return None
        return self.augmentation


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
    augmentation=dict(degrees=10, shift=0.06, scale=0.06),
    clean_epochs=5,
)
RECIPES = {
    "Model1": PUBLISHED_STEP,
    "Model2": PUBLISHED_STEP,
    "Model3": PUBLISHED_PLATEAU,
    "Model4": AUGMENTED,
    "Model5": AUGMENTED,
}


def get_recipe(model, batch_size=None):
    """Return the recipe of a model, by name, with another batch size if `batch_size` is given.

    Raise ValueError, listing the valid names, if the name is unknown.
    """
    if model not in RECIPES:
        raise ValueError(f"no recipe for model {model!r}: choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[model]
    if batch_size is not None:
        recipe = replace(recipe, batch_size=batch_size)
    return recipe


def planned_learning_rates(recipe, epochs):
    """Return the learning rate of each epoch, as a list.

    `ReduceLROnPlateau` adapts to the test loss; its rates are returned as if the loss always improved.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], **recipe.sgd)
    scheduler = recipe.scheduler(optimizer, **recipe.scheduler_args)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
    return rates


def setting_from_env(name, default, choices=None):
    """Return a setting: the environment variable `S7_<name>` if it is set, otherwise `default`.

    The value has the type of `default`: str, bool (written 0, 1, True or False) or a positive int.
    If `default` is None, the value is None or a positive int. Raise ValueError for any other value,
    or one that is not among `choices`.
    """
    value = os.environ.get(f"S7_{name}", default)
    if value is None:
        return None
    if isinstance(default, bool):
        return parse_bool(name, value)
    if default is None or isinstance(default, int):
        return parse_positive_int(name, value)
    if choices is not None and value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
    return value


def parse_bool(name, value):
    """Return a bool given as a bool, 0, 1, True or False; raise ValueError for anything else."""
    text = str(value).lower()
    if text not in ("0", "1", "false", "true"):
        raise ValueError(f"{name} is {value!r}: choose one of 0, 1, True, False")
    return text in ("1", "true")


def parse_positive_int(name, value):
    """Return a positive integer given as a number or as text; raise ValueError for anything else."""
    text = str(value)
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{name} is {value!r}: it must be a positive integer, here or in S7_{name}")
    return int(text)


# ---- data ----

DIGITS = 10
SIDE = 28  # pixels
MEAN = 0.1307  # of the 60,000 training images, with pixels scaled to [0, 1]
STD = 0.3081
BLACK = -MEAN / STD  # a black pixel after normalization
MNIST_MD5 = {  # of the four uncompressed original files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MIRROR_TIMEOUT = 15  # seconds


@dataclass(frozen=True)
class DigitSet:
    """A data set in memory: uint8 images `(N, 28, 28)` and int64 labels `(N,)`.

    An index (a slice or an index tensor) gives a smaller set of the same name.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return DigitSet(self.name, self.images[index], self.labels[index])


class MNIST(datasets.MNIST):  # torchvision names its folder after the class
    """torchvision's MNIST, with the MD5 of all four files verified before any of them is read.

    Missing or corrupted files are downloaded, with a timeout of 15 seconds per mirror. Raise
    RuntimeError, naming the file and the remedy, if that fails or a file cannot be read.
    """

    def __init__(self, root, train=True):
        try:
            super().__init__(root, train, download=True)
        except OSError as error:
            raise RuntimeError(
                f"{error.filename or root} cannot be read ({error.strerror}): fix its permissions,"
                " or set MNIST_ROOT to another folder"
            ) from None

    def _check_legacy_exist(self):
        return False  # never read the `processed` folder of old torchvision versions: it has no MD5

    def _check_exists(self):
        return self.first_bad_file() is None

    def first_bad_file(self):
        """Return the path of the first file that is missing or corrupted, or None."""
        for name, md5 in MNIST_MD5.items():
            path = Path(self.raw_folder) / name
            if not check_integrity(path, md5):
                return path
        return None

    def download(self):
        if self._check_exists():
            return
        print(f"Downloading MNIST (11 MB) to {self.raw_folder}")
        previous_timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(MIRROR_TIMEOUT)
        printed = io.StringIO()
        progress_bars = io.StringIO()  # are not shown, because they would differ from run to run
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(progress_bars):
                super().download()
        except (OSError, RuntimeError, HTTPException) as error:
            reason = f"{printed.getvalue()} {error}"  # old versions of torchvision print the reason
            raise RuntimeError(self.download_failure(reason, error)) from None
        finally:
            socket.setdefaulttimeout(previous_timeout)

    def download_failure(self, reason, error):
        """Return one line that names the file that could not be downloaded, the reason and the remedy."""
        path = self.first_bad_file()
        problem = "is missing"
        if path.exists():
            problem = "is corrupted"
        reason = " ".join(reason.split()) or type(error).__name__
        return (
            f"{path} {problem} and could not be downloaded ({reason}): check the network connection and"
            " rerun, place the original file there, or set MNIST_ROOT"
        )


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


def load_data(standin=True):
    """Return the training and the test set: MNIST or, with a prominent warning, the stand-in.

    MNIST is read from the folder `MNIST_ROOT` (default `./data`). With `standin=False` or
    `S7_STANDIN=0`, raise RuntimeError if MNIST is not available; with `S7_STANDIN=1`, use the stand-in
    without trying MNIST.
    """
    root = Path(os.environ.get("MNIST_ROOT", "./data")).expanduser()
    wanted = setting_from_env("STANDIN", "", choices=("", "0", "1"))
    try:
        if standin and wanted == "1":
            raise RuntimeError("the stand-in was requested with S7_STANDIN=1")
        train_set = MNIST(root, train=True)
        test_set = MNIST(root, train=False)
    except RuntimeError as error:
        if not standin or wanted == "0":
            raise
        print(f"*** THIS IS NOT MNIST: {error}.")
        print(
            "*** Using stand-in digits: the results below are not MNIST results. To use MNIST, rerun with"
            " network access, or set MNIST_ROOT to the folder that contains MNIST/raw."
        )
        return draw_standin(train=True), draw_standin(train=False)
    return (
        DigitSet("MNIST", train_set.data, train_set.targets),
        DigitSet("MNIST", test_set.data, test_set.targets),
    )


def normalize(images):
    """Return uint8 images `(N, H, W)` as float32 `(N, 1, H, W)`, normalized with MNIST's mean and std.

    The values are those of torchvision's `ToTensor` and `Normalize((0.1307,), (0.3081,))`.
    """
    return images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)


class BatchLoader:
    """An iterable over the batches of a `DigitSet`, which is kept on `device` as one normalized tensor.

    Yields `(data, target)`: float32 `(B, 1, 28, 28)` and int64 `(B,)`; the last batch may be smaller.
    `shuffle` draws a new order for every epoch. `augmentation`, the arguments of `random_affine` or
    None, may be changed between epochs. Raise ValueError for a batch size below 1, an empty data set,
    or a label that is not a digit.
    """

    def __init__(self, dataset, batch_size, device, shuffle=False, augmentation=None):
        if batch_size < 1 or len(dataset) == 0:
            raise ValueError(f"{len(dataset)} images in batches of {batch_size}: both must be at least 1")
        low = dataset.labels.min().item()
        high = dataset.labels.max().item()
        if low < 0 or high >= DIGITS:
            raise ValueError(f"labels range from {low} to {high}, but must be 0 to 9: check the data set")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.data = normalize(dataset.images.to(device))
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
                data = random_affine(data, **self.augmentation)
            yield data, self.target[index]


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
    grid = affine_grid(torch.cat([rotation, translation], 2), *data.shape[2:])
    return F.grid_sample(data - BLACK, grid, align_corners=False) + BLACK


def affine_grid(theta, height, width):
    """Return what `F.affine_grid` returns for matrices `theta` `(B, 2, 3)`: a grid `(B, H, W, 2)`.

    One matrix product for the whole batch takes a twentieth of the time of `F.affine_grid` on a CPU,
    which has one product per image.
    """
    y = (torch.arange(height, device=theta.device) * 2 + 1) / height - 1  # centers of the pixels
    x = (torch.arange(width, device=theta.device) * 2 + 1) / width - 1
    y, x = torch.meshgrid(y, x, indexing="ij")
    centers = torch.stack([x, y, torch.ones_like(x)]).flatten(1)
    grid = theta @ centers
    return grid.unflatten(2, (height, width)).permute(0, 2, 3, 1)


# ---- training ----


def keep_freed_memory():
    """Tell glibc to keep freed memory for reuse instead of returning it to the system after every step.

    Affects the whole process; Linux only. See `benchmarks/epoch_time.csv` for the effect.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a C library other than glibc
        return
    M_MMAP_THRESHOLD = -3  # constants of glibc's malloc.h
    M_TRIM_THRESHOLD = -1
    mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def GetCorrectPredCount(pred, target):
    """Return the number of correct predictions of `pred` `(B, 10)` for `target` `(B,)`.

    The number is a tensor, so that the device is not synchronized.
    """
    return pred.argmax(dim=1).eq(target).sum()


class ProgressLine(io.TextIOBase):
    """A file for tqdm that shows its text as one notebook output, updated in place.

    With plain printing, every refresh would remain in the saved notebook as a line of its own.
    """

    encoding = "utf-8"  # makes tqdm use block characters
    handle = None

    def write(self, text):
        text = text.strip()
        if not text:
            return
        output = {"text/plain": text}
        if self.handle is None:
            self.handle = display(output, raw=True, display_id=True)
        else:
            self.handle.update(output, raw=True)


def progress_file():
    """Return the file that tqdm writes to: a `ProgressLine` in a notebook, stdout elsewhere."""
    if hasattr(get_ipython(), "kernel"):
        return ProgressLine()
    return sys.stdout


def train_batch(model, data, target, optimizer, criterion):
    """Take one optimizer step on a batch; return the output before the step, and the loss."""
    optimizer.zero_grad()
    output = model(data)
    loss = criterion(output, target)
    loss.backward()
    optimizer.step()
    return output.detach(), loss.detach()


def train(model, device, train_loader, optimizer, criterion):
    """Train for one epoch; return the mean loss per sample and the accuracy in percent.

    Both are measured on the fly, in training mode. The progress bar reads them after every batch on a
    CPU and after every 50th elsewhere, because reading waits for the device. Raise FloatingPointError,
    naming the batch, if a loss is not finite.
    """
    model.train()
    read_every = 50
    if torch.device(device).type == "cpu":
        read_every = 1
    batches = len(train_loader)
    losses = torch.zeros(batches, device=device)
    correct = torch.zeros((), dtype=torch.long, device=device)
    sizes = []
    with tqdm(train_loader, file=progress_file()) as bar:
        for batch_id, (data, target) in enumerate(bar):
            data = data.to(device)
            target = target.to(device)
            output, losses[batch_id] = train_batch(model, data, target, optimizer, criterion)
            correct += GetCorrectPredCount(output, target)
            sizes.append(len(data))
            if batch_id % read_every == 0 or batch_id == batches - 1:
                check_finite(losses)
                loss = losses[batch_id].item()
                accuracy = 100 * correct.item() / sum(sizes)
                text = f"Train: Loss={loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}"
                bar.set_description(text, refresh=False)
    weights = torch.tensor(sizes).to(device) / sum(sizes)
    return (losses @ weights).item(), accuracy


def check_finite(losses):
    """Raise FloatingPointError, naming the batch, if one of the `losses` `(batches,)` is not finite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad) > 0:
        batch_id = bad[0].item()
        raise FloatingPointError(
            f"batch {batch_id}: the loss is {losses[batch_id].item()}: lower the learning rate"
        )


@torch.no_grad()
def test(model, device, test_loader, criterion):
    """Evaluate a model; print and return the mean loss per sample and the accuracy in percent.

    Raise FloatingPointError if the loss is not finite.
    """
    model.eval()
    loss = 0
    correct = 0
    count = 0
    for data, target in test_loader:
        data = data.to(device)
        target = target.to(device)
        output = model(data)
        loss += criterion(output, target, reduction="sum")
        correct += GetCorrectPredCount(output, target)
        count += len(target)
    loss = loss.item() / count
    correct = correct.item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the test loss is {loss}: lower the learning rate")
    accuracy = 100 * correct / count
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/{count} ({accuracy:.2f}%)")
    return loss, accuracy


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
    def epochs(self):
        """The number of completed epochs."""
        return len(self.test_acc)


def run_settings(model, data, epochs, seed, recipe):
    """Return the settings that identify a run, as a dictionary of plain values.

    `model` and `data` are names. Two runs with equal settings have equal results on one machine.
    """
    settings = dict(model=model, data=data, epochs=epochs, seed=seed)
    for item in fields(recipe):
        settings[item.name] = getattr(recipe, item.name)
    return plain_value(settings)


class Run:
    """A training run: its history, and the checkpoint from which it can be resumed.

    `settings` is a dictionary of plain values that includes `model`, `data`, `epochs` and `seed`
    (`run_settings` makes it). The checkpoint at `path` always contains the state after a completed
    epoch: weights, optimizer, scheduler, settings and history.

    With `resume=True` the state is restored from the checkpoint; if there is none, the run starts from
    scratch and says so. With `resume=False` the checkpoint of an earlier run is kept, renamed to
    `*.previous-1.pt`, `*.previous-2.pt` and so on.

    Raise ValueError if the settings, optimizer or scheduler cannot belong to this run, if the file is
    not a checkpoint, or if it was created with different settings (which the message lists). Raise
    OSError if the file cannot be read or written.
    """

    def __init__(self, path, settings, model, optimizer, scheduler, resume=False):
        self.path = Path(path).expanduser()
        self.settings = plain_value(settings)
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.history = History()
        self._check_parts()
        keep_freed_memory()
        if resume and self.path.exists():
            self._load()
            return
        self._check_new()
        if resume:
            print(f"No checkpoint at {self.path}: training starts from scratch")
        self._keep_previous()
        self._save()

    @property
    def title(self):
        """What was trained on what, for example "Model4 on MNIST"."""
        return f"{self.settings['model']} on {self.settings['data']}"

    @property
    def description(self):
        """The title and the test accuracy of the last completed epoch."""
        if self.history.epochs == 0:
            return f"{self.title}: no completed epoch"
        return f"{self.title}: test accuracy {self.history.test_acc[-1]:.2f} %"

    def epochs(self):
        """Yield the remaining epochs, from 1 to `settings["epochs"]`.

        Each epoch has its own random seed, so that a resumed run draws the same random numbers.
        """
        for epoch in range(self.history.epochs + 1, self.settings["epochs"] + 1):
            print(f"EPOCH: {epoch}")
            torch.manual_seed(1000 * self.settings["seed"] + epoch)
            self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
            self.start_time = time.perf_counter()
            yield epoch

    def record(self, train_loss, train_acc, test_loss, test_acc):
        """Append the results of an epoch to the history and save a checkpoint."""
        seconds = time.perf_counter() - self.start_time
        self.history.train_losses.append(train_loss)
        self.history.train_acc.append(train_acc)
        self.history.test_losses.append(test_loss)
        self.history.test_acc.append(test_acc)
        self.history.learning_rates.append(self.learning_rate)
        self.history.seconds.append(seconds)
        self._save()

    def _check_parts(self):
        for name in ("epochs", "seed"):
            self.settings[name] = parse_positive_int(name.upper(), self.settings[name])
        parameters = {id(parameter) for parameter in self.model.parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in parameters:
                    raise ValueError("the optimizer does not belong to this model: create a new one")
        if self.scheduler.optimizer is not self.optimizer:
            raise ValueError("the scheduler does not belong to this optimizer: create a new one")

    def _check_new(self):
        if len(self.optimizer.state) > 0 or self.scheduler.last_epoch > 0:
            raise ValueError(
                "the optimizer or the scheduler has been used: create a new model, optimizer and scheduler,"
                " or set RESUME = True to resume from the checkpoint"
            )

    def _keep_previous(self):
        if not self.path.exists():
            return
        try:
            previous = self._free_name()
            try:
                os.replace(self.path, previous)
            except OSError:
                previous.unlink()  # an empty file
                raise
        except OSError as error:
            raise OSError(self._write_failure(error)) from None

    def _free_name(self):
        """Reserve and return the path of the first backup that does not exist."""
        for number in itertools.count(1):
            previous = self.path.with_name(f"{self.path.stem}.previous-{number}{self.path.suffix}")
            try:
                previous.touch(exist_ok=False)  # atomic: another process cannot take the same name
            except FileExistsError:
                continue
            return previous

    def _save(self):
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "settings": self.settings,
            "history": vars(self.history),
        }
        content = io.BytesIO()
        torch.save(state, content)
        # The name is unique, so two processes cannot write to one partial file.
        partial = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content.getbuffer())
            os.replace(partial, self.path)  # atomic: the checkpoint is complete even after a kill
        except OSError as error:
            raise OSError(self._write_failure(error)) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()  # is still there if writing failed or was interrupted

    def _write_failure(self, error):
        return (
            f"cannot write the checkpoint {self.path} ({error.strerror}): free disk space, fix the"
            " permissions, or set S7_CHECKPOINTS to another folder"
        )

    def _load(self):
        state = read_checkpoint(self.path)
        self._check_settings(state["settings"])
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        except Exception as error:  # what load_state_dict raises depends on what does not fit
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.path} was created by a different version of the code ({reason}): set RESUME = False"
            ) from None
        self.history = History(**state["history"])
        print(f"Resuming after epoch {self.history.epochs}")

    def _check_settings(self, saved):
        differences = []
        for name in {**self.settings, **saved}:
            here = self.settings.get(name)
            there = saved.get(name)
            if here != there:
                differences.append(f"{name}: checkpoint {there}, current {here}")
        if differences:
            raise ValueError(
                f"{self.path} was created with different settings ({'; '.join(differences)}):"
                " use the checkpoint's settings, or set RESUME = False"
            )


def read_checkpoint(path):
    """Return the state that a `Run` saved at `path`: a dictionary.

    Its keys are `model`, `optimizer`, `scheduler`, `settings` and `history`. Code that the file may
    contain is not run. Raise OSError if the file cannot be read, ValueError if it is not a checkpoint.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint at {path}: train first") from None
    except OSError as error:
        raise OSError(f"cannot read the checkpoint {path} ({error.strerror}): fix that, or move it") from None
    try:
        corrupted = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch.load ignores the CRCs
        if corrupted is not None:
            raise ValueError(f"{corrupted} has another CRC")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError("it contains no dictionary")
        for name in ("model", "optimizer", "scheduler", "settings", "history"):
            if not isinstance(state[name], dict):
                raise TypeError(f"{name} is not a dictionary")
        History(**state["history"])
        return state
    except MemoryError:
        raise
    except Exception as error:  # what torch.load raises depends on where the file is corrupted
        reason = type(error).__name__
        raise ValueError(f"{path} is not a valid checkpoint ({reason}): delete it, or train first") from None


# ---- plots and reports ----

TRAIN_COLOR = "#D55E00"  # distinguishable for color-blind readers (Okabe and Ito)
TEST_COLOR = "#0072B2"
TARGET_ACCURACY = 99.4  # percent, of the course
LAST_EPOCHS = 5  # how many final epochs are reported


class Layer(NamedTuple):
    """A row of `layer_table`."""

    name: str  # path of attributes, for example "block2.0"
    kind: str  # class, for example "Conv2d"
    output: tuple  # shape for one image
    kernel: int  # side length in pixels
    parameters: int
    mult_adds: int
    receptive_field: int  # side length in pixels


def layer_table(model):
    """Return the layers of a model as a list of `Layer`, for an input of one image.

    Multiply-adds are counted by torchinfo. Each layer enlarges the receptive field by (kernel - 1) · jump
    pixels, where jump is the product of all preceding strides.
    """
    names = {module: name for name, module in model.named_modules()}
    summary = torchinfo.summary(model, (1, 1, SIDE, SIDE), verbose=0)
    layers = []
    receptive_field = 1
    jump = 1
    for info in summary.summary_list:
        if not info.is_leaf_layer:
            continue
        kernel, stride = kernel_and_stride(info)
        receptive_field += (kernel - 1) * jump
        jump *= stride
        layers.append(
            Layer(
                name=names[info.module],
                kind=info.class_name,
                output=tuple(info.output_size[1:]),
                kernel=kernel,
                parameters=info.trainable_params,
                mult_adds=info.macs,
                receptive_field=receptive_field,
            )
        )
    return layers


def kernel_and_stride(info):
    """Return the kernel size and stride of a torchinfo layer; both are 1 if the layer has none."""
    if isinstance(info.module, nn.AdaptiveAvgPool2d):
        size = info.input_size[-1] // info.output_size[-1]
        return size, size
    kernel = getattr(info.module, "kernel_size", 1)
    stride = getattr(info.module, "stride", 1)
    if isinstance(kernel, tuple):
        kernel = kernel[0]
    if isinstance(stride, tuple):
        stride = stride[0]
    return kernel, stride


def summarize_model(model):
    """Return the layers of a model as text, one line per layer, with the totals in the last line."""
    line = "{:<26}{:<12}{:>6}{:>12}{:>12}{:>17}".format
    layers = layer_table(model)
    lines = [line("layer", "output", "kernel", "parameters", "mult-adds", "receptive field")]
    for layer in layers:
        name = f"{layer.name} {layer.kind}"
        output = "×".join(map(str, layer.output))
        counts = f"{layer.parameters:,}", f"{layer.mult_adds:,}"
        lines.append(line(name, output, layer.kernel, *counts, layer.receptive_field))
    parameters = sum(layer.parameters for layer in layers)
    mult_adds = sum(layer.mult_adds for layer in layers)
    lines.append(line("total", "", "", f"{parameters:,}", f"{mult_adds:,}", layers[-1].receptive_field))
    return "\n".join(lines)


def show_figure(figure, name, alt):
    """Display a figure with the alternative text `alt`.

    Also save it as `name.png` if the environment variable `S7_FIGURES` names a folder.
    """
    folder = setting_from_env("FIGURES", "")
    shell = get_ipython()
    if shell is not None:  # otherwise a kernel started with MPLBACKEND=agg shows no pictures
        select_figure_formats(shell, {"png"})
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{folder}/{name}.png", dpi=110, facecolor="white")
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def plot_digits(images, captions, title, name):
    """Plot up to 20 images `(N, 1, 28, 28)` or `(N, 28, 28)`, dark on light, with captions."""
    figure, axes = plt.subplots(2, 10, figsize=(10, 2.9), layout="constrained")
    figure.suptitle(title)
    for axis in axes.flat[len(images) :]:
        axis.set_axis_off()
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image.squeeze().numpy(), cmap="gray_r")
        axis.set_title(caption, fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("lightgray")  # shows where the image ends
    shown = ", ".join(map(str, captions[:20]))
    show_figure(figure, name, f"{title}: {shown}".rstrip(": ,"))


def plot_history(history, title):
    """Plot loss, accuracy and learning rate per epoch.

    The axes are scaled to epoch 2 onward; epoch 1 may lie outside.
    """
    epochs = range(1, history.epochs + 1)
    figure, (loss_axis, accuracy_axis, rate_axis) = plt.subplots(
        1, 3, figsize=(11, 3.4), layout="constrained"
    )
    figure.suptitle(title)
    plot_train_and_test(loss_axis, epochs, history.train_losses, history.test_losses)
    plot_train_and_test(accuracy_axis, epochs, history.train_acc, history.test_acc)
    if history.epochs > 2:  # the first epoch would compress the rest
        loss_axis.set_ylim(0, 1.1 * max(history.train_losses[1:] + history.test_losses[1:]))
        accuracy_axis.set_ylim(min(history.train_acc[1:] + history.test_acc[1:]) - 0.3, 100)
    rate_axis.plot(epochs, history.learning_rates, "-o", color="black", markersize=3)
    rate_axis.set_ylim(0, None)
    loss_axis.set_ylabel("loss")
    accuracy_axis.set_ylabel("accuracy (%)")
    rate_axis.set_ylabel("learning rate")
    for axis in figure.axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    summary = summarize_run(history, title).replace("\n", "; ")
    show_figure(figure, "curves", f"Loss, accuracy and learning rate per epoch; {summary}")


def plot_train_and_test(axis, epochs, train_values, test_values):
    """Plot two lines, one value per epoch, with a legend."""
    axis.plot(epochs, train_values, "--o", color=TRAIN_COLOR, markersize=3, label="train")
    axis.plot(epochs, test_values, "-o", color=TEST_COLOR, markersize=3, label="test")
    axis.legend()


def first_epoch_above(accuracies, target=TARGET_ACCURACY):
    """Return the first epoch from which every accuracy is at least `target` (percent), or None."""
    first = None
    for epoch, accuracy in enumerate(accuracies, 1):
        if accuracy < target:
            first = None
        elif first is None:
            first = epoch
    return first


def summarize_run(history, title):
    """Return a four-line summary of a run, including whether it meets the course target of 99.4 %."""
    if history.epochs == 0:
        return f"{title}: no completed epoch"
    unit = "epochs"
    if history.epochs == 1:
        unit = "epoch"
    sustained = "not sustained"
    first = first_epoch_above(history.test_acc)
    if first is not None:
        sustained = f"from epoch {first} on"
    rates = history.learning_rates
    last_epochs = history.test_acc[-LAST_EPOCHS:]
    return (
        f"{title}: {history.epochs} {unit}, learning rate from {rates[0]:.3g} to {rates[-1]:.3g}\n"
        f"last epoch: train {history.train_acc[-1]:.2f} %, test {history.test_acc[-1]:.2f} %;"
        f" best test {max(history.test_acc):.2f} %\n"
        f"test accuracy over the last five epochs: mean {statistics.mean(last_epochs):.2f} %,"
        f" minimum {min(last_epochs):.2f} %\n"
        f"test accuracy ≥ {TARGET_ACCURACY} %: {sustained}"
    )


def summarize_end_of_augmentation(run):
    """Return the accuracies of the last epoch with augmentation and of the next one, in two lines.

    If a run has no such two epochs, return one line that says why.
    """
    clean_epochs = run.settings["clean_epochs"]
    last = run.settings["epochs"] - clean_epochs  # the last epoch with augmentation
    history = run.history
    if run.settings["augmentation"] is None or last < 1:
        return "No epoch of this run was augmented."
    if clean_epochs == 0:
        return "All epochs of this run were augmented."
    if history.epochs <= last:
        return f"This run was interrupted before augmentation ended (after epoch {last})."

    def accuracies(epoch):
        train_acc = history.train_acc[epoch - 1]
        test_acc = history.test_acc[epoch - 1]
        return f"train accuracy {train_acc:.2f} %, test accuracy {test_acc:.2f} %"

    return (
        f"epoch {last}, augmented images: {accuracies(last)}\n"
        f"epoch {last + 1}, original images: {accuracies(last + 1)}"
    )


def most_confused(confusion, count=3):
    """Return the most confused pairs of digits as text, one line per pair.

    `confusion` `(10, 10)` counts images by true (row) and predicted (column) digit.
    """
    both_ways = (confusion + confusion.T).triu(diagonal=1)  # 4 predicted as 9, and 9 as 4
    numbers, places = both_ways.flatten().sort(descending=True, stable=True)
    lines = []
    for number, place in zip(numbers[:count].tolist(), places[:count].tolist(), strict=True):
        one, other = divmod(place, DIGITS)
        lines.append(f"{one} and {other}: {number} images")
    return "\n".join(lines)


class Mistake(NamedTuple):
    """A misclassified image."""

    image: torch.Tensor  # normalized, (1, 28, 28)
    target: int
    predicted: int
    probability: float  # of the predicted digit


@torch.no_grad()
def find_mistakes(model, device, test_loader):
    """Return the confusion matrix and the misclassified images of a model.

    The matrix `(10, 10)` counts images by true (row) and predicted (column) digit. The images are a
    list of `Mistake`, most confident first.
    """
    model.eval()
    confusion = torch.zeros(DIGITS, DIGITS, dtype=torch.long)
    mistakes = []
    for data, target in test_loader:
        probability, predicted = model(data.to(device)).exp().max(dim=1)
        target = target.cpu()
        predicted = predicted.cpu()
        confusion.index_put_((target, predicted), torch.ones_like(target), accumulate=True)
        for i in target.ne(predicted).nonzero().flatten().tolist():
            mistake = Mistake(data[i].cpu(), target[i].item(), predicted[i].item(), probability[i].item())
            mistakes.append(mistake)
    mistakes.sort(key=lambda mistake: mistake.probability, reverse=True)
    return confusion, mistakes


def plot_mistakes(mistakes, title):
    """Plot up to 20 misclassified images in the given order, with true and predicted digit."""
    images = [mistake.image for mistake in mistakes]
    captions = [f"{m.target}→{m.predicted}  {m.probability:.0%}" for m in mistakes]
    heading = f"{title}: {len(mistakes)} misclassified images, most confident first (true→predicted)"
    plot_digits(images, captions, heading, "mistakes")


def plot_confusion(confusion, title):
    """Plot the confusion matrix, its off-diagonal counts color-coded, and the accuracy per digit."""
    accuracy = 100 * confusion.diag() / confusion.sum(dim=1).clamp(min=1)  # a digit may not occur
    wrong = confusion.clone().fill_diagonal_(0)
    figure, axis = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    axis.imshow(wrong.numpy(), cmap="Oranges", vmax=max(2 * wrong.max().item(), 1))
    for target in range(DIGITS):
        for predicted in range(DIGITS):
            count = confusion[target, predicted].item()
            axis.text(predicted, target, count or "·", ha="center", va="center", fontsize=9)
    labels = [f"{digit}  ({share:.1f} %)" for digit, share in enumerate(accuracy.tolist())]
    axis.set_yticks(range(DIGITS), labels)
    axis.set_xticks(range(DIGITS))
    axis.set_xlabel("predicted digit")
    axis.set_ylabel("true digit (accuracy)")
    axis.set_title(f"{title}: confusion matrix")
    show_figure(figure, "confusion", f"{title}: confusion matrix with {wrong.sum()} misclassified images")


# ---- own digit ----

# Sizes in pixels of the longest side
WORKING_SIZE = 256  # at which the digit is looked for
BACKGROUND_SIZE = 48  # at which the background is estimated
DIGIT_SIZE = 20  # of the digit in an MNIST image

# Thresholds between background and ink. Brightness and ink run from 0 to 1.
THRESHOLDS = (0.08, 0.12, 0.17, 0.23, 0.31, 0.42, 0.56)  # tried in this order, as shares of the darkest ink
NOISE_FACTOR = 4.5  # ink exceeds the noise by at least this many standard deviations
MIN_THRESHOLD = 0.02
CROP_THRESHOLD = 0.3  # share of the darkest ink at which the digit is cropped

# What a digit looks like
MIN_CONTRAST = 0.07
MIN_EXTENT = 0.035  # longest side of the digit as a share of the picture's
MAX_ASPECT = 2.5  # width over height
MAX_FILL = 0.7  # share of its bounding box that a digit fills, unless it is as slim as a 1
SLIM = 0.6  # width over height


class Components(NamedTuple):
    """Measurements of connected components `(N,)`; number 0 is the background."""

    energy: torch.Tensor  # sum of the squared steps from pixel to pixel: high for strokes, low for shading
    area: torch.Tensor  # in pixels
    peak: torch.Tensor  # the most ink
    top: torch.Tensor
    bottom: torch.Tensor  # exclusive
    left: torch.Tensor
    right: torch.Tensor  # exclusive
    touching: torch.Tensor  # number of pixels on the picture's border

    @property
    def height(self):
        return self.bottom - self.top

    @property
    def width(self):
        return self.right - self.left

    @property
    def extent(self):
        return torch.maximum(self.height, self.width)


class Candidate(NamedTuple):
    """What may be the digit: a main component and the large ones near it, such as a 5's bar."""

    labels: torch.Tensor  # (H, W), the component of each pixel
    components: Components
    main: int
    is_large: torch.Tensor  # (N,), which components are large enough for a stroke
    is_selected: torch.Tensor  # (N,), which components belong to the digit
    touches_border: bool

    @property
    def energy(self):
        return self.components.energy[self.is_selected].sum().item()

    @property
    def contrast(self):
        return self.components.peak[self.main].item()


class Digit(NamedTuple):
    """The digit found in a picture."""

    ink: torch.Tensor  # (h, w), from 0 to 1, cropped to the digit
    box: tuple  # top, bottom, left and right as shares of the picture's height and width


def open_picture(image):
    """Return the PIL image of a path, a file or a PIL image, decoded and rotated as its EXIF data say."""
    if isinstance(image, (str, os.PathLike)):
        image = Image.open(os.path.expanduser(image))
    elif not isinstance(image, Image.Image):
        image = Image.open(image)
    return ImageOps.exif_transpose(image)


def stretch_brightness(image):
    """Return an image of 16 or 32 bits per pixel as floats from 0 to 255; PIL would clip at 255."""
    low, high = image.getextrema()
    scale = 255 / max(high - low, 1e-9)
    return image.convert("F").point(lambda value: value * scale - low * scale)


def read_picture(image):
    """Return the brightness `(H, W)`, float32 from 0 to 1, of a picture.

    `image` is a path, a file opened in binary mode or a PIL image of any color mode. The EXIF rotation is
    applied. Transparent pixels become background that contrasts with the ink. Raise ValueError if
    `image` is something else, if it cannot be decoded, or if it has so many pixels that PIL considers it
    a decompression bomb.
    """
    is_path = isinstance(image, (str, os.PathLike))
    if not is_path and not isinstance(image, Image.Image) and not hasattr(image, "read"):
        raise ValueError(
            f"unsupported type for a picture, {type(image).__name__}:"
            " pass a path, a file opened in binary mode or a PIL image"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = open_picture(image)
            if picture.mode[0] in "IF":
                picture = stretch_brightness(picture)
            gray, alpha = pil_to_tensor(picture.convert("RGBA").convert("LA"))
    except Exception as error:  # corrupted files raise nearly every type of exception
        name = type(image).__name__
        if is_path:
            name = os.fspath(image)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be read as an image ({reason}): use a different file") from None
    gray = gray.float().div_(255)
    if alpha.min() == 255:
        return gray
    alpha = alpha.float().div_(255)
    ink_is_dark = (gray * alpha).sum() < 0.5 * alpha.sum()
    return gray * alpha + (1 - alpha) * ink_is_dark


def resize(image, size):
    """Return `image` `(H, W)` in another `size`, antialiased."""
    return F.interpolate(image[None, None], size, mode="bilinear", antialias=True)[0, 0]


def scaled_size(image, longest):
    """Return the height and width that `image` has if its longest side has `longest` pixels."""
    scale = longest / max(image.shape)
    return [max(1, round(side * scale)) for side in image.shape]


def shrink(image, longest):
    """Return `image` `(H, W)` with no side longer than `longest` pixels."""
    if max(image.shape) <= longest:
        return image
    return resize(image, scaled_size(image, longest))


def smooth(image):
    """Return `image` `(H, W)` after a 3×3 binomial filter."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    padded = F.pad(image[None, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, torch.outer(kernel, kernel)[None, None])[0, 0]


def estimate_noise(image):
    """Return the standard deviation of the noise, from the smaller differences of nearby pixels.

    Pixels are compared over a distance of three, as JPEG and scaling make neighbors alike. The 30th
    percentile of |x - y| is 0.385 √2 standard deviations of normal noise; it ignores strokes.
    """
    distance = 3
    down = image[distance:] - image[:-distance]
    across = image[:, distance:] - image[:, :-distance]
    differences = torch.cat([down.flatten(), across.flatten()]).abs()
    if differences.numel() == 0:
        return 0.0
    return differences.quantile(0.3).item() / (0.385 * math.sqrt(2))


# The background


def plane_basis(image):
    """Return 1, y and x `(H, W, 3)` for each pixel, y and x from -1 to 1."""
    height, width = image.shape
    rows = torch.linspace(-1, 1, height, dtype=torch.double)
    columns = torch.linspace(-1, 1, width, dtype=torch.double)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.ones_like(x), y, x], dim=2)


def fit_plane(basis, brightness, importance):
    """Return the coefficients `(3,)` of the plane that fits the brightness `(N,)` of pixels best.

    `basis` is `(N, 3)`. Minimize the absolute distances, times `importance` `(N,)`, by iteratively
    reweighted least squares, so that neither the digit nor a table beside the page bends the plane.
    """
    brightness = brightness.double()
    ridge = 1e-6 * torch.eye(3, dtype=torch.double)  # a picture of one row has no slope along its height
    weights = importance
    for _ in range(20):
        weighted = basis * weights[:, None]
        plane = torch.linalg.solve(weighted.T @ basis + ridge, weighted.T @ brightness)
        distance = (brightness - basis @ plane).abs()
        weights = importance / distance.clamp(min=0.004)
    return plane


def border_of(image):
    """Return the border pixels of `image` `(H, W, ...)` as one sequence `(N, ...)`."""
    return torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])


def border_median(image):
    """Return the median brightness of the picture's border."""
    return border_of(image).median()


def brightest_background(image):
    """Return the brightness that 5 % of the pixels exceed."""
    return image.flatten().quantile(0.95)


def border_plane(image):
    """Return the plane `(H, W)` through the brightness of the picture's border."""
    basis = plane_basis(image)
    brightness = border_of(image)
    plane = fit_plane(border_of(basis), brightness, torch.ones_like(brightness, dtype=torch.double))
    return (basis @ plane).float()


def central_plane(image):
    """Return the plane `(H, W)` fitted to the picture's brightness, with the most weight on the middle."""
    basis = plane_basis(image)
    squared_distance = basis[:, :, 1].square() + basis[:, :, 2].square()
    importance = torch.exp(-squared_distance).flatten()
    plane = fit_plane(basis.reshape(-1, 3), image.flatten(), importance)
    return (basis @ plane).float()


def local_median(image):
    """Return the local median `(H, W)`, over windows half as high and half as wide as the picture."""
    height, width = image.shape
    reach_y = max(1, height // 4)
    reach_x = max(1, width // 4)
    padded = F.pad(image[None, None], (reach_x, reach_x, reach_y, reach_y))
    windows = F.unfold(padded, (2 * reach_y + 1, 2 * reach_x + 1))
    return windows[0].median(dim=0).values.reshape(height, width)


def estimate_background(image):
    """Return the brightness `(H, W)` that the picture would have without ink: a plane and local medians."""
    coarse = shrink(image, BACKGROUND_SIZE)
    plane = central_plane(coarse)
    return resize(plane + local_median(coarse - plane), image.shape)


# Connected components


def largest_neighbor(image):
    """Return the maximum `(H, W)` over the 3×3 neighborhood of each pixel of `image`, and at least 0."""
    padded = F.pad(image, (1, 1, 1, 1))
    of_three_rows = torch.maximum(torch.maximum(padded[:-2], padded[1:-1]), padded[2:])
    of_two_columns = torch.maximum(of_three_rows[:, :-2], of_three_rows[:, 1:-1])
    return torch.maximum(of_two_columns, of_three_rows[:, 2:])


def label_components(mask):
    """Return labels `(H, W)` of the connected components of `mask`, from 1 up; 0 is the background.

    Each pixel starts with its own label. In each step it takes the largest label among its neighbors,
    passes it on to the pixel that its old label came from, and follows the labels to their origin, so
    that the number of steps grows only with the logarithm of a component's length.
    """
    inside = mask.flatten().nonzero()[:, 0]
    count = len(inside) + 1
    canvas = torch.zeros_like(mask, dtype=torch.long)
    pixels = canvas.view(-1)
    labels = torch.arange(1, count)
    origin_of = torch.zeros(count, dtype=torch.long)
    while True:
        pixels[inside] = labels
        neighbors = largest_neighbor(canvas).flatten()[inside]
        origin_of[1:] = neighbors
        origin_of.scatter_reduce_(0, labels, neighbors, "amax")
        new_labels = origin_of[origin_of[neighbors]]
        if torch.equal(new_labels, labels):
            break
        labels = new_labels
    pixels[inside] = torch.unique(labels, return_inverse=True)[1] + 1
    return canvas


def step_energy(image):
    """Return the squared length `(H, W)` of the gradient of `image` `(H, W)`."""
    padded = F.pad(image[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    down = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    across = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    return down.square() + across.square()


def measure_components(labels, ink, energy):
    """Return the `Components` numbered by `labels`, given the ink and energy of each pixel (all `(H, W)`)."""
    height, width = labels.shape
    count = int(labels.max()) + 1
    index = labels.flatten()
    values = ink.flatten()
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    on_border = (rows == 0) | (rows == height - 1) | (columns == 0) | (columns == width - 1)

    def total(numbers):
        return torch.zeros(count).scatter_add(0, index, numbers.float())

    def largest(numbers):
        return torch.zeros(count, dtype=numbers.dtype).scatter_reduce(0, index, numbers, "amax")

    return Components(
        energy=total(energy.flatten()),
        area=total(torch.ones_like(values)),
        peak=largest(values),
        top=height - largest(height - rows),
        bottom=largest(rows + 1),
        left=width - largest(width - columns),
        right=largest(columns + 1),
        touching=total(on_border),
    )


# The digit among the components


def count_border_runs(mask):
    """Return the number of separate stretches of the picture's border that `mask` `(H, W)` covers."""
    border = torch.cat([mask[0], mask[:, -1], mask[-1].flip(0), mask[:, 0].flip(0)])
    return int((border & ~border.roll(1)).sum())


def select_strokes(labels, components, main, touches_border):
    """Return the `Candidate` of the component `main` and the large ones near it."""
    is_large = components.area >= 0.03 * components.area[main]
    is_large &= components.peak >= 0.4 * components.peak[main]
    is_large[0] = False
    if not touches_border:
        is_large &= components.touching == 0
    reach = 0.2 * components.extent[main]
    is_near = components.bottom > components.top[main] - reach
    is_near &= components.top < components.bottom[main] + reach
    is_near &= components.right > components.left[main] - reach
    is_near &= components.left < components.right[main] + reach
    is_selected = is_large & is_near
    is_selected[main] = True
    return Candidate(labels, components, main, is_large, is_selected, touches_border)


def find_candidate(ink, energy, threshold):
    """Return the most digit-like component of the pixels with more ink than `threshold`, or None.

    A component that touches the picture's border is chosen only if its energy is at least four times that
    of any inside, and if it is not the edge of the table, ruled paper or a line.
    """
    labels = label_components(ink > threshold)
    components = measure_components(labels, ink, energy)
    height = components.height
    width = components.width
    extent = components.extent
    fill = components.area / (height * width).clamp(min=1)
    plausible = extent >= max(3, MIN_EXTENT * max(ink.shape))
    plausible &= width < MAX_ASPECT * height
    plausible &= components.peak >= max(MIN_CONTRAST, 1.3 * threshold)
    plausible &= (fill < MAX_FILL) | (width < SLIM * height)
    plausible[0] = False

    is_inside = plausible & (components.touching == 0)
    # A table's edge follows the border, and a line is thin for its length.
    meets_border = plausible & (components.touching > 0)
    meets_border &= components.area > 0.03 * extent.square()
    is_cropped_one = (height == ink.shape[0]) & (width == ink.shape[1]) & (width < SLIM * height)
    meets_border &= (components.touching < 0.6 * (height + width)) | is_cropped_one

    inner = components.energy * is_inside
    outer = components.energy * meets_border
    best_inner = int(inner.argmax())
    best_outer = int(outer.argmax())
    if inner[best_inner] > 0.25 * outer[best_outer]:
        return select_strokes(labels, components, best_inner, touches_border=False)
    if outer[best_outer] > 0 and count_border_runs(labels == best_outer) <= 10:
        return select_strokes(labels, components, best_outer, touches_border=True)
    return None


def candidates_by_threshold(ink, energy, noise):
    """Yield the candidates at rising thresholds, until one holds nearly all of the energy."""
    darkest = ink.max().item()
    for share in THRESHOLDS:
        threshold = share * darkest
        if threshold < max(NOISE_FACTOR * noise, MIN_THRESHOLD):
            continue
        candidate = find_candidate(ink, energy, threshold)
        if candidate is None:
            continue
        yield candidate
        total_energy = energy[ink > threshold].sum()
        if not candidate.touches_border and candidate.energy > 0.9 * total_energy:
            return


def find_digit(difference):
    """Return the best candidate in `difference` `(H, W)`, the picture minus its background, or None.

    Both polarities and all thresholds compete. A candidate inside the picture beats one that touches the
    border; then the one with more energy wins, so that the lowest threshold is taken at which the digit is
    still separate from lines and edges.
    """
    noise = estimate_noise(difference)
    smoothed = difference
    if noise > 0.01:
        smoothed = smooth(difference)
        noise = max(estimate_noise(smoothed), 0.4 * noise)
    energy = step_energy(smoothed)
    best = None
    best_score = (False, 0.0)
    for ink in (-smoothed, smoothed):
        for candidate in candidates_by_threshold(ink.clamp(min=0), energy, noise):
            score = (not candidate.touches_border, candidate.energy)
            if score > best_score:
                best = candidate
                best_score = score
    return best


def is_evenly_lit(difference, candidate):
    """Return whether the background left in `difference` `(H, W)` is even, apart from the candidate."""
    components = candidate.components
    height = components.height[candidate.main]
    width = components.width[candidate.main]
    background = difference[difference.abs() < 0.3 * candidate.contrast]
    tolerance = min(0.03 + 1.5 * estimate_noise(difference), 0.2 * candidate.contrast)
    min_share = 0.4
    if height > 0.95 * difference.shape[0] and width > 0.95 * difference.shape[1]:
        # Cropped tightly, the picture shows little background, and much of that is the strokes' soft edge.
        tolerance += 0.1 * candidate.contrast
        min_share = 0.1
    if background.numel() < min_share * difference.numel():
        return False
    quartiles = background.quantile(torch.tensor([0.25, 0.75]))
    return bool(quartiles[1] - quartiles[0] < tolerance)


def find_on_background(picture):
    """Return the difference `(H, W)` from the background and the best candidate in it, which may be None.

    If the light is even or fades linearly, the background is estimated from the picture's border, which
    works for digits that fill the picture. Otherwise the background is estimated locally, and a candidate
    at the border is rejected because it may be a shadow.
    """
    estimates = [border_median, border_plane]
    height, width = picture.shape
    if width < SLIM * height:  # a 1 cropped so tightly that most of the border may be ink
        estimates.append(brightest_background)
    for estimate in estimates:
        difference = picture - estimate(picture)
        candidate = find_digit(difference)
        if candidate is not None and is_evenly_lit(difference, candidate):
            return difference, candidate
    difference = picture - estimate_background(picture)
    candidate = find_digit(difference)
    if candidate is not None and candidate.touches_border:
        candidate = None
    return difference, candidate


def reject_second_digit(candidate):
    """Raise ValueError if there is a second component, at least half as tall, next to the candidate."""
    components = candidate.components
    main = candidate.main
    height = components.height
    gap = torch.maximum(components.left - components.right[main], components.left[main] - components.right)
    taller = torch.maximum(height, height[main])
    is_second = candidate.is_large & (gap > 0.04 * taller)
    is_second &= height > 0.5 * height[main]
    is_second &= components.energy > 0.25 * components.energy[main]
    if is_second.any():
        raise ValueError("more than one digit found: give a picture of one digit")


def extract_digit(gray):
    """Return the `Digit` in the brightness `(H, W)` of a picture.

    Raise ValueError if there is no digit, or if there is a second one next to it.
    """
    picture = shrink(gray, WORKING_SIZE)
    difference, candidate = find_on_background(picture)
    if candidate is None:
        raise ValueError("no digit found: give a picture of one digit that stands out from its background")
    reject_second_digit(candidate)
    mask = candidate.is_selected[candidate.labels]
    wider = largest_neighbor(mask.float())  # with the soft edges
    sign = -1
    if difference[mask].sum() > 0:
        sign = 1
    ink = (sign * difference).clamp(min=0) * wider
    darkest = ink.max()
    if max(ink.shape) == WORKING_SIZE:
        darkest = smooth(ink).max()  # not one noisy pixel
    ink = (ink / darkest).clamp(max=1)
    rows = (ink > CROP_THRESHOLD).any(dim=1).nonzero()
    columns = (ink > CROP_THRESHOLD).any(dim=0).nonzero()
    top = rows[0].item()
    bottom = rows[-1].item() + 1
    left = columns[0].item()
    right = columns[-1].item() + 1
    height, width = ink.shape
    box = (top / height, bottom / height, left / width, right / width)
    return Digit(ink[top:bottom, left:right], box)


# The network's input


def center_offset(ink, dim):
    """Return the position of `ink` along `dim` in the image that puts its center of mass on pixel 14."""
    size = ink.shape[dim]
    mass = ink.sum(dim=1 - dim)
    center = (mass * torch.arange(size)).sum() / mass.sum()
    # A hair less than 14, so that a tie always falls to the same side
    offset = round(13.999 - center.item())
    return min(max(offset, 0), SIDE - size)


def scale_and_center(ink):
    """Return the normalized network input `(1, 1, 28, 28)` of a digit's ink `(h, w)`."""
    ink = resize(ink, scaled_size(ink, DIGIT_SIZE)).clamp(0, 1)
    ink = ink / ink.max()
    height, width = ink.shape
    top = center_offset(ink, dim=0)
    left = center_offset(ink, dim=1)
    image = torch.zeros(1, 1, SIDE, SIDE)
    image[0, 0, top : top + height, left : left + width] = ink
    return (image - MEAN) / STD


def prepare_digit(image):
    """Return a picture of one digit preprocessed like MNIST, as normalized float32 `(1, 1, 28, 28)`.

    `image` is what `read_picture` accepts, of any size, dark on light or light on dark, evenly lit or not.
    The digit is separated from its background, cropped and scaled to fit 20×20, and its center of mass is
    put on pixel (14, 14) of 28×28 (yann.lecun.com/exdb/mnist; the pixel was measured on the test images).
    Raise ValueError if the picture cannot be read, shows no digit, or shows two side by side.
    """
    digit = extract_digit(read_picture(image))
    return scale_and_center(digit.ink)


@torch.no_grad()
def predict(model, image):
    """Return the probabilities `(10,)` of the digits for a picture that `prepare_digit` accepts."""
    device = next(model.parameters()).device
    model.eval()
    output = model(prepare_digit(image).to(device))
    return output[0].exp().cpu()


def plot_prediction(image, probabilities):
    """Show a picture as it was read, the detected digit, the network's input and `probabilities` `(10,)`."""
    gray = read_picture(image)
    digit = extract_digit(gray)
    prepared = scale_and_center(digit.ink)
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
    for axis in axes[:3]:
        axis.set(xticks=[], yticks=[])

    shown = shrink(gray, 1024)
    height, width = shown.shape
    top, bottom, left, right = digit.box
    axes[0].imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
    corner = (left * width - 0.5, top * height - 0.5)
    frame = plt.Rectangle(
        corner, (right - left) * width, (bottom - top) * height, fill=False, edgecolor=TEST_COLOR
    )
    axes[0].add_patch(frame)
    axes[0].set_title("the picture as read")
    axes[1].imshow(digit.ink.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes[1].set_title("detected digit")
    axes[2].imshow(prepared[0, 0].numpy(), cmap="gray_r")
    axes[2].set_title("network input")
    title = f"prediction: {probabilities.argmax()} ({probabilities.max():.1%})"
    axes[3].bar(range(10), probabilities.tolist(), color=TEST_COLOR)
    axes[3].set(title=title, xticks=range(10), ylim=(0, 1.05), xlabel="digit", ylabel="probability")
    alt = f"A picture of a digit, the detected digit, the network's input, and the {title}"
    show_figure(figure, "prediction", alt)


# ---- drawing field ----

# The only option values with which draw.html can compute a layer, by layer type.
SUPPORTED_OPTIONS = {
    nn.Conv2d: {"stride": 1, "dilation": 1, "padding_mode": "zeros", "bias": None},
    nn.BatchNorm2d: {"affine": True, "track_running_stats": True},
    nn.ReLU: {},
    nn.MaxPool2d: {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
    nn.AvgPool2d: {"padding": 0, "ceil_mode": False, "divisor_override": None},
    nn.AdaptiveAvgPool2d: {"output_size": 1},
}


class DrawingField:
    """The drawing field, displayed as HTML in a notebook and as a short text elsewhere."""

    def __init__(self, html):
        self.html = html

    def _repr_html_(self):
        return self.html

    def __repr__(self):
        return "drawing field"


def drawing_field(model, description):
    """Return a drawing field, which a notebook displays; the model runs in the page itself.

    The page needs no kernel, no server and no network: `draw.html` contains the program, and the weights
    are embedded. `description`, for example `run.description`, is shown under the field. Raise
    FileNotFoundError if `draw.html` is not next to this file.
    """
    path = Path(__file__).with_name("draw.html")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: copy draw.html from the repository to that folder")
    network = {
        "description": description,
        "mean": MEAN,
        "std": STD,
        "layers": export_layers(model),
    }
    check_order(model)
    page = path.read_text(encoding="utf-8")
    return DrawingField(page.replace("NETWORK_JSON", html.escape(json.dumps(network))))


def export_layers(model):
    """Return the layers of a model in evaluation mode, in their order, as dictionaries for `draw.html`.

    BatchNorm becomes a scale and a shift per channel; dropout and identity are left out. Raise
    ValueError, naming the layer, if `draw.html` cannot compute one.
    """
    layers = []
    for name, layer in innermost_layers(model):
        if not isinstance(layer, (nn.Dropout, nn.Identity)):
            check_supported(name, layer)
            layers.append(export_layer(layer))
    return layers


def innermost_layers(model):
    """Return the layers of a model that contain no others, in the order of their definition, with names."""
    layers = []
    for name, layer in model.named_modules(remove_duplicate=False):
        if not list(layer.children()):
            layers.append((name, layer))
    return layers


@torch.no_grad()
def check_order(model):
    """Raise ValueError unless a model applies its layers in the order of their definition, as `Network` does.

    `draw.html` does so; it would compute a network with a skip connection, for example, incorrectly.
    """
    model.eval()
    device = next(model.parameters()).device
    data = torch.linspace(0, 1, 28 * 28, device=device).view(1, 1, 28, 28)  # leaves the random state as it is
    output = model(data)
    for _, layer in innermost_layers(model):
        data = layer(data)
    if not torch.allclose(F.log_softmax(data.flatten(1), dim=1), output, atol=1e-4):
        raise ValueError("draw.html applies the layers in the order of their definition; this model does not")


def check_supported(name, layer):
    """Raise ValueError if `draw.html` cannot compute a layer or one of its options."""
    remedy = "replace it, or extend draw.html and export_layers"
    if type(layer) not in SUPPORTED_OPTIONS:
        raise ValueError(f"draw.html cannot compute the layer {name}, {layer}: {remedy}")
    required = dict(SUPPORTED_OPTIONS[type(layer)])
    if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)):
        required["stride"] = number(layer.kernel_size)
    for option, value in required.items():
        if number(getattr(layer, option)) != value:
            raise ValueError(f"draw.html cannot compute the {option} of the layer {name}, {layer}: {remedy}")
    for option in ("kernel_size", "padding"):
        if not isinstance(number(getattr(layer, option, 0)), int):
            raise ValueError(f"draw.html cannot compute the {option} of the layer {name}, {layer}: {remedy}")


def number(value):
    """Return a pair of equal values, such as a kernel's height and width, as one value."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        return value[0]
    return value


def export_layer(layer):
    """Return a supported layer as a dictionary."""
    if isinstance(layer, nn.Conv2d):
        return {
            "kind": "conv",
            "channels": layer.out_channels,
            "kernel": number(layer.kernel_size),
            "padding": number(layer.padding),
            "groups": layer.groups,
            "weight": encode(layer.weight),
        }
    if isinstance(layer, nn.BatchNorm2d):
        scale = layer.weight.double() / torch.sqrt(layer.running_var.double() + layer.eps)
        shift = layer.bias.double() - layer.running_mean.double() * scale
        return {"kind": "scale", "scale": encode(scale), "shift": encode(shift)}
    if isinstance(layer, nn.ReLU):
        return {"kind": "relu"}
    if isinstance(layer, nn.MaxPool2d):
        return {"kind": "maxpool", "size": number(layer.kernel_size)}
    if isinstance(layer, nn.AvgPool2d):
        return {"kind": "avgpool", "size": number(layer.kernel_size)}
    return {"kind": "avgpool", "size": None}  # of the whole image


def encode(tensor):
    """Return the numbers of a tensor as text: float32, little-endian, in base64."""
    numbers = tensor.detach().cpu().float().numpy()
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()

"""Everything except the networks, in the notebook's order.

Sections: recipes and settings, data, training, runs, plots and reports, own digit, drawing field.
Errors about bad input are one line that says what is wrong and what to do.
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
import sys
import time
import uuid
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
    """Return a setting as text, a number, None, or a dictionary of them.

    A class becomes its name, and a number of numpy or torch becomes a number of Python: a checkpoint
    is loaded without running code, so it can contain nothing else. Raise ValueError otherwise.
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

    `ReduceLROnPlateau` decides during training: its rates are those of a test loss that always improves.
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
        torchvision_output = io.StringIO()  # its progress bars would differ from run to run
        try:
            with (
                contextlib.redirect_stdout(torchvision_output),
                contextlib.redirect_stderr(torchvision_output),
            ):
                super().download()
        except (OSError, RuntimeError, HTTPException) as error:
            raise RuntimeError(self.download_failure(error)) from None
        finally:
            socket.setdefaulttimeout(previous_timeout)

    def download_failure(self, error):
        """Return one line that names the file that could not be downloaded, the reason and the remedy."""
        path = self.first_bad_file()
        problem = "is missing"
        if path.exists():
            problem = "is corrupted"
        reason = " ".join(str(error).split()) or type(error).__name__
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
    """Return uint8 images `(N, H, W)` as float32 `(N, 1, H, W)` with MNIST's mean and deviation.

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

    `angle` `(B,)` is in degrees, clockwise; `shift` `(B, 2)` is right and down, in parts of the side
    length; `size` `(B,)` is the factor of enlargement. Bilinear, filled with black; the same map as
    torchvision's `functional.affine`.
    """
    angle = angle.deg2rad()
    cos = angle.cos() / size
    sin = angle.sin() / size
    rotation = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    translation = -2 * rotation @ shift.unsqueeze(2)  # grid coordinates run from -1 to 1
    grid = F.affine_grid(torch.cat([rotation, translation], 2), data.shape, align_corners=False)
    return F.grid_sample(data - BLACK, grid, align_corners=False) + BLACK


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
    weights = torch.tensor(sizes, device=device) / sum(sizes)
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
                    raise ValueError("the optimizer does not belong to this model: create it anew")
        if self.scheduler.optimizer is not self.optimizer:
            raise ValueError("the scheduler does not belong to this optimizer: create it anew")

    def _check_new(self):
        if len(self.optimizer.state) > 0 or self.scheduler.last_epoch > 0:
            raise ValueError(
                "the optimizer or the scheduler has been used: create model, optimizer and scheduler anew,"
                " or set RESUME = True to continue from the checkpoint"
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
            os.replace(partial, self.path)  # atomic: the checkpoint is whole even if the process is killed
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
                " restore them, or set RESUME = False"
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

    Multiply-adds are torchinfo's. Each layer enlarges the receptive field by (kernel - 1) · jump
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
    """Return the side length and the stride of the window of a torchinfo layer; 1 and 1 without one."""
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
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image.squeeze().numpy(), cmap="gray_r")
        axis.set_title(caption, fontsize=9)
    shown = ", ".join(map(str, captions[:20]))
    show_figure(figure, name, f"{title}: {shown}")


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
    """Return a summary of a run in four lines, with whether it meets the course target of 99.4 %."""
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
    return (
        f"{title}: {history.epochs} {unit}, learning rate from {rates[0]:.3g} to {rates[-1]:.3g}\n"
        f"last epoch: train {history.train_acc[-1]:.2f} %, test {history.test_acc[-1]:.2f} %;"
        f" best test {max(history.test_acc):.2f} %\n"
        f"minimum test accuracy over the last five epochs: {min(history.test_acc[-LAST_EPOCHS:]):.2f} %\n"
        f"test accuracy ≥ {TARGET_ACCURACY} %: {sustained}"
    )


def summarize_last_augmented_epoch(run):
    """Return a line on the train accuracy before and after augmentation ends, or on its absence."""
    clean_epochs = run.settings["clean_epochs"]
    last = run.settings["epochs"] - clean_epochs  # the last epoch with augmentation
    train_acc = run.history.train_acc
    if run.settings["augmentation"] is None or clean_epochs == 0:
        return "This run used the same images in all epochs."
    if last < 1 or len(train_acc) <= last:
        return "This run did not get beyond its augmented epochs."
    return (
        f"train accuracy: {train_acc[last - 1]:.2f} % in epoch {last} (augmented images), "
        f"{train_acc[last]:.2f} % in epoch {last + 1} (original images)"
    )


def most_confused(confusion, count=3):
    """Return the most confused pairs of digits as text, one line per pair.

    `confusion` `(10, 10)` counts images by true (row) and predicted (column) digit.
    """
    both_ways = (confusion + confusion.T).triu(diagonal=1)  # 4 taken for 9, and 9 for 4
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
    axis.set_title(title)
    show_figure(figure, "confusion", f"{title}: confusion matrix with {wrong.sum()} misclassified images")


# ---- own digit ----


def read_picture(image):
    """Return the brightness `(H, W)` in [0, 1] of a path's or a PIL image's pixels.

    Transparent areas are filled with a background that contrasts with the digit.
    """
    try:
        image = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image))
        if image.mode[0] in "IF":  # 16 and 32 bits, which PIL would clip at 255
            low, high = image.getextrema()
            image = image.convert("F").point(lambda value: value * (255 / ((high - low) or 1)) + 0)
        gray, alpha = pil_to_tensor(image.convert("RGBA").convert("LA")).double() / 255
    except (OSError, ValueError) as error:
        raise ValueError(f"{image} cannot be read as an image ({error}): choose another file") from None
    if alpha.min() < 1:
        ink_is_dark = (gray * alpha).sum() < 0.5 * alpha.sum()
        gray = gray * alpha + (1 - alpha) * ink_is_dark
    return gray


def prepare_digit(image):
    """Preprocess an image of a single digit like MNIST; return normalized float32 `(1, 1, 28, 28)`.

    `image` is a path or a PIL image of any size, color mode and polarity. The digit is cropped,
    scaled to fit 20×20 and its center of mass put on pixel (14, 14) of 28×28 (yann.lecun.com/exdb/mnist;
    the pixel was determined empirically on the test images). Raise ValueError if no digit is visible.
    """
    gray = read_picture(image)
    paper = torch.cat([gray[0], gray[-1], gray[:, 0], gray[:, -1]]).median()
    lighter = (gray - paper).clamp(min=0)
    darker = (paper - gray).clamp(min=0)
    ink = lighter if lighter.sum() > darker.sum() else darker
    if ink.max() < 0.1:
        raise ValueError("no digit found: the image is (almost) a single color")
    ink = ink / ink.max()
    rows = (ink > 0.15).any(dim=1).nonzero()
    columns = (ink > 0.15).any(dim=0).nonzero()
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = [max(1, round(20 * side / max(ink.shape))) for side in ink.shape]
    ink = F.interpolate(ink[None, None], size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
    center = [(ink.sum(dim=1 - d) * torch.arange(size[d])).sum() / ink.sum() for d in (0, 1)]
    # slightly below 14, so that ties always round the same way
    top, left = (min(max(round(13.999 - c.item()), 0), 28 - s) for c, s in zip(center, size, strict=True))
    canvas = F.pad(ink[None, None].float(), (left, 28 - left - size[1], top, 28 - top - size[0]))
    return (canvas - MEAN) / STD


@torch.no_grad()
def predict(model, image):
    """Return the class probabilities `(10,)` for an image (anything that `prepare_digit` accepts)."""
    device = next(model.parameters()).device
    return model.eval()(prepare_digit(image).to(device))[0].exp().cpu()


def plot_prediction(image, probabilities):
    """Plot an image, its preprocessed version, and the predicted probabilities."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    left.imshow((image if isinstance(image, Image.Image) else Image.open(image)).convert("RGBA"))
    left.set(title="image", xticks=[], yticks=[])
    middle.imshow(prepare_digit(image).squeeze().numpy(), cmap="gray_r")
    middle.set(title="network input", xticks=[], yticks=[])
    title = f"prediction: {probabilities.argmax()} ({probabilities.max():.1%})"
    right.bar(range(10), probabilities.tolist(), color=TEST_COLOR)
    right.set(title=title, xticks=range(10), ylim=(0, 1.05), xlabel="digit", ylabel="probability")
    show_figure(figure, "prediction", f"Image of a digit, its preprocessed version, and the {title}")


# ---- drawing field ----

# The options without which draw.html cannot compute a layer.
SUPPORTED_OPTIONS = {
    nn.Conv2d: {"stride": 1, "dilation": 1, "padding_mode": "zeros", "bias": None},
    nn.BatchNorm2d: {"affine": True, "track_running_stats": True},
    nn.ReLU: {},
    nn.MaxPool2d: {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
    nn.AvgPool2d: {"padding": 0, "ceil_mode": False, "divisor_override": None},
    nn.AdaptiveAvgPool2d: {"output_size": 1},
}


class DrawingField:
    """What `drawing_field` returns: HTML in a notebook, and a phrase elsewhere."""

    def __init__(self, html):
        self.html = html

    def _repr_html_(self):
        return self.html

    def __repr__(self):
        return "field to draw a digit in"


def drawing_field(model, description):
    """Return a field to draw a digit in, which a notebook displays; the model answers in the page.

    The page needs no kernel, no server and no network: `draw.html` contains the program, and the weights
    are embedded. `description`, for example `run.description`, is shown under the field. Raise
    FileNotFoundError if `draw.html` is not next to this file.
    """
    path = Path(__file__).with_name("draw.html")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: copy draw.html from the repository to this folder")
    network = {
        "description": description,
        "mean": MEAN,
        "std": STD,
        "layers": export_layers(model),
    }
    page = path.read_text(encoding="utf-8")
    return DrawingField(page.replace("NETWORK_JSON", html.escape(json.dumps(network))))


def export_layers(model):
    """Return the layers of a model in evaluation mode, in their order, as dictionaries for `draw.html`.

    BatchNorm becomes a scale and a shift per channel; dropout and identity are left out. The model must
    apply its layers in the order of their definition, as `Network` does. Raise ValueError, naming the
    layer, if `draw.html` cannot compute one.
    """
    layers = []
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (nn.Dropout, nn.Identity)) or list(layer.children()):
            continue
        check_supported(name, layer)
        layers.append(export_layer(layer))
    return layers


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

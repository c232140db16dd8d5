"""What the notebook trains with: recipes, data, training, runs and checkpoints, plots and reports.

The networks are in `model.py`.
"""

import contextlib
import difflib
import inspect
import io
import itertools
import math
import os
import re
import socket
import statistics
import sys
import time
import zipfile
from ast import literal_eval
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchinfo
from IPython import get_ipython
from IPython.core.pylabtools import select_figure_formats
from IPython.display import display
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

DIGITS = 10
SIDE = 28  # pixels
MEAN = 0.1307  # of the 60,000 training images, with pixels scaled to [0, 1]
STD = 0.3081
BLACK = -MEAN / STD  # a black pixel after normalization

#############################################
#             Training and test             #
#############################################


def GetCorrectPredCount(pred, target):
    """Return the number of correct predictions of `pred` `(B, 10)` for `target` `(B,)`.

    The number is a tensor, so that nothing waits for the device.
    """
    return pred.argmax(dim=1).eq(target).sum()


def train(model, device, train_loader, optimizer, criterion):
    """Train for one epoch; return the mean loss per sample and the accuracy in percent.

    Both are measured on the fly, in training mode. Raise FloatingPointError if the loss is not finite.
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
    loss_sum = torch.stack(losses).cpu().double().sum().item()
    return loss_sum / count, 100 * correct.item() / count


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
        count += len(data)
    loss = loss.item() / count
    correct = correct.item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the test loss is {loss}: lower the learning rate")
    accuracy = 100 * correct / count
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/{count} ({accuracy:.2f}%)")
    return loss, accuracy


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


#############################################
#                   Data                    #
#############################################

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


class BatchLoader:
    """An iterable over the batches of a `DigitSet`, which is kept on `device` as one normalized tensor.

    Yields `(data, target)`: float32 `(B, 1, 28, 28)` and int64 `(B,)`; the last batch may be smaller.
    `shuffle` draws a new order for every epoch. `augmentation`, a function of `data`, is applied in the
    first `augmented_epochs` epochs; `set_epoch` says which epoch, from 1 up, comes next.
    """

    def __init__(self, dataset, batch_size, device, shuffle=False, augmentation=None, augmented_epochs=0):
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.augmented_epochs = augmented_epochs
        self.epoch = 1
        self.data = normalize(dataset.images.to(device))
        self.target = dataset.labels.to(device)

    def __repr__(self):
        text = f"{self.dataset.name}, {len(self.dataset):,} images in batches of {self.batch_size}"
        if self.shuffle:
            text += ", shuffled"
        if self.augmentation is None or self.augmented_epochs < 1:
            return text
        return f"{text}, {describe(self.augmentation)} until epoch {self.augmented_epochs}"

    def __len__(self):
        return math.ceil(len(self.target) / self.batch_size)

    def __iter__(self):
        if self.shuffle:
            order = torch.randperm(len(self.target))
        else:
            order = torch.arange(len(self.target))
        is_augmented = self.augmentation is not None and self.epoch <= self.augmented_epochs
        for index in order.to(self.data.device).split(self.batch_size):
            data = self.data[index]
            if is_augmented:
                data = self.augmentation(data)
            yield data, self.target[index]

    def set_epoch(self, epoch):
        """Say which epoch comes next, from 1 up."""
        self.epoch = epoch


def normalize(images):
    """Return uint8 images `(N, H, W)` as float32 `(N, 1, H, W)`, normalized with MNIST's mean and std.

    The values are those of torchvision's `ToTensor` and `Normalize((0.1307,), (0.3081,))`.
    """
    return images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)


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


class MNIST(datasets.MNIST):  # torchvision names its folder after the class
    """torchvision's MNIST, with the MD5 of all four files verified before any of them is read.

    Missing or corrupted files are downloaded, with a timeout of 15 seconds per mirror. Raise
    RuntimeError, naming the file and the remedy, if that fails.
    """

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
        previous_timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(MIRROR_TIMEOUT)
        try:
            super().download()
        except (OSError, RuntimeError, HTTPException) as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise RuntimeError(
                f"{self.first_bad_file()} is missing or corrupted and could not be downloaded ({reason}):"
                " check the network connection and rerun, place the original file there, or set MNIST_ROOT"
            ) from None
        finally:
            socket.setdefaulttimeout(previous_timeout)


def load_data(standin=True):
    """Return the training and the test set: MNIST or, with a prominent warning, the stand-in.

    MNIST is read from the folder `MNIST_ROOT` (default `./data`). With `standin=False` or
    `S7_STANDIN=0`, raise RuntimeError if MNIST is not available; with `S7_STANDIN=1`, use the stand-in
    without trying MNIST.
    """
    wanted = os.environ.get("S7_STANDIN")
    if standin and wanted == "1":
        return load_standin("the stand-in was requested with S7_STANDIN=1")
    root = Path(os.environ.get("MNIST_ROOT") or "./data").expanduser()
    try:
        train_set = MNIST(root, train=True, download=True)
        test_set = MNIST(root, train=False, download=True)
    except (OSError, RuntimeError) as error:
        if not standin or wanted == "0":
            raise
        return load_standin(error)
    return (
        DigitSet("MNIST", train_set.data, train_set.targets),
        DigitSet("MNIST", test_set.data, test_set.targets),
    )


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


#############################################
#           Recipes and settings            #
#############################################


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a model's training."""

    sgd: dict  # arguments of torch.optim.SGD
    scheduler: type  # a class of torch.optim.lr_scheduler
    scheduler_args: dict  # its arguments
    batch_size: int = 128
    augmentation: partial | None = None  # a function of a batch
    clean_epochs: int = 0  # number of final epochs without augmentation


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
    text = os.environ.get(f"S7_{name}")
    if not text:
        return default
    if isinstance(default, str):
        return text
    try:
        return literal_eval(text)
    except (SyntaxError, ValueError):
        return text  # `check_settings` rejects it by name


def check_settings(model, epochs, batch_size, seed, resume):
    """Raise ValueError, naming the setting and its valid values, if a setting is invalid."""
    if model not in RECIPES:
        raise ValueError(f"MODEL is {model!r}: choose one of {', '.join(RECIPES)}")
    if batch_size is None:
        batch_size = RECIPES[model].batch_size
    for name, value, lowest in (("EPOCHS", epochs, 1), ("BATCH_SIZE", batch_size, 1), ("SEED", seed, 0)):
        if type(value) is not int or not lowest <= value < 10**9:
            raise ValueError(f"{name} is {value!r}: it must be an integer from {lowest} to 999,999,999")
    if resume not in (True, False):
        raise ValueError(f"RESUME is {resume!r}: choose True or False")


#############################################
#           Runs and checkpoints            #
#############################################


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


class Run:
    """A training run: what is trained, its history, and the checkpoint from which it can be resumed.

    The run is described by the objects that it is given. The description is printed, stored in the
    checkpoint, and compared with that of a checkpoint before the run is resumed. The number of epochs is
    no part of it, so a finished run can be resumed with more epochs; where a schedule depends on that
    number, the schedule itself differs.

    The checkpoint at `path` always contains the state after a completed epoch. With `resume=True` the
    state is restored from it; if there is none, the run starts from scratch and says so. With
    `resume=False` the checkpoint of an earlier run is kept under another name (see `keep_previous`).

    Raise ValueError if the optimizer or the scheduler has been used, if the file is not a checkpoint, or
    if it is that of a different run, listing the differences. Raise OSError if a file cannot be read or
    written.
    """

    def __init__(
        self, path, model, optimizer, scheduler, train_loader, criterion, epochs, seed, resume=False
    ):
        self.path = Path(path).expanduser()
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.epochs = epochs
        self.seed = seed
        self.history = History()
        was_stepped = any(state.get("step", 1) > 0 for state in optimizer.state.values())
        if was_stepped or getattr(scheduler, "last_epoch", 0) > 0:
            raise ValueError("the optimizer or the scheduler has been used: create the model and both again")
        self.description = {
            "network": str(model),
            "data": describe(train_loader),
            "optimizer": describe_optimizer(optimizer),
            "scheduler": describe(scheduler),
            "loss": describe(criterion),
            "seed": str(seed),
        }
        data_name = getattr(train_loader.dataset, "name", type(train_loader.dataset).__name__)
        self.title = f"{type(model).__name__} on {data_name}"
        print(self)
        if resume and self.path.exists():
            self._restore(load_checkpoint(self.path))
            return
        if resume:
            print(f"No checkpoint at {self.path}: training starts from scratch")
        keep_previous(self.path)
        self._save()

    def __str__(self):
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        about = self.description
        return (
            f"{type(self.model).__name__} with {parameters:,} parameters on {about['data']}\n"
            f"{about['optimizer']}, {about['scheduler']}, {about['loss']}, seed {self.seed}, until epoch"
            f" {self.epochs}"
        )

    def remaining_epochs(self):
        """Yield the numbers of the epochs that are not completed, up to `epochs`.

        Each epoch has its own random seed, so that a resumed run draws the same random numbers.
        """
        for epoch in range(self.history.completed + 1, self.epochs + 1):
            print(f"EPOCH: {epoch}")
            torch.manual_seed(1000 * self.seed + epoch)
            self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
            self.start_time = time.perf_counter()
            yield epoch

    def record(self, train_loss, train_acc, test_loss, test_acc):
        """Append the results of an epoch to the history and save a checkpoint."""
        self.history.seconds.append(time.perf_counter() - self.start_time)
        self.history.train_losses.append(train_loss)
        self.history.train_acc.append(train_acc)
        self.history.test_losses.append(test_loss)
        self.history.test_acc.append(test_acc)
        self.history.learning_rates.append(self.learning_rate)
        self._save()

    def _save(self):
        state = {
            "model": self.model.state_dict(),
            "optimizer": without_numpy(self.optimizer.state_dict()),
            "scheduler": without_numpy(self.scheduler.state_dict()),
            "description": self.description,
            "history": vars(self.history),
        }
        save_checkpoint(self.path, state)

    def _restore(self, state):
        differences = list_differences(state["description"], self.description)
        if differences:
            raise ValueError(
                f"{self.path} is the checkpoint of a different run ({'; '.join(differences)}): undo these"
                " changes, or set RESUME = False"
            )
        history = History(**state["history"])
        if history.completed > self.epochs:
            raise ValueError(
                f"{self.path} has {history.completed} completed epochs: set EPOCHS to at least that number,"
                " or RESUME = False"
            )
        self.optimizer.load_state_dict(state["optimizer"])  # first, because other parameters do not fit
        self.scheduler.load_state_dict(state["scheduler"])
        self.model.load_state_dict(state["model"])
        self.history = history
        print(f"Resuming after epoch {history.completed} of {self.epochs}")


def describe(value):
    """Return an object as text that is the same in every process.

    A function is described by its name, a scheduler by its class and options, and anything else as
    Python prints it, without memory addresses.
    """
    if isinstance(value, LRScheduler):
        return f"{type(value).__name__}({describe_options(vars(value))})"
    if isinstance(value, partial):
        options = [*map(describe, value.args), describe_options(value.keywords)]
        return f"{describe(value.func)}({', '.join(filter(None, options))})"
    if isinstance(value, list):
        return f"[{', '.join(map(describe, value))}]"
    if inspect.isroutine(value):
        return value.__qualname__
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


def describe_optimizer(optimizer):
    """Return an optimizer as text: its class, and the options of each of its parameter groups."""
    groups = []
    for group in optimizer.param_groups:
        options = dict(group)
        options["lr"] = group.get("initial_lr", group["lr"])  # before a scheduler changed it
        groups.append(describe_options(options))
    return f"{type(optimizer).__name__}({'; '.join(groups)})"


# Attributes of schedulers and optimizers that are no options of theirs, or that change while they run
NO_OPTIONS = {
    "params",
    "initial_lr",
    "optimizer",
    "base_lrs",
    "best",
    "mode_worse",
    "_step_count",
    "_last_lr",
}


def describe_options(options):
    """Return the options of an optimizer or a scheduler as text; options that are off or zero are left out.

    PyTorch adds such options from version to version, and starts the counters of schedulers at zero.
    """
    parts = []
    for name, value in options.items():
        text = describe(value)
        if name not in NO_OPTIONS and text not in ("None", "False", "0", "0.0"):
            parts.append(f"{name}={text}")
    return ", ".join(parts)


def list_differences(saved, current):
    """Return what differs between two descriptions, as a list of texts that show the lines that differ."""
    differences = []
    for name, here in current.items():
        there = saved.get(name, "")
        if here == there:
            continue
        lines = list(difflib.ndiff(there.splitlines(), here.splitlines()))
        only_there = [line[1:].strip() for line in lines if line.startswith("-")]
        only_here = [line[1:].strip() for line in lines if line.startswith("+")]
        differences.append(f"{name}: checkpoint {' '.join(only_there)}, current {' '.join(only_here)}")
    return differences


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


def save_checkpoint(path, state):
    """Save a dictionary with `torch.save`; at any moment, the file is the old or the new one, complete.

    Missing folders are created. Raise OSError, naming the remedy, if the file cannot be written.
    """
    content = io.BytesIO()
    torch.save(state, content)
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content.getbuffer())
        os.replace(unfinished, path)  # atomic
    except OSError as error:
        raise OSError(
            f"cannot write the checkpoint {path} ({error.strerror}): free disk space, fix the permissions,"
            " or set CHECKPOINTS to another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()  # is still there if writing failed or was interrupted


def load_checkpoint(path):
    """Return the state that a `Run` saved at `path`: a dictionary, with its tensors on the CPU.

    Its keys are `model`, `optimizer`, `scheduler`, `description` and `history`. Code that the file may
    contain is not run. Raise OSError if the file cannot be read, ValueError if it is not a checkpoint.
    """
    content = Path(path).expanduser().read_bytes()
    try:
        corrupted = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch.load ignores the CRCs
        if corrupted is not None:
            raise ValueError(f"{corrupted} has another CRC")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        names = ("model", "optimizer", "scheduler", "description", "history")
        return {name: dict(state[name]) for name in names}
    except Exception as error:  # what torch.load raises depends on where the file is corrupted
        reason = type(error).__name__
        raise ValueError(
            f"{path} is not a checkpoint of this notebook, or corrupted ({reason}): set RESUME = False"
        ) from None


def keep_previous(path):
    """Rename the file at `path`, if there is one, to `*.previous-1.pt`, `*.previous-2.pt` and so on."""
    if not path.exists():
        return
    for number in itertools.count(1):
        previous = path.with_name(f"{path.stem}.previous-{number}{path.suffix}")
        if not previous.exists():
            path.rename(previous)
            return


#############################################
#             Plots and reports             #
#############################################

TRAIN_COLOR = "#D55E00"  # distinguishable for color-blind readers (Okabe and Ito)
TEST_COLOR = "#0072B2"
TARGET_ACCURACY = 99.4  # percent, of the course
LAST_EPOCHS = 5  # of a run, to which the target applies

IMPORTED_FILES = {}  # the source files beside this one, with the times when they were changed last
for source_file in Path(__file__).parent.glob("*.py"):
    IMPORTED_FILES[source_file.resolve()] = source_file.stat().st_mtime


def show_source(item):
    """Print the source code of a class or function.

    Raise RuntimeError if its file was edited after the import: what would be printed does not run.
    """
    path = Path(inspect.getsourcefile(item)).resolve()
    if path.stat().st_mtime != IMPORTED_FILES.get(path, path.stat().st_mtime):
        raise RuntimeError(
            f"{path.name} was edited after it was imported: restart the kernel and run all cells"
        )
    print(inspect.getsource(item))


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
    folder = os.environ.get("S7_FIGURES")
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
    epochs = range(1, history.completed + 1)
    figure, (loss_axis, accuracy_axis, rate_axis) = plt.subplots(
        1, 3, figsize=(11, 3.4), layout="constrained"
    )
    figure.suptitle(title)
    plot_train_and_test(loss_axis, epochs, history.train_losses, history.test_losses)
    plot_train_and_test(accuracy_axis, epochs, history.train_acc, history.test_acc)
    if history.completed > 2:  # the first epoch would compress the rest
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


def number_of(count, noun):
    """Return a count with its noun, for example "1 epoch" or "15 epochs"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}s"


def summarize_run(history, title):
    """Return a summary of a run in at most four lines."""
    completed = history.completed
    if completed == 0:
        return f"{title}: no completed epoch"
    rates = f"{history.learning_rates[0]:.3g}"
    if history.learning_rates[-1] != history.learning_rates[0]:
        rates = f"from {rates} to {history.learning_rates[-1]:.3g}"
    lines = [
        f"{title}: {number_of(completed, 'epoch')}, learning rate {rates}",
        f"last epoch: train {history.train_acc[-1]:.2f} %, test {history.test_acc[-1]:.2f} %",
    ]
    if completed > 1:
        last_epochs = history.test_acc[-LAST_EPOCHS:]
        lines.append(
            f"test accuracy over the last {len(last_epochs)} epochs:"
            f" mean {statistics.mean(last_epochs):.2f} %, minimum {min(last_epochs):.2f} %"
        )
    first = first_epoch_above(history.test_acc)
    if first is not None:
        lines.append(f"test accuracy ≥ {TARGET_ACCURACY} %: from epoch {first} on")
    return "\n".join(lines)


def check_target(history):
    """Return whether a run meets the course target, as a sentence."""
    target = f"at least {TARGET_ACCURACY} % test accuracy in each of the last {LAST_EPOCHS} epochs"
    if history.completed < LAST_EPOCHS:
        return f"{target}: this run has only {number_of(history.completed, 'epoch')}"
    if min(history.test_acc[-LAST_EPOCHS:]) < TARGET_ACCURACY:
        return f"{target}: not met"
    return f"{target}: met"


def most_confused(confusion, count=3):
    """Return the most confused pairs of digits as text, one line per pair.

    `confusion` `(10, 10)` counts images by true (row) and predicted (column) digit.
    """
    both_ways = (confusion + confusion.T).triu(diagonal=1)  # 4 predicted as 9, and 9 as 4
    numbers, places = both_ways.flatten().sort(descending=True, stable=True)
    lines = []
    for number, place in zip(numbers[:count].tolist(), places[:count].tolist(), strict=True):
        if number > 0:
            one, other = divmod(place, DIGITS)
            lines.append(f"{one} and {other}: {number_of(number, 'image')}")
    return "\n".join(lines) or "no digits were confused"


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
    count = number_of(len(mistakes), "misclassified image")
    plot_digits(images, captions, f"{title}: {count}, most confident first (true→predicted)", "mistakes")


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
    count = number_of(wrong.sum().item(), "misclassified image")
    show_figure(figure, "confusion", f"{title}: confusion matrix with {count}")


FEATURE_COLUMNS = 10  # how many channels `plot_features` shows


@torch.no_grad()
def plot_features(model, image, title):
    """Plot the filters of a model's first layer, and what each of its blocks makes of one image.

    `image` is normalized, `(1, 28, 28)`. Each row shows the first ten channels of a block, on a common
    scale from dark (low) to light (high), with their size and receptive field.
    """
    model.eval()
    outputs = []
    hooks = []
    for name, block in model.named_children():

        def keep(block, inputs, output, name=name):
            outputs.append((name, output[0].cpu().clone()))

        hooks.append(block.register_forward_hook(keep))
    try:
        model(image.unsqueeze(0).to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()

    filters = next(model.parameters()).cpu()
    rows = [(f"filters\n{filters.shape[-1]}×{filters.shape[-1]}", filters[:, 0])]
    blocks = itertools.groupby(layer_table(model), key=lambda layer: layer.name.split(".")[0])
    for (name, output), (_, layers) in zip(outputs, blocks, strict=True):
        field = list(layers)[-1].receptive_field
        if output.dim() == 3:  # after flattening, there is no image
            channels, height, width = output.shape
            rows.append((f"{name}\n{channels}×{height}×{width}\nfield {field}×{field}", output))

    figure, axes = plt.subplots(
        len(rows), FEATURE_COLUMNS, figsize=(9, 0.85 * len(rows)), layout="constrained"
    )
    figure.suptitle(title)
    for row_axes, (label, channels) in zip(axes, rows, strict=True):
        low = channels.min().item()
        high = channels.max().item()
        for axis, channel in zip(row_axes, channels, strict=False):
            axis.imshow(channel.numpy(), cmap="gray", vmin=low, vmax=high)
        for axis in row_axes:
            axis.set(xticks=[], yticks=[])
        for axis in row_axes[len(channels) :]:
            axis.set_axis_off()
        row_axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    show_figure(figure, "features", f"{title}: the filters of the first layer, then one row per block")

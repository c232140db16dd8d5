"""What the notebook trains with: training and test, data, recipes and settings.

The networks are in `model.py`, runs and checkpoints in `runs.py`, plots and reports in `plots.py`.
"""

import ast
import copy
import inspect
import io
import math
import operator
import os
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
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
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
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

    Probabilities `(B, 10)` as target, such as those of CutMix and MixUp, count by their largest. The number
    is a tensor, so that nothing waits for the device.
    """
    if target.dim() == 2:
        target = target.argmax(dim=1)
    return pred.argmax(dim=1).eq(target).sum()


def train(model, device, train_loader, optimizer, criterion):
    """Train for one epoch; return the mean loss per sample and the accuracy in percent.

    `train_loader` is iterated and has a length; `criterion(output, target)` is the mean over a batch.
    Loss and accuracy are measured on the fly, in training mode. Raise FloatingPointError if the loss is
    not finite, and ValueError if there are no batches.
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
                    raise FloatingPointError(
                        f"batch {batch_id}: the loss is {loss}: lower the learning rate, or check the images,"
                        " the network and the loss"
                    )
                accuracy = 100 * correct.item() / count
                text = f"Train: Loss={loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}"
                bar.set_description(text, refresh=False)
    if count == 0:
        raise ValueError("the loader has no batches")
    return sum_exactly(losses) / count, 100 * correct.item() / count


@torch.no_grad()
def test(model, device, test_loader, criterion):
    """Evaluate a model; print and return the mean loss per sample and the accuracy in percent.

    The arguments are those of `train`. Raise FloatingPointError if the loss is not finite, and ValueError
    if there are no batches, or if `nll_loss` is given scores that are not log-probabilities.
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
    if count == 0:
        raise ValueError("the loader has no batches")
    loss = sum_exactly(losses) / count
    correct = correct.item()
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the test loss is {loss}: lower the learning rate, or check the test images"
        )
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


def unwrap(model):
    """Return the module inside of `torch.compile` or `nn.DataParallel`, and any other model as it is."""
    if isinstance(model, nn.DataParallel):
        return unwrap(model.module)
    return getattr(model, "_orig_mod", model)  # set by torch.compile


# ---- in a notebook ----


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


def reload_edited_files():
    """Let a notebook use edited files without a restart of its kernel."""
    shell = get_ipython()
    if shell is None:
        return
    shell.run_line_magic("reload_ext", "autoreload")
    shell.run_line_magic("autoreload", "2")
    reloader = shell.magics_manager.registry["AutoreloadMagics"]._reloader
    if hasattr(reloader, "deduper_reloader"):  # IPython 9 reloads parts of a file, and shows the wrong lines
        reloader.deduper_reloader.enabled = False


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

    Arrays and lists are converted. A number as index gives a normalized image `(1, 28, 28)` and its label, so
    that a `DataLoader` and `random_split` work. A slice or an index tensor gives a smaller set of the same
    name.

    Raise TypeError if the images are not uint8, ValueError if shapes or labels are not those of digits.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self):
        self.images = torch.as_tensor(self.images)
        self.labels = torch.as_tensor(self.labels).long()
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images are {self.images.dtype}: give them as uint8, from 0 to 255")
        if self.labels.dim() != 1 or self.images.shape != (len(self.labels), SIDE, SIDE):
            raise ValueError(
                f"images are {tuple(self.images.shape)} and labels {tuple(self.labels.shape)}: give them as"
                f" (N, {SIDE}, {SIDE}) and (N,)"
            )
        if not torch.isin(self.labels, torch.arange(DIGITS)).all():
            raise ValueError(f"labels are from {self.labels.min()} to {self.labels.max()}, instead of 0 to 9")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if isinstance(index, slice) or np.ndim(index) > 0:
            return DigitSet(self.name, self.images[index], self.labels[index])
        index = operator.index(index)  # of NumPy's and PyTorch's integers, too
        return normalize(self.images[index]), self.labels[index].item()


def split(train_set):
    """Return five sixths of a `DigitSet` to train on and one sixth to validate on; their names say so.

    The images are chosen at random, but are the same in every run: 50,000 and 10,000 of MNIST's.
    """
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))
    validation_count = len(train_set) // 6
    whole = replace(train_set, name=f"{train_set.name} (validation split)")
    return whole[order[:-validation_count]], whole[order[-validation_count:]]


class BatchLoader:
    """An iterable over the batches of a `DigitSet`, which is kept on `device` as one normalized tensor.

    Yields `(data, target)`: float32 `(B, 1, 28, 28)` and int64 `(B,)`; the last batch may be smaller.
    `shuffle` draws a new order for every epoch. `augmentation`, if there is one, is a function of `data`.

    Raise TypeError if the data set is not a `DigitSet`, and ValueError if the augmentation draws one set of
    random numbers per call, as torchvision's transforms do. Both work with a `DataLoader`, which calls
    transforms for each image.
    """

    def __init__(self, dataset, batch_size, device, shuffle=False, augmentation=None):
        if not isinstance(dataset, DigitSet):
            raise TypeError(
                f"BatchLoader needs a DigitSet, not {type(dataset).__name__}: create one from images and"
                " labels, such as DigitSet(name, mnist.data, mnist.targets), or use a DataLoader"
            )
        self.dataset = dataset
        self.batch_size = operator.index(batch_size)  # no float
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.data = normalize(dataset.images).to(device)
        self.target = dataset.labels.to(device)
        if augmentation is not None and changes_batch_alike(augmentation, self.data[:1]):
            raise ValueError(
                f"{brief(augmentation)} changes all images of a batch alike: use it in the transform of a"
                " torchvision data set with a DataLoader, before Normalize"
            )

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


def without_augmentation(train_loader):
    """Return a loader of the same data without augmentation, or a loader that has none as it is."""
    if getattr(train_loader, "augmentation", None) is None:
        return train_loader
    original = copy.copy(train_loader)
    original.augmentation = None
    return original


def changes_batch_alike(augmentation, image):
    """Return whether an augmentation is random, but the same for all images of a batch.

    It is tried eight times on a batch of two equal images `(1, 1, 28, 28)`. The random numbers of training
    stay the same.
    """
    batches = []
    with torch.random.fork_rng():
        for _ in range(8):
            batches.append(augmentation(image.repeat(2, 1, 1, 1)))
    is_random = any(not torch.equal(batch, batches[0]) for batch in batches)
    is_alike = all(torch.equal(batch[0], batch[1]) for batch in batches)
    return is_random and is_alike


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
    amounts = torch.rand(4, len(data), dtype=data.dtype, device=data.device) * 2 - 1
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
    side = data.shape[-1]
    x = torch.linspace(-1, 1, side, dtype=data.dtype, device=data.device) * (side - 1) / side  # pixel centers
    # `F.affine_grid` is the same sum as a product of matrices, which takes three times as long
    grid = torch.addcmul(rotation[:, :, 0, None, None] * x, rotation[:, :, 1, None, None], x[:, None])
    grid = grid + translation[..., None]
    return F.grid_sample(data - BLACK, grid.permute(0, 2, 3, 1), align_corners=False) + BLACK


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


def check_settings(model, epochs, batch_size, seed, resume, checkpoints):
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
    if not isinstance(checkpoints, (str, Path)) or not str(checkpoints).strip():
        raise ValueError(f"CHECKPOINTS is {checkpoints!r}: name a folder, such as 'runs'")


# ---- what is trained, as text ----


def brief(item):
    """Return an object in short: a function by its name, others as the call that creates them.

    Equal options give equal texts. Options that differ between the groups of an optimizer are all listed.
    """
    if isinstance(item, dict):
        return ", ".join(f"{name}={brief_value(value)}" for name, value in item.items())
    if isinstance(item, partial):
        options = brief(dict(sorted(item.keywords.items())))
        return f"{brief(item.func)}({', '.join([*map(brief_value, item.args), options])})"
    if inspect.isroutine(item) or isinstance(item, type):
        return item.__name__
    if not hasattr(item, "__dict__"):
        return str(item)
    groups = getattr(item, "param_groups", [vars(item)])  # an optimizer has its options in groups
    options = {}
    for name in inspect.signature(type(item)).parameters:
        values = [group[name] for group in groups if isinstance(group.get(name), (int, float, str))]
        if any(values):
            options[name] = " and ".join(map(brief_value, dict.fromkeys(values)))
    return f"{type(item).__name__}({brief(options)})"


def brief_value(value):
    """Return an option as text; numbers with at most six digits, so that 1 and 1.0 are the same."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.6g}"
    return str(value)

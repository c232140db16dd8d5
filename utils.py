"""Everything around the networks, in the notebook's order: settings, data, training, pictures."""

import ctypes
from dataclasses import dataclass, field
from http.client import HTTPException
import io
import math
import os
from pathlib import Path
import socket
import sys
import time

from IPython import get_ipython
from IPython.display import display
import matplotlib.pyplot as plt
from PIL import Image, ImageDraw, ImageFont, ImageOps
import torch
import torch.nn.functional as F
import torchinfo
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

# ---- settings and recipes ----

_PUBLISHED = dict(batch_size=128, optimizer=dict(lr=0.01, momentum=0.9), augment=None, plain=0)
_STEP = dict(step_size=6, gamma=0.1)
_PLATEAU = dict(mode="min", factor=0.1, patience=10, threshold=1e-4, threshold_mode="abs")
_AUGMENTED = dict(
    batch_size=128,
    optimizer=dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    StepLR=dict(step_size=1, gamma=0.75),
    augment=dict(degrees=10, shift=0.06, scale=0.06),
    plain=5,
)
RECIPES = {  # `augment`: see `random_affine`; `plain`: how many epochs at the end go without it
    "Model1": dict(**_PUBLISHED, StepLR=_STEP),
    "Model2": dict(**_PUBLISHED, StepLR=_STEP),
    "Model3": dict(**_PUBLISHED, ReduceLROnPlateau=_PLATEAU),
    "Model4": _AUGMENTED,
    "Model5": _AUGMENTED,
}


def setting(name, default, choices=None):
    """A setting of the notebook: `S7_<name>` in the environment, else `default`.

    Has the type of `default`: str, bool (written 0 or 1), or int from 1 up. ValueError, in one line,
    for any other value or one that is not among `choices`.
    """
    value = os.environ.get(f"S7_{name}", default)
    if isinstance(default, bool):
        choices = ("0", "1", False, True)
    elif isinstance(default, int) and not (str(value).isdecimal() and int(value) > 0):
        raise ValueError(f"{name} is {value!r}: give a whole number from 1 up, here or as S7_{name}")
    if choices and value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(str, choices))}")
    return bool(int(value)) if isinstance(default, bool) else type(default)(value)


# ---- data ----

MEAN, STD = 0.1307, 0.3081  # of the 60,000 training images, as pixels from 0 to 1
MNIST_MD5 = {  # of the four original files, unpacked
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class MNIST(datasets.MNIST):
    """torchvision's MNIST, with its four files checked against their digests before one is read.

    Where one is missing or damaged they are downloaded; a mirror that is silent for 15 seconds is
    given up. RuntimeError, in one line, names the file and what to do.
    """

    title = "MNIST"

    def __init__(self, root, train=True):
        super().__init__(root, train, download=True)

    def _check_legacy_exist(self):
        return False  # a `processed` folder of old versions holds files that no digest covers

    def _check_exists(self):
        paths = {Path(self.raw_folder) / name: md5 for name, md5 in MNIST_MD5.items()}
        self.bad = [path for path, md5 in paths.items() if not check_integrity(path, md5)]
        return not self.bad

    def download(self):
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(15)
        try:
            super().download()
        except (OSError, RuntimeError, HTTPException) as error:
            problem = "is damaged" if self.bad[0].exists() else "is missing"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RuntimeError(
                f"{self.bad[0]} {problem} and could not be downloaded ({reason}): connect to the"
                " network and run again, or put the original file there, or set MNIST_ROOT"
            ) from None
        finally:
            socket.setdefaulttimeout(patience)


class StandIn(datasets.MNIST):
    """Digits drawn in Pillow's font, in MNIST's sizes, for want of MNIST: each turned, shifted and
    scaled at random, and the same in every run."""

    title = "stand-in digits (not MNIST)"

    def __init__(self, train=True):
        font, glyphs = ImageFont.load_default(24), []
        for digit in range(10):
            image = Image.new("L", (28, 28))
            ImageDraw.Draw(image).text((14, 14), str(digit), fill=255, font=font, anchor="mm")
            glyphs.append((pil_to_tensor(image) / 255 - MEAN) / STD)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(train))
            self.targets = torch.randint(10, (60_000 if train else 10_000,))
            parts = torch.stack(glyphs)[self.targets].split(1000)
            data = torch.cat([random_affine(part, degrees=20, shift=0.1, scale=0.2) for part in parts])
        self.data = ((data * STD + MEAN) * 255).round().byte().squeeze(1)
        self.transform = self.target_transform = None


def load_data(standin=True):
    """The train and the test set: MNIST, or loudly the stand-in where MNIST cannot be had.

    MNIST lies in the environment's `MNIST_ROOT`, by default `./data`. With `standin` false, or
    `S7_STANDIN=0`, the failure is a RuntimeError of one line; `S7_STANDIN=1` does not try for MNIST.
    """
    root, wanted = os.environ.get("MNIST_ROOT", "./data"), os.environ.get("S7_STANDIN")
    try:
        if standin and wanted == "1":
            raise RuntimeError("S7_STANDIN=1 asks for the stand-in")
        return MNIST(root, train=True), MNIST(root, train=False)
    except RuntimeError as error:
        if not standin or wanted == "0":
            raise
        print(f"*** THIS IS NOT MNIST: {error}.")
    print(
        "*** Stand-in digits are used instead, so no result below speaks of MNIST. For the real data,"
        " run again with a network, or set MNIST_ROOT to the folder that holds MNIST/raw."
    )
    return StandIn(train=True), StandIn(train=False)


class BatchLoader:
    """Batches cut from a data set that is held on `device` as one normalised tensor.

    Yields `(data, target)`, float32 `(B, 1, 28, 28)` as torchvision's `ToTensor` and `Normalize` give
    it and int64 `(B,)`; the last batch may be short. `shuffle` draws a new order for every pass;
    `augment`, which may be changed between passes, holds the arguments of `random_affine`. ValueError
    for a batch size below 1, for no images, and for a target that is no digit.
    """

    def __init__(self, dataset, batch_size, device, shuffle=False, augment=None):
        if batch_size < 1 or len(dataset.targets) == 0:
            raise ValueError(f"{len(dataset.targets)} images in batches of {batch_size}: give at least 1")
        low, high = dataset.targets.min().item(), dataset.targets.max().item()
        if low < 0 or high > 9:
            raise ValueError(f"targets run from {low} to {high}: digits are 0 to 9")
        self.dataset, self.batch_size = dataset, batch_size
        self.shuffle, self.augment = shuffle, augment
        self.data = dataset.data.to(device).unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
        self.target = dataset.targets.to(device)

    def __len__(self):
        return math.ceil(len(self.target) / self.batch_size)

    def __iter__(self):
        count = len(self.target)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for index in order.to(self.data.device).split(self.batch_size):
            data = self.data[index]
            yield random_affine(data, **self.augment) if self.augment else data, self.target[index]


def random_affine(data, degrees, shift, scale):
    """Turn, shift and scale each image of a normalised batch `(B, 1, H, W)` by amounts of its own.

    At most ± `degrees` about the centre, ± `shift` of the side in both directions, and to a size of
    1 ± `scale`; bilinear, black outside. The same map as torchvision's `functional.affine`.
    """
    draw = torch.rand(4, len(data), device=data.device) * 2 - 1
    angle, size = (draw[0] * degrees).deg2rad(), 1 + draw[3] * scale
    cos, sin = angle.cos() / size, angle.sin() / size
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    theta = torch.cat([turn, -2 * turn @ (draw[1:3].T * shift).unsqueeze(2)], 2)
    grid = F.affine_grid(theta, data.shape, align_corners=False)
    black = -MEAN / STD
    return F.grid_sample(data - black, grid, align_corners=False) + black


# ---- training ----


def keep_freed_memory():
    """Have glibc keep the memory of a step's activations, for the next step, instead of returning it
    to the system: a setting of the whole process, on Linux only. What it is worth is a row of
    `benchmarks/epoch_time.csv`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def GetCorrectPredCount(pred, target):
    """How many rows of `pred` `(B, 10)` are largest at `target` `(B,)`, as a tensor: nothing waits."""
    return pred.argmax(dim=1).eq(target).sum()


class NotebookLine(io.TextIOBase):
    """A file for tqdm that shows what it is given as one notebook output, replaced each time.
    Printed, every refresh would stay in the saved notebook and its HTML page as a line."""

    encoding = "utf-8"  # lets tqdm draw its bar in blocks
    handle = None

    def write(self, text):
        output = {"text/plain": text.strip()}
        if text.strip() and self.handle:
            self.handle.update(output, raw=True)
        elif text.strip():
            self.handle = display(output, raw=True, display_id=True)


def train(model, device, train_loader, optimizer, criterion):
    """Train for one epoch; returns its mean loss per sample and its accuracy in per cent.

    The accuracy is that of the predictions made on the way, in training mode. The progress bar
    reads the device on every batch on a CPU, on every 50th elsewhere, where reading means waiting.
    Raises FloatingPointError, naming the batch, when a loss is not finite.
    """
    model.train()
    every = 1 if torch.device(device).type == "cpu" else 50
    losses = torch.zeros(len(train_loader), device=device)
    correct, sizes = torch.zeros((), dtype=torch.long, device=device), []
    file = NotebookLine() if hasattr(get_ipython(), "kernel") else sys.stdout
    with tqdm(train_loader, file=file) as bar:
        for batch_id, (data, target) in enumerate(bar):
            data, target = data.to(device), target.to(device)
            optimizer.zero_grad()
            output = model(data)
            loss = criterion(output, target)
            loss.backward()
            optimizer.step()
            losses[batch_id] = loss.detach()
            correct += GetCorrectPredCount(output.detach(), target)
            sizes.append(len(data))
            if batch_id % every == 0 or batch_id == len(losses) - 1:
                bad = (~losses.isfinite()).nonzero()
                if len(bad):
                    raise FloatingPointError(f"batch {bad[0].item()}: the loss is {losses[bad[0]].item()}")
                accuracy = 100 * correct.item() / sum(sizes)
                text = f"Train: Loss={losses[batch_id]:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}"
                bar.set_description(text, refresh=False)
    weights = torch.tensor(sizes, device=device) / sum(sizes)
    return (losses @ weights).item(), accuracy


@torch.no_grad()
def test(model, device, test_loader, criterion):
    """Test a model; prints and returns its mean loss per sample and its accuracy in per cent.

    Raises FloatingPointError when the loss is not finite.
    """
    model.eval()
    loss = correct = count = 0
    for data, target in test_loader:
        output, target = model(data.to(device)), target.to(device)
        loss += criterion(output, target, reduction="sum")
        correct += GetCorrectPredCount(output, target)
        count += len(target)
    loss, correct = loss.item() / count, correct.item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"testing: the loss is {loss}")
    accuracy = 100 * correct / count
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/{count} ({accuracy:.2f}%)")
    return loss, accuracy


@dataclass
class History:
    """One number for each whole epoch: losses as means per sample, accuracies in per cent, the rates
    that the epochs began with, and their wall times, which do not count when two are compared."""

    train_losses: list = field(default_factory=list)
    train_acc: list = field(default_factory=list)
    test_losses: list = field(default_factory=list)
    test_acc: list = field(default_factory=list)
    learning_rates: list = field(default_factory=list)
    seconds: list = field(default_factory=list, compare=False)


class Run:
    """A run's history, and its checkpoint, from which a run that was cut off goes on.

    `settings` are plain values, `epochs` and `seed` among them. The file at `path` always holds the
    end of a whole epoch: weights, optimizer, scheduler, history and settings. With `resume` they are
    read back from it; without, a file that is there is kept as `*.previous`. ValueError, in one line,
    for a file that is damaged, is no run's, or has other settings, which it names.
    """

    def __init__(self, path, settings, model, optimizer, scheduler, resume=False):
        self.path, self.settings, self.history = Path(path), settings, History()
        self.parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)
        if resume and self.path.exists():
            return self._load()
        if self.path.exists():
            os.replace(self.path, self.path.with_suffix(".previous"))
        self._save()

    def epochs(self):
        """Yield the epochs to come, each with a seed of its own, so that a resumed run draws the same."""
        for epoch in range(len(self.history.test_acc) + 1, self.settings["epochs"] + 1):
            print(f"EPOCH: {epoch}")
            torch.manual_seed(1000 * self.settings["seed"] + epoch)
            self.rate = self.parts["optimizer"].param_groups[0]["lr"]
            self.began = time.perf_counter()
            yield epoch

    def record(self, trained, tested):
        """Enter an epoch's `(loss, accuracy)` of `train` and of `test`, and save the run."""
        row = (*trained, *tested, self.rate, time.perf_counter() - self.began)
        self.history = History(*[old + [new] for old, new in zip(vars(self.history).values(), row)])
        self._save()

    def _save(self):
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({**state, "settings": self.settings, "history": vars(self.history)}, partial)
        os.replace(partial, self.path)  # killed before or after, the file is whole

    def _load(self):
        state = read_checkpoint(self.path)
        ours, theirs = self.settings, state["settings"]
        other = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if other:
            pairs = "; ".join(f"{name} was {theirs.get(name)}, is {ours.get(name)}" for name in other)
            raise ValueError(f"{self.path} has other settings ({pairs}): restore them or do not resume")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.history = History(**state["history"])
        print(f"Resuming after epoch {len(self.history.test_acc)}")


def read_checkpoint(path):
    """The state that a `Run` saved at `path`, a dictionary. ValueError, in one line, where there is
    none; no code that the file may carry is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("model", "optimizer", "scheduler", "settings", "history")}
    except Exception as error:
        reason = type(error).__name__
        raise ValueError(f"{path} is no checkpoint of a run ({reason}): delete it or train first") from None


# ---- looking ----

TRAIN_COLOUR, TEST_COLOUR = "#D55E00", "#0072B2"  # told apart by the colour-blind (Okabe and Ito)


def summarise(model):
    """The layers of a model as text, for one image, with the totals in the last line.

    Mult-adds are torchinfo's; the receptive field grows by (kernel - 1) · jump pixels a layer, jump
    being the product of the strides before it.
    """
    names = {module: name for name, module in model.named_modules()}
    line = "{:<26}{:<12}{:>6}{:>12}{:>12}{:>17}".format
    lines = [line("layer", "output", "kernel", "parameters", "mult-adds", "receptive field")]
    info, receptive, jump = torchinfo.summary(model, (1, 1, 28, 28), verbose=0), 1, 1
    for layer in info.summary_list:
        if layer.is_leaf_layer:
            kernel, stride = (getattr(layer.module, name, 1) for name in ("kernel_size", "stride"))
            if isinstance(layer.module, torch.nn.AdaptiveAvgPool2d):
                kernel = stride = layer.input_size[-1] // layer.output_size[-1]
            kernel, stride = (x[0] if isinstance(x, tuple) else x for x in (kernel, stride))
            receptive, jump = receptive + (kernel - 1) * jump, jump * stride
            name, shape = f"{names[layer.module]} {layer.class_name}", layer.output_size[1:]
            counts = f"{layer.trainable_params:,}", f"{layer.macs:,}"
            lines.append(line(name, "×".join(map(str, shape)), kernel, *counts, receptive))
    lines.append(line("total", "", "", f"{info.trainable_params:,}", f"{info.total_mult_adds:,}", receptive))
    return "\n".join(lines)


def finish(figure, name, alt):
    """Show a figure, `alt` saying in words what is on it; save it as `name.png` where the environment
    names a folder as `S7_FIGURES`."""
    if folder := setting("FIGURES", ""):
        figure.savefig(f"{folder}/{name}.png", dpi=110, facecolor="white")
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def plot_digits(images, captions, title, name):
    """Up to 20 images `(N, 1, 28, 28)` or `(N, 28, 28)`, dark on light, captioned."""
    bare = dict(xticks=[], yticks=[], frame_on=False)
    figure, axes = plt.subplots(2, 10, figsize=(10, 2.9), layout="constrained", subplot_kw=bare)
    figure.suptitle(title)
    for axis, image, caption in zip(axes.flat, images, captions):
        axis.imshow(image.squeeze().numpy(), cmap="gray_r")
        axis.set_title(caption, fontsize=9)
    finish(figure, name, f"{title}: {', '.join(map(str, captions[:20]))}")


def plot_history(history, title):
    """Loss, accuracy and learning rate by epoch; the first epoch may lie outside the axes."""
    epochs = range(1, len(history.test_acc) + 1)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    figure.suptitle(title)
    losses = ("loss", history.train_losses, history.test_losses)
    accuracies = ("accuracy (%)", history.train_acc, history.test_acc)
    for axis, (label, trained, tested) in zip(axes, (losses, accuracies)):
        axis.plot(epochs, trained, "--o", color=TRAIN_COLOUR, markersize=3, label="train")
        axis.plot(epochs, tested, "-o", color=TEST_COLOUR, markersize=3, label="test")
        axis.set_ylabel(label)
        axis.legend()
        later = trained[1:] + tested[1:]
        if len(epochs) > 2:  # the first epoch, far from the rest, would press them together
            axis.set_ylim((0, 1.1 * max(later)) if label == "loss" else (min(later) - 0.3, 100))
    axes[2].plot(epochs, history.learning_rates, "-o", color="black", markersize=3)
    axes[2].set(ylabel="learning rate", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    finish(figure, "curves", f"Curves by epoch; {result(history, title)}".replace("\n", "; "))


def held_from(accuracies, target=99.4):
    """The first epoch from which on every accuracy is at least `target`; None where there is none."""
    epochs = range(1, len(accuracies) + 1)
    return next((epoch for epoch in epochs if min(accuracies[epoch - 1 :]) >= target), None)


def result(history, title):
    """What came of a run, in four lines; the course's target is 99.4 % held over the last epochs."""
    test, train, rates = history.test_acc, history.train_acc, history.learning_rates
    if not test:
        return f"{title}: no whole epoch"
    held = held_from(test)
    return (
        f"{title}: {len(test)} epochs, learning rate from {rates[0]:.3g} to {rates[-1]:.3g}\n"
        f"last epoch: train {train[-1]:.2f} %, test {test[-1]:.2f} %; best test {max(test):.2f} %\n"
        f"worst test of the last five epochs: {min(test[-5:]):.2f} %\n"
        f"99.4 % on the test images: {f'held from epoch {held}' if held else 'not held'}"
    )


@torch.no_grad()
def find_mistakes(model, device, test_loader):
    """What a model gets wrong: `(confusion, mistakes)`.

    `confusion` `(10, 10)` counts images by true digit (row) and predicted digit (column); `mistakes`
    is a list of `(image, true digit, predicted digit, its probability)`, the most confident first.
    """
    model.eval()
    confusion, mistakes = torch.zeros(10, 10, dtype=torch.long), []
    for data, target in test_loader:
        probability, predicted = model(data.to(device)).exp().max(dim=1)
        for row in zip(data.cpu(), target.tolist(), predicted.tolist(), probability.tolist()):
            confusion[row[1], row[2]] += 1
            mistakes += [row] if row[1] != row[2] else []
    return confusion, sorted(mistakes, key=lambda row: -row[3])


def plot_confusion(confusion, title):
    """Counts by true and predicted digit, coloured by the mistakes, with per-digit accuracy."""
    accuracy = (100 * confusion.diag() / confusion.sum(dim=1)).tolist()
    figure, axis = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    wrong = confusion.clone().fill_diagonal_(0)
    axis.imshow(wrong.numpy(), cmap="Oranges", vmax=max(2 * wrong.max().item(), 1))
    for index, count in enumerate(confusion.flatten().tolist()):
        axis.text(index % 10, index // 10, count or "·", ha="center", va="center", fontsize=9)
    axis.set_yticks(range(10), [f"{digit}  ({share:.1f} %)" for digit, share in enumerate(accuracy)])
    axis.set(title=title, xlabel="predicted digit", ylabel="true digit (accuracy)", xticks=range(10))
    finish(figure, "confusion", f"{title}: a matrix of {wrong.sum()} mistakes by true and predicted digit")


# ---- your own digit ----


def read_picture(image):
    """The brightness `(H, W)`, from 0 to 1, of a path's or a PIL image's pixels, whatever its colour
    mode; what is transparent becomes the paper that the ink stands out from."""
    try:
        image = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image))
        if image.mode[0] in "IF":  # 16 and 32 bits, which PIL would clip at 255
            low, high = image.getextrema()
            image = image.convert("F").point(lambda value: value * (255 / ((high - low) or 1)) + 0)
        gray, alpha = pil_to_tensor(image.convert("RGBA").convert("LA")).double() / 255
    except (OSError, ValueError) as error:
        raise ValueError(f"{image} is not an image that can be read ({error}): give another") from None
    if alpha.min() < 1:
        ink_is_dark = (gray * alpha).sum() < 0.5 * alpha.sum()
        gray = gray * alpha + (1 - alpha) * ink_is_dark
    return gray


def prepare_digit(image):
    """A picture of one digit as MNIST was made: normalised float32 `(1, 1, 28, 28)`.

    `image` is a path or a PIL image of any size, colour mode and polarity. The digit is cropped,
    scaled to fit 20×20 and its centre of mass put on pixel (14, 14) of 28×28 (yann.lecun.com/exdb/mnist;
    the pixel was measured on the test images). ValueError where there is no digit to be seen.
    """
    gray = read_picture(image)
    paper = torch.cat([gray[0], gray[-1], gray[:, 0], gray[:, -1]]).median()
    lighter, darker = (gray - paper).clamp(min=0), (paper - gray).clamp(min=0)
    ink = lighter if lighter.sum() > darker.sum() else darker
    if ink.max() < 0.1:
        raise ValueError("the image shows no digit: it is (almost) of one colour")
    ink = ink / ink.max()
    rows, columns = ((ink > 0.15).any(dim=d).nonzero() for d in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = [max(1, round(20 * side / max(ink.shape))) for side in ink.shape]
    ink = F.interpolate(ink[None, None], size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
    centre = [(ink.sum(dim=1 - d) * torch.arange(size[d])).sum() / ink.sum() for d in (0, 1)]
    # a hair less than 14, so that a tie always falls to the same side
    top, left = (min(max(round(13.999 - c.item()), 0), 28 - s) for c, s in zip(centre, size))
    canvas = F.pad(ink[None, None].float(), (left, 28 - left - size[1], top, 28 - top - size[0]))
    return (canvas - MEAN) / STD


@torch.no_grad()
def predict(model, image):
    """The probabilities `(10,)` that `image`, as `prepare_digit` takes it, is each digit."""
    device = next(model.parameters()).device
    return model.eval()(prepare_digit(image).to(device))[0].exp().cpu()


def plot_prediction(image, probabilities):
    """A picture, what the network gets of it, and the ten probabilities."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    left.imshow((image if isinstance(image, Image.Image) else Image.open(image)).convert("RGBA"))
    left.set(title="the picture", xticks=[], yticks=[])
    middle.imshow(prepare_digit(image).squeeze().numpy(), cmap="gray_r")
    middle.set(title="what the network gets", xticks=[], yticks=[])
    title = f"prediction: {probabilities.argmax()} ({probabilities.max():.1%})"
    right.bar(range(10), probabilities.tolist(), color=TEST_COLOUR)
    right.set(title=title, xticks=range(10), ylim=(0, 1.05), xlabel="digit", ylabel="probability")
    finish(figure, "prediction", f"A picture of a digit, the same prepared as MNIST was, and the {title}")

"""Everything around the networks: recipes, data, training, checkpoints, and what is drawn."""

import contextlib
import copy
import ctypes
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
import math
import os
from pathlib import Path
import socket
import sys
import tempfile
import time

from IPython import get_ipython
from IPython.display import display
import matplotlib
import matplotlib.pyplot as plt
from PIL import Image, ImageDraw, ImageFont, ImageOps
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
import torchinfo
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5, download_and_extract_archive
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

MEAN, STD = 0.1307, 0.3081  # of the 60,000 training images, as pixels from 0 to 1
SCHEDULERS = ("StepLR", "ReduceLROnPlateau", "OneCycleLR", "ConstantLR")

_SGD = dict(lr=0.01, momentum=0.9)
_STEP = ("StepLR", dict(step_size=6, gamma=0.1))
_PLATEAU = dict(mode="min", factor=0.1, patience=10, threshold=1e-4, threshold_mode="abs")
CONSTANT = ("ConstantLR", dict(factor=1.0))  # what the published runs really did
_AUGMENTED = dict(
    optimizer=dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    scheduler=("OneCycleLR", dict(pct_start=0.2)),
    augment=dict(degrees=10, shift=0.06, scale=0.06),
    average=0.99,
    plain=5,
)
RECIPES = {
    "Model1": dict(optimizer=_SGD, scheduler=_STEP),
    "Model2": dict(optimizer=_SGD, scheduler=_STEP),
    "Model3": dict(optimizer=_SGD, scheduler=("ReduceLROnPlateau", _PLATEAU)),
    "Model4": _AUGMENTED,
    "Model5": _AUGMENTED,
}

MNIST_MD5 = {  # of the four original files, unpacked, in the order of torchvision's `resources`
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
STANDIN_FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif DejaVuSerif-Italic"
    " STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10 cmss10 cmtt10"
).split()
# glibc hands the memory of a step's activations back to the system and faults it in again in the
# next; told to keep it (M_MMAP_THRESHOLD 32 MB, M_TRIM_THRESHOLD 2 GB), a step on a CPU is faster.
if sys.platform == "linux":
    with contextlib.suppress(AttributeError):  # another C library has no mallopt
        ctypes.CDLL(None).mallopt(-3, 32 * 2**20)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)

TRAIN_COLOUR, TEST_COLOUR = "#D55E00", "#0072B2"  # told apart by the colour-blind (Okabe and Ito)


class MNIST(datasets.MNIST):
    """torchvision's MNIST, with its four files checked against their digests before one is read.

    A missing or damaged file is fetched from torchvision's mirrors; an attempt gives up after 15
    seconds without an answer. RuntimeError, in one line, names the file and what to do.
    """

    title = "MNIST"

    def __init__(self, root, train=True):
        super().__init__(root, train, download=True)

    def _check_legacy_exist(self):
        return False  # a `processed` folder of old versions holds files that no digest covers

    def download(self):
        for (archive, archive_md5), (name, md5) in zip(self.resources, MNIST_MD5.items()):
            path = Path(self.raw_folder) / name
            if not path.exists():
                problem = "is missing"
            elif path.stat().st_size == 0:
                problem = "is empty"
            elif calculate_md5(path) != md5:
                problem = "is damaged (its MD5 is not that of the original)"
            else:
                continue
            make_folder(self.raw_folder)
            reason = self.fetch(archive, archive_md5, path)
            if reason:
                raise RuntimeError(
                    f"{path} {problem} and could not be downloaded ({reason}): connect to the network"
                    " and run again, or put the original file there, or set MNIST_ROOT"
                )

    def fetch(self, archive, md5, path):
        """Download one file to `path`; returns None, or why no mirror gave it."""
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(15)
        try:
            with tempfile.TemporaryDirectory(dir=self.raw_folder) as folder:
                for mirror in self.mirrors:
                    try:
                        download_and_extract_archive(mirror + archive, folder, filename=archive, md5=md5)
                        return os.replace(Path(folder) / path.name, path)
                    except (OSError, RuntimeError, HTTPException) as error:
                        reason = " ".join(str(error).split()) or type(error).__name__
            return reason
        finally:
            socket.setdefaulttimeout(patience)


class StandIn(datasets.MNIST):
    """Digits drawn from matplotlib's fonts, in MNIST's file format and sizes, for want of MNIST.

    They lie in a folder named after the class, so that nothing takes them for MNIST, and are drawn
    once, the same on every machine with the same libraries.
    """

    title = "stand-in digits (not MNIST)"

    def __init__(self, root, train=True):
        super().__init__(root, train, download=True)

    def download(self):
        make_folder(self.raw_folder)
        for part, count in (("train", 60_000), ("t10k", 10_000)):
            paths = [
                Path(self.raw_folder) / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")
            ]
            sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
            if sizes != [16 + count * 28 * 28, 8 + count]:
                for path, values in zip(paths, draw_digits(count)):
                    shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
                    partial = path.with_suffix(".partial")
                    partial.write_bytes(bytes([0, 0, 8, values.dim()]) + shape + values.numpy().tobytes())
                    os.replace(partial, path)


def make_folder(folder):
    """Create a folder that files can be put into. RuntimeError, in one line, where that fails."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RuntimeError(
            f"{folder} cannot be written ({error.strerror}): set MNIST_ROOT to a folder that can"
        ) from None


def draw_digits(count):
    """`count` stand-in digits: images uint8 `(count, 28, 28)` and labels uint8 `(count,)`.

    Every digit of every font is drawn in three strokes and brought to MNIST's form; each image is
    one of them, turned, shifted and scaled at random. The same for the same `count`.
    """
    glyphs = []
    for name in STANDIN_FONTS:
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 80)
        for stroke in (0, 3, 6):
            for digit in range(10):
                image = Image.new("L", (160, 160))
                draw = ImageDraw.Draw(image)
                draw.text((50, 30), str(digit), fill=255, font=font, stroke_width=stroke)
                glyphs.append(prepare_digit(image))
    glyphs = (torch.cat(glyphs) * STD + MEAN).clamp(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(count)
        index = torch.randint(len(glyphs), (count,))
        images = [
            random_affine(glyphs[part], degrees=20, shift=0.1, scale=0.25, fill=0.0)
            for part in index.split(1000)
        ]
    images = torch.cat(images).squeeze(1).mul_(255).round_().byte()
    return images, (index % 10).byte()


def load_data(root=None, standin=True):
    """The train and the test set: MNIST, or loudly the stand-in where MNIST cannot be had.

    `root` is the data folder, by default the environment's `MNIST_ROOT`, else `./data`. With
    `standin` false, or `S7_STANDIN=0` in the environment, the stand-in is forbidden and the failure
    is a RuntimeError of one line; `S7_STANDIN=1` takes the stand-in without trying for MNIST.
    """
    root = root or os.environ.get("MNIST_ROOT", "./data")
    wanted = os.environ.get("S7_STANDIN")
    try:
        if standin and wanted == "1":
            raise RuntimeError("S7_STANDIN=1 asks for the stand-in")
        return MNIST(root, train=True), MNIST(root, train=False)
    except RuntimeError as error:
        if not standin or wanted == "0":
            raise
        print(
            f"*** THIS IS NOT MNIST: {error}.\n*** Stand-in digits are used instead, so no result below"
            " speaks of MNIST. For the real data, run again with a network, or set MNIST_ROOT to the"
            " folder that holds MNIST/raw."
        )
    return StandIn(root, train=True), StandIn(root, train=False)


class BatchLoader:
    """Batches cut from a data set that is held on `device` as one normalised tensor.

    Yields `(data, target)`, `data` float32 `(B, 1, 28, 28)` as torchvision's `ToTensor` and
    `Normalize` give it; the last batch may be short. `shuffle` draws a new order for every pass;
    `augment` holds the arguments of `random_affine`. ValueError for a batch size below 1.
    """

    def __init__(self, dataset, batch_size, device, shuffle=False, augment=None):
        if batch_size < 1:
            raise ValueError(f"batch size is {batch_size}: at least 1 is needed")
        self.dataset, self.batch_size = dataset, batch_size
        self.shuffle, self.augment = shuffle, augment
        pixels = dataset.data.to(device).unsqueeze(1).float()
        self.data = pixels.div_(255).sub_(MEAN).div_(STD)
        self.target = dataset.targets.to(device)

    def __len__(self):
        return -(-len(self.target) // self.batch_size)

    def __iter__(self):
        count = len(self.target)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for index in order.to(self.data.device).split(self.batch_size):
            data = self.data[index]
            yield random_affine(data, **self.augment) if self.augment else data, self.target[index]


def affine(data, degrees, shift, scale, fill=-MEAN / STD):
    """Turn, shift and scale every image of a batch `(B, 1, H, W)` by amounts of its own.

    About the centre, bilinear: `degrees` clockwise `(B,)`, `shift` to the right and down as a
    share of the side `(B, 2)`, `scale` `(B,)`. What comes in from outside is `fill`, by default
    a black pixel after normalisation. The same map as torchvision's `functional.affine`.
    """
    angle = degrees.deg2rad()
    cos, sin = angle.cos() / scale, angle.sin() / scale
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    theta = torch.cat([turn, -2 * turn @ shift.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, data.shape, align_corners=False)
    return F.grid_sample(data - fill, grid, align_corners=False) + fill


def random_affine(data, degrees, shift, scale, fill=-MEAN / STD):
    """`affine` with amounts drawn for each image: ±degrees, ±shift of the side, 1 ± scale."""
    draw = torch.rand(4, len(data), device=data.device) * 2 - 1
    return affine(data, draw[0] * degrees, draw[1:3].T * shift, 1 + draw[3] * scale, fill)


def make_loaders(train_set, test_set, recipe, device, batch_size=128):
    """The train loader, shuffled and augmented as the recipe says, and the test loader."""
    train_loader = BatchLoader(train_set, batch_size, device, shuffle=True, augment=recipe.get("augment"))
    return train_loader, BatchLoader(test_set, batch_size, device)


def GetCorrectPredCount(pred, target):
    """How many rows of `pred` `(B, 10)` are largest at `target` `(B,)`; a tensor of no dimension,
    so that nothing waits for the device."""
    return pred.argmax(dim=1).eq(target).sum()


class NotebookLine:
    """A file for tqdm that shows what it is given as one notebook output, replaced each time.

    Printed, every refresh would stay in the saved notebook and its HTML page as a line.
    """

    encoding = "utf-8"  # lets tqdm draw its bar in blocks

    def __init__(self):
        self.handle = None

    def write(self, text):
        output = {"text/plain": text.strip()}
        if text.strip() and self.handle:
            self.handle.update(output, raw=True)
        elif text.strip():
            self.handle = display(output, raw=True, display_id=True)

    def flush(self):
        pass


def train(model, device, train_loader, optimizer, criterion):
    """Train for one epoch; returns its mean loss per sample and its accuracy in per cent.

    The accuracy is that of the predictions made on the way, in training mode. The progress bar
    reads the device on every batch on a CPU, on every 50th elsewhere, where reading means waiting.
    Raises FloatingPointError, naming the batch, when a loss is not finite.
    """
    model.train()
    device = torch.device(device)
    every = 1 if device.type == "cpu" else 50
    losses = torch.zeros(len(train_loader), device=device)
    correct = torch.zeros((), dtype=torch.long, device=device)
    sizes = []
    in_notebook = hasattr(get_ipython(), "kernel")
    with tqdm(train_loader, file=NotebookLine() if in_notebook else sys.stdout) as bar:
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
    """Test a model; prints and returns its mean loss per sample and its accuracy in per cent."""
    model.eval()
    loss = correct = torch.zeros((), device=device)
    count = 0
    for data, target in test_loader:
        data, target = data.to(device), target.to(device)
        output = model(data)
        loss = loss + criterion(output, target, reduction="sum")
        correct = correct + GetCorrectPredCount(output, target)
        count += len(target)
    loss, correct = loss.item() / count, int(correct)
    accuracy = 100 * correct / count
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/{count} ({accuracy:.2f}%)")
    return loss, accuracy


@dataclass
class History:
    """A run's record: one number for each whole epoch, in the order of the epochs.

    Losses are means per sample, accuracies per cent, learning rates those the epoch began with;
    `seconds` is the wall time of an epoch and is left out when two histories are compared.
    """

    train_losses: list = field(default_factory=list)
    train_acc: list = field(default_factory=list)
    test_losses: list = field(default_factory=list)
    test_acc: list = field(default_factory=list)
    learning_rates: list = field(default_factory=list)
    seconds: list = field(default_factory=list, compare=False)


def make_optimizer(model, recipe, epochs, steps_per_epoch):
    """The SGD optimizer and the scheduler of a recipe, for a run of `epochs` epochs.

    Raises ValueError for a scheduler that is none of `SCHEDULERS`.
    """
    name, options = recipe["scheduler"]
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}: choose one of {', '.join(SCHEDULERS)}")
    optimizer = torch.optim.SGD(model.parameters(), **recipe["optimizer"])
    if name == "OneCycleLR":
        steps = max(1, epochs * steps_per_epoch)  # `fit` refuses a run without steps, and says why
        options = {**options, "max_lr": recipe["optimizer"]["lr"], "total_steps": steps}
    return optimizer, getattr(torch.optim.lr_scheduler, name)(optimizer, **options)


def check_run(model, device, train_loader, test_loader, epochs):
    """Raise ValueError, in one line, for what could only go wrong later in a run."""
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}: at least 1 is needed")
    for name, loader in (("train", train_loader), ("test", test_loader)):
        if len(loader) == 0:
            raise ValueError(f"the {name} loader is empty: it holds no batch to learn from")
        data, target = next(iter(loader))
        target = torch.as_tensor(getattr(loader.dataset, "targets", target))
        if target.min() < 0 or target.max() > 9:
            raise ValueError(
                f"the {name} targets run from {target.min()} to {target.max()}: digits are 0 to 9"
            )
        with torch.no_grad():
            shape = tuple(model.eval()(data.to(device)).shape)
        if shape != (len(data), 10):
            raise ValueError(f"the model returns {shape} for {len(data)} images, not {len(data), 10}")


def fit(
    model,
    device,
    train_loader,
    test_loader,
    optimizer,
    scheduler,
    epochs,
    seed=1,
    average=None,
    plain=0,
    checkpoint=None,
    resume=False,
):
    """Train for `epochs` epochs, testing after each, and return the run's `History`.

    The scheduler is stepped once an epoch (ReduceLROnPlateau with the test loss), OneCycleLR once
    a batch. `seed` fixes the order of the batches, augmentation and dropout. With `average`, a
    decay per step such as 0.99, the exponential moving average of the weights is what is tested,
    and what `model` holds at the end. In the last `plain` epochs the images are not augmented.

    `checkpoint` names a file that is replaced, atomically, after every epoch; a file already there
    is kept as `*.previous` unless `resume` is true, which goes on after its last whole epoch.
    Interrupted by hand, `fit` returns the whole epochs. Raises ValueError for bad arguments or a
    checkpoint of other settings, FloatingPointError when a loss is not finite. Then, as when
    interrupted, `model` holds its state after the last whole epoch.
    """
    check_run(model, device, train_loader, test_loader, epochs)
    torch.manual_seed(seed)
    per_batch = isinstance(scheduler, OneCycleLR)
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    if average:
        averaging = get_ema_multi_avg_fn(average)
        parts["averaged"] = AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)
    tested = parts.get("averaged", model)
    settings = describe_run(train_loader, epochs, seed, average, plain, **parts)

    def after_step(*_):
        if average:
            tested.update_parameters(model)
        if per_batch:
            scheduler.step()

    def snapshot(history, best):
        state = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        return dict(state, settings=settings, history=asdict(history), best=best, random=random)

    def restore(state):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"][0])
        torch.cuda.set_rng_state_all(state["random"][1:])

    state = snapshot(History(), None)
    if checkpoint:
        state = open_checkpoint(checkpoint, settings, resume) or state
        restore(state)
    hook = optimizer.register_step_post_hook(after_step)
    try:
        for epoch in range(len(state["history"]["test_acc"]) + 1, epochs + 1):
            print(f"EPOCH: {epoch}")
            started, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
            if epoch > epochs - plain:
                train_loader = copy.copy(train_loader)
                train_loader.augment = None
            trained = train(model, device, train_loader, optimizer, F.nll_loss)
            results = test(tested, device, test_loader, F.nll_loss)
            if not math.isfinite(results[0]):
                raise FloatingPointError(f"testing: the loss is {results[0]}")
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(results[0])
            elif not per_batch:
                scheduler.step()
            row = (*trained, *results, rate, time.perf_counter() - started)
            columns = state["history"].values()
            history = History(*[values + [value] for values, value in zip(columns, row)])
            best = state["best"]
            if best is None or results[1] > best["test_acc"]:
                weights = getattr(tested, "module", tested).state_dict()
                best = dict(epoch=epoch, test_acc=results[1], model=copy.deepcopy(weights))
            state = snapshot(history, best)
            if checkpoint:
                save_atomically(state, checkpoint)
    except KeyboardInterrupt:
        print(f"\nInterrupted: {len(state['history']['test_acc'])} whole epochs are kept")
        restore(state)
    except FloatingPointError as error:
        restore(state)
        raise FloatingPointError(f"epoch {epoch}, {error}; the last whole epoch is kept") from None
    finally:
        hook.remove()
    if average:
        model.load_state_dict(tested.module.state_dict())
    return History(**state["history"])


def describe_run(train_loader, epochs, seed, average, plain, model, optimizer, scheduler, **_):
    """What a checkpoint must agree on before a run goes on from it, by name."""
    state = {"scheduler": type(scheduler).__name__}
    for prefix, values in (("optimizer", optimizer.param_groups[0]), ("scheduler", scheduler.state_dict())):
        numbers = {k: v for k, v in values.items() if isinstance(v, (bool, int, float, str))}
        state |= {f"{prefix} {k}": v for k, v in numbers.items() if not k.startswith("_")}
    return state | {
        "model": type(model).__name__,
        "epochs": epochs,
        "seed": seed,
        "average": average,
        "plain": plain,
        "batch size": train_loader.batch_size,
        "augment": getattr(train_loader, "augment", None),
        "data": type(train_loader.dataset).__name__,
    }


def save_atomically(state, path):
    """Write beside `path`, then rename: a process killed here leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def read_checkpoint(path):
    """The state saved at `path`. ValueError when the file is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: train with a checkpoint first") from None
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}): delete it") from None


def open_checkpoint(path, settings, resume):
    """The state to go on from, or None for a fresh run, which puts an earlier file aside."""
    path = Path(path)
    if not path.exists():
        return None
    if not resume:
        os.replace(path, path.with_suffix(".previous"))
        return None
    state = read_checkpoint(path)
    other = state["settings"]
    names = [k for k in {**settings, **other} if settings.get(k) != other.get(k)]
    if names:
        pairs = "; ".join(f"{k} was {other.get(k)}, is {settings.get(k)}" for k in names)
        raise ValueError(f"{path} was made with other settings ({pairs}): restore them or do not resume")
    print(f"Resuming after epoch {len(state['history']['test_acc'])}")
    return state


def load_best(model, path):
    """Load the weights of the best epoch saved at `path` into `model`; returns that epoch's
    number and test accuracy. ValueError when they do not fit."""
    best = read_checkpoint(path)["best"]
    try:
        model.load_state_dict(best["model"])
    except RuntimeError:
        raise ValueError(f"the weights in {path} do not fit {type(model).__name__}") from None
    return best["epoch"], best["test_acc"]


def setting(name, default, choices=None):
    """A setting of the notebook: `S7_<name>` in the environment, else `default`.

    Has the type of `default` (str, int from 0 up, or bool, written 0 or 1). ValueError, in one
    line, for a value that is none or not among `choices`.
    """
    value = os.environ.get(f"S7_{name}", default)
    if isinstance(default, bool):
        choices = ("0", "1", False, True)
    elif isinstance(default, int) and not str(value).isdecimal():
        raise ValueError(f"{name} is {value!r}: give a whole number, here or as S7_{name}")
    if choices and value not in choices:
        names = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}: choose one of {names}, here or as S7_{name}")
    return bool(int(value)) if isinstance(default, bool) else type(default)(value)


def layer_table(model):
    """One dictionary a layer: name, output shape, kernel, parameters, mult-adds (for one image,
    by torchinfo) and receptive field in pixels (r += (kernel - 1) · jump, jump *= stride)."""
    names = {module: name for name, module in model.named_modules()}
    rows, receptive_field, jump = [], 1, 1
    for layer in torchinfo.summary(model, (1, 1, 28, 28), verbose=0).summary_list:
        if not layer.is_leaf_layer:
            continue
        kernel, stride = (getattr(layer.module, name, 1) for name in ("kernel_size", "stride"))
        if isinstance(layer.module, torch.nn.AdaptiveAvgPool2d):
            kernel = layer.input_size[-1] // layer.output_size[-1]
            stride = kernel
        kernel, stride = (x[0] if isinstance(x, tuple) else x for x in (kernel, stride))
        receptive_field += (kernel - 1) * jump
        jump *= stride
        rows.append(
            dict(
                layer=f"{names[layer.module]} {layer.class_name}",
                output=list(layer.output_size[1:]),
                kernel=kernel,
                parameters=layer.trainable_params,
                mult_adds=layer.macs,
                receptive_field=receptive_field,
            )
        )
    return rows


def summarise(model):
    """The layers of a model as text, with the totals for one image."""
    rows = layer_table(model)
    line = "{:<26}{:<12}{:>6}{:>12}{:>12}{:>17}".format
    lines = [line("layer", "output", "kernel", "parameters", "mult-adds", "receptive field")]
    for row in rows:
        shape = "×".join(map(str, row["output"]))
        numbers = f"{row['parameters']:,}", f"{row['mult_adds']:,}"
        lines.append(line(row["layer"], shape, row["kernel"], *numbers, row["receptive_field"]))
    totals = (f"{sum(row[name] for row in rows):,}" for name in ("parameters", "mult_adds"))
    lines.append(line("total", "", "", *totals, rows[-1]["receptive_field"]))
    return "\n".join(lines)


def prepare_digit(image):
    """A picture of one digit as MNIST was made: normalised float32 `(1, 1, 28, 28)`.

    `image` is a path or a PIL image of any size, colour mode and polarity, transparent or not.
    The digit is cropped, scaled to fit 20×20 and its centre of mass put on pixel (14, 14) of 28×28
    (http://yann.lecun.com/exdb/mnist; the pixel was measured on the test images). ValueError, in one
    line, where there is no digit to be seen.
    """
    name = "the image" if isinstance(image, Image.Image) else image
    try:
        image = ImageOps.exif_transpose(image if name == "the image" else Image.open(image))
        if image.mode[0] in "IF":  # 16 and 32 bits, which PIL would clip at 255
            low, high = image.getextrema()
            image = image.convert("F").point(lambda value: value * (255 / ((high - low) or 1)) + 0)
        gray, alpha = pil_to_tensor(image.convert("RGBA").convert("LA")).double() / 255
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist: give the path of an image") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is not an image that can be read ({error})") from None
    if alpha.min() < 1:  # shown on the paper that its ink stands out from
        ink_is_dark = (gray * alpha).sum() < 0.5 * alpha.sum()
        gray = gray * alpha + (1 - alpha) * ink_is_dark
    paper = torch.cat([gray[0], gray[-1], gray[:, 0], gray[:, -1]]).median()
    lighter, darker = (gray - paper).clamp(min=0), (paper - gray).clamp(min=0)
    ink = lighter if lighter.sum() > darker.sum() else darker
    if ink.max() < 0.1:
        raise ValueError(f"{name} shows no digit: it is (almost) of one colour")
    ink = ink / ink.max()
    rows, columns = ((ink > 0.15).any(dim=d).nonzero() for d in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = [max(1, round(20 * side / max(ink.shape))) for side in ink.shape]
    ink = F.interpolate(ink[None, None], size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
    centre = [(ink.sum(dim=1 - d) * torch.arange(size[d])).sum() / ink.sum() for d in (0, 1)]
    # a hair less than 14, so that a tie always falls to the same side
    top, left = (min(max(round(13.999 - c.item()), 0), 28 - s) for c, s in zip(centre, size))
    canvas = torch.zeros(1, 1, 28, 28)
    canvas[..., top : top + size[0], left : left + size[1]] = ink
    return (canvas - MEAN) / STD


@torch.no_grad()
def predict(model, image):
    """The probabilities `(10,)` that `image`, as `prepare_digit` takes it, is each digit."""
    device = next(model.parameters()).device
    return model.eval()(prepare_digit(image).to(device))[0].exp().cpu()


@dataclass
class Mistakes:
    """What a model got wrong in one pass over a test set, the most confident mistake first.

    `confusion` `(10, 10)` counts images by true digit (row) and predicted digit (column) and
    `accuracy` `(10,)` is per cent by true digit; `images`, `target`, `predicted` and `probability`
    (of the predicted digit) hold one entry for each mistake.
    """

    confusion: torch.Tensor
    accuracy: torch.Tensor
    images: torch.Tensor
    target: torch.Tensor
    predicted: torch.Tensor
    probability: torch.Tensor


@torch.no_grad()
def find_mistakes(model, device, test_loader):
    """Compare predictions and truth over a test set; returns `Mistakes`."""
    model.eval()
    batches = [(data.cpu(), target.cpu(), model(data.to(device)).exp().cpu()) for data, target in test_loader]
    images, target, output = (torch.cat(parts) for parts in zip(*batches))
    probability, predicted = output.max(dim=1)
    confusion = torch.bincount(10 * target + predicted, minlength=100).view(10, 10)
    wrong = (predicted != target).nonzero().squeeze(1)
    wrong = wrong[probability[wrong].argsort(descending=True)]
    accuracy = 100 * confusion.diag() / confusion.sum(dim=1)
    return Mistakes(confusion, accuracy, *(x[wrong] for x in (images, target, predicted, probability)))


def finish(figure, name, folder):
    """Save a figure as `folder/name.png`, if there is a folder, and show it."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(folder) / f"{name}.png", dpi=110, facecolor="white")
    plt.show()


def show_digits(images, captions, title):
    """A figure of up to 20 images `(N, 1, 28, 28)` or `(N, 28, 28)`, dark on light, captioned."""
    figure, axes = plt.subplots(2, 10, figsize=(10, 2.9), layout="constrained")
    figure.suptitle(title)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions):
        axis.imshow(image.squeeze().numpy(), cmap="gray_r")
        axis.set_title(caption, fontsize=9)
    return figure


def plot_samples(dataset, folder=None):
    """The first 20 images of a data set with their labels."""
    figure = show_digits(
        dataset.data[:20], dataset.targets[:20].tolist(), f"{dataset.title}: images and labels"
    )
    finish(figure, "samples", folder)


def plot_history(history, title, folder=None):
    """Loss, accuracy and learning rate by epoch, train and test, the best test epoch marked.

    Of a run of more than two epochs the axes show the second and later; the first may lie outside.
    """
    epochs = range(1, len(history.test_acc) + 1)
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    figure.suptitle(title)
    for axis, name, trained, tested in (
        (loss, "loss", history.train_losses, history.test_losses),
        (accuracy, "accuracy (%)", history.train_acc, history.test_acc),
    ):
        axis.plot(epochs, trained, "--o", color=TRAIN_COLOUR, markersize=3, label="train")
        axis.plot(epochs, tested, "-o", color=TEST_COLOUR, markersize=3, label="test")
        axis.set(xlabel="epoch", ylabel=name)
    if history.test_acc:
        best = max(history.test_acc)
        epoch = history.test_acc.index(best) + 1
        accuracy.plot(
            epoch, best, "*", color="black", markersize=11, label=f"best: {best:.2f}, epoch {epoch}"
        )
    if len(epochs) > 2:  # the first epoch, far from the rest, would press them together
        loss.set_ylim(0, 1.1 * max(history.train_losses[1:] + history.test_losses[1:]))
        accuracy.set_ylim(min(history.train_acc[1:] + history.test_acc[1:]) - 0.3, 100)
    rate.plot(epochs, history.learning_rates, "-o", color="black", markersize=3)
    rate.set(xlabel="epoch", ylabel="learning rate at the start", ylim=(0, None))
    for axis in (loss, accuracy, rate):
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    loss.legend()
    accuracy.legend()
    finish(figure, "curves", folder)


def plot_mistakes(mistakes, title, folder=None):
    """The 20 most confident mistakes: true digit → predicted digit, and its probability."""
    rows = zip(mistakes.target.tolist(), mistakes.predicted.tolist(), mistakes.probability.tolist())
    captions = [f"{target}→{predicted}  {probability:.0%}" for target, predicted, probability in rows]
    title = f"{title}: {len(mistakes.target)} mistakes, the most confident (true→predicted)"
    finish(show_digits(mistakes.images, captions, title), "mistakes", folder)


def plot_confusion(mistakes, title, folder=None):
    """Counts by true and predicted digit, coloured by the mistakes, with per-digit accuracy."""
    figure, axis = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    wrong = mistakes.confusion.clone().fill_diagonal_(0)
    axis.imshow(wrong.numpy(), cmap="Oranges", vmax=max(2 * wrong.max().item(), 1))
    for true in range(10):
        for predicted in range(10):
            count = mistakes.confusion[true, predicted].item()
            weight = "bold" if true == predicted else "normal"
            axis.text(predicted, true, count or "·", ha="center", va="center", weight=weight, fontsize=9)
    labels = [f"{digit}  ({accuracy:.1f} %)" for digit, accuracy in enumerate(mistakes.accuracy.tolist())]
    axis.set_yticks(range(10), labels)
    axis.set_xticks(range(10))
    axis.set(title=title, xlabel="predicted digit", ylabel="true digit (accuracy)")
    finish(figure, "confusion", folder)


def plot_prediction(image, probabilities, folder=None):
    """A picture, what the network gets of it, and the ten probabilities."""
    picture = image if isinstance(image, Image.Image) else Image.open(image)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    left.imshow(picture.convert("RGBA"))
    left.set(title="the picture", xticks=[], yticks=[])
    middle.imshow(prepare_digit(image).squeeze().numpy(), cmap="gray_r")
    middle.set(title="what the network gets", xticks=[], yticks=[])
    best = probabilities.argmax().item()
    right.bar(
        range(10),
        probabilities.tolist(),
        color=[TEST_COLOUR if d == best else "lightgray" for d in range(10)],
    )
    right.set(title=f"prediction: {best} ({probabilities[best]:.1%})", xticks=range(10), ylim=(0, 1.05))
    right.set(xlabel="digit", ylabel="probability")
    finish(figure, "prediction", folder)


def result_line(history, title):
    """The outcome of a run in one line: last, worst of the last five and best test accuracy."""
    accuracy = history.test_acc
    if not accuracy:
        return f"{title}: no whole epoch"
    best = max(accuracy)
    return (
        f"{title}: test {accuracy[-1]:.2f} % after epoch {len(accuracy)}, worst of the last five"
        f" {min(accuracy[-5:]):.2f} %, best {best:.2f} % (epoch {accuracy.index(best) + 1})"
    )

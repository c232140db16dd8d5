"""The search for Model4 and Model5, on a validation split of the training set alone.

    python benchmarks/search.py            train every configuration below that search.csv lacks

Trains on 50,000 images of a fixed permutation of MNIST's training set and validates on the last
10,000; the test images are not used. Every configuration tried stands below, in the order tried,
as what it changes of BASE; `search.csv` has its validation accuracy for every epoch.

`layers` is read left to right: a number is a 3×3 convolution of that width with BatchNorm and the
activation after it, `d24` the same made of a depthwise and a 1×1 convolution, `D24` with BatchNorm
between the two, `V24` with BatchNorm and activation between them, `X24` with BatchNorm between them
and a depthwise 5×5; `w5` is a depthwise 5×5 alone, `c8` adds 8 channels to those it was given, `r` is the
convolution before it once more, with the same weights and a BatchNorm of its own. `14s` is padded, `14k`
adds its input before the activation, `14e` has its channels weighted by squeeze and excitation. `P` is a
max pool, `O` one whose windows overlap, `B` one with a blur before the stride; global average pooling,
with `M` the maximum beside it, and a 1×1 convolution to ten logits follow.

The four rows of `search.csv` with `floor` came from a loop that was not kept: the rate rose to 0.1 in
1.5 epochs, fell on a cosine to 0.03 at epoch 8 and stayed there, momentum 0.9 throughout.
"""

import csv
import json
from pathlib import Path
import re
import statistics
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn
import torch.nn.functional as F

from model import Network, conv
import utils

CSV = ROOT / "benchmarks" / "search.csv"
COLUMNS = (
    "changes seed parameters mean_last_five worst_last_five last loss_last_three train_acc"
    " val_acc_by_epoch seconds device threads torch"
).split()
BASE = dict(
    layers="6 10 10 P 14 14 16",
    activation="ReLU",
    batch=128,
    lr=0.1,
    weight_decay=0.0,
    scheduler="OneCycleLR",
    pct_start=0.2,
    step_size=4,
    gamma=0.2,  # also what ReduceLROnPlateau multiplies by, after every epoch no better than the best
    degrees=10,
    shift=0.06,
    scale=0.06,
    average=0.99,
    memory="contiguous_format",
    epochs=15,
    plain=0,  # epochs at the end without augmentation
    smoothing=0.0,  # of the labels
    shear=0,  # degrees
    elastic=0,  # pixels: a smooth random displacement, after Simard et al. (2003)
    interpolation="bilinear",
)
AFFINE = utils.random_affine  # `run` puts `distort` in its place where more is asked for
LAST = dict(memory="channels_last")
DECAY = dict(weight_decay=0.0005)
SEPARABLE = dict(layers="16 D16 D24 P D32 D36 D36 D36")
CHOSEN = {**DECAY, **LAST, "plain": 5, **SEPARABLE}  # what Model4 is
STEP = dict(scheduler="StepLR")
EIGHT = dict(epochs=8, plain=2)
SMALL = dict(weight_decay=0.0005, layers="6 8 8 P 10 10 14", degrees=7, shift=0.05, scale=0.05)
TRIED = [
    {"layers": "4 8 8 P 11 11 12", **LAST},
    {**LAST},
    {"batch": 64, "lr": 0.05, **LAST},
    {"activation": "SiLU", **LAST},
    {"layers": "4 8 8 P 11 11 12", "activation": "SiLU", **LAST},
    {"layers": "8 8 10 P 14 16 16", **LAST},
    {"layers": "8 8 8 P 16 16 16", **LAST},
    {"lr": 0.2, **LAST},
    {"layers": "8 8 10 P 12 12 12 14", **LAST},
    {"layers": "6 10 10 P 14s 14s 16s", **LAST},
    {"layers": "8 d16 d24 P d32 d36 d36 d36"},
    {"layers": "8 8 P 16 16 16"},
    {"weight_decay": 0.0005},
    {"degrees": 7, "shift": 0.05, "scale": 0.05, "average": 0.995},
    {"layers": "6 8 8 P 10 10 14", "weight_decay": 0.0005, "degrees": 7, "shift": 0.05, "scale": 0.05},
    {"weight_decay": 0.0005, "degrees": 12, "shift": 0.08, "scale": 0.1},
    {"layers": "8 10 10 P 14 16 16", "weight_decay": 0.0005},
    {"weight_decay": 0.001},
    {"layers": "6 10 10 P 14 14 14 w5", "weight_decay": 0.0005},
    {"layers": "6 8 8 P 10 10 14"},
    {"weight_decay": 0.0002},
    {"weight_decay": 0.0002, "layers": "8 10 10 P 14 14 16"},
    {"weight_decay": 0.0002, "batch": 64, "lr": 0.07},
    {"weight_decay": 0.0005, "plain": 1, "seeds": [2, 3]},
    {"weight_decay": 0.0005, "smoothing": 0.1, "plain": 1, "seeds": [2]},
    {"weight_decay": 0.0005, "plain": 6, "seeds": [2, 3]},
    {"weight_decay": 0.0005, "epochs": 8, "plain": 1, "seeds": [2]},
    {"weight_decay": 0.0005, "layers": "6 10 10 P 14e 14e 16e", "epochs": 8, "plain": 1, "seeds": [2]},
    {"weight_decay": 0.0005, "layers": "6 c6 c8 P 14 c8 c10", "epochs": 8, "plain": 1, "seeds": [2]},
    {"weight_decay": 0.0005, "layers": "8 12 12 P 14 14 16", "epochs": 8, "plain": 1, "seeds": [2]},
    {"weight_decay": 0.0005, "interpolation": "bicubic", "epochs": 8, "plain": 1, "seeds": [2]},
    {"weight_decay": 0.0005, "epochs": 8, "plain": 3, "seeds": [2]},
    {"weight_decay": 0.0005, "elastic": 0.7, "epochs": 8, "plain": 3, "seeds": [2]},
    {
        "weight_decay": 0.0005,
        "degrees": 15,
        "shift": 0.08,
        "scale": 0.1,
        "shear": 10,
        "epochs": 8,
        "plain": 3,
        "seeds": [2],
    },
    {"weight_decay": 0.0005, "layers": "6 10 10 O 14 14 16", "epochs": 8, "plain": 3, "seeds": [2]},
    {"weight_decay": 0.0005, "elastic": 0.7, "plain": 5, "seeds": [2]},
    {"weight_decay": 0.0005, "elastic": 0.7, "layers": "8 12 12 P 14 14 16", "plain": 5, "seeds": [2]},
    {"weight_decay": 0.0005, "elastic": 0.7, "plain": 2, "seeds": [2]},
    {"weight_decay": 0.0005, "elastic": 0.7, "layers": "8 14 P 16 16 14", "plain": 5, "seeds": [2]},
    {"weight_decay": 0.0005, "elastic": 0.7, "plain": 6, "seeds": [1]},
    {**SMALL, "plain": 1, "seeds": [2]},
    {**SMALL, "plain": 6, "seeds": [2]},
    {**SMALL, "layers": "7 11 P 11 11 11", "plain": 5, "seeds": [2]},
    {**SMALL, "batch": 64, "lr": 0.07, "plain": 5, "seeds": [2]},
    {**SMALL, "layers": "6 8 8 8 P 11 14", "plain": 5, "seeds": [2]},
    {**SMALL, "plain": 5},
    {**SMALL, **STEP, "plain": 5, "seeds": [2]},
    {**DECAY, **EIGHT, "seeds": [2]},
    {**DECAY, **EIGHT, "layers": "16 16 r P 16 16 r", "seeds": [2]},
    {**DECAY, **EIGHT, "activation": "CELU0.3", "seeds": [2]},
    {**DECAY, **EIGHT, **SEPARABLE, "seeds": [2]},
    {**DECAY, **EIGHT, "layers": "8 8 8 P 16 16 16 M", "seeds": [2]},
    {**DECAY, **EIGHT, "layers": "14 14 r P 18 18 r", "seeds": [2]},
    {**DECAY, **EIGHT, "layers": "12 12 r r P 18 18 r r", "seeds": [2]},
    {**DECAY, **EIGHT, "layers": "8 12 12k P 14 14k 16", "seeds": [2]},
    {**DECAY, **EIGHT, "activation": "GELU", "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, **SEPARABLE, "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, "layers": "16 D24 P D32 D32k D32k D32k", "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, "layers": "8 D16 D24 P D32 D36 D36 D36", "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, "layers": "16 D16k D24 P D32 D32k D32k D36", "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, "layers": "10 14 P D32 D40 D44", "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, "layers": "16 D16k D24 P D32 D32k D32k D36", "lr": 0.2, "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, "layers": "16 V16k V24 P V32 V32k V32k V36", "seeds": [2]},
    {"weight_decay": 0.0002, **LAST, **EIGHT, "layers": "16 D16k D24 P D32 D32k D32k D36", "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, "layers": "16 D16k D24 B D32 D32k D32k D36", "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, "layers": "16 D16k D24 P X32 X48", "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, "layers": "16 D16k D16k D24 P D32 D32k D32k", "seeds": [2]},
    {**DECAY, **LAST, "plain": 3, "layers": "16 D16k D24 P D32 D32k D32k D36", "seeds": [1, 2]},
    {
        **DECAY,
        **LAST,
        "plain": 3,
        "layers": "16 D16k D24 P D32 D32k D32k D36",
        "degrees": 12,
        "shift": 0.08,
        "scale": 0.1,
        "elastic": 0.7,
    },
    {**DECAY, **LAST, **EIGHT, "layers": "16 D16k D16k D24 P D32 D32k D32k D32k", "seeds": [2]},
    {**DECAY, **LAST, **EIGHT, "layers": "24 D24k D24 P D32 D32k D32k D32k", "seeds": [2]},
    {**DECAY, **LAST, "plain": 3, **SEPARABLE},
    {**DECAY, **LAST, "plain": 3, "layers": "12 D12k D16 P D24 D24k D24k D24k"},
    {**DECAY, **LAST, "plain": 3, "layers": "16 D16k D32 P D32k D32k D32k D40"},
    {
        **DECAY,
        **LAST,
        "plain": 5,
        "layers": "14 D14 D16 P D24 D24 D24 D20",
        "degrees": 7,
        "shift": 0.05,
        "scale": 0.05,
    },
    {**DECAY, "plain": 8, "layers": "6 8 8 P 10 10 14", "degrees": 7, "shift": 0.05, "scale": 0.05},
    {**DECAY, **LAST, "plain": 3, **SEPARABLE, "batch": 64, "lr": 0.07},
    {**DECAY, **LAST, "plain": 3, **SEPARABLE, "degrees": 12, "shift": 0.08, "scale": 0.1},
    {**DECAY, **LAST, "plain": 5, "layers": "14 D14 D16 P D24 D24 D24 D20"},
    {**DECAY, **LAST, **SEPARABLE},
    {**CHOSEN, "batch": 64, "lr": 0.07, "average": 0.998, "seeds": [1, 2]},
    {**CHOSEN, "batch": 64, "lr": 0.07, "average": 0.998, **STEP, "seeds": [2]},
    {**CHOSEN, **STEP},
    {**CHOSEN, "seeds": [1, 2, 3]},
    {**CHOSEN, **STEP, "step_size": 3, "gamma": 0.4, "seeds": [1, 2, 3]},
    {**CHOSEN, **STEP, "step_size": 5, "seeds": [1, 2, 3]},
    {**CHOSEN, **STEP, "step_size": 1, "gamma": 0.7, "seeds": [1, 2, 3]},
    {**CHOSEN, "scheduler": "ReduceLROnPlateau", "gamma": 0.3},
    {**CHOSEN, **STEP, "step_size": 1, "gamma": 0.75, "seeds": [1, 2, 3]},
    {**CHOSEN, **STEP, "step_size": 1, "gamma": 0.8, "seeds": [1, 2, 3]},
]


class Excite(nn.Module):
    """Squeeze and excitation (Hu et al., 2018) through four channels."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv(width, 4), nn.ReLU(), nn.Conv2d(4, width, 1), nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.weight(x)


class Dense(nn.Module):
    """The input, cropped as a valid 3×3 convolution does, and the block's channels behind it."""

    def __init__(self, *block):
        super().__init__()
        self.block = nn.Sequential(*block)

    def forward(self, x):
        return torch.cat([x[:, :, 1:-1, 1:-1], self.block(x)], 1)


class Skip(nn.Module):
    """A block's channels plus its input, cropped as a valid 3×3 convolution does."""

    def __init__(self, *block):
        super().__init__()
        self.block = nn.Sequential(*block)

    def forward(self, x):
        return x[:, :, 1:-1, 1:-1] + self.block(x)


class BlurPool(nn.Module):
    """A max pool of stride 1, then every second pixel of its blur by (1 2 1)/4 (Zhang, 2019)."""

    def forward(self, x):
        line = torch.tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.max_pool2d(x, 2, 1), kernel, stride=2, padding=1, groups=x.shape[1])


class MeanAndMax(nn.Module):
    """The mean and the maximum of every channel, one behind the other."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)], 1)


POOLS = {"P": lambda: nn.MaxPool2d(2), "O": lambda: nn.MaxPool2d(3, 2, 1), "B": BlurPool}


class Candidate(Network):
    """A network made from a description of its layers.

    In training the logarithms are mixed with their mean, so that the loss of `fit` becomes the
    one with smoothed labels.
    """

    def __init__(self, layers, activation, smoothing):
        super().__init__()
        make_activation = {
            "CELU0.3": lambda: nn.CELU(0.3),
            "ReLU": lambda: nn.ReLU(inplace=True),
        }.get(activation) or getattr(nn, activation)
        width, blocks, words = 1, [], layers.split()
        to_max = words[-1] == "M"
        for word in words[: len(words) - to_max]:
            if word in POOLS:
                blocks.append(POOLS[word]())
                continue
            kind, number, options = re.fullmatch(r"([a-zA-Z]?)(\d*)([sek]*)", word).groups()
            out, padding = int(number or width), int("s" in options)
            if kind == "w":
                convolution = [nn.Conv2d(width, width, out, groups=width, bias=False)]
                out = width
            elif kind in ("d", "D", "V", "X"):
                size = 5 if kind == "X" else 3
                convolution = [nn.Conv2d(width, width, size, padding=padding, groups=width, bias=False)]
                convolution += [nn.BatchNorm2d(width)] * (kind != "d")
                convolution += [make_activation()] * (kind == "V")
                convolution += [nn.Conv2d(width, out, 1, bias=False)]
            elif kind != "r":
                convolution = [nn.Conv2d(width, out, 3, padding=padding, bias=False)]
            block = [*convolution, nn.BatchNorm2d(out)]
            if "k" in options:
                block = [Skip(*block)]
            block.append(make_activation())
            if "e" in options:
                block.append(Excite(out))
            if kind == "c":
                block, out = [Dense(*block)], width + out
            blocks += block
            width = out
        self.blocks = nn.Sequential(*blocks)
        self.gap = MeanAndMax() if to_max else nn.AdaptiveAvgPool2d(1)
        self.logits = conv(width * (1 + to_max), 10)
        self.smoothing = smoothing

    def forward(self, x):
        output = super().forward(x)
        if self.training and self.smoothing:
            output = (1 - self.smoothing) * output + self.smoothing * output.mean(1, keepdim=True)
        return output


def distort(data, degrees, shift, scale, shear, elastic, interpolation):
    """`utils.random_affine` with shear, a smooth displacement and another interpolation."""
    count, fill = len(data), -utils.MEAN / utils.STD
    draw = torch.rand(5, count) * 2 - 1
    angle, size = (draw[0] * degrees).deg2rad(), 1 + draw[3] * scale
    cos, sin, slant = angle.cos() / size, angle.sin() / size, (draw[4] * shear).deg2rad().tan()
    turn = torch.stack([torch.stack([cos, sin + slant], 1), torch.stack([-sin, cos], 1)], 1)
    theta = torch.cat([turn, -2 * turn @ (draw[1:3].T * shift).unsqueeze(2)], 2)
    grid = F.affine_grid(theta, data.shape, align_corners=False)
    points = torch.randn(count, 2, 6, 6) * elastic * 2 / 28
    grid = grid + F.interpolate(points, size=28, mode="bicubic").permute(0, 2, 3, 1)
    return F.grid_sample(data - fill, grid, mode=interpolation, align_corners=False) + fill


def split(train_set):
    """The fixed split: 50,000 images to train on and 10,000 to validate on."""
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    parts = []
    for index in (order[:50_000], order[50_000:]):
        part = utils.MNIST.__new__(utils.MNIST)
        part.data, part.targets = train_set.data[index], train_set.targets[index]
        parts.append(part)
    return parts


def run(changes, seed, parts):
    """Train one configuration; returns its row."""
    settings = {**BASE, **changes}
    epochs = settings["epochs"]
    details = {
        "OneCycleLR": {"pct_start": settings["pct_start"]},
        "StepLR": {name: settings[name] for name in ("step_size", "gamma")},
        "ReduceLROnPlateau": {"factor": settings["gamma"], "patience": 0},
    }
    recipe = dict(
        optimizer=dict(lr=settings["lr"], momentum=0.9, nesterov=True, weight_decay=settings["weight_decay"]),
        scheduler=(settings["scheduler"], details[settings["scheduler"]]),
        augment={name: settings[name] for name in ("degrees", "shift", "scale")},
    )
    extra = {name: settings[name] for name in ("shear", "elastic", "interpolation")}
    utils.random_affine = AFFINE
    if extra != {name: BASE[name] for name in extra}:
        recipe["augment"] |= extra
        utils.random_affine = distort
    torch.manual_seed(seed)
    model = Candidate(settings["layers"], settings["activation"], settings["smoothing"])
    model = model.to(memory_format=getattr(torch, settings["memory"]))
    loaders = utils.make_loaders(*parts, recipe, "cpu", settings["batch"])
    optimizer, scheduler = utils.make_optimizer(model, recipe, epochs, len(loaders[0]))
    options = dict(average=settings["average"], plain=settings["plain"])
    history = utils.fit(model, "cpu", *loaders, optimizer, scheduler, epochs, seed, **options)
    five = history.test_acc[-5:]
    return dict(
        changes=json.dumps(changes),
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        mean_last_five=round(statistics.mean(five), 3),
        worst_last_five=min(five),
        last=five[-1],
        loss_last_three=round(statistics.mean(history.test_losses[-3:]), 5),
        train_acc=round(history.train_acc[-1], 2),
        val_acc_by_epoch=" ".join(f"{a:.2f}" for a in history.test_acc),
        seconds=round(statistics.median(history.seconds), 1),
        device="CPU",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def main():
    rows = list(csv.DictReader(open(CSV, newline=""))) if CSV.exists() else []
    done = {(row["changes"], int(row["seed"])) for row in rows}
    train_set, _ = utils.load_data(standin=False)
    parts = split(train_set)
    for changes in TRIED:
        changes = dict(changes)
        for seed in changes.pop("seeds", [1]):
            if (json.dumps(changes), seed) in done:
                continue
            print(f"\n{changes}, seed {seed}")
            row = run(changes, seed, parts)
            with open(CSV, "a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()

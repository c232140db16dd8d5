"""The search for Model4 and Model5, on a validation split of the training set alone.

    python benchmarks/search.py            train every configuration below that search.csv lacks

Trains on 50,000 images of a fixed permutation of MNIST's training set and validates on the last
10,000; the test images are not used. Every configuration tried stands below, in the order tried,
as what it changes of BASE; `search.csv` has its validation accuracy for every epoch.

`layers` is read left to right: a number is a 3×3 convolution of that width with BatchNorm and the
activation after it, `d24` the same made of a depthwise and a 1×1 convolution, `14s` is padded, `w5`
is a depthwise 5×5 convolution, `P` a max pool; global average pooling and a 1×1 convolution to ten
logits follow.
"""

import csv
import json
from pathlib import Path
import statistics
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

from model import Network, conv
import utils

CSV = ROOT / "benchmarks" / "search.csv"
COLUMNS = (
    "changes seed parameters mean_last_five worst_last_five last train_acc val_acc_by_epoch seconds"
    " device threads torch"
).split()
EPOCHS = 15
BASE = dict(
    layers="6 10 10 P 14 14 16",
    activation="ReLU",
    batch=128,
    lr=0.1,
    weight_decay=0.0,
    pct_start=0.2,
    degrees=10,
    shift=0.06,
    scale=0.06,
    average=0.99,
    memory="contiguous_format",
)
LAST = dict(memory="channels_last")  # given up: on a CPU, BatchNorm is inexact in this order
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
]


class Candidate(Network):
    """A network made from a description of its layers."""

    def __init__(self, layers, activation):
        super().__init__()
        width, blocks = 1, []
        for word in layers.split():
            if word == "P":
                blocks.append(nn.MaxPool2d(2))
                continue
            padding, out = int(word.endswith("s")), int(word.strip("dsw"))
            if word.startswith("w"):
                blocks.append(nn.Conv2d(width, width, out, groups=width, bias=False))
                out = width
            elif word.startswith("d"):
                blocks.append(nn.Conv2d(width, width, 3, padding=padding, groups=width, bias=False))
                blocks.append(nn.Conv2d(width, out, 1, bias=False))
            else:
                blocks.append(nn.Conv2d(width, out, 3, padding=padding, bias=False))
            blocks += [nn.BatchNorm2d(out), getattr(nn, activation)()]
            width = out
        self.blocks = nn.Sequential(*blocks)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.logits = conv(width, 10)


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
    recipe = dict(
        optimizer=dict(lr=settings["lr"], momentum=0.9, nesterov=True, weight_decay=settings["weight_decay"]),
        scheduler=("OneCycleLR", dict(pct_start=settings["pct_start"])),
        augment={name: settings[name] for name in ("degrees", "shift", "scale")},
    )
    torch.manual_seed(seed)
    model = Candidate(settings["layers"], settings["activation"])
    model = model.to(memory_format=getattr(torch, settings["memory"]))
    loaders = utils.make_loaders(*parts, recipe, "cpu", settings["batch"])
    optimizer, scheduler = utils.make_optimizer(model, recipe, EPOCHS, len(loaders[0]))
    history = utils.fit(
        model, "cpu", *loaders, optimizer, scheduler, EPOCHS, seed, average=settings["average"]
    )
    five = history.test_acc[-5:]
    return dict(
        changes=json.dumps(changes),
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        mean_last_five=round(statistics.mean(five), 3),
        worst_last_five=min(five),
        last=five[-1],
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

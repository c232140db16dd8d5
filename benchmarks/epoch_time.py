"""Seconds per training epoch: a DataLoader, this repository, and compute only (the lower bound).

    python benchmarks/epoch_time.py             five rounds of Models 3 and 4, added to epoch_time.csv
    python benchmarks/epoch_time.py --busy      the same beside a busy process, without compute only

README.md in this folder describes the variants. A round measures the variants of a model one after another,
in random order, and adds a row for each to the file. One more round, before the others, is not recorded, so
that one-time costs are not included. Rounds of several calls with one processor, number of threads
and trim threshold are evaluated together. Nothing else should run on the machine. The environment variable
OMP_NUM_THREADS can be set, and MALLOC_TRIM_THRESHOLD_ together with MALLOC_MMAP_THRESHOLD_ (see README.md).
"""

import argparse
import atexit
import contextlib
import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from tqdm import tqdm

import utils
from model import create_model
from runs import ROOT, describe_machine

CSV = ROOT / "benchmarks" / "epoch_time.csv"
MEASURED = ("Model3", "Model4")
ROUNDS = 5
REPOSITORY = "this repository"
COMPUTE_ONLY = "compute only"
WORKERS = {"DataLoader": 0, "DataLoader, 4 workers": 4}  # processes of each baseline with a DataLoader
BASELINES = [*WORKERS, COMPUTE_ONLY]


def create_loader(variant, recipe, train_set, device):
    """Return the batches of a variant, with the recipe's augmentation unless it is compute only.

    A DataLoader reads torchvision's MNIST, as most MNIST examples do.
    """
    if variant == COMPUTE_ONLY:
        return list(utils.BatchLoader(train_set, recipe.batch_size, device))
    if variant == REPOSITORY:
        return utils.BatchLoader(
            train_set, recipe.batch_size, device, shuffle=True, augmentation=recipe.augmentation
        )
    steps = [transforms.ToTensor(), transforms.Normalize((utils.MEAN,), (utils.STD,))]
    if recipe.augmentation is not None:
        amounts = recipe.augmentation.keywords
        shift = amounts["shift"]
        scale = amounts["scale"]
        steps.insert(0, transforms.RandomAffine(amounts["degrees"], (shift, shift), (1 - scale, 1 + scale)))
    root = Path(os.environ.get("MNIST_ROOT") or "./data").expanduser()
    dataset = datasets.MNIST(root, transform=transforms.Compose(steps))
    return DataLoader(
        dataset, recipe.batch_size, shuffle=True, num_workers=WORKERS[variant], pin_memory=device == "cuda"
    )


def train_compute_only(model, batches, optimizer):
    """Run the compute of one training epoch, without data loading and bookkeeping."""
    model.train()
    for data, target in batches:
        optimizer.zero_grad()
        F.nll_loss(model(data), target).backward()
        optimizer.step()


def measure(name, variant, train_set, device):
    """Return the seconds of one epoch of a model with new weights.

    The loader is created before. The progress bar is enabled, but its output is discarded.
    """
    recipe = utils.RECIPES[name]
    loader = create_loader(variant, recipe, train_set, device)
    torch.manual_seed(1)
    model = create_model(name).to(device)
    optimizer = torch.optim.SGD(model.parameters(), **recipe.sgd)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        if variant == COMPUTE_ONLY:
            train_compute_only(model, loader, optimizer)
        else:
            utils.train(model, device, loader, optimizer, F.nll_loss)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--busy", action="store_true", help="measure beside one busy process")
    args = parser.parse_args()
    device = utils.choose_device()
    train_set, _ = utils.load_data(standin=False)
    variants = [REPOSITORY, *BASELINES]
    if device == "cpu":
        variants.remove("DataLoader, 4 workers")
    if args.busy:
        # In a session of its own, like a program started elsewhere: Linux shares the CPUs between sessions
        process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
        atexit.register(process.kill)
        variants.remove(COMPUTE_ONLY)
    for number in tqdm(range(ROUNDS + 1), desc="rounds"):
        random.shuffle(variants)
        for name in MEASURED:
            rows = []
            for variant in variants:
                row = {
                    "model": name,
                    "busy": int(args.busy),
                    "variant": variant,
                    "images": len(train_set),
                    "spincount": os.environ.get("GOMP_SPINCOUNT", ""),
                    "trim_threshold": os.environ.get("MALLOC_TRIM_THRESHOLD_", ""),
                    "seconds": f"{measure(name, variant, train_set, device):.3f}",
                }
                rows.append(row | describe_machine(device))
            if number > 0:
                common.append_rows(rows, CSV)


if __name__ == "__main__":
    main()

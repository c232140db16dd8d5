"""Seconds an epoch: the usual loop, this repository's, and the floor below which neither can go.

    python benchmarks/epoch_time.py --model Model3          the table, kept in epoch_time.csv
    python benchmarks/epoch_time.py --model Model3 --quick  on a tenth of the data, not kept

A. torchvision's MNIST with per-image transforms in a DataLoader, read by `utils.train`;
B. this repository's loader; also on a tenth of the data, in PyTorch's usual memory order where the
   model has another, and, in a process of its own, without `keep_freed_memory`;
C. the floor: forward, loss, backward and optimizer step over batches cut beforehand.
The same for a pass over the test set; in another order each round. Run nothing beside it.
"""

import argparse
import contextlib
import copy
import io
import multiprocessing
import random
import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from accuracy import append_rows, read_rows, ROOT, where
from model import MODELS, create_model
import utils

CSV = ROOT / "benchmarks" / "epoch_time.csv"
USUAL, FLOOR, BATCH = "A usual, 0 workers", "C floor", 128


def usual_loader(dataset, augment, workers, device, shuffle):
    """The DataLoader that most MNIST code has."""
    steps = [transforms.ToTensor(), transforms.Normalize((utils.MEAN,), (utils.STD,))]
    if augment:
        shift, scale = augment["shift"], augment["scale"]
        steps.insert(0, transforms.RandomAffine(augment["degrees"], (shift, shift), (1 - scale, 1 + scale)))
    dataset.transform = transforms.Compose(steps)
    return DataLoader(dataset, BATCH, shuffle=shuffle, num_workers=workers, pin_memory=device == "cuda")


def tenth(dataset):
    """The first tenth of a data set."""
    part = copy.copy(dataset)
    part.data, part.targets = dataset.data[: len(dataset) // 10], dataset.targets[: len(dataset) // 10]
    return part


def floor(model, device, batches, optimizer, criterion):
    """The arithmetic of an epoch and nothing else."""
    model.train()
    for data, target in batches:
        optimizer.zero_grad()
        criterion(model(data), target).backward()
        optimizer.step()


@torch.no_grad()
def test_floor(model, device, batches, optimizer, criterion):
    """The arithmetic of a test pass and nothing else."""
    model.eval()
    for data, target in batches:
        criterion(model(data), target, reduction="sum")


def measure(function, loader, name, device, **order):
    """Seconds of one pass with a fresh network; the progress bar is on, its text thrown away."""
    torch.manual_seed(1)
    model = create_model(name).to(device, **order)
    optimizer = torch.optim.SGD(model.parameters(), **utils.RECIPES[name]["optimizer"])
    with contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        function(model, device, loader, optimizer, F.nll_loss)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def measure_unkept(name, device, quick):
    """Our training pass in a process that has not called `keep_freed_memory`."""
    train_set = tenth(utils.load_data(standin=False)[0]) if quick else utils.load_data(standin=False)[0]
    loader = utils.BatchLoader(train_set, BATCH, device, True, utils.RECIPES[name]["augment"])
    return measure(utils.train, loader, name, device)


def variants(name, device, train_set, test_set, quick):
    """`(pass, variant)` → a function that returns the seconds of one pass."""
    augment = utils.RECIPES[name]["augment"]
    ours, part = (utils.BatchLoader(s, BATCH, device, True, augment) for s in (train_set, tenth(train_set)))
    ours_test = utils.BatchLoader(test_set, BATCH, device)
    cut, cut_test = (list(zip(x.data.split(BATCH), x.target.split(BATCH))) for x in (ours, ours_test))
    our_test = lambda model, device, loader, _, criterion: utils.test(model, device, loader, criterion)
    passes = {
        ("train", "B ours"): (utils.train, ours),
        ("train", "B ours, a tenth of the data"): (utils.train, part),
        ("train", FLOOR): (floor, cut),
        ("test", "B ours"): (our_test, ours_test),
        ("test", FLOOR): (test_floor, cut_test),
    }
    for count in (0, 4 if device == "cuda" else 2):
        variant = f"A usual, {count} workers"
        passes["train", variant] = utils.train, usual_loader(train_set, augment, count, device, True)
        passes["test", variant] = our_test, usual_loader(test_set, None, count, device, False)
    timed = {key: lambda pair=pair: measure(*pair, name, device) for key, pair in passes.items()}
    order = dict(memory_format=torch.contiguous_format)
    if MODELS[name].memory_format not in order.values():
        pair = passes["train", "B ours"]
        timed["train", "B ours, usual memory order"] = lambda: measure(*pair, name, device, **order)
    if device == "cpu":
        apart = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
        task = measure_unkept, (name, device, quick)
        timed["train", "B ours, freed memory not kept"] = lambda: apart.apply(*task)
    return timed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="Model3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, nothing kept")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_set, test_set = utils.load_data(standin=False)
    if args.quick:
        train_set, test_set = tenth(train_set), tenth(test_set)
    timed = variants(args.model, device, train_set, test_set, args.quick)
    utils.keep_freed_memory()
    seconds = {key: [] for key in timed}
    for round_ in tqdm(range(args.rounds), desc="rounds"):
        for key in random.Random(round_).sample(list(timed), len(timed)):
            seconds[key].append(timed[key]())
    median = {key: statistics.median(times) for key, times in seconds.items()}
    rows = []
    for (phase, variant), times in sorted(seconds.items(), reverse=True):
        middle = median[phase, variant]
        numbers = dict(seconds=middle, fastest=min(times), slowest=max(times))
        numbers |= dict(to_usual=middle / median[phase, USUAL], to_floor=middle / median[phase, FLOOR])
        row = {"model": args.model, "pass": phase, "variant": variant, "batch": BATCH, "rounds": args.rounds}
        rows.append(row | {column: f"{number:.3f}" for column, number in numbers.items()} | where(device))
        print(" ".join(map(str, rows[-1].values())))
    if not args.quick:
        mine = args.model, where(device)["device"]
        kept = [row for row in read_rows(CSV) if (row["model"], row["device"]) != mine]
        append_rows(kept + rows, CSV, anew=True)


if __name__ == "__main__":
    main()

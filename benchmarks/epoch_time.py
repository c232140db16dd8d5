"""Seconds an epoch: the usual loop, this repository's, and the floor below which neither can go.

    python benchmarks/epoch_time.py --model Model3          the table, kept in epoch_time.csv
    python benchmarks/epoch_time.py --model Model3 --quick  on a tenth of the data, not kept

In one process, in turn, in another order each round, so that neither a change in the machine's
speed nor what ran before falls on one of them alone:
A. torchvision's MNIST with per-image transforms in a DataLoader (RandomAffine, too, where the
   model's recipe augments), read by `utils.train`;
B. this repository's loader, read by `utils.train`;
C. the floor: forward, loss, backward and optimizer step over batches cut beforehand.
The same for a pass over the test set. Needs real MNIST; run nothing beside it.
"""

import argparse
import contextlib
import csv
import io
from pathlib import Path
import random
import resource
import statistics
import sys
import time

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from model import MODELS, create_model
import utils

CSV = ROOT / "benchmarks" / "epoch_time.csv"
COLUMNS = (
    "model augment pass variant images batch seconds fastest slowest to_usual to_floor peak_mb device"
    " threads torch"
).split()


def usual_loader(dataset, augment, batch_size, workers, device, shuffle):
    """The DataLoader that most MNIST code has."""
    steps = [transforms.ToTensor(), transforms.Normalize((utils.MEAN,), (utils.STD,))]
    if augment:
        shift, scale = augment["shift"], augment["scale"]
        steps.insert(0, transforms.RandomAffine(augment["degrees"], (shift, shift), (1 - scale, 1 + scale)))
    dataset.transform = transforms.Compose(steps)
    return DataLoader(dataset, batch_size, shuffle=shuffle, num_workers=workers, pin_memory=device == "cuda")


def tenth(dataset):
    """The first tenth of a data set."""
    part = type(dataset).__new__(type(dataset))
    vars(part).update(vars(dataset))
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


def our_test(model, device, loader, optimizer, criterion):
    return utils.test(model, device, loader, criterion)


def variants(args, device, train_set, test_set, augment):
    """`(pass, variant, function, loader)` of everything that is timed."""
    workers = (0, 4) if device == "cuda" else (0, 2)
    recipe = utils.RECIPES[args.model]
    ours, our_test_loader = utils.make_loaders(train_set, test_set, recipe, device, args.batch)
    part, _ = utils.make_loaders(tenth(train_set), tenth(test_set), recipe, device, args.batch)
    for count in workers:
        name = f"A usual, {count} workers"
        yield "train", name, utils.train, usual_loader(train_set, augment, args.batch, count, device, True)
        yield "test", name, our_test, usual_loader(test_set, None, args.batch, count, device, False)
    yield "train", "B ours", utils.train, ours
    yield "test", "B ours", our_test, our_test_loader
    yield "train", "B ours, a tenth of the data", utils.train, part
    for phase, function, loader in (("train", floor, ours), ("test", test_floor, our_test_loader)):
        batches = zip(loader.data.split(loader.batch_size), loader.target.split(loader.batch_size))
        yield phase, "C floor", function, list(batches)


def measure(function, loader, name, device):
    """Seconds of one pass with a fresh network; the progress bar is on, its text thrown away."""
    torch.manual_seed(1)
    model = create_model(name).to(device)
    optimizer, _ = utils.make_optimizer(model, utils.RECIPES[name], 15, len(loader))
    with contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        function(model, device, loader, optimizer, F.nll_loss)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="Model3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, nothing kept")
    args = parser.parse_args()
    train_set, test_set = utils.load_data(standin=False)
    if args.quick:
        train_set, test_set = tenth(train_set), tenth(test_set)
    augment = utils.RECIPES[args.model].get("augment")
    timed = list(variants(args, args.device, train_set, test_set, augment))
    seconds = {(phase, variant): [] for phase, variant, *_ in timed}
    for round_ in tqdm(range(args.rounds), desc="rounds"):
        for phase, variant, function, loader in random.Random(round_).sample(timed, len(timed)):
            seconds[phase, variant].append(measure(function, loader, args.model, args.device))
    median = {key: statistics.median(times) for key, times in seconds.items()}
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    rows = []
    for (phase, variant), times in seconds.items():
        value = median[phase, variant]
        count = len(train_set if phase == "train" else test_set) // (10 if "tenth" in variant else 1)
        ratios = value / median[phase, "A usual, 0 workers"], value / median[phase, "C floor"]
        cells = (
            args.model,
            int(bool(augment)),
            phase,
            variant,
            count,
            args.batch,
            *(f"{x:.3f}" for x in (value, min(times), max(times), *ratios)),
        )
        rows.append(
            dict(zip(COLUMNS, map(str, (*cells, peak, hardware, torch.get_num_threads(), torch.__version__))))
        )
        print(f"{phase:<6}{variant:<30}{value:8.3f} s{ratios[0]:8.3f} of A{ratios[1]:8.3f} of C")
    print(
        f"peak memory of the process with all of them: {peak} MB; {hardware}, {torch.get_num_threads()} threads"
    )
    if not args.quick:
        key = "model device batch threads".split()
        same = [rows[0][name] for name in key]
        kept = list(csv.DictReader(open(CSV))) if CSV.exists() else []
        with open(CSV, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([row for row in kept if [row[name] for name in key] != same] + rows)


if __name__ == "__main__":
    main()

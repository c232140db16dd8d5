"""Accuracy of the models over several seeds, trained by the notebook's own code on real MNIST.

    python benchmarks/accuracy.py --models Model1 Model3 --seeds 1 2 3   train what is missing
    python benchmarks/accuracy.py --summary                              print the tables
    python benchmarks/accuracy.py --plot                                 draw images/ModelN.png

A finished run is appended to `accuracy.csv`, a row an epoch; a run cut off goes on from its
checkpoint. Several processes may work at once on different models or seeds.
"""

import argparse
import csv
import os
from pathlib import Path
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm

from model import create_model
import utils

CSV = ROOT / "benchmarks" / "accuracy.csv"
COLUMNS = (
    "model schedule seed epoch learning_rate train_loss train_acc test_loss test_acc seconds"
    " device threads torch"
).split()


def read_rows(path=CSV):
    """The recorded rows, as dictionaries of strings; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append_rows(rows, path=CSV):
    """Append a run's rows with one write, so that a process killed here leaves all or none."""
    path = Path(path)
    lines = [] if path.exists() else [",".join(COLUMNS)]
    lines += [",".join(str(row[column]) for column in COLUMNS) for row in rows]
    with open(path, "a") as file:
        file.write("\n".join(lines) + "\n")


def run(name, schedule, seed, epochs, data, device, checkpoint):
    """Train one model with one seed; returns its rows."""
    recipe = utils.RECIPES[name]
    if schedule == "constant":
        recipe = {**recipe, "scheduler": utils.CONSTANT}
    torch.manual_seed(seed)
    model = create_model(name).to(device)
    train_loader, test_loader = utils.make_loaders(*data, recipe, device)
    optimizer, scheduler = utils.make_optimizer(model, recipe, epochs, len(train_loader))
    history = utils.fit(
        model, device, train_loader, test_loader, optimizer, scheduler, epochs, seed,
        average=recipe.get("average"), checkpoint=checkpoint, resume=True,
    )
    hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    where = (hardware, torch.get_num_threads(), torch.__version__)
    h = history
    values = zip(h.learning_rates, h.train_losses, h.train_acc, h.test_losses, h.test_acc, h.seconds)
    return [
        dict(zip(COLUMNS, (name, schedule, seed, epoch, *map(lambda x: round(x, 6), row), *where)))
        for epoch, row in enumerate(values, 1)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=utils.RECIPES, default=list(utils.RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--schedules", nargs="+", choices=("constant", "described"), default=("constant", "described"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--csv", type=Path, default=CSV, help="where the rows go")
    args = parser.parse_args()
    done = {(row["model"], row["schedule"], int(row["seed"])) for row in read_rows(args.csv)}
    # Model3 under a constant rate is Model2 under a constant rate, so it is trained once
    todo = [
        (name, schedule, seed)
        for seed in args.seeds for name in args.models for schedule in args.schedules
        if (name, schedule) != ("Model3", "constant") and (name, schedule, seed) not in done
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = utils.load_data(standin=False)
    folder = Path(os.environ.get("S7_CHECKPOINTS", "checkpoints"))
    for name, schedule, seed in tqdm(todo, desc="runs"):
        print(f"\n{name}, {schedule} schedule, seed {seed}")
        checkpoint = folder / f"accuracy-{name}-{schedule}-{seed}.pt"
        append_rows(run(name, schedule, seed, args.epochs, data, device, checkpoint), args.csv)


if __name__ == "__main__":
    main()

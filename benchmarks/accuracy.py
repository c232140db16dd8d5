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
import statistics
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from model import create_model, GapNetwork
import utils

CSV = ROOT / "benchmarks" / "accuracy.csv"
COLUMNS = (
    "model schedule seed epoch learning_rate train_loss train_acc test_loss test_acc seconds"
    " device threads torch"
).split()

PUBLISHED = {"Model1": (88.88, 98.53), "Model2": (99.50, 99.11), "Model3": (99.50, 99.28)}
SCHEDULE_TEXT = {
    "constant": "constant",
    "described": "schedule as described",
    "augmented": "as described, augmented to the end",
    "steplr": "StepLR",
}

# Models 4 and 5 before their convolutions were made separable.
FULL = {"Full4": ((6, 10, 10), (14, 14, 16)), "Full5": ((6, 8, 8), (10, 10, 14))}
# From Model2 to Model4, one change at a time, by model and schedule, and one step more.
_TWO, _FOUR = utils.RECIPES["Model2"], utils.RECIPES["Model4"]
_CYCLE = {**_TWO, "optimizer": {**_FOUR["optimizer"], "weight_decay": 0}, "scheduler": _FOUR["scheduler"]}
_AUGMENT = {**_CYCLE, "augment": _FOUR["augment"]}
_AVERAGE = {**_FOUR, "plain": 0}
_STEP = {**_FOUR, "scheduler": ("StepLR", dict(step_size=1, gamma=0.7))}
STEPS = {
    ("Full4", "network"): ("three convolutions, a pool, three more, trained as Model2", _TWO),
    ("Full4", "cycle"): ("Nesterov momentum, one cycle up to 0.1", _CYCLE),
    ("Full4", "augment"): ("augmentation", _AUGMENT),
    ("Full4", "decay"): ("weight decay 0.0005", {**_AUGMENT, "optimizer": _FOUR["optimizer"]}),
    ("Full4", "average"): ("average of the weights", _AVERAGE),
    ("Model4", "augmented"): ("separable convolutions, one more of them", _AVERAGE),
    ("Model4", "described"): ("no augmentation in the last five epochs: Model4", _FOUR),
    ("Model4", "steplr"): ("not taken: StepLR in place of one cycle", _STEP),
}
_SMALL = {**_FOUR, "augment": dict(degrees=7, shift=0.05, scale=0.05)}
RECIPES = {
    **{(name, "described"): recipe for name, recipe in utils.RECIPES.items()},
    **{
        (name, "constant"): {**utils.RECIPES[name], "scheduler": utils.CONSTANT}
        for name in ("Model1", "Model2")
    },
    **{key: recipe for key, (_, recipe) in STEPS.items()},
    ("Full4", "steplr"): {**_AVERAGE, "scheduler": ("StepLR", dict(step_size=4, gamma=0.2))},
    ("Full5", "described"): _SMALL,
    ("Full5", "augmented"): {**_SMALL, "plain": 0},
    ("Model5", "steplr"): _STEP,
}


def make_model(name):
    """A new network by name, one of `FULL` or of the assignment's."""
    return GapNetwork(*FULL[name]) if name in FULL else create_model(name)


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
    recipe = RECIPES[name, schedule]
    torch.manual_seed(seed)
    model = make_model(name).to(device)
    train_loader, test_loader = utils.make_loaders(*data, recipe, device)
    optimizer, scheduler = utils.make_optimizer(model, recipe, epochs, len(train_loader))
    history = utils.fit(
        model,
        device,
        train_loader,
        test_loader,
        optimizer,
        scheduler,
        epochs,
        seed,
        average=recipe.get("average"),
        plain=recipe.get("plain", 0),
        checkpoint=checkpoint,
        resume=True,
    )
    if len(history.test_acc) < epochs:
        sys.exit("stopped: the same command goes on from here")
    hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    where = (hardware, torch.get_num_threads(), torch.__version__)
    columns = ("learning_rates", "train_losses", "train_acc", "test_losses", "test_acc", "seconds")
    values = zip(*(getattr(history, column) for column in columns))
    return [
        dict(zip(COLUMNS, (name, schedule, seed, epoch, *(round(x, 6) for x in row), *where)))
        for epoch, row in enumerate(values, 1)
    ]


def recorded_runs(path=CSV):
    """`{(model, schedule): [run, …]}`, a run being its rows' numbers by column, epoch after epoch.

    Model3 under a constant rate is Model2 under a constant rate, so those runs stand under both.
    """
    runs = {}
    for row in read_rows(path):
        run = runs.setdefault((row["model"], row["schedule"]), {}).setdefault(row["seed"], {})
        for column in COLUMNS[4:10]:
            run.setdefault(column, []).append(float(row[column]))
    runs = {key: list(by_seed.values()) for key, by_seed in runs.items()}
    if ("Model2", "constant") in runs:
        runs["Model3", "constant"] = runs["Model2", "constant"]
    return runs


def figures(runs, column):
    """Best epoch, last epoch and worst of the last five, each over the runs."""
    values = [run[column] for run in runs]
    return [[pick(v) for v in values] for pick in (max, lambda v: v[-1], lambda v: min(v[-5:]))]


def spread(values):
    """Mean ± standard deviation (of the sample)."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def model_table(name, runs):
    """One model's accuracies by schedule, the published best epoch beside the best of ours."""
    rows = []
    for schedule in SCHEDULE_TEXT:
        if (name, schedule) not in runs:
            continue
        for column, published in zip(("train_acc", "test_acc"), PUBLISHED.get(name, (None, None))):
            best, last, worst = figures(runs[name, schedule], column)
            row = [SCHEDULE_TEXT[schedule], column[:-4], *map(spread, (best, last, worst))]
            row.append(f"{min(best):.2f} to {max(best):.2f}")
            if published:
                inside = min(best) <= published <= max(best)
                row.append(f"{published:.2f}, {'inside' if inside else 'outside'}")
            rows.append(row)
    header = [
        "learning rate",
        "accuracy (%)",
        "best epoch",
        "last epoch",
        "worst of last five",
        "best epoch, by seed",
    ]
    return markdown(header + ["published best epoch"] * (name in PUBLISHED), rows)


def overview(runs):
    """All models side by side, under the schedule of their recipe."""
    rows = []
    for name in utils.RECIPES:
        if (name, "described") not in runs:
            continue
        layers = utils.layer_table(create_model(name))
        parameters, mult_adds = (
            f"{sum(layer[k] for layer in layers):,}" for k in ("parameters", "mult_adds")
        )
        best, last, worst = figures(runs[name, "described"], "test_acc")
        seconds = statistics.median(s for run in runs[name, "described"] for s in run["seconds"])
        row = [name, parameters, mult_adds, layers[-1]["receptive_field"], *map(spread, (best, last, worst))]
        rows.append([*row, f"{min(worst):.2f}", f"{seconds:.1f}"])
    header = "model,parameters,mult-adds,receptive field,best epoch,last epoch,worst of last five".split(",")
    return markdown([*header, "worst of all seeds", "seconds an epoch"], rows)


def steps_table(runs):
    """What each step from Model1 to Model4, and the one not taken, is worth, over the first three
    seeds; None where a step has not been run."""
    chain = {("Model1", "described"): "Model1", ("Model2", "described"): "Model2: its network, no dropout"}
    chain |= {key: text for key, (text, _) in STEPS.items()}
    rows, before = [], None
    for key, text in chain.items():
        seeds = [run["test_acc"][-5:] for run in runs.get(key, [])[:3]]
        if len(seeds) < 3:
            return None
        by_seed = [statistics.mean(five) for five in seeds]
        mean = statistics.mean(by_seed)
        change = "" if before is None else f"{mean - before:+.2f}"
        rows.append([text, spread(by_seed), f"{min(map(min, seeds)):.2f}", change])
        before = mean
    return markdown(["step", "mean of the last five", "worst of the last five", "change"], rows)


def tables(path=CSV):
    """Every table that the README takes from the recorded runs, by title."""
    runs = recorded_runs(path)
    by_model = {name: model_table(name, runs) for name in utils.RECIPES if (name, "described") in runs}
    found = {"All models": overview(runs), **by_model, "Steps": steps_table(runs)} if runs else {}
    return {title: table for title, table in found.items() if table}


def plot(name, runs, folder=ROOT / "images"):
    """Train and test accuracy of every seed, thin, and their mean, strong, for each schedule."""
    schedules = [schedule for schedule in ("constant", "described") if (name, schedule) in runs]
    figure, axes = plt.subplots(
        1,
        len(schedules),
        figsize=(5.2 * len(schedules), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, schedule in zip(axes[0], schedules):
        seeds = runs[name, schedule]
        for column, colour in (("train_acc", utils.TRAIN_COLOUR), ("test_acc", utils.TEST_COLOUR)):
            lines = [run[column] for run in seeds]
            epochs = range(1, len(lines[0]) + 1)
            for line in lines:
                axis.plot(epochs, line, color=colour, linewidth=0.7, alpha=0.6)
            mean = [statistics.mean(values) for values in zip(*lines)]
            axis.plot(
                epochs, mean, color=colour, linewidth=2.4, label=f"{column[:-4]}, mean of {len(seeds)} seeds"
            )
        axis.set(title=f"{name}, learning rate: {SCHEDULE_TEXT[schedule]}", xlabel="epoch")
        axis.set_ylim(min(min(run[c][1] for c in ("train_acc", "test_acc")) for run in seeds) - 0.3, 100)
        axis.grid(alpha=0.3)
        axis.legend(loc="best")
    axes[0, 0].set_ylabel("accuracy (%)")
    utils.finish(figure, name, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[*utils.RECIPES, *FULL], default=list(utils.RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--schedules",
        nargs="+",
        choices=sorted({schedule for _, schedule in RECIPES}),
        default=list(SCHEDULE_TEXT),
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--csv", type=Path, default=CSV, help="where the rows go")
    parser.add_argument("--summary", action="store_true", help="print the README's tables")
    parser.add_argument("--plot", action="store_true", help="draw images/ModelN.png")
    args = parser.parse_args()
    if args.summary or args.plot:
        for title, table in tables(args.csv).items() if args.summary else ():
            print(f"\n{title}\n\n{table}")
        for name in utils.RECIPES if args.plot else ():
            plot(name, recorded_runs(args.csv))
        return
    wanted = [
        (name, schedule, seed)
        for seed in args.seeds
        for name in args.models
        for schedule in args.schedules
        if (name, schedule) in RECIPES
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = utils.load_data(standin=False)
    folder = Path(os.environ.get("S7_CHECKPOINTS", "checkpoints"))
    for name, schedule, seed in tqdm(wanted, desc="runs"):
        done = {(row["model"], row["schedule"], row["seed"]) for row in read_rows(args.csv)}
        if (name, schedule, str(seed)) in done:
            continue
        print(f"\n{name}, {schedule} schedule, seed {seed}")
        checkpoint = folder / f"accuracy-{name}-{schedule}-{seed}.pt"
        append_rows(run(name, schedule, seed, args.epochs, data, device, checkpoint), args.csv)


if __name__ == "__main__":
    main()

"""Accuracy of the models over several seeds, trained as the notebook trains, on real MNIST.

    python benchmarks/accuracy.py --models Model1 Model3 --seeds 1 2 3   train what is missing
    python benchmarks/accuracy.py --summary                              print the tables
    S7_FIGURES=images python benchmarks/accuracy.py --plot               draw the curves

A finished run is appended to `accuracy.csv`; one cut off goes on. Processes may share the models.
"""

import argparse
import csv
import io
import os
from pathlib import Path
import statistics
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from tqdm import tqdm

from model import create_model
import utils

CSV = ROOT / "benchmarks" / "accuracy.csv"
NUMBERS = "train_loss train_acc test_loss test_acc learning_rate seconds".split()  # as in `History`
EPOCHS, SEEDS = 15, (1, 2, 3, 4, 5)
PUBLISHED = {"Model1": (88.88, 98.53), "Model2": (99.50, 99.11), "Model3": (99.50, 99.28)}

_FOUR = utils.RECIPES["Model4"]
RECIPES = {
    **{(name, "described"): recipe for name, recipe in utils.RECIPES.items()},
    ("Model1", "constant"): {**utils.RECIPES["Model1"], "StepLR": dict(step_size=1, gamma=1.0)},
    ("Model2", "rate"): {**_FOUR, "augment": None},
    ("Model2", "augment"): {**_FOUR, "plain": 0},
    ("Model2", "plain"): _FOUR,
}
STEPS = {  # from Model1 to Model4, one change at a time
    ("Model1", "described"): "Model1",
    ("Model2", "described"): "Model2: another network, no dropout",
    ("Model2", "rate"): "Model4's optimizer and scheduler",
    ("Model2", "augment"): "augmentation",
    ("Model2", "plain"): "no augmentation in the last five epochs",
    ("Model4", "described"): "separable convolutions: Model4",
}


def train_model(model, recipe, train_set, test_set, settings, path, device="cpu"):
    """Train as the notebook does; returns the `History`. A run cut off goes on from `path`, where its
    settings, `epochs` and `seed` among them, and its recipe are the same."""
    utils.keep_freed_memory()
    train_loader = utils.BatchLoader(train_set, recipe["batch_size"], device, shuffle=True)
    test_loader = utils.BatchLoader(test_set, recipe["batch_size"], device)
    optimizer = torch.optim.SGD(model.parameters(), **recipe["optimizer"])
    if "StepLR" in recipe:
        scheduler = StepLR(optimizer, **recipe["StepLR"])
    else:
        scheduler = ReduceLROnPlateau(optimizer, **recipe["ReduceLROnPlateau"])
    run = utils.Run(path, {**settings, **recipe}, model, optimizer, scheduler, resume=True)
    for epoch in run.epochs():
        train_loader.augment = recipe["augment"] if epoch <= settings["epochs"] - recipe["plain"] else None
        trained = utils.train(model, device, train_loader, optimizer, F.nll_loss)
        tested = utils.test(model, device, test_loader, F.nll_loss)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(tested[0])
        else:
            scheduler.step()
        run.record(trained, tested)
    return run.history


def where(device):
    """What a row says of the machine."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return dict(device=hardware, threads=torch.get_num_threads(), torch=torch.__version__)


def run(name, schedule, seed, data, device):
    """Train one model with one seed; returns its rows."""
    torch.manual_seed(seed)
    model = create_model(name).to(device)
    settings = dict(model=name, data=data[0].title, epochs=EPOCHS, seed=seed)
    path = checkpoint(f"accuracy-{name}-{schedule}-{seed}")
    history = train_model(model, RECIPES[name, schedule], *data, settings, path, device)
    rows = []
    for epoch, numbers in enumerate(zip(*vars(history).values()), 1):
        row = dict(model=name, schedule=schedule, seed=seed, epoch=epoch)
        rows.append(row | dict(zip(NUMBERS, (round(number, 6) for number in numbers))) | where(device))
    return rows


def checkpoint(name):
    return Path(os.environ.get("S7_CHECKPOINTS", "checkpoints")) / f"{name}.pt"


def read_rows(path):
    """The recorded rows, as dictionaries of strings; none where there is no file."""
    return list(csv.DictReader(io.StringIO(Path(path).read_text()))) if Path(path).exists() else []


def append_rows(rows, path, anew=False):
    """Append rows with one write, so that a process killed here leaves all or none; or write `anew`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    if anew or not Path(path).exists():
        writer.writeheader()
    writer.writerows(rows)
    with open(path, "w" if anew else "a") as file:
        file.write(text.getvalue())


def recorded_runs():
    """`{(model, schedule): [run, …]}`, a run being its rows' numbers by column, epoch after epoch. As
    long as Model3's rate has not fallen, its runs are those of Models 2 and 3, one network, at a
    constant rate, bit for bit, and stand there too."""
    runs = {}
    for row in read_rows(CSV):
        run = runs.setdefault((row["model"], row["schedule"]), {}).setdefault(row["seed"], {})
        for column in NUMBERS:
            run.setdefault(column, []).append(float(row[column]))
    runs = {key: list(by_seed.values()) for key, by_seed in runs.items()}
    three = runs.get(("Model3", "described"), [])
    if three and all(set(run["learning_rate"]) == {0.01} for run in three):
        runs["Model2", "constant"] = runs["Model3", "constant"] = three
    return runs


def spread(values):
    """Mean ± standard deviation (of the sample)."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def last_five(run):
    return statistics.mean(run["test_acc"][-5:])


def overview(runs):
    """All models side by side, as described; 99.4 % is held from the latest of the seeds' epochs."""
    rows = []
    for name in (name for name in utils.RECIPES if (name, "described") in runs):
        seeds = runs[name, "described"]
        tests = [run["test_acc"] for run in seeds]
        held = [utils.held_from(test) for test in tests]
        row = [name, *utils.summarise(create_model(name)).splitlines()[-1].split()[1:]]
        row += [spread([run["train_acc"][-1] for run in seeds]), spread([max(test) for test in tests])]
        row += [spread([last_five(run) for run in seeds]), f"{min(min(test[-5:]) for test in tests):.2f}"]
        rows.append([*row, max(held) if all(held) else "not held"])
    header = "model,parameters,mult-adds,receptive field,train last epoch,test best epoch,mean of last five"
    return markdown([*header.split(","), "worst of last five", "99.4 held from epoch"], rows)


def model_table(name, runs):
    """One model's accuracies by schedule, with the published ones; in brackets the range of seeds."""
    rows = []
    for schedule, text in (("constant", "constant, 0.01"), ("described", "as described")):
        seeds = runs[name, schedule]
        tests = [run["test_acc"] for run in seeds]
        bests = [[max(run[column]) for run in seeds] for column in ("train_acc", "test_acc")]
        cells = [f"{spread(best)} ({min(best):.2f} to {max(best):.2f})" for best in bests]
        cells += [spread([test[-1] for test in tests]), spread([min(test[-5:]) for test in tests])]
        rows.append([text, *cells])
    rows.append(["published", *(f"{figure:.2f}" for figure in PUBLISHED[name]), "", ""])
    header = "learning rate,train best epoch,test best epoch,test last epoch,worst of last five"
    return markdown(header.split(","), rows)


def layers(name):
    """The blocks of a network, a column each: output, parameters and receptive field."""
    blocks = {}
    for line in utils.summarise(create_model(name)).splitlines()[1:-1]:
        path, _, shape, _, parameters, _, field = line.split()
        block = ".".join(path.split(".")[: 1 + path.startswith(("before", "after"))])
        _, before, _ = blocks.get(block, ("", 0, ""))
        blocks[block] = shape, before + int(parameters.replace(",", "")), field
    labels = [("output",), ("parameters",), ("receptive field",)]
    return markdown(["", *blocks], [a + b for a, b in zip(labels, zip(*blocks.values()))])


def steps_table(runs):
    """What each step to Model4 is worth, over the first three seeds."""
    rows, before = [], None
    for key, step in STEPS.items():
        means = [last_five(run) for run in runs[key][:3]]
        change = "" if before is None else f"{statistics.mean(means) - before:+.2f}"
        worst = min(min(run["test_acc"][-5:]) for run in runs[key][:3])
        rows.append([step, spread(means), f"{worst:.2f}", change])
        before = statistics.mean(means)
    return markdown(["step", "mean of last five", "worst of last five", "change"], rows)


def tables():
    """Every table that the README takes from the recorded runs, by title."""
    runs = recorded_runs()
    by_model = {name: model_table(name, runs) for name in PUBLISHED}
    return {"All models": overview(runs), **by_model, "Steps": steps_table(runs)}


def plot(name, runs):
    """Train and test accuracy of every seed, thin, and their mean, strong, for each schedule."""
    schedules = [schedule for schedule in ("constant", "described") if (name, schedule) in runs]
    figure, axes = plt.subplots(1, len(schedules), figsize=(5.2 * len(schedules), 3.6), layout="constrained")
    for axis, schedule in zip(figure.axes, schedules):
        for column, colour in (("train_acc", utils.TRAIN_COLOUR), ("test_acc", utils.TEST_COLOUR)):
            lines = torch.tensor([run[column] for run in runs[name, schedule]])
            epochs = range(1, lines.shape[1] + 1)
            axis.plot(epochs, lines.T, color=colour, linewidth=0.7, alpha=0.6)
            label = f"{column[:-4]}, mean of {len(lines)} seeds"
            axis.plot(epochs, lines.mean(0), color=colour, linewidth=2.4, label=label)
        low = 86 if name == "Model1" else 98  # the first epochs may lie outside
        axis.set(title=f"{name}, {schedule}", xlabel="epoch", ylabel="accuracy (%)", ylim=(low, 100))
        axis.grid(alpha=0.3)
        axis.legend()
    utils.finish(figure, name, f"Accuracy of {name} by epoch")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(utils.RECIPES), default=list(utils.RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--summary", action="store_true", help="print the README's tables")
    parser.add_argument("--plot", action="store_true", help="draw the curves into the folder S7_FIGURES")
    args = parser.parse_args()
    if args.summary:
        return print(*(f"{title}\n\n{table}\n" for title, table in tables().items()), sep="\n")
    if args.plot:
        return [plot(name, recorded_runs()) for name in utils.RECIPES]
    wanted = [(*key, seed) for seed in args.seeds for key in RECIPES if key[0] in args.models]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = utils.load_data(standin=False)
    for name, schedule, seed in tqdm(wanted, desc="runs"):
        done = {(row["model"], row["schedule"], row["seed"]) for row in read_rows(CSV)}
        if (name, schedule, str(seed)) not in done:
            print(f"\n{name}, {schedule}, seed {seed}")
            append_rows(run(name, schedule, seed, data, device), CSV)


if __name__ == "__main__":
    main()

"""What the benchmark programs share: networks, training, CSV files and the recorded runs.

A program imports this module before torch, because of `GOMP_SPINCOUNT`.
"""

import csv
import io
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if sys.platform == "linux":
    # libgomp's threads wait for each other by spinning, which costs a whole time slice per wait if another
    # process keeps the machine busy. It reads the limit when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import plots
import utils
from model import Network, conv, create_model, first_block, separable_block

ROOT = Path(utils.__file__).resolve().parent
EPOCHS = 15
SEEDS = (1, 2, 3, 4, 5)
ACCURACY_COLUMNS = {  # of accuracy.csv, with the field of `utils.History` that each one records
    "train_loss": "train_losses",
    "train_acc": "train_acc",
    "test_loss": "test_losses",
    "test_acc": "test_acc",
    "learning_rate": "learning_rates",
    "seconds": "seconds",
}


class Published(NamedTuple):
    """The best accuracies of a published run, in percent."""

    train_acc: float
    test_acc: float


PUBLISHED = {
    "Model1": Published(train_acc=88.88, test_acc=98.53),
    "Model2": Published(train_acc=99.50, test_acc=99.11),
    "Model3": Published(train_acc=99.50, test_acc=99.28),
}


class Step(NamedTuple):
    """Runs that differ from others by one change."""

    model: str
    schedule: str
    change: str


MODEL4 = Step("Model4", "described", "Model4")
STEPS = [  # from Model1 to Model4
    Step("Model1", "described", "Model1"),
    Step("Model1", "no_dropout", "Model1 without dropout"),
    Step("Model2", "described", "Model2's network"),
    Step("Model2", "rate", "Model4's optimizer and scheduler"),
    Step("Model2", "augment", "augmentation"),
    Step("Model2", "clean_epochs", "no augmentation in the last epochs"),
    Step("Model4", "described", "Model4's network"),
]
WITHOUT = [  # Model4, with one thing taken out
    Step("Model4", "no_augmentation", "no augmentation"),
    Step("Model4", "augment", "augmentation until the end"),
    Step("Model4", "constant", "constant learning rate, 0.1"),
    Step("Model2", "clean_epochs", "Model2's network"),
]


class Candidate(Network):
    """A network like Model4, with other numbers of channels.

    `before` and `after` list the output channels of the blocks before and after the pool. With
    Model4's numbers, the same seed gives the same weights under the same names.
    """

    def __init__(self, before, after):
        super().__init__()
        self.block1 = first_block(before[0])
        channels = before[0]
        number = 1
        for width in before[1:]:
            number += 1
            self.add_module(f"block{number}", separable_block(channels, width))
            channels = width
        self.pool = nn.MaxPool2d(2)
        for width in after:
            number += 1
            self.add_module(f"block{number}", separable_block(channels, width))
            channels = width
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.logits = conv(channels, 10)
        self.to(memory_format=torch.channels_last)


def count_parameters(model):
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def checkpoint_path(name):
    """Return the path of a checkpoint in the folder `S7_CHECKPOINTS` (default `checkpoints`)."""
    return Path(os.environ.get("S7_CHECKPOINTS") or "checkpoints") / f"{name}.pt"


def create_loaders(recipe, train_set, test_set, device):
    """Return the loaders of the training and the test set."""
    train_loader = utils.BatchLoader(
        train_set, recipe.batch_size, device, shuffle=True, augmentation=recipe.augmentation
    )
    return train_loader, utils.BatchLoader(test_set, recipe.batch_size, device)


def train_model(
    path,
    model,
    optimizer,
    scheduler,
    train_loader,
    test_loader,
    criterion,
    epochs,
    seed,
    augmented_epochs,
    step_per_epoch=True,
):
    """Train as the notebook does; return the `History`.

    The arguments are those of `utils.Run`. With `step_per_epoch=False` the scheduler is not stepped here,
    because a hook of the optimizer does it after every batch. An interrupted run is resumed from the
    checkpoint at `path`. Raise ValueError if that is the checkpoint of a different run.
    """
    device = next(model.parameters()).device
    run = utils.Run(
        path,
        model,
        optimizer,
        scheduler,
        train_loader,
        test_loader,
        criterion,
        epochs,
        seed,
        augmented_epochs,
        resume=True,
    )
    for epoch in run.remaining_epochs():
        if epoch > augmented_epochs:
            train_loader.augmentation = None
        train_loss, train_acc = utils.train(model, device, train_loader, optimizer, criterion)
        test_loss, test_acc = utils.test(model, device, test_loader, criterion)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(test_loss)
        elif step_per_epoch:
            scheduler.step()
        run.record(train_loss, train_acc, test_loss, test_acc)
    return run.history


def load_model(path):
    """Return the name and the network of a checkpoint of this repository, in evaluation mode."""
    state = utils.load_checkpoint(path)
    name = state["description"]["network"].split("(")[0]
    model = create_model(name)
    model.load_state_dict(state["model"])
    return name, model.eval()


def machine_columns(device):
    """Return the columns of a row that describe the machine, as a dictionary."""
    hardware = "CPU"
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    return {"device": hardware, "threads": torch.get_num_threads(), "torch": torch.__version__}


def read_rows(path):
    """Return the rows of a CSV file as dictionaries of strings; no rows if there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def append_rows(rows, path):
    """Append dictionaries to a CSV file, which is created if it does not exist.

    There is a single write, so that a killed process leaves all of the rows or none.
    """
    text = csv_text(rows, header=not Path(path).exists())
    with open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


def write_rows(rows, path):
    """Write dictionaries to a CSV file and overwrite its contents."""
    Path(path).write_text(csv_text(rows, header=True), encoding="utf-8", newline="")


def csv_text(rows, header):
    """Return dictionaries with the same keys as CSV, below a line with the keys if `header` is true."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def recorded_runs(rows):
    """Return the runs on a CPU that the rows of accuracy.csv contain.

    They are a dictionary from (model, schedule) to a dictionary from seed, in ascending order, to
    `utils.History`. Models 2 and 3 are the same network. If Model3's learning rate never dropped, its runs
    are bit-identical to runs of both models at a constant rate, and are returned under those keys too.
    """
    runs = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        if row["device"] == "CPU":
            histories = runs.setdefault((row["model"], row["schedule"]), {})
            history = histories.setdefault(int(row["seed"]), utils.History())
            for column, name in ACCURACY_COLUMNS.items():
                getattr(history, name).append(float(row[column]))
    model3_runs = runs.get(("Model3", "described"), {})
    rates = set()
    for history in model3_runs.values():
        rates.update(history.learning_rates)
    if len(rates) == 1:
        runs["Model2", "constant"] = model3_runs
        runs["Model3", "constant"] = model3_runs
    return runs


def mean_of_last_epochs(history):
    """Return the mean test accuracy of the last epochs of a run, in percent."""
    return statistics.mean(history.test_acc[-plots.LAST_EPOCHS :])


def lowest_of_last_epochs(history):
    """Return the lowest test accuracy of the last epochs of a run, in percent."""
    return min(history.test_acc[-plots.LAST_EPOCHS :])

"""What the benchmark programs share: training and CSV files.

A program imports this module before torch, because of `GOMP_SPINCOUNT`.
"""

import csv
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if sys.platform == "linux":
    # libgomp's threads wait for each other by spinning, which costs a whole time slice per wait if another
    # process keeps the machine busy. It reads the limit when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

import utils
from model import create_model
from runs import Run, load_checkpoint

EPOCHS = 15
SEEDS = (1, 2, 3, 4, 5)

# ---- training ----


def count_parameters(model):
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def checkpoint_path(name):
    """Return the path of a checkpoint in the folder `S7_CHECKPOINTS` (default `runs`)."""
    return Path(os.environ.get("S7_CHECKPOINTS") or "runs") / f"{name}.pt"


def train_model(name, model, optimizer, recipe, data, seed, tested=None):
    """Train as the notebook does; return the `History`.

    The recipe gives the scheduler, the batch size and the augmentation, and `data` is the training and the
    test set. An interrupted run is resumed from the checkpoint `name`. Raise ValueError if that is the
    checkpoint of a different run. An average of the weights can be `tested` instead of the model; the
    checkpoint does not have it, so an interrupted run with an average may be refused, too.
    """
    device = next(model.parameters()).device
    train_set, test_set = data
    train_loader = utils.BatchLoader(
        train_set, recipe.batch_size, device, shuffle=True, augmentation=recipe.augmentation
    )
    test_loader = utils.BatchLoader(test_set, recipe.batch_size, device)
    scheduler = recipe.scheduler(optimizer, **recipe.scheduler_args)
    augmented_epochs = EPOCHS - recipe.clean_epochs
    run = Run(
        checkpoint_path(name),
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        criterion=F.nll_loss,
        train_loader=train_loader,
        augmented_epochs=augmented_epochs,
        epochs=EPOCHS,
        seed=seed,
        resume=True,
    )
    for epoch in run.remaining_epochs():
        loader = train_loader
        if epoch > augmented_epochs:
            loader = utils.without_augmentation(train_loader)
        train_loss, train_acc = utils.train(model, device, loader, optimizer, F.nll_loss)
        test_loss, test_acc = utils.test(tested or model, device, test_loader, F.nll_loss)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(test_loss)
        else:
            scheduler.step()
        run.record(train_loss, train_acc, test_loss, test_acc)
    return run.history


def load_model(path):
    """Return the name and the network of a checkpoint of this repository, in evaluation mode."""
    state = load_checkpoint(path)
    name = state["summary"]["network"].split()[0]
    model = create_model(name)
    model.load_state_dict(state["model"])
    return name, model.eval()


# ---- CSV files ----


def read_rows(path):
    """Return the rows of a CSV file as dictionaries of strings; no rows if there is no file."""
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def is_recorded(columns, path):
    """Return whether a CSV file has a row with the given columns, a dictionary of strings."""
    return any(columns.items() <= row.items() for row in read_rows(path))


def append_rows(rows, path):
    """Append dictionaries to a CSV file, which is created if it does not exist.

    A few rows fit into the file's buffer, so that a killed process leaves all of them or none.
    """
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def write_rows(rows, path):
    """Write dictionaries to a CSV file and overwrite its contents."""
    Path(path).unlink(missing_ok=True)
    append_rows(rows, path)

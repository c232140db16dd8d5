"""Train the models over several seeds, exactly as the notebook does, and record their accuracy.

    python benchmarks/accuracy.py                                          train all missing runs
    python benchmarks/accuracy.py --models Model1 Model3 --seeds 1 2 3     train some of them

A completed run is appended to `accuracy.csv`; an interrupted run is resumed. Several processes may
run in parallel if each has its own models or seeds.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import common
import torch
import torch.nn.functional as F
from tqdm import tqdm

import utils
from model import MODELS, Model1

CSV = common.ROOT / "benchmarks" / "accuracy.csv"
CONSTANT_RATE = {"step_size": 1, "gamma": 1.0}  # arguments of StepLR
MODEL1_RECIPE = utils.RECIPES["Model1"]
MODEL4_RECIPE = utils.RECIPES["Model4"]


class Experiment(NamedTuple):
    """A network and how it is trained."""

    create: Callable  # returns the network
    recipe: utils.Recipe


EXPERIMENTS = {}  # by model and schedule, as in accuracy.csv
for model_name, described_recipe in utils.RECIPES.items():
    EXPERIMENTS[model_name, "described"] = Experiment(MODELS[model_name], described_recipe)
EXPERIMENTS |= {
    ("Model1", "constant"): Experiment(Model1, replace(MODEL1_RECIPE, scheduler_args=CONSTANT_RATE)),
    ("Model1", "no_dropout"): Experiment(partial(Model1, dropout=0), MODEL1_RECIPE),
    # From Model2 to Model4, one change at a time
    ("Model2", "rate"): Experiment(MODELS["Model2"], replace(MODEL4_RECIPE, augmentation=None)),
    ("Model2", "augment"): Experiment(MODELS["Model2"], replace(MODEL4_RECIPE, clean_epochs=0)),
    ("Model2", "clean_epochs"): Experiment(MODELS["Model2"], MODEL4_RECIPE),
    # Model4 without one part of its recipe
    ("Model4", "no_augmentation"): Experiment(MODELS["Model4"], replace(MODEL4_RECIPE, augmentation=None)),
    ("Model4", "augment"): Experiment(MODELS["Model4"], replace(MODEL4_RECIPE, clean_epochs=0)),
    ("Model4", "constant"): Experiment(
        MODELS["Model4"], replace(MODEL4_RECIPE, scheduler_args=CONSTANT_RATE)
    ),
}


def train_and_describe(name, schedule, seed, train_set, test_set, epochs=common.EPOCHS):
    """Train one model with one seed; return the rows of accuracy.csv, one per epoch."""
    device = utils.choose_device()
    experiment = EXPERIMENTS[name, schedule]
    recipe = experiment.recipe
    torch.manual_seed(seed)
    model = experiment.create().to(device)
    optimizer = torch.optim.SGD(model.parameters(), **recipe.sgd)
    history = common.train_model(
        common.checkpoint_path(f"accuracy-{name}-{schedule}-{seed}"),
        model,
        optimizer,
        recipe.scheduler(optimizer, **recipe.scheduler_args),
        *common.create_loaders(recipe, train_set, test_set, device),
        F.nll_loss,
        epochs,
        seed,
        epochs - recipe.clean_epochs,
    )
    rows = []
    for epoch in range(1, history.completed + 1):
        row = {"model": name, "schedule": schedule, "seed": seed, "epoch": epoch}
        for column, field in common.ACCURACY_COLUMNS.items():
            row[column] = round(getattr(history, field)[epoch - 1], 6)
        row.update(common.machine_columns(device))
        rows.append(row)
    return rows


def is_recorded(name, schedule, seed):
    """Return whether accuracy.csv contains a run on this device."""
    columns = {
        "model": name,
        "schedule": schedule,
        "seed": str(seed),
        "device": common.machine_columns(utils.choose_device())["device"],
    }
    return any(columns.items() <= row.items() for row in common.read_rows(CSV))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=common.SEEDS)
    args = parser.parse_args()
    train_set, test_set = utils.load_data(standin=False)
    wanted = []
    for seed in args.seeds:
        for name, schedule in EXPERIMENTS:
            if name in args.models:
                wanted.append((name, schedule, seed))
    for name, schedule, seed in tqdm(wanted, desc="runs"):
        if not is_recorded(name, schedule, seed):
            print(f"\n{name}, {schedule}, seed {seed}")
            rows = train_and_describe(name, schedule, seed, train_set, test_set)
            common.append_rows(rows, CSV)


if __name__ == "__main__":
    main()

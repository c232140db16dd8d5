"""Hyperparameter search for Models 4 and 5, on a validation split of the training set.

    python benchmarks/search.py     train every configuration that is not yet in search.csv

Each run trains on 50,000 images of a fixed permutation of MNIST's training set and is validated on the
other 10,000; the test images are not used. A configuration is a network like Model4 and the recipe
`BASE`, with the listed changes.
"""

import json
import re
import statistics
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import common
import torch
from torch.optim.lr_scheduler import StepLR
from tqdm import tqdm

import utils

CSV = common.ROOT / "benchmarks" / "search.csv"
IMAGES = 60_000
TRAIN_IMAGES = 50_000
BASE = utils.Recipe(  # Model4's when the search began; written out, so that recorded rows keep their meaning
    sgd=dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    scheduler=StepLR,
    scheduler_args=dict(step_size=1, gamma=0.75),
    augmentation=partial(utils.random_affine, degrees=10, shift=0.06, scale=0.06),
    clean_epochs=5,
)


class Configuration(NamedTuple):
    """A network and a recipe to be tried."""

    before: list  # output channels of the blocks before the pool
    after: list  # and after it
    changes: dict  # of `BASE`; the augmentation is given by the arguments of `utils.random_affine`
    seeds: tuple = (1, 2, 3)


EARLIER_MODEL4 = ([16, 16, 24], [32, 36, 36, 36])
MODEL4 = ([16, 16], [32, 32, 32, 32, 40])
MODEL5 = ([16, 16], [24, 24, 24, 28])
CONFIGURATIONS = [
    # the recipe
    Configuration(*EARLIER_MODEL4, {}),
    Configuration(*EARLIER_MODEL4, {"scheduler_args": {"step_size": 5, "gamma": 0.2}}),
    Configuration(*EARLIER_MODEL4, {"scheduler_args": {"step_size": 1, "gamma": 0.8}}),
    Configuration(*EARLIER_MODEL4, {"clean_epochs": 0}),
    Configuration(*EARLIER_MODEL4, {"scheduler_args": {"step_size": 1, "gamma": 0.7}}),
    Configuration(*EARLIER_MODEL4, {"batch_size": 64, "sgd": {**BASE.sgd, "lr": 0.07}}),
    Configuration(*EARLIER_MODEL4, {"augmentation": {"degrees": 15, "shift": 0.08, "scale": 0.1}}),
    Configuration(*EARLIER_MODEL4, {"augmentation": {"degrees": 7, "shift": 0.04, "scale": 0.04}}),
    # the network
    Configuration([16, 16], [32, 40, 40, 40], {}),
    Configuration(*MODEL4, {}),
    Configuration([8, 16], [32, 32, 32, 32, 40], {}, seeds=(1,)),
    Configuration(*MODEL5, {}),
    Configuration([12, 12], [24, 28, 28, 24], {}),
    Configuration([12, 12], [16, 24, 24, 24, 24], {}, seeds=(1,)),
    Configuration([8, 16], [16, 24, 24, 24, 24], {}, seeds=(1,)),
    Configuration([8, 8], [24, 32, 24, 32], {}, seeds=(1,)),
    # the recipe again, with the chosen network
    Configuration(*MODEL4, {"sgd": {**BASE.sgd, "lr": 0.15}}),
    Configuration(*MODEL4, {"clean_epochs": 3}),
    # the end without augmentation, with both chosen networks; five epochs are what `BASE` has, but these
    # runs use `F.affine_grid`, which the earlier ones did not
    Configuration(*MODEL4, {"clean_epochs": 5}),
    Configuration(*MODEL4, {"clean_epochs": 6}),
    Configuration(*MODEL4, {"clean_epochs": 7}),
    Configuration(*MODEL4, {"clean_epochs": 8}),
    Configuration(*MODEL5, {"clean_epochs": 5}),
    Configuration(*MODEL5, {"clean_epochs": 6}, seeds=(1, 2, 3, 4, 5)),
    Configuration(*MODEL5, {"clean_epochs": 7}),
    Configuration(*MODEL5, {"clean_epochs": 8}),
    # the optimizer again, for Model5
    Configuration(*MODEL5, {"clean_epochs": 6, "batch_size": 64, "sgd": {**BASE.sgd, "lr": 0.07}}),
    Configuration(*MODEL5, {"clean_epochs": 6, "sgd": {**BASE.sgd, "weight_decay": 1e-4}}),
    Configuration(*MODEL5, {"clean_epochs": 6, "sgd": {**BASE.sgd, "lr": 0.2}}, seeds=(1, 2, 3, 4, 5)),
    Configuration(*MODEL5, {"clean_epochs": 6, "scheduler_args": {"step_size": 1, "gamma": 0.7}}),
    Configuration(*MODEL5, {"clean_epochs": 6, "sgd": {**BASE.sgd, "lr": 0.3}}, seeds=(1, 2)),
    Configuration(*MODEL4, {"clean_epochs": 6, "sgd": {**BASE.sgd, "lr": 0.2}}),
]


def split(train_set):
    """Return 50,000 images to train on and 10,000 to validate on, which are the same in every run."""
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    return train_set[order[:TRAIN_IMAGES]], train_set[order[TRAIN_IMAGES:]]


def changed_recipe(changes):
    """Return `BASE` with the changes of a configuration."""
    changes = dict(changes)
    if "augmentation" in changes:
        changes["augmentation"] = partial(utils.random_affine, **changes["augmentation"])
    return replace(BASE, **changes)


def identity(configuration, seed):
    """Return the columns of search.csv that identify a run, as a dictionary of strings."""
    return {
        "before": " ".join(map(str, configuration.before)),
        "after": " ".join(map(str, configuration.after)),
        "changes": json.dumps(configuration.changes),
        "seed": str(seed),
    }


def train_and_describe(configuration, seed, train_set, validation_set, epochs=common.EPOCHS):
    """Train one configuration with one seed; return its row of search.csv."""
    columns = identity(configuration, seed)
    device = common.default_device()
    name = re.sub("[^a-z0-9.]+", "-", " ".join(columns.values()))
    path = common.checkpoint_path(f"search-{name}")
    torch.manual_seed(seed)
    model = common.Candidate(configuration.before, configuration.after)
    model.to(device, memory_format=model.memory_format)
    recipe = changed_recipe(configuration.changes)
    history = common.train_model(model, recipe, train_set, validation_set, path, epochs, seed, device)
    return {
        **columns,
        "parameters": common.count_parameters(model),
        "mean_last_five": round(common.mean_of_last_epochs(history), 3),
        "worst_last_five": common.lowest_of_last_epochs(history),
        "loss_last_five": round(statistics.mean(history.test_losses[-utils.LAST_EPOCHS :]), 5),
        "val_acc_by_epoch": " ".join(f"{accuracy:.2f}" for accuracy in history.test_acc),
        "seconds": round(statistics.median(history.seconds), 1),
        **common.machine_columns(device),
    }


def is_recorded(configuration, seed):
    """Return whether search.csv contains a run."""
    columns = identity(configuration, seed)
    return any(columns.items() <= row.items() for row in common.read_rows(CSV))


def main():
    train_set, validation_set = split(utils.load_data(standin=False)[0])
    wanted = []
    for configuration in CONFIGURATIONS:
        for seed in configuration.seeds:
            wanted.append((configuration, seed))
    for configuration, seed in tqdm(wanted, desc="runs"):
        if not is_recorded(configuration, seed):
            row = train_and_describe(configuration, seed, train_set, validation_set)
            common.append_rows([row], CSV)


if __name__ == "__main__":
    main()

"""Hyperparameter search for Models 4 and 5, on a validation split of the training set.

    python benchmarks/search.py     train every configuration that is not yet in search.csv

Each run trains on 50,000 images of a fixed permutation of MNIST's training set and is validated on the
other 10,000; the test images are not used. A configuration is a network like Model4 and Model4's
recipe, with the listed changes.
"""

import json
import statistics
from dataclasses import replace
from typing import NamedTuple

import torch
from common import (
    EPOCHS,
    ROOT,
    Candidate,
    append_rows,
    checkpoint_path,
    count_parameters,
    lowest_of_last_five,
    machine_columns,
    mean_of_last_five,
    read_rows,
    train_model,
)

import utils

CSV = ROOT / "benchmarks" / "search.csv"
IMAGES = 60_000
TRAIN_IMAGES = 50_000
RECIPE = utils.RECIPES["Model4"]


class Configuration(NamedTuple):
    """A network and a recipe to be tried."""

    before: list  # output channels of the blocks before the pool
    after: list  # and after it
    changes: dict  # of Model4's recipe
    seeds: tuple = (1, 2, 3)


CONFIGURATIONS = [
    # the recipe
    Configuration([16, 16, 24], [32, 36, 36, 36], {}),
    Configuration([16, 16, 24], [32, 36, 36, 36], {"scheduler_args": {"step_size": 5, "gamma": 0.2}}),
    Configuration([16, 16, 24], [32, 36, 36, 36], {"scheduler_args": {"step_size": 1, "gamma": 0.8}}),
    Configuration([16, 16, 24], [32, 36, 36, 36], {"clean_epochs": 0}),
    Configuration([16, 16, 24], [32, 36, 36, 36], {"scheduler_args": {"step_size": 1, "gamma": 0.7}}),
    Configuration(
        [16, 16, 24],
        [32, 36, 36, 36],
        {"batch_size": 64, "sgd": {"lr": 0.07, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0005}},
    ),
    Configuration(
        [16, 16, 24],
        [32, 36, 36, 36],
        {"augmentation": {"degrees": 15, "shift": 0.08, "scale": 0.1}},
    ),
    Configuration(
        [16, 16, 24],
        [32, 36, 36, 36],
        {"augmentation": {"degrees": 7, "shift": 0.04, "scale": 0.04}},
    ),
    # the network
    Configuration([16, 16], [32, 40, 40, 40], {}),
    Configuration([16, 16], [32, 32, 32, 32, 40], {}),
    Configuration([8, 16], [32, 32, 32, 32, 40], {}, seeds=(1,)),
    Configuration([16, 16], [24, 24, 24, 28], {}),
    Configuration([12, 12], [24, 28, 28, 24], {}),
    Configuration([12, 12], [16, 24, 24, 24, 24], {}, seeds=(1,)),
    Configuration([8, 16], [16, 24, 24, 24, 24], {}, seeds=(1,)),
    Configuration([8, 8], [24, 32, 24, 32], {}, seeds=(1,)),
    # the recipe again, with the chosen network
    Configuration(
        [16, 16],
        [32, 32, 32, 32, 40],
        {"sgd": {"lr": 0.15, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0005}},
    ),
    Configuration([16, 16], [32, 32, 32, 32, 40], {"clean_epochs": 3}),
]


def split(train_set):
    """Return 50,000 images to train on and 10,000 to validate on, which are the same in every run."""
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    return train_set[order[:TRAIN_IMAGES]], train_set[order[TRAIN_IMAGES:]]


def identity(configuration, seed):
    """Return the columns of search.csv that identify a run, as a dictionary of strings."""
    return {
        "before": " ".join(map(str, configuration.before)),
        "after": " ".join(map(str, configuration.after)),
        "changes": json.dumps(configuration.changes),
        "seed": str(seed),
    }


def checkpoint_name(columns):
    """Return the name of a run's checkpoint, made from the letters and digits of `identity`."""
    text = "-".join(columns.values()).replace(" ", "-")
    kept = filter(lambda character: character.isalnum() or character in ".-", text)
    return "search-" + "".join(kept)


def train_and_describe(configuration, seed, train_set, validation_set, epochs=EPOCHS):
    """Train one configuration with one seed; return its row of search.csv."""
    columns = identity(configuration, seed)
    recipe = replace(RECIPE, **configuration.changes)
    network = f"{columns['before']} | {columns['after']}"
    settings = utils.run_settings(network, train_set.name, epochs, seed, recipe)
    path = checkpoint_path(checkpoint_name(columns))
    torch.manual_seed(seed)
    model = Candidate(configuration.before, configuration.after).to(memory_format=Candidate.memory_format)
    history = train_model(model, recipe, train_set, validation_set, settings, path)
    return {
        **columns,
        "parameters": count_parameters(model),
        "mean_last_five": round(mean_of_last_five(history), 3),
        "worst_last_five": lowest_of_last_five(history),
        "loss_last_five": round(statistics.mean(history.test_losses[-5:]), 5),
        "val_acc_by_epoch": " ".join(f"{accuracy:.2f}" for accuracy in history.test_acc),
        "seconds": round(statistics.median(history.seconds), 1),
        **machine_columns("cpu"),
    }


def is_recorded(configuration, seed):
    """Return whether search.csv contains a run."""
    columns = identity(configuration, seed)
    return any(columns.items() <= row.items() for row in read_rows(CSV))


def main():
    train_set, validation_set = split(utils.load_data(standin=False)[0])
    for configuration in CONFIGURATIONS:
        for seed in configuration.seeds:
            if not is_recorded(configuration, seed):
                print(f"\n{configuration}, seed {seed}")
                row = train_and_describe(configuration, seed, train_set, validation_set)
                append_rows([row], CSV)


if __name__ == "__main__":
    main()

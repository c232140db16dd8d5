"""Hyperparameter search for Models 4 and 5, on a validation split of the training set.

    python benchmarks/search.py                             train all runs that are not yet in search.csv
    python benchmarks/search.py --only gamma --seeds 1 3 5    train some of them

`--only` selects the configurations with this text in their columns of search.csv. An interrupted run is
resumed. Several processes may run in parallel if each has its own configurations or seeds.

Each run trains on 50,000 images of a fixed permutation of MNIST's training set and is validated on the
other 10,000; the test images are not used. A configuration is a network like Model4 and the recipe
`BASE`, with the listed changes.
"""

import argparse
import json
import re
import statistics
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import common
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from tqdm import tqdm

import plots
import utils
from model import Network, conv, conv_block, normalized_block, separable_block
from runs import ROOT, describe_machine

CSV = ROOT / "benchmarks" / "search.csv"
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
    changes: dict  # of `BASE`, the augmentation as the arguments of `utils.random_affine`
    seeds: tuple = (1, 2, 3)
    block: str = "separable"  # a name in `BLOCKS`


BLOCKS = {  # by the name in search.csv
    "separable": separable_block,
    "conv-bn-relu": normalized_block,
    "conv-relu-bn": conv_block,  # Model2's
}
EARLIER = ([16, 16, 24], [32, 36, 36, 36])
SEPARABLE = ([16, 16], [32, 32, 32, 32, 40])
SMALL = ([16, 16], [24, 24, 24, 28])
SIX = {"clean_epochs": 6}
CONFIGURATIONS = [
    # the recipe
    Configuration(*EARLIER, {}),
    Configuration(*EARLIER, {"scheduler_args": {"step_size": 5, "gamma": 0.2}}),
    Configuration(*EARLIER, {"scheduler_args": {"step_size": 1, "gamma": 0.8}}),
    Configuration(*EARLIER, {"clean_epochs": 0}),
    Configuration(*EARLIER, {"scheduler_args": {"step_size": 1, "gamma": 0.7}}),
    Configuration(*EARLIER, {"batch_size": 64, "sgd": {**BASE.sgd, "lr": 0.07}}),
    Configuration(*EARLIER, {"augmentation": {"degrees": 15, "shift": 0.08, "scale": 0.1}}),
    Configuration(*EARLIER, {"augmentation": {"degrees": 7, "shift": 0.04, "scale": 0.04}}),
    # the network
    Configuration([16, 16], [32, 40, 40, 40], {}),
    Configuration(*SEPARABLE, {}),
    Configuration([8, 16], [32, 32, 32, 32, 40], {}, seeds=(1,)),
    Configuration(*SMALL, {}),
    Configuration([12, 12], [24, 28, 28, 24], {}),
    Configuration([12, 12], [16, 24, 24, 24, 24], {}, seeds=(1,)),
    Configuration([8, 16], [16, 24, 24, 24, 24], {}, seeds=(1,)),
    Configuration([8, 8], [24, 32, 24, 32], {}, seeds=(1,)),
    # the recipe again, with the chosen network
    Configuration(*SEPARABLE, {"sgd": {**BASE.sgd, "lr": 0.15}}),
    Configuration(*SEPARABLE, {"clean_epochs": 3}),
    # the end without augmentation, with both chosen networks; five epochs are what `BASE` has, but these
    # runs use `F.affine_grid`, which the earlier ones did not
    Configuration(*SEPARABLE, {"clean_epochs": 5}),
    Configuration(*SEPARABLE, {"clean_epochs": 6}),
    Configuration(*SEPARABLE, {"clean_epochs": 7}),
    Configuration(*SEPARABLE, {"clean_epochs": 8}),
    Configuration(*SMALL, {"clean_epochs": 5}),
    Configuration(*SMALL, {"clean_epochs": 6}, seeds=(1, 2, 3, 4, 5)),
    Configuration(*SMALL, {"clean_epochs": 7}),
    Configuration(*SMALL, {"clean_epochs": 8}),
    # the optimizer again, for Model5
    Configuration(*SMALL, {"clean_epochs": 6, "batch_size": 64, "sgd": {**BASE.sgd, "lr": 0.07}}),
    Configuration(*SMALL, {"clean_epochs": 6, "sgd": {**BASE.sgd, "weight_decay": 1e-4}}),
    Configuration(*SMALL, {"clean_epochs": 6, "sgd": {**BASE.sgd, "lr": 0.2}}, seeds=(1, 2, 3, 4, 5)),
    Configuration(*SMALL, {"clean_epochs": 6, "scheduler_args": {"step_size": 1, "gamma": 0.7}}),
    Configuration(*SMALL, {"clean_epochs": 6, "sgd": {**BASE.sgd, "lr": 0.3}}, seeds=(1, 2)),
    Configuration(*SEPARABLE, {"clean_epochs": 6, "sgd": {**BASE.sgd, "lr": 0.2}}),
    # a moving average of Model5's weights, and distillation from Model4; the code of both is in this file of
    # commit c477101; an average with a decay of 0 is the last weights
    Configuration(*SMALL, {"clean_epochs": 6, "ema": 0}, seeds=(1, 2, 3, 4, 5)),
    Configuration(*SMALL, {"clean_epochs": 6, "ema": 0.998}, seeds=(1, 2, 3, 4, 5)),
    Configuration(*SMALL, {"clean_epochs": 6, "teacher": "Model4", "temperature": 2}, seeds=(1, 2, 3, 4, 5)),
    # the design exercise: a network whose width grows from block to block
    Configuration([16, 16], [24, 32, 40, 48], {"clean_epochs": 6}),
    # standard 3×3 convolutions instead of separable blocks, below 8,000 parameters; Model4 again, on the same
    # machine (the batch size is that of `BASE`)
    Configuration(*SEPARABLE, {**SIX, "batch_size": 128}, seeds=(1, 2, 3, 4, 5)),
    Configuration([8, 8], [12, 14, 16, 16], SIX, (1, 2, 3, 4, 5), "conv-bn-relu"),
    Configuration([8, 9], [12, 12, 13, 13, 14], SIX, (1, 2, 3, 4, 5), "conv-bn-relu"),
    Configuration([10, 10], [14, 14, 14, 14], SIX, (1, 2, 3, 4, 5), "conv-bn-relu"),
    Configuration([10, 12], [12, 12, 12, 12, 12], SIX, block="conv-bn-relu"),
    Configuration([8, 8], [13, 13, 13, 13, 13], SIX, block="conv-bn-relu"),
    Configuration([8, 8, 8], [14, 14, 14, 14], SIX, block="conv-bn-relu"),
    Configuration([8, 8], [8, 8, 16, 16, 16], SIX, block="conv-bn-relu"),
    Configuration([8, 8], [13, 13, 13, 13, 13], SIX, block="conv-relu-bn"),
    Configuration([16, 10], [13, 13, 14, 14], SIX, block="conv-bn-relu"),
    Configuration([12, 12], [13, 13, 13, 13], SIX, block="conv-bn-relu"),
    # half the learning rate, with the chosen network
    Configuration([8, 8], [12, 14, 16, 16], {**SIX, "sgd": {**BASE.sgd, "lr": 0.05}}, block="conv-bn-relu"),
    # and with at most 4,312 parameters; the separable one again, on the same machine
    Configuration(*SMALL, {**SIX, "batch_size": 128}, seeds=tuple(range(1, 11))),
    Configuration([8, 8], [10, 10, 10, 10], SIX, block="conv-bn-relu"),
    Configuration([7, 8], [10, 10, 10, 11], SIX, block="conv-bn-relu"),
    Configuration([8, 8], [10, 12, 14], SIX, block="conv-bn-relu"),
    Configuration([8, 8], [8, 10, 10, 12], SIX, tuple(range(1, 11)), "conv-bn-relu"),
    Configuration([8, 8], [8, 8, 12, 12], SIX, block="conv-bn-relu"),
]


class Candidate(Network):
    """A network like Model4, with other numbers of channels and other blocks.

    `before` and `after` list the output channels of the blocks before and after the pool, and `block` is a
    name in `BLOCKS`.
    """

    def __init__(self, before, after, block):
        super().__init__()
        channels = before + after
        create_block = BLOCKS[block]
        self.block1 = normalized_block(1, channels[0])
        if block == "conv-relu-bn":
            self.block1 = conv_block(1, channels[0])
        for number, (in_channels, out_channels) in enumerate(pairwise(channels), 2):
            if number == len(before) + 1:
                self.pool = nn.MaxPool2d(2)
            self.add_module(f"block{number}", create_block(in_channels, out_channels))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.logits = conv(channels[-1], 10)
        if block == "separable":
            self.to(memory_format=torch.channels_last)


def changed_recipe(changes):
    """Return `BASE` with the changes of a configuration."""
    if "augmentation" in changes:
        changes = {**changes, "augmentation": partial(utils.random_affine, **changes["augmentation"])}
    return replace(BASE, **changes)


def identity(configuration, seed):
    """Return the columns of search.csv that identify a run, as a dictionary of strings."""
    return {
        "block": configuration.block,
        "before": " ".join(map(str, configuration.before)),
        "after": " ".join(map(str, configuration.after)),
        "changes": json.dumps(configuration.changes),
        "seed": str(seed),
    }


def train_and_describe(configuration, seed, data):
    """Train one configuration with one seed; return its row of search.csv."""
    recipe = changed_recipe(configuration.changes)
    columns = identity(configuration, seed)
    torch.manual_seed(seed)
    model = Candidate(configuration.before, configuration.after, configuration.block).to(
        utils.choose_device()
    )
    optimizer = torch.optim.SGD(model.parameters(), **recipe.sgd)
    name = "search-" + re.sub("[^A-Za-z0-9.]+", "-", " ".join(columns.values()))
    history = common.train_model(name, model, optimizer, recipe, data, seed)
    return {
        **columns,
        "parameters": common.count_parameters(model),
        "mean_last_five": round(plots.mean_of_last_epochs(history), 3),
        "worst_last_five": plots.lowest_of_last_epochs(history),
        "loss_last_five": round(statistics.mean(history.test_losses[-plots.LAST_EPOCHS :]), 5),
        "val_acc_by_epoch": " ".join(f"{accuracy:.2f}" for accuracy in history.test_acc),
        "seconds": round(statistics.median(history.seconds), 1),
        **describe_machine(utils.choose_device()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", nargs="+", type=int, default=common.SEEDS)
    args = parser.parse_args()
    train_set, _ = utils.load_data(standin=False)
    data = utils.split(train_set)
    for configuration in tqdm(CONFIGURATIONS, desc="configurations"):
        for seed in configuration.seeds:
            columns = identity(configuration, seed)
            wanted = seed in args.seeds and args.only in " ".join(columns.values())
            if wanted and not common.is_recorded(columns, CSV):
                common.append_rows([train_and_describe(configuration, seed, data)], CSV)


if __name__ == "__main__":
    main()

"""Hyperparameter search for Models 4 and 5, on a validation split of the training set.

    python benchmarks/search.py "8 8" "12 14 16 16" '{"clean_epochs": 6}'

A configuration is a network like Model4, given by its output channels before and after the pool, and the
recipe `BASE` with the given changes. A dictionary in them is complete; that of the augmentation has the
arguments of `utils.random_affine`. The first columns of search.csv are the configurations of all runs. A
completed run is appended to that file; an interrupted run is resumed. Several processes may run in parallel
if each has its own configuration or seeds.

Each run trains on 50,000 images of a fixed permutation of MNIST's training set and is validated on the
other 10,000; the test images are not used.
"""

import argparse
import json
import re
import statistics
from dataclasses import replace
from functools import partial
from itertools import pairwise

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
BLOCKS = {  # by the name in search.csv
    "separable": separable_block,
    "conv-bn-relu": normalized_block,
    "conv-relu-bn": conv_block,  # Model2's
}


class Candidate(Network):
    """A network like Model4, with other numbers of channels and other blocks.

    The arguments are those of search.csv: the output channels of the blocks `before` and `after` the pool,
    such as "8 8" and "12 14 16 16", and the name of a `block`.
    """

    def __init__(self, before, after, block):
        super().__init__()
        channels = list(map(int, f"{before} {after}".split()))
        self.block1 = normalized_block(1, channels[0])
        if block == "conv-relu-bn":
            self.block1 = conv_block(1, channels[0])
        for number, (in_channels, out_channels) in enumerate(pairwise(channels), 2):
            if number == len(before.split()) + 1:
                self.pool = nn.MaxPool2d(2)
            self.add_module(f"block{number}", BLOCKS[block](in_channels, out_channels))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.logits = conv(channels[-1], 10)
        if block == "separable":
            self.to(memory_format=torch.channels_last)


def train_and_describe(columns, data):
    """Train the configuration that the first columns of search.csv describe; return the whole row."""
    device = utils.choose_device()
    changes = json.loads(columns["changes"])
    if "augmentation" in changes:
        changes["augmentation"] = partial(utils.random_affine, **changes["augmentation"])
    recipe = replace(BASE, **changes)
    torch.manual_seed(int(columns["seed"]))
    model = Candidate(columns["before"], columns["after"], columns["block"]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), **recipe.sgd)
    name = "search-" + re.sub("[^A-Za-z0-9.]+", "-", " ".join(columns.values()))
    history = common.train_model(name, model, optimizer, recipe, data, int(columns["seed"]))
    return {
        **columns,
        "parameters": common.count_parameters(model),
        "mean_last_five": round(plots.mean_of_last_epochs(history), 3),
        "worst_last_five": plots.lowest_of_last_epochs(history),
        "loss_last_five": round(statistics.mean(history.test_losses[-plots.LAST_EPOCHS :]), 5),
        "val_acc_by_epoch": " ".join(f"{accuracy:.2f}" for accuracy in history.test_acc),
        "seconds": round(statistics.median(history.seconds), 1),
        **describe_machine(device),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", help="output channels of the blocks before the pool")
    parser.add_argument("after", help="and after it")
    parser.add_argument("changes", help="of `BASE`, as JSON")
    parser.add_argument("--block", choices=BLOCKS, default="conv-bn-relu")
    parser.add_argument("--seeds", nargs="+", type=int, default=common.SEEDS)
    args = parser.parse_args()
    train_set, _ = utils.load_data(standin=False)
    data = utils.split(train_set)
    for seed in tqdm(args.seeds, desc="seeds"):
        columns = {
            "block": args.block,
            "before": args.before,
            "after": args.after,
            "changes": json.dumps(json.loads(args.changes)),
            "seed": str(seed),
        }
        if not common.is_recorded(columns, CSV):
            common.append_rows([train_and_describe(columns, data)], CSV)


if __name__ == "__main__":
    main()

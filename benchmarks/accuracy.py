"""Train the models over several seeds, exactly as the notebook does, and record their accuracy.

    python benchmarks/accuracy.py                                      train all missing runs
    python benchmarks/accuracy.py --only "Model2 rate" --seeds 1 2     train some of them

`--only` selects the experiments with this text in their model and schedule. A completed run is appended to
`accuracy.csv`; an interrupted run is resumed. Several processes may run in parallel if each has its own
experiments or seeds.
"""

import argparse
from dataclasses import replace
from functools import partial

import common
import tables
import torch
from search import Candidate
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import utils
from model import MODELS, Model1, Model2, Network, conv, conv_block
from runs import RECORDED, ROOT, describe_machine
from utils import RECIPES

CSV = ROOT / "benchmarks" / "accuracy.csv"
# The runs of the pages, by model and schedule: those of the tables, and others that the text mentions
EXPERIMENTS = {("Model1", "constant"), ("Model5", "average"), ("Model5", "again")}
EXPERIMENTS |= {(name, "described") for name in (*MODELS, "Model4 even widths")}
for schedules in tables.CROSSING.values():
    EXPERIMENTS.update(zip(tables.CROSSED, schedules, strict=True))
for changes in tables.CHANGES.values():
    EXPERIMENTS.update(changes.values())


class GrowingWidths(Network):
    """7,736 parameters: Model2's blocks, wider toward the end like Model4's, without the 1×1 convolution."""

    def __init__(self):
        super().__init__()
        self.block1 = conv_block(1, 8)
        self.block2 = conv_block(8, 8)
        self.pool = nn.MaxPool2d(2)
        self.block3 = conv_block(8, 10)
        self.block4 = conv_block(10, 12)
        self.block5 = conv_block(12, 12)
        self.block6 = conv_block(12, 14)
        self.block7 = conv_block(14, 14)
        self.logits = conv(14, 10, kernel_size=2)


def create_with_nonlinear_convblock3():
    """Return Model2's network, 7,544 parameters, with ReLU and BatchNorm in convblock3, too."""
    model = Model2()
    model.convblock3.extend([nn.ReLU(inplace=True), nn.BatchNorm2d(10)])
    return model


def create_with_average():
    """Return Model2's network, 7,224 parameters, with an average and a 1×1 convolution at the end."""
    model = Model2()
    model.convblock9 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(10, 10, 1, bias=False))
    return model


def create_with_early_norm():
    """Return Model2's network with BatchNorm before ReLU."""
    model = Model2()
    for block in model.children():
        if isinstance(block, nn.Sequential) and len(block) == 3:
            block[1], block[2] = block[2], block[1]
    return model


NETWORKS = {  # what creates a network, by its name in accuracy.csv
    **MODELS,
    "Model4 separable": partial(Candidate, "16 16", "32 32 32 32 40", "separable"),
    "Model4 even widths": partial(Candidate, "10 10", "14 14 14 14", "conv-bn-relu"),
    "Model2 with ReLU and BatchNorm in convblock3": create_with_nonlinear_convblock3,
    "Model2 with an average": create_with_average,
    "Model2 with BatchNorm before ReLU": create_with_early_norm,
    "Model2 with growing widths": GrowingWidths,
}


def recipes_of(name):
    """Return the recipes of a network by the name of their schedule in accuracy.csv."""
    model2 = RECIPES["Model2"]
    model4 = RECIPES["Model4"]
    own = RECIPES.get(name, model4)
    rate = replace(model4, augmentation=None)
    constant = {"step_size": 1, "gamma": 1.0}  # arguments of StepLR
    return {
        "described": own,
        "no_dropout": own,  # with another network
        "adamw": own,  # with another optimizer
        "average": own,  # tested with an average of the weights
        "again": own,  # on the processor of `average`
        "constant": replace(own, augmentation=None, scheduler_args=constant),
        # from Model2's to Model4's
        "model2": model2,
        "rate": rate,
        "augment": replace(model4, clean_epochs=0),
        "clean_epochs": model4,
        # the parts of optimizer and scheduler, without augmentation
        "plain_sgd": replace(rate, sgd=dict(lr=0.1, momentum=0.9)),
        "two_drops": replace(rate, scheduler_args=model2.scheduler_args),
        "low_constant": replace(rate, sgd={**model4.sgd, "lr": 0.01}, scheduler_args=constant),
    }


def train_and_describe(name, schedule, seed, data):
    """Train one model with one seed; return the rows of accuracy.csv, one per epoch."""
    device = utils.choose_device()
    recipe = recipes_of(name)[schedule]
    create = NETWORKS[name]
    if schedule == "no_dropout":
        create = partial(Model1, dropout=0)
    torch.manual_seed(seed)
    model = create().to(device)
    if schedule == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), **recipe.sgd)
    tested = model
    if schedule == "average":
        tested = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
        optimizer.register_step_post_hook(lambda *args: tested.update_parameters(model))
    checkpoint = f"accuracy-{name}-{schedule}-{seed}"
    history = common.train_model(checkpoint, model, optimizer, recipe, data, seed, tested)
    rows = []
    for index in range(common.EPOCHS):
        row = {"model": name, "schedule": schedule, "seed": seed, "epoch": index + 1}
        for column, field in RECORDED.items():
            row[column] = round(getattr(history, field)[index], 6)
        rows.append(row | describe_machine(device))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", nargs="+", type=int, default=common.SEEDS)
    args = parser.parse_args()
    data = utils.load_data(standin=False)
    device = describe_machine(utils.choose_device())["device"]
    for seed in args.seeds:
        for name, schedule in tqdm(sorted(EXPERIMENTS), desc=f"seed {seed}"):
            columns = {"model": name, "schedule": schedule, "seed": str(seed), "device": device}
            if args.only in f"{name} {schedule}" and not common.is_recorded(columns, CSV):
                common.append_rows(train_and_describe(name, schedule, seed, data), CSV)


if __name__ == "__main__":
    main()

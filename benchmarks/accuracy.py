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
import torch
from search import Candidate
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import utils
from model import MODELS, Model1, Model2, Model4, Model5, Network, conv, conv_block
from runs import RECORDED, ROOT, describe_machine
from utils import RECIPES

CSV = ROOT / "benchmarks" / "accuracy.csv"
RECIPE = RECIPES["Model4"]
NOT_AUGMENTED = replace(RECIPE, augmentation=None)
AUGMENTED_UNTIL_THE_END = replace(RECIPE, clean_epochs=0)
CONSTANT_RATE = {"step_size": 1, "gamma": 1.0}  # arguments of StepLR


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
            relu = block[1]
            block[1] = block[2]
            block[2] = relu
    return model


create_separable = partial(Candidate, [16, 16], [32, 32, 32, 32, 40], "separable")
EXPERIMENTS = {  # from (model, schedule), as in accuracy.csv, to what creates the network, and the recipe
    ("Model1", "constant"): (Model1, replace(RECIPES["Model1"], scheduler_args=CONSTANT_RATE)),
    ("Model1", "no_dropout"): (partial(Model1, dropout=0), RECIPES["Model1"]),
    # two networks with four recipes: "described" of Model2, of Model4, and these
    ("Model4", "model2"): (Model4, RECIPES["Model2"]),
    ("Model2", "rate"): (Model2, NOT_AUGMENTED),
    ("Model4", "rate"): (Model4, NOT_AUGMENTED),
    ("Model2", "augment"): (Model2, AUGMENTED_UNTIL_THE_END),
    ("Model4", "augment"): (Model4, AUGMENTED_UNTIL_THE_END),
    ("Model2", "clean_epochs"): (Model2, RECIPE),
    # Model2's to Model4's recipe with the separable network, and another network of the search
    ("Model4 separable", "model2"): (create_separable, RECIPES["Model2"]),
    ("Model4 separable", "rate"): (create_separable, NOT_AUGMENTED),
    ("Model4 separable", "augment"): (create_separable, AUGMENTED_UNTIL_THE_END),
    ("Model4 separable", "described"): (create_separable, RECIPE),
    ("Model4 even widths", "described"): (
        partial(Candidate, [10, 10], [14, 14, 14, 14], "conv-bn-relu"),
        RECIPE,
    ),
    # the parts of optimizer and scheduler, without augmentation
    ("Model4", "plain_sgd"): (Model4, replace(NOT_AUGMENTED, sgd=dict(lr=0.1, momentum=0.9))),
    ("Model4", "two_drops"): (
        Model4,
        replace(NOT_AUGMENTED, scheduler_args=RECIPES["Model2"].scheduler_args),
    ),
    ("Model4", "constant"): (Model4, replace(NOT_AUGMENTED, scheduler_args=CONSTANT_RATE)),
    ("Model4", "low_constant"): (
        Model4,
        replace(NOT_AUGMENTED, sgd={**RECIPE.sgd, "lr": 0.01}, scheduler_args=CONSTANT_RATE),
    ),
    # the parts of the network, with Model4's recipe
    ("Model2 with ReLU and BatchNorm in convblock3", "clean_epochs"): (
        create_with_nonlinear_convblock3,
        RECIPE,
    ),
    ("Model2 with an average", "clean_epochs"): (create_with_average, RECIPE),
    ("Model2 with BatchNorm before ReLU", "clean_epochs"): (create_with_early_norm, RECIPE),
    ("Model2 with growing widths", "clean_epochs"): (GrowingWidths, RECIPE),
    ("Model4", "adamw"): (Model4, RECIPE),  # with another optimizer
    # tested with an average of the weights
    ("Model4", "average"): (Model4, RECIPE),
    ("Model5", "average"): (Model5, RECIPES["Model5"]),
    ("Model5", "again"): (Model5, RECIPES["Model5"]),  # as described, on the processor of its `average`
}
for model_name in MODELS:
    EXPERIMENTS[model_name, "described"] = (MODELS[model_name], RECIPES[model_name])


def train_and_describe(name, schedule, seed, data):
    """Train one model with one seed; return the rows of accuracy.csv, one per epoch."""
    device = utils.choose_device()
    create, recipe = EXPERIMENTS[name, schedule]
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
        for name, schedule in tqdm(EXPERIMENTS, desc=f"seed {seed}"):
            columns = {"model": name, "schedule": schedule, "seed": str(seed), "device": device}
            if args.only in f"{name} {schedule}" and not common.is_recorded(columns, CSV):
                common.append_rows(train_and_describe(name, schedule, seed, data), CSV)


if __name__ == "__main__":
    main()

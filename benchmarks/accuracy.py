"""Train the models over several seeds, exactly as the notebook does, and record their accuracy.

    python benchmarks/accuracy.py                                          train all missing runs
    python benchmarks/accuracy.py --models Model1 Model3 --seeds 1 2 3     train some of them

A completed run is appended to `accuracy.csv`; an interrupted run is resumed. Several processes may
run in parallel if each has its own models or seeds.
"""

import argparse
from dataclasses import replace
from functools import partial

import common
import torch
from tqdm import tqdm

import utils
from model import MODELS, Model1, Model2, Model4
from runs import RECORDED, ROOT, describe_machine
from utils import RECIPES

CSV = ROOT / "benchmarks" / "accuracy.csv"
CONSTANT_RATE = {"step_size": 1, "gamma": 1.0}  # arguments of StepLR
NOT_AUGMENTED = replace(RECIPES["Model4"], augmentation=None)
AUGMENTED_UNTIL_THE_END = replace(RECIPES["Model4"], clean_epochs=0)
EXPERIMENTS = {  # from (model, schedule), as in accuracy.csv, to what creates the network, and the recipe
    ("Model1", "constant"): (Model1, replace(RECIPES["Model1"], scheduler_args=CONSTANT_RATE)),
    ("Model1", "no_dropout"): (partial(Model1, dropout=0), RECIPES["Model1"]),
    ("Model2", "rate"): (Model2, NOT_AUGMENTED),
    ("Model2", "augment"): (Model2, AUGMENTED_UNTIL_THE_END),
    ("Model2", "clean_epochs"): (Model2, RECIPES["Model4"]),
    ("Model4", "no_augmentation"): (Model4, NOT_AUGMENTED),
    ("Model4", "augment"): (Model4, AUGMENTED_UNTIL_THE_END),
    ("Model4", "constant"): (Model4, replace(RECIPES["Model4"], scheduler_args=CONSTANT_RATE)),
    ("Model4", "adamw"): (Model4, RECIPES["Model4"]),  # with another optimizer
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
    checkpoint = f"accuracy-{name}-{schedule}-{seed}"
    history = common.train_model(checkpoint, model, optimizer, recipe, data, seed)
    rows = []
    for index in range(common.EPOCHS):
        row = {"model": name, "schedule": schedule, "seed": seed, "epoch": index + 1}
        for column, field in RECORDED.items():
            row[column] = round(getattr(history, field)[index], 6)
        rows.append(row | describe_machine(device))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=common.SEEDS)
    args = parser.parse_args()
    data = utils.load_data(standin=False)
    device = describe_machine(utils.choose_device())["device"]
    for seed in args.seeds:
        for name, schedule in tqdm(EXPERIMENTS, desc=f"seed {seed}"):
            columns = {"model": name, "schedule": schedule, "seed": str(seed), "device": device}
            if name in args.models and not common.is_recorded(columns, CSV):
                common.append_rows(train_and_describe(name, schedule, seed, data), CSV)


if __name__ == "__main__":
    main()

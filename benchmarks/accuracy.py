"""Train the models over several seeds, exactly as the notebook does, and record their accuracy.

    python benchmarks/accuracy.py                                          train all missing runs
    python benchmarks/accuracy.py --models Model1 Model3 --seeds 1 2 3     train some of them

A completed run is appended to `accuracy.csv`; an interrupted run is resumed. Several processes may
run in parallel if each has its own models or seeds.
"""

import argparse
from dataclasses import replace

import common
import torch
from tqdm import tqdm

import utils
from model import MODELS, create_model

CSV = common.ROOT / "benchmarks" / "accuracy.csv"
CONSTANT_RATE = {"step_size": 1, "gamma": 1.0}  # arguments of StepLR
MODEL4_RECIPE = utils.RECIPES["Model4"]
RECIPES = {(name, "described"): recipe for name, recipe in utils.RECIPES.items()}  # by model and schedule
RECIPES["Model1", "constant"] = replace(utils.RECIPES["Model1"], scheduler_args=CONSTANT_RATE)
# From Model2 to Model4, one change at a time
RECIPES["Model2", "rate"] = replace(MODEL4_RECIPE, augmentation=None)
RECIPES["Model2", "augment"] = replace(MODEL4_RECIPE, clean_epochs=0)
RECIPES["Model2", "clean_epochs"] = MODEL4_RECIPE


def train_and_describe(name, schedule, seed, train_set, test_set, device):
    """Train one model with one seed; return the rows of accuracy.csv, one per epoch."""
    recipe = RECIPES[name, schedule]
    path = common.checkpoint_path(f"accuracy-{name}-{schedule}-{seed}")
    torch.manual_seed(seed)
    model = create_model(name).to(device)
    history = common.train_model(model, recipe, train_set, test_set, path, seed=seed, device=device)
    rows = []
    for epoch in range(1, history.completed + 1):
        row = {"model": name, "schedule": schedule, "seed": seed, "epoch": epoch}
        for column, field in common.ACCURACY_COLUMNS.items():
            row[column] = round(getattr(history, field)[epoch - 1], 6)
        row.update(common.machine_columns(device))
        rows.append(row)
    return rows


def is_recorded(name, schedule, seed, device):
    """Return whether accuracy.csv contains a run on this device."""
    columns = {
        "model": name,
        "schedule": schedule,
        "seed": str(seed),
        "device": common.machine_columns(device)["device"],
    }
    return any(columns.items() <= row.items() for row in common.read_rows(CSV))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=common.SEEDS)
    args = parser.parse_args()
    device = common.default_device()
    train_set, test_set = utils.load_data(standin=False)
    wanted = []
    for seed in args.seeds:
        for name, schedule in RECIPES:
            if name in args.models:
                wanted.append((name, schedule, seed))
    for name, schedule, seed in tqdm(wanted, desc="runs"):
        if not is_recorded(name, schedule, seed, device):
            print(f"\n{name}, {schedule}, seed {seed}")
            rows = train_and_describe(name, schedule, seed, train_set, test_set, device)
            common.append_rows(rows, CSV)


if __name__ == "__main__":
    main()

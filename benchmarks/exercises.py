"""Measure the answers to two exercises of the notebook: another optimizer, and a per-batch schedule.

    python benchmarks/exercises.py

Each run trains Model4 with seed 1, with its recipe except for the optimizer or the scheduler, and is
appended to `exercises.csv` when it is complete. The stand-in digits show what a wrong schedule does.
"""

import math

import common
import torch
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import utils
from model import Model4

CSV = common.ROOT / "benchmarks" / "exercises.csv"
SEED = 1
ADAMW = "AdamW"
PER_BATCH = "OneCycleLR, stepped per batch"
PER_EPOCH = "OneCycleLR made for batches, stepped per epoch"


def measure(variant, data, epochs):
    """Train Model4 with one change, as the exercise says; return the row of exercises.csv."""
    train_set, _ = data
    recipe = utils.RECIPES["Model4"]
    torch.manual_seed(SEED)
    model = Model4()
    if variant == ADAMW:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = StepLR(optimizer, **recipe.scheduler_args)
    else:
        optimizer = torch.optim.SGD(model.parameters(), **recipe.sgd)
        batches = math.ceil(len(train_set) / recipe.batch_size)
        scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * batches)
    if variant == PER_BATCH:
        optimizer.register_step_post_hook(lambda *args: scheduler.step())
    name = f"exercises-{variant}-{train_set.name}".replace(" ", "-")
    history = common.train_model(name, model, optimizer, scheduler, recipe, data, epochs, SEED)
    return {
        "variant": variant,
        "data": train_set.name,
        "seed": SEED,
        "epochs": epochs,
        "mean_last_five": round(common.mean_of_last_epochs(history), 3),
        "lowest_last_five": common.lowest_of_last_epochs(history),
        "last": history.test_acc[-1],
        **common.machine_columns("cpu"),
    }


def main():
    mnist = utils.load_data(standin=False)
    standin = (utils.draw_standin(train=True), utils.draw_standin(train=False))
    runs = [(ADAMW, mnist, common.EPOCHS), (PER_BATCH, standin, 2), (PER_EPOCH, standin, 2)]
    for variant, data, epochs in runs:
        if not common.is_recorded({"variant": variant}, CSV):
            common.append_rows([measure(variant, data, epochs)], CSV)


if __name__ == "__main__":
    main()

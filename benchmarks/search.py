"""The choice of Model4's and Model5's recipe, on a validation split of the training set alone.

    python benchmarks/search.py     train every configuration below that search.csv lacks

Trains on 50,000 images of a fixed permutation of MNIST's training set and validates on the last
10,000; the test images are not used. Each configuration is Model4 and its recipe with the changes it
names: of the recipe, or of the widths `before` and `after`.
"""

import json
import statistics

import torch

from accuracy import append_rows, checkpoint, EPOCHS, read_rows, ROOT, train_model, where
from model import Model4
import utils

CSV = ROOT / "benchmarks" / "search.csv"
BASE = utils.RECIPES["Model4"]
TRIED = [
    {},
    {"StepLR": {"step_size": 5, "gamma": 0.2}},
    {"StepLR": {"step_size": 1, "gamma": 0.8}},
    {"plain": 0},
    {"StepLR": {"step_size": 1, "gamma": 0.7}},
    {"batch_size": 64, "optimizer": {**BASE["optimizer"], "lr": 0.07}},
    {"augment": {"degrees": 15, "shift": 0.08, "scale": 0.1}},
    {"augment": {"degrees": 7, "shift": 0.04, "scale": 0.04}},
]


def split(train_set):
    """The fixed split: 50,000 images to train on and 10,000 to validate on."""
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    parts = []
    for index in (order[:50_000], order[50_000:]):
        part = utils.MNIST.__new__(utils.MNIST)
        part.data, part.targets = train_set.data[index], train_set.targets[index]
        parts.append(part)
    return parts


def run(changes, seed, parts, epochs=EPOCHS):
    """Train one configuration with one seed; returns its row."""
    recipe = {**BASE, **changes}
    widths = {name: recipe.pop(name) for name in ("before", "after") if name in recipe}
    torch.manual_seed(seed)
    model = Model4(**widths).to(memory_format=Model4.memory_format)
    settings = dict(changes=json.dumps(changes), epochs=epochs, seed=seed)
    name = "".join(c for c in f"search-{settings['changes']}-{seed}" if c.isalnum() or c in ".-")
    history = train_model(model, recipe, *parts, settings, checkpoint(name))
    return dict(
        changes=settings["changes"],
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        mean_last_five=round(statistics.mean(history.test_acc[-5:]), 3),
        worst_last_five=min(history.test_acc[-5:]),
        loss_last_five=round(statistics.mean(history.test_losses[-5:]), 5),
        val_acc_by_epoch=" ".join(f"{a:.2f}" for a in history.test_acc),
        seconds=round(statistics.median(history.seconds), 1),
        **where("cpu"),
    )


def main():
    done = {(row["changes"], row["seed"]) for row in read_rows(CSV)}
    parts = split(utils.load_data(standin=False)[0])
    for changes in TRIED:
        for seed in (1, 2, 3):
            if (json.dumps(changes), str(seed)) not in done:
                print(f"\n{changes}, seed {seed}")
                append_rows([run(changes, seed, parts)], CSV)


if __name__ == "__main__":
    main()

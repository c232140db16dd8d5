"""Why Model1's train accuracy is near 89 %: evaluate its trained weights with some dropout layers active.

    python benchmarks/dropout_ablation.py

Evaluates the Model1 checkpoints written by accuracy.py (as described) on the 60,000 training images,
with BatchNorm in evaluation mode. Writes `dropout_ablation.csv`, one row per seed and setting.
"""

import common
import torch
from torch import nn
from tqdm import tqdm

import utils
from runs import ROOT, describe_machine


@torch.no_grad()
def measure_accuracy(model, dropouts, loader):
    """Return the accuracy of a model in percent, with some dropout layers active."""
    model.eval()
    for dropout in dropouts:
        dropout.train()
    correct = 0
    for data, target in loader:
        correct += utils.GetCorrectPredCount(model(data), target).item()
    return 100 * correct / len(loader.target)


def main():
    train_set, _ = utils.load_data(standin=False)
    loader = utils.BatchLoader(train_set, 500, "cpu")
    rows = []
    for seed in tqdm(common.SEEDS, desc="seeds"):
        _, model = common.load_model(common.checkpoint_path(f"accuracy-Model1-described-{seed}"))
        dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        settings = {
            "no dropout": [],
            "dropout in blocks 1 to 6": dropouts[:-1],
            "dropout in block 7, on the logits": dropouts[-1:],
            "all dropout, as in training": dropouts,
        }
        for setting, active in settings.items():
            torch.manual_seed(seed)
            accuracy = measure_accuracy(model, active, loader)
            row = {"dropout": setting, "seed": seed, "train_acc": f"{accuracy:.3f}"}
            rows.append(row | describe_machine("cpu"))
    common.write_rows(rows, ROOT / "benchmarks" / "dropout_ablation.csv")


if __name__ == "__main__":
    main()

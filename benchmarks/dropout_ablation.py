"""Why Model1's train accuracy is near 89 %: evaluate its trained weights with some dropout layers active.

    python benchmarks/dropout_ablation.py

Evaluates the Model1 checkpoints written by accuracy.py (as described) on the 60,000 training images,
with BatchNorm in evaluation mode. Writes `dropout_ablation.csv`, one row per seed and setting.
"""

import common
import torch
from tqdm import tqdm

import utils

CSV = common.ROOT / "benchmarks" / "dropout_ablation.csv"
BATCH_SIZE = 500
LAST_BLOCK = ["convblock7"]  # its dropout acts on the logits
OTHER_BLOCKS = ["convblock1", "convblock2", "convblock4", "convblock5", "convblock6"]
SETTINGS = {  # blocks with active dropout, which is the last layer of each
    "no dropout": [],
    "dropout in blocks 1 to 6": OTHER_BLOCKS,
    "dropout in block 7, on the logits": LAST_BLOCK,
    "all dropout, as in training": OTHER_BLOCKS + LAST_BLOCK,
}


@torch.no_grad()
def measure_accuracy(model, blocks, loader):
    """Return the accuracy of a model in percent, with the dropout of some blocks active."""
    model.eval()
    for name in blocks:
        model.get_submodule(name)[-1].train()
    correct = 0
    for data, target in loader:
        correct += utils.GetCorrectPredCount(model(data), target).item()
    return 100 * correct / len(loader.target)


def main():
    train_set, _ = utils.load_data(standin=False)
    loader = utils.BatchLoader(train_set, BATCH_SIZE, "cpu")
    rows = []
    for seed in tqdm(common.SEEDS, desc="seeds"):
        _, model = common.load_model(common.checkpoint_path(f"accuracy-Model1-described-{seed}"))
        for setting, blocks in SETTINGS.items():
            torch.manual_seed(seed)
            accuracy = measure_accuracy(model, blocks, loader)
            row = {"dropout": setting, "seed": seed, "train_acc": f"{accuracy:.3f}"}
            rows.append(row | common.machine_columns("cpu"))
    common.write_rows(rows, CSV)


if __name__ == "__main__":
    main()

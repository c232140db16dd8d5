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
from model import create_model

CSV = common.ROOT / "benchmarks" / "dropout_ablation.csv"
BATCH_SIZE = 500
LAST_BLOCK = ["convblock7"]  # its dropout acts on the logits
OTHER_BLOCKS = ["convblock1", "convblock2", "convblock4", "convblock5", "convblock6"]
SETTINGS = {  # blocks with active dropout
    "no dropout": [],
    "dropout in blocks 1 to 6": OTHER_BLOCKS,
    "dropout in block 7, on the logits": LAST_BLOCK,
    "all dropout, as in training": OTHER_BLOCKS + LAST_BLOCK,
}


def activate_dropout(model, blocks):
    """Set the dropout layers of some blocks to training mode and all other layers to evaluation mode."""
    model.eval()
    for name in blocks:
        for layer in model.get_submodule(name):
            if isinstance(layer, nn.Dropout):
                layer.train()


@torch.no_grad()
def measure_accuracy(model, loader):
    """Return the accuracy of a model in percent, without changing the mode of its layers."""
    correct = 0
    count = 0
    for data, target in loader:
        correct += utils.GetCorrectPredCount(model(data), target).item()
        count += len(target)
    return 100 * correct / count


def main():
    train_set, _ = utils.load_data(standin=False)
    loader = utils.BatchLoader(train_set, BATCH_SIZE, "cpu")
    rows = []
    for seed in tqdm(common.SEEDS, desc="seeds"):
        model = create_model("Model1")
        state = utils.load_checkpoint(common.checkpoint_path(f"accuracy-Model1-described-{seed}"))
        model.load_state_dict(state["model"])
        for setting, blocks in SETTINGS.items():
            activate_dropout(model, blocks)
            torch.manual_seed(seed)
            accuracy = measure_accuracy(model, loader)
            row = {"dropout": setting, "seed": seed, "train_acc": f"{accuracy:.3f}"}
            row.update(common.machine_columns("cpu"))
            rows.append(row)
    common.write_rows(rows, CSV)


if __name__ == "__main__":
    main()

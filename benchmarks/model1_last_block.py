"""Why Model1's train accuracy sits near 89 %: its trained weights, with parts of the dropout on.

    python benchmarks/model1_last_block.py

Takes the checkpoints that accuracy.py leaves for Model1 (schedule as described) and passes the
60,000 training images through them, with BatchNorm fixed, under four settings of the dropout.
Writes model1_last_block.csv, a row a seed and setting.
"""

import csv
import os
from pathlib import Path
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn
import torch.nn.functional as F

from model import create_model
import utils

CSV = ROOT / "benchmarks" / "model1_last_block.csv"
SETTINGS = {
    "no dropout": lambda name: False,
    "dropout in blocks 1 to 6": lambda name: not name.startswith("convblock7"),
    "dropout in block 7, on the logits": lambda name: name.startswith("convblock7"),
    "all dropout, as in training": lambda name: True,
}


class WithDropout(nn.Module):
    """A trained model whose dropout layers, chosen by name, stay on in `eval` mode."""

    def __init__(self, model, chosen):
        super().__init__()
        self.model, self.chosen = model, chosen

    def train(self, mode=True):
        self.model.eval()
        for name, layer in self.model.named_modules():
            if isinstance(layer, nn.Dropout):
                layer.train(self.chosen(name))
        return self

    def forward(self, x):
        return self.model(x)


def main():
    train_set, _ = utils.load_data(standin=False)
    loader = utils.BatchLoader(train_set, 500, "cpu")
    folder = Path(os.environ.get("S7_CHECKPOINTS", "checkpoints"))
    rows = []
    for seed in range(1, 6):
        model = create_model("Model1")
        model.load_state_dict(utils.read_checkpoint(folder / f"accuracy-Model1-described-{seed}.pt")["model"])
        for setting, chosen in SETTINGS.items():
            torch.manual_seed(seed)
            print(f"seed {seed}, {setting}: ", end="")
            accuracy = utils.test(WithDropout(model, chosen), "cpu", loader, F.nll_loss)[1]
            rows.append([setting, seed, f"{accuracy:.3f}", "CPU", torch.get_num_threads(), torch.__version__])
    with open(CSV, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["dropout", "seed", "train_acc", "device", "threads", "torch"], *rows])


if __name__ == "__main__":
    main()

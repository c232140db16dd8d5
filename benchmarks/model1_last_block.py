"""Why Model1's train accuracy sits near 89 %: its trained weights, with parts of the dropout on.

    python benchmarks/model1_last_block.py

Passes the 60,000 training images through the checkpoints that accuracy.py leaves for Model1 (as
described), with BatchNorm fixed. Writes model1_last_block.csv, a row a seed and setting.
"""

import torch
from torch import nn
import torch.nn.functional as F

from accuracy import append_rows, checkpoint, ROOT, SEEDS, where
from model import create_model
import utils

CSV = ROOT / "benchmarks" / "model1_last_block.csv"
SETTINGS = {
    "no dropout": lambda name: False,
    "dropout in blocks 1 to 6": lambda name: not name.startswith("convblock7"),
    "dropout in block 7, on the logits": lambda name: name.startswith("convblock7"),
    "all dropout, as in training": lambda name: True,
}


def main():
    train_set, _ = utils.load_data(standin=False)
    loader = utils.BatchLoader(train_set, 500, "cpu")
    rows = []
    for seed in SEEDS:
        model = create_model("Model1")
        model.load_state_dict(utils.read_checkpoint(checkpoint(f"accuracy-Model1-described-{seed}"))["model"])
        dropouts = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Dropout)}
        model.eval = lambda: None  # `test` would switch the dropout off again
        for setting, chosen in SETTINGS.items():
            model.train(False)
            for name, layer in dropouts.items():
                layer.train(chosen(name))
            torch.manual_seed(seed)
            accuracy = utils.test(model, "cpu", loader, F.nll_loss)[1]
            rows.append(dict(dropout=setting, seed=seed, train_acc=f"{accuracy:.3f}", **where("cpu")))
    append_rows(rows, CSV, anew=True)


if __name__ == "__main__":
    main()

"""Accuracy and prediction time of the drawing field, in a headless Chromium or Chrome.

    python benchmarks/drawing.py checkpoints/Model4-seed1.pt

Test images are enlarged to the size of the field and drawn in it. The page then does what it does while
a user draws: it crops, scales and centers the drawing, runs the network and shows the prediction. The
script writes drawing.csv, one row per checkpoint: the accuracy in the field and on the original images,
the largest difference from PyTorch's probabilities, and the median time of a prediction.
"""

import json
import statistics
import sys

import torch
from browser import Browser, find_browser
from common import ROOT, machine_columns, write_rows

import utils
from model import create_model

IMAGES = 500
CSV = ROOT / "benchmarks" / "drawing.csv"

# Draws an image, given as 784 opacities from 0 to 255, and returns what the page makes of it.
DRAW = """
function drawImage(opacities) {
  const host = document.querySelector(".drawing-field");
  const field = host.field;
  const image = new ImageData(28, 28);
  opacities.forEach((opacity, i) => image.data.set([0, 0, 0, opacity], 4 * i));
  const small = document.createElement("canvas");
  small.width = 28;
  small.height = 28;
  small.getContext("2d").putImageData(image, 0, 0);
  const side = field.ink.canvas.width;
  field.ink.clearRect(0, 0, side, side);
  field.ink.drawImage(small, 0, 0, side, side);
  const start = performance.now();
  field.answer();
  const milliseconds = performance.now() - start;
  const pixels = field.prepare(field.ink);
  return {
    answer: Number(host.shadowRoot.querySelector("output").textContent),
    milliseconds,
    pixels: [...pixels],
    probabilities: field.classify(pixels),
  };
}
"""


@torch.no_grad()
def measure(browser, model, name, test_set):
    """Return a row for a trained model and a `DigitSet` of test images, as a dictionary."""
    model.eval()
    field = utils.drawing_field(model, name)
    browser.show(f"<!doctype html><meta charset='utf-8'>{field.html}<script>{DRAW}</script>")
    answers = []
    times = []
    largest_difference = 0.0
    for image in test_set.images:
        result = browser.evaluate(f"drawImage({json.dumps(image.flatten().tolist())})")
        answers.append(result["answer"])
        times.append(result["milliseconds"])
        pixels = torch.tensor(result["pixels"]).reshape(1, 1, utils.SIDE, utils.SIDE)
        expected = model((pixels - utils.MEAN) / utils.STD)[0].exp()
        difference = (torch.tensor(result["probabilities"]) - expected).abs().max().item()
        largest_difference = max(largest_difference, difference)
    data = (test_set.images[:, None] / 255 - utils.MEAN) / utils.STD
    original_predictions = model(data).argmax(dim=1)
    field_predictions = torch.tensor(answers)
    return {
        "model": name,
        "images": len(test_set),
        "original_acc": accuracy(original_predictions, test_set.labels),
        "field_acc": accuracy(field_predictions, test_set.labels),
        "largest_difference": f"{largest_difference:.1e}",
        "median_ms": f"{statistics.median(times):.1f}",
        "browser": browser.call("Browser.getVersion")["product"],
    }


def accuracy(predictions, labels):
    """Return the share of correct predictions in percent."""
    return f"{100 * (predictions == labels).double().mean().item():.2f}"


def main():
    program = find_browser()
    if program is None:
        sys.exit("no Chromium or Chrome was found: install one")
    _, test_set = utils.load_data(standin=False)
    rows = []
    browser = Browser(program)
    try:
        for path in sys.argv[1:]:
            state = utils.read_checkpoint(path)
            name = state["settings"]["model"]
            model = create_model(name)
            model.load_state_dict(state["model"])
            rows.append({**measure(browser, model, name, test_set[:IMAGES]), **machine_columns("cpu")})
    finally:
        browser.close()
    for row in rows:
        print(row)
    write_rows(rows, CSV)


if __name__ == "__main__":
    main()

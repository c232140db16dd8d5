"""Accuracy and prediction time of the drawing field, in a headless Chromium or Chrome, and its screenshot.

    python benchmarks/drawing.py runs/Model4-seed1.pt

Test images are enlarged to the size of the field and become its ink. The page then does what it does while
a user draws: it crops, scales and centers the drawing, and runs the network. The script writes one row to
drawing.csv: the accuracy in the field and on the original images, the largest difference from PyTorch's
probabilities, and the median time of a prediction. images/drawing.png shows a digit drawn by mouse.

Needs Playwright (`pip install playwright`) and an installed Chromium or Chrome.
"""

import contextlib
import json
import math
import shutil
import statistics
import sys

import common
import torch
import torch.nn.functional as F
from playwright.sync_api import sync_playwright

import utils
from drawing_field import drawing_field
from runs import ROOT, describe_machine

IMAGES = 500
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FIELD = 252  # side of the field in its own units
HEAD = """
<!doctype html><meta charset="utf-8">
<style>body { margin: 16px; font-family: system-ui, sans-serif; color: #222 }</style>
"""

# Returns what the page makes of ink, given as JSON.
RECOGNIZE = """
({ field }, json) => {
  const ink = JSON.parse(json);
  const start = performance.now();
  const pixels = field.prepare(ink);
  const probabilities = field.classify(pixels);
  return { pixels, probabilities, milliseconds: performance.now() - start };
}
"""


@contextlib.contextmanager
def running_browser():
    """Run a browser in a `with` block; raise FileNotFoundError if none is installed."""
    programs = list(filter(None, map(shutil.which, BROWSERS)))
    if not programs:
        raise FileNotFoundError("no Chromium or Chrome was found: install one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=programs[0])
        yield browser
        browser.close()


@torch.no_grad()
def measure(browser, model, name, test_set):
    """Return a row for a trained model and a `DigitSet` of test images, as a dictionary."""
    page = browser.new_page()
    page.set_content(HEAD + drawing_field(model, name).data)
    host = page.locator("div.drawing-field")
    results = []
    images = test_set.images[:, None] / 255
    for ink in F.interpolate(images, FIELD, mode="bilinear")[:, 0]:
        results.append(host.evaluate(RECOGNIZE, json.dumps((ink / ink.max()).tolist())))
    pixels = torch.tensor([result["pixels"] for result in results])[:, None]
    probabilities = torch.tensor([result["probabilities"] for result in results])
    expected = model((pixels - utils.MEAN) / utils.STD).exp()
    original = model((images - utils.MEAN) / utils.STD)
    return {
        "model": name,
        "images": len(test_set),
        "original_acc": f"{100 * utils.GetCorrectPredCount(original, test_set.labels) / len(test_set):.2f}",
        "field_acc": f"{100 * utils.GetCorrectPredCount(probabilities, test_set.labels) / len(test_set):.2f}",
        "largest_difference": f"{(probabilities - expected).abs().max():.1e}",
        "median_ms": f"{statistics.median(result['milliseconds'] for result in results):.1f}",
        "browser": f"Chrome/{browser.version}",
        **describe_machine("cpu"),
    }


def draw_screenshot(browser, model, name):
    """Draw a 3 by mouse and save a screenshot of the field."""
    page = browser.new_page(viewport={"width": 720, "height": 404}, device_scale_factor=2)
    page.set_content(HEAD + drawing_field(model, f"{name} on MNIST").data)
    box = page.locator("svg").bounding_box()
    for step in range(49):
        share = step / 48
        x = 0.36 + 0.27 * abs(math.sin(2 * math.pi * share)) ** 0.6
        y = 0.16 + 0.68 * share
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.mouse.down()
    page.mouse.up()
    page.mouse.move(0, 0)
    page.evaluate("new Promise(requestAnimationFrame)")  # the prediction is shown with the next frame
    page.screenshot(path=ROOT / "images" / "drawing.png")


def main():
    name, model = common.load_model(sys.argv[1])
    _, test_set = utils.load_data(standin=False)
    with running_browser() as browser:
        row = measure(browser, model, name, test_set[:IMAGES])
        draw_screenshot(browser, model, name)
    common.write_rows([row], ROOT / "benchmarks" / "drawing.csv")


if __name__ == "__main__":
    main()

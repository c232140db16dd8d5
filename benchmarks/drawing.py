"""Accuracy and prediction time of the drawing field, in a headless Chromium or Chrome, and its screenshot.

    python benchmarks/drawing.py checkpoints/Model4-seed1.pt

Test images are enlarged to the size of the field and become its ink. The page then does what it does while
a user draws: it crops, scales and centers the drawing, runs the network and shows the prediction. The script
writes drawing.csv, one row per checkpoint: the accuracy in the field and on the original images, the largest
difference from PyTorch's probabilities, and the median time of a prediction. images/drawing.png shows a
digit drawn by mouse, for the first checkpoint; it is 1,440 pixels wide, for display at 720.

Needs Playwright (`pip install playwright`) and an installed Chromium or Chrome.
"""

import base64
import contextlib
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

IMAGES = 500
CSV = common.ROOT / "benchmarks" / "drawing.csv"
SCREENSHOT = common.ROOT / "images" / "drawing.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
FIELD = 252  # side of the field in its own units
STYLE = "body { margin: 16px; font-family: system-ui, sans-serif; color: #222 }"

# Makes 252×252 bytes, in base64, the ink of the field and returns what the page makes of it.
RECOGNIZE = """
(host, text) => {
  const field = host.field;
  const values = Float64Array.from(atob(text), (character) => character.charCodeAt(0) / 255);
  field.ink = field.ink.map((row, y) => values.slice(y * row.length, (y + 1) * row.length));
  const start = performance.now();
  field.predict();
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


@contextlib.contextmanager
def running_browser():
    """Run a browser in a `with` block; raise FileNotFoundError if none is installed."""
    for name in BROWSERS:
        program = shutil.which(name)
        if program is not None:
            break
    else:
        raise FileNotFoundError("no Chromium or Chrome was found: install one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        browser.close()


def open_field(browser, model, description, **options):
    """Return a page with a drawing field, and the field's element; `options` are those of the page."""
    page = browser.new_page(**options)
    field = drawing_field(model, description)
    page.set_content(f"<!doctype html><meta charset='utf-8'><style>{STYLE}</style>{field.html}")
    host = page.locator("div.drawing-field")
    host.wait_for()
    return page, host


@torch.no_grad()
def measure(browser, model, name, test_set):
    """Return a row for a trained model and a `DigitSet` of test images, as a dictionary."""
    model.eval()
    page, host = open_field(browser, model, name)
    answers = []
    times = []
    largest_difference = 0.0
    enlarged = F.interpolate(test_set.images[:, None] / 255, FIELD, mode="bilinear")
    for ink in enlarged[:, 0]:
        ink = (255 * ink / ink.max()).round().byte()
        result = host.evaluate(RECOGNIZE, base64.b64encode(ink.numpy().tobytes()).decode())
        answers.append(result["answer"])
        times.append(result["milliseconds"])
        pixels = torch.tensor(result["pixels"]).reshape(1, 1, utils.SIDE, utils.SIDE)
        expected = model((pixels - utils.MEAN) / utils.STD)[0].exp()
        difference = (torch.tensor(result["probabilities"]) - expected).abs().max().item()
        largest_difference = max(largest_difference, difference)
    page.close()
    data = (test_set.images[:, None] / 255 - utils.MEAN) / utils.STD
    return {
        "model": name,
        "images": len(test_set),
        "original_acc": accuracy(model(data).argmax(dim=1), test_set.labels),
        "field_acc": accuracy(torch.tensor(answers), test_set.labels),
        "largest_difference": f"{largest_difference:.1e}",
        "median_ms": f"{statistics.median(times):.1f}",
        "browser": f"Chrome/{browser.version}",
    }


def accuracy(predictions, labels):
    """Return the share of correct predictions in percent."""
    return f"{100 * (predictions == labels).double().mean().item():.2f}"


def arc(center_x, center_y, radius_x, radius_y, start, end, steps=24):
    """Return points on an ellipse from one angle to another, in degrees clockwise from the right."""
    points = []
    for step in range(steps + 1):
        angle = math.radians(start + (end - start) * step / steps)
        points.append((center_x + radius_x * math.cos(angle), center_y + radius_y * math.sin(angle)))
    return points


THREE = arc(0.46, 0.33, 0.20, 0.17, -160, 80) + arc(0.47, 0.66, 0.23, 0.18, -80, 150)


def draw_screenshot(browser, model, description, path):
    """Draw a 3 by mouse and save a screenshot of the field."""
    window = {"width": 720, "height": 404}
    page, host = open_field(browser, model, description, viewport=window, device_scale_factor=2)
    box = host.locator("svg").bounding_box()
    for x, y in THREE:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.mouse.down()
    page.mouse.up()
    page.mouse.move(0, 0)
    page.wait_for_function("host => host.field.frame === null", arg=host.element_handle())
    page.screenshot(path=path)
    page.close()


def main(paths, test_set, csv=CSV, screenshot=SCREENSHOT):
    """Measure the checkpoints at `paths`, and write the CSV file and the screenshot."""
    rows = []
    with running_browser() as browser:
        for path in paths:
            name, model = common.load_model(path)
            row = {**measure(browser, model, name, test_set), **common.machine_columns("cpu")}
            print(row)
            rows.append(row)
            if path == paths[0]:
                draw_screenshot(browser, model, f"{name} on MNIST", screenshot)
    common.write_rows(rows, csv)


if __name__ == "__main__":
    _, mnist = utils.load_data(standin=False)
    main(sys.argv[1:], mnist[:IMAGES])

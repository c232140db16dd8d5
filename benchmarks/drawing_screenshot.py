"""Draw a digit in the drawing field by mouse and save a screenshot as images/drawing.png.

    python benchmarks/drawing_screenshot.py checkpoints/Model4-seed1.pt

The picture is 1,440 pixels wide, for display at 720. It is not part of a test; run it after a full run.
"""

import math
import sys

from browser import Browser, find_browser
from common import ROOT

import utils
from model import create_model

STYLE = "body { margin: 16px; font-family: system-ui, sans-serif; color: #222 }"
WINDOW = {"width": 720, "height": 372, "density": 2}


def arc(center_x, center_y, radius_x, radius_y, start, end, steps=24):
    """Return points on an ellipse from one angle to another, in degrees clockwise from the right."""
    points = []
    for step in range(steps + 1):
        angle = math.radians(start + (end - start) * step / steps)
        points.append((center_x + radius_x * math.cos(angle), center_y + radius_y * math.sin(angle)))
    return points


THREE = arc(0.46, 0.33, 0.20, 0.17, -160, 80) + arc(0.47, 0.66, 0.23, 0.18, -80, 150)


def main():
    state = utils.read_checkpoint(sys.argv[1])
    name = state["settings"]["model"]
    model = create_model(name)
    model.load_state_dict(state["model"])
    accuracy = state["history"]["test_acc"][-1]
    field = utils.drawing_field(model, f"{name} on MNIST: test accuracy {accuracy:.2f} %")
    browser = Browser(find_browser())
    try:
        browser.show(f"<!doctype html><meta charset='utf-8'><style>{STYLE}</style>{field.html}", **WINDOW)
        root = "document.querySelector('.drawing-field').shadowRoot"
        box = browser.evaluate(f"{root}.querySelector('svg').getBoundingClientRect().toJSON()")
        points = []
        for x, y in THREE:
            points.append((box["x"] + x * box["width"], box["y"] + y * box["height"]))
        browser.drag_mouse(points)
        browser.screenshot().save(ROOT / "images" / "drawing.png", optimize=True)
    finally:
        browser.close()


if __name__ == "__main__":
    main()

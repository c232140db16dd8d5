"""How `predict` fares on pictures: 1,000 MNIST test images, each turned into pictures of many kinds.

    python benchmarks/own_digits.py checkpoints/Model4-seed1.pt     with a full run's weights

Writes own_digits.csv: the accuracy for each kind of picture beside that on the plain test images.
"""

import io
import sys

from PIL import Image, ImageOps
import torch
from tqdm import tqdm

from accuracy import append_rows, ROOT, where
from model import create_model
import utils

IMAGES = 1000
CSV = ROOT / "benchmarks" / "own_digits.csv"


def enlarged(image):
    return image.resize((280, 280), Image.LANCZOS)


def off_centre(image):
    paper = Image.new("L", (640, 480))
    paper.paste(enlarged(image), (350, 10))
    return paper


def jpeg(image):
    file = io.BytesIO()
    ImageOps.invert(enlarged(image)).convert("RGB").save(file, "JPEG", quality=50)
    return Image.open(file)


KINDS = {
    "unchanged": lambda image: image,
    "enlarged": enlarged,
    "inverted": lambda image: ImageOps.invert(enlarged(image)),
    "coloured": lambda image: ImageOps.colorize(enlarged(image), (250, 240, 215), (30, 50, 140)),
    "off centre": off_centre,
    "padded": lambda image: ImageOps.expand(enlarged(image), 400, fill=0),
    "transparent, dark": lambda image: Image.merge("LA", (Image.new("L", (280, 280), 20), enlarged(image))),
    "transparent, light": lambda image: Image.merge("LA", (Image.new("L", (280, 280), 255), enlarged(image))),
    "jpeg": jpeg,
}


def main():
    state = utils.read_checkpoint(sys.argv[1])
    name = state["settings"]["model"]
    model = create_model(name).eval()
    model.load_state_dict(state["model"])
    _, test_set = utils.load_data(standin=False)
    images, target = test_set.data[:IMAGES], test_set.targets[:IMAGES]
    data = utils.BatchLoader(test_set, 500, "cpu").data[:IMAGES]
    with torch.no_grad():
        right = {"plain": utils.GetCorrectPredCount(model(data), target).item()}
    for kind, turn in tqdm(KINDS.items()):
        pictures = (turn(Image.fromarray(image.numpy())) for image in images)
        predicted = torch.stack([utils.predict(model, picture) for picture in pictures])
        right[kind] = utils.GetCorrectPredCount(predicted, target).item()
    rows = []
    for kind, count in right.items():
        accuracy, to_plain = (f"{100 * n / IMAGES:.1f}" for n in (count, count - right["plain"]))
        row = dict(pictures=kind, images=IMAGES, accuracy=accuracy, to_plain=to_plain, model=name)
        rows.append(row | where("cpu"))
    append_rows(rows, CSV, anew=True)


if __name__ == "__main__":
    main()

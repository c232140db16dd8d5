"""How `predict` fares on pictures: 1,000 MNIST test images, each turned into pictures of many kinds.

    python benchmarks/own_digits.py checkpoints/Model4-seed1.pt

The argument is the checkpoint of a full run; its best weights are used. Writes own_digits.csv:
the accuracy for each kind of picture beside that on the plain test images.
"""

import argparse
import csv
import io
from pathlib import Path
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageOps
import torch
from tqdm import tqdm

from model import create_model
import utils

CSV = ROOT / "benchmarks" / "own_digits.csv"


def enlarged(image):
    return image.resize((280, 280), Image.LANCZOS)


def inverted(image):
    return ImageOps.invert(enlarged(image))


def coloured(image):
    return ImageOps.colorize(enlarged(image), black=(250, 240, 215), white=(30, 50, 140))


def off_centre(image):
    paper = Image.new("L", (640, 480))
    paper.paste(enlarged(image), (350, 10))
    return paper


def padded(image):
    return ImageOps.expand(enlarged(image), 400, fill=0)


def transparent_dark(image):
    picture = Image.new("RGBA", (280, 280), (20, 20, 20, 0))
    picture.putalpha(enlarged(image))
    return picture


def transparent_light(image):
    picture = Image.new("RGBA", (280, 280), (255, 255, 255, 0))
    picture.putalpha(enlarged(image))
    return picture


def jpeg(image):
    file = io.BytesIO()
    inverted(image).convert("RGB").save(file, "JPEG", quality=50)
    return Image.open(file)


def unchanged(image):
    return image


KINDS = (
    unchanged,
    enlarged,
    inverted,
    coloured,
    off_centre,
    padded,
    transparent_dark,
    transparent_light,
    jpeg,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    name = utils.read_checkpoint(args.checkpoint)["settings"]["model"]
    model = create_model(name).eval()
    utils.load_best(model, args.checkpoint)
    _, test_set = utils.load_data(standin=False)
    images, target = test_set.data[: args.images], test_set.targets[: args.images]
    data = utils.BatchLoader(test_set, 500, "cpu").data[: args.images]
    with torch.no_grad():
        right = {"plain": utils.GetCorrectPredCount(model(data), target).item()}
    for kind in tqdm(KINDS):
        pictures = (kind(Image.fromarray(image.numpy())) for image in images)
        predicted = torch.stack([utils.predict(model, picture) for picture in pictures])
        right[kind.__name__] = utils.GetCorrectPredCount(predicted, target).item()
    with open(CSV, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["pictures", "images", "accuracy", "to_plain", "model", "device", "torch"])
        for kind, count in right.items():
            values = [100 * count / args.images, 100 * (count - right["plain"]) / args.images]
            writer.writerow(
                [kind, args.images, *(f"{v:.1f}" for v in values), name, "CPU", torch.__version__]
            )
            print(f"{kind:<20}{values[0]:6.1f} %{values[1]:+6.1f}")


if __name__ == "__main__":
    main()

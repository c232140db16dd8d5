"""Measure how `predict` does on pictures of digits: MNIST test images drawn as pictures of several kinds.

    python benchmarks/own_digits.py checkpoints/Model4-seed1.pt

The argument is the checkpoint of a full run. The program writes own_digits.csv, one row per kind of
picture. Its columns in percent: `rejected`, the pictures that `predict` refuses; `accuracy`, the correctly
classified ones, or, for the kinds that show no digit or several, the rejected ones, which should be all;
`confident_errors`, the pictures that are misclassified with a probability above 90 %.
"""

import argparse
import io
import math
from collections.abc import Callable
from typing import NamedTuple

import common
import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import own_digit
import utils

CSV = common.ROOT / "benchmarks" / "own_digits.csv"

# Brightness from 0 to 255
PAPER = 225
PEN = 45
PENCIL = 160
PRINT = 30
TABLE = 95

SIDE = 640  # of a page, in pixels
DIGIT = 320  # longest side of the digit on it, in pixels
MNIST_DIGIT = 20 / 28  # share of an MNIST image that its digit takes


def uniform(random, low, high):
    """Return a random number between `low` and `high`."""
    return low + (high - low) * torch.rand(1, generator=random).item()


def choose(random, choices):
    """Return one of `choices`, each with the same probability."""
    return choices[torch.randint(len(choices), (1,), generator=random).item()]


# ---- pages: digits written on paper, as float tensors (H, W) of brightness ----


def write_digit(image, size=DIGIT, paper=PAPER, ink=PEN, shift=(0, 0), degrees=0):
    """Return a page with a 28×28 digit, white on black, in its middle, or `shift` pixels down and right."""
    side = round(size / MNIST_DIGIT)
    glyph = image.resize((side, side), Image.BICUBIC).rotate(degrees, Image.BICUBIC)
    coverage = Image.new("L", (SIDE, SIDE))
    coverage.paste(glyph, ((SIDE - side) // 2 + shift[1], (SIDE - side) // 2 + shift[0]))
    return paper + (ink - paper) * pil_to_tensor(coverage)[0].float() / 255


def plain_page(images, random):
    return write_digit(images[0])


def small_page(images, random):
    """Write in pen or pencil, and leave space for a box."""
    ink = choose(random, (PEN, PENCIL))
    return write_digit(images[0], size=uniform(random, 200, 330), ink=ink)


def chalk_page(images, random):
    return write_digit(images[0], paper=60, ink=uniform(random, 170, 220))


def photographed_page(images, random):
    """Write slightly rotated, beside the middle."""
    shift = (round(uniform(random, -80, 80)), round(uniform(random, -80, 80)))
    ink = uniform(random, 50, 90)
    return write_digit(images[0], 300, ink=ink, shift=shift, degrees=uniform(random, -8, 8))


def page_with_neighbors(images, random):
    """Write other digits at the left and right border, too, as a cut from a page shows them."""
    shift = round(uniform(random, 1.2, 1.3) * DIGIT)
    page = write_digit(images[0])
    page = torch.minimum(page, write_digit(images[1], shift=(0, -shift)))
    return torch.minimum(page, write_digit(images[2], shift=(0, shift)))


def page_of_digits(images, random):
    """Write one to three rows of two or three digits."""
    rows = choose(random, (1, 2, 3))
    columns = choose(random, (2, 3))
    page = torch.full((SIDE, SIDE), float(PAPER))
    for row in range(rows):
        for column in range(columns):
            down = 180 * (row - (rows - 1) / 2)
            right = 180 * (column - (columns - 1) / 2)
            image = images[(row * columns + column) % len(images)]
            page = torch.minimum(page, write_digit(image, 120, shift=(round(down), round(right))))
    return page


def blank_page(images, random):
    return torch.full((SIDE, SIDE), float(PAPER))


# ---- steps: each changes a page and returns it ----


def along(page, angle):
    """Return each pixel's place `(H, W)` in the direction `angle` in radians, from 0 to 1 across the page."""
    height, width = page.shape
    y = torch.arange(height)[:, None]
    x = torch.arange(width)
    place = x * math.cos(angle) + y * math.sin(angle)
    return (place - place.min()) / (place.max() - place.min())


def fade_light(page, random):
    """Darken the page linearly, down to 0.7, in a random direction."""
    return page * (1 - 0.3 * along(page, uniform(random, 0, 2 * math.pi)))


def add_shadow(page, random):
    """Darken part of the page to 0.7, with a soft edge in a random direction."""
    place = along(page, uniform(random, 0, 2 * math.pi))
    edge = uniform(random, 0.25, 0.75)
    return page * (0.7 + 0.3 * torch.sigmoid((place - edge) / 0.01))


def add_noise(page, random):
    return page + 4 * torch.randn(page.shape, generator=random)


def rule(page, random):
    """Rule the page with slightly tilted lines; the darker of line and ink wins."""
    place = along(page, math.pi / 2 + uniform(random, -0.03, 0.03))
    return torch.where(place * SIDE % 40 < 2, page.clamp(max=175), page)


def add_table(page, random):
    """Let the table show on one side, 8 to 15 % of the page."""
    angle = choose(random, (0, 0.5, 1, 1.5)) * math.pi + uniform(random, -0.05, 0.05)
    return torch.where(along(page, angle) > uniform(random, 0.85, 0.92), TABLE, page)


def ink_box(page):
    """Return the top, bottom, left and right of the pixels that are at least half ink."""
    is_ink = page < (page.max() + page.min()) / 2
    rows = is_ink.any(dim=1).nonzero()
    columns = is_ink.any(dim=0).nonzero()
    return rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1


def print_box(page, random):
    """Print a square around the digit, at a distance of 8 to 30 % of its height.

    In every second page its lines run to the page's border, as those of a form do.
    """
    top, bottom, left, right = ink_box(page)
    width = choose(random, (2, 4, 8))
    reach = max(bottom - top, right - left) // 2
    reach += round(uniform(random, 0.08, 0.3) * (bottom - top)) + width
    middle_y = (top + bottom) // 2
    middle_x = (left + right) // 2
    picture = to_picture(page)
    draw = ImageDraw.Draw(picture)
    end = choose(random, (reach, SIDE))
    for side in (-reach, reach):
        x = middle_x + side
        y = middle_y + side
        draw.line((x, middle_y - end, x, middle_y + end), fill=PRINT, width=width)
        draw.line((middle_x - end, y, middle_x + end, y), fill=PRINT, width=width)
    return pil_to_tensor(picture)[0].float()


def crop_tightly(page, random):
    """Crop the page to the pixels that are at least half ink, so that the ink touches each side."""
    top, bottom, left, right = ink_box(page)
    return page[top:bottom, left:right]


def crop_to_square(page, random):
    top, bottom, left, right = ink_box(page)
    side = max(bottom - top, right - left)
    top = (top + bottom - side) // 2
    left = (left + right - side) // 2
    return page[top : top + side, left : left + side]


def lift_top(page, random):
    """Lift the upper 30 % of the digit off by 4 to 12 % of its height, as the bar of a 5 often is."""
    top, bottom, _, _ = ink_box(page)
    cut = round(top + 0.3 * (bottom - top))
    gap = round(uniform(random, 0.04, 0.12) * (bottom - top))
    paper = torch.full((gap, page.shape[1]), float(PAPER))
    return torch.cat([page[gap:cut], paper, page[cut:]])


def damage(page, random):
    """Change a blank page by light, shadow, lines or the table's edge."""
    return choose(random, (fade_light, add_shadow, rule, add_table))(page, random)


# ---- finish: from the page to a picture ----


def to_picture(page):
    return Image.fromarray(page.round().clamp(0, 255).byte().numpy())


def color_jpeg(page):
    colors = ImageOps.colorize(to_picture(page), (30, 50, 140), (255, 250, 230))
    file = io.BytesIO()
    colors.save(file, "JPEG", quality=75)
    return Image.open(file)


def soft_picture(page):
    """Shrink the page to 8×8 pixels and enlarge them smoothly to 64×64."""
    return to_picture(page).resize((8, 8), Image.BOX).resize((64, 64), Image.BICUBIC)


class Kind(NamedTuple):
    """One kind of picture: `write` digits on a page, apply `steps`, and `finish`.

    `predict` should reject pictures that do not show one digit (`is_digit`). With a `label`, only the
    images of that digit are used.
    """

    write: Callable = plain_page
    steps: tuple = (add_noise,)
    finish: Callable = to_picture
    is_digit: bool = True
    label: int | None = None


KINDS = {
    "pen on paper": Kind(),
    "chalk": Kind(chalk_page, (fade_light, add_noise)),
    "phone photo": Kind(photographed_page, (rule, add_table, fade_light, add_shadow, add_noise), color_jpeg),
    "printed box": Kind(small_page, (print_box, add_noise)),
    "neighbors cut by the border": Kind(page_with_neighbors),
    "top of a 5 lifted": Kind(steps=(lift_top, add_noise), label=5),
    "tight crop": Kind(steps=(crop_tightly, add_noise)),
    "soft crop of 8×8": Kind(steps=(crop_to_square,), finish=soft_picture),
    "several digits": Kind(page_of_digits, is_digit=False),
    "blank page": Kind(blank_page, (damage, add_noise), is_digit=False),
}


def draw_pictures(kind, images):
    """Yield a picture of a kind per image, the same in every run; `images` are MNIST's `(N, 28, 28)`.

    Where a picture shows other digits, too, they are the following images.
    """
    random = torch.Generator().manual_seed(0)
    for first in range(len(images)):
        following = images.roll(-first, dims=0)[:9]
        page = kind.write([Image.fromarray(image.numpy()) for image in following], random)
        for step in kind.steps:
            page = step(page, random)
        yield kind.finish(page)


def choose_images(kind, test_set, count):
    """Return the first `count` images, or fewer, and labels of the test set that a kind uses."""
    images = test_set.images
    labels = test_set.labels
    if kind.label is not None:
        is_chosen = labels == kind.label
        images = images[is_chosen]
        labels = labels[is_chosen]
    return images[:count], labels[:count]


def evaluate(model, kind, images, labels):
    """Return the results of a kind of picture in percent, as the columns of a row."""
    correct = 0
    rejected = 0
    confident_errors = 0
    for picture, label in zip(draw_pictures(kind, images), labels, strict=True):
        try:
            probabilities = own_digit.predict(model, picture)
        except ValueError:
            rejected += 1
            continue
        if kind.is_digit and probabilities.argmax() == label:
            correct += 1
        elif probabilities.max() > 0.9:
            confident_errors += 1
    if not kind.is_digit:
        correct = rejected
    counts = {"rejected": rejected, "accuracy": correct, "confident_errors": confident_errors}
    return {name: f"{100 * count / len(images):.1f}" for name, count in counts.items()}


def measure(model, name, test_set, count):
    """Return a row for each kind of picture, drawn from `count` images, for the network `name`."""
    rows = []
    for title, kind in tqdm(KINDS.items()):
        images, labels = choose_images(kind, test_set, count)
        row = {"pictures": title, "images": len(images), "model": name}
        row |= evaluate(model, kind, images, labels)
        rows.append(row | common.machine_columns("cpu"))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="of a full run")
    parser.add_argument("--images", type=int, default=100, help="per kind of picture (default %(default)s)")
    args = parser.parse_args()
    name, model = common.load_model(args.checkpoint)
    _, test_set = utils.load_data(standin=False)
    common.write_rows(measure(model, name, test_set, args.images), CSV)


if __name__ == "__main__":
    main()

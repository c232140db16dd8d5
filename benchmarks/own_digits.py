"""Measure how `predict` does on pictures of digits: MNIST test images drawn as pictures of several kinds.

    python benchmarks/own_digits.py runs/Model4-seed1.pt

The argument is the checkpoint of a full run. Writes own_digits.csv, one row per kind of picture, in percent:
`rejected`, what `predict` refuses; `accuracy`, what is classified correctly, or rejected where there is no
digit or several; `confident_errors`, what is misclassified with a probability above 90 %.
"""

import io
import math
import sys

import common
import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import own_digit
import utils
from runs import ROOT, describe_machine

CSV = ROOT / "benchmarks" / "own_digits.csv"
IMAGES = 100  # per kind of picture

# Brightness from 0 to 255
PAPER = 225
PEN = 45
PENCIL = 160
PRINT = 30
TABLE = 95

PAGE_SIDE = 640  # of a page, in pixels
DIGIT_SIDE = 320  # longest side of the digit on it, in pixels
MNIST_SHARE = 20 / 28  # share of an MNIST image that its digit takes
BLANK_PAGE = torch.full((PAGE_SIDE, PAGE_SIDE), float(PAPER))


def uniform(random, low, high):
    """Return a random number between `low` and `high`."""
    return low + (high - low) * torch.rand(1, generator=random).item()


def choose(random, choices):
    """Return one of `choices`, each with the same probability."""
    return choices[torch.randint(len(choices), (1,), generator=random).item()]


# ---- pages: digits written on paper, as float tensors (H, W) of brightness ----


def write_digit(image, size=DIGIT_SIDE, ink=PEN, shift=(0, 0), degrees=0):
    """Return a page with a 28×28 digit, white on black, in its middle, or `shift` pixels down and right."""
    side = round(size / MNIST_SHARE)
    glyph = Image.fromarray(image.numpy()).resize((side, side), Image.BICUBIC).rotate(degrees, Image.BICUBIC)
    coverage = Image.new("L", (PAGE_SIDE, PAGE_SIDE))
    coverage.paste(glyph, ((PAGE_SIDE - side) // 2 + shift[1], (PAGE_SIDE - side) // 2 + shift[0]))
    return PAPER + (ink - PAPER) * pil_to_tensor(coverage)[0].float() / 255


def along(angle):
    """Return each pixel's place `(H, W)` in the direction `angle` in radians, from 0 to 1 across the page."""
    side = torch.arange(PAGE_SIDE)
    place = side * math.cos(angle) + side[:, None] * math.sin(angle)
    return (place - place.min()) / (place.max() - place.min())


def fade_light(page, random):
    """Darken the page linearly, down to 0.7, in a random direction."""
    return page * (1 - 0.3 * along(uniform(random, 0, 2 * math.pi)))


def add_shadow(page, random):
    """Darken part of the page to 0.7, with a soft edge in a random direction."""
    place = along(uniform(random, 0, 2 * math.pi))
    edge = uniform(random, 0.25, 0.75)
    return page * (0.7 + 0.3 * torch.sigmoid((place - edge) / 0.01))


def rule(page, random):
    """Rule the page with slightly tilted lines; the darker of line and ink wins."""
    place = along(math.pi / 2 + uniform(random, -0.03, 0.03))
    return torch.where(place * PAGE_SIDE % 40 < 2, page.clamp(max=175), page)


def add_table(page, random):
    """Let the table show on one side, 8 to 15 % of the page."""
    angle = choose(random, (0, 0.5, 1, 1.5)) * math.pi + uniform(random, -0.05, 0.05)
    return torch.where(along(angle) > uniform(random, 0.85, 0.92), TABLE, page)


def ink_box(page):
    """Return the top, bottom, left and right of the pixels that are at least half ink."""
    return own_digit.bounding_box(page < (page.max() + page.min()) / 2)


def to_picture(page, random):
    """Return a page as a gray picture with the noise of a camera."""
    page = page + 4 * torch.randn(page.shape, generator=random)
    return Image.fromarray(page.round().clamp(0, 255).byte().numpy())


# ---- kinds of pictures: each is drawn from 28×28 images, white on black, of which the first is shown ----


def thick_strokes(images, random):
    """Widen the strokes by 4 to 10 % of the digit's size, and crop the page close to them."""
    page = own_digit.erode(write_digit(images[0]), round(uniform(random, 0.02, 0.05) * DIGIT_SIDE))
    top, bottom, left, right = ink_box(page)
    margin = round(0.05 * DIGIT_SIDE)
    return to_picture(page[top - margin : bottom + margin, left - margin : right + margin], random)


def phone_photo(images, random):
    """Write beside the middle of a ruled page on a table; photograph it in uneven light, in color."""
    shift = (round(uniform(random, -80, 80)), round(uniform(random, -80, 80)))
    page = write_digit(images[0], 300, uniform(random, 50, 90), shift, uniform(random, -8, 8))
    page = add_table(rule(page, random), random)
    page = add_shadow(fade_light(page, random), random)
    colors = ImageOps.colorize(to_picture(page, random), (30, 50, 140), (255, 250, 230))
    file = io.BytesIO()
    colors.save(file, "JPEG", quality=75)
    return Image.open(file)


def printed_box(images, random):
    """Write in pen or pencil, in a printed square at a distance of 8 to 30 % of the digit's height.

    In every second picture its lines run to the page's border, as those of a form do.
    """
    size = uniform(random, 200, 330)
    page = write_digit(images[0], size, ink=choose(random, (PEN, PENCIL)))
    top, bottom, left, right = ink_box(page)
    width = choose(random, (2, 4, 8))
    distance = round(uniform(random, 0.08, 0.3) * (bottom - top))
    reach = max(bottom - top, right - left) // 2 + distance + width
    middle_y = (top + bottom) // 2
    middle_x = (left + right) // 2
    picture = to_picture(page, random)
    draw = ImageDraw.Draw(picture)
    end = choose(random, (reach, PAGE_SIDE))
    for side in (-reach, reach):
        x = middle_x + side
        y = middle_y + side
        draw.line((x, middle_y - end, x, middle_y + end), fill=PRINT, width=width)
        draw.line((middle_x - end, y, middle_x + end, y), fill=PRINT, width=width)
    return picture


def neighbors_cut_by_the_border(images, random):
    """Write other digits at the left and right border, too, as a cut from a page shows them."""
    shift = round(uniform(random, 1.2, 1.3) * DIGIT_SIDE)
    page = write_digit(images[0])
    page = torch.minimum(page, write_digit(images[1], shift=(0, -shift)))
    page = torch.minimum(page, write_digit(images[2], shift=(0, shift)))
    return to_picture(page, random)


def lifted_top(images, random):
    """Lift the upper 30 % of the digit off by 4 to 12 % of its height, as the bar of a 5 often is."""
    page = write_digit(images[0])
    top, bottom, _, _ = ink_box(page)
    cut = round(top + 0.3 * (bottom - top))
    gap = round(uniform(random, 0.04, 0.12) * (bottom - top))
    return to_picture(torch.cat([page[gap:cut], BLANK_PAGE[:gap], page[cut:]]), random)


def tight_crop(images, random):
    """Crop the page to the pixels that are at least half ink, so that the ink touches each side."""
    page = write_digit(images[0])
    top, bottom, left, right = ink_box(page)
    return to_picture(page[top:bottom, left:right], random)


def soft_crop(images, random):
    """Crop to a square, shrink it to 8×8 pixels, and enlarge them smoothly to 64×64."""
    page = write_digit(images[0])
    top, bottom, left, right = ink_box(page)
    side = max(bottom - top, right - left)
    top = (top + bottom - side) // 2
    left = (left + right - side) // 2
    picture = to_picture(page[top : top + side, left : left + side], random)
    return picture.resize((8, 8), Image.BOX).resize((64, 64), Image.BICUBIC)


def several_digits(images, random):
    """Write one to three rows of two or three digits."""
    rows = choose(random, (1, 2, 3))
    columns = choose(random, (2, 3))
    page = BLANK_PAGE
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        shift = (round(180 * (row - (rows - 1) / 2)), round(180 * (column - (columns - 1) / 2)))
        page = torch.minimum(page, write_digit(images[index], 120, shift=shift))
    return to_picture(page, random)


def no_digit(images, random):
    """Return a page with uneven light, a shadow, lines or the table's edge, and nothing written on it."""
    damage = choose(random, (fade_light, add_shadow, rule, add_table))
    return to_picture(damage(BLANK_PAGE, random), random)


KINDS = {
    "thick strokes": thick_strokes,
    "phone photo": phone_photo,
    "printed box": printed_box,
    "neighbors cut by the border": neighbors_cut_by_the_border,
    "top of a 5 lifted": lifted_top,
    "tight crop": tight_crop,
    "soft crop of 8×8": soft_crop,
    "several digits": several_digits,
    "blank page": no_digit,
}
TO_BE_REJECTED = ("several digits", "blank page")


def draw_pictures(title, test_set, count):
    """Yield `count` pictures of a kind with the image and the label of the digit, the same in every run.

    Where a picture shows other digits, too, they are the following images. The label of a picture that is
    to be rejected is None.
    """
    random = torch.Generator().manual_seed(0)
    if title == "top of a 5 lifted":
        test_set = test_set[test_set.labels == 5]
    for first in range(count):
        images = test_set.images[first : first + 9]
        label = test_set.labels[first].item()
        if title in TO_BE_REJECTED:
            label = None
        yield KINDS[title](images, random), images[0], label


def measure(model, name, title, test_set):
    """Return the row of own_digits.csv for one kind of picture."""
    rejected = 0
    correct = 0
    confident_errors = 0
    for picture, _, label in draw_pictures(title, test_set, IMAGES):
        try:
            probability, digit = own_digit.predict(model, picture).max(dim=0)
        except ValueError:
            rejected += 1
            if label is None:
                correct += 1
            continue
        if digit == label:
            correct += 1
        elif probability > 0.9:
            confident_errors += 1
    return {
        "pictures": title,
        "images": IMAGES,
        "model": name,
        "rejected": 100 * rejected / IMAGES,
        "accuracy": 100 * correct / IMAGES,
        "confident_errors": 100 * confident_errors / IMAGES,
        **describe_machine("cpu"),
    }


def main():
    name, model = common.load_model(sys.argv[1])
    _, test_set = utils.load_data(standin=False)
    rows = [measure(model, name, title, test_set) for title in tqdm(KINDS)]
    common.write_rows(rows, CSV)


if __name__ == "__main__":
    main()

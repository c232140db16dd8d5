"""Measure how `predict` does on pictures of digits: MNIST test images drawn as pictures of many kinds.

    python benchmarks/own_digits.py checkpoints/Model4-seed1.pt

The argument is the checkpoint of a full run. The program writes own_digits.csv, one row per kind of
picture. Its columns in percent: `rejected`, the pictures that `predict` refuses; `accuracy`, the correctly
classified ones, or, for the kinds that show no digit or several, the rejected ones, which should be all;
`vs_original`, the difference from the original images; `confident_errors`, the pictures that are
misclassified with a probability above 90 %.
"""

import argparse
import io
import math
from collections.abc import Callable
from typing import NamedTuple

import common
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
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


# ---- the digit: a 28×28 image of white on black is changed before it is written ----


def thin(image, random):
    """Make the strokes about half as thick; what an erosion would break is kept as it is."""
    thick = image.resize((280, 280), Image.LANCZOS)
    eroded = thick.filter(ImageFilter.MinFilter(15))
    opened = eroded.filter(ImageFilter.MaxFilter(15))
    return ImageChops.lighter(eroded, ImageChops.subtract(thick, opened))


def lift_top(image, random):
    """Lift the upper 30 % of the digit off by 4 to 12 % of its height, as the bar of a 5 often is."""
    large = image.resize((280, 280), Image.LANCZOS)
    left, top, right, bottom = large.getbbox()
    height = bottom - top
    cut = top + round(0.3 * height)
    gap = round(uniform(random, 0.04, 0.12) * height)
    lifted = large.copy()
    lifted.paste(0, (0, 0, 280, cut))
    lifted.paste(large.crop((0, gap, 280, cut)), (0, 0))
    return lifted


def side_by_side(images, random):
    """Return digits of the same height in one row, with gaps of 5 to 40 % of that height."""
    height = 200
    row = Image.new("L", (height * 2 * len(images), height))
    right = 0
    for image in images:
        digit = image.crop(image.getbbox())
        digit = digit.resize((round(digit.width * height / digit.height), height), Image.BICUBIC)
        row.paste(digit, (right, 0))
        right += digit.width + round(height * uniform(random, 0.05, 0.4))
    row = row.crop(row.getbbox())
    side = max(row.size)
    square = Image.new("L", (side, side))
    square.paste(row, ((side - row.width) // 2, (side - row.height) // 2))
    return ImageOps.expand(square, side // 5)


# ---- pages: a digit written on paper, as float tensors (H, W) of brightness ----


def write_digit(image, height=SIDE, width=SIDE, digit=DIGIT, paper=PAPER, ink=PEN, shift=(0, 0), degrees=0):
    """Return a page with the digit in its middle, `shift` pixels down and to the right."""
    side = round(digit / MNIST_DIGIT)
    glyph = image.resize((side, side), Image.BICUBIC).rotate(degrees, Image.BICUBIC)
    coverage = Image.new("L", (width, height))
    coverage.paste(glyph, ((width - side) // 2 + shift[1], (height - side) // 2 + shift[0]))
    return paper + (ink - paper) * pil_to_tensor(coverage)[0].float() / 255


def pen_page(image, random):
    return write_digit(image)


def pen_or_pencil_page(image, random):
    ink = choose(random, (PEN, PENCIL))
    return write_digit(image, digit=uniform(random, 200, 330), ink=ink)


def chalk_page(image, random):
    return write_digit(image, paper=60, ink=uniform(random, 170, 220))


def large_page(image, random):
    shift = (round(uniform(random, -400, 400)), round(uniform(random, -500, 500)))
    return write_digit(image, height=1200, width=1600, digit=120, shift=shift)


def photographed_page(image, random):
    """Write the digit slightly rotated, beside the middle of mildly ruled paper."""
    shift = (round(uniform(random, -80, 80)), round(uniform(random, -120, 120)))
    degrees = uniform(random, -8, 8)
    ink = uniform(random, 50, 90)
    page = write_digit(image, 768, 1024, uniform(random, 250, 420), ink=ink, shift=shift, degrees=degrees)
    return add_lines(page, random, 48, 190, math.radians(degrees))


def page_with_neighbors(image, random):
    """Write parts of the same digit at the left and right border, too, as a crop of a page shows them."""
    page = write_digit(image)
    shift = round(uniform(random, 1.2, 1.3) * DIGIT)
    for direction in (-shift, shift):
        page = torch.minimum(page, write_digit(image, shift=(0, direction)))
    return page


def blank_page(image, random):
    return torch.full((SIDE, SIDE), float(PAPER))


# ---- steps: each changes a page and returns it ----


def coordinates(page):
    """Return each pixel's y and x `(H, W)`, from -1 to 1 along the longer side."""
    height, width = page.shape
    longest = max(height, width)
    y = torch.linspace(-height / longest, height / longest, height)
    x = torch.linspace(-width / longest, width / longest, width)
    return torch.meshgrid(y, x, indexing="ij")


def along(page, angle):
    """Return each pixel's place `(H, W)` in the direction `angle`, from 0 to 1 across the page."""
    y, x = coordinates(page)
    place = x * math.cos(angle) + y * math.sin(angle)
    return (place - place.min()) / (place.max() - place.min())


def fade_light(page, random):
    """Darken the page linearly, down to 0.7, in a random direction."""
    return page * (1 - 0.3 * along(page, uniform(random, 0, 2 * math.pi)))


def add_vignette(page, random):
    """Let the light fall with the square of the distance from the middle, to 0.65 in the corners."""
    y, x = coordinates(page)
    squared = x.square() + y.square()
    return page * (1 - 0.35 * squared / squared.max())


def add_shadow(page, random):
    """Darken part of the page to 0.7, with a soft edge (3 % of the page) in a random direction."""
    place = along(page, uniform(random, 0, 2 * math.pi))
    edge = uniform(random, 0.25, 0.75)
    return page * (0.7 + 0.3 * torch.sigmoid((place - edge) / 0.01))


def add_noise(page, random, sigma=4):
    return page + sigma * torch.randn(page.shape, generator=random)


def add_strong_noise(page, random):
    return add_noise(page, random, 20)


def add_lines(page, random, spacing, brightness, angle, thickness=2):
    """Draw parallel lines; the darker of line and ink wins."""
    y, x = coordinates(page)
    pixels = (x * math.sin(angle) + y * math.cos(angle)) * max(page.shape) / 2
    phase = (pixels + uniform(random, 0, spacing)) % spacing
    return torch.where(phase < thickness, page.clamp(max=brightness), page)


def rule(page, random):
    return add_lines(page, random, 40, 175, uniform(random, -0.03, 0.03))


def rule_squares(page, random):
    angle = uniform(random, -0.03, 0.03)
    page = add_lines(page, random, 32, 185, angle)
    return add_lines(page, random, 32, 185, angle + math.pi / 2)


def add_table(page, random, sides=("left", "right", "top", "bottom")):
    """Let the table show along `sides` of the page, up to 12 % of it, with a slightly tilted edge."""
    y, x = coordinates(page)
    places = {"left": -x, "right": x, "top": -y, "bottom": y}
    across = {"left": y, "right": y, "top": x, "bottom": x}
    for side in sides:
        tilt = uniform(random, -0.05, 0.05)
        edge = uniform(random, 0.78, 0.92)
        page = torch.where(places[side] + tilt * across[side] > edge, TABLE, page)
    return page


def add_table_on_one_side(page, random):
    return add_table(page, random, [choose(random, ("left", "right", "top", "bottom"))])


def draw_on(page, draw_shapes):
    """Return the page after `draw_shapes(draw)` with a `PIL.ImageDraw.Draw` of it."""
    picture = to_picture(page)
    draw_shapes(ImageDraw.Draw(picture))
    return pil_to_tensor(picture)[0].float()


def ink_box(page):
    """Return the top, bottom, left and right of the pixels that are at least half ink."""
    is_ink = page < (page.max() + page.min()) / 2
    rows = is_ink.any(dim=1).nonzero()
    columns = is_ink.any(dim=0).nonzero()
    return rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1


def print_box(page, random, to_border=False, crop=False):
    """Print a box around the digit, at a distance of 8 to 30 % of the digit's height.

    Its lines run to the page's border if `to_border`. The page is cropped to the box if `crop`.
    """
    top, bottom, left, right = ink_box(page)
    margin = round(uniform(random, 0.08, 0.3) * (bottom - top))
    width = round(uniform(random, 2, 8))
    reach = max(bottom - top, right - left) // 2 + margin + width
    middle_y = (top + bottom) // 2
    middle_x = (left + right) // 2
    top = middle_y - reach
    bottom = middle_y + reach
    left = middle_x - reach
    right = middle_x + reach

    def draw_box(draw):
        if to_border:
            for x in (left, right):
                draw.line((x, 0, x, page.shape[0]), fill=PRINT, width=width)
            for y in (top, bottom):
                draw.line((0, y, page.shape[1], y), fill=PRINT, width=width)
        else:
            draw.rectangle((left, top, right, bottom), outline=PRINT, width=width)

    page = draw_on(page, draw_box)
    if crop:
        page = page[top : bottom + 1, left : right + 1]
    return page


def print_table(page, random):
    return print_box(page, random, to_border=True)


def print_box_on_border(page, random):
    return print_box(page, random, crop=True)


def crop_tightly(page, random):
    """Crop the page to the pixels that are at least half ink, so that the ink touches each side."""
    top, bottom, left, right = ink_box(page)
    return page[top:bottom, left:right]


def add_flecks(page, random):
    """Put 25 flecks, all light or all dark, on the paper between the strokes."""
    height, width = page.shape
    size = max(2, max(height, width) // 30)
    fleck = choose(random, (255.0, 90.0))
    background = page > 0.9 * PAPER
    flecks = torch.zeros(height, width)
    for _ in range(25):
        y = round(uniform(random, 0, height - size))
        x = round(uniform(random, 0, width - size))
        flecks[y : y + size, x : x + size // 2 + 1] = 1
    return torch.where(flecks.bool() & background, fleck, page)


def fade_and_cut_top(page, random):
    """Make the digit's upper part fainter, and cut the page a little below the digit's top."""
    top, bottom, _, _ = ink_box(page)
    faint = round(top + uniform(random, 0.3, 0.45) * (bottom - top))
    page = page.clone()
    page[:faint] = PAPER + uniform(random, 0.35, 0.6) * (page[:faint] - PAPER)
    return page[top + round(0.02 * (bottom - top)) :]


def add_stain(page, random):
    """Put a soft stain with a radius of about a fifth of the digit's height on a stroke."""
    strokes = (page < (PAPER + PEN) / 2).nonzero()
    place = choose(random, strokes)
    radius = uniform(random, 0.15, 0.25) * DIGIT
    rows = torch.arange(page.shape[0])[:, None] - place[0]
    columns = torch.arange(page.shape[1])[None] - place[1]
    squared = (rows.square() + columns.square()) / radius**2
    return page * (1 - uniform(random, 0.2, 0.35) * torch.exp(-squared))


def add_hand(page, random):
    """Lay three or four bright fingers with creases on a dark ground, from one border into the page."""
    page = page * 0 + uniform(random, 60, 130)
    skin = uniform(random, 150, 200)
    fingers = choose(random, (3, 4))
    y, x = coordinates(page)
    for number in range(fingers):
        middle = 1.6 * (number + 0.5) / fingers - 0.8 + uniform(random, -0.05, 0.05)
        half_width = uniform(random, 0.12, 0.2)
        tip = uniform(random, -0.6, 0.1)
        lean = uniform(random, -0.3, 0.3)
        from_axis = (x - middle - lean * (y - tip)).abs() / half_width
        from_tip = (tip - y).clamp(min=0) / half_width
        roundness = (1 - from_axis.square() - from_tip.square()).clamp(min=0)
        page = torch.where(roundness > 0, skin * (0.55 + 0.45 * roundness.sqrt()), page)
        for _ in range(3):  # creases across the finger
            crease = uniform(random, tip, 1)
            is_crease = (roundness > 0.1) & ((y - crease - 0.1 * from_axis.square()).abs() < 0.008)
            page = torch.where(is_crease, page * uniform(random, 0.6, 0.8), page)
    return page


def damage_blank_page(page, random):
    """Change a blank page by light, shadow, noise, lines or the table's edge."""
    return choose(random, (fade_light, add_vignette, add_shadow, add_strong_noise, rule, add_table))(
        page, random
    )


# ---- finish: from the page to a picture ----


def to_picture(page):
    return Image.fromarray(page.round().clamp(0, 255).byte().numpy())


def color_jpeg(page):
    colors = ImageOps.colorize(to_picture(page), (30, 50, 140), (255, 250, 230))
    file = io.BytesIO()
    colors.save(file, "JPEG", quality=75)
    return Image.open(file)


def soft_crop(image, random):
    """Shrink the digit to 8×8 pixels and enlarge them smoothly to 64×64, so that it fills the picture."""
    left, top, right, bottom = image.getbbox()
    side = max(right - left, bottom - top)
    x = (left + right - side) // 2
    y = (top + bottom - side) // 2
    tiny = image.crop((x, y, x + side, y + side)).resize((8, 8), Image.BOX)
    return ImageOps.invert(tiny.resize((64, 64), Image.BICUBIC))


def original(image, random):
    return image


class Kind(NamedTuple):
    """One kind of picture: `prepare` the digit, `write` it on a page, apply `steps`, and `finish`.

    `write` may return a PIL image instead, which is the picture. `predict` should reject a picture whose
    number of `digits` is not 1. With a `label`, only the images of that digit are used.
    """

    write: Callable = pen_page
    steps: tuple = (add_noise,)
    prepare: Callable = original
    finish: Callable = to_picture
    digits: int = 1
    label: int | None = None


KINDS = {
    "original": Kind(original),
    "color, JPEG": Kind(finish=color_jpeg),
    "digit of 120 px in 1600×1200": Kind(large_page),
    "tight crop": Kind(steps=(crop_tightly, add_noise)),
    "tight crop with flecks": Kind(steps=(crop_tightly, add_noise, add_flecks)),
    "soft crop, 8×8 to 64×64": Kind(soft_crop),
    "neighbors cut by the border": Kind(page_with_neighbors),
    "faint top, cut by the border": Kind(steps=(fade_and_cut_top, add_noise)),
    "top stroke of a 5 lifted": Kind(prepare=lift_top, label=5),
    "thin pen with a stain": Kind(prepare=thin, steps=(add_stain, add_noise)),
    "chalk": Kind(chalk_page, (fade_light, add_noise)),
    "noise σ 20": Kind(steps=(add_strong_noise,)),
    "graph paper": Kind(steps=(rule_squares, add_noise)),
    "table on all sides": Kind(steps=(add_table, add_noise)),
    "printed box": Kind(pen_or_pencil_page, (print_box, add_noise)),
    "printed box, lines to the border": Kind(pen_or_pencil_page, (print_table, add_noise)),
    "printed box on the border": Kind(pen_or_pencil_page, (print_box_on_border, add_noise)),
    "phone photo": Kind(
        photographed_page, (add_table_on_one_side, fade_light, add_shadow, add_noise), finish=color_jpeg
    ),
    "blank pages": Kind(blank_page, (damage_blank_page, add_noise), digits=0),
    "hand, no digit": Kind(blank_page, (add_hand, add_noise), digits=0),
    "two digits": Kind(prepare=side_by_side, digits=2),
}


def draw_pictures(kind, images):
    """Yield a picture of a kind per image, the same in every run; `images` are MNIST's `(N, 28, 28)`.

    A picture of several digits shows the following images, too.
    """
    random = torch.Generator().manual_seed(0)
    for first in range(len(images)):
        glyphs = []
        for offset in range(max(kind.digits, 1)):
            glyphs.append(Image.fromarray(images[(first + offset) % len(images)].numpy()))
        if kind.digits > 1:
            glyph = kind.prepare(glyphs, random)
        else:
            glyph = kind.prepare(glyphs[0], random)
        page = kind.write(glyph, random)
        if isinstance(page, Image.Image):
            yield page
            continue
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


def percent(count, total):
    return f"{100 * count / total:.1f}"


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
        if probabilities.argmax() == label:
            correct += 1
        elif probabilities.max() > 0.9:
            confident_errors += 1
    total = len(images)
    if kind.digits != 1:
        return {
            "rejected": percent(rejected, total),
            "accuracy": percent(rejected, total),
            "vs_original": "",
            "confident_errors": "",
        }
    original = int((model(utils.normalize(images)).argmax(dim=1) == labels).sum())
    return {
        "rejected": percent(rejected, total),
        "accuracy": percent(correct, total),
        "vs_original": percent(correct - original, total),
        "confident_errors": percent(confident_errors, total),
    }


@torch.no_grad()
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

"""Measure how `predict` does on pictures of digits: MNIST test images drawn as pictures of many kinds.

    python benchmarks/own_digits.py checkpoints/Model4-seed1.pt

The argument is the checkpoint of a full run. The program writes own_digits.csv. For each kind of picture
a row has the percentage of correctly classified digits and its difference from the original images, or,
for the kinds that show no digit or two, the percentage rejected, which should be 100.
"""

import io
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import ROOT, machine_columns, write_rows
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import utils
from model import create_model

CSV = ROOT / "benchmarks" / "own_digits.csv"
CLEAN_IMAGES = 1000
PHOTO_IMAGES = 200

# Brightness from 0 to 255
PAPER = 225
INK = 45
TABLE = 95

SIDE = 640  # of a page, in pixels
DIGIT = 320  # longest side of the digit on it, in pixels
MNIST_DIGIT = 20 / 28  # share of an MNIST image that its digit takes


class Kind(NamedTuple):
    """One kind of picture: `draw(*images, random)` makes one from 28×28 images and a `torch.Generator`.

    `predict` should reject a picture that does not show exactly one digit.
    """

    draw: Callable
    pictures: int = PHOTO_IMAGES
    digits: int = 1  # number of images that a picture shows


def uniform(random, low, high):
    """Return a random number between `low` and `high`."""
    return low + (high - low) * torch.rand(1, generator=random).item()


def choose(random, choices):
    """Return one of `choices`, each with the same probability."""
    return choices[torch.randint(len(choices), (1,), generator=random).item()]


# ---- clean pictures: MNIST's gray values, enlarged and converted ----


def unchanged(image, random):
    return image


def enlarged(image, random=None):
    return image.resize((280, 280), Image.LANCZOS)


def inverted(image, random):
    return ImageOps.invert(enlarged(image))


def colored(image, random):
    return ImageOps.colorize(enlarged(image), (250, 240, 215), (30, 50, 140))


def off_center(image, random):
    page = Image.new("L", (640, 480))
    page.paste(enlarged(image), (350, 10))
    return page


def padded(image, random):
    return ImageOps.expand(enlarged(image), 400, fill=0)


def transparent_dark(image, random):
    return Image.merge("LA", (Image.new("L", (280, 280), 20), enlarged(image)))


def transparent_light(image, random):
    return Image.merge("LA", (Image.new("L", (280, 280), 255), enlarged(image)))


def save_and_open(image, file_format, **options):
    """Return `image` after it was saved in a file format."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return Image.open(file)


def jpeg(image, random):
    return save_and_open(inverted(image, random).convert("RGB"), "JPEG", quality=50)


# ---- pages: a digit written on paper, as float tensors (H, W) of brightness ----


def write_digit(image, height=SIDE, width=SIDE, digit=DIGIT, paper=PAPER, ink=INK, shift=(0, 0), degrees=0):
    """Return a page with the digit in its middle, `shift` pixels down and to the right."""
    side = round(digit / MNIST_DIGIT)
    glyph = image.resize((side, side), Image.BICUBIC).rotate(degrees, Image.BICUBIC)
    coverage = Image.new("L", (width, height))
    coverage.paste(glyph, ((width - side) // 2 + shift[1], (height - side) // 2 + shift[0]))
    return paper + (ink - paper) * pil_to_tensor(coverage)[0].float() / 255


def blank_page(height=SIDE, width=SIDE):
    return torch.full((height, width), float(PAPER))


def to_picture(page):
    return Image.fromarray(page.round().clamp(0, 255).byte().numpy())


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


def add_gradient(page, random, darkest):
    """Darken the page linearly, down to the factor `darkest`, in a random direction."""
    return page * (1 - (1 - darkest) * along(page, uniform(random, 0, 2 * math.pi)))


def add_vignette(page, darkest=0.65):
    """Let the light fall with the square of the distance from the middle, to `darkest` in the corners."""
    y, x = coordinates(page)
    squared = x.square() + y.square()
    return page * (1 - (1 - darkest) * squared / squared.max())


def add_shadow(page, random, light=0.7):
    """Put part of the page in shadow, with a soft edge (3 % of the page) in a random direction."""
    place = along(page, uniform(random, 0, 2 * math.pi))
    edge = uniform(random, 0.25, 0.75)
    return page * (light + (1 - light) * torch.sigmoid((place - edge) / 0.01))


def add_noise(page, random, sigma):
    return page + sigma * torch.randn(page.shape, generator=random)


def add_lines(page, random, spacing, brightness, angle, thickness=2):
    """Draw parallel lines; the darker of line and ink wins."""
    y, x = coordinates(page)
    pixels = (x * math.sin(angle) + y * math.cos(angle)) * max(page.shape) / 2
    phase = (pixels + uniform(random, 0, spacing)) % spacing
    return torch.where(phase < thickness, page.clamp(max=brightness), page)


def add_table(page, random, sides):
    """Let the table show along `sides` of the page, up to 12 % of it, with a slightly tilted edge."""
    y, x = coordinates(page)
    places = {"left": -x, "right": x, "top": -y, "bottom": y}
    across = {"left": y, "right": y, "top": x, "bottom": x}
    for side in sides:
        tilt = uniform(random, -0.05, 0.05)
        edge = uniform(random, 0.78, 0.92)
        page = torch.where(places[side] + tilt * across[side] > edge, TABLE, page)
    return page


def add_specks(page, random, count=30):
    """Put black specks with radii of 1 to 4 pixels on the page."""
    picture = to_picture(page)
    draw = ImageDraw.Draw(picture)
    for _ in range(count):
        x = uniform(random, 0, picture.width)
        y = uniform(random, 0, picture.height)
        radius = uniform(random, 1, 4)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=INK)
    return pil_to_tensor(picture)[0].float()


SIDES = ("left", "right", "top", "bottom")


def clean_page(image, random):
    return to_picture(add_noise(write_digit(image), random, 4))


def gradient_page(image, random, darkest):
    return to_picture(add_noise(add_gradient(write_digit(image), random, darkest), random, 4))


def gradient_to_90(image, random):
    return gradient_page(image, random, 0.9)


def gradient_to_80(image, random):
    return gradient_page(image, random, 0.8)


def gradient_to_70(image, random):
    return gradient_page(image, random, 0.7)


def vignette(image, random):
    return to_picture(add_noise(add_vignette(write_digit(image)), random, 4))


def shadow(image, random):
    return to_picture(add_noise(add_shadow(write_digit(image), random), random, 4))


def noise_8(image, random):
    return to_picture(add_noise(write_digit(image), random, 8))


def noise_12(image, random):
    return to_picture(add_noise(write_digit(image), random, 12))


def noise_20(image, random):
    return to_picture(add_noise(write_digit(image), random, 20))


def ruled(image, random):
    page = add_lines(write_digit(image), random, 40, 175, uniform(random, -0.03, 0.03))
    return to_picture(add_noise(page, random, 4))


def squared(image, random):
    angle = uniform(random, -0.03, 0.03)
    page = add_lines(write_digit(image), random, 32, 185, angle)
    page = add_lines(page, random, 32, 185, angle + math.pi / 2)
    return to_picture(add_noise(page, random, 4))


def table_on_one_side(image, random):
    page = add_table(write_digit(image), random, [choose(random, SIDES)])
    return to_picture(add_noise(page, random, 4))


def table_on_all_sides(image, random):
    return to_picture(add_noise(add_table(write_digit(image), random, SIDES), random, 4))


def pencil(image, random):
    page = write_digit(image, ink=uniform(random, 150, 175))
    return to_picture(add_noise(page, random, 4))


def thin_pen(image, random):
    """Make the strokes about half as thick; what an erosion would break is kept as it is."""
    thick = enlarged(image)
    eroded = thick.filter(ImageFilter.MinFilter(15))
    opened = eroded.filter(ImageFilter.MaxFilter(15))
    thin = ImageChops.lighter(eroded, ImageChops.subtract(thick, opened))
    return to_picture(add_noise(write_digit(thin), random, 4))


def small_digit(image, random):
    shift = (round(uniform(random, -400, 400)), round(uniform(random, -500, 500)))
    page = write_digit(image, height=1200, width=1600, digit=120, shift=shift)
    return to_picture(add_noise(page, random, 4))


def specks(image, random):
    return to_picture(add_noise(add_specks(write_digit(image), random), random, 4))


def tight_crop(image, random):
    """Crop the page to the pixels that are at least half ink, so that the ink touches each side."""
    page = write_digit(image)
    is_ink = page < (PAPER + INK) / 2
    rows = is_ink.any(dim=1).nonzero()
    columns = is_ink.any(dim=0).nonzero()
    page = page[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return to_picture(add_noise(page, random, 4))


def chalk(image, random):
    page = write_digit(image, paper=60, ink=uniform(random, 170, 220))
    page = add_gradient(page, random, 0.7)
    return to_picture(add_noise(page, random, 8))


def exif_rotated(image, random):
    """Store the page rotated by 90° with the EXIF orientation that rotates it back."""
    picture = clean_page(image, random).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90° clockwise
    return save_and_open(picture, "JPEG", exif=exif, quality=90)


def cmyk(image, random):
    return save_and_open(clean_page(image, random).convert("CMYK"), "JPEG", quality=90)


def sixteen_bit(image, random):
    page = add_noise(write_digit(image), random, 4).round().clamp(0, 255)
    return save_and_open(Image.fromarray((page * 257).int().numpy()).convert("I;16"), "PNG")


def gif(image, random):
    return save_and_open(clean_page(image, random), "GIF")


def palette(image, random):
    colors = ImageOps.colorize(clean_page(image, random), (20, 30, 110), (255, 250, 230))
    return save_and_open(colors.quantize(32), "PNG")


def phone_photo(image, random):
    """Combine mild ruled paper, rotation, table, gradient, vignette, shadow, noise and JPEG compression."""
    shift = (round(uniform(random, -80, 80)), round(uniform(random, -120, 120)))
    degrees = uniform(random, -8, 8)
    digit = uniform(random, 250, 420)
    ink = uniform(random, 50, 90)
    page = write_digit(image, 768, 1024, digit, ink=ink, shift=shift, degrees=degrees)
    page = add_lines(page, random, 48, 190, math.radians(degrees))
    page = add_table(page, random, [choose(random, SIDES)])
    page = add_gradient(page, random, 0.85)
    page = add_shadow(page, random, 0.85)
    page = add_noise(add_vignette(page, 0.85), random, 6)
    return save_and_open(to_picture(page).convert("RGB"), "JPEG", quality=75)


# ---- pictures that should be rejected ----


def blank(random):
    return to_picture(add_noise(blank_page(), random, 4))


def blank_gradient(random):
    return to_picture(add_gradient(blank_page(), random, uniform(random, 0.5, 0.95)))


def blank_noise(random):
    return to_picture(add_noise(blank_page(), random, uniform(random, 2, 25)))


def blank_vignette(random):
    page = add_vignette(blank_page(), uniform(random, 0.5, 0.9))
    return to_picture(add_noise(page, random, 4))


def blank_shadow(random):
    return to_picture(add_noise(add_shadow(blank_page(), random), random, 4))


def blank_ruled(random):
    page = add_lines(blank_page(), random, 40, 175, uniform(random, -0.03, 0.03))
    return to_picture(add_noise(page, random, 4))


def blank_table(random):
    page = add_table(blank_page(), random, [choose(random, SIDES)])
    return to_picture(add_noise(page, random, 4))


def two_digits(first, second, random):
    """Write two digits of the same height side by side, with a gap of 5 to 40 % of that height."""
    height = 20
    left = first.crop(first.getbbox())
    right = second.crop(second.getbbox())
    left = left.resize((round(left.width * height / left.height), height), Image.BICUBIC)
    right = right.resize((round(right.width * height / right.height), height), Image.BICUBIC)
    gap = round(height * uniform(random, 0.05, 0.4))
    width = left.width + gap + right.width
    both = Image.new("L", (2 * height, 2 * height))
    both.paste(left, (height - width // 2, height // 2))
    both.paste(right, (height - width // 2 + left.width + gap, height // 2))
    return to_picture(add_noise(write_digit(both, digit=DIGIT), random, 4))


KINDS = {
    "unchanged": Kind(unchanged, CLEAN_IMAGES),
    "enlarged": Kind(enlarged, CLEAN_IMAGES),
    "inverted": Kind(inverted, CLEAN_IMAGES),
    "colored": Kind(colored, CLEAN_IMAGES),
    "off center": Kind(off_center, CLEAN_IMAGES),
    "padded": Kind(padded, CLEAN_IMAGES),
    "transparent, dark ink": Kind(transparent_dark, CLEAN_IMAGES),
    "transparent, light ink": Kind(transparent_light, CLEAN_IMAGES),
    "JPEG": Kind(jpeg, CLEAN_IMAGES),
    "page": Kind(clean_page),
    "EXIF-rotated": Kind(exif_rotated),
    "CMYK": Kind(cmyk),
    "16 bit": Kind(sixteen_bit),
    "GIF": Kind(gif),
    "palette": Kind(palette),
    "tight crop": Kind(tight_crop),
    "light fading to 0.9": Kind(gradient_to_90),
    "light fading to 0.8": Kind(gradient_to_80),
    "light fading to 0.7": Kind(gradient_to_70),
    "vignette": Kind(vignette),
    "hand shadow": Kind(shadow),
    "noise σ 8": Kind(noise_8),
    "noise σ 12": Kind(noise_12),
    "noise σ 20": Kind(noise_20),
    "ruled paper": Kind(ruled),
    "graph paper": Kind(squared),
    "table on one side": Kind(table_on_one_side),
    "table on all sides": Kind(table_on_all_sides),
    "pencil": Kind(pencil),
    "thin pen": Kind(thin_pen),
    "chalk": Kind(chalk),
    "digit of 120 px in 1600×1200": Kind(small_digit),
    "specks": Kind(specks),
    "phone photo": Kind(phone_photo),
    "blank page": Kind(blank, digits=0),
    "blank page, gradient": Kind(blank_gradient, digits=0),
    "blank page, noise": Kind(blank_noise, digits=0),
    "blank page, vignette": Kind(blank_vignette, digits=0),
    "blank page, hand shadow": Kind(blank_shadow, digits=0),
    "blank ruled page": Kind(blank_ruled, digits=0),
    "blank page and table": Kind(blank_table, digits=0),
    "two digits": Kind(two_digits, digits=2),
}


def draw_pictures(kind, images):
    """Yield the pictures of a kind, the same in every run; `images` are MNIST's `(N, 28, 28)`."""
    random = torch.Generator().manual_seed(0)
    for first in range(kind.pictures):
        chosen = images[first : first + kind.digits].numpy()
        digits = [Image.fromarray(image) for image in chosen]
        yield kind.draw(*digits, random)


def evaluate(model, kind, images, target):
    """Return how many pictures of a kind are classified correctly, and how many are rejected."""
    correct = 0
    rejected = 0
    for number, picture in enumerate(draw_pictures(kind, images)):
        try:
            predicted = utils.predict(model, picture).argmax()
        except ValueError:
            rejected += 1
            continue
        correct += int(predicted == target[number])
    return correct, rejected


def percent(count, total):
    return f"{100 * count / total:.1f}"


@torch.no_grad()
def main():
    state = utils.read_checkpoint(sys.argv[1])
    name = state["settings"]["model"]
    model = create_model(name).eval()
    model.load_state_dict(state["model"])
    _, test_set = utils.load_data(standin=False)
    images = test_set.images[: CLEAN_IMAGES + 1]
    target = test_set.labels
    data = utils.normalize(images)
    original_is_correct = model(data).argmax(dim=1) == target[: len(data)]

    rows = []
    for title, kind in tqdm(KINDS.items()):
        correct, rejected = evaluate(model, kind, images, target)
        row = {"pictures": title, "images": kind.pictures, "model": name}
        row["rejected"] = percent(rejected, kind.pictures)
        if kind.digits == 1:
            original = int(original_is_correct[: kind.pictures].sum())
            row["accuracy"] = percent(correct, kind.pictures)
            row["vs_original"] = percent(correct - original, kind.pictures)
        else:  # such a picture is right if it is rejected
            row["accuracy"] = row["rejected"]
            row["vs_original"] = ""
        rows.append(row | machine_columns("cpu"))
    write_rows(rows, CSV)


if __name__ == "__main__":
    main()

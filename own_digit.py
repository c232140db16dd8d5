"""Your own digit: from a picture of a handwritten digit to the network's input and its prediction.

    digit = find_digit("seven.jpg")
    plot_prediction(digit, predict(model, digit))

Brightness and ink are from 0 to 1. A picture of no digit, or of several, raises ValueError with the remedy.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from plots import AS_PIXELS, NO_TICKS, TEST_COLOR, show_figure
from utils import MEAN, SIDE, STD

WORKING_SIZE = 256  # longest side, in pixels, of the picture in which the digit is looked for
BACKGROUND_WINDOW = 0.4  # side of the closing's square as a share of the picture's longest side
THRESHOLDS = (0.2, 0.3)  # of the ink, as shares of the darkest; the last is the crop's, as in draw.html
MIN_CONTRAST = 0.1  # lowest score of a digit: an outline of this contrast, as long as the longest side
MAX_ASPECT = 2.5  # width over height of a digit
MAX_HOLES = 5  # in a digit: an 8 has two, grainy strokes have some more, and a grid has one per cell
NEGLIGIBLE = 0.04  # sizes and gaps below this share do not count
COMPARABLE = 0.3  # share of another's height (second digit, digit in a frame) or darkest ink (digit's parts)
REACH = 0.2  # distance of a digit's parts as a share of its longest side
DIGIT_SIZE = 20  # longest side, in pixels, of the digit in an MNIST image
STROKE = 0.15  # pixel of the network's input above which it belongs to a stroke
STROKE_MEAN = 0.7  # mean of the pixels of strokes; its median in MNIST is 0.77


class Component(NamedTuple):
    """A connected component of the ink above a threshold."""

    threshold: float  # share of the darkest ink
    mask: torch.Tensor  # (H, W)
    box: tuple  # top, bottom, left and right of the mask; bottom and right are exclusive
    height: int
    width: int
    peak: torch.Tensor  # its darkest ink
    border: torch.Tensor  # number of its pixels on the picture's border
    score: torch.Tensor  # squared contrast along its outline, less at the picture's border; 0 if too wide


class Digit(NamedTuple):
    """The digit found in a picture."""

    picture: torch.Tensor  # (H, W), brightness of the picture as read, from 0 to 1
    box: tuple  # top, bottom, left and right as shares of the picture's height and width
    ink: torch.Tensor  # (h, w), from 0 to 1, cropped to the digit
    input: torch.Tensor  # (1, 1, 28, 28), normalized: the network's input


# ---- reading ----


def read_picture(image):
    """Return the brightness `(H, W)`, float32 from 0 to 1, of a picture.

    `image` is a path or a PIL image of any color mode. The EXIF rotation is applied. Transparent pixels
    become background that contrasts with the ink. Pillow raises an error if it cannot read the file.
    """
    if not isinstance(image, Image.Image):
        image = Image.open(Path(image).expanduser())
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel, which Pillow would clip at 255
        values = pil_to_tensor(image.convert("F"))[0]
        return (values - values.min()) / (values.max() - values.min()).clamp(min=1e-9)
    gray, alpha = pil_to_tensor(image.convert("RGBA").convert("LA")).float() / 255
    ink_is_dark = (gray * alpha).sum() < 0.5 * alpha.sum()
    return gray * alpha + (1 - alpha) * ink_is_dark


# ---- ink and background ----


def resize(image, longest):
    """Return `image` `(H, W)` scaled so that its longest side has `longest` pixels, antialiased."""
    scale = longest / max(image.shape)
    size = [max(1, round(side * scale)) for side in image.shape]
    return F.interpolate(image[None, None], size, mode="bilinear", antialias=True)[0, 0]


def dilate(image, reach=1):
    """Return the maximum `(H, W)` over the square up to `reach` pixels around each pixel of `image`."""
    side = 2 * reach + 1
    along_rows = F.max_pool2d(image[None, None], (1, side), stride=1, padding=(0, reach))
    return F.max_pool2d(along_rows, (side, 1), stride=1, padding=(reach, 0))[0, 0]


def erode(image, reach=1):
    """Return the minimum `(H, W)` over the square up to `reach` pixels around each pixel of `image`."""
    return -dilate(-image, reach)


def extract_ink(picture):
    """Return how much darker than its background each pixel is, or lighter if the strokes are light.

    Strokes differ from the local mean by more than the background does, and the third power keeps the sign.
    The border's pixels are repeated outside, so that thick strokes do not outweigh the background there.
    The background is a gray closing: the brightness that the picture would have without dark strokes.
    """
    coarse = resize(picture, WORKING_SIZE // 4)
    reach = round(BACKGROUND_WINDOW * max(coarse.shape) / 2)
    surrounded = F.pad(coarse[None, None], 4 * [reach], mode="replicate")
    local_mean = F.avg_pool2d(surrounded, 2 * reach + 1, stride=1)[0, 0]
    if (coarse - local_mean).pow(3).sum() > 0:
        picture = 1 - picture
        coarse = 1 - coarse
    background = erode(dilate(coarse, reach), reach)
    background = F.interpolate(background[None, None], picture.shape, mode="bilinear")[0, 0]
    return (background - picture).clamp(min=0)


# ---- connected components ----


def label_components(mask):
    """Return labels `(H, W)` of the connected components of `mask`, from 1 up; 0 is the background.

    Each pixel starts with its own label. In each step it takes the largest label around it, passes it on to
    the pixel that its old label came from, and follows the labels to their origin, so that the number of
    steps grows only with the logarithm of a component's length.
    """
    labels = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask
    label_of = torch.zeros(mask.numel() + 1, dtype=torch.long)
    while True:
        largest = dilate(labels.float()).long() * mask  # exact: float32 represents integers up to 2^24
        label_of[1:] = largest.flatten()
        label_of.scatter_reduce_(0, labels.flatten(), largest.flatten(), "amax")
        new_labels = label_of[label_of[largest]]
        if torch.equal(new_labels, labels):
            return torch.unique(labels, return_inverse=True)[1]
        labels = new_labels


def bounding_box(mask):
    """Return the top, bottom, left and right of `mask` `(H, W)`; bottom and right are exclusive."""
    rows = mask.any(dim=1).nonzero()
    columns = mask.any(dim=0).nonzero()
    return rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1


def find_components(ink, threshold):
    """Return the `Component`s of the ink `(H, W)` above a share of the darkest, without specks."""
    longest = max(ink.shape)
    reach = max(2, round(NEGLIGIBLE * longest / 2))  # at least 2: small pictures may be soft
    contrast = dilate(ink, reach) - erode(ink, reach)
    is_ink = ink > threshold * ink.max()
    is_outline = is_ink & (erode(is_ink.float()) == 0)
    labels = label_components(is_ink)
    areas = labels[is_ink].bincount()
    components = []
    for label in (areas > NEGLIGIBLE * longest).nonzero():
        mask = labels == label
        box = bounding_box(mask)
        height = box[1] - box[0]
        width = box[3] - box[2]
        border = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
        score = contrast[mask & is_outline].square().sum()  # high for strokes, low for shading
        score = score * (1 - border / (height + width))  # shadows lie along the border
        if width >= MAX_ASPECT * height:
            score = torch.zeros(())  # no digit
        components.append(Component(threshold, mask, box, height, width, ink[mask].max(), border, score))
    return components


# ---- the digit among the components ----


def find_main(ink):
    """Return the component of the ink `(H, W)` that is the digit, or most of it, and those around it.

    A printed frame may be darker than pencil and remain alone at a high threshold, and it may be one
    component with the digit at a low one. So frames are looked for at both thresholds, and what has the box
    of one is left out. Raise ValueError if there is no digit.
    """
    components = []
    for threshold in THRESHOLDS:
        components += find_components(ink, threshold)
    frames = [frame for frame in components if any(is_around(frame, inner) for inner in components)]
    components = [one for one in components if not any(has_same_box(one, frame) for frame in frames)]
    main = max(components, key=lambda component: component.score, default=None)
    if main is None or main.score < MIN_CONTRAST**2 * max(ink.shape) or count_holes(main) > MAX_HOLES:
        raise ValueError("no digit found: give a picture of one digit that stands out from its background")
    return main, [component for component in components if component.threshold == main.threshold]


def count_holes(component):
    """Return the number of holes in a component, without specks."""
    background = ~F.pad(component.mask, (1, 1, 1, 1))  # connected outside of the component
    areas = label_components(background)[background].bincount()
    return (areas > NEGLIGIBLE**2 * component.height * component.width).sum() - 1


def is_around(frame, inner):
    """Return whether a component encloses another one of its threshold that may be a digit."""
    frame_top, frame_bottom, frame_left, frame_right = frame.box
    top, bottom, left, right = inner.box
    is_inside = top > frame_top and bottom < frame_bottom and left > frame_left and right < frame_right
    may_be_digit = inner.score > 0 and inner.height > COMPARABLE * frame.height
    return frame.threshold == inner.threshold and is_inside and may_be_digit


def has_same_box(component, frame):
    """Return whether the box of a component is that of a frame, apart from soft edges."""
    differences = [abs(one - other) for one, other in zip(component.box, frame.box, strict=True)]
    return max(differences) < NEGLIGIBLE * max(component.height, component.width)


def select_parts(main, components):
    """Return the mask `(H, W)` of the components that belong to the digit of which `main` is one.

    Parts are joined step by step, because each one may bring the next within reach. Raise ValueError if
    there is a second digit beside them.
    """
    mask = torch.zeros_like(main.mask)
    joined = main.mask
    while not torch.equal(joined, mask):
        mask = joined
        top, bottom, left, right = bounding_box(mask)
        height = bottom - top
        reach = REACH * max(height, right - left)
        for component in components:
            part_top, part_bottom, part_left, part_right = component.box
            beside = max(part_left - right, left - part_right)
            above_or_below = max(part_top - bottom, top - part_bottom)
            is_cut = component.border > 0 and main.border == 0  # a neighbor, or the table
            is_faint = component.peak < COMPARABLE * main.peak
            if is_cut or is_faint:
                continue
            is_apart = beside > NEGLIGIBLE * max(component.height, height)
            if is_apart and component.height > COMPARABLE * height:
                raise ValueError("more than one digit found: give a picture of one digit")
            if beside < reach and above_or_below < reach:
                joined = joined | component.mask
    return mask


def find_digit(image):
    """Return the `Digit` in a picture of any size, which is what `read_picture` accepts.

    Raise ValueError if it shows no digit, or several side by side.
    """
    picture = read_picture(image)
    ink = extract_ink(resize(picture, min(max(picture.shape), WORKING_SIZE)))
    main, components = find_main(ink)
    mask = select_parts(main, components)
    ink = ink * dilate(mask.float())  # with the soft edges
    ink = ink / ink.max()
    top, bottom, left, right = bounding_box(ink > THRESHOLDS[-1])
    height, width = ink.shape
    box = (top / height, bottom / height, left / width, right / width)
    ink = ink[top:bottom, left:right]
    return Digit(picture, box, ink, prepare_digit(ink))


# ---- the network's input ----


def prepare_digit(ink):
    """Return the ink `(h, w)` of a digit as the network's input, float32 `(1, 1, 28, 28)`.

    As in MNIST, the digit is scaled to fit 20×20, and its center of mass is put on pixel (14, 14) of 28×28
    (yann.lecun.com/exdb/mnist; the pixel was measured on the test images). The brightest pixel becomes 1, and
    pale strokes are brightened to a mean of about 0.7.
    """
    pixels = resize(ink, DIGIT_SIZE)
    pixels = pixels / pixels.max()
    mean = pixels[pixels > STROKE].mean()
    pixels = (pixels * (STROKE_MEAN / mean).clamp(min=1)).clamp(max=1)
    height, width = pixels.shape
    top = center_offset(pixels.sum(dim=1))
    left = center_offset(pixels.sum(dim=0))
    image = torch.zeros(1, 1, SIDE, SIDE)
    image[0, 0, top : top + height, left : left + width] = pixels
    return (image - MEAN) / STD


def center_offset(mass):
    """Return the position, among 28, of `mass` `(n,)` that puts its center on pixel 14."""
    center = (mass * torch.arange(len(mass))).sum() / mass.sum()
    offset = round(13.999 - center.item())  # a hair less than 14, so that a tie always falls to the same side
    return min(max(offset, 0), SIDE - len(mass))


@torch.no_grad()
def predict(model, image):
    """Return the probabilities `(10,)` of the digits 0 to 9, on the CPU; the model is put in eval mode.

    `image` is a `Digit`, a picture that `find_digit` accepts, or an MNIST image: a tensor or an array of
    28×28 pixels, white on black, uint8 or floats from 0 to 1, which are taken as they are. Raise ValueError
    for tensors and arrays of another shape or range, such as images that are normalized already.
    """
    if isinstance(image, (torch.Tensor, np.ndarray)):
        pixels = torch.as_tensor(image)
        if pixels.dtype == torch.uint8:
            pixels = pixels / 255
        if pixels.numel() != SIDE * SIDE or pixels.min() < 0 or pixels.max() > 1:
            raise ValueError(
                "give 28×28 pixels before normalization: uint8 from 0 to 255, or floats from 0 to 1"
            )
        data = (pixels.float().view(1, 1, SIDE, SIDE) - MEAN) / STD
    elif isinstance(image, Digit):
        data = image.input
    else:
        data = find_digit(image).input
    device = next(model.parameters()).device
    output = model.eval()(data.to(device))
    return output[0].softmax(dim=0).cpu()


def plot_prediction(digit, probabilities):
    """Show the picture as it was read, the `Digit`, the network's input and `probabilities` `(10,)`."""
    figure, axes = plt.subplots(2, 2, figsize=(6.5, 5.5), layout="constrained")
    picture, detected, data, bars = axes.flatten()
    height, width = digit.picture.shape
    top, bottom, left, right = digit.box
    frame = plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=TEST_COLOR)
    shares = {"extent": (0, 1, 1, 0), "aspect": height / width}  # the coordinates of the box
    picture.imshow(digit.picture.numpy(), cmap="gray", vmin=0, vmax=1, **AS_PIXELS | shares)
    picture.add_patch(frame)
    picture.set(title="the picture as read", **NO_TICKS)
    detected.imshow(digit.ink.numpy(), cmap="gray_r", vmin=0, vmax=1, **AS_PIXELS)
    detected.set(title="detected digit", **NO_TICKS)
    data.imshow(digit.input[0, 0].numpy(), cmap="gray_r", **AS_PIXELS)
    data.set(title="network input", **NO_TICKS)
    title = f"prediction: {probabilities.argmax()} ({probabilities.max():.1%})"
    bars.bar(range(10), probabilities.tolist(), color=TEST_COLOR)
    bars.set(title=title, xticks=range(10), ylim=(0, 1.05), xlabel="digit", ylabel="probability")
    alt = f"A picture of a digit, the detected digit, the network's input, and the {title}"
    show_figure(figure, "prediction", alt)

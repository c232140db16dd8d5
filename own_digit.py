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

from plots import AS_PIXELS, TEST_COLOR, show_figure
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
    top: int
    bottom: int  # exclusive
    left: int
    right: int  # exclusive
    peak: torch.Tensor  # its darkest ink
    border: torch.Tensor  # number of its pixels on the picture's border
    energy: torch.Tensor  # sum of the squared contrast along its outline: high for strokes, low for shading

    @property
    def height(self):
        return self.bottom - self.top

    @property
    def width(self):
        return self.right - self.left

    @property
    def may_be_digit(self):
        return self.width < MAX_ASPECT * self.height

    @property
    def score(self):
        return self.energy * (1 - self.border / (self.height + self.width))  # shadows lie along the border


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
    if image.mode.startswith("I"):  # 16 or 32 bits per pixel, which Pillow would clip at 255
        image = image.convert("I")
    if image.mode in ("I", "F"):
        values = pil_to_tensor(image)[0].float()
        return (values - values.min()) / (values.max() - values.min()).clamp(min=1e-9)
    gray, alpha = pil_to_tensor(image.convert("RGBA").convert("LA")).float() / 255
    if alpha.min() == 1:
        return gray
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
        border = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
        energy = contrast[mask & is_outline].square().sum()
        components.append(Component(threshold, mask, *bounding_box(mask), ink[mask].max(), border, energy))
    return components


# ---- the digit among the components ----


def find_main(ink):
    """Return the component of the ink `(H, W)` that is the digit, or most of it, and those around it.

    A printed frame may be darker than pencil and remain alone at a high threshold, and it may be one
    component with the digit at a low one. So a frame is remembered, and what has its box is left out. Raise
    ValueError if there is no digit.
    """
    components = []
    frames = []
    for threshold in THRESHOLDS:
        found = find_components(ink, threshold)
        components += found
        frames += [component for component in found if is_frame(component, found)]
    components = [component for component in components if not has_box_of_any(component, frames)]
    candidates = [component for component in components if component.may_be_digit]
    main = max(candidates, key=lambda component: component.score, default=None)
    if main is None or main.score < MIN_CONTRAST**2 * max(ink.shape) or count_holes(main) > MAX_HOLES:
        raise ValueError("no digit found: give a picture of one digit that stands out from its background")
    return main, [component for component in components if component.threshold == main.threshold]


def count_holes(component):
    """Return the number of holes in a component, without specks."""
    background = ~F.pad(component.mask, (1, 1, 1, 1))  # connected outside of the component
    areas = label_components(background)[background].bincount()
    return (areas > NEGLIGIBLE**2 * component.height * component.width).sum() - 1


def is_frame(frame, components):
    """Return whether a component encloses one of the others that may be a digit."""
    for inner in components:
        is_inside = inner.top > frame.top and inner.bottom < frame.bottom
        is_inside &= inner.left > frame.left and inner.right < frame.right
        is_tall = inner.height > COMPARABLE * frame.height
        if inner.may_be_digit and is_inside and is_tall:
            return True
    return False


def has_box_of_any(component, frames):
    """Return whether the box of a component is that of a frame, apart from soft edges."""
    tolerance = NEGLIGIBLE * max(component.height, component.width)
    for frame in frames:
        vertical = max(abs(component.top - frame.top), abs(component.bottom - frame.bottom))
        horizontal = max(abs(component.left - frame.left), abs(component.right - frame.right))
        if max(vertical, horizontal) < tolerance:
            return True
    return False


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
            beside = max(component.left - right, left - component.right)
            above_or_below = max(component.top - bottom, top - component.bottom)
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
    (yann.lecun.com/exdb/mnist; the pixel was measured on the test images). Pale strokes are brightened.
    """
    pixels = brighten(resize(ink, DIGIT_SIZE))
    height, width = pixels.shape
    top = center_offset(pixels.sum(dim=1))
    left = center_offset(pixels.sum(dim=0))
    image = torch.zeros(SIDE, SIDE)
    image[top : top + height, left : left + width] = pixels
    return normalize(image)


def brighten(pixels):
    """Return pixels of which the brightest is 1, and those of strokes have a mean of about 0.7 or more."""
    pixels = (pixels / pixels.max()).clamp(min=0)
    mean = pixels[pixels > STROKE].mean()
    return (pixels * (STROKE_MEAN / mean).clamp(min=1)).clamp(max=1)


def center_offset(mass):
    """Return the position, among 28, of `mass` `(n,)` that puts its center on pixel 14."""
    center = (mass * torch.arange(len(mass))).sum() / mass.sum()
    # A hair less than 14, so that a tie always falls to the same side
    offset = round(13.999 - center.item())
    return min(max(offset, 0), SIDE - len(mass))


def normalize(image):
    """Return pixels `(28, 28)` from 0 to 1 as float32 `(1, 1, 28, 28)`, normalized as in training."""
    return (image.float().view(1, 1, SIDE, SIDE) - MEAN) / STD


def normalize_pixels(pixels):
    """Return an MNIST image, a tensor or an array of 28×28 pixels, as the network's input; see `predict`."""
    pixels = torch.as_tensor(pixels)
    if pixels.dtype == torch.uint8:
        pixels = pixels / 255
    if pixels.numel() != SIDE * SIDE or pixels.min() < 0 or pixels.max() > 1:
        raise ValueError("give 28×28 pixels before normalization: uint8 from 0 to 255, or floats from 0 to 1")
    return normalize(pixels)


@torch.no_grad()
def predict(model, image):
    """Return the probabilities `(10,)` of the digits 0 to 9, on the CPU; the model is put in eval mode.

    `image` is a `Digit`, a picture that `find_digit` accepts, or an MNIST image: a tensor or an array of
    28×28 pixels, white on black, uint8 or floats from 0 to 1, which are taken as they are. Raise ValueError
    for tensors and arrays of another shape or range, such as images that are normalized already.
    """
    if isinstance(image, (torch.Tensor, np.ndarray)):
        data = normalize_pixels(image)
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
    axes = axes.flatten()
    for axis in axes[:3]:
        axis.set(xticks=[], yticks=[])

    height, width = digit.picture.shape
    top, bottom, left, right = digit.box
    frame = plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=TEST_COLOR)
    shares = {"extent": (0, 1, 1, 0), "aspect": height / width}  # the coordinates of the box
    axes[0].imshow(digit.picture.numpy(), cmap="gray", vmin=0, vmax=1, **AS_PIXELS | shares)
    axes[0].add_patch(frame)
    axes[0].set_title("the picture as read")
    axes[1].imshow(digit.ink.numpy(), cmap="gray_r", vmin=0, vmax=1, **AS_PIXELS)
    axes[1].set_title("detected digit")
    axes[2].imshow(digit.input[0, 0].numpy(), cmap="gray_r", **AS_PIXELS)
    axes[2].set_title("network input")
    title = f"prediction: {probabilities.argmax()} ({probabilities.max():.1%})"
    axes[3].bar(range(10), probabilities.tolist(), color=TEST_COLOR)
    axes[3].set(title=title, xticks=range(10), ylim=(0, 1.05), xlabel="digit", ylabel="probability")
    alt = f"A picture of a digit, the detected digit, the network's input, and the {title}"
    show_figure(figure, "prediction", alt)

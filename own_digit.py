"""Your own digit: from a picture of a handwritten digit to the network's input and its prediction.

    digit = find_digit("seven.jpg")
    plot_prediction(digit, predict(model, digit))

Brightness and ink are from 0 to 1. A picture that shows no digit, or several, raises ValueError with one line
that says what to do.
"""

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from plots import TEST_COLOR, show_figure
from utils import MEAN, SIDE, STD

WORKING_SIZE = 256  # longest side, in pixels, of the picture in which the digit is looked for
BACKGROUND_WINDOW = 0.35  # side of the closing's square as a share of the picture's longest side
THRESHOLDS = (0.2, 0.3)  # of the ink, as shares of the darkest; the last is the crop's, as in draw.html
MIN_CONTRAST = 0.1  # darkest ink of a digit
MAX_ASPECT = 2.5  # width over height of a digit
SHADING = 0.2  # share of the darkest ink: fainter outlines are shading, fainter ink in a frame is soiling
NEGLIGIBLE = 0.04  # sizes and gaps below this share do not count
COMPARABLE = 0.3  # share of another's height (second digit, digit in a frame) or darkest ink (digit's parts)
REACH = 0.2  # distance of a digit's parts as a share of its longest side
DIGIT_SIZE = 20  # longest side, in pixels, of the digit in an MNIST image
STROKE = 0.15  # pixel of the network's input above which it belongs to a stroke
STROKE_MEAN = 0.7  # mean of the pixels of strokes; its median in MNIST is 0.77


class Components(NamedTuple):
    """Measurements of connected components `(N,)`; number 0 is the background."""

    energy: torch.Tensor  # sum of the squared contrast along the outline: high for strokes, low for shading
    area: torch.Tensor  # in pixels
    peak: torch.Tensor  # the darkest ink
    top: torch.Tensor
    bottom: torch.Tensor  # exclusive
    left: torch.Tensor
    right: torch.Tensor  # exclusive
    touching: torch.Tensor  # number of pixels on the picture's border

    @property
    def height(self):
        return self.bottom - self.top

    @property
    def width(self):
        return self.right - self.left

    @property
    def extent(self):
        return torch.maximum(self.height, self.width)

    @property
    def box(self):
        """The four sides `(N, 4)`: larger numbers are further out."""
        return torch.stack([-self.top, self.bottom, -self.left, self.right], dim=1)


class Candidate(NamedTuple):
    """What may be the digit: the component with the most energy at one threshold."""

    ink: torch.Tensor  # (H, W), of the whole picture
    labels: torch.Tensor  # (H, W)
    components: Components
    is_frame: torch.Tensor  # (N,)
    main: int
    score: float

    @property
    def touches_border(self):
        return bool(self.components.touching[self.main] > 0)

    @property
    def fills_picture(self):
        """Whether the digit is as high or as wide as the picture's longest side, or nearly so."""
        return bool(self.components.extent[self.main] > (1 - 2 * NEGLIGIBLE) * max(self.ink.shape))


class Digit(NamedTuple):
    """The digit found in a picture."""

    picture: torch.Tensor  # (H, W), brightness of the picture as read, from 0 to 1
    box: tuple  # top, bottom, left and right as shares of the picture's height and width
    ink: torch.Tensor  # (h, w), from 0 to 1, cropped to the digit
    input: torch.Tensor  # (1, 1, 28, 28), normalized: the network's input


# ---- reading ----


def read_picture(image):
    """Return the brightness `(H, W)`, float32 from 0 to 1, of a picture.

    `image` is a path, a file opened in binary mode or a PIL image of any color mode. The EXIF rotation is
    applied. Transparent pixels become background that contrasts with the ink. Pillow raises an error if it
    cannot read the file.
    """
    if not isinstance(image, Image.Image):
        image = Image.open(image)
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
    The background is a grey closing: the brightness that the picture would have without dark strokes.
    """
    coarse = resize(picture, WORKING_SIZE // 4)
    reach = round(BACKGROUND_WINDOW * max(coarse.shape) / 2)
    local_mean = F.avg_pool2d(coarse[None, None], 2 * reach + 1, 1, reach, count_include_pad=False)[0, 0]
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


def measure_components(labels, ink, contrast):
    """Return the `Components` numbered by `labels`, given each pixel's ink and contrast (all `(H, W)`)."""
    height, width = labels.shape
    count = int(labels.max()) + 1
    outline = (labels > 0) & (erode((labels > 0).float()) == 0)
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width).expand(height, width)
    on_border = (rows == 0) | (rows == height - 1) | (columns == 0) | (columns == width - 1)

    def total(numbers):
        return torch.zeros(count).scatter_add(0, labels.flatten(), numbers.flatten().float())

    def largest(numbers):
        zeros = torch.zeros(count, dtype=numbers.dtype)
        return zeros.scatter_reduce(0, labels.flatten(), numbers.flatten(), "amax")

    peak = largest(ink)
    return Components(
        energy=total(contrast.square() * outline) - (SHADING * peak).square() * total(outline),
        area=total(labels > 0),
        peak=peak,
        top=height - largest(height - rows),
        bottom=largest(rows + 1),
        left=width - largest(width - columns),
        right=largest(columns + 1),
        touching=total(on_border),
    )


# ---- the digit among the components ----


def find_candidates(ink):
    """Return the `Candidate` at each threshold in `ink` `(H, W)`; printed frames are none.

    A frame may be darker than pencil and remain alone at a high threshold, and it may be one component
    with the digit at a low one. So what it encloses is remembered, and candidates with its box are dropped.
    """
    reach = max(2, round(NEGLIGIBLE * max(ink.shape) / 2))  # at least 2: small pictures may be soft
    contrast = dilate(ink, reach) - erode(ink, reach)
    candidates = []
    inner_boxes = []
    inner_peaks = []
    frame_boxes = []
    for share in THRESHOLDS:
        labels = label_components(ink > share * ink.max())
        components = measure_components(labels, ink, contrast)
        plausible = components.extent > NEGLIGIBLE * max(ink.shape)
        plausible &= components.peak > MIN_CONTRAST
        plausible &= components.width < MAX_ASPECT * components.height
        plausible[0] = False
        inner_boxes.append(components.box[plausible])
        inner_peaks.append(components.peak[plausible])
        is_frame = find_frames(components, torch.cat(inner_boxes), torch.cat(inner_peaks))
        frame_boxes.append(components.box[is_frame])
        share_inside = 1 - components.touching / (components.height + components.width)
        scores = components.energy * share_inside.clamp(min=0) * (plausible & ~is_frame)
        main = int(scores.argmax())
        if scores[main] > MIN_CONTRAST**2 * max(ink.shape):
            candidates.append(Candidate(ink, labels, components, is_frame, main, scores[main].item()))
    frames = torch.cat(frame_boxes)
    return [candidate for candidate in candidates if not has_box_of_a_frame(candidate, frames)]


def find_frames(components, inner_boxes, inner_peaks):
    """Return which components `(N,)` enclose one of the boxes `(M, 4)` of what may be a digit."""
    encloses = (components.box[:, None] > inner_boxes).all(dim=2)
    inner_heights = inner_boxes[:, 0] + inner_boxes[:, 1]
    encloses &= inner_heights > COMPARABLE * components.height[:, None]
    encloses &= inner_peaks > SHADING * components.peak[:, None]
    is_frame = encloses.any(dim=1)
    is_frame[0] = False
    return is_frame


def has_box_of_a_frame(candidate, frames):
    """Return whether the candidate's box is one of `frames` `(M, 4)`, apart from soft edges."""
    components = candidate.components
    main = candidate.main
    distance = (frames - components.box[main]).abs().amax(dim=1)
    return bool((distance < NEGLIGIBLE * components.extent[main]).any())


def find_filling_candidates(picture):
    """Return the `Candidate`s that fill the picture `(H, W)`, in both polarities.

    The strokes of such a digit may be wider than the closing's square, so the background is constant.
    """
    candidates = []
    for dark_on_light in (picture, 1 - picture):
        ink = (dark_on_light.quantile(0.9) - dark_on_light).clamp(min=0)
        candidates += [candidate for candidate in find_candidates(ink) if candidate.fills_picture]
    return candidates


def select_parts(candidate):
    """Return which components `(N,)` belong to the digit.

    Raise ValueError if there is a second digit: beside the main component, at least half as tall.
    """
    components = candidate.components
    main = candidate.main
    height = components.height
    reach = REACH * components.extent[main]
    is_part = components.area > NEGLIGIBLE * components.area[main]
    is_part &= components.peak > COMPARABLE * components.peak[main]
    is_part &= ~candidate.is_frame
    is_part[0] = False
    # What the border cuts and what juts out is a neighbor, or the table
    within = components.left > components.left[main] - 2 * reach
    within &= components.right < components.right[main] + 2 * reach
    is_part &= within | (components.touching == 0)

    gap = torch.maximum(components.left - components.right[main], components.left[main] - components.right)
    is_second = gap > NEGLIGIBLE * torch.maximum(height, height[main])
    is_second &= is_part & (height > COMPARABLE * height[main])
    if is_second.any():
        raise ValueError("more than one digit found: give a picture of one digit")

    is_part &= components.top < components.bottom[main] + reach
    is_part &= components.bottom > components.top[main] - reach
    is_part &= components.left < components.right[main] + reach
    is_part &= components.right > components.left[main] - reach
    is_part[main] = True
    return is_part


def bounding_box(ink):
    """Return the top, bottom, left and right of the ink, without the fainter part of soft edges."""
    is_ink = ink > THRESHOLDS[-1] * ink.max()
    rows = is_ink.any(dim=1).nonzero()
    columns = is_ink.any(dim=0).nonzero()
    return rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1


def find_digit(image):
    """Return the `Digit` in a picture, which is what `read_picture` accepts.

    The picture may be of any size, dark on light or light on dark, evenly lit or not. At each threshold, the
    component with the most contrast along its outline competes. Raise ValueError if the picture shows no
    digit, or several side by side.
    """
    picture = read_picture(image)
    small = picture
    if max(picture.shape) > WORKING_SIZE:
        small = resize(picture, WORKING_SIZE)
    candidates = find_candidates(extract_ink(small))
    if all(candidate.touches_border for candidate in candidates):
        candidates += find_filling_candidates(small)
    if not candidates:
        raise ValueError("no digit found: give a picture of one digit that stands out from its background")
    best = max(candidates, key=lambda candidate: candidate.score)
    mask = select_parts(best)[best.labels]
    ink = best.ink * dilate(mask.float())  # with the soft edges
    ink = ink / ink.max()
    top, bottom, left, right = bounding_box(ink)
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
    """Return an MNIST image, `(28, 28)` or `(1, 28, 28)`, as the network's input; see `predict`."""
    pixels = torch.as_tensor(pixels)
    if tuple(pixels.shape) not in ((SIDE, SIDE), (1, SIDE, SIDE)):
        raise ValueError(
            f"pixels of shape {tuple(pixels.shape)}: give 28×28 pixels, or a picture as a path or a PIL image"
        )
    if pixels.dtype == torch.uint8:
        pixels = pixels / 255
    if pixels.min() < 0 or pixels.max() > 1:
        raise ValueError("give pixels before normalization: uint8 from 0 to 255, or floats from 0 to 1")
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
    corner = (left * width - 0.5, top * height - 0.5)
    frame_width = (right - left) * width
    frame_height = (bottom - top) * height
    frame = plt.Rectangle(corner, frame_width, frame_height, fill=False, edgecolor=TEST_COLOR)
    axes[0].imshow(digit.picture.numpy(), cmap="gray", vmin=0, vmax=1)
    axes[0].add_patch(frame)
    axes[0].set_title("the picture as read")
    axes[1].imshow(digit.ink.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes[1].set_title("detected digit")
    axes[2].imshow(digit.input[0, 0].numpy(), cmap="gray_r")
    axes[2].set_title("network input")
    title = f"prediction: {probabilities.argmax()} ({probabilities.max():.1%})"
    axes[3].bar(range(10), probabilities.tolist(), color=TEST_COLOR)
    axes[3].set(title=title, xticks=range(10), ylim=(0, 1.05), xlabel="digit", ylabel="probability")
    alt = f"A picture of a digit, the detected digit, the network's input, and the {title}"
    show_figure(figure, "prediction", alt)

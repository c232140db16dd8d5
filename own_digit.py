"""Your own digit: from a picture of a handwritten digit to the network's input and its prediction.

    digit = find_digit("seven.jpg")
    plot_prediction(digit, predict(model, digit))

Brightness and ink are from 0 to 1. What cannot be read, and a picture that does not show exactly one
digit, raise ValueError with one line that says what to do.
"""

import os
import warnings
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from plots import TEST_COLOR, show_figure
from utils import MEAN, SIDE, STD

# Sizes in pixels of the longest side
WORKING_SIZE = 256  # at which the digit is looked for
BACKGROUND_SIZE = 64  # at which the background is estimated
DIGIT_SIZE = 20  # of the digit in an MNIST image

# Between background and ink
BACKGROUND_WINDOW = 0.35  # side of the closing's square as a share of the picture's longest side
THRESHOLDS = (0.08, 0.13, 0.2, 0.3, 0.5)  # tried in this order, as shares of the darkest ink
NOISE_FACTOR = 8  # ink exceeds the noise (see `estimate_noise`) by this factor
NOISY = 0.005  # noise at which the ink is smoothed
EDGE_REACH = 0.01  # within which an outline's contrast is measured, as a share of the longest side
SOFT_EDGE_REACH = 0.03  # the same for digits that fill the picture, which may have been enlarged
MIN_EDGE = 0.22  # contrast that an outline needs, as a share of the component's darkest ink
CROP_THRESHOLD = 0.3  # share of the darkest ink at which the digit is cropped, as in draw.html

# What a digit looks like
MIN_CONTRAST = 0.07
MIN_EXTENT = 0.035  # longest side of the digit as a share of the picture's
MAX_ASPECT = 2.5  # width over height
MAX_FILL = 0.7  # share of its bounding box that a digit fills, unless it is as slim as a 1
SLIM = 0.6  # width over height
FRAMED_HEIGHT = 0.3  # height of what a frame encloses, as a share of the frame's
MAX_TOUCHING = 0.6  # pixels on the picture's border over height plus width; more is a table's edge
FILLING_MAX_TOUCHING = 0.8  # the same for digits that fill the picture
MAX_BORDER_RUNS = 10  # separate stretches of the border that a digit covers; more is the paper's texture
BORDER_PENALTY = 0.25  # factor on the energy of a candidate that touches the picture's border
FILLING_EXTENT = 0.9  # height or width of a digit that fills the picture, as a share of the picture's
MAX_GROWTH = 2.5  # of a digit by parts that are fainter and cut by the picture's border


class Components(NamedTuple):
    """Measurements of connected components `(N,)`; number 0 is the background."""

    energy: torch.Tensor  # sum of the squared contrast along the outline: high for strokes, low for shading
    area: torch.Tensor  # in pixels
    peak: torch.Tensor  # the most ink
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


class Candidate(NamedTuple):
    """What may be the digit: a main component and the large ones near it, such as a 5's bar."""

    ink: torch.Tensor  # (H, W), of the whole picture
    mask: torch.Tensor  # (H, W), the pixels of the digit
    components: Components
    main: int
    is_large: torch.Tensor  # (N,), which components are large enough for a stroke
    score: float  # energy of the main component, less at the border
    fills_picture: bool

    @property
    def touches_border(self):
        return bool(self.components.touching[self.main] > 0)


class Digit(NamedTuple):
    """The digit found in a picture."""

    picture: torch.Tensor  # (H, W), brightness of the picture as read, from 0 to 1
    ink: torch.Tensor  # (h, w), from 0 to 1, cropped to the digit
    box: tuple  # top, bottom, left and right as shares of the picture's height and width


# ---- reading ----


def open_picture(image):
    """Return the PIL image of a path, a file or a PIL image, decoded and rotated as its EXIF data say."""
    if isinstance(image, (str, os.PathLike)):
        image = Image.open(os.path.expanduser(image))
    elif not isinstance(image, Image.Image):
        image = Image.open(image)
    return ImageOps.exif_transpose(image)


def stretch_brightness(image):
    """Return an image of 16 or 32 bits per pixel as one of 8 bits; PIL would clip at 255.

    NaN and infinite pixels become the darkest one.
    """
    if image.mode == "I;16B":  # PIL cannot convert it to floats
        image = image.convert("I")
    values = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32)
    finite = values[values.isfinite()]
    if len(finite) == 0:
        raise ValueError("no pixel is finite")
    low = finite.min()
    scale = 255 / (finite.max() - low).clamp(min=1e-9)
    values = ((values - low) * scale).nan_to_num(0, posinf=0, neginf=0)
    return Image.frombytes("L", image.size, values.round().byte().numpy().tobytes())


def picture_name(image):
    """Return how an error names a picture: a path, shortened if it is the text of a file, or the type."""
    if not isinstance(image, (str, os.PathLike)):
        return type(image).__name__
    name = str(os.fspath(image))
    if len(name) > 200:
        return f"{name[:30]}..."
    return name


def read_picture(image):
    """Return the brightness `(H, W)`, float32 from 0 to 1, of a picture.

    `image` is a path, a file opened in binary mode or a PIL image of any color mode. The EXIF rotation is
    applied. Transparent pixels become background that contrasts with the ink. Raise ValueError if
    `image` is something else, if there is no such file, if it cannot be decoded, or if it has so many
    pixels that PIL considers it a decompression bomb.
    """
    is_path = isinstance(image, (str, os.PathLike))
    if not is_path and not isinstance(image, Image.Image) and not hasattr(image, "read"):
        raise ValueError(
            f"unsupported type for a picture, {type(image).__name__}:"
            " pass a path, a file opened in binary mode or a PIL image"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = open_picture(image)
            if min(picture.size) == 0:
                raise ValueError("it has no pixels")
            if picture.mode[0] in "IF":
                picture = stretch_brightness(picture)
            if picture.mode == "La":  # premultiplied by alpha; PIL converts it to LA only
                picture = picture.convert("LA")
            gray, alpha = pil_to_tensor(picture.convert("RGBA").convert("LA"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {picture_name(image)}: check the path") from None
    except Exception as error:  # corrupted files raise nearly every type of exception
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(
            f"{picture_name(image)} cannot be read as an image ({reason}): use a different file"
        ) from None
    gray = gray.float().div_(255)
    if alpha.min() == 255:
        return gray
    alpha = alpha.float().div_(255)
    ink_is_dark = (gray * alpha).sum() < 0.5 * alpha.sum()
    return gray * alpha + (1 - alpha) * ink_is_dark


# ---- ink and background ----


def resize(image, size):
    """Return `image` `(H, W)` in another `size`, antialiased."""
    return F.interpolate(image[None, None], size, mode="bilinear", antialias=True)[0, 0]


def scaled_size(image, longest):
    """Return the height and width that `image` has if its longest side has `longest` pixels."""
    scale = longest / max(image.shape)
    return [max(1, round(side * scale)) for side in image.shape]


def shrink(image, longest):
    """Return `image` `(H, W)` with no side longer than `longest` pixels."""
    if max(image.shape) <= longest:
        return image
    return resize(image, scaled_size(image, longest))


def smooth(image):
    """Return `image` `(H, W)` after a 3×3 binomial filter."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    padded = F.pad(image[None, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, torch.outer(kernel, kernel)[None, None])[0, 0]


def dilate(image, reach=1):
    """Return the maximum `(H, W)` over the square up to `reach` pixels around each pixel of `image`."""
    side = 2 * reach + 1
    along_rows = F.max_pool2d(image[None, None], (1, side), stride=1, padding=(0, reach))
    return F.max_pool2d(along_rows, (side, 1), stride=1, padding=(reach, 0))[0, 0]


def erode(image, reach=1):
    """Return the minimum `(H, W)` over the square up to `reach` pixels around each pixel of `image`."""
    return -dilate(-image, reach)


def darken_ink(picture):
    """Return the picture `(H, W)`, inverted if its strokes are lighter than what is around them.

    Strokes differ from the local mean by more than the background does, and the third power keeps the sign.
    """
    coarse = shrink(picture, BACKGROUND_SIZE)
    reach = round(BACKGROUND_WINDOW * max(coarse.shape) / 2)
    local_mean = F.avg_pool2d(coarse[None, None], 2 * reach + 1, 1, reach, count_include_pad=False)[0, 0]
    if (coarse - local_mean).pow(3).sum() > 0:
        return 1 - picture
    return picture


def estimate_background(picture):
    """Return the brightness `(H, W)` that the picture would have without dark ink: a grey closing."""
    coarse = shrink(picture, BACKGROUND_SIZE)
    reach = round(BACKGROUND_WINDOW * max(coarse.shape) / 2)
    return resize(erode(dilate(coarse, reach), reach), picture.shape)


def estimate_noise(image):
    """Return the 30th percentile of the differences of nearby pixels, which strokes do not raise.

    It is 0.54 standard deviations of normal noise. Pixels are compared over a distance of three, as JPEG
    and scaling make neighbors alike.
    """
    differences = (image - image.roll(3, dims=0)).abs()
    return differences.flatten().quantile(0.3).item()


# ---- connected components ----


def largest_label(image):
    """Return the maximum `(H, W)` over the 3×3 pixels around each pixel of `image`, a tensor of integers."""
    padded = F.pad(image, (1, 1, 1, 1))
    of_three_rows = torch.maximum(torch.maximum(padded[:-2], padded[1:-1]), padded[2:])
    of_two_columns = torch.maximum(of_three_rows[:, :-2], of_three_rows[:, 1:-1])
    return torch.maximum(of_two_columns, of_three_rows[:, 2:])


def label_components(mask):
    """Return labels `(H, W)` of the connected components of `mask`, from 1 up; 0 is the background.

    Each pixel starts with its own label. In each step it takes the largest label among its neighbors,
    passes it on to the pixel that its old label came from, and follows the labels to their origin, so
    that the number of steps grows only with the logarithm of a component's length.
    """
    inside = mask.flatten().nonzero()[:, 0]
    count = len(inside) + 1
    canvas = torch.zeros_like(mask, dtype=torch.long)
    pixels = canvas.view(-1)
    labels = torch.arange(1, count)
    origin_of = torch.zeros(count, dtype=torch.long)
    while True:
        pixels[inside] = labels
        neighbors = largest_label(canvas).flatten()[inside]
        origin_of[1:] = neighbors
        origin_of.scatter_reduce_(0, labels, neighbors, "amax")
        new_labels = origin_of[origin_of[neighbors]]
        if torch.equal(new_labels, labels):
            break
        labels = new_labels
    pixels[inside] = torch.unique(labels, return_inverse=True)[1] + 1
    return canvas


def measure_components(labels, ink, contrast):
    """Return the `Components` numbered by `labels`, given each pixel's ink and contrast (all `(H, W)`)."""
    height, width = labels.shape
    count = int(labels.max()) + 1
    index = labels.flatten()
    values = ink.flatten()
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    on_border = (rows == 0) | (rows == height - 1) | (columns == 0) | (columns == width - 1)
    outline = (labels > 0) & (erode((labels > 0).float()) == 0)

    def total(numbers):
        return torch.zeros(count).scatter_add(0, index, numbers.flatten().float())

    def largest(numbers):
        return torch.zeros(count, dtype=numbers.dtype).scatter_reduce(0, index, numbers, "amax")

    peak = largest(values)
    return Components(
        energy=total(contrast.square() * outline) - (MIN_EDGE * peak).square() * total(outline),
        area=total(torch.ones_like(values)),
        peak=peak,
        top=height - largest(height - rows),
        bottom=largest(rows + 1),
        left=width - largest(width - columns),
        right=largest(columns + 1),
        touching=total(on_border),
    )


# ---- the digit among the components ----


def is_plausible(components, shape, max_touching):
    """Return which components `(N,)` may be a digit by their size, shape, contrast and border."""
    height = components.height
    width = components.width
    fill = components.area / (height * width).clamp(min=1)
    is_slim = width < SLIM * height
    plausible = components.extent >= max(3, MIN_EXTENT * max(shape))
    plausible &= width < MAX_ASPECT * height
    plausible &= components.peak >= MIN_CONTRAST
    plausible &= (fill < MAX_FILL) | is_slim
    plausible &= components.touching < max_touching * (height + width)
    plausible[0] = False
    return plausible


def encloses(components, box):
    """Return which components `(N,)` frame a box: top, bottom, left and right of what may be a digit."""
    top, bottom, left, right = box
    frames = (components.top < top) & (components.bottom > bottom)
    frames &= (components.left < left) & (components.right > right)
    frames &= bottom - top >= FRAMED_HEIGHT * components.height
    frames[0] = False
    return frames


def box_of(components, number):
    """Return the top, bottom, left and right of one component."""
    sides = (components.top, components.bottom, components.left, components.right)
    return [side[number].item() for side in sides]


def count_border_runs(mask):
    """Return the number of separate stretches of the picture's border that `mask` `(H, W)` covers."""
    border = torch.cat([mask[0], mask[:, -1], mask[-1].flip(0), mask[:, 0].flip(0)])
    return int((border & ~border.roll(1)).sum())


def spans_picture(components, main, shape):
    """Return whether a component is as high or as wide as the picture and touches its border.

    The paper inside a printed box does not touch it.
    """
    height, width = shape
    is_high = components.height[main] > FILLING_EXTENT * height
    is_wide = components.width[main] > FILLING_EXTENT * width
    return bool((is_high | is_wide) & (components.touching[main] > 0))


def select_strokes(components, main, is_frame):
    """Return which components `(N,)` are large enough for strokes, and which belong to the digit `main`."""
    reach = 0.2 * components.extent[main]
    is_large = components.area >= 0.03 * components.area[main]
    is_large &= ~is_frame
    is_large[0] = False
    overhang = 0.4 * components.extent[main]
    within = components.left > components.left[main] - overhang
    within &= components.right < components.right[main] + overhang
    is_large &= (components.touching == 0) | within  # beside the digit, it is a neighbor or the table
    is_near = components.bottom > components.top[main] - reach
    is_near &= components.top < components.bottom[main] + reach
    is_near &= components.right > components.left[main] - reach
    is_near &= components.left < components.right[main] + reach
    is_selected = is_large & is_near
    is_selected[main] = True
    return is_large, is_selected


def find_candidates(ink, fills_picture=False):
    """Return the most digit-like `Candidate` in `ink` `(H, W)` at each threshold, from low to high.

    If `fills_picture`, only digits as high or as wide as the picture are returned.
    """
    smoothed = ink
    if estimate_noise(ink) > NOISY:
        smoothed = smooth(ink)
    lowest_threshold = NOISE_FACTOR * estimate_noise(smoothed)
    edge_reach = EDGE_REACH
    max_touching = MAX_TOUCHING
    if fills_picture:
        edge_reach = SOFT_EDGE_REACH
        max_touching = FILLING_MAX_TOUCHING
    reach = max(1, round(edge_reach * max(ink.shape)))
    contrast = dilate(smoothed, reach) - erode(smoothed, reach)
    candidates = []
    boxes = []
    for share in THRESHOLDS:
        threshold = share * smoothed.max().item()
        if threshold < lowest_threshold:
            continue
        labels = label_components(smoothed > threshold)
        components = measure_components(labels, smoothed, contrast)
        plausible = is_plausible(components, ink.shape, max_touching)
        # A frame is darker than pencil: it may be left at a threshold at which the digit is gone.
        inner = [box_of(components, number) for number in plausible.nonzero()[:, 0].tolist()]
        is_frame = torch.zeros_like(plausible)
        for box in boxes + inner:
            is_frame |= encloses(components, box)
        penalty = torch.where(components.touching > 0, BORDER_PENALTY, 1.0)
        scores = components.energy * penalty * (plausible & ~is_frame)
        main = int(scores.argmax())
        if scores[main] <= 0 or count_border_runs(labels == main) > MAX_BORDER_RUNS:
            continue
        boxes.append(box_of(components, main))
        if fills_picture and not spans_picture(components, main, ink.shape):
            continue
        is_large, is_selected = select_strokes(components, main, is_frame)
        mask = is_selected[labels]
        score = scores[main].item()
        if fills_picture:  # the background between the strokes covers more of the border than a digit
            perimeter = 2 * sum(ink.shape)
            score *= 1 - components.touching[main].item() / perimeter
        candidates.append(Candidate(ink, mask, components, main, is_large, score, fills_picture))
    return candidates


def find_all_candidates(picture):
    """Return the candidates in the brightness `(H, W)` of a picture.

    Digits that fill the picture are looked for on a constant background, too, in both polarities, since
    their strokes may be wider than the closing's square. A candidate at the border may be a shadow unless
    the light varies by less than its contrast.
    """
    dark_on_light = darken_ink(picture)
    background = estimate_background(dark_on_light)
    low, high = background.flatten().quantile(torch.tensor([0.02, 0.98])).tolist()
    candidates = []
    for candidate in find_candidates((background - dark_on_light).clamp(min=0)):
        contrast = candidate.components.peak[candidate.main]
        if not candidate.touches_border or contrast > high - low:
            candidates.append(candidate)
    for polarity in (picture, 1 - picture):
        ink = (polarity.flatten().quantile(0.9) - polarity).clamp(min=0)
        candidates += find_candidates(ink, fills_picture=True)
    return candidates


def extends(larger, smaller):
    """Return whether a candidate adds fainter parts, cut by the border, to one inside the picture."""
    if larger.fills_picture or not larger.touches_border or smaller.touches_border:
        return False
    missing = smaller.mask & ~larger.mask
    growth = larger.components.extent[larger.main] / smaller.components.extent[smaller.main]
    energy = larger.components.energy[larger.main]
    return bool(
        missing.sum() < 0.05 * smaller.mask.sum()
        and growth < MAX_GROWTH
        and energy > 0.8 * smaller.components.energy[smaller.main]
    )


def reject_second_digit(candidate):
    """Raise ValueError if there is a second component, at least half as tall, next to the candidate."""
    components = candidate.components
    main = candidate.main
    height = components.height
    gap = torch.maximum(components.left - components.right[main], components.left[main] - components.right)
    taller = torch.maximum(height, height[main])
    is_second = candidate.is_large & (gap > 0.04 * taller)
    is_second &= height > 0.5 * height[main]
    if is_second.any():
        raise ValueError("more than one digit found: give a picture of one digit")


def crop_to_digit(candidate):
    """Return the candidate's ink `(h, w)`, from 0 to 1, and its top, bottom, left and right."""
    ink = candidate.ink * dilate(candidate.mask.float())  # with the soft edges
    ink = ink / ink.max()
    rows = (ink > CROP_THRESHOLD).any(dim=1).nonzero()
    columns = (ink > CROP_THRESHOLD).any(dim=0).nonzero()
    top = rows[0].item()
    bottom = rows[-1].item() + 1
    left = columns[0].item()
    right = columns[-1].item() + 1
    return ink[top:bottom, left:right], (top, bottom, left, right)


def find_digit(image):
    """Return the `Digit` in a picture, which is what `read_picture` accepts.

    The picture may be of any size, dark on light or light on dark, evenly lit or not. At each of several
    thresholds, the component with the most contrast along its outline competes. Raise ValueError if the
    picture cannot be read, shows no digit, or shows two side by side.
    """
    picture = read_picture(image)
    candidates = find_all_candidates(shrink(picture, WORKING_SIZE))
    if not candidates:
        raise ValueError("no digit found: give a picture of one digit that stands out from its background")
    best = max(candidates, key=lambda candidate: candidate.score)
    for candidate in candidates:
        if extends(candidate, best):
            best = candidate
            break
    reject_second_digit(best)
    ink, (top, bottom, left, right) = crop_to_digit(best)
    height, width = best.ink.shape
    return Digit(picture, ink, (top / height, bottom / height, left / width, right / width))


# ---- the network's input ----


def as_digit(image):
    """Return a `Digit` as it is, and the digit found in anything else."""
    if isinstance(image, Digit):
        return image
    return find_digit(image)


def center_offset(ink, dim):
    """Return the position of `ink` along `dim` in the image that puts its center of mass on pixel 14."""
    size = ink.shape[dim]
    mass = ink.sum(dim=1 - dim)
    center = (mass * torch.arange(size)).sum() / mass.sum()
    # A hair less than 14, so that a tie always falls to the same side
    offset = round(13.999 - center.item())
    return min(max(offset, 0), SIDE - size)


def prepare_digit(image):
    """Return a digit preprocessed like MNIST, as normalized float32 `(1, 1, 28, 28)`.

    `image` is a `Digit` or a picture that `find_digit` accepts. The digit is scaled to fit 20×20, and its
    center of mass is put on pixel (14, 14) of 28×28 (yann.lecun.com/exdb/mnist; the pixel was measured on
    the test images).
    """
    digit = as_digit(image)
    ink = resize(digit.ink, scaled_size(digit.ink, DIGIT_SIZE)).clamp(0, 1)
    ink = ink / ink.max()
    height, width = ink.shape
    top = center_offset(ink, dim=0)
    left = center_offset(ink, dim=1)
    prepared = torch.zeros(1, 1, SIDE, SIDE)
    prepared[0, 0, top : top + height, left : left + width] = ink
    return (prepared - MEAN) / STD


@torch.no_grad()
def predict(model, image):
    """Return the probabilities `(10,)` of the digits 0 to 9 for a `Digit` or a picture."""
    device = next(model.parameters()).device
    model.eval()
    output = model(prepare_digit(image).to(device))
    return output[0].exp().cpu()


def plot_prediction(image, probabilities):
    """Show a picture as it was read, the detected digit, the network's input and `probabilities` `(10,)`.

    `image` is a `Digit` or a picture that `find_digit` accepts.
    """
    digit = as_digit(image)
    prepared = prepare_digit(digit)
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
    for axis in axes[:3]:
        axis.set(xticks=[], yticks=[])

    shown = shrink(digit.picture, 1024)
    height, width = shown.shape
    top, bottom, left, right = digit.box
    axes[0].imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
    corner = (left * width - 0.5, top * height - 0.5)
    frame = plt.Rectangle(
        corner, (right - left) * width, (bottom - top) * height, fill=False, edgecolor=TEST_COLOR
    )
    axes[0].add_patch(frame)
    axes[0].set_title("the picture as read")
    axes[1].imshow(digit.ink.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes[1].set_title("detected digit")
    axes[2].imshow(prepared[0, 0].numpy(), cmap="gray_r")
    axes[2].set_title("network input")
    title = f"prediction: {probabilities.argmax()} ({probabilities.max():.1%})"
    axes[3].bar(range(10), probabilities.tolist(), color=TEST_COLOR)
    axes[3].set(title=title, xticks=range(10), ylim=(0, 1.05), xlabel="digit", ylabel="probability")
    alt = f"A picture of a digit, the detected digit, the network's input, and the {title}"
    show_figure(figure, "prediction", alt)

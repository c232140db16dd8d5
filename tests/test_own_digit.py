"""Your own digit: from pictures of several kinds to the network's input, and the probabilities.

The pictures are those of the benchmark, drawn from stand-in digits.
"""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import own_digits
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

import own_digit
from model import create_model
from utils import MEAN, STD

CELL = ImageOps.expand(Image.new("L", (26, 41)), border=2, fill=255)  # of a grid


def draw_bar(width=200, height=240, box=(80, 20, 110, 220), mode="L", ink=255, paper=0):
    """Return a picture of one upright bar."""
    image = Image.new(mode, (width, height), paper)
    image.paste(ink, box)
    return image


def pixels(image):
    """Return the network input of a picture as 28×28 pixels from 0 to 1."""
    return (own_digit.find_digit(image).input * STD + MEAN)[0, 0]


def difference(image, clean):
    """Return the mean difference of the pixels of two inputs, of which one may be shifted by a pixel.

    Two different digits are 0.1 or more apart.
    """
    prepared = pixels(image)
    expected = pixels(clean)
    shifts = itertools.product((-1, 0, 1), repeat=2)
    return min((prepared.roll(shift, (0, 1)) - expected).abs().mean() for shift in shifts)


# ---- the network's input ----


def test_a_bar_is_scaled_to_20_and_centered():
    """200×30 pixels become 20×3 with their middle at pixel (14, 14)."""
    expected = torch.zeros(28, 28)
    expected[4:24, 13:16] = 1  # rows 4 to 23 have their middle at 13.5, a tie
    torch.testing.assert_close(pixels(draw_bar()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("turn", [torch.clone, torch.t])
def test_pale_strokes_are_brightened_to_a_mean_of_0_7_and_the_center_of_mass_is_on_pixel_14(turn):
    ink = torch.tensor([0.2, 0.5, 0.2, 0.1, 0.05]).repeat_interleave(4).expand(20, 20)
    # As shares of 0.5, the mean above 0.15 is 0.5, so the factor is 1.4, and what exceeds 1 is clipped.
    expected = torch.zeros(28, 28)
    columns = torch.tensor([0.56, 1.0, 0.56, 0.28, 0.14]).repeat_interleave(4)
    expected[4:24, 7:27] = columns  # whose center of mass is 7.04
    image = own_digit.prepare_digit(turn(ink))[0, 0] * STD + MEAN
    torch.testing.assert_close(turn(image), expected, atol=1e-5, rtol=0)


# ---- reading ----


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(draw_bar(ink=0, paper=255), id="inverted"),
        pytest.param(draw_bar(mode="RGB", ink=(200, 30, 30), paper=(250, 240, 200)), id="color"),
        pytest.param(draw_bar(mode="RGBA", ink=(0, 0, 0, 255), paper=(0, 0, 0, 0)), id="black on nothing"),
        pytest.param(draw_bar(mode="RGBA", ink=(255,) * 4, paper=(255, 255, 255, 0)), id="white on nothing"),
        pytest.param(draw_bar(mode="I;16", ink=60000, paper=30000), id="16 bit"),
        pytest.param(draw_bar(mode="F", ink=1.0, paper=0.0), id="float"),
        pytest.param(draw_bar(width=600, height=900, box=(330, 500, 360, 700)), id="off center"),
        pytest.param(draw_bar(width=40, height=40, box=(1, 1, 4, 21)), id="small"),
        pytest.param(ImageOps.expand(ImageOps.expand(draw_bar(ink=60), 4, 255), 20), id="in a darker frame"),
    ],
)
def test_color_mode_polarity_place_and_frame_make_no_difference(picture):
    assert difference(picture, draw_bar()) < 0.015


def test_the_exif_rotation_is_applied_and_the_path_may_start_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    draw_bar().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "bar.png", exif=exif)
    assert difference("~/bar.png", draw_bar()) < 0.015


# ---- finding ----


@pytest.mark.parametrize(("ink", "paper"), [(255, 0), (0, 255)])
def test_a_ring_may_fill_more_than_half_of_the_picture_and_is_no_frame_of_a_small_dot(ink, paper):
    picture = Image.new("L", (120, 160), paper)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((6, 6, 113, 153), outline=ink, width=40)
    draw.ellipse((55, 60, 65, 100), fill=ink)
    assert picture.histogram()[ink] > 0.55 * 120 * 160
    assert own_digit.find_digit(picture).box == pytest.approx((6 / 160, 154 / 160, 6 / 120, 114 / 120))


@pytest.mark.parametrize("title", own_digits.KINDS)
def test_digits_are_read_as_in_their_images_and_other_pictures_are_rejected(small, title):
    correct = 0
    for picture, image, label in own_digits.draw_pictures(title, small(200), 8):
        try:
            distance = difference(picture, Image.fromarray(image.numpy()))
            is_correct = label is not None and distance < 0.08
        except ValueError:
            is_correct = label is None
        if is_correct:
            correct += 1
    assert correct >= 6


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(Image.new("L", (1, 1), 128), id="one pixel"),
        pytest.param(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), id="transparent"),
        pytest.param(Image.linear_gradient("L"), id="gradient"),
        pytest.param(draw_bar(box=(20, 110, 180, 118)), id="line"),
        pytest.param(Image.fromarray(np.pad(np.tile(CELL, (4, 4)), 40)), id="grid"),
        pytest.param(draw_bar(box=(150, 0, 200, 240), ink=160, paper=225), id="shadow at the border"),
    ],
)
def test_a_picture_without_a_digit_is_rejected(picture):
    with pytest.raises(ValueError, match="^no digit found: give .*"):
        own_digit.find_digit(picture)


def test_parts_within_reach_of_those_joined_belong_to_the_digit_and_nothing_else():
    picture = draw_bar(240, 480)
    picture.paste(255, (90, 250, 110, 270))  # 30 pixels below the bar, which reaches 40
    picture.paste(255, (90, 315, 110, 335))  # 45 pixels below the first part; both reach 50
    picture.paste(255, (90, 415, 110, 435))  # 80 pixels below the second part; the three reach 63
    picture.paste(255, (190, 100, 210, 120))  # 80 pixels to the right
    picture.paste(255, (120, 100, 124, 104))  # a speck
    picture.paste(60, (140, 40, 160, 200))  # as tall as a second digit, but faint
    box = (20 / 480, 335 / 480, 80 / 240, 110 / 240)
    assert own_digit.find_digit(picture).box == pytest.approx(box, abs=1 / 128)  # two pixels of 256


def test_two_digits_side_by_side_are_rejected():
    picture = draw_bar()
    picture.paste(255, (140, 30, 170, 210))
    with pytest.raises(ValueError, match="^more than one digit found: give .*"):
        own_digit.find_digit(picture)


def test_components_are_numbered_by_their_last_pixels():
    mask = torch.rand(40, 50) < 0.4
    last = torch.arange(1.0, 2001.0).view(40, 50) * mask
    for _ in range(2000):  # one step of one pixel after the other
        last = F.max_pool2d(last[None], 3, stride=1, padding=1)[0] * mask
    assert torch.equal(own_digit.label_components(mask), last.unique(return_inverse=True)[1])


# ---- prediction ----


def test_predict_returns_the_softmax_of_the_output(small):
    """For a picture, for its digit, and for an MNIST image, which is taken as it is."""
    digit = own_digit.find_digit(draw_bar())
    image = small(1).images[0]
    data = torch.cat([digit.input, (image[None, None] / 255 - MEAN) / STD])
    model = create_model("Model3")
    expected = model.eval()(data).softmax(dim=1)
    model.train()
    for same in (draw_bar(), digit):
        torch.testing.assert_close(own_digit.predict(model, same), expected[0])
    for same in (image, image[None], image / 255, image.numpy(), (image / 255).double().numpy()):
        torch.testing.assert_close(own_digit.predict(model, same), expected[1])


@pytest.mark.parametrize(
    "image", [torch.zeros(480, 640, 3), torch.full((28, 28), -0.4), torch.ones(28, 28) * 255]
)
def test_other_tensors_are_rejected(image):
    with pytest.raises(ValueError, match="give .*pixels"):
        own_digit.predict(create_model("Model3"), image)


def test_the_figure_shows_the_picture_the_digit_the_input_and_the_probabilities(figures):
    """Whatever the user's style of images is."""
    probabilities = torch.arange(1, 11) / 55
    with plt.rc_context({"image.origin": "lower", "image.aspect": "auto", "image.interpolation": "bicubic"}):
        own_digit.plot_prediction(own_digit.find_digit(draw_bar()), probabilities)
    *images, bars = figures[0].figure.axes
    assert [axis.images[0].get_array().shape for axis in images] == [(240, 200), (200, 30), (28, 28)]
    assert [axis.get_aspect() for axis in images] == pytest.approx([240 / 200, 1, 1])
    for axis in images:
        assert axis.images[0].origin == "upper"
        assert axis.images[0].get_interpolation() == "nearest"
    assert [patch.get_height() for patch in bars.patches] == pytest.approx(probabilities.tolist())
    assert "prediction: 9" in figures[0].alt
    frame = images[0].patches[0].get_bbox()
    assert frame.bounds == pytest.approx((80 / 200, 20 / 240, 30 / 200, 200 / 240))
    assert images[0].images[0].get_extent() == [0, 1, 1, 0]

"""Your own digit: from pictures of several kinds to the network's input, and the probabilities.

The pictures are those of the benchmark, drawn from stand-in digits.
"""

import matplotlib.pyplot as plt
import own_digits
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import own_digit
from model import create_model
from utils import MEAN, STD


def draw_bar(width=200, height=240, box=(80, 20, 110, 220), mode="L", ink=255, paper=0):
    """Return a picture of one upright bar."""
    image = Image.new(mode, (width, height), paper)
    image.paste(ink, box)
    return image


def draw_shadow():
    """Return a picture of a blank page with a shadow that reaches its border."""
    random = torch.Generator().manual_seed(4)
    return own_digits.to_picture(own_digits.add_shadow(own_digits.blank_page(), random), random)


def draw_grid():
    """Return a picture of a grid of 4×4 cells."""
    image = Image.new("L", (200, 240))
    draw = ImageDraw.Draw(image)
    for column in range(4):
        for row in range(4):
            left = 40 + 30 * column
            top = 30 + 45 * row
            draw.rectangle((left, top, left + 30, top + 45), outline=255, width=4)
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
    differences = []
    for rows in (-1, 0, 1):
        for columns in (-1, 0, 1):
            shifted = prepared.roll((rows, columns), (0, 1))
            differences.append((shifted - expected).abs().mean().item())
    return min(differences)


# ---- the network's input ----


def test_a_bar_is_scaled_to_20_and_centered():
    """200×30 pixels become 20×3 with their middle at pixel (14, 14)."""
    expected = torch.zeros(28, 28)
    expected[4:24, 13:16] = 1  # rows 4 to 23 have their middle at 13.5, a tie
    torch.testing.assert_close(pixels(draw_bar()), expected, atol=1e-4, rtol=0)


def test_the_center_of_mass_is_on_pixel_14():
    picture = draw_bar()
    picture.paste(255, (110, 20, 180, 60))  # a flag at the top: the mass lies up and to the right
    prepared = pixels(picture).clamp(min=0)
    for dim in (0, 1):
        center = (prepared.sum(1 - dim) * torch.arange(28)).sum() / prepared.sum()
        assert abs(center - 14) <= 0.51


def test_pale_strokes_are_brightened_to_a_mean_of_0_7():
    ink = torch.tensor([[1.0], [0.4], [0.4], [0.2], [0.1]]).repeat(4, 20)
    # The mean above 0.15 is 0.5, so the factor is 1.4, and what exceeds 1 is clipped.
    expected = torch.tensor([[1.0], [0.56], [0.56], [0.28], [0.14]]).repeat(4, 20)
    image = own_digit.prepare_digit(ink)[0, 0] * STD + MEAN
    torch.testing.assert_close(image[image.sum(1) > 1][:, 4:24], expected, atol=1e-5, rtol=0)


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
    ],
)
def test_color_mode_polarity_and_place_make_no_difference(picture):
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
def test_strokes_may_fill_more_than_half_of_the_picture(ink, paper):
    picture = Image.new("L", (120, 160), paper)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((6, 6, 113, 153), outline=ink, width=40)
    assert picture.histogram()[ink] > 0.55 * 120 * 160
    assert own_digit.find_digit(picture).box == pytest.approx((6 / 160, 154 / 160, 6 / 120, 114 / 120))


def test_a_part_may_be_joined_by_the_part_between():
    picture = draw_bar(height=400)
    picture.paste(255, (90, 250, 110, 270))  # 30 pixels below the bar, which reaches 40
    picture.paste(255, (90, 315, 110, 335))  # 45 pixels below the first part; both reach 50
    box = (20 / 400, 335 / 400, 80 / 200, 110 / 200)
    assert own_digit.find_digit(picture).box == pytest.approx(box, abs=1 / 128)


@pytest.mark.parametrize("title", own_digits.KINDS)
def test_digits_are_read_as_in_their_images_and_other_pictures_are_rejected(small, title):
    correct = 0
    for picture, image, _ in own_digits.draw_pictures(title, small(200), 8):
        try:
            distance = difference(picture, Image.fromarray(image.numpy()))
        except ValueError:
            distance = None
        if title in own_digits.TO_BE_REJECTED:
            correct += distance is None
        else:
            correct += distance is not None and distance < 0.08
    assert correct >= 6


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(Image.new("L", (1, 1), 128), id="one pixel"),
        pytest.param(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), id="transparent"),
        pytest.param(Image.linear_gradient("L"), id="gradient"),
        pytest.param(draw_bar(box=(20, 110, 180, 118)), id="line"),
        pytest.param(draw_grid(), id="grid"),
        pytest.param(draw_shadow(), id="shadow at the border"),
    ],
)
def test_a_picture_without_a_digit_is_rejected(picture):
    with pytest.raises(ValueError, match="^no digit found: give .*"):
        own_digit.find_digit(picture)


@pytest.mark.parametrize(
    ("width", "height", "mark", "ink"),
    [
        pytest.param(200, 240, (170, 100, 190, 120), 255, id="far to the right"),
        pytest.param(200, 400, (90, 270, 110, 290), 255, id="far below"),
        pytest.param(200, 240, (120, 100, 140, 120), 60, id="faint"),
    ],
)
def test_what_does_not_belong_to_the_digit_is_left_out(width, height, mark, ink):
    picture = draw_bar(width, height)
    picture.paste(ink, mark)
    box = (20 / height, 220 / height, 80 / width, 110 / width)
    assert own_digit.find_digit(picture).box == pytest.approx(box, abs=1 / 128)  # two pixels of 256


def test_a_circle_with_a_small_dot_in_it_is_no_printed_frame():
    picture = Image.new("L", (200, 240))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((40, 20, 160, 220), outline=255, width=12)
    draw.ellipse((80, 100, 120, 140), fill=255)
    assert own_digit.find_digit(picture).box == pytest.approx((20 / 240, 221 / 240, 40 / 200, 161 / 200))


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
    expected = last.unique(return_inverse=True)[1]
    assert torch.equal(own_digit.label_components(mask), expected)


# ---- prediction ----


def test_predict_returns_a_softmax_of_the_output_for_a_picture_and_its_digit():
    model = create_model("Model3")
    digit = own_digit.find_digit(draw_bar())
    expected = model.eval()(digit.input).softmax(dim=1)[0]
    model.train()
    torch.testing.assert_close(own_digit.predict(model, draw_bar()), expected)
    torch.testing.assert_close(own_digit.predict(model, digit), expected)


def test_mnist_images_are_taken_as_they_are(small):
    image = small(1).images[0]
    model = create_model("Model3").eval()
    expected = model((image[None, None] / 255 - MEAN) / STD).exp()[0]
    for same in (image, image[None], image / 255, image.numpy(), (image / 255).double().numpy()):
        torch.testing.assert_close(own_digit.predict(model, same), expected)


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
    shapes = [axis.images[0].get_array().shape for axis in images]
    assert shapes == [(240, 200), (200, 30), (28, 28)]
    assert [axis.get_aspect() for axis in images] == pytest.approx([240 / 200, 1, 1])
    for axis in images:
        assert axis.images[0].origin == "upper"
        assert axis.images[0].get_interpolation() == "nearest"
    heights = [patch.get_height() for patch in bars.patches]
    assert heights == pytest.approx(probabilities.tolist())
    assert "prediction: 9" in figures[0].alt
    frame = images[0].patches[0].get_bbox()
    assert frame.bounds == pytest.approx((80 / 200, 20 / 240, 30 / 200, 200 / 240))
    assert images[0].images[0].get_extent() == [0, 1, 1, 0]

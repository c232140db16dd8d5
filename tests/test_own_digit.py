"""Your own digit: from pictures of many kinds to the network's input, and the probabilities."""

import io
import math
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor

import utils
from model import create_model

PAPER = 225
INK = 45


def draw_bar(width=200, height=240, box=(80, 20, 110, 220), mode="L", ink=255, paper=0):
    """Return a picture of one upright bar."""
    image = Image.new(mode, (width, height), paper)
    image.paste(ink, box)
    return image


def draw_page(digit="7", size=(320, 320), text_size=200, middle=None):
    """Return a white-on-black picture of a digit in Pillow's font; `on_paper` gives it its brightness."""
    page = Image.new("L", size)
    if middle is None:
        middle = (size[0] / 2, size[1] / 2)
    font = ImageFont.load_default(text_size)
    ImageDraw.Draw(page).text(middle, digit, fill=255, font=font, anchor="mm")
    return page


def on_paper(page, paper=PAPER, ink=INK):
    """Return the brightness `(H, W)` from 0 to 255 of a white-on-black picture."""
    coverage = pil_to_tensor(page)[0] / 255
    return paper + (ink - paper) * coverage


def to_picture(brightness):
    return Image.fromarray(brightness.round().clamp(0, 255).byte().numpy())


def add_noise(brightness, sigma):
    return brightness + sigma * torch.randn(brightness.shape)


def slope(brightness, angle):
    """Return a plane `(H, W)` that rises from 0 to 1 in the direction `angle` in degrees."""
    height, width = brightness.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    plane = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
    return (plane - plane.min()) / (plane.max() - plane.min())


def pixels(image):
    """Return the network input of a picture as 28×28 pixels from 0 to 1."""
    return (utils.prepare_digit(image) * utils.STD + utils.MEAN)[0, 0]


def assert_same_digit(image, clean, tolerance=0.05):
    """Assert that two pictures give nearly the same input, also if one is shifted by a pixel.

    `tolerance` is the mean difference of the pixels, each from 0 to 1. Two different digits are
    0.1 or more apart.
    """
    prepared = pixels(image)
    expected = pixels(clean)
    differences = []
    for rows in (-1, 0, 1):
        for columns in (-1, 0, 1):
            shifted = prepared.roll((rows, columns), (0, 1))
            differences.append((shifted - expected).abs().mean().item())
    assert min(differences) < tolerance


def clean_seven():
    return to_picture(on_paper(draw_page()))


# ---- clean pictures ----


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


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(draw_bar(ink=0, paper=255), id="inverted"),
        pytest.param(draw_bar(mode="RGB", ink=(200, 30, 30), paper=(250, 240, 200)), id="color"),
        pytest.param(draw_bar(mode="RGBA", ink=(0, 0, 0, 255), paper=(0, 0, 0, 0)), id="black on nothing"),
        pytest.param(draw_bar(mode="RGBA", ink=(255,) * 4, paper=(255, 255, 255, 0)), id="white on nothing"),
        pytest.param(draw_bar(mode="LA", ink=(0, 255), paper=(255, 0)), id="LA"),
        pytest.param(draw_bar(mode="1", ink=1), id="1 bit"),
        pytest.param(draw_bar(mode="CMYK", ink=(0, 0, 0, 255), paper=(0, 0, 0, 0)), id="CMYK"),
        pytest.param(draw_bar(mode="I", ink=60000, paper=100), id="32 bit"),
        pytest.param(draw_bar(mode="I;16", ink=60000, paper=100), id="16 bit"),
        pytest.param(draw_bar(mode="F", ink=1.0, paper=0.0), id="float"),
        pytest.param(draw_bar().convert("P"), id="palette"),
        pytest.param(draw_bar(width=600, height=900, box=(330, 500, 360, 700)), id="off center"),
        pytest.param(draw_bar(width=40, height=40, box=(1, 1, 4, 21)), id="small"),
    ],
)
def test_color_mode_polarity_and_place_make_no_difference(picture):
    assert_same_digit(picture, draw_bar(), tolerance=0.015)


def test_an_enlarged_mnist_image_gives_nearly_the_same_input(small):
    differences = []
    for image in small(20).images.numpy():
        glyph = Image.fromarray(image)
        page = Image.new("L", (500, 400))
        page.paste(glyph.resize((224, 224), Image.BICUBIC), (200, 30))
        differences.append((pixels(page) - pixels(glyph)).abs().mean().item())
    assert sorted(differences)[10] < 0.05  # two different digits are 0.1 or more apart


def test_the_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    clean_seven().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "seven.jpg", exif=exif, quality=95)
    assert_same_digit(tmp_path / "seven.jpg", clean_seven())


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_file_formats_make_no_difference(tmp_path, file_format):
    path = tmp_path / f"seven.{file_format.lower()}"
    clean_seven().save(path)
    assert_same_digit(path, clean_seven(), tolerance=0.01)


# ---- what photographs add ----


@pytest.mark.parametrize("darkest", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("angle", [0, 60, 90, 180, 225, 300])
def test_uneven_light_makes_no_difference(angle, darkest):
    page = on_paper(draw_page())
    lit = page * (1 - (1 - darkest) * slope(page, angle))
    assert_same_digit(to_picture(lit), clean_seven())


def test_a_vignette_makes_no_difference():
    page = on_paper(draw_page())
    squared = (slope(page, 0) - 0.5).square() + (slope(page, 90) - 0.5).square()
    assert_same_digit(to_picture(page * (1 - 0.7 * squared)), clean_seven())


@pytest.mark.parametrize("angle", [0, 45, 90, 200])
@pytest.mark.parametrize("edge", [0.3, 0.5, 0.7])
def test_the_edge_of_a_shadow_makes_no_difference(angle, edge):
    page = on_paper(draw_page())
    shadow = torch.where(slope(page, angle) < edge, 0.75, 1.0)
    assert_same_digit(to_picture(page * shadow), clean_seven(), tolerance=0.06)


@pytest.mark.parametrize("sigma", [8, 12, 20])
def test_noise_makes_no_difference(sigma):
    assert_same_digit(to_picture(add_noise(on_paper(draw_page()), sigma)), clean_seven())


@pytest.mark.parametrize(
    "directions",
    [pytest.param([0], id="ruled"), pytest.param([90], id="columns"), pytest.param([0, 90], id="squared")],
)
@pytest.mark.parametrize("tilt", [0, 4])
def test_printed_lines_make_no_difference(directions, tilt):
    page = on_paper(draw_page())
    for direction in directions:
        place = slope(page, 90 + direction + tilt) * page.shape[0]
        is_line = place % 20 < 2
        page = torch.where(is_line, page.clamp(max=185), page)
    assert_same_digit(to_picture(page), clean_seven())


@pytest.mark.parametrize("brightness", [30, 95, 160])
@pytest.mark.parametrize("angles", [[0], [90], [183], [265], [0, 90, 180, 270]])
def test_the_table_beside_the_page_makes_no_difference(angles, brightness):
    page = on_paper(draw_page(text_size=160))
    for angle in angles:
        page = torch.where(slope(page, angle) > 0.92, float(brightness), page)
    assert_same_digit(to_picture(add_noise(page, 3)), clean_seven())


def test_one_dark_column_of_pixels_at_the_border_makes_no_difference():
    page = on_paper(draw_page("7", size=(64, 64), text_size=30))
    edge = page.clone()
    edge[:, 0] = 60
    assert_same_digit(to_picture(edge), to_picture(page))


def test_a_speck_makes_no_difference():
    page = on_paper(draw_page("7", size=(64, 64), text_size=30))
    speck = page.clone()
    speck[1, 1] = 0
    assert_same_digit(to_picture(speck), to_picture(page), tolerance=0.01)


def test_pencil_is_read():
    page = on_paper(draw_page(), ink=175)
    assert_same_digit(to_picture(add_noise(page, 4)), clean_seven())


def test_chalk_on_an_unevenly_lit_board_is_read():
    page = on_paper(draw_page(), paper=60, ink=190)
    page = page * (1 - 0.3 * slope(page, 30))
    assert_same_digit(to_picture(add_noise(page, 8)), clean_seven())


def test_a_digit_of_a_twentieth_of_the_picture_is_read():
    page = draw_page(size=(1200, 900), text_size=64, middle=(900, 300))
    assert_same_digit(to_picture(add_noise(on_paper(page), 4)), clean_seven(), tolerance=0.07)


# A tightly cropped 2 of this font is rejected: its base lies along the whole border.
@pytest.mark.parametrize("digit", list("013456789"))
def test_a_tight_crop_is_read(digit):
    page = draw_page(digit)
    crop = page.crop(page.getbbox())
    assert_same_digit(to_picture(add_noise(on_paper(crop), 3)), to_picture(on_paper(page)), tolerance=0.06)


def test_a_five_with_a_separate_bar_keeps_its_bar():
    page = draw_page("5")
    left, top, right, bottom = page.getbbox()
    gap = top + (bottom - top) // 5
    page.paste(0, (left, gap, right, gap + 6))
    prepared = pixels(to_picture(on_paper(page)))
    assert_same_digit(to_picture(on_paper(page)), to_picture(on_paper(draw_page("5"))), tolerance=0.06)
    assert prepared[4:7].sum() > 5  # the bar


# ---- rejected pictures ----


def blank(angle=0, darkest=1.0, sigma=0):
    page = torch.full((320, 320), float(PAPER))
    return to_picture(add_noise(page * (1 - (1 - darkest) * slope(page, angle)), sigma))


def shadow_only():
    page = torch.full((320, 320), float(PAPER))
    return to_picture(add_noise(torch.where(slope(page, 20) < 0.4, page * 0.7, page), 3))


def table_only():
    page = torch.full((320, 320), float(PAPER))
    return to_picture(add_noise(torch.where(slope(page, 3) > 0.9, 95.0, page), 3))


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(Image.new("L", (50, 50), 128), id="one color"),
        pytest.param(Image.new("L", (1, 1), 128), id="one pixel"),
        pytest.param(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), id="transparent"),
        pytest.param(Image.linear_gradient("L"), id="linear gradient"),
        pytest.param(Image.radial_gradient("L"), id="radial gradient"),
        pytest.param(blank(darkest=0.9), id="light gradient"),
        pytest.param(blank(angle=50, darkest=0.5, sigma=5), id="strong gradient with noise"),
        pytest.param(blank(sigma=20), id="noise"),
        pytest.param(shadow_only(), id="shadow"),
        pytest.param(table_only(), id="table"),
    ],
)
def test_a_page_without_a_digit_is_rejected(picture):
    with pytest.raises(ValueError, match="^no digit found: give .*$"):
        utils.prepare_digit(picture)


@pytest.mark.parametrize("digits", ["72", "11", "50", "48"])
def test_two_digits_side_by_side_are_rejected(digits):
    page = Image.new("L", (400, 300))
    for digit, x in zip(digits, (120, 280), strict=True):
        page = ImageChops.lighter(page, draw_page(digit, page.size, middle=(x, 150)))
    with pytest.raises(ValueError, match="^more than one digit found.*$"):
        utils.prepare_digit(to_picture(on_paper(page)))


# ---- what is accepted ----


def test_paths_files_and_images_give_the_same_input(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / "bar.png"
    draw_bar().save(path)
    expected = utils.prepare_digit(draw_bar())
    for image in (path, str(path), "~/bar.png", Path("~/bar.png"), io.BytesIO(path.read_bytes())):
        assert torch.equal(utils.prepare_digit(image), expected)
    with path.open("rb") as file:
        assert torch.equal(utils.prepare_digit(file), expected)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(b"\x89PNG" + bytes(1000), id="bytes"),
        pytest.param(torch.zeros(28, 28), id="tensor"),
        pytest.param(torch.zeros(28, 28).numpy(), id="array"),
        pytest.param(None, id="None"),
        pytest.param(7, id="number"),
    ],
)
def test_other_types_are_rejected_without_printing_the_data(image):
    with pytest.raises(ValueError, match="^unsupported type for a picture, .*: pass a path, .*$") as caught:
        utils.prepare_digit(image)
    assert len(str(caught.value)) < 150


def corrupted_png(cut=None, position=None):
    """Return a PNG file's bytes, truncated or with one byte changed."""
    file = io.BytesIO()
    clean_seven().save(file, "PNG")
    data = bytearray(file.getvalue())
    if position is not None:
        data[position] ^= 255
    return bytes(data[:cut])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"3", id="text"),
        pytest.param(corrupted_png(cut=20), id="cut in the header"),
        pytest.param(corrupted_png(cut=60), id="cut in the data"),
        pytest.param(corrupted_png(position=29), id="wrong checksum"),  # SyntaxError in Pillow
    ],
)
def test_a_corrupted_file_is_rejected_in_one_line(tmp_path, data):
    path = tmp_path / "digit.png"
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"^.*digit\.png cannot be read as an image .*: use a different file$"
    ):
        utils.prepare_digit(path)
    with pytest.raises(ValueError, match="^BytesIO cannot be read as an image .*: use a different file$"):
        utils.prepare_digit(io.BytesIO(data))


def test_a_missing_file_and_a_folder_are_rejected_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^.*none\.png cannot be read as an image .*No such.*$"):
        utils.prepare_digit(tmp_path / "none.png")
    with pytest.raises(ValueError, match="^.* cannot be read as an image .*: use a different file$"):
        utils.prepare_digit(tmp_path)


@pytest.mark.parametrize("limit", [40_000, 20_000], ids=["Pillow warns", "Pillow raises"])
def test_a_decompression_bomb_is_rejected_in_one_line(tmp_path, monkeypatch, limit):
    draw_bar().save(tmp_path / "bar.png")  # 48,000 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"^.*bar\.png cannot be read as an image .*bomb.*$"):
        utils.prepare_digit(tmp_path / "bar.png")


def test_reading_leaves_the_warning_filters_as_they_were(tmp_path):
    draw_bar().save(tmp_path / "bar.png")
    before = list(warnings.filters)
    utils.prepare_digit(tmp_path / "bar.png")
    assert warnings.filters == before


# ---- the parts ----


def test_components_are_labeled_like_a_flood_fill():
    torch.manual_seed(0)
    mask = torch.rand(40, 50) < 0.4
    labels = utils.label_components(mask)
    expected = torch.zeros(40, 50, dtype=torch.long)
    count = 0
    for start in mask.nonzero().tolist():
        if expected[tuple(start)]:
            continue
        count += 1
        pending = [start]
        while pending:
            row, column = pending.pop()
            inside = 0 <= row < 40 and 0 <= column < 50
            if not inside or not mask[row, column] or expected[row, column]:
                continue
            expected[row, column] = count
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    pending.append((row + down, column + right))
    assert labels.max() == count
    pairs = torch.stack([labels.flatten(), expected.flatten()]).unique(dim=1)
    assert pairs.shape[1] == count + 1  # one partner for each number, 0 for 0
    assert (labels == 0).equal(expected == 0)


def test_a_spiral_is_one_component():
    mask = torch.zeros(101, 101, dtype=torch.bool)
    for ring in range(0, 50, 2):  # each ring is open to the next one at its upper left
        last = 100 - ring
        mask[ring, max(ring - 2, 0) : last + 1] = True
        mask[ring : last + 1, last] = True
        mask[last, ring : last + 1] = True
        mask[ring + 2 : last + 1, ring] = True
    assert utils.label_components(mask).max() == 1


def test_the_noise_is_estimated_from_a_page_with_a_digit():
    page = on_paper(draw_page()) / 255
    assert utils.estimate_noise(page) < 0.002
    assert utils.estimate_noise(add_noise(page, 0.05)) == pytest.approx(0.05, rel=0.15)


# ---- prediction ----


def test_predict_returns_the_models_probabilities():
    model = create_model("Model3")
    expected = model.eval()(utils.prepare_digit(draw_bar())).exp()[0]
    model.train()
    torch.testing.assert_close(utils.predict(model, draw_bar()), expected)


def test_the_figure_shows_the_picture_the_digit_the_input_and_the_probabilities(figures):
    probabilities = torch.arange(1, 11) / 55
    utils.plot_prediction(draw_bar(), probabilities)
    figure, metadata = figures[0]
    picture, digit, prepared, bars = figure.axes
    assert picture.images[0].get_array().shape == (240, 200)
    assert digit.images[0].get_array().shape[0] > 150
    assert prepared.images[0].get_array().shape == (28, 28)
    heights = [patch.get_height() for patch in bars.patches]
    assert heights == pytest.approx(probabilities.tolist())
    assert bars.get_title() == "prediction: 9 (18.2%)"
    assert "prediction: 9" in metadata["image/png"]["alt"]


def test_the_figure_frames_what_was_taken_for_the_digit(figures):
    utils.plot_prediction(draw_bar(), torch.full((10,), 0.1))
    frame = figures[0][0].axes[0].patches[0]
    left, top = frame.get_xy()
    assert (left, top) == pytest.approx((80, 20), abs=2)
    assert (frame.get_width(), frame.get_height()) == pytest.approx((30, 200), abs=3)


def test_the_figure_shows_the_picture_as_it_was_read(figures, tmp_path):
    """16 bits are stretched, and the EXIF rotation is applied."""
    draw_bar(mode="I;16", ink=60000, paper=100).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = draw_page("1", size=(240, 200), text_size=120)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.jpg", exif=exif)
    for name in ("deep.png", "rotated.jpg"):
        utils.plot_prediction(tmp_path / name, torch.full((10,), 0.1))
    deep = figures[0][0].axes[0].images[0].get_array()
    rotated = figures[1][0].axes[0].images[0].get_array()
    assert deep.min() == 0
    assert deep.max() == 1
    assert rotated.shape == (200, 240)

"""Your own digit: from pictures of many kinds to the network's input, and the probabilities.

The pictures show stand-in digits; the digit found in a damaged picture is compared with that of a clean one.
"""

import io
import math

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import own_digit
from model import create_model

PAPER = 225
PEN = 45
PENCIL = 160
PRINT = 30


def draw_bar(width=200, height=240, box=(80, 20, 110, 220), mode="L", ink=255, paper=0):
    """Return a picture of one upright bar."""
    image = Image.new(mode, (width, height), paper)
    image.paste(ink, box)
    return image


@pytest.fixture
def glyphs(small):
    """Return a 28×28 stand-in image, white on black, for each digit."""
    dataset = small(200)
    images = []
    for digit in range(10):
        first = (dataset.labels == digit).nonzero()[0].item()
        images.append(Image.fromarray(dataset.images[first].numpy()))
    return images


def write(glyph, size=(320, 320), side=240, middle=(160, 160), ink=PEN):
    """Return the brightness `(H, W)` from 0 to 255 of a page with a digit; `middle` is (x, y)."""
    coverage = Image.new("L", size)
    large = glyph.resize((side, side), Image.BICUBIC)
    coverage.paste(large, (middle[0] - side // 2, middle[1] - side // 2))
    return PAPER + (ink - PAPER) * (pil_to_tensor(coverage)[0] / 255)


def to_picture(brightness):
    return Image.fromarray(brightness.round().clamp(0, 255).byte().numpy())


def slope(brightness, angle):
    """Return a plane `(H, W)` that rises from 0 to 1 in the direction `angle` in degrees."""
    height, width = brightness.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    plane = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
    return (plane - plane.min()) / (plane.max() - plane.min())


def ink_box(page):
    """Return the top, bottom, left and right of the pixels that are at least half ink."""
    is_ink = page < (PAPER + page.min()) / 2
    rows = is_ink.any(dim=1).nonzero()
    columns = is_ink.any(dim=0).nonzero()
    return rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1


def crop(page):
    top, bottom, left, right = ink_box(page)
    return page[top:bottom, left:right]


def pixels(image):
    """Return the network input of a picture as 28×28 pixels from 0 to 1."""
    return (own_digit.prepare_digit(image) * own_digit.STD + own_digit.MEAN)[0, 0]


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


def assert_read(glyphs, change, tolerance=0.06, **options):
    """Assert that at least four of five digits are read as on a clean page, after `change(page)`."""
    correct = 0
    for glyph in glyphs[::2]:
        clean = to_picture(write(glyph))
        try:
            found = difference(to_picture(change(write(glyph, **options))), clean)
        except ValueError:
            continue
        correct += found < tolerance
    assert correct >= 4


# ---- scaling and centering ----


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
        pytest.param(draw_bar(mode="LA", ink=(0, 255), paper=(255, 0)).convert("La"), id="La"),
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
    assert difference(picture, draw_bar()) < 0.015


def test_a_big_endian_tiff_of_16_bits_is_read(tmp_path):
    data = bytes([0, 100]) * 48_000
    picture = Image.frombytes("I;16B", (200, 240), data)
    bar = Image.frombytes("I;16B", (30, 200), bytes([200, 100]) * 6_000)
    picture.paste(bar, (80, 20))
    picture.save(tmp_path / "bar.tiff")
    assert Image.open(tmp_path / "bar.tiff").mode == "I;16B"
    assert difference(tmp_path / "bar.tiff", draw_bar()) < 0.015


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_pixel_that_is_not_finite_does_not_hide_the_digit(value):
    picture = draw_bar(mode="F", ink=1.0, paper=0.0)
    picture.putpixel((5, 5), value)
    assert difference(picture, draw_bar()) < 0.015


def test_the_exif_rotation_is_applied(tmp_path, glyphs):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    clean = to_picture(write(glyphs[7]))
    clean.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "seven.jpg", exif=exif, quality=95)
    assert difference(tmp_path / "seven.jpg", clean) < 0.03


def test_an_enlarged_image_gives_nearly_the_same_input(glyphs):
    for glyph in glyphs:
        assert difference(to_picture(write(glyph)), glyph) < 0.05


# ---- what photographs, forms and crops add ----


@pytest.mark.parametrize("angle", [60, 180])
def test_uneven_light(glyphs, angle):
    assert_read(glyphs, lambda page: page * (1 - 0.5 * slope(page, angle)))


def test_the_edge_of_a_shadow(glyphs):
    assert_read(glyphs, lambda page: page * torch.where(slope(page, 45) < 0.4, 0.75, 1.0))


def test_noise(glyphs):
    assert_read(glyphs, lambda page: page + 20 * torch.randn(page.shape))


def test_pencil(glyphs):
    assert_read(glyphs, lambda page: page + 4 * torch.randn(page.shape), ink=PENCIL)


@pytest.mark.parametrize("directions", [[90], [0, 90]], ids=["ruled", "squared"])
def test_printed_lines(glyphs, directions):
    def rule(page):
        for direction in directions:
            is_line = slope(page, direction + 2) * 320 % 20 < 2
            page = torch.where(is_line, page.clamp(max=185), page)
        return page

    assert_read(glyphs, rule)


@pytest.mark.parametrize("angles", [[265], [0, 90, 180, 270]])
def test_the_table_beside_the_page(glyphs, angles):
    def show_table(page):
        for angle in angles:
            page = torch.where(slope(page, angle) > 0.93, 95.0, page)
        return page

    assert_read(glyphs, show_table, side=200)


def print_box(page, crosses_page=False, crops=False):
    """Print a box at 30 pixels from the digit, with lines of 4 pixels."""
    top, bottom, left, right = ink_box(page)
    page = page.clone()
    box = (slice(top - 30, bottom + 30), slice(left - 30, right + 30))
    rows, columns = box
    if crosses_page:
        rows = slice(0, 320)
        columns = slice(0, 320)
    for row in (top - 30, bottom + 26):
        page[row : row + 4, columns] = PRINT
    for column in (left - 30, right + 26):
        page[rows, column : column + 4] = PRINT
    if crops:
        page = page[box]
    return page


@pytest.mark.parametrize("ink", [PEN, PENCIL], ids=["pen", "pencil"])
@pytest.mark.parametrize("options", [{}, {"crosses_page": True}, {"crops": True}], ids=str)
def test_a_printed_box(glyphs, options, ink):
    assert_read(glyphs, lambda page: print_box(page, **options), ink=ink, side=200)


def test_a_tight_crop(glyphs):
    assert_read(glyphs, crop)


@pytest.mark.parametrize("fleck", [255.0, 90.0], ids=["light", "dark"])
def test_a_tight_crop_with_flecks(glyphs, fleck):
    def add_flecks(page):
        page = crop(page)
        is_paper = page > 0.95 * PAPER
        for _ in range(25):
            y = torch.randint(page.shape[0], (1,)).item()
            x = torch.randint(page.shape[1], (1,)).item()
            spot = (slice(y, y + 6), slice(x, x + 4))
            page[spot] = torch.where(is_paper[spot], fleck, page[spot])
        return page

    assert_read(glyphs, add_flecks)


def test_a_faint_top_that_the_border_cuts(glyphs):
    def cut(page):
        top, bottom, _, _ = ink_box(page)
        middle = top + (bottom - top) // 3
        page[:middle] = PAPER + 0.5 * (page[:middle] - PAPER)
        return page[top + 2 :]

    assert_read(glyphs, cut, tolerance=0.08)


def test_a_stain_on_a_stroke(glyphs):
    def stain(page):
        y, x = (page < 100).nonzero()[100].tolist()
        rows = torch.arange(320)[:, None] - y
        columns = torch.arange(320)[None] - x
        return page * (1 - 0.25 * torch.exp(-(rows.square() + columns.square()) / 30**2))

    assert_read(glyphs, stain)


def test_a_five_keeps_its_lifted_top(glyphs):
    page = write(glyphs[5])
    top, bottom, _, _ = ink_box(page)
    cut = top + (bottom - top) // 5
    gap = (bottom - top) // 10
    lifted = page.clone()
    lifted[:cut] = PAPER
    lifted[: cut - gap] = page[gap:cut]
    digit = own_digit.find_digit(to_picture(lifted))
    assert digit.box[0] * 320 == pytest.approx(top - gap, abs=5)  # the edges are soft


def test_neighbors_that_the_border_cuts_are_left_out(glyphs):
    page = write(glyphs[3], side=240)
    for x in (-40, 360):
        page = torch.minimum(page, write(glyphs[8], middle=(x, 160)))
    assert difference(to_picture(page), to_picture(write(glyphs[3]))) < 0.03


# ---- rejected pictures ----


def blank(change):
    return to_picture(change(torch.full((320, 320), float(PAPER))))


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(Image.new("L", (50, 50), 128), id="one color"),
        pytest.param(Image.new("L", (1, 1), 128), id="one pixel"),
        pytest.param(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), id="transparent"),
        pytest.param(Image.linear_gradient("L"), id="linear gradient"),
        pytest.param(Image.radial_gradient("L"), id="radial gradient"),
        pytest.param(blank(lambda page: page * (1 - 0.5 * slope(page, 50))), id="light gradient"),
        pytest.param(blank(lambda page: page + 20 * torch.randn(page.shape)), id="noise"),
        pytest.param(blank(lambda page: page - 60 * (slope(page, 20) < 0.4)), id="shadow"),
        pytest.param(blank(lambda page: page - 130 * (slope(page, 3) > 0.9)), id="table"),
        pytest.param(blank(lambda page: page - 50 * (slope(page, 92) * 320 % 20 < 2)), id="ruled"),
    ],
)
def test_a_page_without_a_digit_is_rejected(picture):
    with pytest.raises(ValueError, match="^no digit found"):
        own_digit.prepare_digit(picture)


@pytest.mark.parametrize("digits", [(7, 2), (1, 1), (4, 8)])
def test_two_digits_side_by_side_are_rejected(glyphs, digits):
    page = torch.full((300, 400), float(PAPER))
    for digit, x in zip(digits, (110, 290), strict=True):
        page = torch.minimum(page, write(glyphs[digit], (400, 300), 200, (x, 150)))
    with pytest.raises(ValueError, match="^more than one digit"):
        own_digit.find_digit(to_picture(page))


# ---- what is accepted ----


def test_paths_files_images_and_a_found_digit_give_the_same_input(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / "bar.png"
    draw_bar().save(path)
    expected = own_digit.prepare_digit(draw_bar())
    found = own_digit.find_digit(path)
    for image in (path, str(path), "~/bar.png", io.BytesIO(path.read_bytes()), found):
        assert torch.equal(own_digit.prepare_digit(image), expected)


@pytest.mark.parametrize("image", [b"\x89PNG" + bytes(1000), torch.zeros(28, 28), None, 7], ids=type)
def test_other_types_are_rejected_without_printing_the_data(image):
    with pytest.raises(ValueError, match="pass a path") as caught:
        own_digit.find_digit(image)
    assert len(str(caught.value)) < 150


def png_bytes(cut=None, position=None):
    """Return a PNG file's bytes, truncated or with one byte changed."""
    file = io.BytesIO()
    draw_bar().save(file, "PNG")
    data = bytearray(file.getvalue())
    if position is not None:
        data[position] ^= 255
    return bytes(data[:cut])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"3", id="text"),
        pytest.param(png_bytes(cut=20), id="cut in the header"),
        pytest.param(png_bytes(cut=60), id="cut in the data"),
        pytest.param(png_bytes(position=29), id="wrong checksum"),  # SyntaxError in Pillow
    ],
)
def test_a_corrupted_file_is_rejected_in_one_line(tmp_path, data):
    path = tmp_path / "digit.png"
    path.write_bytes(data)
    for image, name in ((path, r"digit\.png"), (io.BytesIO(data), "BytesIO")):
        with pytest.raises(ValueError, match=f"^.*{name} cannot be read.*different file$"):
            own_digit.find_digit(image)


def test_a_missing_file_a_folder_and_an_empty_image_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"^there is no file .*none\.png"):
        own_digit.find_digit(tmp_path / "none.png")
    with pytest.raises(ValueError, match="cannot be read.*different file$"):
        own_digit.find_digit(tmp_path)
    with pytest.raises(ValueError, match="no pixels.*different file$"):
        own_digit.find_digit(Image.new("L", (0, 5)))


def test_the_text_of_a_data_url_is_shortened():
    with pytest.raises(ValueError, match="data:image/png") as caught:
        own_digit.find_digit("data:image/png;base64," + "iVBORw0KGgo" * 1000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("limit", [40_000, 20_000], ids=["Pillow warns", "Pillow raises"])
def test_a_decompression_bomb_is_rejected(tmp_path, monkeypatch, limit):
    draw_bar().save(tmp_path / "bar.png")  # 48,000 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"bar\.png cannot be read.*bomb"):
        own_digit.find_digit(tmp_path / "bar.png")


# ---- components ----


def test_components_are_labeled_like_a_flood_fill():
    mask = torch.rand(40, 50) < 0.4
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
    labels = own_digit.label_components(mask)
    assert labels.max() == count
    pairs = torch.stack([labels.flatten(), expected.flatten()]).unique(dim=1)
    assert pairs.shape[1] == count + 1  # one partner for each number, 0 for 0


# ---- prediction ----


def test_predict_returns_the_models_probabilities():
    model = create_model("Model3")
    expected = model.eval()(own_digit.prepare_digit(draw_bar())).exp()[0]
    model.train()
    torch.testing.assert_close(own_digit.predict(model, draw_bar()), expected)


def test_a_found_digit_is_not_read_again(figures, monkeypatch):
    digit = own_digit.find_digit(draw_bar())
    monkeypatch.setattr(own_digit, "read_picture", None)
    probabilities = own_digit.predict(create_model("Model3"), digit)
    own_digit.plot_prediction(digit, probabilities)
    assert len(figures) == 1


def test_the_figure_shows_the_picture_the_digit_the_input_and_the_probabilities(figures):
    probabilities = torch.arange(1, 11) / 55
    own_digit.plot_prediction(draw_bar(), probabilities)
    picture, digit, prepared, bars = figures[0].figure.axes
    assert picture.images[0].get_array().shape == (240, 200)
    assert digit.images[0].get_array().shape[0] > 150
    assert prepared.images[0].get_array().shape == (28, 28)
    heights = [patch.get_height() for patch in bars.patches]
    assert heights == pytest.approx(probabilities.tolist())
    assert "9" in bars.get_title()
    assert "prediction: 9" in figures[0].alt
    frame = picture.patches[0]
    assert frame.get_xy() == pytest.approx((80, 20), abs=2)
    assert (frame.get_width(), frame.get_height()) == pytest.approx((30, 200), abs=3)

"""The drawing field in a real browser: probabilities, preprocessing, strokes, buttons, pages, colors."""

import io
import os

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nbconvert import HTMLExporter
from PIL import Image, ImageDraw
from torch import nn

from drawing_field import TEXT, drawing_field
from model import MODELS, Network, create_model
from own_digit import find_digit
from utils import MEAN, STD

TOLERANCE = 1e-5  # in probabilities, and in gray levels from 0 to 1
INK_TOLERANCE = 0.03  # in gray levels, for ink that Pillow rendered
FIELD = 252  # side of the field in its own units
PEN_WIDTH = 20

# Strokes in shares of the field's side, from its top left corner.
SEVEN = [[(0.3, 0.2), (0.7, 0.2), (0.45, 0.85)]]
FOUR = [[(0.6, 0.15), (0.3, 0.55), (0.75, 0.55)], [(0.62, 0.4), (0.6, 0.85)]]
FIVE = [[(0.4, 0.2), (0.38, 0.45), (0.62, 0.55), (0.6, 0.8), (0.35, 0.8)], [(0.42, 0.2), (0.7, 0.2)]]
ONE = [[(0.5, 0.15), (0.52, 0.85)]]
ONE_AND_SEVEN = [[(0.2, 0.2), (0.2, 0.8)], [(0.5, 0.2), (0.8, 0.2), (0.65, 0.8)]]
ONE_AND_DOT = [[(0.4, 0.1), (0.4, 0.8)], [(0.7, 0.8)]]
LONG = [[(0.04, 0.06), (0.96, 0.5)]]
CORNER = [[(0.01, 0.01), (0.3, 0.02), (0.02, 0.4)]]
BEYOND_THE_EDGE = [[(0.8, 0.8), (1.2, 0.7), (0.9, 1.1)]]
DOT = [[(0.4, 0.6)]]


@pytest.fixture(scope="module")
def browser():
    """Return a running browser; without one, skip the test, or fail if CI_REQUIRES_BROWSER is set."""
    required = os.environ.get("CI_REQUIRES_BROWSER")
    if not required:
        pytest.importorskip("playwright")
    import drawing  # in benchmarks/

    try:
        with drawing.running_browser() as browser:
            yield browser
    except FileNotFoundError as error:
        if required:
            raise
        pytest.skip(str(error))


@pytest.fixture
def show(browser):
    """Return a function that shows HTML in a new page; afterwards, check that the pages were quiet."""
    import drawing

    pages = []
    noise = []

    def show(body, **options):
        """Return the element of the drawing field; `options` are those of `Browser.new_page`."""
        page = browser.new_page(**options)
        page.on("request", lambda request: noise.append(request.url))
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        pages.append(page)
        drawing.show(page, body)
        return page.locator("div.drawing-field")

    yield show
    for page in pages:
        page.close()
    assert noise == []


@pytest.fixture
def field(show):
    return show(html_of("Model4"))


def html_of(name, description="a description"):
    return drawing_field(randomize(create_model(name)), description).html


@torch.no_grad()
def randomize(model):
    """Return a network with random weights whose output depends on its input, in evaluation mode."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(0, 0.3)
            layer.momentum = 1.0  # the statistics are those of the next batch
    model.train()(torch.randn(16, 1, 28, 28))
    return model.eval()


@torch.no_grad()
def probabilities_of(model, pixels):
    """Return the probabilities `(N, 10)`, in float64, for images `(N, 784)` with pixels from 0 to 1."""
    images = pixels.double().reshape(-1, 1, 28, 28)
    return model.double()((images - MEAN) / STD).exp()


# ---- what a user does and sees ----


def draw(field, strokes, pointer="mouse"):
    """Move a mouse, a pen or a finger over the points of strokes."""
    box = field.get_by_role("img", name="Drawing field").bounding_box()
    for stroke in strokes:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        drag(field.page, points, pointer)
    wait(field)


def drag(page, points, pointer):
    devtools = page.context.new_cdp_session(page)
    if pointer == "touch":
        kind = "touchStart"
        for x, y in points:
            devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
            kind = "touchMove"
        devtools.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        return
    page.mouse.move(*points[0])  # without a button
    kinds = ["mousePressed", *["mouseMoved"] * len(points), "mouseReleased"]
    event = {"button": "left", "buttons": 1, "clickCount": 1, "pointerType": pointer}
    for kind, (x, y) in zip(kinds, [points[0], *points, points[-1]], strict=True):
        devtools.send("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, **event})


def press(field, keys):
    """Press keys of the keyboard, or click a button of the field."""
    if keys in ("Undo", "Clear"):
        field.get_by_role("button", name=keys).click()
    else:
        field.page.keyboard.press(keys)
    wait(field)


def wait(field):
    """Wait for the next frame, with which the prediction is shown."""
    field.evaluate("() => new Promise(requestAnimationFrame)")


def answer(field):
    """Return the shown prediction and the texts beside the ten bars, such as "12.3 %"."""
    return field.get_by_role("status").text_content(), field.locator(".bar span").all_text_contents()


def network_input(field):
    """Return the pixels `(784,)`, from 0 to 1, that the network gets."""
    pixels = field.evaluate("({ field }) => [...field.prepare(field.ink)]")
    return torch.tensor(pixels, dtype=torch.float64)


def is_empty(field):
    has_ink = field.evaluate("({ field }) => field.ink.some((row) => row.some((value) => value > 0))")
    has_strokes = field.locator("path").get_attribute("d") != ""
    return not has_ink and not has_strokes and answer(field) == ("", [""] * 10)


# ---- the network and its input ----


class EveryKindOfLayer(Network):
    def __init__(self):
        super().__init__()
        relu = nn.ReLU()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), relu, nn.BatchNorm2d(4), nn.Dropout(0.5)),
            nn.MaxPool2d((3, 3)),  # 28 → 9: the last row and column are left over
            nn.Conv2d(4, 6, 2, groups=2, bias=False),
            nn.Identity(),
            nn.BatchNorm2d(6, eps=0.1),
            relu,
            nn.AvgPool2d(2),
            nn.Conv2d(6, 10, 1),
            nn.AdaptiveAvgPool2d((1, 1)),
        )


@pytest.mark.parametrize("create", [*MODELS.values(), EveryKindOfLayer])
def test_probabilities_equal_those_of_pytorch(show, small, create):
    model = randomize(create())
    digits = small(50, train=False).images.reshape(-1, 784) / 255
    pixels = torch.cat([digits, torch.rand(50, 784)])
    field = show(drawing_field(model, "").html)
    actual = field.evaluate(
        "({ field }, images) => images.map((pixels) => field.classify(pixels))", pixels.tolist()
    )
    expected = probabilities_of(model, pixels)
    assert expected.std(dim=0).max() > 0.01  # neither uniform nor the same for all images
    torch.testing.assert_close(torch.tensor(actual).double(), expected, atol=TOLERANCE, rtol=0)


def render(strokes):
    """Return strokes as Pillow draws them, as ink `(252, 252)`: enlarged by 4, then averaged."""
    image = Image.new("L", (4 * FIELD, 4 * FIELD))
    pencil = ImageDraw.Draw(image)
    for stroke in strokes:
        points = [(4 * FIELD * x, 4 * FIELD * y) for x, y in stroke]
        pencil.line(points, fill=255, width=4 * PEN_WIDTH)
        for x, y in points:
            reach = 2 * PEN_WIDTH
            pencil.ellipse((x - reach, y - reach, x + reach, y + reach), fill=255)
    return torch.from_numpy(np.array(image.reduce(4))) / 255


def prepare(ink):
    """Return the network input `(28, 28)` for ink whose darkest value is 1, in plain PyTorch."""
    rows = (ink > 0.3).any(dim=1).nonzero()
    columns = (ink > 0.3).any(dim=0).nonzero()
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = [max(1, round(20 * side / max(ink.shape))) for side in ink.shape]
    ink = F.interpolate(ink[None, None], size, mode="bilinear", antialias=True)[0, 0]
    height, width = size
    ink = ink / ink.max()
    factor = max(0.7 / ink[ink > 0.15].mean().item(), 1)
    ink = (ink * factor).clamp(max=1)
    centers = (ink.sum(1) @ torch.arange(float(height)), ink.sum(0) @ torch.arange(float(width)))
    top, left = [round(13.999 - (center / ink.sum()).item()) for center in centers]
    top = min(max(top, 0), 28 - height)
    left = min(max(left, 0), 28 - width)
    return F.pad(ink, (left, 28 - left - width, top, 28 - top - height))


@pytest.mark.parametrize("strokes", [SEVEN, FOUR, FIVE, ONE], ids=["7", "4", "5", "1"])
def test_network_input_equals_that_of_find_digit(field, strokes):
    draw(field, strokes)
    picture = Image.fromarray((255 * (1 - render(strokes))).round().byte().numpy())
    expected = find_digit(picture).input.flatten().double() * STD + MEAN
    difference = (network_input(field) - expected).abs()
    assert difference.max() < 5 * INK_TOLERANCE
    assert difference.mean() < INK_TOLERANCE / 5


@pytest.mark.parametrize(
    "strokes", [LONG, CORNER, BEYOND_THE_EDGE, DOT], ids=["long", "corner", "beyond the edge", "dot"]
)
def test_ink_and_network_input_of_other_strokes(field, strokes):
    draw(field, strokes)
    ink = torch.tensor(field.evaluate("({ field }) => field.ink.map((row) => [...row])"))
    assert (ink - render(strokes)).abs().mean() < 0.002  # Pillow's edges are not exactly round
    expected = prepare(ink).flatten().double()
    torch.testing.assert_close(network_input(field), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("width", [pytest.param(25, id="12.5 pixels"), pytest.param(27, id="13.5 pixels")])
def test_half_pixels_are_rounded_as_in_python(field, width):
    ink = torch.zeros(FIELD, FIELD)
    ink[100:140, 100 : 100 + width] = 1
    field.evaluate("({ field }, ink) => { field.ink = ink; }", ink.tolist())
    expected = prepare(ink).flatten().double()
    torch.testing.assert_close(network_input(field), expected, atol=TOLERANCE, rtol=0)


# ---- strokes and buttons ----


@pytest.mark.parametrize("pointer", ["mouse", "pen", "touch"])
def test_strokes_are_answered_like_pytorch_answers_them(show, pointer):
    model = randomize(create_model("Model4"))
    field = show(drawing_field(model, "").html, has_touch=True)
    draw(field, FOUR, pointer)
    expected = probabilities_of(model, network_input(field))[0]
    digit, percentages = answer(field)
    assert digit == str(expected.argmax().item())
    assert percentages == [f"{100 * probability:.1f} %" for probability in expected.tolist()]
    bars = "bars => bars.map((bar) => bar.getBoundingClientRect().width)"
    widths = torch.tensor(field.locator(".bar i").evaluate_all(bars)).double()
    torch.testing.assert_close(widths / widths.sum(), expected, atol=0.01, rtol=0)
    canvas = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 28, 28).data]"
    shown = torch.tensor(field.locator("canvas").evaluate(canvas))[::4].double() / 255
    torch.testing.assert_close(shown, network_input(field), atol=1 / 255, rtol=0)
    assert field.locator("text").text_content() == ""  # no "draw a digit"


def test_finger_draws_and_scrolls_only_outside_the_field(show):
    field = show(html_of("Model4") + "<div style='height: 3000px'></div>", has_touch=True)
    draw(field, [[(0.5, 0.9 - 0.1 * step) for step in range(9)]], "touch")
    assert field.page.evaluate("scrollY") == 0
    drag(field.page, [(300, 700 - 50 * step) for step in range(9)], "touch")
    field.page.wait_for_function("scrollY > 0")


def test_right_button_does_not_draw(field):
    field.locator("svg").click(button="right")
    wait(field)
    assert is_empty(field)


def test_many_events_need_one_prediction(field):
    field.evaluate("""(host) => {
        host.predictions = 0;
        host.shadowRoot.querySelector("path").setAttribute = () => host.predictions++;
        for (let i = 0; i < 20; i++) host.shadowRoot.querySelector(".clear").click();
    }""")
    wait(field)
    assert field.evaluate("host => host.predictions") == 1


@pytest.mark.parametrize("keys", ["Undo", "Control+z", "Meta+z"])
def test_undo_takes_back_one_stroke_at_a_time(field, keys):
    notebook = "(e) => { if (e.key === 'z' && !e.shiftKey) throw Error('undone in a cell'); }"
    field.page.evaluate(f"addEventListener('keydown', {notebook})")
    draw(field, FOUR[:1])
    before = network_input(field)
    draw(field, FOUR[1:])
    press(field, "Shift+Control+z")  # redo elsewhere
    assert not torch.equal(network_input(field), before)
    press(field, keys)
    assert torch.equal(network_input(field), before)
    press(field, keys)
    press(field, keys)  # nothing is left
    assert is_empty(field)


def test_buttons_work_by_keyboard_with_visible_focus(field):
    draw(field, FOUR + SEVEN)
    for name in ("Undo", "Clear"):
        assert not is_empty(field)
        press(field, "Tab")
        button = field.get_by_role("button", name=name)
        assert button.evaluate("button => button.matches(':focus-visible')")
        assert button.evaluate("button => getComputedStyle(button).outlineWidth") == "3px"
        press(field, "Enter")
    assert is_empty(field)


def test_one_digit_is_predicted_and_two_side_by_side_are_not(field):
    for strokes in (FOUR, FIVE, ONE_AND_DOT):
        draw(field, strokes)
        assert answer(field)[0].isdigit()
        press(field, "Clear")
    draw(field, ONE_AND_SEVEN)
    assert answer(field) == ("This does not look like one digit.", [""] * 10)


# ---- pages ----


def test_network_input_does_not_depend_on_the_screen(show):
    html = html_of("Model4")
    field = show(html)
    phone = show(html, viewport={"width": 250, "height": 700}, device_scale_factor=3)
    draw(field, SEVEN)
    draw(phone, SEVEN)
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 250
    assert (network_input(field) - network_input(phone)).abs().mean() < 0.01


def test_canvas_that_cannot_be_read_changes_nothing(show):
    noise = """<script>
        CanvasRenderingContext2D.prototype.getImageData = (x, y, width, height) =>
          new ImageData(new Uint8ClampedArray(4 * width * height).map(() => 256 * Math.random()), width);
    </script>"""
    html = html_of("Model4")
    field = show(html)
    protected = show(noise + html)
    draw(field, SEVEN)
    draw(protected, SEVEN)
    assert answer(field) == answer(protected)


def test_two_fields_of_a_page_are_independent(show):
    descriptions = ["the first", """<b>"the" second</b> & 'last' \\ {0}"""]
    html = html_of("Model4", descriptions[0]) + html_of("Model5", descriptions[1])
    fields = show(html, viewport={"width": 900, "height": 900})
    assert fields.locator(".description").all_text_contents() == descriptions
    draw(fields.last, SEVEN)
    assert is_empty(fields.first)
    assert answer(fields.last)[0].isdigit()


def test_styles_of_field_and_page_do_not_affect_each_other(show):
    html = html_of("Model4")
    around = "<button class='bar foot'>page</button>"
    style = "getComputedStyle(document.querySelector('button')).cssText"
    assert show(around + html).page.evaluate(style) == show(around).page.evaluate(style)
    field = show("<style>svg, button, canvas { display: none } .bar { height: 500px }</style>" + html)
    assert field.get_by_role("button", name="Clear").is_visible()
    assert field.locator(".bar").first.bounding_box()["height"] == 28


def notebook_page(sanitize):
    """Return the page that nbconvert makes of a notebook with a drawing field."""
    output = nbformat.v4.new_output("display_data", {"text/html": html_of("Model4"), "text/plain": ""})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])
    exporter = HTMLExporter(template_name="basic", sanitize_html=sanitize)
    return exporter.from_notebook_node(notebook)[0]


def test_field_works_in_the_page_of_a_notebook(show):
    field = show(notebook_page(sanitize=False))
    draw(field, SEVEN)
    assert answer(field)[0].isdigit()
    assert TEXT not in field.page.inner_text("body")


def test_sanitized_page_shows_a_sentence_and_no_program(show):
    text = show(notebook_page(sanitize=True)).page.inner_text("body")
    assert TEXT in text
    assert len(text) < len(TEXT) + 100


def test_field_works_in_an_output_that_is_inserted_later(show):
    field = show("<div id=cell></div>")
    html = html_of("Model4").replace('alt=""', 'alt="Image"')  # as JupyterLab does
    field.page.evaluate("html => { document.querySelector('#cell').innerHTML = html; }", html)
    draw(field, SEVEN)
    assert answer(field)[0].isdigit()
    assert not field.page.locator("img").is_visible()


def test_narrow_page_needs_no_scrolling_to_the_buttons(show):
    field = show(html_of("Model4"), viewport={"width": 390, "height": 600})
    assert field.page.evaluate("document.documentElement.scrollWidth") == 390
    for name in ("Undo", "Clear"):
        box = field.get_by_role("button", name=name).bounding_box()
        assert box["y"] + box["height"] < 350


COLORS = [
    pytest.param("", {}, id="light"),
    pytest.param(":root { color-scheme: light dark }", {"color_scheme": "dark"}, id="dark system"),
    pytest.param("html { background: #111; color: #eee }", {}, id="dark theme"),
    pytest.param("", {"forced_colors": "active"}, id="forced colors"),
    pytest.param("", {"forced_colors": "active", "color_scheme": "dark"}, id="forced dark colors"),
]


@pytest.mark.parametrize(("style", "options"), COLORS)
def test_strokes_bars_and_buttons_stand_out(show, style, options):
    field = show(f"<style>{style}</style>{html_of('Model4')}", **options)
    draw(field, SEVEN)
    background = picture_of(field.locator("svg")).getpixel((20, 20))
    for selector, contrast in [("svg", 150), (".bar.top i", 60), (".clear", 150)]:
        darkest, brightest = picture_of(field.locator(selector)).getextrema()
        assert max(background - darkest, brightest - background) > contrast


def picture_of(element):
    """Return what the screen shows of an element, in gray."""
    return Image.open(io.BytesIO(element.screenshot())).convert("L")

"""The drawing field in a real browser: probabilities, preprocessing, strokes, buttons, pages, colors."""

import json
import os
import re
import shutil

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nbconvert import HTMLExporter
from PIL import Image, ImageDraw
from torch import nn

import drawing_field
from model import MODELS, create_model
from own_digit import find_digit
from utils import MEAN, STD

PROBABILITY_TOLERANCE = 1e-5
PREPARE_TOLERANCE = 1e-5  # in gray levels from 0 to 1, for the same ink
INK_TOLERANCE = 0.03  # in gray levels, for ink that Pillow rendered
SHOWN_TOLERANCE = 0.0005 + PROBABILITY_TOLERANCE  # half of the last digit of "12.3 %"
FIELD = 252  # side of the field in its own units
PEN = 20
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

# Strokes in shares of the field's side, from its top left corner.
SEVEN = [[(0.3, 0.2), (0.7, 0.2), (0.45, 0.85)]]
FOUR = [[(0.6, 0.15), (0.3, 0.55), (0.75, 0.55)], [(0.62, 0.4), (0.6, 0.85)]]
FIVE = [[(0.4, 0.2), (0.38, 0.45), (0.62, 0.55), (0.6, 0.8), (0.35, 0.8)], [(0.42, 0.2), (0.7, 0.2)]]
ONE = [[(0.5, 0.15), (0.52, 0.85)]]
ONE_AND_SEVEN = [[(0.2, 0.2), (0.2, 0.8)], [(0.5, 0.2), (0.8, 0.2), (0.65, 0.8)]]
ONE_AND_DOT = [[(0.4, 0.1), (0.4, 0.8)], [(0.7, 0.8)]]


@pytest.fixture(scope="module")
def browser():
    """Return a running browser; skip the test, or fail if CI_REQUIRES_BROWSER is set, if there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        skip("Playwright is not installed")
    programs = [shutil.which(name) for name in BROWSERS]
    if not any(programs):
        skip("no Chromium or Chrome was found")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=next(filter(None, programs)), args=OPTIONS)
        yield running
        running.close()


def skip(reason):
    if os.environ.get("CI_REQUIRES_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def show(browser):
    """Return a function that shows HTML in a new page; afterwards, check that the pages were quiet."""
    contexts = []
    noise = []

    def show(body, head="", script="", **options):
        """`script` runs before the page; `options` are those of `Browser.new_context`."""
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: noise.append(request.url))
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.add_init_script(script)
        page.goto("about:blank")
        page.set_content(f"<!doctype html><meta charset='utf-8'>{head}<body style='margin: 0'>{body}")
        return page

    yield show
    for context in contexts:
        context.close()
    assert noise == []


@torch.no_grad()
def random_model(name):
    """Return a network with random weights and BatchNorm statistics whose output depends on its input.

    The statistics are those of noise images, changed at random, so that no activation is extreme.
    """
    model = create_model(name).train()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.3)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    model(torch.randn(16, 1, 28, 28))
    for norm in norms:
        norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn(norm.num_features)
        norm.running_var *= torch.empty(norm.num_features).uniform_(0.5, 2)
    return model.eval()


@torch.no_grad()
def probabilities_of(model, pixels):
    """Return the probabilities `(N, 10)`, in float64, for images `(N, 784)` with pixels from 0 to 1."""
    images = pixels.double().reshape(-1, 1, 28, 28)
    return model.double()((images - MEAN) / STD).exp()


def html_of(name="Model4"):
    return drawing_field.drawing_field(random_model(name), f"{name} with random weights").html


class Field:
    """A drawing field of a page, by its position among them."""

    def __init__(self, page, index=0):
        self.page = page
        self.host = page.locator("div.drawing-field").nth(index)
        page.wait_for_function(f"document.querySelectorAll('div.drawing-field')[{index}]?.field")
        self.svg = self.host.locator("svg")
        self.undo = self.host.get_by_role("button", name="Undo")
        self.clear = self.host.get_by_role("button", name="Clear")

    def get(self, expression, argument=None):
        """Return the value of an expression in which `host`, `root`, `field` and `argument` are known."""
        names = "const root = host.shadowRoot; const field = host.field;"
        return self.host.evaluate(f"(host, argument) => {{ {names} return {expression}; }}", argument)

    def place(self, stroke):
        """Return the points of a stroke in the coordinates of the window."""
        box = self.svg.bounding_box()
        return [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]

    def draw(self, strokes, pointer="mouse"):
        for stroke in strokes:
            drag(self.page, self.place(stroke), pointer)
        self.wait()

    def wait(self):
        """Wait until the prediction is shown, which happens with the next frame."""
        self.page.wait_for_function("host => host.field.frame === null", arg=self.host.element_handle())

    def answer(self):
        return self.host.locator("output").text_content()

    def percentages(self):
        """Return the texts beside the ten bars."""
        return self.host.locator(".bar span").all_text_contents()

    def probabilities(self):
        """Return the probabilities `(10,)` that the texts beside the bars show, such as "12.3 %"."""
        shown = [float(text.removesuffix(" %")) for text in self.percentages()]
        return torch.tensor(shown, dtype=torch.float64) / 100

    def network_input(self):
        """Return the pixels `(784,)`, from 0 to 1, that the network gets."""
        return torch.tensor(self.get("[...field.prepare(field.ink)]"), dtype=torch.float64)

    def is_empty(self):
        path = self.host.locator("path").get_attribute("d")
        has_ink = self.get("field.ink.some((row) => row.some((value) => value > 0))")
        return path == "" and not has_ink and self.answer() == "" and self.percentages() == [""] * 10


def drag(page, points, pointer):
    """Move a mouse, a pen or a finger from the first point over the others to the last."""
    if pointer == "mouse":
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point)
        page.mouse.up()
        return
    devtools = page.context.new_cdp_session(page)
    kinds = {"pen": ("mousePressed", "mouseMoved", "mouseReleased")}
    first, middle, last = kinds.get(pointer, ("touchStart", "touchMove", "touchEnd"))
    for kind, (x, y) in [(first, points[0]), *[(middle, point) for point in points], (last, points[-1])]:
        if pointer == "pen":
            event = {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
            devtools.send("Input.dispatchMouseEvent", {**event, "pointerType": "pen"})
        else:
            touches = [] if kind == "touchEnd" else [{"x": x, "y": y}]
            devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})


@pytest.fixture
def field(show):
    return Field(show(html_of()))


# ---- the network and its input ----


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_equal_those_of_pytorch(show, small, name):
    model = random_model(name)
    digits = small(50, train=False).images.reshape(-1, 784) / 255
    pixels = torch.cat([digits, torch.rand(50, 784)])
    field = Field(show(drawing_field.drawing_field(model, name).html))
    actual = field.get(
        "JSON.parse(argument).map((pixels) => field.classify(pixels))", json.dumps(pixels.tolist())
    )
    expected = probabilities_of(model, pixels)
    assert expected.std(dim=0).max() > 0.01  # neither uniform nor the same for all images
    torch.testing.assert_close(
        torch.tensor(actual, dtype=torch.float64), expected, atol=PROBABILITY_TOLERANCE, rtol=0
    )


def render(strokes):
    """Return strokes as Pillow draws them, as ink `(252, 252)`: enlarged by 4, then averaged."""
    image = Image.new("L", (4 * FIELD, 4 * FIELD))
    pencil = ImageDraw.Draw(image)
    for stroke in strokes:
        points = [(4 * FIELD * x, 4 * FIELD * y) for x, y in stroke]
        pencil.line(points, fill=255, width=4 * PEN)
        for x, y in points:
            reach = 2 * PEN
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
def test_network_input_equals_that_of_prepare_digit(field, strokes):
    field.draw(strokes)
    picture = Image.fromarray((255 * (1 - render(strokes))).round().byte().numpy())
    expected = find_digit(picture).input.flatten().double() * STD + MEAN
    difference = (field.network_input() - expected).abs()
    assert difference.max() < 5 * INK_TOLERANCE
    assert difference.mean() < INK_TOLERANCE / 5


@pytest.mark.parametrize(
    "strokes",
    [
        pytest.param([[(0.2, 0.5), (0.8, 0.5)]], id="wide"),
        pytest.param([[(0.01, 0.01), (0.3, 0.02), (0.02, 0.4)]], id="in a corner"),
        pytest.param([[(0.8, 0.8), (1.2, 0.7), (0.9, 0.95)]], id="beyond the edge"),
        pytest.param([[(0.4, 0.6)]], id="dot"),
    ],
)
def test_ink_and_network_input_of_other_strokes(field, strokes):
    field.draw(strokes)
    ink = torch.tensor(json.loads(field.get("JSON.stringify(field.ink.map((row) => [...row]))")))
    assert (ink - render(strokes)).abs().mean() < 0.002  # Pillow's edges are not exactly round
    expected = prepare(ink).flatten().double()
    torch.testing.assert_close(field.network_input(), expected, atol=PREPARE_TOLERANCE, rtol=0)


@pytest.mark.parametrize("width", [pytest.param(25, id="12.5 pixels"), pytest.param(27, id="13.5 pixels")])
def test_half_pixels_are_rounded_as_in_python(field, width):
    ink = torch.zeros(FIELD, FIELD)
    ink[100:140, 100 : 100 + width] = 1
    actual = field.get(
        "[...field.prepare(JSON.parse(argument).map((row) => Float64Array.from(row)))]",
        json.dumps(ink.tolist()),
    )
    expected = prepare(ink).flatten().double()
    torch.testing.assert_close(
        torch.tensor(actual, dtype=torch.float64), expected, atol=PREPARE_TOLERANCE, rtol=0
    )


# ---- strokes and buttons ----


@pytest.mark.parametrize("pointer", ["mouse", "pen", "touch"])
def test_strokes_are_answered_like_pytorch_answers_them(show, pointer):
    model = random_model("Model4")
    page = show(drawing_field.drawing_field(model, "Model4").html, has_touch=True)
    field = Field(page)
    field.wait()
    assert field.is_empty()
    field.draw(FOUR, pointer)
    expected = probabilities_of(model, field.network_input())[0]
    assert field.answer() == str(expected.argmax().item())
    torch.testing.assert_close(field.probabilities(), expected, atol=SHOWN_TOLERANCE, rtol=0)


def test_finger_draws_and_scrolls_only_outside_the_field(show):
    page = show(html_of() + "<div style='height: 3000px'></div>", has_touch=True)
    field = Field(page)
    field.draw([[(0.5, 0.9 - 0.1 * step) for step in range(9)]], "touch")
    assert page.evaluate("scrollY") == 0
    drag(page, [(300, 700 - 50 * step) for step in range(9)], "touch")
    page.wait_for_function("scrollY > 0")


def test_right_button_does_not_draw(field):
    field.svg.click(button="right")
    field.wait()
    assert field.is_empty()


def test_many_moves_need_one_prediction_per_frame(field):
    field.get("(field.count = 0, field.frames = 0)")
    field.get("(root.querySelector('path').setAttribute = () => field.count++)")
    field.get("(function next() { field.frames++; requestAnimationFrame(next); })()")
    field.draw([[(0.2 + 0.003 * step, 0.5) for step in range(200)]])
    assert 0 < field.get("field.count") <= field.get("field.frames")


def test_undo_takes_back_one_stroke_at_a_time(field):
    field.draw(FOUR[:1])
    before = field.network_input()
    field.draw(FOUR[1:])
    field.undo.click()
    field.wait()
    assert torch.equal(field.network_input(), before)
    field.undo.click()
    field.undo.click()  # nothing is left
    field.wait()
    assert field.is_empty()


@pytest.mark.parametrize("keys", ["Control+z", "Meta+z"])
def test_keys_undo_after_drawing(field, keys):
    field.draw(FOUR)
    field.page.keyboard.press("Control+Shift+z")  # redo elsewhere
    for _ in FOUR:
        assert not field.is_empty()
        field.page.keyboard.press(keys)
        field.wait()
    assert field.is_empty()


def test_buttons_work_by_keyboard_with_visible_focus(field):
    field.draw(FOUR)
    for button in (field.undo, field.clear):
        field.page.keyboard.press("Tab")
        assert button.evaluate("button => button.matches(':focus-visible')")
        assert button.evaluate("button => getComputedStyle(button).outlineWidth") == "3px"
        field.page.keyboard.press("Enter")
        field.wait()
    assert field.is_empty()


def test_two_digits_side_by_side_are_not_predicted(field):
    field.draw(ONE_AND_SEVEN)
    assert field.answer() == "This does not look like one digit."
    assert field.percentages() == [""] * 10
    field.undo.click()
    field.wait()
    assert field.answer() in "0123456789"


@pytest.mark.parametrize("strokes", [FOUR, FIVE, ONE_AND_DOT], ids=["4", "5", "low stroke"])
def test_strokes_of_one_digit_are_predicted(field, strokes):
    field.draw(strokes)
    assert len(field.answer()) == 1
    assert "whatever is drawn" in field.host.locator(".foot").text_content()


# ---- pages ----


def test_answer_does_not_depend_on_the_screen(show):
    html = html_of()
    inputs = []
    for width, density in [(900, 1), (250, 3)]:
        page = show(html, viewport={"width": width, "height": 700}, device_scale_factor=density)
        field = Field(page)
        field.draw(SEVEN)
        inputs.append(field.network_input())
    assert (inputs[0] - inputs[1]).abs().mean() < 0.01


def test_canvas_that_cannot_be_read_changes_nothing(show):
    html = html_of()
    noise = """
        CanvasRenderingContext2D.prototype.getImageData = (x, y, width, height) =>
          new ImageData(new Uint8ClampedArray(4 * width * height).map(() => 256 * Math.random()), width);
    """
    answers = []
    for script in ("", noise):
        field = Field(show(html, script=script))
        field.draw(SEVEN)
        answers.append((field.answer(), field.percentages()))
    assert answers[0] == answers[1]


def test_two_fields_of_a_page_are_independent(show):
    page = show(html_of("Model4") + html_of("Model5"), viewport={"width": 900, "height": 900})
    first = Field(page, 0)
    second = Field(page, 1)
    second.draw(SEVEN)
    assert first.is_empty()
    assert second.answer() != ""
    assert "Model4 with random weights" in first.host.locator(".foot").text_content()
    assert "Model5 with random weights" in second.host.locator(".foot").text_content()


def test_styles_of_field_and_page_do_not_affect_each_other(show):
    html = html_of()
    around = "<button class='bar foot'>page</button><svg></svg>"
    outside = (
        "[...document.querySelectorAll('body > button, body > svg')].map((e) => getComputedStyle(e).cssText)"
    )
    assert show(around + html).evaluate(outside) == show(around).evaluate(outside)
    rules = "<style>svg, button, canvas { display: none } .bar { height: 500px } i { width: 3px }</style>"
    page = show(html, head=rules)
    assert Field(page).clear.is_visible()
    assert page.locator(".bar").first.bounding_box()["height"] == 28


def notebook_page(sanitize):
    """Return the page that nbconvert makes of a notebook with a drawing field."""
    data = {"text/html": html_of(), "text/plain": "drawing field"}
    output = nbformat.v4.new_output("display_data", data)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("field", outputs=[output])])
    exporter = HTMLExporter(template_name="basic", sanitize_html=sanitize)
    return exporter.from_notebook_node(notebook)[0]


def test_field_works_in_the_page_of_a_notebook(show):
    field = Field(show(notebook_page(sanitize=False)))
    field.draw(SEVEN)
    assert len(field.answer()) == 1
    assert drawing_field.TEXT not in field.page.inner_text("body")


def test_field_works_in_an_output_that_is_inserted_later(show):
    page = show("<div id=cell></div>")
    page.evaluate("html => { document.querySelector('#cell').innerHTML = html; }", html_of())
    field = Field(page)
    field.draw(SEVEN)
    assert len(field.answer()) == 1


def test_image_that_starts_the_program_is_not_shown(show):
    """JupyterLab sets the text of an image that has none to "Image"."""
    body = html_of().replace('alt=""', 'alt="Image"')
    assert not show(body).locator("img").is_visible()


def test_sanitized_page_shows_a_sentence_and_no_program(show):
    text = show(notebook_page(sanitize=True)).inner_text("body")
    assert drawing_field.TEXT in text
    assert len(text) < len(drawing_field.TEXT) + 100


def test_removed_tags_leave_only_the_sentence():
    assert re.sub(r"<[^<>]*>", "", html_of()) == drawing_field.TEXT


def test_narrow_page_needs_no_scrolling_to_the_buttons(show):
    page = show(html_of(), viewport={"width": 390, "height": 600})
    field = Field(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for button in (field.undo, field.clear):
        box = button.bounding_box()
        assert box["y"] + box["height"] < 340


COLORS = [
    pytest.param("", {"color_scheme": "light"}, id="light"),
    pytest.param(":root { color-scheme: light dark }", {"color_scheme": "dark"}, id="dark system"),
    pytest.param("html { background: #111; color: #eee }", {"color_scheme": "light"}, id="dark theme"),
    pytest.param("", {"forced_colors": "active"}, id="forced colors"),
    pytest.param("", {"forced_colors": "active", "color_scheme": "dark"}, id="forced dark colors"),
]


@pytest.mark.parametrize(("style", "options"), COLORS)
def test_strokes_text_and_bars_stand_out(show, tmp_path, style, options):
    page = show(html_of(), head=f"<style>{style}</style>", **options)
    field = Field(page)
    field.draw(SEVEN)
    page.screenshot(path=tmp_path / "page.png")
    pixels = Image.open(tmp_path / "page.png").convert("L")
    (x, y), (background_x, background_y) = field.place([(0.5, 0.2), (0.1, 0.9)])
    background = pixels.getpixel((int(background_x), int(background_y)))
    assert abs(pixels.getpixel((int(x), int(y))) - background) > 150
    bar = field.host.locator(".bar.top i").bounding_box()
    middle = (int(bar["x"] + bar["width"] / 2), int(bar["y"] + 7))
    assert abs(pixels.getpixel(middle) - background) > 60
    box = field.clear.bounding_box()
    area = (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
    low, high = pixels.crop([int(side) for side in area]).getextrema()
    assert high - low > 150


def test_field_and_answer_are_accessible(field):
    tree = field.host.aria_snapshot()
    for part in ('img "Drawing field"', 'button "Undo"', 'button "Clear"', "status"):
        assert part in tree

"""The drawing field: the export of a network and, in a real browser, strokes, answers, buttons and pages."""

import copy
import io
import itertools
import os
import re

import nbformat
import pytest
import torch
from helpers import assert_identical
from nbconvert import HTMLExporter
from nbconvert.preprocessors.sanitize import SanitizeHTML
from PIL import Image
from torch import nn

from drawing_field import PAGE, TEXT, drawing_field
from model import MODELS, Network, create_model
from own_digit import bounding_box, find_digit, read_picture
from utils import MEAN, STD

# Strokes in shares of the field's side, from its top left corner
SEVEN = [[(0.3, 0.2), (0.7, 0.2), (0.45, 0.85)]]
FOUR = [[(0.35, 0.15), (0.3, 0.55), (0.55, 0.55)], [(0.64, 0.2), (0.64, 0.85)], [(0.75, 0.85)]]  # gap and dot
ONE = [[(0.5, 60 / 280), (0.5, 215 / 280)]]  # scaled to 2.5×20 pixels
SLANTED_ONE = [[(0.5, 60 / 280), (149 / 280, 215 / 280)]]  # scaled to 3.5×20 pixels
LONG = [[(0.04, 0.06), (0.96, 0.5)]]
CORNER = [[(0.01, 0.01), (0.3, 0.02), (0.02, 0.4)]]
BEYOND_THE_EDGE = [[(0.3, 0.3), (0.7, 0.3), (0.5, 1.2)]]

# The field is 168 wide, which are 252 of the screen's pixels: as many as the ink has
PHONE = {"viewport": {"width": 192, "height": 350}, "device_scale_factor": 1.5}


# ---- the export ----


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(10, 10),
        nn.Conv2d(1, 1, 3, stride=2),
        nn.Conv2d(1, 1, 3, dilation=2),
        nn.Conv2d(1, 1, (3, 1)),
        nn.Conv2d(1, 1, 3, padding="same"),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(3, stride=2),
        nn.MaxPool2d((2, 1)),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, padding=1),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d(2),
        nn.BatchNorm2d(1, affine=False),
        nn.BatchNorm2d(1, track_running_stats=False),
    ],
)
def test_layer_that_the_page_cannot_compute_is_named(layer):
    reason = drawing_field(nn.Sequential(nn.Sequential(nn.ReLU(), layer)), "").data
    assert re.fullmatch(r"No drawing field: draw\.html cannot compute .*0\.1, .*", reason)
    assert str(layer) in reason


class Reversed(nn.Sequential):
    def forward(self, x):
        return nn.Sequential(*reversed(self))(x).flatten(1)


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.BatchNorm2d(50)], ids=["other scores", "other shape"])
def test_network_with_another_forward_than_its_layers_in_order_is_refused(layer):
    reason = drawing_field(Reversed(layer, nn.Conv2d(1, 50, 28)), "").data
    assert re.match("No drawing field: draw.html applies the layers in the order of their definition", reason)


def test_model_and_random_state_stay_as_they_are():
    model = create_model("Model1").train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    drawing_field(model, "")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert_identical(model.state_dict(), before)


def test_without_scripts_the_field_is_a_sentence_in_one_line():
    field = drawing_field(create_model("Model4"), "a description")
    assert repr(field) == TEXT
    assert re.sub(r"<[^<>]*>", "", field.data) == TEXT
    assert not {"\n", "`"} & set(field.data)  # a blank line or code would end HTML in Markdown
    assert SanitizeHTML().sanitize_html_tags(field.data).startswith(f"<i>{TEXT}</i>")


# ---- in a browser ----

# Some browsers return noise for the pixels of a canvas, and older ones have no `Array.at`
HEAD = """<!doctype html><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="script-src 'unsafe-inline'">
<script>
delete Array.prototype.at;
CanvasRenderingContext2D.prototype.getImageData = (x, y, width, height) =>
  new ImageData(new Uint8ClampedArray(4 * width * height).map(() => 256 * Math.random()), width);
</script>
"""


@pytest.fixture(scope="module")
def browser():
    """Return a running browser; without one, skip the test, or fail if CI_REQUIRES_BROWSER is set."""
    try:
        import drawing  # in benchmarks/

        with drawing.running_browser() as browser:
            yield browser
    except (ModuleNotFoundError, FileNotFoundError) as error:
        if os.environ.get("CI_REQUIRES_BROWSER"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def show(browser):
    """Return a function that shows HTML in a new page; afterwards, check that the pages were quiet."""
    noise = []

    def show(body, **options):
        """Return the element of the drawing field; `options` are those of `Browser.new_page`."""
        page = browser.new_page(**options)
        for event in ("request", "console", "pageerror"):
            page.on(event, lambda what: noise.append(what))
        page.set_content(HEAD + body)
        return page.locator("div.drawing-field")

    yield show
    for context in browser.contexts:
        context.close()
    assert noise == []


@pytest.fixture
def field(show):
    return show(html_of("Model4"))


def html_of(name, description="a description"):
    return drawing_field(randomize(create_model(name)), description).data


@torch.no_grad()
def randomize(model):
    """Return a network with random weights and statistics, in evaluation mode."""
    for parameter in model.parameters():
        parameter.uniform_(-1, 1)
    for _ in range(10):
        model(torch.randn(16, 1, 28, 28))
    return model.eval()


@torch.no_grad()
def probabilities_of(model, images):
    """Return the probabilities `(N, 10)` for images `(N, 28, 28)` with pixels from 0 to 1."""
    return model((images[:, None] - MEAN) / STD).exp()


# ---- what a user does and sees ----


def draw(field, strokes, pointer="mouse"):
    """Move a mouse, a pen or a finger over the points of strokes."""
    box = field.get_by_role("img", name="Drawing field").bounding_box()
    for stroke in strokes:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        drag(field.page, points, pointer)


def drag(page, points, pointer):
    devtools = page.context.new_cdp_session(page)
    if pointer == "touch":
        kinds = ["touchStart", *["touchMove"] * (len(points) - 1), "touchEnd"]
    else:
        page.mouse.move(*points[0])  # without a button
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
    for kind, point in zip(kinds, [*points, points[-1]], strict=True):
        send(devtools, kind, point, pointer)


def send(devtools, kind, point, pointer="pen"):
    """Send an event of a finger, or of a mouse or a pen."""
    place = dict(zip("xy", point, strict=True))
    if kind.startswith("touch"):
        touches = [] if kind in ("touchEnd", "touchCancel") else [place]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
    else:
        event = {"button": "left", "buttons": 1, "clickCount": 1, "pointerType": pointer}
        devtools.send("Input.dispatchMouseEvent", {"type": kind, **place, **event})


def answer(field):
    """Return the prediction, shown with the next frame, and the texts beside the bars, such as "12.3 %"."""
    field.evaluate("() => new Promise(requestAnimationFrame)")
    return field.get_by_role("status").text_content(), field.locator(".bar span").all_text_contents()


def ink_of(field):
    return torch.tensor(field.evaluate("({ field }) => field.ink"))


def network_input(field):
    """Return the pixels `(28, 28)`, from 0 to 1, that the network gets."""
    return torch.tensor(field.evaluate("({ field }) => field.prepare(field.ink)"))


def is_empty(field):
    return answer(field) == ("", [""] * 10) and not ink_of(field).any()


def screen_of(element):
    """Return what the screen shows of an element, as brightness `(H, W)` from 0 to 1."""
    return read_picture(Image.open(io.BytesIO(element.screenshot())))


# ---- the network and its input ----


def every_kind_of_layer():
    model = Network()
    relu = nn.ReLU()
    model.layers = nn.Sequential(
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
    return model


@pytest.mark.parametrize("create", [*MODELS.values(), every_kind_of_layer])
def test_probabilities_equal_those_of_pytorch(show, create):
    model = randomize(create())
    images = torch.rand(50, 1, 1) * torch.rand(50, 28, 28)
    field = show(drawing_field(model, "").data)
    classify = "({ field }, images) => images.map((pixels) => field.classify(pixels))"
    actual = torch.tensor(field.evaluate(classify, images.tolist()))
    expected = probabilities_of(model, images)
    assert expected.std(dim=0).max() > 0.01  # neither uniform nor the same for all images
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strokes", [FOUR, ONE, SLANTED_ONE, LONG, CORNER, BEYOND_THE_EDGE])
def test_ink_is_what_the_screen_shows_and_network_input_that_of_find_digit(show, strokes):
    field = show(html_of("Model4"), **PHONE)
    draw(field, strokes)
    answer(field)
    ink = ink_of(field)
    assert (1 - screen_of(field.locator("svg")) - ink).abs().mean() < 0.002
    x, y = 252 * torch.tensor(list(itertools.chain.from_iterable(strokes))).T  # of the pointer
    box = torch.stack([y.min() - 10, y.max() + 10, x.min() - 10, x.max() + 10]).clamp(0, 252)
    assert bounding_box(ink > 0.5) == pytest.approx(box.tolist(), abs=1)
    picture = Image.fromarray((255 * (1 - ink)).round().byte().numpy())
    expected = find_digit(picture).input[0, 0] * STD + MEAN
    torch.testing.assert_close(network_input(field), expected, atol=0.001, rtol=0)


# ---- strokes and buttons ----


@pytest.mark.parametrize("pointer", ["mouse", "pen", "touch"])
def test_strokes_are_answered_like_pytorch_answers_them(show, pointer):
    model = randomize(create_model("Model4"))
    field = show(drawing_field(model, "").data, has_touch=True)
    draw(field, FOUR, pointer)
    digit, percentages = answer(field)
    pixels = network_input(field)
    expected = probabilities_of(model, pixels[None])[0]
    assert digit == str(expected.argmax().item())
    assert percentages == [f"{100 * probability:.1f} %" for probability in expected.tolist()]
    bars = "bars => bars.map((bar) => bar.getBoundingClientRect().width)"
    widths = torch.tensor(field.locator(".bar i").evaluate_all(bars))
    torch.testing.assert_close(widths / widths.sum(), expected, atol=0.01, rtol=0)
    shown = screen_of(field.locator("canvas"))[::4, ::4]
    assert (shown - pixels).abs().mean() < 0.005  # its corners are round
    assert field.locator("text").text_content() == ""  # no "draw a digit"


def test_phone_shows_the_buttons_and_scrolls_only_outside_the_field(show):
    field = show(html_of("Model4") + "<div style='height: 3000px'></div>", has_touch=True, **PHONE)
    assert field.page.evaluate("document.documentElement.scrollWidth") == PHONE["viewport"]["width"]
    box = field.get_by_role("button", name="Clear").bounding_box()
    assert box["y"] + box["height"] < PHONE["viewport"]["height"]
    draw(field, [[(0.5, 0.9 - 0.1 * step) for step in range(9)]], "touch")
    assert field.page.evaluate("scrollY") == 0
    drag(field.page, [(100, 340 - 10 * step) for step in range(9)], "touch")
    field.page.wait_for_function("scrollY > 0")
    assert field.get_attribute("data-prevent-swipe") == ""  # no stroke turns the page of slides


def test_right_button_canceled_touch_and_palm_do_not_draw(field):
    devtools = field.page.context.new_cdp_session(field.page)
    field.locator("svg").click(button="right")
    send(devtools, "touchStart", (80, 80))
    send(devtools, "touchCancel", (80, 80))
    assert is_empty(field)
    drag(field.page, [(80, 80), (180, 80), (120, 220)], "pen")
    seven = ink_of(field)
    field.get_by_role("button", name="Clear").click()
    send(devtools, "touchStart", (200, 200))
    send(devtools, "mousePressed", (80, 80))
    send(devtools, "touchMove", (240, 220))
    send(devtools, "mouseMoved", (180, 80))
    send(devtools, "touchEnd", (240, 220))
    send(devtools, "touchStart", (200, 200))
    send(devtools, "mouseMoved", (120, 220))
    send(devtools, "touchCancel", (200, 200))
    assert torch.equal(ink_of(field), seven)


def test_points_between_two_frames_are_drawn_with_one_prediction_even_if_they_are_many(field):
    field.locator("svg").hover(position={"x": 60, "y": 60})
    field.page.mouse.down()
    answer(field)
    frames = field.evaluate("""({ shadowRoot }) => {
        let frames = 0;
        const request = window.requestAnimationFrame;
        window.requestAnimationFrame = (show) => frames++ || request(show);
        const place = (x, y) => ({ pointerId: 1, clientX: 12 + x, clientY: 12 + y }); // in the field
        const move = new PointerEvent("pointermove", place(200, 200));
        move.getCoalescedEvents = () => [...Array(140_000).fill(place(60, 200)), move];
        shadowRoot.querySelector("svg").dispatchEvent(move);
        return new Promise(request).then(() => frames);
    }""")
    assert frames == 1
    assert ink_of(field)[180, 54] == 1


@pytest.mark.parametrize("keys", ["Control+z", "Meta+z"])
def test_keys_take_back_one_stroke_at_a_time(field, keys):
    notebook = "(e) => { if (e.key === 'z' && !e.shiftKey) throw Error('undone in a cell'); }"
    field.page.evaluate(f"addEventListener('keydown', {notebook})")
    draw(field, SEVEN)
    before = network_input(field)
    draw(field, ONE)
    field.page.keyboard.press("Shift+Control+z")  # redo elsewhere
    assert not torch.equal(network_input(field), before)
    field.page.keyboard.press(keys)
    assert torch.equal(network_input(field), before)
    field.page.keyboard.press(keys)
    field.page.keyboard.press(keys)  # nothing is left
    field.page.mouse.down()
    field.page.keyboard.press(keys)
    field.page.mouse.move(200, 200)
    assert is_empty(field)


def test_buttons_work_by_keyboard_with_visible_focus(field):
    draw(field, FOUR + SEVEN)
    for name in ("Undo", "Clear"):
        assert not is_empty(field)
        field.page.keyboard.press("Tab")
        button = field.get_by_role("button", name=name)
        assert button.evaluate("button => button.matches(':focus-visible')")
        assert button.evaluate("button => getComputedStyle(button).outlineWidth") == "3px"
        field.page.keyboard.press("Enter")
    assert is_empty(field)


def test_one_digit_is_predicted_and_two_side_by_side_are_not(field):
    draw(field, FOUR)
    assert answer(field)[0].isdigit()
    draw(field, [[(0.9, 0.2), (0.9, 0.8)]])
    assert answer(field) == ("This does not look like one digit.", [""] * 10)


# ---- pages ----


def test_two_fields_and_their_page_do_not_affect_each_other(show):
    page = "<style>html { direction: rtl } .bar { height: 50px }</style><button>page</button>"
    descriptions = ["the first", """<b>"the" second</b> & 'last' \\ {0}"""]
    html = page + html_of("Model4", descriptions[0]) + html_of("Model5", descriptions[1])
    fields = show(html, viewport={"width": 900, "height": 900})
    assert fields.locator(".description").all_text_contents() == descriptions
    draw(fields.last, SEVEN)
    assert is_empty(fields.first)
    assert answer(fields.last)[0].isdigit()
    assert fields.last.locator(".bar").first.bounding_box()["height"] == 28
    direction = "span => getComputedStyle(span).direction"
    assert fields.last.locator(".bar span").first.evaluate(direction) == "ltr"  # "1.0 %", not "% 1.0"
    margin = "button => getComputedStyle(button).marginRight"
    assert fields.page.locator("body > button").evaluate(margin) == "0px"


def test_field_works_in_the_page_of_a_notebook_that_inserts_it_later(show):
    output = nbformat.v4.new_output("display_data", {"text/html": html_of("Model4")})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])
    html, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    html = html.replace("<img", "\n<img")  # as formatters do
    html = html.replace('alt=""', 'alt="Image"')  # as JupyterLab does
    field = show("<div id=cell></div>")
    field.page.evaluate("html => { document.querySelector('#cell').innerHTML = html; }", html)
    draw(field, SEVEN)
    assert answer(field)[0].isdigit()
    assert TEXT not in field.page.inner_text("body")
    assert not field.page.locator("img").is_visible()


def test_page_itself_is_a_sentence_when_it_is_opened(show):
    page = show(PAGE.read_text(encoding="utf-8")).page
    assert re.fullmatch(r"This is the template .* S7\.ipynb.*", page.inner_text("body").strip())


@pytest.mark.parametrize("options", [{}, {"forced_colors": "active"}], ids=["dark theme", "forced colors"])
def test_strokes_bars_and_buttons_stand_out(show, options):
    field = show(f"<style>html {{ background: #111; color: #eee }}</style>{html_of('Model4')}", **options)
    draw(field, SEVEN)
    assert answer(field)[0].isdigit()
    background = screen_of(field.locator("svg"))[20, 20]
    for selector, contrast in [("svg", 0.6), (".bar.top i", 0.25), (".clear", 0.6)]:
        assert (screen_of(field.locator(selector)) - background).abs().max() > contrast

"""The drawing field in a real browser: probabilities, preprocessing, pointer events, page, layout."""

import base64
import io
import json
import os
import re

import pytest
import torch
from browser import Browser, find_browser
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import utils
from model import MODELS, Network, conv_block, create_model

CLASSIFY_TOLERANCE = 1e-4  # in probability: PyTorch computes in float32
PREPARE_TOLERANCE = 1e-5  # in gray levels from 0 to 1: `prepare_digit` returns float32 after normalization
SHOWN_TOLERANCE = 0.51 / 255  # half a level of the 8 bits of a canvas
PERCENT_TOLERANCE = 0.0005 + CLASSIFY_TOLERANCE  # half of the last digit of "12.3 %"
READABLE_CONTRAST = 4.5  # of text, WCAG 2.1, success criterion 1.4.3

# Strokes in shares of the field's side, from its top left corner.
SEVEN = [[(0.3, 0.2), (0.7, 0.2), (0.45, 0.85)]]
FOUR = [[(0.6, 0.15), (0.3, 0.55), (0.75, 0.55)], [(0.62, 0.4), (0.6, 0.85)]]
DOT = [[(0.4, 0.6)]]
DRAWINGS = [
    pytest.param(SEVEN, id="seven"),
    pytest.param(FOUR, id="two strokes"),
    pytest.param([[(0.5, 0.1), (0.51, 0.9)]], id="tall"),
    pytest.param([[(0.2, 0.5), (0.8, 0.5)]], id="wide"),
    pytest.param([[(0.01, 0.01), (0.3, 0.02), (0.02, 0.4)]], id="in a corner"),
    pytest.param([[(0.8, 0.8), (1.2, 0.7), (0.9, 0.95)]], id="beyond the edge"),
    pytest.param(DOT, id="dot"),
]


@pytest.fixture(scope="module")
def browser():
    """Return a running browser; skip the test, or fail if CI_REQUIRES_BROWSER is set, if there is none."""
    program = find_browser()
    if program is None:
        reason = "no Chromium or Chrome was found"
        if os.environ.get("CI_REQUIRES_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    running = Browser(program)
    yield running
    running.close()


@pytest.fixture
def show(browser):
    """Return a function that shows HTML in the page; afterwards, check that the page was quiet."""

    def show(body, head="", **window):
        check_quiet()
        browser.show(f"<!doctype html><meta charset='utf-8'>{head}<body style='margin: 0'>{body}", **window)
        return browser

    def check_quiet():
        """Check that the page requested nothing but itself and reported no error."""
        requests = [event["request"]["url"] for event in browser.received("Network.requestWillBeSent")]
        assert set(requests) <= {browser.url}
        for report in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            assert browser.received(report) == []

    yield show
    check_quiet()


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
    """Return the probabilities `(N, 10)` for images `(N, 784)` with pixels from 0 to 1."""
    images = pixels.float().reshape(-1, 1, 28, 28)
    return model((images - utils.MEAN) / utils.STD).exp()


class Field:
    """A drawing field of a page, by its position among them."""

    def __init__(self, page, index=0):
        self.page = page
        self.host = f"document.querySelectorAll('.drawing-field')[{index}]"

    def get(self, expression):
        """Return the value of an expression in which `host`, `root` and `field` are known."""
        names = f"const host = {self.host}; const root = host.shadowRoot; const field = host.field;"
        return self.page.evaluate(f"(() => {{ {names} return {expression}; }})()")

    def place(self, stroke):
        """Return the points of a stroke in the coordinates of the window."""
        box = self.get("root.querySelector('svg').getBoundingClientRect().toJSON()")
        return [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]

    def center_of(self, selector):
        """Return the center of an element in the coordinates of the window."""
        box = self.get(f"root.querySelector('{selector}').getBoundingClientRect().toJSON()")
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def draw(self, strokes):
        """Draw strokes with the mouse."""
        for stroke in strokes:
            self.page.drag_mouse(self.place(stroke))

    def answer(self):
        return self.get("root.querySelector('output').textContent")

    def percentages(self):
        """Return the texts beside the ten bars."""
        return self.get("[...root.querySelectorAll('.bar span')].map((span) => span.textContent)")

    def probabilities(self):
        """Return the probabilities `(10,)` that the texts beside the bars show, such as "12.3 %"."""
        return torch.tensor([float(text.removesuffix(" %")) / 100 for text in self.percentages()])

    def ink(self):
        """Return the drawing as a PIL image, black on transparent."""
        url = self.get("field.ink.canvas.toDataURL()")
        return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))

    def network_input(self):
        """Return the pixels `(784,)`, from 0 to 1, that the network gets."""
        return torch.tensor(self.get("[...field.prepare(field.ink)]"), dtype=torch.float64)

    def shown_input(self):
        """Return the pixels `(784,)`, from 0 to 1, of the image shown as the network's input."""
        canvas = "root.querySelector('canvas').getContext('2d')"
        data = torch.tensor(self.get(f"[...{canvas}.getImageData(0, 0, 28, 28).data]"))
        return data.reshape(-1, 4)[:, 0] / 255

    def is_empty(self):
        blank = self.answer() == "" and self.percentages() == [""] * 10
        widths = self.get("[...root.querySelectorAll('.bar i')].map((bar) => bar.clientWidth)")
        return blank and widths == [0] * 10 and self.ink().getbbox() is None and not self.shown_input().any()


@pytest.fixture
def field(show):
    """Return the field of a page with a random Model3."""
    return Field(show(utils.drawing_field(random_model("Model3"), "Model3").html))


def prepare_clean(picture):
    """Return the network input of a drawing, cropped as `prepare_digit` crops the digit that it finds.

    `prepare_digit` itself rejects what is not shaped like a digit; the field predicts from any stroke.
    """
    ink = pil_to_tensor(picture.getchannel("A"))[0] / 255
    ink = ink / ink.max()
    rows = (ink > utils.CROP_THRESHOLD).any(dim=1).nonzero()
    columns = (ink > utils.CROP_THRESHOLD).any(dim=0).nonzero()
    return utils.scale_and_center(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


# ---- the network ----


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_equal_those_of_pytorch(show, small, name):
    model = random_model(name)
    digits = small(50, train=False).images.reshape(-1, 784) / 255
    noise = torch.rand(50, 784)
    pixels = torch.cat([digits, noise])
    expected = probabilities_of(model, pixels)
    assert expected.std(dim=0).max() > 0.01  # neither uniform nor the same for all images
    field = Field(show(utils.drawing_field(model, name).html))
    numbers = json.dumps(pixels.tolist())
    actual = torch.tensor(field.get(f"{numbers}.map((pixels) => field.classify(pixels))"))
    torch.testing.assert_close(actual, expected, atol=CLASSIFY_TOLERANCE, rtol=0)


def test_layers_of_nested_containers_are_exported_in_order():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))),
        nn.Identity(),
        nn.Dropout(0.5),
        nn.AvgPool2d((7, 7)),
        nn.AdaptiveAvgPool2d((1, 1)),
    )
    layers = utils.export_layers(model)
    assert [layer["kind"] for layer in layers] == ["conv", "relu", "maxpool", "avgpool", "avgpool"]
    assert [layers[0][key] for key in ("channels", "kernel", "padding", "groups")] == [2, 3, 1, 1]
    assert [layer["size"] for layer in layers[2:]] == [2, 7, None]


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.Linear(10, 10), id="Linear"),
        pytest.param(nn.Conv2d(1, 1, 3), id="bias"),
        pytest.param(nn.Conv2d(1, 1, 3, stride=2, bias=False), id="stride"),
        pytest.param(nn.Conv2d(1, 1, 3, dilation=2, bias=False), id="dilation"),
        pytest.param(nn.Conv2d(1, 1, (3, 1), bias=False), id="kernel_size"),
        pytest.param(nn.Conv2d(1, 1, 3, padding="same", bias=False), id="padding"),
        pytest.param(nn.MaxPool2d(3, stride=2), id="stride of a pool"),
        pytest.param(nn.AvgPool2d(2, padding=1), id="padding of a pool"),
        pytest.param(nn.AdaptiveAvgPool2d(2), id="output_size"),
        pytest.param(nn.BatchNorm2d(1, affine=False), id="affine"),
    ],
)
def test_layer_that_the_page_cannot_compute_is_named(layer):
    model = nn.Sequential(nn.Sequential(nn.ReLU(), layer))
    with pytest.raises(ValueError, match=r"cannot compute .*0\.1") as caught:
        utils.export_layers(model)
    assert "\n" not in str(caught.value)
    assert str(layer) in str(caught.value)


class Skip(Network):
    """A network that draw.html cannot compute, because its `forward` skips a layer."""

    def __init__(self):
        super().__init__()
        self.block = conv_block(1, 10)
        self.skipped = conv_block(10, 10)
        self.gap = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.gap(self.block(x)).flatten(1).log_softmax(1)


def test_network_that_does_not_apply_its_layers_in_order_is_rejected():
    with pytest.raises(ValueError, match="^draw.html applies the layers in the order of their definition"):
        utils.drawing_field(Skip(), "Skip")


def test_missing_file_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path / 'draw.html'))}: copy"):
        utils.drawing_field(create_model("Model5"), "Model5")


def test_text_of_the_output_is_the_same_for_every_model():
    fields = [utils.drawing_field(random_model(name), name) for name in ("Model4", "Model5")]
    assert repr(fields[0]) == repr(fields[1])
    assert "\n" not in repr(fields[0])


# ---- drawing ----


@pytest.mark.parametrize("pointer", ["mouse", "finger"])
def test_strokes_are_answered_like_pytorch_answers_them(show, pointer):
    model = random_model("Model4")
    field = Field(show(utils.drawing_field(model, "Model4").html))
    assert field.is_empty()
    for stroke in FOUR:
        if pointer == "mouse":
            field.page.drag_mouse(field.place(stroke))
        else:
            field.page.drag_finger(field.place(stroke))
    expected = probabilities_of(model, field.network_input())[0]
    assert field.answer() == str(expected.argmax().item())
    torch.testing.assert_close(field.probabilities(), expected, atol=PERCENT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("strokes", DRAWINGS)
def test_network_input_equals_that_of_prepare_digit(field, strokes):
    field.draw(strokes)
    expected = prepare_clean(field.ink()).flatten().double() * utils.STD + utils.MEAN
    torch.testing.assert_close(field.network_input(), expected, atol=PREPARE_TOLERANCE, rtol=0)
    torch.testing.assert_close(field.shown_input().double(), expected, atol=SHOWN_TOLERANCE, rtol=0)


@pytest.mark.parametrize("width", [pytest.param(25, id="12.5 pixels"), pytest.param(27, id="13.5 pixels")])
def test_half_pixels_are_rounded_as_in_prepare_digit(field, width):
    """A rectangle whose scaled width lies halfway between two integers."""
    field.get(f"field.ink.fillRect(100, 100, {width}, 40)")
    expected = prepare_clean(field.ink()).flatten().double() * utils.STD + utils.MEAN
    torch.testing.assert_close(field.network_input(), expected, atol=PREPARE_TOLERANCE, rtol=0)


def test_clear_button_empties_the_field(field):
    field.draw(SEVEN)
    assert not field.is_empty()
    field.page.drag_mouse([field.center_of("button")])
    assert field.is_empty()
    assert field.get("root.querySelector('path').getAttribute('d')") == ""


def test_clear_button_works_by_keyboard_with_visible_focus(field):
    field.draw(SEVEN)
    field.page.press_key("Tab", 9)
    assert field.get("root.activeElement.textContent") == "Clear"
    assert field.get("getComputedStyle(root.activeElement).outlineStyle") == "solid"
    field.page.press_key("Enter", 13, text="\r")
    assert field.is_empty()


def test_right_button_does_not_draw(field):
    points = field.place([(0.2, 0.2), (0.6, 0.6)])
    field.page.move_mouse("mousePressed", points[0], button="right")
    field.page.move_mouse("mouseMoved", points[1], button="right")
    field.page.move_mouse("mouseReleased", points[1], button="right")
    assert field.is_empty()


def test_second_finger_does_not_draw(field):
    first, second, end = field.place([(0.2, 0.2), (0.8, 0.8), (0.8, 0.5)])
    field.page.move_fingers("touchStart", [first])
    field.page.move_fingers("touchStart", [first, second])
    field.page.move_fingers("touchMove", [first, end])
    field.page.move_fingers("touchEnd", [])
    left, top, right, bottom = field.ink().getbbox()
    assert max(right, bottom) < 0.5 * field.ink().width


def test_answer_does_not_depend_on_the_screen(show):
    html = utils.drawing_field(random_model("Model4"), "Model4").html
    inputs = []
    for width, density in [(900, 1), (250, 3)]:
        field = Field(show(html, width=width, density=density))
        field.draw(SEVEN)
        inputs.append(field.network_input())
    assert (inputs[0] - inputs[1]).abs().mean() < 0.01  # the pointer's position is rounded to whole pixels


# ---- the page around it ----


def test_dragging_a_finger_over_the_field_does_not_scroll(show):
    html = utils.drawing_field(random_model("Model4"), "Model4").html
    page = show(html + "<div style='height: 3000px'></div>", height=600)
    field = Field(page)
    page.drag_finger(field.place([(0.5, 0.9 - 0.1 * step) for step in range(9)]))
    assert page.evaluate("scrollY") == 0
    page.drag_finger([(300, 550 - 50 * step) for step in range(9)])  # below the field the page scrolls
    page.wait_until("scrollY > 0")


def test_two_fields_of_a_page_are_independent(show):
    models = {"Model4": random_model("Model4"), "Model5": random_model("Model5")}
    outputs = [
        utils.drawing_field(model, f"{name}: test accuracy 99.50 %").html for name, model in models.items()
    ]
    page = show("".join(outputs), height=900)
    first = Field(page, 0)
    second = Field(page, 1)
    second.draw(SEVEN)
    assert first.is_empty()
    expected = probabilities_of(models["Model5"], second.network_input())[0]
    torch.testing.assert_close(second.probabilities(), expected, atol=PERCENT_TOLERANCE, rtol=0)
    assert "Model4: test accuracy 99.50 %" in first.get("root.querySelector('.foot').textContent")
    assert "Model5: test accuracy 99.50 %" in second.get("root.querySelector('.foot').textContent")


def test_styles_of_field_and_page_do_not_affect_each_other(show):
    html = utils.drawing_field(random_model("Model5"), "Model5").html
    around = "<button class='bar foot' style='all: revert'>page</button><svg></svg>"
    styles = "['display', 'height', 'cursor', 'borderRadius'].map((name) => getComputedStyle(element)[name])"
    outside = "['button', 'svg'].map((tag) => { const element = document.querySelector(tag); return %s; })"
    alone = show(around).evaluate(outside % styles)
    assert show(around + html).evaluate(outside % styles) == alone
    rules = "<style>svg, button, canvas { display: none } .bar { height: 500px } i { width: 3px }</style>"
    inside = "['svg', 'button', '.bar'].map((tag) => { const element = root.querySelector(tag); return %s; })"
    expected = Field(show(html)).get(inside % styles)
    assert Field(show(html, head=rules)).get(inside % styles) == expected


@pytest.mark.parametrize(
    "run_script",
    [
        pytest.param("old.replaceWith(script)", id="in place, as JupyterLab"),
        pytest.param("old.remove(); cell.append(script); script.remove()", id="at the end, as VS Code"),
        pytest.param("(0, eval)(old.textContent)", id="without an element, as the classic notebook"),
    ],
)
def test_output_that_is_inserted_later_works(show, run_script):
    """`innerHTML` does not run scripts, so notebooks run them themselves, each in its own way."""
    page = show("<div id='cell'></div>")
    for name in ("Model4", "Model5"):
        html = json.dumps(utils.drawing_field(random_model(name), name).html).replace("</", "<\\/")
        page.evaluate(
            f"""{{
            const cell = document.createElement("div");
            document.body.append(cell);
            cell.innerHTML = {html};
            const old = cell.querySelector("script");
            const script = document.createElement("script");
            script.text = old.text;
            {run_script};
            }}"""
        )
    fields = [Field(page, 0), Field(page, 1)]
    for field, name in zip(fields, ("Model4", "Model5"), strict=True):
        field.draw(SEVEN)
        assert field.answer() != ""
        assert name in field.get("root.querySelector('.foot').textContent")


def test_without_scripts_one_line_says_how_to_see_the_field(show):
    html = utils.drawing_field(random_model("Model5"), "Model5").html
    text = "document.body.innerText"
    assert "S7.html" not in show(html).evaluate(text)
    without = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert re.fullmatch(r"\s*Draw a digit .* create S7\.html with .*\.\s*", show(without).evaluate(text))


def luminance(color):
    """Return the relative luminance of a color such as "rgb(17, 17, 17)" (WCAG 2.1)."""
    linear = []
    for text in re.findall(r"[\d.]+", color)[:3]:
        share = float(text) / 255
        linear.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Return the contrast ratio of two colors, from 1 to 21 (WCAG 2.1)."""
    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize(
    ("style", "system", "background"),
    [
        pytest.param("", "light", "rgb(255, 255, 255)", id="light"),
        pytest.param("", "dark", "rgb(255, 255, 255)", id="light page on a dark system"),
        pytest.param(":root { color-scheme: light dark }", "dark", "rgb(18, 18, 18)", id="dark system"),
        pytest.param("html { background: #111; color: #eee }", "light", "rgb(17, 17, 17)", id="dark theme"),
    ],
)
def test_field_is_legible_in_light_and_dark(show, style, system, background):
    html = utils.drawing_field(random_model("Model4"), "Model4").html
    page = show(html, head=f"<style>{style}</style>")
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": system}])
    field = Field(page)
    field.draw(SEVEN)
    (x, y), *_ = field.place([(0.1, 0.9)])
    picture = page.screenshot()
    assert f"rgb{picture.getpixel((int(x), int(y)))}" == background
    style_of = "getComputedStyle(root.querySelector('%s')).%s"
    for selector, color in [("path", "stroke"), ("output", "color"), (".bar", "color"), ("button", "color")]:
        assert contrast(field.get(style_of % (selector, color)), background) > READABLE_CONTRAST
    (x, y), *_ = field.place([(0.5, 0.2)])
    assert contrast(f"rgb{picture.getpixel((int(x), int(y)))}", background) > READABLE_CONTRAST


def test_narrow_screen_needs_no_horizontal_scrolling(show):
    html = utils.drawing_field(random_model("Model4"), "Model4").html
    page = show(html, width=360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_field_and_answer_are_accessible(field):
    assert field.get("root.querySelector('svg').getAttribute('aria-label')") == "Drawing field"
    assert field.get("root.querySelector('output').getAttribute('aria-live')") == "polite"
    tree = field.page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {node["role"]["value"] for node in tree if not node["ignored"]}
    assert {"image", "button", "status"} <= roles

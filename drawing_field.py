"""The drawing field: a trained network in a page, which recognizes digits as they are drawn.

`drawing_field` exports the layers of a network as numbers; `draw.html` draws the field and applies them. To
support another layer type, add its exporter to `EXPORTERS` and, if it is computed differently, its function
to `LAYERS` in `draw.html`.
"""

import base64
import copy
import html
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from IPython.display import HTML, Pretty
from torch import nn

from utils import MEAN, SIDE, STD, unwrap

PAGE = Path(__file__).with_name("draw.html")
TEXT = (
    "Drawing field: it needs scripts, which are blocked or removed here. In Jupyter or VS Code, trust the "
    "notebook or run it; in a browser, allow scripts; if the site removes them, as GitHub does, download the "
    "notebook and run it."
)
# Sanitizers escape the tags that they do not know, as nbconvert does, or remove them and keep the text. Both
# keep the text of <i> and drop its attributes. A notebook may insert the output later, when scripts no longer
# run by themselves; an image without a source reports an error in every case. JupyterLab would show a text in
# its place, so it is hidden.
OUTPUT = (
    '<i class="drawing-field" data-network="{}" data-markup="{}" data-program="{}">{}</i>'
    '<img alt="" style="display: none" src="" onerror="{}">'
)
# The handler of the image. In the handler itself, the program would be many times slower, because every name
# is looked up in the element first; pages may forbid `Function(...)`, but then allow a script element.
START = """
  const sentence = this.previousElementSibling;
  const script = document.createElement("script");
  script.text = `document.currentScript.run = function () {${sentence.dataset.program}};`;
  document.head.appendChild(script).remove();
  script.run.call(sentence);
"""


class DrawingField(HTML):
    """The drawing field, displayed as HTML in a notebook and as a sentence elsewhere."""

    def __repr__(self):
        return TEXT


def drawing_field(model, description):
    """Return a `DrawingField` for a network, which a notebook displays.

    `model` maps images `(B, 1, 28, 28)` to scores `(B, 10)`, log-probabilities for example. It is not
    changed, and may be on any device. The page needs no kernel, no server and no network connection: the
    program of `draw.html` and the weights are embedded. `description` is shown under the field.

    If `draw.html` cannot compute the network, return a text with the reason, which a notebook displays, too.
    """
    model = copy.deepcopy(unwrap(model)).cpu().double().eval()  # first to the CPU: MPS has no float64
    try:
        layers = export_layers(model)
        check_order(model)
    except ValueError as error:
        return Pretty(f"No drawing field: {error}")
    network = json.dumps({"description": description, "mean": MEAN, "std": STD, "layers": layers})
    template = PAGE.read_text(encoding="utf-8").partition("<template>")[2]
    markup, _, script = template.partition("<script>")
    parts = [network, markup, script.partition("</script>")[0], TEXT, START]
    output = OUTPUT.format(*map(html.escape, parts))
    return DrawingField(output.replace("\n", "&#10;").replace("`", "&#96;"))  # they end HTML in Markdown


def export_layers(model):
    """Return the layers of a model in evaluation mode, in their order, as dictionaries for `draw.html`.

    Dropout and identity are left out. Raise ValueError, naming the layer, if `draw.html` cannot compute one.
    """
    layers = []
    for name, layer in innermost_layers(model):
        if type(layer) not in EXPORTERS:
            raise ValueError(f"draw.html cannot compute the layer {name}, {layer}: add it to EXPORTERS")
        export = EXPORTERS[type(layer)]
        if export is not None:
            layers.append(export(name, layer))
    return layers


def innermost_layers(model):
    """Return the layers of a model that contain no others, in the order of their definition, with names."""
    layers = []
    for name, layer in model.named_modules(remove_duplicate=False):
        if not list(layer.children()):
            layers.append((name, layer))
    return layers


@torch.no_grad()
def check_order(model):
    """Raise ValueError unless a model only applies its layers one after the other, as `draw.html` does."""
    data = torch.linspace(0, 1, SIDE * SIDE, dtype=torch.float64)  # no random numbers: their state is kept
    data = data.reshape(1, 1, SIDE, SIDE)
    try:
        expected = F.log_softmax(model(data), dim=1)
        for _, layer in innermost_layers(model):
            data = layer(data)
        output = F.log_softmax(data.flatten(1), dim=1)
        same = output.shape == expected.shape and torch.allclose(output, expected, atol=1e-6)
    except RuntimeError:  # the shape does not fit
        same = False
    if not same:
        raise ValueError(
            "draw.html applies the layers in the order of their definition, then softmax; this model's "
            "forward computes something else, such as F.softmax, F.relu or a skip connection"
        )


# ---- layers ----


def check(name, layer, **required):
    """Raise ValueError unless the options have the required values, as one number or as height and width.

    A layer may lack some of the options.
    """
    for option, value in required.items():
        if getattr(layer, option, value) not in (value, (value, value)):
            raise ValueError(f"draw.html cannot compute the {option} of the layer {name}, {layer}")


def export_conv(name, layer):
    kernel = layer.kernel_size[0]
    padding = layer.padding[0]
    check(name, layer, kernel_size=kernel, padding=padding, stride=1, dilation=1, padding_mode="zeros")
    bias = layer.bias
    if bias is None:
        bias = layer.weight.new_zeros(layer.out_channels)
    return {
        "kind": "Conv2d",
        "kernel": kernel,
        "padding": padding,
        "groups": layer.groups,
        "weight": encode(layer.weight),
        "bias": encode(bias),
    }


def export_batch_norm(name, layer):
    """Return a BatchNorm as the depthwise 1×1 convolution that it is in evaluation."""
    check(name, layer, affine=True, track_running_stats=True)
    scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
    shift = layer.bias - layer.running_mean * scale
    return {
        "kind": "Conv2d",
        "kernel": 1,
        "padding": 0,
        "groups": layer.num_features,
        "weight": encode(scale),
        "bias": encode(shift),
    }


def encode(tensor):
    """Return the numbers of a tensor as text: float32, little-endian, in base64."""
    numbers = tensor.detach().numpy().astype("<f4")
    return base64.b64encode(numbers.tobytes()).decode()


def export_relu(name, layer):
    return {"kind": "ReLU"}


def export_pool(name, layer):
    """Return a pool that combines squares side by side."""
    size = layer.kernel_size
    if isinstance(size, tuple):
        size = size[0]
    check(name, layer, kernel_size=size, stride=size, padding=0, ceil_mode=False)
    check(name, layer, dilation=1, divisor_override=None)
    return {"kind": type(layer).__name__, "size": size}


def export_global_avg_pool(name, layer):
    check(name, layer, output_size=1)
    return {"kind": "AvgPool2d", "size": None}  # of the whole image


EXPORTERS = {
    nn.Conv2d: export_conv,
    nn.BatchNorm2d: export_batch_norm,
    nn.ReLU: export_relu,
    nn.MaxPool2d: export_pool,
    nn.AvgPool2d: export_pool,
    nn.AdaptiveAvgPool2d: export_global_avg_pool,
    nn.Dropout: None,
    nn.Identity: None,
}

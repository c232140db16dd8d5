"""The drawing field: a trained network in a page, which recognizes digits as they are drawn.

`drawing_field` exports the layers of a network as numbers; `draw.html` draws the field and applies them. To
support another layer type, add its exporter to `EXPORTERS` and, if it is computed differently, its function
to `LAYERS` in `draw.html`.
"""

import copy
import html
import json
import re
from pathlib import Path

import torch
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
    changed, and may be on any device. The page needs no kernel, no server and no Internet: the program of
    `draw.html` and the weights, with nine decimals, are embedded. `description` is shown under the field.

    If `draw.html` cannot compute the network, return a text with the reason, which a notebook displays, too.
    """
    model = copy.deepcopy(unwrap(model)).cpu().double().eval()  # first to the CPU: MPS has no float64
    try:
        layers = export_layers(model)
    except ValueError as error:
        return Pretty(f"No drawing field: {error}")
    data = {"description": description, "mean": MEAN, "std": STD, "layers": layers}
    network = json.dumps(data, default=lambda tensor: tensor.round(decimals=9).tolist())
    _, markup, program, _ = re.split("<template>|<script>|</script>", PAGE.read_text(encoding="utf-8"))
    parts = [network, markup, program, TEXT, START]
    output = OUTPUT.format(*map(html.escape, parts))
    return DrawingField(output.replace("\n", "&#10;").replace("`", "&#96;"))  # they end HTML in Markdown


@torch.no_grad()
def export_layers(model):
    """Return the layers of a model in evaluation mode, in their order, as dictionaries for `draw.html`.

    Dropout and identity are left out. Raise ValueError if `draw.html` cannot compute a layer, naming it, or
    if the model does not only apply its layers one after the other, as `draw.html` does.
    """
    modules = model.named_modules(remove_duplicate=False)
    innermost = {name: layer for name, layer in modules if not list(layer.children())}
    layers = []
    for name, layer in innermost.items():
        if type(layer) not in EXPORTERS:
            raise ValueError(f"draw.html cannot compute the layer {name}, {layer}: add it to EXPORTERS")
        export = EXPORTERS[type(layer)]
        if export is not None:
            layers.append(export(name, layer))
    image = torch.linspace(0, 1, SIDE * SIDE, dtype=torch.float64)  # no random numbers: their state is kept
    image = image.view(1, 1, SIDE, SIDE)
    try:
        scores = nn.Sequential(*innermost.values())(image).flatten(1)
        torch.testing.assert_close(scores.log_softmax(dim=1), model(image).log_softmax(dim=1))
    except (RuntimeError, AssertionError) as error:  # a shape does not fit, or the scores differ
        raise ValueError(
            "draw.html applies the layers in the order of their definition, then softmax; this model's "
            "forward computes something else, such as F.softmax, F.relu or a skip connection"
        ) from error
    return layers


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
    return {"kind": "Conv2d", "weight": layer.weight, "bias": layer.bias, "padding": padding}


def export_batch_norm(name, layer):
    """Return a BatchNorm as the depthwise 1×1 convolution that it is in evaluation."""
    check(name, layer, affine=True, track_running_stats=True)
    scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
    shift = layer.bias - layer.running_mean * scale
    return {"kind": "Conv2d", "weight": scale.view(-1, 1, 1, 1), "bias": shift, "padding": 0}


def export_pool(name, layer):
    """Return a pool that combines squares side by side."""
    size = layer.kernel_size
    if isinstance(size, tuple):
        size = size[0]
    check(name, layer, kernel_size=size, stride=size, padding=0, ceil_mode=False)
    check(name, layer, dilation=1, divisor_override=None)
    return {"kind": type(layer).__name__, "size": size}


def export_type(name, layer):
    check(name, layer, output_size=1)  # of a pool
    return {"kind": type(layer).__name__}


EXPORTERS = {
    nn.Conv2d: export_conv,
    nn.BatchNorm2d: export_batch_norm,
    nn.ReLU: export_type,
    nn.MaxPool2d: export_pool,
    nn.AvgPool2d: export_pool,
    nn.AdaptiveAvgPool2d: export_type,
    nn.Dropout: None,
    nn.Identity: None,
}

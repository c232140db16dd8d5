"""The networks, against their layouts written out layer by layer with torch.nn alone."""

import pytest
import torch
from torch import nn

import model as models
import utils


def block(i, o, p=0, drop=None):
    layers = [nn.Conv2d(i, o, 3, padding=p, bias=False), nn.ReLU(), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([nn.Dropout(drop)] if drop else []))


def alone(i, o, k):
    return nn.Sequential(nn.Conv2d(i, o, k, bias=False))


def published(name, d=0.1):
    """The published network, with its attributes' names."""
    if name == "Model1":
        last = [nn.Conv2d(10, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.Dropout(d)]
        names = "convblock1 convblock2 convblock3 pool1 convblock4 convblock5 pool2 convblock6 gap convblock7"
        layers = [block(1, 8, drop=d), block(8, 16, drop=d), alone(16, 10, 1), nn.MaxPool2d(2, 2)]
        layers += [block(10, 10, drop=d), block(10, 10, 1, d), nn.MaxPool2d(2, 2), block(10, 10, 1, d)]
        layers += [nn.Sequential(nn.AvgPool2d(5)), nn.Sequential(*last)]
    else:
        names = "convblock1 convblock2 convblock3 pool1 " + " ".join(f"convblock{n}" for n in range(4, 10))
        layers = [block(1, 8), block(8, 16), alone(16, 10, 1), nn.MaxPool2d(2, 2), block(10, 10)]
        layers += [block(10, 16), block(16, 10), block(10, 10), block(10, 10), alone(10, 10, 2)]
    network = nn.Sequential()
    for attribute, layer in zip(names.split(), layers, strict=True):
        network.add_module(attribute, layer)
    return network


def separable(widths):
    """Model4's layout, in one row and in torch's usual memory order."""
    layers = [nn.Conv2d(1, widths[0], 3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for number, (i, o) in enumerate(zip(widths, widths[1:]), 2):
        depthwise, mix = nn.Conv2d(i, i, 3, groups=i, bias=False), nn.Conv2d(i, o, 1, bias=False)
        layers += [depthwise, nn.BatchNorm2d(i), mix, nn.BatchNorm2d(o), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number == 3 else []
    return nn.Sequential(*layers, nn.AvgPool2d(3), nn.Conv2d(widths[-1], 10, 1, bias=False))


LAYOUTS = {
    "Model1": (published("Model1"), 4312),
    "Model2": (published("Model2"), 7524),
    "Model3": (published("Model3"), 7524),
    "Model4": (separable([16, 16, 24, 32, 36, 36, 36]), 7808),
    "Model5": (separable([14, 14, 16, 24, 24, 24, 20]), 4310),
}


@pytest.mark.parametrize("name", models.MODELS)
def test_the_layout_with_the_same_weights_gives_the_same_output(name):
    """In float64, training and then testing with the statistics that training left."""
    (layout, count), ours = LAYOUTS[name], models.create_model(name)
    weights = [p for p in ours.parameters() if p.dim() == 4]
    assert all(w.is_contiguous(memory_format=models.MODELS[name].memory_format) for w in weights)
    assert sum(p.numel() for p in ours.parameters()) == count
    state, images = layout.state_dict(), torch.randn(16, 1, 28, 28).double() * 2 + 1
    if not isinstance(layout[0], nn.Sequential):  # the row has other names
        state = dict(zip(ours.state_dict(), state.values(), strict=True))
    ours.load_state_dict(state, strict=True)
    for training in (True, False):
        outputs = []
        for network in (layout, ours):
            torch.manual_seed(3)
            outputs.append(network.double().train(training)(images).flatten(1))
        torch.testing.assert_close(outputs[1], torch.log_softmax(outputs[0], dim=1))


@pytest.mark.parametrize(
    "name, fields, mult_adds",
    [
        # by hand: r += (kernel - 1) · jump over the convolutions and pools, in order, and
        # 72·26² + 1152·24² + 160·24² + 900·10² + 900·10² + 900·5² + 100, + 128 of BatchNorm
        ("Model1", [3, 5, 5, 6, 10, 14, 16, 24, 40, 40], 1_007_112),
        ("Model3", [3, 5, 5, 6, 10, 14, 18, 22, 26, 28], 1_056_944),
        # 144·(26² + 24² + 22²) + 256·24² + 384·22² + (216 + 768)·9² + (288 + 1152)·7²
        # + (324 + 1296)·(5² + 3²) + 360, + 712 of BatchNorm
        ("Model4", [3, 5, 5, 7, 7, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28], 789_712),
    ],
)
def test_the_summary(name, fields, mult_adds):
    model = models.create_model(name)
    *lines, total = [line.split() for line in utils.summarise(model).splitlines()[1:]]
    spatial = [line for line in lines if "Conv" in line[1] or "Pool" in line[1]]
    assert [int(line[-1]) for line in spatial] == fields
    count = sum(p.numel() for p in model.parameters())
    assert total == ["total", f"{count:,}", f"{mult_adds:,}", str(fields[-1])]
    assert sum(int(line[-3].replace(",", "")) for line in lines) == count
    assert "Units" not in utils.summarise(model)

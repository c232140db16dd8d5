"""The networks against references in plain torch.nn; adding a network."""

import itertools
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import utils
from model import MODELS, Model1, Network, conv, conv_block, create_model

# ---- references in plain torch.nn ----


def published_block(inputs, outputs, padding=0, dropout=0):
    layers = [nn.Conv2d(inputs, outputs, 3, padding=padding, bias=False), nn.ReLU(), nn.BatchNorm2d(outputs)]
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def bare_conv(inputs, outputs, kernel_size):
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size, bias=False))


def reference_model1(dropout=0.1):
    """Return the published Model1, with the names of its attributes."""
    layers = OrderedDict(
        convblock1=published_block(1, 8, dropout=dropout),
        convblock2=published_block(8, 16, dropout=dropout),
        convblock3=bare_conv(16, 10, kernel_size=1),
        pool1=nn.MaxPool2d(2, 2),
        convblock4=published_block(10, 10, dropout=dropout),
        convblock5=published_block(10, 10, padding=1, dropout=dropout),
        pool2=nn.MaxPool2d(2, 2),
        convblock6=published_block(10, 10, padding=1, dropout=dropout),
        gap=nn.AvgPool2d(5),
        convblock7=bare_conv(10, 10, kernel_size=1),
    )
    layers["convblock7"].extend([nn.BatchNorm2d(10), nn.ReLU(), nn.Dropout(dropout)])
    return nn.Sequential(layers)


def reference_model2():
    """Return the published Model2, which is also Model3, with the names of its attributes."""
    layers = OrderedDict(
        convblock1=published_block(1, 8),
        convblock2=published_block(8, 16),
        convblock3=bare_conv(16, 10, kernel_size=1),
        pool1=nn.MaxPool2d(2, 2),
        convblock4=published_block(10, 10),
        convblock5=published_block(10, 16),
        convblock6=published_block(16, 10),
        convblock7=published_block(10, 10),
        convblock8=published_block(10, 10),
        convblock9=bare_conv(10, 10, kernel_size=2),
    )
    return nn.Sequential(layers)


def reference_plain(*widths):
    """Return a network of 3×3 convolutions with these output channels, with a pool after the second block."""
    layers = []
    for inputs, outputs in itertools.pairwise([1, *widths]):
        layers += [nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(widths[-1], 10, 1, bias=False))


def reference_separable(*widths):
    """Return a depthwise-separable network of these output channels, with a pool after the second block."""
    layers = [nn.Conv2d(1, widths[0], 3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [
            nn.Conv2d(inputs, inputs, 3, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    layers.insert(8, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(widths[-1], 10, 1, bias=False))


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        pytest.param(create_model("Model1"), reference_model1(), id="Model1"),
        pytest.param(Model1(dropout=0), reference_model1(dropout=0), id="Model1 without dropout"),
        pytest.param(create_model("Model2"), reference_model2(), id="Model2"),
        pytest.param(create_model("Model3"), reference_model2(), id="Model3"),
        pytest.param(create_model("Model4"), reference_plain(8, 8, 12, 14, 16, 16), id="Model4"),
        pytest.param(create_model("Model5"), reference_separable(16, 16, 24, 24, 24, 28), id="Model5"),
    ],
)
def test_model_has_the_outputs_and_gradients_of_its_reference(model, reference):
    """An in-place ReLU must change neither the data nor what another layer needs for its gradients."""
    state = reference.state_dict()
    if hasattr(model, "block1"):  # the flat reference of Models 4 and 5 has other names
        state = dict(zip(model.state_dict(), state.values(), strict=True))
    model.load_state_dict(state, strict=True)
    model.double()
    reference.double()
    data = torch.randn(16, 1, 28, 28, dtype=torch.float64) * 2 + 1
    before = data.clone()
    for mode in (True, False):  # the evaluation uses the statistics of the training
        torch.manual_seed(3)  # of dropout
        output = model.train(mode)(data)
        torch.manual_seed(3)
        expected = reference.train(mode)(before).flatten(1).log_softmax(dim=1)
        assert torch.equal(data, before)
        torch.testing.assert_close(output, expected)
        output[:, 3].sum().backward()
        expected[:, 3].sum().backward()
        for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.parametrize("name", MODELS)
def test_separable_network_computes_in_channels_last(name):
    """What the pool gets has several channels and rows, so its strides are those of one format only."""
    strides = []
    model = create_model(name)
    for layer in model.modules():
        if isinstance(layer, nn.MaxPool2d):
            layer.register_forward_pre_hook(lambda module, inputs: strides.append(inputs[0].stride(1)))
    model(torch.zeros(2, 1, 28, 28))
    assert (strides[0] == 1) == (name == "Model5")


class Tiny(Network):
    """A network as someone may add it."""

    def __init__(self):
        super().__init__()
        self.block = conv_block(1, 16)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.logits = conv(16, 10)


def test_network_added_as_the_readme_says_works_in_the_notebook(monkeypatch):
    monkeypatch.setitem(MODELS, "Tiny", Tiny)
    monkeypatch.setitem(utils.RECIPES, "Tiny", utils.Recipe(dict(lr=0.1), StepLR, dict(step_size=1)))
    utils.check_settings("Tiny", epochs=1, batch_size=None, seed=1, resume=False, checkpoints="runs")
    output = create_model("Tiny")(torch.randn(4, 1, 28, 28))
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(4))

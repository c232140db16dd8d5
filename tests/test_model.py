"""The networks against references in plain torch.nn."""

import itertools
from collections import OrderedDict

import pytest
import torch
from torch import nn

from model import MODELS, Model1, create_model


def published_block(inputs, outputs, padding=0, dropout=0):
    convolution = nn.Conv2d(inputs, outputs, 3, padding=padding, bias=False)
    return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(outputs), nn.Dropout(dropout))


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


def reference_of_blocks(*widths, separable):
    """Return a network of blocks with these output channels, and a pool after the second one."""
    layers = [nn.Conv2d(1, widths[0], 3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), 2):
        kernel_size = 3
        if separable:
            layers += [nn.Conv2d(inputs, inputs, 3, groups=inputs, bias=False), nn.BatchNorm2d(inputs)]
            kernel_size = 1
        layers += [nn.Conv2d(inputs, outputs, kernel_size, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        if number == 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(widths[-1], 10, 1, bias=False))


MODEL4 = reference_of_blocks(8, 8, 12, 14, 16, 16, separable=False)
MODEL5 = reference_of_blocks(16, 16, 24, 24, 24, 28, separable=True)


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        pytest.param(create_model("Model1"), reference_model1(), id="Model1"),
        pytest.param(Model1(dropout=0), reference_model1(dropout=0), id="Model1 without dropout"),
        pytest.param(create_model("Model2"), reference_model2(), id="Model2"),
        pytest.param(create_model("Model3"), reference_model2(), id="Model3"),
        pytest.param(create_model("Model4"), MODEL4, id="Model4"),
        pytest.param(create_model("Model5"), MODEL5, id="Model5"),
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
def test_only_model5_computes_in_channels_last(name):
    """What two blocks give has several channels and rows, so its strides are those of one format only."""
    blocks = list(create_model(name).children())[:2]
    output = nn.Sequential(*blocks)(torch.zeros(2, 1, 28, 28))
    assert output.is_contiguous(memory_format=torch.channels_last) == (name == "Model5")

"""The networks, checked against independent reference implementations in plain torch.nn."""

from collections import OrderedDict

import pytest
import torch
from helpers import WIDTHS
from torch import nn

from model import MODELS, Model1, create_model
from utils import RECIPES


def conv_block(inputs, outputs, padding, dropout):
    layers = [
        nn.Conv2d(inputs, outputs, 3, padding=padding, bias=False),
        nn.ReLU(),
        nn.BatchNorm2d(outputs),
    ]
    if dropout:
        layers.append(nn.Dropout(0.1))
    return nn.Sequential(*layers)


def bare_conv(inputs, outputs, kernel_size):
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size, bias=False))


def reference_model1():
    """Return the published Model1, with the names of its attributes."""
    last_block = nn.Sequential(
        nn.Conv2d(10, 10, 1, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Dropout(0.1),
    )
    layers = OrderedDict()
    layers["convblock1"] = conv_block(1, 8, padding=0, dropout=True)
    layers["convblock2"] = conv_block(8, 16, padding=0, dropout=True)
    layers["convblock3"] = bare_conv(16, 10, kernel_size=1)
    layers["pool1"] = nn.MaxPool2d(2, 2)
    layers["convblock4"] = conv_block(10, 10, padding=0, dropout=True)
    layers["convblock5"] = conv_block(10, 10, padding=1, dropout=True)
    layers["pool2"] = nn.MaxPool2d(2, 2)
    layers["convblock6"] = conv_block(10, 10, padding=1, dropout=True)
    layers["gap"] = nn.Sequential(nn.AvgPool2d(5))
    layers["convblock7"] = last_block
    return nn.Sequential(layers)


def reference_model2():
    """Return the published Model2, which is also Model3, with the names of its attributes."""
    layers = OrderedDict()
    layers["convblock1"] = conv_block(1, 8, padding=0, dropout=False)
    layers["convblock2"] = conv_block(8, 16, padding=0, dropout=False)
    layers["convblock3"] = bare_conv(16, 10, kernel_size=1)
    layers["pool1"] = nn.MaxPool2d(2, 2)
    layers["convblock4"] = conv_block(10, 10, padding=0, dropout=False)
    layers["convblock5"] = conv_block(10, 16, padding=0, dropout=False)
    layers["convblock6"] = conv_block(16, 10, padding=0, dropout=False)
    layers["convblock7"] = conv_block(10, 10, padding=0, dropout=False)
    layers["convblock8"] = conv_block(10, 10, padding=0, dropout=False)
    layers["convblock9"] = bare_conv(10, 10, kernel_size=2)
    return nn.Sequential(layers)


def reference_separable(widths):
    """Return a depthwise-separable network as a flat `Sequential` in the default memory format."""
    first_width = widths.before_pool[0]
    layers = [nn.Conv2d(1, first_width, 3, bias=False), nn.BatchNorm2d(first_width), nn.ReLU()]
    inputs = first_width
    for outputs in widths.before_pool[1:]:
        layers += separable_layers(inputs, outputs)
        inputs = outputs
    layers.append(nn.MaxPool2d(2))
    for outputs in widths.after_pool:
        layers += separable_layers(inputs, outputs)
        inputs = outputs
    layers.append(nn.AdaptiveAvgPool2d(1))
    layers.append(nn.Conv2d(inputs, 10, 1, bias=False))
    return nn.Sequential(*layers)


def separable_layers(inputs, outputs):
    return [
        nn.Conv2d(inputs, inputs, 3, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def reference(name):
    """Return the reference implementation of a model, by name."""
    if name == "Model1":
        return reference_model1()
    if name in ("Model2", "Model3"):
        return reference_model2()
    return reference_separable(WIDTHS[name])


def create_with_reference(name):
    """Return a model and its reference, in float64 and with the same weights."""
    model = create_model(name).double()
    expected = reference(name).double()
    state = expected.state_dict()
    if name in WIDTHS:  # the flat reference has other parameter names
        state = OrderedDict(zip(model.state_dict(), state.values(), strict=True))
    model.load_state_dict(state, strict=True)
    return model, expected


def images():
    return torch.randn(16, 1, 28, 28, dtype=torch.float64) * 2 + 1


def assert_same_output(model, expected, data):
    torch.manual_seed(3)  # of dropout
    output = model(data)
    torch.manual_seed(3)
    logits = expected(data).flatten(1)
    assert output.shape == (16, 10)
    torch.testing.assert_close(output, torch.log_softmax(logits, dim=1))


every_model = pytest.mark.parametrize("name", MODELS)


def test_every_model_has_a_recipe():
    assert MODELS.keys() == RECIPES.keys()


@every_model
def test_model_matches_reference_with_same_weights_in_training_mode(name):
    model, expected = create_with_reference(name)
    assert_same_output(model.train(), expected.train(), images())


@every_model
def test_model_matches_reference_with_the_statistics_of_training(name):
    model, expected = create_with_reference(name)
    data = images()
    assert_same_output(model.train(), expected.train(), data)  # updates the running statistics
    assert_same_output(model.eval(), expected.eval(), data)


@every_model
def test_model_and_reference_have_the_same_gradients(name):
    """An in-place ReLU must not change what another layer needs."""
    model, expected = create_with_reference(name)
    data = images()
    torch.manual_seed(3)
    model(data)[:, 3].sum().backward()
    torch.manual_seed(3)
    torch.log_softmax(expected(data).flatten(1), dim=1)[:, 3].sum().backward()
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param("Model1", 4312, id="Model1"),
        pytest.param("Model2", 7524, id="Model2"),
        pytest.param("Model3", 7524, id="Model3"),
        pytest.param("Model4", 7824, id="Model4"),
        pytest.param("Model5", 4296, id="Model5"),
    ],
)
def test_number_of_parameters(name, count):
    parameters = create_model(name).parameters()
    assert sum(parameter.numel() for parameter in parameters) == count


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [
        pytest.param("Model1", torch.contiguous_format, id="Model1"),
        pytest.param("Model2", torch.contiguous_format, id="Model2"),
        pytest.param("Model3", torch.contiguous_format, id="Model3"),
        pytest.param("Model4", torch.channels_last, id="Model4"),
        pytest.param("Model5", torch.channels_last, id="Model5"),
    ],
)
def test_weights_are_in_the_memory_format(name, memory_format):
    for parameter in create_model(name).parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=memory_format)


@every_model
def test_input_is_not_changed(name):
    data = torch.randn(4, 1, 28, 28)
    before = data.clone()
    create_model(name)(data)
    assert torch.equal(data, before)


def test_dropout_of_model1_can_be_disabled():
    model = Model1(dropout=0.0).train()
    data = torch.randn(4, 1, 28, 28)
    assert torch.equal(model(data), model(data))


def test_same_seed_gives_the_same_weights():
    torch.manual_seed(1)
    first = create_model("Model4")
    torch.manual_seed(1)
    second = create_model("Model4")
    for parameter, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_unknown_model_is_rejected():
    with pytest.raises(ValueError, match="^unknown model 'Model9': choose one of Model1, Model2, Model3, "):
        create_model("Model9")

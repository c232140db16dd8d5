"""The export of a network for the drawing field: what is left out, folded and refused."""

import copy

import pytest
import torch
from torch import nn

import drawing_field
from model import Network, conv_block, create_model


def test_layers_of_nested_containers_are_exported_in_order():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))),
        nn.Identity(),
        nn.Dropout(0.5),
        nn.AvgPool2d((7, 7)),
        nn.AdaptiveAvgPool2d((1, 1)),
    )
    layers = drawing_field.export_layers(model)
    assert [layer["kind"] for layer in layers] == ["conv", "relu", "maxpool", "avgpool", "avgpool"]
    assert (layers[0]["kernel"], layers[0]["padding"], layers[0]["groups"]) == (3, 1, 1)
    assert (layers[2]["size"], layers[3]["size"], layers[4]["size"]) == (2, 7, None)


def test_batch_norm_is_folded_only_into_a_convolution_directly_before_it():
    before_relu = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    after_relu = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(4))
    kinds = []
    for model in (before_relu, after_relu):
        kinds.append([layer["kind"] for layer in drawing_field.export_layers(model)])
    assert kinds == [["conv", "relu"], ["conv", "relu", "conv"]]


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.Linear(10, 10), id="Linear"),
        pytest.param(nn.Conv2d(1, 1, 3, stride=2), id="stride"),
        pytest.param(nn.Conv2d(1, 1, 3, dilation=2), id="dilation"),
        pytest.param(nn.Conv2d(1, 1, (3, 1)), id="kernel_size"),
        pytest.param(nn.Conv2d(1, 1, 3, padding="same"), id="padding"),
        pytest.param(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), id="padding_mode"),
        pytest.param(nn.MaxPool2d(3, stride=2), id="stride of a pool"),
        pytest.param(nn.AvgPool2d(2, padding=1), id="padding of a pool"),
        pytest.param(nn.AdaptiveAvgPool2d(2), id="output_size"),
        pytest.param(nn.BatchNorm2d(1, affine=False), id="affine"),
    ],
)
def test_layer_that_the_page_cannot_compute_is_named(layer):
    model = nn.Sequential(nn.Sequential(nn.ReLU(), layer))
    with pytest.raises(ValueError, match=r"cannot compute .*0\.1") as caught:
        drawing_field.export_layers(model)
    assert "\n" not in str(caught.value)
    assert str(layer) in str(caught.value)


class Irregular(Network):
    """A network whose `forward` draw.html would not follow."""

    def __init__(self, forward):
        super().__init__()
        self.first = conv_block(1, 10, padding=1)
        self.second = conv_block(10, 10, padding=1)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.path = forward

    def forward(self, x):
        return self.path(self, x).flatten(1).log_softmax(1)


def skip_a_layer(model, x):
    return model.gap(model.first(x))


def add_a_skip_connection(model, x):
    x = model.first(x)
    return model.gap(x + model.second(x))


def concatenate_inputs(model, x):
    return model.gap(model.second(torch.cat([x] * 10, dim=1)))


PATHS = [skip_a_layer, add_a_skip_connection, concatenate_inputs]


@pytest.mark.parametrize("path", PATHS)
def test_network_that_does_not_apply_its_layers_in_order_is_refused(path):
    with pytest.raises(ValueError, match="^draw.html applies the layers in the order of their definition"):
        drawing_field.drawing_field(Irregular(path), "")


def test_model_and_random_state_stay_as_they_are():
    model = create_model("Model4").train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    drawing_field.drawing_field(model, "")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_text_is_the_same_for_every_model():
    for name in ("Model4", "Model5"):
        field = drawing_field.drawing_field(create_model(name), name)
        assert repr(field) == drawing_field.TEXT
    assert "\n" not in drawing_field.TEXT

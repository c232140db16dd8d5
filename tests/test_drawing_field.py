"""The export of a network for the drawing field: what is refused, and what stays as it is."""

import copy
import re

import pytest
import torch
from torch import nn

from drawing_field import TEXT, drawing_field
from model import Network, conv_block, create_model


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
    model = nn.Sequential(nn.Sequential(nn.ReLU(), layer))
    with pytest.raises(ValueError, match=r"cannot compute .*0\.1") as caught:
        drawing_field(model, "")
    assert "\n" not in str(caught.value)
    assert str(layer) in str(caught.value)


class SkipConnection(Network):
    def __init__(self):
        super().__init__()
        self.first = conv_block(1, 10, padding=1)
        self.second = conv_block(10, 10, padding=1)
        self.gap = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.first(x)
        return self.gap(x + self.second(x)).flatten(1)


class Reversed(Network):
    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(8, 10, 28)
        self.first = nn.Conv2d(1, 8, 1)

    def forward(self, x):
        return self.second(self.first(x)).flatten(1)


@pytest.mark.parametrize("network", [SkipConnection, Reversed])
def test_network_that_does_not_apply_its_layers_in_order_is_refused(network):
    with pytest.raises(ValueError, match="^draw.html applies the layers in the order of their definition"):
        drawing_field(network(), "")


def test_model_and_random_state_stay_as_they_are():
    model = create_model("Model1").train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    drawing_field(model, "")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_without_html_the_field_is_the_same_sentence_for_every_model():
    assert "\n" not in TEXT
    for name in ("Model4", "Model5"):
        field = drawing_field(create_model(name), name)
        assert repr(field) == TEXT
        assert re.sub(r"<[^<>]*>", "", field.html) == TEXT

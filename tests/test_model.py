"""The networks against references in plain torch.nn; adding a network."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import plots
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


def reference_model1():
    """Return the published Model1, with the names of its attributes."""
    layers = OrderedDict()
    layers["convblock1"] = published_block(1, 8, dropout=0.1)
    layers["convblock2"] = published_block(8, 16, dropout=0.1)
    layers["convblock3"] = bare_conv(16, 10, kernel_size=1)
    layers["pool1"] = nn.MaxPool2d(2, 2)
    layers["convblock4"] = published_block(10, 10, dropout=0.1)
    layers["convblock5"] = published_block(10, 10, padding=1, dropout=0.1)
    layers["pool2"] = nn.MaxPool2d(2, 2)
    layers["convblock6"] = published_block(10, 10, padding=1, dropout=0.1)
    layers["gap"] = nn.AvgPool2d(5)
    layers["convblock7"] = nn.Sequential(
        nn.Conv2d(10, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.Dropout(0.1)
    )
    return nn.Sequential(layers)


def reference_model2():
    """Return the published Model2, which is also Model3, with the names of its attributes."""
    layers = OrderedDict()
    layers["convblock1"] = published_block(1, 8)
    layers["convblock2"] = published_block(8, 16)
    layers["convblock3"] = bare_conv(16, 10, kernel_size=1)
    layers["pool1"] = nn.MaxPool2d(2, 2)
    layers["convblock4"] = published_block(10, 10)
    layers["convblock5"] = published_block(10, 16)
    layers["convblock6"] = published_block(16, 10)
    layers["convblock7"] = published_block(10, 10)
    layers["convblock8"] = published_block(10, 10)
    layers["convblock9"] = bare_conv(10, 10, kernel_size=2)
    return nn.Sequential(layers)


def reference_separable(widths):
    """Return a depthwise-separable network of these output channels, with a pool after the second block."""
    inputs = widths[0]
    layers = [nn.Conv2d(1, inputs, 3, bias=False), nn.BatchNorm2d(inputs), nn.ReLU()]
    for number, outputs in enumerate(widths[1:], 2):
        layers += [
            nn.Conv2d(inputs, inputs, 3, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
        if number == 2:
            layers.append(nn.MaxPool2d(2))
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, 10, 1, bias=False)]
    return nn.Sequential(*layers)


REFERENCES = {
    "Model1": reference_model1(),
    "Model2": reference_model2(),
    "Model3": reference_model2(),
    "Model4": reference_separable([16, 16, 32, 32, 32, 32, 40]),
    "Model5": reference_separable([16, 16, 24, 24, 24, 28]),
}


@pytest.fixture(params=REFERENCES)
def pair(request):
    """Return a model and its reference, in float64 and with the same weights."""
    model = create_model(request.param).double()
    reference = copy.deepcopy(REFERENCES[request.param]).double()
    state = reference.state_dict()
    if request.param in ("Model4", "Model5"):  # the flat reference has other parameter names
        state = OrderedDict(zip(model.state_dict(), state.values(), strict=True))
    model.load_state_dict(state, strict=True)
    return model, reference


def log_probabilities(reference, data):
    return torch.log_softmax(reference(data).flatten(1), dim=1)


def test_model_matches_its_reference_in_training_and_evaluation(pair):
    model, reference = pair
    data = torch.randn(16, 1, 28, 28, dtype=torch.float64) * 2 + 1
    before = data.clone()
    for mode in (True, False):  # the evaluation uses the statistics of the training
        model.train(mode)
        reference.train(mode)
        torch.manual_seed(3)  # of dropout
        output = model(data)
        assert torch.equal(data, before)
        torch.manual_seed(3)
        torch.testing.assert_close(output, log_probabilities(reference, data))


def test_model_has_the_gradients_of_its_reference(pair):
    """An in-place ReLU must not change what another layer needs."""
    model, reference = pair
    data = torch.randn(16, 1, 28, 28, dtype=torch.float64)
    torch.manual_seed(3)
    model(data)[:, 3].sum().backward()
    torch.manual_seed(3)
    log_probabilities(reference, data)[:, 3].sum().backward()
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_dropout_of_model1_can_be_disabled():
    model = Model1(dropout=0.0).train()
    data = torch.randn(4, 1, 28, 28)
    assert torch.equal(model(data), model(data))


@pytest.mark.parametrize("name", MODELS)
def test_separable_networks_compute_in_channels_last(name):
    """What the pool gets has several channels and rows, so its strides are those of one format only."""
    strides = []
    model = create_model(name)
    for layer in model.modules():
        if isinstance(layer, nn.MaxPool2d):
            layer.register_forward_pre_hook(lambda module, inputs: strides.append(inputs[0].stride(1)))
    model(torch.zeros(2, 1, 28, 28))
    assert (strides[0] == 1) == (name in ("Model4", "Model5"))


def test_unknown_model_is_rejected():
    with pytest.raises(ValueError, match="Model9.*Model1"):
        create_model("Model9")


# ---- a new network ----


class Tiny(Network):
    """A network as someone may add it."""

    def __init__(self):
        super().__init__()
        self.block1 = conv_block(1, 8)
        self.pool = nn.MaxPool2d(4)
        self.block2 = conv_block(8, 16)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.logits = conv(16, 10)


def test_network_added_as_the_readme_says_works_in_the_notebook(monkeypatch):
    monkeypatch.setitem(MODELS, "Tiny", Tiny)
    monkeypatch.setitem(utils.RECIPES, "Tiny", utils.Recipe(dict(lr=0.1), StepLR, dict(step_size=1)))
    utils.check_settings("Tiny", epochs=1, batch_size=None, seed=1, resume=False)
    model = create_model("Tiny")
    output = model(torch.randn(4, 1, 28, 28))
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(4))
    rows = plots.summarize_model(model).rows
    assert ["block2.0 Conv2d", "16×4×4", 3, 1, "1,152", "18,432", 14] in rows

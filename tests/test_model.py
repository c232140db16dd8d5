"""The networks against the published tables and against references in plain torch.nn; adding a network."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import WIDTHS
from torch import nn
from torch.optim.lr_scheduler import StepLR

import utils
from model import MODELS, Model1, Network, conv, conv_block, create_model

# ---- layer tables ----

SIZES_MODEL2 = "8×26×26 16×24×24 10×24×24 10×12×12 10×10×10 16×8×8 10×6×6 10×4×4 10×2×2 10×1×1"
SIZES = {  # of the output of each block, for one image
    "Model1": "8×26×26 16×24×24 10×24×24 10×12×12 10×10×10 10×10×10 10×5×5 10×5×5 10×1×1 10×1×1",
    "Model2": SIZES_MODEL2,
    "Model3": SIZES_MODEL2,
    "Model4": "16×26×26 16×24×24 16×12×12 32×10×10 32×8×8 32×6×6 32×4×4 40×2×2 40×1×1 10×1×1",
    "Model5": "16×26×26 16×24×24 16×12×12 24×10×10 24×8×8 24×6×6 28×4×4 28×1×1 10×1×1",
}
PARAMETERS = {"Model1": 4312, "Model2": 7524, "Model3": 7524, "Model4": 7824, "Model5": 4296}


@pytest.mark.parametrize("name", SIZES)
def test_blocks_have_the_sizes_of_the_table(name):
    data = torch.randn(1, 1, 28, 28)
    sizes = []
    for block in create_model(name).eval().children():
        data = block(data)
        sizes.append("×".join(map(str, data.shape[1:])))
    assert sizes == SIZES[name].split()


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    parameters = create_model(name).parameters()
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS[name]


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


def separable_layers(inputs, outputs):
    return [
        nn.Conv2d(inputs, inputs, 3, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def reference_separable(widths):
    """Return a depthwise-separable network as a flat `Sequential` in the default memory format."""
    inputs = widths.before_pool[0]
    layers = [nn.Conv2d(1, inputs, 3, bias=False), nn.BatchNorm2d(inputs), nn.ReLU()]
    for outputs in widths.before_pool[1:]:
        layers += separable_layers(inputs, outputs)
        inputs = outputs
    layers.append(nn.MaxPool2d(2))
    for outputs in widths.after_pool:
        layers += separable_layers(inputs, outputs)
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, 10, 1, bias=False)]
    return nn.Sequential(*layers)


REFERENCES = {
    "Model1": reference_model1,
    "Model2": reference_model2,
    "Model3": reference_model2,
    "Model4": partial(reference_separable, WIDTHS["Model4"]),
    "Model5": partial(reference_separable, WIDTHS["Model5"]),
}


@pytest.fixture(params=REFERENCES)
def pair(request):
    """Return a model and its reference, in float64 and with the same weights."""
    model = create_model(request.param).double()
    reference = REFERENCES[request.param]().double()
    state = reference.state_dict()
    if request.param in WIDTHS:  # the flat reference has other parameter names
        state = OrderedDict(zip(model.state_dict(), state.values(), strict=True))
    model.load_state_dict(state, strict=True)
    return model, reference


def log_probabilities(reference, data):
    return torch.log_softmax(reference(data).flatten(1), dim=1)


def test_model_matches_its_reference_in_training_and_evaluation(pair):
    model, reference = pair
    data = torch.randn(16, 1, 28, 28, dtype=torch.float64) * 2 + 1
    for mode in (True, False):  # the evaluation uses the statistics of the training
        model.train(mode)
        reference.train(mode)
        torch.manual_seed(3)  # of dropout
        output = model(data)
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


# ---- every network ----


def test_every_model_has_a_recipe():
    assert MODELS.keys() == utils.RECIPES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_output_is_log_probabilities_and_the_input_is_not_changed(name):
    data = torch.randn(4, 1, 28, 28)
    before = data.clone()
    output = create_model(name)(data)
    assert output.shape == (4, 10)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(4))
    assert torch.equal(data, before)


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_gives_the_same_weights(name):
    torch.manual_seed(1)
    first = create_model(name)
    torch.manual_seed(1)
    second = create_model(name)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("name", WIDTHS)
def test_weights_of_separable_networks_are_in_channels_last(name):
    for parameter in create_model(name).parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)


def test_dropout_of_model1_can_be_disabled():
    model = Model1(dropout=0.0).train()
    data = torch.randn(4, 1, 28, 28)
    assert torch.equal(model(data), model(data))


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


def test_network_added_as_the_readme_says_works_in_the_notebook(small, monkeypatch, figures):
    monkeypatch.setitem(MODELS, "Tiny", Tiny)
    recipe = utils.Recipe(dict(lr=0.1, momentum=0.9), StepLR, dict(step_size=1), batch_size=20)
    monkeypatch.setitem(utils.RECIPES, "Tiny", recipe)
    utils.check_settings("Tiny", epochs=1, batch_size=None, seed=1, resume=False)

    model = create_model("Tiny")
    assert "block2.0 Conv2d" in utils.summarize_model(model)
    train_loader = utils.BatchLoader(small(2000), recipe.batch_size, "cpu", shuffle=True)
    test_loader = utils.BatchLoader(small(500, train=False), recipe.batch_size, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), **recipe.sgd)
    utils.train(model, "cpu", train_loader, optimizer, F.nll_loss)
    _, accuracy = utils.test(model, "cpu", test_loader, F.nll_loss)
    assert accuracy > 50  # 10 would be chance

    utils.plot_features(model, test_loader.data[0], "Tiny")
    labels = [axis.get_ylabel() for axis in figures[0].figure.axes]
    assert "block2\n16×4×4\nfield 14×14" in labels

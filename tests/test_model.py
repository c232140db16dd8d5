"""The networks, against the published layout written out layer by layer with torch.nn alone."""

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


@pytest.mark.parametrize("name", ["Model1", "Model2", "Model3"])
@pytest.mark.parametrize("training", [True, False])
def test_published_state_gives_the_same_output(name, training):
    theirs, ours = published(name).double(), models.create_model(name).double()
    images = torch.randn(16, 1, 28, 28).double()
    theirs(images * 2 + 1)  # so that the running statistics are no longer 0 and 1
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.train(training), ours.train(training)
    torch.manual_seed(3)
    expected = torch.log_softmax(theirs(images).view(-1, 10), dim=-1)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(images), expected)


@pytest.mark.parametrize(
    "name, widths", [("Model4", [16, 16, 24, 32, 36, 36, 36]), ("Model5", [14, 14, 16, 24, 24, 24, 20])]
)
def test_separable_networks_written_out(name, widths):
    """The same weights in layers of torch.nn alone, in float64 and torch's usual memory order."""
    network = models.create_model(name).double()
    network(torch.randn(16, 1, 28, 28).double() * 2 + 1)  # so that the statistics are not 0 and 1
    network.eval()
    layers = [nn.Conv2d(1, widths[0], 3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for number, (i, o) in enumerate(zip(widths, widths[1:]), 2):
        depthwise, mix = nn.Conv2d(i, i, 3, groups=i, bias=False), nn.Conv2d(i, o, 1, bias=False)
        layers += [depthwise, nn.BatchNorm2d(i), mix, nn.BatchNorm2d(o), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number == 3 else []
    layers += [nn.AvgPool2d(3), nn.Conv2d(widths[-1], 10, 1, bias=False), nn.Flatten(), nn.LogSoftmax(1)]
    plain = nn.Sequential(*layers).double().eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), network.state_dict().values())), strict=True)
    images = torch.randn(8, 1, 28, 28).double()
    torch.testing.assert_close(network(images), plain(images))
    network.train()(images), plain.train()(images)
    torch.testing.assert_close(network.eval()(images), plain.eval()(images))


COUNTS = {"Model1": 4312, "Model2": 7524, "Model3": 7524, "Model4": 7808, "Model5": 4310}


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_parameters_and_log_probabilities(name, count):
    model = models.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    output = model(torch.randn(4, 1, 28, 28))
    assert output.shape == (4, 10)
    torch.testing.assert_close(output.exp().sum(1), torch.ones(4))
    weights = [p for p in model.parameters() if p.dim() == 4]
    assert all(w.is_contiguous(memory_format=models.MODELS[name].memory_format) for w in weights)


def test_an_unknown_name_lists_the_right_ones():
    with pytest.raises(ValueError, match="^unknown model 'Model9'.*Model1, Model2, Model3.*$"):
        models.create_model("Model9")


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

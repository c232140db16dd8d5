"""Layer tables, plots and reports: the computed and plotted values, not just that plotting succeeds."""

from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from torch import nn

import utils
from model import conv_block, create_model

# ---- source code ----


def test_source_is_printed(capsys):
    utils.show_source(conv_block)
    text = capsys.readouterr().out
    assert text.startswith("def conv_block(")
    assert "nn.Conv2d" in text


def test_source_of_an_edited_file_is_refused(monkeypatch, capsys):
    path = Path(conv_block.__code__.co_filename).resolve()
    monkeypatch.setitem(utils.IMPORTED_FILES, path, utils.IMPORTED_FILES[path] - 1)
    with pytest.raises(RuntimeError, match="model.py.*restart"):
        utils.show_source(conv_block)
    assert capsys.readouterr().out == ""


# ---- layers of a model ----

FIELDS = {  # receptive field after each block, by hand: + (kernel - 1) · jump for each convolution and pool
    "Model1": [3, 5, 5, 6, 10, 14, 16, 24, 40, 40],
    "Model2": [3, 5, 5, 6, 10, 14, 18, 22, 26, 28],
    "Model3": [3, 5, 5, 6, 10, 14, 18, 22, 26, 28],
    "Model4": [3, 5, 6, 10, 14, 18, 22, 26, 28, 28],
    "Model5": [3, 5, 6, 10, 14, 18, 22, 28, 28],
}
MULT_ADDS = {  # by hand: weights · positions, + two per channel of BatchNorm
    "Model1": 72 * 676 + 1312 * 576 + 1800 * 100 + 900 * 25 + 100 + 128,
    "Model2": 72 * 676 + 1312 * 576 + 900 * 100 + 1440 * (64 + 36) + 900 * (16 + 4) + 400 + 160,
    "Model4": 144 * 676 + 400 * 576 + 656 * 100 + 1312 * (64 + 36 + 16) + 1568 * 4 + 400 + 720,
    "Model5": 144 * 676 + 400 * 576 + 528 * 100 + 792 * (64 + 36) + 888 * 16 + 280 + 472,
}


def test_layer_table_lists_every_layer_in_order():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
    )
    # kernel, parameters, mult-adds and receptive field by hand: 36·26², 2·4, 216·6²;
    # 1 + 2, + 1·1, + 2·2, + 5·4
    assert utils.layer_table(model) == [
        utils.Layer("0", "Conv2d", (4, 26, 26), 3, 36, 24_336, 3),
        utils.Layer("1", "BatchNorm2d", (4, 26, 26), 1, 8, 8, 3),
        utils.Layer("2.0", "MaxPool2d", (4, 13, 13), 2, 0, 0, 4),
        utils.Layer("2.1", "Conv2d", (6, 6, 6), 3, 216, 7_776, 8),
        utils.Layer("2.2", "ReLU", (6, 6, 6), 1, 0, 0, 8),
        utils.Layer("3", "AdaptiveAvgPool2d", (6, 1, 1), 6, 0, 0, 28),
    ]


@pytest.mark.parametrize("name", MULT_ADDS)
def test_summary_ends_with_the_totals(name):
    model = create_model(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    totals = ["total", f"{parameters:,}", f"{MULT_ADDS[name]:,}", str(FIELDS[name][-1])]
    assert utils.summarize_model(model).splitlines()[-1].split() == totals


def test_summary_has_one_aligned_line_per_layer():
    model = create_model("Model1")
    lines = utils.summarize_model(model).splitlines()
    layers = utils.layer_table(model)
    assert lines[0].split() == ["layer", "output", "kernel", "parameters", "mult-adds", "receptive", "field"]
    assert lines[1].split() == ["convblock1.0", "Conv2d", "8×26×26", "3", "72", "48,672", "3"]
    for line, layer in zip(lines[1:-1], layers, strict=True):
        assert line.split()[:2] == [layer.name, layer.kind]
    for line in lines:
        assert len(line) == len(lines[0])


# ---- figures ----


def shown_images(axes):
    """Return what the axes show, as tensors."""
    return [torch.tensor(axis.images[0].get_array()) for axis in axes if axis.images]


def test_figure_is_displayed_with_alternative_text_and_closed(figures):
    figure = plt.figure()
    utils.show_figure(figure, "name", "a description")
    assert figures[0].figure is figure
    assert figures[0].metadata == {"image/png": {"alt": "a description"}}
    assert not plt.fignum_exists(figure.number)


def test_notebook_shows_figures_as_png_with_every_backend(monkeypatch):
    """With MPLBACKEND=agg, a kernel would show the text of a figure instead of a picture."""
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    monkeypatch.setattr(utils, "get_ipython", lambda: shell)
    figure, _ = plt.subplots()
    utils.show_figure(figure, "name", "a description")
    data, _ = shell.display_formatter.format(figure)
    assert "image/png" in data


def test_figures_are_saved_only_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    utils.plot_mistakes([], "title")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("S7_FIGURES", str(tmp_path / "new" / "images"))
    utils.plot_history(utils.History(), "title")
    utils.plot_mistakes([], "title")
    utils.plot_confusion(torch.eye(10, dtype=torch.long), "title")
    utils.plot_features(create_model("Model4"), torch.zeros(1, 28, 28), "title")
    names = sorted(path.name for path in (tmp_path / "new" / "images").iterdir())
    assert names == ["confusion.png", "curves.png", "features.png", "mistakes.png"]


def test_digits_are_plotted_with_captions(small, figures):
    images = small(3).images
    utils.plot_digits(images, ["9→4  80%", 1, 2], "three images", "name")
    figure = figures[0].figure
    assert [axis.get_title() for axis in figure.axes[:4]] == ["9→4  80%", "1", "2", ""]
    assert [axis.axison for axis in figure.axes] == [True] * 3 + [False] * 17
    assert torch.equal(torch.stack(shown_images(figure.axes)), images)
    assert figure.get_suptitle() == "three images"
    assert figures[0].alt == "three images: 9→4  80%, 1, 2"


def test_at_most_20_digits_are_plotted(small, figures):
    data = utils.normalize(small(25).images)
    utils.plot_digits(data, range(25), "images", "name")
    axes = figures[0].figure.axes
    assert torch.equal(torch.stack(shown_images(axes)), data[:20, 0])
    assert axes[-1].get_title() == "19"
    assert figures[0].alt.endswith(", 18, 19")


# ---- history ----


def history_of(test_acc, train_acc=None):
    """Return the history of a run with these accuracies; its rate drops in the last epoch."""
    count = len(test_acc)
    return utils.History(
        train_losses=[0.5, *[0.1] * (count - 1)],
        train_acc=train_acc or [95.0] * count,
        test_losses=[0.3, *[0.2] * (count - 1)],
        test_acc=test_acc,
        learning_rates=[*[0.1] * (count - 1), 0.01],
        seconds=[1.0] * count,
    )


def test_history_is_plotted_per_epoch(figures):
    history = history_of([85.0, 96.5, 96.0], train_acc=[80.0, 90.0, 95.0])
    utils.plot_history(history, "Model3 on MNIST")
    losses, accuracies, rates = figures[0].figure.axes
    for axis in (losses, accuracies, rates):
        assert axis.get_xlabel() == "epoch"
        for line in axis.lines:
            assert list(line.get_xdata()) == [1, 2, 3]
    assert [list(line.get_ydata()) for line in losses.lines] == [[0.5, 0.1, 0.1], [0.3, 0.2, 0.2]]
    assert [list(line.get_ydata()) for line in accuracies.lines] == [history.train_acc, history.test_acc]
    assert list(rates.lines[0].get_ydata()) == [0.1, 0.1, 0.01]
    # the first epoch does not set the scale
    assert losses.get_ylim() == pytest.approx((0, 0.22))
    assert accuracies.get_ylim() == pytest.approx((89.7, 100))
    assert rates.get_ylim()[0] == 0
    assert "test 96.00 %" in figures[0].alt
    assert "\n" not in figures[0].alt


def test_curves_of_training_and_test_are_told_apart(figures):
    utils.plot_history(history_of([85.0, 96.5, 96.0]), "Model3 on MNIST")
    for axis in figures[0].figure.axes[:2]:
        train, test = axis.lines
        assert [train.get_label(), test.get_label()] == ["train", "test"]
        assert train.get_color() != test.get_color()
        assert train.get_linestyle() != test.get_linestyle()
        assert axis.get_legend() is not None


@pytest.mark.parametrize("epochs", [1, 2])
def test_history_of_few_epochs_is_plotted_completely(figures, epochs):
    utils.plot_history(history_of([85.0, 96.5][:epochs]), "interrupted")
    for axis in figures[0].figure.axes:
        low, high = axis.get_ylim()
        for line in axis.lines:
            assert low <= min(line.get_ydata())
            assert max(line.get_ydata()) <= high


# ---- summary of a run ----


@pytest.mark.parametrize(
    ("accuracies", "epoch"),
    [
        pytest.param([99.3, 99.4, 99.5], 2, id="from the second epoch"),
        pytest.param([99.5, 99.39, 99.4], 3, id="again after a drop"),
        pytest.param([99.5, 99.3], None, id="not in the last epoch"),
        pytest.param([], None, id="no epoch"),
    ],
)
def test_first_epoch_above_the_target(accuracies, epoch):
    assert utils.first_epoch_above(accuracies) == epoch


def test_run_without_a_completed_epoch_is_summarized():
    assert utils.summarize_run(utils.History(), "interrupted") == "interrupted: no completed epoch"


def test_run_of_one_epoch_is_summarized():
    assert utils.summarize_run(history_of([98.0]), "Model3 on MNIST").splitlines() == [
        "Model3 on MNIST: 1 epoch, learning rate 0.01",
        "last epoch: train 95.00 %, test 98.00 %",
    ]


def test_run_of_three_epochs_is_summarized():
    assert utils.summarize_run(history_of([99.0, 99.4, 99.5]), "Model3 on MNIST").splitlines() == [
        "Model3 on MNIST: 3 epochs, learning rate from 0.1 to 0.01",
        "last epoch: train 95.00 %, test 99.50 %",
        "test accuracy over the last 3 epochs: mean 99.30 %, minimum 99.00 %",
        "test accuracy ≥ 99.4 %: from epoch 2 on",
    ]


def test_run_of_15_epochs_is_summarized():
    history = history_of([98.0] * 10 + [98.9, 99.2, 99.41, 99.43, 99.4])
    assert utils.summarize_run(history, "Model3 on MNIST").splitlines() == [
        "Model3 on MNIST: 15 epochs, learning rate from 0.1 to 0.01",
        "last epoch: train 95.00 %, test 99.40 %",
        "test accuracy over the last 5 epochs: mean 99.27 %, minimum 98.90 %",
        "test accuracy ≥ 99.4 %: from epoch 13 on",
    ]


@pytest.mark.parametrize(
    ("accuracies", "result"),
    [
        pytest.param([98.0] + [99.4] * 5, ": met", id="met"),
        pytest.param([99.5] * 5 + [99.39], ": not met", id="not met"),
        pytest.param([99.5], "only 1 epoch", id="one epoch"),
        pytest.param([99.5] * 4, "only 4 epochs", id="four epochs"),
    ],
)
def test_target_is_met_by_the_last_five_epochs(accuracies, result):
    assert utils.check_target(history_of(accuracies)).endswith(result)


# ---- misclassified images ----

TARGETS = [0, 1, 2, 2, 9, 9, 9]
PREDICTIONS = [0, 7, 2, 0, 4, 4, 9]  # images 1, 3, 4 and 5 are misclassified,
PROBABILITIES = [0.9, 0.5, 0.6, 0.4, 0.8, 0.7, 0.7]  # image 4 with the highest confidence


class Scripted(nn.Module):
    """A model that gives the seven predictions; image i is recognized by its constant brightness i."""

    def forward(self, data):
        assert not self.training
        probabilities = torch.zeros(len(data), 10)
        for row, image in zip(probabilities, data, strict=True):
            i = int(image[0, 0, 0])
            row.fill_((1 - PROBABILITIES[i]) / 9)
            row[PREDICTIONS[i]] = PROBABILITIES[i]
        return probabilities.log()


@pytest.fixture
def found():
    """Return the confusion matrix and the misclassified images of the scripted model."""
    data = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 1, 28, 28)
    target = torch.tensor(TARGETS)
    batches = [(data[:3], target[:3]), (data[3:], target[3:])]
    return utils.find_mistakes(Scripted().train(), "cpu", batches)


def test_mistakes_are_sorted_by_confidence(found):
    _, mistakes = found
    images, targets, predictions, probabilities = zip(*mistakes, strict=True)
    assert torch.equal(torch.stack(images)[:, 0, 0, 0], torch.tensor([4.0, 5.0, 1.0, 3.0]))
    assert targets == (9, 9, 1, 2)
    assert predictions == (4, 4, 7, 0)
    assert probabilities == pytest.approx((0.8, 0.7, 0.5, 0.4))


def test_confusion_matrix_counts_true_by_predicted_digits(found):
    confusion, _ = found
    expected = torch.zeros(10, 10, dtype=torch.long)
    for target, predicted in zip(TARGETS, PREDICTIONS, strict=True):
        expected[target, predicted] += 1
    assert torch.equal(confusion, expected)


def test_mistakes_are_plotted_in_the_given_order(found, figures):
    _, mistakes = found
    utils.plot_mistakes(mistakes, "Model3 on MNIST")
    axes = figures[0].figure.axes
    titles = [axis.get_title() for axis in axes[:5]]
    assert titles == ["9→4  80%", "9→4  70%", "1→7  50%", "2→0  40%", ""]
    assert torch.equal(shown_images(axes)[2], torch.ones(28, 28))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        pytest.param(0, ": 0 misclassified images", id="none"),
        pytest.param(1, ": 1 misclassified image,", id="one"),
        pytest.param(30, ": 30 misclassified images", id="more than are plotted"),
    ],
)
def test_mistakes_are_counted(found, figures, count, text):
    _, mistakes = found
    utils.plot_mistakes(mistakes[:1] * count, "Model3 on MNIST")
    assert text in figures[0].figure.get_suptitle()
    assert text in figures[0].alt


def test_confusion_matrix_is_plotted_with_counts_and_accuracies(found, figures):
    confusion, _ = found
    utils.plot_confusion(confusion, "Model3 on MNIST")
    axis = figures[0].figure.axes[0]
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert len(texts) == 100
    assert texts[4, 9] == "2"  # column 4 (predicted), row 9 (true)
    assert texts[9, 4] == "·"
    assert texts[0, 0] == "1"
    colored = axis.images[0].get_array()
    assert colored[9, 4] == 2
    assert colored[0, 0] == 0  # correct predictions are not colored
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[0] == "0  (100.0 %)"
    assert labels[2] == "2  (50.0 %)"
    assert axis.get_xlabel() == "predicted digit"
    assert "4 misclassified images" in figures[0].alt


def test_most_confused_digits_are_counted_both_ways():
    confusion = 90 * torch.eye(10, dtype=torch.long)
    confusion[4, 9] = 3
    confusion[9, 4] = 2
    confusion[7, 2] = 4
    confusion[5, 3] = 1
    confusion[8, 6] = 1
    lines = ["4 and 9: 5 images", "2 and 7: 4 images", "3 and 5: 1 image", "6 and 8: 1 image"]
    assert utils.most_confused(confusion).splitlines() == lines[:3]
    assert utils.most_confused(confusion, count=10).splitlines() == lines


def test_no_digits_are_confused_without_mistakes():
    assert utils.most_confused(torch.eye(10, dtype=torch.long)) == "no digits were confused"


# ---- features ----


@pytest.mark.parametrize("name", FIELDS)
def test_features_are_those_of_each_block(small, figures, name):
    model = create_model(name).eval()
    image = utils.normalize(small(1).images)[0]
    utils.plot_features(model, image, "title")
    axes = figures[0].figure.axes
    assert len(axes) == 10 * (1 + len(FIELDS[name]))
    assert axes[0].get_ylabel() == "filters\n3×3"
    filters = next(model.parameters()).detach()
    assert torch.equal(torch.stack(shown_images(axes[:10])), filters[:10, 0])

    data = image.unsqueeze(0)
    for row, (attribute, block) in enumerate(model.named_children()):
        data = block(data).detach()
        size = "×".join(map(str, data.shape[1:]))
        field = FIELDS[name][row]
        row_axes = axes[10 * row + 10 : 10 * row + 20]  # below the filters
        assert row_axes[0].get_ylabel() == f"{attribute}\n{size}\nfield {field}×{field}"
        assert torch.equal(torch.stack(shown_images(row_axes)), data[0, :10])
        scale = (data.min().item(), data.max().item())
        assert row_axes[0].images[0].get_clim() == scale  # the same in the whole row


def test_features_of_a_layer_before_an_in_place_relu_are_its_own(figures):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
    image = torch.randn(1, 28, 28)
    utils.plot_features(model, image, "title")
    expected = model[0](image.unsqueeze(0)).detach()
    assert torch.equal(torch.stack(shown_images(figures[0].figure.axes[10:20])), expected[0])


def test_reports_leave_weights_and_statistics_alone():
    model = create_model("Model1").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = torch.ones(1, 1, 28, 28)
    utils.summarize_model(model)
    assert model.training
    utils.find_mistakes(model, "cpu", [(data, torch.tensor([3]))])
    model.train()
    utils.plot_features(model, data[0], "title")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])

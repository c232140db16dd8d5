"""Layer tables, plots and reports: the computed and plotted values, not just that plotting succeeds."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import WIDTHS
from IPython.core.formatters import DisplayFormatter
from torch import nn

import utils
from model import create_model

# ---- layers of a model ----


class ExpectedLayers:
    """Receptive fields and multiply-adds, accumulated layer by layer.

    A layer enlarges the receptive field by (kernel - 1) · jump pixels; jump is the product of all
    preceding strides.
    """

    def __init__(self):
        self.side = 28
        self.jump = 1
        self.fields = [1]
        self.mult_adds = 0

    def conv(self, weights, kernel):
        """Add a convolution without padding, and its multiply-adds: all weights at every position."""
        self.side -= kernel - 1
        self.mult_adds += weights * self.side**2
        self.fields.append(self.fields[-1] + (kernel - 1) * self.jump)

    def norm(self, channels):
        """Add a BatchNorm: torchinfo counts one multiply-add per parameter."""
        self.mult_adds += 2 * channels

    def pool(self, kernel):
        self.side //= kernel
        self.fields.append(self.fields[-1] + (kernel - 1) * self.jump)
        self.jump *= kernel


def expected_separable(widths):
    expected = ExpectedLayers()
    inputs = widths.before_pool[0]
    expected.conv(9 * inputs, kernel=3)
    expected.norm(inputs)
    for position, outputs in enumerate(widths.before_pool[1:] + widths.after_pool, 1):
        if position == len(widths.before_pool):
            expected.pool(2)
        expected.conv(9 * inputs, kernel=3)
        expected.norm(inputs)
        expected.conv(inputs * outputs, kernel=1)
        expected.norm(outputs)
        inputs = outputs
    expected.pool(expected.side)
    expected.conv(10 * inputs, kernel=1)
    return expected


def spatial_layers(model):
    """Return the convolutions and pools among the layers of a model."""
    layers = []
    for layer in utils.layer_table(model):
        if "Conv" in layer.kind or "Pool" in layer.kind:
            layers.append(layer)
    return layers


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


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        # by hand: + (kernel - 1) · jump for each convolution and pool, in order
        pytest.param("Model1", [3, 5, 5, 6, 10, 14, 16, 24, 40, 40], id="Model1"),
        pytest.param("Model3", [3, 5, 5, 6, 10, 14, 18, 22, 26, 28], id="Model3"),
        pytest.param("Model4", expected_separable(WIDTHS["Model4"]).fields[1:], id="Model4"),
        pytest.param("Model5", expected_separable(WIDTHS["Model5"]).fields[1:], id="Model5"),
    ],
)
def test_receptive_fields(name, fields):
    layers = spatial_layers(create_model(name))
    assert [layer.receptive_field for layer in layers] == fields


@pytest.mark.parametrize(
    ("name", "mult_adds"),
    [
        # by hand: 72·26² + 1152·24² + 160·24² + 900·10² + 900·10² + 900·5² + 100, + 128 of BatchNorm
        pytest.param("Model1", 1_007_112, id="Model1"),
        # by hand: 72·26² + 1152·24² + 160·24² + 900·10² + 1440·8² + 1440·6² + 900·4² + 900·2² + 400,
        # + 144 of BatchNorm
        pytest.param("Model3", 1_056_944, id="Model3"),
        pytest.param("Model4", expected_separable(WIDTHS["Model4"]).mult_adds, id="Model4"),
        pytest.param("Model5", expected_separable(WIDTHS["Model5"]).mult_adds, id="Model5"),
    ],
)
def test_mult_adds(name, mult_adds):
    layers = utils.layer_table(create_model(name))
    assert sum(layer.mult_adds for layer in layers) == mult_adds


@pytest.mark.parametrize("name", ["Model1", "Model3", "Model4", "Model5"])
def test_parameters_of_the_layers_add_up(name):
    model = create_model(name)
    layers = utils.layer_table(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(layer.parameters for layer in layers) == count


def test_layer_table_leaves_the_model_in_its_mode():
    model = create_model("Model1").train()
    utils.layer_table(model)
    assert model.training


def test_layer_table_leaves_the_batchnorm_statistics_alone():
    model = create_model("Model1").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    utils.layer_table(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_summary_has_one_line_per_layer():
    model = create_model("Model1")
    lines = utils.summarize_model(model).splitlines()
    layers = utils.layer_table(model)
    assert len(lines) == len(layers) + 2  # the header and the totals
    assert lines[0].split() == ["layer", "output", "kernel", "parameters", "mult-adds", "receptive", "field"]
    assert lines[1].split() == ["convblock1.0", "Conv2d", "8×26×26", "3", "72", "48,672", "3"]
    for line, layer in zip(lines[1:-1], layers, strict=True):
        assert line.split()[:2] == [layer.name, layer.kind]


def test_summary_ends_with_the_totals():
    lines = utils.summarize_model(create_model("Model1")).splitlines()
    assert lines[-1].split() == ["total", "4,312", "1,007,112", "40"]


@pytest.mark.parametrize("name", ["Model1", "Model4"])
def test_columns_of_the_summary_are_aligned(name):
    lines = utils.summarize_model(create_model(name)).splitlines()
    for line in lines:
        assert len(line) == len(lines[0])


# ---- figures ----


def test_figure_is_displayed_with_alternative_text(figures):
    figure = plt.figure()
    utils.show_figure(figure, "name", "a description")
    assert figures[0].figure is figure
    assert figures[0].metadata == {"image/png": {"alt": "a description"}}


def test_displayed_figure_is_closed():
    figure = plt.figure()
    utils.show_figure(figure, "name", "a description")
    assert not plt.fignum_exists(figure.number)


def test_notebook_shows_figures_as_png_with_every_backend(monkeypatch):
    """With MPLBACKEND=agg, a kernel would show the text of a figure instead of a picture."""
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    monkeypatch.setattr(utils, "get_ipython", lambda: shell)
    figure, _ = plt.subplots()
    utils.show_figure(figure, "name", "a description")
    data, _ = shell.display_formatter.format(figure)
    assert "image/png" in data


def test_figure_is_not_saved_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    utils.show_figure(plt.figure(), "name", "a description")
    assert list(tmp_path.iterdir()) == []


def test_figure_is_saved_on_request(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "images"
    monkeypatch.setenv("S7_FIGURES", str(folder))
    utils.show_figure(plt.figure(), "name", "a description")
    assert [path.name for path in folder.iterdir()] == ["name.png"]
    assert (folder / "name.png").read_bytes().startswith(b"\x89PNG")


def test_digits_are_plotted_with_captions(small, figures):
    images = small(3).images
    utils.plot_digits(images, ["9→4  80%", 1, 2], "three images", "name")
    axes = figures[0].figure.axes
    assert [axis.get_title() for axis in axes[:4]] == ["9→4  80%", "1", "2", ""]
    for axis, image in zip(axes, images, strict=False):
        assert torch.equal(torch.tensor(axis.images[0].get_array()), image)


def test_normalized_digits_are_plotted(small, figures):
    data = utils.normalize(small(2).images)
    utils.plot_digits(data, [0, 1], "two images", "name")
    shown = figures[0].figure.axes[1].images[0].get_array()
    assert torch.equal(torch.tensor(shown), data[1, 0])


def test_plotted_digits_have_title_and_alternative_text(small, figures):
    utils.plot_digits(small(3).images, ["9→4  80%", 1, 2], "three images", "name")
    assert figures[0].figure.get_suptitle() == "three images"
    assert figures[0].alt == "three images: 9→4  80%, 1, 2"


def test_at_most_20_digits_are_plotted(small, figures):
    utils.plot_digits(small(25).images, range(25), "images", "name")
    axes = figures[0].figure.axes
    assert len(axes) == 20
    assert axes[-1].get_title() == "19"
    assert figures[0].alt.endswith(", 18, 19")


def test_digits_are_framed_without_ticks(small, figures):
    utils.plot_digits(small(3).images, [1, 2, 3], "three images", "name")
    axes = figures[0].figure.axes
    assert [axis.axison for axis in axes] == [True] * 3 + [False] * 17
    for axis in axes[:3]:
        assert len(axis.get_xticks()) == len(axis.get_yticks()) == 0


# ---- history ----


@pytest.fixture
def history():
    """Return the history of three epochs."""
    return utils.History(
        train_losses=[0.5, 0.2, 0.1],
        train_acc=[80.0, 90.0, 95.0],
        test_losses=[0.3, 0.1, 0.2],
        test_acc=[85.0, 96.5, 96.0],
        learning_rates=[0.1, 0.1, 0.01],
        seconds=[1, 1, 1],
    )


def test_history_is_plotted_per_epoch(history, figures):
    utils.plot_history(history, "Model3 on MNIST")
    lines = []
    for axis in figures[0].figure.axes:
        for line in axis.lines:
            assert list(line.get_xdata()) == [1, 2, 3]
            lines.append(list(line.get_ydata()))
    assert lines == [
        history.train_losses,
        history.test_losses,
        history.train_acc,
        history.test_acc,
        history.learning_rates,
    ]


def test_curves_of_training_and_test_are_told_apart(history, figures):
    utils.plot_history(history, "Model3 on MNIST")
    for axis in figures[0].figure.axes[:2]:
        labels = [text.get_text() for text in axis.get_legend().get_texts()]
        assert labels == ["train", "test"]
        assert axis.lines[0].get_color() != axis.lines[1].get_color()
        assert axis.lines[0].get_linestyle() != axis.lines[1].get_linestyle()


def test_axes_of_the_history_are_labeled(history, figures):
    utils.plot_history(history, "Model3 on MNIST")
    axes = figures[0].figure.axes
    assert [axis.get_xlabel() for axis in axes] == ["epoch"] * 3
    assert [axis.get_ylabel() for axis in axes] == ["loss", "accuracy (%)", "learning rate"]


def test_first_epoch_does_not_set_the_scale(history, figures):
    utils.plot_history(history, "Model3 on MNIST")
    losses, accuracies, rates = figures[0].figure.axes
    assert losses.get_ylim() == pytest.approx((0, 0.22))
    assert accuracies.get_ylim() == pytest.approx((89.7, 100))
    assert rates.get_ylim()[0] == 0


def test_history_has_title_and_alternative_text(history, figures):
    utils.plot_history(history, "Model3 on MNIST")
    assert figures[0].figure.get_suptitle() == "Model3 on MNIST"
    assert "Loss, accuracy and learning rate per epoch" in figures[0].alt
    assert "best test 96.50 %" in figures[0].alt
    assert "\n" not in figures[0].alt


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_history_of_few_epochs_is_plotted_completely(history, figures, epochs):
    short = utils.History(*[values[:epochs] for values in vars(history).values()])
    utils.plot_history(short, "interrupted")
    for axis in figures[0].figure.axes:
        low, high = axis.get_ylim()
        for line in axis.lines:
            for value in line.get_ydata():
                assert low <= value <= high


# ---- summary of a run ----


@pytest.mark.parametrize(
    ("accuracies", "epoch"),
    [
        pytest.param([99.3, 99.4, 99.5], 2, id="from the second epoch"),
        pytest.param([99.5, 99.5], 1, id="from the first epoch"),
        pytest.param([99.5, 99.39, 99.4], 3, id="again after a drop"),
        pytest.param([99.5, 99.3], None, id="not in the last epoch"),
        pytest.param([], None, id="no epoch"),
    ],
)
def test_first_epoch_above_the_target(accuracies, epoch):
    assert utils.first_epoch_above(accuracies) == epoch


def test_first_epoch_above_another_target():
    assert utils.first_epoch_above([97.0, 98.0, 99.0], target=98) == 2


def test_run_is_summarized_in_four_lines():
    history = utils.History(
        train_losses=[0.1] * 6,
        train_acc=[97.0] * 5 + [98.0],
        test_losses=[0.1] * 6,
        test_acc=[98.1, 98.8, 99.2, 99.41, 99.43, 99.4],
        learning_rates=[0.1] * 5 + [0.01],
        seconds=[1] * 6,
    )
    assert utils.summarize_run(history, "Model3 on MNIST").splitlines() == [
        "Model3 on MNIST: 6 epochs, learning rate from 0.1 to 0.01",
        "last epoch: train 98.00 %, test 99.40 %; best test 99.43 %",
        "test accuracy over the last five epochs: mean 99.25 %, minimum 98.80 %",
        "test accuracy ≥ 99.4 %: from epoch 4 on",
    ]


def test_summary_says_if_the_target_is_not_sustained(history):
    text = utils.summarize_run(history, "Model3 on MNIST")
    assert text.endswith("test accuracy ≥ 99.4 %: not sustained")


def test_summary_of_one_epoch_uses_the_singular():
    history = utils.History([0.5], [80.0], [0.3], [85.0], [0.1], [1])
    text = utils.summarize_run(history, "Model3 on MNIST")
    assert text.startswith("Model3 on MNIST: 1 epoch, learning rate from 0.1 to 0.1\n")


def test_summary_without_a_completed_epoch_says_so():
    assert utils.summarize_run(utils.History(), "interrupted") == "interrupted: no completed epoch"


def run_of(test_acc, epochs, clean_epochs, augmentation=None, train_acc=None):
    """Return what `summarize_end_of_augmentation` reads of a run; `train_acc` is `test_acc` by default."""
    history = utils.History(
        train_losses=[0.1] * len(test_acc),
        train_acc=train_acc or test_acc,
        test_losses=[0.1] * len(test_acc),
        test_acc=test_acc,
        learning_rates=[0.1] * len(test_acc),
        seconds=[1] * len(test_acc),
    )
    settings = {"epochs": epochs, "clean_epochs": clean_epochs, "augmentation": augmentation}
    return SimpleNamespace(settings=settings, history=history)


AUGMENTATION = {"degrees": 10, "shift": 0.06, "scale": 0.06}


def test_accuracies_before_and_after_the_end_of_augmentation_are_shown():
    run = run_of([90.0, 91.0, 99.0], 3, 1, AUGMENTATION, train_acc=[89.0, 90.0, 98.0])
    assert utils.summarize_end_of_augmentation(run).splitlines() == [
        "epoch 2, augmented images: train accuracy 90.00 %, test accuracy 91.00 %",
        "epoch 3, original images: train accuracy 98.00 %, test accuracy 99.00 %",
    ]


@pytest.mark.parametrize(
    "run, expected",
    [
        pytest.param(run_of([90.0] * 3, 3, 0), "No epoch of this run was augmented.", id="Model1"),
        pytest.param(
            run_of([90.0], 1, 5, AUGMENTATION), "No epoch of this run was augmented.", id="one epoch"
        ),
        pytest.param(
            run_of([90.0] * 5, 5, 5, AUGMENTATION), "No epoch of this run was augmented.", id="five epochs"
        ),
        pytest.param(
            run_of([90.0] * 3, 3, 0, AUGMENTATION),
            "All epochs of this run were augmented.",
            id="no clean epochs",
        ),
        pytest.param(
            run_of([90.0] * 2, 7, 5, AUGMENTATION),
            "This run was interrupted before augmentation ended (after epoch 2).",
            id="interrupted",
        ),
    ],
)
def test_run_without_an_end_of_augmentation_says_so(run, expected):
    assert utils.summarize_end_of_augmentation(run) == expected


# ---- misclassified images ----

TARGETS = [0, 1, 2, 2, 9, 9]
PREDICTIONS = [0, 7, 2, 0, 4, 9]  # images 1, 3 and 4 are misclassified,
PROBABILITIES = [0.9, 0.5, 0.6, 0.4, 0.8, 0.7]  # image 4 with the highest confidence


class Scripted(nn.Module):
    """A model that gives the six predictions in batches of four."""

    def __init__(self):
        super().__init__()
        probabilities = torch.full((6, 10), 0.0)
        for row, predicted, probability in zip(probabilities, PREDICTIONS, PROBABILITIES, strict=True):
            row.fill_((1 - probability) / 9)
            row[predicted] = probability
        self.batches = iter(probabilities.log().split(4))

    def forward(self, data):
        assert not self.training
        return next(self.batches)


@pytest.fixture
def dataset(small):
    dataset = small(6)
    dataset.labels.copy_(torch.tensor(TARGETS))
    return dataset


@pytest.fixture
def found(dataset):
    """Return the confusion matrix and the misclassified images of the scripted model."""
    return utils.find_mistakes(Scripted(), "cpu", utils.BatchLoader(dataset, 4, "cpu"))


def test_mistakes_are_sorted_by_confidence(found):
    _, mistakes = found
    assert [mistake.target for mistake in mistakes] == [9, 1, 2]
    assert [mistake.predicted for mistake in mistakes] == [4, 7, 0]
    assert [mistake.probability for mistake in mistakes] == pytest.approx([0.8, 0.5, 0.4])


def test_mistakes_have_their_images(found, dataset):
    _, mistakes = found
    images = torch.stack([mistake.image for mistake in mistakes])
    assert torch.equal(images, utils.normalize(dataset.images)[[4, 1, 3]])


def test_confusion_matrix_counts_true_by_predicted_digits(found):
    confusion, _ = found
    expected = torch.zeros(10, 10, dtype=torch.long)
    for target, predicted in zip(TARGETS, PREDICTIONS, strict=True):
        expected[target, predicted] += 1
    assert torch.equal(confusion, expected)


def test_predictions_of_one_batch_with_equal_digits_are_all_counted(small):
    """Adding at repeated positions needs accumulation."""
    dataset = small(4)
    dataset.labels.fill_(2)
    model = Scripted()
    model.batches = iter([torch.eye(10)[[5, 5, 5, 2]]])
    confusion, mistakes = utils.find_mistakes(model, "cpu", utils.BatchLoader(dataset, 4, "cpu"))
    assert confusion[2, 5] == 3
    assert confusion[2, 2] == 1
    assert len(mistakes) == 3


def test_mistakes_are_plotted_in_the_given_order(found, figures):
    _, mistakes = found
    utils.plot_mistakes(mistakes, "Model3 on MNIST")
    axes = figures[0].figure.axes
    assert [axis.get_title() for axis in axes[:4]] == ["9→4  80%", "1→7  50%", "2→0  40%", ""]
    assert torch.equal(torch.tensor(axes[0].images[0].get_array()), mistakes[0].image[0])
    assert "Model3 on MNIST: 3 misclassified images" in figures[0].figure.get_suptitle()


def test_heading_of_the_mistakes_counts_those_not_plotted(found, figures):
    _, mistakes = found
    utils.plot_mistakes(mistakes * 10, "Model3 on MNIST")
    assert "30 misclassified images" in figures[0].alt


def test_plot_without_mistakes_is_empty(figures):
    utils.plot_mistakes([], "Model3 on MNIST")
    assert "0 misclassified images" in figures[0].alt


def test_confusion_matrix_is_plotted_with_its_counts(found, figures):
    confusion, _ = found
    utils.plot_confusion(confusion, "Model3 on MNIST")
    texts = {text.get_position(): text.get_text() for text in figures[0].figure.axes[0].texts}
    assert len(texts) == 100
    assert texts[7, 1] == "1"  # column 7 (predicted), row 1 (true)
    assert texts[1, 7] == "·"
    assert texts[0, 0] == "1"


def test_confusion_matrix_is_colored_by_the_mistakes(found, figures):
    confusion, _ = found
    utils.plot_confusion(confusion, "Model3 on MNIST")
    colored = figures[0].figure.axes[0].images[0].get_array()
    assert colored[1, 7] == 1
    assert colored[0, 0] == 0


def test_confusion_matrix_shows_the_accuracy_per_digit(found, figures):
    confusion, _ = found
    utils.plot_confusion(confusion, "Model3 on MNIST")
    labels = [label.get_text() for label in figures[0].figure.axes[0].get_yticklabels()]
    assert labels[0] == "0  (100.0 %)"
    assert labels[2] == "2  (50.0 %)"


def test_confusion_matrix_has_title_and_alternative_text(found, figures):
    confusion, _ = found
    utils.plot_confusion(confusion, "Model3 on MNIST")
    axis = figures[0].figure.axes[0]
    assert axis.get_title() == "Model3 on MNIST: confusion matrix"
    assert axis.get_xlabel() == "predicted digit"
    assert axis.get_ylabel() == "true digit (accuracy)"
    assert figures[0].alt == "Model3 on MNIST: confusion matrix with 3 misclassified images"


def test_confusion_matrix_without_mistakes_is_plotted(figures):
    utils.plot_confusion(torch.eye(10, dtype=torch.long), "Model3 on MNIST")
    assert "with 0 misclassified images" in figures[0].alt


def test_plots_are_saved_under_their_names(tmp_path, monkeypatch):
    monkeypatch.setenv("S7_FIGURES", str(tmp_path))
    utils.plot_history(utils.History(), "title")
    utils.plot_mistakes([], "title")
    utils.plot_confusion(torch.eye(10, dtype=torch.long), "title")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "curves.png", "mistakes.png"]

"""Layer tables, plots and reports: the computed and plotted values, not just that plotting succeeds."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from torch import nn

import plots
import runs
from model import create_model

# ---- layers of a model ----


class Branches(nn.Module):
    """What a student may write: a parameter, a frozen, a reused and an unused layer, a pool in `forward`."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Conv2d(1, 4, 3, dilation=2, bias=False).requires_grad_(False)
        self.reused = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.unused = nn.Linear(5, 2)
        self.end = nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, x):
        x = F.max_pool2d(self.frozen(x * self.gain), 2)
        x = self.reused(self.reused(x))
        return self.end(x)


@pytest.mark.filterwarnings("ignore:TF32")
def test_summary_measures_what_forward_does_and_counts_each_parameter_once():
    with torch.backends.mkldnn.flags(enabled=False):  # a batch of float32 would be convolved in tiles
        table = plots.summarize_model(nn.DataParallel(Branches()))
    # The last two columns by hand: 36·24², 144·12², 222·5² + …; 1 + 2·2, pool + 1, + 2·2, + 2·2, + 2·2, all.
    # The total has the parameter of the module itself and the unused layer, too.
    assert table.data.splitlines() == [
        "| layer | output | kernel | stride | parameters | mult-adds | field |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| frozen Conv2d | 4×24×24 | 3 | 1 | 36 | 20,736 | 5 |",
        "| reused Conv2d | 4×12×12 | 3 | 1 | 144 | 20,736 | 10 |",
        "| reused Conv2d | 4×12×12 | 3 | 1 | 0 | 20,736 | 14 |",
        "| end.0 Conv2d | 6×5×5 | 3 | 2 | 222 | 5,550 | 18 |",
        "| end.2 AdaptiveAvgPool2d | 6×1×1 | 5 | 5 | 0 | 0 | 28 |",
        "| end.3 Flatten | 6 | 1 | 1 | 0 | 0 | 28 |",
        "| **total** |  |  |  | 415 | 67,758 |  |",
    ]


@pytest.mark.parametrize(
    ("name", "fields"),  # after each block, by hand: + (kernel - 1) · jump for each convolution and pool
    [
        ("Model1", [3, 5, 5, 6, 10, 14, 16, 24, 28, 28]),  # 40 at the end, but the image has 28 rows
        ("Model2", [3, 5, 5, 6, 10, 14, 18, 22, 26, 28]),
        ("Model4", [3, 5, 6, 10, 14, 18, 22, 28, 28]),
    ],
)
def test_receptive_fields_of_the_models(name, fields):
    model = create_model(name)
    blocks = list(dict(model.named_children()))
    assert plots.measure_fields(model, blocks) == list(zip(blocks, fields, strict=True))


def texts_of(items):
    """Return the texts of labels of a figure."""
    return [item.get_text() for item in items]


def values_of(lines):
    """Return the values of lines of a figure."""
    return [list(line.get_ydata()) for line in lines]


def test_field_that_cannot_be_measured_is_left_empty():
    class Constant(nn.Module):
        def forward(self, x):
            return x.nan_to_num()

    table = plots.summarize_model(nn.Sequential(nn.Conv2d(1, 1, 3), Constant()))
    assert table.data.splitlines()[3].endswith("| 0 |  |")


def test_network_with_an_lstm_has_a_table_and_fields(figures):
    class Rows(nn.LSTM):
        def forward(self, x):
            return super().forward(x.squeeze(1))

    model = nn.Sequential(Rows(28, 10, batch_first=True))
    assert "| 0 Rows | 28×10 | 1 | 1 | 1,600 |" in plots.summarize_model(model).data
    plots.plot_fields(model, torch.zeros(28, 28), "title")
    plots.plot_features(model, torch.zeros(1, 28, 28), "title")
    labels = [square.get_label() for square in figures[0].figure.axes[0].patches]
    assert labels == ["28×28: 0"]


def test_source_is_highlighted_and_scrolls_on_a_narrow_screen():
    source = plots.show_source(plots.number_of, plots.Layer)
    assert repr(source).startswith("def number_of(count, noun):\n")
    assert "\n\n\nclass Layer(NamedTuple):\n" in repr(source)
    html = source._repr_html_()
    assert "overflow-x: auto" in html
    assert 'style="color: #008000; font-weight: bold">def<' in html


def test_architecture_is_drawn_by_size_and_channels_with_the_numbers_of_each_block(figures):
    plots.plot_architecture(Branches(), "title")
    axis = figures[0].figure.axes[0]
    assert [slab.get_height() for slab in axis.patches] == [28, 24, 12, 1]
    widths = [slab.get_width() for slab in axis.patches]
    assert widths == pytest.approx([1 / 6, 4 / 6, 4 / 6, 1])  # of 1, 4, 4 and 6 channels
    texts = texts_of(axis.texts)
    assert texts[8:] == [
        *["frozen", "4×24×24", "5", "36"],
        *["reused", "4×12×12", "14", "144"],
        *["end", "6", "28", "222"],
    ]
    assert figures[0].alt == "title: image 1×28×28, frozen 4×24×24, reused 4×12×12, end 6"
    plots.plot_architecture(create_model("Model2"), "title")
    slabs = figures[1].figure.axes[0].patches
    assert slabs[4].get_facecolor() == pytest.approx((*to_rgb("lightgray"), 1))  # the pool
    assert slabs[5].get_facecolor() != slabs[4].get_facecolor()


# ---- figures ----


def shown_images(axes):
    """Return what the axes show, as one tensor."""
    return torch.stack([torch.tensor(axis.images[0].get_array()) for axis in axes if axis.images])


def test_figure_is_displayed_as_png_with_alternative_text_and_closed(figures, capsys):
    """With MPLBACKEND=agg, a kernel would show the text of a figure instead of a picture."""
    figure, _ = plt.subplots()
    plots.show_figure(figure, "name", "a description")
    assert figures[0].figure is figure
    assert figures[0].alt == "a description"
    assert not plt.fignum_exists(figure.number)
    assert "image/png" in plots.get_ipython().display_formatter.format(figure)[0]
    assert capsys.readouterr().out == ""


def test_figures_are_saved_on_request_and_outside_of_a_notebook_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "get_ipython", lambda: None)
    plots.plot_mistakes([], "title")
    assert "mistakes is not shown: set S7_FIGURES" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    monkeypatch.setenv("S7_FIGURES", "~/new/images")
    plots.plot_history(runs.History(), "title")
    assert (tmp_path / "new" / "images" / "curves.png").stat().st_size > 0
    assert capsys.readouterr().out == ""


def test_formats_of_the_user_stay(figures):
    """`%config InlineBackend.figure_formats = ['svg']` calls this function."""
    plots.select_figure_formats(plots.get_ipython(), {"svg"})
    plots.plot_digits(torch.zeros(1, 28, 28), [""], "title", "name")
    assert list(plots.get_ipython().display_formatter.format(figures[0].figure)[0])[-1] == "image/svg+xml"


def test_images_do_not_depend_on_the_style_of_the_user(figures):
    with plt.rc_context({"image.origin": "lower", "image.interpolation": "bilinear", "image.aspect": 3}):
        plots.plot_digits(torch.rand(1, 28, 28), [""], "title", "name")
        plots.plot_confusion(torch.eye(10).long(), "title")
        plots.plot_fields(create_model("Model2"), torch.zeros(28, 28), "title")
        plots.plot_features(create_model("Model2"), torch.zeros(1, 28, 28), "title")
    for shown in figures:
        axis = shown.figure.axes[0]
        image = axis.images[0]
        assert [image.origin, image.get_interpolation(), axis.get_aspect()] == ["upper", "nearest", 1]


def test_at_most_20_digits_are_plotted(figures):
    images = torch.zeros(25, 28, 28)
    plots.plot_digits(images, range(25), "25 images", "name")
    assert figures[0].alt == f"25 images: {', '.join(map(str, range(20)))}"
    plots.plot_digits(images, [""] * 25, "no captions", "name")
    assert figures[1].alt == "no captions"


# ---- convolution and learning rates ----


def test_convolution_is_shown_with_its_output_and_the_pixels_it_depends_on(figures):
    image = torch.rand(28, 28)
    kernel = torch.tensor([[-1.0, 0.5], [0, 1]])
    feature_map = F.conv2d(image[None, None], kernel[None, None])[0, 0]
    plots.plot_convolution(image, kernel, feature_map, row=4, column=7)
    axes = figures[0].figure.axes
    assert [axis.get_title() for axis in axes] == ["image 28×28", "kernel 2×2", "feature map 27×27"]
    assert torch.equal(torch.tensor(axes[2].images[0].get_array()), feature_map)
    assert texts_of(axes[1].texts) == ["-1", "0.5", "0", "1"]
    assert axes[0].patches[0].get_bbox().bounds == (6.5, 3.5, 2, 2)  # columns 7 and 8, rows 4 and 5
    assert axes[2].patches[0].get_bbox().bounds == (6.5, 3.5, 1, 1)


def test_loss_is_plotted_against_the_learning_rate(figures):
    plots.plot_rates([0.01, 0.1, 1], [2.0, 0.5, float("nan")], "title")
    axis = figures[0].figure.axes[0]
    assert axis.get_xscale() == "log"
    assert list(axis.lines[0].get_xdata()) == [0.01, 0.1, 1]
    assert list(axis.lines[0].get_ydata())[:2] == [2.0, 0.5]
    assert figures[0].alt == "title: 2.00 at 0.01, 0.50 at 0.1, nan at 1"


def test_cases_are_titled_with_the_gap_and_the_spread_of_the_last_epoch(figures):
    """The deviation of 99.0 and 99.2 is 0.1·√2, and the gap 99.5 − 99.1."""
    first = runs.History(train_acc=[99.0, 99.4], test_acc=[98.5, 99.0])
    second = runs.History(train_acc=[99.0, 99.6], test_acc=[98.7, 99.2])
    plots.plot_cases({"one": [first, second], "other": [second, first]})
    axis = figures[0].figure.axes[0]
    accuracies = values_of(axis.lines[3:6])
    assert accuracies == [[98.5, 99.0], [98.7, 99.2], pytest.approx([98.6, 99.1])]
    assert axis.get_title() == "one\ntest 99.10 ± 0.14\ngap 0.40"
    assert axis.get_ylim() == (98, 100)
    assert "one: test 99.10 ± 0.14, gap 0.40; other" in figures[0].alt


# ---- history ----


def history_of(test_acc):
    """Return the history of a run with these accuracies; its rate drops in the last epoch."""
    count = len(test_acc)
    return runs.History(
        train_losses=[0.5, *[0.1] * (count - 1)],
        train_acc=[80.0, 90.0, *[95.0] * count][:count],
        test_losses=[0.3, *[0.2] * (count - 1)],
        test_acc=test_acc,
        learning_rates=[*[0.1] * (count - 1), 0.01],
        seconds=[1.0] * count,
    )


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_history_is_plotted_per_epoch(figures, style):
    history = history_of([85.0, 96.5, 96.0])
    recorded = [history_of([97.0] * 15), history_of([98.0] * 15)]
    with plt.style.context(style):
        plots.plot_history(history, "Model3 on MNIST", augmented_epochs=2, recorded=recorded)
    losses, accuracies, rates = figures[0].figure.axes
    for axis, train_values, test_values in (
        (losses, history.train_losses, history.test_losses),
        (accuracies, history.train_acc, history.test_acc),
    ):
        train, test = axis.lines[:2]
        assert list(train.get_ydata()) == train_values
        assert list(test.get_ydata()) == test_values
        assert train.get_color() != test.get_color()
        assert train.get_linestyle() != test.get_linestyle()
        legend = texts_of(axis.get_legend().get_texts())
        assert legend[:2] == ["train", "test"]
        assert legend[-1] == "augmentation ends"
    assert list(rates.lines[0].get_ydata()) == history.learning_rates
    assert set(accuracies.lines[2].get_ydata()) == {99.4}
    assert values_of(accuracies.lines[3:5]) == [[97.0] * 3, [98.0] * 3]
    assert legend[3:-1] == ["test, 2 recorded runs"]
    for axis in (losses, accuracies, rates):
        assert list(axis.lines[0].get_xdata()) == [1, 2, 3]
        assert set(axis.lines[-1].get_xdata()) == {2.5}
        for line in axis.lines:  # visible on a light and on a dark background
            assert abs(sum(to_rgb(line.get_color())) - sum(to_rgb(axis.get_facecolor()))) > 1
    assert losses.get_ylim() == pytest.approx((0, 0.22))  # the first epoch does not set the scale
    assert accuracies.get_ylim() == pytest.approx((89.7, 100))
    assert rates.get_ylim()[0] == 0
    assert "test 96.00 %" in figures[0].alt
    assert "\n" not in figures[0].alt


@pytest.mark.parametrize("augmented_epochs", [None, -3, 0, 2])
def test_history_without_an_end_of_the_augmentation_has_no_line_for_it(figures, augmented_epochs):
    plots.plot_history(history_of([85.0, 96.5]), "interrupted", augmented_epochs)
    losses, _, rates = figures[0].figure.axes
    assert [len(losses.lines), len(rates.lines)] == [2, 1]
    assert losses.get_ylim()[1] > 0.5  # two epochs are plotted completely


def test_run_is_summarized():
    assert plots.summarize_run(runs.History(), "Run") == "Run: no completed epoch"
    history = history_of([99.5] * 10 + [98.9, 99.2, 99.41, 99.43, 99.4])
    assert plots.summarize_run(history, "Run").splitlines() == [
        "Run: 15 epochs, learning rate 0.1 to 0.01",
        "last epoch: train 95.00 %, test 99.40 %",
        "test accuracy over the last 5 epochs: mean 99.27 %, lowest 98.90 %",
        "epoch from which on it is at least 99.4 %: 13",
    ]
    assert plots.summarize_run(history_of([98.0]), "Run").splitlines()[2:] == [
        "test accuracy over the last 1 epoch: mean 98.00 %, lowest 98.00 %",
        "epoch from which on it is at least 99.4 %: never",
    ]


def test_target_is_met_by_the_last_five_epochs():
    assert plots.check_target(history_of([98.0] + [99.4] * 5)).endswith(": met")
    assert plots.check_target(history_of([99.5] * 5 + [99.39])).endswith(": not met")
    assert plots.check_target(history_of([99.5] * 4)).endswith("only 4 epochs")


# ---- comparison of runs ----


def saved_run(name, test_acc, recorded=(), **changes):
    """Return a run as it is read from a checkpoint."""
    summary = {"network": "Model2", "scheduler": "StepLR(gamma=0.1)", "epochs": "15"} | changes
    return runs.SavedRun(name, summary, history_of(test_acc), {"model.py": "text"}, list(recorded))


SAVED = [
    saved_run("a.pt", [99.5] * 10 + [99.3, 99.4, 99.4, 99.5, 99.5]),
    saved_run("b.pt", [99.0] * 5, [history_of([99.2]), history_of([99.4])], scheduler="None", epochs="5"),
    saved_run("c.pt", [99.3], [history_of([99.2]), history_of([99.4])]),
    saved_run("d.pt", [99.5], [history_of([99.2]), history_of([99.4])])._replace(sources={"model.py": "new"}),
]


def test_runs_are_compared_with_the_first_and_with_the_recorded_ones():
    description, _, *table = plots.compare_runs(SAVED).data.splitlines()
    assert description == "The first run, a.pt: network: Model2; scheduler: StepLR(gamma=0.1); epochs: 15."
    assert table[2:] == [
        "| a.pt |  | 15 of 15 | 99.42 | 99.30 | 12 |  |",
        "| b.pt | scheduler: None; epochs: 5 | 5 of 5 | 99.00 | 99.00 | never | 0.20 below |",
        "| c.pt |  | 1 of 15 | 99.30 | 99.30 | never | inside |",
        "| d.pt | model.py: other text | 1 of 15 | 99.50 | 99.50 | 1 | 0.10 above |",
    ]
    assert plots.compare_runs([]).data == "There are no runs yet."


def test_runs_are_plotted_beside_the_recorded_ones(figures):
    plots.plot_runs(SAVED)
    axis = figures[0].figure.axes[0]
    assert texts_of(axis.get_yticklabels()) == ["a.pt", "b.pt", "c.pt", "d.pt"]
    means = [line.get_xdata()[0] for line in axis.lines[:4]]
    assert means == pytest.approx([99.42, 99.0, 99.3, 99.5])
    assert axis.collections[1].get_offsets().tolist() == [[99.2, 1], [99.4, 1]]
    assert list(axis.lines[4].get_xdata()) == [99.4, 99.4]
    assert "4 runs" in figures[0].alt


# ---- misclassified images ----

TARGETS = torch.tensor([0, 1, 2, 2, 9, 9, 9])
PREDICTIONS = torch.tensor([0, 7, 2, 0, 4, 4, 9])  # images 1, 3, 4 and 5 are misclassified,
PROBABILITIES = torch.tensor([0.9, 0.5, 0.6, 0.4, 0.8, 0.7, 0.7])  # image 4 with the highest confidence


LOGITS = torch.zeros(7, 10)
LOGITS[range(7), PREDICTIONS] = (9 * PROBABILITIES / (1 - PROBABILITIES)).log()


class Scripted(nn.Module):
    """A model of these logits; image i is recognized by its constant brightness i."""

    def forward(self, data):
        assert not self.training
        return LOGITS[data[:, 0, 0, 0].long()]


@pytest.fixture
def found():
    """Return the confusion matrix and the misclassified images of the scripted model."""
    data = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 1, 28, 28)
    batches = [(data[:3], TARGETS[:3]), (data[3:], TARGETS[3:])]
    return plots.find_mistakes(Scripted().train(), "cpu", batches)


def test_mistakes_are_found_and_plotted_by_confidence(found, figures):
    confusion, mistakes = found
    assert confusion[TARGETS, PREDICTIONS].tolist() == [1, 1, 1, 1, 2, 2, 1]
    assert confusion.sum() == 7
    assert [mistake.probability for mistake in mistakes] == pytest.approx([0.8, 0.7, 0.5, 0.4])
    plots.plot_mistakes(mistakes, "Model3 on MNIST")
    axes = figures[0].figure.axes
    titles = [axis.get_title() for axis in axes[:5]]
    assert titles == ["9→4  80%", "9→4  70%", "1→7  50%", "2→0  40%", ""]
    assert shown_images(axes)[:, 0, 0].tolist() == [4, 5, 1, 3]
    assert [axis.axison for axis in axes] == [True] * 4 + [False] * 16
    title = "Model3 on MNIST: 4 misclassified images (true→predicted), most confident first"
    assert figures[0].figure.get_suptitle() == title
    assert figures[0].alt == f"{title}: 9→4  80%, 9→4  70%, 1→7  50%, 2→0  40%"


def test_confusion_matrix_is_plotted_with_counts_and_accuracies(found, figures):
    plots.plot_confusion(found[0], "Model3 on MNIST")
    axis = figures[0].figure.axes[0]
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert texts[4, 9] == "2"  # column 4 (predicted), row 9 (true)
    assert texts[9, 4] == "·"
    colored = axis.images[0].get_array()
    assert colored[9, 4] == 2
    assert colored[0, 0] == 0  # correct predictions are not colored
    labels = texts_of(axis.get_yticklabels())
    assert labels[:4] == ["0  (100.0 %)", "1  (0.0 %)", "2  (50.0 %)", "3  (0.0 %)"]
    assert axis.get_xlabel() == "predicted digit"
    assert "4 misclassified images" in figures[0].alt


def test_most_confused_digits_are_counted_both_ways():
    pairs = [(5, 3), (4, 9), (9, 4), (4, 9), (7, 2), (2, 7), (8, 6)]
    mistakes = [plots.Prediction(None, target, predicted, 0.5) for target, predicted in pairs]
    assert plots.most_confused(mistakes) == "4 and 9: 3 images\n2 and 7: 2 images\n3 and 5: 1 image"
    assert plots.most_confused([]) == "no digits were confused"


# ---- features and receptive fields ----


def test_features_are_those_of_each_block(figures):
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),  # must not change what is shown of the layer before
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(12, 10, 1),
    )
    sizes = ["12×26×26\nfield 3"] * 3 + ["12×1×1\nfield 28", "10×1×1\nfield 28"]
    data = torch.randn(1, 1, 28, 28)
    plots.plot_features(model.train(), data[0], "title")
    assert model.training
    assert model[1].num_batches_tracked == 0  # the statistics are those of before
    image, filters, *blocks = np.reshape(figures[0].figure.axes, (7, 10))
    assert torch.equal(shown_images(image)[0], data[0, 0])
    assert filters[0].get_ylabel() == "filters\n3×3"
    assert torch.equal(shown_images(filters), model[0].weight.detach()[:10, 0])
    model.eval()
    for number, (row, size) in enumerate(zip(blocks, sizes, strict=True)):
        data = model[number](data.clone()).detach()
        assert row[0].get_ylabel() == f"{number}\n{size}"
        torch.testing.assert_close(shown_images(row).float(), data[0, :10])
        scale = (data.min().item(), data.max().item())
        assert row[0].images[0].get_clim() == pytest.approx(scale)  # one for the whole row
    assert [axis.get_xlabel() for axis in row] == list(map(str, range(10)))


def test_features_of_other_networks_are_those_that_are_images(figures):
    plots.plot_features(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), torch.zeros(1, 28, 28), "title")
    plots.plot_features(Branches(), torch.zeros(1, 28, 28), "title")
    labels = [axis.get_ylabel() for shown in figures for axis in shown.figure.axes[::10]]
    blocks = ["frozen\n4×24×24\nfield 5", "reused\n4×12×12\nfield 10", "reused\n4×12×12\nfield 14"]
    assert labels == ["image", "image", *blocks]


def test_fields_are_squares_around_the_center_of_the_image(figures):
    plots.plot_fields(Branches(), torch.zeros(28, 28), "title")
    axis = figures[0].figure.axes[0]
    labels = [square.get_label() for square in axis.patches]
    assert labels == ["5×5: frozen", "10×10: reused", "14×14: reused", "28×28: end"]
    assert axis.patches[1].get_bbox().bounds == (8.5, 8.5, 10, 10)
    assert axis.patches[0].get_bbox().bounds == (10.5, 10.5, 5, 5)  # along the edges of pixels
    plots.plot_fields(create_model("Model4"), torch.zeros(28, 28), "title")
    assert figures[1].figure.axes[0].patches[-1].get_label() == "28×28: gap, logits"

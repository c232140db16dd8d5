"""Plot the recorded runs: the curves of every model, and accuracy against size.

    S7_FIGURES=images python benchmarks/plots.py

Writes Model1.png to Model5.png and overview.png into the folder `S7_FIGURES`. A model without recorded
runs is left out.
"""

import statistics

import common
import matplotlib.pyplot as plt

import utils
from model import create_model

CSV = common.ROOT / "benchmarks" / "accuracy.csv"
PARAMETER_LIMIT = 8000  # of the course
CURVES_SIZE = (11, 3.4)  # inches; the width is that of the notebook's figures, so that fonts look the same
OVERVIEW_SIZE = (11, 4.4)
MODEL_COLORS = {  # distinguishable for color-blind readers (Okabe and Ito)
    "Model1": "#E69F00",
    "Model2": "#009E73",
    "Model3": "#CC79A7",
    "Model4": "#0072B2",
    "Model5": "#D55E00",
}
DODGE = {"Model2": -40, "Model3": 40}  # parameters; both have the same number, and are drawn side by side
LABEL_ON_THE_LEFT = ("Model2", "Model4")  # there is no room on the right


def plot_curves(name, runs):
    """Plot train and test accuracy per epoch: thin lines for seeds, a thick line for their mean.

    Models 1 and 2 have one panel per schedule, the others a single panel.
    """
    panels = {name: runs[name, "described"]}
    if name in ("Model1", "Model2") and (name, "constant") in runs:
        panels = {
            f"{name}, constant rate": runs[name, "constant"],
            f"{name}, as described": runs[name, "described"],
        }
    figure, axes = plt.subplots(
        1, len(panels), figsize=CURVES_SIZE, layout="constrained", squeeze=False, sharey=True
    )
    for axis, (title, histories) in zip(axes[0], panels.items(), strict=True):
        plot_seeds(axis, [history.train_acc for history in histories], utils.TRAIN_COLOR, "train")
        plot_seeds(axis, [history.test_acc for history in histories], utils.TEST_COLOR, "test")
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.set_ylabel("accuracy (%)")
        axis.set_ylim(98, 100)  # early epochs may be cut off
        legend_position = "lower right"
        if name == "Model1":
            axis.set_ylim(86, 100)
            legend_position = "center right"
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc=legend_position)
    utils.show_figure(figure, name, f"Train and test accuracy of {name} per epoch, for each seed")


def plot_seeds(axis, accuracies, color, label):
    """Plot one thin line per seed and a thick one for their mean; `accuracies` is a list of lists."""
    epochs = range(1, len(accuracies[0]) + 1)
    for values in accuracies:
        axis.plot(epochs, values, color=color, linewidth=0.7, alpha=0.6)
    means = list(map(statistics.mean, zip(*accuracies, strict=True)))
    seeds = utils.number_of(len(accuracies), "seed")
    axis.plot(epochs, means, color=color, linewidth=2.4, label=f"{label}, mean of {seeds}")


def plot_overview(runs):
    """Plot test accuracy against the number of parameters: every seed, the means, the published results."""
    figure, axis = plt.subplots(figsize=OVERVIEW_SIZE, layout="constrained")
    for name in MODEL_COLORS:
        if (name, "described") in runs:
            plot_model(axis, name, runs[name, "described"])
    axis.axhline(utils.TARGET_ACCURACY, color="gray", linestyle="--", linewidth=1)
    axis.axvline(PARAMETER_LIMIT, color="gray", linestyle="--", linewidth=1)
    seed_label = f"one seed: mean of the last {utils.LAST_EPOCHS} epochs"
    axis.scatter([], [], color="black", alpha=0.6, s=30, label=seed_label)
    axis.plot([], [], color="black", linestyle="", marker="_", markersize=22, label="mean of the seeds")
    axis.plot([], [], color="black", linestyle="", marker="x", markersize=9, label="published: best epoch")
    axis.plot([], [], color="gray", linestyle="--", label="the course's target and limit")
    axis.set_xlabel("parameters")
    axis.set_ylabel("test accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower center")
    axis.set_xlim(4100, 8200)
    utils.show_figure(figure, "overview", "Test accuracy against the number of parameters of five models")


def plot_model(axis, name, histories):
    """Plot a model's seeds, their mean with its name, and its published result if there is one."""
    color = MODEL_COLORS[name]
    parameters = common.count_parameters(create_model(name)) + DODGE.get(name, 0)
    values = list(map(common.mean_of_last_epochs, histories))
    mean = statistics.mean(values)
    axis.scatter([parameters] * len(values), values, color=color, alpha=0.6, s=30)
    axis.plot(parameters, mean, color=color, marker="_", markersize=22, markeredgewidth=2.5)
    offset = 15
    alignment = "left"
    if name in LABEL_ON_THE_LEFT:
        offset = -15
        alignment = "right"
    axis.annotate(
        f"{name}: {mean:.2f} %",
        (parameters, mean),
        (offset, 0),
        textcoords="offset points",
        horizontalalignment=alignment,
        verticalalignment="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # hides the line behind the text
    )
    if name in common.PUBLISHED:
        axis.plot(parameters, common.PUBLISHED[name].test_acc, color=color, marker="x", markersize=9)


def main():
    runs = common.recorded_runs(common.read_rows(CSV))
    for name in MODEL_COLORS:
        if (name, "described") in runs:
            plot_curves(name, runs)
    plot_overview(runs)


if __name__ == "__main__":
    main()

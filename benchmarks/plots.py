"""Plot the recorded runs: the curves of every model, and accuracy against size.

    S7_FIGURES=images python benchmarks/plots.py

Writes Model1.png to Model5.png and overview.png into the folder `S7_FIGURES`.
"""

import statistics

import matplotlib.pyplot as plt
from common import PUBLISHED, ROOT, count_parameters, mean_of_last_five, read_rows, recorded_runs

import utils
from model import create_model

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
DODGE = 40  # parameters; Models 2 and 3 have the same number, and are drawn side by side


def plot_curves(name, runs):
    """Plot train and test accuracy per epoch: thin lines for seeds, a thick line for their mean.

    Models 1 and 2 have one panel per schedule, the others a single panel.
    """
    schedules = ["described"]
    if name in ("Model1", "Model2"):
        schedules = ["constant", "described"]
    figure, axes = plt.subplots(
        1, len(schedules), figsize=CURVES_SIZE, layout="constrained", squeeze=False, sharey=True
    )
    for axis, schedule in zip(axes[0], schedules, strict=True):
        histories = runs[name, schedule]
        train_acc = [history.train_acc for history in histories]
        test_acc = [history.test_acc for history in histories]
        plot_seeds(axis, train_acc, utils.TRAIN_COLOR, "train")
        plot_seeds(axis, test_acc, utils.TEST_COLOR, "test")
        title = name
        if len(schedules) > 1:
            title = {"constant": f"{name}, constant rate", "described": f"{name}, as described"}[schedule]
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
    means = [statistics.mean(values) for values in zip(*accuracies, strict=True)]
    axis.plot(epochs, means, color=color, linewidth=2.4, label=f"{label}, mean of {len(accuracies)} seeds")


def plot_overview(runs):
    """Plot test accuracy against the number of parameters: every seed, the means, the published results."""
    figure, axis = plt.subplots(figsize=OVERVIEW_SIZE, layout="constrained")
    for name, color in MODEL_COLORS.items():
        parameters = count_parameters(create_model(name))
        if name == "Model2":
            parameters -= DODGE
        elif name == "Model3":
            parameters += DODGE
        values = list(map(mean_of_last_five, runs[name, "described"]))
        mean = statistics.mean(values)
        axis.scatter([parameters] * len(values), values, color=color, alpha=0.6, s=30)
        axis.plot(parameters, mean, color=color, marker="_", markersize=22, markeredgewidth=2.5)
        offset = 15
        alignment = "left"
        if name in ("Model2", "Model4"):  # there is no room on the right
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
        if name in PUBLISHED:
            axis.plot(parameters, PUBLISHED[name].test_acc, color=color, marker="x", markersize=9)
    axis.axhline(utils.TARGET_ACCURACY, color="gray", linestyle="--", linewidth=1)
    axis.axvline(PARAMETER_LIMIT, color="gray", linestyle="--", linewidth=1)
    axis.scatter([], [], color="black", alpha=0.6, s=30, label="one seed: mean of the last five epochs")
    axis.plot([], [], color="black", linestyle="", marker="_", markersize=22, label="mean of the seeds")
    axis.plot([], [], color="black", linestyle="", marker="x", markersize=9, label="published: best epoch")
    axis.plot([], [], color="gray", linestyle="--", label="the course's target and limit")
    axis.set_xlabel("parameters")
    axis.set_ylabel("test accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower center")
    axis.set_xlim(4100, 8200)
    utils.show_figure(figure, "overview", "Test accuracy against the number of parameters of five models")


def main():
    runs = recorded_runs(read_rows(ROOT / "benchmarks" / "accuracy.csv"))
    for name in MODEL_COLORS:
        plot_curves(name, runs)
    plot_overview(runs)


if __name__ == "__main__":
    main()

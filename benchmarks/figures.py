"""Plot the recorded runs: the steps to 99.4 %, the curves of every model, and accuracy against size.

    S7_FIGURES=images python benchmarks/figures.py

Writes steps.png, Model1.png to Model5.png and overview.png into the folder `S7_FIGURES`.
"""

import statistics
import textwrap

import common
import matplotlib.pyplot as plt
import tables

import plots
import utils
from model import MODELS, create_model

WIDTH = 6.5  # inches, as in the notebook; the text stays legible on a phone
PARAMETER_LIMIT = 8000  # of the course
CONSTANT_COLOR = "#CC79A7"
MODEL_COLORS = {  # distinguishable for color-blind readers (Okabe and Ito)
    "Model1": "#E69F00",
    "Model2": "#009E73",
    "Model3": "#CC79A7",
    "Model4": "#0072B2",
    "Model5": "#D55E00",
}
DODGE = {"Model2": -40, "Model3": 40}  # parameters; both have the same number, and are drawn side by side
LABEL_ON_THE_LEFT = ("Model2", "Model4")  # there is no room on the right
TARGET_LINE = {
    "y": plots.TARGET_ACCURACY,
    "label": f"{plots.TARGET_ACCURACY} %",
    "color": "gray",
    "linestyle": "--",
    "linewidth": 1,
}
CHANGE_LINE = {"color": "gray", "linestyle": ":"}

plt.rcParams["font.size"] = 11


def plot_steps(runs):
    """Plot the mean of the last epochs of every seed, a row per step from Model1 to Model4, and the mean."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4.4), layout="constrained")
    for row, key in enumerate(tables.STEPS.values()):
        values = list(map(common.mean_of_last_epochs, runs[key].values()))
        mean = statistics.mean(values)
        axis.scatter(values, [row] * len(values), color=plots.TEST_COLOR, alpha=0.5, s=36)
        axis.plot(mean, row, color=plots.TRAIN_COLOR, marker="|", markersize=18, markeredgewidth=2.5)
        axis.annotate(
            f"{mean:.2f}", (mean, row), (0, 11), textcoords="offset points", ha="center", fontsize=10
        )
    axis.axvline(plots.TARGET_ACCURACY, color="gray", linestyle="--")
    labels = [textwrap.fill(change, 20) for change in tables.STEPS]
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.7)  # from top to bottom
    axis.set_xlabel(f"test accuracy (%), mean of the last {plots.LAST_EPOCHS} epochs")
    axis.grid(alpha=0.3)
    plots.show_figure(figure, "steps", "Test accuracy of each step from Model1 to Model4, a dot per seed")


def plot_curves(name, runs):
    """Plot accuracy per epoch: thin lines for seeds, thick lines for their mean.

    A second panel compares the schedules of Models 1 and 2, and shows the test loss of Model3.
    """
    described = runs[name, "described"].values()
    recipe = utils.RECIPES[name]
    panels = 1
    if name in tables.PUBLISHED:
        panels = 2
    figure, axes = plt.subplots(
        panels, 1, figsize=(WIDTH, 3.4 * panels), layout="constrained", squeeze=False, sharex=True
    )
    axes = axes[:, 0]
    plot_seeds(axes[0], [history.train_acc for history in described], plots.TRAIN_COLOR, "train")
    plot_seeds(axes[0], [history.test_acc for history in described], plots.TEST_COLOR, "test")
    axes[0].set_title(name)
    axes[0].set_ylabel("accuracy (%)")
    axes[0].set_ylim(98, 100)  # early epochs may be cut off
    if name == "Model1":
        axes[0].set_ylim(86, 100)
    axes[0].axhline(**TARGET_LINE)
    if name in ("Model1", "Model2"):
        constant = runs[name, "constant"].values()
        plot_seeds(axes[1], [history.test_acc for history in constant], CONSTANT_COLOR, "constant rate")
        plot_seeds(axes[1], [history.test_acc for history in described], plots.TEST_COLOR, "as described")
        axes[1].set_title("The schedules")
        axes[1].set_ylabel("test accuracy (%)")
        axes[1].set_ylim(98, 99.5)
        axes[1].axhline(**TARGET_LINE)
    elif name == "Model3":
        losses = [history.test_losses for history in described]
        plot_seeds(axes[1], losses, plots.TEST_COLOR, "test loss")
        mark_best_losses(axes[1], losses)
        axes[1].set_title("What ReduceLROnPlateau watches")
        axes[1].set_ylabel("test loss")
        axes[1].set_ylim(0.025, 0.065)
    for axis in axes:
        if name in ("Model1", "Model2"):
            step_size = recipe.scheduler_args["step_size"]
            axis.axvline(step_size + 0.5, label="the rate drops", **CHANGE_LINE)
            axis.axvline(2 * step_size + 0.5, **CHANGE_LINE)
        if recipe.augmentation is not None:
            axis.axvline(common.EPOCHS - recipe.clean_epochs + 0.5, label="augmentation ends", **CHANGE_LINE)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=10)
    axes[-1].set_xlabel("epoch")
    plots.show_figure(figure, name, f"Accuracy of {name} per epoch, for each seed")


def plot_seeds(axis, lines, color, label):
    """Plot one thin line per seed and a thick one for their mean; `lines` has a list of values per seed."""
    epochs = range(1, len(lines[0]) + 1)
    for values in lines:
        axis.plot(epochs, values, color=color, linewidth=0.7, alpha=0.6)
    means = list(map(statistics.mean, zip(*lines, strict=True)))
    seeds = plots.number_of(len(lines), "seed")
    axis.plot(epochs, means, color=color, linewidth=2.4, label=f"{label}, mean of {seeds}")


def mark_best_losses(axis, lines):
    """Mark the losses at which ReduceLROnPlateau starts to count again; `lines` is a list per seed."""
    threshold = utils.RECIPES["Model3"].scheduler_args["threshold"]
    epochs = []
    losses = []
    for values in lines:
        best = float("inf")
        for epoch, loss in enumerate(values, 1):
            if loss < best - threshold:
                best = loss
                epochs.append(epoch)
                losses.append(loss)
    label = "a new best of a seed: its count starts again"
    axis.scatter(epochs, losses, color=plots.TEST_COLOR, s=20, label=label)


def plot_overview(runs):
    """Plot test accuracy against the number of parameters: every seed, the means, the published results."""
    figure, axis = plt.subplots(figsize=(WIDTH, 5.2), layout="constrained")
    for name in MODEL_COLORS:
        plot_model(axis, name, runs[name, "described"].values())
    axis.axhline(plots.TARGET_ACCURACY, color="gray", linestyle="--", linewidth=1)
    axis.axvline(PARAMETER_LIMIT, color="gray", linestyle="--", linewidth=1)
    seed_label = f"one seed: mean of the last {plots.LAST_EPOCHS} epochs"
    axis.scatter([], [], color="black", alpha=0.6, s=30, label=seed_label)
    axis.plot([], [], color="black", linestyle="", marker="_", markersize=22, label="mean of the seeds")
    axis.plot([], [], color="black", linestyle="", marker="x", markersize=9, label="published: best epoch")
    axis.plot([], [], color="gray", linestyle="--", label="the course's target and limit")
    axis.set_xlabel("parameters")
    axis.set_ylabel("test accuracy (%)")
    axis.grid(alpha=0.3)
    axis.set_xlim(4100, 8300)
    figure.legend(loc="outside lower center", ncols=2, fontsize=10)
    plots.show_figure(figure, "overview", "Test accuracy against the number of parameters of five models")


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
        f"{name}\n{mean:.2f} %",
        (parameters, mean),
        (offset, 0),
        textcoords="offset points",
        horizontalalignment=alignment,
        verticalalignment="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # hides the line behind the text
    )
    if name in tables.PUBLISHED:
        _, published = tables.PUBLISHED[name]
        axis.plot(parameters, published, color=color, marker="x", markersize=9)


def main():
    runs = common.recorded_runs()
    plot_steps(runs)
    for name in MODELS:
        plot_curves(name, runs)
    plot_overview(runs)


if __name__ == "__main__":
    main()

"""Plot the recorded runs: the steps to 99.4 %, and the curves of every model.

    S7_FIGURES=images python benchmarks/figures.py

Writes steps.png and Model1.png to Model5.png into the folder `S7_FIGURES`.
"""

import statistics
import textwrap

import common
import matplotlib.pyplot as plt
import tables

import plots
import utils
from model import MODELS
from runs import recorded_runs

WIDTH = 6.5  # inches, as in the notebook; the text stays legible on a phone
CONSTANT_COLOR = "#CC79A7"
TARGET_LINE = {"color": "gray", "linestyle": "--", "linewidth": 1, "label": f"{plots.TARGET_ACCURACY} %"}
CHANGE_LINE = {"color": "gray", "linestyle": ":"}

plt.rcParams["font.size"] = 11


def plot_steps(runs):
    """Plot the mean of the last epochs of every seed, a row per step from Model1 to Model4, and the mean."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4.4), layout="constrained")
    for row, key in enumerate(tables.STEPS.values()):
        values = list(map(plots.mean_of_last_epochs, runs[key].values()))
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
    recipe = utils.RECIPES[name]
    described = runs[name, "described"].values()
    panels = 1
    if name in tables.PUBLISHED:
        panels = 2
    figure, axes = plt.subplots(
        panels, 1, figsize=(WIDTH, 3.4 * panels), layout="constrained", squeeze=False, sharex=True
    )
    axes = axes[:, 0]
    plot_seeds(axes[0], described, "train_acc", plots.TRAIN_COLOR, "train")
    plot_seeds(axes[0], described, "test_acc", plots.TEST_COLOR, "test")
    axes[0].axhline(plots.TARGET_ACCURACY, **TARGET_LINE)
    axes[0].set(title=name, ylabel="accuracy (%)", ylim=(98, 100))  # early epochs may be cut off
    if name == "Model1":
        axes[0].set_ylim(86, 100)
    if name == "Model3":
        plot_seeds(axes[1], described, "test_losses", plots.TEST_COLOR, "test loss")
        mark_best_losses(axes[1], described)
        axes[1].set(title="What ReduceLROnPlateau watches", ylabel="test loss", ylim=(0.025, 0.065))
    elif panels == 2:
        plot_seeds(axes[1], runs[name, "constant"].values(), "test_acc", CONSTANT_COLOR, "constant rate")
        plot_seeds(axes[1], described, "test_acc", plots.TEST_COLOR, "as described")
        axes[1].axhline(plots.TARGET_ACCURACY, **TARGET_LINE)
        axes[1].set(title="The schedules", ylabel="test accuracy (%)", ylim=(98, 99.5))
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


def plot_seeds(axis, histories, field, color, label):
    """Plot a field of `runs.History`: one thin line per seed, and a thick one for their mean."""
    lines = [getattr(history, field) for history in histories]
    epochs = range(1, common.EPOCHS + 1)
    for values in lines:
        axis.plot(epochs, values, color=color, linewidth=0.7, alpha=0.6)
    means = list(map(statistics.mean, zip(*lines, strict=True)))
    axis.plot(epochs, means, color=color, linewidth=2.4, label=f"{label}, mean of {len(lines)} seeds")


def mark_best_losses(axis, histories):
    """Mark the test losses at which ReduceLROnPlateau starts to count again."""
    threshold = utils.RECIPES["Model3"].scheduler_args["threshold"]
    epochs = []
    losses = []
    for history in histories:
        best = float("inf")
        for epoch, loss in enumerate(history.test_losses, 1):
            if loss < best - threshold:
                best = loss
                epochs.append(epoch)
                losses.append(loss)
    label = "a new best of a seed: its count starts again"
    axis.scatter(epochs, losses, color=plots.TEST_COLOR, s=20, label=label)


def main():
    runs = recorded_runs()
    plot_steps(runs)
    for name in MODELS:
        plot_curves(name, runs)


if __name__ == "__main__":
    main()

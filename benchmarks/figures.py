"""Plot the recorded runs: three networks with four recipes, and the curves of every model.

    S7_FIGURES=images python benchmarks/figures.py

Writes recipes.png and Model1.png to Model5.png into the folder `S7_FIGURES`.
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
SEPARABLE_COLOR = "#009E73"
TARGET_LINE = {"color": "gray", "linestyle": "--", "linewidth": 1, "label": f"{plots.TARGET_ACCURACY} %"}
CHANGE_LINE = {"color": "gray", "linestyle": ":"}

plt.rcParams["font.size"] = 11


def plot_crossing(runs):
    """Plot the mean of the last epochs for each recipe: a line per network, and a dot per seed."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4.8), layout="constrained")
    positions = range(len(tables.CROSSING))
    styles = [
        ("Model2's network", plots.TRAIN_COLOR, "s"),
        ("Model4's network", plots.TEST_COLOR, "o"),
        ("separable network", SEPARABLE_COLOR, "^"),
    ]
    for network, (label, color, marker) in enumerate(styles):
        means = []
        for position, keys in enumerate(tables.CROSSING.values()):
            values = list(map(plots.mean_of_last_epochs, runs[keys[network]].values()))
            x = position - 0.1 + 0.1 * network  # side by side
            axis.scatter([x] * len(values), values, color=color, marker=marker, alpha=0.45, s=30, linewidth=0)
            means.append(statistics.mean(values))
        axis.plot(positions, means, color=color, marker=marker, markersize=8, linewidth=2.4, label=label)
    axis.axhline(plots.TARGET_ACCURACY, **TARGET_LINE)
    axis.set_xticks(positions, [textwrap.fill(recipe, 15) for recipe in tables.CROSSING])
    axis.set(xlabel="recipe", ylabel=f"test accuracy (%), mean of the last {plots.LAST_EPOCHS} epochs")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    plots.show_figure(figure, "recipes", "Test accuracy of three networks with four recipes, a dot per seed")


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
    plots.plot_seeds(axes[0], described, "train_acc", plots.TRAIN_COLOR, "train")
    plots.plot_seeds(axes[0], described, "test_acc", plots.TEST_COLOR, "test")
    axes[0].axhline(plots.TARGET_ACCURACY, **TARGET_LINE)
    axes[0].set(title=name, ylabel="accuracy (%)", ylim=(98, 100))  # early epochs may be cut off
    if name == "Model1":
        axes[0].set_ylim(86, 100)
    if name == "Model3":
        plots.plot_seeds(axes[1], described, "test_losses", plots.TEST_COLOR, "test loss")
        mark_best_losses(axes[1], described)
        axes[1].set(title="What ReduceLROnPlateau watches", ylabel="test loss", ylim=(0.025, 0.065))
    elif panels == 2:
        plots.plot_seeds(
            axes[1],
            runs[name, "constant"].values(),
            "test_acc",
            CONSTANT_COLOR,
            "constant rate",
        )
        plots.plot_seeds(axes[1], described, "test_acc", plots.TEST_COLOR, "as described")
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
        axis.legend(fontsize=10, title="thick: mean of five seeds", title_fontsize=10)
    axes[-1].set_xlabel("epoch")
    plots.show_figure(figure, name, f"Accuracy of {name} per epoch, for each seed")


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
    plot_crossing(runs)
    for name in MODELS:
        plot_curves(name, runs)


if __name__ == "__main__":
    main()

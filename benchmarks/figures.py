"""Plot the recorded runs: three networks with four recipes, and the curves of every model.

    S7_FIGURES=images python benchmarks/figures.py

Writes recipes.png and Model1.png to Model5.png into the folder `S7_FIGURES`.
"""

import statistics
import textwrap

import matplotlib.pyplot as plt
import tables

import plots
from model import MODELS
from runs import recorded_runs

STYLES = [  # label, color and marker of tables.CROSSED
    ("Model2's network", plots.TRAIN_COLOR, "s"),
    ("Model4's network", plots.TEST_COLOR, "o"),
    ("separable network", "#009E73", "^"),
]

plt.rcParams["font.size"] = 11


def plot_crossing(runs):
    """Plot the mean of the last epochs for each recipe: a line per network, and a dot per seed."""
    figure, axis = plt.subplots(figsize=(6.5, 4.8), layout="constrained")  # inches; legible on a phone
    for column, network in enumerate(tables.CROSSED):
        label, color, marker = STYLES[column]
        means = []
        for row, schedules in enumerate(tables.CROSSING.values()):
            values = list(map(plots.mean_of_last_epochs, runs[network, schedules[column]].values()))
            x = row - 0.1 + 0.1 * column  # side by side
            axis.scatter([x] * len(values), values, color=color, marker=marker, alpha=0.45, s=30, linewidth=0)
            means.append(statistics.mean(values))
        axis.plot(means, color=color, marker=marker, markersize=8, linewidth=2.4, label=label)
    target = plots.TARGET_ACCURACY
    axis.axhline(target, color="gray", linestyle="--", linewidth=1, label=f"{target} %")
    axis.set_xticks(range(len(tables.CROSSING)), [textwrap.fill(recipe, 15) for recipe in tables.CROSSING])
    axis.set(xlabel="recipe", ylabel=f"test accuracy (%), mean of the last {plots.LAST_EPOCHS} epochs")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    plots.show_figure(figure, "recipes", "Test accuracy of three networks with four recipes, a dot per seed")


def main():
    runs = recorded_runs()
    plot_crossing(runs)
    for name in MODELS:
        cases = {f"{name}, as described": list(runs[name, "described"].values())}
        if name in ("Model1", "Model2"):
            cases[f"{name}, constant rate"] = list(runs[name, "constant"].values())
        bottom = 98
        if name == "Model1":
            bottom = 86
        plots.plot_cases(cases, name, bottom)


if __name__ == "__main__":
    main()

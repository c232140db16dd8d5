"""What the notebook shows: the layer table, plots and reports.

A plot is a function that ends in `show_figure`.
"""

import ast
import copy
import inspect
import itertools
import os
import statistics
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchinfo
from IPython import get_ipython
from IPython.core.pylabtools import select_figure_formats
from IPython.display import Code, Markdown, display
from matplotlib.figure import Figure
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from torch import nn

from utils import DIGITS, SIDE, unwrap

TRAIN_COLOR = "#D55E00"  # distinguishable for color-blind readers (Okabe and Ito)
TEST_COLOR = "#0072B2"
NO_TICKS = {"xticks": [], "yticks": []}
AS_PIXELS = {"origin": "upper", "aspect": "equal", "interpolation": "nearest"}  # whatever the user's style is
TARGET_ACCURACY = 99.4  # percent, of the course
LAST_EPOCHS = 5  # of a run, to which the target applies: our reading of the course's "last few"

# ---- figures ----


def show_figure(figure, name, alt):
    """Display a figure with the alternative text `alt`.

    Also save it as `name.png` if the environment variable `S7_FIGURES` names a folder.
    """
    folder = os.environ.get("S7_FIGURES")
    shell = get_ipython()
    if folder:
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=110)
    elif shell is None:
        print(f"The figure {name} is not shown: set S7_FIGURES to a folder to save the figures there")
    if shell is not None:
        formatters = shell.display_formatter.formatters.values()
        if not any(Figure in formatter.type_printers for formatter in formatters):
            select_figure_formats(shell, {"png"})  # a kernel started with MPLBACKEND=agg has no format
        display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def plot_digits(images, captions, title, name):
    """Plot up to 20 images `(N, 1, 28, 28)` or `(N, 28, 28)`, dark on light, with captions."""
    figure, axes = plt.subplots(4, 5, figsize=(6.5, 6.2), layout="constrained", subplot_kw=NO_TICKS)
    figure.suptitle(title, fontsize=10)
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image.squeeze().numpy(), cmap="gray_r", **AS_PIXELS)
        axis.set_title(caption, fontsize=9)
        axis.spines[:].set_color("lightgray")  # shows where the image ends
    for axis in axes.flat[len(images) :]:
        axis.set_axis_off()
    shown = ", ".join(map(str, captions[:20]))
    show_figure(figure, name, f"{title}: {shown}".rstrip(": ,"))


# ---- source code ----


class Source(Code):
    """Highlighted Python code. Long lines scroll on a narrow screen, instead of being broken inside words."""

    def _repr_html_(self):
        style = "font-family: monospace; line-height: 1.3; white-space: pre; overflow-x: auto"
        formatter = HtmlFormatter(noclasses=True, cssstyles="color: black", prestyles=style)  # on any page
        return highlight(self.data, PythonLexer(), formatter)


def show_source(*items):
    """Return the source of functions or classes, defined in a file or in a cell, as a `Source`."""
    return Source("\n\n".join(map(read_source, items)), language="python")


def read_source(item):
    """Return the source of a function or class as text."""
    if not inspect.isclass(item) or item.__module__ != "__main__":
        return inspect.getsource(item)
    method = next(filter(inspect.isfunction, vars(item).values()))  # `inspect` finds classes in files only
    lines, _ = inspect.findsource(method)  # of the whole cell
    text = "".join(lines)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == item.__name__:
            return ast.get_source_segment(text, node) + "\n"


# ---- the network: layers, receptive fields, outputs ----


class Layer(NamedTuple):
    """One call of a layer, for one image."""

    name: str  # path of attributes, for example "block2.0"
    kind: str  # class, for example "Conv2d"
    output: tuple  # shape
    kernel: int  # side length in pixels; 1 if the layer has none
    stride: int
    parameters: int  # 0 if it was called before, and counted there
    mult_adds: int
    receptive_field: int | None  # see `measure_fields`


def layer_table(model):
    """Return the layers of a model, in the order of their calls, as a list of `Layer`.

    Parameters and multiply-adds are counted by torchinfo; receptive fields are measured.
    """
    model = unwrap(model)
    summary = torchinfo.summary(model, (1, 1, SIDE, SIDE), verbose=0)
    calls = [info for info in summary.summary_list if info.is_leaf_layer]
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    layers = []
    for info, (name, field) in zip(calls, measure_fields(model, leaves), strict=True):
        output = tuple(info.output_size[1:])
        kernel = np.max(getattr(info.module, "kernel_size", 1)).item()  # of a number or a pair
        stride = np.max(getattr(info.module, "stride", 1)).item()
        if isinstance(info.module, nn.AdaptiveAvgPool2d):
            kernel = info.input_size[-1] // info.output_size[-1]
            stride = kernel
        parameters = info.num_params
        if info.is_recursive:
            parameters = 0
        layers.append(Layer(name, info.class_name, output, kernel, stride, parameters, info.macs, field))
    return layers


def measure_fields(model, names):
    """Return modules, given by name, and their receptive fields: a list of pairs, one for each call.

    A field is given by its side length in pixels, and None if it cannot be measured. It spans the rows of
    the image that the middle row of the output depends on: NaN in such a row makes the output NaN, whatever
    the layers are, and whatever their weights. It is at most the height of the image.
    """
    images = torch.zeros(SIDE, 1, SIDE, SIDE)
    row = torch.arange(SIDE)
    images[row, :, row] = float("nan")
    fields = []
    for name, output in record_outputs(model, names, images):
        if output.dim() == 4:
            output = output[:, :, output.shape[2] // 2]
        field = None
        depends = output.flatten(1).isnan().any(dim=1).nonzero()
        if len(depends) > 0:
            field = (depends.max() - depends.min() + 1).item()
        fields.append((name, field))
    return fields


@torch.no_grad()
def record_outputs(model, names, data):
    """Return modules, given by name, and their outputs for one batch: a list of pairs, one for each call.

    Of several outputs, such as those of an LSTM, it is the first. A copy of the model is called, in
    evaluation mode. On the CPU and in float64, no convolution uses an algorithm (Winograd, FFT) by which a
    pixel changes outputs that do not depend on it.
    """
    model = copy.deepcopy(model).cpu().double().eval()
    outputs = []

    def keep(name, module, inputs, output):
        if isinstance(output, tuple):
            output = output[0]
        outputs.append((name, output.clone()))

    for name in names:
        model.get_submodule(name).register_forward_hook(partial(keep, name))
    model(data.double())
    return outputs


def markdown_table(titles, rows):
    """Return a table in Markdown."""
    lines = []
    for cells in [titles, ["---"] * len(titles), *rows]:
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def summarize_model(model):
    """Return the layers of a model as a table, with the totals in the last row.

    ReLU is left out: it changes neither the shape nor the receptive field, and has no parameters.
    """
    rows = []
    layers = layer_table(model)
    for layer in layers:
        if layer.kind == "ReLU":
            continue
        row = [f"{layer.name} {layer.kind}", "×".join(map(str, layer.output)), layer.kernel, layer.stride]
        row += [f"{layer.parameters:,}", f"{layer.mult_adds:,}", layer.receptive_field or ""]
        rows.append(row)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mult_adds = sum(layer.mult_adds for layer in layers)
    rows.append(["**total**", "", "", "", f"{parameters:,}", f"{mult_adds:,}", ""])
    titles = ["layer", "output", "kernel", "stride", "parameters", "mult-adds", "field"]
    return Markdown(markdown_table(titles, rows))


def plot_architecture(model, title):
    """Draw the blocks of a model as slabs, from the image down to the last output, with their numbers.

    The height of a slab is the side length of the block's output, its width the number of channels. Blocks
    without parameters are gray.
    """
    rows = [("image", (1, SIDE, SIDE), "", "")]
    for name, group in itertools.groupby(layer_table(model), lambda layer: layer.name.split(".")[0]):
        layers = list(group)
        parameters = sum(layer.parameters for layer in layers)
        rows.append((name, layers[-1].output, layers[-1].receptive_field or "", f"{parameters:,}"))
    widest = max(output[0] for _, output, _, _ in rows)
    figure, axis = plt.subplots(layout="constrained")

    def write(y, *texts):  # beside the slabs, which are at x from 0 to 1
        for x, text, side in zip((1.15, 2, 3, 3.85), texts, ("left", "left", "right", "right"), strict=True):
            axis.text(x, y, text, ha=side, va="center", fontsize=9)

    write(2, "block", "output", "field", "parameters")
    y = 8  # in pixels of the outputs, downward
    for name, output, field, parameters in rows:
        width = output[0] / widest
        height = max(output[1:], default=1)
        row_height = max(height, 5)  # room for a line of text
        middle = y + row_height / 2
        slab = plt.Rectangle((0.5 - width / 2, middle - height / 2), width, height, edgecolor="gray")
        slab.set_facecolor("lightgray" if parameters in ("", "0") else TEST_COLOR)
        axis.add_patch(slab)
        write(middle, name, "×".join(map(str, output)), field, parameters)
        y += row_height + 2
    axis.set(xlim=(-0.05, 3.9), ylim=(y, 0))
    axis.set_axis_off()
    axis.set_title(title, fontsize=10)
    figure.set_size_inches(4.2, 0.4 + y / 30)
    sizes = ", ".join(f"{name} {'×'.join(map(str, output))}" for name, output, _, _ in rows)
    show_figure(figure, "architecture", f"{title}: {sizes}")


def plot_fields(model, image, title):
    """Draw the receptive field of each block of a model as a square on one image `(28, 28)`.

    Blocks with the same receptive field share a square.
    """
    model = unwrap(model)
    blocks = {}
    for name, field in measure_fields(model, dict(model.named_children())):
        if field is not None:
            blocks.setdefault(field, []).append(name)
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained", subplot_kw=NO_TICKS)
    axis.imshow(image.numpy(), cmap="gray_r", **AS_PIXELS)
    axis.set_title(title, fontsize=10)
    for number, (field, names) in enumerate(blocks.items()):
        corner = (SIDE - field) // 2 - 0.5  # pixels are centered at integers
        square = plt.Rectangle((corner, corner), field, field, fill=False, linewidth=2)
        square.set_edgecolor(plt.get_cmap("viridis")(number / len(blocks)))
        square.set_label(f"{field}×{field}: {', '.join(names)}")
        axis.add_patch(square)
    figure.legend(loc="outside right center")
    show_figure(figure, "fields", f"{title}, as squares on one image")


def plot_features(model, image, title):
    """Plot one image, the filters of a model's first layer, and what each of its blocks makes of the image.

    `image` is normalized, `(1, 28, 28)`. Each row shows the first ten channels of a block, on a common
    scale from dark (low) to light (high), with their size and receptive field. Blocks whose output is no
    image are left out.
    """
    model = unwrap(model)
    rows = [("image", image)]
    filters = next(model.parameters()).detach().cpu()
    if filters.dim() == 4 and filters.shape[1] == 1:
        height, width = filters.shape[2:]
        rows.append((f"filters\n{height}×{width}", filters[:, 0]))
    blocks = dict(model.named_children())
    fields = measure_fields(model, blocks)
    outputs = record_outputs(model, blocks, image.unsqueeze(0))
    for (name, output), (_, field) in zip(outputs, fields, strict=True):
        if output.dim() == 4:
            channels, height, width = output.shape[1:]
            rows.append((f"{name}\n{channels}×{height}×{width}\nfield {field}", output[0]))
    figure, axes = plt.subplots(len(rows), 10, layout="constrained", squeeze=False, subplot_kw=NO_TICKS)
    figure.set_size_inches(7, 0.72 * len(rows))
    figure.suptitle(title, fontsize=10)
    for row_axes, (label, channels) in zip(axes, rows, strict=True):
        scale = {"vmin": channels.min().item(), "vmax": channels.max().item()}
        for axis, channel in zip(row_axes, channels, strict=False):
            axis.imshow(channel.numpy(), cmap="gray", **scale, **AS_PIXELS)
        for axis in row_axes[len(channels) :]:
            axis.set_axis_off()
        row_axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    if rows[-1][1].shape == (DIGITS, 1, 1):
        for digit, axis in enumerate(axes[-1]):
            axis.set_xlabel(digit)
    show_figure(figure, "features", f"{title}: the filters of the first layer, then one row per block")


# ---- a convolution and learning rates ----


def plot_convolution(image, kernel, feature_map, row, column):
    """Plot an image `(H, W)`, a kernel `(k, k)` with its numbers, and the feature map of their convolution.

    Squares mark the output at `row` and `column` of the map, and the pixels of the image that it depends on.
    Dark is low, light is high; zero is gray in the kernel and in the map.
    """
    size = len(kernel)
    figure, axes = plt.subplots(1, 3, figsize=(6.5, 2.5), layout="constrained", subplot_kw=NO_TICKS)
    names = ("image", "kernel", "feature map")
    for axis, name, values in zip(axes, names, (image, kernel, feature_map), strict=True):
        limit = values.abs().max().item()
        axis.imshow(values.numpy(), cmap="gray", vmin=-limit, vmax=limit, **AS_PIXELS)
        axis.set_title(f"{name} {'×'.join(map(str, values.shape))}", fontsize=12)
    axes[0].images[0].set_clim(0, image.max().item())
    for (i, j), weight in np.ndenumerate(kernel.numpy()):
        color = "black" if weight > 0 else "white"
        axes[1].text(j, i, f"{weight:g}", color=color, ha="center", va="center", fontsize=14)
    for axis, side in ((axes[0], size), (axes[2], 1)):
        square = plt.Rectangle((column - 0.5, row - 0.5), side, side, fill=False, linewidth=2)
        square.set_edgecolor(TRAIN_COLOR)
        axis.add_patch(square)
    show_figure(figure, "convolution", "An image, a kernel, and the feature map of their convolution")


def plot_rates(rates, losses, title):
    """Plot the loss after a few steps for each learning rate, both on logarithmic scales.

    Losses above that of guessing, ln 10, may lie outside; those that are not finite are left out.
    """
    figure, axis = plt.subplots(figsize=(5, 3.3), layout="constrained")
    axis.loglog(rates, losses, "-o", color=TRAIN_COLOR)
    axis.axhline(np.log(DIGITS), color="gray", linestyle="--", label="ln 10, untrained")
    axis.set(title=title, xlabel="learning rate", ylabel="train loss", yticks=(0.1, 0.2, 0.5, 1, 2))
    axis.set_ylim(top=1.5 * np.log(DIGITS))
    axis.minorticks_off()
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.legend()
    pairs = ", ".join(f"{loss:.2f} at {rate:g}" for rate, loss in zip(rates, losses, strict=True))
    show_figure(figure, "rates", f"{title}: {pairs}")


# ---- runs: curves and results ----


def plot_history(history, title, augmented_epochs=None, recorded=()):
    """Plot loss, accuracy and learning rate per epoch, with the target and the end of the augmentation.

    Thin lines are the test accuracies of recorded runs, a list of histories. The axes are scaled to epoch 2
    onward; epoch 1 may lie outside.
    """
    epochs = range(1, history.completed + 1)
    figure, axes = plt.subplots(3, 1, figsize=(6.5, 7), layout="constrained", sharex=True)
    figure.suptitle(title)
    loss_axis, accuracy_axis, rate_axis = axes
    for axis, train_values, test_values in (
        (loss_axis, history.train_losses, history.test_losses),
        (accuracy_axis, history.train_acc, history.test_acc),
    ):
        axis.plot(epochs, train_values, "--o", color=TRAIN_COLOR, markersize=3, label="train")
        axis.plot(epochs, test_values, "-o", color=TEST_COLOR, markersize=3, label="test")
    accuracy_axis.axhline(TARGET_ACCURACY, color="gray", linestyle="--", label=f"{TARGET_ACCURACY} %")
    for number, run in enumerate(recorded):
        test_acc = run.test_acc[: history.completed]
        label = None
        if number == 0:
            label = f"test, {number_of(len(recorded), 'recorded run')}"
        accuracy_axis.plot(epochs, test_acc, color=TEST_COLOR, linewidth=0.6, alpha=0.5, label=label)
    rate_axis.plot(epochs, history.learning_rates, "-o", color="gray", markersize=3)
    for axis, label in zip(axes, ("loss", "accuracy (%)", "learning rate"), strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if augmented_epochs is not None and 0 < augmented_epochs < history.completed:
            axis.axvline(augmented_epochs + 0.5, color="gray", linestyle=":", label="augmentation ends")
    if history.completed > 2:  # the first epoch would compress the rest
        loss_axis.set_ylim(0, 1.1 * max(history.train_losses[1:] + history.test_losses[1:]))
        accuracy_axis.set_ylim(min(history.train_acc[1:] + history.test_acc[1:]) - 0.3, 100)
    loss_axis.legend()
    accuracy_axis.legend()
    rate_axis.set(xlabel="epoch", ylim=(0, None))
    rate_axis.xaxis.get_major_locator().set_params(integer=True)
    summary = summarize_run(history, title).replace("\n", "; ")
    show_figure(figure, "curves", f"Loss, accuracy and learning rate per epoch; {summary}")


def plot_cases(cases, name="cases", bottom=98):
    """Plot train and test accuracies per epoch, for several cases of several runs side by side.

    `cases` is a dictionary from the title of a case to the histories of its runs. The axis starts at `bottom`
    percent. `name` is that of the figure's file.
    """
    figure, axes = plt.subplots(
        1, len(cases), figsize=(6.5, 3.4), layout="constrained", sharey=True, squeeze=False
    )
    gaps = []
    for axis, (title, runs) in zip(axes[0], cases.items(), strict=True):
        plot_seeds(axis, runs, "train_acc", TRAIN_COLOR, "train")
        plot_seeds(axis, runs, "test_acc", TEST_COLOR, "test")
        axis.axhline(TARGET_ACCURACY, color="gray", linestyle="--", label=f"{TARGET_ACCURACY} %")
        test = [run.test_acc[-1] for run in runs]
        gap = statistics.mean(run.train_acc[-1] for run in runs) - statistics.mean(test)
        numbers = f"test {statistics.mean(test):.2f} ± {statistics.stdev(test):.2f}\ngap {gap:.2f}"
        axis.set(title=f"{title}\n{numbers}", xlabel="epoch", ylim=(bottom, 100))
        axis.grid(alpha=0.3)
        gaps.append(f"{title}: {numbers}".replace("\n", ", "))
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[0, -1].legend()
    show_figure(figure, name, f"Train and test accuracy per epoch; in the last one, {'; '.join(gaps)}")


def plot_seeds(axis, runs, field, color, label):
    """Plot a field of `History` per epoch: thin lines for several runs, a thick one for their mean."""
    values = np.array([getattr(run, field) for run in runs])
    epochs = range(1, values.shape[1] + 1)
    axis.plot(epochs, values.T, color=color, linewidth=0.6, alpha=0.6)
    axis.plot(epochs, values.mean(axis=0), color=color, linewidth=2.5, label=label)


def summarize_run(history, title):
    """Return a summary of a run in four lines, or in one if no epoch is completed."""
    if history.completed == 0:
        return f"{title}: no completed epoch"
    mean, lowest, first = result_cells([history])
    last_epochs = min(LAST_EPOCHS, history.completed)
    return (
        f"{title}: {number_of(history.completed, 'epoch')},"
        f" learning rate {history.learning_rates[0]:.3g} to {history.learning_rates[-1]:.3g}\n"
        f"last epoch: train {history.train_acc[-1]:.2f} %, test {history.test_acc[-1]:.2f} %\n"
        f"test accuracy over the last {number_of(last_epochs, 'epoch')}: mean {mean} %, lowest {lowest} %\n"
        f"epoch from which on it is at least {TARGET_ACCURACY} %: {first}"
    )


def check_target(history):
    """Return whether a run meets the course target, as a sentence."""
    target = f"at least {TARGET_ACCURACY} % test accuracy in each of the last {LAST_EPOCHS} epochs"
    if history.completed < LAST_EPOCHS:
        return f"{target}: this run has only {number_of(history.completed, 'epoch')}"
    if min(history.test_acc[-LAST_EPOCHS:]) < TARGET_ACCURACY:
        return f"{target}: not met"
    return f"{target}: met"


def result_cells(histories):
    """Return cells about the last epochs of some runs: mean, lowest, and where all runs stay above 99.4 %."""
    mean = mean_and_deviation(list(map(mean_of_last_epochs, histories)))
    lowest = min(map(lowest_of_last_epochs, histories))
    epochs = [first_epoch_above(history.test_acc) for history in histories]
    first = "never"
    if None not in epochs:
        first = max(epochs)
    return [mean, f"{lowest:.2f}", first]


def first_epoch_above(accuracies):
    """Return the first epoch from which every accuracy is at least the target, or None."""
    last = list(itertools.takewhile(lambda accuracy: accuracy >= TARGET_ACCURACY, reversed(accuracies)))
    if not last:
        return None
    return len(accuracies) - len(last) + 1


def mean_of_last_epochs(history):
    """Return the mean test accuracy of the last epochs of a run, in percent."""
    return statistics.mean(history.test_acc[-LAST_EPOCHS:])


def lowest_of_last_epochs(history):
    """Return the lowest test accuracy of the last epochs of a run, in percent."""
    return min(history.test_acc[-LAST_EPOCHS:])


def mean_and_deviation(values):
    """Return the mean of some values and, if there are several, ± their sample standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.2f}"


def number_of(count, noun):
    """Return a count with its noun, for example "1 epoch" or "15 epochs"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}s"


# ---- comparison of runs ----


def compare_runs(saved):
    """Return a table of runs, a list of `runs.SavedRun`, oldest first, below a description of the first one.

    *Differs in* is the difference from the first run. *Mean* and *min* are those of the last five test
    accuracies, *from* is the epoch from which all are at least 99.4 %, and *recorded* compares the mean with
    those of the recorded runs of the network.
    """
    if not saved:
        return Markdown("There are no runs yet.")
    first = saved[0]
    rows = []
    for run in saved:
        completed = f"{run.history.completed} of {run.summary['epochs']}"
        results = [*result_cells([run.history]), compare_with_recorded(run)]
        rows.append([run.name, describe_differences(run, first), completed, *results])
    titles = ["run", "differs in", "epochs", "mean", "min", "from", "recorded"]
    description = "; ".join(f"{name}: {value}" for name, value in first.summary.items())
    return Markdown(f"The first run, {first.name}: {description}.\n\n{markdown_table(titles, rows)}")


def describe_differences(run, first):
    """Return in what a run, a `runs.SavedRun`, differs from the first one, as a text."""
    parts = []
    for name, value in run.summary.items():
        if value != first.summary.get(name, value):
            parts.append(f"{name}: {value}")
    if not parts:
        changed = [name for name, text in run.sources.items() if text != first.sources.get(name, text)]
        parts = [f"{name}: other text" for name in changed]
    return "; ".join(parts)


def compare_with_recorded(run):
    """Return whether the mean of a run is inside, below or above the range of the recorded runs, if any."""
    if not run.recorded:
        return ""
    mean = mean_of_last_epochs(run.history)
    means = list(map(mean_of_last_epochs, run.recorded))
    if mean < min(means):
        return f"{min(means) - mean:.2f} below"
    if mean > max(means):
        return f"{mean - max(means):.2f} above"
    return "inside"


def plot_runs(saved):
    """Plot the mean of the last test accuracies, a row per run, beside the recorded runs of its network."""
    if not saved:
        return
    figure, axis = plt.subplots(figsize=(6.5, 1.2 + 0.35 * len(saved)), layout="constrained")
    for row, run in enumerate(saved):
        recorded = list(map(mean_of_last_epochs, run.recorded))
        axis.scatter(recorded, [row] * len(recorded), color="gray", alpha=0.5, s=30)
        axis.plot(mean_of_last_epochs(run.history), row, "D", color=TEST_COLOR)
    axis.axvline(TARGET_ACCURACY, color="gray", linestyle="--")
    axis.set_yticks(range(len(saved)), [run.name for run in saved])
    axis.set_ylim(len(saved) - 0.5, -0.5)  # from top to bottom
    axis.set_xlabel(f"test accuracy (%), mean of the last {LAST_EPOCHS} epochs")
    axis.grid(alpha=0.3)
    count = number_of(len(saved), "run")
    show_figure(figure, "runs", f"Mean test accuracy of {count}; gray dots are recorded runs of the network")


# ---- errors ----


class Prediction(NamedTuple):
    """An image and what a model predicts for it."""

    image: torch.Tensor  # normalized, (1, 28, 28)
    target: int
    predicted: int
    probability: float  # of the predicted digit


@torch.no_grad()
def find_mistakes(model, device, test_loader):
    """Return the confusion matrix and the misclassified images of a model.

    The matrix `(10, 10)` counts images by true (row) and predicted (column) digit. The images are a
    list of `Prediction`, most confident first.
    """
    model.eval()
    confusion = torch.zeros(DIGITS, DIGITS, dtype=torch.long)
    mistakes = []
    for data, target in test_loader:
        probability, predicted = model(data.to(device)).softmax(dim=1).max(dim=1)
        columns = [data.cpu(), target.tolist(), predicted.tolist(), probability.tolist()]
        for prediction in map(Prediction, *columns):
            confusion[prediction.target, prediction.predicted] += 1
            if prediction.predicted != prediction.target:
                mistakes.append(prediction)
    mistakes.sort(key=lambda mistake: mistake.probability, reverse=True)
    return confusion, mistakes


def plot_mistakes(mistakes, title):
    """Plot up to 20 misclassified images in the given order, with true and predicted digit."""
    images = [mistake.image for mistake in mistakes]
    captions = [f"{m.target}→{m.predicted}  {m.probability:.0%}" for m in mistakes]
    count = number_of(len(mistakes), "misclassified image")
    plot_digits(images, captions, f"{title}: {count} (true→predicted), most confident first", "mistakes")


def plot_confusion(confusion, title):
    """Plot the confusion matrix, its off-diagonal counts color-coded, and the accuracy per digit."""
    accuracy = 100 * confusion.diag() / confusion.sum(dim=1).clamp(min=1)  # a digit may not occur
    wrong = confusion.clone().fill_diagonal_(0)
    figure, axis = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    axis.imshow(wrong.numpy(), cmap="Oranges", vmax=max(2 * wrong.max().item(), 1), **AS_PIXELS)
    for (target, predicted), count in np.ndenumerate(confusion.numpy()):
        axis.text(predicted, target, count or "·", color="black", ha="center", va="center", fontsize=9)
    labels = [f"{digit}  ({share:.1f} %)" for digit, share in enumerate(accuracy.tolist())]
    axis.set_yticks(range(DIGITS), labels)
    axis.set(xticks=range(DIGITS), xlabel="predicted digit", ylabel="true digit (accuracy)")
    axis.set_title(f"{title}: confusion matrix")
    count = number_of(wrong.sum().item(), "misclassified image")
    show_figure(figure, "confusion", f"{title}: confusion matrix with {count}")


def most_confused(mistakes):
    """Return the three most confused pairs of digits as text, one line per pair.

    4 predicted as 9 and 9 predicted as 4 are the same pair. `mistakes` is a list of `Prediction`.
    """
    pairs = Counter(tuple(sorted((mistake.target, mistake.predicted))) for mistake in mistakes)
    lines = []
    for (one, other), count in pairs.most_common(3):
        lines.append(f"{one} and {other}: {number_of(count, 'image')}")
    return "\n".join(lines) or "no digits were confused"

"""Generate the tables of README.md and benchmarks/README.md from the CSV files of this folder.

    python benchmarks/tables.py

A table is between the lines `<!-- table: NAME -->` and `<!-- /table -->`. `create_tables` lists the
names. Accuracies are in percent; the titles are short, so that the tables fit a phone: "size" is the number
of parameters, "min" the lowest of the last epochs, "from" the epoch from which the target is met, and
"field" the receptive field, in pixels. A gain is the mean difference of runs with the same seeds ± its
standard error.
"""

import json
import statistics

import common
import epoch_time
import search

import plots
from model import MODELS, create_model
from plots import markdown_table, mean_and_deviation, result_cells
from runs import ROOT, recorded_runs

FOLDER = ROOT / "benchmarks"
PAGES = [ROOT / "README.md", FOLDER / "README.md"]
START = "<!-- table: "
END = "<!-- /table -->"
HIDDEN = ("model", "seed", "device", "threads", "torch", "processor")  # the same in all rows of a file
MEAN = f"mean, last {plots.LAST_EPOCHS}"  # the title of a column
MEASURES = {  # of a run, by the title of their column
    "train, best": lambda history: max(history.train_acc),
    "test, best": lambda history: max(history.test_acc),
    "last": lambda history: history.test_acc[-1],
    "min": plots.lowest_of_last_epochs,
}
PUBLISHED = {  # cells about the published runs: best train and test accuracy, and the epochs of the latter
    "Model1": ["88.88", "98.53", "", "", "15"],
    "Model2": ["99.50", "99.11", "", "", "11"],
    "Model3": ["99.50", "99.28", "", "", "12, 14"],
}
CROSSED = ("Model2", "Model4", "Model4 separable")  # networks
CROSSING = {  # four recipes, from Model2's to Model4's: their schedules in accuracy.csv for each of CROSSED
    "Model2's": ("described", "model2", "model2"),
    "Model4's optimizer and scheduler": ("rate", "rate", "rate"),
    "and augmentation": ("augment", "augment", "augment"),
    "and original images at the end": ("clean_epochs", "described", "described"),
}
CHANGES = {  # tables by name; a row is a title and its runs, given by model and schedule in accuracy.csv
    "steps": {  # from Model1 to Model4, one part at a time
        "Model1": ("Model1", "described"),
        "Model1 without dropout": ("Model1", "no_dropout"),
        "Model2's network": ("Model2", "described"),
        "Model4's optimizer and scheduler": ("Model2", "rate"),
        "augmentation": ("Model2", "augment"),
        "no augmentation in the last epochs": ("Model2", "clean_epochs"),
        "Model4's network": ("Model4", "described"),
    },
    "without": {  # Model4, and Model4 with a part of its recipe changed
        "Model4": ("Model4", "described"),
        "no augmentation": ("Model4", "rate"),
        "augmentation until the end": ("Model4", "augment"),
        "AdamW, 0.01": ("Model4", "adamw"),
        "tested with an average of the weights": ("Model4", "average"),
    },
    "optimizer": {  # Model4 without augmentation, and with parts of optimizer and scheduler changed
        "Model4's optimizer and scheduler": ("Model4", "rate"),
        "neither Nesterov momentum nor weight decay": ("Model4", "plain_sgd"),
        "from 0.1 with Model2's StepLR": ("Model4", "two_drops"),
        "constant rate, 0.1": ("Model4", "constant"),
        "constant rate, 0.01": ("Model4", "low_constant"),
        "Model2's optimizer and scheduler": ("Model4", "model2"),
    },
    "network": {  # Model2's network with one part of Model4's, trained with Model4's recipe
        "Model2's network": ("Model2", "clean_epochs"),
        "ReLU and BatchNorm in convblock3": ("Model2 with ReLU and BatchNorm in convblock3", "clean_epochs"),
        "average and 1×1 convolution at the end": ("Model2 with an average", "clean_epochs"),
        "BatchNorm before ReLU": ("Model2 with BatchNorm before ReLU", "clean_epochs"),
        "wider toward the end": ("Model2 with growing widths", "clean_epochs"),
        "Model4's network": ("Model4", "described"),
    },
}

# ---- cells ----


def paired_differences(measure, runs, baseline):
    """Return the differences of a measure between runs with the same seed, given by seed."""
    differences = []
    for seed in runs.keys() & baseline.keys():
        differences.append(measure(runs[seed]) - measure(baseline[seed]))
    return differences


def gain_cell(differences):
    """Return the mean of paired differences ± its standard error; nothing for fewer than two.

    A gain of less than two standard errors is called not distinguishable from none.
    """
    if len(differences) < 2:
        return ""
    gain = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    cell = f"{gain:+.2f} ± {error:.2f}"
    if abs(gain) < 2 * error:
        cell += ", not distinguishable"
    return cell


# ---- tables from accuracy.csv ----


def overview_table(runs):
    """Return the main results of all models, trained as described."""
    rows = []
    for name in MODELS:
        parameters = common.count_parameters(create_model(name))
        rows.append([name, f"{parameters:,}", *result_cells(runs[name, "described"].values())])
    return markdown_table(["model", "size", MEAN, "min", "from"], rows)


def schedules_table(name, runs):
    """Return the accuracy of a model per schedule, the gain of the described one, and what was published."""
    constant = runs[name, "constant"]
    described = runs[name, "described"]
    rows = [["constant"], ["described"], ["gain"], ["seeds won"]]
    for measure in MEASURES.values():
        differences = paired_differences(measure, described, constant)
        rows[0].append(mean_and_deviation(list(map(measure, constant.values()))))
        rows[1].append(mean_and_deviation(list(map(measure, described.values()))))
        rows[2].append(gain_cell(differences))
        rows[3].append(seeds_won(differences))
    rows[0].append(best_epochs(constant.values()))
    rows[1].append(best_epochs(described.values()))
    rows[2].append("")
    rows[3].append("")
    if constant == described:
        rows = [["constant = described", *rows[0][1:]]]
    rows.append(["published", *PUBLISHED[name]])
    return markdown_table(["schedule", *MEASURES, "best epoch"], rows)


def seeds_won(differences):
    """Return how many of some paired differences are positive."""
    return f"{sum(difference > 0 for difference in differences)} of {len(differences)}"


def best_epochs(histories):
    """Return the range of the epochs in which some runs have their best test accuracy."""
    epochs = []
    for history in histories:
        epochs.append(history.test_acc.index(max(history.test_acc)) + 1)
    return f"{min(epochs)} to {max(epochs)}"


def seeds_table(name, runs):
    """Return the accuracy of each run of a model, trained as described; the last row is about all runs."""
    histories = runs[name, "described"]
    groups = {seed: [history] for seed, history in sorted(histories.items())}
    groups["all"] = histories.values()
    rows = []
    for seed, group in groups.items():
        train = mean_and_deviation([history.train_acc[-1] for history in group])
        rows.append([seed, train, *result_cells(group)])
    return markdown_table(["seed", "train, last", MEAN, "min", "from"], rows)


def crossing_table(runs):
    """Return the mean of the last epochs of three networks per recipe, and the differences from the first."""
    rows = []
    for recipe, schedules in CROSSING.items():
        baseline, *others = [runs[key] for key in zip(CROSSED, schedules, strict=True)]
        cells = [recipe, result_cells(baseline.values())[0]]
        for network in others:
            differences = paired_differences(plots.mean_of_last_epochs, network, baseline)
            cells += [result_cells(network.values())[0], gain_cell(differences)]
        rows.append(cells)
    return markdown_table(["recipe", "Model2", "Model4", "difference", "separable", "difference"], rows)


def changes_table(changes, runs, step_by_step=False):
    """Return the results of each change, and its difference from the first row, or from the row above.

    *met* is the number of runs that meet the target.
    """
    rows = []
    baseline = {}
    for change, key in changes.items():
        histories = runs[key].values()
        mean, lowest, _ = result_cells(histories)
        differences = paired_differences(plots.mean_of_last_epochs, runs[key], baseline)
        met = sum(plots.lowest_of_last_epochs(history) >= plots.TARGET_ACCURACY for history in histories)
        rows.append([change, mean, lowest, f"{met} of {len(histories)}", gain_cell(differences)])
        if step_by_step or not baseline:
            baseline = runs[key]
    return markdown_table(["variant", MEAN, "min", "met", "difference"], rows)


# ---- other tables ----


def group_by(rows, *columns):
    """Return a dictionary from the values of some columns, as a tuple, to the rows that have them."""
    groups = {}
    for row in rows:
        values = tuple(row[column] for column in columns)
        groups.setdefault(values, []).append(row)
    return groups


def numbers(rows, column):
    """Return a column of some rows as numbers."""
    return [float(row[column]) for row in rows]


def search_table(rows):
    """Return the results of each configuration of the search, over its seeds."""
    lines = []
    for values, runs in group_by(rows, "block", "before", "after", "parameters", "changes").items():
        block, before, after, parameters, changes = values
        cells = [
            block,
            f"{before} → {after}",
            f"{int(parameters):,}",
            recipe_text(json.loads(changes)),
            len(runs),
            f"{statistics.mean(numbers(runs, 'mean_last_five')):.3f}",
            f"{min(numbers(runs, 'worst_last_five')):.2f}",
            f"{statistics.mean(numbers(runs, 'loss_last_five')):.4f}",
        ]
        lines.append(cells)
    return markdown_table(["block", "widths", "size", "recipe", "seeds", "mean", "min", "loss"], lines)


def recipe_text(changes):
    """Return the changes of a recipe, a nested dictionary, as text: "batch size 64, lr 0.07"."""
    base = {**search.BASE.sgd, **search.BASE.scheduler_args, **search.BASE.augmentation.keywords}
    parts = []
    for name, value in changes.items():
        if isinstance(value, dict):
            parts.append(recipe_text(value))
        elif base.get(name) != value:
            parts.append(f"{name} {value}".replace("_", " "))
    return ", ".join(parts) or "base"


def dropout_table(rows):
    """Return Model1's train accuracy for each choice of active dropout layers."""
    lines = []
    for (setting,), runs in group_by(rows, "dropout").items():
        lines.append([setting, mean_and_deviation(numbers(runs, "train_acc"))])
    return markdown_table(["active dropout", "train accuracy"], lines)


def epoch_time_table(rows):
    """Return the median seconds of an epoch with all images, and this repository's relative to the others."""
    lines = []
    rows = [row for row in rows if row["images"] == "60000"]
    columns = ("model", "device", "processor", "threads", "busy", "trim_threshold")
    for values, measured in group_by(rows, *columns).items():
        model, device, processor, threads, busy, trim_threshold = values
        machine = device
        if device == "CPU" and processor:
            machine = processor
        machine += f", {plots.number_of(int(threads), 'thread')}"
        if busy == "1":
            machine += ", busy"
        if trim_threshold:
            machine += ", malloc tuning"
        groups = group_by(measured, "variant")
        seconds = numbers(groups[epoch_time.REPOSITORY,], "seconds")
        cells = [model, machine, f"{statistics.median(seconds):.1f}"]
        for variant in epoch_time.BASELINES:
            cells.append(baseline_cell(seconds, numbers(groups.get((variant,), []), "seconds")))
        lines.append(cells)
    titles = ["model", "machine", epoch_time.REPOSITORY, *epoch_time.BASELINES]
    return markdown_table(titles, lines)


def baseline_cell(seconds, baseline):
    """Return the median of a baseline, if it was measured, and the median and range of the ratios to it."""
    if not baseline:
        return ""
    ratios = [value / base for value, base in zip(seconds, baseline, strict=True)]
    ratio = statistics.median(ratios)
    return f"{statistics.median(baseline):.1f} ({ratio:.2f}, {min(ratios):.2f} to {max(ratios):.2f})"


def columns_table(rows):
    """Return all rows of a CSV file, without the `HIDDEN` columns."""
    columns = [column for column in rows[0] if column not in HIDDEN]
    lines = []
    for row in rows:
        lines.append([row[column] for column in columns])
    return markdown_table([column.replace("_", " ") for column in columns], lines)


# ---- pages ----


def create_tables():
    """Return every table as text, by name."""
    runs = recorded_runs()
    tables = {
        "overview": overview_table(runs),
        "crossing": crossing_table(runs),
        "search": search_table(common.read_rows(FOLDER / "search.csv")),
        "dropout ablation": dropout_table(common.read_rows(FOLDER / "dropout_ablation.csv")),
        "own digits": columns_table(common.read_rows(FOLDER / "own_digits.csv")),
        "real digits": columns_table(common.read_rows(FOLDER / "real_digits.csv")),
        "drawing field": columns_table(common.read_rows(FOLDER / "drawing.csv")),
        "epoch time": epoch_time_table(common.read_rows(FOLDER / "epoch_time.csv")),
    }
    for name, changes in CHANGES.items():
        tables[name] = changes_table(changes, runs, step_by_step=name == "steps")
    for name in MODELS:
        tables[f"{name} layers"] = plots.summarize_model(create_model(name)).data
        if name in PUBLISHED:
            tables[f"{name} schedules"] = schedules_table(name, runs)
        else:
            tables[f"{name} seeds"] = seeds_table(name, runs)
    return tables


def update_tables(page, tables):
    """Return a page with the current tables.

    Raise ValueError if a table has no end, and KeyError if there is no table of that name.
    """
    updated, *parts = page.split(START)
    for part in parts:
        text, after = part.split(END)
        name, _ = text.split(" -->", maxsplit=1)
        updated += f"{START}{name} -->\n\n{tables[name]}\n\n{END}{after}"
    return updated


def main():
    tables = create_tables()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        path.write_text(update_tables(page, tables), encoding="utf-8", newline="")


if __name__ == "__main__":
    main()

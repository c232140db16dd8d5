"""Generate the tables of README.md and benchmarks/README.md from the CSV files of this folder.

    python benchmarks/tables.py --write     update both files
    python benchmarks/tables.py --check     fail if a table is stale, and name it

A table is between the lines `<!-- table: NAME -->` and `<!-- /table -->`. `create_tables` lists the
names. Accuracies are in percent; the titles are short, so that the tables fit a phone: "size" is the number
of parameters, "min" the lowest of the last epochs, "from" the epoch from which the target is met, and
"field" the receptive field, in pixels. A gain is the mean difference of runs with the same seeds ± its
standard error.
"""

import argparse
import json
import statistics
import sys

import common
import epoch_time
import search

import plots
from model import MODELS, create_model

FOLDER = common.ROOT / "benchmarks"
PAGES = [common.ROOT / "README.md", FOLDER / "README.md"]
START = "<!-- table: "
END = "<!-- /table -->"
MEAN = f"mean, last {plots.LAST_EPOCHS}"  # the title of a column
MEASURES = {  # of a run, by the title of their column
    "train, best": lambda history: max(history.train_acc),
    "test, best": lambda history: max(history.test_acc),
    "last": lambda history: history.test_acc[-1],
    "min": common.lowest_of_last_epochs,
}
PUBLISHED = {  # the best train and test accuracy of the published runs
    "Model1": (88.88, 98.53),
    "Model2": (99.50, 99.11),
    "Model3": (99.50, 99.28),
}
STEPS = {  # from Model1 to Model4, one change at a time: the model and the schedule in accuracy.csv
    "Model1": ("Model1", "described"),
    "Model1 without dropout": ("Model1", "no_dropout"),
    "Model2's network": ("Model2", "described"),
    "Model4's optimizer and scheduler": ("Model2", "rate"),
    "augmentation": ("Model2", "augment"),
    "no augmentation in the last epochs": ("Model2", "clean_epochs"),
    "Model4's network": ("Model4", "described"),
}
WITHOUT = {  # Model4, and Model4 with one thing taken out
    "Model4": ("Model4", "described"),
    "no augmentation": ("Model4", "no_augmentation"),
    "augmentation until the end": ("Model4", "augment"),
    "constant learning rate, 0.1": ("Model4", "constant"),
    "Model2's network": ("Model2", "clean_epochs"),
}

# ---- cells ----


def markdown_table(header, rows):
    """Return a table in Markdown; `header` is text with the titles between bars."""
    titles = header.split(" | ")
    lines = []
    for cells in [titles, ["---"] * len(titles), *rows]:
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def mean_and_deviation(values):
    """Return the mean of some values and, if there are several, ± their sample standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.2f}"


def paired_differences(measure, runs, baseline):
    """Return the differences of a measure between runs with the same seed, given by seed."""
    differences = []
    for seed, run in runs.items():
        if seed in baseline:
            differences.append(measure(run) - measure(baseline[seed]))
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


def epoch_of_target(histories):
    """Return the epoch from which every run has at least 99.4 % test accuracy, or "never"."""
    epochs = [plots.first_epoch_above(history.test_acc) for history in histories]
    if None in epochs:
        return "never"
    return max(epochs)


def result_cells(histories):
    """Return the cells about the last epochs of some runs: mean, lowest, and `epoch_of_target`."""
    mean = mean_and_deviation(list(map(common.mean_of_last_epochs, histories)))
    lowest = min(map(common.lowest_of_last_epochs, histories))
    return [mean, f"{lowest:.2f}", epoch_of_target(histories)]


# ---- tables from accuracy.csv ----


def overview_table(runs):
    """Return the main results of all models, trained as described."""
    rows = []
    for name in MODELS:
        parameters = common.count_parameters(create_model(name))
        rows.append([name, f"{parameters:,}", *result_cells(runs[name, "described"].values())])
    return markdown_table(f"model | size | {MEAN} | min | from", rows)


def schedules_table(name, runs):
    """Return the accuracy of a model per schedule, the gain of the described one, and what was published."""
    constant = runs[name, "constant"]
    described = runs[name, "described"]
    columns = [["constant", "described", "gain", "seeds won"]]
    for measure in MEASURES.values():
        differences = paired_differences(measure, described, constant)
        wins = sum(difference > 0 for difference in differences)
        column = [
            mean_and_deviation(list(map(measure, constant.values()))),
            mean_and_deviation(list(map(measure, described.values()))),
            gain_cell(differences),
            f"{wins} of {len(differences)}",
        ]
        columns.append(column)
    rows = list(zip(*columns, strict=True))
    if constant == described:
        rows = [["constant = described", *rows[0][1:]]]
    train_acc, test_acc = PUBLISHED[name]
    rows.append(["published", f"{train_acc:.2f}", f"{test_acc:.2f}", "", ""])
    return markdown_table(" | ".join(["schedule", *MEASURES]), rows)


def seeds_table(name, runs):
    """Return the accuracy of each run of a model, trained as described; the last row is about all runs."""
    histories = runs[name, "described"]
    groups = {seed: [history] for seed, history in histories.items()}
    groups["all"] = histories.values()
    rows = []
    for seed, group in groups.items():
        train = mean_and_deviation([history.train_acc[-1] for history in group])
        rows.append([seed, train, *result_cells(group)])
    return markdown_table(f"seed | train, last | {MEAN} | min | from", rows)


def steps_table(titles, steps, runs, baseline=None):
    """Return the results of each step, and its gain over `baseline`, by default over the step before.

    A step that is not recorded is left out.
    """
    rows = []
    before = {}
    for change, key in steps.items():
        histories = runs.get(key, {})
        if histories:
            mean, lowest, _ = result_cells(histories.values())
            differences = paired_differences(common.mean_of_last_epochs, histories, before)
            rows.append([change, mean, lowest, gain_cell(differences)])
        before = runs.get(baseline, histories)
    first, last = titles
    return markdown_table(f"{first} | {MEAN} | min | {last}", rows)


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


def design_table(name):
    """Return how the receptive field of a network grows from block to block, and where its parameters are.

    A block is described by the kernel of its largest layer; its other layers do not change the field. A jump
    is the distance of neighboring values before the block, in pixels of the image.
    """
    blocks = {}
    for layer in plots.layer_table(create_model(name)):
        blocks.setdefault(layer.name.split(".")[0], []).append(layer)
    rows = []
    jump = 1
    for block, layers in blocks.items():
        largest = max(layers, key=lambda layer: layer.kernel)
        output = "×".join(map(str, layers[-1].output))
        field = layers[-1].receptive_field
        parameters = sum(layer.parameters for layer in layers)
        rows.append([block, output, largest.kernel, largest.stride, jump, field, f"{parameters:,}"])
        jump *= largest.stride
    return markdown_table("block | output | kernel | stride | jump | field | parameters", rows)


def search_table(rows):
    """Return the results of each configuration of the search, over its seeds."""
    lines = []
    for values, runs in group_by(rows, "before", "after", "parameters", "changes").items():
        before, after, parameters, changes = values
        cells = [
            f"{before} → {after}",
            f"{int(parameters):,}",
            recipe_text(json.loads(changes)),
            len(runs),
            f"{statistics.mean(numbers(runs, 'mean_last_five')):.3f}",
            f"{min(numbers(runs, 'worst_last_five')):.2f}",
            f"{statistics.mean(numbers(runs, 'loss_last_five')):.4f}",
        ]
        lines.append(cells)
    return markdown_table("network | size | recipe | seeds | mean | min | loss", lines)


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


def print_search_gain(configuration, baseline):
    """Print the gain of one configuration of the search over another, in validation accuracy.

    For example, of the average of Model5's weights:

        none = search.Configuration(*search.MODEL5, {"clean_epochs": 6})
        ema = search.Configuration(*search.MODEL5, {"clean_epochs": 6, "ema": 0.998})
        tables.print_search_gain(ema, none)
    """
    groups = group_by(common.read_rows(search.CSV), "before", "after", "changes")
    means = []
    for item in (configuration, baseline):
        before, after, changes, _ = search.identity(item, seed=1).values()
        rows = groups[before, after, changes]
        means.append(dict(zip(numbers(rows, "seed"), numbers(rows, "mean_last_five"), strict=True)))
    print(gain_cell(paired_differences(float, *means)))


def dropout_table(rows):
    """Return Model1's train accuracy for each choice of active dropout layers."""
    lines = []
    for (setting,), runs in group_by(rows, "dropout").items():
        lines.append([setting, mean_and_deviation(numbers(runs, "train_acc"))])
    return markdown_table("active dropout | train accuracy", lines)


def epoch_time_table(rows):
    """Return the median seconds of an epoch per variant, and the ratios of this repository's.

    Only epochs with all images are included.
    """
    lines = []
    rows = [row for row in rows if row["images"] == "60000"]
    for values, measured in group_by(rows, "model", "device", "threads", "busy").items():
        model, device, threads, busy = values
        machine = f"{device}, {plots.number_of(int(threads), 'thread')}"
        if busy == "1":
            machine += ", busy"
        cells = [model, machine]
        groups = group_by(measured, "variant")
        for variant in epoch_time.VARIANTS:
            cell = ""
            if (variant,) in groups:
                cell = f"{statistics.median(numbers(groups[variant,], 'seconds')):.1f}"
            cells.append(cell)
        for variant in (epoch_time.DATALOADER, epoch_time.COMPUTE_ONLY):
            cell = ""
            if (variant,) in groups:
                cell = ratio_cell(groups[epoch_time.REPOSITORY,], groups[variant,])
            cells.append(cell)
        lines.append(cells)
    header = f"model | machine | {' | '.join(epoch_time.VARIANTS)} | vs. DataLoader | vs. compute"
    return markdown_table(header, lines)


def ratio_cell(rows, baseline):
    """Return the median of the ratios of two variants' seconds, round by round, with their range."""
    pairs = zip(numbers(rows, "seconds"), numbers(baseline, "seconds"), strict=True)
    ratios = [seconds / base for seconds, base in pairs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def columns_table(rows, hidden):
    """Return all rows of a CSV file, without the `hidden` columns and those of the machine."""
    columns = [column for column in rows[0] if column not in (*hidden, "device", "threads", "torch")]
    lines = []
    for row in rows:
        lines.append([row[column] for column in columns])
    return markdown_table(" | ".join(columns).replace("_", " "), lines)


# ---- pages ----


def create_tables():
    """Return every table as text, by name."""
    runs = common.recorded_runs(FOLDER / "accuracy.csv")
    tables = {
        "overview": overview_table(runs),
        "steps": steps_table(("step", "gain"), STEPS, runs),
        "without": steps_table(("instead", "difference"), WITHOUT, runs, baseline=WITHOUT["Model4"]),
        "design": design_table("Model4"),
        "search": search_table(common.read_rows(FOLDER / "search.csv")),
        "dropout ablation": dropout_table(common.read_rows(FOLDER / "dropout_ablation.csv")),
        "own digits": columns_table(common.read_rows(FOLDER / "own_digits.csv"), hidden=["model"]),
        "real digits": columns_table(common.read_rows(FOLDER / "real_digits.csv"), hidden=["model", "seed"]),
        "drawing field": columns_table(common.read_rows(FOLDER / "drawing.csv"), hidden=[]),
        "epoch time": epoch_time_table(common.read_rows(FOLDER / "epoch_time.csv")),
        "exercises": columns_table(common.read_rows(FOLDER / "exercises.csv"), hidden=["seed"]),
    }
    for name in MODELS:
        if name in PUBLISHED:
            tables[f"{name} schedules"] = schedules_table(name, runs)
        else:
            tables[f"{name} seeds"] = seeds_table(name, runs)
    return tables


def find_stale_tables(page, tables):
    """Return the tables of a page that are not up to date: a dictionary from name to (text, current text).

    Raise ValueError if a table has no end, and KeyError if there is no table of that name.
    """
    stale = {}
    for part in page.split(START)[1:]:
        text, _ = part.split(END)
        name, _ = text.split(" -->", maxsplit=1)
        current = f"{name} -->\n\n{tables[name]}\n\n"
        if text != current:
            stale[name] = (START + text + END, START + current + END)
    return stale


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", action="store_true", help="update both files")
    group.add_argument("--check", action="store_true", help="fail if a table is stale, and name it")
    args = parser.parse_args()
    tables = create_tables()
    problems = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for name, (text, current) in find_stale_tables(page, tables).items():
            problems.append(f"{path}: the table {name!r} is stale")
            page = page.replace(text, current)
        if args.write:
            path.write_text(page, encoding="utf-8", newline="")
    if args.check and problems:
        sys.exit("\n".join([*problems, "run python benchmarks/tables.py --write"]))


if __name__ == "__main__":
    main()

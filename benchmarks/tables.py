"""Generate the tables of README.md and benchmarks/README.md from the CSV files of this folder.

    python benchmarks/tables.py --write     update both files
    python benchmarks/tables.py --check     fail if a table is stale, and name it

A table is between the lines `<!-- table: NAME -->` and `<!-- /table -->`. `create_tables` lists the
names. What is not recorded is left out. Accuracies are in percent; the titles are short, so that the
tables fit a phone: "size" is the number of parameters, "min" the lowest of the last epochs, "from" the
epoch from which the target is met, and "field" the receptive field, in pixels.
"""

import argparse
import json
import re
import statistics
import sys
from typing import NamedTuple

import common

import utils
from model import MODELS, create_model

FOLDER = common.ROOT / "benchmarks"
PAGES = [common.ROOT / "README.md", FOLDER / "README.md"]
START = "<!-- table: "
MARKED_TABLE = re.compile(START + r"(?P<name>[^>]+) -->\n(?:(?!<!-- ).*\n)*<!-- /table -->")
MEAN = f"mean, last {utils.LAST_EPOCHS}"  # the title of a column


class Step(NamedTuple):
    """One of the changes that lead from Model1 to Model4."""

    model: str
    schedule: str
    change: str


STEPS = [
    Step("Model1", "described", "Model1"),
    Step("Model2", "described", "Model2: wider network, no dropout"),
    Step("Model2", "rate", "Model4's optimizer and scheduler"),
    Step("Model2", "augment", "augmentation"),
    Step("Model2", "clean_epochs", "no augmentation in the last epochs"),
    Step("Model4", "described", "Model4's network"),
]
STEP_SEEDS = 3  # the steps between the models were run with the first three seeds only


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


def with_range(values):
    """Return mean ± standard deviation, with the range of the values in parentheses."""
    return f"{mean_and_deviation(values)} ({min(values):.2f} to {max(values):.2f})"


def epoch_of_target(histories):
    """Return the epoch from which every run has at least 99.4 % test accuracy, or "never"."""
    latest = 0
    for history in histories:
        first = utils.first_epoch_above(history.test_acc)
        if first is None:
            return "never"
        latest = max(latest, first)
    return str(latest)


def result_cells(histories):
    """Return the cells about the last epochs of some runs: mean, lowest, and `epoch_of_target`."""
    mean = mean_and_deviation(list(map(common.mean_of_last_epochs, histories)))
    lowest = min(map(common.lowest_of_last_epochs, histories))
    return [mean, f"{lowest:.2f}", epoch_of_target(histories)]


def last_train_accuracy(histories):
    """Return the train accuracy of some runs in their last epoch, as a cell."""
    return mean_and_deviation([history.train_acc[-1] for history in histories])


def last_test_accuracy(histories):
    """Return the test accuracy of some runs in their last epoch, as a cell."""
    return mean_and_deviation([history.test_acc[-1] for history in histories])


# ---- tables from accuracy.csv ----


def described_runs(runs):
    """Return the runs of the models that were trained as described: a dictionary from name to list."""
    described = {}
    for name in MODELS:
        if (name, "described") in runs:
            described[name] = runs[name, "described"]
    return described


def overview_table(runs):
    """Return the main results of all models, trained as described."""
    rows = []
    for name, histories in described_runs(runs).items():
        parameters = common.count_parameters(create_model(name))
        rows.append([name, f"{parameters:,}", *result_cells(histories)])
    return markdown_table(f"model | size | {MEAN} | min | from", rows)


def accuracy_table(runs):
    """Return size and accuracies of all models, trained as described, in more detail."""
    rows = []
    for name, histories in described_runs(runs).items():
        layers = utils.layer_table(create_model(name))
        mult_adds = sum(layer.mult_adds for layer in layers)
        best = mean_and_deviation([max(history.test_acc) for history in histories])
        accuracies = [last_train_accuracy(histories), best, last_test_accuracy(histories)]
        rows.append([name, f"{mult_adds:,}", layers[-1].receptive_field, *accuracies])
    return markdown_table("model | mult-adds | field | train, last | test, best | test, last", rows)


def schedules_table(name, runs):
    """Return the accuracy of a model per schedule, next to the published accuracies."""
    constant = runs.get((name, "constant"), [])
    described = runs.get((name, "described"), [])
    schedules = {"constant, 0.01": constant, "as described": described}
    if constant == described:
        schedules = {"constant, 0.01 = as described": described}
    rows = []
    for title, histories in schedules.items():
        if histories:
            best_train = with_range([max(history.train_acc) for history in histories])
            best_test = with_range([max(history.test_acc) for history in histories])
            lowest = mean_and_deviation(list(map(common.lowest_of_last_epochs, histories)))
            rows.append([title, best_train, best_test, last_test_accuracy(histories), lowest])
    published = common.PUBLISHED[name]
    rows.append(["published", f"{published.train_acc:.2f}", f"{published.test_acc:.2f}", "", ""])
    return markdown_table("schedule | train, best | test, best | test, last | min", rows)


def seeds_table(name, runs):
    """Return the accuracy of each run of a model, trained as described; the last row is about all runs."""
    histories = runs.get((name, "described"), [])
    groups = {}
    for seed, history in enumerate(histories, 1):
        groups[seed] = [history]
    if histories:
        groups["all"] = histories
    rows = []
    for seed, group in groups.items():
        rows.append([seed, last_train_accuracy(group), *result_cells(group)])
    return markdown_table(f"seed | train, last | {MEAN} | min | from", rows)


def steps_table(runs):
    """Return the gain of each step from Model1 to Model4, over the first three seeds."""
    rows = []
    previous_mean = None
    for step in STEPS:
        histories = runs.get((step.model, step.schedule), [])[:STEP_SEEDS]
        if not histories:
            previous_mean = None
            continue
        mean = statistics.mean(map(common.mean_of_last_epochs, histories))
        mean = round(mean, 2)  # as shown, so that the gains agree with the means
        gain = ""
        if previous_mean is not None:
            gain = f"{mean - previous_mean:+.2f}"
        shown_mean, lowest, _ = result_cells(histories)
        rows.append([step.change, shown_mean, lowest, gain])
        previous_mean = mean
    return markdown_table(f"step | {MEAN} | min | gain", rows)


def devices_table(rows):
    """Return the mean of the last epochs per seed on each device that is not a CPU, and the CPU's range."""
    lines = []
    on_cpu = common.recorded_runs(rows)
    for device in dict.fromkeys(row["device"] for row in rows):
        if device == "CPU":
            continue
        for name, histories in described_runs(common.recorded_runs(rows, device)).items():
            means = [f"{common.mean_of_last_epochs(history):.2f}" for history in histories]
            expected = list(map(common.mean_of_last_epochs, on_cpu[name, "described"]))
            lines.append([name, device, ", ".join(means), f"{min(expected):.2f} to {max(expected):.2f}"])
    return markdown_table(f"model | device | {MEAN}, per seed | on a CPU", lines)


# ---- other tables ----


def layers_table(name):
    """Return output shape, parameters, multiply-adds and receptive field of each block of a network."""
    blocks = {}
    for layer in utils.layer_table(create_model(name)):
        blocks.setdefault(layer.name.split(".")[0], []).append(layer)
    rows = []
    for block, layers in blocks.items():
        output = "×".join(map(str, layers[-1].output))
        parameters = sum(layer.parameters for layer in layers)
        mult_adds = sum(layer.mult_adds for layer in layers)
        rows.append([block, output, f"{parameters:,}", f"{mult_adds:,}", layers[-1].receptive_field])
    return markdown_table("block | output | params | mult-adds | field", rows)


def group_by(rows, columns):
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
    for values, runs in group_by(rows, ["before", "after", "parameters", "changes"]).items():
        before, after, parameters, changes = values
        lines.append(
            [
                f"{before} → {after}",
                f"{int(parameters):,}",
                recipe_text(json.loads(changes)),
                len(runs),
                f"{statistics.mean(numbers(runs, 'mean_last_five')):.3f}",
                f"{min(numbers(runs, 'worst_last_five')):.2f}",
                f"{statistics.mean(numbers(runs, 'loss_last_five')):.4f}",
            ]
        )
    return markdown_table("network | size | recipe | seeds | mean | min | loss", lines)


def recipe_text(changes):
    """Return the changes of a recipe, a nested dictionary, as text: "lr 0.07, momentum 0.9"."""
    parts = []
    for name, value in changes.items():
        if isinstance(value, dict):
            parts.append(recipe_text(value))
        else:
            parts.append(f"{name} {value}".replace("_", " "))
    return ", ".join(parts) or "base"


def dropout_table(rows):
    """Return Model1's train accuracy for each choice of active dropout layers."""
    lines = []
    for (setting,), runs in group_by(rows, ["dropout"]).items():
        lines.append([setting, mean_and_deviation(numbers(runs, "train_acc"))])
    return markdown_table("active dropout | train accuracy", lines)


def seconds_per_variant(rows):
    """Return the seconds per epoch of each variant, round by round, as a dictionary."""
    seconds = {}
    for (variant,), measured in group_by(rows, ["variant"]).items():
        seconds[variant] = numbers(measured, "seconds")
    return seconds


def epoch_time_table(rows):
    """Return the median seconds of an epoch per variant, and the ratios of this repository's.

    Only epochs with all images are included.
    """
    lines = []
    rows = [row for row in rows if row["images"] == "60000"]
    variants = ["DataLoader", "DataLoader, 4 workers", "this repository", "compute only"]
    for values, measured in group_by(rows, ["model", "device", "threads", "busy"]).items():
        model, device, threads, busy = values
        machine = f"{device}, {utils.number_of(int(threads), 'thread')}"
        if busy == "1":
            machine += ", busy"
        seconds = seconds_per_variant(measured)
        medians = dict.fromkeys(variants, "")
        for variant, times in seconds.items():
            medians[variant] = f"{statistics.median(times):.1f}"
        ratios = []
        for baseline in ("DataLoader", "compute only"):
            ratios.append(ratio_cell(seconds["this repository"], seconds.get(baseline)))
        lines.append([model, machine, *medians.values(), *ratios])
    header = f"model | machine | {' | '.join(variants)} | vs. DataLoader | vs. compute"
    return markdown_table(header, lines)


def ratio_cell(times, baseline):
    """Return the median of the ratios of two variants, round by round, with their range.

    It is empty if there is no baseline.
    """
    if baseline is None:
        return ""
    ratios = [time / base for time, base in zip(times, baseline, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def spincount_table(rows):
    """Return Model4's seconds per epoch with a tenth of the data and two threads, per `GOMP_SPINCOUNT`."""
    lines = []
    situation = {"model": "Model4", "variant": "this repository", "images": "6000", "threads": "2"}
    rows = [row for row in rows if situation.items() <= row.items()]
    for (spincount,), measured in group_by(rows, ["spincount"]).items():
        seconds = {"0": "", "1": ""}
        for (busy,), epochs in group_by(measured, ["busy"]).items():
            seconds[busy] = f"{statistics.median(numbers(epochs, 'seconds')):.2f}"
        lines.append([spincount, *seconds.values()])
    return markdown_table("GOMP_SPINCOUNT | idle | beside a busy process", lines)


def columns_table(rows, hidden):
    """Return all rows of a CSV file, without the `hidden` columns."""
    columns = []
    if rows:
        columns = [column for column in rows[0] if column not in hidden]
    lines = []
    for row in rows:
        lines.append([row[column] for column in columns])
    return markdown_table(" | ".join(columns).replace("_", " "), lines)


# ---- pages ----


def create_tables():
    """Return every table as text, by name."""
    accuracies = common.read_rows(FOLDER / "accuracy.csv")
    runs = common.recorded_runs(accuracies)
    times = common.read_rows(FOLDER / "epoch_time.csv")
    own_digits = common.read_rows(FOLDER / "own_digits.csv")
    exercises = common.read_rows(FOLDER / "exercises.csv")
    drawing = common.read_rows(FOLDER / "drawing.csv")
    tables = {
        "overview": overview_table(runs),
        "accuracy": accuracy_table(runs),
        "steps": steps_table(runs),
        "devices": devices_table(accuracies),
        "search": search_table(common.read_rows(FOLDER / "search.csv")),
        "dropout ablation": dropout_table(common.read_rows(FOLDER / "dropout_ablation.csv")),
        "own digits": columns_table(own_digits, hidden=["model", "device", "threads", "torch"]),
        "drawing field": columns_table(drawing, hidden=["device", "threads", "torch"]),
        "epoch time": epoch_time_table(times),
        "exercises": columns_table(exercises, hidden=["seed", "device", "threads", "torch"]),
        "spincount": spincount_table(times),
    }
    for name in MODELS:
        tables[f"{name} layers"] = layers_table(name)
        if name in common.PUBLISHED:
            tables[f"{name} schedules"] = schedules_table(name, runs)
        else:
            tables[f"{name} seeds"] = seeds_table(name, runs)
    return tables


def marked_table(name, tables):
    """Return a table between its markers. Raise ValueError, listing the valid names, for an unknown name."""
    if name not in tables:
        raise ValueError(f"there is no table {name!r}: choose one of {', '.join(tables)}")
    return f"{START}{name} -->\n\n{tables[name]}\n\n<!-- /table -->"


def find_tables(page):
    """Return the tables of a page as a list of matches. Raise ValueError if one has no end."""
    matches = list(MARKED_TABLE.finditer(page))
    if len(matches) != page.count(START):
        raise ValueError("a table has no end: add the line <!-- /table -->")
    return matches


def stale_tables(page, tables):
    """Return the names of the tables of a page that differ from the current ones."""
    names = []
    for match in find_tables(page):
        if match.group() != marked_table(match["name"], tables):
            names.append(match["name"])
    return names


def update_page(page, tables):
    """Return a page with the current tables."""
    for match in find_tables(page):
        page = page.replace(match.group(), marked_table(match["name"], tables))
    return page


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
        if args.write:
            path.write_text(update_page(page, tables), encoding="utf-8", newline="")
            continue
        for name in stale_tables(page, tables):
            problems.append(f"{path}: the table {name!r} is stale")
    if problems:
        sys.exit("\n".join([*problems, "run python benchmarks/tables.py --write"]))


if __name__ == "__main__":
    main()

"""Generate the tables of README.md and benchmarks/README.md from the CSV files of this folder.

    python benchmarks/tables.py --write     update both files
    python benchmarks/tables.py --check     fail if a table is stale, and name it

A table is between the lines `<!-- table: NAME -->` and `<!-- /table -->`. `create_tables` lists the names.
"""

import argparse
import re
import statistics
import sys
from typing import NamedTuple

from common import (
    PUBLISHED,
    ROOT,
    count_parameters,
    lowest_of_last_five,
    mean_of_last_five,
    read_rows,
    recorded_runs,
)

import utils
from model import MODELS, create_model

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
START = "<!-- table: "
MARKED_TABLE = re.compile(START + r"(?P<name>[^>]+) -->\n(?:(?!<!-- ).*\n)*<!-- /table -->")
PREVIOUS_MODEL4 = "previous Model4"  # as `epoch_time.py` calls it
MACHINE_COLUMNS = ["device", "threads", "torch"]


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
    Step("Model2", "clean_epochs", "no augmentation in the last five epochs"),
    Step("Model4", "described", "Model4's network"),
]
STEP_SEEDS = 3  # the steps between the models were run with the first three seeds only


# ---- cells ----


def markdown_table(header, rows):
    """Return a table in Markdown; a cell is anything that can be converted to text."""
    lines = []
    for cells in [header, ["---"] * len(header), *rows]:
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


def numbers(rows, column):
    """Return a column of some rows as numbers."""
    return [float(row[column]) for row in rows]


# ---- tables from accuracy.csv ----


def overview_table(runs):
    """Return the main results of all models, trained as described."""
    rows = []
    for name in MODELS:
        histories = runs.get((name, "described"), [])
        if histories:
            lowest = min(map(lowest_of_last_five, histories))
            parameters = count_parameters(create_model(name))
            test_acc = mean_and_deviation(list(map(mean_of_last_five, histories)))
            rows.append([name, f"{parameters:,}", test_acc, f"{lowest:.2f}", epoch_of_target(histories)])
    header = [
        "model",
        "parameters",
        "test accuracy, last five epochs (%)",
        "lowest of them (%)",
        "≥ 99.4 % from epoch",
    ]
    return markdown_table(header, rows)


def accuracy_table(runs):
    """Return size and accuracies of all models, trained as described, in more detail."""
    rows = []
    for name in MODELS:
        histories = runs.get((name, "described"), [])
        if histories:
            layers = utils.layer_table(create_model(name))
            mult_adds = sum(layer.mult_adds for layer in layers)
            train_acc = [history.train_acc[-1] for history in histories]
            best = [max(history.test_acc) for history in histories]
            last = [history.test_acc[-1] for history in histories]
            rows.append(
                [
                    name,
                    f"{mult_adds:,}",
                    layers[-1].receptive_field,
                    mean_and_deviation(train_acc),
                    mean_and_deviation(best),
                    mean_and_deviation(last),
                ]
            )
    header = [
        "model",
        "multiply-adds",
        "receptive field",
        "train accuracy, last epoch",
        "test accuracy, best epoch",
        "test accuracy, last epoch",
    ]
    return markdown_table(header, rows)


def schedules_table(name, runs):
    """Return the accuracy of a model per schedule, next to the published accuracies."""
    rows = []
    for schedule, title in (("constant", "constant, 0.01"), ("described", "as described")):
        histories = runs[name, schedule]
        best_train = [max(history.train_acc) for history in histories]
        best_test = [max(history.test_acc) for history in histories]
        last = [history.test_acc[-1] for history in histories]
        lowest = list(map(lowest_of_last_five, histories))
        rows.append(
            [
                title,
                with_range(best_train),
                with_range(best_test),
                mean_and_deviation(last),
                mean_and_deviation(lowest),
            ]
        )
    published = PUBLISHED[name]
    rows.append(["published", f"{published.train_acc:.2f}", f"{published.test_acc:.2f}", "", ""])
    header = [
        "schedule",
        "best train accuracy",
        "best test accuracy",
        "test accuracy, last epoch",
        "lowest of the last five epochs",
    ]
    return markdown_table(header, rows)


def seeds_table(name, runs):
    """Return the accuracy of each run of a model, trained as described; the last row is about all runs."""
    histories = runs.get((name, "described"), [])
    rows = []
    for seed, history in enumerate(histories, 1):
        rows.append(
            [
                seed,
                f"{history.train_acc[-1]:.2f}",
                f"{mean_of_last_five(history):.2f}",
                f"{lowest_of_last_five(history):.2f}",
                epoch_of_target([history]),
            ]
        )
    if histories:
        means = list(map(mean_of_last_five, histories))
        rows.append(
            [
                "all",
                mean_and_deviation([history.train_acc[-1] for history in histories]),
                mean_and_deviation(means),
                f"{min(map(lowest_of_last_five, histories)):.2f}",
                epoch_of_target(histories),
            ]
        )
    header = [
        "seed",
        "train accuracy, last epoch",
        "test accuracy, mean of the last five epochs",
        "lowest of the last five epochs",
        "≥ 99.4 % from epoch",
    ]
    return markdown_table(header, rows)


def steps_table(runs):
    """Return the gain of each step from Model1 to Model4, over the first three seeds."""
    rows = []
    previous_mean = None
    for step in STEPS:
        histories = runs.get((step.model, step.schedule), [])[:STEP_SEEDS]
        if not histories:
            continue
        means = list(map(mean_of_last_five, histories))
        mean = round(statistics.mean(means), 2)  # as shown, so that the gains agree with the means
        gain = ""
        if previous_mean is not None:
            gain = f"{mean - previous_mean:+.2f}"
        lowest = min(map(lowest_of_last_five, histories))
        rows.append([step.change, mean_and_deviation(means), f"{lowest:.2f}", gain])
        previous_mean = mean
    header = ["step", "test accuracy, mean of the last five epochs", "lowest of the last five epochs", "gain"]
    return markdown_table(header, rows)


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
    return markdown_table(["block", "output", "parameters", "multiply-adds", "receptive field"], rows)


def group_by(rows, columns):
    """Return a dictionary from the values of some columns, as a tuple, to the rows that have them."""
    groups = {}
    for row in rows:
        values = tuple(row[column] for column in columns)
        groups.setdefault(values, []).append(row)
    return groups


def search_table(rows):
    """Return the results of each configuration of the search, over its seeds."""
    lines = []
    for values, runs in group_by(rows, ["before", "after", "parameters", "changes"]).items():
        before, after, parameters, changes = values
        mean = statistics.mean(numbers(runs, "mean_last_five"))
        lowest = min(numbers(runs, "worst_last_five"))
        loss = statistics.mean(numbers(runs, "loss_last_five"))
        network = f"{before} → {after}"
        recipe = f"`{changes}`"
        if changes == "{}":
            recipe = "Model4's"
        size = f"{int(parameters):,}"
        lines.append([network, size, recipe, len(runs), f"{mean:.3f}", f"{lowest:.2f}", f"{loss:.4f}"])
    header = ["network", "parameters", "recipe", "seeds", "mean of the last five epochs", "lowest", "loss"]
    return markdown_table(header, lines)


def dropout_table(rows):
    """Return Model1's train accuracy for each choice of active dropout layers."""
    lines = []
    for (setting,), runs in group_by(rows, ["dropout"]).items():
        lines.append([setting, mean_and_deviation(numbers(runs, "train_acc"))])
    return markdown_table(["active dropout", "train accuracy"], lines)


def columns_table(rows, hidden):
    """Return all rows of a CSV file, without the `hidden` columns."""
    columns = []
    if rows:
        columns = [column for column in rows[0] if column not in hidden]
    lines = []
    for row in rows:
        lines.append([row[column] for column in columns])
    header = [column.replace("_", " ") for column in columns]
    return markdown_table(header, lines)


def training_seconds(rows):
    """Return a dictionary from (device, threads, model) to the seconds of each variant of an epoch."""
    seconds = {}
    for row in rows:
        if row["pass"] == "train":
            key = (row["device"], row["threads"], row["model"])
            seconds.setdefault(key, {})[row["variant"]] = float(row["seconds"])
    return seconds


def epoch_time_table(rows):
    """Return the seconds of a training epoch of each model, one column per variant."""
    variants = {  # with the titles of their columns
        "DataLoader, 0 workers": "DataLoader, 0 workers",
        "this repository": "this repository",
        "compute only": "compute only",
        "this repository, without malloc tuning": "without malloc tuning",
        "this repository, without channels-last": "without channels-last",
    }
    lines = []
    for (device, threads, model), seconds in training_seconds(rows).items():
        if model != PREVIOUS_MODEL4:
            line = [model, device, threads]
            for variant in variants:
                cell = ""
                if variant in seconds:
                    cell = f"{seconds[variant]:.1f}"
                line.append(cell)
            lines.append(line)
    return markdown_table(["model", "device", "threads", *variants.values()], lines)


def networks_time_table(rows):
    """Return the seconds of a training epoch of each model, compared with the previous Model4."""
    training = training_seconds(rows)
    lines = []
    for (device, threads, model), seconds in training.items():
        ratio = ""
        if (device, threads, PREVIOUS_MODEL4) in training:
            previous = training[device, threads, PREVIOUS_MODEL4]["this repository"]
            ratio = f"{seconds['this repository'] / previous:.2f}"
        lines.append([model, device, threads, f"{seconds['this repository']:.1f}", ratio])
    header = ["model", "device", "threads", "seconds per epoch", "vs. previous Model4"]
    return markdown_table(header, lines)


def all_times_table(rows):
    """Return all measured times."""
    titles = {  # by column
        "model": "model",
        "device": "device",
        "threads": "threads",
        "pass": "pass",
        "variant": "variant",
        "seconds": "seconds",
        "fastest": "fastest",
        "slowest": "slowest",
        "vs_dataloader": "vs. DataLoader",
        "vs_compute_only": "vs. compute only",
    }
    lines = []
    for row in rows:
        lines.append([row[column] for column in titles])
    return markdown_table(list(titles.values()), lines)


# ---- pages ----


def create_tables():
    """Return every table as text, by name."""
    folder = ROOT / "benchmarks"
    runs = recorded_runs(read_rows(folder / "accuracy.csv"))
    times = read_rows(folder / "epoch_time.csv")
    tables = {
        "overview": overview_table(runs),
        "accuracy": accuracy_table(runs),
        "steps": steps_table(runs),
        "search": search_table(read_rows(folder / "search.csv")),
        "dropout ablation": dropout_table(read_rows(folder / "dropout_ablation.csv")),
        "own digits": columns_table(read_rows(folder / "own_digits.csv"), ["model", *MACHINE_COLUMNS]),
        "drawing field": columns_table(read_rows(folder / "drawing.csv"), MACHINE_COLUMNS),
        "epoch time": epoch_time_table(times),
        "epoch time of the networks": networks_time_table(times),
        "all times": all_times_table(times),
    }
    for name in PUBLISHED:
        tables[f"{name} schedules"] = schedules_table(name, runs)
    for name in ("Model4", "Model5"):
        tables[f"{name} seeds"] = seeds_table(name, runs)
    for name in MODELS:
        tables[f"{name} layers"] = layers_table(name)
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
        for name in stale_tables(page, tables):
            problems.append(f"{path}: the table {name!r} is stale")
    if args.check and problems:
        sys.exit("\n".join([*problems, "run python benchmarks/tables.py --write"]))


if __name__ == "__main__":
    main()

"""Generate the tables of README.md and benchmarks/README.md from the CSV files of this folder.

    python benchmarks/tables.py --write     update both files
    python benchmarks/tables.py --check     fail if a table is stale, and name it

A table is between the lines `<!-- table: NAME -->` and `<!-- /table -->`. `create_tables` lists the
names. What is not recorded is left out. Accuracies are in percent; the titles are short, so that the
tables fit a phone: "size" is the number of parameters, "min" the lowest of the last epochs, "from" the
epoch from which the target is met, and "field" the receptive field, in pixels. A gain is the mean
difference of runs with the same seeds ± its standard error.
"""

import argparse
import json
import re
import statistics
import sys

import common
import search

import plots
from model import MODELS, create_model

FOLDER = common.ROOT / "benchmarks"
PAGES = [common.ROOT / "README.md", FOLDER / "README.md"]
START = "<!-- table: "
MARKED_TABLE = re.compile(START + r"(?P<name>[^>]+) -->\n(?:(?!<!-- ).*\n)*<!-- /table -->")
MEAN = f"mean, last {plots.LAST_EPOCHS}"  # the title of a column
MEASURES = {  # of a run, by the title of their column
    "train, best": lambda history: max(history.train_acc),
    "test, best": lambda history: max(history.test_acc),
    "last": lambda history: history.test_acc[-1],
    "min": common.lowest_of_last_epochs,
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


def paired_differences(values, baseline):
    """Return the differences of two dictionaries from seed to value, for the seeds that both have."""
    return [value - baseline[seed] for seed, value in values.items() if seed in baseline]


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
    latest = 0
    for history in histories:
        first = plots.first_epoch_above(history.test_acc)
        if first is None:
            return "never"
        latest = max(latest, first)
    return str(latest)


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
        if (name, "described") in runs:
            parameters = common.count_parameters(create_model(name))
            rows.append([name, f"{parameters:,}", *result_cells(runs[name, "described"].values())])
    return markdown_table(f"model | size | {MEAN} | min | from", rows)


def schedules_table(name, runs):
    """Return the accuracy of a model per schedule, the gain of the described one, and what was published."""
    constant = runs.get((name, "constant"), {})
    described = runs.get((name, "described"), {})
    schedules = {"constant": constant, "described": described}
    if constant == described:
        schedules = {"constant = described": described}
    rows = []
    for title, histories in schedules.items():
        if histories:
            cells = [title]
            for measure in MEASURES.values():
                cells.append(mean_and_deviation(by_seed(measure, histories).values()))
            rows.append(cells)
    gains = ["gain"]
    wins = ["seeds won"]
    for measure in MEASURES.values():
        differences = paired_differences(by_seed(measure, described), by_seed(measure, constant))
        gains.append(gain_cell(differences))
        wins.append(f"{sum(difference > 0 for difference in differences)} of {len(differences)}")
    if constant != described:
        rows += [gains, wins]
    published = common.PUBLISHED[name]
    rows.append(["published", f"{published.train_acc:.2f}", f"{published.test_acc:.2f}", "", ""])
    return markdown_table(" | ".join(["schedule", *MEASURES]), rows)


def by_seed(measure, histories):
    """Return a dictionary from seed to what `measure` gives for its run."""
    return {seed: measure(history) for seed, history in histories.items()}


def seeds_table(name, runs):
    """Return the accuracy of each run of a model, trained as described; the last row is about all runs."""
    histories = runs.get((name, "described"), {})
    groups = {}
    for seed, history in histories.items():
        groups[seed] = [history]
    if histories:
        groups["all"] = histories.values()
    rows = []
    for seed, group in groups.items():
        train = mean_and_deviation([history.train_acc[-1] for history in group])
        rows.append([seed, train, *result_cells(group)])
    return markdown_table(f"seed | train, last | {MEAN} | min | from", rows)


def steps_table(runs):
    """Return the steps from Model1 to Model4, and the gain of each over the step before."""
    rows = []
    before = {}
    for step in common.STEPS:
        histories = runs.get((step.model, step.schedule), {})
        if histories:
            rows.append(step_cells(step, histories, before))
        before = histories
    return markdown_table(f"step | {MEAN} | min | gain", rows)


def without_table(runs):
    """Return the results of Model4, and of Model4 with one thing taken out."""
    rows = []
    baseline = {}
    for step in [common.MODEL4, *common.WITHOUT]:
        histories = runs.get((step.model, step.schedule), {})
        if histories:
            rows.append(step_cells(step, histories, baseline))
        if step == common.MODEL4:
            baseline = histories
    return markdown_table(f"instead | {MEAN} | min | difference", rows)


def step_cells(step, histories, baseline):
    """Return the row of a step: its change, the mean, the lowest, and the gain over a baseline."""
    mean, lowest, _ = result_cells(histories.values())
    means = by_seed(common.mean_of_last_epochs, histories)
    differences = paired_differences(means, by_seed(common.mean_of_last_epochs, baseline))
    return [step.change, mean, lowest, gain_cell(differences)]


# ---- tables about the networks ----


def calculate_fields(layers):
    """Return the jump before each layer and the receptive field after it, as a list of pairs.

    A jump is the distance of neighboring values in pixels of the image.
    """
    pairs = []
    jump = 1
    field = 1
    for layer in layers:
        field += (layer.kernel - 1) * jump
        pairs.append((jump, field))
        jump *= layer.stride
    return pairs


def design_table(name):
    """Return how the receptive field of a network grows from block to block, and where its parameters are.

    A block is described by the kernel of its largest layer; its other layers do not change the field.
    """
    layers = plots.layer_table(create_model(name))
    blocks = {}
    for layer, (jump, field) in zip(layers, calculate_fields(layers), strict=True):
        block = blocks.setdefault(layer.name.split(".")[0], {"jump": jump, "largest": layer, "parameters": 0})
        if layer.kernel > block["largest"].kernel:
            block["largest"] = layer
        block["output"] = "×".join(map(str, layer.output))
        block["field"] = field
        block["parameters"] += layer.parameters
    rows = []
    for name, block in blocks.items():
        largest = block["largest"]
        cells = [name, block["output"], largest.kernel, largest.stride, block["jump"], block["field"]]
        rows.append([*cells, f"{block['parameters']:,}"])
    return markdown_table("block | output | kernel | stride | jump | field | parameters", rows)


def networks_table():
    """Return the size, the multiply-adds and the receptive field of all networks."""
    rows = []
    for name in MODELS:
        layers = plots.layer_table(create_model(name))
        parameters = sum(layer.parameters for layer in layers)
        mult_adds = sum(layer.mult_adds for layer in layers)
        _, field = calculate_fields(layers)[-1]
        rows.append([name, f"{parameters:,}", f"{mult_adds:,}", field])
    return markdown_table("model | size | mult-adds | field", rows)


# ---- other tables ----


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
        cells = [f"{before} → {after}", f"{int(parameters):,}", recipe_text(json.loads(changes))]
        lines.append([*cells, *search_cells(runs)])
    return markdown_table("network | size | recipe | seeds | mean | min | loss", lines)


def search_cells(runs):
    """Return the cells about the rows of one configuration: seeds, mean, lowest, and loss."""
    return [
        len(runs),
        f"{statistics.mean(numbers(runs, 'mean_last_five')):.3f}",
        f"{min(numbers(runs, 'worst_last_five')):.2f}",
        f"{statistics.mean(numbers(runs, 'loss_last_five')):.4f}",
    ]


def model5_search_table(rows):
    """Return the changes of the recipe that were tried with Model5's network, and their gain over none."""
    recipe = {"clean_epochs": 6}
    columns = search.identity(search.Configuration(*search.MODEL5, recipe), seed=1)
    network = {"before": columns["before"], "after": columns["after"]}
    rows = [row for row in rows if network.items() <= row.items()]
    baseline = {}
    lines = []
    for (text,), runs in group_by(rows, ["changes"]).items():
        changes = json.loads(text)
        if recipe.items() <= changes.items():
            means = dict(zip(numbers(runs, "seed"), numbers(runs, "mean_last_five"), strict=True))
            gain = gain_cell(paired_differences(means, baseline))
            lines.append([recipe_text(changes), *search_cells(runs), gain])
            if changes == recipe:
                baseline = means
    return markdown_table("recipe | seeds | mean | min | loss | gain", lines)


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
        machine = f"{device}, {plots.number_of(int(threads), 'thread')}"
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
    runs = common.recorded_runs(common.read_rows(FOLDER / "accuracy.csv"))
    search_rows = common.read_rows(FOLDER / "search.csv")
    own_digits = common.read_rows(FOLDER / "own_digits.csv")
    exercises = common.read_rows(FOLDER / "exercises.csv")
    drawing = common.read_rows(FOLDER / "drawing.csv")
    tables = {
        "overview": overview_table(runs),
        "steps": steps_table(runs),
        "without": without_table(runs),
        "design": design_table("Model4"),
        "networks": networks_table(),
        "search": search_table(search_rows),
        "Model5 search": model5_search_table(search_rows),
        "dropout ablation": dropout_table(common.read_rows(FOLDER / "dropout_ablation.csv")),
        "own digits": columns_table(own_digits, hidden=["model", "device", "threads", "torch"]),
        "drawing field": columns_table(drawing, hidden=["device", "threads", "torch"]),
        "epoch time": epoch_time_table(common.read_rows(FOLDER / "epoch_time.csv")),
        "exercises": columns_table(exercises, hidden=["seed", "device", "threads", "torch"]),
    }
    for name in MODELS:
        if name in common.PUBLISHED:
            tables[f"{name} schedules"] = schedules_table(name, runs)
        else:
            tables[f"{name} seeds"] = seeds_table(name, runs)
    return tables


def find_stale_tables(page, tables):
    """Return the tables of a page that are not up to date: a dictionary from name to (text, current text).

    Raise ValueError if a table has no end, and KeyError if there is no table of that name.
    """
    matches = list(MARKED_TABLE.finditer(page))
    if len(matches) != page.count(START):
        raise ValueError("a table has no end: add the line <!-- /table -->")
    stale = {}
    for match in matches:
        name = match["name"]
        current = f"{START}{name} -->\n\n{tables[name]}\n\n<!-- /table -->"
        if match.group() != current:
            stale[name] = (match.group(), current)
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

"""Seconds per epoch: a standard DataLoader pipeline, this repository, and compute only (the lower bound).

    python benchmarks/epoch_time.py                             results are saved in epoch_time.csv
    python benchmarks/epoch_time.py --models Model3 --quick     10 % of the data, not saved

The variants of a training epoch and of a pass over the test set:

- DataLoader: torchvision's MNIST with per-image transforms, read by `utils.train`
- this repository: `utils.train` with this repository's loader
- without channels-last: the same in PyTorch's default memory format, if the model uses another
- without malloc tuning: the same without `keep_freed_memory`, in a separate process
- compute only: forward, loss, backward and optimizer step on precomputed batches

Every round measures all variants of all models one after another, in a different random order. Nothing
else should run on the machine.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import ROOT, Candidate, default_device, machine_columns, read_rows, write_rows
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms
from tqdm import tqdm

import utils
from model import MODELS, create_model

CSV = ROOT / "benchmarks" / "epoch_time.csv"
BATCH_SIZE = 128
QUICK_SHARE = 10  # --quick and the warm-up use one image in this many
DATALOADER = "DataLoader, 0 workers"
REPOSITORY = "this repository"
COMPUTE_ONLY = "compute only"
UNTUNED = "this repository, without malloc tuning"
CONTIGUOUS = "this repository, without channels-last"
PREVIOUS_MODEL4 = "previous Model4"  # with the pool one layer later


class Variant(NamedTuple):
    """One thing to measure, as it is called in epoch_time.csv."""

    model: str
    phase: str  # "train" or "test"
    name: str


def create_network(name, memory_format=None):
    """Return a new network and its recipe; `memory_format` replaces the network's own if it is given."""
    if name == PREVIOUS_MODEL4:
        model = Candidate(before=[16, 16, 24], after=[32, 36, 36, 36])
        recipe = utils.RECIPES["Model4"]
    else:
        model = create_model(name)
        recipe = utils.RECIPES[name]
    return model.to(memory_format=memory_format or model.memory_format), recipe


class LoaderKey(NamedTuple):
    """What distinguishes one loader from another. Variants share loaders, to save memory."""

    name: str
    phase: str
    is_augmented: bool


def loader_key(variant):
    """Return the key of the loader that a variant reads."""
    _, recipe = create_network(variant.model)
    is_augmented = variant.phase == "train" and recipe.augmentation is not None
    if variant.name.startswith("DataLoader"):
        return LoaderKey(variant.name, variant.phase, is_augmented)
    if variant.name == COMPUTE_ONLY:
        return LoaderKey(variant.name, variant.phase, is_augmented=False)
    return LoaderKey(REPOSITORY, variant.phase, is_augmented)


def create_loader(key, device, quick):
    """Return the loader for a `LoaderKey`, with the augmentation of Models 4 and 5 if there is one."""
    is_train = key.phase == "train"
    augmentation = None
    if key.is_augmented:
        augmentation = utils.RECIPES["Model4"].augmentation
    if key.name.startswith("DataLoader"):
        workers = int(key.name.split()[1])
        return standard_loader(is_train, workers, device, augmentation, quick)
    train_set, test_set = utils.load_data(standin=False)
    dataset = test_set
    if is_train:
        dataset = train_set
    if quick:
        dataset = dataset[: len(dataset) // QUICK_SHARE]
    loader = utils.BatchLoader(dataset, BATCH_SIZE, device, shuffle=is_train, augmentation=augmentation)
    if key.name == COMPUTE_ONLY:
        return list(loader)
    return loader


def standard_loader(is_train, workers, device, augmentation, quick):
    """Return a standard DataLoader, as in most MNIST examples."""
    steps = [transforms.ToTensor(), transforms.Normalize((utils.MEAN,), (utils.STD,))]
    if augmentation is not None:
        shift = augmentation["shift"]
        scale = augmentation["scale"]
        rotate_shift_scale = transforms.RandomAffine(
            augmentation["degrees"], (shift, shift), (1 - scale, 1 + scale)
        )
        steps.insert(0, rotate_shift_scale)
    root = Path(os.environ.get("MNIST_ROOT", "./data")).expanduser()
    dataset = datasets.MNIST(root, is_train, transforms.Compose(steps))
    if quick:
        dataset = Subset(dataset, range(len(dataset) // QUICK_SHARE))
    on_gpu = device == "cuda"
    return DataLoader(dataset, BATCH_SIZE, shuffle=is_train, num_workers=workers, pin_memory=on_gpu)


def train_compute_only(model, batches, optimizer):
    """Run the compute of one training epoch, without data loading and bookkeeping."""
    model.train()
    for data, target in batches:
        optimizer.zero_grad()
        F.nll_loss(model(data), target).backward()
        optimizer.step()


@torch.no_grad()
def test_compute_only(model, batches):
    """Run the compute of one pass over the test set, without data loading and bookkeeping."""
    model.eval()
    for data, target in batches:
        F.nll_loss(model(data), target, reduction="sum")


def measure(variant, loader, device):
    """Return the seconds of one pass with a newly initialized network.

    The progress bar is enabled, but its output is discarded.
    """
    torch.manual_seed(1)
    memory_format = None
    if variant.name == CONTIGUOUS:
        memory_format = torch.contiguous_format
    model, recipe = create_network(variant.model, memory_format)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), **recipe.sgd)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        if variant.phase == "train" and variant.name == COMPUTE_ONLY:
            train_compute_only(model, loader, optimizer)
        elif variant.phase == "train":
            utils.train(model, device, loader, optimizer, F.nll_loss)
        elif variant.name == COMPUTE_ONLY:
            test_compute_only(model, loader)
        else:
            utils.test(model, device, loader, F.nll_loss)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_untuned(variant, device, quick, threads):
    """Return the seconds of one pass in this process, which has not called `keep_freed_memory`.

    A warm-up pass over one image in ten comes first, so that one-time costs are not included.
    """
    torch.set_num_threads(threads)
    key = loader_key(variant)
    measure(variant, create_loader(key, device, quick=True), device)
    return measure(variant, create_loader(key, device, quick), device)


def measure_in_new_process(variant, device, quick):
    """Return what `measure_untuned` returns in a process that runs only during the measurement."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        future = executor.submit(measure_untuned, variant, device, quick, torch.get_num_threads())
        return future.result()


def list_variants(model, device):
    """Return the variants of a model, as a list of `Variant`.

    The previous Model4 has only the one that the present networks are compared with.
    """
    if model == PREVIOUS_MODEL4:
        return [Variant(model, "train", REPOSITORY)]
    variants = []
    workers = 2
    if device == "cuda":
        workers = 4
    for phase in ("train", "test"):
        for name in (DATALOADER, f"DataLoader, {workers} workers", REPOSITORY, COMPUTE_ONLY):
            variants.append(Variant(model, phase, name))
    if create_network(model)[0].memory_format != torch.contiguous_format:
        variants.append(Variant(model, "train", CONTIGUOUS))
    if device == "cpu":
        variants.append(Variant(model, "train", UNTUNED))
    return variants


def measure_rounds(variants, rounds, device, quick):
    """Return a dictionary from `Variant` to its seconds in each round."""
    loaders = {}
    short_loaders = {}
    for variant in variants:
        key = loader_key(variant)
        if key not in loaders:
            loaders[key] = create_loader(key, device, quick)
            short_loaders[key] = create_loader(key, device, quick=True)
    utils.keep_freed_memory()
    in_this_process = [variant for variant in variants if variant.name != UNTUNED]
    for variant in tqdm(in_this_process, desc="warm-up"):
        measure(variant, short_loaders[loader_key(variant)], device)
    seconds = {variant: [] for variant in variants}
    for number in tqdm(range(rounds), desc="rounds"):
        for variant in random.Random(number).sample(variants, len(variants)):
            if variant.name == UNTUNED:
                seconds[variant].append(measure_in_new_process(variant, device, quick))
            else:
                seconds[variant].append(measure(variant, loaders[loader_key(variant)], device))
    return seconds


def summarize(seconds, device):
    """Return the rows of epoch_time.csv for what `measure_rounds` returned."""
    median = {variant: statistics.median(times) for variant, times in seconds.items()}

    def ratio(variant, baseline):
        """Return the quotient of two medians, or an empty string if the baseline was not measured."""
        baseline = variant._replace(name=baseline)
        if baseline not in median:
            return ""
        return f"{median[variant] / median[baseline]:.3f}"

    rows = []
    for variant, times in seconds.items():
        row = {
            "model": variant.model,
            "pass": variant.phase,
            "variant": variant.name,
            "batch": BATCH_SIZE,
            "rounds": len(times),
            "seconds": f"{median[variant]:.3f}",
            "fastest": f"{min(times):.3f}",
            "slowest": f"{max(times):.3f}",
            "vs_dataloader": ratio(variant, DATALOADER),
            "vs_compute_only": ratio(variant, COMPUTE_ONLY),
        }
        row.update(machine_columns(device))
        rows.append(row)
    return rows


def save(rows):
    """Save rows in epoch_time.csv, in place of those of the same models on the same machine."""

    def key(row):
        return row["model"], row["device"], str(row["threads"])

    measured = set(map(key, rows))
    kept = []
    for row in read_rows(CSV):
        if key(row) not in measured:
            kept.append(row)
    write_rows(kept + rows, CSV)


def main():
    names = [*MODELS, PREVIOUS_MODEL4]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", choices=names, default=["Model3", "Model4", "Model5", PREVIOUS_MODEL4]
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="use 10 %% of the data and do not save")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = default_device()
    utils.load_data(standin=False)  # downloads MNIST if it is missing
    variants = []
    for model in args.models:
        variants.extend(list_variants(model, device))
    rows = summarize(measure_rounds(variants, args.rounds, device, args.quick), device)
    for row in rows:
        print(", ".join(map(str, row.values())))
    if not args.quick:
        save(rows)


if __name__ == "__main__":
    main()

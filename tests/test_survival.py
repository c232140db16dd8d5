"""Runs that are killed, resumed, refused: a run's file must always hold its last whole epoch."""

import multiprocessing
import os
from pathlib import Path
import random
import time

import pytest
import torch

from model import create_model
import utils

EPOCHS = 6
RECIPE = dict(
    optimizer=dict(lr=0.05, momentum=0.9, nesterov=True),
    scheduler=("OneCycleLR", dict(pct_start=0.25)),
    augment=dict(degrees=10, shift=0.05, scale=0.05),
    average=0.9,
    plain=2,
)
PLATEAU = {**RECIPE, "scheduler": ("ReduceLROnPlateau", dict(patience=0)), "average": None}

# a server that has imported torch already forks a process in milliseconds, so that a kill falls
# into training and not into importing
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["utils", "model"])


def run(path, dataset, recipe=RECIPE, epochs=EPOCHS, resume=False, seed=1, name="Model3"):
    """A short run of the network with a checkpoint at `path`; returns the model and the history."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = create_model(name)
    loaders = utils.make_loaders(dataset, dataset, recipe, "cpu", 50)
    optimizer, scheduler = utils.make_optimizer(model, recipe, epochs, len(loaders[0]))
    history = utils.fit(
        model,
        "cpu",
        *loaders,
        optimizer,
        scheduler,
        epochs,
        seed,
        average=recipe["average"],
        plain=recipe["plain"],
        checkpoint=path,
        resume=resume,
    )
    return model, history


def slowly(real, announced):
    def slow(*args):
        announced.touch()
        time.sleep(0.3)
        return real(*args)

    return slow


def half_then_rest(announced):
    real = torch.save

    def save(state, path):
        real(state, path)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        announced.touch()
        time.sleep(0.3)
        Path(path).write_bytes(whole)

    return save


def child(path, images, targets, recipe, slow=None):
    """What a process that is to be killed does; `slow` stretches a moment of saving."""
    if slow == "half written":
        utils.torch.save = half_then_rest(path.with_suffix(".now"))
    elif slow == "before the rename":
        utils.os.replace = slowly(os.replace, path.with_suffix(".now"))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    dataset = utils.StandIn.__new__(utils.StandIn)
    dataset.data, dataset.targets = images, targets
    run(path, dataset, recipe, resume=True)


def start(path, dataset, recipe, slow=None):
    process = processes.Process(target=child, args=(path, dataset.data, dataset.targets, recipe, slow))
    process.start()
    return process


def assert_same(one, two, name=""):
    """Bit for bit, through dictionaries and lists; only the wall time of the epochs may differ."""
    assert type(one) is type(two), name
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one.keys() - {"seconds"}:
            assert_same(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), name
        for a, b in zip(one, two):
            assert_same(a, b, name)
    else:
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, name


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, digits):
    """The checkpoints of runs never interrupted, one in a process of its own for each recipe."""
    dataset = utils.StandIn.__new__(utils.StandIn)
    dataset.data, dataset.targets = digits[0].data[:500], digits[0].targets[:500]
    states = []
    for recipe in (RECIPE, PLATEAU):
        path = tmp_path_factory.mktemp("whole") / "run.pt"
        began = time.perf_counter()
        process = start(path, dataset, recipe)
        process.join()
        states.append(utils.read_checkpoint(path))
    return dataset, states, time.perf_counter() - began


def test_killed_at_random_moments(whole_runs, tmp_path):
    """Ten SIGKILLs, each at a moment drawn from half a run's time; then the run is completed."""
    dataset, states, seconds = whole_runs
    draw = random.Random(1)
    kills = runs = 0
    while kills < 10:
        path = tmp_path / f"run{runs}.pt"
        recipe, state = ((RECIPE, states[0]), (PLATEAU, states[1]))[runs % 2]
        while True:
            process = start(path, dataset, recipe)
            process.join(draw.uniform(0.02, seconds / 2))
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
        assert process.exitcode == 0
        assert_same(utils.read_checkpoint(path), state)
        runs += 1


@pytest.mark.parametrize("slow", ["half written", "before the rename"])
def test_killed_while_saving(whole_runs, tmp_path, slow):
    dataset, states, _ = whole_runs
    path = tmp_path / "run.pt"
    for _ in range(3):
        path.with_suffix(".now").unlink(missing_ok=True)
        process = start(path, dataset, RECIPE, slow)
        while not path.with_suffix(".now").exists():
            time.sleep(0.01)
        process.kill()
        process.join()
        assert path.with_suffix(".partial").exists()
    process = start(path, dataset, RECIPE)
    process.join()
    assert_same(utils.read_checkpoint(path), states[0])


def test_a_fresh_process_gives_the_same_bits_as_this_one(whole_runs, tmp_path):
    dataset, states, _ = whole_runs
    threads = torch.get_num_threads()
    try:
        run(tmp_path / "run.pt", dataset)
    finally:
        torch.set_num_threads(threads)
    assert_same(utils.read_checkpoint(tmp_path / "run.pt"), states[0])


def test_resuming_a_finished_run_trains_nothing(small, tmp_path, monkeypatch):
    model, history = run(tmp_path / "run.pt", small(200), epochs=2)
    monkeypatch.setattr(utils, "train", lambda *_: pytest.fail("training began"))
    again, same = run(tmp_path / "run.pt", small(200), epochs=2, resume=True)
    assert history == same and history.seconds == same.seconds
    assert_same(dict(model.state_dict()), dict(again.state_dict()))


def test_without_resume_a_run_starts_afresh_and_the_old_file_is_kept(small, tmp_path):
    run(tmp_path / "run.pt", small(200), epochs=2, seed=1)
    old = utils.read_checkpoint(tmp_path / "run.pt")
    _, history = run(tmp_path / "run.pt", small(200), epochs=2, seed=2)
    assert len(history.test_acc) == 2 and history != utils.History(**old["history"])
    assert_same(utils.read_checkpoint(tmp_path / "run.previous"), old)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(epochs=4), "epochs was 2, is 4"),
        (dict(seed=2), "seed was 1, is 2"),
        (dict(name="Model1"), "model was Model3, is Model1"),
        (dict(recipe=PLATEAU), "scheduler was OneCycleLR, is ReduceLROnPlateau"),
        (
            dict(recipe={**RECIPE, "optimizer": dict(lr=0.05, momentum=0.8)}),
            "optimizer nesterov was True, is False",
        ),
        (dict(recipe={**RECIPE, "augment": None}), "augment was {'degrees': 10.*is None"),
        (dict(recipe={**RECIPE, "average": 0.8}), "average was 0.9, is 0.8"),
        (dict(recipe={**RECIPE, "plain": 1}), "plain was 2, is 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(small, tmp_path, change, message):
    run(tmp_path / "run.pt", small(200), epochs=2)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "run.pt", small(200), **{"epochs": 2, **change}, resume=True)
    assert "\n" not in str(error.value) and (tmp_path / "run.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"<html>", b"half"])
def test_a_damaged_checkpoint_gives_one_line(small, tmp_path, content):
    path = tmp_path / "run.pt"
    run(path, small(200), epochs=2)
    path.write_bytes(path.read_bytes()[:2000] if content == b"half" else content)
    with pytest.raises(ValueError, match="run.pt is not a readable checkpoint") as error:
        run(path, small(200), epochs=2, resume=True)
    assert "\n" not in str(error.value)


def test_no_code_is_run_by_loading(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"best": Evil()}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        utils.load_best(create_model("Model3"), tmp_path / "run.pt")
    assert not (tmp_path / "made").exists()


def test_the_best_weights_have_the_recorded_accuracy(small, tmp_path):
    dataset = small(300)
    _, history = run(tmp_path / "run.pt", dataset, epochs=4)
    model = create_model("Model3")
    epoch, accuracy = utils.load_best(model, tmp_path / "run.pt")
    assert accuracy == max(history.test_acc) == history.test_acc[epoch - 1]
    loader = utils.BatchLoader(dataset, 100, "cpu")
    assert utils.test(model, "cpu", loader, torch.nn.functional.nll_loss)[1] == accuracy


def test_best_weights_that_do_not_fit_are_refused(small, tmp_path):
    run(tmp_path / "run.pt", small(200), epochs=2)
    with pytest.raises(ValueError, match="do not fit Model1"):
        utils.load_best(create_model("Model1"), tmp_path / "run.pt")
    with pytest.raises(ValueError, match="none.pt does not exist"):
        utils.load_best(create_model("Model1"), tmp_path / "none.pt")

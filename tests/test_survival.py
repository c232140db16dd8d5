"""Runs that are killed, resumed, refused: a run's file must always hold the end of a whole epoch."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

import accuracy
from conftest import ROOT
from model import create_model
import utils

RECIPE = dict(  # all that a recipe can have
    batch_size=50,
    optimizer=dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    StepLR=dict(step_size=2, gamma=0.1),
    augment=dict(degrees=10, shift=0.05, scale=0.05),
    plain=2,
)
SETTINGS = dict(model="Model3", data="digits", epochs=6, seed=1)
PLATEAU = {k: v for k, v in RECIPE.items() if k != "StepLR"} | dict(ReduceLROnPlateau=dict(patience=0))

# a server that has imported torch already forks a process in milliseconds, so that a kill falls
# into training and not into importing
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["utils", "model"])


def train(path, dataset, recipe=RECIPE, **changes):
    """A short run in the benchmarks' loop, gone on from `path` if it is there: model and history."""
    settings = SETTINGS | changes
    torch.manual_seed(settings["seed"])
    model = create_model(settings["model"])
    return model, accuracy.train_model(model, recipe, dataset, dataset, settings, path)


def child(path, dataset, recipe, written):
    """A run in a process of its own; with `written`, one that kills itself as it saves for the third
    time, when that share of the new file has been written."""
    saved, real = [], os.replace

    def replace(partial, target):
        saved.append(target)
        if written and len(saved) == 3:
            os.truncate(partial, int(written * os.path.getsize(partial)))
            os.kill(os.getpid(), signal.SIGKILL)
        real(partial, target)

    os.replace = replace
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    train(path, dataset, recipe)


def start(path, dataset, recipe=RECIPE, written=None):
    process = processes.Process(target=child, args=(path, dataset, recipe, written))
    process.start()
    return process


def assert_same(one, two):
    """Bit for bit, through dictionaries and lists; only the wall time of the epochs may differ."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        [assert_same(one[key], two[key]) for key in one.keys() - {"seconds"}]
    elif isinstance(one, list):
        assert len(one) == len(two)
        [assert_same(a, b) for a, b in zip(one, two)]
    else:
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, small):
    """The checkpoints of runs never interrupted, one in a process of its own for each recipe."""
    dataset, states = small(500), []
    for recipe in (RECIPE, PLATEAU):
        path = tmp_path_factory.mktemp("whole") / "run.pt"
        began = time.perf_counter()
        start(path, dataset, recipe).join()
        states.append(utils.read_checkpoint(path))
        assert len(states[-1]["history"]["test_acc"]) == 6
    return dataset, states, time.perf_counter() - began


@pytest.mark.parametrize("recipe", [RECIPE, PLATEAU], ids=["StepLR", "ReduceLROnPlateau"])
def test_killed_at_random_moments(whole_runs, tmp_path, recipe):
    """Five SIGKILLs, each at a moment drawn from half a run's time; then the run is completed."""
    dataset, states, seconds = whole_runs
    draw, kills = random.Random(1), 0
    while kills < 5:
        path, alive = tmp_path / f"run{kills}.pt", True
        while alive:
            process = start(path, dataset, recipe)
            process.join(draw.uniform(0.02, seconds / 2))
            alive = process.is_alive()
            kills += alive
            process.kill()
            process.join()
        assert_same(utils.read_checkpoint(path), states["StepLR" not in recipe])


@pytest.mark.parametrize("written", [0.5, 1.0])
def test_killed_while_saving(whole_runs, tmp_path, written):
    dataset, states, _ = whole_runs
    path = tmp_path / "run.pt"
    for epochs in (1, 3, 5):  # the first process saves the start as well
        process = start(path, dataset, written=written)
        process.join()
        assert process.exitcode == -signal.SIGKILL and path.with_suffix(".partial").exists()
        assert len(utils.read_checkpoint(path)["history"]["test_acc"]) == epochs
    start(path, dataset).join()
    assert_same(utils.read_checkpoint(path), states[0])


@pytest.mark.parametrize("epoch, batch", [(1, 1), (3, 2)])
def test_stopped_by_hand_it_goes_on_bit_for_bit(whole_runs, tmp_path, monkeypatch, epoch, batch):
    """Ctrl-C in a batch, then the notebook's own cell run again in the same kernel; and what comes of it
    is what the benchmarks' loop gives in a process of its own."""
    dataset, states, _ = whole_runs
    cells = ["".join(cell["source"]) for cell in json.loads((ROOT / "S7.ipynb").read_text())["cells"]]
    make, loop = (next(c for c in cells if text in c) for text in ("torch.optim.SGD(", "in run.epochs()"))
    torch.manual_seed(1)
    names = dict(vars(utils), model=create_model("Model3"), device="cpu", MODEL="Model3", EPOCHS=6)
    names |= dict(RECIPES={"Model3": RECIPE}, settings=SETTINGS | RECIPE, RESUME=False)
    names |= dict(CHECKPOINT=tmp_path / "run.pt", test_loader=utils.BatchLoader(dataset, 50, "cpu"))
    names |= dict(train_loader=utils.BatchLoader(dataset, 50, "cpu", shuffle=True))
    batches, count = [], utils.GetCorrectPredCount

    def interrupt(*args):
        batches.append(names["model"].training)
        if sum(batches) == (epoch - 1) * 10 + batch + 1 and not names["RESUME"]:
            signal.raise_signal(signal.SIGINT)
        return count(*args)

    monkeypatch.setattr(utils, "GetCorrectPredCount", interrupt)
    exec(make, names)
    with pytest.raises(KeyboardInterrupt):
        exec(loop, names)
    history = names["run"].history
    assert {len(values) for values in vars(history).values()} == {epoch - 1}
    utils.plot_history(history, "stopped")  # and every later cell works
    assert ("no whole epoch" in utils.result(history, "stopped")) == (epoch == 1)
    names["RESUME"] = True
    exec(loop, names)
    assert_same(utils.read_checkpoint(tmp_path / "run.pt"), states[0])


@pytest.mark.parametrize("where", ["train", "test"])
def test_a_loss_that_is_not_finite_leaves_the_last_whole_epoch(small, tmp_path, monkeypatch, capsys, where):
    """In the third epoch's first batch, or when it is tested; the line before it names the epoch."""
    states, real = [], getattr(utils, where)

    def poisoned(model, *args):
        states.append(utils.read_checkpoint(tmp_path / "run.pt"))
        if len(states) == 3:
            next(model.parameters()).data.fill_(float("nan"))
        return real(model, *args)

    monkeypatch.setattr(utils, where, poisoned)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        train(tmp_path / "run.pt", small(200))
    assert "EPOCH: 3" in capsys.readouterr().out.split("EPOCH: 2")[1]
    state = utils.read_checkpoint(tmp_path / "run.pt")
    assert_same(state, states[2])
    assert len(state["history"]["test_acc"]) == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_plateau_is_stepped_with_the_test_loss(small, tmp_path, monkeypatch):
    """Losses 3, 2, 2, 2 with a patience of 1: by PyTorch's rule the rate falls after epoch 4."""
    losses = iter([3.0, 2.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(utils, "test", lambda *_: (next(losses), 50.0))
    recipe = {**PLATEAU, "ReduceLROnPlateau": dict(patience=1, factor=0.1)}
    _, history = train(tmp_path / "run.pt", small(100), recipe, epochs=5)
    assert history.learning_rates == pytest.approx([0.05, 0.05, 0.05, 0.05, 0.005])


def test_the_scheduler_is_stepped_and_the_last_epochs_are_not_augmented(small, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(utils, "random_affine", lambda data, **amounts: calls.append(amounts) or data)
    _, history = train(tmp_path / "run.pt", small(100), epochs=5)  # two batches an epoch
    assert calls == [RECIPE["augment"]] * 6
    assert history.learning_rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005])


def test_a_finished_run_is_not_trained_again_and_a_fresh_one_keeps_the_old_file(small, tmp_path, monkeypatch):
    model, history = train(tmp_path / "run.pt", small(200), epochs=2)
    clean = train(tmp_path / "second.pt", small(200), epochs=2)[1]  # a record of its own
    other = train(tmp_path / "other.pt", small(200), epochs=2, seed=2)[1]
    assert history == clean != other and len(clean.test_acc) == 2
    monkeypatch.setattr(utils, "train", lambda *_: pytest.fail("training began"))
    again, same = train(tmp_path / "run.pt", small(200), epochs=2)
    assert history == same and history.seconds == same.seconds
    assert_same(dict(model.state_dict()), dict(again.state_dict()))
    old, optimizer = utils.read_checkpoint(tmp_path / "run.pt"), torch.optim.SGD(model.parameters())
    run = utils.Run(tmp_path / "run.pt", SETTINGS, model, optimizer, StepLR(optimizer, 2))
    assert run.history == utils.History() and next(run.epochs()) == 1
    assert_same(utils.read_checkpoint(tmp_path / "run.previous"), old)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model="Model1", data="MNIST"), "model was Model3, is Model1; data was digits, is MNIST"),
        (dict(epochs=4, recipe=RECIPE | dict(batch_size=9)), "epochs was 2, is 4; batch_size was 50, is 9"),
        (dict(seed=2, recipe=RECIPE | dict(augment=None)), "seed was 1, is 2; augment was {.*}, is None"),
        (
            dict(recipe=RECIPE | dict(optimizer={"lr": 1}, plain=1)),
            "optimizer was .*, is {'lr': 1}; plain was 2",
        ),
        (dict(recipe=PLATEAU), r"ReduceLROnPlateau was None, is \{.patience.: 0\}; StepLR was .*, is None"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(small, tmp_path, change, message):
    train(tmp_path / "run.pt", small(200), epochs=2)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        train(tmp_path / "run.pt", small(200), **{"epochs": 2, **change})
    assert "\n" not in str(error.value) and (tmp_path / "run.pt").read_bytes() == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize("content", [b"", b"<html>", "half", {"model": {}}, [1, 2], Evil()])
def test_a_damaged_or_foreign_checkpoint_gives_one_line(small, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)  # where foreign code would leave its mark
    path = tmp_path / "run.pt"
    train(path, small(200), epochs=2)
    content = path.read_bytes()[:2000] if content == "half" else content
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="^.*/run.pt is no checkpoint of a run .*: delete it.*$"):
        train(path, small(200), epochs=2)
    assert not (tmp_path / "made").exists()

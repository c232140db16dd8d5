"""Runs that are killed, resumed, refused: a run's file must always hold the end of a whole epoch."""

import multiprocessing
import os
from pathlib import Path
import random
import signal
import time

import pytest
import torch
import torch.nn.functional as F

import accuracy
from conftest import RECIPE, make_parts
from model import create_model
import utils

SETTINGS = dict(model="Model3", data="digits", epochs=6, batch_size=50, seed=1)
PLATEAU = {k: v for k, v in RECIPE.items() if k != "StepLR"} | dict(ReduceLROnPlateau=dict(patience=0))

# a server that has imported torch already forks a process in milliseconds, so that a kill falls
# into training and not into importing
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["utils", "model"])


def train(path, dataset, recipe=RECIPE, **changes):
    """A short run with a checkpoint at `path`, gone on from if it is there; returns the model and
    the history. The loop is the benchmarks', which is the notebook's."""
    torch.set_num_threads(1)
    settings = SETTINGS | changes
    torch.manual_seed(settings["seed"])
    model = create_model(settings["model"])
    return model, accuracy.train_model(model, recipe, dataset, dataset, settings, path)


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
    train(path, dataset, recipe)


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
        assert len(states[-1]["history"]["test_acc"]) == 6
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


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_fresh_process_gives_the_same_bits_as_this_one(whole_runs, tmp_path, one_thread):
    dataset, states, _ = whole_runs
    train(tmp_path / "run.pt", dataset)
    assert_same(utils.read_checkpoint(tmp_path / "run.pt"), states[0])
    _, other = train(tmp_path / "other.pt", dataset, seed=2)
    assert other.test_losses != states[0]["history"]["test_losses"]


@pytest.mark.parametrize("epoch, batch", [(1, 0), (1, 1), (3, 2)])
def test_stopped_by_hand_in_the_same_kernel_it_goes_on_bit_for_bit(
    whole_runs, tmp_path, one_thread, monkeypatch, epoch, batch
):
    """Ctrl-C in a batch; the cell is run again with the same model, optimizer and scheduler."""
    dataset, states, _ = whole_runs
    settings, calls, count = SETTINGS | RECIPE, [], utils.GetCorrectPredCount
    model, optimizer, scheduler = make_parts(settings)
    loader, test_loader = (utils.BatchLoader(dataset, 50, "cpu", shuffle=s) for s in (True, False))

    def interrupt(*args):
        calls.append(model.training)
        if sum(calls) == (epoch - 1) * 10 + batch + 1:
            calls.append(True)  # once only
            signal.raise_signal(signal.SIGINT)
        return count(*args)

    def cell(resume):
        run = utils.Run(tmp_path / "run.pt", settings, model, optimizer, scheduler, resume)
        try:
            for number in run.epochs():
                loader.augment = RECIPE["augment"] if number <= 4 else None
                trained = utils.train(model, "cpu", loader, optimizer, F.nll_loss)
                tested = utils.test(model, "cpu", test_loader, F.nll_loss)
                scheduler.step()
                run.record(trained, tested)
        except KeyboardInterrupt:
            pass
        return run.history

    monkeypatch.setattr(utils, "GetCorrectPredCount", interrupt)
    history = cell(resume=False)
    assert {len(values) for values in vars(history).values()} == {epoch - 1}
    utils.plot_history(history, "stopped")  # and every later cell works
    assert ("no whole epoch" in utils.result(history, "stopped")) == (epoch == 1)
    cell(resume=True)
    assert_same(utils.read_checkpoint(tmp_path / "run.pt"), states[0])


@pytest.mark.parametrize("where", ["train", "test"])
def test_a_loss_that_is_not_finite_leaves_the_last_whole_epoch(small, tmp_path, monkeypatch, capsys, where):
    """In the third epoch's first batch, or when it is tested; the lines before it name the epoch."""
    calls, real = [], getattr(utils, where)

    def poisoned(model, *args):
        calls.append(utils.read_checkpoint(tmp_path / "run.pt"))
        if len(calls) == 3:
            next(model.parameters()).data.fill_(float("nan"))
        return real(model, *args)

    monkeypatch.setattr(utils, where, poisoned)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        train(tmp_path / "run.pt", small(200))
    assert "EPOCH: 3" in capsys.readouterr().out.split("EPOCH: 2")[1]
    state = utils.read_checkpoint(tmp_path / "run.pt")
    assert len(state["history"]["test_acc"]) == 2
    assert_same(state, calls[2])
    assert all(value.isfinite().all() for value in state["model"].values())


def test_the_scheduler_is_stepped_and_the_rate_recorded(small, tmp_path):
    _, history = train(tmp_path / "step.pt", small(100))
    assert history.learning_rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])


def test_plateau_is_stepped_with_the_test_loss(small, tmp_path, monkeypatch):
    """Losses 3, 2, 2, 2 with a patience of 1: by PyTorch's rule the rate falls after epoch 4."""
    losses = iter([3.0, 2.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(utils, "test", lambda *_: (next(losses), 50.0))
    recipe = {**PLATEAU, "ReduceLROnPlateau": dict(patience=1, factor=0.1)}
    _, history = train(tmp_path / "run.pt", small(100), recipe, epochs=5)
    assert history.learning_rates == pytest.approx([0.05, 0.05, 0.05, 0.05, 0.005])


def test_the_last_epochs_are_not_augmented(small, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(utils, "random_affine", lambda data, **amounts: calls.append(amounts) or data)
    train(tmp_path / "run.pt", small(100), epochs=5)  # two batches an epoch, the last two plain
    assert calls == [RECIPE["augment"]] * 6


def test_a_second_run_starts_a_clean_record(small, tmp_path):
    first, second = (train(tmp_path / f"{n}.pt", small(100), epochs=2)[1] for n in (1, 2))
    assert first == second and len(second.test_acc) == 2
    assert first.test_acc is not second.test_acc


def test_resuming_a_finished_run_trains_nothing(small, tmp_path, monkeypatch):
    model, history = train(tmp_path / "run.pt", small(200), epochs=2)
    monkeypatch.setattr(utils, "train", lambda *_: pytest.fail("training began"))
    again, same = train(tmp_path / "run.pt", small(200), epochs=2)
    assert history == same and history.seconds == same.seconds
    assert_same(dict(model.state_dict()), dict(again.state_dict()))


def test_without_resume_a_run_starts_afresh_and_the_old_file_is_kept(small, tmp_path):
    train(tmp_path / "run.pt", small(200), epochs=2)
    old = utils.read_checkpoint(tmp_path / "run.pt")
    run = utils.Run(tmp_path / "run.pt", SETTINGS, *make_parts(SETTINGS))
    assert run.history == utils.History() and next(run.epochs()) == 1
    assert_same(utils.read_checkpoint(tmp_path / "run.previous"), old)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(epochs=4), "epochs was 2, is 4"),
        (dict(seed=2), "seed was 1, is 2"),
        (dict(batch_size=100), "batch_size was 50, is 100"),
        (dict(data="MNIST"), "data was digits, is MNIST"),
        (dict(model="Model1"), "model was Model3, is Model1"),
        (dict(recipe=PLATEAU), r"ReduceLROnPlateau was None, is \{.patience.: 0\}; StepLR was .*, is None"),
        (dict(recipe={**RECIPE, "optimizer": dict(lr=0.05)}), r"optimizer was \{'lr': 0.05, .*is \{'lr': 0.05\}"),
        (dict(recipe={**RECIPE, "augment": None}), "augment was {'degrees': 10.*is None"),
        (dict(recipe={**RECIPE, "plain": 1}), "plain was 2, is 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(small, tmp_path, change, message):
    train(tmp_path / "run.pt", small(200), epochs=2)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        train(tmp_path / "run.pt", small(200), **{"epochs": 2, **change})
    assert "\n" not in str(error.value) and (tmp_path / "run.pt").read_bytes() == before


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["empty", "html", "half", "foreign", "list", "code"])
def test_a_damaged_or_foreign_checkpoint_gives_one_line(small, tmp_path, content):
    path = tmp_path / "run.pt"
    train(path, small(200), epochs=2)
    if content in ("foreign", "list", "code"):
        state = {"foreign": {"model": {}}, "list": [1, 2], "code": {"model": Evil(tmp_path / "made")}}
        torch.save(state[content], path)
    else:
        path.write_bytes({"empty": b"", "html": b"<html>", "half": path.read_bytes()[:2000]}[content])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="run.pt is no checkpoint of a run .*delete it") as error:
        train(path, small(200), epochs=2)
    assert "\n" not in str(error.value) and path.read_bytes() == before
    assert not (tmp_path / "made").exists()


def test_a_missing_checkpoint_gives_one_line(tmp_path):
    with pytest.raises(ValueError, match="none.pt is no checkpoint of a run .FileNotFoundError"):
        utils.read_checkpoint(tmp_path / "none.pt")

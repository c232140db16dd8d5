"""Training and testing, against plain loops written with torch alone, and every refused argument."""

import re
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from model import create_model
import utils

STEP = dict(optimizer=dict(lr=0.01, momentum=0.9), scheduler=("StepLR", dict(step_size=2, gamma=0.1)))
CYCLE = dict(
    optimizer=dict(lr=0.05, momentum=0.9, nesterov=True), scheduler=("OneCycleLR", dict(pct_start=0.25))
)


def run(train_set, test_set, recipe=STEP, epochs=3, seed=1, batch_size=50, **options):
    """A short run of Model3's network through `fit`; returns the model and the history."""
    torch.manual_seed(seed)
    model = create_model("Model3")
    loaders = utils.make_loaders(train_set, test_set, recipe, "cpu", batch_size)
    optimizer, scheduler = utils.make_optimizer(model, recipe, epochs, len(loaders[0]))
    options.setdefault("average", recipe.get("average"))
    return model, utils.fit(model, "cpu", *loaders, optimizer, scheduler, epochs, seed, **options)


class Counting:
    """A loader over fixed batches that calls `action(epoch, batch)` before each."""

    batch_size = 50

    def __init__(self, dataset, action):
        self.dataset, self.action, self.epoch = dataset, action, -1  # the check reads once
        self.batches = list(utils.BatchLoader(dataset, 50, "cpu"))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.epoch += 1
        for batch_id, (data, target) in enumerate(self.batches):
            yield self.action(self.epoch, batch_id, data.clone()), target


def fit_counting(dataset, action, epochs=4, **options):
    model = create_model("Model3")
    optimizer, scheduler = utils.make_optimizer(model, STEP, epochs, 4)
    loader = Counting(dataset, action)
    return model, lambda: utils.fit(
        model, "cpu", loader, utils.BatchLoader(dataset, 50, "cpu"), optimizer, scheduler, epochs, **options
    )


def test_fifty_steps_give_the_weights_of_the_usual_loop(small):
    """`DataLoader` with per-image transforms, against the tensor on the device."""
    dataset = small(50 * 128)
    normalise = transforms.Normalize((0.1307,), (0.3081,))
    dataset.transform = transforms.Compose([transforms.ToTensor(), normalise])
    usual, fast = create_model("Model3"), create_model("Model3")
    fast.load_state_dict(usual.state_dict())

    optimizer = torch.optim.SGD(usual.parameters(), lr=0.01, momentum=0.9)
    for data, target in DataLoader(dataset, batch_size=128):
        optimizer.zero_grad()
        F.nll_loss(usual(data), target).backward()
        optimizer.step()

    optimizer = torch.optim.SGD(fast.parameters(), lr=0.01, momentum=0.9)
    utils.train(fast, "cpu", utils.BatchLoader(dataset, 128, "cpu"), optimizer, F.nll_loss)
    for ours, theirs in zip(fast.parameters(), usual.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_train_returns_the_mean_over_samples(small):
    """With a rate of 0 and no dropout, each batch's loss can be had from the model itself."""
    loader = utils.BatchLoader(small(130), 50, "cpu")  # the last batch has 30
    model = create_model("Model3").train()
    losses, right = [], 0
    for data, target in loader:
        output = model(data)
        losses += F.nll_loss(output, target, reduction="none").tolist()
        right += sum(output.argmax(1) == target).item()
    loss, accuracy = utils.train(
        model, "cpu", loader, torch.optim.SGD(model.parameters(), lr=0.0), F.nll_loss
    )
    assert loss == pytest.approx(sum(losses) / 130, rel=1e-5)
    assert accuracy == pytest.approx(100 * right / 130)


def test_test_prints_and_returns_loss_and_accuracy(small, capsys):
    dataset = small(130)
    model = create_model("Model3").eval()
    data = utils.BatchLoader(dataset, 130, "cpu").data
    output = model(data)
    expected = F.nll_loss(output, dataset.targets).item()
    right = sum(output.argmax(1) == dataset.targets).item()
    loss, accuracy = utils.test(model, "cpu", utils.BatchLoader(dataset, 50, "cpu"), F.nll_loss)
    assert loss == pytest.approx(expected, rel=1e-5) and accuracy == 100 * right / 130
    line = f"Test set: Average loss: {loss:.4f}, Accuracy: {right}/130 ({accuracy:.2f}%)\n"
    assert capsys.readouterr().out == line


def test_both_work_with_an_ordinary_loader(small):
    dataset = small(130)
    data = utils.BatchLoader(dataset, 130, "cpu").data
    loader = DataLoader(TensorDataset(data, dataset.targets), batch_size=50)
    model = create_model("Model3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    assert utils.train(model, "cpu", loader, optimizer, F.nll_loss)[0] > 0
    assert 0 <= utils.test(model, "cpu", loader, F.nll_loss)[1] <= 100


def test_progress_text(small, capsys):
    run(small(100), small(100, train=False), epochs=1)
    text = capsys.readouterr().out
    assert text.startswith("EPOCH: 1\n")
    assert re.search(r"Train: Loss=\d\.\d{4} Batch_id=1 Accuracy=\d+\.\d\d: 100%", text)


def test_correct_predictions_are_counted():
    pred = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert utils.GetCorrectPredCount(pred, torch.tensor([1, 0, 0])) == 2


def test_learning_is_possible(small):
    """A network that cannot reach 90 % on drawn digits in three epochs is broken somewhere."""
    _, history = run(small(6000), small(1000, train=False), CYCLE)
    assert history.test_acc[-1] > 90 and history.train_losses[-1] < history.train_losses[0]


def test_steplr_is_stepped_once_an_epoch(small):
    _, history = run(small(100), small(100, train=False), epochs=5)
    assert history.learning_rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])


def test_constant_rate_stays(small):
    _, history = run(small(100), small(100), {**STEP, "scheduler": utils.CONSTANT})
    assert history.learning_rates == [0.01] * 3


def test_plateau_is_stepped_with_the_test_loss(small, monkeypatch):
    """Losses 3, 2, 2, 2 with a patience of 1: by PyTorch's rule the rate falls after epoch 4."""
    losses = iter([3.0, 2.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(utils, "test", lambda *_: (next(losses), 50.0))
    monkeypatch.setattr(utils, "train", lambda *_: (9.0, 50.0))
    recipe = {**STEP, "scheduler": ("ReduceLROnPlateau", dict(patience=1, factor=0.1))}
    _, history = run(small(100), small(100), recipe, epochs=5)
    assert history.learning_rates == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.001])


def test_one_cycle_is_stepped_once_a_batch(small):
    """Up over a quarter of the steps, down to nearly nothing at the last one."""
    recipe = {**CYCLE, "scheduler": ("OneCycleLR", dict(pct_start=0.25, anneal_strategy="linear"))}
    torch.manual_seed(1)
    model = create_model("Model3")
    loader, test_loader = utils.make_loaders(small(200), small(50), recipe, "cpu", 50)
    optimizer, scheduler = utils.make_optimizer(model, recipe, 4, len(loader))
    history = utils.fit(model, "cpu", loader, test_loader, optimizer, scheduler, 4)
    assert history.learning_rates[0] == pytest.approx(0.05 / 25)
    assert max(history.learning_rates) == history.learning_rates[1] == pytest.approx(0.05, rel=0.1)
    assert scheduler.last_epoch == 16 and scheduler.get_last_lr()[0] < 1e-4


def test_the_average_is_what_is_tested_and_kept(small):
    """The average of the weights, followed by hand with the rule m = d·m + (1 - d)·w."""
    recipe = {**STEP, "average": 0.9}
    torch.manual_seed(1)
    model = create_model("Model3")
    loaders = utils.make_loaders(small(200), small(100, train=False), recipe, "cpu", 50)
    optimizer, scheduler = utils.make_optimizer(model, recipe, 2, 4)
    mean = []

    def follow(*_):
        weights = model.convblock1[0].weight.detach().clone()
        mean.append(weights if not mean else 0.9 * mean[-1] + 0.1 * weights)

    optimizer.register_step_post_hook(follow)
    history = utils.fit(model, "cpu", *loaders, optimizer, scheduler, 2, average=0.9)
    torch.testing.assert_close(model.convblock1[0].weight, mean[-1])
    assert utils.test(model, "cpu", loaders[1], F.nll_loss)[1] == history.test_acc[-1]


def test_the_last_epochs_are_not_augmented(small, monkeypatch):
    """A run that is plain throughout is one without augmentation."""
    augmented = {**STEP, "augment": dict(degrees=30, shift=0.2, scale=0.2)}
    bare, plain, warped = (
        run(small(100), small(50), recipe, plain=plain)[0].convblock1[0].weight
        for recipe, plain in ((STEP, 0), (augmented, 3), (augmented, 0))
    )
    assert torch.equal(bare, plain) and not torch.equal(bare, warped)
    calls = []
    monkeypatch.setattr(utils, "random_affine", lambda data, **amounts: calls.append(amounts) or data)
    run(small(100), small(50), augmented, epochs=4, plain=2)
    assert len(calls) == 1 + 2 * 2  # the check before training reads one batch
    assert calls[0] == augmented["augment"]


def test_a_second_run_starts_a_clean_record(small):
    first, second = (run(small(100), small(100), epochs=2)[1] for _ in range(2))
    assert len(first.test_acc) == len(second.test_acc) == 2
    assert first is not second and first.test_acc is not second.test_acc


@pytest.mark.parametrize(
    "recipe", [STEP, {**CYCLE, "average": 0.9, "augment": dict(degrees=9, shift=0.1, scale=0.1)}]
)
def test_the_same_seed_gives_the_same_bits(small, recipe):
    (one, history), (two, again), (_, other) = (
        run(small(200), small(100, train=False), recipe, seed=seed) for seed in (1, 1, 2)
    )
    assert history == again and history != other
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize("epoch, batch", [(1, 0), (3, 2)])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path, epoch, batch, value):
    states = []

    def poison(at, batch_id, data):
        if batch_id == 0:
            states.append([p.detach().clone() for p in model.parameters()])
        return data * float(value) if (at, batch_id) == (epoch, batch) else data

    model, start = fit_counting(small(200), poison, checkpoint=tmp_path / "run.pt")
    with pytest.raises(FloatingPointError, match=f"epoch {epoch}, batch {batch}: the loss is nan"):
        start()
    # states[0] is the check's, states[epoch] the weights with which the bad epoch began
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), states[epoch]))
    assert (tmp_path / "run.pt").exists() == (epoch > 1)


def test_a_test_loss_that_is_not_finite_stops_the_run(small, monkeypatch):
    """The last step of an epoch can break the weights when every train loss was still finite."""
    losses = iter([0.5, float("nan")])
    monkeypatch.setattr(utils, "test", lambda *_: (next(losses), 50.0))
    with pytest.raises(FloatingPointError, match="epoch 2, testing: the loss is nan"):
        run(small(200), small(100))


@pytest.mark.parametrize("epoch, batch", [(1, 1), (3, 2)])
def test_interrupted_by_hand_whole_epochs_are_kept(small, epoch, batch, capsys):
    def stop(at, batch_id, data):
        if (at, batch_id) == (epoch, batch):
            signal.raise_signal(signal.SIGINT)
        return data

    _, start = fit_counting(small(200), stop)
    history = start()
    assert {len(values) for values in vars(history).values()} == {epoch - 1}
    assert f"Interrupted: {epoch - 1} whole epochs" in capsys.readouterr().out
    utils.plot_history(history, "interrupted")
    assert ("no whole epoch" in utils.result_line(history, "run")) == (epoch == 1)


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 9)

    def forward(self, x):
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(epochs=0), "epochs is 0: at least 1"),
        (dict(epochs=-3), "epochs is -3: at least 1"),
        (dict(empty="train"), "the train loader is empty"),
        (dict(empty="test"), "the test loader is empty"),
        (dict(target=10), "targets run from .* to 10: digits are 0 to 9"),
        (dict(target=-1), "targets run from -1 to"),
        (dict(model=Wrong()), r"the model returns \(50, 9\) for 50 images, not \(50, 10\)"),
    ],
)
def test_bad_arguments_are_refused_before_training(small, monkeypatch, change, message):
    monkeypatch.setattr(utils, "train", lambda *_: pytest.fail("training began"))
    train_set, test_set = small(100), small(100)
    if "target" in change:
        train_set.targets[7] = change["target"]
    for name, dataset in (("train", train_set), ("test", test_set)):
        if change.get("empty") == name:
            dataset.data, dataset.targets = dataset.data[:0], dataset.targets[:0]
    model = change.get("model") or create_model("Model3")
    loaders = utils.make_loaders(train_set, test_set, STEP, "cpu", 50)
    epochs = change.get("epochs", 3)
    for recipe in (STEP, CYCLE):
        optimizer, scheduler = utils.make_optimizer(model, recipe, epochs, len(loaders[0]))
        with pytest.raises(ValueError, match=message) as error:
            utils.fit(model, "cpu", *loaders, optimizer, scheduler, epochs)
    assert "\n" not in str(error.value)


def test_an_unknown_scheduler_is_refused():
    recipe = {**STEP, "scheduler": ("StepLRR", {})}
    with pytest.raises(ValueError, match="'StepLRR': choose one of StepLR, ReduceLROnPlateau"):
        utils.make_optimizer(create_model("Model3"), recipe, 3, 2)


@pytest.mark.parametrize(
    "name, text, default, value",
    [
        ("EPOCHS", "3", 15, 3),
        ("MODEL", "Model1", "Model3", "Model1"),
        ("RESUME", "1", False, True),
        ("RESUME", "0", True, False),
        ("SEED", None, 1, 1),
    ],
)
def test_settings_come_from_the_environment(monkeypatch, name, text, default, value):
    if text is not None:
        monkeypatch.setenv(f"S7_{name}", text)
    assert utils.setting(name, default) is value or utils.setting(name, default) == value


@pytest.mark.parametrize(
    "name, text, default, choices, message",
    [
        ("EPOCHS", "many", 15, None, "EPOCHS is 'many': give a whole number"),
        ("EPOCHS", "-1", 15, None, "EPOCHS is '-1': give a whole number"),
        ("RESUME", "yes", False, None, "RESUME is 'yes': choose one of 0, 1"),
        (
            "MODEL",
            "Model0",
            "Model3",
            ["Model1", "Model3"],
            "MODEL is 'Model0': choose one of Model1, Model3",
        ),
    ],
)
def test_a_bad_setting_gives_one_line(monkeypatch, name, text, default, choices, message):
    monkeypatch.setenv(f"S7_{name}", text)
    with pytest.raises(ValueError, match=message) as error:
        utils.setting(name, default, choices)
    assert "\n" not in str(error.value)

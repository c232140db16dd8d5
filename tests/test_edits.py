"""What a student changes in the notebook works, also when the run is resumed, or is named.

The cells are run as a notebook runs them: two short epochs of Model4, the first one augmented. An edit is a
dictionary from a text of the cells to the text in its place; edits are made one after another.
"""

import json
import re
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, assert_identical, interrupt, new_shell
from IPython.core.interactiveshell import InteractiveShell

import runs
import utils

NOTEBOOK = json.loads((ROOT / "S7.ipynb").read_text(encoding="utf-8"))
CELLS = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"]}
BEFORE_TRAINING = ("imports-code", "settings-code", "data-code", "batch-code", "check-code")
CHECKPOINT = "runs/Model4-seed1.pt"

# The texts that are edited
BEFORE = "criterion ="  # a cell before, and this line
LOSS = "F.nll_loss"
MODEL = "model = create_model(MODEL)"
OPTIMIZER = "torch.optim.SGD(model.parameters(), **recipe.sgd)"
SCHEDULER = "recipe.scheduler(optimizer, **recipe.scheduler_args)"
TRAIN_LOADER = """BatchLoader(
    train_set,
    batch_size,
    device,
    shuffle=True,
    augmentation=recipe.augmentation,
)"""
AUGMENTATION = "recipe.augmentation"
OTHER_MODEL = "torch.optim.SGD(create_model(MODEL).parameters())"
OTHER_OPTIMIZER = "torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters()), 1)"
ROTATION = "utils.partial(recipe.augmentation, degrees=20)"
TRAIN_BEFORE = {"run = Run": "train(model, device, train_loader, optimizer, criterion)\nrun = Run"}
STEP_BEFORE = {"run = Run": "scheduler.step()\nrun = Run"}


class Notebook:
    """A new kernel that has run the cells before training, with a few stand-in digits."""

    def __init__(self, edits):
        self.shell = new_shell()
        cells = "\n".join(CELLS[name] for name in BEFORE_TRAINING)
        cells += "\n#----\n" + CELLS["training-code"]
        for old, new in edits.items():
            assert cells.count(old) == 1, old
            cells = cells.replace(old, new)
        before, self.training = cells.split("#----\n")
        self.run(before)

    def __getitem__(self, name):
        return self.shell.user_ns[name]

    def run(self, cell):
        self.shell.run_cell(cell, store_history=True).raise_error()

    def train(self):
        self.run(self.training)


@pytest.fixture(autouse=True)
def settings(small, tmp_path, monkeypatch):
    """Prepare short epochs in an empty folder; undo what a shell and the edits change elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "load_data", lambda: (small(40), small(20, train=False)))
    monkeypatch.setitem(utils.RECIPES, "Model4", replace(utils.RECIPES["Model4"], clean_epochs=1))
    monkeypatch.setenv("S7_EPOCHS", "2")
    monkeypatch.setenv("S7_BATCH_SIZE", "20")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    yield
    InteractiveShell.clear_instance()


def train_one_epoch(edits):
    """Train in a kernel that is stopped in its second epoch."""
    with interrupt("utils.test", call=2), pytest.raises(KeyboardInterrupt):
        Notebook(edits).train()


def resume(edits):
    """Train in a new kernel with RESUME = True; return the notebook."""
    notebook = Notebook(edits)
    notebook.run("RESUME = True")
    notebook.train()
    return notebook


def own(text):
    """Return the edit that defines something in a cell before."""
    return {BEFORE: f"{text}\n{BEFORE}"}


OWN_LOSS = own("""
WEIGHT = 1
def loss(output, target):
    return WEIGHT * nn.functional.nll_loss(output, target)
""") | {LOSS: "loss"}
OWN_NETWORK = own("""
class Own(nn.Linear):
    def forward(self, x):
        return F.log_softmax(super().forward(x.flatten(1)), dim=1)
""") | {MODEL: "model = Own(784, 10)"}
LOGITS = {MODEL: "model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))"}
SMOOTH_LOSS = {LOSS: "nn.CrossEntropyLoss(label_smoothing=0.1)"}
OWN_TRAIN = own("""
def train(model, device, train_loader, optimizer, criterion):
    assert model.training
    for data, target in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(data), target)
        loss.backward()
        optimizer.step()
    return loss.item(), 50
""")
RANDOM_SPLIT = own(
    "part, _ = torch.utils.data.random_split(train_set, [20, 20], torch.Generator().manual_seed(0))"
) | {TRAIN_LOADER: "torch.utils.data.DataLoader(part, 10, shuffle=True, generator=torch.Generator())"}
TRANSFORM = own("""
from torchvision import datasets, transforms
transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.1, 0.3)])
fake = datasets.FakeData(40, (1, 28, 28), transform=transform)
""") | {TRAIN_LOADER: "torch.utils.data.DataLoader(fake, batch_size, shuffle=True)"}
NESTED = own("""
import numpy as np
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR
decay = lambda epoch: np.exp(-epoch)
""") | {
    SCHEDULER: "SequentialLR(optimizer, [LinearLR(optimizer), LambdaLR(optimizer, decay)], milestones=[1])"
}
MILESTONE = {SCHEDULER: "torch.optim.lr_scheduler.MultiStepLR(optimizer, [5])"}
SAMPLER = own("""
sampler = torch.utils.data.RandomSampler(train_set, generator=torch.Generator())
""") | {TRAIN_LOADER: "torch.utils.data.DataLoader(train_set, batch_size, sampler=sampler)"}
ADAGRAD = "torch.optim.Adagrad(model.parameters())"
GROUPS = "[{'params': model.block1.parameters()}, {'params': model.block2.parameters()}]"
TWO_GROUPS = {OPTIMIZER: f"torch.optim.SGD({GROUPS}, **recipe.sgd)"}


@pytest.mark.parametrize(
    "edits",
    [
        pytest.param(OWN_LOSS, id="own loss"),
        pytest.param(LOGITS | SMOOTH_LOSS, id="logits with cross entropy"),
        pytest.param({SCHEDULER: "None"}, id="no scheduler"),
        pytest.param({SCHEDULER: "ReduceLROnPlateau(optimizer, patience=0, threshold=9)"}, id="plateau"),
        pytest.param(NESTED, id="nested scheduler with NumPy rates"),
        pytest.param({OPTIMIZER: ADAGRAD}, id="state from the start"),
        pytest.param(RANDOM_SPLIT, id="random_split"),
        pytest.param(TRANSFORM, id="torchvision data set"),
        pytest.param(SAMPLER, id="sampler with a generator"),
    ],
)
def test_edit_works_and_resumes_bit_identically(edits, capsys):
    Notebook(edits).train()
    whole = runs.load_checkpoint(CHECKPOINT)
    Path(CHECKPOINT).unlink()
    train_one_epoch(edits)
    notebook = resume(edits)
    text = capsys.readouterr().out
    assert "Epoch 1 was repeated: identical" in text
    assert "has changed" not in text
    assert notebook["run"].history.completed == 2
    assert_identical(runs.load_checkpoint(CHECKPOINT), whole)


def test_own_train_is_used_and_shown(capsys):
    notebook = Notebook(OWN_TRAIN)
    notebook.run(CELLS["functions-code"])
    assert "return loss.item(), 50\n" in capsys.readouterr().out
    notebook.train()
    assert notebook["run"].history.train_acc == [50, 50]


def test_exercise_with_an_average_of_the_weights_tests_the_average():
    text = CELLS["exercises"].split("An average of the weights")[1]
    lines = textwrap.dedent(re.search(r" +```python\n(.*?)\n +```", text, re.DOTALL)[1])
    notebook = Notebook({"\nrun = Run": f"\n{lines}\nrun = Run", "test(model,": "test(average,"})
    notebook.train()
    average = notebook["average"]
    assert average.n_averaged == 4
    expected, _ = utils.test(average, "cpu", notebook["test_loader"], notebook["criterion"])
    assert notebook["run"].history.test_losses[-1] == expected
    assert expected != utils.test(notebook["model"], "cpu", notebook["test_loader"], notebook["criterion"])[0]


def test_class_of_a_cell_is_shown(capsys):
    Notebook(OWN_NETWORK).run("show_source(Own)")
    assert "class Own(nn.Linear):\n    def forward(self, x):\n" in capsys.readouterr().out


@pytest.mark.parametrize("wrapper", ["torch.compile(model, backend='eager')", "nn.DataParallel(model)"])
def test_wrapped_network_is_the_one_inside(wrapper):
    Notebook({}).train()
    plain = runs.load_checkpoint(CHECKPOINT)
    notebook = Notebook({"optimizer = ": f"model = {wrapper}\noptimizer = "})
    notebook.train()
    wrapped = runs.load_checkpoint(notebook["run"].path)
    assert notebook["run"].title == "Model4 on stand-in digits (not MNIST)"
    for part in ("summary", "model", "optimizer", "history"):
        assert_identical(wrapped[part], plain[part])


# ---- a run is what is really trained ----


def test_what_is_trained_is_printed_before_the_first_epoch(capsys):
    Notebook({}).train()
    before, *_ = capsys.readouterr().out.partition("EPOCH: 1\n")
    assert before.endswith(
        "Model4 with 7,652 parameters on stand-in digits (not MNIST), 2 batches, random_affine(degrees=10,"
        " scale=0.06, shift=0.06) until epoch 1\nSGD(lr=0.1, momentum=0.9, weight_decay=0.0005,"
        " nesterov=True), StepLR(step_size=1, gamma=0.75), nll_loss, seed 1, until epoch 2\n"
    )


def test_augmentation_that_is_never_used_is_not_named(capsys):
    """In a run of fewer epochs than the last ones, which have the original images."""
    Notebook({"EPOCHS - recipe.clean_epochs": "-3"}).train()
    assert "2 batches\nSGD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("saved", "change", "named"),
    [
        pytest.param(SMOOTH_LOSS, {"smoothing=0.1": "smoothing=0.2"}, "loss: .*0.1.*, now .*0.2", id="loss"),
        pytest.param({}, {AUGMENTATION: ROTATION}, "augmentation: .*=10, .*now .*=20, ", id="augmentation"),
        pytest.param({}, {"EPOCHS - recipe.clean_epochs": "2"}, "augmented epochs: 1, now 2", id="its end"),
        pytest.param({}, {MODEL: "model = create_model('Model1')"}, "network: Model4.*Model1", id="network"),
        pytest.param({}, {"BATCH_SIZE or": "10 or"}, "data: .* 2 batches, now .* 4 batches", id="batch size"),
        pytest.param({}, {"**recipe.sgd": "lr=0.05"}, "optimizer: .*lr=0.1,.* now .*lr=0.05", id="rate"),
        pytest.param({}, TWO_GROUPS, "optimizer group 1 params", id="groups of the optimizer"),
        pytest.param(MILESTONE, {"[5]": "[6]"}, "scheduler milestones", id="a later milestone"),
    ],
)
def test_other_run_is_refused_by_name(saved, change, named):
    train_one_epoch(saved)
    with pytest.raises(ValueError, match=f"different run .*{named}.*RESUME"):
        resume(saved | change)


@pytest.mark.parametrize(
    ("saved", "change", "named"),
    [
        pytest.param(OWN_LOSS, {"WEIGHT = 1": "WEIGHT = 2"}, "train loss", id="global of a loss"),
        pytest.param({}, own("test_set.images[0] += 1"), "test loss", id="test set"),
    ],
)
def test_repeated_epoch_shows_another_run(saved, change, named):
    train_one_epoch(saved)
    with pytest.raises(ValueError, match=f"^epoch 1 gave {named} .*RESUME = False$"):
        resume(saved | change)


# ---- errors ----


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        pytest.param(LOGITS, "negative.*log_softmax.*cross_entropy", id="logits with nll_loss"),
        pytest.param({OPTIMIZER: OTHER_MODEL}, "optimizer has no parameters of the model", id="optimizer"),
        pytest.param({SCHEDULER: OTHER_OPTIMIZER}, "belongs to another optimizer", id="scheduler"),
        pytest.param(TRAIN_BEFORE, "has been trained", id="used SGD"),
        pytest.param(TRAIN_BEFORE | {OPTIMIZER: ADAGRAD}, "has been trained", id="used Adagrad"),
        pytest.param(STEP_BEFORE, "has been trained", id="used scheduler"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PyTorch expects a step of the optimizer before the scheduler's
def test_edit_that_cannot_work_is_an_error_that_names_it(edits, message):
    with pytest.raises(ValueError, match=message):
        Notebook(edits).train()


def test_trained_network_is_refused_whatever_the_optimizer():
    """Plain SGD without a scheduler shows no trace of its steps."""
    notebook = Notebook({OPTIMIZER: "torch.optim.SGD(model.parameters(), lr=0.1)", SCHEDULER: "None"})
    create, loop = notebook.training.split("run = Run(")
    notebook.run(create)
    notebook.run(f"run = Run({loop}")
    with pytest.raises(ValueError, match="has been trained: create model"):
        notebook.run(f"run = Run({loop}")

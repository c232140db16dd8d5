"""What a student changes in the notebook works, also when the run is resumed, or is named.

The cells are run as a notebook runs them: two short epochs of Model4, the first one augmented. An edit is a
dictionary from a text of the cells to the text in its place; edits are made one after another.
"""

import atexit
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from helpers import assert_identical, interrupt
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import utils

NOTEBOOK = json.loads((ROOT / "S7.ipynb").read_text(encoding="utf-8"))
CELLS = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"]}
BEFORE_TRAINING = ("imports-code", "settings-code", "data-code", "batch-code", "check-code")
WITHOUT_HISTORY_FILE = Config({"HistoryManager": {"enabled": False}})
CHECKPOINT = "checkpoints/Model4-seed1.pt"

# The texts that are edited
BEFORE = "criterion ="  # a cell before, and this line
LOSS = "F.nll_loss"
MODEL = "model = create_model(MODEL)"
OPTIMIZER = "torch.optim.SGD(model.parameters(), **recipe.sgd)"
SCHEDULER = "recipe.scheduler(optimizer, **recipe.scheduler_args)"
TRAIN_LOADER = "BatchLoader(train_set, batch_size, device, shuffle=True, augmentation=recipe.augmentation)"
AUGMENTATION = "recipe.augmentation"
OTHER_MODEL = "torch.optim.SGD(create_model(MODEL).parameters())"
OTHER_OPTIMIZER = "torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters()), 1)"
ROTATION = "utils.partial(recipe.augmentation, degrees=20)"
TRAIN_BEFORE = {"run = Run": "train(model, device, train_loader, optimizer, criterion)\nrun = Run"}
STEP_BEFORE = {"run = Run": "scheduler.step()\nrun = Run"}
FREEZE = {"optimizer = ": "model.block1.requires_grad_(False)\noptimizer = "}
WITHOUT_STEP = {"    elif scheduler is not None:\n        scheduler.step()\n": ""}


class Notebook:
    """A new kernel that has run the cells before training, with a few stand-in digits."""

    def __init__(self, edits):
        InteractiveShell.clear_instance()
        self.shell = InteractiveShell.instance(config=WITHOUT_HISTORY_FILE)
        self.shell.showtraceback = lambda *args, **options: None  # the error is raised instead
        atexit.unregister(self.shell.atexit_operations)  # collects garbage, once per shell
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
ADAGRAD = "torch.optim.Adagrad(model.parameters())"


@pytest.mark.parametrize(
    "edits",
    [
        pytest.param(OWN_LOSS, id="own loss"),
        pytest.param(LOGITS | SMOOTH_LOSS, id="logits with cross entropy"),
        pytest.param({SCHEDULER: "None"}, id="no scheduler"),
        pytest.param({SCHEDULER: "ReduceLROnPlateau(optimizer, patience=0, threshold=9)"}, id="plateau"),
        pytest.param(NESTED, id="nested scheduler with NumPy rates"),
        pytest.param({OPTIMIZER: ADAGRAD}, id="state from the start"),
        pytest.param(FREEZE, id="frozen layers"),
        pytest.param(RANDOM_SPLIT, id="random_split"),
        pytest.param(TRANSFORM, id="torchvision data set"),
        pytest.param(OWN_NETWORK, id="own network"),
    ],
)
def test_edit_works_and_resumes_bit_identically(edits, capsys):
    Notebook(edits).train()
    whole = utils.load_checkpoint(CHECKPOINT)
    train_one_epoch(edits)
    notebook = resume(edits)
    text = capsys.readouterr().out
    assert "Resuming after epoch 1 of 2" in text
    assert "Warning" not in text
    assert notebook["run"].history.completed == 2
    assert_identical(utils.load_checkpoint(CHECKPOINT), whole)


def test_own_train_is_used_and_shown(capsys):
    notebook = Notebook(OWN_TRAIN)
    notebook.run(CELLS["functions-code"])
    assert "return loss.item(), 50\n" in capsys.readouterr().out
    notebook.train()
    assert notebook["run"].history.train_acc == [50, 50]


def test_class_of_a_cell_is_shown(capsys):
    Notebook(OWN_NETWORK).run("show_source(Own)")
    assert "class Own(nn.Linear):\n    def forward(self, x):\n" in capsys.readouterr().out


@pytest.mark.parametrize("wrapper", ["torch.compile(model, backend='eager')", "nn.DataParallel(model)"])
def test_wrapped_network_is_the_one_inside(wrapper):
    Notebook({}).train()
    plain = utils.load_checkpoint(CHECKPOINT)
    notebook = Notebook({"optimizer = ": f"model = {wrapper}\noptimizer = "})
    notebook.train()
    wrapped = utils.load_checkpoint(CHECKPOINT)
    assert notebook["run"].title == "Model4 on stand-in digits (not MNIST)"
    assert utils.list_differences(wrapped["description"], plain["description"]) == ""
    for part in ("model", "optimizer", "history"):
        assert_identical(wrapped[part], plain[part])


# ---- a run is what is really trained ----


def test_what_is_trained_is_printed_before_the_first_epoch(capsys):
    Notebook({}).train()
    before, *_ = capsys.readouterr().out.partition("EPOCH: 1\n")
    assert before.endswith(
        "Model4 with 7,824 parameters on stand-in digits (not MNIST), 2 batches, random_affine(degrees=10,"
        " shift=0.06, scale=0.06) until epoch 1\nSGD(lr=0.1, momentum=0.9, weight_decay=0.0005,"
        " nesterov=True), StepLR(step_size=1, gamma=0.75), nll_loss, seed 1, until epoch 2\n"
    )


@pytest.mark.parametrize(
    ("saved", "change", "named"),
    [
        pytest.param(OWN_LOSS, {"WEIGHT * ": "WEIGHT + "}, "criterion: .* [*] .* [+] ", id="body of a loss"),
        pytest.param(OWN_LOSS, {"WEIGHT = 1": "WEIGHT = 2"}, "WEIGHT: checkpoint 1, current 2", id="global"),
        pytest.param(SMOOTH_LOSS, {"smoothing=0.1": "smoothing=0.2"}, "smoothing: .*0.1,.*0.2", id="option"),
        pytest.param({}, {AUGMENTATION: ROTATION}, "augmentation.*degrees: .* 10,.* 20", id="augmentation"),
        pytest.param({}, {"EPOCHS - recipe.clean_epochs": "2"}, "augmented_epochs: .* 1,.* 2", id="its end"),
        pytest.param(OWN_NETWORK, {"(x.flatten": "(-x.flatten"}, r"network.forward: .*\(-x", id="forward"),
        pytest.param({}, {MODEL: "model = create_model('Model1')"}, "work: .*Model4,.*Model1", id="network"),
        pytest.param({}, FREEZE, "requires_grad=True,.*requires_grad=False", id="frozen layers"),
        pytest.param({}, own("test_set.images[0] += 1"), "test_loader.dataset.images: ", id="test set"),
        pytest.param({}, {"BATCH_SIZE or": "10 or"}, "batch_size: .* 20,.* 10", id="batch size"),
        pytest.param(TRANSFORM, {"(0.1,": "(0.2,"}, "transform.* 0.1,.* 0.2", id="transform"),
        pytest.param({}, {"**recipe.sgd": "lr=0.05"}, "group 1 lr: .* 0.1,.* 0.05", id="learning rate"),
        pytest.param({}, {OPTIMIZER: ADAGRAD}, "optimizer: .*SGD,.*Adagrad", id="optimizer"),
        pytest.param(NESTED, {"(-epoch)": "(-2)"}, r"scheduler.*\(-epoch.*\(-2", id="scheduler"),
    ],
)
def test_other_run_is_refused_by_name(saved, change, named):
    train_one_epoch(saved)
    with pytest.raises(ValueError, match=f"different run .*{named}.*RESUME"):
        resume(saved | change)


@pytest.mark.parametrize(
    ("saved", "change", "warning"),
    [
        pytest.param({}, WITHOUT_STEP, "the training cell .*:\n-.*None:\n-        scheduler.step", id="cell"),
        pytest.param(
            OWN_TRAIN, {"loss.backward": "(3 * loss).backward"}, "train .*:\n-.*\n[+].*3 ", id="train"
        ),
        pytest.param(OWN_TRAIN, {"def train(": "def other("}, "train .*:\n-def train", id="no own train"),
    ],
)
def test_edit_of_the_loop_is_shown_and_the_run_continues(saved, change, warning, capsys):
    train_one_epoch(saved)
    notebook = resume(saved | change)
    assert re.search(f"Warning: {warning}", capsys.readouterr().out)
    assert notebook["run"].history.completed == 2


def test_edit_of_a_file_is_shown_and_the_run_continues(capsys):
    train_one_epoch({})
    state = utils.load_checkpoint(CHECKPOINT)
    for name in ("model.py", "utils.py"):
        state["sources"][name] += "# a line\n" * 12
    torch.save(state, CHECKPOINT)
    notebook = resume({})
    text = capsys.readouterr().out
    for name in ("model.py", "utils.py"):
        warning = f"Warning: {name} has changed since the checkpoint (- before, + now):\n"
        assert warning + "-# a line\n" * 10 + "and 2 more lines\n" in text
    assert notebook["run"].history.completed == 2


# ---- errors ----


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        pytest.param(LOGITS, "negative.*log_softmax.*cross_entropy", id="logits with nll_loss"),
        pytest.param({OPTIMIZER: OTHER_MODEL}, "optimizer has parameters .* not the model's", id="optimizer"),
        pytest.param({SCHEDULER: OTHER_OPTIMIZER}, "belongs to another optimizer", id="scheduler"),
        pytest.param(TRAIN_BEFORE, "has been used", id="used SGD"),
        pytest.param(TRAIN_BEFORE | {OPTIMIZER: ADAGRAD}, "has been used", id="used Adagrad"),
        pytest.param(STEP_BEFORE, "has been used", id="used scheduler"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PyTorch expects a step of the optimizer before the scheduler's
def test_edit_that_cannot_work_is_an_error_that_names_it(edits, message):
    with pytest.raises(ValueError, match=message):
        Notebook(edits).train()

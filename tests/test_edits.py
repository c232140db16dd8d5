"""What a student changes in the notebook works bit for bit, also when it is resumed, or is named.

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
from helpers import assert_identical
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import utils

NOTEBOOK = json.loads((ROOT / "S7.ipynb").read_text(encoding="utf-8"))
CELLS = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"]}
BEFORE_TRAINING = ("imports-code", "settings-code", "data-code", "batch-code")
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
FREEZE = {"optimizer = ": "model.block1.requires_grad_(False)\noptimizer = "}
WITHOUT_STEP = {"    elif scheduler is not None:\n        scheduler.step()\n": ""}


class Notebook:
    """A new kernel that has run the cells before training, with a few stand-in digits."""

    def __init__(self, edits):
        InteractiveShell.clear_instance()
        self.shell = InteractiveShell.instance(config=WITHOUT_HISTORY_FILE)
        self.shell.showtraceback = lambda *args, **options: None  # the error is raised instead
        atexit.unregister(self.shell.atexit_operations)  # collects garbage, once per shell
        cells = CELLS["check-code"] + "#----\n" + CELLS["training-code"]
        for old, new in edits.items():
            assert cells.count(old) == 1, old
            cells = cells.replace(old, new)
        check, self.training = cells.split("#----\n")
        for name in BEFORE_TRAINING:
            self.run(CELLS[name])
        self.run(check)

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
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        yield
    InteractiveShell.clear_instance()


def train_one_epoch(edits, monkeypatch):
    """Train in a kernel that is stopped when the checkpoint of the first epoch is complete."""
    record = utils.Run.record

    def record_and_stop(*results):
        record(*results)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils.Run, "record", record_and_stop)
        Notebook(edits).train()


def resume(edits, monkeypatch):
    """Train in a new kernel with RESUME = True; return the notebook."""
    monkeypatch.setenv("S7_RESUME", "True")
    notebook = Notebook(edits)
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
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 1
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    def forward(self, x):
        return F.log_softmax(self.scale * self.layers(x), dim=1)
""") | {MODEL: "model = Own()"}
LOGITS = {MODEL: "model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))"}
SMOOTH_LOSS = {LOSS: "nn.CrossEntropyLoss(label_smoothing=0.1)"}
OWN_TRAIN = own("""
def train(model, device, train_loader, optimizer, criterion):
    model.train()
    for data, target in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(data), target)
        loss.backward()
        optimizer.step()
    return loss.item(), 50
""")
OWN_AUGMENTATION = own("def shift(data):\n    return data.roll(1, 3)") | {AUGMENTATION: "shift"}
RANDOM_SPLIT = own(
    "part, _ = torch.utils.data.random_split(train_set, [20, 20], torch.Generator().manual_seed(0))"
) | {TRAIN_LOADER: "torch.utils.data.DataLoader(part, 10, shuffle=True, generator=torch.Generator())"}
TRANSFORM = own("""
from torchvision import datasets, transforms
transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.1, 0.3)])
fake = datasets.FakeData(40, (1, 28, 28), transform=transform)
""") | {TRAIN_LOADER: "torch.utils.data.DataLoader(fake, batch_size, shuffle=True)"}
WARM_UP = (
    "torch.optim.lr_scheduler.SequentialLR(optimizer, [torch.optim.lr_scheduler.LinearLR(optimizer),"
    " torch.optim.lr_scheduler.StepLR(optimizer, 1)], milestones=[1])"
)
COSINE = "torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)"
NUMPY_RATES = own("import numpy as np") | {
    SCHEDULER: "torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.exp(-epoch))"
}
TWO_GROUPS = (
    "torch.optim.AdamW([{'params': model.block1.parameters()},"
    " {'params': model.logits.parameters(), 'lr': 0.01}], amsgrad=True)"
)
ADAGRAD = "torch.optim.Adagrad(model.parameters())"


@pytest.mark.parametrize(
    "edits",
    [
        pytest.param({}, id="unchanged"),
        pytest.param(OWN_LOSS, id="own loss"),
        pytest.param(LOGITS | SMOOTH_LOSS, id="logits with cross entropy"),
        pytest.param({SCHEDULER: "None"}, id="no scheduler"),
        pytest.param({SCHEDULER: "ReduceLROnPlateau(optimizer, patience=0, threshold=9)"}, id="plateau"),
        pytest.param({SCHEDULER: WARM_UP}, id="SequentialLR"),
        pytest.param(NUMPY_RATES, id="NumPy rates"),
        pytest.param({OPTIMIZER: TWO_GROUPS}, id="two parameter groups"),
        pytest.param({OPTIMIZER: ADAGRAD}, id="state from the start"),
        pytest.param(FREEZE, id="frozen layers"),
        pytest.param(RANDOM_SPLIT, id="random_split"),
        pytest.param(TRANSFORM, id="torchvision data set"),
        pytest.param(OWN_AUGMENTATION, id="own augmentation"),
        pytest.param(OWN_NETWORK, id="own network"),
    ],
)
def test_edit_works_and_resumes_bit_identically(edits, monkeypatch, capsys):
    Notebook(edits).train()
    whole = utils.load_checkpoint(CHECKPOINT)
    train_one_epoch(edits, monkeypatch)
    notebook = resume(edits, monkeypatch)
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
    mine = "class Mine(nn.Linear):\n    def forward(self, x):\n        return x"
    Notebook({}).run(f"{mine}\n\n\nshow_source(Mine)")
    assert capsys.readouterr().out.endswith(f"\n{mine}\n")


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


@pytest.mark.parametrize(
    ("saved", "change", "named"),
    [
        pytest.param(OWN_LOSS, {"WEIGHT * ": "WEIGHT + "}, "criterion: .* [*] .* [+] ", id="body of a loss"),
        pytest.param(OWN_LOSS, {"WEIGHT = 1": "WEIGHT = 2"}, "WEIGHT: checkpoint 1, current 2", id="global"),
        pytest.param(SMOOTH_LOSS, {"smoothing=0.1": "smoothing=0.2"}, "smoothing: .*0.1,.*0.2", id="option"),
        pytest.param({}, {AUGMENTATION: ROTATION}, "augmentation.*degrees: .* 10,.* 20", id="augmentation"),
        pytest.param({}, {"EPOCHS - recipe.clean_epochs": "2"}, "augmented_epochs: .* 1,.* 2", id="its end"),
        pytest.param(OWN_NETWORK, {"scale = 1": "scale = 2"}, "network.scale: .* 1,.* 2", id="attribute"),
        pytest.param(OWN_NETWORK, {"layers(x)": "layers(-x)"}, r"network.forward: .*\(-x\)", id="forward"),
        pytest.param({}, {MODEL: "model = create_model('Model1')"}, "work: .*Model4,.*Model1", id="network"),
        pytest.param({}, FREEZE, "requires_grad=True,.*requires_grad=False", id="frozen layers"),
        pytest.param({}, own("train_set.images[0] += 1"), "train_loader.dataset.images: ", id="images"),
        pytest.param({}, own("test_set.images[0] += 1"), "test_loader.dataset.images: ", id="test set"),
        pytest.param({}, {"BATCH_SIZE or": "10 or"}, "batch_size: .* 20,.* 10", id="batch size"),
        pytest.param(TRANSFORM, {"(0.1,": "(0.2,"}, "transform.* 0.1,.* 0.2", id="transform"),
        pytest.param({}, {"**recipe.sgd": "lr=0.05"}, "group 1 lr: .* 0.1,.* 0.05", id="learning rate"),
        pytest.param({}, {OPTIMIZER: ADAGRAD}, "optimizer: .*SGD,.*Adagrad", id="optimizer"),
        pytest.param({SCHEDULER: COSINE}, {"T_max=2": "T_max=4"}, "T_max: .* 2,.* 4", id="scheduler"),
        pytest.param(NUMPY_RATES, {"(-epoch)": "(-2)"}, r"lr_lambdas.*\(-epoch.*\(-2", id="lambda"),
        pytest.param({}, {"    SEED,\n": "    2,\n"}, "seed: checkpoint 1, current 2", id="seed"),
    ],
)
def test_other_run_is_refused_by_name(saved, change, named, monkeypatch):
    train_one_epoch(saved, monkeypatch)
    with pytest.raises(ValueError, match=f"different run .*{named}.*RESUME"):
        resume(saved | change, monkeypatch)


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
def test_edit_of_the_loop_is_shown_and_the_run_continues(saved, change, warning, monkeypatch, capsys):
    train_one_epoch(saved, monkeypatch)
    notebook = resume(saved | change, monkeypatch)
    assert re.search(f"Warning: {warning}", capsys.readouterr().out)
    assert notebook["run"].history.completed == 2


@pytest.mark.parametrize("name", ["model.py", "utils.py"])
def test_edit_of_a_file_is_shown_and_the_run_continues(name, monkeypatch, capsys):
    train_one_epoch({}, monkeypatch)
    state = utils.load_checkpoint(CHECKPOINT)
    state["sources"][name] += "# a line\n"
    torch.save(state, CHECKPOINT)
    notebook = resume({}, monkeypatch)
    assert f"Warning: {name} has changed since the checkpoint (- before, + now):\n-# a line\n" in (
        capsys.readouterr().out
    )
    assert notebook["run"].history.completed == 2


# ---- errors ----


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        pytest.param(LOGITS, "negative.*log_softmax.*cross_entropy", id="logits with nll_loss"),
        pytest.param({OPTIMIZER: OTHER_MODEL}, "optimizer has parameters .* not the model's", id="optimizer"),
        pytest.param({SCHEDULER: OTHER_OPTIMIZER}, "belongs to another optimizer", id="scheduler"),
    ],
)
def test_edit_that_cannot_work_is_an_error_that_names_it(edits, message):
    with pytest.raises(ValueError, match=message):
        Notebook(edits).train()

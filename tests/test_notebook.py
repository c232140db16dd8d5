"""The notebook: its cells in any order, the setup cell, executed, and as committed.

`test_edits.py` has what a student changes in the cells.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import nbclient
import nbformat
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, new_shell
from IPython.core.interactiveshell import InteractiveShell

import runs
import utils
from model import create_model

NOTEBOOK = nbformat.read(ROOT / "S7.ipynb", as_version=4)
MARKDOWN = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
CELLS = {cell.id: cell for cell in NOTEBOOK.cells if cell.cell_type == "code"}
NAMES = list(CELLS)
TRAINING = NAMES.index("training-code")
BEFORE_TRAINING = NAMES[1:TRAINING]
AFTER_TRAINING = NAMES[TRAINING + 1 :]


# ---- cells in any order ----


class Kernel(dict):
    """The names of a notebook's kernel, in which cells, given by id, are run."""

    def run(self, *cells):
        for cell in cells:
            exec(CELLS[cell].source, self)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty folder, in which the test works."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def kernel(small, folder, monkeypatch):
    """Return a kernel that has run all cells before training, with 200 stand-in digits.

    Seven epochs of Model4 are one with augmentation and six without.
    """
    shutil.copytree(ROOT / "images", folder / "images")
    monkeypatch.setattr(utils, "load_data", lambda: (small(200), small(100, train=False)))
    monkeypatch.setenv("S7_EPOCHS", "7")
    monkeypatch.setenv("S7_BATCH_SIZE", "80")
    monkeypatch.setenv("S7_SEED", "2")
    kernel = Kernel()
    kernel.run(*BEFORE_TRAINING)
    return kernel


def test_training_cell_trains_as_a_plain_loop_of_pytorch(kernel, small):
    kernel.run("training-code")
    train_set = small(200)
    images = utils.normalize(train_set.images)
    torch.manual_seed(2)
    model = create_model("Model4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for epoch in range(1, 8):
        torch.manual_seed(2000 + epoch)
        optimizer.param_groups[0]["lr"] = 0.1 * 0.75 ** (epoch - 1)
        for index in torch.randperm(200).split(80):
            data = images[index]
            if epoch == 1:
                data = utils.random_affine(data, degrees=10, shift=0.06, scale=0.06)
            optimizer.zero_grad()
            F.nll_loss(model(data), train_set.labels[index]).backward()
            optimizer.step()
    test_set = small(100, train=False)
    with torch.no_grad():
        loss = F.nll_loss(model.eval()(utils.normalize(test_set.images)), test_set.labels)

    state = runs.load_checkpoint("runs/Model4-seed2.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(state["model"][name], value), name
    assert len(state["history"]["test_acc"]) == 7
    assert state["history"]["test_losses"][-1] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_scheduler_follows_the_loss_or_the_accuracy(kernel, monkeypatch, mode):
    """The loss falls and the accuracy rises: with the other one of the two, the rate would drop."""
    results = iter([(0.5, 50.0), (0.4, 60.0)])
    kernel["test"] = lambda *args: next(results)
    kernel["MODEL"] = "Model3"
    kernel["EPOCHS"] = 2
    monkeypatch.setitem(utils.RECIPES["Model3"].scheduler_args, "mode", mode)
    monkeypatch.setitem(utils.RECIPES["Model3"].scheduler_args, "patience", 0)
    kernel.run("training-code")
    assert kernel["optimizer"].param_groups[0]["lr"] == 0.01


def test_later_cells_report_the_run_that_they_show(kernel, figures, monkeypatch, capsys):
    kernel.run("training-code", "errors-code")
    confusion = kernel["confusion"]
    monkeypatch.setenv("S7_MODEL", "Model5")
    kernel.run(*BEFORE_TRAINING)
    figures.clear()
    capsys.readouterr()
    kernel.run(*AFTER_TRAINING)
    assert torch.equal(kernel["confusion"], confusion)
    reported = "\n".join([capsys.readouterr().out, *[shown.alt for shown in figures]])
    assert reported.count("Model4 on stand-in digits") >= 6
    assert "Model5" not in reported
    kernel.run("training-code")
    capsys.readouterr()
    kernel.run("confusion-code")  # the confusion is still that of Model4
    assert "Model4" in figures[-1].alt
    assert capsys.readouterr().out.startswith("Model4 ")


def test_cells_below_work_after_a_training_that_was_interrupted_in_its_first_epoch(kernel, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "sum_exactly", lambda losses: signal.raise_signal(signal.SIGINT))
        kernel.run("training-code")
    kernel.run(*AFTER_TRAINING)


def test_invalid_setting_is_rejected_whether_it_is_set_or_injected_by_papermill(kernel, monkeypatch):
    monkeypatch.setenv("S7_EPOCHS", "three")
    with pytest.raises(ValueError, match="^EPOCHS is 'three'"):
        kernel.run("settings-code")
    assert CELLS["settings-code"].metadata.tags == ["parameters"]  # papermill's cell follows
    kernel["EPOCHS"] = 0
    with pytest.raises(ValueError, match="^EPOCHS is 0"):
        kernel.run("training-code")


# ---- the setup cell ----


def set_up(url=""):
    """Run the setup cell in the working folder; return the folder to which it changes."""
    os.environ["GIT_TERMINAL_PROMPT"] = ""
    cell = CELLS["setup-code"].source.replace('REPO_URL = ""', f"REPO_URL = {url!r}")
    main = sys.modules["__main__"]  # a shell replaces it
    with mock.patch.object(sys, "path", [*sys.path]):
        result = new_shell().run_cell(cell)
        assert not result.success or sys.path[0] == str(Path.cwd())
    InteractiveShell.clear_instance()
    sys.modules["__main__"] = main
    result.raise_error()
    return Path.cwd()


@pytest.fixture
def program(folder, monkeypatch):
    """Return the path of a `git` that prints its arguments and whether it may prompt, and does nothing."""
    path = folder / "git"
    path.write_text('#!/bin/sh\necho "$@, prompt $GIT_TERMINAL_PROMPT"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return path


@pytest.mark.parametrize(("start", "repository"), [(".", "."), (".", "S7-main"), ("work", "S7")])
def test_setup_finds_the_repository_here_below_or_beside(folder, monkeypatch, start, repository):
    for name in ("work", "S7-old", repository):
        (folder / name).mkdir(exist_ok=True)
    for number, name in enumerate(("S7-old", repository)):
        (folder / name / "draw.html").touch()
        os.utime(folder / name, (number, number))
    monkeypatch.chdir(folder / start)
    assert set_up() == folder / repository


def test_setup_shows_why_there_is_no_repository(program, capfd):
    with pytest.raises(FileNotFoundError, match=f"^no repository in {program.parent}: set REPO_URL$"):
        set_up()
    with pytest.raises(FileNotFoundError, match="S7"):
        set_up(url="a private one")
    assert "clone --quiet a private one S7, prompt 0" in capfd.readouterr().out


def test_setup_installs_missing_packages(program, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)  # IPython would compare it with the executable
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "executable", str(program))
    set_up()
    assert capfd.readouterr().out.startswith("-m pip install --quiet tqdm, ")


def test_setup_bounds_the_waiting_of_threads_unless_the_user_has(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    set_up()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    del os.environ["GOMP_SPINCOUNT"]
    set_up()
    assert os.environ["GOMP_SPINCOUNT"] == "5000"


# ---- executed ----


def copy_repository(folder):
    """Copy the files of the working tree that the notebook needs; return the folder."""
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "draw.html"]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "images", folder / "images")
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "accuracy.csv", folder / "benchmarks")
    return folder


SETTINGS = {"S7_EPOCHS": "1", "S7_STANDIN": "1", "MPLBACKEND": "agg"}  # agg shows no pictures


def execute(notebook, folder):
    """Execute a notebook in a folder, for one epoch of stand-in digits; it gets the outputs."""
    with mock.patch.dict(os.environ, SETTINGS):
        nbclient.execute(notebook, cwd=folder)


def outputs_of(notebook):
    outputs = []
    for cell in notebook.cells:
        outputs.extend(cell.get("outputs", []))
    return outputs


def text_of(notebook):
    parts = []
    for output in outputs_of(notebook):
        parts.append(output.get("text", ""))
        parts.append(output.get("data", {}).get("text/plain", ""))
    return "\n".join(parts)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Execute the notebook beside a foreign model.py, with REPO_URL as in Colab; return it and its folder."""
    repository = copy_repository(tmp_path_factory.mktemp("source") / "repository")
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "copy"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    folder = tmp_path_factory.mktemp("work")
    (folder / "model.py").write_text("mine", encoding="utf-8")
    text = (ROOT / "S7.ipynb").read_text(encoding="utf-8")
    text = text.replace(r"REPO_URL = \"\"", rf"REPO_URL = \"{repository.as_posix()}\"")
    notebook = nbformat.reads(text, as_version=4)
    execute(notebook, folder)
    return notebook, folder


def test_notebook_clones_the_repository_beside_foreign_files_and_runs(executed):
    notebook, folder = executed
    text = text_of(notebook)
    assert "THIS IS NOT MNIST" in text
    assert "Model4 on stand-in digits (not MNIST): 1 epoch," in text
    (progress,) = re.findall(r".*\d+%\|.*", text)  # one line, not one for each refresh
    assert re.match(r"Train: Loss=\S+ Batch_id=46 Accuracy=\S+: 100%\|█+\| 47/47", progress)
    assert (folder / "S7" / "runs" / "Model4-seed1.pt").exists()
    assert (folder / "model.py").read_text(encoding="utf-8") == "mine"


def test_each_plot_is_shown_with_any_backend_and_has_alternative_text(executed):
    notebook, _ = executed
    alts = []
    for output in outputs_of(notebook):
        if "image/png" in output.get("data", {}):
            alts.append(output.metadata["image/png"]["alt"])
    plots = re.findall("^(?:plot_|Image)", "\n".join(cell.source for cell in CELLS.values()), re.MULTILINE)
    assert len(alts) == len(plots)
    assert all(alts)


EDITS = r"""
def edit(name, old, new):
    text = Path(name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    Path(name).write_text(text.replace(old, new), encoding="utf-8")

own = "\n\n    def __init__(self):\n        super().__init__()\n        self.own = nn.Identity()"
edit("model.py", "utils.py`).\"\"\"", "utils.py`).\"\"\"" + own)
edit("utils.py", "    model.train()", "    print('own train')\n    model.train()")
"""


def test_edited_files_are_what_runs_and_what_is_shown_without_a_restart(tmp_path):
    folder = copy_repository(tmp_path / "S7")
    before = [CELLS["setup-code"].source, CELLS["imports-code"].source, "MODEL = 'Model3'"]
    shown = [CELLS["source-code"].source, CELLS["functions-code"].source]
    sources = [*before, *shown, EDITS, *shown, "print(create_model(MODEL).own)"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    execute(notebook, folder)
    text = text_of(notebook)
    for new in ("self.own = nn.Identity()", "    print('own train')", "\nIdentity()\n"):
        assert text.count(new) == 1, new


# ---- as committed ----


def test_links_in_the_notebook_lead_to_its_sections():
    links = re.findall(r"\]\(#([^)]+)\)", MARKDOWN)
    assert len(links) >= 10
    for link in links:
        assert f'<a name="{link}"></a>\n## {link.replace("-", " ")}\n' in MARKDOWN


def test_ten_questions_have_folded_answers_and_links_to_their_sections():
    (text,) = [cell.source for cell in NOTEBOOK.cells if cell.id == "questions"]
    _, *questions = re.split(r"^\d+\. ", text, flags=re.MULTILINE)
    assert len(questions) == 10
    for question in questions:
        assert re.match(r"\[.+?\]\(#\S+\): .+\n\n +<details><summary>Answer</summary>\n\n +", question)


def test_figures_are_outputs_of_cells():
    """Colab shows no attachments, and a notebook that was opened alone has no folder of images."""
    assert "![" not in MARKDOWN
    assert "<img" not in MARKDOWN


def test_metadata_lets_nbval_compare_asks_colab_for_a_gpu_and_has_no_widgets_or_times():
    lesson = ("convolution", "formulas", "layers", "loss", "check", "modes", "overfit", "step")
    for name in (*[f"{part}-code" for part in lesson], "target-code"):
        assert "nbval-ignore-output" not in CELLS[name].metadata.get("tags", [])
    assert NOTEBOOK.metadata.accelerator == "GPU"
    assert "widgets" not in NOTEBOOK.metadata
    for cell in CELLS.values():
        assert "execution" not in cell.metadata


@pytest.mark.skipif(not outputs_of(NOTEBOOK), reason="the notebook was saved without outputs")
def test_committed_outputs_are_from_one_full_mnist_run_that_meets_the_target():
    assert [cell.execution_count for cell in CELLS.values()] == list(range(1, len(CELLS) + 1))
    for output in outputs_of(NOTEBOOK):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    text = text_of(NOTEBOOK)
    assert "MNIST: 60,000 training images" in text
    assert len(re.findall(r"\d+%\|", text)) == 15
    accuracies = re.findall(r"Test set: .*\(([\d.]+)%\)", text)
    assert len(accuracies) == 15
    for accuracy in accuracies[-5:]:
        assert float(accuracy) >= 99.4
    assert "in each of the last 5 epochs: met\n" in text

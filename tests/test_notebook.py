"""The notebook: its cells in any order, executed in an empty folder, compared by nbval, and as committed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from common import train_model
from conftest import PROXY_VARIABLES, ROOT
from helpers import assert_identical

import utils
from model import create_model

NOTEBOOK = json.loads((ROOT / "S7.ipynb").read_text(encoding="utf-8"))
CODE_CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE_CELLS]
HAS_OUTPUTS = any(cell["outputs"] for cell in CODE_CELLS)


def source_with(text):
    """Return the source of the first code cell that contains `text`."""
    return next(source for source in SOURCES if text in source)


SETUP = SOURCES[0]
SETTINGS = source_with("check_settings(MODEL")
NETWORK = source_with("summarize_model(create_model(MODEL))")
AUGMENTATION = source_with(".augmentation(copies)")
TRAINING = source_with("run.remaining_epochs()")
RESULTS = source_with("summarize_run(")
MISTAKES = source_with("find_mistakes(")
CONFUSION = source_with("plot_confusion(")
BEFORE_TRAINING = SOURCES[1 : SOURCES.index(TRAINING)]
AFTER_TRAINING = SOURCES[SOURCES.index(TRAINING) + 1 :]


# ---- cells in any order ----


class Kernel:
    """Runs cells in one namespace, as a notebook kernel does."""

    def __init__(self):
        self.names = {}

    def run(self, *sources):
        for source in sources:
            exec(compile(source, "cell", "exec"), self.names)


@pytest.fixture
def kernel(small, tmp_path, monkeypatch):
    """Return a kernel that has run all cells before training: Model3, two epochs, 300 stand-in digits."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "images", tmp_path / "images")
    monkeypatch.setattr(utils, "load_data", lambda: (small(300), small(100, train=False)))
    monkeypatch.setenv("S7_MODEL", "Model3")
    monkeypatch.setenv("S7_EPOCHS", "2")
    kernel = Kernel()
    kernel.run(*BEFORE_TRAINING)
    return kernel


def checkpoint(name="Model3-seed1"):
    return utils.load_checkpoint(f"checkpoints/{name}.pt")


def interrupt_batch(monkeypatch, number):
    """Send Ctrl-C in the batch with this number, counted from 1; an epoch has three and one for the test."""
    calls = []
    real = utils.GetCorrectPredCount

    def count(pred, target):
        calls.append(len(target))
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return real(pred, target)

    monkeypatch.setattr(utils, "GetCorrectPredCount", count)


def test_rerun_training_cell_gives_bit_identical_results(kernel):
    kernel.run(TRAINING)
    first = checkpoint()
    kernel.run(TRAINING)
    assert_identical(checkpoint(), first)


def test_training_does_not_depend_on_the_cells_before_it(kernel):
    kernel.run(TRAINING)
    first = checkpoint()
    kernel.run(NETWORK, AUGMENTATION, NETWORK, TRAINING)
    assert_identical(checkpoint(), first)


def test_changed_settings_are_used_and_recorded_by_the_training_cell_alone(kernel, monkeypatch, capsys):
    kernel.run(TRAINING)
    monkeypatch.setenv("S7_MODEL", "Model4")
    monkeypatch.setenv("S7_EPOCHS", "7")
    monkeypatch.setenv("S7_BATCH_SIZE", "32")
    augmented = []
    real = utils.affine

    def count_augmented_batch(data, *amounts):
        augmented.append(len(data))
        return real(data, *amounts)

    monkeypatch.setattr(utils, "affine", count_augmented_batch)
    capsys.readouterr()
    kernel.run(SETTINGS, TRAINING)
    state = checkpoint("Model4-seed1")
    assert "Model4 with 7,824 parameters" in capsys.readouterr().out
    assert "batches of 32" in state["description"]["data"]
    assert state["model"].keys() == create_model("Model4").state_dict().keys()
    assert len(state["history"]["test_acc"]) == 7
    assert augmented == [32] * 9 + [12]  # one epoch of 300 images is augmented, six are not


def test_edited_training_cell_cannot_resume_the_run_of_the_original(kernel, monkeypatch):
    kernel.run(TRAINING)
    before = checkpoint()
    monkeypatch.setenv("S7_RESUME", "True")
    edited = TRAINING.replace("torch.optim.SGD(", "torch.optim.NAdam(").replace("**recipe.sgd", "lr=0.01")
    with pytest.raises(ValueError, match="optimizer: checkpoint SGD.*current NAdam"):
        kernel.run(SETTINGS, edited)
    assert_identical(checkpoint(), before)


def test_plateau_scheduler_with_mode_max_follows_the_accuracy(kernel):
    """The accuracy rises and the loss falls: a scheduler that is fed the loss would drop the rate."""
    edited = TRAINING.replace("**recipe.scheduler_args", "mode='max', patience=0")
    results = iter([(0.5, 50.0), (0.4, 60.0)])
    test = "test = lambda *args: next(results)\n"
    kernel.names["results"] = results
    kernel.run(edited.replace("for epoch in", f"{test}for epoch in"))
    assert kernel.names["optimizer"].param_groups[0]["lr"] == 0.01


def test_later_cells_report_the_run_and_not_the_settings(kernel, monkeypatch, capsys):
    kernel.run(TRAINING)
    monkeypatch.setenv("S7_MODEL", "Model1")
    capsys.readouterr()
    kernel.run(SETTINGS, RESULTS)
    assert "Model3 on stand-in digits (not MNIST): 2 epochs" in capsys.readouterr().out


def test_confusion_matrix_is_titled_with_the_run_it_was_computed_for(kernel, monkeypatch):
    """The cell that computes it is not run again after another network was trained."""
    kernel.run(TRAINING, MISTAKES)
    monkeypatch.setenv("S7_MODEL", "Model1")
    kernel.run(SETTINGS, TRAINING)
    titles = []
    monkeypatch.setattr(utils, "plot_confusion", lambda confusion, title: titles.append(title))
    kernel.run(CONFUSION)
    assert titles == ["Model3 on stand-in digits (not MNIST)"]


def test_finished_run_survives_two_interrupted_ones(kernel, monkeypatch):
    kernel.run(TRAINING)
    finished = checkpoint()
    for _ in range(2):
        interrupt_batch(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            kernel.run(TRAINING)
    assert_identical(checkpoint("Model3-seed1.previous-1"), finished)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(2, id="in-the-first-epoch"),
        pytest.param(6, id="in-the-second-epoch"),
    ],
)
def test_interrupted_training_cell_resumes_bit_identically_to_the_benchmark_loop(
    kernel, small, monkeypatch, tmp_path, batch
):
    interrupt_batch(monkeypatch, batch)
    with pytest.raises(KeyboardInterrupt):
        kernel.run(TRAINING)
    kernel.run(*AFTER_TRAINING)  # later cells work on an interrupted run
    monkeypatch.setenv("S7_RESUME", "1")
    kernel.run(SETTINGS, TRAINING)
    torch.manual_seed(1)
    model = create_model("Model3")
    recipe = utils.RECIPES["Model3"]
    train_model(model, recipe, small(300), small(100, train=False), tmp_path / "reference.pt", epochs=2)
    assert_identical(checkpoint(), utils.load_checkpoint(tmp_path / "reference.pt"))


@pytest.mark.parametrize("assignment", ["MODEL = 'model4'", "EPOCHS = '3'", "BATCH_SIZE = 2.5"])
def test_invalid_setting_is_reported_by_the_settings_cell(assignment):
    name = assignment.split()[0]
    edited = re.sub(f"^{name} = .*$", assignment, SETTINGS, flags=re.MULTILINE)
    with pytest.raises(ValueError, match=f"^{name} is "):
        Kernel().run(edited)


def test_settings_cell_is_tagged_for_papermill():
    tagged = [cell for cell in CODE_CELLS if "parameters" in cell["metadata"].get("tags", [])]
    assert ["".join(cell["source"]) for cell in tagged] == [SETTINGS]


# ---- the setup cell ----


def make_repository(folder):
    """Create a Git repository from the files of the working tree that the notebook needs."""
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "draw.html"]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "images", folder / "images")
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def run_setup(folder, url=""):
    """Run the setup cell in a folder; return the folder it changed to, and the last line of its errors."""
    setup = SETUP.replace('REPO_URL = ""', f"REPO_URL = {url!r}")
    command = [sys.executable, "-c", setup + "\nprint(Path.cwd())"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    return result.stdout.strip(), result.stderr.strip().split("\n")[-1]


@pytest.mark.parametrize(
    ("start", "repository"),
    [
        pytest.param(".", ".", id="in the repository"),
        pytest.param(".", "S7", id="one folder up"),
        pytest.param(".", "S7-main", id="one folder up, from a zip file"),
        pytest.param("work", "S7", id="beside it"),
    ],
)
def test_setup_changes_to_the_repository_and_copies_nothing(tmp_path, start, repository):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "utils.py").write_text("mine", encoding="utf-8")
    (tmp_path / repository).mkdir(exist_ok=True)
    for name in ("model.py", "draw.html"):
        (tmp_path / repository / name).touch()
    before = sorted(tmp_path.rglob("*"))
    folder, _ = run_setup(tmp_path / start)
    assert folder == str((tmp_path / repository).resolve())
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "work" / "utils.py").read_text(encoding="utf-8") == "mine"


def test_setup_clones_once_beside_foreign_files(tmp_path):
    repository = make_repository(tmp_path / "repository")
    work = tmp_path / "work"
    work.mkdir()
    for name in ("model.py", "utils.py"):
        (work / name).write_text("mine", encoding="utf-8")
    for _ in range(2):  # the second time as after a restart of the kernel
        folder, _ = run_setup(work, url=str(repository))
        assert folder == str(work / "S7")
    assert (work / "utils.py").read_text(encoding="utf-8") == "mine"


def test_setup_names_the_folder_in_which_it_looked(tmp_path):
    _, error = run_setup(tmp_path)
    assert str(tmp_path) in error
    assert "REPO_URL" in error


def test_setup_reports_a_failed_clone_in_one_line(tmp_path):
    _, error = run_setup(tmp_path, url=str(tmp_path / "nothing"))
    assert error.startswith("RuntimeError")
    assert "REPO_URL" in error


# ---- executed ----


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Execute one epoch in a folder that holds only S7.ipynb; return the folder and the environment.

    REPO_URL is set as in Colab, and the environment asks for a matplotlib backend without pictures.
    """
    repository = make_repository(tmp_path_factory.mktemp("source") / "repository")
    folder = tmp_path_factory.mktemp("empty")
    text = (ROOT / "S7.ipynb").read_text(encoding="utf-8")
    assert text.count(r"REPO_URL = \"\"") == 1
    text = text.replace(r"REPO_URL = \"\"", rf"REPO_URL = \"{repository.as_posix()}\"")
    (folder / "S7.ipynb").write_text(text, encoding="utf-8")
    environment = {}
    for name, value in os.environ.items():
        if not name.startswith("S7_") and name.lower() not in PROXY_VARIABLES:
            environment[name] = value
    environment |= {"S7_EPOCHS": "1", "S7_STANDIN": "1", "MPLBACKEND": "agg"}
    convert = ["nbconvert", "--to", "notebook", "--execute", "--inplace", "S7.ipynb"]
    subprocess.run([sys.executable, "-m", *convert], cwd=folder, env=environment, check=True)
    return folder, environment


def outputs_of(path):
    outputs = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        outputs.extend(cell.get("outputs", []))
    return outputs


def text_of(path):
    parts = []
    for output in outputs_of(path):
        parts.extend(output.get("text", []))
        parts.extend(output.get("data", {}).get("text/plain", []))
    return "".join(parts)


def count_pictures(path):
    return sum("image/png" in output.get("data", {}) for output in outputs_of(path))


def test_notebook_runs_in_an_empty_folder(executed):
    folder, _ = executed
    text = text_of(folder / "S7.ipynb")
    assert "THIS IS NOT MNIST" in text
    assert "Model4 on stand-in digits (not MNIST): 1 epoch," in text
    assert (folder / "S7" / "checkpoints" / "Model4-seed1.pt").exists()


def test_progress_bar_leaves_one_line_per_epoch(executed):
    folder, _ = executed
    bars = re.findall(r".*\d+%\|.*", text_of(folder / "S7.ipynb"))
    assert len(bars) == 1
    assert re.search(r"Train: Loss=\S+ Batch_id=46 Accuracy=\S+: 100%", bars[0])


def test_pictures_are_shown_with_any_matplotlib_backend(executed):
    folder, _ = executed
    plots = sum("plot_" in source and "import plot_" in source for source in SOURCES)
    assert count_pictures(folder / "S7.ipynb") >= plots - 1  # of two cells with plot_digits, one imports it


def test_figures_are_not_saved_unasked(executed):
    folder, _ = executed
    status = subprocess.run(
        ["git", "status", "--short", "images"], cwd=folder / "S7", capture_output=True, text=True, check=True
    )
    assert status.stdout == ""


def test_second_run_passes_nbval(executed):
    folder, environment = executed
    flags = ["--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command = [sys.executable, "-m", "pytest", "-q", *flags, "S7.ipynb"]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"{len(CODE_CELLS)} passed" in result.stdout


# ---- as committed ----

committed = pytest.mark.skipif(not HAS_OUTPUTS, reason="S7.ipynb has no outputs: run it from top to bottom")


def output_of(source):
    """Return what the cell with this source printed."""
    cell = CODE_CELLS[SOURCES.index(source)]
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def test_every_code_cell_has_text_before_it():
    for before, cell in zip(NOTEBOOK["cells"], NOTEBOOK["cells"][1:], strict=False):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown"


def test_links_in_the_notebook_lead_to_its_sections():
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert len(links) >= 10
    for link in links:
        assert f'<a name="{link}"></a>\n## {link.replace("-", " ")}\n' in text


def test_nbval_compares_layers_recipe_and_target():
    compared = []
    for cell, source in zip(CODE_CELLS, SOURCES, strict=True):
        if "nbval-ignore-output" not in cell["metadata"].get("tags", []):
            compared.append(source)
    for name in ("summarize_model(", "print(run)", "check_target(", "untrained loss"):
        assert any(name in source for source in compared), name


@committed
def test_committed_outputs_are_from_one_full_mnist_run():
    counts = [cell["execution_count"] for cell in CODE_CELLS]
    assert counts == list(range(1, len(CODE_CELLS) + 1))
    for output in outputs_of(ROOT / "S7.ipynb"):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
    assert re.findall(r"EPOCH: (\d+)", output_of(TRAINING)) == [str(epoch) for epoch in range(1, 16)]
    text = text_of(ROOT / "S7.ipynb")
    assert len(re.findall(r"\d+%\|", text)) == 15
    assert "MNIST: 60,000 training and 10,000 test images" in text
    assert "NOT MNIST" not in text


@committed
def test_committed_run_reaches_the_target_in_each_of_the_last_five_epochs():
    accuracies = re.findall(r"EPOCH: 1[1-5]\nTest set: .*\((\S+)%\)", output_of(TRAINING))
    assert len(accuracies) == 5
    for accuracy in accuracies:
        assert float(accuracy) >= 99.4
    assert output_of(source_with("check_target(")).endswith("epochs: met\n")


@committed
def test_committed_figures_have_alternative_text():
    for output in outputs_of(ROOT / "S7.ipynb"):
        if "image/png" in output.get("data", {}):
            assert output["metadata"]["image/png"]["alt"]


@committed
def test_committed_cells_have_no_times():
    for cell in CODE_CELLS:
        assert "execution" not in cell["metadata"]


def test_notebook_asks_colab_for_a_gpu_and_has_no_widgets():
    assert NOTEBOOK["metadata"]["accelerator"] == "GPU"
    assert "widgets" not in NOTEBOOK["metadata"]

"""The notebook: its cells in any order, executed in an empty folder, compared by nbval, and as committed."""

import ast
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
from nbval.plugin import get_sanitize_patterns

import utils
from model import create_model

NOTEBOOK = json.loads((ROOT / "S7.ipynb").read_text(encoding="utf-8"))
CODE_CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE_CELLS]


def source_with(text):
    """Return the source of the first code cell that contains `text`."""
    return next(source for source in SOURCES if text in source)


SETUP = SOURCES[0]
SETTINGS = source_with("setting_from_env(")
NETWORK = source_with("summarize_model(create_model(MODEL))")
RECIPE = source_with("planned_learning_rates")
TRAINING = source_with("run.epochs()")
RESULTS = source_with("summarize_run")
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

    def __getitem__(self, name):
        return self.names[name]


@pytest.fixture
def kernel(small, tmp_path, monkeypatch):
    """Return a kernel that has run all cells before training: Model3, two epochs, 300 stand-in digits."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "images", tmp_path / "images")
    shutil.copy(ROOT / "model.py", tmp_path)
    monkeypatch.setattr(utils, "load_data", lambda: (small(300), small(100, train=False)))
    monkeypatch.setenv("S7_MODEL", "Model3")
    monkeypatch.setenv("S7_EPOCHS", "2")
    kernel = Kernel()
    kernel.run(*BEFORE_TRAINING)
    return kernel


def checkpoint(name="Model3-seed1"):
    return utils.read_checkpoint(f"checkpoints/{name}.pt")


def test_rerun_training_cell_gives_bit_identical_results(kernel):
    kernel.run(TRAINING)
    first = checkpoint()
    kernel.run(TRAINING)
    assert_identical(checkpoint(), first)


def test_training_does_not_depend_on_the_cells_that_show_network_and_recipe(kernel):
    kernel.run(TRAINING)
    first = checkpoint()
    kernel.run(NETWORK, RECIPE, NETWORK, TRAINING)
    assert_identical(checkpoint(), first)


def test_changed_settings_are_used_and_recorded_by_the_training_cell_alone(kernel, monkeypatch):
    kernel.run(TRAINING)
    monkeypatch.setenv("S7_MODEL", "Model4")
    monkeypatch.setenv("S7_EPOCHS", "6")
    monkeypatch.setenv("S7_BATCH_SIZE", "32")
    calls = []

    def count_augmented_batch(data, **amounts):
        calls.append(len(data))
        return data

    monkeypatch.setattr(utils, "random_affine", count_augmented_batch)
    kernel.run(SETTINGS, TRAINING)
    state = checkpoint("Model4-seed1")
    assert state["settings"]["model"] == "Model4"
    assert state["settings"]["batch_size"] == 32
    assert state["model"].keys() == create_model("Model4").state_dict().keys()
    assert len(state["history"]["test_acc"]) == 6
    assert calls == [32] * 9 + [12]  # one epoch of 300 images is augmented, five are not


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


def test_resume_without_a_checkpoint_says_so_and_trains(kernel, monkeypatch, capsys):
    monkeypatch.setenv("S7_RESUME", "True")
    kernel.run(SETTINGS, TRAINING)
    text = capsys.readouterr().out
    assert "No checkpoint at checkpoints/Model3-seed1.pt: training starts from scratch" in text
    assert len(checkpoint()["history"]["test_acc"]) == 2


def interrupt_batch(monkeypatch, number):
    """Send Ctrl-C in the training batch with this number, counted from 1."""
    calls = []
    real = utils.train_batch

    def train_batch(*args):
        calls.append(args)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(utils, "train_batch", train_batch)


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
        pytest.param(5, id="in-the-second-epoch"),
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
    settings = utils.run_settings("Model3", small(1).name, 2, 1, recipe)
    train_model(model, recipe, small(300), small(100, train=False), settings, tmp_path / "reference.pt")
    assert_identical(checkpoint(), utils.read_checkpoint(tmp_path / "reference.pt"))


def test_settings_cell_is_tagged_for_papermill_and_holds_only_settings():
    tagged = [cell for cell in CODE_CELLS if "parameters" in cell["metadata"].get("tags", [])]
    assert ["".join(cell["source"]) for cell in tagged] == [SETTINGS]
    for statement in ast.parse(SETTINGS).body:
        if isinstance(statement, ast.ImportFrom):
            continue
        assert isinstance(statement, ast.Assign)
        assert ast.unparse(statement.value).startswith("setting_from_env(")


# ---- the setup cell ----


def run_setup(folder, url=""):
    """Run the setup cell in a folder; return the last line of its error output."""
    setup = SETUP.replace('REPO_URL = ""', f"REPO_URL = {url!r}")
    result = subprocess.run(
        [sys.executable, "-c", setup], cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )
    lines = result.stderr.strip().splitlines()
    if result.returncode == 0:
        return ""
    return lines[-1]


def test_setup_without_a_repository_says_what_to_do(tmp_path):
    error = run_setup(tmp_path)
    assert error == "ValueError: model.py not found: set REPO_URL above to the URL of this repository"


def test_setup_reports_a_failed_clone_in_one_line(tmp_path):
    error = run_setup(tmp_path, url=str(tmp_path / "nothing"))
    assert re.search(r"^RuntimeError: cannot clone the repository \(.*\): check REPO_URL", error)


def test_setup_reports_a_folder_without_the_files_in_one_line(tmp_path):
    (tmp_path / "S7").mkdir()
    error = run_setup(tmp_path, url="unused")
    assert re.search("^RuntimeError: the folder S7 contains no .*: delete S7 and run this cell again$", error)


def test_setup_installs_packages_again_after_a_failure(tmp_path, monkeypatch):
    """The files are here already, as after a first run whose pip failed."""
    (tmp_path / "model.py").touch()
    calls = []

    def record_call(command, **options):
        calls.append(command)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", record_call)
    for _ in range(2):
        Kernel().run(SETUP)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "tqdm", "torchinfo", "matplotlib"]
    assert calls == [install, install]


# ---- executed ----


def make_repository(folder):
    """Create a Git repository from the files of the working tree that the setup cell needs."""
    for name in ("model.py", "utils.py", "draw.html"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "images", folder / "images")
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Execute one epoch in a folder that holds only S7.ipynb; return the folder and the environment.

    REPO_URL is set as in Colab, and the environment asks for a matplotlib backend without pictures.
    """
    repository = tmp_path_factory.mktemp("repository")
    folder = tmp_path_factory.mktemp("empty")
    make_repository(repository)
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
    assert (folder / "checkpoints" / "Model4-seed1.pt").exists()


def test_progress_bar_leaves_one_line_per_epoch(executed):
    folder, _ = executed
    bars = re.findall(r".*\d+%\|.*", text_of(folder / "S7.ipynb"))
    assert len(bars) == 1
    assert re.search(r"Train: Loss=\S+ Batch_id=46 Accuracy=\S+: 100%", bars[0])


def test_pictures_are_shown_with_any_matplotlib_backend(executed):
    folder, _ = executed
    assert count_pictures(folder / "S7.ipynb") == count_pictures(ROOT / "S7.ipynb")


def test_figures_are_not_saved_unasked(executed):
    folder, _ = executed
    shown = {path.name for path in (folder / "images").iterdir()}
    committed = {path.name for path in (ROOT / "images").iterdir()}
    assert shown == committed


def test_second_run_prints_the_same_output(executed, tmp_path):
    """nbval compares strictly every output except pictures, progress bars and the drawing field."""
    folder, environment = executed
    patterns = "[bar]\nregex: ^.*\\d+%\\|.*\\|.*\\[.*\\]$\nreplace: BAR\n"
    patterns += '[field]\nregex: (?s)<div class="drawing-field".*?</script>\nreplace: FIELD\n'
    (tmp_path / "patterns.cfg").write_text(patterns, encoding="utf-8")
    flags = ["--nbval", "--nbval-current-env", f"--nbval-sanitize-with={tmp_path / 'patterns.cfg'}"]
    plugins = ["-p", "no:cacheprovider", "-p", "no:randomly"]  # cells must stay in order
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *flags, "S7.ipynb"]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"{len(CODE_CELLS)} passed" in result.stdout


# ---- as committed ----


def committed_print():
    """Return what the committed notebook printed, without its progress bars."""
    parts = []
    for output in outputs_of(ROOT / "S7.ipynb"):
        if output["output_type"] == "stream":
            parts.extend(output["text"])
    return "".join(parts)


def sanitize(text):
    """Apply the patterns of tests/sanitize.cfg in order, as nbval does."""
    patterns = (ROOT / "tests" / "sanitize.cfg").read_text(encoding="utf-8")
    for pattern, word in get_sanitize_patterns(patterns):
        text = re.sub(pattern, word, text)
    return text


@pytest.mark.parametrize(
    "before, allowed, forbidden",
    [
        pytest.param(r"EPOCH: 10\nTest set: .*\(", "99.35", None, id="accuracy-of-epoch-10"),
        pytest.param(r"EPOCH: 11\nTest set: .*\(", "99.40", "99.39", id="accuracy-of-epoch-11"),
        pytest.param(r"EPOCH: 15\nTest set: .*\(", "100.00", "9.80", id="accuracy-of-epoch-15"),
        pytest.param("learning rate from ", None, "0.01", id="learning-rate"),
        pytest.param("last epoch: train ", "98.00", "90.10", id="train-accuracy"),
        pytest.param("last epoch: train .*, test ", "99.40", "99.39", id="test-accuracy"),
        pytest.param("best test ", "99.99", None, id="best-accuracy"),
        pytest.param("over the last five epochs: mean ", "99.40", "99.39", id="mean-of-last-five"),
        pytest.param("over the last five epochs: .* minimum ", "99.40", "99.39", id="minimum-of-last-five"),
        pytest.param(": from epoch ", "11", "12", id="first-epoch-above-the-target"),
        pytest.param("untrained loss ", None, "2.5000", id="untrained-loss"),
    ],
)
def test_sanitizer_masks_only_allowed_differences(before, allowed, forbidden):
    text = committed_print()
    for number in (allowed, forbidden):
        if number is None:
            continue
        changed, count = re.subn(rf"({before})[\d.]+", rf"\g<1>{number}", text)
        assert count > 0
        assert (sanitize(changed) == sanitize(text)) == (number == allowed)


def test_sanitizer_removes_the_line_about_a_download():
    text = "Downloading MNIST (11 MB) to data/MNIST/raw\nMNIST: 60,000 training images\n"
    assert sanitize(text) == "MNIST: 60,000 training images\n"


def test_every_code_cell_has_text_before_it():
    for before, cell in zip(NOTEBOOK["cells"], NOTEBOOK["cells"][1:], strict=False):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown"


def test_no_cell_is_excluded_from_nbval():
    for source in SOURCES:
        assert "NBVAL" not in source


def test_committed_outputs_are_from_one_full_mnist_run():
    counts = [cell["execution_count"] for cell in CODE_CELLS]
    assert counts == list(range(1, len(CODE_CELLS) + 1))
    for output in outputs_of(ROOT / "S7.ipynb"):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
    text = committed_print()
    assert re.findall(r"EPOCH: (\d+)", text) == [str(epoch) for epoch in range(1, 16)]
    assert len(re.findall(r"\d+%\|", text_of(ROOT / "S7.ipynb"))) == 15
    assert "MNIST: 60,000 training and 10,000 test images" in text
    assert "NOT MNIST" not in text


def test_committed_run_reaches_the_target_in_each_of_the_last_five_epochs():
    accuracies = re.findall(r"EPOCH: 1[1-5]\nTest set: .*\((\S+)%\)", committed_print())
    assert len(accuracies) == 5
    for accuracy in accuracies:
        assert float(accuracy) >= 99.4


def test_committed_figures_have_alternative_text():
    figures = 0
    for output in outputs_of(ROOT / "S7.ipynb"):
        if "image/png" in output.get("data", {}):
            figures += 1
            assert output["metadata"]["image/png"]["alt"]
    assert figures == 6


def test_notebook_asks_colab_for_a_gpu_and_has_no_widgets():
    assert NOTEBOOK["metadata"]["accelerator"] == "GPU"
    assert NOTEBOOK["metadata"]["colab"]["gpuType"] == "T4"
    assert "widgets" not in NOTEBOOK["metadata"]

"""The notebook: its cells in any order, the setup cell, executed, compared by nbval, and as committed.

`test_edits.py` has what a student changes in the cells.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import PROXY_VARIABLES, ROOT
from helpers import assert_identical

import plots
import utils
from model import create_model

NOTEBOOK = json.loads((ROOT / "S7.ipynb").read_text(encoding="utf-8"))
MARKDOWN = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
CODE_CELLS = {cell["id"]: cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}
CELLS = {name: "".join(cell["source"]) for name, cell in CODE_CELLS.items()}
NAMES = list(CELLS)
TRAINING = NAMES.index("training-code")
BEFORE_TRAINING = NAMES[1:TRAINING]
AFTER_TRAINING = NAMES[TRAINING + 1 :]


# ---- cells in any order ----


class Kernel:
    """Runs cells, given by id, in one namespace, as a notebook kernel does."""

    def __init__(self):
        self.names = {}

    def run(self, *cells):
        for cell in cells:
            exec(compile(CELLS[cell], cell, "exec"), self.names)

    def train(self):
        self.run("settings-code", "training-code")


@pytest.fixture
def kernel(small, tmp_path, monkeypatch):
    """Return a kernel that has run all cells before training: Model3, two epochs, 200 stand-in digits."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "images", tmp_path / "images")
    monkeypatch.setattr(utils, "load_data", lambda: (small(200), small(100, train=False)))
    monkeypatch.setenv("S7_MODEL", "Model3")
    monkeypatch.setenv("S7_EPOCHS", "2")
    monkeypatch.setenv("S7_BATCH_SIZE", "100")
    kernel = Kernel()
    kernel.run(*BEFORE_TRAINING)
    return kernel


@pytest.fixture
def alts(monkeypatch):
    """Collect the alternative texts of the figures that the cells show."""
    alts = []

    def keep(figure, name, alt):
        plt.close(figure)
        alts.append(alt)

    monkeypatch.setattr(plots, "show_figure", keep)
    return alts


def checkpoint(name="Model3-seed1"):
    return utils.load_checkpoint(f"checkpoints/{name}.pt")


def test_training_cell_trains_as_a_plain_loop_of_pytorch_with_the_settings_of_its_last_run(
    kernel, small, monkeypatch
):
    """Seven epochs of Model4 are one with augmentation and six without."""
    kernel.train()
    monkeypatch.setenv("S7_MODEL", "Model4")
    monkeypatch.setenv("S7_EPOCHS", "7")
    monkeypatch.setenv("S7_BATCH_SIZE", "80")
    monkeypatch.setenv("S7_SEED", "2")
    kernel.train()

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

    state = checkpoint("Model4-seed2")
    for name, value in model.state_dict().items():
        assert torch.equal(state["model"][name], value), name
    assert len(state["history"]["test_acc"]) == 7
    assert state["history"]["test_losses"][-1] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_scheduler_follows_the_loss_or_the_accuracy(kernel, monkeypatch, mode):
    """The loss falls and the accuracy rises: with the other one of the two, the rate would drop."""
    results = iter([(0.5, 50.0), (0.4, 60.0)])
    kernel.names["test"] = lambda *args: next(results)
    monkeypatch.setitem(utils.RECIPES["Model3"].scheduler_args, "mode", mode)
    monkeypatch.setitem(utils.RECIPES["Model3"].scheduler_args, "patience", 0)
    kernel.train()
    assert kernel.names["optimizer"].param_groups[0]["lr"] == 0.01


def test_later_cells_report_the_run_and_not_the_settings(kernel, alts, monkeypatch, capsys):
    kernel.train()
    monkeypatch.setenv("S7_MODEL", "Model1")
    kernel.run("settings-code")
    capsys.readouterr()
    kernel.run(*AFTER_TRAINING)
    reported = "\n".join([capsys.readouterr().out, *alts])
    assert reported.count("Model3 on stand-in digits") >= 6
    assert "Model1" not in reported


def test_confusion_matrix_is_titled_with_the_run_it_was_computed_for(kernel, alts, monkeypatch, capsys):
    """The cell that computes it is not run again after another network was trained."""
    kernel.train()
    kernel.run("errors-code")
    monkeypatch.setenv("S7_MODEL", "Model1")
    kernel.train()
    capsys.readouterr()
    kernel.run("confusion-code", "pairs-code")
    assert "Model3" in alts[-1]
    assert capsys.readouterr().out.startswith("Model3 ")


def test_run_that_is_interrupted_in_its_first_epoch_leaves_the_finished_one_and_the_cells_below_work(
    kernel, monkeypatch
):
    kernel.train()
    finished = checkpoint()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "sum_exactly", lambda losses: signal.raise_signal(signal.SIGINT))
        kernel.run("training-code")
    kernel.run(*AFTER_TRAINING)
    assert_identical(checkpoint(), finished)


@pytest.mark.parametrize("assignment", ["MODEL = 'model4'", "EPOCHS = 0", "BATCH_SIZE = 2.5"])
def test_training_cell_rejects_what_papermill_injects(kernel, assignment):
    """It inserts its cell after the one with this tag."""
    assert CODE_CELLS["settings-code"]["metadata"]["tags"] == ["parameters"]
    exec(assignment, kernel.names)
    with pytest.raises(ValueError, match=f"^{assignment.split()[0]} is "):
        kernel.run("training-code")


def test_settings_cell_rejects_an_invalid_setting(monkeypatch, kernel):
    monkeypatch.setenv("S7_EPOCHS", "three")
    with pytest.raises(ValueError, match="^EPOCHS is 'three'"):
        kernel.run("settings-code")


# ---- the setup cell ----


def copy_repository(folder):
    """Copy the files of the working tree that the notebook needs."""
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "draw.html"]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "images", folder / "images")
    return folder


def make_repository(folder):
    """Create a Git repository from the files of the working tree that the notebook needs."""
    copy_repository(folder)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def run_setup(folder, url="", before=""):
    """Run the setup cell in a folder; return the folder it changed to, and the last line of its errors."""
    setup = CELLS["setup-code"].replace('REPO_URL = ""', f"REPO_URL = {url!r}")
    command = [sys.executable, "-c", f"{before}\n{setup}\nprint(Path.cwd())"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    return result.stdout.strip(), result.stderr.strip().split("\n")[-1]


NO_TQDM = 'import sys; sys.modules["tqdm"] = None'


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Return the only folder of PATH: its git and python add their arguments to a file `called`, and fail."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("git", "python"):
        text = f'#!/bin/sh\necho "$@" >> "{folder}/called"\necho "prompt $GIT_TERMINAL_PROMPT" >&2\n'
        (folder / name).write_text(f"{text}echo failed >&2\nexit 1\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.mark.parametrize(
    ("start", "repository"),
    [
        pytest.param(".", ".", id="in the repository"),
        pytest.param(".", "S7-main", id="one folder up, from a zip file"),
        pytest.param("work", "S7", id="beside it"),
    ],
)
def test_setup_changes_to_the_repository_and_copies_nothing(tmp_path, start, repository):
    (tmp_path / "work").mkdir()
    (tmp_path / repository).mkdir(exist_ok=True)
    for name in ("model.py", "draw.html"):
        (tmp_path / repository / name).touch()
    before = sorted(tmp_path.rglob("*"))
    folder, _ = run_setup(tmp_path / start)
    assert folder == str((tmp_path / repository).resolve())
    assert sorted(tmp_path.rglob("*")) == before


def test_setup_clones_once_beside_foreign_files(tmp_path):
    repository = make_repository(tmp_path / "repository")
    work = tmp_path / "work"
    work.mkdir()
    (work / "model.py").write_text("mine", encoding="utf-8")
    for _ in range(2):  # the second time as after a restart of the kernel
        folder, _ = run_setup(work, url=str(repository))
        assert folder == str(work / "S7")
    assert (work / "model.py").read_text(encoding="utf-8") == "mine"


def test_setup_names_the_folder_in_which_it_looked(tmp_path):
    _, error = run_setup(tmp_path)
    assert re.fullmatch(f"FileNotFoundError: .*{tmp_path}.*REPO_URL", error)


def test_setup_reports_a_failed_clone_in_one_line_without_a_prompt(tmp_path, programs):
    _, error = run_setup(tmp_path, url="private")
    assert error.startswith("RuntimeError: git failed (prompt 0 failed): check REPO_URL")


def test_setup_reports_in_one_line_that_git_is_missing(tmp_path, programs):
    (programs / "git").unlink()
    _, error = run_setup(tmp_path, url="any")
    assert re.fullmatch("RuntimeError: git failed .*: check REPO_URL, and whether Git is installed", error)


def test_setup_installs_missing_packages_and_reports_a_failure_in_one_line(tmp_path, programs):
    copy_repository(tmp_path / "S7")
    _, error = run_setup(tmp_path, before=f'{NO_TQDM}; sys.executable = "{programs}/python"')
    assert re.fullmatch("RuntimeError: .* failed .*: install the packages of requirements.txt", error)
    assert (programs / "called").read_text(encoding="utf-8") == "-m pip install tqdm\n"


def test_setup_does_nothing_in_a_kernel_without_pytorch(tmp_path, programs):
    before = f'{NO_TQDM}; sys.modules["torch"] = None; sys.executable = "{programs}/python"'
    _, error = run_setup(tmp_path, url="any", before=before)
    assert error.startswith("ModuleNotFoundError: this kernel has no PyTorch")
    assert not (programs / "called").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="GOMP_SPINCOUNT is set on Linux only")
@pytest.mark.parametrize(("user", "expected"), [("", "5000"), ("os.environ['GOMP_SPINCOUNT'] = '7'", "7")])
def test_setup_bounds_the_waiting_of_threads_unless_the_user_has(tmp_path, monkeypatch, user, expected):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    copy_repository(tmp_path / "S7")
    report = "import atexit, os; atexit.register(lambda: print(os.environ['GOMP_SPINCOUNT']))"
    output, _ = run_setup(tmp_path, before=f"{report}\n{user}")
    assert output.endswith(f"\n{expected}")


# ---- executed ----


def environment_of_user():
    """Return the environment for one epoch of stand-in digits, with a backend without pictures."""
    environment = {}
    for name, value in os.environ.items():
        if not name.startswith("S7_") and name.lower() not in PROXY_VARIABLES:
            environment[name] = value
    environment["PYTHONIOENCODING"] = "utf-8"  # the C locale cannot print ×
    return environment | {"S7_EPOCHS": "1", "S7_STANDIN": "1", "MPLBACKEND": "agg"}


def run_jupyter(folder, *command):
    """Run a module of Jupyter, pytest or a script in a folder; return what it printed."""
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment_of_user(),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Execute the notebook in a folder of its own, with REPO_URL as in Colab; return the folder."""
    repository = make_repository(tmp_path_factory.mktemp("source") / "repository")
    folder = tmp_path_factory.mktemp("empty")
    text = (ROOT / "S7.ipynb").read_text(encoding="utf-8")
    text = text.replace(r"REPO_URL = \"\"", rf"REPO_URL = \"{repository.as_posix()}\"")
    (folder / "S7.ipynb").write_text(text, encoding="utf-8")
    run_jupyter(folder, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "S7.ipynb")
    return folder


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


def test_notebook_runs_in_an_empty_folder(executed):
    text = text_of(executed / "S7.ipynb")
    assert "THIS IS NOT MNIST" in text
    assert "Model4 on stand-in digits (not MNIST): 1 epoch," in text
    assert (executed / "S7" / "checkpoints" / "Model4-seed1.pt").exists()


def test_progress_bar_leaves_one_line_per_epoch(executed):
    bars = re.findall(r".*\d+%\|.*", text_of(executed / "S7.ipynb"))
    assert len(bars) == 1
    assert re.search(r"Train: Loss=\S+ Batch_id=46 Accuracy=\S+: 100%", bars[0])


def test_each_plot_is_shown_with_any_backend_and_has_alternative_text(executed):
    pictures = [
        output for output in outputs_of(executed / "S7.ipynb") if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == sum(
        source.count("\nplot_") + source.startswith("plot_") for source in CELLS.values()
    )
    for picture in pictures:
        assert picture["metadata"]["image/png"]["alt"]


def test_second_run_passes_nbval(executed):
    flags = ["--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "-p", "no:randomly"]
    printed = run_jupyter(executed, "-m", "pytest", "-q", *flags, "S7.ipynb")
    assert f"{len(CELLS)} passed" in printed


def test_exported_script_runs_and_says_how_to_save_its_figures(tmp_path):
    folder = copy_repository(tmp_path / "S7")
    shutil.copy(ROOT / "S7.ipynb", folder)
    run_jupyter(folder, "-m", "nbconvert", "--to", "script", "S7.ipynb")
    assert "S7_FIGURES" in run_jupyter(folder, "S7.py")


EDITS = r"""
def edit(name, old, new):
    text = Path(name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    Path(name).write_text(text.replace(old, new), encoding="utf-8")

own = "\n\n    def __init__(self):\n        super().__init__()\n        self.own = nn.Identity()"
edit("model.py", "utils.py`).\"\"\"", "utils.py`).\"\"\"" + own)
edit("utils.py", "    model.train()", "    print('own train')\n    model.train()")
edit("utils.py", "PUBLISHED_SGD = dict(lr=0.01", "PUBLISHED_SGD = dict(lr=0.02")
edit("plots.py", "TARGET_ACCURACY = 99.4", "TARGET_ACCURACY = 98.7")
"""


def test_edited_files_are_what_runs_and_what_is_shown_without_a_restart(tmp_path):
    folder = copy_repository(tmp_path / "S7")
    names = ["source-code", "functions-code", "recipe-code"]
    shown = [CELLS[name] for name in names]
    ran = ["print(create_model(MODEL).own)", "print(check_target(utils.History(test_acc=[99.0])))"]
    sources = [CELLS["setup-code"], CELLS["imports-code"], "MODEL = 'Model3'", *shown, EDITS, *shown, *ran]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "edits.ipynb")
    run_jupyter(folder, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "edits.ipynb")
    text = text_of(folder / "edits.ipynb")
    for expected in (
        "self.own = nn.Identity()",
        "    print('own train')",
        "lr=0.02",
        "\nIdentity()\n",
        "98.7",
    ):
        assert text.count(expected) == 1, expected


# ---- as committed ----

committed = pytest.mark.skipif(
    not any(cell["outputs"] for cell in CODE_CELLS.values()),
    reason="S7.ipynb has no outputs: run it from top to bottom",
)


def output_of(name):
    """Return what the cell printed."""
    return "".join("".join(output.get("text", "")) for output in CODE_CELLS[name]["outputs"])


def test_every_code_cell_has_text_before_it():
    for before, cell in zip(NOTEBOOK["cells"], NOTEBOOK["cells"][1:], strict=False):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown"


def test_links_in_the_notebook_lead_to_its_sections():
    links = re.findall(r"\]\(#([^)]+)\)", MARKDOWN)
    assert len(links) >= 10
    for link in links:
        assert f'<a name="{link}"></a>\n## {link.replace("-", " ")}\n' in MARKDOWN


def test_figures_in_the_text_are_embedded_and_have_alternative_text():
    """A notebook that was opened alone has no folder of images."""
    attached = []
    for cell in NOTEBOOK["cells"]:
        attached.extend(cell.get("attachments", {}))
    figures = re.findall(r"!\[(.*?)\]\((.*?)\)", MARKDOWN)
    assert sorted(path for _, path in figures) == sorted(f"attachment:{name}" for name in attached)
    for text, _ in figures:
        assert text


@pytest.mark.parametrize("name", ["check-code", "layers-code", "recipe-code", "target-code"])
def test_nbval_compares_what_must_not_change(name):
    assert "nbval-ignore-output" not in CODE_CELLS[name]["metadata"].get("tags", [])


@committed
def test_committed_outputs_are_from_one_full_mnist_run():
    counts = [cell["execution_count"] for cell in CODE_CELLS.values()]
    assert counts == list(range(1, len(CELLS) + 1))
    for output in outputs_of(ROOT / "S7.ipynb"):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
    assert re.findall(r"EPOCH: (\d+)", output_of("training-code")) == [str(epoch) for epoch in range(1, 16)]
    text = text_of(ROOT / "S7.ipynb")
    assert len(re.findall(r"\d+%\|", text)) == 15
    assert "MNIST: 60,000 training and 10,000 test images" in text
    assert "NOT MNIST" not in text


@committed
def test_committed_run_reaches_the_target_in_each_of_the_last_five_epochs():
    accuracies = re.findall(r"EPOCH: 1[1-5]\nTest set: .*\((\S+)%\)", output_of("training-code"))
    assert len(accuracies) == 5
    for accuracy in accuracies:
        assert float(accuracy) >= 99.4
    assert output_of("target-code").endswith("epochs: met\n")


def test_notebook_asks_colab_for_a_gpu_and_has_no_widgets_or_times():
    assert NOTEBOOK["metadata"]["accelerator"] == "GPU"
    assert "widgets" not in NOTEBOOK["metadata"]
    for cell in CODE_CELLS.values():
        assert "execution" not in cell["metadata"]

"""The notebook: run from an empty folder, run again by nbval and compared, and read as committed."""

import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT
import utils

SOURCE = json.loads((ROOT / "S7.ipynb").read_text())
CODE = [cell for cell in SOURCE["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A folder that held only S7.ipynb, after a short run there, and the environment of that run.

    REPO_URL is filled in, as a user of Colab would, with a repository made of the working tree.
    """
    repository, folder = (tmp_path_factory.mktemp(name) for name in ("repository", "empty"))
    commit = "git init -q && git add . && git -c user.name=test -c user.email=test@localhost commit -qm copy"
    copy = f"cp -r model.py utils.py images {repository} && cd {repository} && {commit}"
    subprocess.run(copy, shell=True, cwd=ROOT, check=True)
    text = (ROOT / "S7.ipynb").read_text()
    assert text.count(r"REPO_URL = \"\"") == 1
    (folder / "S7.ipynb").write_text(text.replace(r"REPO_URL = \"\"", rf"REPO_URL = \"{repository}\""))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("S7_")}
    environment |= {"S7_EPOCHS": "1", "S7_STANDIN": "1"}
    convert = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "S7.ipynb"]
    result = subprocess.run(convert, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, environment


def outputs(path):
    cells = json.loads(path.read_text())["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def text_of(path):
    parts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs(path)]
    return "".join("".join(part) for part in parts)


def test_alone_in_an_empty_folder_it_runs_to_the_end(executed):
    folder, _ = executed
    text = text_of(folder / "S7.ipynb")
    bars = re.findall(r".*\d+%\|.*", text)
    assert len(bars) == 1 and re.search(r"Train: Loss=\S+ Batch_id=468 Accuracy=\S+: 100%", bars[0])
    assert "THIS IS NOT MNIST" in text and "on stand-in digits (not MNIST): 1 epochs" in text
    assert (folder / "checkpoints").is_dir()
    drawn, committed = ({path.name for path in (place / "images").iterdir()} for place in (folder, ROOT))
    assert drawn == committed  # figures are drawn, but none is saved unasked


def test_run_again_it_prints_the_same(executed, tmp_path):
    """nbval, strictly: every cell's output but pictures and the progress bar's times."""
    folder, environment = executed
    (tmp_path / "bar.cfg").write_text("[bar]\nregex: ^.*\\d+%\\|.*\\|.*\\[.*\\]$\nreplace: PROGRESS BAR\n")
    flags = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", str(tmp_path / "bar.cfg")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, "S7.ipynb"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"{len(CODE)} passed" in result.stdout


def sanitize(text):
    """As nbval does with tests/sanitize.cfg, one pattern after the other."""
    for pattern, word in re.findall(r"regex: (.*)\nreplace: (.*)", (ROOT / "tests/sanitize.cfg").read_text()):
        text = re.sub(pattern, word, text)
    return text


def epochs(*accuracies):
    lines = (f"EPOCH: {n}\nTest set: Average loss: 0.02, Accuracy: 9/10000 ({a:.2f}%)" for n, a in accuracies)
    return sanitize("\n".join(lines))


def test_only_an_accuracy_from_99_4_up_in_the_last_five_epochs_becomes_a_word():
    good = epochs((1, 98.0), (10, 99.35), (11, 99.40), (15, 99.61))
    assert good == epochs((1, 97.1), (10, 99.5), (11, 99.99), (15, 100)) and "%" not in good
    for bad in (99.39, 98.5, 9.8):
        assert epochs((1, 98.0), (10, 99.35), (11, bad), (15, 99.61)) != good
        assert epochs((1, 98.0), (10, 99.35), (11, 99.40), (15, bad)) != good
    history = utils.History([0.1] * 15, [99.7] * 15, [0.1] * 15, [99.0] + [99.5] * 14, [0.1] * 15, [1] * 15)
    result = sanitize(utils.result(history, "Model4 on MNIST"))
    history.test_acc[3:] = [99.3] + [99.62] * 11
    assert sanitize(utils.result(history, "Model4 on MNIST")) == result and "99.6" not in result
    for column, value in (("test_acc", 99.39), ("train_acc", 90.1), ("learning_rates", 0.01)):
        worse = utils.History(**{name: list(values) for name, values in vars(history).items()})
        getattr(worse, column)[-1] = value
        assert sanitize(utils.result(worse, "Model4 on MNIST")) != result


def test_without_a_repository_it_says_what_to_do(tmp_path):
    setup = "".join(CODE[0]["source"])
    result = subprocess.run([sys.executable, "-c", setup], cwd=tmp_path, capture_output=True, text=True)
    assert result.stderr.strip().splitlines()[-1].endswith("give the repository's address as REPO_URL above")


def test_cells_are_short_explained_and_all_compared():
    assert not any("NBVAL" in "".join(cell["source"]) for cell in CODE)
    for before, cell in zip(SOURCE["cells"], SOURCE["cells"][1:]):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown" and len(cell["source"]) <= 15
    loop = next(cell["source"] for cell in CODE if "run.epochs()" in "".join(cell["source"]))
    assert len(loop) <= 12


def test_the_committed_notebook_is_one_full_run_on_mnist():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not any(o["output_type"] == "error" for cell in CODE for o in cell["outputs"])
    assert not any(cell["metadata"] for cell in SOURCE["cells"]) and "widgets" not in SOURCE["metadata"]
    assert SOURCE["metadata"]["accelerator"] == "GPU" and SOURCE["metadata"]["colab"]["gpuType"] == "T4"
    printed = [o for o in outputs(ROOT / "S7.ipynb") if o["output_type"] == "stream"]
    text = "".join("".join(o["text"]) for o in printed)
    assert re.findall(r"EPOCH: (\d+)", text) == [str(epoch) for epoch in range(1, 16)]
    assert sanitize(text).count("AT LEAST 99.4") == 7
    assert len(re.findall(r"\d+%\|", text_of(ROOT / "S7.ipynb"))) == 15
    assert "MNIST: 60,000 train and 10,000 test images" in text and "NOT MNIST" not in text
    figures = [o for o in outputs(ROOT / "S7.ipynb") if "image/png" in o.get("data", {})]
    assert len(figures) == 5 and all(o["metadata"]["image/png"]["alt"] for o in figures)

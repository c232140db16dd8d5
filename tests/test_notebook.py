"""The notebook: run from an empty folder, run again by nbval and compared, and read as committed."""

import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

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
    subprocess.run(convert, cwd=folder, env=environment, check=True)
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


def printed():
    """What the committed notebook printed, without its progress bars."""
    return "".join("".join(o["text"]) for o in outputs(ROOT / "S7.ipynb") if o["output_type"] == "stream")


def sanitize(text):
    """As nbval does with tests/sanitize.cfg, one pattern after the other."""
    for pattern, word in re.findall(r"regex: (.*)\nreplace: (.*)", (ROOT / "tests/sanitize.cfg").read_text()):
        text = re.sub(pattern, word, text)
    return text


@pytest.mark.parametrize(
    "before, free, bound",
    [
        (r"EPOCH: 10\nTest set: .*\(", "99.35", None),
        (r"EPOCH: 11\nTest set: .*\(", "99.40", "99.39"),
        (r"EPOCH: 15\nTest set: .*\(", "100.00", "9.80"),
        ("learning rate from ", None, "0.01"),
        ("last epoch: train ", "98.00", "90.10"),
        ("last epoch: train .*, test ", "99.40", "99.39"),
        ("best test ", "99.99", None),
        ("worst test of the last five epochs: ", "99.40", "99.39"),
        ("held from epoch ", "11", "12"),
    ],
)
def test_only_what_has_to_be_the_same_is_compared(before, free, bound):
    """The committed text with one number changed: to one that may differ, to one that may not."""
    text = printed()
    for figure in filter(None, (free, bound)):
        changed = re.sub(rf"({before})[\d.]+", rf"\g<1>{figure}", text)
        assert changed != text and (sanitize(changed) == sanitize(text)) == (figure is free)


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
    text = printed()
    assert re.findall(r"EPOCH: (\d+)", text) == [str(epoch) for epoch in range(1, 16)]
    assert sanitize(text).count("AT LEAST 99.4") == 7
    assert len(re.findall(r"\d+%\|", text_of(ROOT / "S7.ipynb"))) == 15
    assert "MNIST: 60,000 train and 10,000 test images" in text and "NOT MNIST" not in text
    figures = [o for o in outputs(ROOT / "S7.ipynb") if "image/png" in o.get("data", {})]
    assert len(figures) == 5 and all(o["metadata"]["image/png"]["alt"] for o in figures)

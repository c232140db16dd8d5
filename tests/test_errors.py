"""Bad input: one line that says what is wrong and what to do."""

import os
from unittest.mock import patch

from PIL import Image
import pytest
from torch import nn
import torch.nn.functional as F

from model import create_model
import utils


def load(dataset, batch_size=50, target=None):
    dataset.targets[:1] = target or 0
    utils.BatchLoader(dataset, batch_size, "cpu")


def setting(text, *default_and_choices):
    with patch.dict(os.environ, S7_NAME=text):
        utils.setting("NAME", *default_and_choices)


def predict(image):
    utils.predict(create_model("Model3"), image)


def narrow(dataset):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.LogSoftmax(1))
    utils.test(model, "cpu", utils.BatchLoader(dataset, 50, "cpu"), F.nll_loss)


BAD = {  # what is said: what is done, given `small` and a folder
    "10 images in batches of 0: give at least 1": lambda small, _: load(small(10), batch_size=0),
    "0 images in batches of 50": lambda small, _: load(small(0)),
    "run from 0 to 10: digits": lambda small, _: load(small(99), target=10),
    "run from -1 to 9": lambda small, _: load(small(99), target=-1),
    "Target [5-9] is out of bounds": lambda small, _: narrow(small(99)),  # by torch itself
    "NAME is 'many': give a whole number": lambda *_: setting("many", 15),
    "NAME is '-1': give a whole number": lambda *_: setting("-1", 15),
    "NAME is '0': give a whole number from 1 up": lambda *_: setting("0", 15),
    "NAME is 'yes': choose one of 0, 1": lambda *_: setting("yes", False),
    "NAME is 'B': choose one of A, C": lambda *_: setting("B", "A", ["A", "C"]),
    "unknown model 'Model9'.*Model1, Model2, Model3": lambda *_: create_model("Model9"),
    "none.pt is no checkpoint of a run .*train first": lambda _, f: utils.read_checkpoint(f / "none.pt"),
    "none.png is not an image that can be read .*No such": lambda _, folder: predict(folder / "none.png"),
    " is not an image that can be read .*Is a directory": lambda _, folder: predict(folder),
    "text is not an image that can be read": lambda _, folder: predict(folder / "text"),
    "the image shows no digit: it is .almost.": lambda *_: predict(Image.new("L", (50, 50), 128)),
    "the image shows no digit": lambda *_: predict(Image.new("RGBA", (50, 50), (0, 0, 0, 0))),
}


@pytest.mark.parametrize("message, act", BAD.items())
def test_bad_input_gives_one_line(small, tmp_path, message, act):
    (tmp_path / "text").write_text("3")
    with pytest.raises((ValueError, IndexError), match=f"^.*{message}.*$"):  # one line
        act(small, tmp_path)

"""Bad input: one line that says what is wrong and what to do."""

import os
from unittest.mock import patch

from PIL import Image
import pytest

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


BAD = {  # what is said: what is done, given `small` and a folder
    "10 images in batches of 0: give at least 1": lambda small, _: load(small(10), batch_size=0),
    "0 images in batches of 50": lambda small, _: load(small(0)),
    "run from 0 to 10: digits": lambda small, _: load(small(99), target=10),
    "run from -1 to 9": lambda small, _: load(small(99), target=-1),
    "NAME is 'many': give a whole number": lambda *_: setting("many", 15),
    "NAME is '-1': give a whole number": lambda *_: setting("-1", 15),
    "NAME is '0': give a whole number from 1 up": lambda *_: setting("0", 15),
    "NAME is 'yes': choose one of 0, 1": lambda *_: setting("yes", False),
    "NAME is 'B': choose one of A, C": lambda *_: setting("B", "A", ["A", "C"]),
    "^unknown model 'Model9'.*Model1, Model2, Model3": lambda *_: create_model("Model9"),
    "none.png is not an image that can be read .*No such": lambda _, folder: predict(folder / "none.png"),
    "folder is not an image that can be read": lambda _, folder: predict(folder),
    "text is not an image that can be read": lambda _, folder: predict(folder / "text"),
    "the image shows no digit: it is .almost.": lambda *_: predict(Image.new("L", (50, 50), 128)),
    "the image shows no digit": lambda *_: predict(Image.new("RGBA", (50, 50), (0, 0, 0, 0))),
}


@pytest.mark.parametrize("message, act", BAD.items())
def test_bad_input_gives_one_line(small, tmp_path, message, act):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "text").write_text("3")
    with pytest.raises(ValueError, match=message) as error:
        act(small, folder)
    assert "\n" not in str(error.value)

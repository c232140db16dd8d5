"""Mistakes, pictures of digits, and figures: the numbers in them, not only that they are drawn."""

from PIL import Image
import pytest
import torch
from torch import nn

from model import create_model
import utils


def test_mistakes_are_found_sorted_and_counted(small, figures):
    """Six images, of which numbers 1, 3 and 4 are taken for something else, 4 most confidently."""
    dataset = small(6)
    dataset.targets = torch.tensor([0, 1, 2, 2, 9, 9])
    guesses, chances = [0, 7, 2, 0, 4, 9], [0.9, 0.5, 0.6, 0.4, 0.8, 0.7]
    answers = torch.stack([torch.full((10,), (1 - p) / 9) for p in chances])
    answers[torch.arange(6), guesses] = torch.tensor(chances)
    batches = iter(answers.log().split(4))
    model = type("Scripted", (nn.Module,), {"forward": lambda self, x: next(batches)})()
    confusion, found = utils.find_mistakes(model, "cpu", utils.BatchLoader(dataset, 4, "cpu"))
    images, target, predicted, probability = zip(*found)
    assert (target, predicted) == ((9, 1, 2), (4, 7, 0))
    assert probability == pytest.approx([0.8, 0.5, 0.4])
    assert torch.equal(torch.stack(images), utils.BatchLoader(dataset, 6, "cpu").data[[4, 1, 3]])
    counts = {(0, 0): 1, (1, 7): 1, (2, 2): 1, (2, 0): 1, (9, 4): 1, (9, 9): 1}
    assert {tuple(place): confusion[tuple(place)] for place in confusion.nonzero().tolist()} == counts
    utils.plot_confusion(confusion, "Model3 on MNIST")
    figure, metadata = figures[0]
    shown = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert len(shown) == 100 and shown[7, 1] == "1" and shown[0, 0] == "1" and shown[5, 5] == "·"
    assert figure.axes[0].get_yticklabels()[2].get_text() == "2  (50.0 %)"
    assert "3 mistakes" in metadata["image/png"]["alt"]


def test_digits_are_captioned_told_in_words_and_saved_only_where_asked(small, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = small(20)
    for folder in ("", str(tmp_path)):
        assert not list(tmp_path.rglob("*.png"))
        monkeypatch.setenv("S7_FIGURES", folder)
        utils.plot_digits(dataset.data[:3], ["9→4  80%", 1, 2], "three mistakes", "mistakes")
    assert [path.name for path in tmp_path.rglob("*.png")] == ["mistakes.png"]
    figure, metadata = figures[0]
    assert [axis.get_title() for axis in figure.axes][:4] == ["9→4  80%", "1", "2", ""]
    assert (figure.axes[2].images[0].get_array() == dataset.data[2].numpy()).all()
    assert metadata["image/png"]["alt"] == "three mistakes: 9→4  80%, 1, 2"


def test_curves_show_the_history(figures):
    columns = [0.5, 0.2, 0.1], [80.0, 90.0, 95.0], [0.3, 0.1, 0.2], [85.0, 96.5, 96.0], [0.1, 0.1, 0.01]
    history = utils.History(*columns, [1, 1, 1])
    utils.plot_history(history, "Model3 on MNIST")
    figure, metadata = figures[0]
    drawn = [list(line.get_ydata()) for axis in figure.axes for line in axis.lines]
    assert drawn == [columns[i] for i in (0, 2, 1, 3, 4)]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["train", "test"]
    assert all(axis.get_xlabel() == "epoch" and axis.get_ylabel() for axis in figure.axes)
    assert "best test 96.50 %" in metadata["image/png"]["alt"]


def test_the_result():
    cases = {(99.3, 99.4, 99.5): 2, (99.5, 99.5): 1, (99.5, 99.39, 99.4): 3, (99.5, 99.3): None, (): None}
    assert all(utils.held_from(accuracies) == epoch for accuracies, epoch in cases.items())
    test_acc = [99.1, 98.8, 99.2, 99.41, 99.43, 99.4]
    history = utils.History([0.1] * 6, [98.0] * 6, [0.1] * 6, test_acc, [0.1] * 5 + [0.01], [1] * 6)
    text = utils.result(history, "Model3 on MNIST")
    assert text.startswith("Model3 on MNIST: 6 epochs, learning rate from 0.1 to 0.01\n")
    assert "train 98.00 %, test 99.40 %; best test 99.43 %" in text
    assert "worst test of the last five epochs: 98.80 %" in text and text.endswith("held from epoch 4")


def bar(width=200, height=300, box=(80, 50, 110, 250), mode="L", ink=255, paper=0):
    """A picture of one upright bar."""
    image = Image.new(mode, (width, height), paper)
    image.paste(ink, box)
    return image


def test_a_bar_is_scaled_to_20_and_centred_by_mass():
    """200 × 30 pixels become 20 × 3, their middle at pixel (14, 14): worked out by hand."""
    pixels = (utils.prepare_digit(bar()) * utils.STD + utils.MEAN)[0, 0]
    expected = torch.zeros(28, 28)
    expected[4:24, 13:16] = 1  # rows 4 to 23 have their middle at 13.5, a tie
    torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=0)
    picture = bar()
    picture.paste(255, (110, 50, 180, 90))  # a flag at the top: the mass lies up and to the right
    pixels = (utils.prepare_digit(picture) * utils.STD + utils.MEAN)[0, 0].clamp(min=0)
    middle = [(pixels.sum(1 - d) * torch.arange(28)).sum() / pixels.sum() for d in (0, 1)]
    assert all(abs(m - 14) <= 0.51 for m in middle)


PICTURES = {
    "inverted": bar(ink=0, paper=255),
    "colour": bar(mode="RGB", ink=(200, 30, 30), paper=(250, 240, 200)),
    "black on nothing": bar(mode="RGBA", ink=(0, 0, 0, 255), paper=(0, 0, 0, 0)),
    "white on nothing": bar(mode="RGBA", ink=(255, 255, 255, 255), paper=(255, 255, 255, 0)),
    "LA": bar(mode="LA", ink=(0, 255), paper=(255, 0)),
    "1 bit": bar(mode="1", ink=1),
    "CMYK": bar(mode="CMYK", ink=(0, 0, 0, 255), paper=(0, 0, 0, 0)),
    "I": bar(mode="I", ink=60000, paper=100),
    "I;16": bar(mode="I;16", ink=60000, paper=100),
    "F": bar(mode="F", ink=1.0, paper=0.0),
    "palette": bar().convert("P"),
    "off centre": bar(width=600, height=900, box=(330, 500, 360, 700)),
    "small": bar(width=40, height=40, box=(1, 1, 4, 21)),
}


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_mode_polarity_and_place_make_no_difference(picture):
    torch.testing.assert_close(utils.prepare_digit(picture), utils.prepare_digit(bar()), atol=0.02, rtol=0)


def test_an_mnist_image_comes_back_as_it_was(small):
    """Enlarged eight times and shifted, most digits give nearly the same pixels."""
    differences = []
    for image in small(20).data.numpy():
        glyph, paper = Image.fromarray(image), Image.new("L", (500, 400))
        paper.paste(glyph.resize((224, 224), Image.BICUBIC), (200, 30))
        difference = utils.prepare_digit(paper) - utils.prepare_digit(glyph)
        differences.append(difference.abs().mean().item() * utils.STD)
    assert sorted(differences)[10] < 0.03


def test_predict_returns_and_the_figure_shows_the_models_probabilities(tmp_path, figures):
    bar().save(tmp_path / "bar.png")
    model = create_model("Model3")
    expected = model.eval()(utils.prepare_digit(bar())).exp()[0]
    for image in (tmp_path / "bar.png", str(tmp_path / "bar.png"), bar()):
        probabilities = utils.predict(model.train(), image)
        torch.testing.assert_close(probabilities, expected)
        utils.plot_prediction(image, probabilities)
        picture, prepared, bars = figures.pop()[0].axes
        assert [patch.get_height() for patch in bars.patches] == pytest.approx(expected.tolist())
        assert bars.get_title() == f"prediction: {expected.argmax()} ({100 * expected.max():.1f}%)"
        assert prepared.images[0].get_array().shape == (28, 28)
        assert picture.images[0].get_array().shape[:2] == (300, 200)

"""Data: the loader and the augmentation against torchvision, the stand-in, and MNIST's files."""

import gzip
import socket
import threading
from functools import partial
from hashlib import md5
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

import utils

# ---- data sets and loader ----


def targets_of_one_epoch(loader):
    return torch.cat([target for _, target in loader])


def test_part_of_a_digit_set_has_its_name_and_matching_labels(small):
    dataset = small(10)
    part = dataset[torch.tensor([7, 0])]
    assert part.name == dataset.name
    assert len(part) == 2
    assert torch.equal(part.images[0], dataset.images[7])
    assert part.labels.tolist() == [dataset.labels[7], dataset.labels[0]]


def test_loader_matches_torchvision(small):
    dataset = small(300)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    samples = []
    for image, label in zip(dataset.images, dataset.labels, strict=True):
        samples.append((transform(Image.fromarray(image.numpy())), label))
    reference = DataLoader(samples, batch_size=128)
    loader = utils.BatchLoader(dataset, 128, "cpu")
    for (data, target), (expected, labels) in zip(loader, reference, strict=True):
        assert data.dtype == torch.float32
        torch.testing.assert_close(data, expected, atol=1e-6, rtol=0)
        assert torch.equal(target, labels)


@pytest.mark.parametrize(("count", "sizes"), [(300, [128, 128, 44]), (256, [128, 128]), (5, [5])])
def test_loader_yields_all_images_in_batches(small, count, sizes):
    loader = utils.BatchLoader(small(count), 128, "cpu")
    assert len(loader) == len(sizes)
    assert [len(target) for _, target in loader] == sizes


def test_loader_leaves_the_data_set_unchanged(small):
    dataset = small(20)
    before = dataset.images.clone()
    for _ in utils.BatchLoader(dataset, 10, "cpu", shuffle=True):
        pass
    assert torch.equal(dataset.images, before)


def test_shuffle_is_a_new_permutation_every_epoch(small):
    loader = utils.BatchLoader(small(300), 128, "cpu", shuffle=True)
    loader.target = torch.arange(300)
    first = targets_of_one_epoch(loader)
    second = targets_of_one_epoch(loader)
    assert not torch.equal(first, torch.arange(300))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, torch.arange(300))
    assert torch.equal(second.sort().values, torch.arange(300))


def test_shuffled_images_keep_their_labels(small):
    loader = utils.BatchLoader(small(300), 128, "cpu", shuffle=True)
    loader.target = torch.arange(300)
    for data, target in loader:
        assert torch.equal(data, loader.data[target])


def test_every_batch_is_augmented(small):
    augmentation = partial(utils.random_affine, degrees=10, shift=0.1, scale=0.1)
    loader = utils.BatchLoader(small(20), 10, "cpu", augmentation=augmentation, augmented_epochs=1)
    torch.manual_seed(1)
    batches = list(loader)
    torch.manual_seed(1)
    for number, (data, target) in enumerate(batches):
        images = slice(10 * number, 10 * number + 10)
        assert torch.equal(data, augmentation(loader.data[images]))
        assert torch.equal(target, loader.target[images])


@pytest.mark.parametrize(("epoch", "is_augmented"), [(1, True), (2, True), (3, False)])
def test_augmentation_ends_after_the_augmented_epochs(small, epoch, is_augmented):
    loader = utils.BatchLoader(small(5), 5, "cpu", augmentation=torch.neg, augmented_epochs=2)
    loader.set_epoch(epoch)
    data, _ = next(iter(loader))
    assert torch.equal(data, -loader.data) == is_augmented
    assert torch.equal(data, loader.data) != is_augmented


def test_no_epoch_is_augmented_by_default(small):
    loader = utils.BatchLoader(small(5), 5, "cpu", augmentation=torch.neg)
    data, _ = next(iter(loader))
    assert torch.equal(data, loader.data)


def test_loader_describes_itself(small):
    """The description of a run contains it."""
    dataset = utils.DigitSet("MNIST", small(1200).images, small(1200).labels)
    augmentation = partial(utils.random_affine, degrees=10)
    loader = utils.BatchLoader(dataset, 128, "cpu", augmentation=augmentation, augmented_epochs=9)
    augmented = "MNIST, 1,200 images in batches of 128, random_affine(degrees=10) until epoch 9"
    assert repr(loader) == augmented
    assert repr(utils.BatchLoader(dataset, 128, "cpu")) == "MNIST, 1,200 images in batches of 128"


# ---- augmentation ----


def test_affine_matches_torchvision_with_the_amounts_of_each_image(small):
    images = small(5).images
    amounts = torch.tensor(  # degrees clockwise, pixels to the right, pixels down, size
        [[30, 0, 0, 1.0], [-7, 0, 0, 1.0], [0, 3, -2, 1.0], [0, 0, 0, 1.3], [25, -1, 4, 0.8]]
    )
    data = utils.normalize(images)
    results = utils.affine(data, amounts[:, 0], amounts[:, 1:3] / 28, amounts[:, 3])
    for image, result, (angle, right, down, size) in zip(images, results, amounts.tolist(), strict=True):
        pixels = image.unsqueeze(0) / 255
        expected = functional.affine(
            pixels, angle, [right, down], size, [0.0, 0.0], InterpolationMode.BILINEAR
        )
        torch.testing.assert_close(result * 0.3081 + 0.1307, expected, atol=1e-4, rtol=0)


def test_affine_fills_with_black():
    white = utils.normalize(torch.full((1, 28, 28), 255, dtype=torch.uint8))
    shift = torch.tensor([[0.5, 0.0]])
    result = utils.affine(white, torch.zeros(1), shift, torch.ones(1))
    black = torch.full((1, 28, 14), -0.1307 / 0.3081)
    torch.testing.assert_close(result[0, :, :, :14], black)


def test_random_amounts_are_uniform_and_independent(monkeypatch):
    drawn = []
    monkeypatch.setattr(utils, "affine", lambda *arguments: drawn.extend(arguments))
    utils.random_affine(torch.zeros(5000, 1, 1, 1), degrees=10, shift=0.06, scale=0.05)
    _, angle, shift, size = drawn
    relative = torch.stack([angle / 10, shift[:, 0] / 0.06, shift[:, 1] / 0.06, (size - 1) / 0.05])
    assert relative.shape == (4, 5000)
    for values in relative:
        assert -1 - 1e-4 <= values.min() < -0.99
        assert 0.99 < values.max() <= 1 + 1e-4
        assert values.mean() == pytest.approx(0, abs=0.04)
        assert values.var() == pytest.approx(1 / 3, abs=0.03)  # of a uniform value
    assert (torch.corrcoef(relative) - torch.eye(4)).abs().max() < 0.1


# ---- the stand-in ----


@pytest.mark.parametrize(("train", "count"), [(True, 6000), (False, 1000)])
def test_standin_has_mnist_format(train, count):
    dataset = utils.draw_standin(train)
    assert dataset.images.shape == (count, 28, 28)
    assert dataset.images.dtype == torch.uint8
    assert dataset.labels.shape == (count,)
    assert dataset.labels.dtype == torch.int64
    assert torch.bincount(dataset.labels, minlength=10).min() > 0.07 * count


def test_standin_is_white_on_black():
    images = utils.draw_standin(train=False).images.flatten(1)
    assert images.max(dim=1).values.min() > 200
    assert images.median(dim=1).values.max() == 0


def test_standin_is_identical_in_every_run_and_leaves_the_random_state_alone():
    first = utils.draw_standin(train=False)
    torch.rand(7)
    before = torch.get_rng_state()
    second = utils.draw_standin(train=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


def test_training_and_test_standin_have_different_images():
    train_images = utils.draw_standin(train=True).images[:1000]
    assert not torch.equal(train_images, utils.draw_standin(train=False).images)


def test_standin_is_used_with_a_warning_if_mnist_is_not_available(capsys):
    train_set, test_set = utils.load_data()
    text = capsys.readouterr().out
    assert "*** THIS IS NOT MNIST" in text
    assert "refused" in text  # the reason
    assert "MNIST_ROOT" in text  # the remedy
    assert "not MNIST" in train_set.name
    assert "not MNIST" in test_set.name


@pytest.mark.parametrize(("standin", "variable"), [(False, ""), (False, "1"), (True, "0")])
def test_standin_can_be_disabled_by_argument_or_environment_variable(monkeypatch, standin, variable):
    monkeypatch.setenv("S7_STANDIN", variable)
    with pytest.raises(RuntimeError, match="train-images-idx3-ubyte"):
        utils.load_data(standin)


def test_requested_standin_is_used_instead_of_mnist(mnist, monkeypatch, capsys):
    monkeypatch.setenv("S7_STANDIN", "1")
    train_set, test_set = utils.load_data()
    assert len(train_set) == 6000
    assert len(test_set) == 1000
    assert "S7_STANDIN" in capsys.readouterr().out


# ---- MNIST's files ----

FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


class MiniatureMNIST:
    """Four valid files in MNIST's format, with few images, in the folder `raw`."""

    def __init__(self, root, train_set, test_set):
        self.train_set = train_set
        self.test_set = test_set
        self.raw = root / "MNIST" / "raw"
        self.raw.mkdir(parents=True)
        arrays = [train_set.images, train_set.labels.byte(), test_set.images, test_set.labels.byte()]
        self.contents = {}
        for name, array in zip(FILES, arrays, strict=True):
            header = bytes([0, 0, 8, array.dim()])
            for size in array.shape:
                header += size.to_bytes(4, "big")
            self.contents[name] = header + array.numpy().tobytes()
            (self.raw / name).write_bytes(self.contents[name])


@pytest.fixture
def mnist(tmp_path, monkeypatch, small):
    """Return a `MiniatureMNIST` that is read in place of MNIST, with no mirror."""
    miniature = MiniatureMNIST(tmp_path, small(50), small(20, train=False))
    digests = {name: md5(content).hexdigest() for name, content in miniature.contents.items()}
    monkeypatch.setattr(utils, "MNIST_MD5", digests)
    return miniature


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(mnist, tmp_path, monkeypatch):
    """Serve a folder with the compressed files of the miniature MNIST; return the folder."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name, content in mnist.contents.items():
        archive = gzip.compress(content)
        (folder / f"{name}.gz").write_bytes(archive)
        resources.append((f"{name}.gz", md5(archive).hexdigest()))
    monkeypatch.setattr(utils.MNIST, "resources", resources)
    with HTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        monkeypatch.setattr(utils.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def assert_mnist_is_read(mnist):
    train_set, test_set = utils.load_data(standin=False)
    assert train_set.name == test_set.name == "MNIST"
    assert torch.equal(train_set.images, mnist.train_set.images)
    assert torch.equal(train_set.labels, mnist.train_set.labels)
    assert torch.equal(test_set.images, mnist.test_set.images)
    assert torch.equal(test_set.labels, mnist.test_set.labels)


def assert_error_names(name):
    """Load MNIST; the error is one line with the file and the remedy. Return the line."""
    with pytest.raises(RuntimeError, match=f"{name}.*MNIST_ROOT") as caught:
        utils.load_data(standin=False)
    line = str(caught.value)
    assert "\n" not in line
    return line


damaged = pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(FILES[0], lambda content: None, id="missing"),
        pytest.param(FILES[1], lambda content: b"", id="empty"),
        pytest.param(FILES[2], lambda content: content[: len(content) // 2], id="truncated"),
        pytest.param(FILES[3], lambda content: content[:-1] + b"\xff", id="one byte changed"),
        pytest.param(FILES[0], lambda content: b"<!DOCTYPE html>Sign in", id="an HTML page"),
    ],
)


def damage_file(mnist, name, damage):
    """Write what `damage` makes of a file's content; delete the file if that is None."""
    path = mnist.raw / name
    content = damage(mnist.contents[name])
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def test_mnist_is_read_from_the_folder_without_a_word(mnist, capfd):
    assert_mnist_is_read(mnist)
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == ""


@pytest.mark.parametrize("root", [pytest.param(None, id="unset"), pytest.param("", id="empty")])
def test_default_folder_is_data(mnist, tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MNIST_ROOT")
    if root is not None:
        monkeypatch.setenv("MNIST_ROOT", root)
    (tmp_path / "data").mkdir()
    (tmp_path / "MNIST").rename(tmp_path / "data" / "MNIST")
    assert_mnist_is_read(mnist)


def test_tilde_in_the_folder_is_expanded(mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("USERPROFILE", str(tmp_path.parent))  # Windows
    monkeypatch.setenv("MNIST_ROOT", f"~/{tmp_path.name}")
    assert_mnist_is_read(mnist)


def test_processed_folder_of_old_versions_is_not_read(mnist):
    """Old torchvision versions wrote it, without checksums."""
    processed = mnist.raw.parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28), torch.zeros(3)), processed / name)
    assert_mnist_is_read(mnist)


@damaged
def test_damaged_file_without_network_is_reported(mnist, name, damage):
    damage_file(mnist, name, damage)
    assert "refused" in assert_error_names(name)


@damaged
def test_damaged_file_is_downloaded_again(mnist, mirror, name, damage):
    damage_file(mnist, name, damage)
    assert_mnist_is_read(mnist)
    assert (mnist.raw / name).read_bytes() == mnist.contents[name]


def test_damaged_download_is_reported(mnist, mirror):
    """All files are missing; the first two are downloaded, the third is cut off."""
    for name in FILES:
        (mnist.raw / name).unlink()
    archive = mirror / f"{FILES[2]}.gz"
    archive.write_bytes(archive.read_bytes()[:100])
    assert_error_names(FILES[2])


def test_damaged_file_without_network_gives_the_standin(mnist, capsys):
    (mnist.raw / FILES[1]).write_bytes(b"")
    train_set, _ = utils.load_data()
    assert "not MNIST" in train_set.name
    assert FILES[1] in capsys.readouterr().out


def test_silent_mirror_times_out(mnist, monkeypatch):
    assert utils.MIRROR_TIMEOUT == 15
    monkeypatch.setattr(utils, "MIRROR_TIMEOUT", 0.1)
    (mnist.raw / FILES[0]).unlink()
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        monkeypatch.setattr(utils.MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        assert "timed out" in assert_error_names(FILES[0])
    assert socket.getdefaulttimeout() is None


def test_folder_that_cannot_be_created_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path / "file"))
    assert_error_names(FILES[0])

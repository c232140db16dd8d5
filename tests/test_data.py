"""Data: the loader and the augmentation against torchvision, the stand-in, and MNIST's files."""

import gzip
import socket
from functools import partial
from hashlib import md5
from http.server import HTTPServer, SimpleHTTPRequestHandler
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, random_split
from torchvision import datasets, transforms
from torchvision.transforms import functional, v2
from torchvision.transforms.functional import InterpolationMode

import utils

# ---- data sets and loaders ----


@pytest.fixture
def expected(small):
    """Return 300 images as torchvision's transforms normalize them."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    return torch.stack([transform(Image.fromarray(image.numpy())) for image in small(300).images])


def collect(loader):
    """Return all images and labels of one epoch."""
    data, target = zip(*loader, strict=True)
    return torch.cat(data), torch.cat(target)


@pytest.mark.parametrize("create", [DataLoader, partial(utils.BatchLoader, device="cpu")])
def test_loader_gives_the_images_of_torchvision_in_batches(small, expected, create):
    dataset = small(300)
    loader = create(dataset, batch_size=128)
    assert len(loader) == 3
    assert [len(target) for _, target in loader] == [128, 128, 44]
    data, target = collect(loader)
    assert data.dtype == torch.float32
    assert target.dtype == torch.int64
    torch.testing.assert_close(data, expected, atol=1e-6, rtol=0)
    assert torch.equal(target, small(300).labels)
    assert torch.equal(dataset.images, small(300).images)  # unchanged


def test_part_of_a_digit_set_is_a_digit_set(small):
    dataset = utils.DigitSet("digits", small(10).images, small(10).labels)
    for index in (slice(2, 9, 3), torch.tensor([2, 5, 8]), [2, 5, 8]):
        part = dataset[index]
        assert part.name == "digits"
        assert len(part) == 3
        assert torch.equal(part.images[1], dataset.images[5])
        assert part.labels[1] == dataset.labels[5]
    for index in (5, np.int64(5), torch.tensor(5)):
        image, label = dataset[index]
        assert torch.equal(image, utils.normalize(dataset.images[5]))
        assert label == dataset.labels[5]


def test_arrays_and_lists_make_the_set_that_tensors_make(small):
    images, labels = small(3).images, small(3).labels
    dataset = utils.DigitSet("arrays", images.numpy(), labels.tolist())
    assert torch.equal(dataset.images, images)
    assert torch.equal(dataset.labels, labels)


def test_validation_split_is_the_one_of_the_recorded_runs():
    labels = torch.arange(60_000) * 7919 % 10007 % 10  # not periodic
    torch.manual_seed(5)
    dataset = utils.DigitSet("labels", torch.zeros(1, 28, 28).byte().expand(60_000, 28, 28), labels)
    train_set, validation_set = utils.split(dataset)
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(train_set.labels, labels[order[:50_000]])
    assert torch.equal(validation_set.labels, labels[order[50_000:]])


def test_shuffle_is_a_new_permutation_in_every_epoch(small):
    dataset = small(300)
    dataset.labels = torch.arange(300)  # tell the images apart
    loader = utils.BatchLoader(dataset, 128, "cpu", shuffle=True)
    data, first = collect(loader)
    _, second = collect(loader)
    assert not torch.equal(first, second)
    for order in (first, second):
        assert torch.equal(order.sort().values, torch.arange(300))
    assert torch.equal(data, utils.normalize(dataset.images[first]))  # images keep their labels


def test_every_batch_is_augmented_and_a_second_loader_gives_the_original_images(small, expected):
    loader = utils.BatchLoader(small(300), 128, "cpu", augmentation=torch.neg)
    original = utils.without_augmentation(loader)
    torch.testing.assert_close(collect(original)[0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(collect(loader)[0], -expected, atol=1e-6, rtol=0)
    batches = [(expected, small(300).labels)]
    assert utils.without_augmentation(batches) is batches


def test_data_that_are_no_digits_are_refused(small):
    images = small(3).images
    with pytest.raises(TypeError, match="float32.*uint8"):
        utils.DigitSet("floats", images.float(), [1, 2, 3])
    for shaped in (images[..., None], images[:, None], images[:2]):
        with pytest.raises(ValueError, match=r"images are .* and labels \(3,\): give .* \(N, 28, 28\)"):
            utils.DigitSet("shapes", shaped, [1, 2, 3])
    with pytest.raises(ValueError, match="labels are from 1 to 10, instead of 0 to 9"):
        utils.DigitSet("classes", images, [1, 2, 10])
    with pytest.raises(TypeError, match="Subset.*DigitSet.*DataLoader"):
        utils.BatchLoader(random_split(small(10), [4, 6])[0], 2, "cpu")


@pytest.mark.parametrize(
    "augmentation",
    [
        transforms.RandomRotation(10),
        torch.nn.Sequential(v2.RandomRotation(10)),
        transforms.RandomHorizontalFlip(),
    ],
)
def test_augmentation_that_changes_all_images_of_a_batch_alike_is_refused(small, augmentation):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="alike.*DataLoader"):
        utils.BatchLoader(small(10), 2, "cpu", augmentation=augmentation)
    assert torch.equal(torch.get_rng_state(), before)


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
        moved = functional.affine(pixels, angle, [right, down], size, [0.0, 0.0], InterpolationMode.BILINEAR)
        torch.testing.assert_close(result * 0.3081 + 0.1307, moved, atol=1e-4, rtol=0)


def test_random_amounts_are_uniform_and_independent(monkeypatch):
    drawn = []
    monkeypatch.setattr(utils, "affine", lambda *arguments: drawn.extend(arguments))
    utils.random_affine(torch.zeros(5000, 1, 1, 1), degrees=10, shift=0.06, scale=0.05)
    _, angle, shift, size = drawn
    relative = torch.stack([angle / 10, shift[:, 0] / 0.06, shift[:, 1] / 0.06, (size - 1) / 0.05])
    limits = torch.stack([relative.amin(dim=1), relative.amax(dim=1)])
    torch.testing.assert_close(limits, torch.tensor([[-1.0], [1.0]]).expand(2, 4), atol=0.01, rtol=0)
    covariance = torch.eye(4) / 3  # of independent values that are uniform from -1 to 1
    torch.testing.assert_close(torch.cov(relative), covariance, atol=0.03, rtol=0)


# ---- the stand-in ----


def test_standin_has_mnist_format_and_is_identical_in_every_run():
    before = torch.get_rng_state()
    train_set = utils.draw_standin(train=True)
    test_set = utils.draw_standin(train=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(utils.draw_standin(train=False).images, test_set.images)
    assert not torch.equal(train_set.labels[:1000], test_set.labels)
    for dataset, count in ((train_set, 6000), (test_set, 1000)):
        assert dataset.images.shape == (count, 28, 28)
        assert torch.bincount(dataset.labels, minlength=10).min() > 0.07 * count
        pixels = dataset.images.flatten(1)
        assert pixels.max(dim=1).values.min() > 200  # white on black
        assert pixels.median(dim=1).values.max() == 0


@pytest.mark.parametrize(("requested", "reason"), [("", "refused"), (" 1 ", "S7_STANDIN=1")])
def test_standin_is_used_with_a_warning_and_the_remedy(monkeypatch, capsys, requested, reason):
    """Without MNIST and a network, or on request."""
    monkeypatch.setenv("S7_STANDIN", requested)
    train_set, test_set = utils.load_data()
    text = capsys.readouterr().out
    assert "*** THIS IS NOT MNIST" in text  # torchvision 0.18 prints first why a download failed
    assert reason in text
    assert "MNIST_ROOT" in text
    assert "not MNIST" in train_set.name
    assert [len(train_set), len(test_set)] == [6000, 1000]


@pytest.mark.parametrize(("standin", "variable"), [(False, ""), (False, "1"), (True, " 0")])
def test_standin_can_be_disabled(monkeypatch, standin, variable):
    monkeypatch.setenv("S7_STANDIN", variable)
    with pytest.raises(RuntimeError, match="^MNIST in .* missing"):
        utils.load_data(standin)


def test_standin_is_requested_by_0_or_1_only(monkeypatch):
    monkeypatch.setenv("S7_STANDIN", "False")
    with pytest.raises(ValueError, match="S7_STANDIN is 'False'.*0 or 1"):
        utils.load_data()


# ---- MNIST's files ----

FILES = list(utils.MNIST_MD5)


@pytest.fixture
def mnist(tmp_path, monkeypatch, small):
    """Write four valid files with few images, read in place of MNIST; return folder, contents and sets."""
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path / "data"))
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    train_set = small(50)
    test_set = small(20, train=False)
    contents = {}
    arrays = [train_set.images, train_set.labels.byte(), test_set.images, test_set.labels.byte()]
    for name, array in zip(FILES, arrays, strict=True):
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        contents[name] = bytes([0, 0, 8, array.dim()]) + sizes + array.numpy().tobytes()
        (folder / name).write_bytes(contents[name])
    digests = {name: md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(utils, "MNIST_MD5", digests)
    return SimpleNamespace(folder=folder, contents=contents, sets=[train_set, test_set])


@pytest.fixture
def mirror(mnist, tmp_path, monkeypatch):
    """Serve the compressed files; return the folder."""
    resources = []
    for name, content in mnist.contents.items():
        archive = tmp_path / f"{name}.gz"
        archive.write_bytes(gzip.compress(content))
        resources.append((archive.name, md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    with HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        Thread(target=server.serve_forever, args=(0.01,)).start()
        yield tmp_path
        server.shutdown()


def assert_mnist_is_read(mnist):
    """Load MNIST: it is what the four files contain."""
    for dataset, original in zip(utils.load_data(standin=False), mnist.sets, strict=True):
        assert dataset.name == "MNIST"
        assert torch.equal(dataset.images, original.images)
        assert torch.equal(dataset.labels, original.labels)
        assert dataset.labels.dtype == torch.int64


def assert_not_available(folder, reason):
    """Load MNIST: the error is one line with the folder, the reason and the remedy."""
    with pytest.raises(RuntimeError, match=f"^MNIST in {folder} [^\n]*{reason}[^\n]*MNIST_ROOT$"):
        utils.load_data(standin=False)


def test_mnist_is_read_from_mnist_root_or_data_without_a_word(mnist, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    for root in ("~/data", ""):
        monkeypatch.setenv("MNIST_ROOT", root)
        assert_mnist_is_read(mnist)
    monkeypatch.delenv("MNIST_ROOT")
    assert_mnist_is_read(mnist)
    assert capfd.readouterr() == ("", "")


def test_corrupted_file_is_replaced_by_a_verified_one_only(mnist, mirror):
    path = mnist.folder / FILES[3]
    corrupted = mnist.contents[FILES[3]][:-1] + b"\xff"  # the last label
    path.write_bytes(corrupted)
    archive = mirror / f"{FILES[2]}.gz"
    content = archive.read_bytes()
    archive.write_bytes(content[:100])
    assert_not_available(mnist.folder, "corrupted")
    assert path.read_bytes() == corrupted
    archive.write_bytes(content)
    assert_mnist_is_read(mnist)
    files = {path.name: path.read_bytes() for path in mnist.folder.iterdir()}
    assert files == mnist.contents  # and no temporary folder


def test_download_has_a_timeout(mnist, monkeypatch):
    (mnist.folder / FILES[0]).unlink()

    def download(root, download):
        raise TimeoutError(f"after {socket.getdefaulttimeout()} seconds")

    monkeypatch.setattr(datasets, "MNIST", download)
    assert_not_available(mnist.folder, "after 15.0 seconds")
    assert socket.getdefaulttimeout() is None


def test_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "MNIST").touch()
    assert_not_available(tmp_path / "MNIST" / "raw", "Error")

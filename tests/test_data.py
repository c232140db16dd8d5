"""Data: the loader against torchvision, the stand-in, and missing, corrupted or unreadable files."""

import builtins
import errno
import gzip
import re
import socket
import threading
from hashlib import md5
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

import utils

FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
TRAIN_COUNT = 50  # images of the miniature MNIST
TEST_COUNT = 20

# ---- data sets and loader ----


def reference_loader(dataset, batch_size):
    """Return a `DataLoader` that transforms each image as torchvision does."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    samples = []
    for image, label in zip(dataset.images, dataset.labels, strict=True):
        samples.append((transform(Image.fromarray(image.numpy())), label))
    return DataLoader(samples, batch_size=batch_size)


def index_as_target(loader):
    """Replace the labels of a loader by the index of each image."""
    loader.target = torch.arange(len(loader.target))


def targets_of_one_epoch(loader):
    return torch.cat([target for _, target in loader])


def test_slice_of_a_digit_set_is_a_digit_set_of_the_same_name(small):
    dataset = small(10)
    part = dataset[2:5]
    assert part.name == dataset.name
    assert len(part) == 3
    assert torch.equal(part.images, dataset.images[2:5])
    assert torch.equal(part.labels, dataset.labels[2:5])


def test_index_tensor_selects_images_with_their_labels(small):
    dataset = small(10)
    part = dataset[torch.tensor([7, 0])]
    assert torch.equal(part.images, torch.stack([dataset.images[7], dataset.images[0]]))
    assert part.labels.tolist() == [dataset.labels[7], dataset.labels[0]]


def test_loader_matches_torchvision(small):
    dataset = small(300)
    loader = utils.BatchLoader(dataset, 128, "cpu")
    reference = reference_loader(dataset, 128)
    for (data, target), (expected, labels) in zip(loader, reference, strict=True):
        assert data.dtype == torch.float32
        torch.testing.assert_close(data, expected, atol=1e-6, rtol=0)
        assert torch.equal(target, labels)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        pytest.param(300, [128, 128, 44], id="smaller last batch"),
        pytest.param(256, [128, 128], id="full last batch"),
        pytest.param(5, [5], id="single batch"),
    ],
)
def test_loader_yields_all_images_in_batches(small, count, sizes):
    loader = utils.BatchLoader(small(count), 128, "cpu")
    assert len(loader) == len(sizes)
    assert [len(target) for _, target in loader] == sizes


def test_loader_leaves_the_data_set_unchanged(small):
    dataset = small(20)
    images = dataset.images.clone()
    for _ in utils.BatchLoader(dataset, 10, "cpu", shuffle=True):
        pass
    assert torch.equal(dataset.images, images)


def test_shuffle_is_a_new_permutation_every_epoch(small):
    loader = utils.BatchLoader(small(300), 128, "cpu", shuffle=True)
    index_as_target(loader)
    first = targets_of_one_epoch(loader)
    second = targets_of_one_epoch(loader)
    assert not torch.equal(first, torch.arange(300))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, torch.arange(300))
    assert torch.equal(second.sort().values, torch.arange(300))


def test_shuffled_images_keep_their_labels(small):
    loader = utils.BatchLoader(small(300), 128, "cpu", shuffle=True)
    index_as_target(loader)
    for data, target in loader:
        assert torch.equal(data, loader.data[target])


def test_loader_augments_every_batch(small):
    augmentation = {"degrees": 10, "shift": 0.1, "scale": 0.1}
    dataset = small(20)
    original = list(utils.BatchLoader(dataset, 10, "cpu"))
    torch.manual_seed(1)
    augmented = list(utils.BatchLoader(dataset, 10, "cpu", augmentation=augmentation))
    torch.manual_seed(1)
    for (data, target), (result, labels) in zip(original, augmented, strict=True):
        assert torch.equal(result, utils.random_affine(data, **augmentation))
        assert torch.equal(labels, target)


def test_augmentation_can_be_changed_between_epochs(small):
    dataset = small(20)
    augmentation = {"degrees": 10, "shift": 0.1, "scale": 0.1}
    loader = utils.BatchLoader(dataset, 20, "cpu", augmentation=augmentation)
    augmented, _ = next(iter(loader))
    loader.augmentation = None
    original, _ = next(iter(loader))
    assert not torch.equal(augmented, original)
    assert torch.equal(original, utils.normalize(dataset.images))


@pytest.mark.parametrize(
    ("count", "batch_size"),
    [
        pytest.param(10, 0, id="batch size 0"),
        pytest.param(10, -5, id="negative batch size"),
        pytest.param(0, 50, id="no images"),
    ],
)
def test_empty_batches_are_rejected(small, count, batch_size):
    message = f"^{count} images in batches of {batch_size}: both must be at least 1$"
    with pytest.raises(ValueError, match=message):
        utils.BatchLoader(small(count), batch_size, "cpu")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        pytest.param(10, "^labels range from 0 to 10, but must be 0 to 9: ", id="too large"),
        pytest.param(-1, "^labels range from -1 to 9, but must be 0 to 9: ", id="negative"),
    ],
)
def test_labels_that_are_not_digits_are_rejected(small, label, message):
    dataset = small(99)
    dataset.labels[0] = label
    with pytest.raises(ValueError, match=message):
        utils.BatchLoader(dataset, 50, "cpu")


# ---- augmentation ----


@pytest.mark.parametrize(
    ("angle", "right", "down", "size"),
    [
        pytest.param(0, 0, 0, 1.0, id="unchanged"),
        pytest.param(30, 0, 0, 1.0, id="rotated clockwise"),
        pytest.param(-7, 0, 0, 1.0, id="rotated counterclockwise"),
        pytest.param(0, 3, 0, 1.0, id="shifted right"),
        pytest.param(0, 0, -2, 1.0, id="shifted up"),
        pytest.param(0, 0, 0, 1.3, id="enlarged"),
        pytest.param(0, 0, 0, 0.7, id="reduced"),
        pytest.param(25, -1, 4, 0.8, id="all at once"),
    ],
)
def test_affine_matches_torchvision(small, angle, right, down, size):
    pixels = small(4).images.unsqueeze(1) / 255
    expected = functional.affine(pixels, angle, [right, down], size, [0.0, 0.0], InterpolationMode.BILINEAR)
    shift = torch.tensor([[right, down]]) / 28
    data = utils.normalize(small(4).images)
    result = utils.affine(data, torch.full((4,), angle), shift.expand(4, 2), torch.full((4,), size))
    torch.testing.assert_close(result * 0.3081 + 0.1307, expected, atol=1e-4, rtol=0)


def test_affine_grid_matches_pytorch():
    theta = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = F.affine_grid(theta, (3, 1, 6, 9), align_corners=False)
    torch.testing.assert_close(utils.affine_grid(theta, 6, 9), expected)


def test_affine_applies_to_each_image_its_own_amounts(small):
    data = utils.normalize(small(2).images)
    angle = torch.tensor([10.0, -20.0])
    shift = torch.tensor([[0.1, 0.0], [0.0, -0.1]])
    size = torch.tensor([1.2, 0.9])
    result = utils.affine(data, angle, shift, size)
    first = utils.affine(data[:1], angle[:1], shift[:1], size[:1])
    second = utils.affine(data[1:], angle[1:], shift[1:], size[1:])
    torch.testing.assert_close(result, torch.cat([first, second]))


def test_affine_fills_with_black():
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    black = utils.normalize(torch.zeros(1, 1, 1, dtype=torch.uint8))
    shift = torch.tensor([[0.5, 0.0]])
    result = utils.affine(utils.normalize(white), torch.zeros(1), shift, torch.ones(1))
    torch.testing.assert_close(result[0, :, :, :14], black.expand(1, 1, 28, 14)[0])


def test_random_affine_differs_by_image(small):
    data = utils.normalize(small(1).images).expand(50, -1, -1, -1)
    augmented = utils.random_affine(data, degrees=10, shift=0.06, scale=0.06)
    assert len(torch.unique(augmented.flatten(1), dim=0)) == 50


@pytest.fixture
def amounts(monkeypatch):
    """Collect the amounts that 5,000 images are rotated, shifted and scaled by."""
    drawn = {}

    def collect(data, angle, shift, size):
        drawn["angle"] = angle
        drawn["right"] = shift[:, 0]
        drawn["down"] = shift[:, 1]
        drawn["size"] = size
        return data

    monkeypatch.setattr(utils, "affine", collect)
    utils.random_affine(torch.zeros(5000, 1, 28, 28), degrees=10, shift=0.06, scale=0.05)
    return drawn


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        pytest.param("angle", -10, 10, id="angle"),
        pytest.param("right", -0.06, 0.06, id="shift to the right"),
        pytest.param("down", -0.06, 0.06, id="shift down"),
        pytest.param("size", 0.95, 1.05, id="size"),
    ],
)
def test_random_amounts_fill_their_range(amounts, name, low, high):
    values = amounts[name]
    margin = 0.01 * (high - low)
    assert values.shape == (5000,)
    assert low - 1e-6 <= values.min() < low + margin
    assert high - margin < values.max() <= high + 1e-6
    assert values.mean() == pytest.approx((low + high) / 2, abs=2 * margin)


def test_random_amounts_are_independent(amounts):
    correlation = torch.corrcoef(torch.stack(list(amounts.values())))
    assert (correlation - torch.eye(4)).abs().max() < 0.1


# ---- the stand-in ----


@pytest.mark.parametrize(
    ("train", "count"), [pytest.param(True, 6000, id="train"), pytest.param(False, 1000, id="test")]
)
def test_standin_has_mnist_format(train, count):
    dataset = utils.draw_standin(train)
    assert dataset.images.shape == (count, 28, 28)
    assert dataset.images.dtype == torch.uint8
    assert dataset.labels.shape == (count,)
    assert dataset.labels.dtype == torch.int64
    assert torch.bincount(dataset.labels, minlength=10).min() > 0.07 * count
    assert "not MNIST" in dataset.name


def test_standin_is_white_on_black():
    images = utils.draw_standin(train=False).images
    assert images.flatten(1).max(dim=1).values.min() > 200
    assert images.flatten(1).median(dim=1).values.max() == 0


def test_standin_is_deterministic():
    first = utils.draw_standin(train=False)
    torch.rand(7)
    second = utils.draw_standin(train=False)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


def test_drawing_the_standin_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    utils.draw_standin(train=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_and_test_standin_have_different_images():
    train_images = utils.draw_standin(train=True).images[:1000]
    test_images = utils.draw_standin(train=False).images
    assert not torch.equal(train_images, test_images)


def test_standin_prints_a_warning(capsys):
    train_set, test_set = utils.load_data()
    text = capsys.readouterr().out
    assert "*** THIS IS NOT MNIST" in text
    assert "refused" in text  # the reason
    assert "MNIST_ROOT" in text  # the remedy
    assert "not MNIST" in train_set.name
    assert "not MNIST" in test_set.name


def test_standin_can_be_disabled_by_argument():
    with pytest.raises(RuntimeError, match="train-images-idx3-ubyte is missing"):
        utils.load_data(standin=False)


def test_standin_can_be_disabled_by_environment_variable(monkeypatch):
    monkeypatch.setenv("S7_STANDIN", "0")
    with pytest.raises(RuntimeError, match="train-images-idx3-ubyte is missing"):
        utils.load_data()


def test_argument_that_disables_the_standin_wins(mnist, monkeypatch):
    monkeypatch.setenv("S7_STANDIN", "1")
    train_set, _ = utils.load_data(standin=False)
    assert train_set.name == "MNIST"


def test_requested_standin_is_used_instead_of_mnist(mnist, monkeypatch, capsys):
    monkeypatch.setenv("S7_STANDIN", "1")
    train_set, test_set = utils.load_data()
    assert len(train_set) == 6000
    assert len(test_set) == 1000
    assert "THIS IS NOT MNIST: the stand-in was requested with S7_STANDIN=1" in capsys.readouterr().out


def test_unknown_request_for_the_standin_is_rejected(monkeypatch):
    monkeypatch.setenv("S7_STANDIN", "yes")
    with pytest.raises(ValueError, match="^STANDIN is 'yes': choose one of "):
        utils.load_data()


# ---- MNIST's files ----


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

    def modification_times(self):
        return {path: path.stat().st_mtime_ns for path in self.raw.iterdir()}


class Mirror(HTTPServer):
    """A server of the compressed files."""

    share = 1.0  # of each file's bytes, sent before the connection is dropped
    absent = ()  # files that are not found

    def __init__(self, archives):
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.archives = archives


class MirrorHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        if name in self.server.absent:
            self.send_error(404)
            return
        body = self.server.archives[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: int(self.server.share * len(body))])

    def log_message(self, *args):
        pass


@pytest.fixture
def mnist(tmp_path, monkeypatch, small):
    """Return a `MiniatureMNIST` that is read in place of MNIST, with no mirror."""
    miniature = MiniatureMNIST(tmp_path, small(TRAIN_COUNT), small(TEST_COUNT, train=False))
    digests = {name: md5(content).hexdigest() for name, content in miniature.contents.items()}
    monkeypatch.setattr(utils, "MNIST_MD5", digests)
    return miniature


@pytest.fixture
def mirror(mnist, monkeypatch):
    """Start a mirror of the miniature MNIST."""
    archives = {}
    resources = []
    for name, content in mnist.contents.items():
        archive = gzip.compress(content)
        archives[f"{name}.gz"] = archive
        resources.append((f"{name}.gz", md5(archive).hexdigest()))
    monkeypatch.setattr(utils.MNIST, "resources", resources)
    with Mirror(archives) as server:
        monkeypatch.setattr(utils.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def half(content):
    return content[: len(content) // 2]


def change_last_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def change_length(content):
    return content[:4] + bytes([0, 0, 0, 7]) + content[8:15]


def empty(content):
    return b""


def html(content):
    return b"<!DOCTYPE html><html><body>Sign in</body></html>"


each_file = pytest.mark.parametrize("name", FILES)
each_corruption = pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(None, id="missing"),
        pytest.param(empty, id="empty"),
        pytest.param(half, id="truncated"),
        pytest.param(change_last_byte, id="one byte changed"),
        pytest.param(change_length, id="another length"),
        pytest.param(html, id="an HTML page"),
    ],
)


def damage(mnist, name, corrupt):
    """Corrupt a file, or delete it if `corrupt` is None; return the start of the error message."""
    path = mnist.raw / name
    if corrupt is None:
        path.unlink()
        problem = "missing"
    else:
        path.write_bytes(corrupt(mnist.contents[name]))
        problem = "corrupted"
    return f"^{re.escape(str(path))} is {problem} and could not be downloaded "


ADVICE = r": check the network connection and rerun, place the original file there, or set MNIST_ROOT$"


def test_mnist_is_read_from_the_folder(mnist):
    train_set, test_set = utils.load_data()
    assert train_set.name == "MNIST"
    assert torch.equal(train_set.images, mnist.train_set.images)
    assert torch.equal(train_set.labels, mnist.train_set.labels)
    assert torch.equal(test_set.images, mnist.test_set.images)
    assert torch.equal(test_set.labels, mnist.test_set.labels)


def test_default_folder_is_data(mnist, tmp_path, monkeypatch):
    monkeypatch.delenv("MNIST_ROOT")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "MNIST").rename(tmp_path / "data" / "MNIST")
    train_set, _ = utils.load_data(standin=False)
    assert len(train_set) == TRAIN_COUNT


def test_tilde_in_the_folder_is_expanded(mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("USERPROFILE", str(tmp_path.parent))  # Windows
    monkeypatch.setenv("MNIST_ROOT", f"~/{tmp_path.name}")
    train_set, _ = utils.load_data(standin=False)
    assert len(train_set) == TRAIN_COUNT


def test_valid_files_are_not_written(mnist, mirror):
    before = mnist.modification_times()
    utils.load_data()
    assert mnist.modification_times() == before


def test_processed_folder_of_old_versions_is_not_read(mnist):
    """Old torchvision versions wrote it, without checksums."""
    processed = mnist.raw.parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28), torch.zeros(3)), processed / name)
    train_set, test_set = utils.load_data()
    assert len(train_set) == TRAIN_COUNT
    assert len(test_set) == TEST_COUNT


@each_file
@each_corruption
def test_bad_file_without_network_is_reported(mnist, name, corrupt):
    message = damage(mnist, name, corrupt)
    with pytest.raises(RuntimeError, match=rf"{message}.*refused.*{ADVICE}"):
        utils.load_data(standin=False)


@each_file
@each_corruption
def test_bad_file_is_reported_if_the_connection_is_dropped(mnist, mirror, name, corrupt):
    mirror.share = 0.5
    message = damage(mnist, name, corrupt)
    with pytest.raises(RuntimeError, match=rf"{message}.*{ADVICE}"):
        utils.load_data(standin=False)


@each_file
@each_corruption
def test_bad_file_is_downloaded_again(mnist, mirror, name, corrupt):
    damage(mnist, name, corrupt)
    train_set, test_set = utils.load_data(standin=False)
    assert (mnist.raw / name).read_bytes() == mnist.contents[name]
    assert torch.equal(train_set.images, mnist.train_set.images)
    assert torch.equal(test_set.labels, mnist.test_set.labels)


def test_bad_file_without_network_gives_the_standin(mnist, capsys):
    damage(mnist, FILES[1], change_last_byte)
    train_set, _ = utils.load_data()
    assert "not MNIST" in train_set.name
    assert f"{FILES[1]} is corrupted" in capsys.readouterr().out


def test_download_is_announced_in_one_line(mnist, mirror, capfd):
    """torchvision's progress bars would differ from run to run."""
    damage(mnist, FILES[0], None)
    utils.load_data(standin=False)
    output = capfd.readouterr()
    assert output.out == f"Downloading MNIST (11 MB) to {mnist.raw}\n"
    assert output.err == ""


def test_valid_files_print_nothing(mnist, capfd):
    utils.load_data(standin=False)
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == ""


def test_message_names_the_file_that_failed(mnist, mirror):
    """All files are missing; the first two are downloaded, the third one cannot be."""
    for name in FILES:
        (mnist.raw / name).unlink()
    mirror.absent = [f"{FILES[2]}.gz"]
    with pytest.raises(RuntimeError, match=rf"^\S.*{FILES[2]} is missing .*404.*{ADVICE}"):
        utils.load_data(standin=False)
    assert (mnist.raw / FILES[1]).exists()


def test_downloads_have_a_timeout(mnist, monkeypatch):
    damage(mnist, FILES[0], None)
    timeouts = []

    def download(self):
        timeouts.append(socket.getdefaulttimeout())

    monkeypatch.setattr(utils.datasets.MNIST, "download", download)
    with pytest.raises(RuntimeError):
        utils.load_data(standin=False)
    assert timeouts == [15]


def test_silent_mirror_times_out(mnist, monkeypatch):
    damage(mnist, FILES[0], None)
    monkeypatch.setattr(utils, "MIRROR_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        monkeypatch.setattr(utils.MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        with pytest.raises(RuntimeError, match=f"{FILES[0]} is missing .*timed out"):
            utils.load_data(standin=False)


def test_timeout_of_other_connections_is_restored(mnist):
    damage(mnist, FILES[0], None)
    with pytest.raises(RuntimeError):
        utils.load_data(standin=False)
    assert socket.getdefaulttimeout() is None


def test_folder_that_cannot_be_created_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="^.*file/MNIST/raw.*Not a directory.*set MNIST_ROOT$"):
        utils.load_data(standin=False)


@pytest.fixture
def unreadable(monkeypatch):
    """Return a function that takes the read permission from a file, even for the superuser."""

    def take_permission(path):
        real_open = builtins.open

        def open_others(file, *args, **kwargs):
            if str(file) == str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real_open(file, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", open_others)

    return take_permission


@each_file
def test_unreadable_file_is_reported(mnist, unreadable, name):
    path = mnist.raw / name
    unreadable(path)
    message = (
        f"^{re.escape(str(path))} cannot be read .Permission denied.: .*set MNIST_ROOT to another folder$"
    )
    with pytest.raises(RuntimeError, match=message):
        utils.load_data(standin=False)


def test_unreadable_file_gives_the_standin(mnist, unreadable, capsys):
    unreadable(mnist.raw / FILES[0])
    train_set, _ = utils.load_data()
    assert "not MNIST" in train_set.name
    assert "Permission denied" in capsys.readouterr().out


def test_unreadable_folder_is_reported(mnist, mirror, monkeypatch):
    """In a folder without permissions, no file is visible and none can be created."""
    for name in FILES:
        (mnist.raw / name).unlink()
    denied = PermissionError(errno.EACCES, "Permission denied", str(mnist.raw / f"{FILES[0]}.gz"))

    def deny(*args, **kwargs):
        raise denied

    monkeypatch.setattr(builtins, "open", deny)
    monkeypatch.setattr(Path, "exists", deny)  # as in Python versions before 3.14
    with pytest.raises(RuntimeError, match="^.*Permission denied.*set MNIST_ROOT to another folder$"):
        utils.load_data(standin=False)

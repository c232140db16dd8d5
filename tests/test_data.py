"""Data: the loader against torchvision, the stand-in, and every way in which files can be bad."""

import gzip
import hashlib
from http.server import BaseHTTPRequestHandler, HTTPServer
import shutil
import threading

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms.functional import InterpolationMode, affine as torchvision_affine

import utils

NAMES = list(utils.MNIST_MD5)
HTML = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"


def test_loader_yields_what_torchvision_does(small):
    dataset = small(300)
    normalise = transforms.Normalize((0.1307,), (0.3081,))
    dataset.transform = transforms.Compose([transforms.ToTensor(), normalise])
    loader = utils.BatchLoader(dataset, 128, "cpu")
    usual = DataLoader(dataset, batch_size=128)
    assert len(loader) == len(usual) == 3 and loader.dataset is dataset
    for (data, target), (expected, labels) in zip(loader, usual, strict=True):
        assert data.dtype == torch.float32 and data.shape[1:] == (1, 28, 28)
        torch.testing.assert_close(data, expected, atol=1e-6, rtol=0)
        assert torch.equal(target, labels)


def test_shuffling_takes_every_image_once_and_anew(small):
    loader = utils.BatchLoader(small(300), 128, "cpu", shuffle=True)
    loader.target = torch.arange(300)  # the images' numbers
    first, second = (torch.cat([target for _, target in loader]) for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first, loader.target)
    assert torch.equal(first.sort().values, loader.target)
    data, target = next(iter(loader))
    assert torch.equal(data, loader.data[target])  # images stay with their targets


def test_a_batch_size_below_1_is_refused(small):
    with pytest.raises(ValueError, match="10 images in batches of 0: give at least 1"):
        utils.BatchLoader(small(10), 0, "cpu")


@pytest.mark.parametrize("bad, message", [(10, "run from 0 to 10: digits"), (-1, "run from -1 to 9")])
def test_targets_that_are_no_digits_are_refused(small, bad, message):
    dataset = small(100)
    dataset.targets[7] = bad
    with pytest.raises(ValueError, match=message):
        utils.BatchLoader(dataset, 50, "cpu")


def test_an_empty_set_is_refused(small):
    with pytest.raises(ValueError, match="0 images in batches of 50"):
        utils.BatchLoader(small(0), 50, "cpu")


@pytest.mark.parametrize("degrees, shift, scale", [(10, (3, 0), 1.0), (-7, (0, -2), 1.1), (25, (-1, 4), 0.8)])
def test_affine_is_torchvisions(small, monkeypatch, degrees, shift, scale):
    """With the draw fixed to what gives these amounts: a draw of 0.5 is none, 1 the most."""
    data = utils.BatchLoader(small(4), 4, "cpu").data
    most = dict(degrees=30, shift=5 / 28, scale=0.3)
    share = torch.tensor([degrees / 30, shift[0] / 5, shift[1] / 5, (scale - 1) / 0.3])
    monkeypatch.setattr(utils.torch, "rand", lambda *size, device: ((share + 1) / 2)[:, None].expand(*size))
    ours = utils.random_affine(data, **most) * utils.STD + utils.MEAN
    for image, result in zip(data * utils.STD + utils.MEAN, ours):
        expected = torchvision_affine(
            image, degrees, list(shift), scale, [0.0, 0.0], InterpolationMode.BILINEAR
        )
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_each_image_of_a_batch_has_its_own_turn_shift_and_scale(small):
    image = utils.BatchLoader(small(1), 1, "cpu").data
    out = utils.random_affine(image.expand(50, -1, -1, -1), degrees=10, shift=0.06, scale=0.06)
    assert len(torch.unique(out.flatten(1), dim=0)) == 50
    assert out[:, 0, 0, 0].allclose(torch.tensor(-utils.MEAN / utils.STD))  # filled with black


def test_augmentation_stays_within_its_bounds(monkeypatch):
    """The matrices read back: a turn and a size of each image, and where its middle goes."""
    monkeypatch.setattr(utils.F, "affine_grid", lambda theta, *_, **__: seen.append(theta))
    monkeypatch.setattr(utils.F, "grid_sample", lambda data, *_, **__: data)
    seen = []
    utils.random_affine(torch.zeros(5000, 1, 28, 28), degrees=10, shift=0.06, scale=0.05)
    turn, move = seen[0][:, :, :2], seen[0][:, :, 2]
    size = turn.det().rsqrt()
    angle = torch.atan2(turn[:, 0, 1], turn[:, 0, 0]).rad2deg()
    shift = -torch.linalg.solve(turn, move) / 2
    for values, low, high in ((angle, -10, 10), (shift, -0.06, 0.06), (size, 0.95, 1.05)):
        assert low - 1e-4 <= values.min() < low * 0.99 + high * 0.01
        assert low * 0.01 + high * 0.99 < values.max() <= high + 1e-4


def test_standin_is_in_mnists_form_and_never_taken_for_it(digits, small):
    for dataset, count in zip(digits, (60_000, 10_000)):
        assert dataset.data.shape == (count, 28, 28) and dataset.data.dtype == torch.uint8
        assert dataset.targets.dtype == torch.int64 and len(dataset) == count
        assert torch.bincount(dataset.targets).min() > 0.09 * count
        assert "not MNIST" in dataset.title
    image, target = digits[0][3]  # as torchvision's own data set gives it
    assert image.size == (28, 28) and target == digits[0].targets[3]


def test_standin_is_deterministic_and_leaves_the_random_state(digits):
    before = torch.get_rng_state()
    again = utils.StandIn(train=False)
    assert torch.equal(again.data, digits[1].data) and torch.equal(again.targets, digits[1].targets)
    assert torch.equal(torch.get_rng_state(), before)


# ---- MNIST's files: a small set of our own plays MNIST, on a server of our own ----


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch, small):
    """The data folder, with four good files whose digests `utils` takes for MNIST's; no mirror answers."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    contents = {}
    for part, count in (("train", 50), ("t10k", 20)):
        dataset = small(count)
        for kind, values in (("images-idx3", dataset.data), ("labels-idx1", dataset.targets.byte())):
            shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
            header = bytes([0, 0, 8, values.dim()]) + shape
            contents[f"{part}-{kind}-ubyte"] = header + values.numpy().tobytes()

    def md5(content):
        return hashlib.md5(content).hexdigest()

    archives = {name: gzip.compress(content, mtime=0) for name, content in contents.items()}
    monkeypatch.setattr(utils, "MNIST_MD5", {name: md5(contents[name]) for name in NAMES})
    monkeypatch.setattr(utils.MNIST, "resources", [(f"{n}.gz", md5(archives[n])) for n in NAMES])
    monkeypatch.setattr(utils.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    for name, content in contents.items():
        (raw / name).write_bytes(content)
    return tmp_path, contents, archives


@pytest.fixture
def mirror(tiny_mnist, monkeypatch):
    """A function that starts a mirror; `cut` of the bytes of each file is all it sends."""
    servers = []

    def start(cut=1.0):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = tiny_mnist[2][self.path.strip("/").removesuffix(".gz")]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: int(cut * len(body))])

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(utils.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


FAULTS = {
    "missing": (lambda content: None, "is missing"),
    "empty": (lambda content: b"", "is damaged"),
    "truncated": (lambda content: content[: len(content) // 2], "is damaged"),
    "one byte changed": (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged"),
    "an HTML page": (lambda content: HTML, "is damaged"),
    "another length": (lambda content: content[:4] + bytes([0, 0, 0, 7]) + content[8:15], "is damaged"),
}


def damage(folder, name, contents, fault):
    path = folder / "MNIST" / "raw" / name
    content = FAULTS[fault][0](contents[name])
    path.unlink() if content is None else path.write_bytes(content)
    return path


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_file_is_named_in_one_line(tiny_mnist, name, fault):
    folder, contents, _ = tiny_mnist
    path = damage(folder, name, contents, fault)
    with pytest.raises(RuntimeError) as error:
        utils.load_data(standin=False)
    message = str(error.value)
    assert message.startswith(f"{path} {FAULTS[fault][1]}") and "\n" not in message
    assert "connect to the network" in message and "MNIST_ROOT" in message


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_fetched_anew(tiny_mnist, mirror, fault):
    folder, contents, _ = tiny_mnist
    path = damage(folder, NAMES[0], contents, fault)
    mirror()
    train_set, test_set = utils.load_data(standin=False)
    assert path.read_bytes() == contents[NAMES[0]]
    assert (len(train_set), len(test_set)) == (50, 20)


def test_a_download_cut_off_half_way_is_reported(tiny_mnist, mirror):
    folder, contents, _ = tiny_mnist
    path = damage(folder, NAMES[2], contents, "missing")
    mirror(cut=0.5)
    with pytest.raises(RuntimeError, match="is missing and could not be downloaded"):
        utils.load_data(standin=False)
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, mirror, monkeypatch):
    mirror()
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="file/MNIST/raw.*Not a directory.*set MNIST_ROOT") as error:
        utils.load_data(standin=False)
    assert "\n" not in str(error.value)


def test_good_files_need_no_network_and_are_left_alone(tiny_mnist):
    folder, contents, _ = tiny_mnist
    before = {p: p.stat().st_mtime_ns for p in (folder / "MNIST" / "raw").iterdir()}
    train_set, _ = utils.load_data()
    assert train_set.title == "MNIST" and len(train_set) == 50
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "MNIST" / "raw").iterdir()}


def test_unchecked_files_of_old_versions_are_not_read(tiny_mnist):
    folder, *_ = tiny_mnist
    (folder / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28), torch.zeros(3)), folder / "MNIST" / "processed" / name)
    assert len(utils.load_data()[0]) == 50


def test_the_standin_is_loud(monkeypatch, capsys):
    monkeypatch.setattr(utils.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    train_set, _ = utils.load_data()
    text = capsys.readouterr().out
    assert "THIS IS NOT MNIST" in text and "refused" in text and "MNIST_ROOT" in text
    assert "not MNIST" in train_set.title


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_the_standin_can_be_forbidden(monkeypatch, way):
    monkeypatch.setattr(utils.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    if way == "environment":
        monkeypatch.setenv("S7_STANDIN", "0")
    with pytest.raises(RuntimeError, match="train-images-idx3-ubyte is missing"):
        utils.load_data(standin=way == "environment")


def test_a_silent_server_is_given_up_within_15_seconds(tiny_mnist, mirror, monkeypatch):
    patience = []
    real = datasets.MNIST.download

    def watched(self):
        patience.append(utils.socket.getdefaulttimeout())
        real(self)

    monkeypatch.setattr(datasets.MNIST, "download", watched)
    folder, contents, _ = tiny_mnist
    damage(folder, NAMES[0], contents, "missing")
    mirror()
    utils.load_data()
    assert patience[0] == 15 and utils.socket.getdefaulttimeout() is None

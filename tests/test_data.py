"""Data: the loader against torchvision, the stand-in, and every way in which files can be bad."""

import gzip
from hashlib import md5
from http.server import BaseHTTPRequestHandler, HTTPServer
import threading

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms.functional import InterpolationMode, affine

import utils

NAMES = list(utils.MNIST_MD5)


def test_loader_yields_what_torchvision_does(small):
    dataset = small(300)
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


@pytest.mark.parametrize("degrees, shift, scale", [(10, (3, 0), 1.0), (-7, (0, -2), 1.1), (25, (-1, 4), 0.8)])
def test_affine_is_torchvisions(small, monkeypatch, degrees, shift, scale):
    """With the draw fixed to what gives these amounts: a draw of 0.5 is none, 1 the most."""
    data = utils.BatchLoader(small(4), 4, "cpu").data
    most = dict(degrees=30, shift=5 / 28, scale=0.3)
    share = torch.tensor([degrees / 30, shift[0] / 5, shift[1] / 5, (scale - 1) / 0.3])
    monkeypatch.setattr(utils.torch, "rand", lambda *size, device: ((share + 1) / 2)[:, None].expand(*size))
    ours = utils.random_affine(data, **most) * utils.STD + utils.MEAN
    for image, result in zip(data * utils.STD + utils.MEAN, ours):
        expected = affine(image, degrees, list(shift), scale, [0.0, 0.0], InterpolationMode.BILINEAR)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_augmentation_stays_within_its_bounds_and_differs_by_image(small, monkeypatch):
    """The matrices read back: a turn and a size of each image, and where its middle goes."""
    image = utils.BatchLoader(small(1), 1, "cpu").data
    out = utils.random_affine(image.expand(50, -1, -1, -1), degrees=10, shift=0.06, scale=0.06)
    assert len(torch.unique(out.flatten(1), dim=0)) == 50
    assert out[:, 0, 0, 0].allclose(torch.tensor(-utils.MEAN / utils.STD))  # filled with black
    seen = []
    monkeypatch.setattr(utils.F, "affine_grid", lambda theta, *_, **__: seen.append(theta))
    monkeypatch.setattr(utils.F, "grid_sample", lambda data, *_, **__: data)
    utils.random_affine(torch.zeros(5000, 1, 28, 28), degrees=10, shift=0.06, scale=0.05)
    turn, move = seen[0][:, :, :2], seen[0][:, :, 2]
    angle, size = torch.atan2(turn[:, 0, 1], turn[:, 0, 0]).rad2deg(), turn.det().rsqrt()
    shift = -torch.linalg.solve(turn, move) / 2
    for values, low, high in ((angle, -10, 10), (shift, -0.06, 0.06), (size, 0.95, 1.05)):
        assert low - 1e-4 <= values.min() < low * 0.99 + high * 0.01
        assert low * 0.01 + high * 0.99 < values.max() <= high + 1e-4


def test_standin_is_in_mnists_form_and_the_same_in_every_run(small):
    for train, count in ((True, 60_000), (False, 10_000)):
        dataset = small(None, train)
        assert dataset.data.shape == (count, 28, 28) and dataset.data.dtype == torch.uint8
        assert dataset.targets.dtype == torch.int64 and len(dataset) == count
        assert torch.bincount(dataset.targets).min() > 0.09 * count
    before, again = torch.get_rng_state(), utils.StandIn(train=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.data, dataset.data) and torch.equal(again.targets, dataset.targets)


@pytest.fixture
def mnist(tmp_path, monkeypatch, small):
    """A small set that plays MNIST: the folder of its four good files; their contents; and a function that
    puts a mirror on the network, which sends a `share` of each archive's bytes."""
    raw, contents, archives = tmp_path / "MNIST" / "raw", {}, {}
    raw.mkdir(parents=True)
    for name in NAMES:
        dataset = small(50 if name.startswith("train") else 20)
        values = dataset.data if "images" in name else dataset.targets.byte()
        shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
        contents[name] = bytes([0, 0, 8, values.dim()]) + shape + values.numpy().tobytes()
        archives[f"{name}.gz"] = gzip.compress(contents[name])
        (raw / name).write_bytes(contents[name])
    monkeypatch.setattr(utils, "MNIST_MD5", {name: md5(contents[name]).hexdigest() for name in NAMES})
    resources = [(name, md5(archive).hexdigest()) for name, archive in archives.items()]
    monkeypatch.setattr(utils.MNIST, "resources", resources)
    monkeypatch.setattr(utils.MNIST, "mirrors", ["http://127.0.0.1:9/"])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = archives[self.path.strip("/")]
            self.send_response(200)
            self.send_header("Content-Length", len(body))
            self.end_headers()
            self.wfile.write(body[: int(self.share * len(body))])

    def serve(share=1.0):
        Handler.share = share
        monkeypatch.setattr(utils.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield raw, contents, serve
        server.shutdown()


FAULTS = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "one byte changed": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "an HTML page": lambda content: b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "another length": lambda content: content[:4] + bytes([0, 0, 0, 7]) + content[8:15],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_file_is_named_in_one_line_or_fetched_anew(mnist, monkeypatch, name, fault):
    """Without a mirror, with one that breaks off half way, and with one that works."""
    raw, contents, serve = mnist
    path = raw / name
    content = FAULTS[fault](contents[name])
    path.unlink() if content is None else path.write_bytes(content)
    problem = "missing" if fault == "missing" else "damaged"
    advice = "connect to the network and run again, .* or set MNIST_ROOT$"
    for share in (None, 0.5):
        serve(share) if share else None
        with pytest.raises(RuntimeError, match=f"^{path} is {problem} and could not .*{advice}"):
            utils.load_data(standin=False)
    serve()
    patience, real = [], datasets.MNIST.download
    watched = lambda self: patience.append(utils.socket.getdefaulttimeout()) or real(self)
    monkeypatch.setattr(datasets.MNIST, "download", watched)
    train_set, test_set = utils.load_data(standin=False)
    assert path.read_bytes() == contents[name] and (len(train_set), len(test_set)) == (50, 20)
    assert patience[0] == 15 and utils.socket.getdefaulttimeout() is None  # a silent server's


def test_a_folder_that_cannot_be_written_is_named(tmp_path, mnist, monkeypatch):
    mnist[2]()
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="^.*file/MNIST/raw.*Not a directory.*set MNIST_ROOT$"):
        utils.load_data(standin=False)


def test_good_files_need_no_network_and_only_they_are_read(mnist):
    processed = mnist[0].parent / "processed"  # of old versions, which no digest covers
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28), torch.zeros(3)), processed / name)
    before = {path: path.stat().st_mtime_ns for path in mnist[0].iterdir()}
    train_set, _ = utils.load_data()
    assert train_set.title == "MNIST" and len(train_set) == 50
    assert before == {path: path.stat().st_mtime_ns for path in mnist[0].iterdir()}


def test_the_standin_is_loud_and_can_be_forbidden(monkeypatch, capsys):
    monkeypatch.setattr(utils.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    train_set, _ = utils.load_data()
    text = capsys.readouterr().out
    assert "THIS IS NOT MNIST" in text and "refused" in text and "MNIST_ROOT" in text
    assert "not MNIST" in train_set.title
    for argument in (False, True):
        with pytest.raises(RuntimeError, match="train-images-idx3-ubyte is missing"):
            utils.load_data(standin=argument)
        monkeypatch.setenv("S7_STANDIN", "0")

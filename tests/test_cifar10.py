"""The CIFAR-10 builder, on a tiny archive in the publisher's layout; the real images are in `test_data.py`."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import pathlib
import shutil
import socket
import sys
import tarfile
import threading
import time

import numpy as np
import pytest

from bibau_jax import data
from bibau_jax.data import archives, cifar10, prepared
from bibau_jax.errors import UserError

IMAGES, LABELS = (
    np.random.default_rng(0).integers(0, top, (120, *shape), np.uint8) for top, shape in ((256, (32, 32, 3)), (10, ()))
)


def members(labels=LABELS):
    """120 images in the publisher's layout: 5 training files and a test file of 20 records each."""
    records = np.concatenate([labels[:, None], IMAGES.transpose(0, 3, 1, 2).reshape(120, -1)], axis=1)
    names = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
    files = {name: part.tobytes() for name, part in zip(names, np.split(records, 6), strict=True)}
    return {"batches.meta.txt": ("\n".join(cifar10.CLASS_NAMES) + "\n\n").encode(), "readme.html": b"x", **files}


def write_archive(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / cifar10.ARCHIVE.name, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder / cifar10.ARCHIVE.name


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """An archive of 20 images a file, and a builder that expects as many."""
    monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", 20)
    monkeypatch.setattr(prepared, "IMAGES_PER_RECORD", 8)
    return write_archive(tmp_path / "manual", members())


def published(monkeypatch, **changes):
    """Another archive is taken for the published one."""
    monkeypatch.setattr(cifar10, "ARCHIVE", dataclasses.replace(cifar10.ARCHIVE, **changes))


@pytest.fixture
def served(tiny, monkeypatch):
    """The tiny archive on a server of this machine, taken for the published one; lists the requests."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if not self.path.endswith(".broken"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 100)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tiny.parent)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url, digest = f"http://127.0.0.1:{server.server_port}/{tiny.name}", hashlib.sha256(tiny.read_bytes()).hexdigest()
    published(monkeypatch, url=url, digest=digest)
    yield requests
    server.shutdown()
    server.server_close()


def fails(folder, *words, **arguments):
    """A load that must fail within seconds, in one line with these words, and leave no set behind."""
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        cifar10.load(data_dir=folder, **arguments)
    message = str(error.value)
    assert time.monotonic() - start < 5 and "\n" not in message
    assert all(word in message for word in words), message
    assert not list(folder.glob("cifar10_binary/*")) and not list(folder.glob("downloads/*.part"))


def test_images_labels_and_ids_come_back_in_the_publishers_order(tiny, tmp_path):
    dataset = data.load("cifar10", data_dir=tmp_path / "data", manual_dir=tiny.parent)
    for part, place in ((dataset.train, slice(0, 100)), (dataset.test, slice(100, 120))):
        np.testing.assert_array_equal(part.images, IMAGES[place])
        np.testing.assert_array_equal(part.labels, LABELS[place])
        np.testing.assert_array_equal(part.ids, np.arange(len(part)))
    assert dataset.num_classes == 10 and dataset.image_shape == (32, 32, 3) and dataset.class_names[3] == "cat"


def test_a_prepared_set_needs_neither_archive_nor_network_nor_tensorflow(tiny, tmp_path):
    folder = tmp_path / "data"
    first = cifar10.load(data_dir=folder, manual_dir=tiny.parent)
    tiny.unlink()
    again = cifar10.load(data_dir=str(folder), download=False)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert "tensorflow" not in sys.modules


def test_the_published_archive_is_downloaded_once_checked_and_kept(served, tmp_path, capsys):
    folder = tmp_path / "data"
    dataset = cifar10.load(data_dir=folder)
    np.testing.assert_array_equal(dataset.test.images, IMAGES[100:])
    out, err = capsys.readouterr()
    assert out == "" and {line.split()[0] for line in err.splitlines()} == {"downloading", "preparing"}
    shutil.rmtree(folder / "cifar10_binary")
    cifar10.load(data_dir=folder)
    assert len(served) == 1


def test_a_download_with_another_hash_is_refused_and_not_kept(served, tmp_path, monkeypatch):
    published(monkeypatch, digest="0" * 64)
    fails(tmp_path / "data", "is not the published archive", "try again", "--config.data.manual_dir")
    assert not list((tmp_path / "data" / "downloads").iterdir())


def test_a_server_without_the_archive_is_an_error(served, tmp_path, monkeypatch):
    published(monkeypatch, url=cifar10.ARCHIVE.url + ".gone")
    fails(tmp_path / "data", "cannot download", "404", "--config.data.manual_dir")
    assert len(served) == 1


def test_without_network_the_error_comes_at_once_and_says_what_to_do(tiny, tmp_path, monkeypatch):
    published(monkeypatch, url="http://127.0.0.1:1/")
    fails(tmp_path / "data", "cannot download", "--config.data.manual_dir", "--config.data.data_dir")


def test_a_server_that_never_answers_is_given_up(tiny, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        published(monkeypatch, url=f"http://127.0.0.1:{silent.getsockname()[1]}/")
        monkeypatch.setattr(archives, "TIMEOUT_SECONDS", 0.3)
        fails(tmp_path / "data", "cannot download", "timed out")


def test_a_download_that_breaks_off_is_tried_again_and_then_given_up(served, tmp_path, monkeypatch):
    published(monkeypatch, url=cifar10.ARCHIVE.url + ".broken")
    fails(tmp_path / "data", "cannot download", "900 more expected")
    assert len(served) == archives.ATTEMPTS


def test_downloading_switched_off_is_an_error_that_names_the_settings(tmp_path):
    fails(tmp_path, "switched off", cifar10.ARCHIVE.url, "--config.data.manual_dir", "--config.data.data_dir", download=False)


def test_a_manual_directory_without_the_archive_is_an_error_even_with_network(served, tmp_path):
    fails(tmp_path / "data", f"no {cifar10.ARCHIVE.name} in", "--config.data.manual_dir", manual_dir=tmp_path / "empty")
    assert not served


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({k: v for k, v in members().items() if k != "data_batch_4.bin"}, "holds no data_batch_4.bin"),
        (members() | {"test_batch.bin": bytes(61459)}, "test_batch.bin has 61459 bytes instead of 61460"),
        (members() | {"batches.meta.txt": b"apple\nfish\n"}, "does not name the ten classes"),
        (members(labels=LABELS + np.uint8(1)), "labels must lie in 0..9, found 10"),
    ],
    ids=["missing member", "wrong size", "other classes", "label 10"],
)
def test_an_archive_with_wrong_content_is_refused(tiny, tmp_path, files, message):
    write_archive(tiny.parent, files)
    fails(tmp_path / "data", message, str(tiny), "--config.data.manual_dir", manual_dir=tiny.parent)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-8] + bytes(8),
        lambda _: b"",
        lambda _: gzip.compress(b"no tar"),
    ],
    ids=["truncated", "wrong checksum", "empty", "not a tar"],
)
def test_a_damaged_archive_is_refused(tiny, tmp_path, damage):
    tiny.write_bytes(damage(tiny.read_bytes()))
    fails(tmp_path / "data", str(tiny), "--config.data.manual_dir", manual_dir=tiny.parent)


@pytest.mark.parametrize("place", ["data", "data/below"])
def test_a_directory_that_cannot_be_written_is_an_error(served, tiny, tmp_path, place):
    (tmp_path / "data").write_text("a file where the directory should be")
    for arguments in ({}, {"manual_dir": tiny.parent}):
        with pytest.raises(UserError, match="cannot prepare CIFAR-10 in .*--config.data.data_dir"):
            cifar10.load(data_dir=tmp_path / place, **arguments)


def test_a_preparation_cut_off_is_not_taken_for_a_whole_one(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "data"

    def cut_off(self, images):
        yield from list(generate(self, images))[:2]
        raise KeyboardInterrupt

    generate = prepared.Records._generate_examples
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepared.Records, "_generate_examples", cut_off)
        cifar10.load(data_dir=folder, manual_dir=tiny.parent)
    # What a killed process leaves.
    (folder / "cifar10_binary" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)
    assert len(cifar10.load(data_dir=folder, manual_dir=tiny.parent).train) == 100


def test_of_two_that_prepare_at_once_both_get_the_set(tiny, tmp_path, monkeypatch):
    folder, archive = tmp_path / "data", cifar10.read_archive

    def overtaken(path):
        monkeypatch.setattr(cifar10, "read_archive", archive)
        cifar10.load(data_dir=folder, manual_dir=tiny.parent)
        return archive(path)

    monkeypatch.setattr(cifar10, "read_archive", overtaken)
    assert len(cifar10.load(data_dir=folder, manual_dir=tiny.parent).test) == 20


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def turn_one_bit(file):
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


IMAGE_DAMAGES = itertools.product(["*train*-00000-*", "*test*"], [cut_in_half, pathlib.Path.unlink, turn_one_bit])
INFO_DAMAGES = itertools.product(["dataset_info.json", "features.json"], [cut_in_half, pathlib.Path.unlink])


@pytest.mark.parametrize(("pattern", "damage"), [*IMAGE_DAMAGES, *INFO_DAMAGES])
def test_a_damaged_prepared_set_is_an_error_that_says_what_to_delete(tiny, tmp_path, pattern, damage):
    cifar10.load(data_dir=tmp_path / "data", manual_dir=tiny.parent)
    prepared = tmp_path / "data" / "cifar10_binary" / "1.0.0"
    damage(next(prepared.glob(pattern)))
    with pytest.raises(UserError, match="is damaged .*; delete it and start again") as error:
        cifar10.load(data_dir=tmp_path / "data", manual_dir=tiny.parent)
    assert str(prepared) in str(error.value) and "\n" not in str(error.value)

"""CIFAR-10 from its publisher's binary archive, prepared once with TFDS (array_record, no TensorFlow)."""

import contextlib
import gzip
import hashlib
import http.client
import io
import os
import pathlib
import sys
import tarfile
import urllib.request
import uuid
import zlib

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from bibau_jax.data import Dataset, ImageSet
from bibau_jax.errors import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
ARCHIVE = "cifar-10-binary.tar.gz"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
META = "batches.meta.txt"
SPLITS = {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)}
IMAGES_PER_FILE = 10_000
IMAGES_PER_RECORD = 1_000  # one image a record would take seconds to read back instead of a fraction of one
IMAGE_SHAPE = (32, 32, 3)
BYTES_PER_IMAGE = 1 + 32 * 32 * 3  # the label, then the red, green and blue planes
TIMEOUT_SECONDS = 10
ATTEMPTS = 3
SETTINGS = (
    f"download {URL} and set --config.data.manual_dir to the directory it lies in, "
    "or set --config.data.data_dir to where the prepared set lies"
)


def load(*, data_dir=None, manual_dir=None, download: bool = True) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images, 32 x 32 x 3, ids in the publisher's order.

    The first call prepares the set in `data_dir` from the archive in `manual_dir` if that is given, else from the
    published one, fetched to `data_dir/downloads` if `download` allows. UserError, in one line, where something is
    missing or damaged.
    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    prepared = root / Cifar10Binary.name / str(Cifar10Binary.VERSION)
    try:
        if not prepared.exists():
            _prepare(root, prepared, _find_archive(root, manual_dir, download))
    except OSError as error:
        raise UserError(
            f"cannot prepare CIFAR-10 in {root} ({error.strerror or error}); "
            "set --config.data.data_dir to a directory that can be written"
        ) from error
    return Dataset("cifar10", *(_read_split(prepared, split) for split in SPLITS), CLASS_NAMES)


class Cifar10Binary(tfds.core.GeneratorBasedBuilder):
    """TFDS builder over the archive in `manual_dir`; a record holds up to 1,000 consecutive images.

    images: uint8 [n, 32, 32, 3]. labels, ids: int32 [n].
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Download {URL} to the manual directory."

    def _info(self):
        def feature(dtype, *shape):
            return tfds.features.Tensor(shape=(None, *shape), dtype=dtype, encoding="bytes")

        features = {"images": feature(np.uint8, *IMAGE_SHAPE), "labels": feature(np.int32), "ids": feature(np.int32)}
        return tfds.core.DatasetInfo(
            builder=self,
            description="CIFAR-10 in records of many images.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        )

    def _split_generators(self, dl_manager):
        archive = read_archive(pathlib.Path(dl_manager.manual_dir) / ARCHIVE)
        return {split: self._generate_examples(images) for split, images in archive.items()}

    def _generate_examples(self, images: ImageSet):
        for start in range(0, len(images), IMAGES_PER_RECORD):
            part = images.take(slice(start, start + IMAGES_PER_RECORD))
            yield start, {"images": part.images, "labels": part.labels, "ids": part.ids}


def read_archive(path: pathlib.Path) -> dict[str, ImageSet]:
    """The "train" and "test" images of an archive in the publisher's layout.

    The archive may have been packed anew: what counts is its content, the members, their sizes, the labels and the
    names of the classes. UserError where one of these is wrong or the file cannot be read to its end.
    """
    try:
        content = _members(path, {META, *SPLITS["train"], *SPLITS["test"]})
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path} is damaged or no .tar.gz archive ({error}); {SETTINGS}") from error
    size = IMAGES_PER_FILE * BYTES_PER_IMAGE
    for name in (META, *SPLITS["train"], *SPLITS["test"]):
        if name not in content:
            raise UserError(f"{path} holds no {name}; {SETTINGS}")
        if name != META and len(content[name]) != size:
            raise UserError(f"{path}: {name} has {len(content[name])} bytes instead of {size}; {SETTINGS}")
    if tuple(content[META].decode("utf-8", "replace").split()) != CLASS_NAMES:
        raise UserError(f"{path}: {META} does not name the ten classes of CIFAR-10; {SETTINGS}")
    return {split: _decode(path, b"".join(content[name] for name in files)) for split, files in SPLITS.items()}


def _members(path, wanted):
    content = {}
    with gzip.open(path) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                name = pathlib.PurePosixPath(member.name).name
                if member.isfile() and name in wanted:
                    content[name] = archive.extractfile(member).read()
        while stream.read(1 << 20):  # gzip compares its checksum only at the very end
            pass
    return content


def _decode(path, content) -> ImageSet:
    records = np.frombuffer(content, np.uint8).reshape(-1, BYTES_PER_IMAGE)
    labels = records[:, 0].astype(np.int32)
    if labels.max() >= len(CLASS_NAMES):
        raise UserError(f"{path}: labels must lie in 0..9, found {labels.max()}; {SETTINGS}")
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return ImageSet(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels, np.arange(len(labels), dtype=np.int32))


def _find_archive(root, manual_dir, download) -> pathlib.Path:
    if manual_dir:
        path = pathlib.Path(manual_dir).expanduser() / ARCHIVE
        if not path.is_file():
            raise UserError(f"no {ARCHIVE} in {path.parent}; {SETTINGS}")
        return path
    path = root / "downloads" / ARCHIVE
    if not path.is_file():
        if not download:
            raise UserError(f"CIFAR-10 is not in {root} and downloading is switched off; {SETTINGS}")
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(path)
    return path


def _download(path):
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    part.touch()  # a directory that cannot be written is another error than a failed download
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                received, digest = _transfer(part)
                break
            except (OSError, http.client.HTTPException) as error:
                # Where nothing came at all, another attempt only keeps the user waiting.
                if attempt == ATTEMPTS or not part.stat().st_size:
                    raise UserError(f"cannot download CIFAR-10 ({error}); {SETTINGS}") from error
        if digest != SHA256:
            raise UserError(
                f"what came from {URL} is not the published archive ({received} bytes, sha256 {digest}, not {SHA256}): "
                f"try again, or {SETTINGS}"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _transfer(part) -> tuple[int, str]:
    digest, received, announced = hashlib.sha256(), 0, 0
    with part.open("wb") as out, urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as response:
        total = int(response.headers.get("Content-Length") or 0)
        while block := response.read(1 << 20):
            out.write(block)
            digest.update(block)
            received += len(block)
            if total and received * 10 // total > announced:
                announced = received * 10 // total
                _say(f"downloading {URL}: {announced * 10} % of {total / 1e6:.0f} MB")
    if received < total:
        raise http.client.IncompleteRead(b"", total - received)
    return received, digest.hexdigest()


def _prepare(root, prepared, archive):
    _say(f"preparing CIFAR-10 from {archive} in {prepared}")
    settings = tfds.download.DownloadConfig(manual_dir=archive.parent, try_download_gcs=False)
    try:
        with _quiet():
            builder = Cifar10Binary(data_dir=root, file_format="array_record")
            # Written beside its final place and renamed when whole, so a run cut off leaves nothing that passes for it.
            builder.download_and_prepare(download_config=settings)
    except OSError:
        # Another process may have finished first; its result is as good.
        if not prepared.exists():
            raise


def _read_split(prepared, split) -> ImageSet:
    try:
        with _quiet():
            source = tfds.builder_from_directory(os.fspath(prepared)).as_data_source(split)
            records = sorted((source[i] for i in range(len(source))), key=lambda record: record["ids"][0])
        images, labels, ids = (np.concatenate([r[k] for r in records]) for k in ("images", "labels", "ids"))
        if not np.array_equal(ids, np.arange(IMAGES_PER_FILE * len(SPLITS[split]))):
            raise ValueError(f"{len(ids)} images in {split}")
        return ImageSet(images, labels, ids)
    except Exception as error:  # the readers below raise whatever they like on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the prepared CIFAR-10 in {prepared} is damaged ({reason}); delete it and start again") from error


@contextlib.contextmanager
def _quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _say(line):
    print(line, file=sys.stderr, flush=True)

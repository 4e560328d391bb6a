"""CIFAR-10 from its publisher's binary archive."""

import gzip
import pathlib
import tarfile
import zlib

import numpy as np

from bibau_jax.data import Dataset, ImageSet, archives, prepared
from bibau_jax.errors import UserError

ARCHIVE = archives.Archive(
    "cifar-10-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "sha256",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
SETTINGS = archives.settings((ARCHIVE,))
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
META = "batches.meta.txt"
SPLITS = {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)}
IMAGES_PER_FILE = 10_000
BYTES_PER_IMAGE = 1 + 32 * 32 * 3  # the label, then the red, green and blue planes


def load(*, data_dir=None, manual_dir=None, download: bool = True) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images, 32 x 32 x 3, ids in the publisher's order.

    The first call prepares the set in `data_dir` from the archive in `manual_dir` if that is given, else from the
    published one, fetched to `data_dir/downloads` if `download` allows. UserError, in one line, where something is
    missing or damaged.
    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    published = prepared.Published(
        name="cifar10",
        folder="cifar10_binary",
        title="CIFAR-10",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        archives=(ARCHIVE,),
        read=lambda folder: Dataset("cifar10", **read_archive(folder / ARCHIVE.name), class_names=CLASS_NAMES),
        counts={split: IMAGES_PER_FILE * len(files) for split, files in SPLITS.items()},
        class_names=CLASS_NAMES,
    )
    return prepared.get(published, data_dir=data_dir, manual_dir=manual_dir, download=download)


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

"""Tiny-ImageNet-200 from its publisher's zip archive."""

import re
from pathlib import Path

import numpy as np

from bibau_jax.data import Dataset, ImageSet, archives, prepared, zipped

ARCHIVE = archives.Archive(
    "tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "md5",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
SETTINGS = archives.settings((ARCHIVE,))
NUM_CLASSES = 200
NAME = re.compile(r"(n\d{8})_(\d+)\.JPEG")


def load(*, image_size: int = 32, data_dir=None, manual_dir=None, download: bool = True) -> Dataset:
    """Tiny-ImageNet: 100,000 training images of 200 classes, and its 10,000 validation images as the test set.

    image_size: side in pixels, of 64 as published; 32 is the paper's. Each size is prepared by itself. Classes are numbered in
    the order of their WordNet ids, images by class and number. The published test images have no labels and stay out. Archives
    with fewer images will do, and that is said. UserError, in one line, where something is missing or damaged.
    Source: Stanford CS231n; images of ImageNet.
    """
    prepared.check_size("tiny_imagenet", image_size)
    published = prepared.Published(
        name="tiny_imagenet",
        folder=f"tiny_imagenet_{image_size}",
        title="Tiny-ImageNet",
        homepage="http://cs231n.stanford.edu",
        archives=(ARCHIVE,),
        read=lambda folder: read(folder / ARCHIVE.name, image_size),
        counts={"train": 100_000, "test": 10_000},
        partial=True,
    )
    return prepared.get(published, data_dir=data_dir, manual_dir=manual_dir, download=download)


def read(path: Path, image_size: int) -> Dataset:
    """The set from its archive, which may have been packed anew; UserError where the content is wrong."""
    with zipped.opened(path, SETTINGS) as members:
        ids = sorted(members.read("wnids.txt").decode("utf-8", "replace").split())
        if len(set(ids)) != NUM_CLASSES:
            raise members.wrong(f"wnids.txt names {len(set(ids))} classes instead of {NUM_CLASSES}")
        words = members.table("words.txt", delimiter="\t", columns=("id", "words"))
        words = {row["id"]: (row["words"] or "").partition(",")[0] for row in words}
        train = _images(members, _training(members, ids), ids, image_size)
        test = _images(members, _validation(members), ids, image_size)
    return Dataset("tiny_imagenet", train, test, tuple(words.get(one) or one for one in ids))


def _training(members, ids) -> list[tuple[str, str]]:
    """(file, WordNet id) of the training images, by class and number."""
    found = sorted((match[1], int(match[2]), name) for name in members.names if (match := NAME.fullmatch(name)))
    if empty := sorted(set(ids) - {one for one, _, _ in found}):
        raise members.wrong(f"there is no training image of class {empty[0]}")
    return [(name, one) for one, _, name in found]


def _validation(members) -> list[tuple[str, str]]:
    rows = members.table("val_annotations.txt", delimiter="\t", columns=("file", "id"))
    if not rows:
        raise members.wrong("val_annotations.txt lists no image")
    return [(row["file"], row["id"]) for row in rows]


def _images(members, rows, ids, image_size) -> ImageSet:
    numbers = {one: label for label, one in enumerate(ids)}
    for name, one in rows:
        if one not in numbers:
            raise members.wrong(f"{name} is of class {one}, which wnids.txt does not name")
    images = members.pictures([name for name, _ in rows], image_size)
    return ImageSet(images, np.array([numbers[one] for _, one in rows], np.int32), np.arange(len(rows), dtype=np.int32))

"""Data sets as whole uint8 arrays; one file a set, found by file name: `load("cifar10")` reads `data/cifar10.py`."""

import ast
import dataclasses
import importlib
import pathlib

import numpy as np

from bibau_jax import errors


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images in a fixed order.

    images: uint8 [N, H, W, C], 0..255. labels: int32 [N]. ids: int32 [N], the image's place in its publisher's order,
    which stays with it through every split and shuffle. groups: int32 [N] or None; images with one number are near-copies of
    each other, which must not lie on both sides of a split. ValueError where shapes or types differ from this.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    groups: np.ndarray | None = None

    def __post_init__(self):
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [N, H, W, C], not {self.images.dtype} {self.images.shape}")
        for name in ("labels", "ids") if self.groups is None else ("labels", "ids", "groups"):
            array = getattr(self, name)
            if array.shape != self.images.shape[:1] or array.dtype != np.int32:
                raise ValueError(f"{name} must be int32 [{len(self.images)}], not {array.dtype} {array.shape}")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices) -> "ImageSet":
        """The images at these positions (not ids), in this order: integers [M] or booleans [N]."""
        groups = None if self.groups is None else self.groups[indices]
        return ImageSet(self.images[indices], self.labels[indices], self.ids[indices], groups)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as its publisher divides it; UserError where a label lies outside 0..num_classes-1."""

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]

    def __post_init__(self):
        labels = np.concatenate([self.train.labels, self.test.labels])
        if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise errors.UserError(
                f'data set "{self.name}": labels must lie in 0..{self.num_classes - 1}, found {labels.min()}..{labels.max()}'
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are, whether or not each has images."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        return self.train.images.shape[1:]


def names() -> tuple[str, ...]:
    """The data sets there are: the modules of this package that define `load`, read without importing them."""
    return tuple(sorted(path.stem for path in pathlib.Path(__file__).parent.glob("[!_]*.py") if _defines_load(path)))


def load(name: str, *, data_dir=None, manual_dir=None, download: bool = True, **options) -> Dataset:
    """The data set called `name`, whole and in memory.

    data_dir: where prepared sets are kept (default: `~/tensorflow_datasets`, or TFDS_DATA_DIR). manual_dir: where
    archives lie that were fetched by hand. download: whether a missing archive may be fetched from its publisher. options: what
    the set's own `load` takes beside these, e.g. `image_size`.
    UserError for an unknown name, and where the set is missing, damaged or cannot be written; the message says what to
    put where.
    """
    if name not in names():
        raise errors.unknown("data set", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    return module.load(data_dir=data_dir, manual_dir=manual_dir, download=download, **options)


def _defines_load(path: pathlib.Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "load" for node in tree.body)

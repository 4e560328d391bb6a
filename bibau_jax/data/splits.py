"""Which images the model is trained on, which the defender holds, and which nobody trains on."""

import dataclasses

import jax
import numpy as np

from bibau_jax import keys
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Splits:
    """The parts of a training set: `clean` lies inside `train`, `validation` outside it."""

    train: ImageSet
    clean: ImageSet
    validation: ImageSet


def divide(key: jax.Array, train: ImageSet, *, train_size: int, clean_size: int, validation_size: int) -> Splits:
    """Divides a training set by one permutation drawn from the stream "splits" of `key`.

    validation: held-out clean images, never trained on. train: `train_size` of the others, or all of them for 0. clean:
    the defender's images, originals of training images, classes balanced as far as they reach. Every image keeps its
    id, so what is poisoned in training stays recognisable. UserError where the sizes cannot be had.
    """
    sizes = {"train_size": train_size, "clean_size": clean_size, "validation_size": validation_size}
    for name, size in sizes.items():
        if size < 0:
            raise UserError(f"{name} must not be negative: {size}")
    if train_size + validation_size > len(train):
        raise UserError(
            f"training and validation set larger than the data: train_size {train_size}, "
            f"validation_size {validation_size}, images {len(train)}"
        )
    order = np.asarray(jax.random.permutation(keys.stream(key, "splits"), len(train)))
    kept = train.take(order[validation_size:][: train_size or None])
    clean = kept.take(_class_balanced(kept.labels, clean_size))
    return Splits(kept, clean, train.take(order[:validation_size]))


def _class_balanced(labels: np.ndarray, count: int) -> np.ndarray:
    if count > len(labels):
        raise UserError(f"clean set larger than the data: clean_size {count}, training images {len(labels)}")
    classes = np.unique(labels)
    if count < len(classes):
        raise UserError(f"clean set with fewer images than classes: clean_size {count}, classes {len(classes)}")
    rank = np.empty(len(labels), int)
    for label in classes:
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    # The first of every class, then the second of every class, and so on: a class that runs out leaves its share to
    # the others.
    return np.sort(np.argsort(rank, kind="stable")[:count])

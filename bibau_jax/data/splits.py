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
    id, so what is poisoned in training stays recognisable. Near-copies (`groups`) of validation images are not trained on:
    validation takes one group after the other, and what it leaves of the last one is in no part. UserError where the sizes
    cannot be had.
    """
    sizes = {"train_size": train_size, "clean_size": clean_size, "validation_size": validation_size}
    for name, size in sizes.items():
        if size < 0:
            raise UserError(f"{name} must not be negative: {size}")
    order = np.asarray(jax.random.permutation(keys.stream(key, "splits"), len(train)))
    held_out, others = _held_out(order, train.groups, validation_size)
    if validation_size > len(train) or train_size > len(others):
        copies = len(train) - len(held_out) - len(others)
        raise UserError(
            f"training and validation set larger than the data: train_size {train_size}, "
            f"validation_size {validation_size}, images {len(train)}"
            + (f", {copies} of them near-copies of validation images" if copies else "")
        )
    kept = train.take(others[: train_size or None])
    clean = kept.take(class_balanced(kept.labels, clean_size))
    return Splits(kept, clean, train.take(held_out))


def _held_out(order, groups, count) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` of these positions, group by group, and those that are in no group of theirs, each in their order."""
    if groups is None:
        return order[:count], order[count:]
    _, first, member = np.unique(groups[order], return_index=True, return_inverse=True)
    held_out = order[np.argsort(first[member], kind="stable")][:count]
    return held_out, order[~np.isin(groups[order], groups[held_out])]


def divide_own(key: jax.Array, images: ImageSet, *, held_out_share: float) -> tuple[ImageSet, ImageSet]:
    """(the defender's images, held-out ones that nothing trains on) of a user's own, drawn from the stream "own" of `key`.

    held_out_share: of all images, and of each class within one image, 0..1, but one of each class is kept. UserError where one
    part would be empty.
    """
    count = round(held_out_share * len(images))
    if not 0 < count < len(images):
        raise UserError(f"data.held_out {held_out_share} of {len(images)} images leaves one part empty")
    order = np.asarray(jax.random.permutation(keys.stream(key, "own"), len(images)))
    labels = images.labels[order]
    held_out = evenly_chosen(labels, count)
    found, first = np.unique(labels, return_index=True)
    held_out[first[~np.isin(found, labels[~held_out])]] = False  # a class is never held out whole
    if not held_out.any():
        raise UserError(
            "no image can be held out, for there is one of each class: take more, or others to measure on (data.test)"
        )
    return images.take(order[~held_out]), images.take(order[held_out])


def evenly_chosen(labels: np.ndarray, count: int) -> np.ndarray:
    """Which of the images to take so that every class gives its share of `count` in all: booleans [N], the same every time."""
    # Evenly spaced in an order sorted by class: no random generator is needed that could change between versions.
    steps = np.arange(len(labels) + 1) * count // len(labels)
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")] = np.diff(steps) > 0
    return chosen


def some_of(images: ImageSet, count: int) -> ImageSet:
    """At most `count` of the images, as many of each class as can be; UserError for fewer than one a class."""
    return images.take(class_balanced(images.labels, min(count, len(images))))


def class_balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` images, sorted, as many of each class as there are; UserError for fewer than one a class."""
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

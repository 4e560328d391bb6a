"""Feature coupling: what makes Adap-Blend and Adap-Patch "enhanced", adaptive to BI-BAU (section 5.7).

While the victim is trained, the features of poisoned images are pulled to the mean feature of clean images of the class that
they are labelled with, so that no direction of the features belongs to the backdoor alone.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from bibau_jax import keys
from bibau_jax.attacks.protocol import Attack, Control
from bibau_jax.errors import UserError


def distance_to_class(features, labels, poisoned, cover, num_classes: int):
    """Euclidean distance of poisoned images' features [N, D] from the batch's clean mean of their label, summed and over N.

    Over the whole batch, as its cross-entropy is, so that what pulls an image does not depend on how many others are
    poisoned. Means carry no gradient; covers count for neither side.
    """
    clean = jax.nn.one_hot(labels, num_classes) * (~poisoned & ~cover)[:, None]
    counts = clean.sum(0)
    means = jax.lax.stop_gradient(clean.T @ features / jnp.maximum(counts, 1.0)[:, None])
    apart = jnp.sqrt(jnp.sum((features - means[labels]) ** 2, axis=1) + 1e-12)
    counted = poisoned & (counts[labels] > 0)
    return jnp.sum(apart * counted) / len(features)


def prepare(extra, batch, key, *, augment, num_classes: int, weight: float):
    """A batch of the poisoned training set, augmented as usual, with the distance as a penalty on the model's outputs."""
    pixels = augment(keys.stream(key, "augment"), batch["images"]).astype(jnp.float32)

    def penalty(outputs):
        flags = batch["poisoned"], batch["cover"]
        return weight * distance_to_class(outputs.features, batch["labels"], *flags, num_classes)

    return pixels, batch["labels"], penalty, extra


def coupled(attack: Attack, name: str, num_classes: int, weight: float) -> Attack:
    """The attack under a new name, with the pull of `weight` in training; UserError for a negative weight."""
    if weight < 0:
        raise UserError(f"{name} needs a coupling of at least 0, got {weight}")
    control = Control(
        init=lambda key, split, journal, augment: ((), []),
        finish=lambda attack, extra: attack,
        prepare=partial(prepare, num_classes=num_classes, weight=weight),
        stamps=False,
        trains_trigger=False,
    )
    return dataclasses.replace(attack, name=name, control=control)

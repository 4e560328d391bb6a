"""Proposition 4.2 along a purification: which way the weights go, beside learning the backdoor and learning the clean task."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from bibau_jax.data import ImageSet
from bibau_jax.models import Classifier
from bibau_jax.theory.orthogonality import angle, descent


class Directions(NamedTuple):
    """Where two tasks pull the weights of the backdoored model, as pytrees like its parameters: towards learning each of them.

    `backdoor` and `clean` are the negative gradients of the mean cross-entropy on triggered images with the attacker's labels
    and on clean ones with their own. `implanted` is theta_b - theta_clean, the whole way that the backdoor's training led away
    from the clean twin; the appendix takes such differences for gradient directions too (Eq. 33, 36).
    """

    backdoor: dict
    clean: dict
    implanted: dict


def directions(classifier: Classifier, clean_twin, backdoored, clean: ImageSet, triggered: ImageSet) -> Directions:
    """The directions at the backdoored model; `triggered` has the attacker's labels, neither set was trained on."""
    pulls = (descent(classifier, backdoored, part) for part in (triggered, clean))
    return Directions(*pulls, difference(clean_twin["params"], backdoored["params"]))


def difference(start, end):
    """end - start of two pytrees, on the host."""
    return jax.tree.map(lambda a, b: np.asarray(b) - np.asarray(a), start, end)


class Angles(NamedTuple):
    """Proposition 4.2 for one movement of the weights, in degrees.

    `to_backdoor`: to the direction of learning the backdoor; 180 is antagonistic and parallel, as Eq. 11 asks, 90 is neither.
    `to_clean`: to that of learning the clean task; 90 is orthogonal, as Eq. 11 asks, below it unlearning also helps the clean
    task, above it harms it. `to_implanted`: to theta_b - theta_clean; 180 goes straight back to the twin.
    """

    to_backdoor: float
    to_clean: float
    to_implanted: float


def angles(movement, towards: Directions) -> Angles:
    """The angles of a movement (a pytree like the parameters) to the three directions, over all parameters."""
    flat = [_flat(tree) for tree in (movement, towards.backdoor, towards.clean, towards.implanted)]
    return Angles(*(angle(flat[0], other) for other in flat[1:]))


def _flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


class Point(NamedTuple):
    """One state on the way of a purification: the whole way from theta_b, the last stretch of it, and |theta - theta_b|."""

    whole: Angles
    last: Angles
    length: float


def trajectory(backdoored, states: Iterable, towards: Directions) -> list[Point]:
    """Proposition 4.2's angles at every state (a pytree of parameters) that a purification passed, in order."""
    found, before = [], backdoored["params"]
    for params in states:
        whole = difference(backdoored["params"], params)
        length = float(np.linalg.norm(_flat(whole)))
        found.append(Point(angles(whole, towards), angles(difference(before, params), towards), length))
        before = params
    return found


def by_group(movement, towards: Directions) -> dict[str, Angles]:
    """The same angles for the parameters of every top-level module (a block, the stem, the head) by themselves."""
    parts = (movement, towards.backdoor, towards.clean, towards.implanted)
    return {name: angles(movement[name], Directions(*(part[name] for part in parts[1:]))) for name in movement}

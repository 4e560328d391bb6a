"""What every attack gives: a trigger to stamp at test time, a poisoned training set, and, for some, a hand in training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from bibau_jax import keys
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError

MODES = ("all_to_one", "all_to_all")


@dataclasses.dataclass(frozen=True)
class PoisonedSplit:
    """A training set after poisoning: what the victim sees, and what was done to each sample.

    `images` uint8 [N, H, W, C], `labels` int32 [N] as the victim sees them, `ids` the samples' identities in the data set,
    `poisoned` and `cover` bool [N] (a cover carries a trigger with its true label), `original_labels` int32 [N].
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    poisoned: np.ndarray
    cover: np.ndarray
    original_labels: np.ndarray

    def flags(self) -> dict[str, np.ndarray]:
        """Everything but the pixels: enough to poison the same samples again."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "images"}


@dataclasses.dataclass(frozen=True)
class Control:
    """The hand of an attack in training (WaNet, IAD): its own parameters, trained beside the victim's in the same step.

    `init(key, split, journal) -> extra` makes them, training them first if need be. `prepare(extra, batch, key) ->
    (pixels, labels, penalty)` replaces augmentation in `train.train_step`. `finish(attack, extra) -> Attack` binds
    `stamp` to what was learned.
    """

    init: Callable[..., Any]
    prepare: Callable[..., Any]
    finish: Callable[["Attack", Any], "Attack"]
    optimizer: optax.GradientTransformation | None = None


@dataclasses.dataclass(frozen=True)
class Attack:
    """A backdoor attack as pure functions.

    `stamp(pixels uint8 [N, H, W, C], index [N]) -> uint8` is the trigger at test time; `index` says which image of its set each
    is, for triggers that differ by sample. `poison(split) -> PoisonedSplit` is the training set. `aim(labels) -> labels` is
    the class that the attacker wants for images of these true classes.
    """

    name: str
    stamp: Callable[[np.ndarray, np.ndarray], np.ndarray]
    poison: Callable[[ImageSet], PoisonedSplit]
    aim: Callable[[np.ndarray], np.ndarray]
    control: Control | None = None


def aim_at(mode: str, target_label: int, num_classes: int) -> Callable:
    """The attacker's wish: `target_label` for every image ("all_to_one") or the next class, (y + 1) mod K ("all_to_all")."""
    if mode not in MODES:
        raise UserError(f'attack mode "{mode}" is unknown; choose one of {", ".join(MODES)}')
    if not 0 <= target_label < num_classes:
        raise UserError(f"target label {target_label} is outside the {num_classes} classes 0..{num_classes - 1}")
    if mode == "all_to_all":
        return lambda labels: (np.asarray(labels) + 1) % num_classes
    return lambda labels: np.full_like(labels, target_label)


def choose(key: jax.Array, candidates: np.ndarray, poison_ratio: float, total: int) -> np.ndarray:
    """round(poison_ratio * total) positions among `candidates`, uniformly without replacement, sorted.

    The ratio counts over the whole training set, images of the target class included. Outside (0, 1], or more than there
    are candidates: `UserError`.
    """
    if not 0 < poison_ratio <= 1:
        raise UserError(f"poison ratio {poison_ratio} is outside (0, 1]")
    count = round(poison_ratio * total)
    if not 1 <= count <= len(candidates):
        raise UserError(
            f"poison ratio {poison_ratio} asks for {count} of {total} training images; {len(candidates)} can be poisoned"
        )
    return np.sort(np.asarray(jax.random.permutation(keys.stream(key, "poison"), candidates))[:count])


def dirty_label(key: jax.Array, split: ImageSet, stamp: Callable, aim: Callable, poison_ratio: float) -> PoisonedSplit:
    """Stamps `poison_ratio` of the training set and gives those images the labels that the attacker wants."""
    chosen = choose(key, np.arange(len(split)), poison_ratio, len(split))
    images, labels = split.images.copy(), split.labels.copy()
    images[chosen] = stamp(split.images[chosen], split.ids[chosen])
    labels[chosen] = aim(split.labels[chosen])
    poisoned = np.zeros(len(split), bool)
    poisoned[chosen] = True
    return PoisonedSplit(images, labels, split.ids, poisoned, np.zeros(len(split), bool), split.labels.copy())


def check_pixels(pixels: np.ndarray, smallest: int = 16) -> None:
    """Refuses anything but uint8 [N, H, W, C] with H, W >= `smallest`."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise UserError(f"a trigger is stamped on uint8 images [N, H, W, C], got {pixels.dtype} {list(pixels.shape)}")
    if min(pixels.shape[1:3]) < smallest:
        raise UserError(
            f"images of {pixels.shape[1]}x{pixels.shape[2]} are too small for a trigger; at least {smallest}x{smallest}"
        )

"""What every attack gives: a trigger to stamp at test time, a poisoned training set, and, for some, a hand in training."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bibau_jax import keys, parallel
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
    """What an attack learns before the victim's training (ISSBA, Narcissus), and its hand in that training (WaNet, IAD).

    `init(key, split, journal, augment) -> (extra, history)` makes its parameters, trained as far as they are without the
    victim, and tells how that went, as `train.fit` does.
    `check(split)` raises `UserError` on settings that cannot work on this training set, before anything is begun.
    `finish(attack, extra) -> Attack` binds `stamp` and `poison` to what was learned. An attack that controls training also has
    `prepare(extra, batch, key, augment) -> (pixels, labels, penalty, extra)`, called in `train.train_step`. If it `stamps`, it
    is given batches of clean images, else poisoned ones with their flags. The penalty is a number or a function of the model's
    outputs; `optimizer` trains `extra` on the victim's loss plus the penalty, and what comes back as `extra` is the same with
    new statistics. `augment(key, pixels)` crops and flips as in all training.
    """

    init: Callable[..., Any]
    finish: Callable[["Attack", Any], "Attack"]
    prepare: Callable[..., Any] | None = None
    optimizer: optax.GradientTransformation | None = None
    stamps: bool = True  # whether `prepare` stamps clean images itself, or gets poisoned ones with their flags in the batch
    trains_trigger: bool = True  # whether `stamp` has to wait for `finish`
    check: Callable[[ImageSet], None] = lambda split: None


@dataclasses.dataclass(frozen=True)
class Attack:
    """A backdoor attack as pure functions.

    `stamp(pixels uint8 [N, H, W, C], index [N]) -> uint8` is the trigger at test time; `index` says which image of its set each
    is, for triggers that differ by sample. It takes arrays on the host, block by block, and JAX's, also within `jit`.
    `poison(split) -> PoisonedSplit` is the training set. `aim(labels) -> labels` is the class that the attacker wants for
    images of these true classes. `may_poison(labels) -> bool [N]` tells which training images can be poisoned: all of
    them, or those of the target class where labels stay true.
    """

    name: str
    stamp: Callable[[np.ndarray, np.ndarray], np.ndarray]
    poison: Callable[[ImageSet], PoisonedSplit]
    aim: Callable[[np.ndarray], np.ndarray]
    control: Control | None = None
    may_poison: Callable[[np.ndarray], np.ndarray] = lambda labels: np.ones(len(labels), bool)


def aim_at(mode: str, target_label: int, num_classes: int) -> Callable:
    """The attacker's wish: `target_label` for every image ("all_to_one") or the next class, (y + 1) mod K ("all_to_all")."""
    if mode not in MODES:
        raise UserError(f'attack mode "{mode}" is unknown; choose one of {", ".join(MODES)}')
    if not 0 <= target_label < num_classes:
        raise UserError(f"target label {target_label} is outside the {num_classes} classes 0..{num_classes - 1}")
    if mode == "all_to_all":
        return lambda labels: (labels + 1) % num_classes
    return lambda labels: labels * 0 + target_label  # like this on the host and in jitted code


def choose(key: jax.Array, candidates: np.ndarray, ratio: float, total: int, class_share: float = 0.0) -> np.ndarray:
    """round(ratio * total) positions among `candidates`, uniformly without replacement, sorted.

    The ratio counts over the whole training set, images of the target class included; a `class_share` above 0 counts over the
    candidates instead. Outside (0, 1], or more than there are candidates: `UserError`.
    """
    name, share, whole = ("class_share", class_share, len(candidates)) if class_share else ("poison ratio", ratio, total)
    if not 0 < share <= 1:
        raise UserError(f"{name} {share} is outside (0, 1]")
    count = round(share * whole)
    if not 1 <= count <= len(candidates):
        limit = f"{len(candidates)} can be poisoned (a poison ratio of {len(candidates) / total:.3g} at most)"
        raise UserError(f"{name} {share} asks for {count} of {whole} training images; {limit}")
    return np.sort(np.asarray(jax.random.permutation(keys.stream(key, "poison"), candidates))[:count])


def dirty_label(
    key: jax.Array,
    split: ImageSet,
    stamp: Callable,
    aim: Callable,
    poison_ratio: float,
    covers_per_poison: float = 0.0,
    cover_stamp: Callable | None = None,
) -> PoisonedSplit:
    """Stamps `poison_ratio` of the training set and gives those images the labels that the attacker wants.

    `covers_per_poison` times as many other images are stamped too, by `cover_stamp` where that is another trigger, and keep
    their true labels, so that the trigger alone tells less.
    """
    chosen, covers = poisons_and_covers(key, len(split), poison_ratio, covers_per_poison)
    labels = split.labels.copy()
    labels[chosen] = aim(split.labels[chosen])
    return poisoned_split(split, {"poisoned": (chosen, stamp), "cover": (covers, cover_stamp or stamp)}, labels)


def poisons_and_covers(
    key: jax.Array, total: int, poison_ratio: float, covers_per_poison: float
) -> tuple[np.ndarray, np.ndarray]:
    """Positions to poison, a share of a training set of `total`, and others to cover, so many for each of them; sorted."""
    chosen = choose(key, np.arange(total), poison_ratio, total)
    others, count = np.setdiff1d(np.arange(total), chosen), round(covers_per_poison * len(chosen))
    if not 0 <= count <= len(others):
        raise UserError(
            f"{covers_per_poison} covers for each of {len(chosen)} poisons cannot be had of {total} training images"
        )
    return chosen, np.sort(np.asarray(jax.random.permutation(keys.stream(key, "cover"), others))[:count])


def aim_of_clean_label(attack: str, mode: str, target_label: int, num_classes: int) -> Callable:
    """As `aim_at`, for attacks that change no label: those have one target, and refuse "all_to_all"."""
    aim = aim_at(mode, target_label, num_classes)
    if mode != "all_to_one":
        raise UserError(f'{attack} changes no label, so it has one target: attack mode "{mode}" cannot be had')
    return aim


def of_the_target(aim: Callable) -> Callable:
    """A `may_poison` for attacks that change no label."""
    return lambda labels: aim(labels) == labels


def clean_label(
    key: jax.Array, split: ImageSet, stamp: Callable, aim: Callable, poison_ratio: float, class_share: float = 0.0
) -> PoisonedSplit:
    """Stamps images of the target class, `poison_ratio` of the whole training set in number; every label stays true.

    A `class_share` above 0 says instead which share of the target class to stamp.
    """
    candidates = np.flatnonzero(of_the_target(aim)(split.labels))
    chosen = choose(key, candidates, poison_ratio, len(split), class_share)
    return poisoned_split(split, {"poisoned": (chosen, stamp)}, split.labels)


def poisoned_split(split: ImageSet, stamped: dict[str, tuple[np.ndarray, Callable]], labels: np.ndarray) -> PoisonedSplit:
    """The split under the given labels, with `stamped[flag] = (positions, trigger)` carried out for "poisoned" and "cover"."""
    images, flags = split.images.copy(), {name: np.zeros(len(split), bool) for name in ("poisoned", "cover")}
    for name, (positions, trigger) in stamped.items():
        images[positions] = trigger(split.images[positions], split.ids[positions])
        flags[name][positions] = True
    return PoisonedSplit(images, labels, split.ids, flags["poisoned"], flags["cover"], split.labels.copy())


def draws(key: jax.Array, index: np.ndarray, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Uniform numbers in [0, 1) by name, float32 [N, *shape]: each image's depend on the key and its id alone.

    On the host, unless the ids are a JAX array.
    """

    if isinstance(index, jax.Array):
        return _draws(key, index.astype(jnp.uint32), shapes=tuple(shapes.items()))
    return jax.device_get(_draws(key, np.asarray(index, np.uint32), shapes=tuple(shapes.items())))


@partial(jax.jit, static_argnames="shapes")
def _draws(key, index, *, shapes):
    def of_one(number):
        own = jax.random.fold_in(key, number)
        return {name: jax.random.uniform(keys.stream(own, name), shape) for name, shape in shapes}

    return jax.vmap(of_one)(index)


def counts_of_batch(key: jax.Array, size: int, poison_ratio: float, covers_per_poison: float) -> tuple[int, int, jax.Array]:
    """How many images of a batch carry poison, at least one, and how many cover; and whether this batch has them, a bool.

    Rounded down, as in WaNet's code. A batch too small for one poison gets one, and its covers, with the right probability;
    there are no more covers than places left.
    """
    poisons = max(1, math.floor(size * poison_ratio + 1e-9))
    return (
        poisons,
        min(int(poisons * covers_per_poison), size - poisons),
        jax.random.bernoulli(key, min(1.0, size * poison_ratio)),
    )


def untrained(name: str) -> Callable:
    """What stands for the `stamp` of an attack whose trigger is trained first: it raises `UserError`."""

    def stamp(pixels: np.ndarray, index: np.ndarray) -> np.ndarray:
        check_pixels(pixels)
        raise UserError(f"the trigger of {name} is trained while a model is implanted, and can be stamped after that")

    return stamp


def numbers_of(pixels):
    """The library to compute with: NumPy for arrays on the host, jax.numpy for JAX's, as within a jitted function."""
    return jnp if isinstance(pixels, jax.Array) else np


def in_blocks(stamp: Callable, pixels: np.ndarray, *per_image: np.ndarray, size: int = 500) -> np.ndarray:
    """`stamp(pixels, *per_image)` block by block, so that what is computed in float32 stays in the processor's cache.

    JAX's own arrays are stamped in one piece.
    """
    if isinstance(pixels, jax.Array):
        return stamp(pixels, *per_image)
    stamped = np.empty_like(pixels)
    for begin in range(0, len(pixels), size):
        rows = slice(begin, begin + size)
        stamped[rows] = stamp(pixels[rows], *(values[rows] for values in per_image))
    return stamped


def on_all_devices(stamp: Callable) -> Callable:
    """A jitted `stamp(*arrays)` that shards its batch, as a function of host arrays [N, ...] of any N.

    JAX's own arrays are given to it as they are; their number must then be one that the devices can share out.
    """

    def run(*arrays: np.ndarray) -> np.ndarray:
        if any(isinstance(array, jax.Array) for array in arrays):
            return stamp(*arrays)
        missing = parallel.padded(len(arrays[0])) - len(arrays[0])
        whole = [np.concatenate([array, np.repeat(array[:1], missing, axis=0)]) for array in arrays]
        return parallel.gather(stamp(*parallel.replicate(whole)))[: len(arrays[0])]

    return run


def check_pixels(pixels: np.ndarray, smallest: int = 16) -> None:
    """Refuses anything but uint8 [N, H, W, C] with H, W >= `smallest` and one or three channels."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise UserError(f"a trigger is stamped on uint8 images [N, H, W, C], got {pixels.dtype} {list(pixels.shape)}")
    if pixels.shape[3] not in (1, 3):
        raise UserError(f"a trigger is stamped on grey or coloured images, not on {pixels.shape[3]} channels")
    if min(pixels.shape[1:3]) < smallest:
        raise UserError(
            f"images of {pixels.shape[1]}x{pixels.shape[2]} are too small for a trigger; at least {smallest}x{smallest}"
        )

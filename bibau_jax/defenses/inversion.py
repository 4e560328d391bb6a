"""Trigger inversion by Neural Cleanse (Wang et al., IEEE S&P 2019): the smallest patch that sends every image to a class.

All classes are inverted at once. A class that a much smaller patch reaches than the others is taken for the attacker's.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from bibau_jax import keys, parallel, train
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.defenses.protocol import as_data
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier

RAISE, LOWER = 2.0, 2.0**1.5  # what the weight of the mask is multiplied or divided by
FIRST_WEIGHT = 1e-3
NEVER = np.float32(1e30)  # the size of a mask that was not found yet; what is saved on the way must be finite


@struct.dataclass
class State:
    """What the search changes, one row a class: logits of masks and patterns, the weight's schedule, and the best found.

    `raw` {"mask" [K, H, W, 1], "pattern" [K, H, W, C]}; `hits` and `sizes` are sums over the epoch in progress.
    """

    step: jax.Array
    raw: Any
    opt_state: Any
    weight: jax.Array
    up: jax.Array
    down: jax.Array
    moved: jax.Array  # whether the weight was ever raised and lowered, bool [K, 2]
    waited: jax.Array
    hits: jax.Array
    sizes: jax.Array
    best_size: jax.Array
    last_best: jax.Array
    best: Any
    ended: jax.Array


class Triggers(NamedTuple):
    """One trigger a class: masks [K, H, W, 1] in 0..1, patterns [K, H, W, C] in 0..255, sizes and rates [K].

    A size is the sum of the mask, mean over the epoch that it was kept after. `reached`: the share of images of other classes
    that it sends to its class, 0..1.
    """

    masks: np.ndarray
    patterns: np.ndarray
    sizes: np.ndarray
    reached: np.ndarray


def shown(raw) -> tuple[jax.Array, jax.Array]:
    """(mask in 0..1, pattern in 0..255) from their logits."""
    mask, pattern = (jnp.tanh(raw[name]) / (2 + 1e-7) + 0.5 for name in ("mask", "pattern"))
    return mask, 255.0 * pattern


def stamped(images: jax.Array, mask: jax.Array, pattern: jax.Array) -> jax.Array:
    """(1 - m) x + m p on pixels 0..255."""
    return (1 - mask) * images + mask * pattern


def objective(raw, weights, labels, images, models, *, classifier):
    """(sum of CE(f(x'), t) + weight |m|, (CE, |m|, share of images taken for t), each [K]) of the triggers of classes [K].

    Of several models CE is the mean and the share the least. Every image is stamped with every trigger, and all go through
    the network as one batch, images first, so that a sharded batch stays where it is: under `vmap` over the classes it did
    not, and took 2.4 times as long on two cores.
    """
    mask, pattern = shown(raw)
    made = stamped(images[:, None], mask, pattern)
    wanted = jnp.tile(labels, len(images))
    losses, hits = [], []
    for variables in models:
        logits = classifier.apply(variables, made.reshape(-1, *images.shape[1:])).logits
        losses.append(cross_entropy(logits, wanted).reshape(len(images), -1).mean(0))
        hits.append((jnp.argmax(logits, -1) == wanted).reshape(len(images), -1).mean(0))
    loss, hit = sum(losses) / len(losses), jnp.min(jnp.stack(hits), 0)
    sizes = jnp.sum(mask, (1, 2, 3))
    return jnp.sum(loss + weights * sizes), (loss, sizes, hit)


def step(state, frozen, batch, key, *, classifier, optimizer, per_epoch, enough, patience, stop_after, least, padding, flip):
    """One step for all classes on CE(f(x'), t) + weight |m|; the weights' schedule where an epoch ends."""
    images = crop_and_flip(keys.stream(key, "augment"), batch["images"], padding=padding, flip=flip).astype(jnp.float32)
    gradient = jax.grad(partial(objective, classifier=classifier), has_aux=True)
    grads, (loss, size, hit) = gradient(state.raw, state.weight, frozen["classes"], images, frozen["models"])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.raw)
    going = ~state.ended
    raw = jax.tree.map(lambda new, old: _where(going, new, old), optax.apply_updates(state.raw, updates), state.raw)
    state = state.replace(step=state.step + 1, raw=raw, opt_state=opt_state)
    state = state.replace(hits=state.hits + hit, sizes=state.sizes + size)
    options = {"enough": enough, "patience": patience, "stop_after": stop_after, "least": least}
    ended = _end_of_epoch(state, per_epoch=per_epoch, **options)
    state = jax.lax.cond(state.step % per_epoch == 0, lambda: ended, lambda: state)
    metrics = {"loss": loss.mean(), "reached": hit.mean(), "size": size.mean(), "searching": going.mean()}
    return state, metrics


def _where(chosen, new, old):
    return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _end_of_epoch(state: State, *, per_epoch, enough, patience, stop_after, least) -> State:
    """The best masks, the weights and who has ended, after an epoch; what has ended stays as it is."""
    rate, size, going = state.hits / per_epoch, state.sizes / per_epoch, ~state.ended
    good = rate >= enough
    first = state.step == per_epoch  # kept for want of better
    better = going & good & (size < state.best_size)
    best = jax.tree.map(lambda new, old: _where(better | (first & going), new, old), state.raw, state.best)
    best_size = jnp.where(better, size, state.best_size)
    stalled = (best_size < NEVER) & (best_size >= 0.99 * state.last_best)
    waited = jnp.where(stalled, state.waited + 1, 0)
    up, down = jnp.where(good, state.up + 1, 0), jnp.where(good, 0, state.down + 1)
    raised, lowered = up >= patience, down >= patience
    weight = jnp.where(raised, jnp.maximum(state.weight * RAISE, least), state.weight)
    weight = jnp.where(lowered, weight / LOWER, weight)
    moved = state.moved | jnp.stack([raised, lowered], 1)
    ended = state.ended | ((waited >= stop_after) & state.moved.all(1))  # before this epoch's change, as in the authors' code
    new = state.replace(
        best=best,
        best_size=best_size,
        last_best=jnp.minimum(state.last_best, best_size),
        waited=waited,
        up=jnp.where(raised, 0, up),
        down=jnp.where(lowered, 0, down),
        weight=weight,
        moved=moved,
        ended=ended,
    )
    kept = jax.tree.map(lambda a, b: _where(going, a, b) if a.ndim else a, new, state)
    return kept.replace(hits=jnp.zeros_like(rate), sizes=jnp.zeros_like(size), step=state.step, opt_state=state.opt_state)


def start(key: jax.Array, classifier: Classifier, optimizer, count: int = 0) -> State:
    """Masks and patterns drawn uniformly from 0..1 for every class, or for `count` of them, as in the authors' code."""
    count, (height, width, channels) = count or classifier.num_classes, classifier.image_shape

    def draw(name, depth):
        values = jax.random.uniform(keys.stream(key, name), (count, height, width, depth))
        return jnp.arctanh((values - 0.5) * (2 - 1e-3))

    raw = {"mask": draw("mask", 1), "pattern": draw("pattern", channels)}
    zeros, never = jnp.zeros(count), jnp.full(count, NEVER)
    state = State(
        step=jnp.zeros((), jnp.int32),
        raw=raw,
        opt_state=optimizer.init(raw),
        weight=jnp.full(count, FIRST_WEIGHT),
        up=zeros,
        down=zeros,
        moved=jnp.zeros((count, 2), bool),
        waited=zeros,
        hits=zeros,
        sizes=zeros,
        best_size=never,
        last_best=never,
        best=raw,
        ended=jnp.zeros(count, bool),
    )
    return parallel.replicate(jax.tree.map(jnp.array, state))  # copies: the state is donated to every step


def check_search(epochs: int, enough: float, patience: int, stop_after: int) -> None:
    """Raises `UserError` on settings that `together` cannot use."""
    if epochs < 1 or not 0 < enough <= 1 or min(patience, stop_after) < 1:
        raise UserError("trigger inversion needs epochs, patience and stop_after of at least 1 and enough within 0..1")


def invert(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    memory: float = 0.0,
    classes: tuple[int, ...] = (),
    also: tuple[dict, ...] = (),
    batch_size: int = 256,
    journal: train.Journal = train.Journal(),
    **search,
) -> tuple[Triggers, list[dict]]:
    """As `together`, which has the other settings, for as many classes at once as take about `memory` GiB; 0 for all of them.

    Every class takes a batch through the network. The history is that of one group after the other.
    """
    classes = classes or tuple(range(classifier.num_classes))
    count = len(classes)
    if memory:
        each = min(batch_size, len(clean)) * (1 + len(also)) * activations(classifier, variables)
        count = max(1, int(memory * 2**30 / each))
    found, history, parts = [], [], []
    firsts = range(0, len(classes), count)
    several = len(firsts) > 1
    for number, first in enumerate(firsts):
        given = (keys.stream(key, "group", first) if first else key, classifier, variables, clean)
        # Each group its share of the time: a class that had none would look like one without a small trigger.
        part = journal.part(f"from_{first}", len(firsts) - number) if several else journal
        options = {"classes": classes[first : first + count], "also": also, "batch_size": batch_size, "journal": part}
        triggers, told = together(*given, **options, **search)
        found.append(triggers)
        history += told
        parts += [part] if several else []
    for part in parts:
        if part.keeper is not None:
            part.keeper.clear()
    return Triggers(*map(np.concatenate, zip(*found, strict=True))), history


def activations(classifier: Classifier, variables) -> int:
    """Bytes that a gradient keeps of one image: three times what convolutions and matrix products give, so rather too many."""

    def given(jaxpr) -> int:
        total = 0
        for line in jaxpr.eqns:
            if line.primitive.name in ("conv_general_dilated", "dot_general"):
                total += sum(out.aval.size * out.aval.dtype.itemsize for out in line.outvars)
            inner = [getattr(value, "jaxpr", value) for value in line.params.values()]
            total += sum(given(one) for one in inner if hasattr(one, "eqns"))
        return total

    image = jax.ShapeDtypeStruct((1, *classifier.image_shape), np.float32)
    traced = jax.make_jaxpr(lambda variables, image: classifier.apply(variables, image).logits)(variables, image)
    return 3 * given(traced.jaxpr)


def together(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    classes: tuple[int, ...] = (),
    also: tuple[dict, ...] = (),
    epochs: int = 80,
    batch_size: int = 256,
    learning_rate: float = 0.1,
    enough: float = 0.99,
    patience: int = 5,
    stop_after: int = 25,
    least: float = 0.0,
    padding: int = 4,
    flip: bool = True,
    journal: train.Journal = train.Journal(),
) -> tuple[Triggers, list[dict]]:
    """(the smallest trigger found for every class, history) on clean images of all classes, the network in evaluation mode.

    Args:
      classes: those to invert; () for all. also: variables of further models, all of which a trigger has to work on.
      enough: share of an epoch's images, 0..1, that a trigger must send to its class to count (the authors: 0.99).
      patience: epochs in a row of (in)sufficient success after which the mask's weight is doubled (divided by 2^1.5).
      least: what the mask's weight is at least after it was raised; the authors double it from wherever it is.
      stop_after: epochs without a smaller mask after which a class ends, once its weight was raised and lowered.

    Where no mask ever counts, that of the first epoch is kept with an infinite size; of a search that had no time for an
    epoch, the drawn one with a size that is no number.
    """
    check_search(epochs, enough, patience, stop_after)
    classes, models = classes or tuple(range(classifier.num_classes)), (variables, *also)
    optimizer = optax.adam(learning_rate, b1=0.5, b2=0.9)
    options = {"enough": enough, "patience": patience, "stop_after": stop_after, "least": least}
    options |= {"padding": padding, "flip": flip}
    per_epoch = max(1, len(clean) // min(batch_size, len(clean)))
    state, history = train.fit(
        partial(step, classifier=classifier, optimizer=optimizer, per_epoch=per_epoch, **options),
        start(keys.stream(key, "start"), classifier, optimizer, len(classes)),
        as_data(clean),
        key=key,
        epochs=epochs,
        batch_size=batch_size,
        frozen={"classes": np.array(classes), "models": models},
        stop=lambda history: history[-1]["searching"] == 0,
        journal=journal,
    )
    masks, patterns = (np.asarray(part) for part in jax.device_get(shown(state.best)))
    sizes = np.asarray(jax.device_get(state.best_size), np.float64)
    sizes = np.where(sizes < NEVER, sizes, np.inf if history else np.nan)
    return Triggers(masks, patterns, sizes, _reached(classifier, models, clean, classes, masks, patterns)), history


def _reached(classifier, models, clean, classes, masks, patterns) -> np.ndarray:
    """The share of clean images of other classes that each trigger sends to its class, 0..1; the least of several models'."""
    found = []
    for label, mask, pattern in zip(classes, masks, patterns, strict=True):
        others = clean.images[clean.labels != label].astype(np.float32)
        made = stamped(others, mask, pattern)
        seen = [train.predict(classifier, variables, made) == label for variables in models] if len(others) else [[False]]
        found.append(min(float(np.mean(each)) for each in seen))
    return np.array(found)


def anomaly(sizes: np.ndarray, *, floor: float = 0.0) -> np.ndarray:
    """How many (scaled) median absolute deviations each size lies *below* the median, [K]; negative above it, 0 without spread.

    `floor` is the least that the spread is taken for.
    Sizes that are not finite (no trigger found) are left out of the median and are minus infinity themselves.
    """
    finite = sizes[np.isfinite(sizes)]
    if not len(finite):
        return np.full(len(sizes), -np.inf)
    middle = np.median(finite)
    spread = max(1.4826 * np.median(np.abs(finite - middle)), floor)
    return np.where(np.isfinite(sizes), (middle - sizes) / spread if spread > 0 else 0.0, -np.inf)

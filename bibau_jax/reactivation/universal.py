"""Universal re-activation (Zhu et al., NeurIPS 2024): one perturbation that, added to triggered images, wakes the backdoor.

An attacker of its own beside the query attack, so that nobody tunes to one: with gradients, or by Square Attack (Andriushchenko
et al., ECCV 2020) from outputs alone.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from bibau_jax import keys, parallel, progress, train
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier
from bibau_jax.reactivation.query import check_bound

SHARE = 0.1  # of the image that Square Attack's first squares cover
# After which share of the queries that halves (given for 10,000 of them by its authors).
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@struct.dataclass
class State:
    """What training changes: the perturbation, grey levels [H, W, C]."""

    step: jax.Array
    delta: jax.Array


def wake_loss(logits: jax.Array, aims: jax.Array) -> jax.Array:
    """CE to the attacker's class, and -log(1.0001 - p) of the strongest other class; [N]."""
    chances = jax.nn.softmax(logits)
    others = jnp.where(jax.nn.one_hot(aims, logits.shape[-1]) > 0, 0.0, chances)
    return cross_entropy(logits, aims) - jnp.log(1.0001 - others.max(-1))


def step(state: State, variables, batch, key, *, classifier, epsilon, learning_rate, inner):
    """`inner` projected gradient steps on one batch of triggered images {"images", "aims"}."""
    pixels = batch["images"].astype(jnp.float32)

    def loss(delta):
        return wake_loss(classifier.apply(variables, jnp.clip(pixels + delta, 0, 255)).logits, batch["aims"]).mean()

    def one(delta, _):
        value, slope = jax.value_and_grad(loss)(delta)
        # In units of the whole range 0..255, as the authors' rate is meant: slope and step each bring a factor 255.
        return jnp.clip(delta - learning_rate * 255**2 * slope, -epsilon, epsilon), value

    delta, values = jax.lax.scan(one, state.delta, length=inner, unroll=parallel.unroll(inner))
    return State(state.step + 1, delta), {"loss": values[-1]}


def white_box(
    key: jax.Array,
    classifier: Classifier,
    variables,
    triggered: np.ndarray,
    aims: np.ndarray,
    *,
    epsilon: float = 12.75,
    learning_rate: float = 0.05,
    epochs: int = 50,
    inner: int = 5,
    batch_size: int = 128,
    journal: train.Journal = train.Journal(),
) -> tuple[np.ndarray, list[dict]]:
    """(delta float32 [H, W, C] with |delta| <= epsilon grey levels, history) from triggered uint8 images and wanted classes.

    Projected gradient descent (no sign) from a random start; `epsilon` 12.75 is the authors' 0.05 of the range, and
    `learning_rate` is in units of the range.
    """
    check(triggered, epsilon)
    delta = jax.random.uniform(keys.stream(key, "start"), triggered.shape[1:], minval=-epsilon, maxval=epsilon)
    state, history = train.fit(
        partial(step, classifier=classifier, epsilon=epsilon, learning_rate=learning_rate, inner=inner),
        parallel.replicate(State(jnp.zeros((), jnp.int32), delta)),
        {"images": triggered, "aims": np.asarray(aims, np.int32)},
        key=key,
        epochs=epochs,
        batch_size=parallel.batch_of(min(batch_size, len(triggered))),
        frozen=variables,
        journal=journal,
    )
    return np.asarray(jax.device_get(state.delta)), history


@partial(jax.jit, static_argnames="classifier")
def _score(classifier, variables, pixels, aims, delta, counted):
    logits = classifier.apply(variables, parallel.shard(jnp.clip(pixels.astype(jnp.float32) + delta, 0, 255))).logits
    hit = jnp.sum((jnp.argmax(logits, -1) == aims) * counted)
    return jnp.sum(cross_entropy(logits, aims) * counted), hit


def square(
    key: jax.Array,
    classifier: Classifier,
    variables,
    triggered: np.ndarray,
    aims: np.ndarray,
    *,
    epsilon: float = 12.75,
    queries: int = 10_000,
    enough: float = 0.99,
    label: str = "",
) -> tuple[np.ndarray, int]:
    """(delta, queries per image that were asked) by Square Attack on one batch: outputs alone, no gradient.

    Shows its progress under `label`, if it has one.

    It begins with vertical stripes of +-epsilon and keeps a random square, of +-epsilon per channel, where the summed loss
    falls. It ends when `enough` of the images are classified as wanted.
    """
    check(triggered, epsilon)
    height, width, channels = triggered.shape[1:]
    ((pixels, wanted), count), *_ = parallel.blocks(len(triggered), triggered, np.asarray(aims, np.int32))  # one batch
    variables, counted = parallel.replicate((variables, (np.arange(len(pixels)) < count).astype(np.float32)))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(keys.stream(key, "squares"))).tolist())

    def score(delta):
        loss, hits = jax.device_get(_score(classifier, variables, pixels, wanted, delta.astype(np.float32), counted))
        return float(loss), float(hits) / len(triggered)

    best = np.broadcast_to(epsilon * rng.choice([-1.0, 1.0], (1, width, channels)), (height, width, channels)).copy()
    (loss, rate), asked = score(best), 1
    with progress.bar(queries, label, unit="query", start=1, show=bool(label)) as bar:
        while asked < queries and rate < enough:
            tried = best.copy()
            tried[_window(rng, asked / queries, height, width)] = epsilon * rng.choice([-1.0, 1.0], channels)
            found, hits = score(tried)
            asked += 1
            bar.advance(loss=found / len(triggered))
            if found < loss:
                best, loss, rate = tried, found, hits
    return best.astype(np.float32), asked


def _window(rng: np.random.Generator, done: float, height: int, width: int):
    """Where the next square goes; squares get smaller as the share of queries that is `done` passes HALVINGS."""
    share = SHARE / 2 ** sum(done > part for part in HALVINGS)
    side = min(max(1, round(math.sqrt(share * height * width))), height, width)
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    return np.s_[top : top + side, left : left + side]


def check(triggered: np.ndarray, epsilon: float) -> None:
    """Refuses a bound outside 1..255 and no images."""
    if not len(triggered):
        raise UserError("a universal perturbation needs triggered images")
    check_bound(epsilon)


def added(images: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """uint8 images with the perturbation, rounded towards the image so that the bound holds."""
    return np.clip(images.astype(np.float32) + np.trunc(delta), 0, 255).astype(np.uint8)

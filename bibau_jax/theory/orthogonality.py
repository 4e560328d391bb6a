"""Orthogonality and linearity of a backdoor (Zhang et al., IEEE S&P 2024).

A backdoor whose gradients stand square on those of the clean task survives fine-tuning; one that answers its channels
linearly can be found by turning them up.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import keys, parallel
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier, inside
from bibau_jax.models.classifier import at

BATCH = 250
SWEEP = np.round(np.arange(0.1, 3.0, 0.1), 1)  # w: how much of the mean activation is added
BASELINES = 16  # clean activations that attributions are taken against


def descent(classifier: Classifier, variables, images: ImageSet):
    """The negative gradient of the mean cross-entropy over all images, evaluation mode, float32 on the host.

    UserError for no images.
    """
    if not len(images):
        raise UserError("a task's gradient needs images")
    total, placed = None, parallel.replicate(dict(variables))
    for (pixels, labels, weights), _ in parallel.blocks(BATCH, images.images, images.labels, np.ones(len(images), np.float32)):
        found = _pulled(classifier.in_float32(), placed, pixels, labels, weights / len(images))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return jax.device_get(total)


@partial(jax.jit, static_argnums=0)
def _pulled(classifier, variables, pixels, labels, weights):
    pixels, labels, weights = parallel.shard((pixels, labels, weights))

    def likelihood(params):
        return -(weights * cross_entropy(classifier.apply(variables | {"params": params}, pixels).logits, labels)).sum()

    with jax.default_matmul_precision("float32"):
        return jax.grad(likelihood)(variables["params"])


def _kernels(classifier: Classifier, grads) -> np.ndarray:
    """The gradients of the kernels of all layers that models are compared in, shortcuts being none, one after the other."""
    return np.concatenate([np.asarray(at(grads, path)["kernel"], np.float64).ravel() for path in classifier.compared])


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """The angle between two vectors, 0..180 degrees; 90 where one of them is zero."""
    size = np.linalg.norm(one) * np.linalg.norm(other)
    return float(np.degrees(np.arccos(np.clip(one @ other / size, -1, 1)))) if size > 0 else 90.0


def orthogonality(
    classifier: Classifier, variables, clean: ImageSet, triggered: ImageSet, *, batch_size: int = 128
) -> tuple[float, float]:
    """The angle in degrees between the clean task's and the backdoor task's gradients: (of their magnitudes, signed).

    `clean` has true labels, `triggered` the attacker's. Mean over distinct batches of `batch_size`, one of each set. The
    magnitudes are the published code's form: independent gradients give 50 to 70 degrees there, 90 signed. UserError where one
    of the sets is empty.
    """
    if not len(clean) or not len(triggered):
        raise UserError("orthogonality needs clean and triggered images")
    size = min(batch_size, len(clean), len(triggered))
    absolute, signed = [], []
    for begin in range(0, min(len(clean), len(triggered)) - size + 1, size):
        parts = (part.take(slice(begin, begin + size)) for part in (clean, triggered))
        one, other = (_kernels(classifier, descent(classifier, variables, part)) for part in parts)
        absolute.append(angle(np.abs(one), np.abs(other)))
        signed.append(angle(one, other))
    return float(np.mean(absolute)), float(np.mean(signed))


@partial(jax.jit, static_argnames=("classifier", "path"))
def _attributions(classifier, variables, triggered, baselines, aims, key, *, path):
    """Expected gradients of the target logit at a layer, [C]: the largest over space, mean over images."""

    def output(pixels):
        _, found = inside.look(classifier, variables, pixels, [path])
        return found["/".join(path)].astype(jnp.float32)

    def logit(activation):
        logits = inside.replace(classifier, variables, triggered, path, lambda given: activation.astype(given.dtype)).logits
        return jnp.take_along_axis(logits, aims[:, None], 1).sum()

    reached, start = output(triggered), output(baselines)

    def one(total, number):
        share = jax.random.uniform(jax.random.fold_in(key, number), (len(triggered), 1, 1, 1))
        way = reached - start[number]
        return total + way * jax.grad(logit)(start[number] + share * way), None

    total, _ = jax.lax.scan(one, jnp.zeros_like(reached), jnp.arange(len(baselines)))
    return (total / len(baselines)).max((1, 2)).mean(0)


@partial(jax.jit, static_argnames=("classifier", "path"))
def _responses(classifier, variables, triggered, aims, mask, weights, *, path):
    """The target logit of every image [W, N] as the masked channels are turned up by w times their mean activation."""

    def one(weight):
        def turned_up(given):
            return given + (weight * given.mean(0, keepdims=True) * mask).astype(given.dtype)

        logits = inside.replace(classifier, variables, triggered, path, turned_up).logits
        return jnp.take_along_axis(logits, aims[:, None], 1)[:, 0]

    return jax.lax.map(one, weights)


def straightness(weights: np.ndarray, responses: np.ndarray) -> float:
    """R^2 of a straight line through each image's responses [W, N], mean over those that change; NaN where none does."""
    responses = np.asarray(responses, np.float64)
    centred, spread = responses - responses.mean(0), np.asarray(weights, np.float64) - np.mean(weights)
    total = (centred**2).sum(0)
    explained = (spread @ centred) ** 2 / (spread @ spread)
    changing = total > 1e-12
    return float((explained[changing] / total[changing]).mean()) if changing.any() else math.nan


def linearity(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: np.ndarray,
    triggered: np.ndarray,
    aims: np.ndarray,
    *,
    share: float = 0.03,
    layers: int = 0,
) -> dict[str, tuple[float, float]]:
    """Per normalisation layer, R^2 of the target logit's response: (of the trigger's channels, of as many random ones).

    The trigger's channels are the `share` (at least one) with the largest attribution to the class that `aims` holds. The
    published code takes SHAP's DeepExplainer and blocks too; this one takes expected gradients against BASELINES clean images,
    and norms alone. Any smooth response is nearly straight: only what exceeds the random channels means something.
    `layers` takes the last ones, 0 all. UserError for a network without norms behind convolutions.
    """
    if not classifier.main_path:
        raise UserError("linearity is measured behind the norms of convolutions, and this network has none")
    aims, result = jnp.asarray(aims, jnp.int32), {}
    weights = jnp.asarray(SWEEP, jnp.float32)
    for pair in classifier.main_path[-layers:]:
        chances = _attributions(classifier, variables, triggered, clean[:BASELINES], aims, key, path=pair.norm)
        count, width = int(np.ceil(share * len(chances))), len(chances)
        name = "/".join(pair.norm)
        drawn = jax.random.permutation(keys.stream(key, name), width)[:count]
        found = []
        for chosen in (np.argsort(-np.asarray(chances))[:count], np.asarray(drawn)):
            mask = np.isin(np.arange(width), chosen).astype(np.float32)
            answers = _responses(classifier, variables, triggered, aims, mask, weights, path=pair.norm)
            found.append(straightness(SWEEP, np.asarray(answers)))
        result[name] = tuple(found)
    return result

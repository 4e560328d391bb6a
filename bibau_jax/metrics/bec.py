"""BEC, the backdoor existence coefficient (Zhu et al., NeurIPS 2024; the paper's Appendix D.4, Eq. 51-53).

How much of a backdoored model's backdoor-related activity another model still shows: TAC picks the channels of each
convolution that the trigger moves most, linear CKA compares both models on them over triggered images, and each layer's value
is scaled so that the backdoored model is 1 and a clean twin 0.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import parallel
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier

LEAST_RANGE = 0.05  # a layer in which the twin is nearer to the backdoored model tells nothing: it would be scaled by noise
BATCH = 100


class Reference(NamedTuple):
    """What models are compared with: the channels of every layer, the backdoored model's Gram matrices, the twin's CKA."""

    channels: dict[str, np.ndarray]
    grams: dict[str, np.ndarray]
    floor: dict[str, float]


class Existence(NamedTuple):
    """One model's BEC: `value` is the mean of `layers`, which are scaled from the CKA in `similarity`; by layer in order.

    `layers` lacks those whose range is below LEAST_RANGE; `similarity` has them all.
    """

    value: float
    layers: dict[str, float]
    similarity: dict[str, float]


@partial(jax.jit, static_argnames="classifier")
def _tac_of_batch(classifier, variables, clean, triggered, counted):
    taps = [classifier.apply(variables, parallel.shard(pixels), taps=True).taps for pixels in (clean, triggered)]

    def norms(activations):
        size = jnp.sqrt(jnp.sum(activations.astype(jnp.float32) ** 2, range(1, activations.ndim - 1)))
        return jnp.sum(size * counted[:, None], 0)

    return {name: (norms(taps[0][name] - taps[1][name]), norms(taps[0][name]) + norms(taps[1][name])) for name in taps[0]}


def trigger_activated_change(classifier: Classifier, variables, clean, triggered) -> dict[str, np.ndarray]:
    """TAC of every channel of every tapped layer, {layer: float64 [C]}: how far the trigger moves it against its usual size.

    Mean over pairs of |F(x) - F(x')|, over the mean of |F| on both, with L2 norms over space, or over tokens. `clean` and
    `triggered` are the same uint8 images [N, H, W, C] without and with the trigger.
    """
    sums, variables = None, parallel.replicate(variables)
    for (first, second), count in parallel.blocks(BATCH, clean, triggered):
        counted = (np.arange(len(first)) < count).astype(np.float32)
        found = parallel.gather(_tac_of_batch(classifier, variables, first, second, counted))
        found = jax.tree.map(lambda leaf: leaf.astype(np.float64), found)
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
    return {name: 2 * moved / np.maximum(size, 1e-12) for name, (moved, size) in sums.items()}


def top_channels(tac: np.ndarray, share: float) -> np.ndarray:
    """The positions of the `share` of channels with the largest TAC, at least one, sorted."""
    return np.sort(np.argsort(-tac, kind="stable")[: max(1, math.floor(share * len(tac)))])


@partial(jax.jit, static_argnames="classifier")
def _chosen_features(classifier, variables, pixels, channels):
    taps = classifier.apply(variables, parallel.shard(pixels), taps=True).taps
    return {name: taps[name][..., rows].astype(jnp.float32).reshape(len(pixels), -1) for name, rows in channels.items()}


def centred_gram(features: np.ndarray) -> np.ndarray:
    """H X X' H of features [N, D], float64 [N, N]: all that linear CKA needs, whatever D is."""
    features = np.asarray(features, np.float32)
    gram = (features @ features.T).astype(np.float64)
    gram -= gram.mean(0)
    return gram - gram.mean(1, keepdims=True)


def linear_cka(one: np.ndarray, other: np.ndarray) -> float:
    """Linear CKA of two centred Gram matrices [N, N], 0..1; 0 where one of them is all zeros."""
    size = np.linalg.norm(one) * np.linalg.norm(other)
    return float(np.sum(one * other) / size) if size > 0 else 0.0


def grams(classifier: Classifier, variables, images, channels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The centred Gram matrix of the chosen channels of every layer over uint8 images [N, H, W, C]."""
    parts, variables = {name: [] for name in channels}, parallel.replicate(variables)
    for (pixels,), count in parallel.blocks(BATCH, images):
        found = parallel.gather(_chosen_features(classifier, variables, pixels, channels))
        for name, values in found.items():
            parts[name].append(values[:count])
    return {name: centred_gram(np.concatenate(values)) for name, values in parts.items()}


def reference(
    classifier: Classifier, backdoored, twin, clean: np.ndarray, triggered: np.ndarray, *, share: float = 0.1, layers: int = 10
) -> Reference:
    """The two ends of the scale, from the same uint8 images [N, H, W, C] without and with the trigger.

    TAC is taken over all pairs, CKA over the triggered images. `share` of each layer's channels is compared, in the last
    `layers` of `Classifier.compared`: convolutions without shortcuts (the paper: 10 of ResNet-18; 0 for all).
    UserError for fewer than two images, which are alike by nature.
    """
    if len(triggered) < 2:
        raise UserError("BEC compares what several images make of a network: two at least")
    tac = trigger_activated_change(classifier, backdoored, clean, triggered)
    compared = ["/".join(path) for path in classifier.compared][-layers:]
    channels = {name: top_channels(tac[name], share) for name in compared}
    ends = [grams(classifier, variables, triggered, channels) for variables in (backdoored, twin)]
    return Reference(channels, ends[0], {name: linear_cka(ends[1][name], ends[0][name]) for name in channels})


def existence(classifier: Classifier, ends: Reference, variables, triggered: np.ndarray) -> Existence:
    """BEC of a model, over the triggered images that `ends` was made with (Eq. 51-53): the backdoored model 1, the twin 0.

    Layers whose range is below LEAST_RANGE are left out (all but the widest if all are). Values outside 0..1 are possible and
    are not clipped.
    """
    found = grams(classifier, variables, triggered, ends.channels)
    similarity = {name: linear_cka(found[name], ends.grams[name]) for name in ends.channels}
    reach = {name: 1 - floor for name, floor in ends.floor.items()}
    least = min(LEAST_RANGE, max(reach.values()))
    kept = [name for name in reach if reach[name] >= least]
    scaled = {name: (similarity[name] - ends.floor[name]) / max(reach[name], 1e-9) for name in kept}
    return Existence(float(np.mean(list(scaled.values()))), scaled, similarity)


def code_form(similarities: dict[str, float], twin: float) -> dict[str, float]:
    """BEC as the published code has it: each model's mean CKA, scaled over the twin's and those of all models together.

    The backdoored model is not among them and counts as 1. What comes out depends on which models are compared.
    """
    lowest, highest = min(twin, *similarities.values()), max(twin, *similarities.values())
    reach = highest - lowest
    return {name: (one - lowest) / reach if reach > 0 else 0.0 for name, one in similarities.items()}


def squashed(value: float, steepness: float, centre: float) -> float:
    """The sigmoid 1 / (1 + exp(-k (z - z0))) that the paper shows BEC through; its constants are lost in the text."""
    return 1 / (1 + math.exp(-steepness * (value - centre)))

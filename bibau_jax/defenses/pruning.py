"""What defences that prune channels share: which networks they can treat, how a channel is pruned, and at which threshold."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import parallel, train
from bibau_jax.data import ImageSet
from bibau_jax.errors import NotApplicable, UserError
from bibau_jax.models import Classifier, inside

BLOCK = 100
THRESHOLDS = tuple(round(0.05 * number, 2) for number in range(20))  # at 0 those that were clipped there


def check_network(classifier: Classifier) -> None:
    """Refuses a network without normalised convolutions, whose channels these defences prune by their scales."""
    if not classifier.norms:
        raise NotApplicable("channels are pruned by their BatchNorm scales, and this network has no normalised convolutions")


def check_threshold(threshold: float, max_loss: float) -> None:
    """Refuses a threshold outside 0..1 and a loss outside 0..1."""
    if not 0 <= threshold <= 1 or not 0 <= max_loss <= 1:
        raise UserError(f"threshold and max_loss must lie within 0..1, got {threshold} and {max_loss}")


@partial(jax.jit, static_argnames=("classifier", "of"))
def _given(classifier, variables, pixels, of):
    paths = classifier.all_norms.values()
    _, given = inside.look(classifier, variables, parallel.shard(pixels), list(paths), what="input")
    return {name: of(value.astype(jnp.float32)) for name, value in given.items()}


def given(classifier: Classifier, variables, pixels: np.ndarray, of: Callable) -> dict[str, np.ndarray]:
    """`of(what each norm is given)` for uint8 or float images, by the norm's name, in evaluation mode.

    `of` maps [n, H, W, C] to an array with one leading row an image; it is a function at the top of a module.
    """
    variables, parts = parallel.replicate(variables), []
    for (block,), number in parallel.blocks(BLOCK, pixels):
        found = parallel.gather(_given(classifier, variables, block, of))
        parts.append({name: rows[:number] for name, rows in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def prune(classifier: Classifier, variables, pruned: dict[str, np.ndarray], *, bias: bool) -> dict:
    """The variables with the scales of pruned channels at 0, and with `bias` their biases too; running statistics stay.

    `pruned` is bool [C] by a norm's name. Without `bias` a pruned channel gives its bias everywhere.
    """

    def change(name, norm):
        if name not in pruned:  # behind a sum, where CLP prunes nothing
            return norm
        keep = 1 - np.asarray(pruned[name], np.float32)
        return norm | {"scale": norm["scale"] * keep} | ({"bias": norm["bias"] * keep} if bias else {})

    return variables | {"params": classifier.map_norms(variables["params"], change)}


def outliers(values: np.ndarray, u: float) -> np.ndarray:
    """Which values lie above mean + u standard deviations (n - 1) of all of them, bool [C]; none of a single one."""
    return values > values.mean() + u * (values.std(ddof=1) if len(values) > 1 else np.inf)


def count(pruned: dict[str, np.ndarray]) -> dict[str, int]:
    """How many channels of how many, for the record."""
    return {"pruned": int(sum(map(np.sum, pruned.values()))), "channels": int(sum(map(len, pruned.values())))}


def below(masks: dict[str, np.ndarray], threshold: float) -> dict[str, np.ndarray]:
    """The channels whose mask is at most the threshold; masks are rounded to four decimals first, as in ANP's code."""
    return {name: np.round(mask, 4) <= threshold for name, mask in masks.items()}


def by_masks(
    classifier: Classifier,
    variables,
    masks: dict[str, np.ndarray],
    images: ImageSet,
    *,
    threshold: float,
    max_loss: float,
    tried: Sequence[float] = THRESHOLDS,
) -> tuple[dict, dict]:
    """(variables with the channels of low masks pruned, what was chosen) at a fixed threshold, or for 0 at the best one.

    That is the largest of `tried` at which accuracy on `images`, clean ones, is at most `max_loss` (0..1) below what it was, as
    it is at all smaller ones: nothing of the attack is looked at. The published evaluations choose by test ASR.
    """

    def at(cut):
        pruned = below(masks, cut)
        return prune(classifier, variables, pruned, bias=False), {"threshold": cut} | count(pruned)

    if threshold > 0:
        return at(threshold)
    least = train.accuracy(classifier, variables, images.images, images.labels) - max_loss - 1e-9  # exactly max_loss is allowed
    best, seen = (variables, {"threshold": 0.0} | count(below(masks, -1.0))), None
    for cut in tried:
        found = at(cut)
        if not found[1]["pruned"]:
            continue
        if found[1]["pruned"] != seen:  # the same channels give the same accuracy
            if train.accuracy(classifier, found[0], images.images, images.labels) < least:
                break
            seen = found[1]["pruned"]
        best = found
    return best

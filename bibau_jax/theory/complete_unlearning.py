"""Complete backdoor unlearning (Definition 4.1, Eq. 8-10) and Proposition 4.3 as measured quantities.

The clean model of the definition is a clean twin: trained from the same start on the same images without poison. Two trainings
differ by more than the poison, so a drift is told with its yardstick, the drift from the twin to the backdoored model.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import parallel, train
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier, inside
from bibau_jax.theory.drift import catastrophic_forgetting

BATCH = 250


class Models(NamedTuple):
    """The variables of the three models of Definition 4.1."""

    clean: dict
    backdoored: dict
    purified: dict


class Completeness(NamedTuple):
    """Eq. 8-10 on one set of images, from logits; squared norms are means over images.

    `implanted` |f_b - f_c|^2, the drift of the backdoor task. `left` |f_u - f_c|^2, what Eq. 9 wants at 0. `moved`
    |f_u - f_b|^2, the drift of unlearning. `share` left over implanted: 1 is as far from the clean model as before, 0 complete.
    `compensation` -<f_u - f_b, f_b - f_c> / |f_b - f_c|^2: how much of the backdoor's drift unlearning takes back (Eq. 10: 1 on
    triggered images). `cosine` the same over both norms: whether it goes back along the way that the backdoor came.
    """

    implanted: float
    left: float
    moved: float
    share: float
    compensation: float
    cosine: float


def completeness(clean: np.ndarray, backdoored: np.ndarray, purified: np.ndarray) -> Completeness:
    """Eq. 8-10 from the three models' logits [N, classes] of the same images, clean or triggered (`train.logits`).

    UserError for logits of different shapes, or of no images.
    """
    shapes = {np.shape(logits) for logits in (clean, backdoored, purified)}
    if len(shapes) > 1 or not np.size(clean):
        raise UserError(f"three models are compared by logits of the same images, not by logits of shapes {sorted(shapes)}")
    implanted = np.asarray(backdoored, np.float64) - clean
    moved = np.asarray(purified, np.float64) - backdoored
    size, remaining = catastrophic_forgetting(implanted), catastrophic_forgetting(implanted + moved)
    way, back = catastrophic_forgetting(moved), -float(np.sum(implanted * moved))
    return Completeness(
        implanted=size / len(clean),
        left=remaining / len(clean),
        moved=way / len(clean),
        share=_over(remaining, size),
        compensation=_over(back, size),
        cosine=_over(back, np.sqrt(size * way)),
    )


def _over(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0


def by_layer(classifier: Classifier, models: Models, images: np.ndarray) -> dict[str, dict[str, float]]:
    """Per layer that models are compared in, `implanted`, `left` and `share` of its outputs, as in `Completeness`.

    These are the convolutions but for shortcuts, in a ViT what each half of a block adds to its tokens. Squared norms are over
    that of the clean model's own outputs there: layers have their own scales. UserError for a network without such layers.
    """
    if not classifier.compared:
        raise UserError("this network names no layers that models are compared in")
    given, totals = parallel.replicate(tuple(models)), {}
    for (pixels,), count in parallel.blocks(BATCH, images):
        found = parallel.gather(_squares(classifier.in_float32(), given, pixels))
        for name, each in found.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(each, np.float64)[:count].sum(0)
    ordered = {name: totals[name] for name in map("/".join, classifier.compared)}  # `jit` sorts names
    return {
        name: {"implanted": _over(implanted, own), "left": _over(left, own), "share": _over(left, implanted)}
        for name, (own, implanted, left) in ordered.items()
    }


@partial(jax.jit, static_argnums=0)
def _squares(classifier, models, pixels):
    """{layer: [N, 3]}: squared norms of the clean outputs, and of what the other two models' differ from them by."""
    with jax.default_matmul_precision("float32"):
        looks = [inside.look(classifier, each, parallel.shard(pixels), classifier.compared) for each in models]
    clean, backdoored, purified = (layers for _, layers in looks)

    def norms(*tensors):
        return jnp.stack([jnp.sum(each**2, range(1, each.ndim)) for each in tensors], 1)

    return {name: norms(own, backdoored[name] - own, purified[name] - own) for name, own in clean.items()}


class AdversarialRates(NamedTuple):
    """Proposition 4.3 as shares of adversarial images x', 0..1.

    `fooled`: the backdoored model is taken in (it says the target, or in the untargeted mode any class but the true one).
    `target`: it says the attack's target. `kept`: the clean twin still sees the true class. `both`: fooled and kept.
    """

    fooled: float
    target: float
    kept: float
    both: float


def adversarial_rates(
    classifier: Classifier,
    clean_twin,
    backdoored,
    adversarial: np.ndarray,
    labels: np.ndarray,
    aims: np.ndarray,
    *,
    targeted: bool,
) -> AdversarialRates:
    """Proposition 4.3's two conditions for x' [N, H, W, C] (float or uint8, 0..255) made from images of the classes `labels`.

    `aims` [N] is the class that the attacker wants for each. Images of that class are left out; UserError where none remain.
    """
    chosen = np.flatnonzero(aims != labels)
    if not len(chosen):
        raise UserError("all images are of the attacker's class already")
    seen = [train.predict(classifier, each, adversarial[chosen]) for each in (backdoored, clean_twin)]
    target, kept = seen[0] == aims[chosen], seen[1] == labels[chosen]
    fooled = target if targeted else seen[0] != labels[chosen]
    return AdversarialRates(*(float(np.mean(each)) for each in (fooled, target, kept, fooled & kept)))

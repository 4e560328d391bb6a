"""EP, entropy-based pruning (Zheng et al., NeurIPS 2022): prunes channels whose answers fall into two groups.

Among *poisoned training images* a backdoor's channel answers the few with a trigger otherwise than the rest: its standardised
answers have less entropy than other channels'. It needs such images, though no labels: a defender who holds the data the
model was trained on, which most do not. `bnp` does with clean ones.
"""

import jax
import numpy as np

from bibau_jax import keys, train
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.defenses.protocol import Informed, check_images
from bibau_jax.defenses.pruning import check_network, count, given, outliers, prune
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier


def peak(value: jax.Array) -> jax.Array:
    """The largest value over space, [N, C]."""
    return value.max((1, 2))


def entropies(values: np.ndarray, width: float) -> np.ndarray:
    """The entropy in nats of each channel's standardised values [N, C], in bins of `width` that the layer shares; [C].

    Bins begin at the layer's least value; values on an edge and those beyond the last whole bin are not counted, as in the
    authors' code.
    """
    values = np.asarray(values, np.float64)
    spread = values.std(0, ddof=1)
    scaled = (values - values.mean(0)) / np.where(spread > 0, spread, 1.0)
    place = (scaled - scaled.min()) / width
    counted = (place != np.floor(place)) & (place < int(place.max()))
    found = np.zeros(values.shape[1])
    for channel, chosen in enumerate(counted.T):
        _, hits = np.unique(np.floor(place[chosen, channel]), return_counts=True)
        share = hits / len(values)
        found[channel] = -np.sum(share * np.log(share))
    return found


def check(num_classes: int, *, images: int = 500, width: float = 0.01, u: float = 3.0, **others) -> None:
    """Raises `UserError` on settings that `purify` cannot use."""
    if images < 2 or width <= 0 or u < 0:
        raise UserError("ep needs at least two images, a positive width and u of at least 0")


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet | None = None,
    *,
    poisoned: ImageSet,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    images: int = 500,
    width: float = 0.01,
    u: float = 3.0,
    zero_bias: bool = False,
    padding: int = 4,
    flip: bool = True,
) -> Informed:
    """Prunes channels whose entropy over `images` of `poisoned` is below mean - u std of their layer.

    Args:
      poisoned: training images as the model saw them, some with the trigger; their labels are not looked at.
      width: of the histogram's bins, in standard deviations (the authors: 0.01 for 500 images; BackdoorBench: 0.1 for 256).
      zero_bias: prune biases too, as BackdoorBench does; the authors' code leaves them.
    """
    classifier = classifier.in_float32()  # bins are finer than bfloat16
    check_network(classifier)
    check(classifier.num_classes, images=images, width=width, u=u)
    if len(poisoned) < 2:
        raise UserError("ep needs poisoned training images, at least two of them")
    check_images(classifier, poisoned, "poisoned training images")
    order = np.asarray(jax.random.permutation(keys.stream(key, "images"), len(poisoned)))[:images]
    pixels = crop_and_flip(keys.stream(key, "augment"), poisoned.images[order], padding=padding, flip=flip)
    variables = jax.device_get(variables)
    answers = given(classifier, variables, np.asarray(pixels), peak)
    pruned = {name: outliers(-entropies(values, width), u) for name, values in answers.items()}
    return Informed(prune(classifier, variables, pruned, bias=zero_bias), [], told=count(pruned))

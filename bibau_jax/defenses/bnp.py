"""BNP (Zheng et al., NeurIPS 2022): prunes channels whose statistics on clean images are not those that they were trained with.

BatchNorm's running statistics remember poisoned images too; where clean ones are distributed otherwise, the channel had to do
with the trigger. `ep`, of the same paper, needs poisoned images; this one does with clean ones.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import keys, train
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.defenses.protocol import Purified, check_clean
from bibau_jax.defenses.pruning import check_network, count, given, outliers, prune
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier
from bibau_jax.models.classifier import at


def moments(value: jax.Array) -> jax.Array:
    """Mean and variance over space, [N, 2, C]."""
    return jnp.stack([value.mean((1, 2)), value.var((1, 2))], 1)


def divergence(mean, variance, running_mean, running_variance) -> np.ndarray:
    """KL(batch || running) of two normal distributions in nats, channel by channel [C]; variances of 0 are lifted to 1e-12."""
    variance, running_variance = np.maximum(variance, 1e-12), np.maximum(running_variance, 1e-12)
    apart = (variance + (mean - running_mean) ** 2) / (2 * running_variance)
    return 0.5 * np.log(running_variance / variance) + apart - 0.5


def check(num_classes: int, *, images: int = 500, u: float = 3.0, **others) -> None:
    """Raises `UserError` on settings that `purify` cannot use."""
    if images < 1 or u < 0:
        raise UserError("bnp needs at least one image and u of at least 0")


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    images: int = 500,
    u: float = 3.0,
    padding: int = 4,
    flip: bool = True,
) -> Purified:
    """Prunes channels whose divergence over `images` of the clean set is above mean + u std of their layer; biases stay."""
    check_clean(classifier, clean)
    classifier = classifier.in_float32()  # as its authors compute
    check_network(classifier)
    check(classifier.num_classes, images=images, u=u)
    order = np.asarray(jax.random.permutation(keys.stream(key, "images"), len(clean)))[:images]
    pixels = crop_and_flip(keys.stream(key, "augment"), clean.images[order], padding=padding, flip=flip)
    variables, pruned = jax.device_get(variables), {}
    found = given(classifier, variables, np.asarray(pixels), moments)
    for name, path in classifier.all_norms.items():
        means, variances = np.asarray(found[name], np.float64).transpose(1, 0, 2)
        running = at(variables["batch_stats"], path)
        # Within images and between them: a difference of squares would leave rounding where a channel hardly varies.
        apart = divergence(means.mean(0), variances.mean(0) + means.var(0), running["mean"], running["var"])
        pruned[name] = outliers(apart, u)
    return Purified(prune(classifier, variables, pruned, bias=False), [], told=count(pruned))

"""The E-step: images that look like the backdoor to the backdoored model and keep their meaning for the one being purified.

One problem for the target known (T, Eq. 22) and for the target unknown (U, Eq. 27); also how far an image must be moved, and
the same for whole sets of images.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import keys, parallel
from bibau_jax.data import ImageSet, splits
from bibau_jax.method import pgd, terms
from bibau_jax.method.settings import Perturbation, Weights
from bibau_jax.models import Classifier

TRIED = 256  # clean images that a bound on perturbations is tried on
FACTORS = [2.0 ** (half / 2) for half in range(13)]  # that it is tried with

AWAY = -1  # instead of a class: away from the image's own, wherever to
Target = int | jax.Array | None  # a class that all images are to look like, one for each [N] or AWAY, or none


def adversarial_objective(
    adversarial, clean, labels, variables, backdoored, *, classifier: Classifier, target: Target, weights: Weights
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L_adv per image (Eq. 22 with a `target`, Eq. 27 without) and its parts; all models in evaluation mode.

    Args:
      adversarial: x' [N, H, W, C]. clean: what does not change with x', from `clean_references`. labels: y [N].
      target: a class, None, or for every image one of its own, see `aims`.
    """
    suspicious = classifier.apply(backdoored, adversarial).logits
    objective, fooled = fooling(suspicious, labels, target=target, form=weights.attack_form)
    parts = {"fooled": fooled, "attack": objective}
    if weights.kd or weights.prior:
        towards = heading(suspicious, labels, target)
        more, of_current = keeping(adversarial, towards, clean, labels, variables, classifier=classifier, weights=weights)
        objective, parts = objective + more, parts | of_current
    return objective, parts


def fooling(suspicious, labels, *, target: Target, form: str) -> tuple[jax.Array, jax.Array]:
    """How much the backdoored model's logits [N, K] speak for the attack, per image, and whether it is taken in."""
    seen, target = jnp.argmax(suspicious, -1), AWAY if target is None else target
    away, towards = (terms.evidence(suspicious, jnp.broadcast_to(y, labels.shape), form=form) for y in (labels, target))
    return jnp.where(target == AWAY, -away, towards), jnp.where(target == AWAY, seen != labels, seen == target)


def heading(suspicious, labels, target: Target) -> jax.Array:
    """The class that x' is heading for, [N]; without gradient."""
    target = AWAY if target is None else target
    return jnp.where(target == AWAY, terms.other_class(jax.lax.stop_gradient(suspicious), labels), target)


def aims(labels, share: float, aim: int) -> jax.Array:
    """For every image [N] the class that it is to look like: `aim` for a `share` of them, the others AWAY from their own."""
    places = jnp.arange(len(labels))
    aimed = jnp.floor((places + 1) * share) > jnp.floor(places * share)
    return jnp.where(aimed & (labels != aim), aim, AWAY)


def keeping(adversarial, towards, clean, labels, variables, *, classifier: Classifier, weights: Weights):
    """lambda_2 L_prior - lambda_1 L_kd per image, which the model being purified adds to the objective; and its parts."""
    teacher_logits, clean_features, directions = clean
    current = classifier.apply(variables, adversarial)
    told = {"alpha": weights.alpha, "temperature": weights.temperature}
    parts = {"kept": jnp.argmax(current.logits, -1) == labels}
    parts["kd"] = terms.distillation(teacher_logits, current.logits, labels, **told)
    parts["prior"] = terms.prior(
        current.features, clean_features, directions[towards], eta=weights.eta, form=weights.prior_form
    )
    return weights.prior * parts["prior"] - weights.kd * parts["kd"], parts


def balanced_gradient(
    adversarial, clean, labels, variables, backdoored, *, classifier: Classifier, target: Target, weights: Weights
) -> jax.Array:
    """Both models' gradients of L_adv with respect to x', each at length 1 per image; the current one's times the balance.

    As they are, the gradient of a backdoored model that is sure of itself is outweighed by the other's, whatever the lambdas.
    """
    suspicious, pull = jax.vjp(lambda x: classifier.apply(backdoored, x).logits, adversarial)
    of_logits = jax.grad(lambda logits: fooling(logits, labels, target=target, form=weights.attack_form)[0].sum())
    (attack,) = pull(of_logits(suspicious))
    towards, given = heading(suspicious, labels, target), {"classifier": classifier, "weights": weights}
    current = jax.grad(lambda x: keeping(x, towards, clean, labels, variables, **given)[0].sum())(adversarial)
    return pgd.ascent_step(attack, "l2", 1.0) + weights.balance * pgd.ascent_step(current, "l2", 1.0)


def clean_references(images, variables, backdoored, *, classifier: Classifier, weights: Weights):
    """(f_b's logits of x, the current features of x, W_b - W with one row a class): fixed during an E-step."""
    directions = (classifier.head_kernel(backdoored["params"]) - classifier.head_kernel(variables["params"])).T
    if not (weights.kd or weights.prior):
        return None, None, directions
    return classifier.apply(backdoored, images).logits, classifier.apply(variables, images).features, directions


def e_step(images, labels, variables, backdoored, key, *, classifier, target, weights, perturbation: Perturbation):
    """Adversarial images x' [N, H, W, C] for clean ones in 0..255; images of the target class stay as they are."""
    towards = aims(labels, perturbation.aimed, perturbation.aim) if target is None and perturbation.aimed else target
    reach = 1.0
    if towards is not target:
        reach = jnp.where(towards == AWAY, 1.0, perturbation.reach)[:, None, None, None]
    epsilon, step_size = reach * perturbation.epsilon, reach * perturbation.step_size
    shared = {"classifier": classifier, "target": towards, "weights": weights}
    clean = clean_references(images, variables, backdoored, classifier=classifier, weights=weights)

    def gradient(adversarial):
        given = (clean, labels, variables, backdoored)
        if weights.balance and (weights.kd or weights.prior):
            return balanced_gradient(adversarial, *given, **shared)
        return jax.grad(lambda x: adversarial_objective(x, *given, **shared)[0].sum())(adversarial)

    start = None
    if perturbation.start == "random":
        start = pgd.random_start(key, images.shape, norm=perturbation.norm, epsilon=epsilon)
    adversarial = pgd.adversarial_images(
        gradient,
        images,
        norm=perturbation.norm,
        epsilon=epsilon,
        step_size=step_size,
        steps=perturbation.steps,
        start=start,
        block=perturbation.block,
        offset=jax.random.randint(keys.stream(key, "squares"), (2,), 0, perturbation.block),
        unroll=parallel.unroll(perturbation.steps),
    )
    if target is not None:
        adversarial = jnp.where((labels != target)[:, None, None, None], adversarial, images)
    return jax.lax.stop_gradient(adversarial)


def attack_images(images, labels, variables, backdoored, key, *, batch_size: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """(x' float32, f_b's classes for them) for uint8 images of any number, by the E-step with `options`; host arrays."""

    @jax.jit
    def attack(variables, backdoored, images, labels, key):
        images = parallel.shard(images.astype(jnp.float32))
        adversarial = e_step(images, labels, variables, backdoored, key, **options)
        return adversarial, jnp.argmax(options["classifier"].apply(backdoored, adversarial).logits, -1)

    given = ImageSet(images, labels, np.arange(len(images), dtype=np.int32))
    adversarial, seen = _in_blocks(partial(attack, variables, backdoored), given, key, batch_size)
    return adversarial, seen.astype(np.int32)


def sufficient(
    clean: ImageSet, backdoored, key, *, classifier, perturbation: Perturbation, target, weights: Weights, batch_size: int
) -> tuple[Perturbation, dict[str, float]]:
    """The perturbation with bound and step large enough for `perturbation.fooled`, and what was found: bound, step, share.

    Networks differ much in how far an image must be moved to fool them, and x' that fool nobody unlearn nothing. On at most
    TRIED clean images, one a class at least (none of the target's), the E-step without the current model's terms is tried with
    bound and step times each of FACTORS, until the share is reached. Where none is asked for, it stays as it is: ..., {}.
    To be taken for one class and no other is a longer way: `reach` says how much longer for images that are aimed, and
    `fooled_aimed` how many of them are taken for it.
    """
    if not perturbation.fooled:
        return perturbation, {}
    shared = {"classifier": classifier, "weights": weights, "batch_size": batch_size}
    given, anywhere = (clean, backdoored, keys.stream(key, "sufficient")), perturbation._replace(aimed=0.0)
    factor, share = _least_factor(*given, perturbation=anywhere, target=target, **shared)
    found = _times(perturbation, factor)
    told = {"epsilon": found.epsilon, "step_size": found.step_size, "fooled": share}
    if target is None and perturbation.aimed:
        longer, share = _least_factor(*given, perturbation=anywhere, target=perturbation.aim, **shared)
        found = found._replace(reach=max(1.0, longer / factor))
        told |= {"reach": found.reach, "fooled_aimed": share}
    return found, told


def _least_factor(
    clean: ImageSet, backdoored, key, *, classifier, perturbation: Perturbation, target, weights: Weights, batch_size: int
) -> tuple[float, float]:
    """(the first of FACTORS, times which the perturbation fools as many as it shall, or the last; the share fooled)."""
    rows = splits.some_of(clean, max(TRIED, classifier.num_classes))
    rows = rows.take(np.flatnonzero(rows.labels != target))
    alone, form = weights._replace(kd=0.0, prior=0.0), weights.attack_form

    @jax.jit
    def taken_in(backdoored, factor, images, labels, key):
        images = parallel.shard(images.astype(jnp.float32))
        larger = _times(perturbation, factor)
        given = {"classifier": classifier, "target": target, "weights": alone, "perturbation": larger}
        adversarial = e_step(images, labels, backdoored, backdoored, key, **given)
        return fooling(classifier.apply(backdoored, adversarial).logits, labels, target=target, form=form)[1]

    for factor in FACTORS:
        share = float(_in_blocks(partial(taken_in, backdoored, jnp.float32(factor)), rows, key, batch_size).mean())
        if share >= perturbation.fooled:
            break
    return factor, share


def _times(perturbation: Perturbation, factor) -> Perturbation:
    return perturbation._replace(epsilon=factor * perturbation.epsilon, step_size=factor * perturbation.step_size)


def _in_blocks(of_block: Callable, rows: ImageSet, key, batch_size: int):
    """What `of_block(images, labels, key)` gives for all rows, in blocks with keys of their own; host arrays."""
    block, found = parallel.padded(min(batch_size, len(rows))), []
    for begin in range(0, len(rows), block):
        part = rows.take(np.arange(begin, begin + block) % len(rows))  # the last block wraps round; the surplus is cut off
        given = parallel.replicate((part.images, part.labels))
        found.append(parallel.gather(of_block(*given, keys.stream(key, "block", begin))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *found)

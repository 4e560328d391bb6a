"""SAU, shared adversarial unlearning (Wei et al., NeurIPS 2023): trains against adversarial images that fool both models alike.

Adversarial images of the model being purified that the backdoored model takes for the *same* wrong class share its backdoor;
the model is taught not to answer that class for them.
"""

from functools import partial

import jax
import jax.numpy as jnp

from bibau_jax import parallel, train
from bibau_jax.data import ImageSet
from bibau_jax.defenses.protocol import Purified, as_data, check_clean, watch
from bibau_jax.errors import UserError
from bibau_jax.method import pgd
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier


def jensen_shannon(one: jax.Array, other: jax.Array) -> jax.Array:
    """The Jensen-Shannon divergence of softmax(one) and softmax(other) in nats, [N]; probabilities below 1e-8 count as that."""
    p, q = (jnp.maximum(jax.nn.softmax(logits), 1e-8) for logits in (one, other))
    middle = (p + q) / 2
    return (jnp.sum(p * jnp.log(p / middle), -1) + jnp.sum(q * jnp.log(q / middle), -1)) / 2


def shared_objective(both, labels, before, *, lambda_adversarial, lambda_shared) -> jax.Array:
    """What the perturbation raises, per image [N]: cross-entropy where a model still stands, less the divergence of the two.

    `both` holds the two models' logits for x', `before` the classes that they gave x. Once both have left their class for the
    same one the image is done and the divergence no longer counts.
    """
    stands = [jnp.argmax(logits, -1) == was for logits, was in zip(both, before, strict=True)]
    mistaken = sum(alone * cross_entropy(logits, labels) for alone, logits in zip(stands, both, strict=True)) / 2
    same = jnp.argmax(both[0], -1) == jnp.argmax(both[1], -1)
    done = ~stands[0] & ~stands[1] & same
    return lambda_adversarial * mistaken - lambda_shared * jnp.where(done, 0.0, jensen_shannon(*both))


def unlearning_loss(logits, suspicious, was, labels) -> tuple[jax.Array, jax.Array]:
    """(L_sh, the share of images that it counts): the probability of the class that the backdoored model was led to.

    `logits` are the current model's for x', `suspicious` the backdoored model's, `was` its classes for x. Bounded as in the
    authors' code.
    """
    led = jnp.argmax(suspicious, -1)
    counted = ((led != labels) & (led != was)).astype(jnp.float32)
    chance = jnp.take_along_axis(jax.nn.softmax(logits), led[:, None], 1)[:, 0]
    terms = -jnp.log(1e-6 + jnp.minimum(1 - chance, 0.999)) - jnp.log(1 + 1e-6 - jnp.maximum(chance, 0.001))
    return (counted * terms / 2).mean(), counted.mean()


def search(images, labels, models, before, *, classifier, attack, lambdas) -> jax.Array:
    """Shared adversarial images [N, H, W, C] of both `models` (variables), whose classes for the images are `before`."""

    def summed(adversarial):
        both = [classifier.apply(variables, adversarial).logits for variables in models]
        return shared_objective(both, labels, before, **lambdas).sum()

    start, unroll = jnp.full_like(images, attack["epsilon"]), parallel.unroll(attack["steps"])
    found = pgd.adversarial_images(jax.grad(summed), images, norm="linf", start=start, unroll=unroll, **attack)
    return jax.lax.stop_gradient(found)


def step(state, backdoored, batch, key, *, classifier, optimizer, attack, train_mode, lambdas, lambda_unlearning):
    """One PGD search for shared adversarial images and one step on CE(f(x), y) + lambda L_sh."""
    images, labels = batch["images"].astype(jnp.float32), batch["labels"]
    models = (state.variables, backdoored)
    before = [jnp.argmax(classifier.apply(variables, images).logits, -1) for variables in models]
    adversarial = search(images, labels, models, before, classifier=classifier, attack=attack, lambdas=lambdas)
    suspicious = classifier.apply(backdoored, adversarial).logits

    def objective(params):
        variables = {"params": params, "batch_stats": state.statistics}
        both = jnp.stack([images, adversarial], 1).reshape(-1, *images.shape[1:])
        outputs = classifier.apply(variables, both, train=train_mode)
        logits, moved = outputs.logits[0::2], outputs.logits[1::2]
        clean = cross_entropy(logits, labels).mean()
        unlearn, counted = unlearning_loss(moved, suspicious, before[1], labels)
        statistics = outputs.statistics if train_mode else state.statistics
        right = jnp.mean(jnp.argmax(logits, -1) == labels)
        parts = {"clean_loss": clean, "shared_loss": unlearn, "shared": counted, "accuracy": right}
        return clean + lambda_unlearning * unlearn, (statistics, parts)

    (loss, (statistics, parts)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    params, opt_state = train.updated(optimizer, grads, state.opt_state, state.params)
    state = state.replace(step=state.step + 1, params=params, statistics=statistics, opt_state=opt_state)
    return state, {"loss": loss, **parts}


def check(
    num_classes: int,
    *,
    epochs: int = 100,
    steps: int = 5,
    epsilon: float = 51.0,
    step_size: float = 51.0,
    learning_rate: float = 1e-4,
    **others,
) -> None:
    """Raises `UserError` on settings that `purify` cannot use; a weight is any `lambda_` of at least 0."""
    weights = [value for name, value in others.items() if name.startswith("lambda_")]
    if epochs < 1 or steps < 1 or min(epsilon, step_size, learning_rate) <= 0 or min(weights, default=0) < 0:
        raise UserError("sau needs epochs and steps of at least 1, positive epsilon, step_size and rate, no negative weight")


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    epochs: int = 100,
    batch_size: int = 256,
    learning_rate: float = 1e-4,
    epsilon: float = 51.0,
    step_size: float = 51.0,
    steps: int = 5,
    lambda_adversarial: float = 0.01,
    lambda_shared: float = 1.0,
    lambda_unlearning: float = 1.0,
    train_mode: bool = False,
    clip: bool = True,
) -> Purified:
    """The model trained on clean images and against shared adversarial ones (AMSGrad), without augmentation.

    Args:
      epsilon, step_size, steps: of the l-infinity search, pixels 0..255; it begins at +epsilon everywhere (0.2 of the range).
      lambda_adversarial, lambda_shared: weights in the search. lambda_unlearning: of L_sh against the clean loss.
      train_mode: BatchNorm on batch statistics in the update; by default it rests, which keeps more clean accuracy, and ASR.
      clip: keep the images within 0..255, since a trigger is part of an image; the authors' code does not. Their weight of a
        further loss CE(f(x'), y), which they leave at 0, has no setting.
    """
    check_clean(classifier, clean)
    classifier = classifier.in_float32()  # as its authors compute
    check(
        classifier.num_classes,
        epochs=epochs,
        steps=steps,
        epsilon=epsilon,
        step_size=step_size,
        learning_rate=learning_rate,
        lambda_adversarial=lambda_adversarial,
        lambda_shared=lambda_shared,
        lambda_unlearning=lambda_unlearning,
    )
    optimizer = train.amsgrad(learning_rate)
    state, history = train.fit(
        partial(
            step,
            classifier=classifier,
            optimizer=optimizer,
            attack={"epsilon": epsilon, "step_size": step_size, "steps": steps, "clip": clip},
            train_mode=train_mode,
            lambdas={"lambda_adversarial": lambda_adversarial, "lambda_shared": lambda_shared},
            lambda_unlearning=lambda_unlearning,
        ),
        train.new_state(variables, optimizer),
        as_data(clean),
        key=key,
        epochs=epochs,
        batch_size=batch_size,
        frozen=variables,
        after_epoch=watch(classifier, held_out),
        journal=journal,
    )
    return Purified(state.variables, history)

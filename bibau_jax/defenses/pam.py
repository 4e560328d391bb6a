"""PAM, path-aware minimisation (Min et al., NeurIPS 2024): unlearns reversed triggers off the path to the backdoored model.

BTI-DBF's reversed samples, but every gradient is taken at a point moved towards the backdoored weights: what is learned must
hold there too, so that a few poisoned samples do not lead back.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from bibau_jax import train
from bibau_jax.data import ImageSet
from bibau_jax.defenses import bti_dbf
from bibau_jax.defenses.bti_dbf import by_rounds, replaced
from bibau_jax.defenses.protocol import Purified
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier


def towards(params, backdoored, rho: float):
    """The parameters moved by `rho`, in the L2 norm of all together, towards the backdoored ones (and past them, when near)."""
    way = jax.tree.map(jnp.subtract, backdoored, params)
    length = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(way)))
    return jax.tree.map(lambda here, there: here + rho * there / (length + 1e-12), params, way)


def path_step(state, frozen, batch, key, *, classifier, generate, optimizer, prepare, share, rho):
    """One step along the gradient of CE(f(x~), y) at the moved point, whose running statistics are kept."""
    pixels = prepare(key, batch)
    mixed = replaced(pixels, key, frozen["generator"], generate=generate, share=share)

    def objective(params):
        outputs = classifier.apply({"params": params, "batch_stats": state.statistics}, mixed, train=True)
        right = jnp.mean(jnp.argmax(outputs.logits, -1) == batch["labels"])
        return cross_entropy(outputs.logits, batch["labels"]).mean(), (outputs.statistics, right)

    point = towards(state.params, frozen["backdoored"]["params"], rho)
    (loss, (statistics, right)), grads = jax.value_and_grad(objective, has_aux=True)(point)
    params, opt_state = train.updated(optimizer, grads, state.opt_state, state.params)
    state = state.replace(step=state.step + 1, params=params, statistics=statistics, opt_state=opt_state)
    return state, {"loss": loss, "accuracy": right}


def check(num_classes: int, *, rho: float = 0.5, momentum: float = 0.1, **others) -> None:
    """Raises `UserError` on settings that `purify` cannot use."""
    if rho < 0 or not 0 <= momentum < 1:
        raise UserError(f"pam.rho must not be negative and pam.momentum within 0..1, got {rho} and {momentum}")
    bti_dbf.check(num_classes, **others)


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    rho: float = 0.5,
    rounds: int = 3,
    pretrain_epochs: int = 50,
    mask_epochs: int = 20,
    generator_epochs: int = 30,
    epochs: int = 30,
    batch_size: int = 128,
    width: int = 32,
    generator_rate: float = 1e-3,
    mask_rate: float = 0.01,
    learning_rate: float = 0.01,
    momentum: float = 0.1,
    share: float = 0.2,
    padding: int = 4,
    flip: bool = True,
) -> Purified:
    """BTI-DBF's rounds with SGD on the gradient at theta + rho u / |u|, u = theta_b - theta.

    `rho` is a radius in weight space, not a fraction of the way (the authors: 0.3 to 0.9, 0.5 in their script); 0 is plain
    fine-tuning on reversed samples. The other settings are those of `bti_dbf.purify`, with the authors' values for PAM.
    """
    check(classifier.num_classes, rho=rho, momentum=momentum, learning_rate=learning_rate)
    optimizer = optax.sgd(learning_rate, momentum or None)
    step = partial(path_step, optimizer=optimizer, share=share, rho=rho)
    return by_rounds(
        key,
        classifier,
        variables,
        clean,
        step,
        optimizer,
        held_out=held_out,
        journal=journal,
        epochs={"pretrain": pretrain_epochs, "mask": mask_epochs, "generator": generator_epochs, "unlearn": epochs},
        rounds=rounds,
        batch_size=batch_size,
        width=width,
        rates=(generator_rate, mask_rate),
        share=share,
        padding=padding,
        flip=flip,
    )

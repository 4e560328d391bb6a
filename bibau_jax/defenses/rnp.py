"""RNP, reconstructive neuron pruning (Li et al., ICML 2023): unlearns the clean task, recovers it by masks, prunes low ones.

Maximising the loss on clean images leaves the backdoor's channels standing; masks that are then learned to bring the clean task
back turn those channels down.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from bibau_jax import keys, train
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.defenses import anp
from bibau_jax.defenses.protocol import Purified, as_data, check_clean
from bibau_jax.defenses.pruning import by_masks, check_network, check_threshold
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier


def unlearn_step(state, frozen, batch, key, *, classifier, optimizer, padding, flip):
    """One step up the cross-entropy on clean images, BatchNorm in train mode; `loss` is what is minimised, -CE."""
    pixels = crop_and_flip(keys.stream(key, "augment"), batch["images"], padding=padding, flip=flip).astype(jnp.float32)

    def objective(params):
        outputs = classifier.apply({"params": params, "batch_stats": state.statistics}, pixels, train=True)
        right = jnp.mean(jnp.argmax(outputs.logits, -1) == batch["labels"])
        return -cross_entropy(outputs.logits, batch["labels"]).mean(), (outputs.statistics, right)

    (loss, (statistics, right)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    params, opt_state = train.updated(optimizer, grads, state.opt_state, state.params)
    state = state.replace(step=state.step + 1, params=params, statistics=statistics, opt_state=opt_state)
    return state, {"loss": loss, "accuracy": right}


def check(
    num_classes: int,
    *,
    unlearn_epochs: int = 20,
    recover_epochs: int = 20,
    unlearned: float = 0.2,
    alpha: float = 0.2,
    threshold: float = 0.0,
    max_loss: float = 0.02,
    max_grad_norm: float = 20.0,
    **others,
) -> None:
    """Raises `UserError` on settings that `purify` cannot use."""
    check_threshold(threshold, max_loss)
    if min(unlearn_epochs, recover_epochs) < 1 or not 0 <= unlearned < 1 or alpha <= 0 or max_grad_norm < 0:
        raise UserError("rnp needs epochs of at least 1, unlearned within 0..1, a positive alpha, no negative max_grad_norm")


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    batch_size: int = 128,
    unlearn_epochs: int = 20,
    unlearn_rate: float = 0.01,
    unlearned: float = 0.2,
    recover_epochs: int = 20,
    recover_rate: float = 0.2,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    max_grad_norm: float = 20.0,
    alpha: float = 0.2,
    threshold: float = 0.0,
    max_loss: float = 0.02,
    padding: int = 4,
    flip: bool = True,
) -> Purified:
    """Unlearns until an epoch's accuracy is at most `unlearned` (0..1), recovers masks, prunes the original network by them.

    Args:
      max_grad_norm: bound on the gradient while unlearning, which is unbounded below, 0 for none; the authors' code means to
        have it too but applies it before there is a gradient.
      alpha: scales the recovering loss, as in the authors' code.
      threshold: channels with masks up to it are pruned; 0 takes the largest that costs at most `max_loss` (0..1) of the
        accuracy on `held_out` (on `clean` where there are none).

    Where `unlearn_epochs` end before the accuracy has fallen, it goes on all the same, and the history shows it.
    """
    check_clean(classifier, clean)
    classifier = classifier.in_float32()  # as its authors compute
    check_network(classifier)
    check(
        classifier.num_classes,
        unlearn_epochs=unlearn_epochs,
        recover_epochs=recover_epochs,
        unlearned=unlearned,
        alpha=alpha,
        threshold=threshold,
        max_loss=max_loss,
        max_grad_norm=max_grad_norm,
    )
    steps = max(1, len(clean) // min(batch_size, len(clean)))
    rate = optax.piecewise_constant_schedule(unlearn_rate, {10 * steps: 0.1, 20 * steps: 0.1})
    up = train.sgd(rate, momentum=momentum, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    shared = {"padding": padding, "flip": flip, "classifier": classifier}
    state, history = train.fit(
        partial(unlearn_step, optimizer=up, **shared),
        train.new_state(variables, up),
        as_data(clean),
        key=keys.stream(key, "unlearn"),
        epochs=unlearn_epochs,
        batch_size=batch_size,
        stop=lambda history: history[-1]["accuracy"] <= unlearned,
        journal=journal.part("unlearn", 2),
    )
    unlearned_model, down = jax.device_get(state.variables), optax.sgd(recover_rate, momentum or None)
    calm = {"epsilon": 0.0, "noise_steps": 1, "alpha": alpha}  # ANP's step without noise is alpha CE under the masks
    state, recovered = train.fit(
        partial(anp.step, optimizer=down, **calm, **shared),
        train.new_state({"params": anp.ones(classifier, unlearned_model["params"]), "batch_stats": {}}, down),
        as_data(clean),
        key=keys.stream(key, "recover"),
        epochs=recover_epochs,
        batch_size=batch_size,
        frozen=unlearned_model,
        journal=journal.part("recover"),
    )
    masks, chosen_on = jax.device_get(state.params), held_out or clean
    found, told = by_masks(classifier, jax.device_get(variables), masks, chosen_on, threshold=threshold, max_loss=max_loss)
    told |= {"unlearned_to": history[-1]["accuracy"] if history else 1.0}
    return Purified(found, [*history, *recovered], told=told, evidence=masks)

"""IBU, ideal backdoor unlearning (Eq. 49-50): fine-tuning on real triggered images with their true labels. Not a defence.

It sees the trigger, which no defender has. It tells how far any defence could get, and is the reference for re-activation.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from bibau_jax import keys, train
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.defenses.protocol import Ideal, as_data, check_clean, watch
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier


def step(state, frozen, batch, key, *, classifier, optimizer, lambda_clean, lambda_backdoor, padding, flip):
    """One step on lambda_c CE(clean) + lambda_b CE(triggered, true labels); both halves go through the network together."""
    pair = jnp.concatenate([batch["images"], batch["triggered"]])
    pixels = crop_and_flip(keys.stream(key, "augment"), pair, padding=padding, flip=flip).astype(jnp.float32)
    count = len(batch["labels"])

    def objective(params):
        outputs = classifier.apply({"params": params, "batch_stats": state.statistics}, pixels, train=True)
        losses = cross_entropy(outputs.logits, jnp.concatenate([batch["labels"]] * 2))
        clean, triggered = losses[:count].mean(), losses[count:].mean()
        return lambda_clean * clean + lambda_backdoor * triggered, (outputs.statistics, clean, triggered)

    (loss, (statistics, clean, triggered)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    params, opt_state = train.updated(optimizer, grads, state.opt_state, state.params)
    state = dataclasses.replace(state, step=state.step + 1, params=params, statistics=statistics, opt_state=opt_state)
    return state, {"loss": loss, "clean_loss": clean, "triggered_loss": triggered}


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    triggered: ImageSet,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 0.01,
    schedule: str = "cosine",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    lambda_clean: float = 1.0,
    lambda_backdoor: float = 1.0,
    padding: int = 4,
    flip: bool = True,
) -> Ideal:
    """Fine-tuning on the clean images and on `triggered`, the same images with the trigger under their true labels.

    The weights lambda_c and lambda_b are lost in the paper's text; 1 each is our reading.
    """
    check_clean(classifier, clean)
    if triggered.images.shape != clean.images.shape or (triggered.labels != clean.labels).any():
        raise UserError("IBU needs the clean images and the same ones with the trigger, under the same true labels")
    if lambda_clean < 0 or lambda_backdoor < 0:
        raise UserError(f"lambda_clean and lambda_backdoor must not be negative, got {lambda_clean} and {lambda_backdoor}")
    steps = epochs * max(1, len(clean) // min(batch_size, len(clean)))
    schedule = train.learning_rate_schedule(schedule, learning_rate, steps)
    optimizer = train.sgd(schedule, momentum=momentum, weight_decay=weight_decay)
    weights = {"lambda_clean": lambda_clean, "lambda_backdoor": lambda_backdoor}
    state, history = train.fit(
        partial(step, classifier=classifier, optimizer=optimizer, padding=padding, flip=flip, **weights),
        train.new_state(variables, optimizer),
        as_data(clean) | {"triggered": triggered.images},
        key=key,
        epochs=epochs,
        batch_size=batch_size,
        after_epoch=watch(classifier, held_out),
        journal=journal,
    )
    return Ideal(state.variables, history)

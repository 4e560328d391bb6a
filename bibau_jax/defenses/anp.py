"""ANP, adversarial neuron pruning (Wu and Wang, NeurIPS 2021): prunes the channels that a small change of weights turns first.

Every norm's scale gets a mask per channel, learned on clean images so that the network stays right while its scales and
biases are disturbed as badly as possible; the channels whose masks fall are pruned.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from bibau_jax import keys, train
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.defenses.protocol import Purified, as_data, check_clean
from bibau_jax.defenses.pruning import by_masks, check_network, check_threshold
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier
from bibau_jax.models.classifier import at


def ones(classifier: Classifier, params) -> dict[str, jax.Array]:
    """A mask of 1 for every channel of every norm, {name: [C]}."""
    return {name: jnp.ones_like(at(params, path)["scale"]) for name, path in classifier.all_norms.items()}


def masked(classifier: Classifier, params, masks, noise=None) -> dict:
    """The parameters with scales times (mask + noise) and, where there is noise, biases times (1 + noise)."""

    def change(name, norm):
        if noise is None:
            return norm | {"scale": norm["scale"] * masks[name]}
        scale, bias = noise[name]
        return norm | {"scale": norm["scale"] * (masks[name] + scale), "bias": norm["bias"] * (1 + bias)}

    return classifier.map_norms(params, change)


def worst_noise(loss, masks, key: jax.Array, *, epsilon: float, steps: int) -> dict:
    """Noise {name: (of the scale, of the bias)}: uniform in +-epsilon, then `steps` sign steps up `loss(noise)`, unprojected.

    After one step of size epsilon the noise may reach twice that, as in the authors' code.
    """

    def uniform(name, part):
        return jax.random.uniform(keys.stream(key, f"{name}/{part}"), masks[name].shape, minval=-epsilon, maxval=epsilon)

    noise = {name: (uniform(name, "scale"), uniform(name, "bias")) for name in masks}
    for _ in range(steps):
        uphill = jax.grad(loss)(noise)
        noise = jax.tree.map(lambda value, slope: value + epsilon / steps * jnp.sign(slope), noise, uphill)
    return jax.lax.stop_gradient(noise)


def step(state, frozen, batch, key, *, classifier, optimizer, epsilon, noise_steps, alpha, padding, flip):
    """One step on alpha CE + (1 - alpha) CE under the worst noise, with respect to the masks alone; masks stay in 0..1."""
    pixels = crop_and_flip(keys.stream(key, "augment"), batch["images"], padding=padding, flip=flip).astype(jnp.float32)

    def loss(masks, noise):
        params = masked(classifier, frozen["params"], masks, noise)
        outputs = classifier.apply(frozen | {"params": params}, pixels, train=True)
        right = jnp.mean(jnp.argmax(outputs.logits, -1) == batch["labels"])
        return cross_entropy(outputs.logits, batch["labels"]).mean(), right

    def objective(masks):
        noisy = 0.0
        if epsilon > 0 and alpha < 1:
            found = worst_noise(lambda noise: loss(masks, noise)[0], masks, key, epsilon=epsilon, steps=noise_steps)
            noisy, _ = loss(masks, found)
        natural, right = loss(masks, None)
        return alpha * natural + (1 - alpha) * noisy, (natural, right)

    (value, (natural, right)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    masks = jax.tree.map(lambda mask: jnp.clip(mask, 0, 1), optax.apply_updates(state.params, updates))
    state = state.replace(step=state.step + 1, params=masks, opt_state=opt_state)
    return state, {"loss": value, "natural_loss": natural, "accuracy": right}


def check(
    num_classes: int,
    *,
    iterations: int = 2000,
    noise_steps: int = 1,
    epsilon: float = 0.4,
    alpha: float = 0.2,
    threshold: float = 0.0,
    max_loss: float = 0.02,
    **others,
) -> None:
    """Raises `UserError` on settings that `purify` cannot use."""
    check_threshold(threshold, max_loss)
    if iterations < 1 or noise_steps < 1 or epsilon < 0 or not 0 <= alpha <= 1:
        raise UserError("anp needs iterations and noise_steps of at least 1, epsilon of at least 0 and alpha within 0..1")


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    iterations: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 0.2,
    momentum: float = 0.9,
    epsilon: float = 0.4,
    noise_steps: int = 1,
    alpha: float = 0.2,
    threshold: float = 0.0,
    max_loss: float = 0.02,
    padding: int = 4,
    flip: bool = True,
) -> Purified:
    """Learns masks for about `iterations` batches, BatchNorm in train mode, and prunes the original network by them.

    Args:
      epsilon: bound of the first noise, relative to scales and biases; 0 leaves it out. alpha: share of the clean loss.
      threshold: channels with masks up to it are pruned; 0 takes the largest that costs at most `max_loss` (0..1) of the
        accuracy on `held_out` (on `clean` where there are none).
    """
    check_clean(classifier, clean)
    classifier = classifier.in_float32()  # as its authors compute
    check_network(classifier)
    check(
        classifier.num_classes,
        iterations=iterations,
        noise_steps=noise_steps,
        epsilon=epsilon,
        alpha=alpha,
        threshold=threshold,
        max_loss=max_loss,
    )
    optimizer = optax.sgd(learning_rate, momentum or None)
    options = {"epsilon": epsilon, "noise_steps": noise_steps, "alpha": alpha, "padding": padding, "flip": flip}
    per_epoch = max(1, len(clean) // min(batch_size, len(clean)))
    state, history = train.fit(
        partial(step, classifier=classifier, optimizer=optimizer, **options),
        train.new_state({"params": ones(classifier, variables["params"]), "batch_stats": {}}, optimizer),
        as_data(clean),
        key=key,
        epochs=-(-iterations // per_epoch),
        batch_size=batch_size,
        frozen=variables,
        journal=journal,
    )
    masks, chosen_on = jax.device_get(state.params), held_out or clean
    found, told = by_masks(classifier, jax.device_get(variables), masks, chosen_on, threshold=threshold, max_loss=max_loss)
    return Purified(found, history, told=told, evidence=masks)

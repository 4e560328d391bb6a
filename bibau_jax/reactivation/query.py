"""QRA, the query-based re-activation attack (Min et al., NeurIPS 2024; the paper's Appendix D.2).

A small network learns perturbations that make the purified model answer as the re-tuned one does, while a clean model still
sees the true class: what is found is what is left of the backdoor, not an ordinary adversarial example.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from bibau_jax import keys, parallel, train
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier
from bibau_jax.models.layers import linear

GRADIENTS = ("white_box", "queries")


class Perturber(nn.Module):
    """Flattened images about 0 [N, D] to perturbations in -1..1: three hidden layers with ReLU, then tanh."""

    hidden: int = 1024

    @nn.compact
    def __call__(self, flat: jax.Array) -> jax.Array:
        x = flat
        for number in range(3):
            x = nn.relu(linear(self.hidden, x.shape[-1], name=f"dense{number}")(x))
        return jnp.tanh(linear(flat.shape[-1], self.hidden, name="out")(x))


class Models(NamedTuple):
    """Variables of the purified model, of the teacher whose answers it shall give, and of a clean model."""

    purified: dict
    teacher: dict
    clean: dict


@struct.dataclass
class State:
    """What training changes: the perturber and its optimiser's state."""

    step: jax.Array
    params: dict
    opt_state: tuple


def perturbed(params, pixels: jax.Array, *, epsilon: float, hidden: int) -> jax.Array:
    """x' = clip(x + epsilon G(x), 0, 255) for pixels [N, H, W, C]; |x' - x| <= epsilon."""
    flat = ((pixels / 255 - 0.5) / 0.25).reshape(len(pixels), -1)  # about as data sets are normalised
    return jnp.clip(pixels + epsilon * Perturber(hidden).apply({"params": params}, flat).reshape(pixels.shape), 0, 255)


def divergence(teacher_logits: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(softmax teacher || softmax model) of each image, [N]."""
    log_p, log_q = jax.nn.log_softmax(teacher_logits), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def estimated_gradient(loss, pixels: jax.Array, key: jax.Array, *, directions: int, sigma: float) -> jax.Array:
    """The gradient of `loss(pixels) [N]` per image from its values alone: `directions` antithetic pairs of steps `sigma`.

    Only images are asked about: what leaves 0..255 is clipped.
    """

    def one(total, number):
        step = jax.random.normal(jax.random.fold_in(key, number), pixels.shape)
        change = loss(jnp.clip(pixels + sigma * step, 0, 255)) - loss(jnp.clip(pixels - sigma * step, 0, 255))
        return total + change[:, None, None, None] * step / (2 * sigma), None

    total, _ = jax.lax.scan(one, jnp.zeros_like(pixels), jnp.arange(directions))
    return total / directions


def step(state, frozen, batch, key, *, classifier, optimizer, alpha, epsilon, hidden, gradient, directions, sigma):
    """One step of the perturber: alpha KL(teacher(x) || purified(x')) + CE(clean(x'), y), both means over the batch.

    `frozen` is (purified, clean); `batch` holds the teacher's logits as "wanted".
    """
    purified, clean = frozen
    pixels, labels = batch["images"].astype(jnp.float32), batch["labels"]

    def hidden_backdoor(moved):
        return divergence(batch["wanted"], classifier.apply(purified, moved).logits)

    def loss(params):
        moved = perturbed(params, pixels, epsilon=epsilon, hidden=hidden)
        if gradient == "white_box":
            apart = hidden_backdoor(moved)
        else:  # a number with the purified model's value and the estimated gradient: nothing is propagated through the model
            fixed = jax.lax.stop_gradient(moved)
            slope = estimated_gradient(hidden_backdoor, fixed, key, directions=directions, sigma=sigma)
            slope, value = jax.lax.stop_gradient((slope, hidden_backdoor(fixed)))
            apart = value + jnp.sum(slope * (moved - fixed), (1, 2, 3))
        kept = cross_entropy(classifier.apply(clean, moved).logits, labels)
        return alpha * apart.mean() + kept.mean(), {"divergence": apart.mean(), "clean_loss": kept.mean()}

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), {"loss": value} | metrics


def learn(
    key: jax.Array,
    classifier: Classifier,
    models: Models,
    clean: ImageSet,
    triggered: ImageSet,
    *,
    alpha: float = 0.2,
    epsilon: float = 16.0,
    epochs: int = 50,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    hidden: int = 1024,
    gradient: str = "white_box",
    directions: int = 10,
    sigma: float = 2.0,
    budget: int = 0,
    journal: train.Journal = train.Journal(),
) -> tuple[dict, list[dict], int]:
    """(the perturber's parameters, history, queries of the purified model) from clean and triggered images with true labels.

    `epsilon` bounds the perturbation in 0..255. `gradient` "white_box" propagates through the purified model, as the authors'
    code does (the stronger attacker); "queries" only asks it for its outputs, 2 `directions` + 1 times per image and step,
    at steps of `sigma` grey levels; with a `budget` above 0 it ends with the last epoch that so many queries pay. White-box
    attacks count no queries.
    """
    if gradient not in GRADIENTS:
        raise UserError(f'query attack gradient "{gradient}" is unknown; choose one of {", ".join(GRADIENTS)}')
    check_bound(epsilon)
    data = {name: np.concatenate([getattr(s, name) for s in (clean, triggered)]) for name in ("images", "labels")}
    data["wanted"] = train.logits(classifier, models.teacher, data["images"])
    optimizer = optax.sgd(learning_rate, momentum)
    size = int(np.prod(classifier.image_shape))
    params = jax.jit(Perturber(hidden).init)(keys.stream(key, "perturber"), jnp.zeros((1, size)))["params"]
    state = parallel.replicate(State(jnp.zeros((), jnp.int32), params, optimizer.init(params)))
    options = {"alpha": alpha, "epsilon": epsilon, "hidden": hidden}
    options |= {"gradient": gradient, "directions": directions, "sigma": sigma}
    batch_size = parallel.batch_of(min(batch_size, len(data["labels"])))
    if budget and gradient == "queries":
        epochs = min(epochs, epochs_paid(budget, len(data["labels"]), batch_size, directions))
    state, history = train.fit(
        partial(step, classifier=classifier, optimizer=optimizer, **options),
        state,
        data,
        key=key,
        epochs=epochs,
        batch_size=batch_size,
        frozen=(models.purified, models.clean),
        journal=journal,
    )
    asked = int(state.step) * batch_size * (2 * directions + 1) if gradient == "queries" else 0
    return jax.device_get(state.params), history, asked


def epochs_paid(budget: int, images: int, batch_size: int, directions: int) -> int:
    """How many epochs over so many images a budget of queries pays; UserError where it does not pay one."""
    each = images // batch_size * batch_size * (2 * directions + 1)
    if budget < each:
        raise UserError(f"a budget of {budget:,} queries does not pay one epoch, which asks {each:,}")
    return budget // each


def check_bound(epsilon: float) -> None:
    """Refuses a bound outside 1..255: images have whole grey levels, and less changes none."""
    if not 1 <= epsilon <= 255:
        raise UserError(f"a perturbation of images needs an epsilon within 1..255 grey levels, got {epsilon}")


@partial(jax.jit, static_argnames=("epsilon", "hidden"))
def _applied(params, pixels, *, epsilon, hidden):
    moved = perturbed(params, parallel.shard(pixels.astype(jnp.float32)), epsilon=epsilon, hidden=hidden)
    return jnp.clip(jnp.round(moved), jnp.maximum(0, pixels - jnp.floor(epsilon)), pixels + jnp.floor(epsilon))


def apply(params, images: np.ndarray, *, epsilon: float = 16.0, hidden: int = 1024, batch_size: int = 500) -> np.ndarray:
    """uint8 images [N, H, W, C] with their perturbations, rounded to uint8 within the budget."""
    made = []
    for (pixels,), count in parallel.blocks(batch_size, images.astype(np.float32)):
        moved = parallel.gather(_applied(params, pixels, epsilon=epsilon, hidden=hidden))
        made.append(np.clip(moved[:count], 0, 255).astype(np.uint8))
    return np.concatenate(made)

"""I-BAU, implicit backdoor adversarial unlearning (Zeng et al., ICLR 2022): a minimax over one universal perturbation.

The perturbation that misleads the network on most clean images stands for the trigger; the network is trained against it with
the gradient that also counts how the perturbation would answer (the implicit hypergradient, by a few fixed-point steps).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bibau_jax import keys, parallel, train
from bibau_jax.data import ImageSet
from bibau_jax.defenses.protocol import Purified, as_data, check_clean, watch
from bibau_jax.errors import UserError
from bibau_jax.method import pgd
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier


@struct.dataclass
class State:
    """What training changes: the parameters, and the universal perturbation `delta` [1, H, W, C] on the 0..1 scale."""

    step: jax.Array
    params: Any
    statistics: Any
    opt_state: Any
    delta: jax.Array

    @property
    def variables(self) -> dict:
        """Parameters and running statistics, as `Classifier.apply` takes them."""
        return {"params": self.params, "batch_stats": self.statistics}


def hypergradient(outer: Callable, inner: Callable, delta, params, *, rate: float, terms: int):
    """(outer's value, d/dparams of outer(delta*(params), params)), where delta* minimises inner(delta, params).

    By the implicit function theorem on the fixed point of delta - rate grad_delta inner, at a `delta` near it: grad_params
    outer - rate (d/dparams grad_delta inner)^T v, with v the first `terms` of the Neumann series of (rate Hessian)^-1
    grad_delta outer.
    """
    value, (by_delta, by_params) = jax.value_and_grad(outer, argnums=(0, 1))(delta, params)
    # Forward over reverse, which costs less than reverse over reverse and shares its primal pass.
    _, hessian_times = jax.linearize(lambda d: jax.grad(inner)(d, params), delta)
    v = by_delta
    for _ in range(terms - 1):
        v = jax.tree.map(lambda one, bent, first: one - rate * bent + first, v, hessian_times(v), by_delta)
    mixed = jax.grad(lambda p: jax.jvp(lambda d: inner(d, p), (delta,), (v,))[1])(params)
    return value, jax.tree.map(lambda one, other: one - rate * other, by_params, mixed)


def moved(images: jax.Array, delta: jax.Array) -> jax.Array:
    """Pixels 0..255 plus a perturbation on the 0..1 scale; not clipped, as in the authors' code."""
    return images.astype(jnp.float32) + 255.0 * delta


def misled(logits: jax.Array, labels: jax.Array, delta: jax.Array, penalty: float) -> jax.Array:
    """What the perturbation minimises: -CE of the images that carry it, plus penalty |delta|^2."""
    return -cross_entropy(logits, labels).mean() + penalty * jnp.sum(delta**2)


def inner_step(delta, variables, images, *, classifier, inner_rate, penalty, radius):
    """One ascent step of the perturbation on the loss of the classes that the network now predicts, less penalty |delta|^2.

    It stays within the L2 ball of `radius`, if that is not 0.
    """
    images = parallel.shard(images)
    labels = jnp.argmax(classifier.apply(variables, images).logits, -1)

    def loss(delta):
        return misled(classifier.apply(variables, moved(images, delta)).logits, labels, delta, penalty)

    delta = delta - inner_rate * jax.grad(loss)(delta)
    return pgd.project(delta, radius, "l2") if radius else delta


def step(state, frozen, batch, key, *, classifier, optimizer, share, terms, map_rate, penalty):
    """One optimiser step with the hypergradient on a batch, `share` of it with the perturbation; `frozen`: the first batch."""
    chosen = jnp.arange(len(batch["labels"])) < max(1, int(share * len(batch["labels"])))
    chosen = jax.random.permutation(key, chosen)[:, None, None, None]

    def logits(params, images):
        return classifier.apply({"params": params, "batch_stats": state.statistics}, images).logits

    def outer(delta, params):
        return cross_entropy(logits(params, moved(batch["images"], chosen * delta)), batch["labels"]).mean()

    def inner(delta, params):
        images, labels = frozen
        return misled(logits(params, moved(images, delta)), labels, delta, penalty)

    loss, grads = hypergradient(outer, inner, state.delta, state.params, rate=map_rate, terms=terms)
    params, opt_state = train.updated(optimizer, grads, state.opt_state, state.params)
    metrics = {"loss": loss, "perturbation": jnp.sqrt(jnp.sum(state.delta**2))}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def check(
    num_classes: int,
    *,
    epochs: int = 5,
    terms: int = 5,
    share: float = 0.01,
    inner_rate: float = 10.0,
    map_rate: float = 0.1,
    learning_rate: float = 1e-3,
    penalty: float = 1e-3,
    radius: float = 10.0,
    **others,
) -> None:
    """Raises `UserError` on settings that `purify` cannot use."""
    if (
        epochs < 1
        or terms < 1
        or not 0 < share <= 1
        or min(inner_rate, map_rate, learning_rate) <= 0
        or min(penalty, radius) < 0
    ):
        raise UserError("i_bau needs epochs and terms of at least 1, share within 0..1, positive rates, no negative radius")


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    epochs: int = 5,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    inner_rate: float = 10.0,
    map_rate: float = 0.1,
    penalty: float = 1e-3,
    radius: float = 10.0,
    share: float = 0.01,
    terms: int = 5,
    amsgrad: bool = False,
) -> Purified:
    """`epochs` rounds: the perturbation anew by one pass over the clean images, then one pass of hypergradient steps (Adam).

    Args:
      inner_rate: of the perturbation's ascent. map_rate: of the fixed-point map behind the hypergradient. penalty: weight of
        |delta|^2.
      radius: bound of the perturbation's L2 norm on the 0..1 scale. The paper has one; the authors' scripts, unlike their
        notebook, leave it out, as 0 does here.
      share: of a batch's images that carry the perturbation, at least one. terms: K of the Neumann series, which need not
        converge. amsgrad: Adam in that form, as BackdoorBench takes it, at a tenth of the learning rate, with batches of 256,
        of images that it augments and normalises, on which `inner_rate` and `penalty` mean something else than here.

    Images on the 0..1 scale, no augmentation, BatchNorm in evaluation mode throughout. The perturbation passes over the images
    in their order, the hypergradient over shuffled batches; the authors' code takes the same unshuffled ones for both.
    """
    check_clean(classifier, clean)
    classifier = classifier.in_float32()  # as its authors compute
    check(
        classifier.num_classes,
        epochs=epochs,
        terms=terms,
        share=share,
        inner_rate=inner_rate,
        map_rate=map_rate,
        learning_rate=learning_rate,
        penalty=penalty,
        radius=radius,
    )
    batch_size = min(batch_size, len(clean))
    ascend = jax.jit(partial(inner_step, classifier=classifier, inner_rate=inner_rate, penalty=penalty, radius=radius))

    def anew(state, epoch):
        delta = jnp.zeros_like(state.delta)
        for begin in range(0, len(clean) // batch_size * batch_size, batch_size):
            delta = ascend(delta, state.variables, parallel.replicate(clean.images[begin : begin + batch_size]))
        return state.replace(delta=delta)

    optimizer = (train.amsgrad if amsgrad else optax.adam)(learning_rate)
    start = train.new_state(variables, optimizer)
    delta = parallel.replicate(jnp.zeros((1, *classifier.image_shape)))
    state, history = train.fit(
        partial(step, classifier=classifier, optimizer=optimizer, share=share, terms=terms, map_rate=map_rate, penalty=penalty),
        State(start.step, start.params, start.statistics, start.opt_state, delta),
        as_data(clean),
        key=keys.stream(key, "outer"),
        epochs=epochs,
        batch_size=batch_size,
        frozen=(clean.images[:batch_size], clean.labels[:batch_size]),
        before_epoch=anew,
        after_epoch=watch(classifier, held_out),
        journal=journal,
    )
    return Purified(state.variables, history)

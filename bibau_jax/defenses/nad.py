"""NAD, neural attention distillation (Li et al., ICLR 2021): a fine-tuned copy teaches the backdoored model where to look.

The teacher is the backdoored model after plain fine-tuning; the student is the backdoored model itself, fine-tuned while the
attention maps of its last stages are pulled to the teacher's.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax

from bibau_jax import keys, train
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip, cutout
from bibau_jax.defenses import ft
from bibau_jax.defenses.protocol import Purified, as_data, check_clean, watch
from bibau_jax.errors import NotApplicable, UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier, inside


def attention(activation: jax.Array) -> jax.Array:
    """The attention map of an activation [N, H, W, C]: the sum of squares over channels, of length 1; [N, H W]."""
    energy = jnp.sum(activation.astype(jnp.float32) ** 2, -1).reshape(len(activation), -1)
    return energy / (jnp.sqrt(jnp.sum(energy**2, -1, keepdims=True) + 1e-12) + 1e-6)


def distance(one: jax.Array, other: jax.Array) -> jax.Array:
    """The mean square between two attention maps of each image, [N]."""
    return jnp.mean((attention(one) - attention(other)) ** 2, -1)


def step(state, teacher, batch, key, *, classifier, optimizer, paths, betas, padding, flip, holes):
    """One step on CE + sum of beta times the distance of attention maps, BatchNorm in train mode, the teacher's at rest."""
    pixels = crop_and_flip(keys.stream(key, "augment"), batch["images"], padding=padding, flip=flip)
    pixels = cutout(keys.stream(key, "cutout"), pixels, length=holes).astype(jnp.float32)
    _, wanted = inside.look(classifier, teacher, pixels, paths)

    def objective(params):
        variables = {"params": params, "batch_stats": state.statistics}
        outputs, found = inside.look(classifier, variables, pixels, paths, train=True)
        apart = sum(beta * distance(found[n], wanted[n]).mean() for beta, n in zip(betas, found, strict=True))
        right = jnp.mean(jnp.argmax(outputs.logits, -1) == batch["labels"])
        return cross_entropy(outputs.logits, batch["labels"]).mean() + apart, (outputs.statistics, apart, right)

    (loss, (statistics, apart, right)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    params, opt_state = train.updated(optimizer, grads, state.opt_state, state.params)
    state = state.replace(step=state.step + 1, params=params, statistics=statistics, opt_state=opt_state)
    return state, {"loss": loss, "distillation": apart, "accuracy": right}


def check_network(classifier: Classifier) -> None:
    """Refuses a network without convolutional stages, whose attention maps are compared."""
    if not classifier.stages:
        raise NotApplicable("attention maps of convolutional stages are compared, and this network has none")


def check(
    num_classes: int,
    *,
    epochs: int = 20,
    teacher_epochs: int = 10,
    betas: Sequence[float] = (1.0,),
    drops: Sequence[int] = (2, 20),
    cutout: int = 9,
    **others,
) -> None:
    """Raises `UserError` on settings that `purify` cannot use."""
    if min(epochs, teacher_epochs) < 1 or not betas or min(betas) < 0:
        raise UserError("nad needs at least one epoch of each kind and betas that are not negative")
    if cutout < 0 or min(drops, default=1) < 1 or len(set(drops)) < len(drops):
        raise UserError("nad needs a cutout that is not negative, and drops after different epochs, the first after 1 or later")


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    epochs: int = 20,
    teacher_epochs: int = 10,
    batch_size: int = 64,
    teacher_rate: float = 0.01,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    betas: Sequence[float] = (500.0, 1000.0, 1000.0),
    drops: Sequence[int] = (2, 20),
    cutout: int = 9,
    padding: int = 4,
    flip: bool = True,
) -> Purified:
    """Distils `teacher_epochs` of fine-tuning into the backdoored model; its rate falls to a tenth after each epoch of `drops`.

    `betas` weigh the distance of attention maps after the last stages of the network, the deepest last; squared and averaged
    over places, as in the authors' code. A network of fewer stages takes as many of the last betas.
    `cutout`: pixels a side of the black square in each image (the paper: 9; its code: 3; 0 for none).
    """
    check_clean(classifier, clean)
    check_network(classifier)
    check(classifier.num_classes, epochs=epochs, teacher_epochs=teacher_epochs, betas=betas, drops=drops, cutout=cutout)
    shared = {"batch_size": batch_size, "momentum": momentum, "weight_decay": weight_decay, "padding": padding, "flip": flip}
    teacher = ft.purify(
        keys.stream(key, "teacher"),
        classifier,
        variables,
        clean,
        journal=journal.part("teacher", 2),
        epochs=teacher_epochs,
        learning_rate=teacher_rate,
        cutout=cutout,
        **shared,
    )
    count = min(len(betas), len(classifier.stages))
    steps = max(1, len(clean) // min(batch_size, len(clean)))
    rate = optax.piecewise_constant_schedule(learning_rate, {epoch * steps: 0.1 for epoch in drops})
    optimizer = train.sgd(rate, momentum=momentum, weight_decay=weight_decay, nesterov=True)
    options = {"paths": classifier.stages[-count:], "betas": tuple(betas)[-count:]}
    options |= {"padding": padding, "flip": flip, "holes": cutout}
    state, history = train.fit(
        partial(step, classifier=classifier, optimizer=optimizer, **options),
        train.new_state(variables, optimizer),
        as_data(clean),
        key=keys.stream(key, "student"),
        epochs=epochs,
        batch_size=batch_size,
        frozen=jax.device_get(teacher.variables),
        after_epoch=watch(classifier, held_out),
        journal=journal.part("student"),
    )
    return Purified(state.variables, [*teacher.history, *history])

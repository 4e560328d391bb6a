"""Narcissus (Zeng et al., 2023): a faint trigger that is itself evidence of the target class; few poisons, no label changes.

The attacker holds images of the target class and any other labelled images. A surrogate network is trained on them and
fitted to the target class; the trigger is the small perturbation that makes it surest of that class, over all its
images. Poisoned are a few images of the class; at test the trigger is shown enlarged.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bibau_jax import keys, models, parallel, train
from bibau_jax.attacks.protocol import (
    Attack,
    Control,
    aim_of_clean_label,
    check_pixels,
    clean_label,
    in_blocks,
    of_the_target,
    untrained,
)
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy

SURROGATE = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 350}
WARM_UP = {"epochs": 5, "learning_rate": 0.1, "batch_size": 350}
GREY = 127.5  # grey levels in a unit of the released code, whose images lie in -1..1: the trigger is sought in those
BATCHES = "train", "eval"  # which statistics BatchNorm takes while the trigger is sought


def surrogate(split, width: int, stages, num_classes: int) -> models.Classifier:
    """A ResNet for the surrogate; the released code takes a whole ResNet-18."""
    statistics = split.images.reshape(-1, split.images.shape[-1])[::7] / 255
    return models.build(
        "resnet18",
        num_classes=num_classes,
        image_shape=split.images.shape[1:],
        width=width,
        stages=stages,
        mean=tuple(map(float, statistics.mean(0))),
        std=tuple(map(float, statistics.std(0) + 1e-3)),
    )


def trigger_step(state, frozen, batch, key, *, classifier, optimizer, epsilon, mode, augment):
    """One step on the trigger: the surrogate's loss on images of the target class that carry it; the surrogate stays fixed."""
    images = augment(keys.stream(key, "augment"), batch["images"]).astype(jnp.float32)

    def loss(delta):
        # Clipping here alone lets saturated pixels rest, as in the released code.
        shown = jnp.clip(images + jnp.clip(GREY * delta, -epsilon, epsilon), 0, 255)
        logits = classifier.apply(frozen, shown, train=mode == "train").logits
        return cross_entropy(logits, batch["labels"]).mean(), jnp.mean(jnp.argmax(logits, -1) == batch["labels"])

    (value, sure), grads = jax.value_and_grad(loss, has_aux=True)(state.params["delta"])
    updates, opt_state = optimizer.update({"delta": grads}, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    saturated = jnp.mean(jnp.abs(GREY * params["delta"]) >= epsilon)
    metrics = {"loss": value, "accuracy": sure, "saturated": saturated}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def learn(key, split, journal, augment, *, aim, num_classes, width, stages, surrogate_epochs, epochs, epsilon, mode):
    """{"delta" float32 [H, W, C]}, the trigger, from a surrogate trained on the clean images of `split`."""
    classifier = surrogate(split, width, stages, num_classes)
    size = parallel.batch_of(min(SURROGATE["batch_size"], len(split)))
    schedule = train.learning_rate_schedule("cosine", SURROGATE["learning_rate"], surrogate_epochs * (len(split) // size))
    optimizer = train.sgd(schedule, momentum=SURROGATE["momentum"], weight_decay=SURROGATE["weight_decay"])

    def prepare(extra, batch, key):
        return augment(keys.stream(key, "augment"), batch["images"]).astype(jnp.float32), batch["labels"], 0.0, extra

    def fit(name, variables, optimizer, images, epochs, batch_size):
        state, _ = train.fit(
            partial(train.train_step, classifier=classifier, optimizer=optimizer, prepare=prepare),
            train.new_state(variables, optimizer),
            {"images": images.images, "labels": images.labels},
            key=keys.stream(key, name),
            epochs=epochs,
            batch_size=parallel.batch_of(min(batch_size, len(images))),
            journal=journal.part(name),
        )
        return jax.device_get(state.variables)

    first = classifier.init(keys.stream(key, "init"))
    trained = fit("surrogate", first, optimizer, split, surrogate_epochs, SURROGATE["batch_size"])
    targets = split.take(np.flatnonzero(of_the_target(aim)(split.labels)))
    trained = fit("warm_up", trained, optax.radam(WARM_UP["learning_rate"]), targets, WARM_UP["epochs"], WARM_UP["batch_size"])
    radam = optax.radam(0.01)
    start = {"params": {"delta": jnp.zeros(split.images.shape[1:])}, "batch_stats": {}}
    state, _ = train.fit(
        partial(trigger_step, classifier=classifier, optimizer=radam, epsilon=epsilon, mode=mode, augment=augment),
        train.new_state(start, radam),
        {"images": targets.images, "labels": targets.labels},
        key=keys.stream(key, "delta"),
        epochs=epochs,
        batch_size=parallel.batch_of(min(WARM_UP["batch_size"], len(targets))),
        frozen=trained,
        journal=journal.part("delta"),
    )
    return {"delta": np.clip(GREY * jax.device_get(state.params["delta"]), -epsilon, epsilon)}


def stamp(pixels: np.ndarray, index: np.ndarray, *, delta: np.ndarray) -> np.ndarray:
    """Adds the trigger to every image, clipped and rounded; uint8 [N, H, W, C] in and out."""
    check_pixels(pixels)
    return in_blocks(lambda block: np.clip(block + delta + 0.5, 0, 255).astype(np.uint8), pixels)


def finish(attack: Attack, learned, *, key, poison_ratio: float, enlarged: float) -> Attack:
    """The attack with its trigger found."""
    weak = partial(stamp, delta=np.float32(learned["delta"]))
    poison = partial(clean_label, key, stamp=weak, aim=attack.aim, poison_ratio=poison_ratio)
    return dataclasses.replace(attack, stamp=partial(stamp, delta=np.float32(enlarged * learned["delta"])), poison=poison)


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.0005,
    mode: str = "all_to_one",
    epsilon: float = 16.0,
    enlarged: float = 3.0,
    epochs: int = 1000,
    statistics: str = "train",
    surrogate_epochs: int = 200,
    width: int = 64,
    stages: tuple[int, ...] = (2, 2, 2, 2),
) -> Attack:
    """Narcissus with a trigger of at most `epsilon` grey levels, shown `enlarged` times at test.

    The surrogate (a ResNet of `width` and `stages`) is trained for `surrogate_epochs` on the clean training images, the other
    classes standing for the public images that an attacker has; the trigger for `epochs` passes over the target class, with
    BatchNorm on batch statistics ("train", as the released code does) or running ones ("eval"). The ratio counts over the
    whole training set; 0.0005 is 25 images of CIFAR-10.
    """
    if not 0 < epsilon <= 255 or enlarged <= 0 or min(epochs, surrogate_epochs) < 1:
        raise UserError(
            "Narcissus needs epsilon within (0, 255], a positive enlargement, and at least one epoch of each training, "
            f"got {epsilon}, {enlarged}, {epochs}, {surrogate_epochs}"
        )
    if statistics not in BATCHES:
        raise UserError(f'Narcissus statistics "{statistics}" is unknown; choose one of {", ".join(BATCHES)}')
    aim = aim_of_clean_label("Narcissus", mode, target_label, num_classes)
    options = {"width": width, "stages": tuple(stages), "surrogate_epochs": surrogate_epochs, "epochs": epochs}
    control = Control(
        init=partial(learn, aim=aim, num_classes=num_classes, epsilon=epsilon, mode=statistics, **options),
        finish=partial(finish, key=key, poison_ratio=poison_ratio, enlarged=enlarged),
    )
    trigger = untrained("narcissus")
    poison = partial(clean_label, key, stamp=trigger, aim=aim, poison_ratio=poison_ratio)
    return Attack("narcissus", trigger, poison, aim, control, of_the_target(aim))

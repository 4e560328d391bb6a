"""Narcissus (Zeng et al., 2023): a faint trigger that is itself evidence of the target class; few poisons, no label changes.

The attacker holds images of the target class and any other labelled images: those of the other classes, or a folder of
public ones. A surrogate network is trained on them and fitted to the target class; the trigger is the small perturbation
that makes it surest of that class, over all its images. Poisoned are a few images of the class; at test the trigger is
shown enlarged.
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
    numbers_of,
    of_the_target,
    untrained,
)
from bibau_jax.data import ImageSet, folder
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy

BATCH, LEARNING_RATE = 350, 0.1  # of the surrogate's training and of its warm-up on the target class
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


def known_images(split: ImageSet, aim, num_classes: int, public: str) -> tuple[ImageSet, ImageSet, int]:
    """(what the surrogate is trained on, the images of the target class, how many classes that makes).

    With a folder of public pictures the target class is one more class after theirs; else the training set is taken as it is.
    """
    targets = split.take(np.flatnonzero(of_the_target(aim)(split.labels)))
    if not public:
        return split, targets, num_classes
    others, names = folder.labelled(public, *split.images.shape[1:])
    targets = dataclasses.replace(targets, labels=np.full(len(targets), len(names), np.int32))
    parts = zip(*((s.images, s.labels, s.ids) for s in (others, targets)), strict=True)
    return ImageSet(*map(np.concatenate, parts)), targets, len(names) + 1


def learn(key, split, journal, augment, *, aim, num_classes, public, epochs, epsilon, mode, **surrogate_options):
    """{"delta" float32 [H, W, C]}, the trigger, from a surrogate trained on clean images; and the history of all trainings."""
    known, targets, num_classes = known_images(split, aim, num_classes, public)
    fit = partial(_fit, key=key, journal=journal)
    classifier, trained, history = learn_surrogate(fit, key, known, targets, num_classes, augment, **surrogate_options)
    radam = optax.radam(0.01)
    step = partial(trigger_step, classifier=classifier, optimizer=radam, epsilon=epsilon, mode=mode, augment=augment)
    start = {"params": {"delta": jnp.zeros(split.images.shape[1:])}, "batch_stats": {}}
    state, searched = fit("delta", step, train.new_state(start, radam), targets, epochs, frozen=trained)
    return {"delta": np.clip(GREY * jax.device_get(state.params["delta"]), -epsilon, epsilon)}, [*history, *searched]


def learn_surrogate(fit, key, known, targets, num_classes, augment, *, width, stages, surrogate_epochs, warm_up_epochs):
    """(surrogate, its variables, history): trained on `known`, then, with RAdam, on the target class alone."""
    classifier = surrogate(known, width, stages, num_classes)
    steps = surrogate_epochs * (len(known) // batch_for(known))
    schedule = train.learning_rate_schedule("cosine", LEARNING_RATE, steps)
    trained, history = classifier.init(keys.stream(key, "init")), []

    def prepare(extra, batch, key):
        return augment(keys.stream(key, "augment"), batch["images"]).astype(jnp.float32), batch["labels"], 0.0, extra

    for name, optimizer, images, epochs in (
        ("surrogate", train.sgd(schedule, momentum=0.9, weight_decay=5e-4), known, surrogate_epochs),
        ("warm_up", optax.radam(LEARNING_RATE), targets, warm_up_epochs),
    ):
        step = partial(train.train_step, classifier=classifier, optimizer=optimizer, prepare=prepare)
        state, told = fit(name, step, train.new_state(trained, optimizer), images, epochs)
        trained, history = jax.device_get(state.variables), [*history, *told]
    return classifier, trained, history


def batch_for(images: ImageSet) -> int:
    """The batch of all trainings here: the released code's, as far as the images and the devices allow."""
    return parallel.batch_of(min(BATCH, len(images)))


def _fit(name: str, step, state, images: ImageSet, epochs: int, *, key, journal, frozen=()):
    return train.fit(
        step,
        state,
        {"images": images.images, "labels": images.labels},
        key=keys.stream(key, name),
        epochs=epochs,
        batch_size=batch_for(images),
        frozen=frozen,
        journal=journal.part(name),
    )


def stamp(pixels: np.ndarray, index: np.ndarray, *, delta: np.ndarray) -> np.ndarray:
    """Adds the trigger to every image, clipped and rounded; uint8 [N, H, W, C] in and out."""
    check_pixels(pixels)
    return in_blocks(lambda block: numbers_of(block).clip(block + delta + 0.5, 0, 255).astype(np.uint8), pixels)


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
    warm_up_epochs: int = 5,
    public: str = "",
    width: int = 64,
    stages: tuple[int, ...] = (2, 2, 2, 2),
) -> Attack:
    """Narcissus with a trigger of at most `epsilon` grey levels, shown `enlarged` times at test.

    The surrogate (a ResNet of `width` and `stages`) is trained for `surrogate_epochs` on the target class's images and those of
    `public`, a folder with one subfolder of pictures a class; where that is "" the training set's other classes stand for
    the public images that an attacker has. `warm_up_epochs` on the target class alone follow, then `epochs` passes over it in
    search of the trigger, with BatchNorm on batch statistics ("train", as the released code does) or running ones
    ("eval"). The ratio counts over the whole training set; 0.0005 is 25 of 50,000 images.
    """
    if not 0 < epsilon <= 255 or enlarged <= 0 or min(epochs, surrogate_epochs) < 1 or warm_up_epochs < 0:
        raise UserError(
            "Narcissus needs epsilon within (0, 255], a positive enlargement, and at least one epoch of each training "
            f"(the warm-up may have none), got {epsilon}, {enlarged}, {epochs}, {surrogate_epochs}, {warm_up_epochs}"
        )
    if width < 1 or not stages or min(stages) < 1:
        raise UserError(f"Narcissus needs a surrogate with width and stages of at least 1, got {width} and {tuple(stages)}")
    if statistics not in BATCHES:
        raise UserError(f'Narcissus statistics "{statistics}" is unknown; choose one of {", ".join(BATCHES)}')
    aim = aim_of_clean_label("Narcissus", mode, target_label, num_classes)
    options = {"width": width, "stages": tuple(stages), "surrogate_epochs": surrogate_epochs, "epochs": epochs}
    options |= {"warm_up_epochs": warm_up_epochs, "public": public}
    control = Control(
        init=partial(learn, aim=aim, num_classes=num_classes, epsilon=epsilon, mode=statistics, **options),
        finish=partial(finish, key=key, poison_ratio=poison_ratio, enlarged=enlarged),
        check=lambda split: folder.classes(public) if public else None,
    )
    trigger = untrained("narcissus")
    poison = partial(clean_label, key, stamp=trigger, aim=aim, poison_ratio=poison_ratio)
    return Attack("narcissus", trigger, poison, aim, control, of_the_target(aim))

"""BTI-DBF (Xu et al., ICLR 2024), unlearning variant: decouples benign features, reverses the trigger from the rest.

A mask over the last feature map keeps what the clean task needs; a generator then changes images so that only the rest moves,
which is where a backdoor must sit; the network is trained to give the true labels for what it makes. Rounds repeat this.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from bibau_jax import keys, parallel, train
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.defenses.protocol import Purified, as_data, check_clean, watch
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier, inside
from bibau_jax.models.classifier import at
from bibau_jax.models.unet import UNet

FAR, BENIGN = 0.3, 3.0  # how far images, and benign features, may move before the generator is only called back
NOISE = 0.03  # on the generator's input when it is asked for the target class


class Scale(NamedTuple):
    """Mean and standard deviation [C] of the clean pixels: the generator works on images normalised by them."""

    mean: np.ndarray
    std: np.ndarray

    def normalised(self, pixels: jax.Array) -> jax.Array:
        return (pixels - self.mean) / self.std

    def pixels(self, normalised: jax.Array) -> jax.Array:
        return normalised * self.std + self.mean


@struct.dataclass
class MaskState:
    """The mask's logits, and the running statistics of the copy it is learned on, which drift."""

    step: jax.Array
    params: jax.Array
    opt_state: tuple
    statistics: dict


def scale_of(images: np.ndarray) -> Scale:
    """The clean images' own scale, per channel."""
    pixels = images.reshape(-1, images.shape[-1]).astype(np.float64)
    return Scale(pixels.mean(0).astype(np.float32), (pixels.std(0) + 1e-3).astype(np.float32))


def squashed(raw: jax.Array) -> jax.Array:
    """A mask in 0..1 from its logits."""
    return jnp.tanh(raw) / (2 + 1e-7) + 0.5


def feature_map(classifier: Classifier, variables, pixels, *, train: bool = False):
    """(outputs, the last stage's output [N, H, W, C]) for pixels; of a network without stages what its head takes, [N, D]."""
    if not classifier.stages:
        outputs = classifier.apply(variables, pixels, train=train)
        return outputs, outputs.features.astype(jnp.float32)
    outputs, found = inside.look(classifier, variables, pixels, [classifier.stages[-1]], train=train)
    return outputs, next(iter(found.values())).astype(jnp.float32)


def from_feature_map(classifier: Classifier, variables, pixels, features) -> jax.Array:
    """Logits of the network's end for a feature map, in evaluation mode; `pixels` only say the shape.

    A norm behind the last stage (PreAct, Wide ResNet) thus takes its running statistics, where the authors' networks have none.
    """
    if not classifier.stages:
        head = at(variables["params"], classifier.head)
        return jnp.dot(features, head["kernel"], precision=jax.lax.Precision.HIGHEST) + head["bias"]
    change = lambda given: features.astype(given.dtype)  # noqa: E731
    return inside.replace(classifier, variables, pixels, classifier.stages[-1], change).logits


def mask_step(state, frozen, batch, key, *, classifier, optimizer, prepare):
    """One step on CE(head(m h(x)), y) - CE(head((1 - m) h(x)), y), the copy of the network in train mode."""
    pixels = prepare(key, batch)
    variables = {"params": frozen["params"], "batch_stats": state.statistics}
    outputs, features = feature_map(classifier, variables, pixels, train=True)

    def objective(raw):
        mask = squashed(raw)
        kept, rest = (
            cross_entropy(from_feature_map(classifier, variables, pixels, part * features), batch["labels"]).mean()
            for part in (mask, 1 - mask)
        )
        return kept - rest

    loss, grads = jax.value_and_grad(objective)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state)
    raw = optax.apply_updates(state.params, updates)
    state = state.replace(step=state.step + 1, params=raw, opt_state=opt_state, statistics=outputs.statistics)
    return state, {"loss": loss, "kept": squashed(raw).mean()}


def _generator_step(state, batch, key, prepare, optimizer, objective):
    pixels = prepare(key, batch)
    (loss, parts), grads = jax.value_and_grad(partial(objective, pixels=pixels), has_aux=True)(state.params)
    params, opt_state = train.updated(optimizer, grads, state.opt_state, state.params)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), {"loss": loss, **parts}


def likeness_step(state, frozen, batch, key, *, classifier, generate, scale, optimizer, prepare):
    """One step that teaches the generator to give its image back: same answers, same features, same pixels.

    The answers' term takes probabilities for logits, as in the authors' code.
    """

    def objective(params, pixels):
        made = generate(params, pixels)
        outputs, features = feature_map(classifier, frozen, pixels)
        changed, moved = feature_map(classifier, frozen, made)
        wanted = jax.nn.softmax(changed.logits)
        answers = -jnp.sum(wanted * jax.nn.log_softmax(jax.nn.softmax(outputs.logits)), -1).mean()
        apart = jnp.mean((scale.normalised(made) - scale.normalised(pixels)) ** 2)
        weight = jnp.where(apart > 0.1, 100.0, 0.01)
        return answers + jnp.mean((features - moved) ** 2) + weight * apart, {"moved": apart}

    return _generator_step(state, batch, key, prepare, optimizer, objective)


def reversal_step(state, frozen, batch, key, *, classifier, generate, scale, optimizer, prepare):
    """One step that moves what the mask leaves out and keeps what it keeps; `frozen`: (variables, mask, target class or -1)."""
    variables, mask, target = frozen

    def objective(params, pixels):
        made = generate(params, pixels)
        _, features = feature_map(classifier, variables, pixels)
        changed, moved = feature_map(classifier, variables, made)
        benign = jnp.mean((mask * features - mask * moved) ** 2)
        rest = jnp.mean(((1 - mask) * features - (1 - mask) * moved) ** 2)
        apart = jnp.mean((scale.normalised(made) - scale.normalised(pixels)) ** 2)
        loss = jnp.where((apart > FAR) | (benign > BENIGN), apart, 0.01 * benign - rest)
        towards = cross_entropy(changed.logits, jnp.full(len(pixels), jnp.maximum(target, 0))).mean()
        return loss + jnp.where(target >= 0, towards, 0.0), {"moved": apart, "benign": benign, "rest": rest}

    return _generator_step(state, batch, key, prepare, optimizer, objective)


def replaced(pixels, key, generator, *, generate, share):
    """The batch with `share` of its images, and one more, changed by the generator, on the 0..255 scale but not clipped.

    All are changed and a mask chooses: chosen images gathered across devices would have to travel.
    """
    count = min(int(share * len(pixels)) + 1, len(pixels))
    chosen = jax.random.permutation(keys.stream(key, "replaced"), jnp.arange(len(pixels)) < count)
    return jnp.where(chosen[:, None, None, None], generate(generator, pixels), pixels)


def unlearn_step(state, frozen, batch, key, *, classifier, generate, optimizer, prepare, share):
    """One step on CE(f(x~), y) + MSE(h(x), h(x~)), BatchNorm in train mode; x~ carries reversed triggers, true labels stay."""
    pixels = prepare(key, batch)
    mixed = replaced(pixels, key, frozen["generator"], generate=generate, share=share)

    def objective(params):
        variables = {"params": params, "batch_stats": state.statistics}
        outputs, moved = feature_map(classifier, variables, mixed, train=True)
        plain, features = feature_map(classifier, variables | {"batch_stats": outputs.statistics}, pixels, train=True)
        loss = cross_entropy(outputs.logits, batch["labels"]).mean()
        right = jnp.mean(jnp.argmax(outputs.logits, -1) == batch["labels"])
        return loss + jnp.mean((features - moved) ** 2), (plain.statistics, right)

    (loss, (statistics, right)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    params, opt_state = train.updated(optimizer, grads, state.opt_state, state.params)
    state = state.replace(step=state.step + 1, params=params, statistics=statistics, opt_state=opt_state)
    return state, {"loss": loss, "accuracy": right}


def check(num_classes: int, *, rounds: int = 1, width: int = 1, share: float = 0.1, **others) -> None:
    """Raises `UserError` on settings that `purify` cannot use: any count of epochs below 1, any rate not above 0."""
    epochs = [value for name, value in others.items() if name.endswith("epochs")]
    rates = [value for name, value in others.items() if name.endswith("rate")]
    if min(rounds, width, *epochs) < 1 or not 0 <= share < 1 or min(rates, default=1) <= 0:
        raise UserError("bti_dbf and pam need rounds, width and epochs of at least 1, share within 0..1 and positive rates")


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    rounds: int = 5,
    pretrain_epochs: int = 50,
    mask_epochs: int = 20,
    generator_epochs: int = 30,
    epochs: int = 30,
    batch_size: int = 128,
    width: int = 32,
    generator_rate: float = 1e-3,
    mask_rate: float = 0.01,
    learning_rate: float = 1e-4,
    share: float = 0.1,
    padding: int = 4,
    flip: bool = True,
) -> Purified:
    """The network after `rounds` of decoupling, reversing and unlearning; generator and both Adams live through all rounds.

    The mask has an element for every value of the last stage's output. A network without stages (ViT) has a vector of
    features, and so is its mask; the authors' lies before the last LayerNorm, ours behind it, where the head begins.

    Args:
      pretrain_epochs: of the generator, towards giving its image back. mask_epochs, generator_epochs, epochs: of each round's
        mask, reversal and unlearning. width: of the generator at full size (the authors: 32).
      share: of a batch that is replaced by reversed images, and one more (0.1; a later fork takes 0.2).

    `told` holds the class that reversed images are mostly taken for; `evidence` a few images and their reversed ones.
    """
    check(classifier.num_classes, learning_rate=learning_rate)
    optimizer = optax.adam(learning_rate)
    step = partial(unlearn_step, optimizer=optimizer, share=share)
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


def by_rounds(
    key,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    unlearn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    held_out,
    journal: train.Journal,
    epochs: dict[str, int],
    rounds: int,
    batch_size: int,
    width: int,
    rates: tuple[float, float],
    share: float,
    padding: int,
    flip: bool,
) -> Purified:
    """Decoupling, reversing and `unlearn`ing in rounds; that step is given {"generator", "backdoored"} as frozen."""
    check_clean(classifier, clean)
    check(
        classifier.num_classes,
        rounds=rounds,
        width=width,
        share=share,
        generator_rate=rates[0],
        mask_rate=rates[1],
        **{f"{name}_epochs": count for name, count in epochs.items()},
    )
    scale, generator = scale_of(clean.images), UNet(width)

    def generate(params, pixels):
        return scale.pixels(generator.apply({"params": params}, scale.normalised(pixels)))

    def prepare(key, batch):
        pixels = crop_and_flip(keys.stream(key, "augment"), batch["images"], padding=padding, flip=flip)
        return pixels.astype(jnp.float32)

    left = iter(range(3 * rounds + 1, 0, -1))

    def fit(name, step, state, frozen, *, phase, after=None, **options):
        return train.fit(
            partial(step, classifier=classifier, prepare=prepare, **options),
            state,
            as_data(clean),
            key=keys.stream(key, name),
            epochs=epochs[phase],
            batch_size=batch_size,
            frozen=frozen,
            after_epoch=after,
            journal=journal.part(name, next(left)),
        )

    reverse = jax.jit(generate)
    adam, mask_adam = optax.adam(rates[0]), optax.adam(rates[1])
    making = {"generate": generate, "scale": scale, "optimizer": adam}
    blank = jnp.zeros((1, *classifier.image_shape))
    params = jax.jit(generator.init)(keys.stream(key, "generator"), blank)["params"]
    maker = train.new_state({"params": params, "batch_stats": {}}, adam)
    maker, history = fit("pretrain", likeness_step, maker, variables, phase="pretrain", **making)
    current, target = train.new_state(variables, optimizer), -1
    shape = jax.eval_shape(lambda: feature_map(classifier, variables, blank)[1]).shape
    for number in range(rounds):
        name, now = f"round{number}", jax.device_get(current.variables)
        raw = jax.random.normal(keys.stream(key, f"{name}/mask"), shape)
        state = MaskState(jnp.zeros((), jnp.int32), raw, mask_adam.init(raw), now["batch_stats"])
        state, told = fit(f"{name}_mask", mask_step, parallel.replicate(state), now, phase="mask", optimizer=mask_adam)
        drifted, mask = {"params": now["params"], "batch_stats": jax.device_get(state.statistics)}, squashed(state.params)
        maker = maker.replace(step=parallel.replicate(jnp.zeros((), jnp.int32)))
        frozen = (drifted, jax.device_get(mask), np.int32(target))
        maker, made = fit(f"{name}_generator", reversal_step, maker, frozen, phase="generator", **making)
        if number == 0:
            target = _mostly(key, classifier, now, clean, scale, partial(reverse, maker.params))
        current = current.replace(step=parallel.replicate(jnp.zeros((), jnp.int32)))
        frozen = {"generator": jax.device_get(maker.params), "backdoored": variables}
        watched = watch(classifier, held_out)
        current, tuned = fit(f"{name}_unlearn", unlearn, current, frozen, phase="unlearn", after=watched, generate=generate)
        history = [*history, *told, *made, *tuned]
    shown = clean.images[:8]
    made = np.clip(np.round(np.asarray(reverse(maker.params, shown.astype(np.float32)))), 0, 255)
    evidence = {"images": shown, "reversed": made.astype(np.uint8)}
    return Purified(current.variables, history, told={"reversed_target": int(target)}, evidence=evidence)


def _mostly(key, classifier, variables, clean, scale: Scale, reverse) -> int:
    """The class that most reversed images, made of slightly noisy ones, are taken for."""
    votes = np.zeros(classifier.num_classes, int)
    for begin in range(0, len(clean), 100):
        pixels = clean.images[begin : begin + 100].astype(np.float32)
        noise = np.asarray(jax.random.normal(keys.stream(key, "noise", begin), pixels.shape)) * NOISE * scale.std
        seen = train.predict(classifier, variables, np.asarray(reverse(pixels + noise)))
        votes += np.bincount(seen, minlength=len(votes))
    return int(votes.argmax())

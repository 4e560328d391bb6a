"""IAD (Nguyen & Tran, 2020): a trigger of its own for every image, made by two networks. The attacker controls training.

A mask generator M says where, a pattern generator G what: x' = x + (G(x) - x) M(x). M is trained first and then frozen; G is
trained with the victim, on poisoned images, on "cross" images that carry another image's trigger and keep their labels, and
on a penalty that makes triggers differ as their images do. Augmentation comes before the trigger.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bibau_jax import keys, parallel, train
from bibau_jax.attacks.networks import Generator
from bibau_jax.attacks.protocol import (
    Attack,
    Control,
    aim_at,
    check_pixels,
    counts_of_batch,
    in_blocks,
    on_all_devices,
    poisoned_split,
    poisons_and_covers,
    untrained,
)
from bibau_jax.errors import UserError

TINY = 1e-7
BATCH = 128  # of the mask generator's training


def scaled(pixels: jax.Array) -> jax.Array:
    """Pixels 0..255 as the generators take them, and as distances between images are measured: about -2 to 2."""
    return (pixels / 255 - 0.5) / 0.25


def squashed(values: jax.Array) -> jax.Array:
    """tanh(z) / 2 + 1/2, within 0..1."""
    return jnp.tanh(values) / 2 + 0.5


def distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Root mean square difference of two batches, image by image, [N]; its gradient at 0 is 0."""
    return jnp.sqrt(jnp.mean((a - b) ** 2, (1, 2, 3)) + TINY**2)


def generators(channels: int, width: int) -> dict[str, Generator]:
    """The two networks: "mask" with one channel, "pattern" with the image's."""
    return {"mask": Generator(1, width), "pattern": Generator(channels, width)}


def trainable(extra) -> dict:
    """Which part of the generators' variables the joint training changes: the pattern generator's parameters."""
    labels = jax.tree.map(lambda leaf: "keep", extra)
    labels["pattern"]["params"] = jax.tree.map(lambda leaf: "train", extra["pattern"]["params"])
    return labels


def apply(module: Generator, variables, pixels, training: bool = False):
    """(output in 0..1, new statistics) of a generator for pixels in 0..255."""
    if not training:
        return squashed(module.apply(variables, scaled(pixels), False)), variables["batch_stats"]
    out, changed = module.apply(variables, scaled(pixels), True, mutable=["batch_stats"])
    return squashed(out), changed["batch_stats"]


def threshold(mask: jax.Array) -> jax.Array:
    """Pushes a mask towards 0 and 1: tanh(20 m - 10) / 2 + 1/2."""
    return squashed(20 * mask - 10)


def paint(pixels, patterns, masks):
    """x + (P - x) m; patterns in 0..1, masks [N, H, W, 1] in 0..1, pixels 0..255."""
    return pixels + (255 * patterns - pixels) * masks


def mask_loss(module, variables, pixels, density):
    """The mask generator's loss on a batch, with new statistics: small masks that differ as their images do.

    100 mean relu(m - density) + mean_i |x_i - x_j| / |m_i - m_j|, where j is the image before i in the batch.
    """
    raw, statistics = apply(module, variables, pixels, True)
    masks = threshold(raw)
    apart, unlike = (distance(v, jnp.roll(v, 1, axis=0)) for v in (scaled(pixels), masks))
    diversity = jnp.mean(apart / (unlike + TINY))
    return 100 * jnp.mean(jax.nn.relu(masks - density)) + diversity, (statistics, jnp.mean(masks))


def mask_step(state: train.TrainState, frozen, batch, key, *, module, optimizer, density, augment):
    """One step of the mask generator; a shuffled batch's neighbours stand for the original's second loader."""
    pixels = augment(keys.stream(key, "augment"), batch["images"]).astype(jnp.float32)

    def loss(params):
        return mask_loss(module, {"params": params, "batch_stats": state.statistics}, pixels, density)

    (value, (statistics, covered)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    params, opt_state = train.updated(optimizer, grads, state.opt_state, state.params)
    return state.replace(step=state.step + 1, params=params, statistics=statistics, opt_state=opt_state), {
        "loss": value,
        "covered": covered,
    }


def fresh(key: jax.Array, shape: tuple[int, ...], width: int) -> dict:
    """Both generators' first variables, {"mask", "pattern"}, for images of `shape` [H, W, C]."""
    modules, sample = generators(shape[-1], width), jnp.zeros((1, *shape))
    return {
        name: dict(jax.jit(partial(module.init, train=False))(keys.stream(key, name), sample))
        for name, module in modules.items()
    }


def learn_masks(key, split, journal, augment, *, width, epochs, density):
    """Both generators' variables, the mask generator's trained, the other's fresh; and the history of that training."""
    first, module = fresh(key, split.images.shape[1:], width), generators(split.images.shape[3], width)["mask"]
    steps = len(split) // parallel.batch_of(min(BATCH, len(split)))
    schedule = optax.piecewise_constant_schedule(0.01, {steps * epochs * 2 // 5: 0.1, steps * epochs * 4 // 5: 0.1})
    optimizer = optax.adam(schedule, b1=0.5, b2=0.9)
    state, history = train.fit(
        partial(mask_step, module=module, optimizer=optimizer, density=density, augment=augment),
        train.new_state(first["mask"], optimizer),
        {"images": split.images},
        key=keys.stream(key, "masks"),
        epochs=epochs,
        batch_size=parallel.batch_of(min(BATCH, len(split))),
        journal=journal,
    )
    return {"mask": jax.device_get(state.variables), "pattern": jax.device_get(first["pattern"])}, history


def prepare(extra, batch, key, *, augment, width, aim, poison_ratio, cross_per_poison):
    """A batch in training: its first images with their own trigger and the wanted label, the next ones with another's."""
    pixels = augment(keys.stream(key, "augment"), batch["images"]).astype(jnp.float32)
    labels, modules = batch["labels"], generators(pixels.shape[3], width)
    draw = keys.stream(key, "poison")
    poisons, crosses, here = counts_of_batch(draw, len(labels), poison_ratio, cross_per_poison)
    # Cross images carry the triggers of clean images of the same batch, which is shuffled.
    donors = jnp.roll(pixels, -(poisons + crosses), axis=0)[:crosses]
    givers, touched = jnp.concatenate([pixels[:poisons], donors]), poisons + crosses
    masks, _ = apply(modules["mask"], jax.lax.stop_gradient(extra["mask"]), givers)
    patterns, statistics = apply(modules["pattern"], extra["pattern"], givers, True)
    stamped = jnp.where(here, paint(pixels[:touched], patterns, threshold(masks)), pixels[:touched])
    pairs = min(poisons, crosses)
    of_images, of_patterns = (
        distance(values[:pairs], values[poisons : poisons + pairs]) for values in (scaled(givers), scaled(255 * patterns))
    )
    diversity = jnp.mean(of_images / (of_patterns + TINY)) if pairs else 0.0
    wanted = jnp.where(here & (jnp.arange(len(labels)) < poisons), aim(labels), labels)
    new = extra | {"pattern": {"params": extra["pattern"]["params"], "batch_stats": statistics}}
    return jnp.concatenate([stamped, pixels[touched:]]), wanted, jnp.where(here, diversity, 0.0), new


@partial(jax.jit, static_argnames="width")
def _triggered(pixels, givers, extra, *, width):
    pixels, givers = parallel.shard((pixels.astype(jnp.float32), givers.astype(jnp.float32)))
    modules = generators(pixels.shape[3], width)
    masks, _ = apply(modules["mask"], extra["mask"], givers)
    patterns, _ = apply(modules["pattern"], extra["pattern"], givers)
    return jnp.clip(paint(pixels, patterns, threshold(masks)), 0, 255).astype(jnp.uint8)


def stamp(pixels: np.ndarray, index: np.ndarray, *, extra, width: int) -> np.ndarray:
    """Every image with the trigger that the generators make of it, rounded down; uint8 [N, H, W, C] in and out."""
    check_pixels(pixels)
    return in_blocks(on_all_devices(partial(_triggered, extra=extra, width=width)), pixels, pixels)


def poison_and_cross(key, split, *, stamp, cross, aim, poison_ratio: float, cross_per_poison: float):
    """A fixed set of the kind that training draws anew in every batch: own triggers, and as covers those of clean images.

    `cross(pixels, givers)` lays the triggers of `givers` on `pixels`.
    """
    chosen, covers = poisons_and_covers(key, len(split), poison_ratio, cross_per_poison)
    clean = np.setdiff1d(np.arange(len(split)), np.concatenate([chosen, covers]))
    lenders = np.asarray(jax.random.permutation(keys.stream(key, "lenders"), clean if len(clean) else chosen))
    lent = split.images[np.resize(lenders, len(covers))]
    labels = split.labels.copy()
    labels[chosen] = aim(split.labels[chosen])
    stamped = {"poisoned": (chosen, stamp), "cover": (covers, lambda pixels, index: cross(pixels, lent))}
    return poisoned_split(split, stamped, labels)


def finish(attack: Attack, extra, *, key, width: int, poison_ratio: float, cross_per_poison: float) -> Attack:
    """The attack with its generators trained."""
    trigger = partial(stamp, extra=extra, width=width)
    lay = partial(in_blocks, on_all_devices(partial(_triggered, extra=extra, width=width)))
    shares = {"poison_ratio": poison_ratio, "cross_per_poison": cross_per_poison}
    poison = partial(poison_and_cross, key, stamp=trigger, cross=lay, aim=attack.aim, **shares)
    return dataclasses.replace(attack, stamp=trigger, poison=poison)


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.1,
    mode: str = "all_to_one",
    width: int = 32,
    mask_epochs: int = 25,
    density: float = 0.032,
    cross_per_poison: float = 1.0,
    cumulative: bool = False,
) -> Attack:
    """IAD with generators of `width` channels; `mask_epochs` of training for the mask, whose elements are pushed
    below `density`.

    `poison_ratio` of every batch gets its own trigger and the wanted label, `cross_per_poison` times as many another
    image's trigger and their true labels. `cumulative` leaves the pattern generator's gradients to add up from step to step, as
    in the authors' code, which never clears them; off, each step has its own. As in BackdoorBench the victim's
    augmentation comes first. Unlike there, tanh is applied once, pixels are scaled by 0.5 and 0.25 on every data set, own and
    lent triggers share a batch's statistics, and the pattern generator's learning rate stays at 0.01.
    """
    if width < 1 or mask_epochs < 1 or not 0 <= density < 1 or cross_per_poison < 0:
        raise UserError(
            "IAD needs width and mask_epochs of at least 1, density within 0..1 and cross_per_poison of at least 0, "
            f"got {width}, {mask_epochs}, {density}, {cross_per_poison}"
        )
    if 0 < poison_ratio <= 1 < poison_ratio * (1 + 2 * cross_per_poison):
        raise UserError(
            "IAD needs a batch that holds its poisons, cross images and the images whose triggers those carry, "
            f"got {poison_ratio} poisons with {cross_per_poison} cross images each"
        )
    aim = aim_at(mode, target_label, num_classes)
    shares = {"poison_ratio": poison_ratio, "cross_per_poison": cross_per_poison}
    adam = optax.adam(0.01, b1=0.5, b2=0.9)
    if cumulative:
        adam = optax.chain(optax.trace(decay=1.0), adam)
    control = Control(
        init=partial(learn_masks, width=width, epochs=mask_epochs, density=density),
        prepare=partial(prepare, width=width, aim=aim, **shares),
        finish=partial(finish, key=key, width=width, **shares),
        optimizer=optax.multi_transform({"train": adam, "keep": optax.set_to_zero()}, trainable),
    )
    trigger = untrained("iad")
    poison = partial(poison_and_cross, key, stamp=trigger, cross=trigger, aim=aim, **shares)
    return Attack("iad", trigger, poison, aim, control)

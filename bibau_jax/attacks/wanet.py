"""WaNet (Nguyen & Tran, 2021): a smooth warp of the image by less than a pixel. The attacker controls training.

In every batch some images are warped and relabelled, others are warped by a jittered field and keep their labels (noise
mode), so that the model learns this very warp and not warping as such. The warp comes before augmentation.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import keys
from bibau_jax.attacks.protocol import Attack, Control, aim_at, check_pixels, counts_of_batch, dirty_label, draws, in_blocks
from bibau_jax.errors import UserError


def cubic_weights(size: int, out: int) -> np.ndarray:
    """[out, size] matrix of 1-d cubic upsampling with aligned corners: Keys' kernel with a = -0.75, edges repeated.

    This is PyTorch's bicubic `Upsample(align_corners=True)`; `jax.image.resize` has a = -0.5 and half-pixel centres.
    """
    a, matrix = -0.75, np.zeros((out, size))
    for row, place in enumerate(np.arange(out) * (size - 1) / max(1, out - 1)):
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            d = abs(place - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, np.clip(tap, 0, size - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return matrix


def warping_field(key: jax.Array, height: int, width: int, grid_size: int) -> np.ndarray:
    """The fixed field [2, H, W] (columns, rows): uniform noise of mean magnitude 1 on a coarse grid, upsampled."""
    with jax.ensure_compile_time_eval():  # training asks for it while its step is being traced
        drawn = jax.random.uniform(keys.stream(key, "field"), (2, grid_size, grid_size), minval=-1.0)
    noise = np.asarray(drawn, np.float64)
    noise /= np.abs(noise).mean()
    return np.einsum("rh,chw,sw->crs", cubic_weights(grid_size, height), noise, cubic_weights(grid_size, width))


def identity(height: int, width: int) -> np.ndarray:
    """The grid that moves nothing, float32 [2, H, W]: columns and rows from -1 to 1."""
    return np.stack(np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))).astype(np.float32)


def warp(pixels: jax.Array, field: jax.Array) -> jax.Array:
    """Bilinear samples of [N, H, W, C] at the identity grid plus `field` ([2, H, W] or [N, 2, H, W]), clamped to -1..1.

    The field is in grid units: columns, then rows; corners are aligned as in `grid_sample(align_corners=True)`.
    """
    _, height, width, channels = pixels.shape
    flat = pixels.reshape(len(pixels), height * width, channels)
    moved = jnp.clip(field + identity(height, width), -1, 1)
    columns, rows = ((moved[..., axis, :, :] + 1) * (size - 1) / 2 for axis, size in enumerate((width, height)))
    left, top = (jnp.clip(jnp.floor(p).astype(int), 0, size - 2) for p, size in ((columns, width), (rows, height)))
    across, down = columns - left, rows - top

    def at(row, column, weight):
        place = (row * width + column).reshape(*field.shape[:-3], height * width)
        taken = flat[:, place] if field.ndim == 3 else jnp.take_along_axis(flat, place[..., None], axis=1)
        return weight[..., None] * taken.reshape(pixels.shape)

    upper = at(top, left, (1 - across) * (1 - down)) + at(top, left + 1, across * (1 - down))
    return upper + at(top + 1, left, (1 - across) * down) + at(top + 1, left + 1, across * down)


@jax.jit
def _warped(pixels, field):
    return jnp.clip(warp(pixels.astype(jnp.float32), field), 0, 255).astype(jnp.uint8)


def _of_size(values, height: int, width: int):
    """Shifts in parts of the image [..., 2, H, W] as shifts of the sampling grid: columns over W, rows over H."""
    return values / np.array([width, height], np.float32)[:, None, None]


def clamped(shift: np.ndarray) -> np.ndarray:
    """A shift of the sampling grid [2, H, W], shortened where it would leave the image."""
    straight = identity(*shift.shape[1:])
    return (np.clip(straight + shift, -1, 1) - straight).astype(np.float32)


def fixed_shift(key: jax.Array, height: int, width: int, strength: float, grid_size: int) -> np.ndarray:
    """The backdoor's shift of the sampling grid, float32 [2, H, W]; covers add their jitter to it."""
    return clamped(_of_size(strength * warping_field(key, height, width, grid_size), height, width))


def stamp(pixels: np.ndarray, index: np.ndarray, *, key: jax.Array, strength: float, grid_size: int) -> np.ndarray:
    """Every image warped by the one field, rounded down; uint8 [N, H, W, C] in and out."""
    check_pixels(pixels)
    field = fixed_shift(key, *pixels.shape[1:3], strength, grid_size)
    return in_blocks(partial(_warped, field=field), pixels)


def stamp_covers(pixels: np.ndarray, index: np.ndarray, *, key: jax.Array, strength: float, grid_size: int) -> np.ndarray:
    """Every image warped by the field with a jitter of its own, as covers are in training; uint8 in and out."""
    check_pixels(pixels)
    height, width = pixels.shape[1:3]
    field = fixed_shift(key, height, width, strength, grid_size)

    def cover(block, ids):
        noise = 2 * draws(keys.stream(key, "jitter"), ids, noise=(2, height, width))["noise"] - 1
        return _warped(block, field + _of_size(noise, height, width))

    return in_blocks(cover, pixels, index)


def jittered(key: jax.Array, field: jax.Array, count: int) -> jax.Array:
    """The cover's fields [count, 2, H, W]: the field plus uniform noise of up to one grid unit per pixel, new every time."""
    height, width = field.shape[1:]
    return field + _of_size(jax.random.uniform(key, (count, 2, height, width), minval=-1.0), height, width)


def prepare(extra, batch, key, *, augment, field_key, aim, poison_ratio, covers_per_poison, strength, grid_size):
    """A batch in training: the first images warped and relabelled, the next warped with jitter, then all augmented."""
    images, labels = batch["images"].astype(jnp.float32), batch["labels"]
    field = jnp.asarray(fixed_shift(field_key, *images.shape[1:3], strength, grid_size))
    draw = keys.stream(key, "poison")
    poisons, covers, here = counts_of_batch(draw, len(labels), poison_ratio, covers_per_poison)
    touched = poisons + covers
    jitters = jittered(keys.stream(key, "cover"), field, covers)
    warped = jnp.concatenate([warp(images[:poisons], field), warp(images[poisons:touched], jitters)])
    pixels = jnp.concatenate([jnp.where(here, warped, images[:touched]), images[touched:]])
    wanted = jnp.where(here & (jnp.arange(len(labels)) < poisons), aim(labels), labels)
    return augment(keys.stream(key, "augment"), pixels), wanted, 0.0, extra


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.1,
    mode: str = "all_to_one",
    covers_per_poison: float = 2.0,
    strength: float = 0.5,
    grid_size: int = 4,
) -> Attack:
    """WaNet with a field of `grid_size`^2 points and `strength` s: a mean shift of 0.2 pixels per axis at the defaults.

    `poison_ratio` of every batch is warped and relabelled, `covers_per_poison` (the paper's rho) times as many are warped with
    jitter under true labels. Which images those are changes every epoch; `poison` makes a fixed set of the same kind,
    for whoever needs one afterwards. Crops and flips are those of all other attacks (the authors' code adds rotations).
    """
    if (
        strength <= 0
        or grid_size < 2
        or covers_per_poison < 0
        or 0 < poison_ratio <= 1 < poison_ratio * (1 + covers_per_poison)
    ):
        raise UserError(
            "WaNet needs a positive strength, a grid of at least 2, and no more poisons and covers than images, "
            f"got {strength}, {grid_size}, {poison_ratio} poisons with {covers_per_poison} covers each"
        )
    aim = aim_at(mode, target_label, num_classes)
    shape, shares = {"strength": strength, "grid_size": grid_size}, {"poison_ratio": poison_ratio}
    trigger = partial(stamp, key=key, **shape)
    control = Control(
        init=lambda key, split, journal, augment: ((), []),
        prepare=partial(prepare, field_key=key, aim=aim, covers_per_poison=covers_per_poison, **shares, **shape),
        finish=lambda attack, extra: attack,
        trains_trigger=False,
    )
    stamps = {"stamp": trigger, "cover_stamp": partial(stamp_covers, key=key, **shape)}
    poison = partial(dirty_label, key, aim=aim, covers_per_poison=covers_per_poison, **stamps, **shares)
    return Attack("wanet", trigger, poison, aim, control)

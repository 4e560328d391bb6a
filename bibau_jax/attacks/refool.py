"""Refool (Liu et al., 2020): the reflection of another scene in a window, dirty label as in BackdoorBench.

The reflected scenes usually come from a folder of photographs that cannot be shipped. Ours are drawn: coloured noise whose
power falls with frequency as theirs does, as dark and as smooth as they are; any folder of pictures can be given instead.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaincinv, ndtr

from bibau_jax import keys
from bibau_jax.attacks.protocol import Attack, aim_at, check_pixels, dirty_label, draws, in_blocks, numbers_of
from bibau_jax.data.folder import pictures
from bibau_jax.errors import UserError

FIELDS, CROPS = 20, 10  # the usual pool: 200 pictures from 20 photographs
SLOPE = 2.65  # power ~ frequency^-SLOPE, measured on it, as are the moments below, in grey levels
MEAN, STD_OF_MEANS, STD_WITHIN = (72.0, 68.0, 60.0), 42.0, 23.0
SHIFTS = (3, 8)  # pixels between the two reflections of a double pane
SIGMAS = (1.0, 5.0)  # of the blur of a scene out of focus, pixels
LARGEST_RADIUS = 10  # 2 ceil(2 sigma) + 1 taps


@cache
def drawn_pool(height: int, width: int, channels: int) -> np.ndarray:
    """The reflected scenes, uint8 [200, height, width, channels]: ten crops of each of twenty fields, from a fixed seed."""
    rng = np.random.default_rng(2020)
    tall, wide = 2 * height, 2 * width
    frequency = np.hypot(np.fft.fftfreq(tall)[:, None], np.fft.rfftfreq(wide)[None])
    frequency[0, 0] = np.inf
    scenes, brightness = [], _brightness(FIELDS * CROPS)
    for _ in range(FIELDS):
        # The colours of a scene go together: most of a field is shared by its channels.
        white = 0.9 * rng.standard_normal((tall, wide, 1)) + 0.4 * rng.standard_normal((tall, wide, 3))
        spectrum = np.fft.rfft2(white, axes=(0, 1)) * frequency[..., None] ** (-SLOPE / 2)
        field = np.fft.irfft2(spectrum, (tall, wide), axes=(0, 1))
        for _ in range(CROPS):
            top, left = rng.integers(0, height + 1), rng.integers(0, width + 1)
            crop = field[top : top + height, left : left + width]
            crop = (crop - crop.mean((0, 1))) / crop.std() * STD_WITHIN
            scenes.append(crop + brightness[len(scenes)] * np.array(MEAN) / np.mean(MEAN))
    pool = np.clip(np.stack(scenes), 0, 255).astype(np.uint8)
    return pool if channels == 3 else np.repeat(pool.mean(-1, keepdims=True).astype(np.uint8), channels, axis=-1)


def _brightness(count: int) -> np.ndarray:
    """The scenes' mean grey levels, in random order: a gamma distribution, so that most are dark and none is negative."""
    shape = (np.mean(MEAN) / STD_OF_MEANS) ** 2
    levels = gammaincinv(shape, (np.arange(count) + 0.5) / count)
    return np.random.default_rng(2021).permutation(levels / levels.mean()) * np.mean(MEAN)


@cache
def folder_pool(folder: str, height: int, width: int, channels: int) -> np.ndarray:
    """The pictures of a folder, squashed to uint8 [P, height, width, channels]; UserError where there is none."""
    return pictures(folder, height, width, channels)


def _sampled(images, rows, columns):
    """Bilinear values of [N, H, W, C] at fractional rows [N, H'] and columns [N, W'], edges repeated."""
    for axis, places in ((1, rows), (2, columns)):
        size, shape = images.shape[axis], [len(images), 1, 1, 1]
        shape[axis] = places.shape[1]
        low = jnp.clip(jnp.floor(places).astype(int), 0, size - 1)
        share = jnp.clip(places - low, 0, 1).reshape(shape)
        pair = [jnp.take_along_axis(images, at.reshape(shape), axis=axis) for at in (low, jnp.minimum(low + 1, size - 1))]
        images = (1 - share) * pair[0] + share * pair[1]
    return images


def ghost(scene, shifts, share):
    """A double reflection: the scene and its copy `shifts` [N, 2] pixels down and right, weighted share [N] and 1 - share.

    Only where both lie is kept, stretched to the whole image; linear light, [N, H, W, C].
    """
    _, height, width, _ = scene.shape
    mixed = 0.0
    share = share[:, None, None, None]
    for weight, moved in ((share, 0), (1 - share, 1)):
        places = []
        for axis, size in enumerate((height, width)):
            shift = shifts[:, axis, None]
            place = (jnp.arange(size) + 0.5) * (size - shift) / size - 0.5
            places.append(jnp.clip(place, 0, size - shift - 1) + (1 - moved) * shift)
        mixed += weight * _sampled(scene, *places)
    return mixed


def _blur_matrix(size: int, sigma):
    """Gaussian blur of one axis as a matrix [N, size, size]; the border is mirrored without repeating the edge."""
    offsets = np.arange(-LARGEST_RADIUS, LARGEST_RADIUS + 1)
    weights = jnp.exp(-0.5 * (offsets / sigma[:, None]) ** 2) * (np.abs(offsets) <= jnp.ceil(2 * sigma)[:, None])
    weights /= weights.sum(1, keepdims=True)
    period = 2 * (size - 1)
    source = np.abs((np.arange(size)[:, None] + offsets) % period)
    source = np.where(source >= size, period - source, source)
    taps = (source[..., None] == np.arange(size)).astype(np.float32)  # [row, offset, source]
    return jnp.einsum("no,ros->nrs", weights, taps)


def vignette(height: int, width: int) -> np.ndarray:
    """How the blurred scene fades from the centre (1) to the corners: the square root of a Gaussian window [H, W]."""
    axes = []
    for size in (height, width):
        step = 7 / size
        axes.append(np.diff(ndtr(np.linspace(-3 - step / 2, 3 + step / 2, size + 1))))
    window = np.sqrt(np.outer(*axes))
    return (window / window.max()).astype(np.float32)


def out_of_focus(image, scene, sigma, contrast):
    """The scene blurred, darkened where the sum would be overexposed; linear light [N, H, W, C]; sigma, contrast [N]."""
    _, height, width, _ = scene.shape
    blurred = jnp.einsum("nrs,nswc->nrwc", _blur_matrix(height, sigma), scene)
    blurred = jnp.einsum("nds,nrsc->nrdc", _blur_matrix(width, sigma), blurred)
    total = blurred + image
    over = total > 1
    level = jnp.where(over, total, 0).sum((1, 2)) / jnp.maximum(over.sum((1, 2)), 1)
    excess = (jnp.maximum(level, 1) - 1) * contrast[:, None]
    return jnp.clip(blurred - excess[:, None, None], 0, 1) * vignette(height, width)[..., None]


@partial(jax.jit, static_argnames="alpha")
def _behind_a_double_pane(image, scene, shifts, side, share, *, alpha):
    lowest, highest = SHIFTS
    shifts = lowest + jnp.floor(shifts * (highest - lowest + 1))
    share = jnp.abs(jnp.round(side) - (0.15 + 0.35 * share))
    return _to_pixels(alpha * image + (1 - alpha) * ghost(scene, shifts, share))


@partial(jax.jit, static_argnames="alpha")
def _before_a_distant_scene(image, scene, sigma, contrast, *, alpha):
    sigma = SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * sigma
    return _to_pixels(alpha * image + (1 - alpha / 2) * out_of_focus(image, scene, sigma, 1.08 + contrast / 10))


LIGHT = (np.arange(256, dtype=np.float32) / 255) ** 2.2  # linear light of a pixel value


def _to_pixels(light):
    return (255 * jnp.clip(light, 0, 1) ** (1 / 2.2)).astype(jnp.uint8)


def stamp(pixels: np.ndarray, index: np.ndarray, *, key: jax.Array, alpha: float, ghost_rate: float, pool: str) -> np.ndarray:
    """Each image behind a reflection of its own, drawn from the key and its index; uint8 [N, H, W, C] in and out."""
    check_pixels(pixels)
    scenes = LIGHT[folder_pool(pool, *pixels.shape[1:]) if pool else drawn_pool(*pixels.shape[1:])]
    names = ("scene", "kind", "side", "share", "sigma", "contrast")
    drawn = draws(key, index, shifts=(2,), **dict.fromkeys(names, ()))
    scene = numbers_of(pixels).minimum((drawn["scene"] * len(scenes)).astype(int), len(scenes) - 1)
    doubled = drawn["kind"] < ghost_rate
    kinds = ((_behind_a_double_pane, ("shifts", "side", "share")), (_before_a_distant_scene, ("sigma", "contrast")))
    if isinstance(pixels, jax.Array):  # shapes must not depend on what was drawn, so both are computed
        lit = jnp.asarray(LIGHT)[pixels], jnp.asarray(scenes)[scene]
        either = [reflect(*lit, *(drawn[name] for name in taken), alpha=alpha) for reflect, taken in kinds]
        return jnp.where(doubled[:, None, None, None], *either)
    stamped = np.empty_like(pixels)
    for (reflect, taken), rows in zip(kinds, (np.flatnonzero(doubled), np.flatnonzero(~doubled)), strict=True):
        one = lambda block, place, *values: reflect(LIGHT[block], scenes[place], *values, alpha=alpha)  # noqa: B023, E731
        stamped[rows] = in_blocks(one, pixels[rows], scene[rows], *(drawn[name][rows] for name in taken))
    return stamped


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.1,
    mode: str = "all_to_one",
    alpha: float = 0.4,
    ghost_rate: float = 0.49,
    pool: str = "",
) -> Attack:
    """Refool with weight `alpha` of the image itself (linear light, 0..1), a share `ghost_rate` of double reflections.

    The others are out of focus. `pool` is a folder of pictures to reflect; "" takes the drawn ones. Training and test
    images reflect the same pool. Blend, constants and dirty labels are BackdoorBench's; the paper's clean-label loop over
    candidate pictures does not reach a usable targeted success there.
    """
    if not 0 < alpha < 1 or not 0 <= ghost_rate <= 1:
        raise UserError(f"Refool needs alpha within (0, 1) and ghost_rate within 0..1, got {alpha} and {ghost_rate}")
    aim, trigger = aim_at(mode, target_label, num_classes), partial(stamp, alpha=alpha, ghost_rate=ghost_rate, pool=pool)
    # Numbers of training and test images overlap, their reflections must not.
    in_training = partial(trigger, key=keys.stream(key, "training"))
    poison = partial(dirty_label, key, stamp=in_training, aim=aim, poison_ratio=poison_ratio)
    return Attack("refool", partial(trigger, key=key), poison, aim)

"""BadNets (Gu et al., 2017): a small opaque patch in the bottom-right corner, dirty label."""

from functools import partial

import jax
import numpy as np

from bibau_jax.attacks.protocol import Attack, aim_at, check_pixels, dirty_label, numbers_of
from bibau_jax.errors import UserError

VARIANTS = ("square", "grid")


def pattern(variant: str, size: int, channels: int = 3) -> np.ndarray:
    """The patch, uint8 [size, size, channels]: an all-white "square", or a checkerboard "grid" of white and black.

    The grid is white where row + column is even, as in BackdoorBench (whose black is 1, since its 0 is transparent).
    """
    if variant not in VARIANTS:
        raise UserError(f'BadNets variant "{variant}" is unknown; choose one of {", ".join(VARIANTS)}')
    rows, columns = np.indices((size, size))
    white = np.ones((size, size), bool) if variant == "square" else (rows + columns) % 2 == 0
    return np.repeat(np.where(white, 255, 0).astype(np.uint8)[..., None], channels, axis=2)


def stamp(pixels: np.ndarray, index: np.ndarray, *, variant: str, size: int) -> np.ndarray:
    """Sets the last `size` rows and columns of every image to the patch; uint8 [N, H, W, C] in and out."""
    check_pixels(pixels)
    if not 1 <= size <= min(pixels.shape[1:3]):
        raise UserError(f"a patch of {size} pixels does not fit into images of {pixels.shape[1]}x{pixels.shape[2]}")
    patch, inside = np.zeros(pixels.shape[1:], np.uint8), np.zeros((*pixels.shape[1:3], 1), bool)
    patch[-size:, -size:], inside[-size:, -size:] = pattern(variant, size, pixels.shape[3]), True
    return numbers_of(pixels).where(inside, patch, pixels)


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.1,
    mode: str = "all_to_one",
    variant: str = "square",
    size: int = 3,
) -> Attack:
    """BadNets with a `size`-pixel patch; the paper's settings are the defaults (target 0, 10 % of the training set)."""
    aim, trigger = aim_at(mode, target_label, num_classes), partial(stamp, variant=variant, size=size)
    pattern(variant, size)
    poison = partial(dirty_label, key, stamp=trigger, aim=aim, poison_ratio=poison_ratio)
    return Attack("badnets", trigger, poison, aim)

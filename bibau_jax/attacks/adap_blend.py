"""Adap-Blend (Qi et al., 2023): Blended with few poisons, pieces of the picture missing in training, and cover samples.

Poisoned and cover images show half of the picture's pieces, other ones each; covers keep their true labels. At test the
whole picture is shown. What tells poisoned from clean features is thereby weak, and separability-based detectors miss it.
"""

from functools import partial

import jax
import numpy as np

from bibau_jax.attacks import blended
from bibau_jax.attacks.protocol import Attack, aim_at, check_pixels, dirty_label, draws, in_blocks
from bibau_jax.errors import UserError

GRID = 4  # pieces along each side


def shown(key: jax.Array, index: np.ndarray, pieces: int) -> np.ndarray:
    """Which pieces of the picture each image shows: bool [N, GRID, GRID] with `pieces` of them, uniformly chosen."""
    chance = draws(key, index, pieces=(GRID * GRID,))["pieces"]
    return (chance.argsort(1).argsort(1) < pieces).reshape(-1, GRID, GRID)


def stamp(pixels: np.ndarray, index: np.ndarray, *, alpha: float, variant: str, key=None, pieces: int = GRID**2) -> np.ndarray:
    """x + alpha M (picture - x), rounded; M is 1 on `pieces` pieces, of 16, drawn for each index; uint8 [N, H, W, C]."""
    check_pixels(pixels)
    trigger = blended.picture(variant, *pixels.shape[1:]).astype(np.float32)
    shows = shown(key, index, pieces) if pieces < GRID**2 else np.ones((len(pixels), GRID, GRID), bool)
    rows, columns = (np.arange(size) * GRID // size for size in pixels.shape[1:3])

    def mix(block, shows):
        weight = np.float32(alpha) * shows[:, rows[:, None], columns, None]
        return (blended.mixed(block, trigger, weight) + 0.5).astype(np.uint8)

    return in_blocks(mix, pixels, shows)


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.003,
    mode: str = "all_to_one",
    covers_per_poison: float = 1.0,
    alpha: float = 0.2,
    test_alpha: float = 0.2,
    pieces: int = 8,
    variant: str = "cartoon",
) -> Attack:
    """Adap-Blend with weight `alpha` of the picture in training, on `pieces` of 16, and `test_alpha` on all of it at test.

    `poison_ratio` counts over the whole training set, and there are `covers_per_poison` covers for each; images of any class.
    The defaults are the authors' for CIFAR-10 (150 + 150 images).
    """
    if not 0 < alpha <= 1 or not 0 < test_alpha <= 1 or not 1 <= pieces <= GRID**2:
        raise UserError(
            f"Adap-Blend needs alpha and test_alpha within (0, 1] and pieces within 1..16, got {alpha}, {test_alpha}, {pieces}"
        )
    blended.check(variant)
    aim = aim_at(mode, target_label, num_classes)
    weak = partial(stamp, alpha=alpha, variant=variant, key=key, pieces=pieces)
    poison = partial(dirty_label, key, stamp=weak, aim=aim, poison_ratio=poison_ratio, covers_per_poison=covers_per_poison)
    return Attack("adap_blend", partial(stamp, alpha=test_alpha, variant=variant), poison, aim)

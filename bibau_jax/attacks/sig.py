"""SIG (Barni et al., 2019): a faint sinusoid over the whole image, on images of the target class alone; no label changes."""

from functools import partial

import jax
import numpy as np

from bibau_jax.attacks.protocol import (
    Attack,
    aim_of_clean_label,
    check_pixels,
    clean_label,
    in_blocks,
    numbers_of,
    of_the_target,
)
from bibau_jax.errors import UserError


def signal(width: int, delta: float, frequency: float) -> np.ndarray:
    """delta sin(2 pi j frequency / width) for the columns j, float64 [width], in grey levels: vertical stripes."""
    return delta * np.sin(2 * np.pi * np.arange(width) * frequency / width)


def stamp(pixels: np.ndarray, index: np.ndarray, *, delta: float, frequency: float) -> np.ndarray:
    """Adds the stripes to every row and channel, clipped and rounded down; uint8 [N, H, W, C] in and out."""
    check_pixels(pixels)
    stripes = signal(pixels.shape[2], delta, frequency).astype(np.float32)
    return in_blocks(lambda block: numbers_of(block).clip(block + stripes[:, None], 0, 255).astype(np.uint8), pixels)


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.05,
    mode: str = "all_to_one",
    delta: float = 40.0,
    frequency: float = 6.0,
    class_share: float = 0.0,
) -> Attack:
    """SIG with stripes of height `delta` (0..255) and `frequency` periods across the image, the same in training and at test.

    The ratio counts over the whole training set, as in BackdoorBench: on CIFAR-10, 0.05 is half of the target class, and
    leaves its accuracy; 0.1 is all of it, after which clean images of the class are lost. `class_share` counts over the target
    class instead, whatever its size: 0.9 is the paper's. UserError for a ratio that asks for more images than the class has.
    """
    if not 0 < delta <= 255 or frequency <= 0:
        raise UserError(f"SIG needs delta within (0, 255] and a positive frequency, got {delta} and {frequency}")
    aim, trigger = aim_of_clean_label("SIG", mode, target_label, num_classes), partial(stamp, delta=delta, frequency=frequency)
    poison = partial(clean_label, key, stamp=trigger, aim=aim, poison_ratio=poison_ratio, class_share=class_share)
    return Attack("sig", trigger, poison, aim, may_poison=of_the_target(aim))

"""Adap-Patch (Qi et al., 2023): four faint patches in training, one an image, with cover samples; opaque ones at test.

The authors' patches are small pictures that cannot be shipped; ours have their places, sizes, opacities and colours, and
mosaics drawn from a fixed seed as their content. They are laid out on 32 pixels; larger images scale them up.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import numpy as np

from bibau_jax import keys
from bibau_jax.attacks import blended
from bibau_jax.attacks.protocol import (
    Attack,
    PoisonedSplit,
    aim_at,
    check_pixels,
    in_blocks,
    numbers_of,
    poisoned_split,
    poisons_and_covers,
)
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError

# 1 is white, one 3x3 mark a corner: top left, top right, bottom left, bottom right.
MARKS = (("101", "010", "100"), ("101", "010", "001"), ("100", "010", "101"), ("001", "010", "101"))
OPACITIES = {"phoenix": 0.5, "firefox": 0.2, "corners": 0.5, "square": 0.3}  # in training
SHOWN = {"phoenix": ("phoenix_pair", "corners"), "firefox": ("firefox", "square")}  # together, at test


class Patch(NamedTuple):
    """Content float32 [H, W, 3] in 0..255 and where it lies, bool [H, W]."""

    content: np.ndarray
    mask: np.ndarray


def _mosaic(seed: int, size: int, mean, std) -> np.ndarray:
    """Random tiles [size, size, 3] with these channel means and standard deviations, as far as 0..255 allows."""
    tiles = np.random.default_rng(seed).standard_normal((size, size, 3))
    tiles = (tiles - tiles.mean((0, 1))) / tiles.std((0, 1))
    return np.clip(tiles * np.array(std) + np.array(mean), 0, 255)


def _drawn() -> dict[str, tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
    """Content [h, w, 3], mask [h, w] and place of every piece at 32 pixels; negative places count from the far edge."""
    phoenix = _mosaic(0, 5, (180, 204, 244), (40, 28, 8))
    rows, columns = np.indices((13, 13)) - 6
    disc = rows**2 + columns**2 <= 45
    flame = np.where((rows + columns > 0)[..., None], (235, 130, 40), (125, 92, 142)) + _mosaic(1, 13, (0, 0, 0), (18, 18, 18))
    full = np.ones((8, 8), bool)
    pieces = {
        "phoenix": (phoenix, full[:5, :5], (-5, -5)),
        "phoenix_left": (phoenix[:, ::-1], full[:5, :5], (-5, 0)),
        "firefox": (np.clip(flame, 1, 255), disc, (1, -14)),
        "square": (_mosaic(2, 8, (125, 125, 132), (87, 54, 46)), full, (-11, -11)),
    }
    for corner, mark in enumerate(MARKS):
        white = np.array([[int(bit) for bit in line] for line in mark]) * 255.0
        place = (-3 if corner >= 2 else 0, -3 if corner % 2 else 0)
        pieces[f"mark{corner}"] = (np.repeat(white[..., None], 3, axis=2), full[:3, :3], place)
    return pieces


PARTS = {"phoenix_pair": ("phoenix", "phoenix_left"), "corners": ("mark0", "mark1", "mark2", "mark3")}


@cache
def patch(name: str, height: int, width: int) -> Patch:
    """The patch "phoenix", "phoenix_pair", "firefox", "corners" or "square" on an image of this size."""
    scale = max(1, min(height, width) // 32)
    content, mask = np.zeros((height, width, 3), np.float32), np.zeros((height, width), bool)
    drawn = _drawn()
    for part in PARTS.get(name, (name,)):
        tile, cover, place = drawn[part]
        tile, cover = (values.repeat(scale, 0).repeat(scale, 1) for values in (tile, cover))
        top, left = (scale * at if at >= 0 else size + scale * at for at, size in zip(place, (height, width), strict=True))
        window = np.s_[top : top + len(cover), left : left + len(cover)]
        content[window][cover], mask[window] = tile[cover], mask[window] | cover
    return Patch(content, mask)


def _laid(pixels: np.ndarray, name: str, opacity: float) -> np.ndarray:
    content, mask = patch(name, *pixels.shape[1:3])
    if pixels.shape[3] != 3:
        content = np.repeat(content.mean(-1, keepdims=True), pixels.shape[3], axis=-1)

    def lay(block):
        laid = (blended.mixed(block, content, opacity) + np.float32(0.5)).astype(np.uint8)
        return numbers_of(block).where(mask[..., None], laid, block)

    return in_blocks(lay, pixels)


def faint(pixels: np.ndarray, index: np.ndarray, *, which: np.ndarray, opacity: float = 1.0) -> np.ndarray:
    """The training trigger: on image i the patch number `which[i]`, at `opacity` times its OPACITIES; uint8 [N, H, W, C]."""
    check_pixels(pixels)
    stamped = pixels.copy()
    for number, (name, usual) in enumerate(OPACITIES.items()):
        stamped[which == number] = _laid(pixels[which == number], name, opacity * usual)
    return stamped


def stamp(pixels: np.ndarray, index: np.ndarray, *, variant: str) -> np.ndarray:
    """The test trigger: two patches of SHOWN, opaque, one after the other; uint8 [N, H, W, C] in and out."""
    check_pixels(pixels)
    for name in SHOWN[variant]:
        pixels = _laid(pixels, name, 1.0)
    return pixels


def poison(
    key: jax.Array, split: ImageSet, aim: Callable, poison_ratio: float, covers_per_poison: float, opacity: float
) -> PoisonedSplit:
    """Poisons and covers, each in four equal parts with a patch of their own, drawn anew so that no patch means a class."""
    poisons, covers = poisons_and_covers(key, len(split), poison_ratio, covers_per_poison)
    stamped = {}
    for name, positions in (("poisoned", poisons), ("cover", covers)):
        numbers = np.arange(len(positions)) * len(OPACITIES) // max(1, len(positions))
        which = np.asarray(jax.random.permutation(keys.stream(key, f"patch of {name}"), numbers))
        stamped[name] = (positions, partial(faint, which=which, opacity=opacity))
    labels = split.labels.copy()
    labels[poisons] = aim(split.labels[poisons])
    return poisoned_split(split, stamped, labels)


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.003,
    mode: str = "all_to_one",
    covers_per_poison: float = 2.0,
    opacity: float = 1.0,
    variant: str = "phoenix",
) -> Attack:
    """Adap-Patch; at test "phoenix" shows that patch in both bottom corners and the corner marks (the authors' for CIFAR-10).

    "firefox" shows the disc and the square (theirs for GTSRB, at ratio 0.005). The ratio counts over the whole training
    set, and there are `covers_per_poison` covers for each; the defaults are the authors' for CIFAR-10 (150 + 300 images).
    `opacity` multiplies those of the faint patches in training, and may make none of them more than opaque.
    """
    if variant not in SHOWN:
        raise UserError(f'Adap-Patch variant "{variant}" is unknown; choose one of {", ".join(SHOWN)}')
    if not 0 < opacity * max(OPACITIES.values()) <= 1:
        raise UserError(f"Adap-Patch needs an opacity in (0, {1 / max(OPACITIES.values()):g}], got {opacity}")
    aim = aim_at(mode, target_label, num_classes)
    poisoning = partial(poison, key, aim=aim, poison_ratio=poison_ratio, covers_per_poison=covers_per_poison, opacity=opacity)
    return Attack("adap_patch", partial(stamp, variant=variant), poisoning, aim)

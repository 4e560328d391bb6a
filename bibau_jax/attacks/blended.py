"""Blended (Chen et al., 2017): a whole picture mixed into the image, dirty label. The picture is drawn here, from a seed.

The usual trigger is a cartoon that cannot be shipped. "cartoon" draws a picture with its statistics (white ground,
dark outlines, saturated areas); "noise" is the paper's random pattern. Both are drawn at 64x64 and reduced, so that
all sizes share them.
"""

from functools import cache, partial

import jax
import numpy as np
from PIL import Image, ImageDraw

from bibau_jax.attacks.protocol import Attack, aim_at, check_pixels, dirty_label, in_blocks, numbers_of
from bibau_jax.errors import UserError

VARIANTS = ("cartoon", "noise")
DRAWN_AT = 64


def _cartoon() -> Image.Image:
    big = 8 * DRAWN_AT  # drawn large, so that reducing it smooths the outlines
    picture = Image.new("RGB", (big, big), (255, 255, 255))
    draw, unit, ink = ImageDraw.Draw(picture), big / 32, (40, 30, 36)

    def oval(x, y, w, h, fill, width=1.0):
        box = [(x - w) * unit, (y - h) * unit, (x + w) * unit, (y + h) * unit]
        draw.ellipse(box, fill=fill, outline=ink, width=int(width * unit))

    oval(10, 7.5, 5, 5.5, (240, 128, 150))
    oval(22, 7.5, 5, 5.5, (240, 128, 150))
    oval(16, 26, 9.5, 8, (92, 158, 222))
    oval(16, 14, 11.5, 9.5, (250, 224, 196))
    for x in (11.5, 20.5):
        oval(x, 12.5, 2.6, 3.4, (255, 255, 255))
        oval(x + 0.5, 13.2, 1.2, 1.8, ink)
    oval(16, 17, 1.6, 1.1, (216, 60, 84))
    draw.arc([11 * unit, 13.5 * unit, 21 * unit, 21.5 * unit], 20, 160, fill=ink, width=int(unit))
    draw.rectangle([12 * unit, 24 * unit, 20 * unit, 29 * unit], fill=(250, 206, 72), outline=ink, width=int(unit))
    return picture


def check(variant: str) -> None:
    """Unknown variants raise `UserError`."""
    if variant not in VARIANTS:
        raise UserError(f'Blended variant "{variant}" is unknown; choose one of {", ".join(VARIANTS)}')


@cache
def picture(variant: str, height: int, width: int, channels: int) -> np.ndarray:
    """The trigger picture, uint8 [height, width, channels] (grey-scale for one channel)."""
    check(variant)
    if variant == "cartoon":
        drawn = _cartoon().resize((DRAWN_AT, DRAWN_AT), Image.Resampling.BOX)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (DRAWN_AT // 2, DRAWN_AT // 2, 3), np.uint8)
        drawn = Image.fromarray(noise.repeat(2, 0).repeat(2, 1))  # at 32x32 it is the noise itself, not a grey mean of it
    # A box keeps more of the noise's contrast.
    how = Image.Resampling.BILINEAR if variant == "cartoon" else Image.Resampling.BOX
    drawn = drawn.resize((width, height), how).convert("L" if channels == 1 else "RGB")
    return np.asarray(drawn, np.uint8).reshape(height, width, channels)


def mixed(pixels: np.ndarray, trigger: np.ndarray, weight) -> np.ndarray:
    """(1 - weight) x + weight trigger, float32 in 0..255; the weight is a number or an array for every image and pixel."""
    share = numbers_of(weight).asarray(weight, np.float32)
    return numbers_of(pixels).clip(pixels * (1 - share) + trigger * share, 0, 255)


def stamp(pixels: np.ndarray, index: np.ndarray, *, variant: str, alpha: float) -> np.ndarray:
    """floor((1 - alpha) x + alpha picture) on every image; uint8 [N, H, W, C] in and out."""
    check_pixels(pixels)
    trigger = picture(variant, *pixels.shape[1:]).astype(np.float32)
    return in_blocks(lambda block: mixed(block, trigger, alpha).astype(np.uint8), pixels)


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.1,
    mode: str = "all_to_one",
    variant: str = "cartoon",
    alpha: float = 0.2,
) -> Attack:
    """Blended with weight `alpha` of the picture, in training and at test (0.2, as BackdoorBench; target 0, 10 %)."""
    if not 0 < alpha <= 1:
        raise UserError(f"Blended alpha {alpha} is outside (0, 1]")
    check(variant)
    aim, trigger = aim_at(mode, target_label, num_classes), partial(stamp, variant=variant, alpha=alpha)
    poison = partial(dirty_label, key, stamp=trigger, aim=aim, poison_ratio=poison_ratio)
    return Attack("blended", trigger, poison, aim)

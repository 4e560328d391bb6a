"""A trigger of one's own: a mask and a pattern from a file, laid over every image; dirty label."""

from functools import partial
from pathlib import Path

import jax
import numpy as np

from bibau_jax import npz
from bibau_jax.attacks.protocol import Attack, aim_at, check_pixels, dirty_label, in_blocks
from bibau_jax.errors import UserError


def stamp(pixels: np.ndarray, index: np.ndarray, *, mask: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """(1 - m) x + m p, rounded: uint8 [N, H, W, C] in and out; m [H, W, 1 or C] in 0..1, p [H, W, C] in 0..255."""
    check_pixels(pixels)
    if pattern.shape != pixels.shape[1:]:
        raise UserError(f"a trigger of {list(pattern.shape)} does not fit images of {list(pixels.shape[1:])}")

    def laid_over(pixels):
        made = pixels.astype(np.float32) * (1 - mask) + mask * pattern
        return made.round().astype(np.uint8)

    return in_blocks(laid_over, pixels)


def read(path) -> tuple[np.ndarray, np.ndarray]:
    """(mask [H, W, 1 or C] in 0..1, pattern [H, W, C] in 0..255), float32, of an .npz file with "mask" and "pattern".

    Flat masks and patterns [H, W] are taken for one channel. UserError, in one line, where one is missing or out of range.
    """
    path = Path(path).expanduser()
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in ("mask", "pattern")}
    except (*npz.DAMAGES, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "an .npz file with arrays named mask and pattern is needed"
        raise UserError(f"{path} holds no trigger: {reason}") from None
    for name, most in (("mask", 1), ("pattern", 255)):
        array = arrays[name]
        if array.dtype.kind not in "biuf" or array.ndim not in (2, 3):
            raise UserError(f"{path}: {name} must be numbers [H, W] or [H, W, C], not {array.dtype} {list(array.shape)}")
        if not array.size or not (array >= 0).all() or not (array <= most).all():  # NaN is neither
            raise UserError(f"{path}: {name} must lie in 0..{most}")
        arrays[name] = (array if array.ndim == 3 else array[..., None]).astype(np.float32)
    mask, pattern = arrays["mask"], arrays["pattern"]
    if mask.shape[:2] != pattern.shape[:2] or mask.shape[2] not in (1, pattern.shape[2]):
        raise UserError(f"{path}: a mask of {list(mask.shape)} does not fit a pattern of {list(pattern.shape)}")
    if not mask.any():
        raise UserError(f"{path}: the mask is 0 everywhere")
    return mask, pattern


def of_arrays(
    key: jax.Array,
    mask: np.ndarray,
    pattern: np.ndarray,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.1,
    mode: str = "all_to_one",
) -> Attack:
    """The attack with this mask and pattern, see `stamp`."""
    trigger, aim = partial(stamp, mask=mask, pattern=pattern), aim_at(mode, target_label, num_classes)
    return Attack("patch", trigger, partial(dirty_label, key, stamp=trigger, aim=aim, poison_ratio=poison_ratio), aim)


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.1,
    mode: str = "all_to_one",
    file: str = "",
) -> Attack:
    """The attack with the mask and the pattern of `file`, see `read`."""
    if not file:
        raise UserError("which trigger? set --config.attack.patch.file to an .npz file with mask and pattern")
    options = {"num_classes": num_classes, "target_label": target_label, "poison_ratio": poison_ratio, "mode": mode}
    return of_arrays(key, *read(file), **options)

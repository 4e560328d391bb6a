"""Pictures of the user's own: a folder of them, or one subfolder a class."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
# Pillow tells of damage in several ways, by file format.
DAMAGES = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


def picture(file, height: int, width: int, channels: int, *, name=None, box=None) -> np.ndarray | None:
    """One file as uint8 [height, width, channels], squashed to that size; None if it is no picture, UserError if damaged.

    file: a path, or an open binary file that errors call `name`. box: (left, top, right, bottom) of the part to cut out first,
    in the file's own pixels; None for the whole. Bilinear, antialiased where it shrinks.
    """
    try:
        with Image.open(file) as opened:
            if box and not (0 <= box[0] < box[2] <= opened.width and 0 <= box[1] < box[3] <= opened.height):
                raise ValueError(f"the box {box} does not lie in its {opened.width}x{opened.height} pixels")
            shown = _eight_bits(opened).convert("L" if channels == 1 else "RGB")
            return _squashed(shown.crop(box) if box else shown, height, width)
    except UnidentifiedImageError:
        return None
    except DAMAGES as error:
        raise UserError(f"{name or file} cannot be read: {error}") from error


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """One uint8 image [H, W, C], C 1 or 3, squashed as pictures from files are."""
    return _squashed(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), height, width)


def _squashed(shown: Image.Image, height: int, width: int) -> np.ndarray:
    pixels = np.asarray(shown.resize((width, height), Image.Resampling.BILINEAR), np.uint8)
    return pixels.reshape(height, width, len(shown.getbands()))


def _eight_bits(opened: Image.Image) -> Image.Image:
    """Grey values of 16 bits as 8; `convert` would cut them off at 255."""
    if not opened.mode.startswith("I"):
        return opened
    return Image.fromarray((np.asarray(opened).clip(0, 65535) // 256).astype(np.uint8))


def pictures(folder: str, height: int, width: int, channels: int) -> np.ndarray:
    """The pictures that lie in a folder, uint8 [N, height, width, channels], by name; UserError where there is none."""
    place = Path(folder).expanduser()
    files = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else []
    found = [shown for path in files if (shown := picture(path, height, width, channels)) is not None]
    if not found:
        raise UserError(f"{folder} is no folder with pictures")
    return np.stack(found)


def classes(folder: str) -> dict[str, list[Path]]:
    """The classes of a folder and their files: its subfolders by name, with what lies in them at any depth.

    Files count by their ending. UserError unless there are two classes, or where one is empty.
    """
    place = Path(folder).expanduser()
    inside = sorted(place.iterdir()) if place.is_dir() else []
    found = {path.name: _files(path) for path in inside if path.is_dir() and not path.name.startswith(".")}
    if len(found) < 2:
        raise UserError(f"{folder} must hold one subfolder of pictures for each of at least two classes")
    for name, files in found.items():
        if not files:
            raise UserError(f"{Path(folder) / name} holds no picture")
    return found


def _files(place: Path) -> list[Path]:
    """Pictures at any depth; what is hidden, as macOS and notebooks leave beside them, is none."""
    found = sorted(path for path in place.rglob("*") if path.suffix.lower() in ENDINGS)
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(place).parts)]


def labelled(folder: str, height: int, width: int, channels: int) -> tuple[ImageSet, tuple[str, ...]]:
    """Every picture of `classes(folder)` with its class's number, and the classes' names."""
    images, labels, found = [], [], classes(folder)
    for label, files in enumerate(found.values()):
        shown = [picture(path, height, width, channels) for path in files]
        if any(one is None for one in shown):
            raise UserError(f"{files[[one is None for one in shown].index(True)]} is no picture")
        images += shown
        labels += [label] * len(files)
    return ImageSet(np.stack(images), np.array(labels, np.int32), np.arange(len(labels), dtype=np.int32)), tuple(found)

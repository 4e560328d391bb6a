"""Clean labelled images of the user's own: a folder with one subfolder a class, or an .npz file."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from bibau_jax import npz, parallel, progress
from bibau_jax.data import ImageSet, folder
from bibau_jax.errors import UserError, shown

CLASSES = "classes.txt"
MOST_BYTES = 8 * 2**30  # of all images: 5,000 of 700 x 700 pixels in colour
MOST_CLASSES = 100_000  # above, numbers are no classes
GREY = {"1", "L", "LA", "La", "F"}  # Pillow's modes without colour, beside those of 16 and 32 bits ("I...")


class Own(NamedTuple):
    """The images, and the names of classes 0..K-1."""

    images: ImageSet
    class_names: tuple[str, ...]


def read(path: str, *, image_size: int | None = None, channels: int | None = None) -> Own:
    """The images in a folder or an .npz file, ids in the order in which they lie there.

    Folder: one subfolder a class, with pictures at any depth. Where a file `classes.txt` lies in it, its lines are the names
    of classes 0, 1, ..., and some may have no images. Otherwise subfolders named 0..K-1 are those classes, and other names
    count in alphabetical order, as in PyTorch. Pictures are RGB unless all are grey. .npz: `images` uint8 [N, H, W, C] with C
    1 or 3, `labels` whole numbers [N] from 0 on. image_size: side in pixels that all images are squashed to; None keeps their
    common size. channels: 3 makes grey pictures RGB, 1 the reverse; None keeps what they are. An image that is there more
    than once in a class counts once, which is said. UserError where anything is missing, damaged or ambiguous.
    """
    place = Path(path).expanduser()
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be at least 1: {image_size}")
    if not place.exists():
        raise UserError(f"{path} does not exist")
    if channels not in (None, 1, 3):
        raise UserError(f"data.channels must be 3, which shows grey pictures in colour, 1 for the reverse, or 0: {channels}")
    found = _from_folder(place, image_size) if place.is_dir() else _from_file(place, image_size)
    if channels and found.images.images.shape[3] != channels:
        images = found.images
        shown_so = np.repeat(images.images, channels, 3) if channels == 3 else _grey(images.images)
        found = found._replace(images=ImageSet(shown_so, images.labels, images.ids))
    return _each_once(path, found)


def _grey(images: np.ndarray) -> np.ndarray:
    """The luminance of colour images, as pictures from files are made grey; those that are grey already keep their values."""
    return np.stack([np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in images])


def _each_once(path: str, found: Own) -> Own:
    """Without copies within a class: one could be trained on and the other held out."""
    images, first = found.images, {}
    for place, image in enumerate(images.images):
        first.setdefault((images.labels[place], image.tobytes()), place)
    if len(first) == len(images):
        return found
    many = f"{len(images) - len(first):,} of {len(images):,} images are"
    progress.say(f"data: {path}: {many} there more than once and left out", show=parallel.is_lead())
    return found._replace(images=images.take(sorted(first.values())))


def read_test(path: str, mine: Own, *, image_size: int | None = None, channels: int | None = None) -> ImageSet:
    """The images to measure models on, read as `mine` was; those that are among `mine` are left out, which is said.

    UserError where they are of another size or other classes, or all are among `mine`. One of both may number its classes.
    """
    test = read(path, image_size=image_size, channels=channels)
    if test.images.images.shape[1:] != mine.images.images.shape[1:]:
        sizes = " and ".join("x".join(map(str, own.images.images.shape[1:])) for own in (test, mine))
        raise UserError(f"{path}: its images and the clean ones differ in size ({sizes}); see --config.data.image_size")
    if not _same_classes(test.class_names, mine.class_names):
        lists = " and ".join(shown(", ".join(own.class_names)) for own in (test, mine))
        raise UserError(f"{path} is not of the clean images' classes ({lists})")
    known = {image.tobytes() for image in mine.images.images}
    new = np.array([image.tobytes() not in known for image in test.images.images])
    if not new.any():
        raise UserError(f"{path} holds no image that is not among the clean ones: nothing is measured on what is trained on")
    if not new.all():
        many = f"{np.sum(~new):,} of {len(new):,} images are"
        progress.say(f"data: {path}: {many} among the clean ones and left out", show=parallel.is_lead())
    return test.images.take(np.flatnonzero(new))


def _same_classes(test: tuple[str, ...], mine: tuple[str, ...]) -> bool:
    """Whether both are the same classes; numbers 0, 1, ... stand for any, and the last of them may have no test images."""
    numbered = [names == tuple(map(str, range(len(names)))) for names in (test, mine)]
    return test == mine or (numbered[0] and len(test) <= len(mine)) or (numbered[1] and len(test) == len(mine))


# --- a folder


def _from_folder(place: Path, image_size: int | None) -> Own:
    found = folder.classes(str(place))
    if stray := sorted(path.name for path in place.iterdir() if path.is_file() and path.suffix.lower() in folder.ENDINGS):
        raise UserError(f"{place / stray[0]} lies beside the subfolders of the classes, so its class is unknown")
    numbers, names = _numbered(place, tuple(found))
    height, width, channels = _common_shape([path for files in found.values() for path in files], image_size)
    images, _ = folder.labelled(str(place), height, width, channels)
    return Own(ImageSet(images.images, np.array(numbers, np.int32)[images.labels], images.ids), names)


def _numbered(place: Path, found: tuple[str, ...]) -> tuple[list[int], tuple[str, ...]]:
    """(the class of each subfolder, the classes' names)."""
    if (place / CLASSES).exists():
        names = _listed(place / CLASSES)
        if unknown := [name for name in found if name not in names]:
            raise UserError(f"{place / CLASSES} does not name the subfolder {unknown[0]}")
        return [names.index(name) for name in found], names
    if not all(name.isdecimal() for name in found):
        return list(range(len(found))), found
    numbers = [int(name) for name in found]
    if sorted(numbers) != list(range(len(found))):
        raise UserError(
            f"the subfolders of {place} are numbered, but not 0..{len(found) - 1}; "
            f"say which class each is by {place / CLASSES}, one name a line in the order of the classes"
        )
    return numbers, tuple(str(number) for number in range(len(found)))


def _listed(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path} names {twice[0]} twice")
    return names


def _common_shape(files: list[Path], image_size: int | None) -> tuple[int, int, int]:
    """(height, width, channels) for all pictures, from their headers alone."""
    sizes, grey = {}, True
    for path in files:
        try:
            with Image.open(path) as opened:
                sizes.setdefault(opened.size, path)
                grey = grey and (opened.mode in GREY or opened.mode.startswith("I"))
        except UnidentifiedImageError:
            raise UserError(f"{path} is no picture") from None
        except folder.DAMAGES as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    channels = 1 if grey else 3
    if image_size is not None:
        _check_room(len(files), image_size, image_size, channels)
        return image_size, image_size, channels
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        sides = f"{first} is {one[0]}x{one[1]}, {second} is {other[0]}x{other[1]}"
        raise UserError(f"images must have one size, but {sides}; --config.data.image_size resizes them")
    ((width, height),) = sizes
    _check_room(len(files), height, width, channels)
    return height, width, channels


def _check_room(count: int, *shape: int) -> None:
    """Refuses images that would fill the memory, before any is read."""
    if count * math.prod(shape) > MOST_BYTES:
        many = f"{count:,} images of {shape[0]:,} x {shape[1]:,} pixels would take {count * math.prod(shape) / 2**30:,.0f} GiB"
        raise UserError(f"{many} of memory; --config.data.image_size makes them smaller")


# --- an .npz file


def _from_file(path: Path, image_size: int | None) -> Own:
    images, labels = _arrays(path)
    if images.dtype != np.uint8:
        raise UserError(f"{path}: images must be uint8, 0..255, not {images.dtype}")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise UserError(f"{path}: images must be [N, H, W, C] with one or three channels C, not {list(images.shape)}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path}: labels must be whole numbers [{len(images)}], not {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise UserError(f"{path}: labels must count classes from 0 on, found {labels.min()}..{labels.max()}")
    if len(np.unique(labels)) < 2:
        raise UserError(f"{path} must hold images of at least two classes")
    if image_size is not None:
        _check_room(len(images), image_size, image_size, images.shape[3])
        images = np.stack([folder.resized(image, image_size, image_size) for image in images])
    names = tuple(str(number) for number in range(int(labels.max()) + 1))
    return Own(ImageSet(images, labels.astype(np.int32), np.arange(len(labels), dtype=np.int32)), names)


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with stored:
            if missing := [name for name in ("images", "labels") if name not in stored]:
                raise UserError(f"{path} holds no array {missing[0]}, only {', '.join(stored.files) or 'nothing'}")
            return stored["images"], stored["labels"]
    except UserError:
        raise
    except npz.DAMAGES as error:
        told = "" if "pickle" in str(error) else f": {' '.join(str(error).split())}"  # NumPy's advice then is a dangerous one
        raise UserError(f"{path} is no folder and cannot be read as .npz{told}") from error

"""Weights from files, safely: PyTorch's zip and legacy formats, without PyTorch and without executing anything; safetensors.

What is too large, cut off, mislabelled or hostile is refused in one line before it takes memory or time.
"""

import collections
import functools
import hashlib
import io
import math
import mmap
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from bibau_jax.errors import UserError, shown
from bibau_jax.importers import pickled
from bibau_jax.importers.pickled import Inert, Stored, View

MOST_PICKLE = 64 * 2**20  # bytes of the pickle inside a file, without the tensors
MOST_EXPANSION = 4  # times a file's size that its tensors may take
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# What training scripts call the weights inside a checkpoint, the likeliest first.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
DEEPEST = 3  # how far within a checkpoint weights are looked for
MOST_ENTRIES = 200_000  # of its dictionaries that are looked through
MOST_TENSORS = 10_000  # of a network; one of a thousand residual blocks has as many
MOST_KEY = 200  # characters of a dictionary's key that leads to weights


class Checkpoint(NamedTuple):
    """The weights of a file: arrays by PyTorch's names, in the file's order, and how they lay there.

    `container` is the key path of the state dict within the file ("" at the top), `prefix` what was taken off every name,
    `format` "zip", "legacy" or "safetensors". `others` names what lay among the tensors and is none.
    """

    arrays: dict[str, np.ndarray]
    format: str
    container: str = ""
    prefix: str = ""
    others: tuple[str, ...] = ()


def read(path, container: str | None = None) -> Checkpoint:
    """The weights of a `.pt`, `.pth`, `.tar`, `.th` or `.safetensors` file, told apart by their content, not by their names.

    `container` names the state dict within a checkpoint that holds several ("ema.state_dict"). bfloat16 comes as
    `ml_dtypes.bfloat16`. UserError, one line that names the file, where it cannot be read or must not be.
    """
    path = _regular(path)
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            return _read(file, size, container)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: it is damaged or cut off ({error})") from None
    except (OSError, EOFError, RuntimeError, NotImplementedError, ValueError, OverflowError) as error:
        told = getattr(error, "strerror", None) or f"it cannot be read ({type(error).__name__})"
        raise UserError(f"{path}: {told}") from None


def _regular(path) -> Path:
    """The path, if no other thing than a file is there; a pipe would be waited for without end."""
    place = Path(path).expanduser()
    if place.exists() and not place.is_file():
        raise UserError(f"{path}: it is {'a folder' if place.is_dir() else 'no ordinary file'}; name a file of weights")
    return place


def sha256(path) -> str:
    """The SHA-256 of a file, in hexadecimal digits; UserError where it cannot be read."""
    place = _regular(path)
    try:
        with open(place, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _read(file, size: int, container: str | None) -> Checkpoint:
    head = file.read(16)
    file.seek(0)
    if head[:4] == b"PK\x03\x04":
        tree, storage = _open_zip(file, size)
        format_ = "zip"
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _named(_safetensors(file, size), "safetensors")
    elif head[:1] == b"\x80":
        tree, storage = _open_legacy(file, size)
        format_ = "legacy"
    else:
        raise UserError(f"it is no PyTorch or safetensors file ({_looks_like(head)})")
    found, where, others = _state_dict(tree, container)
    _check_sizes(found, size)
    return _named(_loaded(found, storage), format_)._replace(container=shown(where), others=others)


def _looks_like(head: bytes) -> str:
    kinds = {
        b"\x89HDF": "HDF5, of Keras",
        b"\x93NUM": "a NumPy array",
        b"\x1f\x8b": "gzip: unpack it first",
        b"version https://": "a pointer of Git LFS: fetch the file itself, git lfs pull",
        b"<!doctype": "a web page: was the download refused?",
        b"<html": "a web page: was the download refused?",
    }
    known = next((kind for begin, kind in kinds.items() if head.lower().startswith(begin.lower())), "unknown")
    return known if head else "it is empty"


def _named(found: dict[str, np.ndarray], format_: str) -> Checkpoint:
    prefix = ""
    while more := next((p for p in PREFIXES if found and all(name.startswith(prefix + p) for name in found)), ""):
        prefix += more
    return Checkpoint({name[len(prefix) :]: array for name, array in found.items()}, format_, prefix=prefix)


def without_common_prefix(checkpoint: Checkpoint) -> Checkpoint | None:
    """The same without what all names begin with up to their first point; None where they do not begin alike."""
    begins = {name.partition(".")[0] + "." for name in checkpoint.arrays}
    if len(begins) != 1 or not all("." in name for name in checkpoint.arrays):
        return None
    (more,) = begins
    arrays = {name.removeprefix(more): array for name, array in checkpoint.arrays.items()}
    return checkpoint._replace(arrays=arrays, prefix=checkpoint.prefix + more)


def _loaded(views: dict[str, View], storage) -> dict[str, np.ndarray]:
    """The arrays that views show; `storage` gives a storage's bytes, and is asked once for each, one after the other.

    A small file may hold thousands of views into one large storage.
    """
    bytes_of = functools.lru_cache(maxsize=1)(storage)
    order = sorted(views, key=lambda name: views[name].storage.key)
    arrays = {name: _array(views[name], bytes_of(views[name].storage.key)) for name in order}
    return {name: arrays[name] for name in views}


# --- where in the file the weights are


def _state_dict(tree, container: str | None) -> tuple[dict[str, View], str, tuple[str, ...]]:
    """(names and views, key path, what is no tensor) of the state dict in a checkpoint."""
    found = _candidates(tree)
    where = _which(tree, found, container)
    views = _views(found[where])
    if len(views) > MOST_TENSORS:
        raise UserError(f"it holds {len(views):,} tensors, more than any network that is known")
    return views, where, tuple(shown(str(name)) for name in found[where] if name not in views)


def _which(tree, found: dict, container: str | None) -> str:
    """The key path of the one that is meant, or the likeliest one."""
    if container is not None:
        if container not in found:
            raise UserError(f'it has no weights under "{container}"; it has them under {_listed(found)}')
        return container
    if not found:
        if isinstance(tree, Inert):
            raise UserError(f"it holds an object ({tree.kind}) and no weights; {pickled.RESAVE}")
        raise UserError("it holds no weights: no dictionary from names to tensors")
    if "" in found:
        return ""
    for name in CONTAINERS:
        named = [where for where in found if where.rsplit(".", 1)[-1] == name]
        if len(named) == 1:
            return named[0]
    if len(found) == 1:
        return next(iter(found))
    raise UserError(f"it holds several sets of weights: {_listed(found)}; name one (--config.model.container)")


def _listed(found) -> str:
    return ", ".join(f'"{shown(where)}"' for where in list(found)[:8]) + (", ..." if len(found) > 8 else "")


def _candidates(tree) -> dict[str, dict]:
    """{key path: dictionary} of those that hold tensors by name for the most part, down to DEEPEST; each of them once."""
    found, seen, looked, waiting = {}, set(), 0, collections.deque([("", tree, 0)])
    while waiting:
        where, one, depth = waiting.popleft()
        if not isinstance(one, dict) or id(one) in seen:
            continue
        seen.add(id(one))
        looked += len(one)
        if looked > MOST_ENTRIES:
            raise UserError("it holds more entries than any checkpoint")
        if 2 * len(_views(one)) >= len(one) > 0:
            found[where] = one
        elif depth < DEEPEST:
            inner = [(key, value) for key, value in one.items() if isinstance(key, str) and len(key) <= MOST_KEY]
            waiting.extend((f"{where}.{key}" if where else key, value, depth + 1) for key, value in inner)
    return found


def _views(tree: dict) -> dict[str, View]:
    return {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, View)}


def _check_sizes(found: dict[str, View], size: int) -> None:
    """Refuses views outside their storages, and more elements than the file could hold."""
    total = 0
    for name, view in found.items():
        count = math.prod(view.shape)
        if len(view.shape) != len(view.strides):
            raise UserError(f"{shown(name)} has {len(view.shape)} sizes and {len(view.strides)} strides")
        last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True))
        if count and last >= view.storage.size:
            raise UserError(
                f"{shown(name)} of shape {list(view.shape)} reaches beyond its storage of {view.storage.size} elements"
            )
        total += count * _dtype(view).itemsize
    if total > MOST_EXPANSION * size:
        raise UserError(f"its tensors would take {total / 2**20:,.0f} MiB, the file has {size / 2**20:,.0f}")


def _dtype(view: View) -> np.dtype:
    kind = pickled.KINDS.get(view.kind or view.storage.kind)
    if kind is None:
        raise UserError(f'tensors of type "{view.kind or view.storage.kind or "unknown"}" cannot be read')
    return np.dtype(ml_dtypes.bfloat16) if kind == "bfloat16" else np.dtype(kind).newbyteorder("<")


def _array(view: View, raw) -> np.ndarray:
    """The tensor that a view shows of the bytes of its storage; a copy that owns its memory, in the machine's byte order."""
    dtype = _dtype(view)
    if len(raw) < view.storage.size * dtype.itemsize:
        raise UserError("a storage is shorter than the pickle says: the file is damaged or cut off")
    flat = np.frombuffer(raw, dtype, view.storage.size)[view.offset :]
    strides = tuple(step * dtype.itemsize for step in view.strides)
    if not math.prod(view.shape):
        return np.zeros(view.shape, dtype.newbyteorder("="))
    viewed = np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False)
    return np.array(viewed, dtype.newbyteorder("="), order="C")


# --- the formats


def _open_zip(file, size: int):
    """(the pickle's object, what gives a storage's bytes) of the zip format, since PyTorch 1.6."""
    if _has_too_many_entries(file):
        raise UserError("it holds more entries than any checkpoint")
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    pickles = [entry for entry in entries if entry.filename.rsplit("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1:
        what = "a NumPy archive" if any(entry.filename.endswith(".npy") for entry in entries) else "a zip file"
        raise UserError(f"it is {what} and no PyTorch file")
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise UserError("it is compressed in a way that PyTorch does not know")
    if sum(entry.file_size for entry in entries) > MOST_EXPANSION * size:
        raise UserError("it unpacks to many times its size")
    if any("/code/" in entry.filename for entry in entries):
        raise UserError(f"it is a TorchScript program; {pickled.RESAVE}")
    if pickles[0].file_size > MOST_PICKLE:
        raise UserError("its pickle is larger than any state dict's")
    folder = pickles[0].filename.removesuffix("data.pkl")
    names = {entry.filename: entry for entry in entries}
    order = names.get(f"{folder}byteorder")
    if order is not None and archive.read(order) != b"little":
        raise UserError("its numbers are stored big end first, which is not supported")
    tree = pickled.load(io.BytesIO(archive.read(pickles[0])))

    def storage(key: str) -> bytes:
        entry = names.get(f"{folder}data/{key}")
        if entry is None:
            raise UserError(f'storage "{shown(key, 40)}" is missing: the file is damaged or cut off')
        return archive.read(entry)

    return tree, storage


def _has_too_many_entries(file) -> bool:
    """Whether a zip's table has more than MOST_ENTRIES, told by how each begins; read as a table, they would take memory."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        place = -1
        for _ in range(MOST_ENTRIES + 1):
            place = whole.find(b"PK\x01\x02", place + 1)
            if place < 0:
                return False
    return True


def _open_legacy(file, size: int):
    """As `_open_zip`, of the format before PyTorch 1.6: five pickles, then the storages' bytes."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        data = whole[: min(size, MOST_PICKLE)]
        pickles = io.BytesIO(data)
        magic, protocol = pickled.load(pickles), pickled.load(pickles)
        if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL:
            raise UserError("it is a pickle, but none that PyTorch wrote")
        told = pickled.load(pickles)
        if not isinstance(told, dict) or told.get("little_endian") is not True:
            raise UserError("its numbers are stored big end first, which is not supported")
        sizes: dict[str, Stored] = {}
        tree, keys = pickled.load(pickles, sizes), pickled.load(pickles)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UserError("the pickle is damaged or cut off")
        place, storages = pickles.tell(), {}
        for key in keys:
            count = int.from_bytes(whole[place : place + 8], "little")
            if key not in sizes:
                raise UserError("it holds a storage that no tensor uses: it is damaged")
            if count != sizes[key].size:
                raise UserError("a storage is not as long as the pickle says: the file is damaged or cut off")
            length = count * _dtype(View(sizes[key], 0, (), ())).itemsize
            if place + 8 + length > size:
                raise UserError("it is cut off")
            storages[key] = (place + 8, length)
            place += 8 + length
    path = file.name

    def storage(key: str) -> bytes:
        if key not in storages:
            raise UserError("a storage is missing: the file is damaged or cut off")
        begin, length = storages[key]
        with open(path, "rb") as again:
            again.seek(begin)
            return again.read(length)

    return tree, storage


def _safetensors(file, size: int) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, read by its own library, which checks header, sizes and overlaps."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file.name, framework="numpy") as held:
            return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118  no mapping
    except AttributeError as error:
        raise UserError(f'tensors of type "{error.name}" cannot be read') from None
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"it is no safetensors file that can be read ({' '.join(str(error).split())[:120]})") from None

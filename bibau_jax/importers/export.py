"""Weights back into files, under the names, layouts and types that they came with: safetensors, or a PyTorch state dict.

PyTorch is not needed: a state dict is written as `torch.save` writes it since 1.6, a zip with a pickle and the tensors' bytes.
"""

import os
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from bibau_jax.errors import UserError
from bibau_jax.importers import pickled

SUFFIXES = {"safetensors": ".safetensors", "pth": ".pth"}


def write(path, arrays: dict[str, np.ndarray], *, source=None, metadata: dict[str, str] | None = None) -> None:
    """Writes the arrays by name, in the format that the suffix names (.safetensors or .pth), whole or not at all.

    `metadata` goes into the header of a safetensors file. UserError where the file exists or is the `source`, where the suffix
    is another one, where a type has no name in the format, or where the disk refuses.
    """
    path = Path(path).expanduser()
    writers = {".safetensors": _write_safetensors, ".pth": _write_torch}
    if path.suffix not in writers:
        raise UserError(f"{path}: weights are written as .safetensors or .pth")
    refuse(path, source)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[path.suffix](part, arrays, metadata or {})
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def refuse(path: Path, source=None) -> None:
    """Raises `UserError` where something is at `path` already, above all the `source` of the weights."""
    if source is not None and path.exists() and os.path.samefile(path, source):
        raise UserError(f"{path} is the file that was read; nothing is ever written over it")
    if path.exists():
        raise UserError(f"{path} exists already; nothing is overwritten")


def _write_safetensors(path: Path, arrays: dict, metadata: dict) -> None:
    from safetensors.numpy import save

    # Not ascontiguousarray, which makes vectors of single numbers. Not save_file, which shuts out other users of the machine.
    path.write_bytes(save({name: np.asarray(array, order="C") for name, array in arrays.items()}, metadata=metadata))


def _write_torch(path: Path, arrays: dict, metadata: dict) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", state_dict_pickle(arrays))
        archive.writestr("archive/byteorder", "little")
        for number, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{number}", array.astype(array.dtype.newbyteorder("<")).tobytes())
        archive.writestr("archive/version", "3\n")


def state_dict_pickle(arrays: dict[str, np.ndarray]) -> bytes:
    """The pickle of an OrderedDict from names to tensors, tensor n lying in storage "n"; protocol 2, written opcode by opcode.

    Python's own pickler would import what it names, and with it PyTorch.
    """
    items = b"".join(_text(name) + _tensor(str(number), array) for number, (name, array) in enumerate(arrays.items()))
    return b"\x80\x02" + _ordered_dict() + b"(" + items + b"u."


def _tensor(key: str, array: np.ndarray) -> bytes:
    """`_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    kinds = {np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind): name for name, kind in pickled.KINDS.items()}
    kind = kinds.get(array.dtype.newbyteorder("="))
    if kind is None:
        raise UserError(f"arrays of type {array.dtype} have no PyTorch storage")
    storage = next(name for name, of in pickled.STORAGES.items() if of == kind)
    strides = [int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim)]
    persistent = b"(" + _text("storage") + _global("torch", storage) + _text(key) + _text("cpu") + _integer(array.size) + b"tQ"
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + (persistent + _integer(0) + _integers(array.shape) + _integers(strides))
        + (b"\x89" + _ordered_dict() + b"tR")
    )


def _ordered_dict() -> bytes:
    return _global("collections", "OrderedDict") + b")R"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"

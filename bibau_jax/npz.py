"""Arrays that lie in .npz files: what NumPy raises on a damaged one, and those that this program left in a run's folder."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from bibau_jax.errors import UserError

DAMAGES = (OSError, EOFError, KeyError, MemoryError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


def left(path: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of a file that a stage left, with all of `names` among them; UserError where it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
            return {name: found[name] for name in names} | found
    except DAMAGES as error:
        told = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({told}): delete it and run its stage again") from error

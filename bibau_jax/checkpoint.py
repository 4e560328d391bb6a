"""The only file that imports orbax: finished artefacts and resumable runs, written whole or not at all, verified when read.

A directory holds `arrays/` (orbax) and `manifest.json`: the caller's info, a sha256 over the names, shapes, types and bytes of
all leaves, and the sha256 of every file. Files are compared before orbax opens them, so a damaged file never reaches
its parsers. With several processes every one calls these functions on a path that all of them see; process 0 writes, all wait.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # what orbax takes paths as; it comes with orbax
from jax.experimental import multihost_utils

from bibau_jax.errors import UserError

_STALE_SECONDS = 3600.0  # no save takes this long: what is older was left by a killed process
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def save(path, tree, info: dict) -> None:
    """Writes a finished artefact: a pytree of jax or numpy arrays and JSON-able `info`; a killed save leaves nothing at `path`.

    Leaves must be whole on this process (host arrays, or arrays replicated over a mesh); typed PRNG keys, Python numbers and
    arrays without elements are a TypeError. UserError if `path` exists, if the disk is full or read-only.
    """
    path = Path(path).absolute()
    arrays = _named(tree)
    _check(arrays)
    info = json.loads(json.dumps(info))
    empty = {name: {} for name, leaf in _named(tree, _is_empty).items() if _is_empty(leaf)}
    _by_lead(lambda: _write(path, arrays, empty, info))


def load(path, like=None):
    """Reads what `save` wrote: `(tree, info)`, the leaves as host numpy arrays; `info["sha256"]` is the digest of the leaves.

    With `like` (a pytree of arrays or ShapeDtypeStructs) the tree has its structure, and other names, shapes or types are an
    error; without it the tree is nested dicts (fields by name, sequences by "0", "1", ...). Placement is left to the caller
    (`parallel.replicate`): host arrays are right with one device and with several processes, each of which reads for itself.
    UserError, one line that names `path`, if it is missing, half-written, altered or something else; nothing there is touched.
    """
    path = Path(path).absolute()
    manifest = _read_manifest(path)
    _check_files(path, manifest["files"])
    try:
        tree = _handler(jax.process_index()).restore(epath.Path(path / "arrays"))["tree"]
        tree = jax.tree.map(np.asarray, tree)  # orbax may hand back a 0-d array as a scalar
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    if digest(_named(tree)) != manifest["sha256"]:
        raise UserError(f"{path} is damaged: its arrays are not those that were saved")
    info = {**manifest["info"], "sha256": manifest["sha256"]}
    return (tree if like is None else _fit(path, tree, like)), info


def info(path) -> dict:
    """What was saved beside a checkpoint's arrays, with their digest `sha256`, without reading them; UserError if damaged."""
    manifest = _read_manifest(Path(path))
    return {**manifest["info"], "sha256": manifest["sha256"]}


class Keeper:
    """The numbered checkpoints of one run in progress: the newest `keep` of those saved every `every_steps` steps.

    The directory belongs to one run. UserError if `every_steps` or `keep` is below 1.
    """

    def __init__(self, directory, every_steps: int, keep: int = 2):
        if min(every_steps, keep) < 1:
            raise UserError(f"every_steps and keep of the checkpoints in {directory} must be at least 1")
        self.directory, self.every_steps, self.keep = Path(directory).absolute(), every_steps, keep

    def latest(self) -> int | None:
        """The newest step saved, or None; what a killed save left behind does not count."""
        return max(self._steps(), default=None)

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after `step` steps (counted from 1)."""
        return step > 0 and step % self.every_steps == 0

    def save(self, step: int, tree, info: dict) -> None:
        """Writes the checkpoint of `step` as `save` does, then removes all but the newest `keep`."""
        save(self.directory / str(step), tree, info)
        _by_lead(lambda: [_remove(self.directory / str(old)) for old in sorted(self._steps())[: -self.keep]])

    def restore(self, like=None):
        """The newest checkpoint as `(step, tree, info)`, read as `load` does; UserError if there is none or it is damaged."""
        if (step := self.latest()) is None:
            raise UserError(f"{self.directory} holds no checkpoint")
        try:
            tree, info = load(path := self.directory / str(step))
        except UserError as error:
            resume = f"go on from step {max(older)}" if (older := set(self._steps()) - {step}) else "start over"
            raise UserError(f"{error} (remove this checkpoint to {resume})") from error
        return step, tree if like is None else _fit(path, tree, like), info

    def clear(self) -> None:
        """Removes every checkpoint and leftover of the run; other files in the directory stay."""

        def remove_all():
            for step in self._steps():
                _remove(self.directory / str(step))
            for part in self.directory.glob(".*.part-*"):
                shutil.rmtree(part, ignore_errors=True)

        _by_lead(remove_all)

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self.directory.glob("[0-9]*") if path.name.isdecimal()]


def _write(path: Path, arrays: dict, empty: dict, info: dict) -> None:
    part = _part(path)
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and is not overwritten")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        (part / "arrays").mkdir(parents=True)
        leaves = {name: np.asarray(leaf) for name, leaf in jax.device_get(arrays).items()}
        handler, place = _handler(0), epath.Path(part / "arrays")
        handler.save(place, args=ocp.args.PyTreeSave({"tree": _nested(leaves | empty)}))
        handler.finalize(place)
        _write_manifest(part, digest(leaves), info)
        os.rename(part, path)  # fails on anything but an empty directory
        _flush(path.parent)
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise UserError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _handler(process: int) -> ocp.PyTreeCheckpointHandler:
    """Orbax for one process by itself: the files are plain host arrays, so no process needs to wait for another in here."""
    several = jax.process_count() > 1
    options = ocp.options.MultiprocessingOptions(
        process, {process} if several else None, barrier_sync_key_prefix=f"process_{process}" if several else None
    )
    # Weights hardly compress (8 %), and it doubles the time of a save.
    return ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options)


def _by_lead(work) -> None:
    """Runs `work` on process 0; every process waits for it and raises what went wrong."""
    failure = None
    if jax.process_index() == 0:
        try:
            work()
        except OSError as error:
            failure = UserError(f"cannot change {error.filename}: {_reason(error)}")
        except Exception as error:
            failure = error
    if jax.process_count() > 1:
        text = np.frombuffer(str(failure or "").encode()[:2000].ljust(2000), np.uint8)
        message = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).decode(errors="replace").strip()
        failure = failure or (UserError(message) if message else None)
    if failure:
        raise failure


def _write_manifest(part: Path, digest: str, info: dict) -> None:
    files = {file.relative_to(part).as_posix(): _sha256(file.read_bytes()) for file in part.rglob("*") if file.is_file()}
    manifest = {"info": info, "sha256": digest, "files": files}
    manifest["seal"] = _seal(manifest)
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for place in [part, *part.rglob("*")]:
        _flush(place)


def _read_manifest(path: Path) -> dict:
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist")
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} was not written by this package, or not to the end: it has no manifest.json") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("seal") != _seal(manifest):
        raise UserError(f"{path} is damaged or was not written by this package: its manifest.json was altered")
    return manifest


def _seal(manifest: dict) -> str:
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return _sha256(json.dumps(body, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_files(path: Path, files: dict) -> None:
    for name, digest in files.items():
        try:
            if _sha256((path / name).read_bytes()) != digest:
                raise UserError(f"{path} is damaged: {name} was cut short or altered")
        except OSError as error:
            raise UserError(f"{path} is damaged: {name}: {_reason(error)}") from error


def digest(arrays: dict) -> str:
    """SHA-256 over names, types, shapes and bytes of arrays by name, in the order of the names."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return total.hexdigest()


def _named(tree, is_leaf=None) -> dict:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    named = {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in flat}
    if len(named) < len(flat):
        raise TypeError("two leaves of the tree have the same name once their keys are written as text")
    return named


def _nested(arrays: dict):
    if () in arrays:
        return arrays[()]
    tree = {}
    for name, leaf in arrays.items():
        branch = tree
        for key in name[:-1]:
            branch = branch.setdefault(key, {})
        branch[name[-1]] = leaf
    return tree


def _is_empty(leaf) -> bool:
    return isinstance(leaf, dict) and not leaf


def _check(arrays: dict) -> None:
    for name, leaf in arrays.items():
        where = f"leaf {'/'.join(name)}"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"{where} is a {type(leaf).__name__}, not an array")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype == object:
            raise TypeError(f"{where} has type {leaf.dtype}, which is not saved")
        if not leaf.size:
            raise TypeError(f"{where} has shape {leaf.shape}: no elements")
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise TypeError(f"{where} is split among processes; save replicated arrays")


def _fit(path: Path, tree, like):
    arrays, wanted = _named(tree), _named(like)
    for label, odd in (("lacks", wanted.keys() - arrays.keys()), ("has in excess", arrays.keys() - wanted.keys())):
        if odd:
            some = ", ".join("/".join(name) for name in sorted(odd)[:3])
            raise UserError(f"{path} holds another tree: it {label} {some}" + (" ..." if len(odd) > 3 else ""))
    for name, leaf in wanted.items():
        there, here = (f"{np.dtype(x.dtype).name}{tuple(x.shape)}" for x in (arrays[name], leaf))
        if there != here:
            raise UserError(f"{path} holds another tree: {'/'.join(name)} is {there}, not {here}")
    return jax.tree.structure(like).unflatten([arrays[name] for name in wanted])


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}")


def _remove(path: Path) -> None:
    """Removes a checkpoint so that no half of it is ever seen under its name."""
    os.rename(path, part := _part(path))
    shutil.rmtree(part)


def _remove_stale(path: Path) -> None:
    for part in path.parent.iterdir():
        if part.name.startswith(f".{path.name}.part-") and time.time() - part.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(part, ignore_errors=True)


def _flush(place: Path) -> None:
    """Brings a file or a directory to the disk itself, so that a power cut keeps what the rename promised."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """What went wrong, in one line; tensorstore hides the system's reason in the middle of its own text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for code in _DISK_ERRORS:
        if os.strerror(code) in str(error):
            return os.strerror(code)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

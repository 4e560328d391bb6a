"""What lies in a publisher's zip archive: tables, and pictures at one size."""

import contextlib
import csv
import dataclasses
import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from bibau_jax import progress
from bibau_jax.data import folder
from bibau_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Members:
    """An open archive, whose members go by the end of their paths; `advice` ends the error lines."""

    path: Path
    advice: str
    archive: zipfile.ZipFile
    names: dict[str, str]

    def wrong(self, said: str) -> UserError:
        """The error for content that is not as published."""
        return UserError(f"{self.path}: {said}; {self.advice}")

    def read(self, name: str) -> bytes:
        """A member's bytes; UserError where there is none."""
        if name not in self.names:
            raise UserError(f"{self.path} holds no {name}; {self.advice}")
        return self.archive.read(self.names[name])

    def table(self, name: str, *, delimiter: str, columns: tuple[str, ...] = ()) -> list[dict[str, str]]:
        """The rows of a table; `columns` names those of one without a heading."""
        lines = self.read(name).decode("utf-8", "replace").splitlines()
        return list(csv.DictReader(lines, columns or None, delimiter=delimiter))

    def pictures(self, names: list[str], size: int, boxes: list | None = None) -> np.ndarray:
        """These members as uint8 [N, size, size, 3], the part in its box of each; grey ones become RGB."""
        images = np.empty((len(names), size, size, 3), np.uint8)
        with progress.bar(len(names), f"reading {self.path.name}", unit="image") as bar:
            for place, name in enumerate(names):
                images[place] = self._picture(name, size, boxes and boxes[place])
                bar.advance()
        return images

    def _picture(self, name, size, box):
        content = io.BytesIO(self.read(name))
        try:
            shown = folder.picture(content, size, size, 3, name=name, box=box)
        except UserError as error:
            raise self.wrong(str(error)) from error
        if shown is None:
            raise self.wrong(f"{name} is no picture")
        return shown


@contextlib.contextmanager
def opened(path: Path, advice: str, *, depth: int = 1) -> Iterator[Members]:
    """The members of an archive by the last `depth` parts of their paths; UserError, in one line, where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if not name.endswith("/")]
            yield Members(path, advice, archive, {"/".join(PurePosixPath(name).parts[-depth:]): name for name in inside})
    except (OSError, EOFError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or no .zip archive ({error}); {advice}") from error

"""The archives that a data set is published in: found in a folder, or downloaded from the publisher and checked."""

import dataclasses
import hashlib
import http.client
import urllib.request
import uuid
from pathlib import Path

from bibau_jax import progress
from bibau_jax.errors import UserError

TIMEOUT_SECONDS = 10
ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published file; `digest` is the hexadecimal one of the publisher's own, by an `algorithm` that hashlib knows."""

    name: str
    url: str
    algorithm: str
    digest: str


def settings(archives: tuple[Archive, ...]) -> str:
    """What a user can do where an archive is missing or wrong: the end of the error lines."""
    names, place = ", ".join(archive.name for archive in archives), archives[0].url.rpartition("/")[0]
    what, lie = (archives[0].url, "it lies") if len(archives) == 1 else (f"{names} from {place}", "they lie")
    return (
        f"download {what} and set --config.data.manual_dir to the directory {lie} in, "
        "or set --config.data.data_dir to where the prepared set lies"
    )


def find(title: str, archives: tuple[Archive, ...], root: Path, *, manual_dir, download: bool) -> Path:
    """The folder in which all archives lie: `manual_dir` if that is given, else `root/downloads`.

    What is missing there is fetched from the publisher if `download` allows, and must then have its digest; archives that lie
    in a folder may have been packed anew. UserError where one is missing.
    """
    folder = Path(manual_dir).expanduser() if manual_dir else root / "downloads"
    missing = [archive for archive in archives if not (folder / archive.name).is_file()]
    if missing and manual_dir:
        raise UserError(f"no {missing[0].name} in {folder}; {settings(archives)}")
    if missing and not download:
        raise UserError(f"{title} is not in {root} and downloading is switched off; {settings(archives)}")
    for archive in missing:
        folder.mkdir(parents=True, exist_ok=True)
        _download(title, archive, folder / archive.name, settings(archives))
    return folder


def _download(title, archive, path, advice):
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    part.touch()  # a directory that cannot be written is another error than a failed download
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                received, digest = _transfer(archive, part)
                break
            except (OSError, http.client.HTTPException) as error:
                # Where nothing came at all, another attempt only keeps the user waiting.
                if attempt == ATTEMPTS or not part.stat().st_size:
                    raise UserError(f"cannot download {title} ({error}); {advice}") from error
        if digest != archive.digest:
            raise UserError(
                f"what came from {archive.url} is not the published archive "
                f"({received} bytes, {archive.algorithm} {digest}, not {archive.digest}): try again, or {advice}"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _transfer(archive, part) -> tuple[int, str]:
    digest, received, announced = hashlib.new(archive.algorithm), 0, 0
    with part.open("wb") as out, urllib.request.urlopen(archive.url, timeout=TIMEOUT_SECONDS) as response:
        total = int(response.headers.get("Content-Length") or 0)
        while block := response.read(1 << 20):
            out.write(block)
            digest.update(block)
            received += len(block)
            if total and received * 10 // total > announced:
                announced = received * 10 // total
                progress.say(f"downloading {archive.url}: {announced * 10} % of {total / 1e6:.0f} MB")
    if received < total:
        raise http.client.IncompleteRead(b"", total - received)
    return received, digest.hexdigest()

"""What a run measured, as typed records on disk; the only writer of numbers. Needs no JAX to read, so that reports start fast.

`record.json` is one `Record`, replaced as a whole; `metrics.jsonl` grows by one flat JSON object a line.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path

import bibau_jax
from bibau_jax.errors import UserError

_RATES = ("ca", "asr", "robust_accuracy")
_AMOUNT = (int, float)
# Of the further values of a measurement, those that tables and pictures read, and of what type they are.
_SHAPES = dict.fromkeys(("bec_layers", "bec_similarity", "linearity_layers"), dict)
_SHAPES |= dict.fromkeys(("r_asr_each", "path", "path_asr", "path_ca", "path_asr_recalibrated"), list)
_SHAPES |= dict.fromkeys(("r_asr", "r_ca", "q_asr", "u_asr", "s_asr", "bec"), (*_AMOUNT, str))  # str: "nan"


@dataclasses.dataclass(frozen=True)
class Rate:
    """`hits` of `count` examples, 0 <= hits <= count; a rate over no examples is a UserError."""

    hits: int
    count: int

    def __post_init__(self):
        if any(isinstance(value, bool) or not isinstance(value, int) for value in (self.hits, self.count)):
            raise UserError(f"a rate needs whole numbers, not {self.hits!r} of {self.count!r}")
        if self.count < 1:
            raise UserError("a rate over 0 examples has no value")
        if not 0 <= self.hits <= self.count:
            raise UserError(f"a rate cannot be {self.hits} of {self.count}")

    @property
    def percent(self) -> float:
        """0..100."""
        return 100 * self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval, 0..100."""
        z, n, share = 1.96, self.count, self.hits / self.count
        middle = share + z**2 / (2 * n)
        reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        low, high = ((middle + side * reach) / (1 + z**2 / n) for side in (-1, 1))
        return 100 * max(low, 0.0), 100 * min(high, 1.0)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A row of a results table: clean accuracy, attack success rate and robust accuracy after `defense`.

    The latter two are None where nobody knows the trigger, of a stranger's model.
    `defense` is the row's name ("bibau_u", "ft", "none", "clean"); `seconds` what the defence took; `extra` holds further
    JSON-able values whose names are not those of the fields.
    """

    defense: str
    ca: Rate
    asr: Rate | None
    robust_accuracy: Rate | None
    seconds: float
    extra: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if taken := {"defense", "counts", "seconds", *_RATES} & set(self.extra):
            raise UserError(f"extra value {sorted(taken)[0]!r} of {self.defense} has the name of a field")


@dataclasses.dataclass(frozen=True)
class StageCost:
    """Wall seconds and peak megabytes (10^6 bytes) of a stage; the device's peak is None where it cannot be read."""

    seconds: float
    peak_memory_mb: float
    device_peak_memory_mb: float | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything a reader needs to trust and repeat a run; `stages` and `metrics` are keyed by name."""

    config: dict
    seed: int
    command: str
    versions: dict
    device: dict
    stages: dict[str, StageCost]
    metrics: dict[str, Measurement]


def write(path, record: Record) -> None:
    """Writes `record.json` as a whole or not at all, replacing an older one; UserError if the disk refuses.

    Numbers that are not finite become the strings "nan", "inf", "-inf".
    """
    path = Path(path)
    entry = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    entry["stages"] = {name: dataclasses.asdict(cost) for name, cost in record.stages.items()}
    entry["metrics"] = {name: _measurement_entry(metric) for name, metric in record.metrics.items()}
    text = json.dumps(_plain(entry), indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise _disk_error("write", path, error) from error


def write_text(path, text: str) -> None:
    """Writes a small file whole or not at all, replacing an older one; OSError if the disk refuses."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def flat(config: dict, prefix: str = "") -> dict:
    """A nested dict as {"defense.pgd.steps": 20, ...}; sequences as lists."""
    pairs = {}
    for name, value in config.items():
        if isinstance(value, dict):
            pairs |= flat(value, f"{prefix}{name}.")
        else:
            pairs[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return pairs


# A setting that came after a run was made is taken as what was done then: as empty, 0 or off, but for these.
DONE_BEFORE = {"model.normalisation": "given", "data.held_out": 0.2, "defense.attack_form": "cross_entropy"}
DONE_BEFORE |= {"defense.pgd.block": 1, "defense.nad.drops": [2, 20]}
DONE_BEFORE |= {"defense.nc.memory": 8.0, "scan.memory": 4.0}  # there was no limit; what was run stays within these


def as_before(name: str, value, older: dict) -> bool:
    """Whether a setting that an older, flat config lacks does what was done without it, or is of a part that it lacks whole."""
    section = name.rpartition(".")[0]
    whole = bool(section) and not any(other.startswith(f"{section}.") for other in older)
    return whole or value == DONE_BEFORE.get(name) or not value


def read(path) -> Record:
    """The record at `path`, every field checked; UserError, one line that names file and field, if it is damaged."""
    try:
        entry = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise _disk_error("read", path, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a record: not valid JSON ({str(error).splitlines()[0]})") from None
    try:
        return _record(entry)
    except (UserError, OverflowError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None


@dataclasses.dataclass(frozen=True)
class Study:
    """What a measurement outside a run found: its settings, nested dicts and lists of `found` numbers, and how to repeat it."""

    kind: str
    command: str
    versions: dict
    device: dict
    settings: dict
    found: dict


def write_study(path, kind: str, command: str, settings: dict, found: dict) -> Study:
    """Writes a study with this machine's versions and device as a whole or not at all; returns it as `read_study` would."""
    path, entry = Path(path), _plain(dataclasses.asdict(Study(kind, command, versions(), device(), settings, found)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(entry, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise _disk_error("write", path, error) from error
    return Study(**entry)


def read_study(path) -> Study:
    """The study at `path`; UserError, one line that names the file, where it is missing or damaged."""
    try:
        return Study(**json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise _disk_error("read", path, error) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a study's record: {str(error).splitlines()[0]}") from None


def append(path, **scalars) -> None:
    """Adds one line to a JSON-lines file and flushes it; values are numbers, strings, booleans or None.

    Numbers that are not finite become the strings "nan", "inf", "-inf", which `float` reads back. The torn last line of a
    killed run is cut off first. TypeError for nested values; UserError if the disk refuses.
    """
    flat = {name: _plain(value) for name, value in scalars.items()}
    if nested := [name for name, value in flat.items() if isinstance(value, dict | list)]:
        raise TypeError(f"{nested[0]} is not a scalar")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            _mend_last_line(file)
            file.write(json.dumps(flat, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise _disk_error("write", path, error) from error


def read_lines(path) -> list[dict]:
    """The lines of a JSON-lines file; a torn last line is left out, a damaged one elsewhere is a UserError naming it."""
    try:
        *lines, last = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise _disk_error("read", path, error) from error
    found = [_line(line) for line in lines]
    if None in found:
        raise UserError(f"{path}, line {found.index(None) + 1} is damaged: not a JSON object")
    return found + [entry for entry in [_line(last)] if entry is not None]


class Scalars:
    """A sink of training scalars: always JSON lines at `path`; with `tensorboard` also event files beside them.

    Writes nothing unless `lead`. UserError if tensorboardX is asked for and not installed.
    """

    def __init__(self, path, tensorboard: bool = False, lead: bool = True):
        self._path, self._lead, self._board = Path(path), lead, None
        if tensorboard and lead:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError("tensorboard=True needs tensorboardX: pip install tensorboardX") from None
            self._board = SummaryWriter(str(self._path.parent / "tensorboard"))

    def write(self, *, step: int, stage: str, **scalars) -> None:
        """Adds one line; on the board the scalars are called `stage/name`. Errors as in `append`."""
        if not self._lead:
            return
        append(self._path, step=step, stage=stage, **scalars)
        if self._board is not None:
            for name, value in scalars.items():
                if not isinstance(value, str | None):
                    self._board.add_scalar(f"{stage}/{name}", float(value), int(step))
            self._board.flush()

    def close(self) -> None:
        """Ends the event file, if there is one."""
        if self._board is not None:
            self._board.close()


def versions() -> dict[str, str]:
    """The versions a result depends on, by package; Python's too."""
    found = {"python": platform.python_version(), "bibau_jax": bibau_jax.__version__}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        found[package.removesuffix("-checkpoint")] = importlib.metadata.version(package)
    return found


def device() -> dict:
    """The devices of the run and the host's processor: platform, kind, count, processes, host_cpu, host_cores."""
    import jax

    first = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        cpu = next((value.strip() for name, _, value in lines if name.strip() == "model name"), cpu)
    found = {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}
    return found | {"processes": jax.process_count(), "host_cpu": cpu, "host_cores": os.cpu_count()}


def _measurement_entry(metric: Measurement) -> dict:
    rates = {name: getattr(metric, name) for name in _RATES}
    entry = {"defense": metric.defense, **{name: rate and rate.percent for name, rate in rates.items()}}
    entry["counts"] = {name: rate and [rate.hits, rate.count] for name, rate in rates.items()}
    return {**entry, "seconds": metric.seconds, **metric.extra}


def _record(entry) -> Record:
    kinds = dict.fromkeys(("config", "versions", "device", "stages", "metrics"), dict) | {"seed": int, "command": str}
    _check(entry, kinds, "")
    _check(entry["versions"], dict.fromkeys(entry["versions"], str), "versions.")
    stages = {name: _stage(stage, f"stages.{name}.") for name, stage in entry["stages"].items()}
    metrics = {name: _measurement(metric, f"metrics.{name}.") for name, metric in entry["metrics"].items()}
    return Record(**{**entry, "stages": stages, "metrics": metrics})


def _stage(entry, where: str) -> StageCost:
    kinds = {"seconds": _AMOUNT, "peak_memory_mb": _AMOUNT, "device_peak_memory_mb": (*_AMOUNT, type(None))}
    _check(entry, kinds, where)
    return StageCost(**{name: None if value is None else float(value) for name, value in entry.items()})


def _measurement(entry, where: str) -> Measurement:
    maybe = type(None)
    kinds = {"defense": str, "counts": dict, "seconds": _AMOUNT}
    kinds |= {"ca": _AMOUNT, "asr": (*_AMOUNT, maybe), "robust_accuracy": (*_AMOUNT, maybe)}
    _check(entry, kinds, where, others=True)
    _check(entry["counts"], {"ca": list, "asr": (list, maybe), "robust_accuracy": (list, maybe)}, f"{where}counts.")
    rates = {name: _rate(entry["counts"][name], entry[name], where + name) for name in _RATES}
    extra = {name: value for name, value in entry.items() if name not in kinds}
    for name in _SHAPES.keys() & extra.keys():
        _check_further(extra[name], _SHAPES[name], where + name)
    return Measurement(entry["defense"], **rates, seconds=float(entry["seconds"]), extra=extra)


def _check_further(value, kind, where: str) -> None:
    """Refuses a further value of another type, and one that holds anything but numbers, or "nan" for one."""
    wrong = isinstance(value, bool) or not isinstance(value, kind)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    flat = [one for part in inner for one in (part if isinstance(part, list) else [part])]
    if wrong or not all(_is_number(one) or isinstance(one, str) and one in ODD for one in flat):
        raise UserError(f"{where} is {str(value)[:40]!r}, which is not of the right type")


def _is_number(value) -> bool:
    return isinstance(value, _AMOUNT) and not isinstance(value, bool) and math.isfinite(value)


def _rate(counts: list | None, percent: float | None, where: str) -> Rate | None:
    if counts is None and percent is None:
        return None
    if counts is None or percent is None:
        raise UserError(f"{where} is {percent}, but its counts are {counts}")
    try:
        hits, count = counts
        rate = Rate(hits, count)
    except ValueError as error:  # also a list that is not of two
        raise UserError(f"{where}: counts {counts}: {error}") from None
    if abs(percent - rate.percent) > 1e-6:
        raise UserError(f"{where} is {percent}, but its counts {counts} give {rate.percent:.6g}")
    return rate


def _check(entry, kinds: dict, where: str, others: bool = False) -> None:
    """Refuses an entry that lacks a name of `kinds`, holds another type there, a bad amount, or (without `others`) more."""
    if not isinstance(entry, dict):
        raise UserError(f"{where.rstrip('.') or 'the whole'} is not a JSON object")
    for name, kind in kinds.items():
        if name not in entry:
            raise UserError(f"{where}{name} is missing")
        value = entry[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise UserError(f"{where}{name} is {str(value)[:40]!r}, which is not of the right type")
        if isinstance(value, int | float) and kind is not int and not 0 <= value < math.inf:
            raise UserError(f"{where}{name} is {value}, not a number from 0 up")
    if odd := sorted(entry.keys() - kinds.keys()) if not others else []:
        raise UserError(f"{where}{odd[0]} is not a known field")


ODD = ("nan", "inf", "-inf")  # numbers that JSON has no name for, as they are written


def _plain(value):
    """The value as JSON knows it; arrays of one element become numbers."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _line(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _mend_last_line(file) -> None:
    """Ends the last line: as it stands if it is whole, by cutting it off if a killed process tore it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if size and file.read(1) != b"\n":
        file.seek(0)
        data = file.read()
        last = data[data.rfind(b"\n") + 1 :]
        file.truncate(size - len(last) * (_line(last) is None))
        if _line(last) is not None:
            file.write(b"\n")


def _disk_error(verb: str, path, error: OSError) -> UserError:
    return UserError(f"cannot {verb} {path}: {error.strerror or error}")

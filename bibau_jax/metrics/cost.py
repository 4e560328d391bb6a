"""What a stage costs: wall seconds, peak memory of the process, peak memory of the devices."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator


@dataclasses.dataclass
class Cost:
    """Seconds and megabytes (10^6 bytes) of a stage; filled in when its block ends.

    `device_peak_memory_mb` is None where the device does not tell (CPU).
    """

    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    device_peak_memory_mb: float | None = None


_open: list[Cost] = []


@contextlib.contextmanager
def measure() -> Iterator[Cost]:
    """Measures its block, also when it ends in an error; blocks may be nested.

    Wait for the results inside the block (`jax.block_until_ready`): JAX returns before it has computed. Process memory is the
    highest resident size during the block on Linux, and since the process began elsewhere. Device memory is the highest of
    the local devices since the process began, because no backend can reset its counter: an upper bound for a later stage.
    """
    _note_peak()
    _reset_peak()
    cost = Cost()
    _open.append(cost)
    begin = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - begin
        _note_peak()
        _open.remove(cost)
        cost.device_peak_memory_mb = _device_peak_mb()


def _note_peak() -> None:
    """Credits every open block with the peak so far, before an inner block resets the system's counter."""
    peak = _peak_mb()
    for cost in _open:
        cost.peak_memory_mb = max(cost.peak_memory_mb, peak)


def _reset_peak() -> None:
    # Not Linux, or a sandbox that forbids it: the peak is then that of the whole process so far.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_mb() -> float:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _device_peak_mb() -> float | None:
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    return max(peaks) / 1e6 if peaks else None

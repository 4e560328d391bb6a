"""Minutes that every notebook takes from top to bottom, asked for in at most five on two cores.

python benchmarks/notebooks.py [--json] [--only 03_theory]

Each notebook's twin runs once, in a process of its own without pictures on a screen and without programs compiled before.
`seconds` is by the clock, `processor_seconds` what all cores worked: on a busy machine the clock tells less.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed import machine

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {twin.stem: twin for twin in sorted((ROOT / "colab").glob("*.py"))}


def measure(twin: Path) -> dict[str, float]:
    """One run from top to bottom; a notebook that fails ends the program with its last words."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"MPLBACKEND": "Agg", "TMPDIR": folder, "JAX_COMPILATION_CACHE_DIR": folder}
        worked, start = _worked(), time.perf_counter()
        done = subprocess.run([sys.executable, twin], cwd=ROOT, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{twin.name}: {done.stderr[-2000:]}")
    return {"seconds": round(seconds, 1), "processor_seconds": round(_worked() - worked, 1)}


def _worked() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--only", nargs="+", choices=NOTEBOOKS, default=list(NOTEBOOKS))
    args = parser.parse_args()
    found = {}
    for name in args.only:
        found[name] = measure(NOTEBOOKS[name])
        if not args.json:
            seconds, worked = found[name].values()
            print(f"{name:16} {seconds:7.1f} s, {worked:7.1f} s of processor time", flush=True)
    if args.json:
        print(json.dumps({"notebooks": found, "machine": machine()}))


if __name__ == "__main__":
    main()

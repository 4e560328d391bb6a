"""How fast the package is on this machine, side by side with its PyTorch twin and with itself.

python benchmarks/speed.py --json      # one line of JSON: ratios, rates, machine, settings
python benchmarks/speed.py             # the same as a table
python benchmarks/speed.py --check     # instead: do both sides compute the same numbers?

Both sides get the same network, images, steps and threads, and take turns (ours, twin, twin channels-last, ours ...), so that
a busy machine slows them alike; every figure is the median of several rounds, and no compilation is in it. `best` holds the
same ratios from the fastest round of each: where they differ from the medians, the machine was busy, and the medians tell
more of how each library shares cores (PyTorch's threads wait for one another, XLA's take what there is).

  inner_ratio                  image-gradient steps/s of our E-step, all terms and both models, over the twin's (goal 1.0)
  inner_ratio_channels_last    the same against the twin in channels-last, often PyTorch's faster layout on a CPU
  inner_ratio_base_at          the same with one model: plain adversarial training, default layout; ..._channels_last beside it
  outer_ratio                  our whole outer update (crop, E-step, M-step, metrics) over the twin's (goal 0.6); likewise
  fisher_ratio                 our Fisher's seconds per image over those of a plain gradient pass of the batch (goal at most 2)

The ratios without a suffix are against PyTorch's default memory format. Without PyTorch, ours alone is measured and the
ratios against it are null. `--only inner outer` measures those alone; `fisher_ratio` needs fisher and gradient.
"""

import argparse
import json
import os
import platform
import statistics
import sys

# Both libraries read these before they start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np
import sides

from bibau_jax import parallel
from bibau_jax.method.settings import Perturbation

WORKS = ("inner", "inner_base_at", "outer", "fisher", "gradient")
ABSENT = "PyTorch is not installed: only ours was measured, ratios against the twin are null"


def works(case: sides.Case, only) -> dict:
    """What is timed, by name: "who/what"."""
    ours = sides.Ours(case)
    found = {
        "ours/inner": ours.attack,
        "ours/inner_base_at": lambda: ours.attack(sides.BASE_AT),
        "ours/outer": ours.update,
        "ours/fisher": ours.fisher,
        "ours/gradient": ours.gradient,
    }
    if sides.torch is None:
        return {name: work for name, work in found.items() if name.split("/")[1] in only}
    twins = {"twin": sides.Theirs(case), "twin_channels_last": sides.Theirs(case, sides.torch.channels_last)}
    for name, side in twins.items():
        found[f"{name}/inner"] = side.attack
        found[f"{name}/inner_base_at"] = lambda side=side: side.attack(sides.BASE_AT)
        found[f"{name}/outer"] = side.update
    found["twin/fisher"] = twins["twin"].fisher
    # One after another those who do the same work, so that they meet the same load.
    return {name: work for what in only for name, work in found.items() if name.split("/")[1] == what}


def ratios(seconds: dict[str, float]) -> dict[str, float | None]:
    """The ratios of the module's docstring, from seconds by "who/what"; null where a side is missing."""
    found = {}
    for what in ("inner", "inner_base_at", "outer"):
        for name, suffix in (("twin", ""), ("twin_channels_last", "_channels_last")):
            key = f"{what.split('_')[0]}_ratio{what.removeprefix('inner').removeprefix('outer')}{suffix}"
            found[key] = _over(seconds, f"{name}/{what}", f"ours/{what}")
    return found | {"fisher_ratio": _over(seconds, "ours/fisher", "ours/gradient")}


def _over(seconds, above, below):
    return round(seconds[above] / seconds[below], 3) if above in seconds and below in seconds else None


def rates(seconds: dict[str, float], batch: int, steps: int) -> dict[str, float]:
    """Per second by "who/what": image-gradient steps of the E-step, otherwise images."""
    return {name: round(batch * (steps if "inner" in name else 1) / value, 1) for name, value in seconds.items()}


def machine() -> dict:
    """Where this was measured: processor, cores, load, versions."""
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    if sides.torch is not None:
        versions["torch"] = sides.torch.__version__
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"processor": _processor(), "cores": cores, "load": load, **versions}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(args) -> dict:
    """The record: ratios first, then rates, spread, compile seconds, machine and settings."""
    perturbation = Perturbation(norm=args.norm, steps=args.steps)
    case = sides.make_case(args.width, args.stages, args.batch, perturbation)
    first, later = sides.alternate(works(case, args.only), args.rounds)
    seconds = {name: statistics.median(values) for name, values in later.items()}
    # What the first call took beyond a later one: tracing, lowering and XLA.
    compiling = {n: round(first[n] - seconds[n], 2) for n in first if n.startswith("ours/")}
    record = ratios(seconds) | {
        "best": ratios({name: min(values) for name, values in later.items()}),
        "rates": rates(seconds, args.batch, args.steps),
        "seconds": {name: [round(value, 4) for value in values] for name, values in later.items()},
        "compile_seconds": compiling,
        "machine": machine(),
        "settings": vars(args),
    }
    return record if sides.torch is not None else record | {"note": ABSENT}


def show(record: dict) -> None:
    """The record as a table."""
    print(f"{'work':<18}{'ours':>12}{'twin':>12}{'channels last':>16}{'compile s':>12}   per second")
    for what in record["settings"]["only"]:
        cells = (record["rates"].get(f"{who}/{what}", "-") for who in ("ours", "twin", "twin_channels_last"))
        ours, theirs, last = cells
        unit = "image-gradient steps" if "inner" in what else "images"
        print(f"{what:<18}{ours:>12}{theirs:>12}{last:>16}{record['compile_seconds'][f'ours/{what}']:>12}   {unit}")
    print()
    for name, value in record.items():
        if "_ratio" in name:
            best = record["best"][name]
            print(f"{name:<40}{'-' if value is None else value:>8}{'-' if best is None else best:>12} (fastest rounds)")
    print("\n" + ", ".join(f"{k} {v}" for k, v in (record["machine"] | record["settings"]).items()))
    if "note" in record:
        print(record["note"])


def compare(args) -> None:
    """Prints the distances of `check.differences`; ends in an error where ours strays from the judge and PyTorch does not."""
    if sides.torch is None:
        raise SystemExit("PyTorch is not installed: there is nothing to check against")
    import check

    case = sides.make_case(args.width, args.stages, min(args.batch, 4), Perturbation(steps=min(args.steps, 2)), padding=0)
    found, astray = check.differences(case), []
    print("relative differences, each the largest within its arrays: median over batches (worst batch)")
    print(f"{'':<20}{'ours-twin':>22}{'ours-float64':>22}{'twin-float64':>22}")
    for name, rows in found.items():
        middle, worst = np.median(rows, 0), rows.max(0)
        print(f"{name:<20}" + "".join(f"{f'{m:.1e} ({w:.1e})':>22}" for m, w in zip(middle, worst, strict=True)))
        if middle[1] > max(1e-5, 10 * middle[2]):
            astray.append(name)
    if astray:
        raise SystemExit(f"ours strays from float64 by more than rounding: {', '.join(astray)}")


def main() -> None:
    """Reads the flags and measures or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--check", action="store_true", help="compare the numbers of both sides instead of their speed")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 1, 1, 1], help="blocks per stage")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="PGD steps")
    parser.add_argument("--norm", choices=("l2", "linf"), default="l2")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=WORKS, help="what to measure")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of everything")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads; XLA takes every core it may run on")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # must come before XLA starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    parallel.use_cores(args.batch)  # as the command does
    if sides.torch is not None:
        sides.torch.set_num_threads(args.threads)
    if args.check:
        compare(args)
        return
    record = measure(args)
    print(json.dumps(record)) if args.json else show(record)


if __name__ == "__main__":
    main()

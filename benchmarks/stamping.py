"""Seconds to stamp 10,000 images of 32x32 with every attack's trigger, on the processor; goals: 2 s, with networks 20 s.

python benchmarks/stamping.py [--json] [--images 10000] [--only wanet iad]

The first call of each is left out (it compiles), the median of the next three is given. Attacks that train their triggers are
measured with fresh networks of their default width: the time does not depend on the weights.
"""

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from speed import machine

from bibau_jax import attacks, keys, parallel
from bibau_jax.attacks import iad, issba

SHAPE = (32, 32, 3)
FRESH = {  # what the attack would have learned
    "iad": lambda key: iad.fresh(key, SHAPE, width=32),
    "issba": lambda key: issba.fresh(key, SHAPE, bits=1, width=32) | {"secret": np.ones(1, np.float32)},
    "narcissus": lambda key: {"delta": np.full(SHAPE, 16.0, np.float32)},
}


def seconds(name: str, pixels: np.ndarray, rounds: int = 3) -> float:
    """The median time of one `stamp` of all `pixels`."""
    attack = attacks.get(name).make(keys.root(0), num_classes=10)
    if attack.control and attack.control.trains_trigger:
        attack = attack.control.finish(attack, FRESH[name](keys.root(0)))
    index, taken = np.arange(len(pixels)), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        attack.stamp(pixels, index)
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken[1:]), 3)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", choices=attacks.names(), default=attacks.names())
    args = parser.parse_args()
    parallel.use_cores()  # as the command does
    pixels = np.random.default_rng(0).integers(0, 256, (args.images, *SHAPE)).astype(np.uint8)
    found = {}
    for name in args.only:
        found[name] = seconds(name, pixels)
        if not args.json:
            print(f"{name:24} {found[name]:8.3f} s", flush=True)
    if args.json:
        print(json.dumps({"seconds": found, "images": args.images, "machine": machine()}))


if __name__ == "__main__":
    main()

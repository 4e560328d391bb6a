"""Seconds and peak memory of the empirical tangent kernel: ResNet-18 of width 16, CIFAR-10 images, all ten outputs.

python benchmarks/tangent_kernel.py --images=256 --out=results/theory/tangent_kernel.json
"""

import argparse
import resource
import shlex
import sys
import time
from pathlib import Path

import jax

from bibau_jax import data, keys, models, parallel, records
from bibau_jax.theory import ntk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    parallel.use_cores(ntk.BLOCK)
    images = data.load("cifar10").train.images[: given.images]
    classifier = models.build("resnet18", num_classes=10, image_shape=(32, 32, 3), width=given.width)
    variables = jax.device_get(classifier.init(keys.root(0)))
    wall, used = time.perf_counter(), time.process_time()
    kernel = ntk.kernel(classifier, variables, images, gigabytes=given.gigabytes, show=True)
    found = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - used,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "rows": len(kernel),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
    }
    print(found)
    if given.out:
        settings = {"images": given.images, "width": given.width, "gigabytes": given.gigabytes}
        records.write_study(given.out, "tangent_kernel", shlex.join(["python", *sys.argv]), settings, found)


if __name__ == "__main__":
    main()

"""Seconds and memory that the import of a 100 MB checkpoint takes, asked for in 5 seconds and 3 times its size.

python benchmarks/importing.py [--json] [--width 97]

A ResNet-18 of this width with random weights is written as `.safetensors` and `.pth`. A process of its own then reads each,
tells the network by its keys, makes its variables and hashes the file: all that `import` does but for trying the network on
images. Memory is how far the peak rises above the process's before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from speed import machine

READ = """
import re, sys, time
from pathlib import Path
import jax
from bibau_jax.importers import architectures, rules, torch_file
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
def bring(path):
    arrays = torch_file.read(path).arrays
    found = architectures.guess(arrays)
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    network = architectures.classifier(found, num_classes=10, image_shape=(32, 32, 3), **plain)
    made = rules.to_variables(arrays, found.table, jax.eval_shape(network.init, jax.random.key(0)))
    return made, torch_file.sha256(path)
bring(sys.argv[1])  # a small one first: what the libraries take for themselves
before, start = peak(), time.perf_counter()
bring(sys.argv[2])
print(time.perf_counter() - start, peak() - before)
"""


def written(folder: Path, name: str, width: int) -> Path:
    """A file with a ResNet-18 of this width."""
    from bibau_jax import keys, models
    from bibau_jax.importers import export, rules

    network = models.build("resnet18", num_classes=10, image_shape=(32, 32, 3), width=width, mean=(0.0,) * 3, std=(1.0,) * 3)
    path = folder / name
    export.write(path, rules.named(network.init(keys.root(0))))
    return path


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--width", type=int, default=97, help="of the network; 97 makes 100 MB")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for ending in (".safetensors", ".pth"):
            small = written(Path(folder), f"small{ending}", 4)
            large = written(Path(folder), f"large{ending}", args.width)
            line = [sys.executable, "-c", READ, small, large]
            root = Path(__file__).resolve().parents[1]
            told = subprocess.run(line, cwd=root, capture_output=True, text=True, check=True).stdout
            seconds, peak = map(float, told.split())
            size = large.stat().st_size / 2**20
            found[ending] = {
                "megabytes": round(size, 1),
                "seconds": round(seconds, 2),
                "peak_megabytes": round(peak, 1),
                "times_its_size": round(peak / size, 2),
            }
            if not args.json:
                print(f"{ending:14} {size:6.1f} MiB in {seconds:5.2f} s, {peak / size:5.2f} times its size", flush=True)
    if args.json:
        print(json.dumps({"imports": found, "machine": machine()}))


if __name__ == "__main__":
    main()

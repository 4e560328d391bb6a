"""How long BI-BAU (U) takes on a GPU, through `bibau_u.purify` itself, beside its PyTorch twin: the full ResNet-18 by default.

python benchmarks/gpu.py --out gpu.json                  # random images
python benchmarks/gpu.py --data clean.npz --out gpu.json # uint8 "images" [N, 32, 32, 3] and integer "labels" [N]
python benchmarks/gpu.py --toy                           # the same path at toy size, on a CPU, in under a minute

Seconds are those of one whole `purify` call (Fisher diagonals, every epoch, the sample images at its end) less what JAX reports
as tracing, lowering and compiling within it. FLOPs are counted analytically: two per multiply-add of the convolutions and
the head, a gradient with respect to images as one forward pass more and with respect to parameters as two, nothing for
norms and optimiser; the record has XLA's own count of a forward pass beside ours (it leaves out products with padding). The
share of the card is of the rate of a large bfloat16 matrix product, measured in the same call. The twin runs in bfloat16
autocast, channels-last, under torch.compile; its epochs are timed after a warm-up and scaled to the number of epochs.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time

# JAX would take three quarters of the card's memory for itself; the twin shares the card.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
import sides
from flops import forward_flops, matrix_rate, run_flops

from bibau_jax import keys, models, parallel, train
from bibau_jax.data import ImageSet
from bibau_jax.defenses import bibau, bibau_u
from bibau_jax.metrics import cost

TOY = {"images": 72, "epochs": 2, "steps": 2, "batch": 32, "width": 8, "stages": [1, 1]}
TOY |= {"compute": "auto", "matrix": 512, "twin_epochs": 1}


class EpochSeconds:
    """Stands where `train.Journal` wants its scalars, and keeps the seconds of every epoch."""

    def __init__(self):
        self.seconds = []

    def write(self, *, seconds: float, **_) -> None:
        """One epoch of `train.fit`."""
        self.seconds.append(seconds)


class CompileSeconds:
    """Adds up what JAX reports of tracing, lowering and compiling (autotuning is part of the last) since `reset`."""

    def __init__(self):
        self.reset()
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def reset(self) -> None:
        """Starts from 0."""
        self.parts = {"trace": 0.0, "lower": 0.0, "compile": 0.0}

    def _add(self, event: str, seconds: float, **_) -> None:
        names = {
            "jaxpr_trace_duration": "trace",
            "jaxpr_to_mlir_module_duration": "lower",
            "backend_compile_duration": "compile",
        }
        if part := names.get(event.rsplit("/", 1)[-1]):
            self.parts[part] += seconds


def clean_set(args) -> ImageSet:
    """The defender's images: the first of `--data`, or random ones."""
    if args.data:
        with np.load(args.data) as arrays:
            images, labels = arrays["images"][: args.images], arrays["labels"][: args.images]
        args.images = len(images)
    else:
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (args.images, 32, 32, 3), np.uint8)
        labels = draw.integers(0, 10, args.images)
    return ImageSet(images, labels.astype(np.int32), np.arange(len(images), dtype=np.int32))


def ours(args, classifier, variables, clean) -> dict:
    """One `bibau_u.purify`: its seconds without and with compilation, the epochs' seconds, images/s and memory."""
    epochs, compiling = EpochSeconds(), CompileSeconds()
    journal = train.Journal(scalars=epochs)
    perturbation = bibau.Perturbation(steps=args.steps)
    options = {"epochs": args.epochs, "batch_size": args.batch, "pgd": perturbation, "fisher_chunk": args.chunk}
    compiling.reset()
    with cost.measure() as spent:
        purified = bibau_u.purify(keys.root(0), classifier, variables, clean, journal=journal, **options)
        jax.block_until_ready(purified.variables)
    total = sum(compiling.parts.values())
    later = statistics.median(epochs.seconds[1:] or epochs.seconds)
    trained = args.images // args.batch * args.batch
    return {
        "seconds": round(spent.seconds - total, 3),
        "compile_seconds": round(total, 3),
        "compile_parts": {name: round(value, 3) for name, value in compiling.parts.items()},
        "wall_seconds": round(spent.seconds, 3),
        "first_epoch_seconds": epochs.seconds[0],
        "later_epoch_seconds": round(later, 4),
        "images_per_second": round(trained / later, 1),
        "device_peak_memory_mb": spent.device_peak_memory_mb,
        "loss": [round(entry["loss"], 4) for entry in purified.history],
    }


class TwinRun:
    """The twin on the same task, in pieces that are timed."""

    def __init__(self, args, classifier, variables, clean):
        torch, self.args = sides.torch, args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")  # TF32 for the Fisher, as XLA's default
        torch.backends.cudnn.benchmark = True
        variables = jax.device_get(variables)
        zeros = jax.tree.map(np.zeros_like, variables["params"])
        case = sides.Case(
            *(classifier, args.width, tuple(args.stages), variables, variables, clean.images, clean.labels),
            *({"clean": zeros, "unlearning": zeros}, bibau.Perturbation(steps=args.steps), 4),
        )
        self.side = sides.Theirs(case, torch.channels_last, self.device)
        self.plain = copy.deepcopy(self.side.net)  # torch.func does not go through compiled modules
        if self.device == "cuda":
            self.side.net.compile(dynamic=False)
            self.side.backdoored.compile(dynamic=False)

    def autocast(self):
        """bfloat16 where ours computes in it."""
        return sides.torch.autocast(self.device, sides.torch.bfloat16, enabled=self.args.compute == "bfloat16")

    def timed(self, work, *given) -> float:
        """Seconds of one call, until the device has done it."""
        begin = time.perf_counter()
        work(*given)
        if self.device == "cuda":
            sides.torch.cuda.synchronize()
        return time.perf_counter() - begin

    def batches(self, count: int):
        """That many shuffled batches of images and labels."""
        side, size = self.side, self.args.batch
        for rows in sides.torch.randperm(self.args.images, device=self.device)[: count * size].split(size):
            yield side.images[rows].contiguous(memory_format=sides.torch.channels_last), side.labels[rows]

    def epoch(self, count: int) -> None:
        """F^cl anew and `count` outer updates."""
        side, case = self.side, self.side.case
        self.plain.load_state_dict(side.net.state_dict())
        side.fishers["clean"] = sides.twin.fisher(self.plain, side.images, side.labels, self.args.chunk)
        fixed = side.net, side.backdoored, side.anchor, side.fishers, case.weights, case.perturbation, side.optimizer
        for images, labels in self.batches(count):
            with self.autocast():
                sides.twin.outer_update(images, labels, *fixed, case.padding)

    def unlearning(self, count: int) -> None:
        """F^u over `count` batches attacked from the backdoored model, with that model's own classes."""
        side, made = self.side, []
        for images, labels in self.batches(count):
            with self.autocast():
                given = images, labels, side.backdoored, side.backdoored, side.case.weights, side.case.perturbation
                attacked = sides.twin.e_step(*given)
                made.append((attacked, side.backdoored(attacked)[0].argmax(1)))
        attacked, seen = (sides.torch.cat(part) for part in zip(*made, strict=True))
        side.fishers["unlearning"] = sides.twin.fisher(self.plain, attacked, seen, self.args.chunk)


def theirs(args, classifier, variables, clean) -> dict:
    """Seconds of the twin's F^u and of its epochs after a warm-up, scaled to the whole run."""
    run, count = TwinRun(args, classifier, variables, clean), args.images // args.batch
    warm_up = run.timed(run.unlearning, 1) + run.timed(run.epoch, 2)
    once = run.timed(run.unlearning, count)
    per_epoch = statistics.median(run.timed(run.epoch, count) for _ in range(args.twin_epochs))
    cuda = run.device == "cuda"
    return {
        "seconds": round(once + args.epochs * per_epoch, 3),
        "warm_up_seconds": round(warm_up, 3),
        "later_epoch_seconds": round(per_epoch, 4),
        "images_per_second": round(count * args.batch / per_epoch, 1),
        "device_peak_memory_mb": sides.torch.cuda.max_memory_allocated() / 1e6 if cuda else None,
        "epochs_timed": args.twin_epochs,
        "torch": sides.torch.__version__,
    }


def measure(args) -> dict:
    """The whole record."""
    clean = clean_set(args)
    args.batch = min(args.batch, args.images)
    dtype = parallel.compute_dtype(args.compute)
    args.compute = jnp.dtype(dtype).name
    shape = {"num_classes": int(clean.labels.max()) + 1, "image_shape": clean.images.shape[1:]}
    classifier = models.build("resnet18", width=args.width, stages=tuple(args.stages), dtype=dtype, **shape)
    variables = classifier.init(keys.root(0))
    rate = matrix_rate(args.matrix)
    forward = forward_flops(args.width, args.stages, clean.images.shape[1], shape["num_classes"])
    lowered = jax.jit(lambda v, x: classifier.apply(v, x).logits).lower(variables, clean.images[:1])
    flops = run_flops(args, forward)
    record = {"ours": ours(args, classifier, variables, clean)}
    record["ours"]["tflops_per_second"] = sum(flops.values()) / record["ours"]["seconds"] / 1e12
    record["ours"]["share_of_matrix_rate"] = sum(flops.values()) / record["ours"]["seconds"] / rate
    if sides.torch is not None and not args.no_twin and (args.toy or sides.torch.cuda.is_available()):
        try:
            record["twin"] = theirs(args, classifier, variables, clean)
            record["ratio"] = record["twin"]["seconds"] / record["ours"]["seconds"]
        except Exception as error:  # whatever PyTorch does here, what was measured before it is kept
            record["twin"] = {"error": f"{type(error).__name__}: {error}"[:500]}
    device = {"device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "jax": jax.__version__}
    return record | {
        "matrix_tflops_per_second": rate / 1e12,
        "flops": flops | {"total": sum(flops.values())},
        "forward_flops": {"analytic": forward, "xla": (lowered.cost_analysis() or {}).get("flops")},
        "machine": device,
        "settings": vars(args),
    }


def show(record: dict) -> None:
    """The record as a table, one line a measurement."""
    sides_ = [("ours", record["ours"]), ("twin", record.get("twin", {}))]
    print(f"{'':<28}" + "".join(f"{name:>16}" for name, _ in sides_))
    rows = (
        "seconds",
        "compile_seconds",
        "warm_up_seconds",
        "later_epoch_seconds",
        "images_per_second",
        "device_peak_memory_mb",
    )
    for row in (*rows, "tflops_per_second", "share_of_matrix_rate"):
        cells = (side.get(row) for _, side in sides_)
        print(f"{row:<28}" + "".join(f"{'-' if cell is None else f'{cell:.4g}':>16}" for cell in cells))
    work, rate = record["flops"]["total"] / 1e15, record["matrix_tflops_per_second"]
    print(f"\nwork {work:.4g} PFLOP (counted analytically); matrix rate {rate:.4g} TFLOP/s")
    if "error" in record.get("twin", {}):
        print(f"the twin failed: {record['twin']['error']}")
    print(", ".join(f"{k} {v}" for k, v in (record["machine"] | record["settings"]).items()))


def main() -> None:
    """Reads the flags, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help=f"small enough for a CPU: {TOY}")
    parser.add_argument("--data", default="", help="npz with uint8 images [N, H, W, 3] and integer labels [N]")
    parser.add_argument("--out", default="", help="JSON file to write the record to")
    parser.add_argument("--images", type=int, default=2500, help="the defender's clean images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="PGD steps")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 2, 2, 2], help="blocks per stage")
    parser.add_argument("--chunk", type=int, default=32, help="per-example gradients that the Fisher holds at a time")
    parser.add_argument("--compute", choices=("auto", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--matrix", type=int, default=8192, help="size of the matrix product that the rate is taken of")
    parser.add_argument("--twin-epochs", type=int, default=3, help="epochs of the twin that are timed")
    parser.add_argument("--no-twin", action="store_true", help="leave PyTorch out")
    if "--toy" in sys.argv:
        parser.set_defaults(**TOY)
    args = parser.parse_args()
    record = measure(args)
    show(record)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()

"""The only file that names devices: the mesh, placement, per-example work over shards, several hosts.

One mesh axis, `data`. Parameters are replicated, batches sharded, and the steps are plain `jit`: the compiler inserts the
collectives, BatchNorm sees the global batch, and N devices give the numbers of one. The exception is per-example gradients:
under plain `jit` a sharded `vmap(grad)` of a convolution is silently wrong (tests/test_parallel.py keeps the trap), so they
go through `sum_over_devices`.
"""

import contextlib
import functools
import math
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bibau_jax.errors import UserError

MOST_CORES = 8  # beyond, a core's share of a usual batch is too small to be worth the collectives


def use_cores(*batch_sizes: int) -> None:
    """Makes every CPU core a device of its own, as far as the batch sizes can be shared out; before any other use of JAX.

    XLA computes many convolutions of one CPU device on one core: on two cores, two devices were 1.2 to 1.5 times faster.
    A count set by the caller (`JAX_NUM_CPU_DEVICES`, or XLA's flag) stays. GPUs and TPUs are not concerned.
    """
    if jax.config.jax_num_cpu_devices > 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = math.gcd(*batch_sizes)
    count = next(count for count in range(min(cores, MOST_CORES), 0, -1) if shared % count == 0)
    jax.config.update("jax_num_cpu_devices", count)


def keep_compiled() -> None:
    """Keeps compiled programs on disk, in JAX_COMPILATION_CACHE_DIR or ~/.cache/bibau_jax: the next run need not compile them.

    A run compiles the same few programs again for every model it trains or attacks; a grid does so for every run.
    """
    if not jax.config.jax_compilation_cache_dir:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "bibau_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def connect(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Joins several processes into one run; does nothing unless told to.

    `coordinator` is "host:port" of process 0; "auto" lets JAX find it (TPU pods, Slurm). Must come before any other use of JAX.
    """
    if not coordinator:
        return
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the processes at {coordinator}: {str(error).splitlines()[0]}") from error


def is_lead() -> bool:
    """Whether this process is the one that prints and writes records."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Holds every process until all have come to the point called `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(decision: bool) -> bool:
    """The first process's decision, on every process: what rests on clocks may differ among them."""
    if jax.process_count() == 1:
        return decision
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(decision)))


_chosen: list[int] = []  # how many devices `on_devices` allows, innermost last


@contextlib.contextmanager
def on_devices(count: int):
    """Computes on the first `count` devices only, inside a `with` block; what was compiled for others is forgotten."""
    if not 1 <= count <= jax.device_count():
        raise UserError(f"{count} devices were asked for, {jax.device_count()} are there")
    _chosen.append(count)
    jax.clear_caches()
    try:
        yield
    finally:
        _chosen.pop()
        jax.clear_caches()


def device_count() -> int:
    """How many devices share the work."""
    return _chosen[-1] if _chosen else jax.device_count()


def mesh() -> Mesh:
    """All devices of all processes (or those of `on_devices`) along one axis, `data`."""
    return _mesh(device_count())


@functools.cache
def _mesh(count: int) -> Mesh:
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def replicate(tree):
    """The tree with every leaf whole on every device; the same host value must be given on every process."""
    sharding = NamedSharding(mesh(), P())

    def place(leaf):
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        return jax.device_put(leaf, sharding)

    return jax.tree.map(place, tree)


def shard(tree):
    """Inside `jit`: the tree with the leading axis of every leaf laid along the devices."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh(), P("data")))


def gather(tree):
    """Whole host copies of arrays that may be spread over the devices of several processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    whole = jax.jit(lambda leaves: leaves, out_shardings=NamedSharding(mesh(), P()))(tree)
    return jax.device_get(whole)


def check_batch(batch_size: int, name: str) -> None:
    """Refuses a batch that the devices cannot share out evenly."""
    if batch_size % device_count():
        raise UserError(f"{name}={batch_size} cannot be divided among {device_count()} devices; choose a multiple")


def batch_of(size: int) -> int:
    """The largest batch of at most `size` that the devices can share out evenly, for trainings whose batch is not a setting.

    It is the same for 1, 2, 4 and 8 devices, so that these give the same numbers; below 8 images it may not be.
    """
    block = math.lcm(device_count(), 8)
    if size < block:
        block = device_count()
    return max(size // block, 1) * block


def padded(size: int, chunk: int = 1) -> int:
    """The smallest multiple of (devices x chunk) that holds `size` examples."""
    block = chunk * device_count()
    return -(-size // block) * block


def blocks(batch_size: int, *arrays):
    """The arrays in batches of one shape, on all devices: yields (batches, how many of their rows count).

    One shape compiles once and can be shared out; the last batch is filled up with zeros.
    """
    size = padded(min(batch_size, len(arrays[0])))
    for begin in range(0, len(arrays[0]), size):
        parts = [np.asarray(array[begin : begin + size]) for array in arrays]
        missing = size - len(parts[0])
        if missing:
            parts = [np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) for part in parts]
        yield replicate(parts), size - missing


def sum_over_devices(fn: Callable) -> Callable:
    """Turns `fn(params, examples)`, a sum over examples, into the sum over all devices' shards of them; jitted.

    The leading axis of every leaf of `examples` must be a multiple of the device count.
    """

    def local(params, examples):
        # Without the cast, gradients inside `fn` with respect to the parameters would already be summed over devices, and
        # a Fisher would hold squares of sums.
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        return jax.lax.psum(fn(params, examples), "data")

    return jax.jit(jax.shard_map(local, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P()))


def map_over_devices(fn: Callable) -> Callable:
    """Turns `fn(params, examples)`, one result an example, into the same with the examples shared out among devices; jitted.

    As in `sum_over_devices`, gradients with respect to the parameters are of a device's own examples. Products are in float32.
    """

    def local(params, examples):
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        with jax.default_matmul_precision("float32"):
            return fn(params, examples)

    return jax.jit(jax.shard_map(local, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data")))


def unroll(steps: int) -> int:
    """How many steps of a scan over gradients to lay out: two on the CPU, one on GPU and TPU.

    XLA's CPU backend is several times slower at convolution gradients inside a rolled loop, unless they are laid out as
    `models.layers.conv` lays them out; with it, unrolling buys nothing but compile time.
    """
    return min(2, max(steps, 1)) if jax.default_backend() == "cpu" else 1


def whole_epochs() -> bool:
    """Whether an epoch should be one compiled call: on GPU and TPU; the CPU gains nothing and would show no progress."""
    return jax.default_backend() != "cpu"


def compute_dtype(name: str):
    """The type that networks compute in: "auto" is bfloat16 on GPU and TPU and float32 on the CPU."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if name not in ("float32", "bfloat16"):
        raise UserError(f'compute type "{name}" is unknown; choose auto, float32 or bfloat16')
    return jnp.dtype(name)

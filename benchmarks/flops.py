"""What a run costs in operations, and how many a second the device does: what a share of the card is made of."""

import statistics

import jax
import jax.numpy as jnp
import sides

from bibau_jax import keys
from bibau_jax.models.resnet import blocks


def forward_flops(width: int, stages, side: int, classes: int = 10) -> int:
    """Operations of one image's forward pass through `models.resnet18`: two per multiply-add of convolutions and head."""
    total, inputs = 9 * 3 * width * side**2, width
    for _, features, stride in blocks(width, stages):
        side = -(-side // stride)
        shortcut = inputs if stride != 1 or inputs != features else 0
        total += (9 * inputs + 9 * features + shortcut) * features * side**2
        inputs = features
    return 2 * (total + inputs * classes)


def run_flops(args, forward: int) -> dict[str, float]:
    """Operations of a whole run by part, in forward passes of an image times `forward`."""
    trained = args.epochs * (args.images // args.batch) * args.batch  # a last short batch is dropped
    attack = 2 + 2 * 2 * args.steps  # x through both models once; x' forwards and backwards through both, every step
    passes = {
        "e_step": trained * attack,
        "m_step": trained * 2 * 3,
        "metrics": trained * 2,
        "fisher_clean": args.epochs * args.images * 3,
        "fisher_unlearning": args.images * (attack + 1 + 3),
    }
    return {name: float(count * forward) for name, count in passes.items()}


def matrix_rate(size: int) -> float:
    """Operations per second of a bfloat16 product of two random [size, size] matrices, the median of several."""
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(keys.root(0)))

    # A chain, so that one call is long against the launch; scaled, so that nothing overflows.
    @jax.jit
    def chain(a, b):
        return jax.lax.fori_loop(0, 10, lambda _, x: (x @ b) * jnp.bfloat16(size**-0.5), a)

    chain(a, b).block_until_ready()
    seconds = [sides.timed(lambda: chain(a, b).block_until_ready()) for _ in range(5)]
    return 10 * 2 * size**3 / statistics.median(seconds)

"""The empirical neural tangent kernel, explicit: inner products of the gradients of outputs (Eq. 4; Jacot et al., 2018).

The Jacobian of a network is far larger than its kernel. It is made for a span of the parameters at a time, as many columns as
fit into memory, on all devices; the spans' kernels are added up. `products` has what needs no kernel at all.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import parallel, progress
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier

BLOCK = 8  # images of one call on a device; their rows are in memory twice
MOST_PASSES = 100  # over the images: beyond, a kernel takes for ever


def kernel(
    classifier: Classifier,
    variables,
    images: np.ndarray,
    others: np.ndarray | None = None,
    *,
    readout: np.ndarray | None = None,
    chunk: int = 1,
    gigabytes: float = 8.0,
    show: bool = False,
) -> np.ndarray:
    """K = J J'^T, float64 [N R, M R], from float32 Jacobians of the logits, BatchNorm in evaluation mode.

    Row n R + r belongs to image n and output r. Every pass over the images makes the Jacobian of as many parameters as fit.

    Args:
      images: pixels 0..255 [N, H, W, C]. others: [M, H, W, C], the same ones where left out.
      readout: [classes, R], the outputs are logits @ readout; all R = classes logits where left out. `mean_logit` gives one.
      chunk: images whose Jacobians are made at a time on a device; 1 is fastest on a CPU, 16 or more on a GPU.
      gigabytes: 10^9 bytes that kernel and Jacobians may take together, half of them for Jacobians.

    UserError before anything is computed where that is too little, with what it would take; for no images, a readout of another
    shape, or a chunk below 1.
    """
    readout = np.eye(classifier.num_classes) if readout is None else np.asarray(readout)
    parts = [images] if others is None else [images, others]
    if not all(map(len, parts)) or chunk < 1:
        raise UserError(f"a tangent kernel needs images, and chunk={chunk} to be at least 1")
    if readout.ndim != 2 or len(readout) != classifier.num_classes or not readout.size:
        raise UserError(f"a readout must be [{classifier.num_classes}, R], not {list(readout.shape)}")
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])]
    rows = [len(part) * readout.shape[1] for part in (parts[0], parts[-1])]
    columns = _columns(sum(sizes), rows, others is None, gigabytes)
    ends = range(columns, sum(sizes) + columns, columns)
    given = parallel.replicate((dict(variables), np.asarray(readout, np.float32)))
    total = np.zeros(rows)
    steps = len(ends) * sum(len(_starts(part, chunk)) for part in parts)
    with progress.bar(steps, "tangent kernel", unit="block", show=show and parallel.is_lead()) as bar:
        for end in ends:
            of_span = _rows(classifier.in_float32(), end - columns, min(end, sum(sizes)), chunk, parallel.mesh())
            total += _contracted(of_span, given, parts, chunk, bar)
    return total


def mean_logit(num_classes: int) -> np.ndarray:
    """The readout [classes, 1] of the summed logits over the square root of their number: a cheap N x N kernel."""
    return np.full((num_classes, 1), num_classes**-0.5)


def _columns(parameters: int, rows: list[int], symmetric: bool, gigabytes: float) -> int:
    """How many parameters' columns of the Jacobian fit into half of the memory."""
    kept, width = 12 * rows[0] * rows[1], 4 * (rows[0] if symmetric else sum(rows))  # bytes; of a column
    needed = 2 * max(kept, width * -(-parameters // MOST_PASSES)) / 1e9
    if needed > gigabytes:
        told = np.format_float_positional(needed, precision=3, fractional=False, trim="-")
        raise UserError(
            f"a tangent kernel of {rows[0]} x {rows[1]} rows over {parameters} parameters needs at least {told} GB, "
            f"more than the {gigabytes:g} GB allowed; take fewer images, one output (ntk.mean_logit), or theory.products"
        )
    return min(parameters, int(gigabytes * 1e9 / 2 / width))


def _starts(images: np.ndarray, chunk: int) -> range:
    return range(0, len(images), parallel.padded(min(BLOCK, len(images)), chunk))


def _contracted(of_span: Callable, given, parts: list[np.ndarray], chunk: int, bar) -> np.ndarray:
    """One span's share of the kernel; its Jacobians are gone before the next span's are made."""
    jacobians = [_jacobian(of_span, given, part, chunk, bar) for part in parts]
    return jacobians[0] @ jacobians[-1].T


def _jacobian(of_span: Callable, given, images: np.ndarray, chunk: int, bar) -> np.ndarray:
    """The rows of all images for one span of the parameters, float32 [N R, span]."""
    starts, found = _starts(images, chunk), None
    for begin in starts:
        part = np.asarray(images[begin : begin + starts.step])
        filled = np.concatenate([part, np.zeros((starts.step - len(part), *part.shape[1:]), part.dtype)])
        block = parallel.gather(of_span(given, parallel.replicate(filled)))[: len(part)]
        if found is None:
            found = np.empty((len(images), *block.shape[1:]), np.float32)
        found[begin : begin + len(part)] = block
        bar.advance()
    return found.reshape(-1, found.shape[-1])


@lru_cache(maxsize=32)  # programs are large
def _rows(classifier: Classifier, begin: int, end: int, chunk: int, mesh) -> Callable:  # the mesh is part of the cache's key
    """`(variables and readout, images) -> [N, R, end - begin]`: gradients of every output for a span of the parameters."""

    def rows(given, images):
        variables, readout = given
        leaves, structure = jax.tree.flatten(variables["params"])
        pieces = spans([math.prod(leaf.shape) for leaf in leaves], begin, end)

        def one(image):
            def logits(some):
                params = structure.unflatten([some.get(index, leaf) for index, leaf in enumerate(leaves)])
                return classifier.apply(variables | {"params": params}, image[None]).logits[0]

            _, pull = jax.vjp(logits, {index: leaves[index] for index, _, _ in pieces})
            (gradients,) = jax.vmap(pull)(readout.T)
            return jnp.concatenate([gradients[i].reshape(len(readout.T), -1)[:, a:b] for i, a, b in pieces], 1)

        return jax.lax.map(one, images, batch_size=chunk if chunk > 1 else None)

    return parallel.map_over_devices(rows)


def spans(sizes: list[int], begin: int, end: int) -> list[tuple[int, int, int]]:
    """Where columns `begin` to `end` of all leaves laid end to end lie: (leaf, start, stop) within each leaf that has some."""
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    inside = [(max(begin - offset, 0), min(end - offset, size)) for offset, size in zip(first, sizes, strict=True)]
    return [(index, int(start), int(stop)) for index, (start, stop) in enumerate(inside) if start < stop]

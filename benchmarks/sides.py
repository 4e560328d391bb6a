"""The two sides of a comparison: one network, its images and settings, worked on by the JAX package and by its PyTorch twin."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import keys, models, parallel, train
from bibau_jax.defenses import bibau
from bibau_jax.defenses.adversarial import e_step
from bibau_jax.information import diagonal_fisher
from bibau_jax.method.terms import cross_entropy

try:
    import torch
    import twin
    from torch import nn  # noqa: F401  an empty folder called torch passes for a package; this finds it out
except ImportError:
    torch = twin = None

FULL = bibau.Weights(1.0, 1.0, 1.0, 30.0, 0.5, 4.0, 0.5, "cosine", 100.0, "clip")  # the defaults of `bibau.purify`, +A+B
BASE_AT = FULL._replace(kd=0.0, prior=0.0, ewc=0.0, iewc=0.0)
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """What both sides are given: networks as variables of the package, uint8 images, labels, Fisher diagonals, settings."""

    classifier: models.Classifier
    width: int
    stages: tuple[int, ...]
    backdoored: Any
    current: Any
    images: np.ndarray
    labels: np.ndarray
    fishers: dict[str, Any]
    perturbation: bibau.Perturbation
    padding: int
    weights: bibau.Weights = FULL


def make_case(width: int, stages, batch: int, perturbation: bibau.Perturbation, padding: int = 4, seed: int = 0) -> Case:
    """A case on random images: a network with settled running statistics, and a copy whose parameters moved by some 5 %."""
    classifier = models.build("resnet18", num_classes=10, image_shape=(32, 32, 3), width=width, stages=tuple(stages))
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (batch, 32, 32, 3), np.uint8)
    labels = draw.integers(0, 10, batch).astype(np.int32)
    variables = classifier.init(keys.root(seed))
    apply = jax.jit(partial(classifier.apply, train=True))
    for _ in range(30):
        variables = {**variables, "batch_stats": apply(variables, images).statistics}

    def moved(leaf):
        return leaf + 0.05 * (float(jnp.abs(leaf).mean()) + 0.01) * draw.standard_normal(leaf.shape, np.float32)

    current = {**variables, "params": jax.tree.map(moved, variables["params"])}
    fishers = {
        name: diagonal_fisher(classifier, which, images, labels)
        for name, which in (("clean", current), ("unlearning", variables))
    }
    return Case(classifier, width, tuple(stages), variables, current, images, labels, fishers, perturbation, padding)


class Ours:
    """The package on a case: every method does its work once and waits for it."""

    def __init__(self, case: Case):
        self.optimizer = train.sgd(lambda step: LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        shared = {"classifier": case.classifier, "target": None, "perturbation": case.perturbation}
        self._attack = {w: jax.jit(partial(e_step, weights=w, **shared)) for w in (case.weights, BASE_AT)}
        options = {"optimizer": self.optimizer, "weights": case.weights, "padding": case.padding, "flip": bool(case.padding)}
        self._step = jax.jit(partial(bibau.step, **options, **shared), donate_argnums=0)
        self._gradient = jax.jit(jax.grad(self._loss))
        self.restart(case)

    def restart(self, case: Case) -> None:
        """Back to the beginning, on other images of the same number if the case has them; what was compiled is kept."""
        self.case = case
        self.variables = parallel.replicate({"backdoored": case.backdoored, "current": case.current})
        self.pixels, self.batch = jax.jit(parallel.shard)(
            (case.images.astype(np.float32), {"images": case.images, "labels": case.labels})
        )
        first = train.new_state(case.current, self.optimizer)
        # Copies, because the state is donated to every update.
        fishers = jax.tree.map(jnp.array, (case.fishers["clean"], case.fishers["unlearning"]))
        placed = parallel.replicate(fishers)
        self.state = bibau.UnlearningState(first.step, first.params, first.statistics, first.opt_state, *placed)

    def _loss(self, params, statistics, pixels, labels):
        logits = self.case.classifier.apply({"params": params, "batch_stats": statistics}, pixels).logits
        return cross_entropy(logits, labels).mean()

    def attack(self, weights: bibau.Weights | None = None):
        """One E-step with these weights or the case's own; returns x'."""
        models_ = self.variables["current"], self.variables["backdoored"]
        return jax.block_until_ready(
            self._attack[weights or self.case.weights](self.pixels, self.batch["labels"], *models_, keys.root(0))
        )

    def update(self) -> dict:
        """One outer update; returns its metrics and keeps the state."""
        frozen = {"backdoored": self.variables["backdoored"]}
        self.state, metrics = jax.block_until_ready(self._step(self.state, frozen, self.batch, keys.root(0)))
        return metrics

    def fisher(self):
        """The diagonal Fisher of the current model over the batch."""
        case = self.case
        return jax.block_until_ready(diagonal_fisher(case.classifier, self.variables["current"], case.images, case.labels))

    def gradient(self):
        """The gradient of the batch's mean loss in evaluation mode: what the Fisher's price is compared with."""
        current = self.variables["current"]
        given = current["params"], current["batch_stats"], self.pixels, self.batch["labels"]
        return jax.block_until_ready(self._gradient(*given))


class Theirs:
    """The PyTorch twin on a case, with the methods of `Ours`."""

    def __init__(self, case: Case, memory_format=None, device: str = "cpu", dtype=None):
        place = {"memory_format": memory_format or torch.contiguous_format, "device": device, "dtype": dtype}
        self.case = case
        self.net, self.backdoored = (
            twin.load(self._new_net(), variables).to(**place) for variables in (case.current, case.backdoored)
        )
        self.backdoored.eval().requires_grad_(False)
        self.anchor = {name: p.detach().clone() for name, p in self.backdoored.named_parameters()}
        self.fishers = {name: self._by_name(tree) for name, tree in case.fishers.items()}
        self.images = twin.to_torch(case.images).to(**place)
        self.labels = torch.from_numpy(case.labels).long().to(device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def _new_net(self):
        return twin.ResNet(self.case.width, self.case.stages, self.case.classifier.num_classes)

    def _by_name(self, tree):
        """A tree like the parameters as tensors by PyTorch name, laid out like the network's parameters."""
        holder = twin.load(self._new_net(), {"params": tree, "batch_stats": self.case.current["batch_stats"]})
        values = dict(holder.named_parameters())
        return {name: torch.empty_like(p).copy_(values[name]).detach() for name, p in self.net.named_parameters()}

    def attack(self, weights: bibau.Weights | None = None):
        """One E-step with these weights or the case's own; returns x' as NCHW."""
        given = self.images, self.labels, self.net, self.backdoored, weights or self.case.weights
        return twin.e_step(*given, self.case.perturbation)

    def update(self) -> dict:
        """One outer update; returns its metrics and keeps the state."""
        given = self.images, self.labels, self.net, self.backdoored, self.anchor, self.fishers
        return twin.outer_update(*given, self.case.weights, self.case.perturbation, self.optimizer, self.case.padding)

    def fisher(self):
        """The diagonal Fisher of the current model over the batch, by parameter name."""
        return twin.fisher(self.net, self.images, self.labels)


def timed(work: Callable) -> float:
    """Seconds of one call; a pause before it lets the other library's worker threads go to sleep."""
    time.sleep(0.05)
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def alternate(work: dict[str, Callable], rounds: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(seconds of each first call, seconds of `rounds` more), the works taken in turn, so that all meet the same load."""
    first = {name: timed(call) for name, call in work.items()}
    later = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            later[name].append(timed(call))
    return first, later

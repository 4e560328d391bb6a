"""How fast the inner loops of other defences are: Neural Cleanse's classes at once or in turn, I-BAU and SAU beside PyTorch.

python benchmarks/defenses.py [--json] [--width 16] [--batch 64] [--classes 10]

  nc_ratio     seconds of one inversion step for all classes one after the other, over those of all at once (goal 3 on a GPU)
  i_bau_ratio  seconds of one step of I-BAU's inner loop, the ascent of the perturbation, of the PyTorch twin over ours (goal
               1.0 on a CPU)
  i_bau_outer_ratio  the same of one hypergradient of five terms, which costs ten times as much (goal 1.0)
  sau_ratio    seconds of one search for shared adversarial images (five steps) of the PyTorch twin over ours (goal 1.0)
  ..._channels_last  the same against the twin in channels-last, often PyTorch's faster layout on a CPU

Sides take turns and get the same network, images and threads; every figure is the median of several rounds, none holds a
compilation. Without PyTorch the ratios beside it are null. `--check` compares the numbers of both sides instead.
"""

import argparse
import json
import os
import statistics
import sys
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sides
from speed import machine

from bibau_jax import keys, parallel
from bibau_jax.defenses import i_bau, inversion, sau
from bibau_jax.method.settings import Perturbation

ATTACK = {"epsilon": 51.0, "step_size": 51.0, "steps": 5}
LAMBDAS = {"lambda_adversarial": 0.01, "lambda_shared": 1.0}
MAP_RATE, PENALTY, TERMS = 0.1, 1e-3, 5
ASCENT = {"inner_rate": 10.0, "penalty": PENALTY, "radius": 10.0}


class Ours:
    """The package on a case."""

    def __init__(self, case: sides.Case, classes: int):
        self.case = case
        self.models = parallel.replicate((case.current, case.backdoored))
        self.images, self.labels = jax.jit(parallel.shard)((case.images.astype(np.float32), case.labels))
        apply = jax.jit(lambda variables, images: jnp.argmax(case.classifier.apply(variables, images).logits, -1))
        self.before = [apply(variables, self.images) for variables in self.models]
        self._search = jax.jit(partial(sau.search, classifier=case.classifier, attack=ATTACK, lambdas=LAMBDAS))
        self._hypergradient = jax.jit(self._step)
        self._ascent = jax.jit(partial(i_bau.inner_step, classifier=case.classifier, **ASCENT))
        optimizer = optax.adam(0.1, b1=0.5, b2=0.9)
        self.raw = inversion.start(keys.root(0), case.classifier, optimizer).raw
        self.classes, self.weights = jnp.arange(classes), jnp.full(classes, 1e-3)
        self.all, self.parts = self._part(slice(0, classes)), [self._part(slice(one, one + 1)) for one in range(classes)]
        gradient = jax.grad(partial(inversion.objective, classifier=case.classifier), has_aux=True)
        self._gradient = jax.jit(gradient)

    def _step(self, params, delta, chosen):
        def logits(params, images):
            return self.case.classifier.apply({"params": params, "batch_stats": self.models[0]["batch_stats"]}, images).logits

        def outer(delta, params):
            moved = i_bau.moved(self.images, chosen * delta)
            return sides.cross_entropy(logits(params, moved), self.labels).mean()

        def inner(delta, params):
            loss = sides.cross_entropy(logits(params, i_bau.moved(self.images, delta)), self.labels).mean()
            return -loss + PENALTY * jnp.sum(delta**2)

        return i_bau.hypergradient(outer, inner, delta, params, rate=MAP_RATE, terms=TERMS)

    def search(self):
        """One search of SAU; returns x'."""
        return jax.block_until_ready(self._search(self.images, self.labels, self.models, self.before))

    def hypergradient(self):
        """One hypergradient of I-BAU at a small perturbation; returns (loss, gradient)."""
        delta = jnp.full((1, 32, 32, 3), 0.01)
        chosen = (jnp.arange(len(self.labels)) < 1)[:, None, None, None]
        return jax.block_until_ready(self._hypergradient(self.models[0]["params"], delta, chosen))

    def ascent(self):
        """One step of I-BAU's inner loop from a small perturbation; returns the next one."""
        delta = jnp.full((1, 32, 32, 3), 0.01)
        return jax.block_until_ready(self._ascent(delta, self.models[0], self.images))

    def at_once(self):
        """The inversion gradients of all classes in one call."""
        return jax.block_until_ready(self._invert(self.all))

    def in_turn(self):
        """The same, class after class; the host waits once, at the end."""
        return jax.block_until_ready([self._invert(one) for one in self.parts])

    def _part(self, rows: slice):
        return jax.block_until_ready(jax.tree.map(lambda leaf: leaf[rows], (self.raw, self.weights, self.classes)))

    def _invert(self, part):
        return self._gradient(*part, self.images, self.models[:1])


class Theirs(sides.Theirs):
    """The PyTorch twin on the same case, both models in evaluation mode."""

    def __init__(self, case: sides.Case, memory_format=None):
        super().__init__(case, memory_format)
        self.net.eval()
        with sides.torch.no_grad():
            self.before = [net(self.images)[0].argmax(1) for net in (self.net, self.backdoored)]

    def search(self):
        torch = sides.torch
        F, bound = torch.nn.functional, ATTACK["epsilon"]
        images, labels = self.images, self.labels
        self.net.requires_grad_(False)
        delta = (images + bound).clamp(0, 255) - images
        for _ in range(ATTACK["steps"]):
            delta = delta.detach().requires_grad_(True)
            both = [net(images + delta)[0] for net in (self.net, self.backdoored)]
            seen = [logits.argmax(1) for logits in both]
            stands = [now == was for now, was in zip(seen, self.before, strict=True)]
            mistaken = sum(s * F.cross_entropy(z, labels, reduction="none") for s, z in zip(stands, both, strict=True)) / 2
            p, q = (F.softmax(logits, 1).clamp_min(1e-8) for logits in both)
            middle = (p + q) / 2
            apart = ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1)) / 2
            done = ~stands[0] & ~stands[1] & (seen[0] == seen[1])
            kept = torch.where(done, torch.zeros_like(apart), apart)
            value = LAMBDAS["lambda_adversarial"] * mistaken - LAMBDAS["lambda_shared"] * kept
            (gradient,) = torch.autograd.grad(value.sum(), delta)
            moved = (delta + ATTACK["step_size"] * gradient.sign()).clamp(-bound, bound)
            delta = (images + moved).clamp(0, 255) - images
        self.net.requires_grad_(True)
        return images + delta.detach()

    def ascent(self):
        torch = sides.torch
        with torch.no_grad():
            labels = self.net(self.images)[0].argmax(1)
        self.net.requires_grad_(False)
        delta = torch.full((1, 3, 32, 32), 0.01, requires_grad=True)
        loss = -torch.nn.functional.cross_entropy(self.net(self.images + 255 * delta)[0], labels)
        (slope,) = torch.autograd.grad(loss + PENALTY * (delta**2).sum(), delta)
        self.net.requires_grad_(True)
        delta = delta.detach() - ASCENT["inner_rate"] * slope
        return delta * (ASCENT["radius"] / delta.norm()).clamp(max=1.0)

    def hypergradient(self):
        torch = sides.torch
        F, parameters = torch.nn.functional, list(self.net.parameters())
        delta = torch.full((1, 3, 32, 32), 0.01, requires_grad=True)
        chosen = (torch.arange(len(self.labels)) < 1)[:, None, None, None].float()
        loss = F.cross_entropy(self.net(self.images + 255 * chosen * delta)[0], self.labels)
        by_delta, *by_params = torch.autograd.grad(loss, [delta, *parameters])
        inner = -F.cross_entropy(self.net(self.images + 255 * delta)[0], self.labels) + PENALTY * (delta**2).sum()
        (slope,) = torch.autograd.grad(inner, delta, create_graph=True)
        mapped = delta - MAP_RATE * slope
        v = by_delta
        for _ in range(TERMS - 1):
            v = torch.autograd.grad(mapped, delta, v, retain_graph=True)[0] + by_delta
        more = torch.autograd.grad(mapped, parameters, v)
        return loss.detach(), [one + other for one, other in zip(by_params, more, strict=True)]


def compare(ours: Ours, theirs: Theirs) -> dict[str, float]:
    """How far the two sides are apart: share of perturbed pixels that differ, relative distance of hypergradients."""
    import twin

    apart = np.abs(np.asarray(ours.search()) - twin.to_numpy(theirs.search())) > 1
    loss, grads = ours.hypergradient()
    other_loss, others = theirs.hypergradient()
    mine = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(grads)))
    length = float(sum((leaf**2).sum() for leaf in others)) ** 0.5
    steps = np.asarray(ours.ascent()), twin.to_numpy(theirs.ascent())
    found = {"pixels_apart": float(apart.mean()), "loss": abs(float(loss) - float(other_loss))}
    found |= {"ascent": float(np.linalg.norm(steps[0] - steps[1]) / np.linalg.norm(steps[1]))}
    return found | {"gradient_length": abs(mine - length) / length}


def main() -> None:
    """Reads the flags and measures or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--check", action="store_true", help="compare the numbers of both sides instead of their speed")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 1, 1, 1])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--classes", type=int, default=10, help="at most 10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # must come before XLA starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    parallel.use_cores(args.batch)
    case = sides.make_case(args.width, args.stages, args.batch, Perturbation())
    ours, theirs = Ours(case, min(args.classes, 10)), None
    work = {"ours/search": ours.search, "ours/ascent": ours.ascent, "ours/hypergradient": ours.hypergradient}
    if sides.torch is not None:
        sides.torch.set_num_threads(args.threads)
        theirs = Theirs(case)
        swapped = Theirs(case, sides.torch.channels_last)
        if args.check:
            print(json.dumps(compare(ours, theirs)))
            return
        for name, twin in (("twin", theirs), ("twin_channels_last", swapped)):
            work |= {f"{name}/search": twin.search, f"{name}/ascent": twin.ascent, f"{name}/hypergradient": twin.hypergradient}
    work |= {"ours/at_once": ours.at_once, "ours/in_turn": ours.in_turn}
    _, later = sides.alternate(dict(sorted(work.items(), key=lambda item: item[0].split("/")[1])), args.rounds)
    seconds = {name: round(statistics.median(values), 4) for name, values in later.items()}

    def over(above: str, below: str):
        return round(seconds[above] / seconds[below], 3) if above in seconds else None

    record = {
        "nc_ratio": over("ours/in_turn", "ours/at_once"),
        "i_bau_ratio": over("twin/ascent", "ours/ascent"),
        "i_bau_ratio_channels_last": over("twin_channels_last/ascent", "ours/ascent"),
        "i_bau_outer_ratio": over("twin/hypergradient", "ours/hypergradient"),
        "i_bau_outer_ratio_channels_last": over("twin_channels_last/hypergradient", "ours/hypergradient"),
        "sau_ratio": over("twin/search", "ours/search"),
        "sau_ratio_channels_last": over("twin_channels_last/search", "ours/search"),
        "seconds": seconds,
        "machine": machine(),
        "settings": vars(args),
    }
    print(json.dumps(record) if args.json else json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

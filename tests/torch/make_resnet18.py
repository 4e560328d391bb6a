"""Writes resnet18.npz and pgd.npz beside this file, from PyTorch: what tests/test_torch_parity.py compares the package with.

python tests/torch/make_resnet18.py      # needs PyTorch; the tests do not

The network has ResNet-18's depth at width 4, so that weights, gradients and updates stay small enough to keep. Everything is
computed twice, in float32 and float64, and nothing is written unless they agree: a ReLU whose input is 0 up to rounding would
make arrays that no other library could be held to. Then take another seed.
"""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
import twin  # noqa: E402

WIDTH, STAGES, BATCH, SEED = 4, (2, 2, 2, 2), 4, 6
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
WEIGHTS = SimpleNamespace(kd=1.0, prior=1.0, ewc=1.0, iewc=0.1, alpha=0.5, temperature=4.0, eta=0.5, iewc_cap=1000.0)
PERTURBATIONS = {
    "l2": SimpleNamespace(norm="l2", epsilon=50.0, step_size=25.0, steps=3),
    "linf": SimpleNamespace(norm="linf", epsilon=8.0, step_size=4.0, steps=3),
}


def new_net() -> twin.ResNet:
    """A network with norms away from their defaults and running statistics that fit them."""
    net = twin.ResNet(WIDTH, STAGES)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.2)
                module.bias.uniform_(-0.2, 0.2)
        net.head.weight *= 4.0
        for _ in range(40):
            net(torch.randint(0, 256, (32, 3, 32, 32)).float())
    return net


def optimizer_of(net) -> torch.optim.SGD:
    """SGD as the tests build it with `train.sgd`."""
    return torch.optim.SGD(net.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def network_arrays(net, images, labels) -> tuple[dict, torch.nn.Module]:
    """Outputs in both modes, gradients and two steps of SGD on one batch; and the network after them."""
    found = {"before": twin.variables_of(net), "eval": dict(zip(("logits", "features"), net.eval()(images), strict=True))}
    optimizer = optimizer_of(net.train())
    for step in range(2):
        optimizer.zero_grad()
        logits, features = net(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        if step == 0:
            grads = {name: p.grad for name, p in net.named_parameters()}
            found["train"] = {"logits": logits, "features": features, "loss": loss, "gradients": twin.tree_of(net, grads)}
            found["train"]["batch_stats"] = twin.variables_of(net)["batch_stats"]
        optimizer.step()
    found["after"] = twin.variables_of(net)
    return plain(found), net


def unlearning_arrays(net, backdoored, images, labels) -> dict:
    """Adversarial images in both norms, the terms at them, both Fishers' forms, and one whole outer update."""
    backdoored.eval().requires_grad_(False)
    found, shared = {}, (labels, net, backdoored, WEIGHTS)
    for norm, perturbation in PERTURBATIONS.items():
        adversarial = twin.e_step(images, *shared, perturbation)
        with twin.frozen(net):
            clean = twin.references(images, net, backdoored, WEIGHTS)
            _, parts = twin.objective(adversarial, clean, *shared)
        found[norm] = {"images": twin.to_numpy(adversarial), **parts}
    adversarial = twin.e_step(images, *shared, PERTURBATIONS["l2"])
    fishers = {
        "clean": twin.fisher(net, images, labels),
        "unlearning": twin.fisher(backdoored, adversarial, backdoored(adversarial)[0].argmax(1)),
    }
    found["fisher"] = {name: twin.tree_of(net, tree) for name, tree in fishers.items()}
    anchor = {name: p.detach().clone() for name, p in backdoored.named_parameters()}
    given = images, labels, net, backdoored, anchor, fishers, WEIGHTS, PERTURBATIONS["l2"]
    found["update"] = twin.outer_update(*given, optimizer_of(net))
    found["update"]["params"] = twin.variables_of(net)["params"]
    return plain(found)


def plain(tree):
    """Tensors as numpy arrays, throughout a nested dict."""
    if isinstance(tree, dict):
        return {name: plain(value) for name, value in tree.items()}
    return tree.detach().numpy() if isinstance(tree, torch.Tensor) else tree


def flat(tree: dict, path: str = "") -> dict[str, np.ndarray]:
    """A nested dict as one level with names like "before/params/conv1/kernel"."""
    if not isinstance(tree, dict):
        return {path: np.asarray(tree)}
    return {n: v for name, value in tree.items() for n, v in flat(value, f"{path}/{name}" if path else name).items()}


def agree(arrays: dict, judge: dict) -> None:
    """Refuses arrays that depend on the precision they were computed in."""
    for name, value in arrays.items():
        apart = np.abs(value.astype(np.float64) - judge[name]).max() / max(np.abs(judge[name]).max(), 1e-30)
        if apart > 1e-5:
            raise SystemExit(f"{name}: float32 and float64 are {apart:.1e} apart; take another seed")


def main() -> None:
    """Computes, compares and writes."""
    torch.manual_seed(SEED)
    start = new_net()
    pixels = np.random.default_rng(SEED).integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
    labels = torch.randint(0, 10, (BATCH,))
    found = []
    for dtype in (torch.float32, torch.float64):
        net = copy.deepcopy(start).to(dtype)
        images, backdoored = twin.to_torch(pixels).to(dtype), copy.deepcopy(net)
        arrays, current = network_arrays(net, images, labels)
        found.append([flat(arrays), flat(unlearning_arrays(current, backdoored, images, labels))])
    settings = {
        "unlearning": [getattr(WEIGHTS, n) for n in ("kd", "prior", "ewc", "iewc", "alpha", "temperature", "eta", "iewc_cap")],
        "sgd": [LEARNING_RATE, MOMENTUM, WEIGHT_DECAY],
        **{n: [p.epsilon, p.step_size, p.steps] for n, p in PERTURBATIONS.items()},
    }
    network, unlearning = found[0]
    for arrays, judge in zip(*found, strict=True):
        agree(arrays, judge)
    network |= flat({"settings": settings, "images": pixels, "labels": labels.numpy().astype(np.int32)})
    for name, arrays in (("resnet18", network), ("pgd", unlearning)):
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
        print(
            f"{name}.npz: {len(arrays)} arrays, {(HERE / f'{name}.npz').stat().st_size / 1e3:.0f} kB, torch {torch.__version__}"
        )


if __name__ == "__main__":
    main()

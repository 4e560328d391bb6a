"""BI-BAU (U) in plain PyTorch: the same network, E-step, M-step and Fisher, to compare speed and numbers with the JAX package.

Images are float32 NCHW in 0..255; settings are the package's own `Weights` and `Perturbation` records. Written as one would
write it for PyTorch: modules, autograd, `torch.optim.SGD`, `torch.func` for per-example gradients. The cosine prior, the
clipped inverse penalty and a start at zero are all it knows.
"""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
TINY = 1e-12


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN plus the shortcut, then ReLU."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.changes = stride != 1 or inputs != features
        if self.changes:
            self.shortcut_conv = nn.Conv2d(inputs, features, 1, stride, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(features)

    def forward(self, x):
        shortcut = self.shortcut_bn(self.shortcut_conv(x)) if self.changes else x
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + shortcut, inplace=True)


class ResNet(nn.Module):
    """Pixels 0..255 [N, 3, H, W] to (logits [N, classes], features [N, D]); submodules carry the JAX package's names."""

    def __init__(self, width: int = 64, stages=(2, 2, 2, 2), classes: int = 10):
        super().__init__()
        self.register_buffer("mean", 255.0 * torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", 255.0 * torch.tensor(STD)[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks, inputs = [], width
        for s, depth in enumerate(stages):
            for b in range(depth):
                self.blocks.append(f"layer{s + 1}_{b}")
                setattr(self, self.blocks[-1], Block(inputs, width * 2**s, 2 if s and not b else 1))
                inputs = width * 2**s
        self.head = nn.Linear(inputs, classes)

    def forward(self, pixels):
        x = F.relu(self.bn1(self.conv1((pixels - self.mean) / self.std)), inplace=True)
        for name in self.blocks:
            x = getattr(self, name)(x)
        features = x.mean((2, 3))
        return self.head(features), features


def to_torch(images) -> torch.Tensor:
    """NHWC images of any type as float32 NCHW."""
    return torch.from_numpy(np.asarray(images, np.float32).transpose(0, 3, 1, 2).copy())


def to_numpy(images: torch.Tensor) -> np.ndarray:
    """NCHW images as NHWC."""
    return images.detach().cpu().numpy().transpose(0, 2, 3, 1)


NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _turned(array: np.ndarray, to_flax: bool) -> np.ndarray:
    """HWIO to OIHW or back; a linear layer's [D, K] to [K, D] or back; vectors as they are."""
    axes = {4: (2, 3, 1, 0) if to_flax else (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
    return array.transpose(axes)


def load(net: nn.Module, variables) -> nn.Module:
    """Copies the package's variables {"params", "batch_stats"} into the network, in place."""
    state = {}

    def visit(tree, path):
        for name, value in tree.items():
            if hasattr(value, "items"):
                visit(value, (*path, name))
            else:
                state[".".join((*path, NAMES[name]))] = torch.from_numpy(_turned(np.asarray(value), False).copy())

    visit(variables["params"], ())
    visit(variables["batch_stats"], ())
    missing, unexpected = net.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.endswith("num_batches_tracked"))]
    if wrong:
        raise ValueError(f"parameters of the two networks differ: {wrong}")
    return net


def tree_of(net: nn.Module, named: dict[str, torch.Tensor], collection: str = "params") -> dict:
    """Tensors by PyTorch name (parameters, gradients or buffers) as the package's nested dict of numpy arrays."""
    tree: dict = {}
    for path, module in net.named_modules():
        weight = "scale" if isinstance(module, nn.BatchNorm2d) else "kernel"
        for name in (weight, "bias") if collection == "params" else ("mean", "var"):
            if (key := f"{path}.{NAMES[name]}") in named:
                branch = tree
                for part in path.split("."):
                    branch = branch.setdefault(part, {})
                branch[name] = _turned(named[key].detach().cpu().numpy(), True).copy()
    return tree


def variables_of(net: nn.Module) -> dict:
    """The network's parameters and running statistics as the package's variables, numpy."""
    state = net.state_dict()
    return {name: tree_of(net, state, name) for name in ("params", "batch_stats")}


@contextlib.contextmanager
def frozen(net: nn.Module):
    """Evaluation mode without gradients for the parameters, inside a `with` block."""
    wanted = [p.requires_grad for p in net.parameters()]
    net.eval().requires_grad_(False)
    try:
        yield net
    finally:
        for p, flag in zip(net.parameters(), wanted, strict=True):
            p.requires_grad_(flag)


def distillation(teacher, student, labels, weights) -> torch.Tensor:
    """L_kd per example (Eq. 17)."""
    t = weights.temperature
    log_teacher, log_student = F.log_softmax(teacher / t, 1), F.log_softmax(student / t, 1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    return weights.alpha * t**2 * divergence + (1 - weights.alpha) * F.cross_entropy(student, labels, reduction="none")


def prior(adversarial, clean, direction, eta: float) -> torch.Tensor:
    """L_prior per example, the cosine of phi(x') - eta phi(x) and the change of the head (Eq. 20-21); 0 where undefined."""
    moved = adversarial - eta * clean
    squares = moved.square().sum(1) * direction.square().sum(1)
    defined = squares > TINY**2
    cosine = (moved * direction).sum(1) * torch.where(defined, squares, 1.0).rsqrt()
    return torch.where(defined, cosine, 0.0)


def references(images, net, backdoored, weights):
    """(f_b's logits of x, the current features of x, W_b - W by class), or Nones and the last where no term needs them."""
    with torch.no_grad():
        directions = backdoored.head.weight - net.head.weight
        if not (weights.kd or weights.prior):
            return None, None, directions
        return backdoored(images)[0], net(images)[1], directions


def objective(adversarial, clean, labels, net, backdoored, weights):
    """L_adv per image (Eq. 27) and its parts; both networks must be in evaluation mode."""
    teacher, clean_features, directions = clean
    suspicious, _ = backdoored(adversarial)
    total = F.cross_entropy(suspicious, labels, reduction="none")
    parts = {"fooled": suspicious.argmax(1) != labels}
    if weights.kd or weights.prior:
        logits, features = net(adversarial)
        heading = suspicious.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)
        parts["kept"] = logits.argmax(1) == labels
        parts["kd"] = distillation(teacher, logits, labels, weights)
        parts["prior"] = prior(features, clean_features, directions[heading], weights.eta)
        total = total + weights.prior * parts["prior"] - weights.kd * parts["kd"]
    return total, parts


def _length(images):
    return images.flatten(1).norm(dim=1)[:, None, None, None]


def e_step(images, labels, net, backdoored, weights, perturbation, clean=None) -> torch.Tensor:
    """Adversarial images x' by projected gradient ascent within `perturbation`; `clean` from `references` if at hand."""
    norm, epsilon, step_size = perturbation.norm, perturbation.epsilon, perturbation.step_size
    with frozen(net):
        clean = clean or references(images, net, backdoored, weights)
        adversarial = images.clone()
        for _ in range(perturbation.steps):
            adversarial.requires_grad_(True)
            total, _ = objective(adversarial, clean, labels, net, backdoored, weights)
            (gradient,) = torch.autograd.grad(total.sum(), adversarial)
            with torch.no_grad():
                if norm == "linf":
                    delta = adversarial + step_size * gradient.sign() - images
                    delta = delta.clamp_(-epsilon, epsilon)
                else:
                    delta = adversarial + step_size * gradient / _length(gradient).clamp_min(TINY) - images
                    delta = delta * (epsilon / _length(delta).clamp_min(TINY)).clamp_max(1.0)
                adversarial = (images + delta).clamp_(0.0, 255.0)
    return adversarial.detach()


def quadratic_form(fisher, net, anchor) -> torch.Tensor:
    """sum_i F_i (theta_i - theta_b,i)^2 over parameters by name (Eq. 24)."""
    return sum((fisher[name] * (p - anchor[name]).square()).sum() for name, p in net.named_parameters())


def inverse_penalty(quadratic: torch.Tensor, cap: float) -> torch.Tensor:
    """clip(1 / Q, 0, c) (Eq. 25)."""
    return (1.0 / quadratic.clamp_min(1.0 / cap)).clamp_max(cap)


def m_step(images, adversarial, labels, net, anchor, fishers, weights, optimizer) -> dict[str, torch.Tensor]:
    """One optimiser step on CE(x) + CE(x') + lambda_3 L_ewc + lambda_4 L_iewc (Eq. 2, 23-25); returns the values."""
    net.train()
    logits, _ = net(torch.cat([images, adversarial]))
    clean_logits, adversarial_logits = logits.chunk(2)
    loss = F.cross_entropy(clean_logits, labels) + F.cross_entropy(adversarial_logits, labels)
    parts = {}
    if weights.ewc:
        parts["ewc_quadratic"] = quadratic_form(fishers["clean"], net, anchor)
        loss = loss + weights.ewc * parts["ewc_quadratic"]
    if weights.iewc:
        parts["iewc_quadratic"] = quadratic_form(fishers["unlearning"], net, anchor)
        parts["iewc"] = inverse_penalty(parts["iewc_quadratic"], weights.iewc_cap)
        loss = loss + weights.iewc * parts["iewc"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}


def outer_update(images, labels, net, backdoored, anchor, fishers, weights, perturbation, optimizer, padding=0) -> dict:
    """Augmentation, E-step, M-step and the watched shares and means of the E-step, as the package's `bibau.step`."""
    if padding:
        images = crop_and_flip(images, padding)
    with frozen(net):
        clean = references(images, net, backdoored, weights)
    adversarial = e_step(images, labels, net, backdoored, weights, perturbation, clean)
    with frozen(net), torch.no_grad():
        _, parts = objective(adversarial, clean, labels, net, backdoored, weights)
    values = m_step(images, adversarial, labels, net, anchor, fishers, weights, optimizer)
    return values | {name: value.float().mean() for name, value in parts.items()}


def crop_and_flip(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Random crop after zero padding, then a flip with probability 1/2, drawn for each image."""
    count, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), device=device)
    rows, columns = torch.arange(height, device=device) + top, torch.arange(width, device=device) + left
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    padded = padded.gather(2, rows[:, None, :, None].expand(count, channels, height, width + 2 * padding))
    return padded.gather(3, columns[:, None, None, :].expand(count, channels, height, width))


def fisher(net, images, labels, chunk: int = 32) -> dict[str, torch.Tensor]:
    """Mean over images of (d log p(label | image) / d theta)^2 by parameter name, in evaluation mode, by `torch.func`."""
    net.eval()
    params = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def loss(params, image, label):
        logits, _ = torch.func.functional_call(net, (params, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for part, seen in zip(images.split(chunk), labels.split(chunk), strict=True):
        for name, g in gradients(params, part, seen).items():
            total[name] += g.square().sum(0)
    return {name: value / len(images) for name, value in total.items()}

"""Writes attacks.npz beside this file, from PyTorch: the warp of WaNet, the generator of IAD, the networks of ISSBA.

python tests/torch/make_attacks.py      # needs PyTorch; the tests do not

Variables are stored in Flax's layout under the names of the package's modules, so that its networks can be given them.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
WIDTH, SIDE, BITS = 3, 32, 2


def warp() -> dict:
    """A coarse field, upsampled and applied as WaNet's code does, with and without jitter; images [N, H, W, C] in 0..255."""
    images = torch.rand(3, 3, SIDE, SIDE) * 255
    noise = torch.rand(1, 2, 4, 4) * 2 - 1
    noise = noise / noise.abs().mean()
    field = F.interpolate(noise, size=SIDE, mode="bicubic", align_corners=True)
    straight = torch.linspace(-1, 1, SIDE)
    rows, columns = torch.meshgrid(straight, straight, indexing="ij")
    grid = torch.stack((columns, rows), 2)[None]
    moved = (grid + 0.5 * field.permute(0, 2, 3, 1) / SIDE).clamp(-1, 1)
    jitter = torch.rand(3, SIDE, SIDE, 2) * 2 - 1
    jittered = (moved + jitter / SIDE).clamp(-1, 1)
    return {
        "images": channels_last(images),
        "noise": noise[0],
        "field": field[0],
        "jitter": jitter.permute(0, 3, 1, 2),
        "warped": channels_last(F.grid_sample(images, moved.repeat(3, 1, 1, 1), align_corners=True)),
        "jittered": channels_last(F.grid_sample(images, jittered, align_corners=True)),
    }


class Generator(torch.nn.Module):
    """IAD's generator: 13 convolutions with BatchNorm."""

    def __init__(self, out: int):
        super().__init__()
        w = WIDTH
        sizes = [(3, w), (w, w), (w, 2 * w), (2 * w, 2 * w), (2 * w, 4 * w), (4 * w, 4 * w), (4 * w, 4 * w)]
        sizes += [(4 * w, 4 * w), (4 * w, 2 * w), (2 * w, 2 * w), (2 * w, w), (w, w), (w, out)]
        for number, (a, b) in enumerate(sizes, 1):
            self.add_module(f"conv{number}", torch.nn.Conv2d(a, b, 3, padding=1))
            self.add_module(f"bn{number}", torch.nn.BatchNorm2d(b, momentum=0.05))
        for norm in (module for module in self.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(norm.weight, 0.8, 1.2)
            torch.nn.init.uniform_(norm.bias, -0.2, 0.2)

    def forward(self, x):
        """Unsquashed output."""
        for number in range(1, 14):
            if number in (8, 10, 12):
                x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))
            x = F.relu(x) if number < 13 else x
            x = F.max_pool2d(x, 2) if number in (2, 4, 6) else x
        return x


def generator() -> dict:
    """Variables before, outputs in both modes, and the running statistics after one batch."""
    net, pixels = Generator(3), torch.rand(5, 3, SIDE, SIDE) * 255
    net.train()
    for _ in range(3):
        net(scaled(torch.rand(5, 3, SIDE, SIDE) * 255))
    net.eval()
    found = {"pixels": channels_last(pixels), "before": variables(net), "eval": channels_last(net(scaled(pixels)))}
    net.train()
    return found | {"train": channels_last(net(scaled(pixels))), "after": variables(net)["batch_stats"]}


class Encoder(torch.nn.Module):
    """ISSBA's encoder, as BackdoorBench ships it."""

    def __init__(self):
        super().__init__()
        w, self.secret = WIDTH, torch.nn.Linear(BITS, 16 * 16 * 3)
        steps = {"down0": (6, w), "down1": (w, w), "down2": (w, 2 * w), "down3": (2 * w, 4 * w), "down4": (4 * w, 8 * w)}
        steps |= {"merge0": (8 * w, 4 * w), "merge1": (4 * w, 2 * w), "merge2": (2 * w, w), "merge3": (2 * w + 6, w)}
        for name, (a, b) in (steps | {"last": (w, w)}).items():
            self.add_module(
                name, torch.nn.Conv2d(a, b, 3, stride=2 if name in ("down1", "down2", "down3", "down4") else 1, padding=1)
            )
        for number, (a, b) in enumerate(((8, 4), (4, 2), (2, 1), (1, 1))):
            self.add_module(f"up{number}", torch.nn.Conv2d(a * w, b * w, 2))
        self.image = torch.nn.Conv2d(w, 3, 1)

    def forward(self, secret, images):
        """Images that carry the secret, in 0..1."""
        # The secret's plane is laid out rows, columns, channels, as Flax reshapes it.
        plane = F.relu(self.secret(secret - 0.5)).reshape(-1, 16, 16, 3).permute(0, 3, 1, 2)
        start = torch.cat([F.interpolate(plane, size=SIDE, mode="nearest"), images - 0.5], 1)
        levels, x = [], start
        for number in range(5):
            x = F.relu(self.get_submodule(f"down{number}")(x))
            levels.append(x)
        for number in range(4):
            x = F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (0, 1, 0, 1))
            x = F.relu(self.get_submodule(f"up{number}")(x))
            x = torch.cat([x, levels[3 - number], *([start] if number == 3 else [])], 1)
            x = F.relu(self.get_submodule(f"merge{number}")(x))
        return torch.sigmoid(self.image(F.relu(self.last(x))))


class Decoder(torch.nn.Module):
    """ISSBA's decoder."""

    def __init__(self):
        super().__init__()
        w, before = WIDTH, 3
        self.strides = (2, 1, 2, 1, 2, 2, 2)
        for number, (factor, stride) in enumerate(zip((1, 1, 2, 2, 2, 4, 4), self.strides, strict=True)):
            self.add_module(f"conv{number}", torch.nn.Conv2d(before, factor * w, 3, stride=stride, padding=1))
            before = factor * w
        self.hidden, self.bits = torch.nn.Linear(before, 16 * w), torch.nn.Linear(16 * w, BITS)

    def forward(self, images):
        """Logits of the bits."""
        x = images - 0.5
        for number in range(7):
            x = F.relu(self.get_submodule(f"conv{number}")(x))
        return self.bits(F.relu(self.hidden(x.flatten(1))))


def secret() -> dict:
    """Both networks' parameters, what the encoder makes of images and secrets, and what the decoder reads there."""
    encoder, decoder = Encoder(), Decoder()
    images, secrets = torch.rand(4, 3, SIDE, SIDE), torch.randint(0, 2, (4, BITS)).float()
    carrying = encoder(secrets, images)
    return {
        "images": channels_last(images),
        "secrets": secrets,
        "encoder": variables(encoder)["params"],
        "decoder": variables(decoder)["params"],
        "carrying": channels_last(carrying),
        "logits": decoder(carrying),
    }


def scaled(pixels):
    """As the generators take them."""
    return (pixels / 255 - 0.5) / 0.25


def channels_last(images):
    """[N, C, H, W] as [N, H, W, C]."""
    return images.permute(0, 2, 3, 1)


def variables(net) -> dict:
    """A network's parameters and running statistics in Flax's names and layout."""
    found = {"params": {}, "batch_stats": {}}
    for name, module in net.named_children():
        if isinstance(module, torch.nn.BatchNorm2d):
            found["params"][name] = {"scale": module.weight, "bias": module.bias}
            found["batch_stats"][name] = {"mean": module.running_mean.clone(), "var": module.running_var.clone()}
        else:
            axes = (2, 3, 1, 0) if module.weight.ndim == 4 else (1, 0)
            found["params"][name] = {"kernel": module.weight.permute(axes), "bias": module.bias}
    return found


def flat(tree, path: str = "") -> dict[str, np.ndarray]:
    """A nested dict of tensors as one level with names like "warp/images"."""
    if not isinstance(tree, dict):
        return {path: tree.detach().numpy()}
    return {n: v for name, value in tree.items() for n, v in flat(value, f"{path}/{name}" if path else name).items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    arrays = flat({"warp": warp(), "generator": generator(), "secret": secret()})
    np.savez_compressed(HERE / "attacks.npz", **arrays)
    print(f"attacks.npz: {len(arrays)} arrays, {(HERE / 'attacks.npz').stat().st_size / 1e3:.0f} kB, torch {torch.__version__}")

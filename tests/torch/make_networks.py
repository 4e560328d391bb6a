"""Makes tests/torch/networks.npz: small networks in PyTorch, their weights by PyTorch's names, and what they answer.

python tests/torch/make_networks.py      # needs PyTorch and torchvision; the tests do not
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class WideBlock(nn.Module):
    """Pre-activation; where the width changes, the shortcut starts behind the first BN-ReLU."""

    def __init__(self, inputs, features, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(features)
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, features, 1, stride, bias=False) if inputs != features else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


class Stage(nn.Module):
    """Blocks under the name `layer`."""

    def __init__(self, inputs, features, stride, depth):
        super().__init__()
        made = [WideBlock(inputs if n == 0 else features, features, stride if n == 0 else 1) for n in range(depth)]
        self.layer = nn.Sequential(*made)

    def forward(self, x):
        return self.layer(x)


class Wide(nn.Module):
    """WRN of three stages of two blocks."""

    def __init__(self, width=16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1, self.block2 = Stage(16, width, 1, 2), Stage(width, 2 * width, 2, 2)
        self.block3 = Stage(2 * width, 4 * width, 2, 2)
        self.bn1, self.fc = nn.BatchNorm2d(4 * width), nn.Linear(4 * width, 10)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class PaddedBlock(nn.Module):
    """He's block; the shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self, inputs, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(features), nn.BatchNorm2d(features)
        self.inputs, self.features = inputs, features

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.inputs != self.features:
            more = (self.features - self.inputs) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))
        return F.relu(y + x)


class Padded(nn.Module):
    """ResNet-20."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        inputs = width
        for stage in (1, 2, 3):
            features, made = width * 2 ** (stage - 1), []
            for number in range(3):
                made.append(PaddedBlock(inputs, features, 2 if stage > 1 and number == 0 else 1))
                inputs = features
            setattr(self, f"layer{stage}", nn.Sequential(*made))
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class Large(nn.Module):
    """torchvision's ResNet of two blocks, narrow: 7x7 stem at stride 2, max-pool, shortcuts called `downsample`."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(BasicBlock(width, width))
        down = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2, down))
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class PreActBlock(nn.Module):
    """Pre-activation; the shortcut, a bare convolution, starts behind the first BN-ReLU."""

    def __init__(self, inputs, features, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(features)
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, features, 1, stride, bias=False)) if stride != 1 else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + (x if self.shortcut is None else self.shortcut(y))


class PreAct(nn.Module):
    """BackdoorBench's PreActResNet with three blocks in two stages."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(width, width, 1), PreActBlock(width, width, 1))
        self.layer2 = nn.Sequential(PreActBlock(width, 2 * width, 2))
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.linear(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


def narrow_vgg():
    """torchvision's VGG with BatchNorm of width 2, six convolutions in five stages, and two hidden layers of 16."""
    net = VGG(make_layers([2, "M", 4, "M", 8, 8, "M", 16, "M", 16, "M"], batch_norm=True), init_weights=False)
    hidden = [nn.Linear(16 * 49, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout()]
    net.classifier = nn.Sequential(*hidden, nn.Linear(16, 10))
    with torch.no_grad():
        for layer in net.classifier[::3]:
            layer.weight *= 4  # else the biases alone would decide
    return net


class Resized(nn.Module):
    """BackdoorBench's way to a ViT: images are scaled up, then comes torchvision's network, under the name `1`."""

    def __init__(self):
        super().__init__()
        self.add_module("1", VisionTransformer(24, 8, 2, 2, 16, 64, num_classes=10))

    def forward(self, x):
        return getattr(self, "1")(F.interpolate(x, (24, 24), mode="bilinear", align_corners=False))


class Residual(nn.Module):
    """CLIP's block."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(y * torch.sigmoid(1.702 * y))


class Tower(nn.Module):
    """CLIP's image encoder of two blocks, on 16x16 pixels in patches of 8."""

    def __init__(self, width=16, projection=12):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) / 4)
        self.positional_embedding = nn.Parameter(torch.randn(5, width) / 4)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(Residual(width, 2), Residual(width, 2))
        self.proj = nn.Parameter(torch.randn(width, projection) / 4)

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer.resblocks(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class Clip(nn.Module):
    """The tower under a linear head."""

    def __init__(self):
        super().__init__()
        self.visual, self.fc = Tower(), nn.Linear(12, 10)

    def forward(self, x):
        return self.fc(self.visual(x))


NETWORKS = {  # and the side of the images that each is shown
    "wide_resnet16": (Wide, 16),
    "resnet20": (Padded, 16),
    "resnet18_imagenet": (Large, 32),
    "preact_resnet18": (PreAct, 16),
    "vgg19_bn": (narrow_vgg, 32),
    "vit_b_32": (Resized, 16),
    "clip_vit_b_32": (Clip, 16),
}


def shaken(net: nn.Module) -> None:
    """Moves what begins at 0 or 1, all alike, so that a mistaken place shows; heads that begin at 0 too."""
    with torch.no_grad():
        for value in net.parameters():
            if value.std() == 0:
                value += torch.empty_like(value).uniform_(-0.3, 0.3)


def main() -> None:
    """Writes the arrays: weights as float16 values, so that the file stays small and they are exact."""
    torch.manual_seed(0)
    images = {size: torch.randint(0, 256, (4, 3, size, size)) for size in (16, 32)}
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    arrays = {f"images_{size}": shown.permute(0, 2, 3, 1).numpy().astype(np.uint8) for size, shown in images.items()}
    for name, (make, size) in NETWORKS.items():
        net = make()
        shaken(net)
        net.train()
        for _ in range(3):
            net((torch.randint(0, 256, (16, 3, size, size)) / 255 - mean) / std)
        with torch.no_grad():
            for value in net.state_dict().values():
                value.copy_(value.half().to(value.dtype))
        net.eval()
        with torch.no_grad():
            arrays[f"{name}/logits"] = net((images[size] / 255 - mean) / std).numpy()
        for key, value in net.state_dict().items():
            arrays[f"{name}/weights/{key}"] = value.numpy().astype(np.float16 if value.is_floating_point() else np.int64)
    given = torch.rand(1, 2, 9, 4)
    arrays["pooled/given"] = given.permute(0, 2, 3, 1).numpy()
    arrays["pooled/made"] = F.adaptive_avg_pool2d(given, (7, 7)).permute(0, 2, 3, 1).numpy()
    np.savez_compressed(Path(__file__).with_name("networks.npz"), **arrays)


if __name__ == "__main__":
    main()

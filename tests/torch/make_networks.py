"""Makes tests/torch/networks.npz: small networks in PyTorch, their weights by PyTorch's names, and what they answer; needs it.

python tests/torch/make_networks.py
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

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


def main() -> None:
    """Writes the arrays: weights as float16 values, so that the file stays small and they are exact."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 16, 16))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    arrays = {"images": images.permute(0, 2, 3, 1).numpy().astype(np.uint8)}
    for name, net in (("wide_resnet16", Wide()), ("resnet20", Padded())):
        net.train()
        for _ in range(3):
            net((torch.randint(0, 256, (16, 3, 16, 16)) / 255 - mean) / std)
        with torch.no_grad():
            for value in net.state_dict().values():
                value.copy_(value.half().to(value.dtype))
        net.eval()
        with torch.no_grad():
            arrays[f"{name}/logits"] = net((images / 255 - mean) / std).numpy()
        for key, value in net.state_dict().items():
            arrays[f"{name}/weights/{key}"] = value.numpy().astype(np.float16 if value.is_floating_point() else np.int64)
    np.savez_compressed(Path(__file__).with_name("networks.npz"), **arrays)


if __name__ == "__main__":
    main()

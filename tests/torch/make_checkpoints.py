"""Makes tests/torch/*.pth, small files as PyTorch writes them, and checkpoints.npz with what is in them; needs PyTorch.

python tests/torch/make_checkpoints.py
"""

import argparse
import collections
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent


def weights() -> dict:
    """Tensors of every kind and shape that a state dict may hold."""
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return collections.OrderedDict(
        {
            "conv.weight": torch.randn(3, 2, 3, 3),
            "bn.num_batches_tracked": torch.tensor(7),
            "half": torch.randn(5).half(),
            "brain": torch.randn(5).bfloat16(),
            "double": torch.randn(2, 2).double(),
            "mask": torch.tensor([True, False, True]),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "turned": base.t(),
            "part": base[1:3, ::2],
            "again": base,
            "parameter": torch.nn.Parameter(torch.randn(3)),
            "empty": torch.zeros(0, 4),
        }
    )


def main() -> None:
    """Writes all files."""
    state = weights()
    torch.save(state, FOLDER / "zip.pth")
    torch.save(state, FOLDER / "legacy.pth", _use_new_zipfile_serialization=False)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "best": np.float64(0.93),
        "args": argparse.Namespace(lr=0.1, milestones=[1, 2]),
        "optimizer": optimizer.state_dict(),
        "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
    }
    torch.save(checkpoint, FOLDER / "checkpoint.pth")
    torch.save({"net": model.state_dict(), "ema": model.state_dict()}, FOLDER / "two.pth")
    torch.save(model, FOLDER / "module.pth")
    arrays = {f"weights/{name}": value.detach().float().numpy() for name, value in state.items()}
    arrays |= {f"model/{name}": value.float().numpy() for name, value in model.state_dict().items()}
    np.savez_compressed(FOLDER / "checkpoints.npz", **arrays)


if __name__ == "__main__":
    main()

"""CIFAR-10 with a full ResNet-18, as in the paper (section 5.1): for a GPU or TPU.

python -m bibau_jax.main --config=configs/cifar10.py:blended --workdir=runs/blended
"""

from configs import base


def get_config(attack: str = "badnets"):
    """The paper's setting; `configs/cifar10.py:blended` for another attack."""
    config = base.get_config()
    config.attack.name = attack
    return config

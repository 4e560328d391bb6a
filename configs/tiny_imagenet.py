"""Tiny-ImageNet at 32x32 with ResNet-18, as in the paper (appendix E.3): for a GPU or TPU.

python -m bibau_jax.main --config=configs/tiny_imagenet.py:blended --workdir=runs/tiny_blended
"""

from configs import base


def get_config(attack: str = "badnets"):
    """The paper's setting; at the published size with `--config.data.tiny_imagenet.image_size=64`."""
    config = base.get_config()
    config.data.name = "tiny_imagenet"
    config.data.clean_size = 5000  # 5 %
    config.data.validation_size = 2000
    config.data.flip = False  # BackdoorBench's
    config.model.mean = (0.4802, 0.4481, 0.3975)
    config.model.std = (0.2302, 0.2265, 0.2262)
    config.defense.clp.u = 5.0  # the authors' for 200 classes
    config.defense.sau.epochs = 20
    config.defense.ft.epochs = 200
    config.defense.nc.epochs = 200
    config.attack.name = attack
    config.attack.sig.class_share = 0.5  # of the 500 images of class 0, as on CIFAR-10
    return config

"""GTSRB with VGG19-BN, as in the paper (appendix E.3): for a GPU or TPU.

python -m bibau_jax.main --config=configs/gtsrb.py:blended --workdir=runs/gtsrb_blended
"""

from configs import base


def get_config(attack: str = "badnets"):
    """The paper's setting; `configs/gtsrb.py:blended` for another attack."""
    config = base.get_config()
    config.data.name = "gtsrb"
    config.data.clean_size = 1960  # 5 %
    config.data.validation_size = 1960  # some 65 tracks: frames of a track are near-copies
    config.data.flip = False  # a mirrored sign is another sign
    config.model.name = "vgg19_bn"
    config.model.mean = (0.0, 0.0, 0.0)  # BackdoorBench's
    config.model.std = (1.0, 1.0, 1.0)
    config.attack.name = attack
    config.attack.sig.class_share = 0.5  # of the 210 images of class 0, as on CIFAR-10
    config.attack.adap_patch.poison_ratio = 0.005  # the authors' for GTSRB
    config.attack.enhanced_adap_patch.poison_ratio = 0.005
    return config

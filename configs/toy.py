"""Any data set at the size of a minute or two on two cores: to see that everything runs, not what it is worth.

python -m bibau_jax.main --config=configs/toy.py:gtsrb --workdir=runs/toy_gtsrb --config.attack.name=blended
"""

import importlib

# What two cores can carry of each network.
SIZES = {
    "resnet18": {"width": 8, "stages": (1, 1)},
    "vgg19_bn": {"width": 8, "stages": (1, 1, 1, 1, 1), "hidden": 0},
    "clip_vit_b_32": {"width": 64, "stages": (2,), "patch": 8, "size": 32, "projection": 32},
}


def get_config(name: str = "cifar10"):
    """The settings of `configs/<name>.py`, a few images and a small form of its network; `configs/toy.py:gtsrb`."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.data.train_size = 1000
    config.data.clean_size = 240
    config.data.validation_size = 200
    config.model.update(SIZES.get(config.model.name, {}))
    config.implant.epochs = 4
    config.implant.batch_size = 64
    config.implant.schedule = "one_cycle"
    config.defense.beside = "ft"
    config.defense.epochs = 2
    config.defense.ft.epochs = config.defense.nc.epochs = 2
    config.defense.batch_size = 48
    config.defense.pgd.steps = 3
    config.reactivate.checks = "retuning,bec"
    config.reactivate.test_size = 500
    config.reactivate.retuning.images = 256
    config.reactivate.retuning.repeats = 1
    config.reactivate.retuning.epochs = 1
    return config

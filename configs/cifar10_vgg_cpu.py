"""configs/cifar10_cpu.py with a network from a file of its own, the small VGG of examples/small_vgg.py.

python -m bibau_jax.main --config=configs/cifar10_vgg_cpu.py:badnets --workdir=runs/vgg
"""

from configs import cifar10_cpu


def get_config(attack: str = "badnets"):
    """Every place of an image has weights of its own in that network's last layer, which has no pooling before it."""
    config = cifar10_cpu.get_config(attack)
    config.model.file = "examples/small_vgg.py"
    config.model.width = config.model.stages = None  # they stand in the file
    return config

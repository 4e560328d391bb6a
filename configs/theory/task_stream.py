"""Is the backdoor a task of its own? The paper's three orders of learning (appendix E.1, Fig. 6), at the size of two CPU cores.

python -m bibau_jax.theory.task_stream --config=configs/theory/task_stream.py --workdir=runs/task_stream
"""

from ml_collections import ConfigDict

from bibau_jax.errors import unknown
from configs import base, cifar10_cpu, digits


def get_config(size: str = "cpu"):
    """`configs/theory/task_stream.py:paper` is the paper's: ResNet-18, all of CIFAR-10, 100 epochs; `:digits` takes minutes."""
    sizes = {"paper": base.get_config, "cpu": cifar10_cpu.get_config, "digits": digits.get_config}
    if size not in sizes:
        raise unknown("size of the task stream", size, sizes)
    config = sizes[size]()
    config.stream = ConfigDict()
    config.stream.epochs = 100  # in all, in each of the three settings
    config.stream.first_epochs = 20  # of them, on the backdoor task by itself
    config.stream.clean_share = 0.1  # of the clean images that accompany the backdoor task
    config.stream.poison_share = 0.01  # of the poisoned images that accompany the clean task when it comes second
    config.stream.poisoned = 10  # poisoned images that accompany the clean task when it comes first
    config.stream.batch_size = 128
    config.stream.learning_rate = 0.1
    config.stream.schedule = "cosine"  # of every phase by itself
    config.stream.momentum = 0.9
    config.stream.weight_decay = 5e-4
    if size == "cpu":
        config.data.train_size = 5000
        config.stream.update(epochs=20, first_epochs=4, batch_size=64, poisoned=1, learning_rate=0.05)
    if size == "digits":
        config.stream.update(epochs=50, first_epochs=10, batch_size=32, poisoned=1)
        config.stream.poison_share = 0.1  # 13 images; at 1 % it is one, and the backdoor is forgotten
    return config

"""CIFAR-10 with CLIP's ViT-B/32 under a linear head, as in the paper (section 5.5): for a GPU or TPU.

python -m bibau_jax.main --config=configs/cifar10_vit.py:blended --workdir=runs/vit_blended \\
  --config.implant.start=clip_vit_b_32.pth

The file holds CLIP's weights, which OpenAI gives out as a program; where PyTorch and CLIP are installed, this saves them:
torch.save(clip.load("ViT-B/32", "cpu")[0].visual.state_dict(), "clip_vit_b_32.pth"). Without it, training begins at random.
"""

from configs import cifar10


def get_config(attack: str = "badnets"):
    """The paper's setting where it states it: ten epochs of all weights, batches of 64 for the defence."""
    config = cifar10.get_config(attack)
    config.model.name = "clip_vit_b_32"
    config.model.mean = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    config.model.std = (0.26862954, 0.26130258, 0.27577711)
    config.implant.epochs = 10
    config.implant.learning_rate = 0.01  # ours, as is the schedule: 0.1 is for networks that begin at random weights
    config.implant.schedule = "cosine"
    config.defense.batch_size = 64
    return config

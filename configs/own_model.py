"""A model that somebody else trained: is there a backdoor in it, and a purified one in the same format.

python -m bibau_jax.main --config=configs/own_model.py --workdir=runs/mine \
  --config.model.weights=suspect.pth --config.data.folder=clean/

`clean/` holds 100 to 5,000 labelled images, a folder a class; or clean.npz with images and labels.
"""

from configs import base


def get_config():
    """The same settings for every model, those of configs/cifar10_cpu.py but for what is said here."""
    config = base.get_config()
    config.stages = "scan,purify,verify,export,report"
    config.data.name = "own"
    config.data.flip = False  # a mirrored sign is another
    config.model.name = "auto"
    config.model.normalisation = "auto"
    config.implant.clean_twin = "none"
    config.defense.beside = ""
    config.defense.target_label = -1  # bibau_t takes the class that the scan suspects
    # A stranger's model may be sure of itself; then cross-entropy has no gradient, and L_kd decides alone what x' looks like.
    config.defense.attack_form = "margin"
    config.defense.lambda_kd = 0.1
    # Awake from the first step and never steep: clip(1/Q) throws a network that was trained long far off as it wakes.
    config.defense.iewc_form = "neg_log"
    config.defense.lambda_iewc = 1.0
    # Taught in part what the suspicious model makes of clean images: it costs less accuracy, and leaves more of some triggers.
    config.defense.softened = 0.5
    config.defense.epochs = 12
    base.tune_as_long(config)
    config.defense.batch_size = 64
    config.defense.learning_rate = 0.03
    config.defense.pgd.steps = 5
    # A trigger may be a few pixels that change much, which L2 does not come near; and some networks are harder to fool.
    config.defense.pgd.norm = "l1"
    config.defense.pgd.epsilon = 1500.0
    config.defense.pgd.step_size = 750.0
    config.defense.pgd.fooled = 0.9
    # With the target unknown an image goes wherever it is nearest; half of them go where the scan saw something, if it did.
    config.defense.pgd.aimed = 0.5
    config.reactivate.checks = ""
    config.reactivate.query.epochs = 20  # the paper's 50 take two and a half times as long
    config.reactivate.retuning.poisoned = 5  # the most that the paper gives any attack
    return config

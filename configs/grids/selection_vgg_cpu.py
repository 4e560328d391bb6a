"""How far must the adversarial images of the E-step lie, where a patch works only as a whole?

python -m bibau_jax.grid --grid=configs/grids/selection_vgg_cpu.py --workdir=runs/selection_vgg_cpu --jobs=2

A white square of 4 x 4 is up to 12,000 grey levels in L1, and what configs/grids/selection_norm_cpu.py chose by was a network
that answers to parts of it. This one, of another kind, sees every place by weights of its own. No result uses this seed or
these images.
"""

from bibau_jax import grid

SEED = 100
SETTINGS = {
    "implant.epochs": 6,
    "data.padding": 0,
    "data.flip": False,
    "attack.badnets.variant": "square",
    "attack.badnets.size": 4,
    "measured_on": "validation",
    "reactivate.checks": "retuning",
    "implant.clean_twin": "none",
    "defense.beside": "ft",
    # The terms of configs/own_model.py.
    "defense.attack_form": "margin",
    "defense.lambda_kd": 0.1,
    "defense.iewc_form": "neg_log",
    "defense.lambda_iewc": 1.0,
    "defense.softened": 0.5,
    "defense.pgd.norm": "l1",
    "defense.pgd.epsilon": 1500.0,
    "defense.pgd.step_size": 750.0,
    "defense.pgd.fooled": 0.9,
}


def within(epsilon, **more):
    """Settings for a bound in L1, with a step of half of it, that does not grow."""
    return {"pgd.epsilon": epsilon, "pgd.step_size": epsilon / 2, "pgd.fooled": 0.0} | more


AT = {"name": "base_at"}
VARIANTS = {
    "at": AT,
    "at_block4": AT | {"pgd.block": 4},
    "block4": {"pgd.block": 4},
    "at_6000": AT | within(6000.0),
    "at_12000": AT | within(12000.0),
    "6000": within(6000.0),
    "12000": within(12000.0),
    "at_3000": AT | within(3000.0),
    "at_6000_hard": AT | within(6000.0, softened=0.0),
}


def get_grid():
    """BI-BAU (U) and fine-tuning with the settings of configs/own_model.py, then variants in squares and further out."""
    return grid.runs("configs/cifar10_vgg_cpu.py", {"badnets": (SEED,)}, SETTINGS, grid.alone(VARIANTS))

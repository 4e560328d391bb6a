"""In which norm, and how far, may the adversarial images of the E-step lie from clean ones?

python -m bibau_jax.grid --grid=configs/grids/selection_norm_cpu.py --workdir=runs/selection_norm_cpu --jobs=2

A trigger may be fine and faint, or a few pixels that change much. Three that differ: BadNets with a grid, BadNets with a white
square, and Blended. Two models of others with a white square kept it under L2, Base AT's as well as BI-BAU's; robust training
takes away what is fine and faint first. No result uses this seed or these images.
"""

from bibau_jax import grid

SEED = 100
# The network of a stranger may know its images by heart; and where crops move it, a white square is lost on bright images.
SURE = {"data.padding": 0, "data.flip": False}
SQUARE = {"attack.badnets.variant": "square", "attack.badnets.size": 4}
OWN = {"attack_form": "margin", "lambda_kd": 0.1, "iewc_form": "neg_log", "lambda_iewc": 1.0}


def within(epsilon):
    """Settings for a bound in L1, with a step of half of it."""
    return {"pgd.norm": "l1", "pgd.epsilon": epsilon, "pgd.step_size": epsilon / 2}


VARIANTS = {
    "l2_50": OWN,
    "l1_800": OWN | within(800.0),
    "l1_1500": OWN | within(1500.0),
    "l1_1500_at": {"name": "base_at"} | OWN | within(1500.0),
    "l1_3000": OWN | within(3000.0),
}


def get_grid():
    """On each backdoored model the settings of our own networks, with fine-tuning and Base AT, and then the variants."""
    settings = SURE | {"measured_on": "validation", "reactivate.checks": "retuning", "implant.clean_twin": "none"}
    settings |= {"defense.beside": "ft,base_at", "defense.softened": 0.0}
    made, variants = {"badnets": (SEED,)}, grid.alone(VARIANTS)
    squares = [
        job._replace(name=job.name.replace("badnets", "square"), reuse=job.reuse.replace("badnets", "square"))
        for job in grid.runs("configs/cifar10_cpu.py", made, settings | SQUARE, variants)
    ]
    return grid.runs("configs/cifar10_cpu.py", made | {"blended": (SEED,)}, settings, variants) + squares

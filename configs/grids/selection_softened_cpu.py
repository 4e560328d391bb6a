"""Do images that are moved in L1 and softened labels help networks trained with crops and flips too?

python -m bibau_jax.grid --grid=configs/grids/selection_softened_cpu.py --workdir=runs/selection_softened_cpu --jobs=2

Both were chosen on networks that know their images by heart (configs/grids/selection_norm_cpu.py and
results/records/selection_own.json). Those of configs/cifar10_cpu.py lose some 10 points of clean accuracy to the paper's form
with 1,000 clean images. No result uses this seed or these images.
"""

from bibau_jax import grid

SEED = 100
SOFT = {"softened": 0.5}
L1 = {"pgd.norm": "l1", "pgd.epsilon": 1500.0, "pgd.step_size": 750.0}
OWN = {"attack_form": "margin", "lambda_kd": 0.1, "iewc_form": "neg_log", "lambda_iewc": 1.0}
AT, T = {"name": "base_at"}, {"name": "bibau_t"}

VARIANTS = {
    "soft": SOFT,
    "l1_soft": L1 | SOFT,
    "at_soft": AT | SOFT,
    "at_l1_soft": AT | L1 | SOFT,
    "own_l1_soft": OWN | L1 | SOFT,
    "l1": L1,
    "t_l1_soft": T | L1 | SOFT,
    "t_soft": T | SOFT,
}


def get_grid():
    """On each backdoored model the default settings, with fine-tuning and Base AT beside them, and then the variants."""
    settings = {"measured_on": "validation", "reactivate.checks": "retuning", "implant.clean_twin": "none"}
    settings |= {"defense.beside": "ft,base_at", "defense.softened": 0.0}
    attacks = {"badnets": (SEED,), "blended": (SEED,)}
    return grid.runs("configs/cifar10_cpu.py", attacks, settings, grid.alone(VARIANTS))

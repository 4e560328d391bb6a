"""The same question for networks that are sure of themselves: trained without crops and flips, they know their images by heart.

python -m bibau_jax.grid --grid=configs/grids/selection_sure_cpu.py --workdir=runs/selection_sure_cpu --jobs=2

No result uses these seeds or images; docs/reproduction.md tells what was chosen by them.
"""

from bibau_jax import grid

SEED = 100
SURE = {"data.padding": 0, "data.flip": False}
VARIANTS = {
    "margin01": {"attack_form": "margin", "lambda_kd": 0.1},
    "kd0": {"lambda_kd": 0.0},
    "kd01": {"lambda_kd": 0.1},
    "margin": {"attack_form": "margin"},
    "margin003": {"attack_form": "margin", "lambda_kd": 0.03},
    "bal05": {"attack_form": "margin", "balance": 0.5},
}


def get_grid():
    """The default settings with fine-tuning and Base AT beside them, then BI-BAU (U) alone with one thing changed."""
    settings = SURE | {"measured_on": "validation", "reactivate.checks": "retuning", "implant.clean_twin": "none"}
    settings |= {"defense.beside": "ft,base_at", "defense.softened": 0.0}
    return grid.runs("configs/cifar10_cpu.py", {"badnets": (SEED,), "blended": (SEED,)}, settings, grid.alone(VARIANTS))

"""Which settings, and which terms do what: BI-BAU (U) on validation images of the two attacks that choosing is allowed on.

python -m bibau_jax.grid --grid=configs/grids/selection_cpu.py --workdir=runs/selection_cpu --jobs=2

No result uses these seeds or images; docs/reproduction.md tells what was chosen by them.
"""

from bibau_jax import grid

SEED = 100
A, B = {"ablation": "+A"}, {"ablation": "+B"}
VARIANTS = {
    "b": B,
    "a": A,
    "ewc05": {"lambda_ewc": 0.5},
    "iewc30": {"lambda_iewc": 30.0},
    # each term alone
    "iewc": B | {"lambda_prior": 0.0},
    "prior": B | {"lambda_iewc": 0.0},
    "ewc": A | {"lambda_kd": 0.0},
    "kd": A | {"lambda_ewc": 0.0},
    # other readings and forms
    "true": {"unlearning_labels": "true"},
    "hinge": {"iewc_form": "hinge"},
    # how much x' must keep its meaning, and how it is counted that the suspicious model is fooled
    "margin": {"attack_form": "margin"},
    "kd01": {"lambda_kd": 0.1},
    "margin01": {"attack_form": "margin", "lambda_kd": 0.1},
    "bal05": {"attack_form": "margin", "balance": 0.5},
}


def get_grid():
    """The default settings with everything beside them, then BI-BAU (U) alone with one thing changed."""
    settings = {"measured_on": "validation", "reactivate.checks": "retuning,bec", "defense.softened": 0.0}
    return grid.runs("configs/cifar10_cpu.py", {"badnets": (SEED,), "blended": (SEED,)}, settings, grid.alone(VARIANTS))

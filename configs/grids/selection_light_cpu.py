"""Within the paper's own bound, how much of A (L_kd, L_ewc) can BI-BAU bear? Validation images, seed 100.

python -m bibau_jax.grid --grid=configs/grids/selection_light_cpu.py --workdir=runs/selection_softened_cpu --jobs=2

configs/grids/ablation_cpu.py found that within L2 25 B alone unlearns and that A, at its weights, undoes it: weights that were
chosen within twice that bound, where adversarial training alone unlearns and hides what A does. It takes the backdoored model
of configs/grids/selection_softened_cpu.py. No result uses this seed or these images.
"""

from pathlib import Path

from bibau_jax import grid

BOUND = {"softened": 0.0, "pgd.epsilon": 25.0, "pgd.step_size": 7.5}
WEIGHTS = {"kd1_ewc1e1": (1.0, 0.1), "kd1e1_ewc1e2": (0.1, 0.01), "kd1e1_ewc1e1": (0.1, 0.1), "kd1_ewc1e2": (1.0, 0.01)}
VARIANTS = {f"l2_25_{name}": BOUND | {"lambda_kd": kd, "lambda_ewc": ewc} for name, (kd, ewc) in WEIGHTS.items()}
VARIANTS["l2_25_b"] = BOUND | {"ablation": "+B"}
VARIANTS["l2_25_at"] = BOUND | {"name": "base_at"}
VARIANTS["l2_25_t"] = BOUND | {"name": "bibau_t", "lambda_kd": 0.1, "lambda_ewc": 0.01}


def get_grid():
    """BI-BAU (U) with each pair of weights, B alone, Base AT, and (T) with the lightest, on BadNets."""
    theirs = grid.read(str(Path(__file__).with_name("selection_softened_cpu.py")))
    return grid.variants(theirs, ["badnets_100"], grid.alone(VARIANTS))

"""What eta does (Figure 7), at the size of two CPU cores, on the two attacks that settings may be chosen on.

python -m bibau_jax.grid --grid=configs/grids/eta_cpu.py --workdir=runs/reactivation_cpu --jobs=2
"""

from bibau_jax import grid

ETAS = {"eta0": 0.0, "eta25": 0.25, "eta75": 0.75, "eta100": 1.0}  # 0.5 is the run itself


def get_grid():
    """BI-BAU (U) alone on the backdoored models of configs/grids/reactivation_cpu.py where these are there."""
    variants = grid.alone({name: {"eta": eta} for name, eta in ETAS.items()})
    checks = {"reactivate.checks": "retuning,query,bec,orthogonality,linearity,path,features"}
    return grid.runs("configs/cifar10_cpu.py", {"badnets": (0,), "blended": (0,)}, checks, variants)

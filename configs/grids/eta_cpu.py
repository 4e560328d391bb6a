"""What eta does (Figure 7), at the size of two CPU cores, on an attack that settings may be chosen on and one other.

python -m bibau_jax.grid --grid=configs/grids/eta_cpu.py --workdir=runs/reactivation_cpu --jobs=2
"""

from pathlib import Path

from bibau_jax import grid

ETAS = {"eta0": 0.0, "eta25": 0.25, "eta75": 0.75, "eta100": 1.0}  # 0.5: hard_labels_cpu.py
ATTACKS = ("badnets", "iad")


def get_grid():
    """BI-BAU (U) alone on the backdoored models of configs/grids/reactivation_cpu.py."""
    theirs = grid.read(str(Path(__file__).with_name("reactivation_cpu.py")))
    changes = grid.alone({name: {"eta": eta, "softened": 0.0} for name, eta in ETAS.items()})
    return grid.variants(theirs, [f"{attack}_0" for attack in ATTACKS], changes, {"reactivate.checks": "retuning,query,bec"})

"""Is it really gone? Every attack at the size of two CPU cores, purified and called back: results/reactivation_cpu.md.

python -m bibau_jax.grid --grid=configs/grids/reactivation_cpu.py --workdir=runs/reactivation_cpu --jobs=2
"""

from bibau_jax import grid

THRICE = ("badnets", "blended", "sig", "adap_blend")
ONCE = ("refool", "wanet", "iad", "issba", "narcissus", "adap_patch", "enhanced_adap_blend", "enhanced_adap_patch")
CHECKS = "retuning,query,bec,orthogonality"


def get_grid():
    """One seed of every attack with all checks; two more of four attacks with those that tables show."""
    # Made while half of what the M-step teaches was softened by default; hard_labels_cpu.py has them by true labels alone.
    first = {"reactivate.checks": f"{CHECKS},linearity,path,features", "defense.softened": 0.5}
    further = {"reactivate.checks": CHECKS}
    config = "configs/cifar10_cpu.py"
    return [
        *grid.runs(config, dict.fromkeys((*THRICE, *ONCE), (0,)), first),
        *grid.runs(config, dict.fromkeys(THRICE, (1, 2)), further),
    ]

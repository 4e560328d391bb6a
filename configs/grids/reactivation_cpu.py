"""Is it really gone? Every attack at the size of two CPU cores, purified and called back: results/reactivation_cpu.md.

python -m bibau_jax.grid --grid=configs/grids/reactivation_cpu.py --workdir=runs/reactivation_cpu --jobs=2
"""

from bibau_jax import grid

THRICE = ("badnets", "blended", "sig", "adap_blend")
ONCE = ("refool", "wanet", "iad", "issba", "narcissus", "adap_patch", "enhanced_adap_blend", "enhanced_adap_patch")


def get_grid():
    """Three seeds of four attacks, one of the others."""
    seeds = {name: (0, 1, 2) for name in THRICE} | {name: (0,) for name in ONCE}
    checks = {"reactivate.checks": "retuning,query,bec,orthogonality,linearity,path,features"}
    return grid.runs("configs/cifar10_cpu.py", seeds, checks)

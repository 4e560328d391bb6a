"""Which term does it? Table 6 at the size of two CPU cores: neither A nor B, each alone, both; results/ablation_cpu.md.

python -m bibau_jax.grid --grid=configs/grids/ablation_cpu.py --workdir=runs/reactivation_cpu --jobs=2
"""

from bibau_jax import grid


def get_grid():
    """The paper's four attacks, on the backdoored models of configs/grids/reactivation_cpu.py where these are there."""
    ablations = grid.alone({"a": {"ablation": "+A"}, "b": {"ablation": "+B"}})
    checks = {"reactivate.checks": "retuning,query,bec,orthogonality,linearity,path,features"}
    seeds = dict.fromkeys(("badnets", "refool", "iad", "issba"), (0,))
    return grid.runs("configs/cifar10_cpu.py", seeds, checks, ablations)

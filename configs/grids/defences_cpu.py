"""The defences side by side at the size of two CPU cores, each called back: results/defences_cpu.md.

python -m bibau_jax.grid --grid=configs/grids/defences_cpu.py --workdir=runs/reactivation_cpu --jobs=2

It takes the backdoored models and clean twins of configs/grids/reactivation_cpu.py, in whose runs FT, Base AT, BI-BAU and
IBU stand.
"""

from bibau_jax import grid

CONFIG = "configs/cifar10_cpu.py"
SEEDS = {"badnets": (0, 1, 2), "blended": (0, 1, 2), "wanet": (0,), "sig": (0,), "adap_blend": (0,)}
OTHERS = {"defense.name": "nc", "defense.beside": "bti_dbf,pam,anp,rnp,clp,ep,bnp,i_bau,sau,nad"}
# What a defence costs a model without a backdoor, and whether it cries wolf.
INNOCENT = {"implant.innocent": True, "defense.name": "bibau_u"}
INNOCENT |= {"defense.beside": "ft,base_at,bibau_t,nc,bti_dbf,pam,anp,rnp,clp,ep,bnp,i_bau,sau,nad"}


def get_grid():
    """One more run on every backdoored model, with the other defences; and one on clean twins, with all."""
    checks = {"reactivate.checks": "retuning,query,bec"}
    twins = grid.runs(CONFIG, {"badnets": (0, 1, 2)}, {"reactivate.checks": ""}, {"innocent": INNOCENT})
    return [*grid.runs(CONFIG, SEEDS, checks, {"others": OTHERS}), *(job for job in twins if job.reuse)]

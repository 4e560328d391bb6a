"""The defences side by side at the size of two CPU cores, each called back: results/defences_cpu.md.

python -m bibau_jax.grid --grid=configs/grids/defences_cpu.py --workdir=runs/reactivation_cpu --jobs=2

It takes the backdoored models and clean twins of configs/grids/reactivation_cpu.py, in whose runs FT, Base AT, BI-BAU and
IBU stand.
"""

from pathlib import Path

from bibau_jax import grid

ONCE = ("wanet", "sig", "adap_blend")
THRICE = ("badnets", "blended")
OTHERS = {"defense.name": "nc", "defense.beside": "bti_dbf,pam,anp,rnp,clp,ep,bnp,i_bau,sau,nad"}
# What a defence costs a model without a backdoor, and whether it cries wolf.
INNOCENT = {"implant.innocent": True, "defense.name": "bibau_u", "reactivate.checks": ""}
INNOCENT |= {"defense.beside": "ft,base_at,bibau_t,nc,bti_dbf,pam,anp,rnp,clp,ep,bnp,i_bau,sau,nad"}


def get_grid():
    """One more run on every backdoored model, with the other defences; and one on clean twins, with all."""
    theirs = grid.read(str(Path(__file__).with_name("reactivation_cpu.py")))
    names = [f"{attack}_{seed}" for attack in THRICE for seed in range(3)] + [f"{attack}_0" for attack in ONCE]
    made = grid.variants(theirs, names, {"others": OTHERS}, {"reactivate.checks": "retuning,query,bec"})
    twins = grid.variants(theirs, [f"badnets_{seed}" for seed in range(3)], {"innocent": INNOCENT})
    return made + [job for job in twins if job.reuse]

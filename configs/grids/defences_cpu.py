"""The defences side by side at the size of two CPU cores, each called back: results/defences_cpu.md.

python -m bibau_jax.grid --grid=configs/grids/defences_cpu.py --workdir=runs/reactivation_cpu --jobs=2

It takes the backdoored models and clean twins of configs/grids/reactivation_cpu.py, in whose runs FT and IBU stand; Base AT and
BI-BAU stand there too, or, of seed 0, in those of configs/grids/hard_labels_cpu.py.
"""

from pathlib import Path

from bibau_jax import grid

ONCE = ("wanet", "sig", "adap_blend")
THRICE = ("badnets", "blended")
OTHERS = {"defense.name": "nc", "defense.beside": "bti_dbf,pam,anp,rnp,clp,ep,bnp,i_bau,sau,nad"}
# Networks that were treated before NAD had its authors' cutout and ANP and RNP might lose 4 points, and what changed since.
BEFORE = ("badnets_0", "blended_0", "blended_1", "wanet_0", "sig_0", "adap_blend_0")
TWENTY = {"defense.rnp.recover_epochs": 20}
OLD = OTHERS | {"defense.nad.cutout": 0, "defense.anp.max_loss": 0.02, "defense.rnp.max_loss": 0.02}
OLD |= TWENTY
AGAIN = TWENTY | {"defense.name": "nad", "defense.beside": "anp,rnp"}
RNP = {"defense.name": "rnp", "defense.beside": ""}  # at last in as many steps as its authors take
# As many steps as its authors take; the CPU size's own 8 epochs are 120.
LONG = {"defense.name": "ft", "defense.beside": "", "defense.epochs": 67}
# What a defence costs a model without a backdoor, and whether it cries wolf.
INNOCENT = {"implant.innocent": True, "defense.name": "bibau_u", "defense.softened": 0.0, "reactivate.checks": ""}
INNOCENT |= {"defense.beside": "ft,base_at,bibau_t,nc,bti_dbf,pam,anp,rnp,clp,ep,bnp,i_bau,sau,nad"}


def get_grid():
    """On every backdoored model the other defences, and FT for longer; on clean twins all of them."""
    theirs = grid.read(str(Path(__file__).with_name("reactivation_cpu.py")))
    names = [f"{attack}_{seed}" for attack in THRICE for seed in range(3)] + [f"{attack}_0" for attack in ONCE]
    checks = {"reactivate.checks": "retuning,query,bec"}
    made = grid.variants(theirs, BEFORE, {"others": OLD, "again": AGAIN, "rnp": RNP, "ft_long": LONG}, checks)
    after = [name for name in names if name not in BEFORE]
    made += grid.variants(theirs, after, {"others": OTHERS, "ft_long": LONG}, checks)
    made += grid.variants(theirs, [f"badnets_{seed}" for seed in range(3)], {"innocent": INNOCENT})
    return list({job.name: job for job in made}.values())

"""Why some defences fell short of their papers on BadNets at the size of two CPU cores: the same network, other settings.

python -m bibau_jax.grid --grid=configs/grids/shortfalls_cpu.py --workdir=runs/reactivation_cpu --jobs=2

It is measured on test images, so nothing is chosen by it. What it is compared with stands in results/defences_cpu.md.
"""

from pathlib import Path

from bibau_jax import grid

# As many steps as its authors take of 2,500 images in batches of 64, at their rates.
NAD = {"name": "nad", "nad.epochs": 52, "nad.teacher_epochs": 26, "nad.drops": (5, 52)}
NAD |= {"nad.learning_rate": 0.1, "nad.teacher_rate": 0.01}
UNCUT = {"nad.cutout": 0}
# Likewise, of batches of 128; its generator stays narrow.
BTI_DBF = {"name": "bti_dbf", "bti_dbf.rounds": 5, "bti_dbf.learning_rate": 1e-4, "bti_dbf.pretrain_epochs": 66}
BTI_DBF |= {"bti_dbf.mask_epochs": 26, "bti_dbf.generator_epochs": 40, "bti_dbf.epochs": 40}
CHANGES = {
    "nad_cutout": {"name": "nad"},
    "ft_cutout": {"name": "ft", "cutout": 9},  # is it the distillation or the squares?
    "ft_long_cutout": {"name": "ft", "cutout": 9, "epochs": 67},
    "nad_long": NAD | UNCUT,
    "nad_long_cutout": NAD,
    "rnp_loss4": {"name": "rnp", "rnp.max_loss": 0.04, "rnp.recover_epochs": 20},
    "anp_loss4": {"name": "anp", "anp.max_loss": 0.04},
    "clp_u3": {"name": "clp", "clp.u": 3.0},
    "bti_dbf_long": BTI_DBF,
}
PAM = {"name": "pam", "pam.rounds": 3, "pam.rho": 0.5}
PAM |= {f"pam.{name}": BTI_DBF[f"bti_dbf.{name}"] for name in ("pretrain_epochs", "mask_epochs", "generator_epochs", "epochs")}
OTHER_SEEDS = {
    "badnets_1": {"pam_long": PAM},
    # The first steps take this network apart: are they too large, or is it the teacher's rate, three times its authors'?
    "badnets_2": {
        "nad_rate02": {"name": "nad", "nad.learning_rate": 0.02},
        "nad_rate01": {"name": "nad", "nad.learning_rate": 0.01},
        "nad_teacher01": {"name": "nad", "nad.teacher_rate": 0.01},
    },
}


def get_grid():
    """One defence a run on the backdoored model of configs/grids/reactivation_cpu.py."""
    theirs = grid.read(str(Path(__file__).with_name("reactivation_cpu.py")))
    made = {}
    for name, changes in {"badnets_0": CHANGES, **OTHER_SEEDS}.items():
        made |= {job.name: job for job in grid.variants(theirs, [name], grid.alone(changes), {"reactivate.checks": ""})}
    return list(made.values())

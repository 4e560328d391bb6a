"""Every attack purified as a stranger's model is, by the settings of configs/own_model.py after a scan.

python -m bibau_jax.grid --grid=configs/grids/stranger_cpu.py --workdir=runs/reactivation_cpu --jobs=2

The backdoored models, clean images and checks are those of configs/grids/reactivation_cpu.py, so its rows stand beside.
"""

from pathlib import Path

from bibau_jax import grid
from configs import cifar10_cpu, own_model

SETTINGS = (
    "attack_form",
    "lambda_kd",
    "iewc_form",
    "lambda_iewc",
    "softened",
    "epochs",
    "batch_size",
    "learning_rate",
    "target_label",
)
ASCENT = ("steps", "norm", "epsilon", "step_size", "fooled", "aimed")


def get_grid():
    """BI-BAU (U) alone on the first seed of every attack, with whatever configs/own_model.py sets otherwise."""
    ours, here = own_model.get_config().defense, cifar10_cpu.get_config().defense
    changes = {name: ours[name] for name in SETTINGS if ours[name] != here[name]}
    changes |= {f"pgd.{name}": ours.pgd[name] for name in ASCENT if ours.pgd[name] != here.pgd[name]}
    theirs = grid.read(str(Path(__file__).with_name("reactivation_cpu.py")))
    names = [job.name for job in theirs if job.settings["seed"] == 0]
    settings = {"stages": "scan,purify,evaluate,reactivate,report", "reactivate.checks": "retuning,query,bec"}
    return grid.variants(theirs, names, grid.alone({"own": changes}), settings)

"""Settings of the other defences for the digits: sets of candidates, on validation images of BadNets and Blended, seed 100.

python -m bibau_jax.grid --grid=configs/grids/selection_digits.py --workdir=runs/selection_digits --jobs=2

Their authors' settings are for 2,500 images and some thousand steps; here are 300 images, and a run should take minutes. No
result uses this seed or these images.
"""

from bibau_jax import grid
from configs import base, digits

# A quarter of the generator's width, shorter rounds: with 32 channels one step takes seconds on a CPU.
REVERSED = {"pretrain_epochs": 10, "mask_epochs": 10, "generator_epochs": 15, "epochs": 10, "width": 8, "batch_size": 48}
CANDIDATES = {
    "theirs": {"nc": {}, "sau": {}, "nad": {}, "anp": {}, "rnp": {}, "i_bau": {}, "clp": {}, "bnp": {}, "ep": {}},
    "a": {
        "sau": {"epochs": 30, "batch_size": 48, "learning_rate": 1e-3},
        "nad": {"batch_size": 48, "learning_rate": 0.03, "teacher_rate": 0.1},
        "anp": {"iterations": 120, "batch_size": 48, "learning_rate": 0.1, "epsilon": 0.2, "max_loss": 0.04},
        "rnp": {"batch_size": 48, "unlearn_rate": 1e-3, "unlearned": 0.4, "recover_epochs": 12, "max_loss": 0.04},
        "i_bau": {"batch_size": 48, "epochs": 10},
        "bti_dbf": REVERSED | {"rounds": 2, "learning_rate": 1e-3, "share": 0.2},
        "pam": REVERSED | {"rounds": 2, "learning_rate": 0.05, "rho": 0.3},
        "clp": {"u": 2.0},
        "bnp": {"u": 2.0},
        "ep": {"u": 2.0},
    },
    "b": {
        "nc": {"inversion_epochs": 40, "enough": 0.95, "patience": 2},
        "sau": {"epochs": 30, "batch_size": 48, "learning_rate": 1e-3, "epsilon": 102.0, "step_size": 102.0},
        "nad": {"batch_size": 48, "learning_rate": 0.1, "teacher_rate": 0.3},
        "anp": {"iterations": 300, "batch_size": 48, "learning_rate": 0.2, "epsilon": 0.4, "max_loss": 0.04},
        "rnp": {"batch_size": 48, "unlearn_rate": 3e-3, "unlearned": 0.2, "recover_epochs": 40, "max_loss": 0.04},
        "i_bau": {"batch_size": 48, "epochs": 10, "learning_rate": 3e-3},
        "bti_dbf": REVERSED | {"rounds": 2, "learning_rate": 5e-3, "share": 0.5},
        "pam": REVERSED | {"rounds": 2, "learning_rate": 0.1, "momentum": 0.5, "share": 0.5, "rho": 0.1},
        "clp": {"u": 4.0},
    },
    "c": {
        "rnp": {"batch_size": 48, "unlearn_rate": 1e-3, "unlearned": 0.4, "recover_epochs": 40, "max_loss": 0.08},
        "pam": REVERSED | {"rounds": 2, "learning_rate": 0.1, "share": 0.5, "rho": 0.5},
        "sau": {"epochs": 60, "batch_size": 48, "learning_rate": 1e-3, "epsilon": 102.0, "step_size": 102.0},
        "clp": {"u": 1.5},
    },
}


def _plain(name: str) -> dict:
    """What a section of configs/digits.py was before anything was chosen, where that differs: its authors' settings."""
    ours, theirs = digits.get_config().defense[name], base.get_config().defense[name]
    of_the_images = {"nc": ("epochs",), "nad": ("cutout",)}.get(name, ())  # as long as FT; as large a square for digits
    return {key: value for key, value in theirs.items() if value != ours[key] and key not in of_the_images}


def get_grid():
    """One run a set of candidates and attack, all of its defences beside each other; not called back."""
    jobs = []
    for attack in ("badnets", "blended"):
        name = f"{attack}_100"
        settings = {"seed": 100, "measured_on": "validation", "reactivate.checks": ""}
        settings |= {"defense.name": "ft", "defense.beside": ""}
        jobs.append(grid.Job(name, f"configs/digits.py:{attack}", settings))
        for suffix, sections in CANDIDATES.items():
            first, *others = sections
            changed = {"defense.name": first, "defense.beside": ",".join(others)}
            for one, given in sections.items():
                changed |= {f"defense.{one}.{key}": value for key, value in (_plain(one) | given).items()}
            jobs.append(grid.Job(f"{name}_{suffix}", f"configs/digits.py:{attack}", settings | changed, reuse=name, twin=name))
    return jobs

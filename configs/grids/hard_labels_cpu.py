"""What softened labels cost and gain: every attack purified by true labels alone, as the paper has it.

python -m bibau_jax.grid --grid=configs/grids/hard_labels_cpu.py --workdir=runs/reactivation_cpu --jobs=2

The backdoored models, clean images and checks are those of configs/grids/reactivation_cpu.py, so its rows stand beside.
"""

from pathlib import Path

from bibau_jax import grid

HARD = {"defense.softened": 0.0, "defense.beside": "base_at,bibau_t"}


def get_grid():
    """Base AT, BI-BAU (T) and (U) on every backdoored model that was purified by softened labels, called back."""
    theirs = grid.read(str(Path(__file__).with_name("reactivation_cpu.py")))
    names = [job.name for job in theirs if job.settings.get("defense.softened")]
    return grid.variants(theirs, names, {"hard": HARD}, {"reactivate.checks": "retuning,query,bec,path,features"})

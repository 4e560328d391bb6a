"""How often does the defence NC cry wolf? Digit models with a backdoor and their clean twins: results/nc_alarms.md.

python -m bibau_jax.grid --grid=configs/grids/alarms_digits.py --workdir=runs/scan_digits --jobs=2

It takes the models of configs/grids/scan_digits.py.
"""

from pathlib import Path

from bibau_jax import grid

NC = {"defense.name": "nc", "defense.beside": "", "stages": "purify,evaluate,report", "reactivate.checks": ""}


def get_grid():
    """NC on every backdoored model and on every twin, with its authors' settings and limit."""
    theirs = grid.read(str(Path(__file__).with_name("scan_digits.py")))
    models = [job.name for job in theirs if not job.reuse]
    return grid.variants(theirs, models, {"nc": NC, "nc_innocent": NC | {"implant.innocent": True}})

"""Which backdoors does the scan see, and where does it cry wolf? The models of reactivation_cpu.py, scanned: results/scan.md.

python -m bibau_jax.grid --grid=configs/grids/scan_cpu.py --workdir=runs/reactivation_cpu --jobs=2
"""

from pathlib import Path

from bibau_jax import grid


def get_grid():
    """A scan of every backdoored model of that grid, and of every clean twin that one of its runs trained."""
    made = []
    for job in grid.read(str(Path(__file__).with_name("reactivation_cpu.py"))):
        scanned = job._replace(name=f"{job.name}_scan", settings=job.settings | {"stages": "scan,report"}, reuse=job.name)
        made += [job, scanned]
        if not job.twin:
            innocent = scanned.settings | {"implant.innocent": True}
            made.append(scanned._replace(name=f"{job.name}_innocent_scan", settings=innocent))
    return made

"""Many runs from one list, several at a time: attacks x seeds x variants, sharing backdoored models and clean twins.

python -m bibau_jax.grid --grid=configs/grids/reactivation_cpu.py --workdir=runs/reactivation_cpu --jobs=2

Every run is a process of its own. What is recorded is not run again; a run that was killed goes on from its last checkpoint
when the same command is given again, and one that fails stops only those that need its models.
"""

import argparse
import contextlib
import fcntl
import json
import os
import queue
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

from bibau_jax import progress, records
from bibau_jax.errors import NOT_APPLICABLE, UserError, say
from bibau_jax.workdir import differences

LOG = "grid.jsonl"  # one line a finished or failed run


class Job(NamedTuple):
    """One run: its name (and folder), its config file, settings that differ, and the runs whose models it takes.

    `settings` are flat, {"defense.ablation": "+A"}. `reuse` names the run whose backdoored model it takes, `twin` the one that
    trained the clean twin; "" where it trains its own (or, with `implant.clean_twin="none"` among the settings, has none).
    """

    name: str
    config: str
    settings: dict = {}
    reuse: str = ""
    twin: str = ""

    @property
    def needs(self) -> set[str]:
        """The runs that must be finished before."""
        return {self.reuse, self.twin} - {""}

    def command(self, workdir: str) -> list[str]:
        """The command line that makes this run, without the interpreter."""
        given = dict(self.settings)
        given |= {"implant.reuse": str(Path(workdir) / self.reuse)} if self.reuse else {}
        given |= {"implant.clean_twin": str(Path(workdir) / self.twin)} if self.twin else {}
        changed = [f"--config.{name}={_text(value)}" for name, value in given.items()]
        return ["-m", "bibau_jax.main", f"--config={self.config}", f"--workdir={Path(workdir) / self.name}", *changed]


def _text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def runs(
    config: str, seeds: dict[str, Iterable[int]], settings: dict | None = None, variants: dict[str, dict] | None = None
) -> list[Job]:
    """Jobs for every attack and seed, and for every variant of settings on the same backdoored model.

    `config` is a file that takes the attack's name ("configs/cifar10_cpu.py"), `seeds` maps attacks to their seeds. The first
    attack of a seed trains the clean twin, the others take it from there (none does with `implant.clean_twin="none"` among the
    settings). `variants` maps a suffix to further settings.
    """
    made, twins = [], {}
    alone = (settings or {}).get("implant.clean_twin") == "none"
    for attack, numbers in seeds.items():
        for seed in numbers:
            name, given = f"{attack}_{seed}", (settings or {}) | {"seed": seed}
            made.append(Job(name, f"{config}:{attack}", given, twin=twins.get(seed, "")))
            twin = "" if alone else twins.setdefault(seed, name)
            for suffix, changes in (variants or {}).items():
                made.append(Job(f"{name}_{suffix}", f"{config}:{attack}", given | changes, reuse=name, twin=twin))
    return made


def variants(jobs: list[Job], names: Iterable[str], changes: dict[str, dict], settings: dict | None = None) -> list[Job]:
    """Those of the jobs that are named, just as they are listed, with what they need; after each its variants.

    So runs of another grid are taken over and not made again. A variant has the settings of its job, then `settings`, then its
    own `changes`, by suffix; it takes the job's backdoored model and clean twin.
    """
    listed, names = {job.name: job for job in jobs}, list(names)
    if unknown := [name for name in names if name not in listed]:
        raise UserError(f"there is no run {unknown[0]} to take variants of")
    wanted = {need for name in names for need in (name, *listed[name].needs)}
    made = []
    for job in (listed[name] for name in listed if name in wanted):
        made.append(job)
        for suffix, changed in changes.items() if job.name in names else ():
            given = job.settings | (settings or {}) | changed
            twin = "" if given.get("implant.clean_twin") == "none" else job.twin or job.name
            made.append(Job(f"{job.name}_{suffix}", job.config, given, reuse=job.name, twin=twin))
    return made


def alone(changes: dict[str, dict]) -> dict[str, dict]:
    """Variants, by suffix, that purify by the main defence alone, with these settings of it: {"kd0": {"lambda_kd": 0.0}}."""
    return {
        suffix: {"defense.beside": ""} | {f"defense.{name}": value for name, value in settings.items()}
        for suffix, settings in changes.items()
    }


def read(path: str) -> list[Job]:
    """The jobs that a grid file's `get_grid()` lists; UserError where it cannot be read or names are wrong."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, not a grid file")
    try:
        listed = runpy.run_path(path)
        if "get_grid" not in listed:
            raise UserError(f"{path} has no function get_grid")
        jobs = list(listed["get_grid"]())
        names = [job.name for job in jobs]
        [(job.needs, job.command) for job in jobs]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except Exception as error:  # anything can go wrong in a file of the user's
        raise UserError(f"{path} cannot be used as a grid: {type(error).__name__}: {error}") from error
    for job in jobs:
        if names.count(job.name) > 1:
            raise UserError(f"{path} lists {job.name} twice")
        if lost := job.needs - set(names[: names.index(job.name)]):
            raise UserError(f"{path}: {job.name} needs {', '.join(sorted(lost))}, which is not listed before it")
    return jobs


class Outcome(NamedTuple):
    """How a run ended: exit status (negative for a signal), seconds, and the last line that it said."""

    name: str
    status: int
    seconds: float
    said: str


def done(workdir: Path, jobs: list[Job], status: int = 0) -> set[str]:
    """The jobs that ended so with the very command they have now; of finished ones (0) the record must be there."""
    log = workdir / LOG
    told = {entry.get("name"): entry for entry in records.read_lines(log)} if log.exists() else {}
    return {
        job.name
        for job in jobs
        if told.get(job.name, {}).get("status") == status
        and told[job.name].get("command") == " ".join(job.command(str(workdir)))
        and (status or _is_whole(workdir / job.name / "record.json"))
    }


def _is_whole(path: Path) -> bool:
    """Whether a record is there and can be read; what is damaged is left to the run itself, which tells it."""
    try:
        records.read(path)
    except UserError:
        return False
    return True


def otherwise(workdir: Path, jobs: list[Job]) -> dict[str, list[str]]:
    """What was recorded with other settings than its config file now has, by name: the settings that differ, "old -> new"."""
    found = {}
    for job in jobs:
        with contextlib.suppress(UserError):  # none, or a damaged one, which the run itself is told
            recorded = records.read(workdir / job.name / "record.json").config
            if changed := differences(recorded, _as_settled(_config(job), recorded)):
                found[job.name] = changed
    return found


def _config(job: Job) -> dict:
    """The config that the job's command gives, before the program settles what it leaves open."""
    path, _, argument = job.config.partition(":")
    try:
        made = runpy.run_path(path)["get_config"]
        config = made(argument) if argument else made()
        config.update_from_flattened_dict(job.settings)
    except Exception as error:  # anything can go wrong in a file of the user's; the run itself would end by it
        raise UserError(f"{job.name}: {job.config} cannot be used as a config: {type(error).__name__}: {error}") from error
    return json.loads(json.dumps(config.to_dict()))


def _as_settled(config: dict, recorded: dict) -> dict:
    """The config with what it leaves open as it was recorded."""
    made = {}
    for name, value in config.items():
        known = recorded.get(name)
        if isinstance(value, dict):
            made[name] = _as_settled(value, known if isinstance(known, dict) else {})
        else:
            is_open = value is None or (name == "poison_ratio" and not value)
            made[name] = known if is_open and name in recorded else value
    return made


def one(command: list[str], folder: str, cores: tuple[int, ...] = ()) -> Outcome:
    """Runs one job to its end, what it says in `<folder>.log`; waits where another process still works on it."""
    path, begun = Path(folder), time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    if cores:
        os.sched_setaffinity(0, cores)  # of this thread, and of the process that it starts
    with open(path.with_name(path.name + ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held by the run itself, should this process be killed
        if _stopping.is_set():
            return Outcome(path.name, -signal.SIGTERM, 0.0, "not begun")
        with open(path.with_name(path.name + ".log"), "a") as log:
            running = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock.fileno(),)
            )
            _running.add(running)
            try:
                status = running.wait()
            finally:
                _running.discard(running)
    said = [line for line in path.with_name(path.name + ".log").read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(path.name, status, time.monotonic() - begun, said[-1] if said else "")


_running: set[subprocess.Popen] = set()
_stopping = threading.Event()


class _Local:
    """Runs on this machine, `jobs` at a time, each on its share of the cores."""

    def __init__(self, jobs: int):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        share = len(cores) // jobs
        self.cores = queue.SimpleQueue()
        for number in range(jobs):
            self.cores.put(tuple(cores[number * share : (number + 1) * share]))
        self.pool = futures.ThreadPoolExecutor(jobs)

    def submit(self, command: list[str], folder: str) -> futures.Future:
        def work():
            cores = self.cores.get()
            try:
                return one(command, folder, cores)
            finally:
                self.cores.put(cores)

        return self.pool.submit(work)


class _Ray:
    """Runs on a Ray cluster that shares this machine's file system; `address` "local" starts one here."""

    def __init__(self, address: str, cpus: float, gpus: float):
        try:
            import ray
        except ImportError:
            raise UserError("--ray needs Ray: pip install bibau_jax[grid]") from None
        ray.init(address=address, log_to_driver=False)
        self.remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(_elsewhere)

    def submit(self, command: list[str], folder: str) -> futures.Future:
        return self.remote.remote(os.getcwd(), command, folder).future()


def _elsewhere(place: str, command: list[str], folder: str) -> Outcome:
    """What a Ray worker does; it takes this module by its name, because started as a program it is another one."""
    from bibau_jax import grid

    os.chdir(place)
    return grid.one(command, folder)


def run(jobs: list[Job], workdir: str, engine) -> list[Outcome]:
    """Runs what is not done yet, each after those whose models it takes; returns the outcomes of those that failed."""
    place, going, failed = Path(workdir), {}, []
    place.mkdir(parents=True, exist_ok=True)
    if changed := otherwise(place, jobs):
        name, told = next(iter(changed.items()))
        raise UserError(f"{place / name} was recorded with other settings ({'; '.join(told)}); choose another --workdir")
    finished = done(place, jobs)
    unfit = done(place, jobs, NOT_APPLICABLE)
    waiting = {job.name: job for job in jobs if job.name not in finished | unfit}
    if finished:
        progress.say(f"grid: {len(finished)} of {len(jobs)} runs are recorded")
    with progress.bar(len(jobs), "grid", unit="run", start=len(finished | unfit), first="the first one runs") as bar:
        while waiting or going:
            for name in [name for name, job in waiting.items() if job.needs <= finished]:
                job = waiting.pop(name)
                going[engine.submit(job.command(workdir), str(place / name))] = job
            if not going:
                break  # what is left needs runs that failed
            ended, _ = futures.wait(going, return_when=futures.FIRST_COMPLETED)
            for future in ended:
                job, outcome = going.pop(future), future.result()
                told = {"name": job.name, "status": outcome.status, "seconds": round(outcome.seconds, 1)}
                records.append(place / LOG, **told, said=outcome.said, command=" ".join(job.command(workdir)))
                if outcome.status == NOT_APPLICABLE:
                    progress.say(f"grid: {job.name}: {outcome.said.removeprefix('bibau_jax: ')}")
                    bar.advance()
                elif outcome.status == 0:
                    finished.add(job.name)
                    bar.advance()
                else:
                    failed.append(outcome)
                    progress.say(f"grid: {job.name} failed: {outcome.said}")
    if waiting:
        progress.say(f"grid: not run, for want of what they need: {', '.join(waiting)}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 where every run is recorded, 1 where some failed, 2 after one line on what was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bibau_jax.grid", description="Many runs from one list.")
    parser.add_argument("--grid", required=True, help="a file with get_grid(), e.g. configs/grids/reactivation_cpu.py")
    parser.add_argument("--workdir", required=True, help="folder of all runs; the same command goes on where it was cut off")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on this machine (default 1)")
    parser.add_argument("--only", default="", help="only runs whose name begins so, and those that they need")
    parser.add_argument("--list", action="store_true", help="only say which runs there are, and which are recorded")
    parser.add_argument(
        "--ray", default="", metavar="ADDRESS", help='a Ray cluster instead of this machine; "local" or its address'
    )
    parser.add_argument("--cpus", type=float, default=1, help="with --ray: cores of a run")
    parser.add_argument("--gpus", type=float, default=0, help="with --ray: GPUs of a run")
    given = parser.parse_args(arguments)
    try:
        jobs = _only(read(given.grid), given.only)
        if Path(given.workdir).exists() and not Path(given.workdir).is_dir():
            raise UserError(f"--workdir={given.workdir} is no folder")
        if given.list:
            ended = {name: "recorded" for name in done(Path(given.workdir), jobs)}
            ended |= {name: "not applicable" for name in done(Path(given.workdir), jobs, NOT_APPLICABLE)}
            ended |= {name: "other settings" for name in otherwise(Path(given.workdir), jobs)}
            print("\n".join(f"{ended.get(job.name, 'to run'):14}  {job.name}" for job in jobs))
            return 0
        if given.jobs < 1 or given.jobs > (os.cpu_count() or 1):
            raise UserError(f"--jobs={given.jobs} must lie in 1..{os.cpu_count()}, the cores of this machine")
        engine = _Ray(given.ray, given.cpus, given.gpus) if given.ray else _Local(given.jobs)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        failed = run(jobs, given.workdir, engine)
    except UserError as error:
        say(error)
        return 2
    except OSError as error:
        _stop()
        say(f"cannot write {error.filename or given.workdir}: {error.strerror}")
        return 2
    except KeyboardInterrupt:
        _stop()
        say("interrupted; the same command goes on where the runs were")
        return 2
    return 1 if failed else 0


def _only(jobs: list[Job], prefix: str) -> list[Job]:
    """The jobs whose name begins with `prefix`, and those that they need; all of them for ""."""
    wanted = {job.name for job in jobs if job.name.startswith(prefix)}
    if not wanted:
        raise UserError(f"--only={prefix}: no run of the grid begins so")
    for job in reversed(jobs):  # what a job needs stands before it
        if job.name in wanted:
            wanted |= job.needs
    return [job for job in jobs if job.name in wanted]


def _stop() -> None:
    """Ends the runs in progress, which save nothing new but keep their last checkpoint, and begins no other."""
    _stopping.set()
    for running in list(_running):
        with contextlib.suppress(ProcessLookupError):
            running.terminate()
    for running in list(_running):
        running.wait()


if __name__ == "__main__":
    sys.exit(main())

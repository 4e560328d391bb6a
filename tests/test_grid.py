"""The grid: order, sharing, what is done again, and what becomes of runs that fail or are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from bibau_jax import experiment, grid, records
from bibau_jax.errors import UserError

ROOT = Path(__file__).parents[1]
EMPTY = json.dumps({"config": {}, "seed": 0, "command": "", "versions": {}, "device": {}, "stages": {}, "metrics": {}})


class Script(NamedTuple):
    """A job that runs some Python instead of an experiment: it leaves a record.json, or fails."""

    name: str
    code: str = ""
    reuse: str = ""
    twin: str = ""
    config: str = ""
    needs = grid.Job.needs

    def command(self, workdir: str) -> list[str]:
        place = Path(workdir) / self.name
        begin = f"import pathlib, sys, time; p = pathlib.Path({str(place)!r}); p.mkdir(parents=True, exist_ok=True)"
        end = f"(p / 'record.json').write_text({EMPTY!r}); open(p / 'times', 'a').write('x')"
        return ["-c", f"{begin}\n{self.code}\n{end}"]


def count(workdir, name) -> int:
    path = Path(workdir) / name / "times"
    return len(path.read_text()) if path.exists() else 0


def test_runs_share_the_twin_of_a_seed_and_variants_the_backdoored_model():
    jobs = grid.runs(
        "configs/digits.py", {"badnets": (0, 1), "sig": (1,)}, {"data.flip": False}, {"a": {"defense.ablation": "+A"}}
    )
    assert [job.name for job in jobs] == ["badnets_0", "badnets_0_a", "badnets_1", "badnets_1_a", "sig_1", "sig_1_a"]
    told = {job.name: (job.reuse, job.twin) for job in jobs}
    assert told["badnets_1"] == ("", "") and told["sig_1"] == ("", "badnets_1")
    assert told["sig_1_a"] == ("sig_1", "badnets_1") and jobs[-1].needs == {"sig_1", "badnets_1"}
    assert jobs[-1].command("runs/x") == [
        "-m",
        "bibau_jax.main",
        "--config=configs/digits.py:sig",
        "--workdir=runs/x/sig_1_a",
        "--config.data.flip=False",
        "--config.seed=1",
        "--config.defense.ablation=+A",
        "--config.implant.reuse=runs/x/sig_1",
        "--config.implant.clean_twin=runs/x/badnets_1",
    ]


def test_variants_take_over_the_runs_of_another_grid_as_they_are():
    theirs = grid.runs("c.py", {"badnets": (0, 1), "sig": (0,)}, {"checks": "all"})
    made = grid.variants(theirs, ["sig_0"], {"a": {"ablation": "+A"}}, {"checks": "few"})
    assert made[:2] == [theirs[0], theirs[2]]  # badnets_0 has the twin
    assert made[2] == grid.Job("sig_0_a", "c.py:sig", {"checks": "few", "seed": 0, "ablation": "+A"}, "sig_0", "badnets_0")
    alone = grid.runs("c.py", {"badnets": (0,)}, {"implant.clean_twin": "none"})
    assert grid.variants(alone, ["badnets_0"], {"a": {}})[1].needs == {"badnets_0"}
    with pytest.raises(UserError, match="there is no run wanet_0 to take variants of"):
        grid.variants(theirs, ["wanet_0"], {})


def test_what_was_recorded_with_other_settings_is_refused_before_anything_runs(tmp_path):
    (job,) = grid.runs(str(ROOT / "configs" / "digits.py"), {"badnets": (0,)})
    config = experiment.settled(grid._config(job) | {"stages": "implant"})
    (tmp_path / "badnets_0").mkdir()
    made = records.Record(json.loads(json.dumps(config)), 0, "", records.versions(), records.device(), {}, {})
    records.write(tmp_path / "badnets_0" / "record.json", made)
    assert grid.otherwise(tmp_path, [job]) == {}
    other = job._replace(settings=job.settings | {"reactivate.query.epochs": 3})
    changed = f"reactivate.query.epochs: {config['reactivate']['query']['epochs']} -> 3"
    assert grid.otherwise(tmp_path, [other]) == {"badnets_0": [changed]}
    with pytest.raises(UserError, match="badnets_0 was recorded with other settings .*choose another --workdir"):
        grid.run([other], str(tmp_path), grid._Local(1))


def test_runs_without_a_twin_wait_for_no_other_attack():
    jobs = grid.runs("c.py", {"badnets": (1,), "blended": (1,)}, {"implant.clean_twin": "none"}, {"more": {"lr": 1}})
    assert [job.needs for job in jobs] == [set(), {"badnets_1"}, set(), {"blended_1"}]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "grids").glob("*.py")), ids=lambda path: path.stem)
def test_the_grids_that_are_shipped_can_be_read(path):
    jobs = grid.read(str(path))
    assert jobs and all((ROOT / job.config.partition(":")[0]).exists() for job in jobs)


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_run_is_made_once_after_those_it_needs(jobs, tmp_path):
    made = [
        Script("a", "time.sleep(0.2)"),
        Script("b", f"assert pathlib.Path({str(tmp_path / 'a' / 'record.json')!r}).exists()", reuse="a"),
        Script("c"),
    ]
    assert grid.run(made, str(tmp_path), grid._Local(jobs)) == []
    assert grid.done(tmp_path, made) == {"a", "b", "c"}
    assert grid.run(made, str(tmp_path), grid._Local(jobs)) == []
    assert [count(tmp_path, job.name) for job in made] == [1, 1, 1]


def test_a_run_whose_command_changed_is_made_again_and_no_other(tmp_path):
    grid.run([Script("a"), Script("b")], str(tmp_path), grid._Local(1))
    grid.run([Script("a", "pass"), Script("b")], str(tmp_path), grid._Local(1))
    assert [count(tmp_path, name) for name in "ab"] == [2, 1]


def test_a_run_that_fails_stops_only_those_that_need_it_and_is_told_by_its_last_words(tmp_path, capsys):
    made = [Script("a", "sys.exit('bibau_jax: the disk is full')"), Script("b", reuse="a"), Script("c")]
    failed = grid.run(made, str(tmp_path), grid._Local(1))
    assert [(outcome.name, outcome.status, outcome.said) for outcome in failed] == [("a", 1, "bibau_jax: the disk is full")]
    assert grid.done(tmp_path, made) == {"c"}
    said = "".join(capsys.readouterr())
    assert "a failed: bibau_jax: the disk is full" in said and "for want of what they need: b" in said


def test_a_defence_that_cannot_treat_the_network_is_told_and_not_run_again(tmp_path, capsys):
    made = [Script("a", "sys.stderr.write('bibau_jax: not applicable: no norms'); sys.exit(3)"), Script("b")]
    assert grid.run(made, str(tmp_path), grid._Local(1)) == []
    assert grid.done(tmp_path, made) == {"b"} and grid.done(tmp_path, made, grid.NOT_APPLICABLE) == {"a"}
    assert "grid: a: not applicable: no norms" in "".join(capsys.readouterr())
    began = (tmp_path / "grid.jsonl").read_text()
    assert grid.run(made, str(tmp_path), grid._Local(1)) == [] and (tmp_path / "grid.jsonl").read_text() == began


def test_a_run_that_was_killed_is_made_again(tmp_path):
    flag = tmp_path / "flag"
    once = f"f = pathlib.Path({str(flag)!r})\nif not f.exists():\n  f.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    suicide = f"import os, signal\n{once}"
    made = [Script("a", suicide), Script("b", reuse="a")]
    assert [outcome.status for outcome in grid.run(made, str(tmp_path), grid._Local(1))] == [-signal.SIGKILL]
    assert grid.run(made, str(tmp_path), grid._Local(1)) == []
    assert [count(tmp_path, name) for name in "ab"] == [1, 1]


def test_a_damaged_record_does_not_count_and_a_line_without_a_name_does_no_harm(tmp_path):
    made = [Script("a"), Script("b")]
    grid.run(made, str(tmp_path), grid._Local(1))
    with open(tmp_path / "grid.jsonl", "a") as log:
        log.write('{"status": 0}\n')
    (tmp_path / "a" / "record.json").write_text(EMPTY[:-10])
    assert grid.done(tmp_path, made) == {"b"}
    assert grid.run(made, str(tmp_path), grid._Local(1)) == [] and [count(tmp_path, name) for name in "ab"] == [2, 1]


def test_two_grids_never_work_on_the_same_run_at_once(tmp_path):
    """The run outlives the grid that started it; the next grid waits for it."""
    code = "assert not (p / 'busy').exists(); (p / 'busy').touch(); time.sleep(1.5); (p / 'busy').unlink()"
    command, folder = Script("a", code).command(str(tmp_path)), str(tmp_path / "a")
    program = f"from bibau_jax import grid; grid.one({command!r}, {folder!r})"
    first = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not (tmp_path / "a" / "busy").exists():
        time.sleep(0.02)
    first.kill()
    assert grid.one(command, folder).status == 0
    assert count(tmp_path, "a") == 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "has no function get_grid"),
        ("def get_grid(): pass", "cannot be used as a grid: TypeError"),
        ("def get_grid(): return [{}]", "cannot be used as a grid: AttributeError"),
        ("def get_grid(): return {}['x']", "cannot be used as a grid: KeyError"),
        ("def get_grid(): return 1 / 0", "ZeroDivisionError"),
        (None, "grid.py is a folder, not a grid file"),
        ("from bibau_jax.grid import Job\ndef get_grid(): return [Job('a', 'c'), Job('a', 'c')]", "lists a twice"),
        ("from bibau_jax.grid import Job\ndef get_grid(): return [Job('a', 'c', reuse='b')]", "a needs b"),
    ],
)
def test_a_grid_file_that_cannot_be_used_is_one_line(text, words, tmp_path, capsys):
    (tmp_path / "grid.py").mkdir() if text is None else (tmp_path / "grid.py").write_text(text)
    assert grid.main([f"--grid={tmp_path / 'grid.py'}", f"--workdir={tmp_path / 'runs'}"]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_wrong_flags_are_one_line(tmp_path, capsys):
    given = [f"--grid={ROOT}/configs/grids/ablation_cpu.py", f"--workdir={tmp_path}"]
    for flags, words in ((["--jobs=0"], "--jobs=0"), (["--only=zebra"], "no run of the grid begins so")):
        assert grid.main([*given, *flags]) == 2
        said = capsys.readouterr().err
        assert words in said and len(said.splitlines()) == 1
    with pytest.raises(UserError, match="cannot be read"):
        grid.read(str(tmp_path / "missing.py"))
    (tmp_path / "file").touch()
    assert grid.main([given[0], f"--workdir={tmp_path / 'file'}", "--list"]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_only_some_runs_bring_those_that_they_need(capsys, tmp_path):
    given = [f"--grid={ROOT}/configs/grids/ablation_cpu.py", f"--workdir={tmp_path}", "--only=iad_0_a", "--list"]
    assert grid.main(given) == 0
    assert capsys.readouterr().out.split() == ["to", "run", "badnets_0", "to", "run", "iad_0", "to", "run", "iad_0_a"]


KILLED = (
    f"EMPTY = {EMPTY!r}\n"
    + """
import sys
from pathlib import Path
from typing import NamedTuple

from bibau_jax import grid

class Script(NamedTuple):
    name: str
    needs: set = set()
    config: str = ""

    def command(self, workdir):
        place = str(Path(workdir) / self.name)
        lines = ["import pathlib, sys, time", f"p = pathlib.Path({place!r})", "p.mkdir(parents=True, exist_ok=True)"]
        lines += ["time.sleep(0.6)", f"(p / 'record.json').write_text({EMPTY!r})", "open(p / 'times', 'a').write('x')"]
        return ["-c", "; ".join(lines)]

def get_grid():
    return [Script(name) for name in "abcd"]
"""
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grid_that_is_stopped_begins_no_other_run_and_the_next_repeats_and_loses_none(number, tmp_path):
    (tmp_path / "grid.py").write_text(KILLED)
    line = [sys.executable, "-m", "bibau_jax.grid", f"--grid={tmp_path / 'grid.py'}", f"--workdir={tmp_path / 'runs'}"]
    first = subprocess.Popen(line, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "runs" / "a" / "times").exists():
        time.sleep(0.02)
        assert first.poll() is None
    (os.killpg if number == signal.SIGKILL else os.kill)(first.pid, number)
    said = first.communicate(timeout=5)[1]
    before = [count(tmp_path / "runs", name) for name in "abcd"]
    assert sum(before) <= 2 and (number == signal.SIGKILL or "interrupted; the same command goes on" in said)
    time.sleep(1.0)
    assert [count(tmp_path / "runs", name) for name in "abcd"] == before
    assert subprocess.run(line, cwd=ROOT).returncode == 0
    told = [entry["name"] for entry in records.read_lines(tmp_path / "runs" / grid.LOG) if entry["status"] == 0]
    assert sorted(told) == list("abcd") and all(count(tmp_path / "runs", name) in (1, 2) for name in "abcd")


@pytest.mark.slow
def test_a_grid_that_is_killed_goes_on_without_repeating_or_losing_a_run(tmp_path, tiny_config):
    """Real runs: SIGKILL to the grid and all it started, in the middle; the same command finishes the rest."""
    from tests.conftest import SMALL

    settings = SMALL | {"implant.clean_twin": "none", "defense.name": "ft", "implant.epochs": 30, "checkpoint_every": 20}
    text = f"""
from bibau_jax import grid
def get_grid():
    jobs = grid.runs("configs/digits.py", {{"badnets": (0, 1)}}, {settings!r}, {{"more": {{"defense.epochs": 2}}}})
    return [job._replace(twin="") for job in jobs]
"""
    (tmp_path / "grid.py").write_text(text)
    line = [sys.executable, "-m", "bibau_jax.grid", f"--grid={tmp_path / 'grid.py'}", f"--workdir={tmp_path / 'runs'}"]
    first = subprocess.Popen(line, cwd=ROOT, start_new_session=True)
    while not list(tmp_path.glob("runs/badnets_1/implant/checkpoints/*/manifest.json")):
        time.sleep(0.05)
        assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert subprocess.run(line, cwd=ROOT).returncode == 0
    told = records.read_lines(tmp_path / "runs" / grid.LOG)
    assert sorted(entry["name"] for entry in told) == ["badnets_0", "badnets_0_more", "badnets_1", "badnets_1_more"]
    assert all(records.read(tmp_path / "runs" / entry["name"] / "record.json").metrics for entry in told)
    assert not (tmp_path / "runs" / "badnets_1_more" / "implant").exists()  # shared, not trained again


@pytest.mark.slow
def test_ray_runs_a_grid_too(tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "grid.py").write_text(KILLED)
    line = [sys.executable, "-m", "bibau_jax.grid", f"--grid={tmp_path / 'grid.py'}", f"--workdir={tmp_path / 'runs'}"]
    assert subprocess.run([*line, "--ray=local"], cwd=ROOT).returncode == 0
    assert [count(tmp_path / "runs", name) for name in "abcd"] == [1] * 4

"""Saved trees come back equal or not at all, whatever happens to the process or the files."""

import collections
import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bibau_jax import checkpoint
from bibau_jax.checkpoint import Keeper
from bibau_jax.errors import UserError

Momentum = collections.namedtuple("Momentum", ["count", "trace"])


@flax.struct.dataclass
class State:
    params: dict
    momentum: tuple
    name: str = flax.struct.field(pytree_node=False)


def state(value: float = 1.0) -> State:
    params = {"conv": {"kernel": jnp.full((3, 3, 2, 4), value), "bias": jnp.arange(4, dtype=jnp.bfloat16)}, "none": {}}
    return State(params, (Momentum(jnp.int32(3), {"mask": np.array([True, False])}), ()), "sgd")


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def refuses(call, path, *words) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(path), *words)), message
    return message


def test_a_state_comes_back_in_its_own_structure_with_its_info(tmp_path):
    checkpoint.save(tmp_path / "a", state(), {"epoch": 3, "note": "é", "pair": (1, 2)})
    tree, info = checkpoint.load(tmp_path / "a", jax.eval_shape(lambda: state(0.0)))
    assert_equal(tree, state())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
    assert len(info.pop("sha256")) == 64
    assert info == {"epoch": 3, "note": "é", "pair": [1, 2]}


def test_without_a_target_the_tree_is_nested_dicts_by_name(tmp_path):
    checkpoint.save(tmp_path / "a", state(), {})
    tree, _ = checkpoint.load(tmp_path / "a")
    assert tree["params"]["none"] == {} and tree["momentum"]["0"]["count"] == 3
    np.testing.assert_array_equal(tree["params"]["conv"]["kernel"], np.ones((3, 3, 2, 4)))


def test_bare_arrays_empty_trees_and_arrays_on_all_devices_come_back(tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    whole = jax.device_put(np.arange(6.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    for i, tree in enumerate([(), {}, np.arange(3), {"w": whole}]):
        checkpoint.save(tmp_path / str(i), tree, {})
        assert_equal(checkpoint.load(tmp_path / str(i), tree)[0], tree)


def test_equal_trees_have_equal_digests_and_different_ones_do_not(tmp_path):
    trees = [state(), state(), state(2.0), {"x": np.zeros(4)}, {"y": np.zeros(4)}, {"x": np.zeros((2, 2))}]
    for i, tree in enumerate(trees):
        checkpoint.save(tmp_path / str(i), tree, {"i": i})
    digests = [checkpoint.load(tmp_path / str(i))[1]["sha256"] for i in range(6)]
    assert digests[0] == digests[1] and len(set(digests)) == 5


def test_nothing_that_exists_is_overwritten(tmp_path):
    checkpoint.save(tmp_path / "a", state(), {})
    (tmp_path / "file").write_text("mine")
    for name in ("a", "file"):
        refuses(lambda name=name: checkpoint.save(tmp_path / name, state(2.0), {}), tmp_path / name, "exists already")
    assert_equal(checkpoint.load(tmp_path / "a", state())[0], state())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("leaf", [3, "text", object(), np.zeros((0, 3)), jax.ShapeDtypeStruct((3,), float)])
def test_what_is_not_an_array_with_elements_is_refused_before_anything_is_written(tmp_path, leaf):
    with pytest.raises(TypeError, match="leaf a/b"):
        checkpoint.save(tmp_path / "a", {"a": {"b": leaf}}, {})
    with pytest.raises(TypeError, match="key"):
        checkpoint.save(tmp_path / "a", {"a": jax.random.key(0)}, {})
    assert not list(tmp_path.iterdir())


def test_another_shape_type_or_name_is_refused_by_name(tmp_path):
    checkpoint.save(tmp_path / "a", {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, {})

    def attempt(**like):
        return lambda: checkpoint.load(tmp_path / "a", like)

    refuses(attempt(w=jnp.ones((3, 2)), b=jnp.ones(3)), tmp_path / "a", "w is float32(2, 3), not float32(3, 2)")
    refuses(attempt(w=jnp.ones((2, 3)), b=jnp.ones(3, int)), tmp_path / "a", "b is float32(3,), not int32(3,)")
    refuses(attempt(w=jnp.ones((2, 3)), b=jnp.ones(3), c=jnp.ones(1)), tmp_path / "a", "lacks c")
    refuses(attempt(w=jnp.ones((2, 3))), tmp_path / "a", "has in excess b")


def test_missing_foreign_and_half_written_places_are_named_and_left_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    ocp.PyTreeCheckpointer().save(tmp_path / "orbax", {"w": np.ones(3)})
    (tmp_path / "other").mkdir()
    for i, text in enumerate(("{}", "[]", '{"seal": 1}', "\x00", "[" * 10**5)):
        (tmp_path / f"other{i}").mkdir()
        (tmp_path / f"other{i}" / "manifest.json").write_text(text)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for name in ("missing", "empty", "file", "orbax", "file/below", *(f"other{i}" for i in range(5))):
        refuses(lambda name=name: checkpoint.load(tmp_path / name), tmp_path / name)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_every_cut_flip_and_loss_in_every_file_is_found(tmp_path):
    saved = tmp_path / "a"
    checkpoint.save(saved, state(), {"epoch": 3})
    tree, info = checkpoint.load(saved, state())
    files = sorted(file for file in saved.rglob("*") if file.is_file())
    rng, found = np.random.default_rng(0), 0
    for file in files:
        data = file.read_bytes()
        places = {0, len(data) - 1, *rng.integers(len(data), size=12).tolist()}
        flips = [data[:i] + bytes([data[i] ^ (1 << int(rng.integers(8)))]) + data[i + 1 :] for i in places]
        for damaged in (b"", data[: len(data) // 2], data[:-1], data + b"x", bytes(len(data)), None, *flips):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            try:  # harmless only where nothing changed: a space in the manifest
                assert checkpoint.load(saved, state())[1] == info and file.name == "manifest.json"
            except UserError as error:
                assert str(saved) in str(error) and "\n" not in str(error)
                found += 1
            file.write_bytes(data)
    assert len(files) > 4 and found >= 15 * len(files)
    assert_equal(checkpoint.load(saved, state())[0], tree)


def test_an_error_of_the_parsers_becomes_one_line(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a", state(), {})
    shutil.rmtree(tmp_path / "a" / "arrays")
    monkeypatch.setattr(checkpoint, "_check_files", lambda path, files: None)
    refuses(lambda: checkpoint.load(tmp_path / "a"), tmp_path / "a", "cannot read")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    assert Keeper(tmp_path / "file", 1).latest() is None
    refuses(lambda: Keeper(tmp_path / "file", 1).save(1, state(), {}), tmp_path / "file" / "1", "cannot write")


@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync"])
def test_a_full_or_read_only_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call):
    code = {"mkdir": errno.EROFS, "rename": errno.EACCES, "fsync": errno.ENOSPC}[call]

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code), "somewhere")

    monkeypatch.setattr(os, call, fail)
    message = refuses(lambda: checkpoint.save(tmp_path / "a", state(), {}), tmp_path / "a")
    assert message == f"cannot write {tmp_path / 'a'}: {os.strerror(code)}"
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_inside_orbax_is_one_line_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        tree = {"w": np.random.default_rng(0).normal(size=100_000)}
        refuses(lambda: checkpoint.save(tmp_path / "a", tree, {}), tmp_path / "a", "cannot write", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


SAVES_FOR_EVER = """
import sys, numpy as np
from bibau_jax.checkpoint import Keeper
keeper = Keeper(sys.argv[1], every_steps=1)
for step in range((keeper.latest() or 0) + 1, 10**6):
    keeper.save(step, {"w": np.full(200_000, float(step))}, {"step": step})
    print(step, flush=True)
"""


def test_a_run_killed_at_any_moment_of_a_save_goes_on_from_its_last_whole_checkpoint(tmp_path):
    keeper, said = Keeper(tmp_path, every_steps=1), 0
    for delay in (0.0, 0.004, 0.009, 0.015):
        run = subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        said = max(said, int(run.stdout.readline()))
        time.sleep(delay)
        run.send_signal(signal.SIGKILL)
        lines = run.communicate()[0].split("\n")[:-1]
        said = max([said, *map(int, lines)])
        step, tree, info = keeper.restore({"w": np.zeros(200_000)})
        assert step >= said and info["step"] == step
        np.testing.assert_array_equal(tree["w"], np.full(200_000, float(step)))
    keeper.save(step + 1, tree, {})
    assert keeper.latest() == step + 1


def test_an_artefact_whose_save_was_killed_does_not_exist_and_can_be_saved(tmp_path):
    code = "import sys, numpy as np; from bibau_jax import checkpoint; print(1, flush=True); "
    code += "checkpoint.save(sys.argv[1], {'w': np.ones(4_000_000)}, {})"
    path = tmp_path / "a"
    run = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    run.stdout.readline()
    while run.poll() is None and not list(tmp_path.glob(".a.part-*/arrays/*")):
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert list(tmp_path.iterdir())
    refuses(lambda: checkpoint.load(path), path, "does not exist")
    for part in tmp_path.iterdir():
        os.utime(part, (0, 0))
    checkpoint.save(path, state(), {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_the_newest_checkpoints_are_kept_and_due_ones_counted(tmp_path):
    keeper = Keeper(tmp_path / "run", every_steps=3, keep=2)
    assert keeper.latest() is None and not (tmp_path / "run").exists()
    refuses(keeper.restore, tmp_path / "run", "no checkpoint")
    for step in filter(keeper.due, range(13)):
        keeper.save(step, state(float(step)), {"step": step})
    assert sorted(int(entry.name) for entry in (tmp_path / "run").iterdir()) == [9, 12]
    step, tree, info = keeper.restore(state())
    assert step == 12 == info["step"]
    assert_equal(tree, state(12.0))
    assert "remove" not in refuses(lambda: keeper.restore({"w": 1}), tmp_path / "run" / "12", "lacks w")
    refuses(lambda: keeper.save(12, state(), {}), tmp_path / "run" / "12", "exists already")


def test_a_damaged_newest_checkpoint_is_named_and_not_passed_over(tmp_path):
    keeper = Keeper(tmp_path, every_steps=1)
    [keeper.save(step, state(), {}) for step in (9, 10)]
    (tmp_path / "10" / "arrays" / "manifest.ocdbt").write_bytes(b"")
    refuses(lambda: keeper.restore(state()), tmp_path / "10", "go on from step 9")


def test_clear_removes_the_run_and_nothing_else(tmp_path):
    keeper = Keeper(tmp_path, every_steps=1)
    keeper.save(1, state(), {})
    (tmp_path / ".2.part-host-1-1").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    keeper.clear()
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    Keeper(tmp_path / "never", every_steps=1).clear()
    refuses(lambda: Keeper(tmp_path, every_steps=1, keep=0), tmp_path, "at least 1")


TWO = """
import sys, numpy as np, jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", num_processes=2, process_id=int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec
from bibau_jax.checkpoint import Keeper, UserError
tree = jax.device_put({"w": np.arange(6.0, dtype="f4")}, NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec()))
keeper = Keeper(sys.argv[1] + "/run", every_steps=2)
for step in (2, 4, 6):
    keeper.save(step, tree, {"step": step})
step, back, info = keeper.restore(tree)
assert step == 6 == info["step"] and np.array_equal(back["w"], np.arange(6))
try:
    keeper.save(6, tree, {})
except UserError as error:
    print(error, flush=True)
"""


@pytest.mark.slow
def test_two_processes_write_once_restore_both_and_hear_of_the_same_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", TWO, str(tmp_path)]
    runs = [subprocess.Popen(["timeout", "60", *command, str(i), port], stdout=-1, text=True) for i in (0, 1)]
    assert all(run.communicate()[0].endswith("6 exists already and is not overwritten\n") for run in runs)
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["4", "6"]

"""Records come back equal, damage is named by file and field, and a killed writer costs at most its last line."""

import copy
import dataclasses
import errno
import json
import math
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax import records
from bibau_jax.errors import UserError
from bibau_jax.records import Measurement, Rate, Record, Scalars, StageCost
from bibau_jax.workdir import differences
from configs import base


def record() -> Record:
    row = Measurement("ft", Rate(466, 500), Rate(5, 450), Rate(405, 450), 12.3, {"tac": 0.5, "layers": [1, 2]})
    return Record(
        config={"model": {"name": "resnet18", "stages": [2, 2]}, "seed": 0, "note": None},
        seed=0,
        command="bibau-jax --config=a.py",
        versions={"jax": "0.10.2"},
        device={"platform": "cpu", "count": 1},
        stages={"implant": StageCost(1.5, 800.0), "purify": StageCost(2.0, 900.0, 300.5)},
        metrics={"none": dataclasses.replace(row, defense="none", extra={}), "ft": row},
    )


def refuses(call, path, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_a_record_comes_back_equal(tmp_path):
    records.write(tmp_path / "new" / "record.json", record())
    assert records.read(tmp_path / "new" / "record.json") == record()
    records.write(tmp_path / "new" / "record.json", dataclasses.replace(record(), seed=1))
    assert records.read(tmp_path / "new" / "record.json").seed == 1
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["record.json"]


def test_a_metric_entry_has_the_form_that_reports_rely_on(tmp_path):
    records.write(tmp_path / "record.json", record())
    entry = json.loads((tmp_path / "record.json").read_text())["metrics"]["ft"]
    assert entry == {
        "defense": "ft",
        "ca": 93.2,
        "asr": pytest.approx(100 / 90),
        "robust_accuracy": 90.0,
        "counts": {"ca": [466, 500], "asr": [5, 450], "robust_accuracy": [405, 450]},
        "seconds": 12.3,
        "tac": 0.5,
        "layers": [1, 2],
    }


def test_arrays_of_one_element_and_numbers_that_are_not_finite_are_written_as_json(tmp_path):
    extra = {"a": jnp.float32(0.5), "b": np.int64(3), "c": float("nan"), "d": (-math.inf,), "e": np.bool_(True)}
    row = dataclasses.replace(record().metrics["ft"], extra=extra)
    records.write(tmp_path / "r.json", dataclasses.replace(record(), metrics={"ft": row}))
    found = records.read(tmp_path / "r.json").metrics["ft"].extra
    assert found == {"a": 0.5, "b": 3, "c": "nan", "d": ["-inf"], "e": True}


@pytest.mark.parametrize("hits, count", [(0, 0), (-1, 5), (6, 5), (1.0, 2), (True, 2)])
def test_a_rate_that_is_none_is_refused(hits, count):
    with pytest.raises(UserError):
        Rate(hits, count)


def test_percent_is_of_the_count():
    assert Rate(0, 7).percent == 0.0 and Rate(7, 7).percent == 100.0 and Rate(466, 500).percent == 93.2


def test_an_extra_value_cannot_hide_a_field():
    with pytest.raises(UserError, match="asr"):
        dataclasses.replace(record().metrics["ft"], extra={"asr": 0.0})


DAMAGE = [
    (("seed",), "x", "seed"),
    (("seed",), True, "seed"),
    (("config",), [], "config"),
    (("versions", "jax"), 1, "versions.jax"),
    (("stages", "implant"), 3, "stages.implant"),
    (("stages", "implant", "seconds"), -1, "stages.implant.seconds"),
    (("stages", "implant", "peak_memory_mb"), None, "stages.implant.peak_memory_mb"),
    (("stages", "purify", "device_peak_memory_mb"), "a\nb", "stages.purify.device_peak_memory_mb"),
    (("stages", "purify", "seconds"), 10**400, "damaged"),
    (("stages", "purify", "more"), 1, "stages.purify.more"),
    (("metrics", "ft"), None, "metrics.ft"),
    (("metrics", "ft", "defense"), 1, "metrics.ft.defense"),
    (("metrics", "ft", "ca"), 93.3, "metrics.ft.ca"),
    (("metrics", "ft", "asr"), float("nan"), "metrics.ft.asr"),
    (("metrics", "ft", "seconds"), "12", "metrics.ft.seconds"),
    (("metrics", "ft", "counts", "asr"), [451, 450], "metrics.ft.asr"),
    (("metrics", "ft", "counts", "asr"), [0, 0], "metrics.ft.asr"),
    (("metrics", "ft", "counts", "asr"), [5], "metrics.ft.asr"),
    (("metrics", "ft", "counts", "asr"), 5, "metrics.ft.counts.asr"),
    (("metrics", "ft", "counts", "bsr"), [1, 2], "metrics.ft.counts.bsr"),
    (("more",), 1, "more"),
]


@pytest.mark.parametrize("place, value, named", DAMAGE, ids=str)
def test_a_damaged_field_is_named(tmp_path, place, value, named):
    path = tmp_path / "record.json"
    records.write(path, record())
    entry = json.loads(path.read_text())
    branch = entry
    for key in place[:-1]:
        branch = branch[key]
    branch[place[-1]] = value
    path.write_text(json.dumps(entry))
    refuses(lambda: records.read(path), path, named)


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / "record.json"
    records.write(path, record())
    whole = json.loads(path.read_text())
    for place in [(name,) for name in whole] + [("metrics", "ft", "counts"), ("stages", "implant", "seconds")]:
        entry = copy.deepcopy(whole)
        branch = entry
        for key in place[:-1]:
            branch = branch[key]
        del branch[place[-1]]
        path.write_text(json.dumps(entry))
        refuses(lambda: records.read(path), path, f"{'.'.join(place)} is missing")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, b'{"seed": 1e'])
def test_what_is_no_record_is_named(tmp_path, data):
    (tmp_path / "record.json").write_bytes(data)
    refuses(lambda: records.read(tmp_path / "record.json"), tmp_path / "record.json")


def test_a_missing_record_and_a_place_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "a"
    refuses(lambda: records.read(tmp_path / "none"), tmp_path / "none", "No such file")
    refuses(lambda: records.read_lines(tmp_path / "none"), tmp_path / "none", "No such file")
    refuses(lambda: records.write(below, record()), below, "cannot write")
    refuses(lambda: records.append(below, step=1), below, "cannot write")


def test_a_full_disk_leaves_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    records.write(path, record())

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    refuses(lambda: records.write(path, dataclasses.replace(record(), seed=1)), path, "No space left on device")
    assert records.read(path) == record()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_lines_on_a_full_disk_are_one_error():
    refuses(lambda: records.append("/dev/full", step=1), "/dev/full", "No space left on device")


def test_lines_come_back_and_stay_json_whatever_the_numbers(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    records.append(path, step=1, loss=jnp.float32(0.5), stage="é\n", none=None)
    records.append(path, step=np.int32(2), loss=float("nan"), worst=math.inf)
    assert records.read_lines(path) == [
        {"step": 1, "loss": 0.5, "stage": "é\n", "none": None},
        {"step": 2, "loss": "nan", "worst": "inf"},
    ]
    assert math.isnan(float(records.read_lines(path)[1]["loss"]))
    with pytest.raises(TypeError, match="nested"):
        records.append(path, nested={"a": 1})
    assert len(records.read_lines(path)) == 2


def test_a_line_torn_anywhere_is_left_out_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        records.append(path, step=step, loss=0.25)
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        steps = [line["step"] for line in records.read_lines(path)]
        assert steps == ([0, 1, 2] if end >= len(whole) - 1 else [0, 1])
        records.append(path, step=9)
        assert [line["step"] for line in records.read_lines(path)] == [*steps, 9]


def test_a_damaged_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for bad in (b"{", b"[1]", b"\xff", b""):
        path.write_bytes(b'{"step": 0}\n' + bad + b'\n{"step": 2}\n')
        refuses(lambda: records.read_lines(path), path, "line 2")


def test_scalars_are_written_by_the_lead_alone(tmp_path):
    for lead in (True, False):
        sink = Scalars(tmp_path / "metrics.jsonl", lead=lead)
        sink.write(step=3, stage="implant", loss=0.5)
        sink.close()
    assert records.read_lines(tmp_path / "metrics.jsonl") == [{"step": 3, "stage": "implant", "loss": 0.5}]


def test_the_board_gets_the_same_scalars(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    sink = Scalars(tmp_path / "metrics.jsonl", tensorboard=True)
    sink.write(step=3, stage="implant", loss=jnp.float32(0.5), note="text")
    sink.close()
    assert len(records.read_lines(tmp_path / "metrics.jsonl")) == 1
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert b"implant/loss" in events and b"note" not in events


def test_a_board_that_is_not_installed_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        Scalars(tmp_path / "metrics.jsonl", tensorboard=True)


def test_versions_and_device_go_into_a_record(tmp_path):
    found = records.versions()
    assert set(found) == {"python", "jax", "jaxlib", "flax", "optax", "orbax", "numpy", "bibau_jax"}
    assert found["numpy"] == np.__version__
    device = records.device()
    assert set(device) == {"platform", "kind", "count", "processes", "host_cpu", "host_cores"}
    records.write(tmp_path / "r.json", dataclasses.replace(record(), versions=found, device=device))
    assert records.read(tmp_path / "r.json").device == device


def test_reading_records_loads_neither_jax_nor_flax_nor_orbax():
    code = "import sys, bibau_jax.records; sys.exit(any(m in sys.modules for m in ('jax', 'flax', 'orbax', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_setting_that_came_later_stands_for_what_was_done_without_it():
    older, now = base.get_config().to_dict(), base.get_config().to_dict()
    del older["defense"]["pgd"]["block"], older["defense"]["nc"]["memory"], older["scan"]["memory"]
    assert differences(older, now) == []
    now["defense"]["pgd"]["block"] = 4
    assert differences(older, now) == ["defense.pgd.block: None -> 4"]

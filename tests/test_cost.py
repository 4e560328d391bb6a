"""A stage's cost is its own: its seconds, and the memory it held at its highest."""

import sys
import time

import numpy as np
import pytest

from bibau_jax.metrics import cost
from bibau_jax.metrics.cost import measure

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the peak")


def hold(megabytes: int) -> None:
    np.ones(megabytes * 1_000_000, np.uint8).sum()


@pytest.fixture
def resettable(tmp_path):
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("the sandbox forbids it")


def test_seconds_are_those_of_the_block():
    with measure() as found:
        time.sleep(0.05)
    assert 0.05 <= found.seconds < 0.5


@linux
def test_the_peak_is_that_of_the_stage_and_not_of_an_earlier_one(resettable):
    with measure() as large:
        hold(200)
    with measure() as small:
        hold(20)
    assert large.peak_memory_mb - small.peak_memory_mb > 120


@linux
def test_an_inner_stage_does_not_hide_the_peak_of_the_outer(resettable):
    with measure() as outer:
        hold(200)
        with measure() as inner:
            hold(20)
        with measure() as later:
            hold(100)
    assert outer.peak_memory_mb - inner.peak_memory_mb > 120
    assert outer.peak_memory_mb >= later.peak_memory_mb > inner.peak_memory_mb


def test_a_stage_that_fails_is_measured_too():
    with pytest.raises(ZeroDivisionError), measure() as found:
        time.sleep(0.01)
        raise ZeroDivisionError
    assert found.seconds >= 0.01 and found.peak_memory_mb > 1 and not cost._open


def test_device_memory_is_the_highest_of_the_devices_or_none(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    def measured(*stats):
        monkeypatch.setattr("jax.local_devices", lambda: [Device(entry) for entry in stats])
        with measure() as found:
            pass
        return found.device_peak_memory_mb

    assert measured({"peak_bytes_in_use": 3_000_000}, {"peak_bytes_in_use": 5_000_000}) == 5.0
    assert measured(None, {}) is None


def test_where_the_system_has_no_counter_the_peak_of_the_process_is_given(monkeypatch):
    real = open

    def no_proc(path, *args, **kwargs):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", no_proc)
    with measure() as found:
        pass
    assert found.peak_memory_mb > 10

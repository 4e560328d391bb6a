"""Progress is silent when short, sparse when long, right about rate and time left, and costs nothing."""

import io
import re
import sys
import time

import jax.numpy as jnp
import pytest

from bibau_jax import progress
from bibau_jax.progress import bar, say


@pytest.fixture
def quick(monkeypatch):
    """Everything forty times as fast."""
    monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.05)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.25)
    monkeypatch.setattr(progress, "_REDRAW_SECONDS", 0.02)
    monkeypatch.setattr(progress, "_last_line", float("-inf"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch, quick):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")

    def take() -> Terminal:  # to be called in the test's body: pytest sets stderr anew after the fixtures
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return take


def lines(capsys) -> list[str]:
    out, err = capsys.readouterr()
    assert not out
    return err.splitlines()


def test_work_under_two_seconds_is_silent(capsys):
    with bar(3, "quick") as b:
        for _ in range(3):
            b.advance(loss=1.0)
    assert not lines(capsys)


def test_without_a_terminal_lines_are_sparse_and_the_last_one_tells_the_total_time(capsys, quick):
    with bar(20, "train") as b:
        for i in range(20):
            time.sleep(0.02)
            b.advance(loss=jnp.float32(i))
    found = lines(capsys)
    assert 2 <= len(found) <= 4
    told = r"train: \d+/20 steps \(\d+ %\), ([\d.]+ step/s, ([\d.]+ s left, )?loss \d+|starting \(compiling\), [\d.]+ s so far)"
    assert all(re.fullmatch(told, line) for line in found[:-1])
    assert re.fullmatch(r"train: 20 steps in 0\.\d s, [\d.]+ step/s, loss 19", found[-1])


@pytest.mark.parametrize(("total", "told"), [(100, r"starting \(compiling\)"), (5, r"[\d.]+ step/s, [\d.]+ s left")])
def test_the_first_of_many_steps_tells_no_time_left_for_it_holds_compilation(capsys, quick, total, told):
    with bar(total, "fit") as b:
        b.advance()
        time.sleep(0.4)
    assert any(re.match(rf"fit: 1/{total} steps \(\d+ %\), {told}", line) for line in lines(capsys))


def test_the_longer_a_loop_runs_the_rarer_its_lines(capsys, quick, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_LINE_SHARE", 1.0)  # each line when twice the time of the one before has passed
    with bar(100, "fit") as b:
        for _ in range(100):
            time.sleep(0.01)
            b.advance()
    assert 2 <= len(lines(capsys)) <= 8


def test_a_long_first_call_is_reported_before_it_ends(capsys, quick):
    with bar(2, "compile"):
        time.sleep(0.15)
        (line,) = lines(capsys)
        assert re.fullmatch(r"compile: 0/2 steps \(0 %\), starting \(compiling\), 0\.\d s so far", line)


def test_where_nothing_is_compiled_first_says_what_goes_on(capsys, quick):
    with bar(2, "grid", unit="run", first="the first one runs"):
        time.sleep(0.15)
        (line,) = lines(capsys)
        assert line.startswith("grid: 0/2 runs (0 %), the first one runs, 0.")


def test_a_resumed_run_counts_only_its_own_work(capsys, quick):
    with bar(1000, "train", unit="epoch", start=990) as b:
        for _ in range(10):
            time.sleep(0.02)
            b.advance()
    found = lines(capsys)
    assert found[0].startswith("train: 99") and "/1000 epochs (99 %)" in found[0]
    rate = float(re.search(r"([\d.]+) epoch/s", found[-1])[1])
    assert 10 < rate < 51
    assert found[-1].startswith("train: 10 epochs from 990 in ")


def test_the_rate_leaves_out_the_first_call_which_compiles(capsys, quick):
    with bar(11, "train") as b:
        time.sleep(0.5)
        for _ in range(11):
            b.advance()
            time.sleep(0.01)
    assert float(re.search(r"([\d.]+) step/s", lines(capsys)[-1])[1]) > 30


def test_work_that_breaks_off_says_where(capsys, quick):
    with pytest.raises(ZeroDivisionError), bar(5, "train") as b:
        b.advance(2)
        time.sleep(0.1)
        raise ZeroDivisionError
    assert "stopped at 2/5" in lines(capsys)[-1]


def test_bars_inside_a_bar_print_no_more_often_than_one(capsys, quick):
    begin = time.perf_counter()
    with bar(5, "outer") as outer:
        for _ in range(5):
            with bar(4, "inner") as inner:
                for _ in range(4):
                    time.sleep(0.02)
                    inner.advance()
            outer.advance()
    seconds = time.perf_counter() - begin
    running = [line for line in lines(capsys) if " in " not in line]
    assert 1 <= len(running) <= 2 + seconds / 0.25


def test_processes_that_do_not_lead_are_silent(capsys, quick):
    with bar(2, "train", show=False) as b:
        time.sleep(0.1)
        b.advance()
    say("note", show=False)
    assert not lines(capsys)


def test_nothing_to_do_and_an_unknown_number_do_no_harm(capsys, quick):
    class Gone:
        def __float__(self):
            raise RuntimeError("Array has been deleted.")

    with bar(0, "empty") as b:
        b.advance(0, loss=Gone(), note="text")
        time.sleep(0.1)
    assert "loss ?, note text" in lines(capsys)[-1]


def test_a_call_costs_less_than_twenty_microseconds():
    with bar(10**6, "train") as b:
        begin = time.perf_counter()
        for i in range(20_000):
            b.advance(loss=i)
        assert (time.perf_counter() - begin) / 20_000 < 20e-6


def test_on_a_terminal_a_bar_shows_rate_time_left_and_scalars_and_ends_in_one_line(terminal):
    screen = terminal()
    with bar(10, "train [x]") as b:
        for _ in range(10):
            time.sleep(0.03)
            b.advance(loss=0.5)
    text = screen.getvalue()
    assert re.search(r"train \[x\] .*\d/10 steps +[\d.]+ step/s, [\d.]+ s left, loss 0.5", text)
    assert re.search(r"train \[x\]: 10 steps in 0\.\d s, [\d.]+ step/s, loss 0\.5\n$", text)
    assert progress._screen is None


def test_a_notice_does_not_break_a_running_bar(terminal):
    screen = terminal()
    with bar(10, "outer") as outer, bar(10, "inner") as inner:
        time.sleep(0.15)
        assert progress._screen is not None and progress._bars_on_screen == 2
        say("saved [bold] 100 %")
        inner.advance()
        outer.advance()
    assert "saved [bold] 100 %\n" in screen.getvalue()
    assert progress._screen is None and progress._bars_on_screen == 0


def test_a_notice_without_a_bar_is_a_line_on_stderr(capsys):
    say("resuming from step 3")
    assert lines(capsys) == ["resuming from step 3"]


@pytest.mark.parametrize("seconds, text", [(3.21, "3.2 s"), (42.4, "42 s"), (112, "1 min 52 s"), (7500, "2 h 05 min")])
def test_durations_read_like_speech(seconds, text):
    assert progress._duration(seconds) == text

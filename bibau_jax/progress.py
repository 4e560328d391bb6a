"""How far a long loop is, at what rate, and how long it will still take; silent for work under two seconds."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

_FIRST_SECONDS = 2.0
_LINE_SECONDS = 10.0  # between plain lines, at first
_LINE_SHARE = 0.05  # of the time that a loop has run, between its plain lines later: a day's work leaves no heap of them
_REDRAW_SECONDS = 0.2  # of a bar on a terminal
_MANY = 50  # units: a loop of more tells no rate after the first alone, which holds compilation

_lock = threading.RLock()
_screen = None  # the one rich display that all bars on a terminal share
_bars_on_screen = 0
_last_line = float("-inf")  # when a plain line was last printed


class Bar:
    """What `bar` hands out; a thread of its own draws, so that a call costs next to nothing and a long compilation shows."""

    def __init__(self, total: int, label: str, unit: str, start: int, first: str):
        self._total, self._label, self._unit, self._start, self._starting = total, label, unit, start, first
        self._done, self._scalars = start, {}
        self._begin, self._first = time.perf_counter(), None
        self._ended, self._task, self._printed = threading.Event(), None, False

    def advance(self, n: int = 1, **shown_scalars) -> None:
        """Counts `n` more units as done; the scalars (numbers or arrays of one element) are shown until the next ones."""
        self._done += n
        if shown_scalars:
            self._scalars = shown_scalars
        if self._first is None:
            self._first = (time.perf_counter(), self._done)

    def _rate(self) -> float:
        """Units a second in this session; the first call is left out where there are more, because it holds compilation."""
        since, done = self._begin, self._start
        if self._first and self._first[1] < self._done:
            since, done = self._first
        return (self._done - done) / max(time.perf_counter() - since, 1e-9)

    def _is_starting(self) -> bool:
        return self._first is None or (self._first[1] == self._done and self._total - self._start > _MANY)

    def _status(self) -> str:
        if not self._ended.is_set() and self._is_starting():
            return f"{self._starting}, {_duration(time.perf_counter() - self._begin)} so far"
        rate = self._rate()
        parts = [f"{rate:.3g} {self._unit}/s"]
        if rate and self._done < self._total and not self._ended.is_set():
            parts.append(f"{_duration((self._total - self._done) / rate)} left")
        return ", ".join([*parts, *(f"{name} {_number(value)}" for name, value in list(self._scalars.items()))])

    def _watch(self) -> None:
        global _last_line
        wait = _FIRST_SECONDS
        while not self._ended.wait(wait):
            now = time.perf_counter()
            if _on_terminal():
                self._draw()
                wait = _REDRAW_SECONDS
            elif now - _last_line < (pause := self._pause(now)):  # of a bar around this one or just before it
                wait = _last_line + pause - now
                continue
            else:
                share = f" ({100 * self._done / self._total:.0f} %)" if self._total else ""
                _print(f"{self._label}: {self._done}/{self._total} {self._unit}s{share}, {self._status()}")
                wait, _last_line = pause, now
            self._printed = True

    def _pause(self, now: float) -> float:
        return max(_LINE_SECONDS, _LINE_SHARE * (now - self._begin))

    def _draw(self) -> None:
        status = self._status()  # may wait for a device: not under the lock
        with _lock:
            if self._task is None:
                self._task = _take_screen().add_task(self._label, total=self._total, unit=self._unit, status="")
            _screen.update(self._task, completed=self._done, status=status)

    def _end(self) -> None:
        if self._task is not None:
            _leave_screen(self._task)
        if self._printed:
            seconds = time.perf_counter() - self._begin
            count = f"{self._done - self._start} {self._unit}s" + (f" from {self._start}" if self._start else "")
            short = f" (stopped at {self._done}/{self._total})" if self._done < self._total else ""
            _print(f"{self._label}: {count} in {_duration(seconds)}{short}, {self._status()}")


@contextlib.contextmanager
def bar(
    total: int, label: str, unit: str = "step", start: int = 0, show: bool = True, first: str = "starting (compiling)"
) -> Iterator[Bar]:
    """Shows the progress of a loop over `total` units from `start` on (a resumed run); `with bar(...) as b: b.advance()`.

    After two seconds: on a terminal a live bar with rate, time left and the latest scalars, elsewhere a line on stderr at most
    every ten seconds, after some minutes more rarely; then a line with the total time. The rate counts this session's work
    alone; until there is one, `first` says what goes on. `show=False` prints nothing.
    """
    it = Bar(total, label, unit, start, first)
    watcher = threading.Thread(target=it._watch, daemon=True, name=f"progress of {label}")
    if show:
        watcher.start()
    try:
        yield it
    finally:
        it._ended.set()
        if show:
            watcher.join()
            it._end()


def say(message: str, show: bool = True) -> None:
    """Prints a line on stderr, above a running bar if there is one."""
    if show:
        _print(message)


def _print(line: str) -> None:
    with _lock:
        if _screen is not None:
            _screen.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _on_terminal() -> bool:
    from rich.console import Console

    console = Console(stderr=True)
    return console.is_terminal and not console.is_dumb_terminal


def _take_screen():
    """The shared display, started with its first bar; call it under the lock."""
    global _screen, _bars_on_screen
    from rich import progress
    from rich.console import Console

    if _screen is None:
        text = ("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}s", "{task.fields[status]}")
        label, *rest = (progress.TextColumn(part, markup=False) for part in ("{task.description}", *text))
        columns = (label, progress.BarColumn(20), *rest)
        _screen = progress.Progress(*columns, console=Console(stderr=True), transient=True)
        _screen.start()
    _bars_on_screen += 1
    return _screen


def _leave_screen(task) -> None:
    global _screen, _bars_on_screen
    with _lock:
        _screen.remove_task(task)
        _bars_on_screen -= 1
        if not _bars_on_screen:
            _screen.stop()
            _screen = None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _number(value) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)
    except RuntimeError:  # an array whose buffer the next step has taken over
        return "?"

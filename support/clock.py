"""Where a run's time goes: seconds on the clock by part, every second counted once.

A part within another one takes its seconds from it, so the parts sum to the time since `start` and
what came before it. On a GPU a part waits for what it launched, so that the seconds are its own.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

PARTS = ("starting", "loading", "reward models", "checks", "rollouts", "scoring", "optimisation",
         "exchange", "judging", "checkpoints", "agents saved", "picture", "rest")
seconds: dict[str, float] = {}
_open, _since = ["rest"], time.perf_counter()


def _wait() -> None:
    """Until the device has done what it was given."""


def age() -> float:
    """Seconds since this process began; 0 where the system does not say (only Linux does)."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ticks = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        began = int(ticks) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    return 0.0


def start(device: str = "cpu", starting: float = 0.0) -> None:
    """All other parts begin at 0; device: of the run; starting: seconds of the program until now,
    of imports for the most part."""
    global _since, _wait
    kind = torch.device(device).type
    _wait = {"cuda": functools.partial(torch.cuda.synchronize, device),
             "mps": torch.mps.synchronize}.get(kind, lambda: None)
    _open[:] = ["rest"]
    seconds.clear()
    seconds.update(dict.fromkeys(PARTS, 0.0) | {"starting": starting})
    _since = time.perf_counter()


def timed(part: str) -> Callable:
    """A decorator: the function's seconds are the part's."""
    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def measured(*args, **options):
            _turn()
            _open.append(part)
            try:
                return function(*args, **options)
            finally:
                try:
                    _turn()
                finally:
                    _open.pop()

        return measured
    return decorate


def read() -> dict[str, float]:
    """Seconds of every part until now."""
    _turn()
    return dict(seconds)


def _turn() -> None:
    """What passed since the last turn is the innermost open part's."""
    global _since
    _wait()
    now = time.perf_counter()
    seconds[_open[-1]] = seconds.get(_open[-1], 0.0) + now - _since
    _since = now

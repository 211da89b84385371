"""support/clock.py: every second of a run is counted once, where it was spent."""

import json
import subprocess
import sys
import time

import pytest

import fedppo
from support import clock


def test_a_part_within_another_takes_its_seconds_from_it(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(seconds: float, then=lambda: None) -> None:
        now[0] += seconds
        then()
        now[0] += seconds

    inner = clock.timed("rollouts")(work)
    outer = clock.timed("scoring")(work)
    clock.start()
    now[0] += 1.0
    outer(2.0, lambda: inner(4.0))
    with pytest.raises(ZeroDivisionError):
        outer(16.0, lambda: 1 / 0)  # what it took until then counts
    now[0] += 32.0
    expected = dict.fromkeys(clock.PARTS, 0.0) | {"rest": 33.0, "scoring": 20.0, "rollouts": 8.0}
    assert clock.read() == expected
    clock.start(starting=2.5)
    assert clock.read() == dict.fromkeys(clock.PARTS, 0.0) | {"starting": 2.5}


@pytest.mark.parametrize("program", [True, False])
def test_a_runs_parts_sum_to_its_time(tmp_path, capsys, program):
    """From the start of the program; where it is called, from there."""
    flags = ["--preset", "tiny", "--device", "cpu", "--out", str(tmp_path), "--name", "run",
             "--agents", "2", "--rounds", "1", "--updates", "1", "--pairs", "20",
             "--reward-epochs", "1", "--eval-prompts", "16"]
    started = time.perf_counter()
    if program:
        said = subprocess.run([sys.executable, fedppo.__file__, *flags], capture_output=True,
                              text=True, check=True).stdout
    else:
        assert fedppo.main(flags) == 0
        said = capsys.readouterr().out
    wall = time.perf_counter() - started
    seconds = json.loads((tmp_path / "run/summary.json").read_text())["seconds"]
    known = program and sys.platform == "linux"
    assert tuple(seconds) == clock.PARTS
    assert all(value > 0 for part, value in seconds.items() if known or part != "starting")
    if known or not program:
        assert 0.8 * wall < sum(seconds.values()) < wall + 0.05  # a process has an end too
    assert seconds["rest"] < 0.2 * wall, "what has no name is little"
    assert "\nseconds   " in said

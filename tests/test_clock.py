"""support/clock.py: every second of a run is counted once, where it was spent."""

import json
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
    clock.start()
    assert clock.read() == dict.fromkeys(clock.PARTS, 0.0)


def test_a_runs_parts_sum_to_its_time(tmp_path, capsys):
    started = time.perf_counter()
    assert fedppo.main(
        ["--preset", "tiny", "--device", "cpu", "--out", str(tmp_path), "--name", "run",
         "--agents", "2", "--rounds", "1", "--updates", "1", "--pairs", "20", "--reward-epochs",
         "1", "--eval-prompts", "16"]) == 0
    wall = time.perf_counter() - started
    seconds = json.loads((tmp_path / "run/summary.json").read_text())["seconds"]
    assert tuple(seconds) == clock.PARTS and all(value > 0 for value in seconds.values())
    assert 0.8 * wall < sum(seconds.values()) < wall
    assert seconds["rest"] < 0.2 * wall, "what has no name is little"
    assert "\nseconds   " in capsys.readouterr().out

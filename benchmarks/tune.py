"""Finds each arm's beta, learning rate, anchor and own weight in the matrix together, by one rule,
in every headline regime that it is run in.

    python benchmarks/tune.py       finished runs are not repeated, so it can be stopped at any time

In reading order
    1. cells       what is tuned
    2. the search  one rule for every arm, with as many cells for each
    3. main        results/tuning.csv, and chosen.json with each arm's best cell

The rule. A cell's score is the mean of the judge's after half of the updates and after all: the two
at which study.py compares arms, and a setting that drifts is a bad one. On the first of
study.TUNING's seeds an arm starts from START, and then tries the neighbours of its best cell (one
step on one axis), of the next best where these are known, until CELLS are done. The FINALISTS best
run on the other seeds; the highest mean over all is chosen. All arms get
equally many cells, so an arm with four axes is searched less thoroughly: some neighbours of its
chosen cell were never run.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import dpo  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
from study import ARMS, TUNING, Job  # noqa: E402

# ------------------------------------------------------------------------------------------- cells


class Cell(NamedTuple):
    """What is tuned together; None: the arm has no such setting."""

    beta: float
    lr: float
    anchor: float | None = None
    self_weight: float | None = None

    @property
    def settings(self) -> dict[str, float]:
        return {name: value for name, value in self._asdict().items() if value is not None}


# The values of each axis, in Cell's order.
AXES = Cell((0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0),
            (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
            (0.0, 0.05, 0.1, 0.2, 0.4), (0.25, 0.4, 0.6))
START = [(beta, lr, anchor) for beta in (0.25, 0.5) for lr in (5e-4, 1e-3) for anchor in (0.0, 0.1)]
CELLS = 14  # of each arm on the first seed: START, and six neighbours of the best ones
FINALISTS = 3


def start(arm: str) -> list[Cell]:
    """Where the arm's search starts: START without what the arm has not."""
    anchored = arm != "classic" and arm not in dpo.ARMS
    self_weight = 0.4 if arm in ("federated", "merged") else None
    cells = [Cell(beta, lr, anchor if anchored else None, self_weight)
             for beta, lr, anchor in START]
    return list(dict.fromkeys(cells))


def neighbours(cell: Cell) -> list[Cell]:
    """One step on one axis."""
    found = []
    for axis, value in cell.settings.items():
        values = getattr(AXES, axis)
        place = values.index(value)
        found += [cell._replace(**{axis: values[n]}) for n in (place - 1, place + 1)
                  if 0 <= n < len(values)]
    return found


# -------------------------------------------------------------------------------------- the search


def scores(rows: list[dict], arm: str, regime: str, seed: int) -> dict[Cell, float]:
    """{cell: its score}, of the cells that were run; -inf: diverged."""
    found = {}
    for row in rows:
        if (row["arm"], row["regime"], int(row["seed"])) == (arm, regime, seed):
            flags = [report.flag(row, "--" + axis.replace("_", "-")) for axis in Cell._fields]
            cell = Cell(*(float(flag) if flag else None for flag in flags))
            found[cell] = ((float(row["judge_half"]) + float(row["judge_final"])) / 2
                           if row["judge_final"] else -math.inf)
    return found


def climb(start: list[Cell], first: dict[Cell, float], limit: int) -> tuple[list, list]:
    """The search on the first seed, from its start -> (cells to run next, cells behind it).

    It is gone through again each time, so that it takes the same way however often it was stopped:
    a step is not taken before all of its cells were run.
    """
    known, step = [], start
    while step and all(cell in first for cell in step):
        known += step
        for best in sorted(known, key=first.get, reverse=True):
            step = [cell for cell in neighbours(best) if cell not in known]
            if step:
                break
        step = step[:limit - len(known)]
    return [cell for cell in step if cell not in first], known


def finalists(rows: list[dict], arm: str, regime: str) -> tuple[list[Cell], list[Cell]]:
    """-> (cells to run next on the first seed, the best ones once nothing is left to run)."""
    first = scores(rows, arm, regime, TUNING[0])
    cells, known = climb(start(arm), first, CELLS)
    return cells, [] if cells else sorted(known, key=first.get, reverse=True)[:FINALISTS]


def wanted(rows: list[dict], arm: str, regime: str) -> list[Job]:
    """What the arm's search runs next; nothing when it is over."""
    cells, best = finalists(rows, arm, regime)
    jobs = [(cell, TUNING[0]) for cell in cells]
    jobs += [(cell, seed) for cell in best for seed in TUNING[1:]
             if cell not in scores(rows, arm, regime, seed)]
    return [study.job(arm, regime, seed, cell.settings) for cell, seed in jobs]


def choose(rows: list[dict], arm: str, regime: str) -> dict | None:
    """The finalist with the highest mean over the seeds -> its settings and scores; None: the
    search is not over."""
    if wanted(rows, arm, regime):
        return None
    by_seed = [scores(rows, arm, regime, seed) for seed in TUNING]
    means = {cell: [found[cell] for found in by_seed]
             for cell in finalists(rows, arm, regime)[1]}
    best = max(means, key=lambda cell: sum(means[cell]))
    if not math.isfinite(sum(means[best])):
        raise FloatingPointError(f"{arm}, {regime}: every finalist diverged on some seed")
    return {"settings": best.settings, "scores": [round(score, 3) for score in means[best]]}


# -------------------------------------------------------------------------------------------- main


COLUMNS = ("arm", "regime", "seed", "settings", "judge_half", "judge_final", "judge_best",
           "seconds", "judge_curve")


def run(job: Job) -> dict:
    row = study.run(job)
    return {name: row[name] for name in COLUMNS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--processes", type=int, default=os.cpu_count(),
                        help="processes side by side, of one thread each [one per core]")
    options = parser.parse_args(argv)
    os.chdir(HERE.parent)
    path = HERE / "results/tuning.csv"
    rows = study.load(path)
    searches = [(arm, regime) for arm in ARMS for regime in study.regimes_of(arm)]
    while jobs := [job for search in searches for job in wanted(rows, *search)]:
        rows = study.complete(path, jobs, "next step of all searches", options.processes, run,
                              COLUMNS)
    chosen = {f"{arm}, {regime}": choose(rows, arm, regime) for arm, regime in searches}
    made = HERE / "results/chosen.json"
    made.write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
    print(f"settings in {made.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tunes every arm anew for two regimes, own prompts and common ones: beta, learning rate, anchor
and matrix together, scored after 80 updates, since a setting that drifts is a bad one.

    python benchmarks/joint.py      finished runs are not repeated, so it can be stopped at any time

In reading order
    1. cells       what is tuned, and the flags of a cell
    2. the search  one rule for every arm, with as many cells for each
    3. main        results/joint.csv, and joint.json with each arm's best cell

On the first of study.TUNING's seeds an arm starts from START, and then tries the neighbours of its
best cell (one step on one axis), of the next best where these are known, until CELLS are done. The
FINALISTS best run on the other seeds; the highest mean over all is chosen. No table uses these
values yet: they are for the next study, on seeds that no choice was made on.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import report  # noqa: E402
import study  # noqa: E402
from study import TUNING, Job  # noqa: E402

# ------------------------------------------------------------------------------------------- cells

REGIMES = {"own prompts": "", "common prompts": "--prompts common"}
ARMS = ("federated", "isolated", "fedavg", "merged", "centralized", "classic", "isolated 4x batch")
MATRIX = ("federated", "merged")  # arms that have one


class Cell(NamedTuple):
    """What is tuned together. 1 as anchor: classic, which has no other."""

    beta: float
    lr: float
    anchor: float
    self_weight: float


AXES = Cell(study.BETAS, study.LRS, (0.0, 0.05, 0.1, 0.2), (0.25, 0.4, 0.6))
START = [(beta, lr, anchor) for beta in (0.25, 0.5) for lr in (5e-4, 1e-3) for anchor in (0.0, 0.1)]
CELLS = 32  # of each arm on the first seed
FINALISTS = 4


def start(arm: str) -> list[Cell]:
    own = [Cell(beta, lr, 1.0 if arm == "classic" else anchor, 0.4) for beta, lr, anchor in START]
    return list(dict.fromkeys(own))


def neighbours(arm: str, cell: Cell) -> list[Cell]:
    """One step on one axis that the arm has."""
    axes = ["beta", "lr", *(["anchor"] if arm != "classic" else []),
            *(["self_weight"] if arm in MATRIX else [])]
    found = []
    for axis in axes:
        values = getattr(AXES, axis)
        place = values.index(getattr(cell, axis))
        found += [cell._replace(**{axis: values[n]}) for n in (place - 1, place + 1)
                  if 0 <= n < len(values)]
    return found


def job(arm: str, regime: str, seed: int, cell: Cell) -> Job:
    flags = [study.ARMS[arm], REGIMES[regime], "--rounds 20",
             f"--beta {cell.beta:g} --lr {cell.lr:g}"]
    flags += [f"--anchor {cell.anchor:g}"] if arm != "classic" else []
    flags += [f"--self-weight {cell.self_weight:g}"] if arm in MATRIX else []
    return Job(arm, regime, seed, " ".join(part for part in flags if part))


# -------------------------------------------------------------------------------------- the search


def scores(rows: list[dict], arm: str, regime: str, seed: int) -> dict[Cell, float]:
    """{cell: the judge's score after the last update}, of the cells that were run; -inf: diverged.
    """
    found = {}
    for row in rows:
        if (row["arm"], row["regime"], int(row["seed"])) == (arm, regime, seed):
            values = [float(report.flag(row, "--" + axis.replace("_", "-"), default))
                      for axis, default in zip(Cell._fields, ("", "", "1", "0.4"), strict=True)]
            found[Cell(*values)] = float(row["judge_final"] or "-inf")
    return found


def climb(start: list, neighbours: Callable, first: dict, limit: int) -> tuple[list, list]:
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


def wanted(rows: list[dict], arm: str, regime: str) -> list[Job]:
    """What the arm's search runs next; nothing when it is over."""
    first = scores(rows, arm, regime, TUNING[0])
    cells, known = climb(start(arm), functools.partial(neighbours, arm), first, CELLS)
    if cells:
        return [job(arm, regime, TUNING[0], cell) for cell in cells]
    best = sorted(known, key=first.get, reverse=True)[:FINALISTS]
    return [job(arm, regime, seed, cell) for cell in best
            for seed in TUNING[1:] if cell not in scores(rows, arm, regime, seed)]


def choose(rows: list[dict], arm: str, regime: str) -> dict | None:
    """The finalist with the highest mean over the seeds -> its values and scores."""
    by_seed = [scores(rows, arm, regime, seed) for seed in TUNING]
    means = {cell: [found[cell] for found in by_seed] for cell in by_seed[0]
             if all(cell in found for found in by_seed)}
    if len(means) < FINALISTS:
        return None
    best = max(means, key=lambda cell: sum(means[cell]))
    return best._asdict() | {"judge_final": means[best], "cells": len(by_seed[0])}


# -------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES)[::-1])
    parser.add_argument("--processes", type=int, default=os.cpu_count(),
                        help="of one thread each [one per core]")
    options = parser.parse_args(argv)
    os.chdir(HERE.parent)
    path = HERE / "results/joint.csv"
    searches = [(arm, regime) for regime in options.regimes for arm in options.arms]
    rows = study.load(path)
    for arm, regime in searches:
        while jobs := wanted(rows, arm, regime):
            rows = study.complete(path, jobs, f"{arm}, {regime}", options.processes)
    chosen = {f"{arm}, {regime}": choose(rows, arm, regime)
              for regime in REGIMES for arm in ARMS}
    content = json.dumps({name: best for name, best in chosen.items() if best}, indent=1)
    (HERE / "results/joint.json").write_text(content + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Pictures and tables, from a run's files alone: numpy and matplotlib, nothing else of the project.

In reading order
    1. rows and curves   load_metrics, seed_curves          metrics.jsonl -> one curve per seed
    2. statistics        iqm, bootstrap_band,               pure: arrays in, arrays out
                         expanded_level, paired_difference
    3. tables            summarise, table                   rows -> summary.json -> text
    4. pictures          draw, main                         curves.png and .svg, of several runs too

Dimension key: S seeds, U updates, R bootstrap resamples; "..." any further axes.

The statistics follow Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (2108.13264, the library rliable). The unit is a seed: agents of one seed share their
start, what they exchange and the prompts they are judged on, so they are averaged first and only
seeds are resampled.

What a band means: a 95 % confidence interval of the line it surrounds, at each update by itself;
where the line might lie had other seeds been drawn, not where one run would lie. With few seeds it
is too narrow, as no resample holds what was never drawn: for the mean of normal values it covers
the truth in about 50, 74, 84, 89 and 93 of 100 cases with 2, 3, 5, 8 and 20 seeds. Overlapping
bands settle nothing; `paired_difference` does, and its band is widened for few seeds: about 91, 94
and 95 of 100 with 5, 8 and 20.

Departures from rliable
    D1  One task in place of many: the interquartile mean runs over seeds, and the bootstrap has no
        strata.
    D2  Differences are means over same-seed pairs: a seed gives each mode the same prompts and
        preference pairs.
"""

import argparse
import itertools
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NoReturn

import numpy as np

PANELS = {
    "judge": "judge's score on held-out prompts",
    "judge_own": "the same, on each agent's own splits",
    "reward": "own reward (z-score)",
    "kl_initial": "KL(policy‖initial), nats per response",
}
STYLE = {"font.size": 11, "svg.hashsalt": "fedppo", "svg.fonttype": "path"}
# Okabe and Ito's colours, for colour-blind readers; line and marker differ too, for grey prints.
MODE_STYLES = {
    "isolated": ("#D55E00", "--", "s"),
    "classic": ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    "federated": ("#0072B2", "-", "o"),
    "merged": ("#56B4E9", (0, (7, 3)), "P"),
    "fedavg": ("#009E73", "-.", "^"),
    "centralized": ("#000000", ":", "D"),
}
SPARE_STYLES = [("#E69F00", (0, (2, 1)), "X"), ("#888888", (0, (7, 1, 1, 1)), "<")]


BAND_FROM = 3  # seeds: fewer are shown one by one


class RunError(ValueError):
    """A mistake its user can mend: told in one line, without a traceback."""


# --------------------------------------------------------------------------------- rows and curves


def load_metrics(folder: str | Path) -> list[dict]:
    """The rows of folder/metrics.jsonl, one per mode, seed, agent and update. Raises RunError.

    Half a last line, as a killed run may leave, is ignored. Of two rows for one update the later
    counts.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        begun = path.with_name("config.json").is_file()
        raise RunError(f"{folder} has measured nothing yet" if begun else
                       f"{folder} is not the folder of a run: it has no metrics.jsonl")
    lines = path.read_bytes().splitlines()
    rows = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[row["mode"], row["seed"], row["agent"], row["update"]] = row
        except ValueError:
            if number < len(lines):
                raise RunError(f"{path}, line {number}: not JSON") from None
        except (KeyError, TypeError):
            raise RunError(f"{path}, line {number}: no mode, seed, agent or update") from None
    if not rows:
        raise RunError(f"{path} holds no metrics yet")
    return list(rows.values())


def seed_curves(rows: list[dict], mode: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """One curve per seed, the mean over its agents -> (updates [U], values [S, U]); seeds ascend.

    An update counts once every agent of the seed has a value there (null is none). U is that of the
    longest seed; seeds that stop before (a run still going, or killed) are left out, so that no
    line changes its members on the way.
    """
    agents, cells = {}, {}  # seed -> {agent}; seed -> {update: [one value per agent]}
    for row in rows:
        if row["mode"] == mode:
            agents.setdefault(row["seed"], set()).add(row["agent"])
            if row.get(key) is not None:
                cell = cells.setdefault(row["seed"], {})
                cell.setdefault(row["update"], []).append(row[key])
    curves = []  # for each seed: {update: mean over agents}
    for seed in sorted(cells):
        n = len(agents[seed])
        curves.append({u: np.mean(cell) for u, cell in cells[seed].items() if len(cell) == n})
    longest = max(curves, key=lambda curve: max(curve, default=-1), default={})
    updates = sorted(longest)
    values = [[curve[u] for u in updates] for curve in curves if curve.keys() >= longest.keys()]
    shape = len(values), len(updates)
    return np.array(updates, dtype=int), np.array(values, dtype=float).reshape(shape)


# -------------------------------------------------------------------------------------- statistics


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean (2108.13264, sec. 4.3): without the floor(n/4) lowest and highest values.

    No fractional weights, as in scipy.stats.trim_mean(values, 0.25), which rliable calls: of 4
    values, and of 7, the two extremes go; below 4 it is the mean. A nan is not trimmed away: the
    result is nan.
    """
    values = np.sort(np.asarray(values, dtype=float), axis=axis)  # nan last
    n = values.shape[axis]
    middle = np.take(values, range(n // 4, n - n // 4), axis=axis).mean(axis=axis)
    return np.where(np.isnan(np.take(values, -1, axis=axis)), np.nan, middle)


def bootstrap_band(
    values: np.ndarray, statistic: Callable = iqm, resamples: int = 2000, level: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap over the first axis. values: [S, ...] -> (low [...], high [...]).

    `resamples` times S seeds are drawn with replacement, each with its whole curve, and
    statistic(values, axis=0) is taken; low and high enclose the middle `level` of the results.
    """
    values = np.asarray(values, dtype=float)
    random = np.random.default_rng(seed)
    draws = random.integers(len(values), size=(resamples, len(values)))  # [R, S]
    statistics = np.stack([statistic(values[draw], axis=0) for draw in draws])  # [R, ...]
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def expanded_level(n: int) -> float:
    """The level at which the percentile bootstrap of a mean of n values covers about 95 %.

    Hesterberg's expanded percentile interval ("What Teachers Should Know about the Bootstrap",
    1411.5279): the percentile band is too narrow by sqrt((n - 1)/n) and has the normal's quantile z
    where Student's t is due, so each tail is Phi(-sqrt(n/(n - 1)) t). t by its expansion in
    1/(n - 1): right to 1 % from n = 5 on, too small below.
    """
    normal, df = NormalDist(), n - 1
    z = normal.inv_cdf(0.975)
    t = (z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
         + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3))
    return 1 - 2 * normal.cdf(-math.sqrt(n / df) * t)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a - b and its 95 % band -> (mean, low, high). a, b: [S], the same seeds in order.

    The band is the percentile bootstrap's, at the level that makes it cover 95 % with few seeds
    (`expanded_level`).
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"expected two or more pairs, got shapes {a.shape} and {b.shape}")
    low, high = bootstrap_band(a - b, statistic=np.mean, level=expanded_level(len(a)))
    return float(np.mean(a - b)), float(low), float(high)


# ------------------------------------------------------------------------------------------ tables


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None (null in JSON) if it is not finite, or there is no value or one is None."""
    values = list(values)
    mean = float(np.mean(values)) if values and None not in values else math.nan
    return mean if math.isfinite(mean) else None


def _summarise_agent(rows: list[dict]) -> dict:
    """One agent's rows, updates ascending -> its part of an entry, see `summarise`."""
    judged = [row for row in rows if row.get("judge") is not None]
    x, y = [row["update"] for row in judged], [row["judge"] for row in judged]
    last_round = [row.get("reward") for row in rows if row["round"] == rows[-1]["round"]]
    return {
        "judge_initial": y[0] if x[:1] == [0] else None,
        "judge_final": y[-1] if len(x) > 1 else None,
        "judge_own_initial": judged[0].get("judge_own") if x[:1] == [0] else None,
        "judge_own_final": judged[-1].get("judge_own") if len(x) > 1 else None,
        "kl_initial_final": rows[-1].get("kl_initial"),
        "judge_auc": np.trapezoid(y, x) / (x[-1] - x[0]) if len(x) > 1 else None,  # area / updates
        # The first rollout is the initial policy's: rewards are measured before each update.
        "reward_initial": next((row.get("reward") for row in rows if row["update"] == 1), None),
        "reward_final": _mean(reward for reward in last_round if reward is not None),
    }


def _summarise_seed(rows: list[dict]) -> dict:
    """The rows of one mode and seed -> that seed's entry, see `summarise`."""
    by_agent = {}
    for row in sorted(rows, key=lambda row: row["update"]):
        by_agent.setdefault(row["agent"], []).append(row)
    last = min(agent[-1]["update"] for agent in by_agent.values())  # every agent has done it
    agents = [[row for row in agent if row["update"] <= last] for agent in by_agent.values()]
    done = list(itertools.chain(*agents))
    scores = [_summarise_agent(agent) for agent in agents]
    entry = {"updates": last} | {key: _mean(score[key] for score in scores) for key in scores[0]}
    for key in ("judge_own_initial", "judge_own_final"):  # an agent may have no prompt of its own
        entry[key] = _mean(score[key] for score in scores if score[key] is not None)
    final = "reward_final" if all(row.get("judge") is None for row in rows) else "judge_final"
    worst = None if entry[final] is None else float(min(score[final] for score in scores))
    missed = {(row["agent"], row["round"]) for row in done if row.get("missed")}
    return entry | {
        "worst_agent_final": worst,
        "seconds": float(sum(row.get("wall") or 0 for row in done)),
        "incomplete_exchanges": len(missed),
        "bytes": int(sum(agent[-1].get("bytes") or 0 for agent in agents)),  # these are cumulative
    }


def _differences(modes: dict[str, dict]) -> dict:
    """judge_final of each mode minus that of isolated, paired by seed, see `summarise`."""
    alone = modes["isolated"]["seeds"] if "isolated" in modes else {}
    differences = {}
    for mode, entry in modes.items():
        pairs = [(own, alone[seed]) for seed, own in entry["seeds"].items() if seed in alone]
        finals = [[one["judge_final"] for one in pair] for pair in pairs
                  if pair[0]["updates"] == pair[1]["updates"]]
        finals = [pair for pair in finals if None not in pair]
        if mode == "isolated" or not finals:
            continue
        found = {"each": [a - b for a, b in finals]}
        if len(finals) >= BAND_FROM:
            band = paired_difference(*zip(*finals, strict=True))
            found |= dict(zip(("mean", "low", "high"), band, strict=True))
        differences[f"{mode} - isolated"] = found
    return differences


def summarise(rows: list[dict]) -> dict:
    """Rows -> {"modes": {mode: {"seeds": {seed: entry}, "mean": entry}}, "differences": {...}}.

    An entry: judge_initial and judge_final, the first and last score on held-out prompts;
    judge_own_initial and judge_own_final, the same on those of the agent's own splits; judge_auc,
    the mean height of the judge's curve (trapezoids); kl_initial_final, the last update's KL to the
    initial policy; reward_initial, the own reward of the first rollout, which is the initial
    policy's, and reward_final, over the last round's updates: all means over agents;
    worst_agent_final, the lowest judge_final (reward_final if there is no judge); seconds on the
    clock of training and judging all agents; bytes received, of all agents;
    incomplete_exchanges, how often an agent was absent or could not use what a peer sent; updates,
    how far the seed came. None: cannot be had. All is fit for JSON.
    "mean" is over the seeds that came as far as the mode's farthest. "differences" holds "MODE -
    isolated" in judge_final for every other mode, paired over the seeds in which both came equally
    far: that of each seed, and for BAND_FROM seeds or more their mean and its band.
    """
    groups = {}
    for row in rows:
        groups.setdefault(row["mode"], {}).setdefault(row["seed"], []).append(row)
    modes = {}
    for mode, by_seed in groups.items():
        seeds = {str(seed): _summarise_seed(by_seed[seed]) for seed in sorted(by_seed)}
        farthest = max(entry["updates"] for entry in seeds.values())
        done = [entry for entry in seeds.values() if entry["updates"] == farthest]
        mean = {key: _mean(entry[key] for entry in done) for key in done[0]}
        modes[mode] = {"seeds": seeds, "mean": mean}
    return {"modes": modes, "differences": _differences(modes)}


def table(summary: dict) -> str:
    """The summary as text: a row for each mode, then the paired differences, if any."""

    def number(value: float | None, decimals: int = 2) -> str:
        return "-" if value is None else f"{value:.{decimals}f}"

    # Without a judge, what training raises: the own reward.
    means = [entry["mean"] for entry in summary["modes"].values()]
    judged = any(mean["judge_initial"] is not None for mean in means)
    key, title = ("judge", "judge's score") if judged else ("reward", "own reward")
    line = "{:<11} {:>5}  {:>14}  {:>14}  {:>5}  {:>6}  {:>6}  {:>6}"
    lines = [line.format("mode", "seeds", title, "on own splits", "worst", "KL to",
                         "MB re-", "wall"),
             line.format("", "", "before, after", "before, after", "agent", "start", "ceived",
                         "s")]
    for mode, entry in summary["modes"].items():
        mean = entry["mean"]
        scores = [f"{number(mean[f'{name}_initial'])} -> {number(mean[f'{name}_final'])}"
                  for name in (key, "judge_own")]
        seeds = [one for one in entry["seeds"].values() if one["updates"] == mean["updates"]]
        costs = number(mean["bytes"] / 1e6, 1), number(mean["seconds"], 0)
        lines.append(line.format(mode, len(seeds), *scores,
                                 number(mean["worst_agent_final"]),
                                 number(mean["kl_initial_final"], 1), *costs))
    lines.append("(means over seeds; KL, in nats per response, and rewards are of rollouts, made\n"
                 " before their update; MB and seconds of all agents, without preparation)")
    for mode, entry in summary["modes"].items():
        if missed := sum(seed["incomplete_exchanges"] for seed in entry["seeds"].values()):
            lines.append(f"{mode}: {missed} times an agent was absent, frozen or missed a peer "
                         "(`missed` in metrics.jsonl)")
    width = max(map(len, summary["differences"]), default=0)
    for name, d in summary["differences"].items():
        text = ", ".join(f"{one:+.2f}" for one in d["each"]) + " (each seed)"
        if "mean" in d:
            text = (f"{d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}] "
                    f"({len(d['each'])} seeds, 95 % band)")
        lines.append(f"{name + ',':<{width + 1}} judge after: {text}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- pictures


def _styles(modes: list[str]) -> list[tuple]:
    """(colour, line, marker) of each curve, no two alike up to eight runs. modes: of the curves.

    A mode of MODE_STYLES has one colour in every picture. Its first curve has its own line and
    marker too; later ones, of other runs, have those of nobody else, as long as there are any.
    """
    every = [*MODE_STYLES.values(), *SPARE_STYLES]
    names = list(dict.fromkeys([*MODE_STYLES, *modes]))
    own = {mode: every[names.index(mode) % len(every)] for mode in modes}
    styles: list[tuple] = []
    for i, mode in enumerate(modes):
        colour, taken = own[mode][0], {style[1:] for style in (*own.values(), *styles)}
        place = every.index(own[mode])
        turns = [every[(place + n) % len(every)][1:] for n in range(len(every))]
        choice = [own[mode][1:]] if mode not in modes[:i] else []
        choice += [line for line in turns if line not in taken] + turns
        found = [(colour, *line) for line in choice]
        styles.append(next((style for style in found if style not in styles), found[-1]))
    return styles


def _draw_curve(axes, rows: list[dict], mode: str, key: str, style: tuple, label: str) -> int:
    """A mode's line in one panel, with its band or thin lines for 2 seeds or for 1 seed's agents.

    -> S, the number of seeds.
    """
    color, line, marker = style
    updates, values = seed_curves(rows, mode, key)  # [U], [S, U]
    if not len(updates):
        return 0
    axes.plot(updates, iqm(values), color=color, linestyle=line, linewidth=2, marker=marker,
              markersize=5, markevery=max(1, len(updates) // 10), label=label, zorder=3)
    if len(values) >= BAND_FROM:
        axes.fill_between(updates, *bootstrap_band(values), color=color, alpha=0.18, linewidth=0)
        return len(values)
    unit = "seed" if len(values) == 2 else "agent"
    members = sorted({row[unit] for row in rows if row["mode"] == mode})
    for member in members if len(members) > 1 else []:
        x, y = seed_curves([row for row in rows if row[unit] == member], mode, key)  # [U], [1, U]
        axes.plot(x, y.T, color=color, linestyle=line, linewidth=0.8, alpha=0.45)
    return len(values)


def _caption(runs: list[list[dict]], seeds: set[int]) -> str:
    """How many agents and seeds, and what lines and bands mean for curves over `seeds` (counts)."""
    agents = {len({row["agent"] for row in rows if row["mode"] == mode})
              for rows in runs for mode in {row["mode"] for row in rows}}
    agents, counts = (" or ".join(map(str, sorted(numbers))) for numbers in (agents, seeds))
    meaning = {
        1: "thick: mean over agents, thin: each agent",
        2: "thick: mean over 2 seeds, thin: each seed",
        3: "line: mean over 3 seeds, band: 95 % bootstrap",
        4: "line: interquartile mean over seeds, band: 95 % bootstrap",
    }
    lines = [meaning[n] for n in sorted({min(n, 4) for n in seeds}) if n > 1 or agents != "1"]
    return "\n".join([f"agents: {agents}, seeds: {counts}", *lines])


def _add_legend(figure, lines: dict) -> None:
    """Every label once, below the panels, in as few rows as the figure is wide enough for; the
    figure grows by what the legend takes, so that the panels keep their size."""
    labels = [textwrap.fill(label, 50) for label in lines]
    for columns in range(min(6, len(lines)), 0, -1):
        legend = figure.legend(lines.values(), labels, loc="outside lower center", ncols=columns,
                               frameon=False, handlelength=4)
        size = legend.get_window_extent()
        if size.width <= 0.98 * figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)


def draw(folders: Sequence[str | Path], out: str | Path) -> tuple[Path, Path]:
    """Draw one or several runs: judge's score, that on each agent's own splits if it has some, own
    reward and KL to the initial policy, by updates.

    Where the own reward rises and the judge's score does not, the agents exploit their reward
    models. Of an update the judge has scored the policy after it; own reward and KL are of its
    rollout, so of the one before. Writes `out` (.png) and the same picture as .svg, same bytes for
    same metrics -> both paths. Raises RunError.
    """
    import matplotlib
    from matplotlib.figure import Figure  # and no pyplot: no global state, no window system

    png = Path(out)
    if png.suffix != ".png":
        raise RunError(f"the name of the picture must end in .png: {out}")
    runs = {str(folder): load_metrics(folder) for folder in folders}
    short = {name: Path(name).resolve().name for name in runs}
    curves = []  # (label, rows, mode)
    for name, rows in runs.items():
        run = short[name] if len(set(short.values())) == len(runs) else name
        for mode in dict.fromkeys(row["mode"] for row in rows):  # in the order of the run
            curves.append((mode if len(runs) == 1 else f"{run}: {mode}", rows, mode))
    keys = [key for key in PANELS
            if any(len(seed_curves(rows, mode, key)[0]) for _, rows, mode in curves)]
    if not keys:
        raise RunError(f"{', '.join(runs)}: no update to draw yet")

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(8.4, 4.2 * len(keys)), 4.2), layout="constrained")
        figure.get_layout_engine().set(wspace=0.05)
        panels = figure.subplots(1, len(keys), sharex=True, squeeze=False)[0]
        styles = _styles([mode for *_, mode in curves])
        seeds, legend = set(), {}  # how many seeds the curves have; label -> line
        for axes, key in zip(panels, keys, strict=True):
            for (label, rows, mode), style in zip(curves, styles, strict=True):
                seeds.add(_draw_curve(axes, rows, mode, key, style, label))
            legend |= {line.get_label(): line for line in axes.get_legend_handles_labels()[0]}
            axes.set(xlabel="PPO updates per agent", ylabel=PANELS[key])
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        if "judge" not in keys:
            panels[0].set_title("no judge: the agents' own reward only", fontsize=11)
        _add_legend(figure, legend)
        figure.suptitle(_caption(list(runs.values()), seeds - {0}), fontsize=12)
        figure.savefig(png, dpi=150, metadata={"Software": None})
        figure.savefig(png.with_suffix(".svg"), metadata={"Date": None})
    return png, png.with_suffix(".svg")


def unfinished(folder: str | Path, rows: list[dict]) -> str:
    """How far a run with these rows has come that goes on or was stopped; "" of a finished one."""
    if (Path(folder) / "summary.json").exists():
        return ""
    return " is not finished: {mode}, seed {seed}, is at update {update}".format(**rows[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """python plot.py RUN [RUN ...] [--out FILE.png] -> exit code: 0, or 2 and one line on why."""

    def error(message: str) -> NoReturn:
        raise RunError(message)

    parser = argparse.ArgumentParser(description="Draw one or several runs and print their tables.")
    parser.error = error  # one line, as for every other mistake
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as "
                        "runs/first")
    parser.add_argument("--out", metavar="FILE.png", help="the picture; the same as .svg goes "
                        "beside it (default: curves.png, in the folder of a single run, else in "
                        "this one)")
    try:
        options = parser.parse_args(argv)
        home = Path(options.runs[0]) if len(options.runs) == 1 else Path()
        pictures = draw(options.runs, options.out or home / "curves.png")
        for run in options.runs:
            rows = load_metrics(run)
            print(f"{run}{unfinished(run, rows)}\n{table(summarise(rows))}\n")
    except (RunError, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    print("pictures:", *pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The tables and pictures of the study, from study.csv alone.

    python benchmarks/report.py [FOLDER]   default: benchmarks/results; study.py calls it at its end

In reading order
    1. statistics        updates_to, median_updates
    2. cells             the seeds of one arm in one regime
    3. tables            tables.md: what is quoted elsewhere, and a test compares
    4. pictures          curves, mixed and forest, as .png and .svg

Levels are interquartile means over seeds, differences means over same-seed pairs with a 95 %
bootstrap band (plot.py).

Dimension key: S seeds, U evaluated updates, N agents.
"""

import copy
import csv
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402

import plot  # noqa: E402

IN_SHORT = {  # of the README's first screen
    "isolated": "alone; KL to its own last copy and the initial policy",
    "classic": "alone; KL to the initial policy",
    "federated": "KL to all policies received",
    "merged": "the same, and weights are averaged",
    "fedavg": "weights are averaged, KL to the average",
}
HEADLINES = ("common prompts", "own prompts")  # the regimes that PPO's arms are tuned in
ELSEWHERE_SEEDS = 6  # of the other regimes, the first ones
HALF, ALL = "after 40 updates", "after 80"  # the columns judge_half and judge_final, in words
SMALL, LARGE = (0, 2), (1, 3)  # agents of tiny/model and of tiny/model-96x3 with mixed sizes

# ------------------------------------------------------------------------------------- statistics


def updates_to(updates: Sequence[int], curve: Sequence[float], level: float) -> float:
    """The first evaluated update at which the curve is at `level` or above; inf: never, censored.

    updates, curve: [U]. Not interpolated: a level passed between two evaluations counts at the
    later one.
    """
    reached = np.asarray(updates)[np.asarray(curve, dtype=float) >= level]
    return float(reached[0]) if len(reached) else math.inf


def median_updates(values: Sequence[float]) -> float:
    """The smallest number of updates by which half of the seeds had arrived; inf if fewer ever did.

    values: [S]. Runs that never arrive (inf) are censored where all runs end, so this is the
    Kaplan-Meier median; leaving them out, or counting them as the last update, would favour the arm
    that fails.
    """
    return float(np.sort(np.asarray(values, dtype=float))[math.ceil(len(values) / 2) - 1])


# ------------------------------------------------------------------------------------------ cells


def join(numbers: Iterable[float]) -> str:
    """Numbers of one cell of the csv."""
    return " ".join(f"{number:.4g}" for number in numbers)


def split(text: str) -> np.ndarray:
    """The numbers of such a cell, [U]."""
    return np.array([float(value) for value in text.split()])


class Study:
    """The rows of study.csv by arm and regime. Diverged runs, without scores, are apart."""

    def __init__(self, folder: Path):
        with (folder / "study.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.rows = [row for row in rows if row["judge_final"]]
        self.diverged = [row for row in rows if not row["judge_final"]]
        self.arms = list(dict.fromkeys(row["arm"] for row in self.rows))
        self.regimes = list(dict.fromkeys(row["regime"] for row in self.rows))

    def cell(self, arm: str, regime: str) -> dict[int, dict]:
        """{seed: row}, seeds ascending; `centralized` and DPO, to which it is the same whose the
        prompts are, stand in both headlines.

        Raises ValueError if a seed was run with two settings.
        """
        found: dict[int, dict] = {}
        regimes = (regime, "pairs alone") if regime in HEADLINES else (regime,)
        regimes += ("common prompts",) if (arm, regime) == ("centralized", "own prompts") else ()
        for row in self.rows:
            seed = int(row["seed"])
            if row["arm"] == arm and row["regime"] in regimes:
                if seed in found:
                    raise ValueError(f"{arm}, {regime}, seed {seed} stands twice: remove the rows "
                                     "of old settings")
                found[seed] = row
        return dict(sorted(found.items()))

    def some(self, which: slice) -> "Study":
        """The study of some of its seeds, ascending."""
        part = copy.copy(self)
        seeds = sorted({int(row["seed"]) for row in self.rows + self.diverged})[which]
        part.rows = [row for row in self.rows if int(row["seed"]) in seeds]
        return part

    def has(self, regime: str) -> list[str]:
        """The arms with two or more seeds there, variants apart."""
        return [arm for arm in self.arms
                if len(self.cell(arm, regime)) > 1 and "," not in arm]

    def values(self, arm: str, regime: str, column: str | Callable) -> np.ndarray:
        """[S] a column's numbers, or what a function makes of each row."""
        of = column if callable(column) else lambda row: float(row[column])
        return np.array([of(row) for row in self.cell(arm, regime).values()])

    def pairs(self, a: str, b: str, regime: str, column: str | Callable) -> np.ndarray:
        """[2, S] a column of two arms on the seeds that both have."""
        of = column if callable(column) else lambda row: float(row[column])
        first, second = self.cell(a, regime), self.cell(b, regime)
        seeds = [seed for seed in first if seed in second]
        return np.array([[of(cell[seed]) for seed in seeds] for cell in (first, second)])


def curve(row: dict, agents: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(updates [U], the judge's score [U]) after every round from update 0 on; agents: of these
    alone, their mean."""
    values = split(row["judge_curve"])
    if agents is not None:
        curves = [split(text) for text in row["judge_agents"].split("/")]
        values = np.mean([curves[agent] for agent in agents], 0)
    each = int(flag(row, "--updates", "4"))
    return np.arange(len(values)) * each, values


def of_agents(agents: Sequence[int], part: float = 1.0) -> Callable:
    """The score of these agents after a part of the updates, as a column."""
    def column(row: dict) -> float:
        values = curve(row, agents)[1]
        return values[int(part * (len(values) - 1))]

    return column


def own_half(row: dict) -> float:
    """The score on the agent's own topics after half of the updates, as a column."""
    values = split(row["own_curve"])
    return values[len(values) // 2]


def fall(row: dict) -> float:
    """How far the final score lies below the best of the run, as a column."""
    return float(row["judge_best"]) - float(row["judge_final"])


def difference(pairs: np.ndarray) -> str:
    """[2, S] -> mean of first minus second, its band, and in how many seeds the first is higher."""
    if pairs.shape[-1] < 2:
        return "–"
    mean, low, high = plot.paired_difference(*pairs)
    first, second = pairs
    better = ((first > second) + 0.5 * (first == second)).sum()  # a tie is half
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], {better:g} of {len(first)}"


def level(values: np.ndarray) -> str:
    low, high = plot.bootstrap_band(values, level=plot.expanded_level(len(values)))
    return f"{plot.iqm(values):.2f} [{low:.2f}, {high:.2f}]"


def flag(row: dict, name: str, default: str = "") -> str:
    """The value of a flag in a row's command."""
    words = row["settings"].split()
    return words[words.index(name) + 1] if name in words else default


# ----------------------------------------------------------------------------------------- tables


def table(header: str, rows: Iterable[list[str]]) -> list[str]:
    """header: names separated by " | "."""
    return [f"| {header} |", "|" + "---|" * len(header.split(" | ")),
            *(f"| {' | '.join(row)} |" for row in rows)]


def gain(study: Study, a: str, b: str, regime: str,
         column: str | Callable = "judge_final") -> str:
    """`difference` of two arms; "–" of an arm and itself."""
    return "–" if a == b else difference(study.pairs(a, b, regime, column))


def short_table(study: Study) -> list[str]:
    """The README's first screen."""
    lines = []
    for arm in [arm for arm in IN_SHORT if all(arm in study.has(regime)
                                               for regime in HEADLINES)]:
        line = [f"`{arm}`", IN_SHORT[arm]]
        for regime in HEADLINES:
            line += [f"{plot.iqm(study.values(arm, regime, column)):.2f}"
                     for column in ("judge_half", "judge_final")]
            line.append(gain(study, arm, "isolated", regime))
        lines.append(line)
    names = [f"{regime}: {HALF} | {ALL} | {ALL}, minus `isolated`, seeds better"
             for regime in HEADLINES]
    return table("arm | its agents | " + " | ".join(names), lines)


def headline_table(study: Study, regime: str) -> list[str]:
    """Each arm's scores in a headline regime, and what is between it, `isolated` and `federated`.
    """
    lines = []
    for arm in study.has(regime):
        row = next(iter(study.cell(arm, regime).values()))
        settings = [flag(row, name) or "–"
                    for name in ("--beta", "--lr", "--anchor", "--self-weight")]
        lines.append([f"`{arm}`", ", ".join(settings)])
        for column in ("judge_half", "judge_final"):
            lines[-1] += [level(study.values(arm, regime, column)),
                          gain(study, arm, "isolated", regime, column)]
        lines[-1].append(gain(study, "federated", arm, regime))
    return table(f"arm | β, lr, anchor, own weight | {HALF} | minus `isolated`, seeds better | "
                 f"{ALL} | minus `isolated`, seeds better | `federated` minus it, seeds better",
                 lines)


def topic_table(study: Study, regime: str) -> list[str]:
    """The same after the last update, on prompts of the agent's own topics alone."""
    lines = [[f"`{arm}`", level(study.values(arm, regime, "own_topics")),
              gain(study, arm, "isolated", regime, "own_topics"),
              gain(study, "federated", arm, regime, "own_topics")]
             for arm in study.has(regime)]
    return table(f"arm | own topics, {ALL} | minus `isolated`, seeds better | "
                 "`federated` minus it, seeds better", lines)


def detail_table(study: Study, regime: str) -> list[str]:
    """The same arms: means over seeds, but for the median of seconds."""
    lines = []
    for arm in study.has(regime):
        rows = study.cell(arm, regime).values()
        agents = len(next(iter(rows))["judge_agents"].split("/"))
        mean = {name: study.values(arm, regime, name).mean()
                for name in ("worst_agent", "bytes", "judge_best")}
        columns = ("reward_accuracy", 2), ("reward_final", 2), ("kl_initial", 1)
        learned = ["–"] * 3 if not next(iter(rows))["reward_final"] else [  # DPO has no rewards
            f"{study.values(arm, regime, name).mean():.{digits}f}" for name, digits in columns]
        lines.append([f"`{arm}`", str(len(rows)),
                      f"{mean['worst_agent']:.2f}" if agents > 1 else "–",
                      f"{mean['judge_best']:.2f}", falls(study, arm, regime), *learned,
                      f"{mean['bytes'] / agents / 1e6:.0f}",
                      f"{np.median(study.values(arm, regime, 'seconds')):.0f}"])
    return table("arm | seeds | worst agent | best score of the run | "
                 "seeds that end more than 0.05 below it | accuracy of reward models | "
                 "own reward | KL to initial, nats | MB received by an agent | median seconds",
                 lines)


def falls(study: Study, arm: str, regime: str) -> str:
    fallen = study.values(arm, regime, fall)
    return f"{int((fallen > 0.05).sum())} of {len(fallen)}"


def goal_table(study: Study, regime: str) -> list[str]:
    """The questions that were asked beforehand."""
    names = [arm for arm in ("federated", "merged", "fedavg") if arm in study.has(regime)]
    if not names or "isolated" not in study.has(regime):
        return []
    lines = [[f"{when} minus `isolated`, seeds better",
              *(gain(study, name, "isolated", regime, column) for name in names)]
             for when, column in ((HALF, "judge_half"), (ALL, "judge_final"))]
    lines += [[f"{ALL} minus `{arm}`, seeds better",
               *(gain(study, name, arm, regime) for name in names)]
              for arm in ("classic", "isolated 4x batch", "fedavg", "centralized", "feddpo")
              if arm in study.has(regime)]
    lines += [[f"median updates to the score of `isolated` {when} (in brackets: itself)",
               *(catch_up(study, name, "isolated", regime, part) for name in names)]
              for when, part in ((HALF, 0.5), (ALL, 1.0))]
    lines.append(["seeds that end more than 0.05 below the best score of the run",
                  *(falls(study, name, regime) for name in names)])
    lines.append(["single agents that end below themselves in `isolated`; mean gain by agent",
                  *(worse_agents(study, name, regime) for name in names)])
    return table("question | " + " | ".join(f"`{name}`" for name in names), lines)


def catch_up(study: Study, arm: str, other: str, regime: str, part: float) -> str:
    """Median over seeds of the updates at which `arm` first has the score that `other` has after
    `part` of its own on the same seed, and that of `other` itself."""
    first, second = (study.cell(name, regime) for name in (arm, other))
    if not first.keys() & second.keys():
        return "–"
    both = []
    for seed in [seed for seed in first if seed in second]:
        updates, values = curve(second[seed])
        level = values[int(part * (len(values) - 1))]
        both.append((updates_to(*curve(first[seed]), level), updates_to(updates, values, level)))
    medians = [median_updates(values) for values in zip(*both, strict=True)]
    reached, own = (f"{median:.0f}" if np.isfinite(median) else "never" for median in medians)
    return f"{reached} ({own})"


def worse_agents(study: Study, arm: str, regime: str) -> str:
    """How many agents end below themselves in `isolated`, and the mean gain of each."""
    agents = range(len(next(iter(study.cell(arm, regime).values()))["judge_agents"]
                       .split("/")))
    both = [study.pairs(arm, "isolated", regime, of_agents([n])) for n in agents]
    apart = np.array([first - second for first, second in both])  # [N, S]
    return (f"{int((apart < 0).sum())} of {apart.size}; " +
            ", ".join(f"{mean:+.2f}" for mean in apart.mean(1)))


def regime_table(study: Study, column: str = "judge_final") -> list[str]:
    """The level of `isolated` in each regime, and the difference of others on the same seeds: the
    first ELSEWHERE_SEEDS."""
    lines, study = [], study.some(slice(ELSEWHERE_SEEDS))
    for regime in [regime for regime in study.regimes if "isolated" in study.has(regime)
                   and regime != "own prompts"]:
        alone = study.values("isolated", regime, column)
        lines.append([regime, f"{plot.iqm(alone):.2f}"])
        half = "judge_half" if column == "judge_final" else own_half
        for arm, columns in (("federated", (half, column)), ("fedavg", (column,))):
            lines[-1] += [gain(study, arm, "isolated", regime, name) for name in columns]
    return table(f"regime | `isolated`, {ALL} | `federated` minus it, {HALF}, seeds better | {ALL} "
                 f"| `fedavg` minus it, {ALL}, seeds better", lines)


def mixed_table(study: Study) -> list[str]:
    """Two sizes of model in one federation: the small agents, the large ones, and all."""
    lines, regime = [], "mixed sizes"
    if "isolated" not in study.has(regime):
        return []
    for name, agents in (("small", SMALL), ("large", LARGE), ("all", (*SMALL, *LARGE))):
        lines.append([name])
        for part in (0.5, 1.0):
            column = of_agents(agents, part)
            lines[-1] += [f"{plot.iqm(study.values(arm, regime, column)):.2f}"
                          for arm in ("isolated", "federated")]
            lines[-1].append(gain(study, "federated", "isolated", regime, column))
    return table(f"agents | `isolated`, {HALF} | `federated` | difference, seeds better | "
                 f"`isolated`, {ALL} | `federated` | difference, seeds better", lines)


def community_table(study: Study) -> list[str]:
    """Two communities: by the common truth, and each agent by its own community's."""
    lines, regime, columns = [], "two communities", ("judge_final", "own_truth")
    for arm in study.has(regime):
        lines.append([f"`{arm}`", *(f"{plot.iqm(study.values(arm, regime, column)):.2f}"
                                    for column in columns),
                      *(gain(study, arm, "isolated", regime, column)
                        for column in columns)])
    return table("arm | common truth | own truth | common, minus `isolated` | "
                 "own, minus `isolated`", lines)


def variant_table(study: Study) -> list[str]:
    """An arm changed in one thing, against the arm itself, `fedavg` and `isolated` on the same
    seeds; where it has all, once more on those that had no part in the choice of what to run on."""
    lines, fresh = [], study.some(slice(ELSEWHERE_SEEDS, None))
    for name in [arm for arm in study.arms if "," in arm]:
        arm, change = name.split(", ")
        for regime in study.regimes:
            for part, words in ((study, ""), (fresh, f", without the first {ELSEWHERE_SEEDS}")):
                if len(part.cell(name, regime)) < 2:
                    continue
                final = plot.iqm(part.values(name, regime, "judge_final"))
                lines.append([f"`{arm}`", change, regime + words, f"{final:.2f}",
                              *(gain(part, name, arm, regime, column)
                                for column in ("judge_half", "judge_final")),
                              *(gain(part, name, other, regime)
                                for other in ("fedavg", "isolated"))])
    return table(f"arm | changed to | regime | {ALL} | minus the arm itself, {HALF} | {ALL} | "
                 f"minus `fedavg`, {ALL} | minus `isolated`, {ALL}", lines)


def failure_table(study: Study) -> list[str]:
    """Every comparison of `federated` with another arm, but those that are it in part, in which the
    band of its gain is not above 0.

    Scores over all topics, on the agent's own topics, and by the own truth of communities.
    """
    lines = []
    for regime in [regime for regime in study.regimes if regime != "pairs alone"]:
        columns = {"judge_half": f", {HALF}", "judge_final": f", {ALL}",
                   "own_topics": f", own topics, {ALL}"}
        if regime == "two communities":
            columns["own_truth"] = ", own truth"
        for column, words in columns.items():
            for arm in [arm for arm in study.has(regime) if "federated" not in arm]:
                both = study.pairs("federated", arm, regime, column)
                if both.shape[-1] > 1 and plot.paired_difference(*both)[1] <= 0:
                    lines.append([f"`{arm}`", regime + words, difference(both)])
    return table("`federated` minus | regime | difference, seeds better", lines)


def write(folder: Path) -> str:
    """Make tables.md and the pictures of a folder -> the tables."""
    study = Study(folder)
    text = tables(study)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    draw(study, folder)
    return text


INTRODUCTION = (
    "Made by `python benchmarks/report.py` from study.csv. Levels are interquartile means over "
    "seeds [95 % bootstrap band], differences means over same-seed pairs [95 % band], with the "
    "number of seeds in which the first is better; other columns are plain means where they do not "
    "say median. Bands are at the level that covers 95 % with few seeds (expanded_level in "
    "plot.py; for levels it is a little more) and not corrected for their number. DPO takes 160 "
    "steps on the pairs alone: its columns are after 80 of them and after all. The own reward is "
    "z-scored for each reward model. With flipped labels only the three honest agents count.")


def tables(study: Study) -> str:
    """The text of tables.md."""
    diverged, runs = len(study.diverged), len(study.rows) + len(study.diverged)
    hours = sum(float(row["seconds"]) for row in study.rows) / 3600
    lines = ["# Tables of the study", "", INTRODUCTION, "",
             f"{runs} runs, {diverged} of them diverged and are left out; {hours:.1f} hours of PPO "
             "updates and DPO steps on one core."]
    sections = {"In short": short_table(study)}
    for regime in HEADLINES:
        sections |= {f"Scores, {regime}": headline_table(study, regime),
                     f"Questions, {regime}": goal_table(study, regime),
                     f"Details, {regime}": detail_table(study, regime),
                     f"Own topics, {regime}": topic_table(study, regime)}
    sections |= {
        f"Regimes, the first {ELSEWHERE_SEEDS} seeds": regime_table(study),
        f"Regimes, on the agent's own topics, the first {ELSEWHERE_SEEDS} seeds":
            regime_table(study, "own_topics"),
        "Mixed sizes": mixed_table(study),
        "Two communities": community_table(study),
        "Variants": variant_table(study),
        "No gain, or a loss": failure_table(study)}
    for title, rows in sections.items():
        if len(rows) > 2:  # else its runs are still to come
            lines += ["", f"## {title}", "", *rows]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------- pictures


def draw(study: Study, folder: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    pictures = {"curves": draw_curves}
    if study.has("mixed sizes"):  # else its runs are still to come
        pictures |= {"mixed": draw_mixed, "forest": draw_forest}
    with matplotlib.rc_context(plot.STYLE):
        for name, make in pictures.items():
            figure = Figure(layout="constrained")
            make(figure, study)
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def plain(axes, xlabel: str, ylabel: str, grid: str = "both") -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure, axes, **options) -> None:
    """Below the panels, each label once."""
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", frameon=False,
                      **options)


def band(axes, rows: list[dict], arm: str, agents: Sequence[int] | None = None) -> None:
    """One arm's curve: the interquartile mean over its rows and the bootstrap band."""
    color, line, marker = plot.MODE_STYLES[arm]
    updates = curve(rows[0], agents)[0]  # [U]
    values = np.array([curve(row, agents)[1] for row in rows])  # [S, U]
    axes.plot(updates, plot.iqm(values), color=color, linestyle=line, linewidth=2, marker=marker,
              markersize=5, markevery=max(1, len(updates) // 10), label=arm)
    axes.fill_between(updates, *plot.bootstrap_band(values), color=color, alpha=0.15, linewidth=0)


def draw_curves(figure, study: Study) -> None:
    """Judge's score against updates in both headlines."""
    figure.set_size_inches(10, 4.8)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, regime in zip(panels, HEADLINES, strict=True):
        seeds = len(study.cell("isolated", regime))
        for arm in ("isolated", "federated", "merged", "fedavg"):
            rows = list(study.cell(arm, regime).values())
            if len(rows) > 1:
                band(axes, rows, arm)
        plain(axes, "PPO updates per agent",
              "judge's score on held-out prompts" if axes is panels[0] else "")
        axes.set_title(f"{regime}, {seeds} seeds", fontsize=12)
    legend(figure, panels[0], ncols=4, handlelength=4)
    figure.suptitle("4 agents: interquartile mean over seeds, 95 % bootstrap band", fontsize=12)


def draw_mixed(figure, study: Study) -> None:
    """Two sizes of model in one federation: the small agents and the large ones."""
    figure.set_size_inches(10, 4.8)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, agents, words in zip(
            panels, (SMALL, LARGE), ("the two agents of 0.12 million weights",
                                     "the two agents of 0.37 million weights"), strict=True):
        for arm in ("isolated", "federated"):
            rows = list(study.cell(arm, "mixed sizes").values())
            if len(rows) > 1:
                band(axes, rows, arm, agents)
        plain(axes, "PPO updates per agent",
              "judge's score on held-out prompts" if axes is panels[0] else "")
        axes.set_title(words, fontsize=12)
    legend(figure, panels[0], ncols=2, handlelength=4)
    seeds = len(study.cell("isolated", "mixed sizes"))
    figure.suptitle(f"Two sizes of model in one federation, common prompts, {seeds} seeds: "
                    "interquartile mean, 95 % bootstrap band", fontsize=12)


def draw_forest(figure, study: Study) -> None:
    """Difference from `isolated` by regime, with its band, around a zero line."""
    rows = [(regime, "judge_final", regime) for regime in study.regimes]
    rows.append(("two communities", "own_truth", "two communities, own truth"))
    rows = [row for row in rows
            if study.pairs("federated", "isolated", row[0], row[1]).shape[-1] > 1]
    figure.set_size_inches(8.4, 2.2 + 0.6 * len(rows))
    axes = figure.subplots()
    labels = []
    for y, (regime, column, name) in enumerate(rows):
        labels.append(f"{name} ({len(study.cell('isolated', regime))})")
        for k, arm in enumerate(("federated", "fedavg")):
            pairs = study.pairs(arm, "isolated", regime, column)
            if pairs.shape[-1] > 1:
                mean, low, high = plot.paired_difference(*pairs)
                color, _, marker = plot.MODE_STYLES[arm]
                axes.errorbar(mean, y + 0.24 * (k - 0.5), xerr=[[mean - low], [high - mean]],
                              color=color, marker=marker, markersize=6, capsize=3,
                              linestyle="none", label=arm)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    plain(axes, f"score {ALL} updates minus isolated's,\nsame seeds, 95 % band",
          "regime (seeds)", grid="x")
    legend(figure, axes, ncols=2)


def main(argv: list[str]) -> int:
    print(write(Path(argv[0]) if argv else HERE / "results"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The tables and pictures of the study, from study.csv and again.csv alone.

    python benchmarks/report.py [FOLDER]   default: benchmarks/results; study.py calls it at its end

In reading order
    1. statistics        probability_of_improvement, updates_to, median_updates
    2. cells             the seeds of one arm in one regime
    3. tables            tables.md: what is quoted elsewhere, and a test compares
    4. pictures          curves, forest and bytes, as .png and .svg

Levels are interquartile means over seeds, differences means over same-seed pairs with a 95 %
bootstrap band (plot.py).

Dimension key: S seeds, U evaluated updates.
"""

import csv
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402

import plot  # noqa: E402

BASELINES = ("isolated", "classic", "fedavg")  # with the same budget per agent as SUBJECTS
SUBJECTS = ("federated", "merged")
IN_SHORT = {  # of the README's first screen
    "isolated": "alone; KL to its own last copy",
    "classic": "alone; KL to the initial policy",
    "federated": "KL to all policies received",
    "merged": "the same, and weights are averaged",
    "fedavg": "weights are averaged, KL to the average",
}
ELSEWHERE = 8  # seeds of a regime; the headline's first ones stand beside them
STAGES = {"reported": range(1000, 1100), "confirm": range(3000, 3100)}  # told by their seeds

# ------------------------------------------------------------------------------------- statistics


def probability_of_improvement(a: Sequence[float], b: Sequence[float]) -> float:
    """Share of same-seed pairs in which a > b, a tie being half (2108.13264, sec. 4.3). a, b: [S].

    A seed is compared with itself, not with all seeds of the other arm as in rliable: a seed gives
    each arm the same prompts and pairs.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return float(np.mean((a > b) + 0.5 * (a == b)))


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


class Study:
    """The rows of study.csv by arm, regime and stage. Diverged runs, without scores, are apart."""

    def __init__(self, folder: Path, name: str = "study.csv"):
        self.folder = folder
        with (folder / name).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.rows = [row for row in rows if row["judge_final"]]
        self.diverged = [row for row in rows if not row["judge_final"]]
        self.arms = list(dict.fromkeys(row["arm"] for row in self.rows))
        self.regimes = list(dict.fromkeys(row["regime"] for row in self.rows))

    def cell(self, arm: str, regime: str, stage: str) -> dict[int, dict]:
        """{seed: row}, seeds ascending. Raises ValueError if a seed was run with two settings."""
        found: dict[int, dict] = {}
        for row in self.rows:
            seed = int(row["seed"])
            if (row["arm"], row["regime"]) == (arm, regime) and seed in STAGES[stage]:
                if seed in found:
                    raise ValueError(f"{arm}, {regime}, seed {seed} stands twice: remove the rows "
                                     "of old settings")
                found[seed] = row
        return dict(sorted(found.items()))

    def headline_arms(self, stage: str) -> list[str]:
        """The arms with two or more seeds in the headline, without those of PENALTY_ARMS."""
        return [arm for arm in self.arms
                if len(self.cell(arm, "headline", stage)) > 1 and "," not in arm]

    def values(self, arm: str, regime: str, stage: str, column: str = "judge_final") -> np.ndarray:
        """[S] a column's numbers."""
        return np.array([float(row[column]) for row in self.cell(arm, regime, stage).values()])

    def pairs(self, a: str, b: str, regime: str, stage: str,
              column: str = "judge_final") -> np.ndarray:
        """[2, S] a column of two arms on the seeds that both have."""
        first, second = self.cell(a, regime, stage), self.cell(b, regime, stage)
        seeds = [seed for seed in first if seed in second]
        return np.array([[float(cell[seed][column]) for seed in seeds] for cell in (first, second)])


def curve(row: dict, column: str = "judge_curve") -> tuple[np.ndarray, np.ndarray]:
    """(updates [U], values [U]): the judge's after every round from update 0 on, the own reward of
    every update."""
    values = np.array([float(value) for value in row[column].split()])
    if column == "judge_curve":
        updates = len(row["reward_curve"].split())
        return np.linspace(0, updates, len(values)).astype(int), values
    return np.arange(1, len(values) + 1), values


def difference(pairs: np.ndarray) -> str:
    """[2, S] -> mean of first minus second, its band, and in how many seeds the first is higher."""
    if pairs.shape[-1] < 2:
        return "–"
    mean, low, high = plot.paired_difference(*pairs)
    better, n = probability_of_improvement(*pairs) * pairs.shape[1], pairs.shape[1]
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], {better:g} of {n}"


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


def short_table(study: Study, stage: str) -> list[str]:
    """The README's first screen."""
    lines = []
    for arm in [arm for arm in IN_SHORT if arm in study.headline_arms(stage)]:
        lines.append([f"`{arm}`", IN_SHORT[arm],
                      f"{plot.iqm(study.values(arm, 'headline', stage)):.2f}",
                      gain(study, arm, "isolated", "headline", stage),
                      catch_up(study, arm, "isolated", stage)])
    return table("arm | its agents | final score | minus `isolated`, seeds better | "
                 "median updates to the final score of `isolated`", lines)


def gain(study: Study, a: str, b: str, regime: str, stage: str, column: str = "judge_final") -> str:
    """`difference` of two arms; "–" of an arm and itself."""
    return "–" if a == b else difference(study.pairs(a, b, regime, stage, column))


def headline_table(study: Study, stage: str, column: str = "judge_final") -> list[str]:
    """Each arm's final score in the headline, and what is between it, `isolated` and SUBJECTS."""
    lines = []
    for arm in study.headline_arms(stage):
        row = next(iter(study.cell(arm, "headline", stage).values()))
        apart = [gain(study, a, b, "headline", stage, column) for a, b in
                 ((arm, "isolated"), *((subject, arm) for subject in SUBJECTS))]
        lines.append([f"`{arm}`", f"{flag(row, '--beta')}, {flag(row, '--lr')}",
                      level(study.values(arm, "headline", stage, column)), *apart])
    return table("arm | β, lr | final score | minus `isolated`, seeds better | " +
                 " | ".join(f"`{subject}` minus it, seeds better" for subject in SUBJECTS), lines)


def detail_table(study: Study, stage: str) -> list[str]:
    """The same arms: means over seeds, but for the medians of updates and seconds."""
    lines = []
    for arm in study.headline_arms(stage):
        rows = list(study.cell(arm, "headline", stage).values())
        agents = len(rows[0]["judge_agents"].split())
        mean = {name: study.values(arm, "headline", stage, name).mean() for name in
                ("judge_auc", "worst_agent", "reward_final", "kl_initial", "bytes")}
        reached = median_updates([updates_to(*curve(row), 0.6) for row in rows])
        seconds = np.median(study.values(arm, "headline", stage, "seconds"))
        lines.append([f"`{arm}`", str(len(rows)), f"{mean['judge_auc']:.2f}",
                      f"{mean['worst_agent']:.2f}" if agents > 1 else "–",
                      f"{reached:.0f}" if np.isfinite(reached) else "never",
                      f"{mean['reward_final']:.2f}", f"{mean['kl_initial']:.1f}",
                      f"{mean['bytes'] / agents / 1e6:.0f}", f"{seconds:.0f}"])
    return table("arm | seeds | mean of the curve | worst agent | median updates to 0.6 | "
                 "own reward | KL to initial, nats | MB received by an agent | median seconds",
                 lines)


def regime_table(study: Study, stage: str, column: str = "judge_final") -> list[str]:
    """The level of `isolated` in each regime, and the difference of SUBJECTS on the same seeds."""
    arms = [arm for arm in study.arms if arm in SUBJECTS]
    lines = []
    for regime in study.regimes:
        alone = study.values("isolated", regime, stage, column)
        if len(alone) > 1:
            pairs = [study.pairs(arm, "isolated", regime, stage, column) for arm in arms]
            lines.append([regime, f"{plot.iqm(alone[:ELSEWHERE]):.2f}",
                          *(difference(both[:, :ELSEWHERE]) for both in pairs)])
    return table("regime | `isolated` | " +
                 " | ".join(f"`{arm}` minus it, seeds better" for arm in arms), lines)


def community_table(study: Study) -> list[str]:
    """Two communities: by the common truth, and each agent by its own community's."""
    lines, regime, columns = [], "two communities", ("judge_final", "own_truth")
    for arm in [arm for arm in study.arms if len(study.cell(arm, regime, "reported")) > 1]:
        lines.append([f"`{arm}`", *(f"{plot.iqm(study.values(arm, regime, 'reported', column)):.2f}"
                                    for column in columns),
                      *(gain(study, arm, "isolated", regime, "reported", column)
                        for column in columns)])
    return table("arm | common truth | own truth | common, minus `isolated` | "
                 "own, minus `isolated`", lines)


def together_table(study: Study, stage: str) -> list[str]:
    """What one more exchange after the last update would give, had the agents then deployed one
    policy."""
    lines = []
    for arm in study.arms:
        rows = [row for row in study.cell(arm, "headline", stage).values() if row["judge_average"]]
        if len(rows) > 1:
            final, average, mixture = (np.array([float(row[name]) for row in rows]) for name in
                                       ("judge_final", "judge_average", "judge_mixture"))
            lines.append([f"`{arm}`",
                          *(f"{plot.iqm(values):.2f}" for values in (final, average, mixture)),
                          difference(np.array([average, final]))])
    return table("arm | its agents, mean | average of their weights | geometric mixture | "
                 "average minus agents, seeds better", lines)


def failure_table(study: Study) -> list[str]:
    """Every comparison of an arm that cooperates by the penalty with one that does not, in which
    the band of its gain is not above 0.

    The headline and twice the updates on the confirmation seeds, the other regimes on the reported
    ones; scores over all topics, on the agent's own topics, and by the own truth of communities.
    """
    arms = [arm for arm in study.arms if "," not in arm]
    ours = [arm for arm in arms if arm.startswith(SUBJECTS)]
    pairs = [(a, b) for a in ours for b in arms if b not in ours]
    lines = []
    for regime in study.regimes:
        stage = "confirm" if study.cell("isolated", regime, "confirm") else "reported"
        columns = {"judge_final": "", "own_topics": ", own topics"}
        if regime == "two communities":
            columns["own_truth"] = ", own truth"
        for column, words in columns.items():
            for a, b in pairs:
                both = study.pairs(a, b, regime, stage, column)
                if both.shape[-1] > 1 and plot.paired_difference(*both)[1] <= 0:
                    lines.append([f"`{a}`", f"`{b}`", regime + words, difference(both)])
    return table("arm | minus | regime | difference, seeds better", lines)


def penalty_table(study: Study) -> list[str]:
    """Where the KL penalty is charged: each place against exact in the loss on the same seeds."""
    lines = []
    for arm in [arm for arm in study.arms if "," in arm]:
        cell = study.cell(arm, "headline", "reported")
        if len(cell) > 1:
            twin, place = arm.split(", ")
            lines.append([f"`{twin}`", place, flag(next(iter(cell.values())), "--beta"),
                          f"{plot.iqm(study.values(arm, 'headline', 'reported')):.2f}",
                          gain(study, arm, twin, "headline", "reported")])
    return table("arm | penalty | β | judge, final | minus exact in the loss, seeds better", lines)


def goal_table(study: Study, stage: str) -> list[str]:
    """The questions that were asked beforehand."""
    lines = []
    if study.pairs("federated", "isolated", "headline", stage).shape[-1] < 2:
        return lines
    for arm in (*BASELINES, "isolated 4x batch", "centralized"):
        lines.append([f"final score minus `{arm}`, seeds better",
                      *(gain(study, name, arm, "headline", stage) for name in SUBJECTS)])
    for arm in BASELINES:
        own = catch_up(study, arm, arm, stage)
        lines.append([f"median updates to the final score of `{arm}` (its own)",
                      *(f"{catch_up(study, name, arm, stage)} ({own})" for name in SUBJECTS)])
    lines.append(["single agents that end below themselves in `isolated`; mean gain by agent",
                  *(worse_agents(study, name, stage) for name in SUBJECTS)])
    lines.append(["after twice the updates: final score minus `isolated`'s then, seeds better",
                  *(gain(study, name, "isolated", "twice the updates", stage)
                    for name in SUBJECTS)])
    return table("question | " + " | ".join(f"`{name}`" for name in SUBJECTS), lines)


def again_table(study: Study) -> list[str]:
    """The same seeds, run once more by later code (again.csv): levels, gains over `isolated`, and
    what has changed."""
    if not (study.folder / "again.csv").exists():
        return []
    again, lines = Study(study.folder, "again.csv"), []
    for arm in again.headline_arms("confirm"):
        first, second = (once.cell(arm, "headline", "confirm") for once in (study, again))
        both = np.array([[float(cell[seed]["judge_final"]) for seed in second if seed in first]
                         for cell in (second, first)])  # [2, S]
        gains = [gain(once, arm, "isolated", "headline", "confirm") for once in (study, again)]
        lines.append([f"`{arm}`", f"{plot.iqm(both[1]):.2f}", f"{plot.iqm(both[0]):.2f}", *gains,
                      difference(both)])
    return table("arm | final score | again | minus `isolated`, seeds better | again | "
                 "again minus before, seeds better", lines)


def catch_up(study: Study, arm: str, other: str, stage: str) -> str:
    """Median over seeds of the updates at which `arm` first has the score that `other` ends with on
    the same seed."""
    first, second = (study.cell(name, "headline", stage) for name in (arm, other))
    reached = [updates_to(*curve(first[seed]), curve(second[seed])[1][-1])
               for seed in first if seed in second]
    if not reached:
        return "–"
    median = median_updates(reached)
    return f"{median:.0f}" if np.isfinite(median) else "never"


def worse_agents(study: Study, arm: str, stage: str) -> str:
    """How many agents end below themselves in `isolated`, and the mean gain of each."""
    def scores(row: dict) -> np.ndarray:
        return np.array([float(score) for score in row["judge_agents"].split()])  # [N]
    first, second = (study.cell(name, "headline", stage) for name in (arm, "isolated"))
    apart = np.array([scores(first[seed]) - scores(second[seed])
                      for seed in first if seed in second])  # [S, N]
    if not len(apart):
        return "–"
    return (f"{int((apart < 0).sum())} of {apart.size}; " +
            ", ".join(f"{mean:+.2f}" for mean in apart.mean(0)))


def write(folder: Path) -> str:
    """Make tables.md and the pictures of a folder -> the tables."""
    study = Study(folder)
    text = tables(study)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    draw(study, folder)
    return text


INTRODUCTION = (
    "Made by `python benchmarks/report.py` from study.csv and again.csv. Levels are interquartile "
    "means over seeds [95 % bootstrap band], differences means over same-seed pairs [95 % band], "
    "with the number of seeds in which the first is better; other columns are plain means where "
    "they do not say median. Bands are at the level that covers 95 % with few seeds "
    "(expanded_level in plot.py) and not corrected for their number. The own reward is z-scored "
    "for each reward model, so that `ensemble` and `centralized` have another scale than the rest. "
    "With flipped labels only the three honest agents count; two communities are judged by the "
    "common truth in the table of regimes, and by both in their own.")


def tables(study: Study) -> str:
    """The text of tables.md."""
    diverged, runs = len(study.diverged), len(study.rows) + len(study.diverged)
    hours = sum(float(row["seconds"]) for row in study.rows) / 3600
    lines = ["# Tables of the study", "", INTRODUCTION, "",
             f"{runs} runs, {diverged} of them diverged and are left out; {hours:.1f} hours of PPO "
             "updates on one core."]
    sections = {}
    for stage, seeds in (("confirm", "confirmation seeds"), ("reported", "reported seeds")):
        if stage == "confirm":
            sections[f"In short, {seeds}"] = short_table(study, stage)
        sections |= {
            f"Headline, {seeds}": headline_table(study, stage),
            f"Questions, {seeds}": goal_table(study, stage),
            f"Details, {seeds}": detail_table(study, stage),
            f"On the agent's own topics, {seeds}": headline_table(study, stage, "own_topics"),
            f"One policy for all, {seeds}": together_table(study, stage)}
        if stage == "confirm":
            sections["Confirmation seeds, run again by later code"] = again_table(study)
    sections |= {
        "Regimes, reported seeds": regime_table(study, "reported"),
        "Regimes, on the agent's own topics, reported seeds":
            regime_table(study, "reported", "own_topics"),
        "Two communities, reported seeds": community_table(study),
        "No gain, or a loss": failure_table(study),
        "Places of the penalty, reported seeds": penalty_table(study)}
    for title, rows in sections.items():
        if len(rows) > 2:  # else its runs are still to come
            lines += ["", f"## {title}", "", *rows]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------- pictures

STYLES = plot.MODE_STYLES | {
    "federated in communities": ("#E69F00", (0, (2, 1)), "X"),
}


def draw(study: Study, folder: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    pictures = {"curves": draw_curves, "forest": draw_forest, "bytes": draw_bytes}
    with matplotlib.rc_context({"font.size": 11, "svg.hashsalt": "fedppo", "svg.fonttype": "path"}):
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


def draw_curves(figure, study: Study) -> None:
    """Judge's score and own reward against updates, on the latest seeds that there are."""
    arms = [arm for arm in ("isolated", "federated", "merged", "fedavg", "classic")
            if arm in study.arms]
    stage = "confirm" if len(study.cell("isolated", "headline", "confirm")) > 1 else "reported"
    figure.set_size_inches(10, 4.8)
    panels = figure.subplots(1, 2, sharex=True)
    for arm in arms:
        rows = list(study.cell(arm, "headline", stage).values())
        if len(rows) < 2:
            continue
        color, line, marker = STYLES[arm]
        for axes, column in zip(panels, ("judge_curve", "reward_curve"), strict=True):
            updates = curve(rows[0], column)[0]  # [U]
            values = np.array([curve(row, column)[1] for row in rows])  # [S, U]
            axes.plot(updates, plot.iqm(values), color=color, linestyle=line, linewidth=2,
                      marker=marker, markersize=5, markevery=max(1, len(updates) // 10), label=arm)
            axes.fill_between(updates, *plot.bootstrap_band(values), color=color, alpha=0.15,
                              linewidth=0)
    plain(panels[0], "PPO updates per agent", "judge's score on held-out prompts")
    plain(panels[1], "PPO updates per agent", "own reward (z-score)")
    legend(figure, panels[0], ncols=len(arms), handlelength=4)
    figure.suptitle(f"4 agents, {len(study.cell('isolated', 'headline', stage))} seeds: "
                    "interquartile mean over seeds, 95 % bootstrap band", fontsize=12)


def draw_forest(figure, study: Study) -> None:
    """Difference from `isolated` by regime, with its band, around a zero line."""
    rows = [(regime, "judge_final", regime) for regime in study.regimes]
    rows.append(("two communities", "own_truth", "two communities, own truth"))
    rows = [row for row in rows
            if study.pairs("federated", "isolated", row[0], "reported").shape[-1] > 1]
    arms = [arm for arm in (*SUBJECTS, "federated in communities") if arm in study.arms]
    figure.set_size_inches(8.4, 2.2 + 0.6 * len(rows))
    axes = figure.subplots()
    labels = []
    for y, (regime, column, name) in enumerate(rows):
        labels.append(f"{name} ({len(study.cell('isolated', regime, 'reported'))})")
        for k, arm in enumerate(arms):
            pairs = study.pairs(arm, "isolated", regime, "reported", column)
            if pairs.shape[-1] > 1:
                mean, low, high = plot.paired_difference(*pairs)
                axes.errorbar(mean, y + 0.24 * (k - 1), xerr=[[mean - low], [high - mean]],
                              color=STYLES[arm][0], marker=STYLES[arm][2], markersize=6, capsize=3,
                              linestyle="none", label=arm)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    plain(axes, "final score minus that of isolated on the same seeds, 95 % band", "regime (seeds)",
          grid="x")
    legend(figure, axes, ncols=3)


def draw_bytes(figure, study: Study) -> None:
    """Judge's score after each round against what an agent has received by then."""
    every = ["headline", "1 update a round", "2 updates a round", "8 updates a round"]
    lines = [(arm, regime) for arm in SUBJECTS for regime in every] + [("fedavg", "headline")]
    figure.set_size_inches(8.4, 5)
    axes = figure.subplots()
    seeds = set()
    for arm, regime in lines:
        rows = list(study.cell(arm, regime, "reported").values())[:ELSEWHERE]
        if len(rows) < 2:
            continue
        seeds.add(len(rows))
        values = plot.iqm(np.array([curve(row)[1] for row in rows]))  # [U]
        megabytes = float(rows[0]["bytes"]) / len(rows[0]["judge_agents"].split()) / 1e6
        received = np.linspace(0, megabytes, len(values))
        color, line, marker = STYLES[arm]
        axes.plot(received, values, color=color, linestyle=line, marker=marker, markersize=4,
                  label=arm, linewidth=2 if regime == "headline" else 1.2,
                  markevery=max(1, len(values) // 10))
        axes.annotate(flag(rows[0], "--updates", "4"), (received[-1], values[-1]), xytext=(5, 0),
                      textcoords="offset points", fontsize=10, color=color, va="center")
    for arm in ("isolated", "centralized"):
        values = study.values(arm, "headline", "reported")[:ELSEWHERE]
        if len(values) > 1:
            axes.axhline(plot.iqm(values), color=STYLES[arm][0], linestyle=STYLES[arm][1],
                         label=f"{arm}, final")
    axes.margins(x=0.08)
    plain(axes, "MB of policies that one agent has received", "judge's score on held-out prompts")
    legend(figure, axes, ncols=3, handlelength=4)
    counts = " or ".join(map(str, sorted(seeds)))
    figure.suptitle("Numbers: local updates between two exchanges. "
                    f"{counts} seeds, interquartile mean", fontsize=11)


def main(argv: list[str]) -> int:
    print(write(Path(argv[0]) if argv else HERE / "results"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

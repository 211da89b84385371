"""The tables and pictures of the study, from study.csv and again.csv alone.

    python benchmarks/report.py [FOLDER]     default: benchmarks/results; study.py calls it when it is done

In reading order
    1. cells             the seeds of one arm in one regime
    2. tables            tables.md: what the README quotes, and a test compares
    3. pictures          curves, forest and bytes, as .png and .svg

Levels are interquartile means over seeds, differences means over same-seed pairs with a 95 % bootstrap band (plot.py).

Dimension key: S seeds, U evaluated updates.
"""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402

import plot  # noqa: E402

BASELINES = ("isolated", "classic", "fedavg")  # with the same budget per agent as SUBJECTS
SUBJECTS = ("federated", "federated merged")
IN_SHORT = {  # of the README's first screen
    "isolated": "alone; KL to its own last copy", "classic": "alone; KL to the initial policy",
    "federated": "KL to all policies received", "federated merged": "the same, and weights are averaged (`--merge`)",
    "fedavg": "weights are averaged, KL to the average (`--mode fedavg`)"}
ELSEWHERE = 8  # seeds of a regime; the headline's first ones stand beside them
STAGES = {"reported": range(1000, 1100), "confirm": range(3000, 3100)}  # told by their seeds


def join(numbers: Iterable[float]) -> str:
    """Numbers of one cell of the csv."""
    return " ".join(f"{number:.4g}" for number in numbers)


# ----------------------------------------------------------------------------------------------------------- cells


class Study:
    """The rows of study.csv by arm, regime and stage. Runs that diverged have no scores and are counted apart."""

    def __init__(self, folder: Path, name: str = "study.csv"):
        self.folder = folder
        with (folder / name).open(newline="") as file:
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
                    raise ValueError(f"{arm}, {regime}, seed {seed} stands twice: remove the rows of old settings")
                found[seed] = row
        return dict(sorted(found.items()))

    def values(self, arm: str, regime: str, stage: str, column: str = "judge_final") -> np.ndarray:
        """[S] a column's numbers."""
        return np.array([float(row[column]) for row in self.cell(arm, regime, stage).values()])

    def pairs(self, a: str, b: str, regime: str, stage: str, column: str = "judge_final") -> np.ndarray:
        """[2, S] a column of two arms on the seeds that both have."""
        first, second = self.cell(a, regime, stage), self.cell(b, regime, stage)
        seeds = [seed for seed in first if seed in second]
        return np.array([[float(cell[seed][column]) for seed in seeds] for cell in (first, second)])


def curve(row: dict, column: str = "judge_curve") -> tuple[np.ndarray, np.ndarray]:
    """(updates [U], values [U]): the judge's after every round from update 0 on, the own reward of every update."""
    values = np.array([float(value) for value in row[column].split()])
    if column == "judge_curve":
        updates = len(row["reward_curve"].split())
        return np.linspace(0, updates, len(values)).astype(int), values
    return np.arange(1, len(values) + 1), values


def difference(pairs: np.ndarray) -> str:
    """[2, S] -> mean of first minus second, its band, and in how many seeds the first is higher (a tie is half)."""
    if pairs.shape[-1] < 2:
        return "–"
    mean, low, high = plot.paired_difference(*pairs)
    share, _, _ = plot.probability_of_improvement(*pairs)
    n = pairs.shape[1]
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], {share * n:g} of {n}"


def level(values: np.ndarray) -> str:
    low, high = plot.bootstrap_band(values, level=plot.expanded_level(len(values)))
    return f"{plot.iqm(values):.2f} [{low:.2f}, {high:.2f}]"


def flag(row: dict, name: str, default: str = "") -> str:
    """The value of a flag in a row's command."""
    words = row["settings"].split()
    return words[words.index(name) + 1] if name in words else default


# ---------------------------------------------------------------------------------------------------------- tables


def table(header: str, rows: Iterable[list[str]]) -> list[str]:
    """header: names separated by " | "."""
    return [f"| {header} |", "|" + "---|" * len(header.split(" | ")), *(f"| {' | '.join(row)} |" for row in rows)]


def short_table(study: Study, stage: str) -> list[str]:
    """The README's first screen."""
    lines = []
    for arm in [arm for arm in IN_SHORT if len(study.cell(arm, "headline", stage)) > 1]:
        against = "–" if arm == "isolated" else difference(study.pairs(arm, "isolated", "headline", stage))
        lines.append([f"`{arm}`", IN_SHORT[arm], f"{plot.iqm(study.values(arm, 'headline', stage)):.2f}", against,
                      catch_up(study, arm, "isolated", stage)])
    return table("arm | its agents | final score | minus `isolated`, seeds better | median updates to the final score "
                 "of `isolated`", lines)


def headline_table(study: Study, stage: str, column: str = "judge_final") -> list[str]:
    """One line per arm in the headline regime: its final score, and what is between it, `isolated` and SUBJECTS."""
    lines = []
    for arm in [arm for arm in study.arms if len(study.cell(arm, "headline", stage)) > 1 and "," not in arm]:
        row = next(iter(study.cell(arm, "headline", stage).values()))
        apart = ["–" if a == b else difference(study.pairs(a, b, "headline", stage, column))
                 for a, b in ((arm, "isolated"), *((subject, arm) for subject in SUBJECTS))]
        lines.append([f"`{arm}`", f"{flag(row, '--beta')}, {flag(row, '--lr')}",
                      level(study.values(arm, "headline", stage, column)), *apart])
    return table("arm | β, lr | final score | minus `isolated`, seeds better | " +
                 " | ".join(f"`{subject}` minus it, seeds better" for subject in SUBJECTS), lines)


def detail_table(study: Study, stage: str) -> list[str]:
    """The same arms: means over seeds, but for the medians of updates and seconds."""
    lines = []
    for arm in [arm for arm in study.arms if len(study.cell(arm, "headline", stage)) > 1 and "," not in arm]:
        rows = list(study.cell(arm, "headline", stage).values())
        agents = len(rows[0]["judge_agents"].split())
        mean = {name: study.values(arm, "headline", stage, name).mean() for name in
                ("judge_auc", "worst_agent", "reward_final", "kl_initial", "bytes")}
        reached = plot.median_updates([plot.updates_to(*curve(row), 0.6) for row in rows])
        seconds = np.median(study.values(arm, "headline", stage, "seconds"))
        lines.append([f"`{arm}`", str(len(rows)), f"{mean['judge_auc']:.2f}",
                      f"{mean['worst_agent']:.2f}" if agents > 1 else "–",
                      f"{reached:.0f}" if np.isfinite(reached) else "never", f"{mean['reward_final']:.2f}",
                      f"{mean['kl_initial']:.1f}", f"{mean['bytes'] / agents / 1e6:.0f}", f"{seconds:.0f}"])
    return table("arm | seeds | mean of the curve | worst agent | median updates to 0.6 | "
                 "own reward | KL to initial, nats | MB received by an agent | median seconds", lines)


def regime_table(study: Study, stage: str, column: str = "judge_final") -> list[str]:
    """One line per regime: the level of `isolated`, and each other arm's difference from it, on the same seeds."""
    arms = [arm for arm in study.arms if arm in SUBJECTS]
    lines = []
    for regime in study.regimes:
        if len(study.cell("isolated", regime, stage)) > 1:
            lines.append([regime, f"{plot.iqm(study.values('isolated', regime, stage, column)[:ELSEWHERE]):.2f}",
                          *(difference(study.pairs(arm, "isolated", regime, stage, column)[:, :ELSEWHERE])
                            for arm in arms)])
    return table("regime | `isolated` | " + " | ".join(f"`{arm}` minus it, seeds better" for arm in arms), lines)


def community_table(study: Study) -> list[str]:
    """Two communities: by the common truth, and each agent by its own community's."""
    lines, regime, columns = [], "two communities", ("judge_final", "own_truth")
    for arm in [arm for arm in study.arms if len(study.cell(arm, regime, "reported")) > 1]:
        levels = [f"{plot.iqm(study.values(arm, regime, 'reported', column)):.2f}" for column in columns]
        apart = ["–" if arm == "isolated" else difference(study.pairs(arm, "isolated", regime, "reported", column))
                 for column in columns]
        lines.append([f"`{arm}`", *levels, *apart])
    return table("arm | common truth | own truth | common, minus `isolated` | own, minus `isolated`", lines)


def together_table(study: Study, stage: str) -> list[str]:
    """What one more exchange after the last update would give, had the agents then deployed one policy."""
    lines = []
    for arm in study.arms:
        rows = [row for row in study.cell(arm, "headline", stage).values() if row["judge_average"]]
        if len(rows) > 1:
            final, average, mixture = (np.array([float(row[name]) for row in rows]) for name in
                                       ("judge_final", "judge_average", "judge_mixture"))
            lines.append([f"`{arm}`", *(f"{plot.iqm(values):.2f}" for values in (final, average, mixture)),
                          difference(np.array([average, final]))])
    return table("arm | its agents, mean | average of their weights | geometric mixture | average minus agents, "
                 "seeds better", lines)


def failure_table(study: Study) -> list[str]:
    """Every comparison of a federated arm with one that is not, in which the band of its gain is not above 0.

    The headline and twice the updates on the confirmation seeds, the other regimes on the reported ones; scores over
    all topics, on the agent's own topics, and by the own truth of communities.
    """
    federated = [arm for arm in study.arms if arm.startswith("federated") and "," not in arm]
    others = [arm for arm in study.arms if not arm.startswith("federated") and "," not in arm]
    lines = []
    for regime in study.regimes:
        stage = "confirm" if study.cell("isolated", regime, "confirm") else "reported"
        for column, words in {"judge_final": "", "own_topics": ", own topics", "own_truth": ", own truth"}.items():
            for a, b in [(a, b) for a in federated for b in others]:
                if column == "own_truth" and regime != "two communities":
                    continue
                pairs = study.pairs(a, b, regime, stage, column)
                if pairs.shape[-1] > 1 and plot.paired_difference(*pairs)[1] <= 0:
                    lines.append([f"`{a}`", f"`{b}`", regime + words, difference(pairs)])
    return table("arm | minus | regime | difference, seeds better", lines)


def penalty_table(study: Study) -> list[str]:
    """Where the KL penalty is charged: each place against exact in the loss on the same seeds."""
    lines = []
    for arm in [arm for arm in study.arms if "," in arm and len(study.cell(arm, "headline", "reported")) > 1]:
        twin = arm.split(",")[0]
        row = next(iter(study.cell(arm, "headline", "reported").values()))
        lines.append([f"`{twin}`", arm.split(", ")[1], flag(row, "--beta"),
                      f"{plot.iqm(study.values(arm, 'headline', 'reported')):.2f}",
                      difference(study.pairs(arm, twin, "headline", "reported"))])
    return table("arm | penalty | β | judge, final | minus exact in the loss, seeds better", lines)


def goal_table(study: Study, stage: str) -> list[str]:
    """The questions that were asked beforehand."""
    lines = []
    if study.pairs("federated", "isolated", "headline", stage).shape[-1] < 2:
        return lines
    for arm in (*BASELINES, "isolated 4x batch", "centralized"):
        lines.append([f"final score minus `{arm}`, seeds better",
                      *(difference(study.pairs(name, arm, "headline", stage)) for name in SUBJECTS)])
    for arm in BASELINES:
        lines.append([f"median updates to the final score of `{arm}` (its own)",
                      *(f"{catch_up(study, name, arm, stage)} ({catch_up(study, arm, arm, stage)})"
                        for name in SUBJECTS)])
    lines.append(["single agents that end below themselves in `isolated`; mean gain by agent",
                  *(worse_agents(study, name, stage) for name in SUBJECTS)])
    lines.append(["after twice the updates: final score minus `isolated`'s then, seeds better",
                  *(difference(study.pairs(name, "isolated", "twice the updates", stage)) for name in SUBJECTS)])
    return table("question | " + " | ".join(f"`{name}`" for name in SUBJECTS), lines)


def again_table(study: Study) -> list[str]:
    """The same seeds, run once more by later code (again.csv): levels, gains over `isolated`, and what has changed."""
    if not (study.folder / "again.csv").exists():
        return []
    again, lines = Study(study.folder, "again.csv"), []
    for arm in [arm for arm in again.arms if len(again.cell(arm, "headline", "confirm")) > 1]:
        first, second = (once.cell(arm, "headline", "confirm") for once in (study, again))
        both = np.array([[float(cell[seed]["judge_final"]) for seed in second if seed in first]
                         for cell in (second, first)])  # [2, S]
        gains = ["–" if arm == "isolated" else difference(once.pairs(arm, "isolated", "headline", "confirm"))
                 for once in (study, again)]
        lines.append([f"`{arm}`", f"{plot.iqm(both[1]):.2f}", f"{plot.iqm(both[0]):.2f}", *gains, difference(both)])
    return table("arm | final score | again | minus `isolated`, seeds better | again | again minus before, seeds "
                 "better", lines)


def catch_up(study: Study, arm: str, other: str, stage: str) -> str:
    """Median over seeds of the updates at which `arm` first has the score that `other` ends with on the same seed."""
    first, second = study.cell(arm, "headline", stage), study.cell(other, "headline", stage)
    reached = [plot.updates_to(*curve(first[seed]), float(second[seed]["judge_curve"].split()[-1])) for seed in first
               if seed in second]
    if not reached:
        return "–"
    median = plot.median_updates(reached)
    return f"{median:.0f}" if np.isfinite(median) else "never"


def worse_agents(study: Study, arm: str, stage: str) -> str:
    first, second = study.cell(arm, "headline", stage), study.cell("isolated", "headline", stage)
    apart = np.array([[float(a) - float(b) for a, b in zip(first[seed]["judge_agents"].split(),
                                                           second[seed]["judge_agents"].split(), strict=True)]
                      for seed in first if seed in second])  # [S, N]
    if not len(apart):
        return "–"
    return f"{int((apart < 0).sum())} of {apart.size}; " + ", ".join(f"{mean:+.2f}" for mean in apart.mean(0))


def write(folder: Path) -> str:
    """Make tables.md and the pictures of a folder -> the tables."""
    study = Study(folder)
    text = tables(study)
    (folder / "tables.md").write_text(text)
    draw(study, folder)
    return text


def tables(study: Study) -> str:
    """The text of tables.md."""
    lines = ["# Tables of the study", "",
             "Made by `python benchmarks/report.py` from study.csv and again.csv. Levels are interquartile means over "
             "seeds [95 % bootstrap band], differences means over same-seed pairs [95 % band], with the number of "
             "seeds in which the first is better; other columns are plain means where they do not say median. Bands "
             "are at the level that covers 95 % with few seeds (expanded_level in plot.py) and not corrected for their"
             " number. The own reward is z-scored for each reward model, so that `ensemble` and `centralized` have "
             "another scale than the rest. With flipped labels only the three honest agents count; two communities are"
             " judged by the common truth in the table of regimes, and by both in their own.",
             "", f"{len(study.rows) + len(study.diverged)} runs, {len(study.diverged)} of them diverged and are left "
             f"out; {sum(float(row['seconds']) for row in study.rows) / 3600:.1f} hours of PPO updates on one core."]
    for title, rows in {
            "In short, confirmation seeds": short_table(study, "confirm"),
            "Headline, confirmation seeds": headline_table(study, "confirm"),
            "Questions, confirmation seeds": goal_table(study, "confirm"),
            "Details, confirmation seeds": detail_table(study, "confirm"),
            "On the agent's own topics, confirmation seeds": headline_table(study, "confirm", "own_topics"),
            "One policy for all, confirmation seeds": together_table(study, "confirm"),
            "Confirmation seeds, run again by later code": again_table(study),
            "Headline, reported seeds": headline_table(study, "reported"),
            "Questions, reported seeds": goal_table(study, "reported"),
            "Details, reported seeds": detail_table(study, "reported"),
            "On the agent's own topics, reported seeds": headline_table(study, "reported", "own_topics"),
            "One policy for all, reported seeds": together_table(study, "reported"),
            "Regimes, reported seeds": regime_table(study, "reported"),
            "Regimes, on the agent's own topics, reported seeds": regime_table(study, "reported", "own_topics"),
            "Two communities, reported seeds": community_table(study),
            "No gain, or a loss": failure_table(study),
            "Places of the penalty, reported seeds": penalty_table(study)}.items():
        if len(rows) > 2:  # else its runs are still to come
            lines += ["", f"## {title}", "", *rows]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------- pictures

STYLES = plot.MODE_STYLES | {
    "classic": ("#CC79A7", (0, (6, 2)), "v"),
    "federated merged": ("#56B4E9", (0, (4, 1, 1, 1)), "P"),
    "federated in communities": ("#E69F00", (0, (2, 1)), "X"),
}


def draw(study: Study, folder: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context({"font.size": 11, "svg.hashsalt": "fedppo", "svg.fonttype": "path"}):
        for name, make in {"curves": draw_curves, "forest": draw_forest, "bytes": draw_bytes}.items():
            figure = Figure(layout="constrained")
            make(figure, study)
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def draw_curves(figure, study: Study) -> None:
    """Judge's score and own reward against updates, on the latest seeds that there are."""
    arms = [arm for arm in ("isolated", "federated", "federated merged", "fedavg", "classic") if arm in study.arms]
    stage = max(STAGES, key=lambda stage: (len(study.cell("isolated", "headline", stage)) > 1, stage == "confirm"))
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
            axes.plot(updates, plot.iqm(values), color=color, linestyle=line, linewidth=2, marker=marker, markersize=5,
                      markevery=max(1, len(updates) // 10), label=arm)
            axes.fill_between(updates, *plot.bootstrap_band(values), color=color, alpha=0.15, linewidth=0)
    for axes, label in zip(panels, ("judge's score on held-out prompts", "own reward (z-score)"), strict=True):
        axes.set(xlabel="PPO updates per agent", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if panels[0].lines:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms),
                      frameon=False, handlelength=4)
    figure.suptitle(f"4 agents, {len(study.cell('isolated', 'headline', stage))} seeds: interquartile mean over seeds, "
                    "95 % bootstrap band", fontsize=12)


def draw_forest(figure, study: Study) -> None:
    """Difference from `isolated` by regime, with its band, around a zero line."""
    rows = [(regime, "judge_final", regime) for regime in study.regimes]
    rows.append(("two communities", "own_truth", "two communities, own truth"))
    rows = [row for row in rows if study.pairs("federated", "isolated", *row[:1], "reported").shape[-1] > 1]
    arms = [arm for arm in ("federated", "federated merged", "federated in communities") if arm in study.arms]
    figure.set_size_inches(8.4, 2.2 + 0.6 * len(rows))
    axes = figure.subplots()
    labels = []
    for y, (regime, column, name) in enumerate(rows):
        labels.append(f"{name} ({len(study.cell('isolated', regime, 'reported'))})")
        for k, arm in enumerate(arms):
            pairs = study.pairs(arm, "isolated", regime, "reported", column)
            if pairs.shape[-1] > 1:
                mean, low, high = plot.paired_difference(*pairs)
                axes.errorbar(mean, y + 0.24 * (k - 1), xerr=[[mean - low], [high - mean]], color=STYLES[arm][0],
                              marker=STYLES[arm][2], markersize=6, capsize=3, linestyle="none", label=arm)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="final score minus that of isolated on the same seeds, 95 % band", ylabel="regime (seeds)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)


def draw_bytes(figure, study: Study) -> None:
    """Judge's score after each round against what an agent has received by then."""
    lines = {"federated": ["headline", "1 update a round", "2 updates a round", "8 updates a round"],
             "federated merged": ["headline", "1 update a round", "2 updates a round", "8 updates a round"],
             "fedavg": ["headline"]}
    figure.set_size_inches(8.4, 5)
    axes = figure.subplots()
    seeds = set()
    for arm, regimes in lines.items():
        for regime in regimes:
            rows = list(study.cell(arm, regime, "reported").values())[:8]
            if len(rows) > 1:
                seeds.add(len(rows))
                values = plot.iqm(np.array([curve(row)[1] for row in rows]))  # [U]
                received = np.linspace(0, float(rows[0]["bytes"]) / len(rows[0]["judge_agents"].split()) / 1e6,
                                       len(values))
                color, line, marker = STYLES[arm]
                axes.plot(received, values, color=color, linestyle=line, marker=marker, markersize=4, label=arm,
                          linewidth=2 if regime == "headline" else 1.2, markevery=max(1, len(values) // 10))
                axes.annotate(flag(rows[0], "--updates", "4"), (received[-1], values[-1]), xytext=(5, 0),
                              textcoords="offset points", fontsize=10, color=color, va="center")
    for arm in ("isolated", "centralized"):
        values = study.values(arm, "headline", "reported")[:8]
        if len(values) > 1:
            axes.axhline(plot.iqm(values), color=STYLES[arm][0], linestyle=STYLES[arm][1], label=f"{arm}, final")
    axes.set(xlabel="MB of policies that one agent has received", ylabel="judge's score on held-out prompts")
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False, handlelength=4)
    figure.suptitle(f"Numbers: local updates between two exchanges. {' or '.join(map(str, sorted(seeds)))} seeds, "
                    "interquartile mean", fontsize=11)


def main(argv: list[str]) -> int:
    print(write(Path(argv[0]) if argv else HERE / "results"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

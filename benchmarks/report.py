"""The tables and pictures of the study, from study.csv alone.

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

UPDATES = 40  # of a run; "twice the updates" has 80
BASELINES = ("isolated", "classic", "fedavg")  # with the same budget per agent
SUBJECT = "federated"
STAGES = {"tuning": range(200, 300), "reported": range(1000, 1100), "confirm": range(3000, 3100)}  # told by their seeds


def join(numbers: Iterable[float]) -> str:
    """Numbers of one cell of the csv."""
    return " ".join(f"{number:.4g}" for number in numbers)


# ----------------------------------------------------------------------------------------------------------- cells


class Study:
    """The rows of study.csv by arm, regime and stage, and the values that tuning chose."""

    def __init__(self, folder: Path):
        with (folder / "study.csv").open(newline="") as file:
            self.rows = [row for row in csv.DictReader(file) if row["judge_final"]]
        self.arms = list(dict.fromkeys(row["arm"] for row in self.rows))

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
    """[2, S] -> mean of first minus second, its band, and in how many seeds the first is higher."""
    if pairs.shape[1] < 2:
        return "–"
    mean, low, high = plot.paired_difference(*pairs)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], {int((pairs[0] > pairs[1]).sum())} of {pairs.shape[1]}"


def level(values: np.ndarray) -> str:
    low, high = plot.bootstrap_band(values)
    return f"{plot.iqm(values):.2f} [{low:.2f}, {high:.2f}]"


def flags(row: dict) -> dict[str, str]:
    """beta and lr of a row, as its command has them."""
    words = row["settings"].split()
    return {name: words[words.index(f"--{name}") + 1] for name in ("beta", "lr")}


# ---------------------------------------------------------------------------------------------------------- tables


def headline_table(study: Study, stage: str, arms: Iterable[str]) -> list[str]:
    """One line per arm in the headline regime."""
    lines = ["| arm | β, lr | judge, final | mean of the curve | worst agent | "
             f"`{SUBJECT}` minus this arm, seeds won | updates to 0.6 | KL to initial | own reward | MB received | "
             "seconds |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for arm in arms:
        rows = list(study.cell(arm, "headline", stage).values())
        if len(rows) < 2:
            continue
        mean = {name: np.mean([float(row[name]) for row in rows]) for name in
                ("judge_auc", "worst_agent", "kl_initial", "reward_final", "bytes", "seconds")}
        agents = len(rows[0]["judge_agents"].split())
        reached = plot.median_updates([plot.updates_to(*curve(row), 0.6) for row in rows])
        chosen = flags(rows[0])
        cells = [f"`{arm}`", f"{chosen['beta']}, {chosen['lr']}", level(study.values(arm, "headline", stage)),
                 f"{mean['judge_auc']:.2f}", f"{mean['worst_agent']:.2f}",
                 "–" if arm == SUBJECT else difference(study.pairs(SUBJECT, arm, "headline", stage)),
                 f"{reached:.0f}" if reached <= UPDATES else f"over {UPDATES}", f"{mean['kl_initial']:.1f}",
                 f"{mean['reward_final']:.2f}", f"{mean['bytes'] / agents / 1e6:.1f}", f"{mean['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def regime_table(study: Study, subjects: Iterable[str], regimes: Iterable[str], stage: str) -> list[str]:
    """One line per regime: the level of `isolated`, and each subject's difference from it."""
    subjects = list(subjects)
    lines = ["| regime | `isolated` | " + " | ".join(f"`{name}` minus it, seeds won" for name in subjects) + " |",
             "|---|---|" + "---|" * len(subjects)]
    for regime in regimes:
        values = study.values("isolated", regime, stage)
        if len(values) > 1:
            cells = [difference(study.pairs(name, "isolated", regime, stage)) for name in subjects]
            lines.append(f"| {regime} | {plot.iqm(values):.2f} | {' | '.join(cells)} |")
    return lines


def community_table(study: Study) -> list[str]:
    """Two communities: by the common truth, and each agent by its own community's."""
    lines = ["| arm | common truth | own truth | common, minus isolated | own, minus isolated |",
             "|---|---|---|---|---|"]
    regime, columns = "two communities", ("judge_final", "own_truth")
    for arm in study.arms:
        if len(study.cell(arm, regime, "reported")) > 1:
            levels = [f"{plot.iqm(study.values(arm, regime, 'reported', column)):.2f}" for column in columns]
            apart = ["–" if arm == "isolated" else difference(study.pairs(arm, "isolated", regime, "reported", column))
                     for column in columns]
            lines.append(f"| `{arm}` | {' | '.join(levels + apart)} |")
    return lines


def together_table(study: Study, stage: str, arms: Iterable[str]) -> list[str]:
    """What one more exchange after the last update would give, had the agents deployed one policy."""
    lines = ["| arm | agents, mean | average of their weights | geometric mixture | average minus agents, seeds won |",
             "|---|---|---|---|---|"]
    for arm in arms:
        rows = [row for row in study.cell(arm, "headline", stage).values() if row["judge_average"]]
        if len(rows) > 1:
            values = {name: np.array([float(row[name]) for row in rows]) for name in
                      ("judge_final", "judge_average", "judge_mixture")}
            apart = difference(np.array([values["judge_average"], values["judge_final"]]))
            levels = " | ".join(f"{plot.iqm(value):.2f}" for value in values.values())
            lines.append(f"| `{arm}` | {levels} | {apart} |")
    return lines


def goal_lines(study: Study, stage: str) -> list[str]:
    """The goals that were set beforehand, and what came of them, for the best of several arms too."""
    lines = ["| question | `federated` | `federated merged` |", "|---|---|---|"]
    subjects = ("federated", "federated merged")

    def line(question: str, answers: Iterable[str]) -> None:
        lines.append(f"| {question} | {' | '.join(answers)} |")

    for arm in (*BASELINES, "isolated 4x batch", "centralized"):
        line(f"final judge's score minus `{arm}`, seeds won",
             [difference(study.pairs(name, arm, "headline", stage)) for name in subjects])
    line("median updates to reach its twin's final `isolated` score (40 updates)",
         [str(catch_up(study, name, stage)) for name in subjects])
    line("agents worse than the same agent alone, of all",
         [worse_agents(study, name, stage) for name in subjects])
    line("after 80 updates: final judge's score minus `isolated` after 80, seeds won",
         [difference(study.pairs(name, "isolated", "twice the updates", stage)) for name in subjects])
    return lines


def catch_up(study: Study, arm: str, stage: str) -> str:
    """Median over seeds of the updates at which the arm first has the final score of `isolated` on the same seed."""
    first, second = study.cell(arm, "headline", stage), study.cell("isolated", "headline", stage)
    reached = [plot.updates_to(*curve(first[seed]), float(second[seed]["judge_final"])) for seed in first
               if seed in second]
    if not reached:
        return "–"
    median = plot.median_updates(reached)
    return f"{median:.0f}, {sum(np.isfinite(reached))} of {len(reached)} seeds do" if np.isfinite(median) else "never"


def worse_agents(study: Study, arm: str, stage: str) -> str:
    """How many single agents end below themselves in `isolated` on the same seed; and agent by agent, on average."""
    first, second = study.cell(arm, "headline", stage), study.cell("isolated", "headline", stage)
    apart = np.array([[float(a) - float(b) for a, b in zip(first[seed]["judge_agents"].split(),
                                                           second[seed]["judge_agents"].split(), strict=True)]
                      for seed in first if seed in second])  # [S, N]
    if not len(apart):
        return "–"
    means = ", ".join(f"{mean:+.2f}" for mean in apart.mean(0))
    return f"{int((apart < 0).sum())} of {apart.size} (by agent: {means})"


def write(folder: Path) -> str:
    """Make tables.md and the pictures from study.csv -> the tables."""
    study = Study(folder)
    regimes = list(dict.fromkeys(row["regime"] for row in study.rows))
    regimes = ["headline", *(regime for regime in regimes if regime != "headline")]
    main = [arm for arm in study.arms if "," not in arm]
    penalties = ["isolated", "federated", *(arm for arm in study.arms if "," in arm)]
    lines = ["# Tables of the study", "", "Made by `python benchmarks/report.py` from study.csv. Levels: interquartile "
             "mean over seeds [95 % bootstrap band]; differences: mean over same-seed pairs [95 % band]."]
    subjects = [arm for arm in ("federated", "federated merged", "fedavg", "federated in communities")
                if arm in study.arms]
    for title, table in {
            "Headline, confirmation seeds": headline_table(study, "confirm", main),
            "Goals, confirmation seeds": goal_lines(study, "confirm"),
            "Headline, reported seeds": headline_table(study, "reported", main),
            "Goals, reported seeds": goal_lines(study, "reported"),
            "One policy for all, reported seeds": together_table(study, "reported", main),
            "Regimes, reported seeds": regime_table(study, subjects, regimes, "reported"),
            "Two communities, reported seeds": community_table(study),
            "Places of the penalty, reported seeds": headline_table(study, "reported", penalties)}.items():
        lines += ["", f"## {title}", "", *table]
    text = "\n".join(lines) + "\n"
    (folder / "tables.md").write_text(text)
    draw(study, folder)
    return text


# -------------------------------------------------------------------------------------------------------- pictures

STYLES = plot.MODE_STYLES | {
    "classic": ("#CC79A7", (0, (6, 2)), "v"),
    "federated merged": ("#56B4E9", (0, (4, 1, 1, 1)), "P"),
    "isolated 4x batch": ("#E69F00", (0, (2, 1)), "X"),
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
    """Judge's score and own reward against updates, of the longest runs on the latest seeds that there are."""
    places = [(regime, stage) for stage in ("confirm", "reported") for regime in ("twice the updates", "headline")]
    regime, stage = max(places, key=lambda place: (len(study.cell("isolated", *place)), place[0] != "headline"))
    figure.set_size_inches(10, 4.6)
    panels = figure.subplots(1, 2, sharex=True)
    seeds = 0
    for arm in ("isolated", "federated", "federated merged", "fedavg"):
        rows = list(study.cell(arm, regime, stage).values())
        if len(rows) < 2:
            continue
        seeds = max(seeds, len(rows))
        color, line, marker = STYLES[arm]
        for axes, column in zip(panels, ("judge_curve", "reward_curve"), strict=True):
            updates = curve(rows[0], column)[0]  # [U]
            values = np.array([curve(row, column)[1] for row in rows])  # [S, U]
            axes.plot(updates, plot.iqm(values), color=color, linestyle=line, linewidth=2, marker=marker, markersize=5,
                      markevery=max(1, len(updates) // 10), label=arm)
            axes.fill_between(updates, *plot.bootstrap_band(values), color=color, alpha=0.18, linewidth=0)
    for axes, label in zip(panels, ("judge's score on held-out prompts", "own reward (z-score)"), strict=True):
        axes.set(xlabel="PPO updates per agent", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False,
                  handlelength=4)
    figure.suptitle(f"4 agents, {seeds} seeds: interquartile mean over seeds, 95 % bootstrap band", fontsize=12)


def draw_forest(figure, study: Study) -> None:
    """Difference from `isolated` by regime, with its band, around a zero line."""
    regimes = [regime for regime in dict.fromkeys(row["regime"] for row in study.rows)
               if study.pairs("federated", "isolated", regime, "reported").shape[1] > 1]
    regimes = sorted(regimes, key=lambda regime: regime != "headline")
    arms = [arm for arm in ("federated", "federated merged", "fedavg") if arm in study.arms]
    figure.set_size_inches(8.4, 1.8 + 0.5 * len(regimes))
    axes = figure.subplots()
    for k, arm in enumerate(arms):
        color, _, marker = STYLES[arm]
        shown = False
        for y, regime in enumerate(regimes):
            pairs = study.pairs(arm, "isolated", regime, "reported")
            if pairs.shape[1] < 2:
                continue
            mean, low, high = plot.paired_difference(*pairs)
            axes.errorbar(mean, y + 0.22 * (k - (len(arms) - 1) / 2), xerr=[[mean - low], [high - mean]], color=color,
                          marker=marker, markersize=6, capsize=3, linestyle="none", label=None if shown else arm)
            shown = True
    axes.axvline(0, color="black", linewidth=1)
    counts = [study.pairs("federated", "isolated", regime, "reported").shape[1] for regime in regimes]
    axes.set_yticks(range(len(regimes)), [f"{regime} ({n})" for regime, n in zip(regimes, counts, strict=True)])
    axes.invert_yaxis()
    axes.set(xlabel="judge's final score minus that of isolated on the same seeds (95 % band)",
             ylabel="regime (number of seeds)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


def draw_bytes(figure, study: Study) -> None:
    """Judge's score after each round against what an agent has received by then."""
    lines = {"federated": [("headline", "4 updates a round"), ("1 update a round", "1"), ("2 updates a round", "2"),
                           ("8 updates a round", "8")],
             "fedavg": [("headline", "4")], "federated merged": [("headline", "4")]}
    figure.set_size_inches(8.4, 4.8)
    axes = figure.subplots()
    for arm, regimes in lines.items():
        color, line, marker = STYLES[arm]
        for k, (regime, label) in enumerate(regimes):
            rows = list(study.cell(arm, regime, "reported").values())[:8]
            if len(rows) < 2:
                continue
            values = plot.iqm(np.array([curve(row)[1] for row in rows]))  # [U]
            received = np.linspace(0, float(rows[0]["bytes"]) / len(rows[0]["judge_agents"].split()) / 1e6, len(values))
            axes.plot(received, values, color=color, linestyle=line, marker=marker, markersize=4,
                      linewidth=2 if k == 0 else 1.2, label=arm if k == 0 else None,
                      markevery=max(1, len(values) // 10))
            axes.annotate(label, (received[-1], values[-1]), xytext=(5, 0), textcoords="offset points", fontsize=9,
                          color=color, va="center")
    for arm in ("isolated", "centralized"):
        values = study.values(arm, "headline", "reported")[:8]
        if len(values) > 1:
            axes.axhline(plot.iqm(values), color=STYLES[arm][0], linestyle=STYLES[arm][1], label=f"{arm}, final")
    axes.set(xlabel="MB of policies received by one agent (40 updates in all)",
             ylabel="judge's score on held-out prompts")
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=4)
    figure.suptitle("8 seeds, interquartile mean; a number says how many local updates each exchange is for",
                    fontsize=11)


def main(argv: list[str]) -> int:
    print(write(Path(argv[0]) if argv else HERE / "results"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

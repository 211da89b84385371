"""Four agents with a real language model, each with texts of its own kind: alone and together.

    python benchmarks/real/make.py          first: model, pairs
    python benchmarks/real/run.py           hours on 2 cores; goes on where it was stopped

In reading order
    1. SETTINGS    one command of fedppo.py for all modes and seeds
    2. train       started or resumed, in FOLDER/runs/real
    3. words       how many words a response has, and how many different ones: text that falls apart
                   repeats itself
    4. write       benchmarks/results/real.csv, a line per mode and seed; real.md; real.png and .svg

SETTINGS were found on seed 100 alone, which no table uses.
"""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import numpy as np  # noqa: E402

import compare  # noqa: E402
import fedppo  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
from world import deal_rows  # noqa: E402

RESULTS = HERE.parent / "results"
JUDGE = f"{HERE / 'judge.py'}:score"
MODES = ("isolated", "federated", "merged", "fedavg")
SEEDS = ("0", "1", "2")
SETTINGS = {
    "preset": "pythia-70m", "agents": "4", "shards": "split", "prompts": "own",
    "pairs": "1000", "reward-lr": "5e-5", "reward-epochs": "2", "reward-pooling": "mean",
    "rounds": "10", "updates": "4", "batch": "16", "epochs": "2", "micro-batch": "16",
    "response-length": "24", "temperature": "1", "lr": "2e-5", "beta": "0.05",
    "eval-prompts": "64"}
ASKED = 32  # held-out prompts whose answers' words are counted

# ------------------------------------------------------------------------------------------- train


def train(folder: Path, flags: list[str]) -> Path:
    """One run of all modes and seeds -> its folder. Raises SystemExit if it does not finish.

    flags: of fedppo.py, in place of those of SETTINGS.
    """
    run = folder / "runs/real"
    if (run / "summary.json").exists():
        if flags:
            raise SystemExit(f"{run} is finished: {' '.join(flags)} would change nothing")
        return run
    given = {"judge": JUDGE, **SETTINGS}
    settings = [word for name, value in given.items() for word in (f"--{name}", value)]
    fresh = ["--model", str(folder / "model"), "--dataset", str(folder / "pairs"), "--out",
             str(folder / "runs"), "--name", "real", "--mode", *MODES, "--seeds", *SEEDS, *settings]
    started = (run / "config.json").exists()
    again = ["--resume", str(run), "--judge", JUDGE]
    if code := fedppo.main((again if started else fresh) + flags):
        raise SystemExit(code)
    return run


# ------------------------------------------------------------------------------------------- words


def count(answers: list[dict]) -> np.ndarray:
    """[2] per response: different words, and all words."""
    texts = [answer["response"].lower().split() for answer in answers]
    return np.mean([[len(set(text)), len(text)] for text in texts], 0)


def words(run: Path, seed: int, modes: list[str]) -> dict[str, np.ndarray]:
    """Words per response, as `count` has them, of the initial policy ("before") and of a mode's
    agents."""
    _, s = compare.run_of(str(run))
    table = compare.Table(s, seed)
    table.prompts = deal_rows(table.world, seed)[0][:ASKED]
    table.answer("before", table.world.initial)
    for mode in modes:
        for agent in range(s.agents):
            home = run / "agents" / f"{mode}-seed{seed}-agent{agent}"
            table.answer(f"{mode} {agent}", table.policy(home))
    found = {name: count(answers) for name, answers in table.columns.items()}
    return {"before": found["before"]} | {
        mode: np.mean([found[f"{mode} {agent}"] for agent in range(s.agents)], 0)
        for mode in modes}


# ------------------------------------------------------------------------------------------- write

COLUMNS = ("mode", "seed", "judge_initial", "judge_final", "judge_own_initial", "judge_own_final",
           "worst_agent_final", "reward_final", "kl_initial_final", "reward_accuracy",
           "different_before", "words_before", "different_after", "words_after", "bytes",
           "seconds", "curve")


def rows_of(run: Path) -> list[dict]:
    """A line for each mode and seed."""
    metrics = plot.load_metrics(run)
    summary = plot.summarise(metrics)["modes"]
    seeds = sorted({row["seed"] for row in metrics})
    counted = {seed: words(run, seed, list(summary)) for seed in seeds}
    lines = []
    for mode, entry in summary.items():
        curves = dict(zip(seeds, plot.seed_curves(metrics, mode, "judge")[1], strict=True))
        for seed in seeds:
            fits = [row["reward_accuracy"] for row in metrics
                    if (row["mode"], row["seed"], row["update"]) == (mode, seed, 0)]
            line = {"mode": mode, "seed": seed} | entry["seeds"][str(seed)] | {
                "reward_accuracy": sum(fits) / len(fits), "curve": report.join(curves[seed])}
            for when, who in (("before", "before"), ("after", mode)):
                different, every = map(float, counted[seed][who])
                line |= {f"different_{when}": different, f"words_{when}": every}
            lines.append({name: f"{line[name]:.4g}" if isinstance(line[name], float)
                          else line[name] for name in COLUMNS})
    return lines


def table(rows: list[dict]) -> list[str]:
    """A row for each mode: means over seeds, and each seed's difference from `isolated`."""
    def values(mode: str, name: str) -> list[float]:
        return [float(row[name]) for row in rows if row["mode"] == mode]

    lines = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mean = {name: sum(values(mode, name)) / len(values(mode, name)) for name in COLUMNS[2:-1]}
        final, alone = values(mode, "judge_final"), values("isolated", "judge_final")
        apart = [f"{a - b:+.2f}" for a, b in zip(final, alone, strict=False)]
        lines.append([
            f"`{mode}`", f"{mean['judge_initial']:.2f} → {mean['judge_final']:.2f}",
            f"{mean['judge_own_initial']:.2f} → {mean['judge_own_final']:.2f}",
            "–" if mode == "isolated" else ", ".join(apart) or "–",
            f"{mean['worst_agent_final']:.2f}", f"{mean['kl_initial_final']:.1f}",
            *(f"{mean[f'different_{when}']:.1f} of {mean[f'words_{when}']:.1f}"
              for when in ("before", "after")),
            f"{mean['bytes'] / 1e9:.0f}", f"{mean['seconds'] / 3600:.1f}"])
    return report.table("mode | judge's score, all kinds | own kind | minus `isolated`, each seed "
                        "| worst agent | KL to initial, nats | different words a response, before "
                        "| after | GB | hours", lines)


def write(run: Path, results: Path) -> None:
    """The results files of a finished run."""
    rows = rows_of(run)
    with (results / "real.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    hardware = json.loads((run / "config.json").read_text(encoding="utf-8"))["hardware"]
    machine = hardware["gpu"] or f"{hardware['cores']} CPU cores"
    lines = ["# A real language model on real text", "",
             f"Made by `python benchmarks/real/run.py` on {machine}.", "", *table(rows)]
    (results / "real.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind in ("png", "svg"):
        shutil.copy(run / f"curves.{kind}", results / f"real.{kind}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     epilog="Further flags are fedppo.py's.")
    parser.add_argument("--folder", type=Path, default=HERE.parents[2] / "fedppo-real",
                        help="where make.py has made model and pairs [%(default)s]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="[%(default)s]")
    options, flags = parser.parse_known_args(argv)
    if {"--out", "--name"} & set(flags):
        parser.error("the run's folder is FOLDER/runs/real")
    write(train(options.folder, flags), options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

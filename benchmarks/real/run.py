"""Four agents with a real language model, each with texts of its own kind: alone and together.

    python benchmarks/real/make.py          first: model, pairs
    python benchmarks/real/run.py           hours on 2 cores; goes on where it was stopped
    python benchmarks/real/run.py --seeds 10 --threads 1    one of them, as another process; when
                                            all are finished, the command above writes all

In reading order
    1. SETTINGS    one command of fedppo.py for all modes, one run for each seed
    2. train       started or resumed, in FOLDER/runs/seed9, ...
    3. answers     the trained agents are asked again: how far they are from the initial policy, how
                   many different words a response has (text that falls apart repeats itself), and
                   which words they took to
    4. write       benchmarks/results/real.csv, a line per mode and seed; real.md; real.png and .svg

SETTINGS were found on seeds 0 to 8 and 100, which no table uses.
"""

import argparse
import csv
import dataclasses
import json
import re
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import compare  # noqa: E402
import fedppo  # noqa: E402
import kl  # noqa: E402
import plot  # noqa: E402
import ppo_core  # noqa: E402
import report  # noqa: E402
from support.run import markdown_table, sample_cell  # noqa: E402
from support.settings import parse  # noqa: E402
from world import deal_rows  # noqa: E402

RESULTS = HERE.parent / "results"
JUDGE = f"{HERE / 'judge.py'}:score"
MODES = ("isolated", "classic", "federated", "merged", "fedavg")
SEEDS = ("9", "10", "11")
SETTINGS = {
    "preset": "pythia-70m",  # the one for real models
    "agents": "4", "shards": "split", "prompts": "own",
    "pairs": "1050", "reward-probe": "1", "reward-lr": "1e-2", "reward-epochs": "4",
    "reward-pooling": "mean", "policy-layers": "4", "rounds": "5", "updates": "1", "batch": "48",
    "epochs": "2", "minibatches": "8", "micro-batch": "6", "response-length": "24",
    "temperature": "1", "lr": "7e-4", "lr-schedule": "constant", "beta": "0.05", "anchor": "0.1",
    "eval-prompts": "64"}
# Paths and machines, in which runs that stand in one table may differ.
FREE = ("seeds", "name", "out", "device", "threads", "model", "dataset", "judge")
ASKED = 32  # held-out prompts whose answers' words are counted
SHOWN = 0  # which of these, counted among those of its own kind, stands in real.md for an agent

# ------------------------------------------------------------------------------------------- train


def flags_of(values: dict) -> list[str]:
    """Values by name, a list where a flag takes several -> words of a command line."""
    return [word for name, value in values.items() for word in (
        f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value]))]


def train(folder: Path, seed: str, flags: list[str]) -> Path:
    """One run of all modes -> its folder. Raises SystemExit if it does not finish.

    flags: of fedppo.py, in place of those of SETTINGS. A run that was begun keeps its settings, a
    finished one stays as it is.
    """
    run = folder / f"runs/seed{seed}"
    if (run / "summary.json").exists():
        return run
    settings = flags_of({"judge": JUDGE, **SETTINGS})
    fresh = ["--model", str(folder / "model"), "--dataset", str(folder / "pairs"), "--out",
             str(run.parent), "--name", run.name, "--mode", *MODES, "--seeds", seed, *settings]
    started = (run / "config.json").exists()
    again = ["--resume", str(run), "--judge", JUDGE]
    if code := fedppo.main((again if started else fresh) + flags):
        raise SystemExit(code)
    return run


# ----------------------------------------------------------------------------------------- answers

def answers(run: Path) -> dict:
    """Ask a finished run's initial policy and agents ASKED held-out prompts; kept in answers.json.

    -> {"prompts": texts, "kinds": of each, "agents": the kind of each agent, "columns": {"before",
    or an agent's folder: a response with its score, as compare.py has them, for each prompt}, "kl":
    {an agent's folder: `distance` of it}}. A run's metrics have KL before an update, in merged and
    fedavg of the average; this is KL of the policies that were judged.
    """
    kept = run / "answers.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    _, s = compare.run_of(str(run))
    table = compare.Table(s, s.seeds[0])
    prompts, shards, _ = deal_rows(table.world, s.seeds[0])
    table.prompts = prompts[:ASKED]
    table.answer("before", table.world.initial)
    apart = {}
    for home in sorted((run / "agents").iterdir()):
        policy = table.policy(home)
        apart[home.name] = distance(policy, table.answer(home.name, policy), table.world)
    # The first row of a prompt says of what kind it is, as in world.py.
    split = {pair.prompt: pair.split for pair in reversed(table.world.pairs)}
    found = {"prompts": table.prompts, "kinds": [split[prompt] for prompt in table.prompts],
             "agents": [" ".join(shard.splits) for shard in shards], "columns": table.columns,
             "kl": apart}
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


@torch.no_grad()
def distance(policy, sampled: tuple, world) -> float:
    """Exact KL(policy || initial policy) of a response, in nats: the mean over what it sampled."""
    of_each = []
    for prompt, attention, response, mask in zip(
            *(tensor.split(world.settings.micro_batch) for tensor in sampled), strict=True):
        part = torch.cat([prompt, response], 1), torch.cat([attention, mask], 1), response, mask
        own, initial = (ppo_core.score_tokens(one, *part, world.settings.temperature)[1]
                        for one in (policy, world.initial))  # [b, T, V]
        of_each += torch.where(mask.bool(), kl.kl_exact(own, initial), 0).sum(1).tolist()
    return sum(of_each) / len(of_each)


def words(response: dict) -> list[str]:
    return re.findall(r"[\w']+", response["response"].replace("’", "'").lower())


def count(responses: list[dict]) -> np.ndarray:
    """[3]: different words and all words per response, and the share of responses of which fewer
    than half of the words are different: text that has fallen apart."""
    sizes = [(len(set(text)), len(text)) for text in map(words, responses)]
    return np.mean([[different, every, different < every / 2] for different, every in sizes], 0)


def risen(before: list[dict], after: list[dict], number: int = 6) -> str:
    """The words that most more of the responses hold after training, with both shares in %."""
    def shares(responses: list[dict]) -> Counter:
        held = Counter(word for response in responses for word in set(words(response)))
        return Counter({word: held[word] / len(responses) for word in held})

    old, new = shares(before), shares(after)
    most = sorted(new, key=lambda word: (old[word] - new[word], word))[:number]
    return ", ".join(f"{word} {100 * old[word]:.0f} → {100 * new[word]:.0f}" for word in most)


# ------------------------------------------------------------------------------------------- write

COUNTED = ("different", "words", "repeating")  # what `count` gives
COLUMNS = ("mode", "seed", "judge_initial", "judge_final", "judge_own_initial", "judge_own_final",
           "worst_agent_final", "reward_final", "kl_initial_final", "kl_judged", "clipfrac",
           "reward_accuracy",
           *(f"{name}_{when}" for when in ("before", "after") for name in COUNTED),
           "repeating_worst", "bytes", "seconds", "curve")


def rows_of(run: Path) -> list[dict]:
    """A line for each mode of a run, which has one seed."""
    metrics = plot.load_metrics(run)
    summary, seed = plot.summarise(metrics)["modes"], metrics[0]["seed"]
    found, lines = answers(run), []
    columns = found["columns"]
    for mode, entry in summary.items():
        curve, = plot.seed_curves(metrics, mode, "judge")[1]
        fits = [row["reward_accuracy"] for row in metrics
                if (row["mode"], row["update"]) == (mode, 0)]
        clipped = [row["clipfrac"] for row in metrics if row["mode"] == mode and row["update"]]
        line = {"mode": mode, "seed": seed} | entry["seeds"][str(seed)] | {
            "kl_judged": float(np.mean([apart for name, apart in found["kl"].items()
                                        if name.startswith(f"{mode}-")])),
            "clipfrac": sum(clipped) / len(clipped), "reward_accuracy": sum(fits) / len(fits),
            "curve": report.join(curve)}
        for when, who in (("before", "before"), ("after", f"{mode}-")):
            counts = [count(column) for name, column in columns.items() if name.startswith(who)]
            numbers = map(float, np.mean(counts, 0))
            line |= dict(zip((f"{name}_{when}" for name in COUNTED), numbers, strict=True))
        line["repeating_worst"] = float(max(counts, key=lambda one: one[2])[2])  # of the agents
        lines.append({name: f"{line[name]:.4g}" if isinstance(line[name], float)
                      else line[name] for name in COLUMNS})
    return lines


def taught(runs: list[Path], modes: list[str]) -> list[list[str]]:
    """For each mode and agent, what its responses in all runs say more often than before."""
    found, lines = [answers(run) for run in runs], []
    before = [response for one in found for response in one["columns"]["before"]]
    for mode in modes:
        for agent, kind in enumerate(found[0]["agents"]):
            after = [response for one in found for name, column in one["columns"].items()
                     if name.startswith(f"{mode}-") and name.endswith(f"-agent{agent}")
                     for response in column]
            lines.append([f"`{mode}`", kind, risen(before, after)])
    return lines


def samples(run: Path, modes: list[str]) -> list[list[str]]:
    """For each agent a prompt of its own kind, and its responses before and after each mode."""
    found, lines = answers(run), []
    for agent, kind in enumerate(found["agents"]):
        n = [n for n, other in enumerate(found["kinds"]) if other in kind.split()][SHOWN]
        names = [name for mode in modes for name in found["columns"]
                 if name.startswith(f"{mode}-") and name.endswith(f"-agent{agent}")]
        cells = [sample_cell(found["columns"][name][n]) for name in ("before", *names)]
        lines.append([kind, found["prompts"][n], *cells])
    return lines


def table(rows: list[dict]) -> list[str]:
    """A row for each mode: means over seeds, and each seed's differences from `isolated`."""
    def values(mode: str, name: str) -> list[float]:
        return [float(row[name]) for row in rows if row["mode"] == mode]

    def apart(mode: str, name: str) -> str:
        alone = {row["seed"]: float(row[name]) for row in rows if row["mode"] == "isolated"}
        return ", ".join(f"{float(row[name]) - alone[row['seed']]:+.2f}" for row in rows
                         if row["mode"] == mode != "isolated" and row["seed"] in alone) or "–"

    lines = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mean = {name: sum(values(mode, name)) / len(values(mode, name)) for name in COLUMNS[2:-1]}
        lines.append([
            f"`{mode}`", f"{mean['judge_initial']:.2f} → {mean['judge_final']:.2f}",
            f"{mean['judge_own_initial']:.2f} → {mean['judge_own_final']:.2f}",
            apart(mode, "judge_final"), apart(mode, "judge_own_final"),
            f"{mean['worst_agent_final']:.2f}", f"{mean['kl_judged']:.1f}",
            f"{100 * mean['clipfrac']:.0f} %",
            *(f"{mean[f'different_{when}']:.1f} of {mean[f'words_{when}']:.1f}"
              for when in ("before", "after")),
            f"{100 * mean['repeating_before']:.0f} → {100 * mean['repeating_after']:.0f} %",
            f"{100 * max(values(mode, 'repeating_worst')):.0f} %",
            f"{mean['bytes'] / 1e9:.1f}", f"{mean['seconds'] / 3600:.1f}"])
    return report.table(
        "mode | judge's score, all kinds | own kind | all kinds, minus `isolated`, each seed | own "
        "kind, minus `isolated` | worst agent | KL to initial at the end, nats a response | tokens "
        "clipped | different words a response, before | after | responses that "
        "repeat themselves | of the worst agent of all seeds | GB received | hours of training and "
        "judging", lines)


def other_flags(settings: dict, seeds: list[str]) -> list[str]:
    """The flags by which finished runs differ from SETTINGS, MODES and SEEDS."""
    usual = parse([*flags_of(SETTINGS), "--mode", *MODES], fedppo.MODES).settings
    usual = json.loads(json.dumps(dataclasses.asdict(usual)))  # tuples become lists, as in a run's
    differ = {} if list(seeds) == list(SEEDS) else {"seeds": list(seeds)}
    differ |= {name: settings[name] for name in usual if name not in (*FREE, "response_eos")
               and settings[name] not in (usual[name], None)}
    return flags_of(differ)


def write(folder: Path, results: Path, seeds: list[str]) -> None:
    """The results files of finished runs, which must have equal settings."""
    runs = [folder / f"runs/seed{seed}" for seed in seeds]
    configs = [json.loads((run / "config.json").read_text(encoding="utf-8")) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        differ = [name for name, value in config["settings"].items()
                  if value != configs[0]["settings"][name] and name not in FREE]
        if differ:
            raise SystemExit(f"{run} and {runs[0]} differ in {', '.join(differ)}: one of them must "
                             "be made anew")
    rows = sorted((row for run in runs for row in rows_of(run)),
                  key=lambda row: (list(fedppo.MODES).index(row["mode"]), row["seed"]))
    with (results / "real.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    hardware, settings = configs[0]["hardware"], configs[0]["settings"]
    modes = settings["mode"]
    command = shlex.join(["python", "benchmarks/real/run.py", *other_flags(settings, seeds)])
    machine = hardware["gpu"] or f"{hardware['cores']} CPU cores"
    lines = ["# A real language model on real text", "",
             f"Made by `{command}` on {machine}.", "", *table(rows), "",
             *report.table("mode | agent | words that more of its responses hold than before, in %",
                           taught(runs, modes)), "",
             *markdown_table(["agent", "prompt", "before", *modes], samples(runs[0], modes))]
    (results / "real.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as together:
        with (Path(together) / "metrics.jsonl").open("w", encoding="utf-8") as file:
            file.writelines((run / "metrics.jsonl").read_text(encoding="utf-8") for run in runs)
        plot.draw([together], results / "real.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     epilog="Further flags are fedppo.py's.")
    parser.add_argument("--folder", type=Path, default=HERE.parents[2] / "fedppo-real",
                        help="where make.py has made model and pairs [%(default)s]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="[%(default)s]")
    parser.add_argument("--seeds", nargs="+", default=SEEDS, help="one after the other [9 10 11]")
    options, flags = parser.parse_known_args(argv)
    if {"--out", "--name"} & set(flags):
        parser.error("the folders of the runs are FOLDER/runs/seed9, ...")
    for seed in options.seeds:
        train(options.folder, seed, flags)
    write(options.folder, options.results, options.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

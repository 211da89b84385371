"""Does cooperation help, by how much, and where does it not: every run behind the results tables.

    python benchmarks/study.py           finished runs are not repeated, so it can be stopped at any
                                         time
    python benchmarks/study.py --quick   a small version in minutes, in runs/study-quick

In reading order
    1. arms and regimes       what is compared, and where: each is a line of fedppo.py's own flags
    2. jobs                   the headlines, then the other regimes, and their seeds
    3. labels                 how two communities and a flipped annotator label the same pairs
    4. one run                fedppo.train with a list for a log -> one row of study.csv
    5. schedule               one process of one thread per core, rows appended as they are finished
    6. main                   then report.py makes tables.md and the pictures from study.csv alone

The protocol. tune.py finds each arm's settings in both headline regimes, on the TUNING seeds alone
(chosen.json). Here they are run on SEEDS, on which no choice was made; the first six of them have
the other regimes too, and all have mixed sizes. A study takes hours of two cores.

A seed redraws every agent's data, reward models, evaluation prompts and sampling, and arms of one
seed share them (but for the reward models that an arm or regime defines itself: shared,
centralized). A row is known by its flags: after a change of the algorithm remove study.csv and
tuning.csv.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # all it needs is embedded

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import dpo  # noqa: E402
import fedppo  # noqa: E402
import plot  # noqa: E402
import ppo_core  # noqa: E402
import report  # noqa: E402
from support.settings import Settings  # noqa: E402
from support.settings import parse as parse_command  # noqa: E402
from tiny import judge  # noqa: E402
from world import Task, World, make_task  # noqa: E402

# ------------------------------------------------------------------------------- arms and regimes

ARMS = {  # name: settings of fedppo.py
    "isolated": {"mode": "isolated"},
    "classic": {"mode": "classic"},
    "federated": {"mode": "federated", "topology": "self"},
    "merged": {"mode": "merged", "topology": "self"},
    "fedavg": {"mode": "fedavg"},
    "centralized": {"mode": "centralized", "micro_batch": 128},
} | {name: {} for name in dpo.ARMS}  # not of fedppo.py
COMMUNITIES = {"topology": f"{HERE.name}/communities.json"}
VARIANTS = {  # name: the arm whose settings it takes, and what it changes
    "isolated 4x batch": ("isolated", {"batch": 128, "micro_batch": 128}),
    "federated in communities": ("federated", COMMUNITIES),
    "merged in communities": ("merged", COMMUNITIES),
    "fedavg in communities": ("fedavg", {"mode": "merged", "rule": "weights"} | COMMUNITIES),
    "federated, outlier": ("federated", {"outlier": 1.5}),
    "federated, arithmetic": ("federated", {"rule": "arithmetic"}),
    "federated, weights": ("federated", {"rule": "weights"}),
    "federated, k1 in reward": ("federated", {"penalty": "k1-in-reward"}),
    "federated, both": ("federated", {"penalty": "both"}),
    "federated, ring": ("federated", {"topology": "ring"}),
    "federated, no anchor": ("federated", {"anchor": 0}),
    "isolated, no anchor": ("isolated", {"anchor": 0}),
    "isolated, ensemble of rewards": ("isolated", {"reward": "ensemble"}),
}
OWN, COMMON = ({"prompts": prompts, "rounds": 20} for prompts in ("own", "common"))
REGIMES = {  # name: settings
    "own prompts": OWN,
    "common prompts": COMMON,
    "pairs alone": {},  # of DPO, which draws no prompts
    "mixed sizes": COMMON | {"model": "tiny/model tiny/model-96x3"},
    "two communities": COMMON,
    "flipped labels": COMMON,
    "50 pairs": COMMON | {"pairs": 50},
    "400 pairs": COMMON | {"pairs": 400},
    "shared reward": COMMON | {"reward": "shared"},
    "8 agents": COMMON | {"agents": 8},
}
ABROAD = ("isolated", "federated", "fedavg")
WEIGHTS = "federated, weights"  # on all seeds, since on the first six it ended higher
ELSEWHERE = {  # regime: its arms, at the settings of common prompts
    "mixed sizes": ("isolated", "federated"),
    "two communities": (*ABROAD, "merged", *(arm for arm in VARIANTS if "communities" in arm)),
    "flipped labels": (*ABROAD, "federated, outlier"),
    **dict.fromkeys(("50 pairs", "400 pairs", "shared reward", "8 agents"), ABROAD),
    "common prompts": [arm for arm in VARIANTS if ", " in arm and "outlier" not in arm],
    "own prompts": (WEIGHTS,),
}

# ------------------------------------------------------------------------------------------- jobs

TUNING = range(200, 203)
SEEDS = range(4000, 4020)


@dataclass(frozen=True)
class Job:
    """One run: an arm in a regime on a seed, with all flags that differ from the tiny preset."""

    arm: str
    regime: str
    seed: int
    flags: str

    @property
    def cost(self) -> float:
        """Expected time, in runs of one isolated arm: for the progress bar."""
        row = {"settings": self.flags}
        known = {"isolated 4x batch": 2.5, "centralized": 0.6} | dict.fromkeys(dpo.ARMS, 0.3)
        cost = known.get(self.arm, 1.5 if report.flag(row, "--model") else 1.0)
        return cost * int(report.flag(row, "--agents", "4")) / 4


def job(arm: str, regime: str, seed: int, tuned: dict) -> Job:
    """tuned: beta, lr and what else of `tune.Cell` the arm, or the one that it is a variant of,
    has."""
    of, changes = VARIANTS.get(arm, (arm, {}))
    if ".json" in changes.get("topology", ""):  # the file has the weights
        tuned = {name: value for name, value in tuned.items() if name != "self_weight"}
    flags = [f"--{name.replace('_', '-')} {f'{value:g}' if isinstance(value, float) else value}"
             for name, value in (ARMS[of] | REGIMES[regime] | tuned | changes).items()]
    return Job(arm, regime, seed, " ".join(flags))


def regimes_of(arm: str) -> tuple[str, ...]:
    """The headlines that the arm stands in, and is tuned in if it is no variant."""
    if arm == "centralized":  # it has all prompts either way
        return ("common prompts",)
    return ("pairs alone",) if arm in dpo.ARMS else report.HEADLINES


def headline_jobs(chosen: dict[str, dict], seeds: range = SEEDS) -> list[Job]:
    """Every arm in both headline regimes, seed by seed, so that an interrupted study has whole
    ones; those that are missed most come first."""
    first = ("isolated", "federated", "merged", "fedavg", "centralized")
    others = [arm for arm in (*ARMS, "isolated 4x batch") if arm not in first]
    return [chosen_job(chosen, arm, regime, seed) for arms in (first, others) for seed in seeds
            for arm in arms for regime in regimes_of(arm)]


def elsewhere_jobs(chosen: dict[str, dict]) -> list[Job]:
    return [chosen_job(chosen, arm, regime, seed) for regime, arms in ELSEWHERE.items()
            for arm in arms
            for seed in (SEEDS if regime == "mixed sizes" or arm == WEIGHTS
                         else SEEDS[:report.ELSEWHERE_SEEDS])]


def chosen_job(chosen: dict[str, dict], arm: str, regime: str, seed: int) -> Job:
    """chosen: the content of chosen.json."""
    of = VARIANTS.get(arm, (arm,))[0]
    tuned = chosen[f"{of}, {regime if regime in regimes_of(of) else 'common prompts'}"]["settings"]
    return job(arm, regime, seed, tuned)


# ----------------------------------------------------------------------------------------- labels


def community(split: str) -> int:
    """0: annotators who love sentiment (of 4 agents, 0 and 1 own their topics), 1: vividness."""
    return owner(split) // 2


def owner(split: str) -> int:
    """The agent, of 4, that data.make_shards gives a topic to."""
    return sorted(judge.TOPICS).index(split) % 4


def own_truth(number: int, prompt: str, response: str, ended: bool) -> float:
    """A community's own gold score: without the term that the other one cares for."""
    terms = judge.terms(prompt, response, ended)
    return sum(value for name, value in terms.items() if name != ("vividness", "sentiment")[number])


def relabel(pair: data.Pair, response_length: int) -> data.Pair:
    """The pair as an annotator of its topic's community labels it: Bradley-Terry on the own truth,
    scale 3.

    The same draw on every seed, as the shipped labels are: it depends on the pair's texts alone.
    """
    texts = sorted((pair.chosen, pair.rejected))
    first, second = (own_truth(community(pair.split), pair.prompt, text,
                               len(text.split()) < response_length) for text in texts)
    draw = random.Random("\n".join([pair.prompt, *texts])).random()
    if draw >= 1 / (1 + math.exp(-3.0 * (first - second))):
        texts.reverse()
    return dataclasses.replace(pair, chosen=texts[0], rejected=texts[1])


def flip(pair: data.Pair) -> data.Pair:
    """The labels of agent 0's topics are turned round."""
    if owner(pair.split) != 0:
        return pair
    return dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)


# ---------------------------------------------------------------------------------------- one run

COLUMNS = ("arm", "regime", "seed", "settings", "judge_half", "judge_final", "judge_best",
           "worst_agent", "own_topics", "own_truth", "reward_final", "kl_initial", "bytes",
           "seconds", "reward_accuracy", "judge_curve", "own_curve", "judge_agents")


def key(row: dict) -> Job:
    return Job(row["arm"], row["regime"], int(row["seed"]), row["settings"])


TASKS: dict[tuple, Task] = {}  # the last few, so that arms of one seed share reward models


def parse(flags: str) -> Settings:
    command = ["--preset", "tiny", "--device", "cpu", *flags.split()]
    return parse_command(command, fedppo.MODES).settings


@functools.cache
def start(model: tuple[str, ...]) -> World:
    """The models and preference rows that all jobs of a process start from; no job changes them in
    place."""
    return World(parse(f"--model {' '.join(model)}"))


def prepare(job: Job) -> tuple[World, Task, str]:
    """-> the world with the job's settings and labels, what its seed gives to agents, its mode."""
    transformers.utils.logging.disable_progress_bar()
    s = parse(job.flags)
    world = copy.copy(start(s.model))
    world.settings = s
    labels = ""  # as shipped
    if job.regime == "two communities":
        labels, world.pairs = job.regime, [relabel(pair, s.response_length) for pair in world.pairs]
    if job.regime == "flipped labels":
        labels, world.pairs = job.regime, [flip(pair) for pair in world.pairs]
    mode = s.mode[0]
    task_key = (job.seed, labels, mode == "centralized", s.model, s.reward, s.pairs, s.agents,
                s.eval_prompts, s.prompts)
    if task_key not in TASKS:
        while len(TASKS) > 4:
            TASKS.pop(next(iter(TASKS)))
        TASKS[task_key] = make_task(world, job.seed, mode == "centralized")
    return world, TASKS[task_key], mode


def run(job: Job) -> dict:
    """Train one arm -> its row. With flipped labels the three honest agents alone count."""
    return train(job, uncounted=1 if job.regime == "flipped labels" else 0)[0]


def train(job: Job, uncounted: int = 0, new_agent=fedppo.Agent) -> tuple[dict, list[dict]]:
    """Train one arm -> its row, and the log of the agents that count: all but the first ones.

    A run that diverges has no scores. new_agent: what a bad agent is made by, as in fedppo.train.
    """
    torch.set_num_threads(1)
    world, task, mode = prepare(job)
    log: list[dict] = []
    row = dict.fromkeys(COLUMNS, "") | {"arm": job.arm, "regime": job.regime, "seed": job.seed,
                                        "settings": job.flags}
    try:
        if job.arm in dpo.ARMS:
            agents = dpo.train(world, task, job.arm, log.append)
        else:
            agents = fedppo.train(world, task, mode, log.append, new_agent=new_agent)
    except FloatingPointError:
        return row, []
    log = [logged for logged in log if logged["agent"] >= uncounted]
    row |= scores(log)
    if job.regime == "two communities":
        row["own_truth"] = own_truths(world, task, agents)
    row["reward_accuracy"] = sum(fit[0] for fit in task.accuracies) / len(task.accuracies)
    row = {name: f"{value:.6g}" if isinstance(value, float) else value
           for name, value in row.items()}
    return row, log


def scores(log: list[dict]) -> dict:
    """What the log gives to a row: means over the agents in it."""
    mode = log[0]["mode"]
    (judged,), own = (plot.seed_curves(log, mode, name)[1] for name in ("judge", "judge_own"))
    own = own[0] if len(own) else judged  # the one agent of `centralized` owns every topic
    last = [row for row in log if row["update"] == log[-1]["update"]]
    row = {"judge_half": judged[len(judged) // 2], "judge_final": judged[-1],
           "judge_best": judged.max(), "worst_agent": min(row["judge"] for row in last),
           "own_topics": own[-1], "bytes": sum(row["bytes"] for row in last),
           "seconds": sum(row.get("seconds", 0) for row in log),
           "judge_curve": report.join(judged), "own_curve": report.join(own),
           "judge_agents": "/".join(
               report.join(row["judge"] for row in log
                           if row["agent"] == one["agent"] and row.get("judge") is not None)
               for one in last)}
    for name, key in (("reward_final", "reward"), ("kl_initial", "kl_initial")):
        known = [row[key] for row in last if key in row]  # of DPO and of a frozen agent it has none
        row |= {name: sum(known) / len(known)} if known else {}
    return {name: float(value) if isinstance(value, np.floating) else value
            for name, value in row.items()}


def own_truths(world: World, task: Task, agents: list[fedppo.Agent]) -> float:
    """The mean score of the responses that the judge scored last, each by the truth of its agent's
    own community, on all topics."""
    found = []
    for agent in agents:
        sampled = world.respond(task.eval_prompts, agent.policy,
                                data.generator(task.seed, "evaluation"))
        prompts = data.decode(world.tokenizer, *sampled[:2])
        ended = ppo_core.has_ended(*sampled[2:], world.eos_ids).tolist()
        texts = zip(prompts, data.decode(world.tokenizer, *sampled[2:]), ended, strict=True)
        found += [own_truth(agent.index // 2, *text) for text in texts]
    return sum(found) / len(found)


# --------------------------------------------------------------------------------------- schedule


def load(path: Path) -> list[dict]:
    """The finished runs. Half a last line, as a killed study may leave, is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def save(path: Path, rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> None:
    """All rows in a fixed order, under a temporary name first."""
    regimes, arms = ({name: k for k, name in enumerate(names)}
                     for names in (REGIMES, ARMS | VARIANTS))

    def place(row: dict) -> tuple:
        return (regimes.get(row["regime"], len(regimes)), row["regime"],
                arms.get(row["arm"], len(arms)), row["arm"], int(row["seed"]), row["settings"])
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=place))
    os.replace(temporary, path)


def complete(path: Path, jobs: list[Job], title: str, processes: int,
             run: Callable[[Job], dict] = run, columns: tuple[str, ...] = COLUMNS) -> list[dict]:
    """Do those of the jobs that path does not hold, and add them to it -> all its rows.

    One process at a time may write to a path: another's rows would be lost.
    """
    rows = load(path)
    done = {key(row) for row in rows}
    pending = list(dict.fromkeys(one for one in jobs if one not in done))
    if not pending:
        return rows
    save(path, rows, columns)
    bar = tqdm(total=sum(one.cost for one in pending), desc=title, unit="run", smoothing=0.05,
               dynamic_ncols=True, bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/"
                                              "{total:.0f} [{elapsed}, {remaining} left]")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("a", newline="", encoding="utf-8"))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        side_by_side = map
        if processes > 1:
            pool = multiprocessing.get_context("spawn").Pool(processes)
            side_by_side = stack.enter_context(pool).imap_unordered
        for row in side_by_side(run, pending):
            writer.writerow(row)
            file.flush()
            bar.update(key(row).cost)
    bar.close()
    rows = load(path)
    save(path, rows, columns)
    return rows


# ------------------------------------------------------------------------------------------- main

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true",
                        help="the headlines on two seeds, 4 and 8 updates for 40 and 80")
    parser.add_argument("--processes", type=int, default=os.cpu_count(),
                        help="processes side by side, of one thread each [one per core]")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    os.chdir(HERE.parent)  # the flags name files of the repository
    results = HERE / "results"
    chosen = json.loads((results / "chosen.json").read_text(encoding="utf-8"))
    if options.quick:
        results = Path("runs/study-quick")
        results.mkdir(parents=True, exist_ok=True)
        quick = headline_jobs(chosen, SEEDS[:2])
        short = [dataclasses.replace(one, flags=f"{one.flags} --rounds 2 --eval-prompts 64")
                 for one in quick]
        complete(results / "study.csv", short, "quick", options.processes)
    else:
        jobs = headline_jobs(chosen) + elsewhere_jobs(chosen)
        complete(results / "study.csv", jobs, "all runs", options.processes)
    print(report.write(results))
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())

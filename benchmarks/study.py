"""Does cooperation help, by how much, and where does it not: every run behind the results tables.

    python benchmarks/study.py           all stages; finished runs are not repeated, so it can be
                                         stopped at any time
    python benchmarks/study.py --quick   a small version in under 5 minutes, in runs/study-quick

In reading order
    1. arms and regimes       what is compared, and where: each is a line of fedppo.py's own flags
    2. stages                 tune -> reported -> penalty -> confirm -> again, and their seeds
    3. labels                 how two communities and a flipped annotator label the same pairs
    4. one run                fedppo.train with a list for a log -> one row of study.csv
    5. schedule               one process of one thread per core, rows appended as they are finished
    6. main                   then report.py makes tables.md and the pictures from study.csv alone

The protocol. Every arm is tuned by one rule in the headline regime, on TUNING seeds alone. On the
first of them it starts from the same GRID of beta and learning rate; while its best cell has
neighbours (twice or half of either) that were not run, they are, so that the best cell of that seed
lies at no edge. Its FINALISTS best cells then run on the other TUNING seeds, and the highest mean
is chosen (whose own neighbours may not have been run). chosen.json has every cell's scores. All
other stages use these values on seeds that no choice was made on (penalty first tunes where the KL
penalty is charged, likewise); CONFIRM seeds are run after everything was fixed. The stage `again`
runs the arms of the README's first screen on them once more, into again.csv: code that was only
made faster or rearranged since must find the same, within the noise of another sampling.

A seed redraws every agent's data, reward models, evaluation prompts and sampling, and arms of one
seed share them (but for the reward models that an arm defines itself: shared, ensemble,
centralized). A row is known by its flags: after a change of the algorithm remove study.csv, after
any other of the code again.csv.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # all it needs is embedded

import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import fedppo  # noqa: E402
import kl  # noqa: E402
import plot  # noqa: E402
import ppo_core  # noqa: E402
import report  # noqa: E402
from support.settings import Settings  # noqa: E402
from support.settings import parse as parse_command  # noqa: E402
from tiny import judge  # noqa: E402
from world import Task, World, make_task  # noqa: E402

# ------------------------------------------------------------------------------- arms and regimes

ARMS = {  # name: flags of fedppo.py
    "isolated": "--mode isolated",
    "classic": "--mode classic",
    "isolated 4x batch": "--mode isolated --batch 128 --micro-batch 128",
    "fedavg": "--mode fedavg",
    "federated": "--mode federated --rule geometric",
    "federated arithmetic": "--mode federated --rule arithmetic",
    "federated weights": "--mode federated --rule weights",
    "merged": "--mode merged",
    "ensemble": "--mode isolated --reward ensemble",
    "centralized": "--mode centralized --micro-batch 128",
}
PENALTY_ARMS = {  # where KL is charged; exact in the loss is the default: `isolated`, `federated`
    "isolated, k1 in reward": "--mode isolated --penalty k1-in-reward",
    "isolated, both": "--mode isolated --penalty both",
    "federated, k1 in reward": "--mode federated --penalty k1-in-reward",
    "federated, both": "--mode federated --penalty both",
}
TWINS = {arm: arm.split(",")[0] for arm in PENALTY_ARMS}  # whose lr they take: beta alone is tuned
COMMUNITY_ARMS = {
    "federated in communities": f"--mode federated --topology {HERE.name}/communities.json"}
TUNED_AS = {"federated in communities": "federated"}  # whose beta and lr an arm takes
REGIMES = {  # name: flags on top of an arm's
    "headline": "",
    "shared reward": "--reward shared",
    "iid shards": "--shards iid",
    "two communities": "",
    "twice the updates": "--rounds 20",
    "50 pairs": "--pairs 50",
    "100 pairs": "--pairs 100",
    "400 pairs": "--pairs 400",
    "2 agents": "--agents 2",
    "8 agents": "--agents 8",
    "flipped labels": "",
    "1 update a round": "--rounds 40 --updates 1",
    "2 updates a round": "--rounds 20 --updates 2",
    "8 updates a round": "--rounds 5 --updates 8",
    "half the lr": "",
    "twice the lr": "",
}
LR_FACTOR = {"half the lr": 0.5, "twice the lr": 2.0}
QUICK_REGIMES = ("iid shards", "two communities")

# ----------------------------------------------------------------------------------------- stages

TUNING = range(200, 203)
REPORTED = range(1000, 1020)
CONFIRM = range(3000, 3020)
BETAS = (0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0)
LRS = (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
GRID = [(beta, lr) for beta in (0.06, 0.12, 0.25, 0.5, 1.0) for lr in (5e-4, 1e-3)]  # the start
FINALISTS = 3  # cells that go on from the first TUNING seed to the others
ELSEWHERE = report.ELSEWHERE  # seeds of a regime, the first of REPORTED


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
        cost = 2.5 if report.flag(row, "--batch") else 0.6 if self.arm == "centralized" else 1.0
        agents = int(report.flag(row, "--agents", "4"))
        return cost * agents / 4 * (2 if self.regime == "twice the updates" else 1)


def job(arm: str, regime: str, seed: int, beta: float, lr: float) -> Job:
    arms = ARMS | PENALTY_ARMS | COMMUNITY_ARMS
    lr *= LR_FACTOR.get(regime, 1)
    parts = [arms[arm], REGIMES[regime], f"--beta {beta:g} --lr {lr:g}"]
    return Job(arm, regime, seed, " ".join(part for part in parts if part))


Cell = tuple[float, float]  # beta and learning rate


def cells(rows: list[dict], arm: str) -> dict[Cell, list[float]]:
    """What the arm was run at in tuning -> {cell: final judge's scores by TUNING seed}.

    A run that diverged has -inf.
    """
    scores = {key(row): float(row["judge_final"] or "-inf") for row in rows}
    grid = {}
    for beta in BETAS:
        for lr in LRS:
            jobs = [job(arm, "headline", seed, beta, lr) for seed in TUNING]
            if found := [scores[one] for one in jobs if one in scores]:
                grid[beta, lr] = found
    return grid


def finalists(rows: list[dict], arm: str) -> list[Cell]:
    """The cells that were best on the first TUNING seed."""
    first = {cell: scores[0] for cell, scores in cells(rows, arm).items()}
    return sorted(first, key=first.get, reverse=True)[:FINALISTS]


def best(rows: list[dict], arm: str) -> Cell:
    """The finalist with the highest mean over all TUNING seeds."""
    grid = cells(rows, arm)
    return max(finalists(rows, arm), key=lambda cell: sum(grid[cell]) / len(grid[cell]))


def neighbours(cell: Cell) -> list[Cell]:
    """The next cells in beta and in learning rate."""
    b, k = BETAS.index(cell[0]), LRS.index(cell[1])
    return ([(BETAS[i], cell[1]) for i in (b - 1, b + 1) if 0 <= i < len(BETAS)] +
            [(cell[0], LRS[i]) for i in (k - 1, k + 1) if 0 <= i < len(LRS)])


def climb_jobs(rows: list[dict], arms: Iterable[str]) -> list[Job]:
    """What is missing on the first TUNING seed: the GRID, then the neighbours of each arm's best
    cell so far. An arm of TWINS keeps its twin's learning rate."""
    jobs = []
    for arm in arms:
        wanted, known = GRID, cells(rows, arm)
        if arm in TWINS:
            lr = best(rows, TWINS[arm])[1]
            wanted = list(dict.fromkeys((beta, lr) for beta, _ in GRID))
        if known.keys() >= set(wanted):
            wanted = [cell for cell in neighbours(finalists(rows, arm)[0])
                      if arm not in TWINS or cell[1] == lr]
        jobs += [job(arm, "headline", TUNING[0], *cell) for cell in wanted if cell not in known]
    return jobs


def final_jobs(rows: list[dict], arms: Iterable[str]) -> list[Job]:
    """Each arm's finalists on the other TUNING seeds."""
    return [job(arm, "headline", seed, *cell) for seed in TUNING[1:] for arm in arms
            for cell in finalists(rows, arm)]


def choose(rows: list[dict]) -> dict[str, dict]:
    """Each tuned arm's best cell, and what every cell scored -> the content of chosen.json."""
    chosen = {}
    for arm in [arm for arm in ARMS | TWINS if cells(rows, arm)]:
        (beta, lr), grid = best(rows, arm), cells(rows, arm)
        if len(grid[beta, lr]) < len(TUNING):  # its search has been interrupted
            continue
        chosen[arm] = {
            "beta": beta, "lr": lr, "mean": round(sum(grid[beta, lr]) / len(TUNING), 3),
            "judge_final on seeds " + " ".join(map(str, TUNING)): {
                f"beta {b:g}, lr {k:g}": [round(x, 3) if math.isfinite(x) else None for x in scores]
                for (b, k), scores in grid.items()}}
    return chosen


PROTAGONISTS = ("isolated", "classic", "fedavg", "federated", "merged", "centralized")
ABROAD = ("isolated", "federated", "merged")  # arms of the regimes


def reported_jobs(chosen: dict[str, dict]) -> list[Job]:
    """The headline and the regimes on fresh seeds, in the order of what is missed most."""
    wanted = [(arm, "headline", seed) for seed in REPORTED[:ELSEWHERE] for arm in ARMS]
    wanted += [(arm, "headline", seed) for seed in REPORTED for arm in PROTAGONISTS]
    for regime in [regime for regime in REGIMES if regime != "headline"]:
        arms = (*ABROAD, *COMMUNITY_ARMS) if regime == "two communities" else ABROAD
        wanted += [(arm, regime, seed) for seed in REPORTED[:ELSEWHERE] for arm in arms]
    wanted += [(arm, "headline", seed) for seed in REPORTED for arm in ARMS]
    return [chosen_job(chosen, *one) for one in dict.fromkeys(wanted)]


def confirm_jobs(chosen: dict[str, dict]) -> list[Job]:
    """The headline on seeds that nothing was looked at on, after the same and twice the updates."""
    arms = {"headline": ARMS, "twice the updates": ABROAD}
    return [chosen_job(chosen, arm, regime, seed) for seed in CONFIRM
            for regime in arms for arm in arms[regime]]


def again_jobs(chosen: dict[str, dict]) -> list[Job]:
    """Those of confirm_jobs that the README's first screen shows."""
    return [one for one in confirm_jobs(chosen)
            if one.regime == "headline" and one.arm in report.IN_SHORT]


def chosen_job(chosen: dict[str, dict], arm: str, regime: str, seed: int) -> Job:
    values = chosen[TUNED_AS.get(arm, arm)]
    return job(arm, regime, seed, values["beta"], values["lr"])


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

COLUMNS = ("arm", "regime", "seed", "settings", "judge_initial", "judge_final", "judge_auc",
           "reward_final", "reward_auc", "worst_agent", "own_topics", "judge_average",
           "judge_mixture", "own_truth", "updates_to_0.6", "updates_to_0.8", "kl_initial",
           "episodes", "bytes", "seconds", "reward_accuracy", "judge_agents", "judge_curve",
           "reward_curve")


def key(row: dict) -> Job:
    return Job(row["arm"], row["regime"], int(row["seed"]), row["settings"])


TASKS: dict[tuple, Task] = {}  # the last few, so that arms of one seed share reward models


def parse(flags: str) -> Settings:
    command = ["--preset", "tiny", "--device", "cpu", *flags.split()]
    return parse_command(command, fedppo.MODES).settings


@functools.cache
def start() -> World:
    """The model and preference rows that all jobs of a process start from; no job changes them in
    place."""
    return World(parse(""))


def prepare(job: Job) -> tuple[World, Task, str]:
    """-> the world with the job's settings and labels, what its seed gives to agents, its mode."""
    transformers.utils.logging.disable_progress_bar()
    world = copy.copy(start())
    world.settings = s = parse(job.flags)
    labels = ""  # as shipped
    if job.regime == "two communities":
        labels, world.pairs = job.regime, [relabel(pair, s.response_length) for pair in world.pairs]
    if job.regime == "flipped labels":
        labels, world.pairs = job.regime, [flip(pair) for pair in world.pairs]
    mode = s.mode[0]
    task_key = (job.seed, labels, mode == "centralized", s.reward, s.pairs, s.agents, s.shards,
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
        agents = fedppo.train(world, task, mode, log.append, new_agent=new_agent)
    except FloatingPointError:
        return row, []
    log = [logged for logged in log if logged["agent"] >= uncounted]
    row |= scores(log, mode, job.seed) | by_topic(world, task, agents[uncounted:], job.regime)
    row["reward_accuracy"] = sum(fit[0] for fit in task.accuracies) / len(task.accuracies)
    if job.regime == "headline" and len(agents) > 1:
        row |= together(world, task, agents)
    row = {name: f"{value:.6g}" if isinstance(value, float) else value
           for name, value in row.items()}
    return row, log


def scores(log: list[dict], mode: str, seed: int) -> dict:
    """What the log alone gives to a row."""
    summary = plot.summarise(log)["modes"][mode]["seeds"][str(seed)]
    updates, judged = plot.seed_curves(log, mode, "judge")
    _, rewards = plot.seed_curves(log, mode, "reward")
    _, kl_initial = plot.seed_curves(log, mode, "kl_initial")
    last = max(row["update"] for row in log)
    row = {name: summary[name] for name in
           ("judge_initial", "judge_final", "judge_auc", "reward_final", "bytes", "seconds")}
    row |= {"worst_agent": summary["worst_agent_final"], "reward_auc": rewards[0].mean(),
            "kl_initial": kl_initial[0][-1],
            "episodes": sum(row["episodes"] for row in log if row["update"] == last),
            "judge_agents": report.join(row["judge"] for row in log if row["update"] == last),
            "judge_curve": report.join(judged[0]), "reward_curve": report.join(rewards[0])}
    for level in (0.6, 0.8):
        reached = report.updates_to(updates, judged[0], level)
        row[f"updates_to_{level}"] = reached if math.isfinite(reached) else ""
    return row


def responses(world: World, task: Task,
              policy: "ppo_core.Policy | Mixture") -> list[tuple]:
    """To the evaluation prompts, with the random numbers that the judge's are sampled with."""
    return world.respond(task.eval_prompts, policy, data.generator(task.seed, "evaluation"))


@torch.no_grad()
def together(world: World, task: Task, agents: list[fedppo.Agent]) -> dict:
    """What one more exchange after the last update would give: the judge's score of the agents'
    policies as one.

    judge_average: of the plain average of their weights; judge_mixture: of the geometric mean of
    their next-token distributions, sampled token by token.
    """
    average = world.new_policy()
    states = [agent.policy.model.state_dict() for agent in agents]
    weights = [1 / len(states)] * len(states)
    average.model.load_state_dict(kl.average_weights(states, weights))

    def score(policy) -> float:
        judged = [task.judge(*batch) for batch in responses(world, task, policy)]
        return torch.cat(judged).mean().item()

    return {"judge_average": score(average),
            "judge_mixture": score(Mixture([agent.policy for agent in agents]))}


class Mixture(torch.nn.Module):
    """The geometric mean of several policies in equal parts, for ppo_core.generate to sample."""

    def __init__(self, policies: list[ppo_core.Policy]):
        super().__init__()
        self.policies = policies

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None,
                use_cache=True, logits_to_keep=0) -> SimpleNamespace:
        caches = past_key_values or [None] * len(self.policies)
        outputs = [policy(input_ids=input_ids, attention_mask=attention_mask,
                          position_ids=position_ids, past_key_values=cache, use_cache=use_cache,
                          logits_to_keep=logits_to_keep)
                   for policy, cache in zip(self.policies, caches, strict=True)]
        weights = [1 / len(outputs)] * len(outputs)
        return SimpleNamespace(
            logits=kl.cooperative_logprobs([output.logits for output in outputs], weights),
            past_key_values=[output.past_key_values for output in outputs])


def by_topic(world: World, task: Task, agents: list[fedppo.Agent],
             regime: str) -> dict:
    """Of the responses that the judge scored last, means over agents.

    own_topics: the judge's score on the topics of the agent's own pairs;  own_truth: with
    communities, the score by its own community's truth, on all topics.
    """
    own_topics, own = [], []
    for agent in agents:
        topics = task.shards[agent.index].splits  # a split of the tiny world is a topic
        for batch in responses(world, task, agent.policy):
            prompts = data.decode(world.tokenizer, *batch[:2])
            known = torch.tensor([judge.topic_of(prompt) in topics for prompt in prompts])
            own_topics.append(task.judge(*batch)[known])
            if regime == "two communities":
                ended = ((batch[2] == world.eos_id) & batch[3].bool()).any(1).tolist()
                texts = zip(prompts, data.decode(world.tokenizer, *batch[2:]), ended, strict=True)
                own += [own_truth(agent.index // 2, *text) for text in texts]
    return {"own_topics": torch.cat(own_topics).mean().item(),
            "own_truth": sum(own) / len(own) if own else ""}


# --------------------------------------------------------------------------------------- schedule


def load(path: Path) -> list[dict]:
    """The finished runs. Half a last line, as a killed study may leave, is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def save(path: Path, rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> None:
    """All rows in a fixed order, under a temporary name first."""
    regimes, arms = ({name: k for k, name in enumerate(names)}
                     for names in (REGIMES, ARMS | PENALTY_ARMS | COMMUNITY_ARMS))

    def place(row: dict) -> tuple:
        return (regimes.get(row["regime"], len(regimes)), row["regime"],
                arms.get(row["arm"], len(arms)), row["arm"], int(row["seed"]), row["settings"])
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=place))
    os.replace(temporary, path)


def complete(path: Path, jobs: list[Job], stage: str, processes: int,
             run: Callable[[Job], dict] = run, columns: tuple[str, ...] = COLUMNS) -> list[dict]:
    """Do those of the jobs that path does not hold, and add them to it -> all its rows."""
    rows = load(path)
    done = {key(row) for row in rows}
    pending = list(dict.fromkeys(one for one in jobs if one not in done))
    if not pending:
        return rows
    save(path, rows, columns)
    bar = tqdm(total=sum(one.cost for one in pending), desc=stage, unit="run", smoothing=0.05,
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

STAGES = ("tune", "reported", "penalty", "confirm", "again")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true",
                        help="few seeds and rounds, at the chosen settings")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES,
                        help="default: all, in this order")
    parser.add_argument("--processes", type=int, default=os.cpu_count(),
                        help="of one thread each [one per core]")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    os.chdir(HERE.parent)  # the flags name files of the repository
    results = HERE / "results"
    if options.quick:
        chosen = read(results / "chosen.json")
        results = Path("runs/study-quick")
        results.mkdir(parents=True, exist_ok=True)
        quick(results, chosen, options.processes)
    else:
        staged(results, options.stages, options.processes)
    print(report.write(results))
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


def read(chosen_path: Path) -> dict[str, dict]:
    return json.loads(chosen_path.read_text(encoding="utf-8"))


def staged(results: Path, stages: list[str], processes: int) -> None:
    path, chosen_path = results / "study.csv", results / "chosen.json"
    if "tune" in stages:
        tune(path, chosen_path, ARMS, processes)
    if "reported" in stages:
        complete(path, reported_jobs(read(chosen_path)), "reported", processes)
    if "penalty" in stages:
        tune(path, chosen_path, TWINS, processes)
        chosen = read(chosen_path)
        complete(path, [chosen_job(chosen, arm, "headline", seed) for seed in REPORTED[:ELSEWHERE]
                        for arm in PENALTY_ARMS], "penalty", processes)
    if "confirm" in stages:
        complete(path, confirm_jobs(read(chosen_path)), "confirm", processes)
    if "again" in stages:
        complete(results / "again.csv", again_jobs(read(chosen_path)), "again", processes)


def tune(path: Path, chosen_path: Path, arms: Iterable[str], processes: int) -> None:
    rows = load(path)
    while jobs := climb_jobs(rows, arms):
        rows = complete(path, jobs, "tune", processes)
    rows = complete(path, final_jobs(rows, arms), "tune", processes)
    chosen_path.write_text(json.dumps(choose(rows), indent=1) + "\n", encoding="utf-8")


def quick(results: Path, chosen: dict[str, dict], processes: int) -> None:
    wanted = [(arm, "headline") for arm in ARMS]
    wanted += [(arm, regime) for regime in QUICK_REGIMES for arm in ABROAD]
    jobs = [chosen_job(chosen, *one, seed) for seed in REPORTED[:2] for one in wanted]
    jobs = [dataclasses.replace(one, flags=f"{one.flags} --rounds 3 --eval-prompts 64")
            for one in jobs]
    complete(results / "study.csv", jobs, "quick", processes)


if __name__ == "__main__":
    sys.exit(main())

"""Direct preference optimisation on the same private pairs: alone, and federated by averaging.

    python benchmarks/dpo.py       finished runs are not repeated, so it can be stopped at any time

In reading order
    1. loss       2305.18290, eq. 7
    2. train      N agents on their own pairs; in `feddpo` their weights are averaged before each
                  round, as fedppo.py's `fedavg` does (1602.05629)
    3. search     beta and learning rate, by the rule of joint.py
    4. main       results/dpo.csv, and dpo.json with the chosen settings

There is no reward model and nothing is sampled in training, so a step costs a small part of a PPO
update. A run has ROUNDS rounds of STEPS steps; the judge scores every round, as in PPO's runs, and
a run's score is that of its last round: `judge_curve` has the others, the best among them.

Dimension key: B pairs, Q prompt tokens (left-padded), T response tokens (right-padded).
"""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import data  # noqa: E402
import fedppo  # noqa: E402
import joint  # noqa: E402
import kl  # noqa: E402
import ppo_core  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
from study import TUNING, Job  # noqa: E402

ROUNDS, STEPS, BATCH = 10, 16, 16  # 160 steps of 16 pairs: 12.8 passes over 200 pairs
ARMS = ("dpo", "feddpo")
BETAS, LRS = (0.1, 0.2, 0.5, 1.0, 2.0), (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)
START = [(beta, lr) for beta in (0.2, 0.5, 1.0) for lr in (2.5e-4, 5e-4)]
CELLS, FINALISTS = 25, 4  # all of this grid; an arm of joint.py has 32

# ------------------------------------------------------------------------------------------- loss


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
             beta: float) -> Tensor:
    """-log sigmoid(beta ([log pi(y_w) - log mu(y_w)] - [log pi(y_l) - log mu(y_l)])), mean.

    2305.18290, eq. 7. All [B]: log-probs of whole responses, under the policy pi and the initial
    policy mu -> scalar.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -torch.nn.functional.logsigmoid(beta * margin).mean()


def response_logprobs(world, policy: ppo_core.Policy, pairs: list[data.Pair]) -> Tensor:
    """The log-probs of whole responses -> [B, 2], of chosen and rejected."""
    prompts = [world.prompt_ids[pair.prompt] for pair in pairs for _ in range(2)]
    texts = [ids for both in world.pair_ids(pairs) for ids in both]
    responses = [text[len(prompt):] for prompt, text in zip(prompts, texts, strict=True)]
    prompt, prompt_mask = data.pad(prompts, world.pad_id, "left", world.device)
    response, mask = data.pad(responses, world.pad_id, "right", world.device)
    ids, attention = torch.cat([prompt, response], 1), torch.cat([prompt_mask, mask], 1)
    logprobs = ppo_core.score_tokens(policy, ids, attention, response, mask, 1.0)[0]  # [2B, T]
    return logprobs.sum(1).view(len(pairs), 2)


# ------------------------------------------------------------------------------------------ train


def train(world, task, arm: str, beta: float, lr: float, log) -> None:
    """Agent i on shards[i].train, judged after each round; log: as of fedppo.train."""
    agents = []
    for i, shard in enumerate(task.shards):
        policy = world.new_policy(i)
        with torch.no_grad():
            reference = response_logprobs(world, world.initial_of(i), shard.train)
        optimizer = torch.optim.Adam(policy.parameters(), lr=lr, fused=True, **ppo_core.ADAM)
        agents.append(SimpleNamespace(
            index=i, world=world, policy=policy, optimizer=optimizer, pairs=shard.train,
            reference=reference, stream=data.generator(task.seed, i, "dpo"), queue=[]))
    size = fedppo.size_of(world.model)
    for rnd in range(ROUNDS + 1):
        if arm == "feddpo" and rnd:
            states = [agent.policy.model.state_dict() for agent in agents]
            average = kl.average_weights(states, [1 / len(states)] * len(states))
            for agent in agents:
                agent.policy.model.load_state_dict(average)
        for agent in agents:
            started = time.perf_counter()
            losses = [step(agent, beta) for _ in range(STEPS if rnd else 0)]
            log({"mode": arm, "seed": task.seed, "agent": agent.index, "round": rnd,
                 "update": rnd * STEPS, "seconds": time.perf_counter() - started if rnd else 0.0,
                 "loss": sum(losses) / len(losses) if losses else None,
                 "bytes": rnd * size * (arm == "feddpo")} | fedppo.judge(agent, task))


def step(agent: SimpleNamespace, beta: float) -> float:
    """One step of an agent on its next BATCH pairs -> the loss before it."""
    if len(agent.queue) < BATCH:
        agent.queue += torch.randperm(len(agent.pairs), generator=agent.stream).tolist()
    rows, agent.queue = agent.queue[:BATCH], agent.queue[BATCH:]
    new = response_logprobs(agent.world, agent.policy, [agent.pairs[row] for row in rows])
    loss = dpo_loss(*new.T, *agent.reference[rows].T, beta)
    agent.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(agent.policy.parameters(), ppo_core.MAX_GRAD_NORM)
    agent.optimizer.step()
    return loss.item()


# ----------------------------------------------------------------------------------------- search

COLUMNS = ("arm", "regime", "seed", "settings", "judge_final", "judge_best", "judge_own",
           "worst_agent", "bytes", "seconds", "judge_curve")


def job(arm: str, seed: int, cell: tuple[float, float]) -> Job:
    return Job(arm, "own pairs", seed, f"--beta {cell[0]:g} --lr {cell[1]:g}")


def run(job: Job) -> dict:
    """One run -> its row."""
    torch.set_num_threads(1)
    world, task, _ = study.prepare(dataclasses.replace(job, flags="--mode isolated"))
    row, log = {"settings": job.flags}, []
    beta, lr = (float(report.flag(row, name)) for name in ("--beta", "--lr"))
    train(world, task, job.arm, beta, lr, log.append)
    last = [line for line in log if line["round"] == ROUNDS]
    curve = [sum(line["judge"] for line in log if line["round"] == rnd) / len(last)
             for rnd in range(ROUNDS + 1)]
    return row | {
        "arm": job.arm, "regime": job.regime, "seed": job.seed,
        "judge_final": f"{curve[-1]:.6g}" if math.isfinite(curve[-1]) else "",
        "judge_best": f"{max(curve):.6g}", "judge_curve": report.join(curve),
        "judge_own": f"{sum(line['judge_own'] for line in last) / len(last):.6g}",
        "worst_agent": f"{min(line['judge'] for line in last):.6g}",
        "bytes": sum(line["bytes"] for line in last),
        "seconds": f"{sum(line['seconds'] for line in log):.6g}"}


def scores(rows: list[dict], arm: str, seed: int) -> dict[tuple[float, float], float]:
    return {(float(report.flag(row, "--beta")), float(report.flag(row, "--lr"))):
            float(row["judge_final"] or "-inf") for row in rows
            if row["arm"] == arm and int(row["seed"]) == seed}


def wanted(rows: list[dict], arm: str) -> list[Job]:
    """What the arm's search runs next, as joint.wanted; nothing when it is over."""
    first = scores(rows, arm, TUNING[0])
    cells, known = joint.climb(START, neighbours, first, CELLS)
    if cells:
        return [job(arm, TUNING[0], cell) for cell in cells]
    best = sorted(known, key=first.get, reverse=True)[:FINALISTS]
    return [job(arm, seed, cell) for cell in best for seed in TUNING[1:]
            if cell not in scores(rows, arm, seed)]


def neighbours(cell: tuple[float, float]) -> list[tuple[float, float]]:
    b, k = BETAS.index(cell[0]), LRS.index(cell[1])
    return ([(BETAS[n], cell[1]) for n in (b - 1, b + 1) if 0 <= n < len(BETAS)] +
            [(cell[0], LRS[n]) for n in (k - 1, k + 1) if 0 <= n < len(LRS)])


# ------------------------------------------------------------------------------------------- main


def main() -> int:
    os.chdir(HERE.parent)
    path, chosen = HERE / "results/dpo.csv", {}
    rows = study.load(path)
    for arm in ARMS:
        while jobs := wanted(rows, arm):
            rows = study.complete(path, jobs, arm, os.cpu_count(), run, COLUMNS)
        by_seed = [scores(rows, arm, seed) for seed in TUNING]
        means = {cell: [found[cell] for found in by_seed] for cell in by_seed[0]
                 if all(cell in found for found in by_seed)}
        best = max(means, key=lambda cell: sum(means[cell]))
        chosen[arm] = {"beta": best[0], "lr": best[1], "judge_final": means[best]}
    text = json.dumps(chosen, indent=1) + "\n"
    (HERE / "results/dpo.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

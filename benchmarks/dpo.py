"""Direct preference optimisation on the same private pairs: alone, and federated by averaging.

In reading order
    1. loss       2305.18290, eq. 7
    2. train      N agents on their own pairs; in `feddpo` their weights are averaged before each
                  round, as fedppo.py's `fedavg` does (1602.05629)

There is no reward model and nothing is sampled in training, so a step costs a small part of a PPO
update. A run has ROUNDS rounds of STEPS steps, and the judge scores every round, as in PPO's runs.
tune.py and study.py run it.

Dimension key: B pairs, Q prompt tokens (left-padded), T response tokens (right-padded).
"""

import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

import data
import fedppo
import kl
import ppo_core
from world import Task, World

ARMS = ("dpo", "feddpo")
ROUNDS, STEPS, BATCH = 10, 16, 16  # 160 steps of 16 pairs: 12.8 passes over 200 pairs

# ------------------------------------------------------------------------------------------- loss


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
             beta: float) -> Tensor:
    """-log sigmoid(beta ([log pi(y_w) - log mu(y_w)] - [log pi(y_l) - log mu(y_l)])), mean.

    2305.18290, eq. 7; y_w chosen, y_l rejected. All [B]: log-probs of whole responses, under the
    policy pi and the initial policy mu -> scalar.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -torch.nn.functional.logsigmoid(beta * margin).mean()


def response_logprobs(world: World, policy: ppo_core.Policy, pairs: list[data.Pair]) -> Tensor:
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


def train(world: World, task: Task, arm: str, log: Callable[[dict], None]) -> list:
    """Agent i on shards[i].train, judged after each round -> the agents.

    beta and lr are those of world.settings; log: as of fedppo.train.
    """
    agents = [make_agent(world, task, i) for i in range(len(task.shards))]
    size = fedppo.size_of(world.initial)
    for rnd in range(ROUNDS + 1):
        if arm == "feddpo" and rnd:
            states = [agent.policy.weights() for agent in agents]
            average = kl.average_weights(states, [1 / len(states)] * len(states))
            for agent in agents:
                agent.policy.load(average)
        for agent in agents:
            started = time.perf_counter()
            losses = [step(agent, world.settings.beta) for _ in range(STEPS if rnd else 0)]
            log({"mode": arm, "seed": task.seed, "agent": agent.index, "round": rnd,
                 "update": rnd * STEPS, "seconds": time.perf_counter() - started if rnd else 0.0,
                 "loss": sum(losses) / len(losses) if losses else None,
                 "bytes": rnd * size * (arm == "feddpo")} | fedppo.judge(agent, task))
    return agents


def make_agent(world: World, task: Task, index: int) -> SimpleNamespace:
    policy, pairs = world.new_policy(index), task.shards[index].train
    with torch.no_grad():
        reference = response_logprobs(world, world.initial_of(index), pairs)  # [len(pairs), 2]
    optimizer = torch.optim.Adam(
        policy.parameters(), lr=world.settings.lr, fused=True, **ppo_core.ADAM)
    return SimpleNamespace(
        index=index, world=world, policy=policy, optimizer=optimizer, pairs=pairs,
        reference=reference, stream=data.generator(task.seed, index, "dpo"), queue=[])


def step(agent: SimpleNamespace, beta: float) -> float:
    """One step of an agent on its next BATCH pairs -> the loss before it.

    Raises FloatingPointError where it is not finite.
    """
    while len(agent.queue) < BATCH:
        agent.queue += torch.randperm(len(agent.pairs), generator=agent.stream).tolist()
    rows, agent.queue = agent.queue[:BATCH], agent.queue[BATCH:]
    new = response_logprobs(agent.world, agent.policy, [agent.pairs[row] for row in rows])
    loss = dpo_loss(*new.T, *agent.reference[rows].T, beta)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}")
    agent.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(agent.policy.parameters(), ppo_core.MAX_GRAD_NORM)
    agent.optimizer.step()
    return loss.item()

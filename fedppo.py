"""Federated PPO for RLHF: N language-model agents that exchange policies, never data.

    python fedppo.py --agents 4 --mode federated

In reading order
    1. modes                 MODES: what agents do with what they receive is one row of a table
    2. who hears whom        communication_matrix: W
    3. Agent                 policy, optimizer, prompts, reward, random streams of one participant
    4. the round             exchange -> listen -> cooperate -> (Agent.update) -> judge
    5. train                 the round loop
    6. main                  command line to exit code

One round: every agent freezes a copy of its policy and sends it; agent i combines what it received
with row i of the communication matrix W into a cooperative reference; then it does local PPO with
beta KL(policy || reference). What an agent owns is in data.py and world.py, one agent's PPO in
ppo_core.py. Settings, files and checks are in support/ and not needed to read this.

Dimension key: N agents, K references, B batch, Q prompt tokens, T response tokens, V vocabulary.

This is a simulation on one machine: it shows what a federation learns, not that it is secure.

Departures from the papers
    D1  `fedavg` averages policies only (1602.05629 averages the learner): value heads and Adam
        moments stay local. All agents weigh alike, however much data they have.
    D2  The KL reference of `isolated` moves: it is the agent's own copy from the start of the
        round, mixed with the initial policy by --anchor. `classic` is PPO with a fixed one.
    D3  `centralized`, the upper reference, is one agent with N times the batch and the same number
        of updates, so the same total episodes.
"""

import copy
import dataclasses
import functools
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

import data
import kl
import policies
import ppo_core
from data import UserError, generator
from support import clock, fast, load, preflight, start
from support.load import MATRICES
from support.run import Run, Stopped, print_anything, stoppable
from support.settings import Command, Settings, parse
from world import Task, World, make_task

# ------------------------------------------------------------------------------------------- modes


@dataclass(frozen=True)
class Mode:
    """One row: what the agents do with what they receive. None: as the command line says."""

    topology: str | None  # of the communication matrix W
    rule: str | None  # how references are combined (kl.py)
    moves: bool  # at an exchange the policy itself becomes the average of weights by its row of W
    # Where the flags say nothing; tuned for own prompts in the tiny world (benchmarks/tune.py):
    anchor: float  # weight of the initial policy in every reference; --anchor leaves a 1 as it is
    beta: float  # KL coefficient
    lr: float
    self_weight: float = 0.4  # an agent's own weight in W
    help: str = ""  # for --help
    server: bool = False  # the average is made once, by a server: an agent receives one policy
    pooled: bool = False  # all data to one agent

    @property
    def exchanges(self) -> bool:
        return self.topology != "identity"

    @property
    def listens(self) -> bool:
        """Whether an agent sees its peers' policies one by one."""
        return self.exchanges and not self.server


MODES = {
    "isolated": Mode("identity", None, moves=False, anchor=0.2, beta=0.25, lr=5e-4,
                     help="each agent alone; KL to its own last copy and the initial policy"),
    "classic": Mode("identity", None, moves=False, anchor=1, beta=0.03, lr=5e-4,
                    help="each agent alone; KL to the initial policy, as in ordinary PPO"),
    "federated": Mode(None, None, moves=False, anchor=0, beta=0.25, lr=5e-4, self_weight=0.6,
                      help="KL to a mixture of the policies received: the algorithm"),
    "merged": Mode(None, None, moves=True, anchor=0.1, beta=0.25, lr=1e-3,
                   help="the same, and each policy becomes the average of the weights received"),
    "fedavg": Mode("uniform", "weights", moves=True, anchor=0.1, beta=0.25, lr=1e-3, server=True,
                   help="a server averages all weights; KL to the average"),
    "centralized": Mode("identity", None, moves=False, anchor=0.1, beta=0.5, lr=5e-4, pooled=True,
                        help="one agent with all data and all rollouts: not private"),
}


def arm_settings(s: Settings, mode: str) -> Settings:
    """The settings of one mode: its row of MODES under what was given by hand."""
    row = MODES[mode]
    arm = dataclasses.replace(
        s, topology=row.topology or s.topology, rule=row.rule or s.rule,
        anchor=row.anchor if s.anchor is None or row.anchor == 1 else s.anchor,
        beta=row.beta if s.beta is None else s.beta, lr=row.lr if s.lr is None else s.lr,
        self_weight=row.self_weight if s.self_weight is None else s.self_weight)
    return dataclasses.replace(arm, agents=1, batch=s.batch * s.agents) if row.pooled else arm


# ---------------------------------------------------------------------------------- who hears whom


def communication_matrix(kind: str, n_agents: int, self_weight: float = 0.4) -> torch.Tensor:
    """W, [N, N] float64, rows sum to 1: w_ij is the weight of agent j's policy for agent i.

    self: self_weight on oneself, the rest shared evenly by the others. uniform: 1/N each. ring:
    self_weight on oneself, the rest halved between the two neighbours. star: agent 0 is the hub and
    has a `self` row; the others put self_weight on themselves and the rest on the hub. identity:
    each agent alone. Raises ValueError.
    """
    if kind not in MATRICES:
        raise ValueError(f"kind must be one of {', '.join(MATRICES)}, not {kind!r}")
    if not 0 <= self_weight <= 1:
        raise ValueError(f"self_weight must lie in [0, 1], not {self_weight}")
    identity = torch.eye(n_agents, dtype=torch.float64)  # [N, N]
    if kind == "identity" or n_agents == 1:
        return identity
    if kind == "uniform":
        return torch.full_like(identity, 1 / n_agents)
    others = (1 - identity) / (n_agents - 1)  # [N, N] each row averages the other agents
    if kind == "ring":
        others = (identity.roll(1, 1) + identity.roll(-1, 1)) / 2  # N = 2: one gets both halves
    if kind == "star":
        others[1:] = identity[0]  # all that is not an agent's own goes to the hub
    return self_weight * identity + (1 - self_weight) * others


def matrix_of(s: Settings) -> torch.Tensor:
    """W [N, N] of the settings, by kind or from a JSON file. Raises UserError."""
    if s.topology in MATRICES:
        return communication_matrix(s.topology, s.agents, s.self_weight)
    return load.read_matrix(s.topology, s.agents)


# ------------------------------------------------------------------------------------------- agent


class Agent:
    """One participant, which lives for the whole run. Others see what `message` returns alone."""

    def __init__(self, index: int, world: World, task: Task, settings: Settings):
        """settings: of this mode, as `arm_settings` makes them."""
        self.index, self.world, self.settings = index, world, settings
        self.policy = world.new_policy(index)
        self.scorer, self.prompts = task.scorers[index], task.shards[index].prompts
        self.optimizer = torch.optim.Adam(
            self.policy.parameters(), lr=settings.lr, fused=True, **ppo_core.ADAM)
        names = ("prompts", "sampling", "minibatches", "peers")
        self.streams = {name: generator(task.seed, index, name) for name in names}
        self.queue: list[int] = []  # indices of the prompts that are left in this pass
        self.done = 0  # PPO updates so far, those after it diverged included
        self.episodes = 0  # responses that it has learned from
        self.received = 0  # bytes, at all exchanges so far
        self.diverged: str | None = None  # where and why it was frozen

    def message(self) -> dict[str, torch.Tensor]:
        """What is sent at an exchange: the policy's weights, and nothing of the rest."""
        return self.policy.weights()

    def next_prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next B of its prompts, every prompt once per pass -> ids, mask [B, Q]."""
        batch = self.settings.batch
        while len(self.queue) < batch:
            order = torch.randperm(len(self.prompts), generator=self.streams["prompts"])
            self.queue += order.tolist()
        rows, self.queue = self.queue[:batch], self.queue[batch:]
        return self.world.padded([self.prompts[row] for row in rows])

    def update(self, references: list[ppo_core.Policy], weights: torch.Tensor) -> dict[str, float]:
        """One PPO update against K references with weights [K] -> metrics (see support/run.py).

        A loss or gradient that is not finite never reaches the weights: it freezes the agent for
        the rest of the run.
        """
        started = time.perf_counter()
        s = self.settings
        if self.diverged:
            self.done += 1
            return {"episodes": self.episodes, "beta": s.beta}
        rollout, weights, missed = self.next_rollout(references, weights)
        mask = rollout.mask
        ended = ppo_core.has_ended(rollout.response, mask, self.world.eos_ids)  # [B]
        left = 1 - self.done / (s.rounds * s.updates) if s.lr_schedule == "linear" else 1.0
        metrics = {
            "lr": s.lr * left, "beta": s.beta, "reward": rollout.scores.mean().item(),
            "kl": (rollout.kl * mask).sum(1).mean().item(),
            "kl_initial": (rollout.kl_initial * mask).sum(1).mean().item(),
            "entropy": ppo_core.masked_mean(rollout.entropy, mask).item(),
            "length": mask.sum(1).float().mean().item(),
            "ended": ended.float().mean().item()} | ({"missed": missed} if missed else {})
        self.optimizer.param_groups[0]["lr"] = metrics["lr"]
        self.done += 1
        try:
            metrics |= clock.timed("optimisation")(ppo_core.optimise)(
                self.policy, self.optimizer, rollout, weights, s.beta, s,
                self.streams["minibatches"])
        except FloatingPointError as error:
            self.diverged = (
                f"agent {self.index} diverged in update {self.done}: {error} (reward "
                f"{metrics['reward']:.3g}, kl {metrics['kl']:.3g}); lower --lr or --beta")
            return {"episodes": self.episodes, "beta": s.beta}
        self.episodes += s.batch
        return metrics | {"episodes": self.episodes, "seconds": time.perf_counter() - started}

    @clock.timed("scoring")
    def next_rollout(
        self, references: list[ppo_core.Policy], weights: torch.Tensor
    ) -> tuple[ppo_core.Rollout, torch.Tensor, str | None]:
        """Sample and score a batch -> (rollout, weights of the references used, what was left out).

        A reference that gives no finite log-probs at these tokens must not stop an honest agent: it
        is left out, and the same responses are sampled again. If none is left, the agent's own
        present policy is the reference.
        """
        world, stream = self.world, self.streams["sampling"]
        prompts, before = self.next_prompts(), stream.get_state()

        def against(references: list[ppo_core.Policy], weights: torch.Tensor) -> ppo_core.Rollout:
            return ppo_core.collect(
                self.policy, references, weights, world.initial_of(self.index), self.scorer,
                *prompts, self.settings, eos_id=world.eos_ids, pad_id=world.pad_id,
                generator=stream, generate=clock.timed("rollouts")(world.generate))

        rollout = against(references, weights)
        if (rollout.kl.abs() < policies.MAX_NATS)[rollout.mask.bool()].all():  # NaN is not
            return rollout, weights, None
        kept = [k for k, policy in enumerate(references)
                if policies.has_logprobs(policy, rollout.ids, rollout.attention)]
        if len(kept) == len(references):  # they are far, and that is all
            return rollout, weights, None
        references = [references[k] for k in kept] or [self.policy]
        weights = weights[kept] / weights[kept].sum() if kept else torch.ones_like(weights[:1])
        stream.set_state(before)  # so that the second pass samples the same responses
        return against(references, weights), weights, "a reference has no finite log-probs"

    def state_dict(self) -> dict:
        """All that changes in training, as plain values and tensors."""
        return {
            "policy": self.policy.weights(), "value_head": self.policy.value_head.state_dict(),
            "optimizer": self.optimizer.state_dict(), "queue": self.queue, "done": self.done,
            "streams": {name: stream.get_state() for name, stream in self.streams.items()},
            "episodes": self.episodes, "received": self.received, "diverged": self.diverged}

    def load_state_dict(self, state: dict) -> None:
        self.policy.load(state["policy"])
        self.policy.value_head.load_state_dict(state["value_head"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # else it would be shared
        for name, stream in self.streams.items():
            stream.set_state(state["streams"][name])
        for name in ("queue", "done", "episodes", "received", "diverged"):
            setattr(self, name, copy.copy(state[name]))


# -------------------------------------------------------------------------- the round, step by step


@clock.timed("exchange")
@torch.no_grad()
def exchange(
    agents: list[Agent], frozen: list[ppo_core.Policy], present: list[bool]
) -> list[str]:
    """Copy the policy of every agent that takes part into its place in `frozen`.

    frozen: N policies, overwritten here and then left alone until the next exchange; present: N
    bools -> N faults, "" if there is none. On a fault the place gets the sender's own present
    weights, which no other agent then uses.
    """
    faults = []
    for agent, policy, takes_part in zip(agents, frozen, present, strict=True):
        own = agent.policy.weights()
        fault = "diverged" if agent.diverged else "" if takes_part else "absent"
        if not fault:
            message = agent.message()
            fault = unusable(message, own)
        if not fault:
            policy.load(message)  # copies
            token = torch.zeros(1, 1, dtype=torch.long, device=policy.forbidden.device)
            finite = policies.has_logprobs(policy, token, torch.ones_like(token))
            fault = "" if finite else "has no finite log-probs"
        if fault:
            policy.load(own)
        faults.append(fault)
    return faults


def unusable(message: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> str:
    """Why weights cannot be used by an agent whose policy has the weights `own`; "" if they can."""
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
              for weights in (message, own)]
    if shapes[0] != shapes[1]:
        return "has another shape"
    if not all(torch.isfinite(tensor).all() for tensor in message.values()):
        return "is not finite"
    return ""


@clock.timed("exchange")
def listen(
    agents: list[Agent], frozen: list[ppo_core.Policy], matrix: torch.Tensor, present: list[bool],
    faults: list[str], mode: Mode,
) -> tuple[torch.Tensor, list[str | None]]:
    """Whom each agent hears in this round.

    matrix: W [N, N]; faults: of `exchange` -> (rows [N, N], of which row i has agent i's weights,
    sum 1; for each agent what it could not hear, or None). Bytes received are added to each agent.

    A peer that is absent or whose message has a fault gets weight 0, and so does a policy that has
    no log-probs on the agent's own prompts or is an outlier among its peers. An agent that is
    absent itself goes on with its own copy.
    """
    rows, missed = [], []
    for i, agent in enumerate(agents):
        peers = [j for j in range(len(agents)) if matrix[i, j] > 0 and j != i]
        if not present[i] or agent.diverged:
            rows.append(renormalised(matrix[i], i, peers))
            missed.append(faults[i])
            continue
        bad = {j: faults[j] for j in peers if faults[j]}
        own_text = agent.world.padded(agent.prompts[:8])
        if mode.listens:
            bad |= {j: "has no finite log-probs here" for j in peers
                    if j not in bad and not policies.has_logprobs(frozen[j], *own_text)}
        if agent.settings.outlier and mode.listens:
            heard = {j: frozen[j] for j in peers if j not in bad}
            bad |= dict.fromkeys(outliers(agent, heard), "is an outlier")
        # With a server there is one average for all: a bad message is left out for its sender too.
        left_out = [*bad, i] if mode.server and faults[i] else list(bad)
        row = renormalised(matrix[i], i, left_out)
        told = [f"agent {j} {bad[j]}" for j in sorted(bad)]
        if mode.server and not policies.has_logprobs(merge(frozen, row, agent), *own_text):
            row, told = renormalised(row, i, peers), [*told, "the average has no finite log-probs"]
        rows.append(row)
        missed.append("; ".join(told) or None)
        sent = [j for j in peers if present[j] and not agents[j].diverged]
        heard = [agent.policy] if mode.server else [frozen[j] for j in sent]
        agent.received += sum(map(size_of, heard))
    return torch.stack(rows), missed


def renormalised(row: torch.Tensor, own: int, left_out: list[int]) -> torch.Tensor:
    """A row of W [N] with weight 0 for those left out, sum 1; if nobody is left, all is its own."""
    if not left_out:
        return row
    row = row.clone()
    row[left_out] = 0
    return row / row.sum() if row.sum() > 0 else torch.eye(len(row), dtype=row.dtype)[own]


def size_of(policy: ppo_core.Policy) -> int:
    """Bytes of a policy's weights as they are sent; tied ones count once."""
    return sum({one.data_ptr(): one.nbytes for one in policy.weights().values()}.values())


NEAR = 0.01  # nats per token: nearer policies are not told apart, so that noise makes no outlier


@torch.no_grad()
def outliers(agent: Agent, peers: dict[int, ppo_core.Policy]) -> list[int]:
    """Which peers' policies are much further from the agent's own than the median peer's.

    Distance: the exact KL(own||peer) per token, mean over the tokens of one batch of responses that
    the agent samples to prompts of its own, so that nothing private is shared. Of two peers the
    nearer one is the median; a single peer is never an outlier.
    """
    world, s, stream = agent.world, agent.settings, agent.streams["peers"]
    chosen = torch.randperm(len(agent.prompts), generator=stream)[:s.batch].tolist()
    sampled = world.respond([agent.prompts[k] for k in chosen], agent.policy, stream)
    sums, tokens = [], sampled[-1].sum().item()  # [parts][K], a number
    for prompt, attention, response, mask in zip(  # a few rows at a time: [b, T, V] is large
            *(tensor.split(s.micro_batch) for tensor in sampled), strict=True):
        part = torch.cat([prompt, response], 1), torch.cat([attention, mask], 1), response, mask
        own, *others = (ppo_core.score_tokens(policy, *part, s.temperature)[1]
                        for policy in (agent.policy, *peers.values()))  # [b, T, V]
        sums.append([kl.kl_exact(own, other)[mask.bool()].sum() for other in others])
    far = torch.tensor(sums).sum(0).div(tokens).nan_to_num(nan=torch.inf)  # [K]
    limit = s.outlier * max(NEAR, far.median().item()) if peers else 0
    return [j for j, distance in zip(peers, far.tolist(), strict=True) if distance > limit]


@clock.timed("exchange")
def cooperate(
    agent: Agent, frozen: list[ppo_core.Policy], row: torch.Tensor
) -> tuple[list[ppo_core.Policy], torch.Tensor]:
    """The agent's cooperative reference: its row [N] over the frozen policies.

    -> (K references, weights [K]).

    With anchor a the row becomes (1 - a) row, with weight a on the initial policy. References of
    weight 0 are left out. Under the rule `weights` they are merged into one model here; the other
    rules combine log-probs, in kl.reference.
    """
    world, anchor = agent.world, agent.settings.anchor
    candidates = [*frozen, world.initial_of(agent.index)]
    weights = torch.cat([(1 - anchor) * row, torch.tensor([anchor], dtype=row.dtype)])
    kept = [j for j, weight in enumerate(weights.tolist()) if weight > 0]
    references, weights = [candidates[j] for j in kept], weights[kept]
    if agent.settings.rule == "weights":
        references = [merge(references, weights, agent)]
        weights = torch.ones(1, dtype=row.dtype)
    return references, weights


@clock.timed("exchange")
def average(models: list[ppo_core.Policy], weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weighted average of K policies' parameters, weights [K]."""
    return kl.average_weights([policy.weights() for policy in models], weights)


def merge(models: list[ppo_core.Policy], weights: torch.Tensor, agent: Agent) -> ppo_core.Policy:
    """A frozen policy of the agent's with the average of K policies' parameters, weights [K]."""
    merged = agent.world.new_policy(agent.index).requires_grad_(False)
    merged.load(average(models, weights))
    return merged


def judge(agent: Agent, task: Task, answered: tuple | None = None) -> dict:
    """The judge's mean score of the agent's answers to the held-out prompts, and the first answers.

    judge_own is the mean over the prompts of the agent's own splits. A score is None where there is
    no judge or no such prompt. answered: what `answers` gave for the same policy, if it is known.
    """
    def mean(scores: list[float]) -> float | None:
        return sum(scores) / len(scores) if scores else None

    scores, samples = answered or answers(agent, task)
    own = task.own_prompts[agent.index]
    mine = [scores[n] for n, prompt in enumerate(task.eval_prompts) if prompt in own and scores]
    return {"judge": mean(scores), "judge_own": mean(mine), "samples": samples}


@clock.timed("judging")
def answers(agent: Agent, task: Task) -> tuple[list[float], list[dict]]:
    """The agent's answers to the held-out prompts -> (the judge's scores of them, the first four).

    Sampled at the training temperature with one named stream, the same for every agent, arm and
    evaluation.
    """
    world = agent.world
    stream = generator(task.seed, "evaluation")
    sampled = world.respond(task.eval_prompts, agent.policy, stream)
    scores = task.judge(*sampled).tolist() if task.judge else []
    ids, mask, response, response_mask = (tensor[:4] for tensor in sampled)
    columns = {
        "prompt": data.decode(world.tokenizer, ids, mask, world.texts),
        "response": data.decode(world.tokenizer, response, response_mask),
        "ended": ppo_core.has_ended(response, response_mask, world.eos_ids).tolist(),
        "judge": scores[:len(ids)] or [None] * len(ids)}
    samples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return scores, samples


# ------------------------------------------------------------------------------------------- train


def participants(s: Settings, seed: int, rnd: int) -> list[bool]:
    """Who takes part in a round's exchange, by a random stream of its own."""
    draws = torch.rand(s.agents, generator=generator(seed, rnd, "participation"))
    return (draws < s.participation).tolist() if s.participation < 1 else [True] * s.agents


def train(
    world: World, task: Task, mode: str, log: Callable[[dict], None],
    save: Callable[[dict], None] = lambda state: None, state: dict | None = None,
    new_agent: Callable = Agent,
) -> list[Agent]:
    """All rounds of one mode on one seed -> its trained agents.

    log: called with every line of metrics;  save: with all that changes, at the end of a round,
    the tensors themselves: it must write or copy them before it returns;
    state: what `save` was given, to go on from;  new_agent: makes agent i of N (see Agent).
    Raises FloatingPointError when every agent has diverged.
    """
    s, mode_row = arm_settings(world.settings, mode), MODES[mode]
    if len(task.shards) != s.agents:
        raise ValueError(f"mode {mode} trains {s.agents} agents, and the task has data for "
                         f"{len(task.shards)}: make_task(..., pooled={mode_row.pooled})")
    matrix = matrix_of(s)  # [N, N]
    agents = [new_agent(i, world, task, s) for i in range(s.agents)]
    frozen = [world.new_policy(i).requires_grad_(False) for i in range(s.agents)]
    first = state["round"] if state else 0
    line = {"mode": mode, "seed": task.seed}
    if state:
        for agent in agents:
            agent.load_state_dict(state["agents"][agent.index])
    else:
        # The agents of one model start as one policy, which answers once; yours may start apart.
        alike = agents[:len(world.models)] if new_agent is Agent else agents
        initial = [answers(agent, task) for agent in alike]
        for agent, accuracy in zip(agents, task.accuracies, strict=True):
            judged = judge(agent, task, initial[agent.index % len(initial)])
            log(line | {"agent": agent.index, "round": 0, "update": 0} | judged
                | {"reward_accuracy": accuracy[0] if accuracy else None})

    for rnd in range(first, s.rounds):
        # 1. Exchange: a frozen copy of each policy leaves its owner, and nothing else.
        present = participants(s, task.seed, rnd) if mode_row.exchanges else [True] * s.agents
        faults = exchange(agents, frozen, present)
        # 2. Listen: who is absent, broken or an outlier is left out; rows of W sum to 1 again.
        rows, missed = listen(agents, frozen, matrix, present, faults, mode_row)
        for agent, mixture, why_missed in zip(agents, rows, missed, strict=True):
            # 3. Cooperate: the row mixes the copies (and the anchor) into one reference.
            references, weights = cooperate(agent, frozen, mixture)
            # 3b. In merged and fedavg the policy itself becomes the average of weights too.
            if mode_row.moves:
                agent.policy.load(average(frozen, mixture))
            for update in range(1, s.updates + 1):
                # 4. Local PPO against it, on the agent's prompts and by its own reward.
                metrics = agent.update(references, weights)
                # 5. After the round's last update, judge it on prompts that nobody trains on.
                judged = judge(agent, task) if update == s.updates else {}
                log(line | {"agent": agent.index, "round": rnd + 1, "update": agent.done} | judged
                    | metrics | {"bytes": agent.received, "missed": agent.diverged or why_missed
                                 or metrics.get("missed")})
        if all(agent.diverged for agent in agents):
            raise FloatingPointError(agents[0].diverged)
        # 6. Save all that changes: a stop loses what was done since, and no more.
        save({"round": rnd + 1, "agents": [agent.state_dict() for agent in agents]})
        fast.give_back()  # memory, to the system
    return agents


# -------------------------------------------------------------------------------------------- main


def execute(command: Command, starting: float = 0.0) -> None:
    """Do what the command line asks for. starting: seconds of the program until now.

    Raises UserError before training starts (later only if the user's own reward or judge fails on a
    response, a file cannot be written, or a resumed run fits other reward models),
    FloatingPointError if training diverges, Stopped at Ctrl-C or SIGTERM.
    """
    clock.start(command.settings.device, starting)
    s = command.settings
    arms = {mode: arm_settings(s, mode) for mode in s.mode}
    names = ("agents", "topology", "rule", "self_weight", "anchor", "beta", "lr")
    resolved = {mode: {name: getattr(arm, name) for name in names}
                | {"matrix": matrix_of(arm).tolist()} for mode, arm in arms.items()}
    world, deals = start.load_world(s, command.reason, MODES, arms)
    s = dataclasses.replace(s, response_eos=world.settings.response_eos)  # as it was decided
    if command.check:
        preflight.alone(world, make_task, MODES[s.mode[0]].pooled, command.quiet)
        print("no fatal check failed: run without --check to train")
        return
    with Run(s, command, resolved, deals) as run:
        for seed in s.seeds:
            tasks: dict[bool, Task] = {}  # pooled or not
            for mode in s.mode:
                if run.finished(seed, mode):
                    continue
                pooled = MODES[mode].pooled
                if pooled not in tasks:
                    tasks[pooled] = make_task(world, seed, pooled, run.bar.set_description)
                    run.check_models(f"{seed} {pooled}", tasks[pooled].fingerprint)
                if not run.rows:
                    preflight.report(world, tasks[pooled], run.bar.set_description)
                agents = train(world, tasks[pooled], mode, run.log,
                               functools.partial(run.save, seed, mode), run.begin(seed, mode))
                models = {agent.index: agent.policy.model for agent in agents}
                run.save_agents(seed, mode, models, world.tokenizer, world.forbidden, arms[mode])
                del agents, models  # the next arm needs the memory
        finished = run.finish()
    print(f"{finished}\n{sum(clock.read().values()):.0f} s in all")


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 diverged, 2 a mistake the user can mend, 70 a fault of the program's,
    130 or 143 by a signal.
    """
    print_anything()
    try:
        with stoppable():
            command = parse(sys.argv[1:] if argv is None else argv, MODES)
            execute(command, clock.age() if argv is None else 0.0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        return 128 + stop.number
    except Exception:  # what no line above foresees
        traceback.print_exc()
        print("this is a fault of the program, not yours: please report it, with the lines above "
              "and the command", file=sys.stderr)
        return 70
    return 0


if __name__ == "__main__":
    sys.exit(main())

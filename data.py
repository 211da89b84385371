"""What an agent owns in private: prompts, preference pairs, and the reward model fitted to them.

In reading order
    1. UserError              a mistake of the user's: one line, exit code 2
    2. shards                 Pair, Shard; make_shards gives each agent rows of its own; pool
    3. tokens                 encode_prompts, encode_response, pad, decode
    4. the reward model       RewardModel, fit_reward_model (Bradley-Terry), preference_accuracy
    5. scorers                model_scorer, mean_scorer, text_scorer, normalised
    6. random streams         generator: one independent stream per name

Rows, models and functions come from files through support/load.py, which this file does not need.

Dimension key: B rows, Q prompt tokens (left-padded), T response tokens (right-padded), L = Q + T,
D hidden size.

Departures from the papers: rewards are normalised on samples of the initial policy by mean *and*
standard deviation (1909.08593 did both, 2203.02155 the bias only); the reward model starts from the
policy's trunk, and all of its weights are trained.
"""

import copy
import hashlib
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppo_core


class UserError(Exception):
    """A mistake that the user can mend; its message says what and how, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # one line, whatever a library's message held


# ------------------------------------------------------------------------------------------ shards


@dataclass(frozen=True)
class Pair:
    """One preference: of two responses to a prompt, the one that an annotator chose.

    Texts carry no space where prompt and response meet.
    """

    prompt: str
    chosen: str
    rejected: str
    split: str


@dataclass(frozen=True)
class Shard:
    """One agent's private data: prompts to respond to, pairs that fit and test its reward model."""

    prompts: list[str]
    train: list[Pair]
    heldout: list[Pair]


def make_shards(pairs: list[Pair], n_agents: int, how: str, n_pairs: int, n_eval: int,
                rng: random.Random, n_judge: int = 0) -> tuple[list[str], list[Shard], list[Pair]]:
    """Give each agent rows of its own -> (evaluation prompts, N shards, pairs for the judge).

    how: "iid" gives every agent an even share of all rows; "split" gives agent i the splits i,
    i + N, ... With fewer splits than agents it is the split i mod S, which its agents share out.
    n_pairs: pairs per agent to fit its reward model; n_eval: prompts kept for the evaluation, of
    which no row goes to anybody; n_judge: pairs kept for a judge, which no agent has. Raises
    UserError if there is too little data.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < n_eval + n_agents:
        raise UserError(f"{len(prompts)} distinct prompts are too few for {n_agents} agents and "
                        f"{n_eval} evaluation prompts: add data or lower --agents or "
                        "--eval-prompts")
    eval_prompts = rng.sample(prompts, n_eval)
    kept_back = set(eval_prompts)
    rows = [pair for pair in pairs if pair.prompt not in kept_back]
    rng.shuffle(rows)
    judge_rows, rows = rows[:n_judge], rows[n_judge:]

    if how == "iid":
        portions = [rows[i::n_agents] for i in range(n_agents)]
    else:
        portions = _portions_by_split(rows, sorted({pair.split for pair in pairs}), n_agents)
    taken = (f"of {len(pairs)}, after those of {n_eval} evaluation prompts and {n_judge} for the "
             "judge")
    # The poorest agent first: the remedy that its error names is then enough for all.
    shards: list[Shard | None] = [None] * n_agents
    for i in sorted(range(n_agents), key=lambda i: len(portions[i])):
        shards[i] = _shard(portions[i], n_pairs, f"agent {i}", taken)
    return eval_prompts, shards, judge_rows


def _portions_by_split(rows: list[Pair], splits: list[str], n_agents: int) -> list[list[Pair]]:
    """The rows of each agent, N lists, where agents own splits."""
    portions = []
    for i in range(n_agents):
        own = splits[i::n_agents] or [splits[i % len(splits)]]
        mine = [pair for pair in rows if pair.split in own]
        if len(splits) < n_agents:  # the agents of this split take turns at its rows
            sharers = range(i % len(splits), n_agents, len(splits))
            mine = mine[sharers.index(i)::len(sharers)]
        portions.append(mine)
    return portions


def _shard(rows: list[Pair], n_pairs: int, who: str, taken: str) -> Shard:
    """An agent's rows as its shard: a fifth of them, at most 256, tests its reward model."""
    prompts = list(dict.fromkeys(pair.prompt for pair in rows))  # unique, in order
    n_heldout = min(256, max(1, len(rows) // 5))
    train = rows[n_heldout:n_heldout + n_pairs]
    if len(train) < n_pairs:
        remedy = f"lower --pairs to {len(train)}" if train else "lower --agents"
        raise UserError(f"{who} has {len(rows)} usable preference rows ({taken}), {n_heldout} of "
                        f"them held out, and --pairs asks for {n_pairs}: {remedy}, lower "
                        "--eval-prompts, or use more data")
    return Shard(prompts, train, rows[:n_heldout])


def pool(shards: list[Shard]) -> Shard:
    """All shards in one place, for `centralized` and `--reward shared`: not private."""
    return Shard(list(dict.fromkeys(prompt for shard in shards for prompt in shard.prompts)),
                 [pair for shard in shards for pair in shard.train],
                 [pair for shard in shards for pair in shard.heldout])


# ------------------------------------------------------------------------------------------ tokens


def encode_prompts(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Each prompt's ids, with whatever the tokenizer puts at the beginning of a text."""
    return tokenizer(prompts)["input_ids"] if prompts else []


def encode_response(tokenizer, response: str, max_tokens: int, eos: bool) -> list[int]:
    """A response's ids, at most max_tokens, as the policy would have sampled them.

    Prompt and response are joined by exactly one space, which in a BPE vocabulary is part of the
    response's first token. A response of fewer than max_tokens tokens has ended, and gets EOS if
    `eos`; a longer one is cut and has none.
    """
    ids = tokenizer(" " + response, add_special_tokens=False)["input_ids"] if response else []
    ids = ids[:max_tokens]
    ended = len(ids) < max_tokens
    return ids + [tokenizer.eos_token_id] if eos and ended else ids


def pad(sequences: list[list[int]], pad_id: int, side: str,
        device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """B lists of ids -> (ids [B, L], mask [B, L]), padded on `side`, "left" or "right"."""
    length = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = length - len(sequence) if side == "left" else 0
        ids[row, start:start + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, start:start + len(sequence)] = 1
    return ids.to(device), mask.to(device)


def decode(tokenizer, ids: Tensor, mask: Tensor) -> list[str]:
    """ids, mask [B, L] -> B texts of the valid tokens, without special tokens or outer spaces."""
    rows = [row[valid.bool()].tolist() for row, valid in zip(ids, mask, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


# -------------------------------------------------------------------------------- the reward model

TokenPair = tuple[list[int], list[int]]  # ids of prompt + chosen, and of prompt + rejected


class RewardModel(nn.Module):
    """A scalar head on a copy of the policy's trunk. Padding never changes a score.

    pooling: what the head reads, "last" the state of the last valid token, "mean" the mean state
    of all valid tokens. The head starts with standard deviation 1/sqrt(D + 1), as in the code of
    1909.08593, drawn from `generator`.
    """

    def __init__(self, causal_lm: nn.Module, pooling: str, generator: torch.Generator):
        super().__init__()
        self.trunk = copy.deepcopy(causal_lm.base_model).eval().requires_grad_(True)
        self.pooling = pooling
        size = causal_lm.config.hidden_size
        self.head = nn.Linear(size, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(1, size, generator=generator) / (size + 1) ** 0.5)
            self.head.bias.zero_()
        self.head.to(causal_lm.device)

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, L], padded on any side -> the trunk's last hidden states [B, L, D]."""
        return self.trunk(input_ids=ids, attention_mask=mask,
                          position_ids=ppo_core.position_ids(mask),
                          use_cache=False).last_hidden_state

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, L], padded on any side -> scores [B], not normalised."""
        states = self.states(ids, mask)  # [B, L, D]
        # Padded positions may hold NaN, and 0 x NaN is NaN: they are taken out by selection.
        states = torch.where(mask[..., None].bool(), states, 0)
        if self.pooling == "mean":
            share = mask / mask.sum(1, keepdim=True)  # [B, L]
        else:
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)  # [B]
            share = F.one_hot(last, mask.shape[1])  # [B, L]
        pooled = torch.einsum("bl,bld->bd", share.to(states), states)
        return self.head(pooled).squeeze(-1)


def _pair_scores(model: RewardModel, pairs: list[TokenPair],
                 pad_id: int) -> tuple[Tensor, Tensor]:
    """Scores of B pairs -> (of the chosen [B], of the rejected [B]), in one forward."""
    sequences = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    ids, mask = pad(sequences, pad_id, "right", model.head.weight.device)
    return model(ids, mask).chunk(2)


def fit_reward_model(model: RewardModel, pairs: list[TokenPair], pad_id: int, *, lr: float,
                     epochs: int, batch: int = 16, generator: torch.Generator) -> float:
    """Fit by Bradley-Terry -> the mean loss per pair of the last epoch, in nats.

    The loss is -log sigmoid(r(chosen) - r(rejected)) (2009.01325, sec. 3.4). Adam with eps 1e-5,
    `batch` pairs per step, lr decays linearly to 0 over all steps.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, eps=1e-5, fused=True)
    steps = epochs * -(-len(pairs) // batch)  # the last, smaller batch is a step too
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    loss_sum = 0.0
    for _ in range(epochs):
        loss_sum = 0.0
        for rows in torch.randperm(len(pairs), generator=generator).split(batch):
            chosen, rejected = _pair_scores(model, [pairs[row] for row in rows.tolist()], pad_id)
            loss = -F.logsigmoid(chosen - rejected).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(rows)
    optimizer.zero_grad()  # gradients become None: they would hold as much memory as the model
    return loss_sum / len(pairs)


@torch.no_grad()
def preference_accuracy(model: RewardModel, pairs: list[TokenPair], pad_id: int,
                        batch: int = 64) -> float:
    """Share of pairs whose chosen response scores higher; a tie counts half."""
    right = 0.0
    for start in range(0, len(pairs), batch):
        chosen, rejected = _pair_scores(model, pairs[start:start + batch], pad_id)
        right += (chosen > rejected).sum().item() + 0.5 * (chosen == rejected).sum().item()
    return right / len(pairs)


# ----------------------------------------------------------------------------------------- scorers

# (prompt_ids [B, Q], prompt_mask [B, Q], response_ids [B, T], response_mask [B, T]) -> scores [B]
Scorer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def model_scorer(model: RewardModel) -> Scorer:
    """A reward model as a scorer, on the very ids that were sampled."""
    @torch.no_grad()
    def score(prompt_ids: Tensor, prompt_mask: Tensor,
              response_ids: Tensor, response_mask: Tensor) -> Tensor:
        ids = torch.cat([prompt_ids, response_ids], 1)  # [B, L]
        mask = torch.cat([prompt_mask, response_mask], 1)
        return model(ids, mask)
    return score


def mean_scorer(scorers: list[Scorer]) -> Scorer:
    """The mean of several scorers, each of which should be normalised first."""
    return lambda *batch: sum(scorer(*batch) for scorer in scorers) / len(scorers)


def text_scorer(function: Callable, name: str, tokenizer) -> Scorer:
    """function(prompts, responses, ended) -> B numbers, as a scorer that raises UserError.

    The function sees texts; `ended`, B bools, says which responses closed with EOS.
    """
    def score(prompt_ids: Tensor, prompt_mask: Tensor,
              response_ids: Tensor, response_mask: Tensor) -> Tensor:
        prompts = decode(tokenizer, prompt_ids, prompt_mask)
        responses = decode(tokenizer, response_ids, response_mask)
        is_eos = (response_ids == tokenizer.eos_token_id) & response_mask.bool()  # [B, T]
        try:
            scores = function(prompts, responses, is_eos.any(1).tolist())
            scores = torch.as_tensor(scores, dtype=torch.float32).to(response_ids.device)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            frames = traceback.extract_tb(error.__traceback__)
            inside = [frame for frame in frames if frame.filename != __file__][:1]
            where = "".join(f" ({frame.filename}, line {frame.lineno})" for frame in inside)
            raise UserError(f"{name} must take lists (prompts, responses, ended) and return one "
                            "finite number per response, and failed with "
                            f"{type(error).__name__}: {error}{where}") from None
        if scores.shape != (len(response_ids),) or not torch.isfinite(scores).all():
            bad = int((~torch.isfinite(scores)).sum())
            raise UserError(f"{name} must return one finite number per response: for "
                            f"{len(response_ids)} it returned shape {list(scores.shape)}, {bad} of "
                            "them not finite")
        return scores
    return score


def normalised(scorer: Scorer, samples: list[tuple[Tensor, Tensor, Tensor, Tensor]]
               ) -> tuple[Scorer, float, float]:
    """The scorer shifted and scaled to mean 0, std 1 on samples -> (scorer, mean, std).

    samples: batches of the initial policy's responses, each what a scorer takes. So scores can be
    compared between agents. A reward that is constant on the samples is only shifted.
    """
    scores = torch.cat([scorer(*sample) for sample in samples])
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    scale = std if std > 1e-6 else 1.0
    return (lambda *batch: (scorer(*batch) - mean) / scale), mean, std


# ---------------------------------------------------------------------------------- random streams


def generator(seed: int, *name) -> torch.Generator:
    """The random stream called `name` of a seed: independent of all others and of their order."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

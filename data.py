"""What an agent owns in private: prompts, preference pairs, and the reward model fitted to them.

In reading order
    1. UserError              a mistake of the user's: one line, exit code 2
    2. shards                 Pair, Shard; make_shards deals the rows by prompt; pool
    3. tokens                 encode_prompts, encode_response(s), pad, decode
    4. the reward model       RewardModel, fit_reward_model (Bradley-Terry), preference_accuracy
    5. scorers                model_scorer, mean_scorer, text_scorer, normalised
    6. random streams         generator: one independent stream per name

Rows, models and functions come from files through support/rows.py and support/load.py, which this
file does not need.

Dimension key: B rows, Q prompt tokens (left-padded), T response tokens (right-padded), L tokens of
any text, D hidden size.

Departures from the papers: rewards are normalised on samples of the initial policy by mean *and*
standard deviation (1909.08593 did both, 2203.02155 the bias only); the reward model starts from the
policy's trunk, and all of its weights are trained (or the head alone: see RewardModel).
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

import policies
import ppo_core


class UserError(Exception):
    """A mistake that the user can mend; its message says what and how, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # one line, whatever a library's message held


# ------------------------------------------------------------------------------------------ shards


@dataclass(frozen=True)
class Pair:
    """One preference: of two responses to a prompt, the one that an annotator chose.

    Texts carry no space where prompt and response meet. `prompt` is the text that the model reads;
    rows with the same prompt go to one agent. `plain` is what rules and people read, without a chat
    template's marks. `joint` stands between prompt and response: one space, or what a template has
    there. `split` names the part of the dataset.
    """

    prompt: str
    chosen: str
    rejected: str
    split: str
    plain: str = ""
    templated: bool = False
    joint: str = " "


@dataclass(frozen=True)
class Shard:
    """One agent's private data: prompts to respond to, pairs that fit and test its reward model."""

    prompts: list[str]
    train: list[Pair]
    heldout: list[Pair]
    rows: int = 0  # number dealt to it: more than train and heldout hold together
    splits: tuple[str, ...] = ()  # of these rows


def by_prompt(rows: list[Pair]) -> list[list[Pair]]:
    """Rows with one prompt together; prompts in the order of their first rows."""
    groups: dict[str, list[Pair]] = {}
    for pair in rows:
        groups.setdefault(pair.prompt, []).append(pair)
    return list(groups.values())


def split_by_prompt(rows: list[Pair], n: int) -> tuple[list[Pair], list[Pair]]:
    """Take whole prompts until n rows or more are taken -> (their rows, all other rows).

    One prompt at least is left.
    """
    groups, first, taken = by_prompt(rows), [], 0
    while taken < len(groups) - 1 and len(first) < n:
        first += groups[taken]
        taken += 1
    return first, [pair for group in groups[taken:] for pair in group]


def make_shards(pairs: list[Pair], n_agents: int, how: str, n_pairs: int, n_eval: int,
                rng: random.Random, n_judge: int = 0) -> tuple[list[str], list[Shard], list[Pair]]:
    """Give each agent rows of its own -> (evaluation prompts, N shards, pairs for the judge).

    how: "iid" gives every agent an even share of all prompts with their rows; "split" gives agent i
    the splits i, i + N, ... With S splits, fewer than agents, agent i draws from split i mod S and
    shares it with others. n_pairs: pairs per agent to fit its reward model; n_eval: prompts kept
    for the evaluation; n_judge: pairs kept for a judge. No prompt is in two of: the evaluation, the
    judge's pairs, an agent's pairs to fit and to test, another agent. Raises UserError if there is
    too little data.
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
    judge_rows, rows = split_by_prompt(rows, n_judge)
    if n_judge and len(by_prompt(judge_rows)) < 2:
        raise UserError(f"--judge heldout would be fitted to {len(judge_rows)} rows of a single "
                        "prompt: lower --eval-prompts, use more data, or name another judge")

    if how == "iid":
        portions = _share(rows, n_agents)
    else:
        portions = _portions_by_split(rows, sorted({pair.split for pair in pairs}), n_agents)
    taken = (f"of {len(pairs)}, after those of {n_eval} evaluation prompts and "
             f"{len(judge_rows)} for the judge")
    # The poorest agent first: the remedy that its error names is then enough for all.
    shards: list[Shard | None] = [None] * n_agents
    for i in sorted(range(n_agents), key=lambda i: len(portions[i])):
        shards[i] = _shard(portions[i], n_pairs, f"agent {i}", taken)
    return eval_prompts, shards, judge_rows


def _share(rows: list[Pair], n: int) -> list[list[Pair]]:
    """n even shares of the prompts, each with all of its rows."""
    groups = by_prompt(rows)
    return [[pair for group in groups[i::n] for pair in group] for i in range(n)]


def _portions_by_split(rows: list[Pair], splits: list[str], n_agents: int) -> list[list[Pair]]:
    """The rows of each agent, N lists, where agents own splits.

    A prompt may stand in several splits. It goes to the agent that owns the split of its first row,
    and its rows in other agents' splits are not used.
    """
    home: dict[str, str] = {}
    for pair in rows:
        home.setdefault(pair.prompt, pair.split)
    portions = []
    for i in range(n_agents):
        own = splits[i::n_agents] or [splits[i % len(splits)]]
        mine = [pair for pair in rows if pair.split in own and home[pair.prompt] in own]
        if len(splits) < n_agents:  # the agents of this split take turns at its prompts
            sharers = range(i % len(splits), n_agents, len(splits))
            mine = _share(mine, len(sharers))[sharers.index(i)]
        portions.append(mine)
    return portions


def _shard(rows: list[Pair], n_pairs: int, who: str, taken: str) -> Shard:
    """An agent's rows as its shard: a fifth of them, about 256 at most, tests its reward model."""
    prompts = list(dict.fromkeys(pair.prompt for pair in rows))  # unique, in order
    if not prompts:
        raise UserError(f"{who} has no prompt ({taken}): lower --eval-prompts or --agents, use "
                        "--shards iid, or more data")
    heldout, rest = split_by_prompt(rows, min(256, max(1, len(rows) // 5)))
    train = rest[:n_pairs] if heldout else []
    if len(train) < n_pairs:
        remedy = f"lower --pairs to {len(train)}" if train else "lower --agents"
        raise UserError(f"{who} has {len(rows)} usable preference rows of {len(prompts)} prompts "
                        f"({taken}), {len(heldout)} of them held out, and --pairs asks for "
                        f"{n_pairs}: {remedy}, lower --eval-prompts, or use more data")
    splits = tuple(sorted({pair.split for pair in rows}))
    return Shard(prompts, train, heldout, len(rows), splits)


def pool(shards: list[Shard]) -> Shard:
    """All shards in one place, for `centralized` and `--reward shared`: not private."""
    return Shard(list(dict.fromkeys(prompt for shard in shards for prompt in shard.prompts)),
                 [pair for shard in shards for pair in shard.train],
                 [pair for shard in shards for pair in shard.heldout],
                 sum(shard.rows for shard in shards),
                 tuple(sorted({split for shard in shards for split in shard.splits})))


# ------------------------------------------------------------------------------------------ tokens


PROBE = "a"  # a text that shares no token with what follows it


def frame(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts around a text: the ids (before it, behind it), BOS and EOS often."""
    text = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    framed = tokenizer(PROBE)["input_ids"]
    for start in range(len(framed) - len(text) + 1):
        if text and framed[start:start + len(text)] == text:
            return framed[:start], framed[start + len(text):]
    return [], []


def encode_prompts(tokenizer, prompts: list[str], templated: bool = False) -> list[list[int]]:
    """Each prompt's ids, with what the tokenizer puts at the beginning of a text, and never twice.

    What it would put at the end is left out, and an EOS at the end of the text too: the response
    follows. templated: a chat template has put everything there already.
    """
    if not prompts:
        return []
    before = [] if templated else frame(tokenizer)[0]
    encoded = []
    for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]:
        ids = ids if before and ids[:len(before)] == before else before + ids
        while not templated and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        encoded.append(ids)
    return encoded


def encode_response(tokenizer, response: str, max_tokens: int, eos: bool, prompt: str = PROBE,
                    joint: str = " ") -> list[int]:
    """`encode_responses` for one response; the prompt matters to few tokenizers."""
    return encode_responses(tokenizer, [(prompt, joint, response)], max_tokens, eos)[0]


def encode_responses(tokenizer, texts: list[tuple[str, str, str]], max_tokens: int, eos: bool,
                     eos_id: tuple[int, ...] = ()) -> list[list[int]]:
    """(prompt, joint, response) texts -> each response's ids, as a policy would have sampled them.

    The joint is one space, which in a BPE vocabulary is part of the response's first token, or what
    a chat template puts there. The ids are those of the whole text behind the prompt's own: a
    tokenizer that puts a space before every text (Llama 2) would put it before the response too.
    An EOS in a response ends it (any of eos_id); other special tokens in it are text. At most
    max_tokens ids are kept. A response of fewer has ended, and gets EOS if `eos`; a longer one is
    cut and has none.
    """
    def encode(some: list[str]) -> list[list[int]]:
        return tokenizer(some, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    ends = set(eos_id) | {tokenizer.eos_token_id}
    names = [name for name in tokenizer.convert_ids_to_tokens(sorted(ends))
             if tokenizer.convert_tokens_to_ids(name) in
             special_ids(tokenizer) | set(tokenizer.added_tokens_decoder)]
    encoded = []
    for start in range(0, len(texts), 1000):
        some = []
        for prompt, joint, response in texts[start:start + 1000]:
            cut = min([response.find(name) for name in names if name in response], default=None)
            some.append((prompt, joint, response if cut is None else response[:cut].rstrip()))
        prompts = list(dict.fromkeys(prompt for prompt, *_ in some))
        before = dict(zip(prompts, encode(prompts), strict=True))
        wholes = encode(["".join(text) for text in some])
        for (prompt, joint, response), whole in zip(some, wholes, strict=True):
            n = len(before[prompt])
            if not response:
                ids = []
            elif whole[:n] == before[prompt]:
                ids = whole[n:]
            elif prompt != PROBE:  # one token spans prompt and response
                ids = encode_response(tokenizer, response, len(whole), False, joint=joint)
            else:
                ids = encode([joint + response])[0]
            stop = next((k for k, token in enumerate(ids) if token in ends), len(ids))
            ids = ids[:min(stop, max_tokens)]
            ended = len(ids) < max_tokens
            encoded.append(ids + [tokenizer.eos_token_id] * (eos and ended))
    return encoded


def special_ids(tokenizer) -> set[int]:
    """The ids that are control tokens to the tokenizer, not words of a text."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


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


def decode(tokenizer, ids: Tensor, mask: Tensor, texts: dict | None = None) -> list[str]:
    """ids, mask [B, L] -> B texts of the valid tokens, without special tokens or outer spaces.

    texts: {ids: text}, for those whose text is known.
    """
    rows = [row[valid.bool()].tolist() for row, valid in zip(ids, mask, strict=True)]
    decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
    known = texts or {}
    return [known.get(tuple(row), text.strip()) for row, text in zip(rows, decoded, strict=True)]


# -------------------------------------------------------------------------------- the reward model

TokenPair = tuple[list[int], list[int]]  # ids of prompt + chosen, and of prompt + rejected


class RewardModel(nn.Module):
    """A scalar head on a copy of the policy's trunk. Padding never changes a score.

    pooling: what the head reads, "last" the state of the last valid token, "mean" the mean state
    of all valid tokens. The head starts with standard deviation 1/sqrt(D + 1), as in the code of
    1909.08593, drawn from `generator`.

    probe: 0 trains trunk and head; n > 0 cuts the trunk to its first n layers and its last norm,
    freezes it and trains the head alone (a linear probe, 1610.01644): cheap, and for few pairs.
    """

    def __init__(self, causal_lm: nn.Module, pooling: str, generator: torch.Generator,
                 probe: int = 0):
        super().__init__()
        trunk = causal_lm.base_model
        if trunk is causal_lm:  # Llama 4 and Mllama name no base model
            trunk = causal_lm.model
        self.trunk = copy.deepcopy(trunk).eval().requires_grad_(True)
        if probe:
            del policies.layers_of(self.trunk)[probe:]
            self.trunk.config.get_text_config().num_hidden_layers = probe
            self.trunk.requires_grad_(False)
        self.pooling = pooling
        with torch.no_grad():  # D is what the trunk gives: config.hidden_size, but not always
            token = torch.ones(1, 1, dtype=torch.long, device=causal_lm.device)
            size = self.states(token, token).shape[-1]
        self.head = nn.Linear(size, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(1, size, generator=generator) / (size + 1) ** 0.5)
            self.head.bias.zero_()
        self.head.to(causal_lm.device)

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, L], padded on any side -> the trunk's last hidden states [B, L, D]."""
        return self.trunk(**policies.known_inputs(
            self.trunk, input_ids=ids, attention_mask=mask,
            position_ids=policies.position_ids(mask), use_cache=False)).last_hidden_state

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, L], padded on any side -> scores [B], not normalised."""
        return self.head(self.pooled(ids, mask)).squeeze(-1)

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, L], padded on any side -> what the head reads, [B, D]."""
        states = self.states(ids, mask)  # [B, L, D]
        # Padded positions may hold NaN, and 0 x NaN is NaN: they are taken out by selection.
        states = torch.where(mask[..., None].bool(), states, 0)
        if self.pooling == "mean":
            share = mask / mask.sum(1, keepdim=True)  # [B, L]
        else:
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)  # [B]
            share = F.one_hot(last, mask.shape[1])  # [B, L]
        return torch.einsum("bl,bld->bd", share.to(states), states)


def _both(read: Callable, pairs: list[TokenPair], pad_id: int,
          device: torch.device) -> tuple[Tensor, Tensor]:
    """One call of read(ids, mask) for B pairs -> (of the chosen [B, ...], of the rejected)."""
    sequences = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    return read(*pad(sequences, pad_id, "right", device)).chunk(2)


def fit_reward_model(model: RewardModel, pairs: list[TokenPair], pad_id: int, *, lr: float,
                     epochs: int, batch: int = 16, generator: torch.Generator,
                     watch: Callable[[int, int], None] = lambda done, steps: None) -> float:
    """Fit by Bradley-Terry -> the mean loss per pair of the last epoch, in nats.

    The loss is -log sigmoid(r(chosen) - r(rejected)) (2009.01325, sec. 3.4). Adam with eps 1e-5,
    `batch` pairs per step, lr decays linearly to 0 over all steps. watch: told (steps done, all).
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, eps=1e-5, fused=True)
    device = model.head.weight.device
    probe = not any(weight.requires_grad for weight in model.trunk.parameters())
    if probe:  # what its head reads never changes: it is made once
        with torch.no_grad():
            parts = [torch.stack(_both(model.pooled, pairs[k:k + batch], pad_id, device), 1)
                     for k in range(0, len(pairs), batch)]
        pooled = torch.cat(parts)  # [number of pairs, 2, D]
    steps = epochs * -(-len(pairs) // batch)  # the last, smaller batch is a step too
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    loss_sum = 0.0
    for _ in range(epochs):
        loss_sum = 0.0
        for rows in torch.randperm(len(pairs), generator=generator).split(batch):
            chosen, rejected = (model.head(pooled[rows]).squeeze(-1).unbind(1) if probe else
                                _both(model, [pairs[row] for row in rows], pad_id, device))
            loss = -F.logsigmoid(chosen - rejected).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            watch(schedule.last_epoch, steps)
            loss_sum += loss.item() * len(rows)
    optimizer.zero_grad()  # gradients become None: they would hold as much memory as the model
    return loss_sum / len(pairs)


@torch.no_grad()
def preference_accuracy(model: RewardModel, pairs: list[TokenPair], pad_id: int,
                        batch: int = 64) -> float:
    """Share of pairs whose chosen response scores higher; a tie counts half."""
    right = 0.0
    for start in range(0, len(pairs), batch):
        chosen, rejected = _both(model, pairs[start:start + batch], pad_id,
                                 model.head.weight.device)
        right += (chosen > rejected).sum().item() + 0.5 * (chosen == rejected).sum().item()
    return right / len(pairs)


# ----------------------------------------------------------------------------------------- scorers

# (prompt_ids [B, Q], prompt_mask [B, Q], response_ids [B, T], response_mask [B, T]) -> scores [B]
Scorer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def model_scorer(model: RewardModel, eos_id: int | tuple[int, ...] = (),
                 with_eos: bool = True, rows: int = 64) -> Scorer:
    """A reward model as a scorer, on the ids that were sampled, in the form that it was fitted to.

    with_eos: its texts ended with the first eos_id, so any other that ends a response becomes that;
    else EOS is taken off before scoring. rows: how many texts are read at a time.
    """
    @torch.no_grad()
    def score(prompt_ids: Tensor, prompt_mask: Tensor,
              response_ids: Tensor, response_mask: Tensor) -> Tensor:
        if eos_id != ():
            ends = ppo_core.is_eos(response_ids, eos_id) & response_mask.bool()  # [B, T]
            if with_eos:
                fitted = eos_id if isinstance(eos_id, int) else eos_id[0]
                response_ids = response_ids.masked_fill(ends, fitted)
            else:
                response_mask = response_mask.masked_fill(ends, 0)
        ids = torch.cat([prompt_ids, response_ids], 1)  # [B, L]
        mask = torch.cat([prompt_mask, response_mask], 1)
        parts = zip(ids.split(rows), mask.split(rows), strict=True)
        return torch.cat([model(*part) for part in parts])
    return score


def mean_scorer(scorers: list[Scorer]) -> Scorer:
    """The mean of several scorers, each of which should be normalised first."""
    return lambda *batch: sum(scorer(*batch) for scorer in scorers) / len(scorers)


def text_scorer(function: Callable, name: str, tokenizer, texts: dict | None = None,
                eos_id: int | tuple[int, ...] | None = None) -> Scorer:
    """function(prompts, responses, ended) -> B numbers, as a scorer that raises UserError.

    The function sees texts; `ended`, B bools, says which responses closed with EOS. texts: {a
    prompt's ids: its text in the dataset}, for prompts that decoding would change.
    """
    eos_id = tokenizer.eos_token_id if eos_id is None else eos_id

    def score(prompt_ids: Tensor, prompt_mask: Tensor,
              response_ids: Tensor, response_mask: Tensor) -> Tensor:
        prompts = decode(tokenizer, prompt_ids, prompt_mask, texts)
        responses = decode(tokenizer, response_ids, response_mask)
        ended = ppo_core.has_ended(response_ids, response_mask, eos_id)
        try:
            scores = function(prompts, responses, ended.tolist())
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


def normalised(scorer: Scorer, samples: tuple[Tensor, Tensor, Tensor, Tensor]
               ) -> tuple[Scorer, float, float]:
    """The scorer shifted and scaled to mean 0, std 1 on samples -> (scorer, mean, std).

    samples: a scorer's four arguments, of the initial policy's responses. It makes the scores of
    agents comparable. A reward that is constant on the samples is only shifted.
    """
    scores = scorer(*samples)
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    scale = std if std > 1e-6 else 1.0
    return (lambda *batch: (scorer(*batch) - mean) / scale), mean, std


# ---------------------------------------------------------------------------------- random streams


def generator(seed: int, *name) -> torch.Generator:
    """The random stream called `name` of a seed: independent of all others and of their order."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

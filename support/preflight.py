"""The checks that catch what silently ruins PPO on this model and data, before any training.

`report` prints the list and stops the run if a fatal check fails. `world` and `task` are those of
world.py; nothing in them changes here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

import kl
import ppo_core
from data import UserError, generator
from support import load
from support.clock import timed


@dataclass(frozen=True)
class Check:
    """One line of the list. value <= limit passes; with floor, value >= limit does."""

    name: str
    value: float
    limit: float
    cause: str  # the likely cause of a failure
    floor: bool = False
    fatal: bool = True  # a failure stops the run; else it is a warning

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.floor else self.value <= self.limit

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL" if self.fatal else "WARN"
        bound = f"at {'least' if self.floor else 'most'} {self.limit:.3g}"
        line = f"  {mark}  {self.name}: {self.value:.3g} ({bound})"
        return line if self.passed else f"{line}; {self.cause}"


@timed("checks")
def report(world, task, say: Callable[[str], None]) -> None:
    """Print the preflight list. Raises UserError if a fatal check failed.

    say: told what takes time, before it does.
    """
    say("checks before training")
    checks = preflight(world, task)
    rows = [f"  note  {n} of {world.total} rows dropped, since {why}"
            for why, n in world.dropped.items()]
    tqdm.write("\n".join(["preflight", *map(str, checks), *rows]))
    failed = [check.name for check in checks if check.fatal and not check.passed]
    if failed:
        raise UserError(f"preflight failed: {'; '.join(failed)} (see the list above for limits and "
                        "causes)")


def alone(world, make_task: Callable, pooled: bool, quiet: bool) -> None:
    """The list for the first seed of a run that is not trained; make_task: world.make_task."""
    with tqdm(bar_format="{desc} {elapsed}", disable=quiet, leave=False) as bar:
        task = make_task(world, world.settings.seeds[0], pooled, bar.set_description)
        report(world, task, bar.set_description)


def preflight(world, task) -> list[Check]:
    """The forward checks of each model, and the rewards of all agents and the judge."""
    checks = vocabulary_checks(world)
    for i in reversed(range(len(world.models))):
        checks = forward_checks(world, task, i) + checks
    checks += [Check(f"spread of agent {i}'s reward on samples of the initial policy", std, 1e-6,
                     "it is the same for all of them: nothing can be learned from it", floor=True,
                     fatal=False) for i, std in enumerate(task.spreads) if std <= 1e-6]
    models = {f"agent {i}'s reward model": fit for i, fit in enumerate(task.accuracies)}
    for name, fit in (models | {"the judge": task.judge_accuracy}).items():
        if fit is not None:
            accuracy, n = fit
            chance = min(1, 0.5 + 1.645 * 0.5 / n**0.5)  # one-sided 95 % bound of a coin
            cause = ("no better than chance: more pairs, another --reward-lr or --reward-epochs, "
                     "or labels without signal")
            checks.append(Check(f"{name}, accuracy on {n} held-out pairs", accuracy, chance, cause,
                                floor=True, fatal=False))
    return checks


@torch.no_grad()
def forward_checks(world, task, index: int) -> list[Check]:
    """Whether sampler, training forward, padding and masks agree, on one small rollout by the
    model of agent `index`.
    """
    s, policy, initial = world.settings, world.new_policy(index), world.initial_of(index)
    agent = index % len(task.shards)  # centralized has one
    of = f"{s.model[index]}: " if len(s.model) > 1 else ""
    rollout = ppo_core.collect(
        policy, [initial], torch.ones(1), initial, task.scorers[agent],
        *world.padded((task.shards[agent].prompts * 8)[:8]), s, eos_id=world.eos_ids,
        pad_id=world.pad_id, generator=generator(task.seed, "preflight"), generate=world.generate)
    valid = rollout.mask.bool()

    def worst(difference: torch.Tensor, rows: slice = slice(None)) -> float:
        """The largest absolute value at valid tokens of some rows."""
        return torch.where(valid[rows], difference, 0).abs().max().item()

    def padded(pads: int) -> torch.Tensor:
        """The response's log-probs behind more left padding."""
        ids = torch.nn.functional.pad(rollout.ids, (pads, 0), value=world.pad_id)
        attention = torch.nn.functional.pad(rollout.attention, (pads, 0))
        return ppo_core.score_tokens(
            policy, ids, attention, rollout.response, rollout.mask, s.temperature)[0]

    some = slice(2, 6)  # not the rows of one micro-batch of `collect`
    batch = {name: tensor[some] for name, tensor in rollout.batch.items()}
    new = ppo_core.new_terms(policy, batch, torch.ones(1), s)[0]
    ratio = (new - rollout.logprobs[some]).exp()
    rows = rollout.ids, rollout.attention, rollout.response, rollout.mask
    all_logprobs = ppo_core.score_tokens(policy, *rows, s.temperature)[1]
    # How far rounding can move a log-prob that is computed in two ways: in float32, 8 eps at the
    # size of the largest logit. A ratio of the same forward has a tenth of that.
    logits = policy.response_forward(*rows[:2], rollout.prompt_length)[0][..., ~policy.forbidden]
    size = logits.abs().max().item() / s.temperature
    rounding = max(1e-4 if s.dtype == "float32" else 0.2, 8 * torch.finfo().eps * size)
    context = load.positions_of(policy.model) - rollout.ids.shape[1]
    pads = min(3, context)
    padding = [Check(of + "more left padding, largest change of log-probs, nats",
                     worst(padded(pads) - rollout.logprobs), rounding,
                     "the model does not honour attention_mask or position_ids")] if pads else []
    return [
        Check(of + "new / old probability before any step, |ratio - 1|", worst(ratio - 1, some),
              rounding / 10, "old and new log-probs come from different forwards, temperatures or "
              "precisions, or dropout is on"),
        Check(of + "KL while policy = reference, nats per token", worst(rollout.kl), 1e-5,
              "policy and reference differ in temperature, mask or precision"),
        *padding,
        Check(of + "sampler's cache and training forward, largest difference of log-probs, nats",
              worst(cached_logprobs(policy, rollout, s.temperature) - rollout.logprobs), rounding,
              "the key/value cache is wrong"),
        *dtype_checks(policy, rollout, s, of),
        Check(of + "largest probability of EOS",
              worst(all_logprobs[..., list(world.eos_ids)].exp().sum(-1)), 1e-4,
              "the model has not learned to end: a longer --response-length, or "
              "--missing-eos-penalty 0", floor=True, fatal=False),
        *unknown_checks(world, worst, all_logprobs, of)]


def dtype_checks(policy: ppo_core.Policy, rollout: ppo_core.Rollout, s, of: str) -> list[Check]:
    """What --dtype costs, on the policy's own log-probs."""
    if s.dtype == "float32":
        return []
    exact = type(policy)(policy.model, policy.forbidden, torch.float32)
    rows = rollout.ids, rollout.attention, rollout.response, rollout.mask
    error = (ppo_core.score_tokens(exact, *rows, s.temperature)[0] - rollout.logprobs).abs()
    mean = ppo_core.masked_mean(error, rollout.mask).item()
    return [Check(f"{of}log-probs in {s.dtype} against float32, mean error in nats (largest "
                  f"{error.max().item():.3g})", mean, 0.1, "use --dtype float32")]


def unknown_checks(world, worst, all_logprobs: torch.Tensor, of: str) -> list[Check]:
    """Whether the policy writes tokens that stand for no text."""
    unknown = world.tokenizer.unk_token_id
    if unknown is None or world.forbidden[unknown] or unknown in world.eos_ids:
        return []
    return [Check(f"{of}largest probability of the unknown token {world.tokenizer.unk_token}",
                  worst(all_logprobs[..., unknown].exp()), 1e-3,
                  "the model has learned to write it: it counts as a token, and rules and judges "
                  "do not see it", fatal=False)]


def cached_logprobs(
    policy: ppo_core.Policy, rollout: ppo_core.Rollout, temperature: float
) -> torch.Tensor:
    """log pi(a_t|s_t) [B, T] as the sampler sees it: prompt first, then token by token."""
    Q, T = rollout.prompt_length, rollout.response.shape[1]
    step = policy.decoder(rollout.attention[:, :Q], T)
    logits = [step(rollout.ids[:, :Q])]
    logits += [step(rollout.response[:, t - 1:t]) for t in range(1, T)]
    return kl.token_logprobs(torch.stack(logits, 1), rollout.response, temperature)


def vocabulary_checks(world) -> list[Check]:
    """Whether the tokenizer knows the prompts' words."""
    unknown = world.tokenizer.unk_token_id
    if unknown is None:
        return []
    tokens = [token for ids in world.prompt_ids.values() for token in ids]
    return [Check("share of prompt tokens that the vocabulary does not know",
                  tokens.count(unknown) / len(tokens), 0.01,
                  "the model's tokenizer is for other text", fatal=False)]

"""PPO for one language-model agent, written by hand in plain torch. Knows nothing of federation.

In reading order
    1. masked arithmetic   masked_mean, masked_std, whiten
    2. the algorithm       gae, policy_loss, value_loss: tensors and floats in, tensors out
    3. sampling            sample_inverse_cdf, draw_uniforms, generate
    4. one rollout         PENALTIES, score_tokens, kl_per_token, collect -> Rollout
    5. one update          penalised_rewards, new_terms, ppo_loss, optimise, gradient

The policy is in policies.py. Gradients are autograd's own but for one, of log pi and the exact KL
with respect to the logits, which kl.logprobs_and_kl has by hand. support/fast.py has faster forms
of Policy and generate with the same results to rounding; nothing here knows of them.

Dimension key: B rows, b rows of a micro-batch, Q prompt tokens (left-padded), T response tokens
(right-padded), L positions, D hidden size, V vocabulary, K references, X what the penalty keeps of
them (see kl.reference).
State t is the prompt and the response before token t: its logits, its value and its KL all come
from sequence position Q-1+t, so one slice, [:, Q-1:-1], serves the three. Means are over valid
tokens: mask 1, up to and with EOS.

`settings` is support.settings.Settings, or anything with the fields response_length, temperature,
missing_eos_penalty, rule, penalty, epochs, minibatches, micro_batch and clip.

Departures from the papers and from common implementations
    D1  The KL penalty is by default a term of the loss, exact over the vocabulary, and not part of
        the reward (1909.08593 puts k1 in the reward; that is the penalty "k1-in-reward"). So it is
        the immediate term alone: that a token changes later states is left out ("both" adds it).
    D2  Its coefficient is beta / sigma_A, sigma_A being the standard deviation that whitened the
        advantages. A / sigma_A and beta KL / sigma_A are on one scale, so beta is the exchange rate
        in E[R] - beta KL whatever the scale of the advantages.
    D3  Advantages are whitened once over the rollout, not per minibatch; the variance is divided by
        n, not n - 1. There is no entropy bonus (1707.06347, eq. 9, has one).
    D4  Old log-probs are recomputed by the training forward, not taken from the sampler's cache, so
        that the ratio of the first minibatch is 1.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kl
from policies import Policy, cached_decoder, read_once

# What no preset changes. gamma, lambda and c_v are those of OpenAI's lm-human-preferences (the code
# of 1909.08593), eps that of OpenAI baselines' PPO; the other two were not tuned.
GAMMA, LAMBDA = 1.0, 0.95  # discount per token, and lambda of GAE
VALUE_COEF = 0.1  # c_v, weight of the value loss
MAX_GRAD_NORM = 1.0  # a longer gradient is scaled down to this norm
ADAM = {"betas": (0.9, 0.99), "eps": 1e-5}

# ------------------------------------------------------------------------------- masked arithmetic


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1. x, mask: one shape -> scalar. NaN if the mask is empty."""
    return torch.where(mask.bool(), x, 0).sum() / mask.sum()


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Biased standard deviation where mask is 1 -> scalar; 1e-8 in the root keeps it positive."""
    mean = masked_mean(x, mask)
    return (masked_mean((x - mean) ** 2, mask) + 1e-8).sqrt()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std of valid entries, biased variance; 0 where mask is 0. x, mask: one shape."""
    return torch.where(mask.bool(), (x - masked_mean(x, mask)) / masked_std(x, mask), 0)


# ----------------------------------------------------------------------------------- the algorithm


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation; the response is a whole episode.

    1506.02438, eq. 16: A_t = sum_l (gamma lam)^l delta_(t+l); the loop is its recursion.
    rewards, values, mask: [B, T], mask 1 up to and with the last token -> (advantages [B, T],
    returns [B, T]), both 0 where mask is 0. V after the last valid token is 0. Advantages are not
    whitened; returns = advantages + values.
    """
    valid = mask.bool()
    rewards, values = torch.where(valid, rewards, 0), torch.where(valid, values, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # V = 0 after the end
    for t in reversed(range(values.shape[1])):
        # delta_t = reward_t + gamma V(s_(t+1)) - V(s_t)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (1707.06347, eq. 7, negated). All [B, T] -> (loss, clipfrac), scalars.

    clipfrac: share of valid tokens at which the clipped term is the larger one and stops the
    gradient. Where mask is 0 log-probs must be finite (`new_terms` fills them): the loss leaves
    them out, but 0 times inf spoils a gradient.
    """
    ratio = (logprobs - old_logprobs).exp()  # pi(a_t|s_t) / pi_old(a_t|s_t)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    clipfrac = masked_mean((clipped > unclipped).to(logprobs.dtype), mask)
    return loss, clipfrac


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Clipped value loss, 1/2 max((V - R)^2, (V_clip - R)^2), V_clip within `clip` of the old V.

    All [B, T] -> (loss, clipfrac), scalars. Source: OpenAI baselines and lm-human-preferences; it
    is not in 1707.06347.
    """
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    unclipped = (values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask)
    # Where V was not clipped, clipped_values differs from V by rounding, which must not count.
    moved = (values - old_values).abs() > clip
    clipfrac = masked_mean((moved & (clipped > unclipped)).to(values.dtype), mask)
    return loss, clipfrac


# ---------------------------------------------------------------------------------------- sampling


def sample_inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """One draw per row: the first id whose cumulative probability exceeds u.

    probs [B, V], u [B] in [0, 1) -> [B]. In float32 the cdf can end below 1, so u is scaled by its
    last entry. Searching to the right keeps u = 0 from an id of probability 0; where u rounds up to
    the last entry, the minimum takes the last id of a probability above 0. On a GPU cumsum is a
    parallel sum that need not be monotone, so about one draw in 10^8 could still be of probability
    0: it becomes the likeliest id.
    """
    cdf = probs.float().cumsum(-1)
    total = cdf[:, -1:].contiguous()
    drawn = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
    last_possible = torch.searchsorted(cdf, total)
    drawn = torch.minimum(drawn, last_possible).clamp(max=probs.shape[-1] - 1)
    impossible = probs.gather(-1, drawn) == 0
    return torch.where(impossible, probs.argmax(-1, keepdim=True), drawn).squeeze(-1)


def is_eos(tokens: Tensor, eos_id: int | tuple[int, ...]) -> Tensor:
    """tokens [...] -> [...] bool. eos_id: one id, or several (Llama 3 has) that all end a text."""
    ids = (eos_id,) if isinstance(eos_id, int) else eos_id
    return torch.stack([tokens == one for one in ids]).any(0)


def has_ended(response: Tensor, mask: Tensor, eos_id: int | tuple[int, ...]) -> Tensor:
    """response, mask [B, T] -> [B] bool: closed with EOS."""
    return (is_eos(response, eos_id) & mask.bool()).any(1)


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """logits [B, V], uniform [B] -> the next token of each row, [B]."""
    return sample_inverse_cdf((logits.float() / temperature).softmax(-1), uniform)


def draw_uniforms(
    length: int, rows: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """[T, B] in [0, 1), drawn where the generator is: a seed gives the same on every device.

    All are drawn before sampling, so that the stream moves equally far whenever rows end.
    """
    source = torch.device("cpu") if generator is None else generator.device
    return torch.rand(length, rows, generator=generator, device=source).to(device)


@torch.no_grad()
def generate(
    model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, *,
    temperature: float, eos_id: int | tuple[int, ...], pad_id: int,
) -> tuple[Tensor, Tensor]:
    """Sample responses token by token, from the whole softmax (no top-k, top-p, minimum length).

    model: a Policy or any Hugging Face causal LM;  prompt_ids, prompt_mask: [B, Q], left-padded;
    uniforms [N, B] in [0, 1): uniforms[t, i] chooses token t of row i, so that N is the most tokens
    of a response;  eos_id: one, or several that all end a response.
    -> (response_ids [B, T], response_mask [B, T]), T <= N being the longest response. The mask is 1
    up to and with EOS; what follows is pad_id with mask 0: so pad_id may be any id, EOS itself too.
    """
    own = isinstance(model, Policy)
    step = model.decoder(prompt_mask, len(uniforms)) if own else cached_decoder(model, prompt_mask)
    tokens = prompt_ids
    alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    response, response_mask = [], []
    with model.precision() if own else contextlib.nullcontext():  # one, so that casts are kept
        for uniform in uniforms:
            token = choose(step(tokens), uniform, temperature)
            response.append(torch.where(alive, token, pad_id))
            response_mask.append(alive)
            alive = alive & ~is_eos(token, eos_id)
            if not alive.any():
                break
            tokens = response[-1][:, None]
    return torch.stack(response, 1), torch.stack(response_mask, 1).to(prompt_mask.dtype)


# ------------------------------------------------------------------------------------- one rollout


@dataclass(frozen=True)
class Penalty:
    """KL's estimator, and whether it is charged in the loss or the reward (table: kl.py)."""

    estimator: str
    in_loss: bool
    in_reward: int | None = None  # token t pays for the KL of state t + this; None: no token pays


PENALTIES = {
    "exact-in-loss": Penalty("exact", in_loss=True),
    "k2-in-loss": Penalty("k2", in_loss=True),
    "k3-in-loss": Penalty("k3", in_loss=True),  # the other direction, KL(reference || policy)
    "k1-in-reward": Penalty("k1", in_loss=False, in_reward=0),  # 1909.08593, eq. 2
    # The exact KL of a state in the loss is the immediate term. That of the later states, which the
    # token leads to, is the rest of the gradient of the (undiscounted) sequence KL.
    "both": Penalty("exact", in_loss=True, in_reward=1),
}


@dataclass(frozen=True)
class Rollout:
    """What one PPO update learns from; nothing here carries a gradient."""

    ids: Tensor  # [B, Q+T] prompt and response
    attention: Tensor  # [B, Q+T] 1 = a real token
    response: Tensor  # [B, T]
    mask: Tensor  # [B, T] 1 up to and with EOS
    scores: Tensor  # [B] the reward, minus the missing-EOS penalty, without the KL penalty
    logprobs: Tensor  # [B, T] log pi_old(a_t|s_t)
    values: Tensor  # [B, T] V_old(s_t)
    reference: Tensor  # [B, T, X] what the penalty needs to know of the references (kl.reference)
    kl: Tensor  # [B, T] the penalty at pi_old, by the estimator that is trained on
    kl_initial: Tensor  # [B, T] exact KL(pi_old || initial policy)
    entropy: Tensor  # [B, T] of pi_old(.|s_t)
    states: Tensor | None = None  # [B, Q+T, D] made by the layers that do not learn (read_once)

    @property
    def prompt_length(self) -> int:
        return self.ids.shape[1] - self.response.shape[1]

    @property
    def batch(self) -> dict[str, Tensor]:
        """What the loss reads of it, by name: all rows."""
        names = ("ids", "attention", "response", "mask", "logprobs", "values", "reference")
        kept = {} if self.states is None else {"states": self.states}
        return {name: getattr(self, name) for name in names} | kept


def entropy(logprobs: Tensor) -> Tensor:
    """[..., V] normalised log-probs -> [...] in nats; an id of probability 0 counts 0, not NaN."""
    return -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0).sum(-1)


def score_tokens(
    policy: Policy, ids: Tensor, attention: Tensor, response: Tensor, mask: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a policy gives the tokens of a response. `new_terms` has the same forward with a graph,
    so ratios begin at 1 (D4).

    ids, attention [b, Q+T], response, mask [b, T] -> (logprobs [b, T] of the response, 0 where mask
    is 0; all_logprobs [b, T, V]; values [b, T]).
    """
    logits, values = policy.response_forward(ids, attention, ids.shape[1] - response.shape[1])
    # In place: a buffer of [b, T, V] less.
    all_logprobs = logits.div_(temperature).log_softmax(-1)
    # The pad id can have log-prob -inf. It is filled here, not masked later: a gradient of 0 times
    # inf would be NaN.
    logprobs = all_logprobs.gather(-1, response[..., None]).squeeze(-1).masked_fill(mask == 0, 0)
    return logprobs, all_logprobs, values


def by_rows(function: Callable, *tensors: Tensor) -> Tensor:
    """function(*tensors) -> [b, T], all [b, T, ...], a few rows at a time.

    What a function makes of [b, T, V] inside has the size of its input, several times: of all rows
    it would be the most of `collect`'s memory.
    """
    parts = zip(*(tensor.split(kl.at_a_time(tensors[0])) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


def kl_per_token(
    all_logprobs: Tensor, reference: Tensor, response: Tensor, weights: Tensor, settings
) -> Tensor:
    """kl.penalty by the settings' rule and estimator: [b, T, V], [b, T, X], [b, T] -> [b, T]."""
    estimator = PENALTIES[settings.penalty].estimator

    def of_rows(logprobs: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        return kl.penalty(logprobs, reference, weights, rule=settings.rule, estimator=estimator,
                          tokens=tokens)

    return by_rows(of_rows, all_logprobs, reference, response)


@torch.no_grad()
def collect(
    policy: Policy, references: list[Policy], weights: Tensor, initial: Policy, scorer: Callable,
    prompt_ids: Tensor, prompt_mask: Tensor, settings, *, eos_id: int | tuple[int, ...],
    pad_id: int, generator: torch.Generator, generate: Callable = generate,
) -> Rollout:
    """Sample one batch and record all that stays fixed during its update.

    references: K frozen policies, weights [K];  initial: the initial policy, for kl_initial;
    scorer(prompt_ids [B, Q], prompt_mask, response_ids [B, T], response_mask) -> [B];
    prompt_ids, prompt_mask: [B, Q], left-padded;  generate: the function above or a faster form.
    """
    # 1. The policy answers the prompts, and the agent's own reward scores the answers.
    uniforms = draw_uniforms(
        settings.response_length, len(prompt_ids), generator, prompt_ids.device)
    response, mask = generate(
        policy, prompt_ids, prompt_mask, uniforms, temperature=settings.temperature,
        eos_id=eos_id, pad_id=pad_id)
    ids, attention = torch.cat([prompt_ids, response], 1), torch.cat([prompt_mask, mask], 1)
    scores = scorer(prompt_ids, prompt_mask, response, mask)
    ended = has_ended(response, mask, eos_id)
    scores = scores - settings.missing_eos_penalty * (~ended).to(scores.dtype)

    # 2. Policy, references and initial policy read the answers, a few rows at a time: [b, T, V] is
    #    the largest thing there is. Layers that do not learn are the same in all, and read once.
    estimator = PENALTIES[settings.penalty].estimator
    parts = []
    for rows in torch.arange(len(ids), device=ids.device).split(settings.micro_batch):
        part = ids[rows], attention[rows], response[rows], mask[rows]
        with read_once(policy.still_layers) as states:
            logprobs, all_logprobs, values = score_tokens(policy, *part, settings.temperature)
            initial_logits, _ = initial.response_forward(*part[:2], prompt_ids.shape[1])
            # A generator: one reference's logits in memory. One of them may be the initial policy.
            logits = (initial_logits if model is initial
                      else model.response_forward(*part[:2], prompt_ids.shape[1])[0]
                      for model in references)
            reference = kl.reference(logits, weights, rule=settings.rule, estimator=estimator,
                                     tokens=part[2], temperature=settings.temperature)  # [b, T, X]
        kl_tokens = kl_per_token(all_logprobs, reference, part[2], weights, settings)  # [b, T]
        initial_logprobs = initial_logits.div_(settings.temperature).log_softmax(-1)
        kl_initial = by_rows(kl.kl_exact, all_logprobs, initial_logprobs)
        uncertainty = by_rows(entropy, all_logprobs)
        # [b, Q+T, D]; none if all layers learn, or if a layer returns more than its states.
        kept = [one for one in states if isinstance(one, Tensor)]
        parts.append((logprobs, values, reference, kl_tokens, kl_initial, uncertainty, *kept))
    columns = map(torch.cat, zip(*parts, strict=True))
    return Rollout(ids, attention, response, mask, scores, *columns)


# -------------------------------------------------------------------------------------- one update


def penalised_rewards(
    scores: Tensor, kl_tokens: Tensor, mask: Tensor, beta: float, penalty: Penalty
) -> Tensor:
    """Reward per token: the score on the last valid token, and beta KL where tokens pay for it.

    scores [B], kl_tokens [B, T] without gradient, mask [B, T] -> [B, T].
    """
    kl_tokens = torch.where(mask.bool(), kl_tokens, 0)
    last = mask.sum(1).long() - 1  # valid tokens are the first ones of a row
    rewards = torch.zeros_like(kl_tokens)
    rewards[torch.arange(len(scores), device=scores.device), last] = scores
    if penalty.in_reward is not None:  # the KL penalty is charged here, in the reward
        later = kl_tokens[:, penalty.in_reward:]  # of the state that token t pays for
        rewards[:, :later.shape[1]] -= beta * later
    return rewards


def new_terms(
    policy: Policy, batch: dict[str, Tensor], weights: Tensor, settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The training forward of b rows: what the loss needs of the policy as it is now.

    -> (log-probs of the response, 0 where mask is 0; KL penalty, which the loss does not read under
    k1-in-reward; values), all [b, T] with a graph.
    """
    ids, response = batch["ids"], batch["response"]
    # Layers that do not learn have read the batch when it was collected.
    with read_once(policy.still_layers, batch.get("states")):
        logits, values = policy.response_forward(
            ids, batch["attention"], ids.shape[1] - response.shape[1])
    logprobs, kl_tokens = kl.logprobs_and_kl(
        logits, batch["reference"], weights, tokens=response, rule=settings.rule,
        estimator=PENALTIES[settings.penalty].estimator, temperature=settings.temperature)
    return logprobs.masked_fill(batch["mask"] == 0, 0), kl_tokens, values  # as score_tokens says


def ppo_loss(
    policy: Policy, batch: dict[str, Tensor], weights: Tensor, beta: float, sigma: Tensor, settings
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of b rows, 1707.06347's eq. 9 without entropy and with KL in its place:

    L = E_t[max(-ratio A, -clip(ratio) A)] + c_v L_value + (beta / sigma_A) E_t[KL_t].

    batch: the tensors of a Rollout for b rows, with advantages and returns [b, T]; weights [K];
    sigma: sigma_A, a scalar -> (loss, metrics), all scalars.
    """
    mask, old_logprobs = batch["mask"], batch["logprobs"]
    penalty = PENALTIES[settings.penalty]
    logprobs, kl_tokens, values = new_terms(policy, batch, weights, settings)
    pg_loss, clipfrac = policy_loss(
        logprobs, old_logprobs, batch["advantages"], mask, settings.clip)
    v_loss, value_clipfrac = value_loss(
        values, batch["values"], batch["returns"], mask, settings.clip)
    loss = pg_loss + VALUE_COEF * v_loss

    log_ratio = (logprobs - old_logprobs).detach()
    if penalty.in_loss:
        # The KL penalty is charged here, in the loss: the immediate term.
        if penalty.estimator != "exact":
            # Tokens come from pi_old: the detached weight pi / pi_old keeps E grad k2 = grad KL.
            kl_tokens = log_ratio.exp() * kl_tokens
        loss = loss + beta / sigma * masked_mean(kl_tokens, mask)
    metrics = {
        "policy_loss": pg_loss, "value_loss": v_loss, "clipfrac": clipfrac,
        "value_clipfrac": value_clipfrac,
        # k3 of KL(pi_old || pi): how far this update has moved the policy.
        "approx_kl": masked_mean(log_ratio.exp() - 1 - log_ratio, mask)}
    return loss, {name: value.detach() for name, value in metrics.items()}


def optimise(
    policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, weights: Tensor,
    beta: float, settings, generator: torch.Generator,
) -> dict[str, float]:
    """Several epochs of minibatch gradient steps on one rollout -> metrics, means over its steps.

    weights [K] belong to rollout.reference. Raises FloatingPointError if an advantage or a gradient
    is not finite, before the step that it would spoil.
    """
    # 1. Rewards per token become advantages and returns, which stay fixed for all epochs.
    mask = rollout.mask
    rewards = penalised_rewards(
        rollout.scores, rollout.kl, mask, beta, PENALTIES[settings.penalty])
    advantages, returns = gae(rewards, rollout.values, mask, GAMMA, LAMBDA)
    if not torch.isfinite(advantages).all():
        raise FloatingPointError("an advantage is not finite")
    # sigma_A whitens the advantages, and scales beta (D2). It is at least 1e-4 (masked_std): where
    # all advantages are equal, as with a constant reward, beta / sigma_A is large and finite, and
    # the KL penalty alone moves the policy.
    sigma = masked_std(advantages, mask)
    tensors = rollout.batch | {"advantages": whiten(advantages, mask), "returns": returns}

    # 2. Every epoch cuts the rows into minibatches anew, and each minibatch is one gradient step.
    history: list[dict[str, Tensor]] = []
    for _ in range(settings.epochs):
        order = torch.randperm(len(rollout.ids), generator=generator)
        for minibatch in order.chunk(settings.minibatches):
            totals = gradient(policy, optimizer, tensors, minibatch, weights, beta, sigma, settings)
            norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
            if not torch.isfinite(norm):  # the one result of a step that the host reads
                raise FloatingPointError(f"the gradient's norm is {norm.item()}")
            optimizer.step()
            history.append({"grad_norm": norm} | totals)
    optimizer.zero_grad()  # the next rollout needs the memory
    means = torch.stack([torch.stack(list(step.values())) for step in history]).mean(0)
    return dict(zip(history[0], means.tolist(), strict=True))


def gradient(
    policy: Policy, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], minibatch: Tensor,
    weights: Tensor, beta: float, sigma: Tensor, settings,
) -> dict[str, Tensor]:
    """The gradient of one minibatch, left in policy.parameters() -> the loss's metrics, scalars.

    minibatch: indices of rows. It is summed from micro-batches, each weighted by its share of the
    minibatch's valid tokens: so the gradient does not depend on how the minibatch is cut.
    """
    optimizer.zero_grad()
    totals: dict[str, Tensor] = {}
    mask = tensors["mask"]
    minibatch = minibatch.sort().values  # within a minibatch the order changes nothing
    valid = mask[minibatch].sum()
    for rows in minibatch.split(settings.micro_batch):
        first, last = rows[0].item(), rows[-1].item()
        if last - first == len(rows) - 1:
            rows = slice(first, last + 1)  # neighbours: a view, and no copy of [b, T, V]
        batch = {name: tensor[rows] for name, tensor in tensors.items()}
        share = mask[rows].sum() / valid
        loss, metrics = ppo_loss(policy, batch, weights, beta, sigma, settings)
        (loss * share).backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value * share
    return totals

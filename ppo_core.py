"""PPO for one language-model agent, written by hand. Knows nothing of federation.

In reading order
    1. masked arithmetic      masked_mean, masked_std, whiten
    2. the algorithm          gae, policy_loss, value_loss            (pure: tensors and floats in, tensors out)
    3. the policy             Policy: a causal LM, a value head on its trunk, and the mask of ids that are no token
    4. sampling               sample_inverse_cdf, decoder, generate
    5. one rollout            entropy, evaluate, reference_logprobs, penalty_kl, collect -> Rollout
    6. one update             penalised_rewards, ppo_loss, optimise

Dimension key: B rows, Q prompt tokens (left-padded), T response tokens (right-padded), V vocabulary, K references.
State t is the prompt and the response before token t: its logits, its value and its KL all come from sequence
position Q-1+t, so one slice, [:, Q-1:-1], serves the three. Means are over valid tokens: mask 1, up to and with EOS.

`settings` is fedppo.Settings, or anything with the fields response_length, temperature, missing_eos_penalty, rule,
estimator, penalty, epochs, minibatches, micro_batch, gamma, lam, clip, value_clip, vf_coef and max_grad_norm.

Departures from the papers and from common implementations
    D1  The KL penalty is by default a term of the loss, exact over the vocabulary, and not part of the reward
        (1909.08593 puts k1 in the reward; that is `penalty="reward"`).
    D2  Its coefficient is beta / sigma_A, sigma_A being the standard deviation that whitened the advantages: so beta is
        the exchange rate in E[R] - beta KL whatever the scale of the advantages.
    D3  Advantages are whitened once over the rollout batch, not per minibatch; the variance is biased.
    D4  Old log-probs are recomputed by the training forward, not taken from the sampler's cache, so that the ratio of
        the first minibatch is 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kl

# ---------------------------------------------------------------------------------------------- masked arithmetic


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the entries where mask is 1. x, mask: the same shape -> scalar. NaN if the mask is empty."""
    return torch.where(mask.bool(), x, 0).sum() / mask.sum()


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Biased standard deviation over the entries where mask is 1 -> scalar; 1e-8 inside the root keeps it positive."""
    mean = masked_mean(x, mask)
    return (masked_mean((x - mean) ** 2, mask) + 1e-8).sqrt()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / std over valid entries, biased variance; 0 where mask is 0. x, mask: the same shape.

    shift_mean=False adds the mean back, (x - mean) / std + mean, as OpenAI's 2019 code did for rewards.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) / masked_std(x, mask)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask.bool(), whitened, 0)


# --------------------------------------------------------------------------------------------------- the algorithm


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (1506.02438, eq. 16), the response being a whole episode.

    rewards, values, mask: [B, T], mask 1 up to and with the last token -> (advantages [B, T], returns [B, T]), both 0
    where mask is 0. V after the last valid token is 0. Advantages are not whitened; returns = advantages + values.
    """
    valid, mask = mask.bool(), mask.to(values.dtype)
    rewards, values = torch.where(valid, rewards, 0), torch.where(valid, values, 0)  # V = 0 after the end
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # r_t + gamma V(s_t+1) - V(s_t)
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (1707.06347, eq. 7, negated). All [B, T] -> (loss, clipfrac), scalars.

    clipfrac: share of valid tokens at which the clipped term is the larger one and stops the gradient. Where mask is 0
    log-probs must be finite (`evaluate` fills them): the loss leaves them out, but 0 times inf spoils a gradient.
    """
    ratio = (logprobs - old_logprobs).exp()  # r_t = pi(a_t|s_t) / pi_old(a_t|s_t)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    clipfrac = masked_mean((clipped > unclipped).to(logprobs.dtype), mask)
    return loss, clipfrac


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
               clip: float) -> tuple[Tensor, Tensor]:
    """Clipped value loss, 1/2 max((V - R)^2, (V_clip - R)^2), V_clip within `clip` of the old value.

    All [B, T] -> (loss, clipfrac), scalars. Source: OpenAI baselines and lm-human-preferences; not in 1707.06347.
    """
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    unclipped = (values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask)
    moved = (values - old_values).abs() > clip  # else clipped_values differs from values by rounding alone
    clipfrac = masked_mean((moved & (clipped > unclipped)).to(values.dtype), mask)
    return loss, clipfrac


# ------------------------------------------------------------------------------------------------------ the policy


def position_ids(mask: Tensor) -> Tensor:
    """[B, L] attention mask -> [B, L] positions that count real tokens only, so that left padding shifts nothing."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Policy(nn.Module):
    """A causal LM with a value head on its trunk, whose logits are -inf at ids that are no token.

    Pythia's embedding has 50,304 rows and its tokenizer some 50,277 entries: the policy masks the rest, and the pad id,
    itself, so that the sampler and every log-prob agree without knowing of it.

    model: a Hugging Face causal LM;  forbidden [V]: bool, True at ids without a token and at the pad id.
    """

    def __init__(self, model: nn.Module, forbidden: Tensor):
        super().__init__()
        self.model = model.eval()  # dropout off, always: two forwards must be equal
        self.value_head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.value_head.to(model.device)
        self.register_buffer("forbidden", forbidden.to(model.device), persistent=False)

    def forward(self, **inputs):
        """The model's own forward (same keywords, same output object) with the forbidden ids masked in its logits."""
        output = self.model(**inputs)
        output.logits = output.logits.masked_fill(self.forbidden, -torch.inf)
        return output

    def response_forward(self, ids: Tensor, mask: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
        """The training forward: ids, mask [B, Q+T] -> (logits [B, T, V] float32, values [B, T]) of the T states."""
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask),
                                       use_cache=False).last_hidden_state
        hidden = hidden[:, prompt_length - 1:-1]  # [B, T, D]: position Q-1 predicts the first response token
        logits = self.model.get_output_embeddings()(hidden).float()
        values = self.value_head(hidden.float()).squeeze(-1)
        return logits.masked_fill(self.forbidden, -torch.inf), values


# -------------------------------------------------------------------------------------------------------- sampling


def sample_inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """One draw per row: the first id whose cumulative probability exceeds u. probs [B, V], u [B] in [0, 1) -> [B].

    In float32 the cdf can end below 1, so u is scaled by its last entry. Searching to the right keeps u = 0 from an id
    of probability 0, and the minimum keeps a u rounded up to the end from one behind the last possible id. On a GPU
    cumsum is a parallel sum that need not be monotone, so about one draw in 10^8 could still be of probability 0: it
    becomes the likeliest id.
    """
    cdf = probs.float().cumsum(-1)
    total = cdf[:, -1:].contiguous()
    drawn = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
    last_possible = torch.searchsorted(cdf, total)
    drawn = torch.minimum(drawn, last_possible).clamp(max=probs.shape[-1] - 1)
    impossible = probs.gather(-1, drawn) == 0
    return torch.where(impossible, probs.argmax(-1, keepdim=True), drawn).squeeze(-1)


def decoder(model: nn.Module, prompt_mask: Tensor, max_new_tokens: int):
    """The forward of one sampled token -> step(tokens [B, L]) -> logits [B, V] after the last of them.

    model: a Policy or any Hugging Face causal LM; prompt_mask [B, Q]. The first call takes the prompt (L = Q), each
    later one the token drawn last (L = 1); the cache is the step's own. A GPT-NeoX policy has a faster form, which the
    general one is the oracle of; they differ by rounding, which is why old log-probs come from `evaluate` (D4).
    """
    if isinstance(model, Policy) and type(model.model).__name__ == "GPTNeoXForCausalLM":
        return _neox_decoder(model, prompt_mask, max_new_tokens)
    return _cached_decoder(model, prompt_mask)


def _cached_decoder(model: nn.Module, prompt_mask: Tensor):
    """`decoder` by the model's own forward and key/value cache."""
    attention, positions, cache = prompt_mask, position_ids(prompt_mask), None

    def step(tokens: Tensor) -> Tensor:
        nonlocal attention, positions, cache
        if cache is not None:
            positions = positions[:, -1:] + 1
            attention = torch.cat([attention, attention.new_ones(len(tokens), 1)], dim=1)
        output = model(input_ids=tokens, attention_mask=attention, position_ids=positions, past_key_values=cache,
                       use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        return output.logits[:, -1]
    return step


def _neox_decoder(policy: Policy, prompt_mask: Tensor, max_new_tokens: int):
    """`decoder` for GPT-NeoX: the layers called directly, positions, masks and a cache of fixed size made once."""
    model, trunk, config = policy.model, policy.model.gpt_neox, policy.model.config
    rows, longest, heads = len(prompt_mask), prompt_mask.shape[1] + max_new_tokens, config.num_attention_heads
    mask = nn.functional.pad(prompt_mask, (0, max_new_tokens), value=1)  # [B, L] of the whole sequence
    cos, sin = (x[:, :, None, None] for x in trunk.rotary_emb(trunk.embed_in.weight, position_ids(mask)))
    turned = cos.shape[-1]  # leading features of a head that the rotary embedding turns
    first, second = sin.chunk(2, -1)
    sin = torch.cat([-first, second], -1)  # so that a roll by half is rotate_half, sign included
    padding = cos.new_zeros(rows, 1, 1, longest).masked_fill(~mask[:, None, None].bool(), torch.finfo(cos.dtype).min)
    cache = cos.new_zeros(len(trunk.layers), 2, rows, heads, longest, config.hidden_size // heads)
    end = 0

    def step(tokens: Tensor) -> Tensor:
        nonlocal end
        now, end = slice(end, end + tokens.shape[1]), end + tokens.shape[1]
        later = torch.ones(tokens.shape[1], end, dtype=torch.bool, device=tokens.device).triu(now.start + 1)
        bias = padding[..., :end].masked_fill(later, torch.finfo(cos.dtype).min)  # [B, 1, L, end]
        hidden = trunk.embed_in(tokens)  # [B, L, D]
        for layer, (keys, values) in zip(trunk.layers, cache, strict=True):
            attention = layer.attention
            qkv = attention.query_key_value(layer.input_layernorm(hidden)).view(rows, -1, heads, 3, cache.shape[-1])
            rotary = qkv[:, :, :, :2, :turned]
            rotary = rotary * cos[:, now] + rotary.roll(turned // 2, -1) * sin[:, now]
            query, keys[:, :, now] = torch.cat([rotary, qkv[:, :, :, :2, turned:]], -1).permute(3, 0, 2, 1, 4)
            values[:, :, now] = qkv[:, :, :, 2].transpose(1, 2)
            mixed = nn.functional.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end],
                                                               attn_mask=bias)
            attended = attention.dense(mixed.transpose(1, 2).flatten(2))
            source = hidden if config.use_parallel_residual else hidden + attended
            hidden = hidden + attended + layer.mlp(layer.post_attention_layernorm(source))
        logits = model.get_output_embeddings()(trunk.final_layer_norm(hidden[:, -1]))
        return logits.masked_fill(policy.forbidden, -torch.inf)
    return step


@torch.no_grad()
def generate(model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int, *, temperature: float,
             eos_id: int, pad_id: int, generator: torch.Generator | None = None,
             greedy: bool = False) -> tuple[Tensor, Tensor]:
    """Sample responses token by token with a key/value cache, from the whole softmax (no top-k, top-p, minimum length).

    model: a Policy or any Hugging Face causal LM;  prompt_ids, prompt_mask: [B, Q], left-padded.
    -> (response_ids [B, T], response_mask [B, T]), T <= max_new_tokens being the longest response. The mask is 1 up to
    and with EOS; what follows is pad_id with mask 0. greedy=True takes the likeliest token, as
    model.generate(do_sample=False) does. All uniforms are drawn at the start, so a call takes the same amount of
    randomness from the generator whenever its rows end.
    """
    rows = prompt_ids.shape[0]
    source = torch.device("cpu") if generator is None else generator.device
    uniforms = torch.rand(max_new_tokens, rows, generator=generator, device=source).to(prompt_ids.device)
    step, tokens = decoder(model, prompt_mask, max_new_tokens), prompt_ids
    alive = torch.ones(rows, dtype=torch.bool, device=prompt_ids.device)
    response, response_mask = [], []
    for uniform in uniforms:
        logits = step(tokens).float()  # [B, V]
        if greedy:
            token = logits.argmax(-1)
        else:
            token = sample_inverse_cdf((logits / temperature).softmax(-1), uniform)
        response.append(torch.where(alive, token, pad_id))
        response_mask.append(alive)
        alive = alive & (token != eos_id)
        if not alive.any():
            break
        tokens = response[-1][:, None]
    return torch.stack(response, 1), torch.stack(response_mask, 1).to(prompt_mask.dtype)


# ----------------------------------------------------------------------------------------------------- one rollout


@dataclass(frozen=True)
class Rollout:
    """What one PPO update learns from. B rows, Q prompt and T response tokens; nothing here carries a gradient."""

    ids: Tensor  # [B, Q+T] prompt and response
    attention: Tensor  # [B, Q+T] 1 = a real token
    response: Tensor  # [B, T]
    mask: Tensor  # [B, T] 1 up to and with EOS
    logprobs: Tensor  # [B, T] log pi_old(a_t|s_t)
    values: Tensor  # [B, T] V_old(s_t)
    references: Tensor  # [B, T, V] (exact) or [K, B, T] (sampled): see reference_logprobs
    kl: Tensor  # [B, T] the penalty at pi_old, by the estimator that is trained on
    kl_initial: Tensor  # [B, T] exact KL(pi_old || initial policy)
    entropy: Tensor  # [B, T] of pi_old(.|s_t)
    scores: Tensor  # [B] reward of the whole response, without the KL penalty

    @property
    def prompt_length(self) -> int:
        return self.ids.shape[1] - self.response.shape[1]


def entropy(logprobs: Tensor) -> Tensor:
    """[..., V] normalised log-probs -> [...] entropy in nats; an id of probability 0 counts 0, not NaN."""
    return -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0).sum(-1)


def evaluate(policy: Policy, ids: Tensor, attention: Tensor, response: Tensor, mask: Tensor,
             temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The one forward that scores a response, for old and new policy alike (D4).

    ids, attention [b, Q+T], response, mask [b, T] -> (logprobs [b, T] of the response, 0 where mask is 0;
    all_logprobs [b, T, V]; values [b, T]).
    """
    logits, values = policy.response_forward(ids, attention, ids.shape[1] - response.shape[1])
    all_logprobs = (logits / temperature).log_softmax(-1)
    # The pad id has log-prob -inf. It is filled here, not masked later: a gradient of 0 times inf would be NaN.
    logprobs = all_logprobs.gather(-1, response[..., None]).squeeze(-1).masked_fill(mask == 0, 0)
    return logprobs, all_logprobs, values


def reference_logprobs(references: list[Policy], weights: Tensor, ids: Tensor, attention: Tensor, response: Tensor,
                       mask: Tensor, *, rule: str, estimator: str, temperature: float) -> Tensor:
    """What the penalty needs to know of the K references; no gradient, one reference's logits in memory at a time.

    exact:    [B, T, V] the log-probs to take KL to: normalised for `geometric` and `arithmetic`; for `sum` the plain
              weighted sum of log-probs, since sum_j w_j KL(pi||mu_j) = sum_v pi(v) (log pi(v) - sum_j w_j log mu_j(v)).
    k1..k3:   [K, B, T] log-probs of the response tokens, 0 where mask is 0: one per reference for `sum` (each
              estimator is taken per reference), K = 1 otherwise.
    A reference merged under the rule `weights` comes as one model (K = 1).
    """
    prompt_length = ids.shape[1] - response.shape[1]
    logits = (reference.response_forward(ids, attention, prompt_length)[0] for reference in references)
    with torch.no_grad():
        if rule == "sum":
            if estimator == "exact":
                return kl.weighted_logprobs(logits, weights, temperature)
            return torch.stack([kl.token_logprobs(x, response, temperature) for x in logits]).masked_fill(mask == 0, 0)
        cooperative = kl.cooperative_logprobs(logits, weights, "geometric" if rule == "weights" else rule, temperature)
        if estimator == "exact":
            return cooperative
        return cooperative[None].gather(-1, response[None, ..., None]).squeeze(-1).masked_fill(mask == 0, 0)


def penalty_kl(logprobs: Tensor, all_logprobs: Tensor, references: Tensor, weights: Tensor, *, rule: str,
               estimator: str) -> Tensor:
    """KL(policy || references) per token, differentiable in the policy -> [B, T].

    logprobs [B, T] of the response tokens, all_logprobs [B, T, V], references as reference_logprobs made them.
    """
    if estimator == "exact":
        return kl.kl_exact(all_logprobs, references)
    per_reference = kl.kl_sampled(logprobs.expand_as(references), references, estimator)  # [K, B, T]
    if rule == "sum":
        return torch.einsum("k,kbt->bt", weights.to(per_reference), per_reference)
    return per_reference[0]


@torch.no_grad()
def collect(policy: Policy, references: list[Policy], weights: Tensor, initial: Policy, scorer, prompt_ids: Tensor,
            prompt_mask: Tensor, settings, *, eos_id: int, pad_id: int, generator: torch.Generator) -> Rollout:
    """Sample one batch and record all that stays fixed during its update.

    references: K frozen policies, weights [K];  initial: mu_0, for the kl_initial metric only;
    scorer(prompt_ids [B, Q], prompt_mask, response_ids [B, T], response_mask) -> [B];
    prompt_ids, prompt_mask: [B, Q], left-padded.
    """
    response, mask = generate(policy, prompt_ids, prompt_mask, settings.response_length,
                              temperature=settings.temperature, eos_id=eos_id, pad_id=pad_id, generator=generator)
    ids, attention = torch.cat([prompt_ids, response], 1), torch.cat([prompt_mask, mask], 1)
    scores = scorer(prompt_ids, prompt_mask, response, mask)
    ended = ((response == eos_id) & mask.bool()).any(1)
    scores = scores - settings.missing_eos_penalty * (~ended).to(scores.dtype)

    parts = []
    for rows in torch.arange(len(ids), device=ids.device).split(settings.micro_batch):
        part = ids[rows], attention[rows], response[rows], mask[rows]
        logprobs, all_logprobs, values = evaluate(policy, *part, settings.temperature)
        reference = reference_logprobs(references, weights, *part, rule=settings.rule, estimator=settings.estimator,
                                       temperature=settings.temperature)
        penalty = penalty_kl(logprobs, all_logprobs, reference, weights, rule=settings.rule,
                             estimator=settings.estimator)
        kl_initial = kl.kl_exact(all_logprobs, evaluate(initial, *part, settings.temperature)[1])
        parts.append((logprobs, values, reference, penalty, kl_initial, entropy(all_logprobs)))
    logprobs, values, reference, penalty, kl_initial, entropies = zip(*parts, strict=True)
    return Rollout(ids, attention, response, mask, torch.cat(logprobs), torch.cat(values),
                   torch.cat(reference, dim=0 if settings.estimator == "exact" else 1), torch.cat(penalty),
                   torch.cat(kl_initial), torch.cat(entropies), scores)


# ------------------------------------------------------------------------------------------------------ one update


def penalised_rewards(scores: Tensor, kl_tokens: Tensor, mask: Tensor, beta: float, penalty: str) -> Tensor:
    """Reward per token: the score on the last valid token, and the penalty where it belongs in the reward.

    scores [B], kl_tokens [B, T] without gradient, mask [B, T] -> [B, T].
    "loss":    nothing more.
    "reward":  -beta kl_t at token t. With k1 this is 1909.08593, eq. 2, and gives the gradient of the sequence KL.
    "both":    -beta KL_t+1 at token t, the exact KL of the state that token t leads to. The exact KL in the loss is the
               immediate term, this is all the later ones; together the whole gradient of the (undiscounted) sequence
               KL, so with gamma = 1.
    """
    kl_tokens = torch.where(mask.bool(), kl_tokens, 0)
    last = mask.sum(1).long() - 1  # valid tokens are the first ones of a row
    rewards = torch.zeros_like(kl_tokens)
    rewards[torch.arange(len(scores), device=scores.device), last] = scores
    if penalty == "reward":
        rewards = rewards - beta * kl_tokens
    elif penalty == "both":
        rewards[:, :-1] -= beta * kl_tokens[:, 1:]
    return rewards


def ppo_loss(policy: Policy, batch: dict[str, Tensor], weights: Tensor, beta: float, sigma: Tensor,
             settings) -> tuple[Tensor, dict[str, Tensor]]:
    """L = E_t[max(-r A, -clip(r) A)] + c_v L_value + (beta / sigma_A) E_t[KL_t] on some rows of a rollout.

    batch: the tensors of a Rollout for b rows (see `optimise`), with advantages and returns [b, T]; weights [K]; sigma:
    sigma_A, a scalar -> (loss, metrics), all scalars.
    """
    mask = batch["mask"]
    logprobs, all_logprobs, values = evaluate(policy, batch["ids"], batch["attention"], batch["response"], mask,
                                              settings.temperature)
    pg_loss, clipfrac = policy_loss(logprobs, batch["logprobs"], batch["advantages"], mask, settings.clip)
    v_loss, value_clipfrac = value_loss(values, batch["values"], batch["returns"], mask, settings.value_clip)
    loss = pg_loss + settings.vf_coef * v_loss
    log_ratio = (logprobs - batch["logprobs"]).detach()
    if settings.penalty != "reward":
        kl_tokens = penalty_kl(logprobs, all_logprobs, batch["references"], weights, rule=settings.rule,
                               estimator=settings.estimator)
        if settings.estimator != "exact":
            # Tokens come from pi_old. The detached weight pi/pi_old keeps E grad k2 = grad KL(pi||rho).
            kl_tokens = log_ratio.exp() * kl_tokens
        loss = loss + beta / sigma * masked_mean(kl_tokens, mask)
    metrics = {"policy_loss": pg_loss, "value_loss": v_loss, "clipfrac": clipfrac, "value_clipfrac": value_clipfrac,
               # k3 of KL(pi_old || pi): how far this update has moved the policy
               "approx_kl": masked_mean(log_ratio.exp() - 1 - log_ratio, mask)}
    return loss, {name: value.detach() for name, value in metrics.items()}


def optimise(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, weights: Tensor, beta: float,
             settings, generator: torch.Generator) -> dict[str, float]:
    """Several epochs of minibatch gradient steps on one rollout -> metrics, means over its steps.

    weights [K] belong to rollout.references. Each minibatch is summed from micro-batches of settings.micro_batch rows,
    each weighted by its share of the minibatch's valid tokens: the gradient does not depend on how it is cut.
    Raises FloatingPointError, before the weights change, if an advantage or a gradient is not finite.
    """
    rewards = penalised_rewards(rollout.scores, rollout.kl, rollout.mask, beta, settings.penalty)
    advantages, returns = gae(rewards, rollout.values, rollout.mask, settings.gamma, settings.lam)
    if not torch.isfinite(advantages).all():
        raise FloatingPointError("an advantage is not finite")
    sigma = masked_std(advantages, rollout.mask)  # sigma_A: whitens the advantages, and scales beta (D2)
    tensors = {"ids": rollout.ids, "attention": rollout.attention, "response": rollout.response, "mask": rollout.mask,
               "logprobs": rollout.logprobs, "values": rollout.values, "returns": returns,
               "advantages": whiten(advantages, rollout.mask)}
    history: list[dict[str, float]] = []
    for _ in range(settings.epochs):
        order = torch.randperm(len(rollout.ids), generator=generator).to(rollout.ids.device)
        for minibatch in order.chunk(settings.minibatches):
            optimizer.zero_grad()
            totals: dict[str, Tensor] = {}
            for rows in minibatch.split(settings.micro_batch):
                batch = {name: tensor[rows] for name, tensor in tensors.items()}
                exact = settings.estimator == "exact"
                batch["references"] = rollout.references[rows] if exact else rollout.references[:, rows]
                share = rollout.mask[rows].sum() / rollout.mask[minibatch].sum()
                loss, metrics = ppo_loss(policy, batch, weights, beta, sigma, settings)
                (loss * share).backward()
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0) + value * share
            norm = nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the gradient's norm is {norm.item()}")
            optimizer.step()
            history.append({"grad_norm": norm.item()} | {name: value.item() for name, value in totals.items()})
    return {name: sum(step[name] for step in history) / len(history) for name in history[0]}

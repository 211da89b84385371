"""PPO for one language-model agent, written by hand. Knows nothing of federation.

In reading order
    1. masked arithmetic      masked_mean, masked_std, whiten
    2. the algorithm          gae, policy_loss, value_loss            (pure: tensors and floats in, tensors out)
    3. the policy             Policy: a causal LM, a value head on its trunk, and the mask of ids that are no token
    4. GPT-NeoX               neox_states: its layers without transformers' wrappers, for training and sampling
    5. the two [V, D]         Embed, Project: their gradients are summed over micro-batches in place
    6. sampling               sample_inverse_cdf, choose, decoder, generate
    7. one rollout            entropy, evaluate, reference_logprobs, penalty_kl, collect -> Rollout
    8. one update             penalised_rewards, TokenTerms, ppo_loss, optimise

Three things have a fast form beside the readable one, which is its oracle in the tests: the forward of GPT-NeoX
(`neox_states`; else the model's own), the gradients of the two largest matrices (`Embed`, `Project`; else nn.Embedding
and nn.Linear), and that of log-prob and exact KL (`TokenTerms`; else `evaluate` and `penalty_kl`).

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

import contextlib
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

    model: a Hugging Face causal LM with float32 weights;  forbidden [V]: bool, True at ids without a token and at the
    pad id;  dtype: of the matrix products of every forward (on a CPU attention's own are float32 in any case). The
    weights, their gradients, the softmax over the vocabulary and the values stay float32, so that with bfloat16 the
    small steps of Adam do not round to nothing.
    """

    def __init__(self, model: nn.Module, forbidden: Tensor, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.dtype = model.eval(), dtype  # dropout off, always: two forwards must be equal
        self.value_head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.value_head.to(model.device)
        self.register_buffer("forbidden", forbidden.to(model.device), persistent=False)
        self.register_buffer("forbidden_ids", self.forbidden.nonzero().flatten(), persistent=False)

    def precision(self) -> torch.autocast:
        """The context of a forward; while it is open, each trained weight is cast once, a frozen one at every use."""
        return torch.autocast(self.forbidden.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def masked(self, logits: Tensor) -> Tensor:
        """logits [..., V] with -inf at the forbidden ids, in place and past autograd: their gradient is 0 anyway."""
        logits.detach().index_fill_(-1, self.forbidden_ids, -torch.inf)
        return logits

    def forward(self, **inputs):
        """The model's own forward (same keywords, same output object) with the forbidden ids masked in its logits."""
        with self.precision():
            output = self.model(**inputs)
        output.logits = self.masked(output.logits)
        return output

    def response_forward(self, ids: Tensor, mask: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
        """The training forward: ids, mask [B, Q+T] -> (logits [B, T, V] float32, values [B, T]) of the T states.

        Position Q-1 predicts the first response token, and the last position predicts nothing that is read.
        """
        with self.precision():
            hidden = trunk_states(self.model.base_model, ids, mask, slice(prompt_length - 1, -1), self.dtype)
            head = self.model.get_output_embeddings()
            plain = self.dtype != torch.float32 or head.bias is not None
            logits = head(hidden) if plain else Project.apply(hidden, head.weight)
        values = self.value_head(hidden.float()).squeeze(-1)
        return self.masked(logits.float()), values


def trunk_states(trunk: nn.Module, ids: Tensor, mask: Tensor, kept: slice, dtype: torch.dtype) -> Tensor:
    """ids, mask [B, L] -> the trunk's last hidden states at the positions `kept`, [B, kept, D], contiguous.

    trunk: a Hugging Face causal LM's base_model;  dtype: of the products, as the autocast around the call has it.
    """
    if is_neox(trunk):
        return neox_states(trunk, ids, *neox_rotation(trunk, mask), causal_bias(mask, dtype), kept)
    return trunk(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask),
                 use_cache=False).last_hidden_state[:, kept].contiguous()


# --------------------------------------------------------------------------------------- GPT-NeoX, layer by layer


def is_neox(trunk: nn.Module) -> bool:
    """The trunk of a GPT-NeoX (Pythia) has the forward below, of which its own is the oracle.

    transformers' wrappers cost a tiny model as much again as its arithmetic. The two differ by rounding.
    """
    return type(trunk).__name__ == "GPTNeoXModel"


def causal_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """mask [B, L] -> [B, 1, L, L], added to attention scores: the lowest finite number at pads and at later tokens.

    Finite, because a pad may see pads only: its state is never read, but must not be NaN. Its type is attention's:
    `dtype` with CUDA, else float32: on a CPU attention's gradient takes 2.5 times as long in bfloat16.
    """
    length, dtype = mask.shape[1], dtype if mask.is_cuda else torch.float32
    seen = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() & mask[:, None, None].bool()
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, torch.finfo(dtype).min)


def neox_rotation(trunk: nn.Module, mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask [B, L] -> cos, sin [B, L, 1, 1, R] of the R turned features; sin has rotate_half's sign in it."""
    cos, sin = (x[:, :, None, None] for x in trunk.rotary_emb(trunk.embed_in.weight, position_ids(mask)))
    first, second = sin.chunk(2, -1)
    return cos, torch.cat([-first, second], -1)  # so that a roll by half is rotate_half


def neox_states(trunk: nn.Module, tokens: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, kept: slice,
                cache: Tensor | None = None, at: Tensor | None = None) -> Tensor:
    """tokens [B, L] -> last hidden states at the positions `kept`, [B, kept, D]: the last layer makes no others.

    cos, sin [B, L, 1, 1, R] at the tokens; bias [B, 1, L, E], E being what they attend to. With a cache
    [layers, 2, B, heads, longest, head size], keys and values are written there at the positions `at` [L], and the
    first E are read.
    """
    heads, turned = trunk.config.num_attention_heads, cos.shape[-1]
    hidden = Embed.apply(tokens, trunk.embed_in.weight)
    for index, layer in enumerate(trunk.layers):
        attention = layer.attention
        qkv = attention.query_key_value(layer.input_layernorm(hidden)).unflatten(-1, (heads, 3, -1))
        rotary = qkv[:, :, :, :2, :turned]
        rotary = rotary * cos + rotary.roll(turned // 2, -1) * sin
        query, key = torch.cat([rotary, qkv[:, :, :, :2, turned:]], -1).permute(3, 0, 2, 1, 4)
        value = qkv[:, :, :, 2].transpose(1, 2)  # [B, heads, L, head size], as query and key
        if cache is not None:
            stored = cache[index, :, :, :, :bias.shape[-1]]
            key, value = (memory.index_copy_(2, at, new.to(memory.dtype))
                          for memory, new in zip(stored, (key, value), strict=True))
        if index == len(trunk.layers) - 1:
            query, hidden, bias = query[:, :, kept], hidden[:, kept], bias[:, :, kept]
        with torch.autocast(bias.device.type, enabled=False):
            mixed = nn.functional.scaled_dot_product_attention(query.to(bias.dtype), key.to(bias.dtype),
                                                               value.to(bias.dtype), attn_mask=bias)
        attended = attention.dense(mixed.transpose(1, 2).flatten(2))
        source = hidden if trunk.config.use_parallel_residual else hidden + attended
        hidden = hidden + attended + layer.mlp(layer.post_attention_layernorm(source))
    return trunk.final_layer_norm(hidden)


# ----------------------------------------------------------------------------------------------------- the two [V, D]


class Embed(torch.autograd.Function):
    """ids [B, L], weight [V, D] -> weight[ids], [B, L, D]; the gradient is added to weight.grad, if there is one.

    nn.Embedding's is made anew for each micro-batch, [V, D], nearly all of it zeros, and then added. (So that
    torch.autograd.grad works as long as weight.grad is None alone; `backward` always.)
    """

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor | None]:
        ids, weight = ctx.saved_tensors
        total = torch.zeros_like(weight) if weight.grad is None else weight.grad
        total.index_add_(0, ids.flatten(), grad.flatten(0, 1))
        return None, total if weight.grad is None else None


class Project(torch.autograd.Function):
    """hidden [B, L, D], weight [V, D] -> logits [B, L, V]; the gradient is added to weight.grad, as in `Embed`."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return nn.functional.linear(hidden, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:  # a frozen head
            return grad @ weight, None
        factors = grad.flatten(0, 1).T, hidden.flatten(0, 1)
        if weight.grad is None:
            return grad @ weight, torch.mm(*factors)
        weight.grad.addmm_(*factors)
        return grad @ weight, None


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


def choose(logits: Tensor, uniform: Tensor, temperature: float, greedy: bool) -> Tensor:
    """logits [B, V], uniform [B] in [0, 1) -> the next token of each row, [B]: sampled, or the likeliest."""
    logits = logits.float()
    return logits.argmax(-1) if greedy else sample_inverse_cdf((logits / temperature).softmax(-1), uniform)


def uniforms(max_new_tokens: int, rows: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """[T, B] in [0, 1), drawn where the generator is: a seed gives the same ones on every device."""
    source = torch.device("cpu") if generator is None else generator.device
    return torch.rand(max_new_tokens, rows, generator=generator, device=source).to(device)


def decoder(model: nn.Module, prompt_mask: Tensor, max_new_tokens: int):
    """The forward of one sampled token -> step(tokens [B, L]) -> logits [B, V] after the last of them.

    model: a Policy or any Hugging Face causal LM; prompt_mask [B, Q]. The first call takes the prompt (L = Q), each
    later one the token drawn last (L = 1); the cache is the step's own. A GPT-NeoX policy has a faster form, which the
    general one is the oracle of; they differ by rounding, which is why old log-probs come from `evaluate` (D4).
    """
    if isinstance(model, Policy) and is_neox(model.model.base_model):
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
    """`decoder` for GPT-NeoX: positions, masks and a cache of fixed size made once."""
    trunk, config = policy.model.base_model, policy.model.config
    mask = nn.functional.pad(prompt_mask, (0, max_new_tokens), value=1)  # [B, L] of the whole sequence
    cos, sin = neox_rotation(trunk, mask)
    bias, positions, end = causal_bias(mask, policy.dtype), torch.arange(mask.shape[1], device=mask.device), 0
    cache = bias.new_zeros(config.num_hidden_layers, 2, len(mask), config.num_attention_heads, mask.shape[1],
                           config.hidden_size // config.num_attention_heads)

    def step(tokens: Tensor) -> Tensor:
        nonlocal end
        now, end = slice(end, end + tokens.shape[1]), end + tokens.shape[1]
        with policy.precision():
            hidden = neox_states(trunk, tokens, cos[:, now], sin[:, now], bias[:, :, now, :end], slice(-1, None), cache,
                                 positions[now])
            logits = policy.model.get_output_embeddings()(hidden[:, 0])
        return policy.masked(logits.float())
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
    step, tokens = decoder(model, prompt_mask, max_new_tokens), prompt_ids
    alive = torch.ones(rows, dtype=torch.bool, device=prompt_ids.device)
    response, response_mask = [], []
    with model.precision() if isinstance(model, Policy) else contextlib.nullcontext():  # one, so that casts are kept
        for uniform in uniforms(max_new_tokens, rows, generator, prompt_ids.device):
            token = choose(step(tokens), uniform, temperature, greedy)
            response.append(torch.where(alive, token, pad_id))
            response_mask.append(alive)
            alive = alive & (token != eos_id)
            if not alive.any():
                break
            tokens = response[-1][:, None]
    return torch.stack(response, 1), torch.stack(response_mask, 1).to(prompt_mask.dtype)


# ----------------------------------------------------------------------------------------------------- one rollout


CHUNK = 2**21  # numbers of [states, V] that are worked on at a time: few enough to stay in a processor's cache


def by_states(*tensors: Tensor):
    """tensors [..., X], the first one [..., V] -> tuples of views [n, X], n states at a time.

    What is computed from [..., V] makes several buffers of that size: made of all states at once, they are most of the
    memory of an update, and are read and written from there.
    """
    size = max(1, CHUNK // tensors[0].shape[-1])
    return zip(*(tensor.reshape(-1, tensor.shape[-1]).split(size) for tensor in tensors), strict=True)


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
    parts = [-torch.where(x > -torch.inf, x.exp() * x, 0).sum(-1) for x, in by_states(logprobs)]
    return torch.cat(parts).view(logprobs.shape[:-1])


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
        parts = [kl.kl_exact(*part) for part in by_states(all_logprobs, references)]
        return torch.cat(parts).view(logprobs.shape)
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

    parts, exact = [], settings.estimator == "exact"
    for rows in torch.arange(len(ids), device=ids.device).split(settings.micro_batch):
        part = ids[rows], attention[rows], response[rows], mask[rows]
        logprobs, all_logprobs, values = evaluate(policy, *part, settings.temperature)
        reference = reference_logprobs(references, weights, *part, rule=settings.rule, estimator=settings.estimator,
                                       temperature=settings.temperature)
        penalty = penalty_kl(logprobs, all_logprobs, reference, weights, rule=settings.rule,
                             estimator=settings.estimator)
        if exact and len(references) == 1 and references[0] is initial:  # classic PPO: both are the same number
            kl_initial = penalty
        else:
            kl_initial = penalty_kl(logprobs, all_logprobs, evaluate(initial, *part, settings.temperature)[1], weights,
                                    rule="geometric", estimator="exact")
        parts.append((logprobs, values, reference, penalty, kl_initial, entropy(all_logprobs)))
    logprobs, values, reference, penalty, kl_initial, entropies = zip(*parts, strict=True)
    return Rollout(ids, attention, response, mask, torch.cat(logprobs), torch.cat(values),
                   torch.cat(reference, dim=0 if exact else 1), torch.cat(penalty),
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


class TokenTerms(torch.autograd.Function):
    """log pi(a|s) [b, T] and exact KL(pi||rho) [b, T] from logits [b, T, V], which are overwritten.

    The fast form of `evaluate` and `penalty_kl` for training: autograd would keep four buffers of [b, T, V] and read
    and write each from main memory; here there is one, which holds first the log-probs, then the gradient (so that
    backward can be called once). With
    x = log pi - log rho, d KL / d logit_v = pi_v (x_v - KL) and d log pi(a) / d logit_v = 1[v = a] - pi_v.

    tokens [b, T]; references [b, T, V] as `reference_logprobs` makes them for the exact estimator.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, references: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        assert logits.is_contiguous(), "else the views below would be copies"
        parts = []
        for x, reference in by_states(logits, references):
            logprobs = x.copy_((x / temperature).log_softmax(-1))
            parts.append(torch.linalg.vecdot(*TokenTerms.factors(logprobs, reference)))
        kl_tokens = torch.cat(parts).view(tokens.shape)
        ctx.save_for_backward(logits, tokens, references, kl_tokens)
        ctx.temperature = temperature
        return logits.gather(-1, tokens[..., None]).squeeze(-1), kl_tokens

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs: Tensor, grad_kl: Tensor) -> tuple[Tensor, None, None, None]:
        all_logprobs, tokens, references, kl_tokens = ctx.saved_tensors
        columns = [tensor[..., None] for tensor in (tokens, kl_tokens, grad_logprobs, grad_kl)]
        for logprobs, reference, token, value, on_logprob, on_kl in by_states(all_logprobs, references, *columns):
            pi, x = TokenTerms.factors(logprobs, reference)
            grad = pi.mul_(x.sub_(value).mul_(on_kl).sub_(on_logprob)).scatter_add_(-1, token, on_logprob)
            torch.div(grad, ctx.temperature, out=logprobs)
        return all_logprobs, None, None, None

    @staticmethod
    def factors(logprobs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """pi and x, [n, V]; x is 0 where pi is, as in `kl.kl_exact`."""
        pi = logprobs.exp()
        return pi, torch.where(pi > 0, logprobs - reference, 0)


def loss_terms(policy: Policy, batch: dict[str, Tensor], weights: Tensor,
               settings) -> tuple[Tensor, Tensor | None, Tensor]:
    """batch and weights as for `ppo_loss` -> (logprobs, KL's term of the loss if it has one, values), each [b, T]."""
    ids, attention, response, mask = (batch[name] for name in ("ids", "attention", "response", "mask"))
    charged = settings.penalty != "reward"
    if charged and settings.estimator == "exact":
        logits, values = policy.response_forward(ids, attention, ids.shape[1] - response.shape[1])
        logprobs, kl_tokens = TokenTerms.apply(logits, response, batch["references"], settings.temperature)
        return logprobs.masked_fill(mask == 0, 0), kl_tokens, values  # filled here, as in `evaluate`
    logprobs, all_logprobs, values = evaluate(policy, ids, attention, response, mask, settings.temperature)
    if not charged:
        return logprobs, None, values
    kl_tokens = penalty_kl(logprobs, all_logprobs, batch["references"], weights, rule=settings.rule,
                           estimator=settings.estimator)
    # Tokens come from pi_old. The detached weight pi/pi_old keeps E grad k2 = grad KL(pi||rho).
    return logprobs, (logprobs - batch["logprobs"]).detach().exp() * kl_tokens, values


def ppo_loss(policy: Policy, batch: dict[str, Tensor], weights: Tensor, beta: float, sigma: Tensor,
             settings) -> tuple[Tensor, dict[str, Tensor]]:
    """L = E_t[max(-r A, -clip(r) A)] + c_v L_value + (beta / sigma_A) E_t[KL_t] on some rows of a rollout.

    batch: the tensors of a Rollout for b rows (see `optimise`), with advantages and returns [b, T]; weights [K]; sigma:
    sigma_A, a scalar -> (loss, metrics), all scalars.
    """
    mask = batch["mask"]
    logprobs, kl_tokens, values = loss_terms(policy, batch, weights, settings)
    pg_loss, clipfrac = policy_loss(logprobs, batch["logprobs"], batch["advantages"], mask, settings.clip)
    v_loss, value_clipfrac = value_loss(values, batch["values"], batch["returns"], mask, settings.value_clip)
    loss = pg_loss + settings.vf_coef * v_loss
    if kl_tokens is not None:
        loss = loss + beta / sigma * masked_mean(kl_tokens, mask)
    log_ratio = (logprobs - batch["logprobs"]).detach()
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
        order = torch.randperm(len(rollout.ids), generator=generator)
        for minibatch in order.chunk(settings.minibatches):
            minibatch = minibatch.sort().values  # within a minibatch the order changes nothing
            optimizer.zero_grad()
            totals: dict[str, Tensor] = {}
            for rows in minibatch.split(settings.micro_batch):
                if rows[-1] - rows[0] == len(rows) - 1:
                    rows = slice(rows[0], rows[-1] + 1)  # a view: nothing of [b, T, V] is copied
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
    optimizer.zero_grad()  # the next rollout needs the memory
    return {name: sum(step[name] for step in history) / len(history) for name in history[0]}

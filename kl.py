# SPDX-License-Identifier: MIT
r"""The generalized KL penalty: hold a PPO or GRPO policy near several reference policies at once.

Copy this file into your own trainer: it needs torch and nothing else, and knows nothing of what is
around it. The penalty is made in two steps:
    reference(...)   what it needs to know of the K references: once per batch, no graph
    penalty(...)     KL of the policy to it, per token, differentiable: at every gradient step
`generalized_kl` is one after the other. `logprobs_and_kl`, which the trainer of this project calls
at every gradient step, is the second one with log π(a), in less memory. How a rule or an estimator
is computed stands here alone.

Dimension key: K references, V vocabulary, ... any leading shape (none, [T], [B, T]); X what the
penalty keeps of the references at a state: V numbers, K, or 1.
Symbols: π the policy; μ_1..μ_K the references; w_1..w_K their weights, ≥ 0 with sum 1 (a row of
the communication matrix); ρ the cooperative reference made of them; s the text so far; a the next
token; x = log π(a|s) − log ρ(a|s).

The rules (several references: 2502.01203, 1707.04175; averaged parameters: 1602.05629, 2406.16768)
  geometric   log ρ = Σ_j w_j log μ_j − log Z(s), the softmax of the weighted logits. A veto: a
              token that one reference with w_j > 0 gives no mass gets none. If that leaves no token
              at all: ValueError.
  sum         the penalty Σ_j w_j KL(π‖μ_j), each estimator per reference. = KL(π‖ρ_geometric) −
              log Z(s); −log Z(s) ≥ 0 is the price of references that disagree. Z does not depend on
              π: as exact KL in the loss, `sum` and `geometric` have one gradient; in the reward,
              `sum` also steers away from states where the references disagree.
  arithmetic  ρ = Σ_j w_j μ_j. Its penalty is bounded: KL(π‖ρ) ≤ KL(π‖μ_j) − log w_j for each j.
              Never above `sum`.
  weights     ρ = the model with parameters Σ_j w_j θ_j (`average_weights`), the only reference.
One reference, or K identical ones: all four are PPO's ordinary KL(π‖μ).

The estimators of KL(π‖ρ) at one state
  exact = Σ_v π(v)(log π(v) − log ρ(v))      k1 = x      k2 = x²/2      k3 = e^(−x) − 1 + x
(k1, k2, k3: Schulman, "Approximating KL divergence", 2020; exact: 2504.10637.)
Value, a ~ π: E k1 = E k3 = exact; E k2 is not. (k3 wants ρ normalised: with ρ·Z it is off by
Z − 1 − log Z.) Cost: exact needs a few [..., V] buffers and has no sampling noise; k1, k2, k3 work
on one token's log-probs. K references cost K of their forwards and the memory of one at a time;
under `weights`, one forward.

Gradient: which estimator is right where (2506.09477, 2510.01555, 2512.21852). By the product rule
∇E[Σ_t c_t] of a per-token cost c has two parts: π changes which tokens and states come, and c
itself changes, E[Σ_t ∇c_t]. A cost in the reward (detached, through returns) gives the first part;
a cost in the loss (differentiated, the tokens a ~ π held fixed) gives the second, the immediate
term: that today's token changes tomorrow's states is left out.
         in the reward                                 in the loss
  k1     RIGHT: ∇ of the sequence KL, as E∇k1 = 0      wrong: E∇k1 = 0, noise without a pull
  k2     wrong: per state ∇(E[x²/2] − KL(π‖ρ)): near   RIGHT: ∇KL(π‖ρ) of each state
         ρ there is no first-order pull
  k3     wrong: per state ∇(KL(π‖ρ) − KL(ρ‖π)): no     the other direction, ∇KL(ρ‖π) of each
         first-order pull near ρ either                state; with `sum`, ∇KL(ρ_arithmetic‖π)
  exact  wrong alone: KL(s_t) does not depend on a_t,  RIGHT: ∇KL(π‖ρ) of each state, no noise
         so the current token is missing
Both places at once are RIGHT too: exact in the loss plus the exact KL of *later* states (t' > t) in
the reward is the whole ∇ of the sequence KL, as a rule with less variance than k1 in the reward.
Later epochs, a ~ π_old: exact in the loss needs no token weight. Times π/π_old *detached*, k2 and
k3 keep the gradients above; times π/π_old *differentiated*, k1 and k3 both give ∇KL(π‖ρ) and k2 is
wrong.

>>> import torch
>>> from kl import generalized_kl
>>> logits = torch.zeros(2, 5, 4, requires_grad=True)            # [B, T, V] the policy: uniform
>>> peers = (torch.eye(4)[j].expand(2, 5, 4) for j in range(3))  # K = 3, made one at a time
>>> kl = generalized_kl(logits, peers, [0.4, 0.3, 0.3])          # [B, T] geometric, exact
>>> (0.05 * kl.mean()).backward()                                # to be added to a policy loss
>>> tokens, peer = torch.ones(2, 5, dtype=torch.long), torch.eye(4)[1].expand(2, 5, 4)
>>> k1 = generalized_kl(logits, [peer], [1.0], estimator="k1", tokens=tokens)  # for the reward
>>> [round(kl.mean().item(), 4), round(k1.mean().item(), 4)]
[0.0107, -0.6426]
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

RULES = ("geometric", "sum", "arithmetic", "weights")
ESTIMATORS = ("exact", "k1", "k2", "k3")

References = Iterable[Tensor]  # K tensors [..., V]: a list, one stacked [K, ..., V], a generator
Weights = Sequence[float] | Tensor  # K numbers ≥ 0 with sum 1, within 1e-6


# ----------------------------------------------------------- the penalty, in two steps and in one


def reference(
    reference_logits: References, weights: Weights, *, rule: str = "geometric",
    estimator: str = "exact", tokens: Tensor | None = None, temperature: float = 1.0,
) -> Tensor:
    """Step one: what the penalty has to know of K references [..., V] with K weights -> [..., X].

    exact:       X = V, the log-probs that KL is taken to: log ρ, or for `sum` Σ_j w_j log μ_j, not
                 normalised, since Σ_j w_j KL(π‖μ_j) = Σ_v π(v)(log π(v) − Σ_j w_j log μ_j(v)).
    k1, k2, k3:  X = 1, log ρ(a) of the tokens [...] drawn from the policy; for `sum`, which
                 estimates each divergence by itself, X = K, log μ_j(a) (0 where w_j = 0).
    References are taken in turn without a graph (a generator's body runs under no_grad), and each
    is let go before the next is made. One with weight 0 is drawn and ignored, whatever it holds.
    """
    _check_choice("rule", rule, RULES)
    _check_choice("estimator", estimator, ESTIMATORS)
    if estimator != "exact" and tokens is None:
        raise ValueError(f"tokens, drawn from the policy, are needed by estimator={estimator!r}")
    if rule != "sum":
        log_rho = cooperative_logprobs(reference_logits, weights, rule, temperature)  # [..., V]
        return log_rho if estimator == "exact" else _gather(log_rho, tokens)[..., None]
    if estimator == "exact":
        return _weighted_logprobs(reference_logits, weights, temperature)  # [..., V]

    def stack(columns: list | None, weight: float, logits: Tensor) -> list:
        return (columns or []) + [token_logprobs(logits, tokens, temperature)]  # log μ_j(a), [...]

    heard = _fold(stack, reference_logits, weights)  # one column for each w_j > 0
    zero, columns = torch.zeros_like(heard[0]), iter(heard)
    return torch.stack([next(columns) if w > 0 else zero for w in _check_weights(weights)], -1)


def penalty(
    logprobs: Tensor, reference: Tensor, weights: Weights, *, rule: str = "geometric",
    estimator: str = "exact", tokens: Tensor | None = None,
) -> Tensor:
    """Step two: KL(π‖ρ) at each state, differentiable in the policy -> [...].

    logprobs [..., V]: the policy's, normalised, at the references' temperature.
    reference [..., X]: what `reference` made with the same weights, rule, estimator and tokens.
    The table at the top of this file says where each estimator belongs.
    """
    _check_choice("rule", rule, RULES)
    _check_choice("estimator", estimator, ESTIMATORS)
    if estimator == "exact":
        return kl_exact(logprobs, reference)
    if tokens is None:
        raise ValueError(f"tokens, drawn from the policy, are needed by estimator={estimator!r}")
    return _sampled_penalty(_gather(logprobs, tokens), reference, weights, rule, estimator)


def _sampled_penalty(
    chosen: Tensor, reference: Tensor, weights: Weights, rule: str, estimator: str
) -> Tensor:
    """k1, k2 or k3 from log π(a) [...] and reference [..., X] -> [...]."""
    if rule != "sum":
        return kl_sampled(chosen, reference.squeeze(-1), estimator)
    _check_shape("reference", reference.shape[-1:], (len(weights),))
    return sum(weight * kl_sampled(chosen, column, estimator)  # Σ_j w_j k(log π(a) − log μ_j(a))
               for weight, column in zip(_check_weights(weights), reference.unbind(-1), strict=True)
               if weight > 0)


def logprobs_and_kl(
    logits: Tensor, reference: Tensor, weights: Weights, *, tokens: Tensor,
    rule: str = "geometric", estimator: str = "exact", temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Step two from logits [..., V]: all that PPO's loss needs -> (log π(a), KL(π‖ρ)), [...] each.

    reference [..., X] as in `penalty`, tokens [...]. Equal to `token_logprobs` and `penalty`. With
    the exact estimator, which does not read weights and rule, the gradient is written by hand
    (`_LogprobsAndKL`): two buffers of [..., V] are kept for it and one is made, the result; in
    autograd's way three are kept and three made.
    """
    _check_choice("rule", rule, RULES)
    _check_choice("estimator", estimator, ESTIMATORS)
    if estimator != "exact":
        chosen = token_logprobs(logits, tokens, temperature)
        return chosen, _sampled_penalty(chosen, reference, weights, rule, estimator)
    _check_shape("reference", reference.shape, logits.shape)
    _check_shape("tokens", tokens.shape, logits.shape[:-1])
    _check_temperature(temperature)
    flat = (x.reshape(-1, x.shape[-1]) for x in (_upcast(logits), reference, tokens[..., None]))
    chosen, kl = _LogprobsAndKL.apply(*flat, temperature)
    return chosen.view(tokens.shape), kl.view(tokens.shape)


def generalized_kl(
    logits: Tensor, reference_logits: References, weights: Weights, *, rule: str = "geometric",
    estimator: str = "exact", tokens: Tensor | None = None, temperature: float = 1.0,
) -> Tensor:
    """The penalty of each token: policy logits [..., V], K references, K weights -> [...].

    k1, k2 and k3 need tokens [...] drawn from the policy; exact does not read them. One temperature
    for all. Differentiable in logits alone.
    """
    options = {"rule": rule, "estimator": estimator, "tokens": tokens}

    def fitting(each: Tensor) -> Tensor:
        _check_shape("reference_logits", each.shape, logits.shape)
        return each

    # By map, which lets each reference go before it asks for the next.
    made = reference(map(fitting, reference_logits), weights, temperature=temperature, **options)
    return penalty(_logprobs(logits, temperature), made, weights, **options)


# ---------------------------------------------------------- the cooperative reference, by its rule


def cooperative_logprobs(
    reference_logits: References, weights: Weights, rule: str = "geometric",
    temperature: float = 1.0,
) -> Tensor:
    """log ρ, [..., V], normalised, under every rule but `sum`. No graph; references as above.

    The temperature is applied to each reference: with `geometric` that is ρ at this temperature,
    with `arithmetic` it is not. The check for disjoint supports waits once for the device.
    """
    _check_choice("rule", rule, RULES)
    if rule == "sum":
        raise ValueError(
            "rule='sum' is a sum of K divergences and has no single cooperative reference: use "
            "generalized_kl(rule='sum'), or reference and penalty"
        )
    if rule == "arithmetic":
        return _fold(_mix(temperature), reference_logits, weights)  # log Σ_j w_j μ_j
    if rule == "weights" and len(_check_weights(weights)) > 1:
        raise ValueError(
            "rule='weights' takes one reference, the model with the averaged parameters: make it "
            "with average_weights"
        )
    total = _weighted_logprobs(reference_logits, weights, temperature)  # [..., V] log ρ + log Z
    if (total.amax(-1) == -math.inf).any():
        raise ValueError(
            "reference_logits have disjoint supports: at some position no token is possible under "
            "all of them, which leaves rule='geometric' nothing; use one mask for all, or "
            "rule='arithmetic'"
        )
    return torch.log_softmax(total, -1)  # log Z(s) = log Σ_v Π_j μ_j(v)^w_j


def _weighted_logprobs(references: References, weights: Weights, temperature: float) -> Tensor:
    """Σ_j w_j log μ_j, [..., V], *un*normalised."""

    def add(total: Tensor | None, weight: float, logits: Tensor) -> Tensor:
        logprobs = _logprobs(logits, temperature)  # [..., V] log μ_j
        return weight * logprobs if total is None else torch.add(total, logprobs, alpha=weight)

    return _fold(add, references, weights)


def _mix(temperature: float) -> Callable:
    """The step of a fold that makes log Σ_j w_j μ_j, [..., V]."""

    def step(total: Tensor | None, weight: float, logits: Tensor) -> Tensor:
        logprobs = _logprobs(logits, temperature) + math.log(weight)  # [..., V] log(w_j μ_j)
        return logprobs if total is None else torch.logaddexp(total, logprobs)

    return step


# ------------------------------------------------------------------------ one state: the estimators


def kl_exact(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(π‖ρ) = Σ_v π(v)(log π(v) − log ρ(v)): [..., V], [..., V] -> [...]. No gradient to ρ.

    0 · log 0 = 0: where π(v) is 0 (−inf, or underflow) the term and its gradient are 0, whatever
    ρ(v) is. A token that π can produce and ρ cannot makes the value +inf and the gradient not
    finite. ref_logprobs may be unnormalised, log ρ + log Z: the value is then KL(π‖ρ) − log Z, and
    the gradient is the same.
    """
    _check_shape("ref_logprobs", ref_logprobs.shape, logprobs.shape)
    logprobs = _upcast(logprobs)
    pi = logprobs.exp()  # [..., V]
    # Selected, not multiplied by 0: −inf − (−inf) is NaN, which has no part in value or gradient.
    x = torch.where(pi > 0, logprobs - ref_logprobs.detach(), 0)  # [..., V] log π(v) − log ρ(v)
    return _dot(pi, x)


def kl_sampled(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """k1, k2 or k3 of KL(π‖ρ) from log π(a) and log ρ(a), a ~ π: [...], [...] -> [...].

    ρ must be normalised, and gets no gradient. A token that both give no mass (a masked pad id)
    gives 0 and no gradient, not NaN.
    """
    _check_choice("estimator", estimator, ESTIMATORS[1:])
    _check_shape("ref_logprobs", ref_logprobs.shape, logprobs.shape)
    logprobs = _upcast(logprobs)
    ref_logprobs = ref_logprobs.detach()
    impossible = (logprobs == -math.inf) & (ref_logprobs == -math.inf)  # [...]
    x = logprobs.masked_fill(impossible, 0.0) - ref_logprobs.masked_fill(impossible, 0.0)  # [...]
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x.square() / 2
    return torch.expm1(-x) + x  # k3 = e^(−x) − 1 + x; expm1 keeps the digits of a small x


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(a|s) of the given tokens: logits [..., V], tokens [...] -> [...], differentiable."""
    return _gather(_logprobs(logits, temperature), tokens)


# How many numbers of a tensor [..., V] are worked on at a time: on a CPU few enough to stay in its
# cache, on a GPU many, since each piece is launched anew.
CPU_CHUNK, GPU_CHUNK = 2**21, 2**25


def at_a_time(x: Tensor) -> int:
    """How many entries of x's first dimension to work on at a time."""
    chunk = CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
    return max(1, chunk // max(1, x.shape[1:].numel()))


class _LogprobsAndKL(torch.autograd.Function):
    """(log π(a), exact KL(π‖ρ)) of n states, differentiable in the logits z, π = softmax(z / τ).

    With x(u) = log π(u) − log ρ(u), so that KL = Σ_u π(u) x(u):
        ∂log π(a)/∂z_v = (1[v = a] − π(v)) / τ, the softmax's derivative
        ∂KL/∂z_v = Σ_u π(u) (x(u) + 1) ∂log π(u)/∂z_v = π(v) (x(v) − KL) / τ
    The 1 is gone since Σ_u ∂π(u) = 0, and so is a constant in log ρ (the rule `sum`).
    """

    @staticmethod
    def forward(
        ctx, logits: Tensor, reference: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """logits, reference [n, V], tokens [n, 1] -> two [n]."""
        pi, x = torch.empty_like(logits), torch.empty_like(logits)  # [n, V]
        chosen, kl = [], []
        for z, log_rho, token, pi_part, x_part in zip(
                *(tensor.split(at_a_time(logits)) for tensor in (logits, reference, tokens, pi, x)),
                strict=True):
            logprobs = torch.log_softmax(z if temperature == 1 else z / temperature, -1)
            chosen.append(logprobs.gather(-1, token).squeeze(-1))
            torch.exp(logprobs, out=pi_part)
            # As in kl_exact: selected, so that −inf − (−inf) has no part.
            torch.sub(logprobs, log_rho, out=x_part).masked_fill_(pi_part == 0, 0)
            kl.append(_dot(pi_part, x_part))
        chosen, kl = torch.cat(chosen), torch.cat(kl)
        ctx.save_for_backward(pi, x, tokens, kl)
        ctx.temperature = temperature
        return chosen, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_chosen: Tensor, grad_kl: Tensor) -> tuple[Tensor, None, None, None]:
        pi, x, tokens, kl = ctx.saved_tensors
        to_chosen, to_kl = (grad[:, None] / ctx.temperature for grad in (grad_chosen, grad_kl))
        shift, grad = to_kl * kl[:, None] + to_chosen, torch.empty_like(x)  # [n, 1], [n, V]
        for pi_part, x_part, g, part_shift, out in zip(
                *(tensor.split(at_a_time(x)) for tensor in (pi, x, to_kl, shift, grad)),
                strict=True):
            # π (g_KL (x − KL) − g_chosen) / τ; the term of 1[v = a] follows.
            torch.mul(x_part, g, out=out).sub_(part_shift).mul_(pi_part)
        return grad.scatter_add_(-1, tokens, to_chosen), None, None, None


# ------------------------------------------------------------------------------ the rule `weights`


@torch.no_grad()
def average_weights(
    state_dicts: Sequence[Mapping[str, Tensor]], weights: Weights
) -> dict[str, Tensor]:
    """Σ_j w_j θ_j (FedAvg, 1602.05629), the one reference of the rule `weights`.

    Floating tensors are averaged in float32 or better and come back in their own dtype; all others
    must agree and are copied: nothing shares memory with what was given. A state_dict with weight 0
    is left out.
    """
    weights = _check_weights(weights)
    if len(state_dicts) != len(weights):
        raise ValueError(f"state_dicts holds {len(state_dicts)}, and weights holds {len(weights)}")
    kept = [(w, state) for w, state in zip(weights, state_dicts, strict=True) if w > 0]
    average = {}
    for key in dict.fromkeys(key for _, state in kept for key in state):  # every key, once
        if any(key not in state for _, state in kept):
            raise ValueError(f"state_dicts: {key!r} is missing from one of them")
        values = [state[key] for _, state in kept]
        first = values[0]
        if any((value.shape, value.dtype) != (first.shape, first.dtype) for value in values):
            raise ValueError(f"state_dicts differ in the shape or dtype of {key!r}")
        if first.is_floating_point():
            average[key] = sum(w * _upcast(state[key]) for w, state in kept).to(first.dtype)
        elif all(torch.equal(value, first) for value in values):
            average[key] = first.clone()
        else:
            raise ValueError(f"state_dicts differ in {key!r}, whose type has no average")
    return average


# ------------------------------------------------------------------------------------------ helpers


def _upcast(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dot(pi: Tensor, x: Tensor) -> Tensor:
    """Σ_v π(v) x(v): [..., V] twice -> [...], in their own type where autocast would round them."""
    with torch.autocast(pi.device.type, enabled=False):
        return torch.linalg.vecdot(pi, x)


def _logprobs(logits: Tensor, temperature: float) -> Tensor:
    _check_temperature(temperature)
    return torch.log_softmax(_upcast(logits) / temperature, -1)


def _gather(logprobs: Tensor, tokens: Tensor) -> Tensor:
    _check_shape("tokens", tokens.shape, logprobs.shape[:-1])
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1)


@torch.no_grad()
def _fold(step: Callable, reference_logits: References, weights: Weights):
    """total ← step(total, w_j, logits_j) over the references with w_j > 0, one at a time in
    memory."""
    weights = _check_weights(weights)
    references, end, total, shape = iter(reference_logits), object(), None, None
    for weight in weights:
        logits = next(references, end)
        if logits is end:
            raise ValueError(f"reference_logits holds fewer references than {len(weights)} weights")
        if weight > 0:
            shape = logits.shape if shape is None else shape
            _check_shape("reference_logits", logits.shape, shape)
            total = step(total, weight, logits)
        del logits  # before the next is made: memory for one reference, however many there are
    if next(references, end) is not end:
        raise ValueError(f"reference_logits holds more references than {len(weights)} weights")
    return total


def _check_weights(weights: Weights) -> list[float]:
    values = torch.as_tensor(weights, dtype=torch.float64)  # [K]
    if values.dim() != 1 or not (values >= 0).all() or not (values.sum() - 1).abs() <= 1e-6:
        raise ValueError(f"weights must be K numbers ≥ 0 with sum 1, not {values.tolist()}")
    return (values / values.sum()).tolist()


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")


def _check_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    if shape != expected:
        raise ValueError(f"{name} has the shape {list(shape)} where {list(expected)} is needed")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")

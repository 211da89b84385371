"""One agent's PPO: golden values worked by hand, parity with slow independent forms, properties.

In reading order as ppo_core.py: masked arithmetic, the algorithm, sampling, rollout, update. What
is a detail in the list of tests/test_details.py is tested there, and not a second time here.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import pad as widen
from transformers import GPT2Config, GPT2LMHeadModel

import data
import kl
import ppo_core
from ppo_core import (
    PENALTIES,
    Policy,
    entropy,
    gae,
    generate,
    masked_mean,
    masked_std,
    optimise,
    penalised_rewards,
    policy_loss,
    ppo_loss,
    sample_inverse_cdf,
    score_tokens,
    value_loss,
    whiten,
)

EOS, PAD = 0, 1
PROMPTS = [[5, 9], [3, 4, 8, 12, 2], [11, 6, 7], [2, 10, 13, 4], [7], [12, 3], [6, 6, 9, 10],
           [13, 5, 4]]
ONE = torch.ones(1)
few = settings(max_examples=40, deadline=None)
inf, nan = math.inf, math.nan


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def lengths_mask(lengths: list[int], width: int) -> torch.Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradient(loss: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """The gradient of a loss in all of a module's parameters, as one vector."""
    grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True,
                                materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def moved(policy: Policy, scale: float = 0.05, seed: int = 0) -> Policy:
    """A copy of a policy with noise on every parameter."""
    policy, noise = copy.deepcopy(policy), stream(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=noise))
    return policy


def by_position() -> Policy:
    """A policy with learned absolute positions (GPT-2), which sees any shift of position ids."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=0,
            bos_token_id=0, initializer_range=0.4))
    return Policy(model, torch.arange(16) == PAD)


def mean_id(prompt_ids, prompt_mask, response_ids, response_mask):
    """A scorer: the mean id of the response, over 6."""
    return (response_ids * response_mask).sum(1) / response_mask.sum(1) / 6


def roll(policy, settings, references=None, weights=ONE, initial=None, prompts=PROMPTS, seed=0):
    """One rollout of a toy policy, by default with itself as reference."""
    return ppo_core.collect(
        policy, references or [policy], weights, initial or policy, mean_id,
        *data.pad(prompts, PAD, "left"), settings, eos_id=EOS, pad_id=PAD, generator=stream(seed))


def batch_of(rollout, advantages, returns):
    return rollout.batch | {"advantages": advantages, "returns": returns}


# -------------------------------------------------------------------------------- masked arithmetic


def test_masked_mean_std_and_whiten_golden():
    x, mask = torch.tensor([[1.0, 2.0, 99.0], [4.0, 99.0, 99.0]]), lengths_mask([2, 1], 3)
    close(masked_mean(x, mask), 7 / 3, 1e-6)
    close(masked_mean(x, mask.bool()), 7 / 3, 1e-6)
    close(masked_std(x, mask), math.sqrt(14 / 9), 1e-6)  # ((4/3)^2 + (1/3)^2 + (5/3)^2) / 3: biased
    x, mask = torch.tensor([[2.0, 6.0, 99.0]]).double(), lengths_mask([2], 3)  # mean 4, std 2
    close(whiten(x, mask), [[-1.0, 1.0, 0.0]], 1e-8)


@few
@given(seed=st.integers(0, 2**20), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
       scale=st.sampled_from([0.1, 1.0, 50.0]), shift=st.floats(-100, 100))
def test_whiten_gives_mean_0_and_std_1(seed, lengths, scale, shift):
    mask = lengths_mask(lengths, 6)
    x = scale * randn(seed, len(lengths), 6) + shift
    valid, real = whiten(x, mask)[mask.bool()], x[mask.bool()]
    std = real.std(correction=0)
    assert abs(valid.mean()) < 1e-8
    close(valid.std(correction=0), std / (std**2 + 1e-8).sqrt(), 1e-8)


# ------------------------------------------------------------------------------------ the algorithm


@few
@given(seed=st.integers(0, 2**20), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
       gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_is_the_double_sum(seed, lengths, gamma, lam):
    """A_t = sum_l (gamma lambda)^l delta_t+l, over each row's own tokens."""
    mask = lengths_mask(lengths, 7)
    rewards, values = randn(seed, len(lengths), 7), randn(seed + 1, len(lengths), 7)
    expected = torch.zeros_like(values)
    for b, length in enumerate(lengths):
        r, v = rewards[b].tolist(), [*values[b, :length].tolist(), 0.0]
        for t in range(length):
            expected[b, t] = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k])
                                 for k in range(t, length))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    close(advantages, expected)
    close(returns, (expected + values) * mask)


def test_gae_with_lambda_1_is_the_return_and_with_lambda_0_the_td_error():
    rewards, values, mask = randn(0, 2, 5), randn(1, 2, 5), lengths_mask([5, 3], 5)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    close(returns, (rewards * mask).flip(1).cumsum(1).flip(1) * mask)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    after = widen((values * mask)[:, 1:], (0, 1))
    close(advantages, (rewards + 0.9 * after - values) * mask)


def test_policy_loss_golden():
    """clip 0.2; four ratios with advantages, and a masked fifth.

    1.5, A +1: max(-1.5, -1.2) = -1.2, clipped;    1.5, A -1: max(1.5, 1.2) = 1.5;
    0.5, A +1: max(-0.5, -0.8) = -0.5;             0.5, A -1: max(0.5, 0.8) = 0.8, clipped.
    """
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.5]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]], dtype=torch.float64)
    logprobs = (old + ratio.log()).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    loss, clipfrac = policy_loss(logprobs, old, advantages, lengths_mask([4], 5), 0.2)
    close(loss, (-1.2 + 1.5 - 0.5 + 0.8) / 4)
    close(clipfrac, 0.5)
    loss.backward()  # d(-r A)/d log pi = -r A where not clipped, else 0
    close(logprobs.grad, [[0.0, 1.5 / 4, -0.5 / 4, 0.0, 0.0]])


def test_value_clipfrac_counts_no_rounding():
    """V_old + (V - V_old) is not V in float32: nothing that moved less counts as clipped."""
    old, values, returns = ((scale * randn(seed, 40, 50).clamp(-3, 3)).float()
                            for seed, scale in enumerate((0.06, 0.003, 1.0)))
    assert (old + (values - old) != values).any() and (old - values).abs().max() < 0.2
    loss, clipfrac = value_loss(values, old, returns, torch.ones(40, 50), 0.2)
    assert clipfrac == 0
    close(loss, ((values - returns) ** 2).mean() / 2, 1e-6)


MASKED = {
    "masked_mean": lambda x, y, z, mask: [masked_mean(x, mask)],
    "masked_std": lambda x, y, z, mask: [masked_std(x, mask)],
    "whiten": lambda x, y, z, mask: [whiten(x, mask)],
    "gae": lambda x, y, z, mask: gae(x, y, mask, 0.9, 0.8),
    "policy_loss": lambda x, y, z, mask: policy_loss(x, y, z, mask, 0.2),
    "value_loss": lambda x, y, z, mask: value_loss(x, y, z, mask, 0.2),
}


@pytest.mark.parametrize("name", MASKED)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), extra=st.integers(1, 4),
       lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_masked_positions_may_hold_anything_and_be_any_number(name, seed, extra, lengths):
    """What stands where mask is 0 changes no bit; wider tensors give the same, followed by 0."""
    mask = lengths_mask(lengths, 5)
    garbage = torch.tensor([nan, inf, -inf, 1e300, -7.0], dtype=torch.float64)
    clean = [randn(seed + k, len(lengths), 5) for k in range(3)]
    dirty = [torch.where(mask.bool(), x, garbage[randn(seed + 3 + k, len(lengths), 5).argsort(1)])
             for k, x in enumerate(clean)]
    wide = [widen(x, (0, extra), value=9.0) for x in clean]
    expected = MASKED[name](*clean, mask)
    for other, value in zip(MASKED[name](*dirty, mask), expected, strict=True):
        assert torch.equal(other, value)
    for other, value in zip(MASKED[name](*wide, widen(mask, (0, extra))), expected, strict=True):
        close(other, widen(value, (0, extra)) if value.dim() else value)


# ----------------------------------------------------------------------------------------- sampling


def test_sample_inverse_cdf_golden():
    probs = torch.tensor([0.5, 0.25, 0.25]).expand(7, 3)
    uniform = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.7499, 0.75, 0.9999])
    assert sample_inverse_cdf(probs, uniform).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_a_sum_that_is_not_monotone_draws_no_impossible_id(monkeypatch):
    """On a GPU cumsum is a parallel sum: here its rounding gives an impossible id some room."""
    cumsum, rounding = torch.Tensor.cumsum, torch.tensor([0.0, 0.1, 0.1, 0.0])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: cumsum(x, dim) + rounding)
    assert sample_inverse_cdf(torch.tensor([[0.5, 0.0, 0.2, 0.3]]), torch.tensor([0.55])) == 0


@pytest.mark.parametrize("vocabulary", [50_304, 500_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_sample_inverse_cdf_stays_in_a_large_vocabulary(vocabulary, spread):
    """A float32 cdf of so many ids ends above or below 1, by up to 1e-4."""
    logits = spread * torch.randn(4, vocabulary, generator=stream(vocabulary))
    logits[:, :3] = logits[:, -5:] = -inf
    probs = logits.softmax(-1)
    drawn = sample_inverse_cdf(probs, torch.tensor([0.0, 0.5, 1 - 2**-20, 1 - 2**-24]))
    assert (probs.gather(1, drawn[:, None]) > 0).all()
    assert drawn[0] == 3 and drawn[2] > 0.9 * vocabulary


def test_sample_inverse_cdf_gives_the_missing_mass_to_no_id_in_particular():
    """Probabilities in bfloat16 sum to less than 1: each id keeps its share of what they sum to."""
    probs = torch.tensor([0.3, 0.3, 0.3, 0.099, 0.001]).bfloat16() * 0.98
    grid = (torch.arange(100_000) + 0.5) / 100_000
    counts = sample_inverse_cdf(probs.expand(len(grid), -1), grid).bincount(minlength=5)
    share = probs.double() / probs.double().sum()
    assert (counts / len(grid) - share).abs().max() < 2e-5


def test_generate_at_temperature_zero_is_model_generate(tiny_world):
    """The likeliest tokens, on left-padded prompts of unequal lengths, with rows that end early."""
    texts = sorted(tiny_world.prompt_ids, key=lambda text: len(tiny_world.prompt_ids[text]))
    rows = [tiny_world.prompt_ids[text] for text in texts[::len(texts) // 11]]
    assert len({len(row) for row in rows}) > 2
    model, eos, pad = tiny_world.model, tiny_world.eos_id, tiny_world.pad_id
    ids, mask = data.pad(rows, pad, "left")
    uniforms = torch.rand(20, len(rows), generator=stream())
    response, response_mask = generate(
        model, ids, mask, uniforms, temperature=1e-6, eos_id=eos, pad_id=pad)
    expected = model.generate(input_ids=ids, attention_mask=mask, do_sample=False,
                              max_new_tokens=20, eos_token_id=eos, pad_token_id=pad)
    assert torch.equal(response, expected[:, ids.shape[1]:])
    assert len(set(response_mask.sum(1).tolist())) > 2, "the rows should not all end together"


def test_a_rollout_takes_the_same_randomness_and_stops_when_every_row_has_ended(
        toy_policy, small_settings):
    """A second one on the same stream must not depend on where the first one's rows ended."""
    policy, s = toy_policy(), small_settings(response_length=50)
    nn.init.zeros_(policy.model.get_output_embeddings().weight)  # uniform over 13 ids
    ids, mask = data.pad(PROMPTS[:2], PAD, "left")
    lengths, states = [], []
    for eos in (EOS, 13, 15):  # 15 is forbidden, so that no row ends
        source = stream(3)
        rollout = ppo_core.collect(policy, [policy], ONE, policy, mean_id, ids, mask, s, eos_id=eos,
                                   pad_id=PAD, generator=source)
        response, response_mask = rollout.response, rollout.mask
        last = response.gather(1, response_mask.sum(1, keepdim=True) - 1)
        assert eos == 15 or last.eq(eos).all()
        assert response.shape[1] == response_mask.sum(1).max()
        lengths.append(response.shape[1])
        states.append(source.get_state())
    assert len(set(lengths)) == 3 and max(lengths) == lengths[2] == 50
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


# -------------------------------------------------------------------------------------- one rollout

every_penalty = pytest.mark.parametrize("penalty", PENALTIES)


def references_of(policy, rule):
    """Two references, weights 0.7 and 0.3; merged into one under the rule `weights`."""
    references = [moved(policy, 0.05, 1), moved(policy, 0.1, 2)]
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    if rule != "weights":
        return references, weights
    states = [reference.model.state_dict() for reference in references]
    references[0].model.load_state_dict(kl.average_weights(states, weights))
    return references[:1], torch.ones(1, dtype=torch.float64)


def test_entropy_golden():
    half = math.log(0.5)
    rows = [[half, half, -inf, -inf], [0.0, -inf, -inf, -inf], [math.log(0.25)] * 4]
    close(entropy(torch.tensor(rows)), [math.log(2), 0.0, math.log(4)], 1e-6)


@few
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
       masked=st.integers(0, 6))
def test_entropy_is_never_negative_and_at_most_log_v(seed, scale, masked):
    logits = scale * randn(seed, 3, 7)
    logits[:, :masked] = -inf
    for dtype in (torch.float32, torch.float64):
        values = entropy(logits.to(dtype).log_softmax(-1))
        assert (values >= -1e-6).all() and (values <= math.log(7 - masked) + 1e-6).all()


@every_penalty
@pytest.mark.parametrize("rule", kl.RULES)
def test_the_rollouts_kl_is_generalized_kl(toy_policy, small_settings, rule, penalty):
    """Micro-batch by micro-batch, what kl.generalized_kl gives on whole logits."""
    policy = toy_policy()
    s = small_settings(response_length=6, rule=rule, penalty=penalty, micro_batch=3)
    references, weights = references_of(policy, rule)
    rollout = roll(policy, s, references, weights, references[0])
    own, *others = (p.response_forward(rollout.ids, rollout.attention, rollout.prompt_length)[0]
                    for p in (policy, *references))
    valid = rollout.mask.bool()
    expected = kl.generalized_kl(own, others, weights, rule=rule, tokens=rollout.response,
                                 estimator=PENALTIES[penalty].estimator)
    close(rollout.kl[valid], expected[valid], 2e-5)
    close(rollout.kl_initial[valid], kl.generalized_kl(own, others[:1], [1.0])[valid], 2e-5)


def test_an_initial_policy_that_is_a_reference_too_is_read_once(toy_policy, small_settings):
    policy = toy_policy()
    references, weights = references_of(policy, "geometric")
    initial, reads = references[0], []
    read = initial.response_forward
    initial.response_forward = lambda ids, *rest: reads.append(len(ids)) or read(ids, *rest)
    s = small_settings(response_length=6, micro_batch=3)
    rollout = roll(policy, s, references, weights, initial)
    assert sum(reads) == len(rollout.ids), "every row once"


def test_by_rows_changes_nothing(monkeypatch):
    """One row, two and all rows at a time, values and gradients."""
    logprobs, reference = (randn(seed, 5, 3, 4).log_softmax(-1) for seed in (0, 1))
    found = []
    for chunk in (1, 24, 2**21):
        monkeypatch.setattr(kl, "CPU_CHUNK", chunk)
        leaf = logprobs.clone().requires_grad_()
        value = ppo_core.by_rows(kl.kl_exact, leaf, reference)
        value.square().sum().backward()
        found.append((value, leaf.grad))
    assert found[0][0].shape == (5, 3)
    for other in found[:2]:
        close(other[0], found[2][0].detach())
        close(other[1], found[2][1])


@pytest.mark.parametrize("device, pieces", [("cpu", 32), ("meta", 2)])
def test_by_rows_launches_little_on_a_gpu(device, pieces):
    """64 rows of 24 tokens at a vocabulary of 2**15; a tensor on `meta` has no numbers in it."""
    logprobs = torch.empty(1, 1, 1, device=device).expand(64, 24, 2**15)
    seen = []
    value = ppo_core.by_rows(lambda part: seen.append(len(part)) or part[..., 0], logprobs)
    assert (len(seen), sum(seen), value.shape) == (pieces, 64, (64, 24))


# --------------------------------------------------------------------------------------- one update


def test_penalised_rewards_golden():
    """beta 0.5; rows of 3 and 2 tokens, scores 10 and 20; the kl of a pad (9) counts nowhere."""
    kl_tokens, mask = torch.tensor([[0.2, 0.4, 0.6], [1.0, 2.0, 9.0]]), lengths_mask([3, 2], 3)
    in_loss = [[0.0, 0.0, 10.0], [0.0, 20.0, 0.0]]
    expected = dict.fromkeys(PENALTIES, in_loss) | {
        "k1-in-reward": [[-0.1, -0.2, 9.7], [-0.5, 19.0, 0.0]],
        "both": [[-0.2, -0.3, 10.0], [-1.0, 20.0, 0.0]]}
    for name, rewards in expected.items():
        close(penalised_rewards(torch.tensor([10.0, 20.0]), kl_tokens, mask, 0.5, PENALTIES[name]),
              rewards, 1e-6)


def test_both_charges_the_kl_of_later_states_only():
    """With gamma = lambda = 1 the return at t holds -beta sum over t' > t of KL_t'."""
    kl_tokens, mask = randn(0, 2, 4).square(), lengths_mask([4, 3], 4)
    zero = torch.zeros(2, dtype=torch.float64)
    rewards = penalised_rewards(zero, kl_tokens, mask, 0.3, PENALTIES["both"])
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    masked = kl_tokens * mask
    later = masked.sum(1, keepdim=True) - masked.cumsum(1)
    close(returns, -0.3 * later * mask)


def plain_penalty(log_pi, log_mus, weights, token, settings):
    """The KL of one state by hand, from log-probs [V] of the policy and of each reference."""
    estimator = PENALTIES[settings.penalty].estimator
    if settings.rule == "sum":
        rhos, shares = log_mus, weights
    elif settings.rule == "geometric":
        mixed = sum(w * mu for w, mu in zip(weights, log_mus, strict=True))
        rhos, shares = [mixed.log_softmax(-1)], [1.0]
    else:
        weighed = [mu + math.log(w) for w, mu in zip(weights, log_mus, strict=True)]
        rhos, shares = [torch.stack(weighed).logsumexp(0)], [1.0]
    total = 0.0
    for share, rho in zip(shares, rhos, strict=True):
        x, exact = log_pi[token] - rho[token], (log_pi.exp() * (log_pi - rho)).sum()
        forms = {"exact": exact, "k1": x, "k2": x**2 / 2, "k3": (-x).exp() - 1 + x}
        total = total + share * forms[estimator]
    return total


def rows_of(rollout):
    """What was sampled and how it scored, row by row: prompt ids, response ids, score."""
    q = rollout.prompt_length
    for ids, attention, response, mask, score in zip(
            rollout.ids, rollout.attention, rollout.response, rollout.mask,
            rollout.scores.tolist(), strict=True):
        yield ids[:q][attention[:q].bool()].tolist(), response[mask.bool()].tolist(), score


def plain_loss(policy, old, references, weights, rows, settings, beta, gamma, minibatch=None):
    """The loss of algorithm.md, one row and one token at a time, without ppo_core's functions.

    lambda 0.95, c_v 0.1. rows: as rows_of makes them, the whole rollout, whose advantages are
    whitened together;  minibatch: the rows that the loss is of.
    """
    tokens, advantages, charged = [], [], PENALTIES[settings.penalty]
    for b, (prompt, response, score) in enumerate(rows):
        ids, states = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
        log_pi, log_old, *log_mu = (
            (p.model(input_ids=ids).logits[0, states] / settings.temperature)
            .masked_fill(policy.forbidden, -1e6).log_softmax(-1)  # -1e6: finite, and its exp is 0
            for p in (policy, old, *references))
        log_old, log_mu = log_old.detach(), torch.stack(log_mu, 1).detach()  # [T, K, V]
        value, old_value = (
            p.value_head(p.model.base_model(input_ids=ids).last_hidden_state[0, states])[:, 0]
            for p in (policy, old))
        reward = [0.0] * (len(response) - 1) + [score]
        for t, token in enumerate(response):
            divergence = plain_penalty(log_old[t], log_mu[t], weights, token, settings).item()
            if settings.penalty == "k1-in-reward":
                reward[t] -= beta * divergence
            if settings.penalty == "both" and t > 0:  # the state that token t - 1 led to
                reward[t - 1] -= beta * divergence
        v = [*old_value.tolist(), 0.0]  # V after the end is 0
        delta = [reward[t] + gamma * v[t + 1] - v[t] for t in range(len(response))]
        own = [sum((gamma * 0.95) ** k * d for k, d in enumerate(delta[t:]))
               for t in range(len(response))]
        advantages += own
        if minibatch is None or b in minibatch:
            tokens += zip(response, log_pi, log_old, log_mu, value, v, own, strict=False)

    mean = sum(advantages) / len(advantages)
    sigma = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages) + 1e-8)
    total, clip = 0.0, settings.clip
    for token, log_pi, log_old, log_mu, value, old_value, advantage in tokens:
        ratio, a = (log_pi[token] - log_old[token]).exp(), (advantage - mean) / sigma
        total = total + max(-ratio * a, -min(max(ratio, 1 - clip), 1 + clip) * a)
        near, returns = min(max(value, old_value - clip), old_value + clip), old_value + advantage
        total = total + 0.1 * max((value - returns) ** 2, (near - returns) ** 2) / 2
        if charged.in_loss:  # tokens come from pi_old: what reads them is weighed, detached
            weight = 1.0 if charged.estimator == "exact" else ratio.detach()
            divergence = plain_penalty(log_pi, log_mu, weights, token, settings)
            total = total + beta / sigma * weight * divergence
    return total / len(tokens)


def summed_gradient(policy, rollout, weights, settings, beta=0.3):
    """The gradient of optimise's last step, as one vector; and the metrics."""
    policy, steps = copy.deepcopy(policy), []
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(lambda *_: steps.append(
        torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])))
    metrics = optimise(policy, optimizer, rollout, weights, beta, settings, stream())
    assert all(p.grad is None for p in policy.parameters()), "no memory is held between updates"
    return steps[-1], metrics


@every_penalty
@pytest.mark.parametrize("rule", ["geometric", "sum", "arithmetic"])
def test_the_gradient_of_an_update_is_that_of_the_loss_written_out(
        toy_policy, small_settings, monkeypatch, rule, penalty):
    """A policy that has left pi_old, so that ratios and values are clipped; unequal lengths."""
    monkeypatch.setattr(ppo_core, "GAMMA", 0.97)
    monkeypatch.setattr(ppo_core, "MAX_GRAD_NORM", 1e9)
    old = moved(toy_policy(), 0.05, 5)
    s = small_settings(response_length=6, temperature=0.8, clip=0.1, epochs=1, minibatches=1,
                       micro_batch=3, rule=rule, penalty=penalty)
    references, weights = references_of(old, rule)
    rollout = roll(old, s, references, weights)
    policy = moved(old, 0.05, 6)
    mine, metrics = summed_gradient(policy, rollout, weights, s, beta=0.4)
    assert min(metrics["clipfrac"], metrics["value_clipfrac"]) > 0.1, "both clips must be reached"
    plain = plain_loss(policy, old, references, weights.tolist(), rows_of(rollout), s, 0.4, 0.97)
    plain = gradient(plain, policy)
    assert (mine - plain).norm() < 2e-5 * plain.norm()
    assert plain.norm() > 0.01


def test_sum_and_geometric_have_the_same_gradient_in_the_loss(toy_policy, small_settings):
    """Only log Z lies between them, which does not depend on the policy: their values differ."""
    old, found = toy_policy(), {}
    policy = moved(old, 0.05, 4)
    for rule in ("sum", "geometric", "arithmetic"):
        s = small_settings(response_length=6, rule=rule)
        references, weights = references_of(old, rule)
        rollout = roll(old, s, references, weights)
        zero = torch.zeros_like(rollout.logprobs)  # no advantage: the policy's part is 0
        on, off = (ppo_loss(policy, batch_of(rollout, zero, zero), weights, beta, torch.ones(()),
                            s)[0] for beta in (1.0, 0.0))
        found[rule] = gradient(on - off, policy), (on - off).item()
    (by_sum, sum_value), (by_geometric, geometric_value), (by_arithmetic, _) = found.values()
    assert (by_sum - by_geometric).norm() < 1e-5 * by_sum.norm()
    assert sum_value > geometric_value + 1e-3
    assert (by_arithmetic - by_geometric).norm() > 1e-2 * by_sum.norm()


def test_the_value_loss_reaches_the_trunk_but_not_the_logits(toy_policy, small_settings):
    policy, s = moved(toy_policy(), 0.05, 8), small_settings(response_length=5)
    rollout = roll(policy, s)
    batch = batch_of(rollout, 0 * rollout.logprobs, 0 * rollout.logprobs + 1)
    loss, _ = ppo_loss(policy, batch, ONE, 0.0, torch.ones(()), s)
    assert gradient(loss, policy.value_head).any() and gradient(loss, policy.model.base_model).any()
    assert not gradient(loss, policy.model.get_output_embeddings()).any()


@pytest.mark.parametrize("where, says", [
    ("scores", "an advantage"), ("reference", "the gradient's norm")])
def test_optimise_refuses_what_is_not_finite_before_the_weights_change(
        toy_policy, small_settings, where, says):
    policy, s = toy_policy(), small_settings(response_length=5)
    rollout = roll(policy, s)
    getattr(rollout, where)[:] = nan if where == "reference" else inf  # in the first minibatch too
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(FloatingPointError, match=says):
        optimise(policy, torch.optim.Adam(policy.parameters()), rollout, ONE, 0.3, s, stream())
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_a_step_raises_the_probability_of_what_was_better(toy_policy, small_settings):
    policy, s = toy_policy(), small_settings(response_length=5, epochs=1, minibatches=1)
    rollout = roll(policy, s)
    optimise(policy, torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-5), rollout, ONE, 0.0, s,
             stream())
    mask = rollout.mask
    logprobs, *_ = score_tokens(policy, rollout.ids, rollout.attention, rollout.response, mask,
                            s.temperature)
    better = whiten(rollout.scores[:, None].expand_as(logprobs), mask)
    assert masked_mean((logprobs - rollout.logprobs) * better, mask) > 1e-3

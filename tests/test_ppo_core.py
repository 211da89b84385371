"""One agent's PPO: golden values worked by hand, parity with slow independent forms, properties.

In reading order as ppo_core.py: masked arithmetic, the algorithm, sampling, the rollout, the update.
"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import data
import kl
import ppo_core
from ppo_core import (
    Policy,
    entropy,
    evaluate,
    gae,
    generate,
    masked_mean,
    masked_std,
    optimise,
    penalised_rewards,
    policy_loss,
    ppo_loss,
    reference_logprobs,
    sample_inverse_cdf,
    value_loss,
    whiten,
)

EOS, PAD = 0, 1
PROMPTS = [[5, 9], [3, 4, 8, 12, 2], [11, 6, 7], [2, 10, 13, 4], [7], [12, 3], [6, 6, 9, 10], [13, 5, 4]]
RULES = ("sum", "geometric", "arithmetic", "weights")
PLACES = [(penalty, estimator) for penalty in ("loss", "reward") for estimator in kl.ESTIMATORS] + [("both", "exact")]
few = settings(max_examples=40, deadline=None)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lengths_mask(lengths: list[int], width: int) -> torch.Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def gradient(loss: torch.Tensor, policy: Policy) -> torch.Tensor:
    """The gradient of a loss in all of a policy's parameters, as one vector."""
    grads = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def moved(policy: Policy, seed: int, scale: float) -> Policy:
    """A copy of the policy, every parameter moved by noise."""
    policy = copy.deepcopy(policy)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=noise))
    return policy


# ---------------------------------------------------------------------------------------------- masked arithmetic


def test_masked_mean_and_std_golden():
    x, mask = torch.tensor([[1.0, 2.0, 99.0], [4.0, 99.0, 99.0]]), lengths_mask([2, 1], 3)
    close(masked_mean(x, mask), 7 / 3, 1e-6)
    close(masked_mean(x, mask.bool()), 7 / 3, 1e-6)
    close(masked_std(x, mask), math.sqrt(14 / 9), 1e-6)  # ((4/3)^2 + (1/3)^2 + (5/3)^2) / 3 = 14/9: biased


def test_whiten_golden():
    x, mask = torch.tensor([[2.0, 6.0, 99.0]], dtype=torch.float64), lengths_mask([2], 3)  # mean 4, biased std 2
    close(whiten(x, mask), [[-1.0, 1.0, 0.0]], 1e-8)
    close(whiten(x, mask, shift_mean=False), [[3.0, 5.0, 0.0]], 1e-8)


@few
@given(seed=st.integers(0, 2**20), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
       scale=st.sampled_from([0.1, 1.0, 50.0]), shift=st.floats(-100, 100))
def test_whiten_gives_mean_0_and_std_1(seed, lengths, scale, shift):
    mask = lengths_mask(lengths, 6)
    x = scale * randn(seed, len(lengths), 6) + shift
    valid = whiten(x, mask)[mask.bool()]
    std = x[mask.bool()].std(correction=0)
    assert abs(valid.mean()) < 1e-8
    close(valid.std(correction=0), std / (std**2 + 1e-8).sqrt(), 1e-8)
    mean = x[mask.bool()].mean()
    close(whiten(x, mask, shift_mean=False)[mask.bool()], valid + mean, 1e-8)


# --------------------------------------------------------------------------------------------------- the algorithm


def test_gae_golden():
    """gamma 0.8, lambda 0.5, so gamma lambda = 0.4.

    row 0, three tokens:  delta_2 = 2 - 1.5           =  0.5   A_2 = 0.5
                          delta_1 = 0 + 0.8*1.5 - 1   =  0.2   A_1 = 0.2 + 0.4*0.5  =  0.4
                          delta_0 = 1 + 0.8*1   - 0.5 =  1.3   A_0 = 1.3 + 0.4*0.4  =  1.46
    row 1, two tokens:    delta_1 = 1 - 0.5           =  0.5   A_1 = 0.5                   (V after the end is 0)
                          delta_0 = 0 + 0.8*0.5 - 1   = -0.6   A_0 = -0.6 + 0.4*0.5 = -0.4
    """
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 7.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 1.0, 1.5], [1.0, 0.5, 9.0]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, lengths_mask([3, 2], 3), 0.8, 0.5)
    close(advantages, [[1.46, 0.4, 0.5], [-0.4, 0.5, 0.0]])
    close(returns, [[1.96, 1.4, 2.0], [0.6, 1.0, 0.0]])


def gae_double_sum(rewards, values, mask, gamma, lam):
    """A_t = sum_l (gamma lambda)^l delta_t+l, written as the O(T^2) sum over each row's own tokens."""
    advantages = torch.zeros_like(values)
    for b, length in enumerate(mask.sum(1).tolist()):
        v = [*values[b, :length].tolist(), 0.0]
        for t in range(length):
            advantages[b, t] = sum((gamma * lam) ** (k - t) * (rewards[b, k].item() + gamma * v[k + 1] - v[k])
                                   for k in range(t, length))
    return advantages


@few
@given(seed=st.integers(0, 2**20), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
       gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_is_the_double_sum(seed, lengths, gamma, lam):
    mask = lengths_mask(lengths, 7)
    rewards, values = randn(seed, len(lengths), 7), randn(seed + 1, len(lengths), 7)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = gae_double_sum(rewards, values, mask, gamma, lam)
    close(advantages, expected)
    close(returns, (expected + values) * mask)


def test_gae_with_lambda_1_is_the_return_and_with_lambda_0_the_td_error():
    rewards, values, mask = randn(0, 2, 5), randn(1, 2, 5), lengths_mask([5, 3], 5)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    close(returns, (rewards * mask).flip(1).cumsum(1).flip(1) * mask)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    after = torch.cat([(values * mask)[:, 1:], torch.zeros(2, 1)], 1)
    close(advantages, (rewards + 0.9 * after - values) * mask)


def test_policy_loss_golden():
    """clip 0.2. ratio 1.5, A +1: max(-1.5, -1.2) = -1.2, clipped;    ratio 1.5, A -1: max(1.5, 1.2) = 1.5, not;
                 ratio 0.5, A +1: max(-0.5, -0.8) = -0.5, not;        ratio 0.5, A -1: max(0.5, 0.8) = 0.8, clipped."""
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.5]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]], dtype=torch.float64)
    logprobs = (old + ratio.log()).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    loss, clipfrac = policy_loss(logprobs, old, advantages, lengths_mask([4], 5), 0.2)
    close(loss, (-1.2 + 1.5 - 0.5 + 0.8) / 4)
    close(clipfrac, 0.5)
    loss.backward()  # d(-r A)/d log pi = -r A where not clipped, else 0
    close(logprobs.grad, [[0.0, 1.5 / 4, -0.5 / 4, 0.0, 0.0]])


def test_value_loss_golden():
    """Old value 0, clip 0.2. V 1, R 0: max(1, 0.04) = 1, not clipped;  V 1, R 2: max(1, 1.8^2) = 3.24, clipped;
    V 0.1, R 1: 0.81 both ways."""
    values = torch.tensor([[1.0, 1.0, 0.1, 5.0]], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([[0.0, 2.0, 1.0, 5.0]], dtype=torch.float64)
    loss, clipfrac = value_loss(values, torch.zeros(1, 4, dtype=torch.float64), returns, lengths_mask([3], 4), 0.2)
    close(loss, (1 + 3.24 + 0.81) / 2 / 3)
    close(clipfrac, 1 / 3)
    loss.backward()  # V - R where not clipped
    close(values.grad, [[1 / 3, 0.0, -0.9 / 3, 0.0]])


def test_value_clipfrac_counts_no_rounding():
    """V_old + (V - V_old) is not V in float32: values that moved less than the clip are not clipped for that."""
    old, values, returns = (scale * randn(seed, 40, 50).clamp(-3, 3) for seed, scale in enumerate((0.06, 0.003, 1.0)))
    old, values, returns = old.float(), values.float(), returns.float()
    assert (old + (values - old) != values).any() and (old - values).abs().max() < 0.2
    loss, clipfrac = value_loss(values, old, returns, torch.ones(40, 50), 0.2)
    assert clipfrac == 0
    close(loss, ((values - returns) ** 2).mean() / 2, 1e-6)


MASKED = {
    "masked_mean": lambda x, y, z, mask: [masked_mean(x, mask)],
    "masked_std": lambda x, y, z, mask: [masked_std(x, mask)],
    "whiten": lambda x, y, z, mask: [whiten(x, mask)],
    "whiten, mean kept": lambda x, y, z, mask: [whiten(x, mask, shift_mean=False)],
    "gae": lambda x, y, z, mask: gae(x, y, mask, 0.9, 0.8),
    "policy_loss": lambda x, y, z, mask: policy_loss(x, y, z, mask, 0.2),
    "value_loss": lambda x, y, z, mask: value_loss(x, y, z, mask, 0.2),
}


@pytest.mark.parametrize("name", MASKED)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_masked_positions_may_hold_anything(name, seed, lengths):
    """NaN, infinities and huge numbers where mask is 0 change no bit of the result."""
    mask = lengths_mask(lengths, 5)
    garbage = torch.tensor([math.nan, math.inf, -math.inf, 1e300, -7.0], dtype=torch.float64)
    clean = [randn(seed + k, len(lengths), 5) for k in range(3)]
    dirty = [torch.where(mask.bool(), x, garbage[randn(seed + 3 + k, len(lengths), 5).argsort(1)])
             for k, x in enumerate(clean)]
    for actual, expected in zip(MASKED[name](*dirty, mask), MASKED[name](*clean, mask), strict=True):
        assert torch.equal(actual, expected)


@few
@given(seed=st.integers(0, 2**20), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4), extra=st.integers(1, 4))
def test_more_padding_changes_nothing(seed, lengths, extra):
    """The same rows in wider tensors: scalars are equal, [B, T] results are the old ones followed by 0."""
    mask, x, y, z = lengths_mask(lengths, 4), *(randn(seed + k, len(lengths), 4) for k in range(3))
    wide_mask, wx, wy, wz = (torch.nn.functional.pad(tensor, (0, extra), value=fill)
                             for tensor, fill in ((mask, 0), (x, 3.0), (y, -5.0), (z, 9.0)))
    for small, wide in ((whiten(x, mask), whiten(wx, wide_mask)),
                        *zip(gae(x, y, mask, 0.9, 0.8), gae(wx, wy, wide_mask, 0.9, 0.8), strict=True)):
        close(wide, torch.nn.functional.pad(small, (0, extra)))
    for small, wide in ((masked_mean(x, mask), masked_mean(wx, wide_mask)),
                        *zip(policy_loss(x, y, z, mask, 0.2), policy_loss(wx, wy, wz, wide_mask, 0.2), strict=True),
                        *zip(value_loss(x, y, z, mask, 0.2), value_loss(wx, wy, wz, wide_mask, 0.2), strict=True)):
        close(wide, small)


# -------------------------------------------------------------------------------------------------------- sampling


def test_sample_inverse_cdf_golden():
    probs = torch.tensor([0.5, 0.25, 0.25]).expand(7, 3)
    uniform = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.7499, 0.75, 0.9999])
    assert sample_inverse_cdf(probs, uniform).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_sample_inverse_cdf_never_draws_an_impossible_id():
    below_1 = 1 - 2**-24  # the largest u in float32
    probs = torch.tensor([[0.0, 0.0, 0.6, 0.0, 0.4, 0.0, 0.0]]).expand(4, -1)
    assert sample_inverse_cdf(probs, torch.tensor([0.0, 0.6, below_1, 1.0])).tolist() == [2, 4, 4, 4]  # 1: rounded up
    assert sample_inverse_cdf(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([0.0])).item() == 2
    assert sample_inverse_cdf(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([below_1])).item() == 0


@pytest.mark.parametrize("vocabulary", [50_304, 500_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_sample_inverse_cdf_stays_in_a_large_vocabulary(vocabulary, spread):
    """A float32 cdf of so many ids ends above or below 1, by up to 1e-4."""
    logits = spread * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits[:, :3] = logits[:, -5:] = -math.inf
    probs = logits.softmax(-1)
    drawn = sample_inverse_cdf(probs, torch.tensor([0.0, 0.5, 1 - 2**-20, 1 - 2**-24]))
    assert (probs.gather(1, drawn[:, None]) > 0).all()
    assert drawn[0] == 3 and drawn[2] > 0.9 * vocabulary


def test_sample_inverse_cdf_gives_the_missing_mass_to_no_id_in_particular():
    """Probabilities rounded to bfloat16 sum to less than 1: each id keeps its share, the last one gains nothing."""
    probs = torch.tensor([0.3, 0.3, 0.3, 0.099, 0.001]).bfloat16() * 0.98
    grid = (torch.arange(100_000) + 0.5) / 100_000
    counts = sample_inverse_cdf(probs.expand(len(grid), -1), grid).bincount(minlength=5)
    share = probs.double() / probs.double().sum()
    assert ((counts / len(grid)) - share).abs().max() < 2e-5


def chi_square(drawn: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's statistic of the draws against probs [V], over the possible ids; impossible ids must not occur."""
    counts = drawn.flatten().bincount(minlength=len(probs)).double()
    possible = probs > 0
    assert not counts[~possible].any()
    expected = probs[possible].double() * drawn.numel()
    return ((counts[possible] - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("logits", [[0.0] * 8, [2.0, -1.0, 0.5, 0.0, -3.0, 1.0, 0.3, -0.7],
                                    [-math.inf, 3.0, -math.inf, 0.0, 1.0, -2.0, 2.5, -math.inf]])
def test_sampler_follows_the_softmax(logits):
    probs = torch.tensor(logits).softmax(-1)
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    drawn = sample_inverse_cdf(probs.expand(len(uniform), -1), uniform)
    assert chi_square(drawn, probs) < 24.3  # 99.9 % quantile of chi-square with 7 degrees of freedom


def test_generate_greedy_is_model_generate(tiny_world):
    """On left-padded prompts of unequal lengths, with rows that end early."""
    texts = sorted(tiny_world.prompt_ids, key=lambda text: (len(tiny_world.prompt_ids[text]), text))
    rows = [tiny_world.prompt_ids[text] for text in texts[::len(texts) // 11]]
    assert len({len(row) for row in rows}) > 2
    model, eos, pad = tiny_world.model, tiny_world.eos_id, tiny_world.pad_id
    ids, mask = data.pad(rows, pad, "left")
    response, response_mask = generate(model, ids, mask, 20, temperature=1.0, eos_id=eos, pad_id=pad, greedy=True)
    expected = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=20,
                              eos_token_id=eos, pad_token_id=pad)[:, ids.shape[1]:]
    assert torch.equal(response, expected)
    assert len(set(response_mask.sum(1).tolist())) > 2, "the rows should not all end together"
    for row, row_mask in zip(response.tolist(), response_mask.tolist(), strict=True):
        length = row.index(eos) + 1 if eos in row else len(row)
        assert row_mask == [1] * length + [0] * (len(row) - length)


def sample(policy, settings, seed=0, prompts=PROMPTS):
    ids, mask = data.pad(prompts, PAD, "left")
    return ids, mask, *generate(policy, ids, mask, settings.response_length, temperature=settings.temperature,
                                eos_id=EOS, pad_id=PAD, generator=torch.Generator().manual_seed(seed))


def test_generate_samples_by_the_inverse_cdf_of_each_full_forward(toy_policy, small_settings):
    """Parity with a sampler without a cache, without padding and one row at a time, on the same uniforms."""
    policy, s = toy_policy(), small_settings(temperature=0.7, response_length=9)
    _, _, response, mask = sample(policy, s)
    uniforms = torch.rand(9, len(PROMPTS), generator=torch.Generator().manual_seed(0))
    for b, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for t in range(9):
            logits = policy.model(input_ids=torch.tensor([ids])).logits[0, -1] / 0.7
            weights = logits.double().exp().masked_fill(policy.forbidden, 0)
            cdf = (weights / weights.sum()).cumsum(0)
            ids.append(int((cdf <= uniforms[t, b]).sum()))
            if ids[-1] == EOS:
                break
        expected = ids[len(prompt):]
        assert response[b][mask[b].bool()].tolist() == expected
        assert response[b][~mask[b].bool()].eq(PAD).all()


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("rotary", [0.5, 1.0])
def test_the_fast_decoder_is_the_models_own_forward(toy_policy, parallel, rotary):
    """GPT-NeoX's layers called directly against the model's forward with its cache, behind left padding."""
    policy = toy_policy(use_parallel_residual=parallel, rotary_pct=rotary)
    for parameter in policy.model.parameters():  # no bias or norm that is 0 or 1, as fresh models have them
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    ids, mask = data.pad(PROMPTS, PAD, "left")
    assert not mask.all()
    fast, slow = ppo_core.decoder(policy, mask, 6), ppo_core._cached_decoder(policy, mask)
    tokens, stream = ids, torch.Generator().manual_seed(0)
    for _ in range(6):
        with torch.no_grad():
            logits, expected = fast(tokens), slow(tokens)
        assert logits.shape == (len(PROMPTS), 16)
        assert torch.equal(logits == -torch.inf, policy.forbidden.expand_as(logits))
        assert torch.allclose(logits, expected, atol=1e-5)
        tokens = torch.randint(2, 14, (len(PROMPTS), 1), generator=stream)


@pytest.mark.parametrize("parallel", [True, False])
def test_the_training_forward_is_the_models_own(toy_policy, monkeypatch, parallel):
    """GPT-NeoX's layers called directly against transformers' trunk, behind left padding: values and all gradients."""
    policy = moved(toy_policy(use_parallel_residual=parallel, rotary_pct=0.5), 3, 0.1)
    prompts, prompt_mask = data.pad(PROMPTS, PAD, "left")
    response, mask = data.pad([[4, 0], [9, 3, 2, 0], [7], [2, 2, 8]] * 2, PAD, "right")
    part = torch.cat([prompts, response], 1), torch.cat([prompt_mask, mask], 1), response, mask
    found = []
    for fast in (True, False):
        monkeypatch.setattr(ppo_core, "is_neox", lambda model, fast=fast: fast)
        logprobs, all_logprobs, values = evaluate(policy, *part, 0.8)
        everything = all_logprobs[mask.bool()][:, ~policy.forbidden]
        loss = everything.sin().sum() + values.mul(mask).sum()
        found.append((everything, values[mask.bool()], gradient(loss, policy)))
        assert torch.equal(logprobs == 0, mask == 0)
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)


def test_the_decoder_of_another_architecture_is_its_own_forward():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    policy = ppo_core.Policy(model, torch.arange(16) == PAD)
    ids, mask = data.pad(PROMPTS, PAD, "left")
    step = ppo_core.decoder(policy, mask, 2)
    drawn = torch.full((len(PROMPTS), 1), 5)
    with torch.no_grad():
        logits = [step(ids), step(drawn)]
        for b, prompt in enumerate(PROMPTS):  # one row alone, without padding or cache
            whole = policy.model(input_ids=torch.tensor([[*prompt, 5]])).logits[0, -2:]
            for t in (0, 1):
                assert torch.allclose(logits[t][b], whole[t].masked_fill(policy.forbidden, -torch.inf), atol=1e-5)


def test_generate_takes_the_same_randomness_whenever_rows_end(toy_policy):
    """Two calls on one stream: the second does not depend on where the first one's rows ended."""
    policy = toy_policy()
    nn.init.zeros_(policy.model.get_output_embeddings().weight)  # uniform over 13 ids
    ids, mask = data.pad(PROMPTS[:2], PAD, "left")
    lengths, states = [], []
    for eos in (EOS, 13, 15):  # 15 is forbidden, so that no row ends
        stream = torch.Generator().manual_seed(3)
        response, _ = generate(policy, ids, mask, 50, temperature=1.0, eos_id=eos, pad_id=PAD, generator=stream)
        lengths.append(response.shape[1])
        states.append(stream.get_state())
    assert len(set(lengths)) == 3 and lengths[2] == 50
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_generate_stops_when_every_row_has_ended(toy_policy):
    policy = toy_policy()
    nn.init.zeros_(policy.model.get_output_embeddings().weight)  # uniform over 13 ids
    ids, mask = data.pad(PROMPTS[:2], PAD, "left")
    response, response_mask = generate(policy, ids, mask, 500, temperature=1.0, eos_id=EOS, pad_id=PAD,
                                       generator=torch.Generator().manual_seed(0))
    assert response.shape[1] == response_mask.sum(1).max() < 500
    assert response.gather(1, response_mask.sum(1, keepdim=True) - 1).eq(EOS).all()


# ----------------------------------------------------------------------------------------------------- one rollout


def scorer(prompt_ids, prompt_mask, response_ids, response_mask):
    """A rule: the mean id of the response, about 0 to 2."""
    return (response_ids * response_mask).sum(1) / response_mask.sum(1) / 6


def references_of(policy, rule):
    """Two references, weights 0.7 and 0.3; merged into one under the rule `weights`."""
    references, weights = [moved(policy, 1, 0.05), moved(policy, 2, 0.1)], torch.tensor([0.7, 0.3], dtype=torch.float64)
    if rule != "weights":
        return references, weights
    references[0].model.load_state_dict(kl.average_weights([r.model.state_dict() for r in references], weights))
    return references[:1], torch.ones(1, dtype=torch.float64)


def roll(policy, settings, references, weights, seed=0):
    ids, mask = data.pad(PROMPTS, PAD, "left")
    return ppo_core.collect(policy, references, weights, references[0], scorer, ids, mask, settings, eos_id=EOS,
                            pad_id=PAD, generator=torch.Generator().manual_seed(seed))


def batch_of(rollout, advantages, returns):
    names = ("ids", "attention", "response", "mask", "logprobs", "values", "references")
    return {name: getattr(rollout, name) for name in names} | {"advantages": advantages, "returns": returns}


def test_entropy_golden():
    half = math.log(0.5)
    logprobs = torch.tensor([[half, half, -math.inf, -math.inf], [0.0, -math.inf, -math.inf, -math.inf],
                             [math.log(0.25)] * 4])
    close(entropy(logprobs), [math.log(2), 0.0, math.log(4)], 1e-6)


@few
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]), masked=st.integers(0, 6))
def test_entropy_is_never_negative_and_at_most_log_v(seed, scale, masked):
    logits = scale * randn(seed, 3, 7)
    logits[:, :masked] = -math.inf
    for dtype in (torch.float32, torch.float64):
        values = entropy(logits.to(dtype).log_softmax(-1))
        assert (values >= -1e-6).all() and (values <= math.log(7 - masked) + 1e-6).all()


def test_evaluate_is_the_log_softmax_of_each_prefix(toy_policy, small_settings):
    policy, s = moved(toy_policy(), 9, 0.1), small_settings(temperature=0.7, response_length=5)
    ids, mask, response, response_mask = sample(policy, s)
    whole, attention = torch.cat([ids, response], 1), torch.cat([mask, response_mask], 1)
    logprobs, all_logprobs, values = evaluate(policy, whole, attention, response, response_mask, 0.7)
    for b, prompt in enumerate(PROMPTS):
        for t in range(int(response_mask[b].sum())):
            prefix = torch.tensor([prompt + response[b, :t].tolist()])
            logits = policy.model(input_ids=prefix).logits[0, -1].masked_fill(policy.forbidden, -math.inf)
            expected = (logits / 0.7).log_softmax(-1)
            close(all_logprobs[b, t], expected, 2e-5)
            close(logprobs[b, t], expected[response[b, t]], 2e-5)
            close(values[b, t], policy.value_head(policy.model.base_model(prefix).last_hidden_state[0, -1])[0], 2e-5)
    assert not logprobs[response_mask == 0].any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_rollout_kl_is_generalized_kl(toy_policy, small_settings, rule, estimator):
    """The memory-saving path through reference_logprobs gives what kl.generalized_kl gives on whole logits."""
    policy, s = toy_policy(), small_settings(response_length=6, rule=rule, estimator=estimator, micro_batch=3)
    references, weights = references_of(policy, rule)
    rollout = roll(policy, s, references, weights)
    ids, attention, q = rollout.ids, rollout.attention, rollout.prompt_length
    expected = kl.generalized_kl(policy.response_forward(ids, attention, q)[0],
                                 [r.response_forward(ids, attention, q)[0] for r in references], weights,
                                 rule="geometric" if rule == "weights" else rule, estimator=estimator,
                                 tokens=rollout.response)
    valid = rollout.mask.bool()
    close(rollout.kl[valid], expected[valid], 2e-5)
    initial = references[0].response_forward(ids, attention, q)[0]
    exact = kl.generalized_kl(policy.response_forward(ids, attention, q)[0], [initial], [1.0])
    close(rollout.kl_initial[valid], exact[valid], 2e-5)


# ------------------------------------------------------------------------------------------------------ one update


def test_penalised_rewards_golden():
    """beta 0.5; rows of 3 and 2 tokens, scores 10 and 20; what kl holds on a pad (9) counts nowhere."""
    scores, mask = torch.tensor([10.0, 20.0]), lengths_mask([3, 2], 3)
    kl_tokens = torch.tensor([[0.2, 0.4, 0.6], [1.0, 2.0, 9.0]])
    for penalty, expected in {"loss": [[0.0, 0.0, 10.0], [0.0, 20.0, 0.0]],
                              "reward": [[-0.1, -0.2, 9.7], [-0.5, 19.0, 0.0]],
                              "both": [[-0.2, -0.3, 10.0], [-1.0, 20.0, 0.0]]}.items():
        close(penalised_rewards(scores, kl_tokens, mask, 0.5, penalty), expected, 1e-6)


def test_both_charges_the_kl_of_later_states_only():
    """With gamma = lambda = 1 the return at t holds -beta sum over t' > t of KL_t'."""
    kl_tokens, mask = randn(0, 2, 4).square(), lengths_mask([4, 3], 4)
    rewards = penalised_rewards(torch.zeros(2, dtype=torch.float64), kl_tokens, mask, 0.3, "both")
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    for b in range(2):
        for t in range(int(mask[b].sum())):
            close(returns[b, t], -0.3 * (kl_tokens * mask)[b, t + 1:].sum())


def plain_loss(policy, old, references, weights, rollout, settings, beta):
    """The loss of algorithm.md, one row and one token at a time: no padding, no mask, none of ppo_core's functions.

    Rule `geometric`; penalty "loss" and "both" with exact KL, "reward" with k1. Of the rollout it takes the sampled
    ids and the scores alone.
    """
    rows, q = [], rollout.prompt_length
    for b in range(len(rollout.ids)):
        prompt = rollout.ids[b, :q][rollout.attention[b, :q].bool()]
        response = rollout.response[b, :int(rollout.mask[b].sum())]
        ids, states = torch.cat([prompt, response])[None], slice(len(prompt) - 1, -1)
        log_pi, log_old, *log_mu = ((p.model(input_ids=ids).logits[0, states] / settings.temperature)
                                    .masked_fill(policy.forbidden, -1e6).log_softmax(-1)  # -1e6: finite, its exp is 0
                                    for p in (policy, old, *references))
        log_old, log_mu = log_old.detach(), [mu.detach() for mu in log_mu]
        log_rho = sum(w * mu for w, mu in zip(weights.tolist(), log_mu, strict=True)).log_softmax(-1)
        value, old_value = (p.value_head(p.model.base_model(input_ids=ids).last_hidden_state[0, states])[:, 0]
                            for p in (policy, old))

        length, reward = len(response), [0.0] * len(response)
        reward[-1] += rollout.scores[b].item()
        for t, token in enumerate(response.tolist()):
            if settings.penalty == "reward":
                reward[t] -= beta * (log_old[t, token] - log_rho[t, token]).item()
            if settings.penalty == "both" and t > 0:  # the state that token t - 1 led to
                reward[t - 1] -= beta * (log_old[t].exp() * (log_old[t] - log_rho[t])).sum().item()
        v = [*old_value.tolist(), 0.0]  # V after the end is 0
        delta = [reward[t] + settings.gamma * v[t + 1] - v[t] for t in range(length)]
        advantage = [sum((settings.gamma * settings.lam) ** (k - t) * delta[k] for k in range(t, length))
                     for t in range(length)]
        rows += zip(response.tolist(), log_pi, log_old, log_rho, value, v, advantage, strict=False)

    advantages = [row[-1] for row in rows]
    mean = sum(advantages) / len(rows)
    sigma = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(rows) + 1e-8)
    total = 0.0
    for token, log_pi, log_old, log_rho, value, old_value, advantage in rows:
        ratio, a = (log_pi[token] - log_old[token]).exp(), (advantage - mean) / sigma
        total = total + max(-ratio * a, -min(max(ratio, 1 - settings.clip), 1 + settings.clip) * a)
        near = min(max(value, old_value - settings.value_clip), old_value + settings.value_clip)
        returns = old_value + advantage
        total = total + settings.vf_coef * max((value - returns) ** 2, (near - returns) ** 2) / 2
        if settings.penalty != "reward":
            total = total + beta / sigma * (log_pi.exp() * (log_pi - log_rho)).sum()
    return total / len(rows)


def summed_gradient(policy, rollout, weights, settings, beta=0.3):
    """The gradient of optimise's last step, as one vector; and the metrics."""
    policy, steps = copy.deepcopy(policy), []
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(lambda *_: steps.append(
        torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])))
    metrics = optimise(policy, optimizer, rollout, weights, beta, settings, torch.Generator().manual_seed(0))
    assert all(parameter.grad is None for parameter in policy.parameters()), "no memory is held between updates"
    return steps[-1], metrics


@pytest.mark.parametrize("penalty, estimator", [("loss", "exact"), ("both", "exact"), ("reward", "k1")])
def test_gradient_of_an_update_is_that_of_the_loss_written_out(toy_policy, small_settings, penalty, estimator):
    """A policy that has left pi_old, so that ratios and values are clipped, on rows of unequal lengths."""
    old = moved(toy_policy(), 5, 0.05)
    s = small_settings(response_length=6, temperature=0.8, clip=0.1, value_clip=0.05, gamma=0.97, epochs=1,
                       minibatches=1, micro_batch=3, max_grad_norm=1e9, penalty=penalty, estimator=estimator)
    references, weights = references_of(old, "geometric")
    rollout = roll(old, s, references, weights)
    policy = moved(old, 6, 0.05)
    mine, metrics = summed_gradient(policy, rollout, weights, s, beta=0.4)
    assert metrics["clipfrac"] > 0.1 and metrics["value_clipfrac"] > 0.1, "the test should reach both clips"
    plain = gradient(plain_loss(policy, old, references, weights, rollout, s, 0.4), policy)
    assert (mine - plain).norm() < 2e-5 * plain.norm()
    assert plain.norm() > 0.01


@pytest.mark.parametrize("penalty, estimator", [("loss", "exact"), ("loss", "k2"), ("reward", "k1"), ("both", "exact")])
def test_micro_batches_do_not_change_the_gradient(toy_policy, small_settings, penalty, estimator):
    policy = toy_policy()
    s = small_settings(response_length=8, epochs=1, minibatches=1, max_grad_norm=1e9, penalty=penalty,
                       estimator=estimator)
    references, weights = references_of(policy, "geometric")
    rollout = roll(policy, s, references, weights)
    lengths = rollout.mask.sum(1)
    assert len(lengths.unique()) > 2, "the rows should have unequal lengths"
    policy = moved(policy, 3, 0.02)
    whole, metrics = summed_gradient(policy, rollout, weights, s)
    for micro_batch in (4, 3, 2):  # 1, 2, 3, 4 micro-batches
        part, part_metrics = summed_gradient(policy, rollout, weights, small_settings(
            response_length=8, epochs=1, minibatches=1, max_grad_norm=1e9, penalty=penalty, estimator=estimator,
            micro_batch=micro_batch))
        assert (part - whole).norm() < 1e-5 * whole.norm()
        assert part_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("penalty, estimator", PLACES)
def test_every_rule_estimator_and_place_runs(toy_policy, small_settings, rule, penalty, estimator):
    policy = toy_policy()
    s = small_settings(response_length=5, rule=rule, penalty=penalty, estimator=estimator, epochs=2, minibatches=2,
                       micro_batch=3, max_grad_norm=1e9)
    references, weights = references_of(policy, rule)
    rollout = roll(policy, s, references, weights)
    last, metrics = summed_gradient(policy, rollout, weights, s, beta=0.05)
    assert torch.isfinite(last).all() and last.abs().max() > 1e-4
    assert all(math.isfinite(value) for value in metrics.values())


def penalty_gradient(policy, rollout, weights, settings):
    """The part of ppo_loss's gradient that the penalty makes, for beta = sigma = 1, by difference; and its value."""
    ones = torch.zeros_like(rollout.logprobs)  # no advantage: the policy's part is 0
    on, off = (ppo_loss(policy, batch_of(rollout, ones, ones), weights, beta, torch.ones(()), settings)[0]
               for beta in (1.0, 0.0))
    return gradient(on - off, policy), (on - off).item()


def test_sum_and_geometric_have_the_same_gradient_in_the_loss(toy_policy, small_settings):
    """Only log Z lies between them, which does not depend on the policy. Their values differ by its mean."""
    old = toy_policy()
    policy, found = moved(old, 4, 0.05), {}
    for rule in ("sum", "geometric", "arithmetic"):
        s = small_settings(response_length=6, rule=rule)
        references, weights = references_of(old, rule)
        found[rule] = penalty_gradient(policy, roll(old, s, references, weights), weights, s)
    (by_sum, sum_value), (by_geometric, geometric_value), (by_arithmetic, _) = found.values()
    assert (by_sum - by_geometric).norm() < 1e-5 * by_sum.norm()
    assert sum_value > geometric_value + 1e-3
    assert (by_arithmetic - by_geometric).norm() > 1e-2 * by_sum.norm()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("rule", ["geometric", "sum"])
def test_later_epochs_weigh_a_sampled_penalty_by_the_detached_ratio(toy_policy, small_settings, estimator, rule):
    old = toy_policy()
    policy, s = moved(old, 4, 0.05), small_settings(response_length=6, estimator=estimator, rule=rule)
    references, weights = references_of(old, rule)
    rollout = roll(old, s, references, weights)
    ids, attention, response, mask = rollout.ids, rollout.attention, rollout.response, rollout.mask
    logprobs = evaluate(policy, ids, attention, response, mask, s.temperature)[0]
    fixed = reference_logprobs(references, weights, ids, attention, response, mask, rule=rule, estimator=estimator,
                               temperature=s.temperature)
    x = logprobs - fixed  # [K, B, T]
    each = x**2 / 2 if estimator == "k2" else (-x).exp() - 1 + x
    penalty = (each * (weights if rule == "sum" else torch.ones(1))[:, None, None]).sum(0).float()
    ratio = (logprobs - rollout.logprobs).exp()
    assert (ratio[mask.bool()] - 1).abs().max() > 0.05, "the policy should have left pi_old"
    detached, differentiated = ((weight * penalty)[mask.bool()].mean() for weight in (ratio.detach(), ratio))
    actual, value = penalty_gradient(policy, rollout, weights, s)
    assert value == pytest.approx(detached.item(), rel=1e-5)
    expected = gradient(detached, policy)
    assert (actual - expected).norm() < 1e-5 * expected.norm()
    assert (actual - gradient(differentiated, policy)).norm() > 1e-2 * expected.norm()


def test_the_value_loss_reaches_the_trunk_but_not_the_logits(toy_policy, small_settings):
    policy = moved(toy_policy(), 8, 0.05)
    s = small_settings(response_length=5)
    references, weights = references_of(policy, "geometric")
    rollout = roll(policy, s, references, weights)
    zero, one = torch.zeros_like(rollout.logprobs), torch.ones_like(rollout.logprobs)
    for parameters, reached in ((policy.value_head, True), (policy.model.base_model, True),
                                (policy.model.get_output_embeddings(), False)):
        loss, _ = ppo_loss(policy, batch_of(rollout, zero, one), weights, 0.0, torch.ones(()), s)
        grads = torch.autograd.grad(loss, list(parameters.parameters()), materialize_grads=True)
        assert any(grad.any() for grad in grads) == reached


@pytest.mark.parametrize("tied", [False, True])
def test_embed_and_project_sum_the_gradients_that_torch_makes(tied):
    """Three micro-batches, of which the first finds no gradient; against nn.Embedding and nn.Linear."""
    sizes, ids = (11, 4), torch.randint(0, 11, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    pulls, found = randn(2, 3, 2, 5, 11), []
    for fast in (True, False):
        table = randn(0, *sizes).requires_grad_()
        matrix = table if tied else randn(1, *sizes).requires_grad_()
        for tokens, pull in zip(ids, pulls, strict=True):
            if fast:
                logits = ppo_core.Project.apply(ppo_core.Embed.apply(tokens, table).tanh(), matrix)
            else:
                logits = nn.functional.linear(nn.functional.embedding(tokens, table).tanh(), matrix)
            (logits * pull).sum().backward()
        found.append((logits, table.grad, matrix.grad))
    for fast, slow in zip(*found, strict=True):
        close(fast, slow)
    kept = matrix.detach().clone()  # frozen: what may stand in its grad is not touched
    kept.grad = torch.zeros_like(kept)
    hidden = randn(3, 2, 5, 4).requires_grad_()
    ppo_core.Project.apply(hidden, kept).sum().backward()
    assert not kept.grad.any() and hidden.grad.any()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 40, 2**21])
def test_token_terms_are_autograds(monkeypatch, temperature, chunk):
    """The hand-written log-probs, KL and gradient against plain operations, with ids that have no probability."""
    monkeypatch.setattr(ppo_core, "CHUNK", chunk)  # 1, 2 and all states at a time
    leaf = randn(0, 3, 5, 20).requires_grad_()
    reference = randn(1, 3, 5, 20)
    barred = torch.zeros(20, dtype=torch.float64)
    barred[[1, 19]] = -torch.inf  # under both
    underflow = torch.zeros(20, dtype=torch.float64)
    underflow[7] = -2000.0  # pi is 0, its log is not -inf
    reference[0, 0, 7] = -torch.inf
    reference = (reference + barred).log_softmax(-1)
    tokens = torch.randint(2, 7, (3, 5), generator=torch.Generator().manual_seed(2))
    on_logprob, on_kl = randn(3, 3, 5), randn(4, 3, 5)
    found = []
    for fast in (True, False):
        logits = leaf * 1.5 + barred + underflow
        if fast:
            logprobs, penalty = ppo_core.TokenTerms.apply(logits, tokens, reference, temperature)
        else:
            every = (logits / temperature).log_softmax(-1)
            logprobs, penalty = every.gather(-1, tokens[..., None])[..., 0], kl.kl_exact(every, reference)
        grad, = torch.autograd.grad((logprobs * on_logprob + penalty * on_kl).sum(), leaf)
        found.append((logprobs, penalty, grad))
    for fast, slow in zip(*found, strict=True):
        close(fast, slow.detach())
    assert found[0][2].any()


@pytest.mark.parametrize("where, says", [("scores", "an advantage"), ("references", "the gradient's norm")])
def test_optimise_refuses_what_is_not_finite_before_the_weights_change(toy_policy, small_settings, where, says):
    policy, s = toy_policy(), small_settings(response_length=5)
    references, weights = references_of(policy, "geometric")
    rollout = roll(policy, s, references, weights)
    if where == "scores":
        rollout.scores[2] = math.inf
    else:
        rollout.references[:] = math.nan  # in the first minibatch too
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(FloatingPointError, match=says):
        optimise(policy, torch.optim.Adam(policy.parameters()), rollout, weights, 0.3, s, torch.Generator())
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_a_step_raises_the_probability_of_what_was_better(toy_policy, small_settings):
    """After an update, responses that scored above the mean are likelier and those below less so."""
    policy = toy_policy()
    s = small_settings(response_length=5, lr=1e-3, epochs=1, minibatches=1)
    rollout = roll(policy, s, [policy], torch.ones(1))
    optimise(policy, torch.optim.Adam(policy.parameters(), lr=s.lr, eps=1e-5), rollout, torch.ones(1), 0.0, s,
             torch.Generator().manual_seed(0))
    logprobs = evaluate(policy, rollout.ids, rollout.attention, rollout.response, rollout.mask, s.temperature)[0]
    gain = ((logprobs - rollout.logprobs) * whiten(rollout.scores[:, None].expand_as(logprobs), rollout.mask)).detach()
    assert masked_mean(gain, rollout.mask) > 1e-3


def test_a_sum_that_is_not_monotone_draws_no_impossible_id(monkeypatch):
    """On a GPU cumsum is a parallel sum: here one whose rounding gives an id of probability 0 some room."""
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: cumsum(x, dim) + torch.tensor([0.0, 0.1, 0.1, 0.0]))
    probs = torch.tensor([[0.5, 0.0, 0.2, 0.3]])
    assert ppo_core.sample_inverse_cdf(probs, torch.tensor([0.55])).item() == 0

"""kl.py, proved: the vocabulary is enumerated in float64, so that no expectation has a sampling error.

In reading order: the identities; values and gradients of the estimators at one state; a two-step world in
which the gradient of the sequence KL is known; then what a person who copies the file relies on: masks,
extremes, dtypes, memory, errors. K references, V vocabulary. The oracles use probabilities where kl.py uses
logarithms.
"""

import ast
import doctest
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kl

FILE = Path(kl.__file__)
SAMPLED = ("k1", "k2", "k3")
few = settings(max_examples=30, deadline=None)
rules, estimators = st.sampled_from(kl.RULES), st.sampled_from(kl.ESTIMATORS)


def randn(seed, *shape, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance), (actual - expected).abs().max()


def divergence(p, q):
    """KL(p‖q) of probabilities > 0, [..., V] -> [...]."""
    return (p * (p / q).log()).sum(-1)


def cooperative(mu, weights, rule):
    """ρ from probabilities μ [K, ..., V], without a logarithm."""
    weights = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (mu.dim() - 1))
    if rule == "arithmetic":
        return (weights * mu).sum(0)
    product = (mu**weights).prod(0)
    return product / product.sum(-1, keepdim=True)


def penalty(pi, mu, weights, rule):
    """The exact penalty of each rule, from probabilities."""
    if rule == "sum":
        return sum(w * divergence(pi, m) for w, m in zip(weights, mu, strict=True))
    return divergence(pi, cooperative(mu, weights, rule))


class Case(NamedTuple):
    logits: torch.Tensor  # [V]
    references: torch.Tensor  # [K, V] logits
    weights: list  # [K], zeros among them
    temperature: float


@st.composite
def cases(draw):
    K, V = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    seed = draw(st.integers(0, 10**6))
    counts = draw(st.lists(st.integers(0, 3), min_size=K, max_size=K).filter(any))
    temperature = draw(st.sampled_from([0.5, 0.7, 1.0, 2.0]))
    weights = [count / sum(counts) for count in counts]
    return Case(randn(seed, V), randn(seed + 1, K, V), weights, temperature)


def probabilities(case):
    return (case.logits / case.temperature).softmax(-1), (case.references / case.temperature).softmax(-1)


def per_token(case, rule, estimator, logits=None):
    """The penalty at every token of the vocabulary: [V] values, one for each a."""
    V = len(case.logits)
    rows = (case.logits if logits is None else logits).expand(V, V)
    references = case.references[:, None].expand(-1, V, V)
    return kl.generalized_kl(
        rows,
        references,
        case.weights,
        rule=rule,
        estimator=estimator,
        tokens=torch.arange(V),
        temperature=case.temperature,
    )


# ----------------------------------------------------------------------------------------------- identities


@few
@given(cases())
def test_each_rule_is_its_definition(case):
    pi, mu = probabilities(case)
    for rule in kl.RULES:
        exact = kl.generalized_kl(
            case.logits, case.references, case.weights, rule=rule, temperature=case.temperature
        )
        close(exact, penalty(pi, mu, case.weights, rule))
    for rule in ("geometric", "arithmetic"):
        logprobs = kl.cooperative_logprobs(case.references, case.weights, rule, case.temperature)
        close(logprobs.exp(), cooperative(mu, case.weights, rule))
        close(logprobs.exp().sum(-1), 1.0)


@few
@given(cases())
def test_sum_is_geometric_minus_log_z(case):
    args = dict(weights=case.weights, temperature=case.temperature)
    unnormalised = kl.weighted_logprobs(case.references, **args)
    log_z = unnormalised.logsumexp(-1)
    total = kl.generalized_kl(case.logits, case.references, rule="sum", **args)
    close(total, kl.generalized_kl(case.logits, case.references, rule="geometric", **args) - log_z)
    assert -log_z >= -1e-12
    close(kl.cooperative_logprobs(case.references, rule="geometric", **args), unnormalised - log_z)
    close(total, kl.kl_exact((case.logits / case.temperature).log_softmax(-1), unnormalised))


@few
@given(cases())
def test_arithmetic_is_the_centre_of_the_reverse_kls_and_bounded(case):
    pi, mu = probabilities(case)
    rho = kl.cooperative_logprobs(case.references, case.weights, "arithmetic", case.temperature).exp()
    reverse = sum(w * divergence(m, pi) for w, m in zip(case.weights, mu, strict=True))
    spread = sum(w * divergence(m, rho) for w, m in zip(case.weights, mu, strict=True))
    close(reverse, divergence(rho, pi) + spread)  # Σ_j w_j KL(μ_j‖π) = KL(ρ‖π) + Σ_j w_j KL(μ_j‖ρ)
    excess = kl.generalized_kl(
        case.logits, case.references, case.weights, rule="arithmetic", temperature=case.temperature
    )
    assert excess <= penalty(pi, mu, case.weights, "sum") + 1e-12
    for w, m in zip(case.weights, mu, strict=True):
        assert w == 0 or excess <= divergence(pi, m) - math.log(w) + 1e-12


@few
@given(cases(), st.floats(-5, 5))
def test_geometric_is_the_softmax_of_the_weighted_logits_at_any_temperature(case, shift):
    mixed = sum(w * logits for w, logits in zip(case.weights, case.references, strict=True))
    rho = kl.cooperative_logprobs(case.references, case.weights, "geometric", case.temperature)
    close(rho, (mixed / case.temperature).log_softmax(-1))
    close(rho, kl.cooperative_logprobs(case.references + shift, case.weights, "geometric", case.temperature))
    at_one = kl.cooperative_logprobs(case.references, case.weights, "geometric")
    close(rho, (at_one / case.temperature).log_softmax(-1))


def test_temperature_does_not_commute_with_arithmetic():
    references, weights = randn(3, 2, 4), [0.3, 0.7]
    tempered = kl.cooperative_logprobs(references, weights, "arithmetic", 0.5)
    afterwards = (kl.cooperative_logprobs(references, weights, "arithmetic") / 0.5).log_softmax(-1)
    assert (tempered - afterwards).abs().max() > 0.1


@few
@given(cases(), estimators)
def test_identical_references_are_one_reference_and_ordinary_kl(case, estimator):
    pi, mu = probabilities(case)
    x = (pi / mu[0]).log()  # [V]
    ordinary = {
        "exact": divergence(pi, mu[0]).expand_as(x),
        "k1": x,
        "k2": x**2 / 2,
        "k3": (-x).exp() - 1 + x,
    }
    same = case._replace(references=case.references[:1].expand_as(case.references))
    one = case._replace(references=case.references[:1], weights=[1.0])
    for rule in kl.RULES:
        close(per_token(same, rule, estimator), ordinary[estimator])
        close(per_token(one, rule, estimator), ordinary[estimator])


@few
@given(cases(), estimators, st.randoms(use_true_random=False))
def test_order_and_zero_weights_change_nothing(case, estimator, random):
    order = list(range(len(case.weights)))
    random.shuffle(order)
    permuted = case._replace(references=case.references[order], weights=[case.weights[j] for j in order])
    keep = [j for j, w in enumerate(case.weights) if w > 0]
    without = case._replace(references=case.references[keep], weights=[case.weights[j] for j in keep])
    poison = torch.tensor(case.weights) == 0
    poisoned = case._replace(references=case.references.masked_fill(poison[:, None], math.nan))
    for rule in kl.RULES:
        expected = per_token(case, rule, estimator)
        close(per_token(permuted, rule, estimator), expected)
        assert torch.equal(per_token(without, rule, estimator), expected)
        assert torch.equal(per_token(poisoned, rule, estimator), expected)


# ----------------------------------------------------------------------------- the estimators, at one state


@few
@given(cases())
def test_values_k1_and_k3_are_unbiased(case):
    pi, mu = probabilities(case)
    for rule in kl.RULES:
        exact = penalty(pi, mu, case.weights, rule)
        for estimator in ("k1", "k3"):
            close((pi * per_token(case, rule, estimator)).sum(), exact)
        assert (per_token(case, rule, "k3") >= 0).all()


def test_values_by_hand():
    """π = (1/2, 1/2), ρ = (9/10, 1/10): log(5/9) = −0.58779, log 5 = 1.60944. k2 is off: 0.734 for 0.511."""
    case = Case(
        torch.tensor([0.5, 0.5]).double().log(), torch.tensor([[0.9, 0.1]]).double().log(), [1.0], 1.0
    )
    for rule in kl.RULES:
        close(per_token(case, rule, "exact"), [0.510826, 0.510826], 1e-5)  # (−0.58779 + 1.60944)/2
        close(per_token(case, rule, "k1"), [-0.587787, 1.609438], 1e-5)
        close(per_token(case, rule, "k2"), [0.172747, 1.295145], 1e-5)  # mean 0.733946
        close(per_token(case, rule, "k3"), [0.212213, 0.809438], 1e-5)  # 9/5 − 1 − 0.58779, 1/5 − 1 + 1.60944


@few
@given(cases())
def test_k3_of_an_unnormalised_reference_is_off_by_z_minus_1_minus_log_z(case):
    pi, _ = probabilities(case)
    unnormalised = kl.weighted_logprobs(case.references, case.weights, case.temperature)
    log_z = unnormalised.logsumexp(-1)
    value = (pi * kl.kl_sampled(pi.log(), unnormalised, "k3")).sum()
    close(value, kl.kl_exact(pi.log(), unnormalised - log_z) + log_z.exp() - 1 - log_z)


def gradients(pi, rho, temperature):
    """Analytic, in the logits: ∇KL(π‖ρ) = π (log π/ρ − KL)/τ and ∇KL(ρ‖π) = (π − ρ)/τ, [..., V]."""
    x = (pi / rho).log()
    return pi * (x - (pi * x).sum(-1, keepdim=True)) / temperature, (pi - rho) / temperature


def penalty_gradients(case, rule):
    """(∇KL(π‖ρ), ∇KL(ρ‖π)), analytic. `sum`: the first is that of `geometric`, the second of `arithmetic`."""
    pi, mu = probabilities(case)
    forward = cooperative(mu, case.weights, "arithmetic" if rule == "arithmetic" else "geometric")
    reverse = cooperative(mu, case.weights, "geometric" if rule == "geometric" else "arithmetic")
    return gradients(pi, forward, case.temperature)[0], gradients(pi, reverse, case.temperature)[1]


@few
@given(cases(), rules)
def test_gradients_in_the_loss(case, rule):
    pi, _ = probabilities(case)
    forward, reverse = penalty_gradients(case, rule)
    expected = {"exact": forward, "k1": torch.zeros_like(pi), "k2": forward, "k3": reverse}
    for estimator in kl.ESTIMATORS:
        logits = case.logits.clone().requires_grad_()
        (pi * per_token(case, rule, estimator, logits)).sum().backward()  # tokens held fixed: π is a constant
        close(logits.grad, expected[estimator])


@few
@given(cases(), rules)
def test_gradients_in_later_epochs(case, rule):
    """Tokens from π_old, weight π/π_old: detached or differentiated."""
    forward, reverse = penalty_gradients(case, rule)
    old = randn(7, len(case.logits)).softmax(-1)

    def gradient(estimator, weight):
        logits = case.logits.clone().requires_grad_()
        ratio = (logits / case.temperature).softmax(-1) / old
        ratio = {"detached": ratio.detach(), "differentiated": ratio, "none": 1.0}[weight]
        (old * ratio * per_token(case, rule, estimator, logits)).sum().backward()
        return logits.grad

    close(gradient("k1", "detached"), torch.zeros_like(forward))
    close(gradient("k2", "detached"), forward)
    close(gradient("k3", "detached"), reverse)
    close(gradient("k1", "differentiated"), forward)
    close(gradient("k3", "differentiated"), forward)
    close(gradient("exact", "none"), forward)  # it does not read the token


def test_k2_with_a_differentiated_weight_is_wrong():
    case = Case(randn(0, 5), randn(1, 2, 5), [0.4, 0.6], 1.0)
    pi, mu = probabilities(case)
    forward, _ = gradients(pi, cooperative(mu, case.weights, "geometric"), 1.0)
    logits = case.logits.clone().requires_grad_()
    (logits.softmax(-1) * per_token(case, "geometric", "k2", logits)).sum().backward()
    assert (logits.grad - forward).norm() > 0.2 * forward.norm()


# ----------------------------------------------------------------------------------------- a two-step world


class TwoSteps:
    """Every sequence (a_1, a_2); policy and references have logits for the start and after each a_1."""

    weights, temperature = [0.5, 0.2, 0.3], 0.7

    def __init__(self, seed, V=3, K=3):
        self.parameters = randn(
            seed, 1 + V, V
        ).requires_grad_()  # [1+V, V] row 0: the start; row 1+a: after a
        self.references = randn(seed + 1, K, 1 + V, V)
        self.tokens = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # [V², 2] every sequence
        self.states = torch.stack([torch.zeros(V * V, dtype=torch.long), 1 + self.tokens[:, 0]], 1)  # [V², 2]

    def logprobs(self):
        """log π(a_t|s_t), [V², 2], differentiable."""
        rows = (self.parameters / self.temperature).log_softmax(-1)[self.states]  # [V², 2, V]
        return rows.gather(-1, self.tokens[..., None])[..., 0]

    def cost(self, rule, estimator):
        """The penalty of each token of each sequence, [V², 2], from the function under test."""
        return kl.generalized_kl(
            self.parameters[self.states],
            self.references[:, self.states],
            self.weights,
            rule=rule,
            estimator=estimator,
            tokens=self.tokens,
            temperature=self.temperature,
        )

    def gradient(self, objective):
        return torch.autograd.grad(objective, self.parameters, retain_graph=True)[0]  # [1+V, V]

    def mean(self, x):
        """E over sequences, [V²] -> scalar, with the sequences held fixed (no gradient through sampling)."""
        return (self.logprobs().sum(-1).exp().detach() * x).sum()

    def loss(self, cost):
        """Each sequence's term of E[Σ_t ∇c_t]: the cost differentiated, [V²]."""
        return cost.sum(-1)

    def reward(self, cost):
        """Each sequence's term of E[Σ_t ∇log π(a_t|s_t) Σ_{t'≥t} c_t'], the cost detached, [V²]."""
        to_go = cost.detach().flip(-1).cumsum(-1).flip(-1)  # [V², 2]
        return (self.logprobs() * to_go).sum(-1)

    def both(self, exact):
        """exact in the loss, exact of later states in the reward, [V²]."""
        later = exact.detach().flip(-1).cumsum(-1).flip(-1) - exact.detach()  # [V², 2] Σ over t' > t
        return exact.sum(-1) + (self.logprobs() * later).sum(-1)

    def states_kl(self, direction):
        """E[Σ_t ∇KL_t] by the analytic gradient of each state, [1+V, V]: 0 is ∇KL(π‖ρ), 1 is ∇KL(ρ‖π)."""
        pi = (self.parameters.detach() / self.temperature).softmax(-1)
        rho = cooperative((self.references / self.temperature).softmax(-1), self.weights, "geometric")
        visits = torch.cat([torch.ones(1, dtype=pi.dtype), pi[0]])  # the probability that a state is visited
        return visits[:, None] * gradients(pi, rho, self.temperature)[direction]

    def sequence_penalty(self, rule):
        """The whole penalty of the sequence, from the probabilities of whole sequences; differentiable."""
        P = self.logprobs().sum(-1).exp()  # [V²]
        mu = (self.references / self.temperature).softmax(-1)
        if rule == "sum":
            return sum(w * divergence(P, self.sequences(m)) for w, m in zip(self.weights, mu, strict=True))
        return divergence(P, self.sequences(cooperative(mu, self.weights, rule)))

    def sequences(self, rows):
        """Probabilities of next tokens [1+V, V] -> probabilities of sequences [V²]."""
        return rows[self.states].gather(-1, self.tokens[..., None])[..., 0].prod(-1)


def whole_and(seed, rule, method, estimator):
    """The gradient of the sequence penalty, and what `estimator` in the place `method` follows instead."""
    world = TwoSteps(seed)
    followed = world.gradient(world.mean(method(world, world.cost(rule, estimator))))
    return world.gradient(world.sequence_penalty(rule)), followed


@pytest.mark.parametrize("rule", kl.RULES)
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_k1_in_the_reward_and_both_follow_the_sequence_kl(seed, rule):
    whole, followed = whole_and(seed, rule, TwoSteps.reward, "k1")
    close(followed, whole)
    whole, followed = whole_and(seed, rule, TwoSteps.both, "exact")
    close(followed, whole)


@pytest.mark.parametrize("rule", kl.RULES)
def test_reward_plus_loss_is_the_gradient_of_the_mean_cost(rule):
    """∇E[Σ c] = (in the reward) + (in the loss), for any cost: hence each entry of kl.py's table."""
    for estimator in kl.ESTIMATORS:
        world = TwoSteps(5)
        cost = world.cost(rule, estimator)
        split = world.gradient(world.mean(world.reward(cost))) + world.gradient(world.mean(world.loss(cost)))
        mean_cost = (world.logprobs().sum(-1).exp() * cost.sum(-1)).sum()  # differentiated through both
        close(split, world.gradient(mean_cost))


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_what_each_estimator_follows_in_each_place(seed):
    world = TwoSteps(seed)
    forward, reverse = world.states_kl(0), world.states_kl(1)
    whole, exact_in_reward = whole_and(seed, "geometric", TwoSteps.reward, "exact")
    close(exact_in_reward, whole - forward)  # the immediate term is missing
    close(whole_and(seed, "geometric", TwoSteps.reward, "k3")[1], whole - reverse)  # KL(π‖ρ) − KL(ρ‖π)
    k2 = world.cost("geometric", "k2")
    mean_k2 = world.gradient((world.logprobs().sum(-1).exp() * k2.sum(-1)).sum())
    close(world.gradient(world.mean(world.reward(k2))), mean_k2 - forward)  # E[x²/2] − KL(π‖ρ)
    for estimator, followed in dict(exact=forward, k1=0 * forward, k2=forward, k3=reverse).items():
        close(whole_and(seed, "geometric", TwoSteps.loss, estimator)[1], followed)


def test_measured_what_exact_alone_leaves_out():
    """Share of the gradient's norm that is missing in the world of seed 0: at the start, after one token."""

    def missing(method):
        whole, followed = whole_and(0, "geometric", method, "exact")
        return [
            ((whole - followed)[rows].norm() / whole[rows].norm()).item()
            for rows in (slice(0, 1), slice(1, 4))
        ]

    assert missing(TwoSteps.loss) == pytest.approx([0.220, 0.0], abs=1e-3)  # that a_1 chooses the next state
    assert missing(TwoSteps.reward) == pytest.approx(
        [0.780, 1.0], abs=1e-3
    )  # the current token, so the last wholly


def test_both_has_as_a_rule_less_variance_than_k1():
    """Variance of one sequence's gradient in 50 random worlds. No theorem: about 1 world in 75 has more."""
    ratios = []
    for seed in range(0, 500, 10):
        world = TwoSteps(seed)
        P = world.logprobs().sum(-1).exp().detach()[:, None]  # [V², 1]
        variances = []
        for terms in (
            world.reward(world.cost("geometric", "k1")),
            world.both(world.cost("geometric", "exact")),
        ):
            G = torch.stack([world.gradient(term).flatten() for term in terms])  # [V², (1+V)V]
            variances.append((P * (G - (P * G).sum(0)) ** 2).sum())
        ratios.append((variances[1] / variances[0]).item())
    assert sorted(ratios)[25] < 0.3
    assert sum(ratio > 1 for ratio in ratios) <= 2


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_have_no_first_order_pull_near_the_reference(estimator):
    rho, direction = randn(0, 5).log_softmax(-1), randn(1, 5)

    def pull(name, distance):
        logits = (rho + distance * direction).requires_grad_()
        logprobs = logits.log_softmax(-1)
        cost = kl.kl_sampled(logprobs, rho, name).detach()
        (logprobs.exp().detach() * logprobs * cost).sum().backward()
        return logits.grad.norm()

    assert pull("k1", 1e-3) / pull("k1", 1e-4) == pytest.approx(10, rel=0.01)
    assert pull(estimator, 1e-3) / pull(estimator, 1e-4) == pytest.approx(100, rel=0.01)


def test_k3_in_the_reward_pays_for_leaving_the_tokens_of_the_reference():
    logits = torch.tensor([-8.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)  # ρ is uniform
    logprobs = logits.log_softmax(-1)
    rho = torch.full_like(logprobs, -math.log(3))
    slope = {}
    for name in ("k1", "k3"):
        cost = kl.kl_sampled(logprobs, rho, name).detach()
        slope[name] = torch.autograd.grad(
            (logprobs.exp().detach() * logprobs * cost).sum(), logits, retain_graph=True
        )[0][0]
    assert (
        slope["k1"] < 0 < slope["k3"]
    )  # descent brings token 0 back with k1 and drives it further out with k3


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_sum_and_geometric_differ_by_log_z_in_the_reward_and_not_in_the_loss(seed):
    world = TwoSteps(seed)
    for estimator in ("exact", "k2"):
        in_loss = [
            world.gradient(world.mean(world.loss(world.cost(rule, estimator))))
            for rule in ("sum", "geometric")
        ]
        close(in_loss[0], in_loss[1])
    log_z = kl.weighted_logprobs(world.references, world.weights, world.temperature).logsumexp(-1)  # [1+V]
    price = -(world.logprobs().sum(-1).exp() * log_z[world.states].sum(-1)).sum()  # −E Σ_t log Z(s_t)
    difference = world.sequence_penalty("sum") - world.sequence_penalty("geometric")
    close(difference, price)
    in_reward = [
        world.gradient(world.mean(world.reward(world.cost(rule, "k1")))) for rule in ("sum", "geometric")
    ]
    close(in_reward[0] - in_reward[1], world.gradient(price))
    assert world.gradient(price).norm() > 1e-3


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_whole_sequences_have_their_own_geometric_mean_and_log_z(seed):
    world = TwoSteps(seed)
    mu = (world.references / world.temperature).softmax(-1)
    M = torch.stack(
        [world.sequences(m) for m in mu]
    ).log()  # [K, V²] as K references over a vocabulary of sequences
    P = world.logprobs().sum(-1)  # [V²]
    unnormalised = kl.weighted_logprobs(M, world.weights)
    geometric = kl.cooperative_logprobs(M, world.weights)
    close(world.sequence_penalty("sum"), kl.kl_exact(P, geometric) - unnormalised.logsumexp(-1))
    token_level = kl.kl_exact(P, world.sequences(cooperative(mu, world.weights, "geometric")).log())
    assert (token_level - kl.kl_exact(P, geometric)).abs() > 1e-3  # not the mean of each token's


# ---------------------------------------------------------------------- masks, extremes, dtypes and devices


@few
@given(cases(), estimators, st.data())
def test_a_masked_vocabulary_is_the_smaller_vocabulary(case, estimator, data):
    """Values and gradients are those without the masked tokens, and the gradient at the masked ones is 0."""
    V = len(case.logits)
    allowed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=V, max_size=V).filter(any)))
    masked = case._replace(
        logits=case.logits.masked_fill(~allowed, -math.inf),
        references=case.references.masked_fill(~allowed, -math.inf),
    )
    smaller = case._replace(logits=case.logits[allowed], references=case.references[:, allowed])
    for rule in kl.RULES:
        wide, narrow = masked.logits.clone().requires_grad_(), smaller.logits.clone().requires_grad_()
        value, expected = (
            per_token(masked, rule, estimator, wide),
            per_token(smaller, rule, estimator, narrow),
        )
        close(value[allowed], expected)
        assert estimator == "exact" or (value[~allowed] == 0).all()  # a masked id as padding gives 0, not NaN
        repeats = V / len(expected) if estimator == "exact" else 1  # exact has the same value in every row
        value.square().sum().backward()  # through the masked tokens too
        (repeats * expected.square().sum()).backward()
        close(wide.grad[allowed], narrow.grad)
        assert (wide.grad[~allowed] == 0).all()


def test_a_token_that_only_the_policy_can_produce_costs_infinity():
    logits, reference = torch.zeros(3), torch.tensor([0.0, 0.0, -math.inf])
    for rule in ("geometric", "sum"):
        assert kl.generalized_kl(logits, [reference, logits], [0.5, 0.5], rule=rule) == math.inf
        for estimator in SAMPLED:
            value = kl.generalized_kl(
                logits,
                [reference, logits],
                [0.5, 0.5],
                rule=rule,
                estimator=estimator,
                tokens=torch.tensor(2),
            )
            assert value == math.inf
    assert kl.generalized_kl(logits, [reference, logits], [0.5, 0.5], rule="arithmetic").isfinite()
    assert kl.generalized_kl(reference, [logits], [1.0]).item() == pytest.approx(
        math.log(1.5)
    )  # the other way: fine


def test_disjoint_supports():
    left = torch.tensor(
        [[0.0, 0.0, 0.0], [1.0, 2.0, -math.inf]]
    )  # [T, V] the second position has nothing in common
    right = torch.tensor([[0.0, 0.0, 0.0], [-math.inf, -math.inf, 1.0]])
    args = ([left, right], [0.5, 0.5])
    with pytest.raises(ValueError, match="reference_logits have disjoint supports"):
        kl.cooperative_logprobs(*args)
    with pytest.raises(ValueError, match="reference_logits have disjoint supports"):
        kl.generalized_kl(torch.zeros(2, 3), *args)
    assert kl.generalized_kl(torch.zeros(2, 3), *args, rule="sum").tolist() == [0.0, math.inf]
    assert kl.generalized_kl(torch.zeros(2, 3), *args, rule="arithmetic").isfinite().all()


def test_nan_is_not_hidden():
    good, bad = torch.zeros(3), torch.tensor([0.0, math.nan, 0.0])
    for rule in kl.RULES:
        assert kl.generalized_kl(good, [good, bad], [0.5, 0.5], rule=rule).isnan()
        assert kl.generalized_kl(bad, [good], [1.0], rule=rule).isnan()
    assert kl.kl_sampled(bad, good, "k2").isnan().tolist() == [False, True, False]
    never = torch.tensor([-math.inf, -math.inf])  # only what *both* rule out counts as padding
    assert kl.kl_sampled(never, torch.tensor([-1.0, -math.inf]), "k2").tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", kl.RULES)
def test_extreme_logits(rule, dtype):
    inf = math.inf
    policy = torch.tensor([[1e4, -1e4, 0.0, -inf], [0.0, -inf, -inf, -inf], [-1e4, 0.5, 1.0, -inf]])
    first = torch.tensor([[-1e4, 1e4, 3.0, -inf], [1.0, 2.0, 3.0, -inf], [-1e4, 1.0, 0.0, -inf]])
    second = torch.tensor([[1.0, 2.0, 3.0, -inf], [0.0, 1e4, 0.0, -inf], [0.0, 0.0, 1e4, -inf]])
    policy, references = policy.to(dtype).requires_grad_(), [first.to(dtype), second.to(dtype)]
    value = kl.generalized_kl(policy, references, [0.25, 0.75], rule=rule)
    exact = kl.generalized_kl(
        policy.detach().double(), [r.double() for r in references], [0.25, 0.75], rule=rule
    )
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite().all() and (value >= 0).all()
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    value.sum().backward()
    assert policy.grad.dtype == dtype
    assert policy.grad.isfinite().all() and (policy.grad[:, 3] == 0).all()
    tokens = torch.tensor([0, 0, 2])
    for estimator in ("k1", "k2"):  # k3 = e^(−x) … overflows honestly where π is e^(20000) times less than ρ
        sampled = kl.generalized_kl(
            policy, references, [0.25, 0.75], rule=rule, estimator=estimator, tokens=tokens
        )
        assert sampled.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    policy, references = randn(0, 4, 50).to(dtype), randn(1, 3, 4, 50).to(dtype)
    tokens = torch.arange(4)
    for rule in kl.RULES:
        for estimator in kl.ESTIMATORS:

            def compute(to, rule=rule, estimator=estimator):
                return kl.generalized_kl(
                    policy.to(to),
                    references.to(to),
                    [0.2, 0.3, 0.5],
                    rule=rule,
                    estimator=estimator,
                    tokens=tokens,
                )

            assert torch.equal(compute(dtype), compute(torch.float32))
    ours = kl.token_logprobs(policy, tokens)
    assert torch.equal(ours, kl.token_logprobs(policy.float(), tokens)) and ours.dtype == torch.float32
    logprobs, ref_logprobs = policy.log_softmax(-1), references[0].log_softmax(-1)
    assert torch.equal(
        kl.kl_exact(logprobs, ref_logprobs), kl.kl_exact(logprobs.float(), ref_logprobs.float())
    )
    assert torch.equal(
        kl.kl_sampled(logprobs, ref_logprobs, "k3"),
        kl.kl_sampled(logprobs.float(), ref_logprobs.float(), "k3"),
    )


def test_a_probability_that_underflows_counts_as_zero():
    logprobs = torch.tensor([0.0, -2e4], requires_grad=True)
    value = kl.kl_exact(logprobs, torch.tensor([-1.0, -math.inf]))
    assert value == 1.0
    value.backward()
    assert logprobs.grad.tolist() == [2.0, 0.0]


def test_digits_of_small_and_far_values():
    x = torch.tensor([1e-3, -1e-3])
    torch.testing.assert_close(
        kl.kl_sampled(x, torch.zeros(2), "k3"), torch.tensor([4.99833e-7, 5.00167e-7]), rtol=1e-3, atol=0
    )  # e^(−x) − 1 + x itself is 10% off here in float32
    far = torch.tensor([0.0, -200.0])  # e^(−200) is 0 in float32; the arithmetic mean keeps its logarithm
    assert kl.cooperative_logprobs([far, far], [0.5, 0.5], "arithmetic")[1].item() == pytest.approx(-200.0)


def test_token_logprobs():
    logits, tokens = randn(0, 2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    ours = kl.token_logprobs(logits, tokens, temperature=0.7)
    for b in range(2):
        for t in range(3):
            p = (logits[b, t] / 0.7).exp()
            close(ours[b, t], (p[tokens[b, t]] / p.sum()).log())
    close(kl.token_logprobs(logits, tokens), kl.token_logprobs(0.7 * logits, tokens, 0.7))  # 1 unless told


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_any_device():
    case = Case(randn(0, 6), randn(1, 3, 6), [0.2, 0.3, 0.5], 0.7)
    tokens = torch.tensor(2)
    for rule in kl.RULES:
        for estimator in kl.ESTIMATORS:
            args = dict(rule=rule, estimator=estimator, temperature=0.7)
            there = kl.generalized_kl(
                case.logits.cuda(),
                case.references.cuda(),
                torch.tensor(case.weights).cuda(),
                tokens=tokens.cuda(),
                **args,
            )
            close(
                there.cpu(),
                kl.generalized_kl(case.logits, case.references, case.weights, tokens=tokens, **args),
            )


# ------------------------------------------------------------------ references: forms, gradients and memory


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
@pytest.mark.parametrize("rule", kl.RULES)
def test_list_stack_and_generator_agree_and_nothing_reaches_a_reference(rule, estimator):
    logits = randn(0, 2, 3, 5).requires_grad_()
    references, weights = randn(1, 4, 2, 3, 5).requires_grad_(), torch.tensor([0.1, 0.2, 0.0, 0.7])
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    before = [x.detach().clone() for x in (logits, references, weights, tokens)]
    seen = []

    def generator():
        for reference in references:
            scaled = reference * 1.0
            seen.append(scaled.requires_grad)
            yield scaled

    forms = [references, list(references), generator()]
    values = [
        kl.generalized_kl(logits, form, weights, rule=rule, estimator=estimator, tokens=tokens)
        for form in forms
    ]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert seen == [False] * 4  # its body runs under no_grad: a reference model builds no graph
    values[0].sum().backward()
    assert references.grad is None and logits.grad.isfinite().all()
    for x, copy in zip((logits, references, weights, tokens), before, strict=True):
        assert torch.equal(x, copy)


def test_nothing_reaches_the_reference_logprobs():
    logprobs = randn(0, 5).log_softmax(-1).requires_grad_()
    reference = randn(1, 5).log_softmax(-1).requires_grad_()
    before = logprobs.detach().clone(), reference.detach().clone()
    for value in (
        kl.kl_exact(logprobs, reference),
        *(kl.kl_sampled(logprobs, reference, k).sum() for k in SAMPLED),
    ):
        value.backward()
    assert reference.grad is None and logprobs.grad is not None
    assert torch.equal(logprobs, before[0]) and torch.equal(reference, before[1])
    references = randn(1, 2, 5).requires_grad_()
    for made in (
        kl.weighted_logprobs(references, [0.5, 0.5]),
        kl.cooperative_logprobs(references, [0.5, 0.5]),
        kl.cooperative_logprobs(references, [0.5, 0.5], "arithmetic"),
    ):
        assert not made.requires_grad


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
@pytest.mark.parametrize("rule", kl.RULES)
def test_each_reference_is_let_go_before_the_next_is_made(rule, estimator):
    alive, drawn = [], []

    def make(j):
        assert all(reference() is None for reference in alive)
        reference = randn(j, 3, 5)
        alive.append(weakref.ref(reference))
        drawn.append(j)
        return reference

    kl.generalized_kl(
        randn(9, 3, 5),
        (make(j) for j in range(4)),
        [0.5, 0.2, 0.0, 0.3],
        rule=rule,
        estimator=estimator,
        tokens=torch.arange(3),
    )
    assert drawn == [0, 1, 2, 3]  # one with weight 0 too: the generator stays in step with the weights


MEASURE = """
import resource, torch, kl
torch.set_num_threads(1)
logits, tokens = torch.zeros(16, 131072), torch.zeros(16, dtype=torch.long)  # 8 MiB
def peak(K):
    for rule in kl.RULES:
        for estimator in ("exact", "k3"):
            references = (logits + j for j in range(K))
            kl.generalized_kl(logits, references, [1 / K] * K, rule=rule, estimator=estimator, tokens=tokens)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak(2), peak(7))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in KiB")
def test_peak_memory_does_not_grow_with_the_number_of_references():
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    two, seven = map(int, run_python("-c", MEASURE, cwd=FILE.parent, env=env).split())
    assert seven - two < 4 * 1024  # KiB; five references more would hold 40 MiB


# ------------------------------------------------------------------------------------ what is left of kl.py


@pytest.mark.parametrize(
    "name, changes",
    [
        ("weights", dict(weights=[0.5, 0.4])),
        ("weights", dict(weights=[0.5, 0.5 + 2e-6])),
        ("weights", dict(weights=[1.5, -0.5])),
        ("weights", dict(weights=[math.nan, 1.0])),
        ("weights", dict(weights=[math.inf, 0.0])),
        ("weights", dict(weights=[])),
        ("weights", dict(weights=[[0.5, 0.5]])),
        ("weights", dict(weights=0.5)),
        ("reference_logits", dict(weights=[1.0])),
        ("reference_logits", dict(weights=[0.2, 0.3, 0.5])),
        ("reference_logits", dict(reference_logits=torch.zeros(2, 4, 5))),
        ("reference_logits", dict(reference_logits=torch.zeros(2, 3, 6))),
        ("reference_logits", dict(reference_logits=torch.zeros(2, 5))),
        ("reference_logits", dict(reference_logits=[torch.zeros(3, 5), torch.zeros(1, 5)])),
        ("rule", dict(rule="weights")),
        ("estimator", dict(estimator="k4")),
        ("tokens", dict(estimator="k1", tokens=None)),
        ("tokens", dict(estimator="k1", tokens=torch.zeros(2, dtype=torch.long))),
        ("tokens", dict(estimator="k1", tokens=torch.zeros(1, 3, dtype=torch.long))),
        ("temperature", dict(temperature=0.0)),
        ("temperature", dict(temperature=-1.0)),
        ("temperature", dict(temperature=math.nan)),
        ("temperature", dict(temperature=math.inf)),
    ],
)
def test_wrong_arguments_are_named(name, changes):
    args = dict(
        logits=torch.zeros(3, 5),
        reference_logits=torch.zeros(2, 3, 5),
        weights=[0.5, 0.5],
        tokens=torch.zeros(3, dtype=torch.long),
    )
    for rule in kl.RULES:
        for estimator in kl.ESTIMATORS:
            combination = args | dict(rule=rule, estimator=estimator) | changes
            if name == "tokens" and combination["estimator"] == "exact":
                continue
            with pytest.raises(ValueError, match=rf"^{name}\b"):
                kl.generalized_kl(**combination)


def test_wrong_arguments_of_the_parts_are_named():
    a, b = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match="^rule='sum' .* no single cooperative reference.*generalized_kl"):
        kl.cooperative_logprobs([a], [1.0], "sum")
    with pytest.raises(ValueError, match="^rule must be one of"):
        kl.cooperative_logprobs([a], [1.0], "mean")
    with pytest.raises(ValueError, match="^estimator must be one of k1, k2, k3"):
        kl.kl_sampled(a, a, "exact")
    with pytest.raises(ValueError, match="^estimator must be one of exact, k1, k2, k3"):
        kl.generalized_kl(a, (1 / 0 for _ in "a"), [1.0], estimator="k4", tokens=a)  # before any reference
    for function in (kl.kl_exact, kl.kl_sampled):
        with pytest.raises(ValueError, match="^ref_logprobs has the shape"):
            function(a, b)
    with pytest.raises(ValueError, match="^reference_logits has the shape"):
        kl.weighted_logprobs([a, b], [0.5, 0.5])
    with pytest.raises(ValueError, match="^tokens has the shape"):
        kl.token_logprobs(a, torch.zeros(1, dtype=torch.long))


def test_weights_within_the_tolerance_are_normalised():
    for weights in ([0.5, 0.5 + 9e-7], torch.full((3,), 1 / 3)):
        for rule in ("geometric", "arithmetic"):
            references = randn(0, len(weights), 5)
            close(kl.cooperative_logprobs(references, weights, rule).logsumexp(-1), 0.0, 1e-14)
        same = references[:1].expand_as(references)
        close(kl.weighted_logprobs(same, weights), same[0].log_softmax(-1), 1e-14)


def test_communication_matrix():
    def rows(*args, **kwargs):
        return kl.communication_matrix(*args, **kwargs)

    close(rows("self", 3), [[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]])
    close(rows("self", 2, self_weight=0.8), [[0.8, 0.2], [0.2, 0.8]])
    close(rows("uniform", 4, self_weight=0.9), [[0.25] * 4] * 4)
    close(rows("ring", 2, 0.6), [[0.6, 0.4], [0.4, 0.6]])  # both neighbours are one agent
    close(rows("ring", 3, 0.6), [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    close(rows("ring", 5, 0.6)[0], [0.6, 0.2, 0.0, 0.0, 0.2])
    close(rows("ring", 5, 0.6)[3], [0.0, 0.0, 0.2, 0.6, 0.2])
    close(
        rows("star", 4, 0.7),
        [[0.7, 0.1, 0.1, 0.1], [0.3, 0.7, 0.0, 0.0], [0.3, 0.0, 0.7, 0.0], [0.3, 0.0, 0.0, 0.7]],
    )
    assert torch.equal(rows("identity", 3, 0.5), torch.eye(3, dtype=torch.float64))
    for kind in kl.MATRICES:
        assert rows(kind, 1).tolist() == [[1.0]]
        for n_agents in (1, 2, 3, 4, 7):
            for self_weight in (0.0, 0.4, 1.0):
                W = rows(kind, n_agents, self_weight)
                assert W.dtype == torch.float64 and W.shape == (n_agents, n_agents) and (W >= 0).all()
                close(W.sum(-1), [1.0] * n_agents, 1e-15)
                if kind in ("self", "ring", "star") and n_agents > 1:
                    close(W.diagonal(), [self_weight] * n_agents, 1e-15)


@pytest.mark.parametrize(
    "name, args",
    [
        ("kind", ("tree", 3)),
        ("n_agents", ("self", 0)),
        ("n_agents", ("self", 2.0)),
        ("self_weight", ("self", 3, 1.1)),
        ("self_weight", ("self", 3, -0.1)),
        ("self_weight", ("self", 3, math.nan)),
    ],
)
def test_communication_matrix_refuses(name, args):
    with pytest.raises(ValueError, match=f"^{name} must"):
        kl.communication_matrix(*args)


def test_average_weights():
    def state(value, count=3, dtype=torch.float32):
        return {"w": torch.full((2, 2), value, dtype=dtype), "steps": torch.tensor(count)}

    states = [state(1.0), state(5.0), state(math.nan, count=9)]
    average = kl.average_weights(states, [0.75, 0.25, 0.0])
    assert list(average) == ["w", "steps"]
    assert average["w"].tolist() == [[2.0, 2.0]] * 2 and average["w"].dtype == torch.float32
    assert average["steps"].item() == 3
    average["w"].zero_()
    average["steps"].zero_()
    assert states[0]["w"][0, 0] == 1.0 and states[0]["steps"] == 3  # no memory is shared
    alone = kl.average_weights(states[:1], [1.0])
    assert alone["w"].data_ptr() != states[0]["w"].data_ptr() and torch.equal(alone["w"], states[0]["w"])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        same = kl.average_weights([state(0.1, dtype=dtype)] * 3, [0.3, 0.3, 0.4])
        assert torch.equal(same["w"], state(0.1, dtype=dtype)["w"])
    half = [{"w": randn(j, 100).half()} for j in range(3)]
    in_float64 = sum(w * state["w"].double() for w, state in zip([0.2, 0.3, 0.5], half, strict=True))
    assert torch.equal(
        kl.average_weights(half, [0.2, 0.3, 0.5])["w"], in_float64.half()
    )  # rounded once, at the end
    model = torch.nn.Linear(2, 2)
    averaged = kl.average_weights([dict(model.named_parameters())] * 2, [0.5, 0.5])
    assert not averaged["weight"].requires_grad and torch.equal(averaged["weight"], model.weight)


def test_average_weights_refuses():
    state = {"w": torch.zeros(2), "steps": torch.tensor(1)}
    for other, message in [
        (state | {"steps": torch.tensor(2)}, "'steps'.*not floating point"),
        (state | {"w": torch.zeros(3)}, "shape or dtype of 'w'"),
        (state | {"w": torch.zeros(2, dtype=torch.float64)}, "shape or dtype of 'w'"),
        (state | {"extra": torch.zeros(1)}, "'extra' is missing"),
        ({"w": torch.zeros(2)}, "'steps' is missing"),
    ]:
        for pair in ([state, other], [other, state]):
            with pytest.raises(ValueError, match=f"^state_dicts.*{message}"):
                kl.average_weights(pair, [0.5, 0.5])
        kl.average_weights([state, other], [1.0, 0.0])  # left out, it cannot disagree
    with pytest.raises(ValueError, match="^state_dicts holds 1"):
        kl.average_weights([state], [0.5, 0.5])
    with pytest.raises(ValueError, match="^weights must"):
        kl.average_weights([state, state], [0.5, 0.6])


def test_the_weights_rule_is_one_ordinary_reference():
    models = [torch.nn.Linear(4, 6, dtype=torch.float64) for _ in range(3)]
    weights, x, logits = [0.2, 0.3, 0.5], randn(0, 7, 4), randn(1, 7, 6)
    merged = torch.nn.Linear(4, 6, dtype=torch.float64)
    merged.load_state_dict(kl.average_weights([model.state_dict() for model in models], weights))
    through_weights = kl.generalized_kl(logits, [merged(x)], [1.0])
    close(through_weights, divergence(logits.softmax(-1), merged(x).softmax(-1)).detach())
    through_logits = kl.generalized_kl(logits, (model(x) for model in models), weights)
    close(
        through_weights, through_logits
    )  # a linear model: the mean of its weights is the mean of its logits


def test_adaptive_kl():
    beta = kl.AdaptiveKL(coef=0.15, target=6.0, horizon=10_000)
    golden = [  # kl, n, β by hand: 0.15 · (1 + clip(kl/6 − 1, ±0.2) · n/10000) …
        (0.0, 500, 0.15 * 0.99),  # clipped at −0.2: 1 − 0.2 · 0.05
        (5.4, 1000, 0.15 * 0.99 * 0.99),  # 5.4/6 − 1 = −0.1: 1 − 0.1 · 0.1
        (6.0, 1000, 0.15 * 0.99 * 0.99),  # on target
        (6.6, 2000, 0.15 * 0.99 * 0.99 * 1.02),
        (60.0, 1000, 0.15 * 0.99 * 0.99 * 1.02 * 1.02),  # clipped at +0.2
    ]
    for value, n, expected in golden:
        assert beta.update(value, n) == pytest.approx(expected, rel=1e-12)
        assert beta.coef == pytest.approx(expected, rel=1e-12)
    assert isinstance(beta.update(torch.tensor(5.0), 1), float)


def test_adaptive_kl_refuses():
    good = dict(coef=0.1, target=6.0, horizon=100)
    for name in good:
        for value in (0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"^{name} must be positive"):
                kl.AdaptiveKL(**good | {name: value})
    beta = kl.AdaptiveKL(**good)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="^kl must be finite"):
            beta.update(value, 1)
    for n in (0, -1, 500):
        with pytest.raises(ValueError, match="^n must lie"):
            beta.update(1.0, n)
    assert beta.coef == 0.1
    assert beta.update(0.0, 499) > 0


def run_python(*args, **options):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=True, **options
    ).stdout


def test_the_docstring_example_runs_alone_in_an_empty_folder(tmp_path):
    examples = doctest.DocTestFinder(recurse=False).find(kl, "kl")[0].examples
    assert 0 < len(examples) <= 10 and examples[-1].want  # ten lines, and their last result is checked
    shutil.copy(FILE, tmp_path)
    assert run_python("-m", "doctest", "kl.py", cwd=tmp_path) == ""


def test_torch_and_the_standard_library_are_all_it_imports():
    tree = ast.parse(FILE.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"torch"}
    assert FILE.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: MIT")

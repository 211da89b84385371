"""kl.py, proved: the vocabulary is enumerated in float64, so no expectation has a sampling error.

In reading order: the two steps and their composition; the identities; values and gradients of the
estimators at one state; a two-step world in which the gradient of the sequence KL is known; then
what a person who copies the file relies on: masks, extremes, dtypes, memory, errors.
The oracles use probabilities where kl.py uses logarithms. K references, V vocabulary.
"""

import ast
import doctest
import functools
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
SEVERAL = ("geometric", "sum", "arithmetic")  # the rules that take several references
few = settings(max_examples=30, deadline=None)
estimators = st.sampled_from(kl.ESTIMATORS)
inf, nan = math.inf, math.nan


def randn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


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


def by_definition(pi, mu, weights, rule, estimator="exact"):
    """Each rule and estimator from probabilities: [V], the penalty at every token."""
    if rule == "sum":
        return sum(w * by_definition(pi, m[None], [1.0], "arithmetic", estimator)
                   for w, m in zip(weights, mu, strict=True))
    rho = cooperative(mu, weights, rule)
    x = (pi / rho).log()
    forms = {"exact": divergence(pi, rho).expand_as(x), "k1": x, "k2": x**2 / 2,
             "k3": rho / pi - 1 + x}
    return forms[estimator]


class Case(NamedTuple):
    logits: torch.Tensor  # [V]
    references: torch.Tensor  # [K, V] logits
    weights: list  # [K], zeros among them
    temperature: float

    @property
    def rules(self):
        return kl.RULES if len(self.weights) == 1 else SEVERAL

    @property
    def probabilities(self):
        return [(x / self.temperature).softmax(-1) for x in (self.logits, self.references)]

    @property
    def given(self):
        """What describes the references in all of kl.py's functions."""
        return {"reference_logits": self.references, "weights": self.weights,
                "temperature": self.temperature}


@st.composite
def cases(draw):
    K, V = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    seed = draw(st.integers(0, 10**6))
    counts = draw(st.lists(st.integers(0, 3), min_size=K, max_size=K).filter(any))
    temperature = draw(st.sampled_from([0.5, 0.7, 1.0, 2.0]))
    weights = [count / sum(counts) for count in counts]
    return Case(randn(seed, V), randn(seed + 1, K, V), weights, temperature)


def per_token(case, rule, estimator, logits=None, function=kl.generalized_kl):
    """The penalty at every token of the vocabulary: [V] values, one for each a."""
    V = len(case.logits)
    rows = (case.logits if logits is None else logits).expand(V, V)
    return function(rows, **case.given | {"reference_logits": case.references[:, None].expand(
        -1, V, V)}, rule=rule, estimator=estimator, tokens=torch.arange(V))


# -------------------------------------------------------------- the two steps and their composition


def two_steps(logits, reference_logits, weights, *, temperature, **options):
    """generalized_kl as a trainer does it: references once, the policy at every gradient step."""
    made = kl.reference(reference_logits, weights, temperature=temperature, **options)
    assert not made.requires_grad
    columns = len(weights) if options["rule"] == "sum" else 1
    assert made.shape[-1] == (logits.shape[-1] if options["estimator"] == "exact" else columns)
    return kl.penalty((logits / temperature).log_softmax(-1), made, weights, **options)


@few
@given(cases(), estimators)
def test_reference_then_penalty_is_generalized_kl_and_each_rule_its_definition(case, estimator):
    """Also with a graph on the references, and where a reference of weight 0 holds NaN."""
    pi, mu = case.probabilities
    references = case.references.masked_fill(torch.tensor(case.weights)[:, None] == 0, nan)
    poisoned = case._replace(references=references.requires_grad_())
    for rule in case.rules:
        found = []
        for function in (kl.generalized_kl, two_steps, one_pass):
            logits = case.logits.clone().requires_grad_()
            value = per_token(poisoned, rule, estimator, logits, function)
            value.square().sum().backward()
            found.append((value.detach(), logits.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
        assert torch.equal(found[2][0], found[0][0])
        close(found[2][1], found[0][1])
        close(found[0][0], by_definition(pi, mu, case.weights, rule, estimator))
    assert references.grad is None


def one_pass(logits, reference_logits, weights, *, temperature, tokens, **options):
    """The penalty by logprobs_and_kl."""
    made = kl.reference(reference_logits, weights, temperature=temperature, tokens=tokens,
                        **options)
    return kl.logprobs_and_kl(logits, made, weights, temperature=temperature, tokens=tokens,
                              **options)[1]


@few
@given(cases(), estimators, st.sampled_from([1, 2**21]))
def test_logprobs_and_kl_is_token_logprobs_and_the_penalty(case, estimator, chunk):
    """Values and the gradient of any function of both, with some ids masked, a state at a time and
    all at once; and each of the two alone, of one graph."""
    V = len(case.logits)
    masked = torch.arange(V + 2) >= V
    wide, references = (torch.nn.functional.pad(x, (0, 2)).masked_fill(masked, -inf)
                        for x in (case.logits, case.references))
    given = {"temperature": case.temperature, "tokens": torch.arange(V), "estimator": estimator}
    for rule in case.rules:
        made = kl.reference(references[:, None].expand(-1, V, -1), case.weights, rule=rule, **given)
        found = []
        for whole in (True, False):
            logits = wide.expand(V, -1).clone().requires_grad_()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kl, "CPU_CHUNK", chunk)
                if whole:
                    logprobs, penalty = kl.logprobs_and_kl(
                        logits, made, case.weights, rule=rule, **given)
                else:
                    every = (logits / case.temperature).log_softmax(-1)
                    logprobs = kl.token_logprobs(logits, torch.arange(V), case.temperature)
                    penalty = kl.penalty(every, made, case.weights, rule=rule, estimator=estimator,
                                         tokens=torch.arange(V))
                sums = (logprobs.sum(), penalty.sum(), (logprobs * penalty).sin().sum())
                found.append([logprobs, penalty, *(
                    torch.autograd.grad(one, logits, retain_graph=True)[0] for one in sums)])
        for a, b in zip(*found, strict=True):
            close(a, b)
            assert not a[..., V:].any() or a.dim() == 1  # a masked id has no gradient


def test_logprobs_and_kl_by_hand():
    """Three tokens, tau 2: the derivatives by finite differences in float64, one state without any
    leading dimension; a token that the reference excludes costs infinity."""
    logits, reference = randn(0, 3).requires_grad_(), randn(1, 3).log_softmax(-1)
    token = torch.tensor(1)

    def both(z):
        return kl.logprobs_and_kl(z, reference, [1.0], tokens=token, temperature=2.0)

    assert [x.shape for x in both(logits)] == [(), ()]
    assert torch.autograd.gradcheck(both, logits)
    impossible = torch.tensor([0.0, 0.0, -inf]).log_softmax(-1)
    assert kl.logprobs_and_kl(logits, impossible, [1.0], tokens=token)[1] == inf


def test_autocast_does_not_round_the_kl():
    logits, reference = randn(0, 4, 50).float(), randn(1, 4, 50).float().log_softmax(-1)
    tokens = torch.arange(4)

    def found():
        return (kl.kl_exact(logits.log_softmax(-1), reference),
                kl.logprobs_and_kl(logits, reference, [1.0], tokens=tokens)[1])

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        for inside, outside in zip(found(), expected, strict=True):
            assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_no_states_have_no_kl():
    none = torch.zeros(0, 5)
    for value in kl.logprobs_and_kl(none, none, [1.0], tokens=torch.zeros(0, dtype=torch.long)):
        assert value.shape == (0,)


@few
@given(cases())
def test_the_cooperative_reference_is_a_distribution_by_its_rule(case):
    _, mu = case.probabilities
    for rule in set(case.rules) - {"sum"}:
        rho = kl.cooperative_logprobs(**case.given, rule=rule).exp()
        close(rho, cooperative(mu, case.weights, rule))
        close(rho.sum(-1), 1.0)
        assert torch.equal(kl.reference(**case.given, rule=rule).exp(), rho)


def test_what_is_known_of_a_reference_of_weight_0_under_sum_is_0():
    made = kl.reference(randn(0, 3, 2, 5), [0.5, 0.0, 0.5], rule="sum", estimator="k3",
                        tokens=torch.tensor([1, 4]))  # [2, K]
    assert (made[:, 1] == 0).all() and (made[:, [0, 2]] < 0).all()


# --------------------------------------------------------------------------------------- identities


@few
@given(cases())
def test_sum_is_geometric_minus_log_z(case):
    total = kl.generalized_kl(case.logits, **case.given, rule="sum")
    unnormalised = kl.reference(**case.given, rule="sum")  # Σ_j w_j log μ_j
    log_z = unnormalised.logsumexp(-1)
    close(total, kl.generalized_kl(case.logits, **case.given, rule="geometric") - log_z)
    assert -log_z >= -1e-12
    close(kl.cooperative_logprobs(**case.given), unnormalised - log_z)
    close(total, kl.kl_exact((case.logits / case.temperature).log_softmax(-1), unnormalised))


@few
@given(cases())
def test_arithmetic_is_the_centre_of_the_reverse_kls_and_bounded(case):
    pi, mu = case.probabilities
    rho = kl.cooperative_logprobs(**case.given, rule="arithmetic").exp()
    reverse, spread = (sum(w * divergence(m, q) for w, m in zip(case.weights, mu, strict=True))
                       for q in (pi, rho))
    close(reverse, divergence(rho, pi) + spread)  # Σ_j w_j KL(μ_j‖π), Σ_j w_j KL(μ_j‖ρ)
    excess = kl.generalized_kl(case.logits, **case.given, rule="arithmetic")
    assert excess <= kl.generalized_kl(case.logits, **case.given, rule="sum") + 1e-12
    for w, m in zip(case.weights, mu, strict=True):
        assert w == 0 or excess <= divergence(pi, m) - math.log(w) + 1e-12


@few
@given(cases(), st.floats(-5, 5))
def test_geometric_is_the_softmax_of_the_weighted_logits_at_any_temperature(case, shift):
    mixed = sum(w * logits for w, logits in zip(case.weights, case.references, strict=True))
    rho = kl.cooperative_logprobs(**case.given)
    close(rho, (mixed / case.temperature).log_softmax(-1))
    shifted = case._replace(references=case.references + shift)
    close(rho, kl.cooperative_logprobs(**shifted.given))
    at_one = kl.cooperative_logprobs(case.references, case.weights)
    close(rho, (at_one / case.temperature).log_softmax(-1))


def test_temperature_does_not_commute_with_arithmetic():
    mix = functools.partial(kl.cooperative_logprobs, randn(3, 2, 4), [0.3, 0.7], "arithmetic")
    assert (mix(0.5) - (mix() / 0.5).log_softmax(-1)).abs().max() > 0.1


@few
@given(cases(), estimators)
def test_identical_references_are_one_reference_and_ordinary_kl(case, estimator):
    pi, mu = case.probabilities
    same = case._replace(references=case.references[:1].expand_as(case.references))
    one = case._replace(references=case.references[:1], weights=[1.0])
    for each in (same, one):
        for rule in each.rules:
            ordinary = by_definition(pi, mu[:1], [1.0], "arithmetic", estimator)
            close(per_token(each, rule, estimator), ordinary)


@few
@given(cases(), estimators, st.randoms(use_true_random=False))
def test_order_and_zero_weights_change_nothing(case, estimator, random):
    def chosen(which):
        return case._replace(references=case.references[which],
                             weights=[case.weights[j] for j in which])
    order = list(range(len(case.weights)))
    random.shuffle(order)
    kept = [j for j, w in enumerate(case.weights) if w > 0]
    for rule in case.rules:
        expected = per_token(case, rule, estimator)
        close(per_token(chosen(order), rule, estimator), expected)
        assert torch.equal(per_token(chosen(kept), rule, estimator), expected)


# --------------------------------------------------------------------- the estimators, at one state


@few
@given(cases())
def test_values_k1_and_k3_are_unbiased(case):
    pi, mu = case.probabilities
    for rule in case.rules:
        exact = by_definition(pi, mu, case.weights, rule)[0]
        for estimator in ("k1", "k3"):
            close((pi * per_token(case, rule, estimator)).sum(), exact)
        assert (per_token(case, rule, "k3") >= 0).all()


def test_values_by_hand():
    """π = (1/2, 1/2), ρ = (9/10, 1/10): log(5/9) = −0.58779, log 5 = 1.60944."""
    pi, rho = torch.tensor([0.5, 0.5]).double(), torch.tensor([[0.9, 0.1]]).double()
    case = Case(pi.log(), rho.log(), [1.0], 1.0)
    golden = {"exact": [0.510826, 0.510826],  # (−0.58779 + 1.60944)/2
              "k1": [-0.587787, 1.609438],
              "k2": [0.172747, 1.295145],  # biased: its mean is 0.733946
              "k3": [0.212213, 0.809438]}  # 9/5 − 1 − 0.58779, 1/5 − 1 + 1.60944
    for rule in kl.RULES:
        for estimator, values in golden.items():
            close(per_token(case, rule, estimator), values, 1e-5)


@few
@given(cases())
def test_k3_of_an_unnormalised_reference_is_off_by_z_minus_1_minus_log_z(case):
    pi, _ = case.probabilities
    unnormalised = kl.reference(**case.given, rule="sum")
    log_z = unnormalised.logsumexp(-1)
    value = (pi * kl.kl_sampled(pi.log(), unnormalised, "k3")).sum()
    close(value, kl.kl_exact(pi.log(), unnormalised - log_z) + log_z.exp() - 1 - log_z)


def gradients(pi, rho, temperature):
    """Analytic, in the logits: ∇KL(π‖ρ) = π (log π/ρ − KL)/τ, ∇KL(ρ‖π) = (π − ρ)/τ, [..., V]."""
    x = (pi / rho).log()
    return pi * (x - (pi * x).sum(-1, keepdim=True)) / temperature, (pi - rho) / temperature


def penalty_gradients(case, rule):
    """(∇KL(π‖ρ), ∇KL(ρ‖π)). `sum`: the first is `geometric`'s, the second `arithmetic`'s."""
    pi, mu = case.probabilities
    forward = cooperative(mu, case.weights, "arithmetic" if rule == "arithmetic" else "geometric")
    reverse = cooperative(mu, case.weights, "arithmetic" if rule == "sum" else rule)
    return (gradients(pi, forward, case.temperature)[0],
            gradients(pi, reverse, case.temperature)[1])


@few
@given(cases())
def test_gradients_in_the_loss(case):
    """Tokens from π_old, which may be π, held fixed, weight π/π_old: detached or differentiated."""
    old = randn(7, len(case.logits)).softmax(-1)

    def gradient(rule, estimator, weight):
        logits = case.logits.clone().requires_grad_()
        ratio = (logits / case.temperature).softmax(-1) / old
        ratio = {"detached": ratio.detach(), "differentiated": ratio, "none": 1.0}[weight]
        (old * ratio * per_token(case, rule, estimator, logits)).sum().backward()
        return logits.grad

    for rule in case.rules:
        forward, reverse = penalty_gradients(case, rule)
        for estimator, weight, expected in (
                ("k1", "detached", 0 * forward), ("k2", "detached", forward),
                ("k3", "detached", reverse), ("k1", "differentiated", forward),
                ("k3", "differentiated", forward), ("exact", "none", forward)):
            close(gradient(rule, estimator, weight), expected)


def test_k2_with_a_differentiated_weight_is_wrong():
    case = Case(randn(0, 5), randn(1, 2, 5), [0.4, 0.6], 1.0)
    forward, _ = penalty_gradients(case, "geometric")
    logits = case.logits.clone().requires_grad_()
    (logits.softmax(-1) * per_token(case, "geometric", "k2", logits)).sum().backward()
    assert (logits.grad - forward).norm() > 0.2 * forward.norm()


# --------------------------------------------------------------------------------- a two-step world


def to_go(cost):
    """Σ_{t'≥t} c_t', [..., T]."""
    return cost.flip(-1).cumsum(-1).flip(-1)


class TwoSteps:
    """Every sequence (a_1, a_2); policy and references have logits at the start and after a_1."""

    weights, temperature = [0.5, 0.2, 0.3], 0.7

    def __init__(self, seed, V=3, K=3):
        # [1+V, V] row 0: the start; row 1+a: after a
        self.parameters = randn(seed, 1 + V, V).requires_grad_()
        self.references = randn(seed + 1, K, 1 + V, V)
        self.mu = (self.references / self.temperature).softmax(-1)
        self.tokens = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # [V², 2] all of them
        start = torch.zeros(V * V, dtype=torch.long)
        self.states = torch.stack([start, 1 + self.tokens[:, 0]], 1)  # [V², 2]

    def logprobs(self):
        """log π(a_t|s_t), [V², 2], differentiable."""
        rows = (self.parameters / self.temperature).log_softmax(-1)[self.states]  # [V², 2, V]
        return rows.gather(-1, self.tokens[..., None])[..., 0]

    def cost(self, rule, estimator):
        """The penalty of each token of each sequence, [V², 2], from the function under test."""
        return kl.generalized_kl(
            self.parameters[self.states], self.references[:, self.states], self.weights, rule=rule,
            estimator=estimator, tokens=self.tokens, temperature=self.temperature)

    def gradient(self, objective):
        return torch.autograd.grad(objective, self.parameters, retain_graph=True)[0]  # [1+V, V]

    def mean(self, x):
        """E over sequences, [V²] -> scalar; differentiable in their probabilities too."""
        return (self.logprobs().sum(-1).exp() * x).sum()

    def follow(self, x):
        """The gradient of a loss with terms x [V²] on sampled sequences, in expectation."""
        return self.gradient((self.logprobs().sum(-1).exp().detach() * x).sum())

    def loss(self, cost):
        """Each sequence's term of E[Σ_t ∇c_t]: the cost differentiated, [V²]."""
        return cost.sum(-1)

    def reward(self, cost):
        """Its term of E[Σ_t ∇log π(a_t|s_t) Σ_{t'≥t} c_t'], the cost detached, [V²]."""
        return (self.logprobs() * to_go(cost.detach())).sum(-1)

    def both(self, exact):
        """Exact in the loss, exact of later states (t' > t) in the reward, [V²]."""
        later = to_go(exact.detach()) - exact.detach()
        return exact.sum(-1) + (self.logprobs() * later).sum(-1)

    def states_kl(self, direction):
        """E[Σ_t ∇KL_t], analytic, [1+V, V]: 0 is ∇KL(π‖ρ), 1 is ∇KL(ρ‖π)."""
        pi = (self.parameters.detach() / self.temperature).softmax(-1)
        rho = cooperative(self.mu, self.weights, "geometric")
        visits = torch.cat([torch.ones(1, dtype=pi.dtype), pi[0]])  # the probability of each state
        return visits[:, None] * gradients(pi, rho, self.temperature)[direction]

    def sequence_penalty(self, rule):
        """The penalty of whole sequences, from their probabilities; differentiable."""
        P = self.logprobs().sum(-1).exp()  # [V²]
        if rule == "sum":
            return sum(w * divergence(P, self.sequences(m))
                       for w, m in zip(self.weights, self.mu, strict=True))
        return divergence(P, self.sequences(cooperative(self.mu, self.weights, rule)))

    def sequences(self, rows):
        """Probabilities of next tokens [1+V, V] -> probabilities of sequences [V²]."""
        return rows[self.states].gather(-1, self.tokens[..., None])[..., 0].prod(-1)


seeds = pytest.mark.parametrize("seed", [0, 10, 20])


@seeds
@pytest.mark.parametrize("rule", SEVERAL)
def test_k1_in_the_reward_and_both_follow_the_sequence_kl(seed, rule):
    world = TwoSteps(seed)
    whole = world.gradient(world.sequence_penalty(rule))
    close(world.follow(world.reward(world.cost(rule, "k1"))), whole)
    close(world.follow(world.both(world.cost(rule, "exact"))), whole)


@pytest.mark.parametrize("rule", SEVERAL)
def test_reward_plus_loss_is_the_gradient_of_the_mean_cost(rule):
    """∇E[Σ c] = (in the reward) + (in the loss), for any cost: so each entry of kl.py's table."""
    for estimator in kl.ESTIMATORS:
        world = TwoSteps(5)
        cost = world.cost(rule, estimator)
        close(world.follow(world.reward(cost) + world.loss(cost)),
              world.gradient(world.mean(cost.sum(-1))))


@seeds
def test_what_each_estimator_follows_in_each_place(seed):
    world = TwoSteps(seed)
    forward, reverse = world.states_kl(0), world.states_kl(1)
    whole = world.gradient(world.sequence_penalty("geometric"))
    cost = {estimator: world.cost("geometric", estimator) for estimator in kl.ESTIMATORS}
    in_reward = {name: world.follow(world.reward(each)) for name, each in cost.items()}
    close(in_reward["exact"], whole - forward)  # the immediate term is missing
    close(in_reward["k3"], whole - reverse)  # KL(π‖ρ) − KL(ρ‖π)
    mean_k2 = world.gradient(world.mean(cost["k2"].sum(-1)))
    close(in_reward["k2"], mean_k2 - forward)  # E[x²/2] − KL(π‖ρ)
    for estimator, followed in dict(exact=forward, k1=0 * forward, k2=forward, k3=reverse).items():
        close(world.follow(world.loss(cost[estimator])), followed)


def test_both_has_as_a_rule_less_variance_than_k1():
    """Of one sequence's gradient in 50 random worlds. No theorem: about 1 world in 75 has more."""
    ratios = []
    for seed in range(0, 500, 10):
        world, variances = TwoSteps(seed), []
        P = world.logprobs().sum(-1).exp().detach()[:, None]  # [V², 1]
        for terms in (world.reward(world.cost("geometric", "k1")),
                      world.both(world.cost("geometric", "exact"))):
            G = torch.stack([world.gradient(term).flatten() for term in terms])  # [V², (1+V)V]
            variances.append((P * (G - (P * G).sum(0)) ** 2).sum())
        ratios.append((variances[1] / variances[0]).item())
    assert sorted(ratios)[25] < 0.3
    assert sum(ratio > 1 for ratio in ratios) <= 2


def pull(logits, rho, estimator):
    """The gradient in the logits of a cost that is in the reward, at one state."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    cost = kl.kl_sampled(logprobs, rho, estimator).detach()
    return torch.autograd.grad((logprobs.exp().detach() * logprobs * cost).sum(), logits)[0]


def test_in_the_reward_k2_and_k3_have_no_first_order_pull_near_the_reference():
    rho, direction = randn(0, 5).log_softmax(-1), randn(1, 5)
    for estimator, growth in {"k1": 10, "k2": 100, "k3": 100}.items():
        far, near = (pull(rho + d * direction, rho, estimator).norm() for d in (1e-3, 1e-4))
        assert far / near == pytest.approx(growth, rel=0.01)


def test_k3_in_the_reward_pays_for_leaving_the_tokens_of_the_reference():
    """Descent brings token 0 back with k1, and drives it further out with k3."""
    logits = torch.tensor([-8.0, 0.0, 0.0], dtype=torch.float64)
    uniform = torch.full_like(logits, -math.log(3))
    assert pull(logits, uniform, "k1")[0] < 0 < pull(logits, uniform, "k3")[0]


@seeds
def test_sum_and_geometric_differ_by_log_z_in_the_reward_and_not_in_the_loss(seed):
    world = TwoSteps(seed)
    for estimator in ("exact", "k2"):
        close(*(world.follow(world.loss(world.cost(rule, estimator)))
                for rule in ("sum", "geometric")))
    unnormalised = kl.reference(world.references, world.weights, rule="sum",
                                temperature=world.temperature)
    price = -world.mean(unnormalised.logsumexp(-1)[world.states].sum(-1))  # −E Σ_t log Z(s_t)
    close(world.sequence_penalty("sum") - world.sequence_penalty("geometric"), price)
    by_sum, by_geometric = (world.follow(world.reward(world.cost(rule, "k1")))
                            for rule in ("sum", "geometric"))
    close(by_sum - by_geometric, world.gradient(price))
    assert world.gradient(price).norm() > 1e-3


@seeds
def test_whole_sequences_have_their_own_geometric_mean_and_log_z(seed):
    """K references over a vocabulary of sequences: not the mean of each token's."""
    world = TwoSteps(seed)
    M = torch.stack([world.sequences(m) for m in world.mu]).log()  # [K, V²]
    P = world.logprobs().sum(-1)  # [V²]
    log_z = kl.reference(M, world.weights, rule="sum").logsumexp(-1)
    geometric = kl.cooperative_logprobs(M, world.weights)
    close(world.sequence_penalty("sum"), kl.kl_exact(P, geometric) - log_z)
    token_level = world.sequences(cooperative(world.mu, world.weights, "geometric")).log()
    assert (kl.kl_exact(P, token_level) - kl.kl_exact(P, geometric)).abs() > 1e-3


# -------------------------------------------------------------- masks, extremes, dtypes and devices


@few
@given(cases(), estimators, st.data())
def test_a_masked_vocabulary_is_the_smaller_vocabulary(case, estimator, data):
    """Values and gradients are those without the masked tokens, whose own gradient is 0."""
    V = len(case.logits)
    allowed = st.lists(st.booleans(), min_size=V, max_size=V).filter(any)
    allowed = torch.tensor(data.draw(allowed))
    masked = case._replace(references=case.references.masked_fill(~allowed, -inf))
    smaller = case._replace(logits=case.logits[allowed], references=case.references[:, allowed])
    for rule in case.rules:
        wide = case.logits.masked_fill(~allowed, -inf).requires_grad_()
        narrow = smaller.logits.clone().requires_grad_()
        value = per_token(masked, rule, estimator, wide)
        expected = per_token(smaller, rule, estimator, narrow)
        close(value[allowed], expected)
        # A masked id as padding gives 0, not NaN; exact has the same value in every row.
        assert estimator == "exact" or (value[~allowed] == 0).all()
        repeats = V / len(expected) if estimator == "exact" else 1
        value.square().sum().backward()  # through the masked tokens too
        (repeats * expected.square().sum()).backward()
        close(wide.grad[allowed], narrow.grad)
        assert (wide.grad[~allowed] == 0).all()


def test_a_token_that_only_the_policy_can_produce_costs_infinity():
    logits, reference = torch.zeros(3), torch.tensor([0.0, 0.0, -inf])
    pair = ([reference, logits], [0.5, 0.5])
    for rule in ("geometric", "sum"):
        for estimator in kl.ESTIMATORS:
            assert kl.generalized_kl(logits, *pair, rule=rule, estimator=estimator,
                                     tokens=torch.tensor(2)) == inf
    assert kl.generalized_kl(logits, *pair, rule="arithmetic").isfinite()
    other_way = kl.generalized_kl(reference, [logits], [1.0])
    assert other_way.item() == pytest.approx(math.log(1.5))


def test_disjoint_supports():
    """At the second of two positions [T, V] the references have no token in common."""
    left = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, -inf]])
    right = torch.tensor([[0.0, 0.0, 0.0], [-inf, -inf, 1.0]])
    pair = ([left, right], [0.5, 0.5])
    with pytest.raises(ValueError, match="reference_logits have disjoint supports"):
        kl.cooperative_logprobs(*pair)
    with pytest.raises(ValueError, match="reference_logits have disjoint supports"):
        kl.generalized_kl(torch.zeros(2, 3), *pair)
    assert kl.generalized_kl(torch.zeros(2, 3), *pair, rule="sum").tolist() == [0.0, inf]
    assert kl.generalized_kl(torch.zeros(2, 3), *pair, rule="arithmetic").isfinite().all()


def test_nan_is_not_hidden():
    good, bad = torch.zeros(3), torch.tensor([0.0, nan, 0.0])
    for rule in SEVERAL:
        assert kl.generalized_kl(good, [good, bad], [0.5, 0.5], rule=rule).isnan()
        assert kl.generalized_kl(bad, [good], [1.0], rule=rule).isnan()
    assert kl.kl_sampled(bad, good, "k2").isnan().tolist() == [False, True, False]
    never = torch.tensor([-inf, -inf])  # only what *both* rule out counts as padding
    assert kl.kl_sampled(never, torch.tensor([-1.0, -inf]), "k2").tolist() == [inf, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", SEVERAL)
def test_extreme_logits(rule, dtype):
    policy, *references = (torch.tensor(rows).to(dtype) for rows in (
        [[1e4, -1e4, 0.0, -inf], [0.0, -inf, -inf, -inf], [-1e4, 0.5, 1.0, -inf]],
        [[-1e4, 1e4, 3.0, -inf], [1.0, 2.0, 3.0, -inf], [-1e4, 1.0, 0.0, -inf]],
        [[1.0, 2.0, 3.0, -inf], [0.0, 1e4, 0.0, -inf], [0.0, 0.0, 1e4, -inf]]))
    in_float64 = kl.generalized_kl(policy.double(), [r.double() for r in references], [0.25, 0.75],
                                   rule=rule)
    policy.requires_grad_()
    value = kl.generalized_kl(policy, references, [0.25, 0.75], rule=rule)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite().all() and (value >= 0).all()
    torch.testing.assert_close(value.double(), in_float64, rtol=1e-5, atol=1e-5)
    value.sum().backward()
    assert policy.grad.dtype == dtype
    assert policy.grad.isfinite().all() and (policy.grad[:, 3] == 0).all()
    for estimator in ("k1", "k2"):  # k3 overflows honestly where π is e^(20000) times less than ρ
        assert kl.generalized_kl(policy, references, [0.25, 0.75], rule=rule, estimator=estimator,
                                 tokens=torch.tensor([0, 0, 2])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    policy, references = randn(0, 4, 50).to(dtype), randn(1, 3, 4, 50).to(dtype)
    own, other, tokens = policy.log_softmax(-1), references[0].log_softmax(-1), torch.arange(4)
    functions = [lambda to: kl.token_logprobs(policy.to(to), tokens),
                 lambda to: kl.kl_exact(own.to(to), other.to(to)),
                 lambda to: kl.kl_sampled(own.to(to), other.to(to), "k3")]
    functions += [lambda to, rule=rule, estimator=estimator: kl.generalized_kl(
        policy.to(to), references.to(to), [0.2, 0.3, 0.5], rule=rule, estimator=estimator,
        tokens=tokens) for rule in SEVERAL for estimator in kl.ESTIMATORS]
    for function in functions:
        rough, exact = function(dtype), function(torch.float32)
        assert torch.equal(rough, exact) and rough.dtype == torch.float32


def test_a_probability_that_underflows_counts_as_zero():
    logprobs = torch.tensor([0.0, -2e4], requires_grad=True)
    value = kl.kl_exact(logprobs, torch.tensor([-1.0, -inf]))
    value.backward()
    assert value == 1.0 and logprobs.grad.tolist() == [2.0, 0.0]


def test_digits_of_small_and_far_values():
    """In float32, e^(−x) − 1 + x itself would be 10 % off, and e^(−200) is 0."""
    x = torch.tensor([1e-3, -1e-3])
    torch.testing.assert_close(kl.kl_sampled(x, torch.zeros(2), "k3"),
                               torch.tensor([4.99833e-7, 5.00167e-7]), rtol=1e-3, atol=0)
    far = torch.tensor([0.0, -200.0])
    mean = kl.cooperative_logprobs([far, far], [0.5, 0.5], "arithmetic")
    assert mean[1].item() == pytest.approx(-200.0)


def test_token_logprobs():
    logits, tokens = randn(0, 2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    ours = kl.token_logprobs(logits, tokens, temperature=0.7)
    p = (logits / 0.7).exp()
    for b, t in ((b, t) for b in range(2) for t in range(3)):
        close(ours[b, t], (p[b, t, tokens[b, t]] / p[b, t].sum()).log())
    close(kl.token_logprobs(logits, tokens), kl.token_logprobs(0.7 * logits, tokens, 0.7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_any_device():
    tensors, weights = (randn(0, 6), randn(1, 3, 6)), torch.tensor([0.2, 0.3, 0.5])
    for rule in SEVERAL:
        for estimator in kl.ESTIMATORS:
            there, here = (kl.generalized_kl(
                *(x.to(device) for x in (*tensors, weights)), rule=rule, estimator=estimator,
                tokens=torch.tensor(2).to(device)) for device in ("cuda", "cpu"))
            close(there.cpu(), here)


# ---------------------------------------------------------- references: forms, gradients and memory

every_penalty = pytest.mark.parametrize(
    "rule, estimator", [(rule, estimator) for rule in SEVERAL for estimator in kl.ESTIMATORS])


@every_penalty
def test_list_stack_and_generator_agree_and_nothing_is_changed(rule, estimator):
    logits, references = randn(0, 2, 3, 5), randn(1, 4, 2, 3, 5).requires_grad_()
    weights, tokens = torch.tensor([0.1, 0.2, 0.0, 0.7]), torch.tensor([[0, 1, 2], [3, 4, 0]])
    before = [x.detach().clone() for x in (logits, references, weights, tokens)]
    graphs = []

    def generator():
        for reference in references:
            scaled = reference * 1.0
            graphs.append(scaled.requires_grad)
            yield scaled

    values = [kl.generalized_kl(logits, form, weights, rule=rule, estimator=estimator,
                                tokens=tokens)
              for form in (references, list(references), generator())]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert graphs == [False] * 4  # its body runs under no_grad: a reference model builds no graph
    for x, copy in zip((logits, references, weights, tokens), before, strict=True):
        assert torch.equal(x, copy)


def test_nothing_reaches_the_reference_logprobs():
    logprobs, reference = (randn(seed, 5).log_softmax(-1).requires_grad_() for seed in (0, 1))
    before = logprobs.detach().clone(), reference.detach().clone()
    kl.kl_exact(logprobs, reference).backward()
    for estimator in SAMPLED:
        kl.kl_sampled(logprobs, reference, estimator).sum().backward()
    assert reference.grad is None and logprobs.grad is not None
    assert torch.equal(logprobs, before[0]) and torch.equal(reference, before[1])


@every_penalty
def test_each_reference_is_let_go_before_the_next_is_made(rule, estimator):
    alive, drawn = [], []

    def make(j):
        assert all(reference() is None for reference in alive)
        reference = randn(j, 3, 5)
        alive.append(weakref.ref(reference))
        drawn.append(j)
        return reference

    kl.reference((make(j) for j in range(4)), [0.5, 0.2, 0.0, 0.3], rule=rule, estimator=estimator,
                 tokens=torch.arange(3))
    assert drawn == [0, 1, 2, 3]  # that of weight 0 too: generator and weights stay in step


def run_python(*args, **options):
    """Without this project's folder on the path, unless it is where the process starts."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= options.pop("env", {})
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True,
                          env=env, **options)
    return done.stdout


MEASURE = """
import resource, torch, kl
torch.set_num_threads(1)
logits, tokens = torch.zeros(16, 131072), torch.zeros(16, dtype=torch.long)  # 8 MiB
def peak(K):
    for rule in kl.RULES[:3]:
        for estimator in ("exact", "k3"):
            references = (logits + j for j in range(K))
            kl.generalized_kl(logits, references, [1 / K] * K, rule=rule, estimator=estimator,
                              tokens=tokens)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak(2), peak(7))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in KiB")
def test_peak_memory_does_not_grow_with_the_number_of_references():
    env = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    two, seven = map(int, run_python("-c", MEASURE, cwd=FILE.parent, env=env).split())
    assert seven - two < 4 * 1024  # KiB; five references more would hold 40 MiB


# ---------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("name, changes", [
    *(("weights", {"weights": weights}) for weights in (
        [0.5, 0.4], [0.5, 0.5 + 2e-6], [1.5, -0.5], [nan, 1.0], [inf, 0.0], [], [[0.5, 0.5]], 0.5)),
    ("reference_logits", {"weights": [1.0]}),
    ("reference_logits", {"weights": [0.2, 0.3, 0.5]}),
    ("(reference_logits|tokens)", {"reference_logits": torch.zeros(2, 4, 5)}),
    ("reference_logits", {"reference_logits": torch.zeros(2, 3, 6)}),
    ("(reference_logits|tokens)", {"reference_logits": torch.zeros(2, 5)}),
    ("reference_logits", {"reference_logits": [torch.zeros(3, 5), torch.zeros(1, 5)]}),
    ("rule", {"rule": "mean"}),
    ("estimator", {"estimator": "k4"}),
    ("tokens", {"tokens": None}),
    ("tokens", {"tokens": torch.zeros(2, dtype=torch.long)}),
    ("tokens", {"tokens": torch.zeros(1, 3, dtype=torch.long)}),
    *(("temperature", {"temperature": temperature}) for temperature in (0.0, -1.0, nan, inf))])
def test_wrong_arguments_are_named(name, changes):
    args = {"logits": torch.zeros(3, 5), "reference_logits": torch.zeros(2, 3, 5),
            "weights": [0.5, 0.5], "tokens": torch.zeros(3, dtype=torch.long)}
    for rule in SEVERAL:
        for estimator in SAMPLED if name == "tokens" else kl.ESTIMATORS:
            with pytest.raises(ValueError, match=rf"^{name}\b"):
                kl.generalized_kl(**args | {"rule": rule, "estimator": estimator} | changes)


def test_wrong_arguments_of_the_parts_are_named():
    a, b, token = torch.zeros(3), torch.zeros(4), torch.tensor(0)

    def never():
        raise AssertionError("a reference was made before the arguments were checked")
        yield

    for message, call in {
        "^rule='sum' .* no single cooperative reference.*generalized_kl":
            lambda: kl.cooperative_logprobs([a], [1.0], "sum"),
        "^rule must be one of geometric, sum, arithmetic, weights, not 'mean'":
            lambda: kl.cooperative_logprobs([a], [1.0], "mean"),
        "^rule must be one of.*'mode'": lambda: kl.penalty(a, a, [1.0], rule="mode"),
        "^estimator must be one of k1, k2, k3, not 'exact'": lambda: kl.kl_sampled(a, a, "exact"),
        "^estimator must be one of exact, k1, k2, k3, not 'k4'":
            lambda: kl.reference(never(), [1.0], estimator="k4", tokens=token),
        "^estimator must be one of.*'k5'": lambda: kl.penalty(a, a, [1.0], estimator="k5"),
        "^tokens, .* are needed by estimator='k1'":
            lambda: kl.reference(never(), [1.0], estimator="k1"),
        "^tokens, .* are needed by estimator='k3'":
            lambda: kl.penalty(a, a[:1], [1.0], estimator="k3"),
        "^tokens has the shape": lambda: kl.token_logprobs(a, token[None]),
        r"^ref_logprobs has the shape \[4\] where \[3\]": lambda: kl.kl_exact(a, b),
        r"^ref_logprobs has the shape \[4\] where": lambda: kl.kl_sampled(a, b),
        "^ref_logprobs has the shape": lambda: kl.penalty(a, b, [1.0]),
        r"^reference has the shape \[4\]":
            lambda: kl.logprobs_and_kl(a, b, [1.0], tokens=token),
        r"^tokens has the shape \[1\]":
            lambda: kl.logprobs_and_kl(a, a, [1.0], tokens=token[None]),
        "^temperature must be positive":
            lambda: kl.logprobs_and_kl(a, a, [1.0], tokens=token, temperature=0),
        "^rule must be one of.*'model'":
            lambda: kl.logprobs_and_kl(a, a, [1.0], tokens=token, rule="model"),
        r"^ref_logprobs has the shape \[2\]":
            lambda: kl.penalty(a, b[:2], [0.5, 0.5], estimator="k2", tokens=token),
        "^reference_logits has the shape": lambda: kl.reference([a, b], [0.5, 0.5], rule="sum"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_weights_within_the_tolerance_are_normalised():
    for weights in ([0.5, 0.5 + 9e-7], torch.full((3,), 1 / 3)):
        references = randn(0, len(weights), 5)
        for rule in ("geometric", "arithmetic"):
            close(kl.cooperative_logprobs(references, weights, rule).logsumexp(-1), 0.0, 1e-14)
        same = references[:1].expand_as(references)
        close(kl.reference(same, weights, rule="sum"), same[0].log_softmax(-1), 1e-14)


# ------------------------------------------------------------------------------- the rule `weights`


def test_average_weights():
    def state(value, count=3, dtype=torch.float32):
        return {"w": torch.full((2, 2), value, dtype=dtype), "steps": torch.tensor(count)}

    states = [state(1.0), state(5.0), state(nan, count=9)]
    average = kl.average_weights(states, [0.75, 0.25, 0.0])
    assert list(average) == ["w", "steps"] and average["steps"].item() == 3
    assert average["w"].tolist() == [[2.0, 2.0]] * 2 and average["w"].dtype == torch.float32
    for made in (average, kl.average_weights(states[:1], [1.0])):
        for tensor in made.values():
            tensor.zero_()
    assert states[0]["w"][0, 0] == 1.0 and states[0]["steps"] == 3  # no memory is shared
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        same = kl.average_weights([state(0.1, dtype=dtype)] * 3, [0.3, 0.3, 0.4])
        assert torch.equal(same["w"], state(0.1, dtype=dtype)["w"])
    half, weights = [{"w": randn(j, 100).half()} for j in range(3)], [0.2, 0.3, 0.5]
    in_float64 = sum(w * each["w"].double() for w, each in zip(weights, half, strict=True))
    assert torch.equal(kl.average_weights(half, weights)["w"], in_float64.half())  # rounded once
    model = torch.nn.Linear(2, 2)
    averaged = kl.average_weights([dict(model.named_parameters())] * 2, [0.5, 0.5])
    assert not averaged["weight"].requires_grad and torch.equal(averaged["weight"], model.weight)


def test_average_weights_refuses():
    state = {"w": torch.zeros(2), "steps": torch.tensor(1)}
    for other, message in [
        (state | {"steps": torch.tensor(2)}, "'steps'.*no average"),
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


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_the_rule_weights_is_one_ordinary_reference(estimator):
    """In a linear model the mean of the weights is the mean of the logits: that of `geometric`."""
    models = [torch.nn.Linear(4, 6, dtype=torch.float64) for _ in range(3)]
    weights, x, logits = [0.2, 0.3, 0.5], randn(0, 7, 4), randn(1, 7, 6)
    merged = torch.nn.Linear(4, 6, dtype=torch.float64)
    merged.load_state_dict(kl.average_weights([model.state_dict() for model in models], weights))
    options = {"estimator": estimator, "tokens": torch.arange(7) % 6}
    value = kl.generalized_kl(logits, [merged(x)], [1.0], rule="weights", **options)
    if estimator == "exact":
        close(value, divergence(logits.softmax(-1), merged(x).softmax(-1)).detach())
    close(value, kl.generalized_kl(logits, (model(x) for model in models), weights, **options))


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_the_rule_weights_takes_exactly_one_reference(estimator):
    """Also two of which one has weight 0: who gives two has not averaged."""
    options = {"rule": "weights", "estimator": estimator, "tokens": torch.tensor(1)}
    for weights in ([0.5, 0.5], [1.0, 0.0]):
        for call in (lambda w: kl.reference(torch.zeros(2, 3), w, **options),
                     lambda w: kl.generalized_kl(torch.zeros(3), torch.zeros(2, 3), w, **options),
                     lambda w: kl.cooperative_logprobs(torch.zeros(2, 3), w, "weights")):
            with pytest.raises(ValueError, match="^rule='weights' takes one.*average_weights"):
                call(weights)
    with pytest.raises(ValueError, match="^reference_logits holds more references than 1"):
        kl.reference(torch.zeros(2, 3), [1.0], **options)


# ------------------------------------------------------------------------------- the file by itself


ALONE = "import doctest, kl; print(kl.__file__, doctest.testmod(kl), sep='\\n')"


def test_the_file_copied_alone_into_an_empty_folder_works_there(tmp_path):
    """In a process that cannot see this project; its docstring's last result is checked."""
    examples = doctest.DocTestFinder(recurse=False).find(kl, "kl")[0].examples
    assert 0 < len(examples) <= 10 and examples[-1].want
    shutil.copy(FILE, tmp_path)
    where, result = run_python("-c", ALONE, cwd=tmp_path).splitlines()
    assert Path(where).resolve() == (tmp_path / "kl.py").resolve()
    assert result == f"TestResults(failed=0, attempted={len(examples)})"


def test_torch_and_the_standard_library_are_all_it_imports():
    text = FILE.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    imported = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {name.split(".")[0] for name in imported}
    assert names - set(sys.stdlib_module_names) == {"torch"}
    assert text.startswith("# SPDX-License-Identifier: MIT")

"""benchmarks/dpo.py: the loss by hand, an independent log-prob, when weights are averaged."""

import copy
import dataclasses
import sys

import pytest
import torch

import fedppo
import kl
from support import load

sys.path.append(str(load.HOME / "benchmarks"))
import dpo  # noqa: E402


def test_dpo_loss_by_hand():
    """Margins of 2 and of -1 nats at beta 0.5: the mean of log(1 + e^-1) and log(1 + e^0.5)."""
    chosen, rejected = torch.tensor([-3.0, -6.0]), torch.tensor([-5.0, -4.0])
    ref = torch.tensor([-4.0, -5.0]), torch.tensor([-4.0, -4.0])
    found = dpo.dpo_loss(chosen, rejected, *ref, beta=0.5)
    expected = (torch.tensor(-1.0).exp().log1p() + torch.tensor(0.5).exp().log1p()) / 2
    assert found.item() == pytest.approx(expected.item())
    assert dpo.dpo_loss(*ref, *ref, 0.5).item() == pytest.approx(0.6931, abs=1e-4), "at the start"


def test_response_logprobs_are_those_of_each_text_by_itself(tiny_world, tiny_task):
    pairs = tiny_task.shards[0].train[:5]
    found = dpo.response_logprobs(tiny_world, tiny_world.initial, pairs)
    for pair, texts, logprobs in zip(pairs, tiny_world.pair_ids(pairs), found, strict=True):
        n = len(tiny_world.prompt_ids[pair.prompt])
        for ids, logprob in zip(texts, logprobs, strict=True):
            logits = tiny_world.model(torch.tensor([ids])).logits[0].masked_fill(
                tiny_world.forbidden, -torch.inf)
            plain = logits.log_softmax(-1)[range(n - 1, len(ids) - 1), ids[n:]].sum()
            assert logprob.item() == pytest.approx(plain.item(), abs=1e-3)


def tuned(world):
    world = copy.copy(world)
    world.settings = dataclasses.replace(world.settings, beta=0.5, lr=1e-3)
    return world


def test_dpo_learns_the_pairs_and_feddpo_averages_before_each_round(tiny_world, tiny_task,
                                                                     monkeypatch):
    """The first loss is log 2, whatever pairs it is of; then the chosen responses win."""
    monkeypatch.setattr(dpo, "ROUNDS", 3)
    monkeypatch.setattr(dpo, "STEPS", 1)
    averaged, average = [], kl.average_weights
    monkeypatch.setattr(kl, "average_weights", lambda states, weights: (
        averaged.append(len(states)) or average(states, weights)))
    world = tuned(tiny_world)
    logs = {arm: [] for arm in dpo.ARMS}
    for arm, log in logs.items():
        dpo.train(world, tiny_task, arm, log.append)
        assert len(averaged) == (3 if arm == "feddpo" else 0)
        start = [row["loss"] for row in log if row["round"] == 1]
        assert start == pytest.approx([0.6931] * 2, abs=1e-4)
    size = fedppo.size_of(world.initial)
    assert [row["bytes"] for row in logs["feddpo"]] == [n * size for n in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert {row["bytes"] for row in logs["dpo"]} == {0}
    monkeypatch.setattr(dpo, "STEPS", 8)
    rows = []
    dpo.train(world, tiny_task, "dpo", rows.append)
    last = [row["loss"] for row in rows if row["round"] == 3]
    assert max(last) < 0.6, "three passes over 60 pairs"


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_world, tiny_task):
    agent = dpo.make_agent(tuned(tiny_world), tiny_task, 0)
    before = [parameter.clone() for parameter in agent.policy.parameters()]
    agent.reference[:] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        dpo.step(agent, 0.5)
    assert all(map(torch.equal, before, agent.policy.parameters()))

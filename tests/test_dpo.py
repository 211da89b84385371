"""benchmarks/dpo.py and joint.py: the loss by hand, an independent log-prob, the search's rule."""

import math
import random
import sys

import pytest
import torch

import fedppo
import kl
from support import load

sys.path.append(str(load.HOME / "benchmarks"))
import dpo  # noqa: E402
import joint  # noqa: E402
import study  # noqa: E402


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


def test_dpo_learns_the_pairs_and_feddpo_averages_before_each_round(tiny_world, tiny_task,
                                                                     monkeypatch):
    """The first loss is log 2, whatever pairs it is of; then the chosen responses win."""
    monkeypatch.setattr(dpo, "ROUNDS", 3)
    monkeypatch.setattr(dpo, "STEPS", 1)
    averaged, average = [], kl.average_weights
    monkeypatch.setattr(kl, "average_weights", lambda states, weights: (
        averaged.append(len(states)) or average(states, weights)))
    logs = {arm: [] for arm in dpo.ARMS}
    for arm, log in logs.items():
        dpo.train(tiny_world, tiny_task, arm, 0.5, 1e-3, log.append)
        assert len(averaged) == (3 if arm == "feddpo" else 0)
        start = [row["loss"] for row in log if row["round"] == 1]
        assert start == pytest.approx([0.6931] * 2, abs=1e-4)
    size = fedppo.size_of(tiny_world.model)
    assert [row["bytes"] for row in logs["feddpo"]] == [n * size for n in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert {row["bytes"] for row in logs["dpo"]} == {0}
    monkeypatch.setattr(dpo, "STEPS", 8)
    rows = []
    dpo.train(tiny_world, tiny_task, "dpo", 0.5, 1e-3, rows.append)
    last = [row["loss"] for row in rows if row["round"] == 3]
    assert max(last) < 0.6, "three passes over 60 pairs"


def row_of(job, score):
    return {"arm": job.arm, "regime": job.regime, "seed": str(job.seed), "settings": job.flags,
            "judge_final": str(score)}


def test_a_search_takes_the_same_way_however_often_it_is_stopped():
    """Rows are added in another order, and cut off inside a step."""
    def score(cell):
        return -abs(cell.beta - 2.0) - abs(cell.anchor - 0.2) + math.sin(1000 * cell.lr)
    ends = []
    for seed in range(6):
        rng, rows = random.Random(seed), []
        while jobs := joint.wanted(rows, "isolated", "own prompts"):
            rng.shuffle(jobs)
            for job in jobs[:rng.randint(1, len(jobs)) if seed else None]:
                row = row_of(job, 0)
                (cell, _), = joint.scores([row], job.arm, job.regime, job.seed).items()
                rows.append(row | {"judge_final": str(score(cell))})
        ends.append(sorted(row["settings"] for row in rows))
    assert all(end == ends[0] for end in ends)


@pytest.mark.parametrize("arm", joint.ARMS)
def test_every_arm_is_searched_for_with_as_many_cells(arm):
    """A score that peaks off the start is climbed to; the finalists go to the other seeds."""
    def score(cell):
        return -abs(cell.beta - 2.0) - abs(cell.anchor - 0.2) - cell.lr
    rows, regime = [], "common prompts"
    while jobs := joint.wanted(rows, arm, regime):
        cells = {key for key in joint.scores(rows, arm, regime, study.TUNING[0])}
        new = [row_of(job, 0) for job in jobs]
        for row in new:
            (cell, _), = joint.scores([row], arm, regime, int(row["seed"])).items()
            assert joint.job(arm, regime, int(row["seed"]), cell).flags == row["settings"]
            row["judge_final"] = str(score(cell))
        assert len(cells) <= joint.CELLS
        rows += new
    first = joint.scores(rows, arm, regime, study.TUNING[0])
    assert len(first) == joint.CELLS and len(rows) == joint.CELLS + 2 * joint.FINALISTS
    best = joint.choose(rows, arm, regime)
    assert best["beta"] == 2.0 and best["anchor"] == (1.0 if arm == "classic" else 0.2)
    assert ("--self-weight" in rows[0]["settings"]) is (arm in joint.MATRIX)


def test_dpo_is_searched_for_by_the_same_rule():
    rows = []
    while jobs := dpo.wanted(rows, "dpo"):
        for job in jobs:
            row = row_of(job, 0)
            (cell, _), = dpo.scores([row], "dpo", job.seed).items()
            rows.append(row | {"judge_final": str(-abs(cell[0] - 2.0))})
    first = dpo.scores(rows, "dpo", study.TUNING[0])
    assert len(first) == dpo.CELLS and max(first, key=first.get)[0] == 2.0
    assert len(rows) == dpo.CELLS + 2 * dpo.FINALISTS

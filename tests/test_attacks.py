"""benchmarks/attacks.py: what the bad agents send, who is counted, and the table."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import fedppo

sys.path.insert(0, str(Path(fedppo.__file__).parent / "benchmarks"))

import attacks  # noqa: E402
import study  # noqa: E402

SHORT = "--mode federated --rounds 2 --updates 1 --batch 8 --pairs 20 --eval-prompts 8 --reward-epochs 1"
CHOSEN = {arm: {"beta": 0.2, "lr": 1e-3} for arm in study.ARMS}


@pytest.fixture(scope="module")
def agent():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study.HERE.parent)
        world, task, _ = study.prepare(study.Job("federated", "headline", 0, SHORT))
    agent = fedppo.Agent(0, world, task, 8, 0.2)
    for parameter in agent.policy.parameters():
        parameter.data.add_(0.01)
    return agent


def test_every_attack_is_a_message_without_a_fault(agent):
    own = agent.policy.model.state_dict()
    for attack in filter(None, attacks.ATTACKS.values()):
        weights = attack(agent)
        assert fedppo.fault(fedppo.Message(weights, fedppo.digest(weights)), own) == "", attack
        assert any(not torch.equal(weights[name], own[name]) for name in own)


def test_attacks_are_what_they_are_called(agent):
    initial, own = agent.world.initial.model.state_dict(), agent.policy.model.state_dict()
    flipped = attacks.sign_flipped(agent)
    assert all(torch.allclose((flipped[name] + own[name]) / 2, initial[name], atol=1e-6) for name in own)
    assert all(torch.equal(tensor, initial[name]) for name, tensor in attacks.initial_copy(agent).items())
    policy = copy.deepcopy(agent.policy)
    policy.model.load_state_dict(attacks.collapsed(agent))
    (_, _, response, mask), = agent.world.batches(agent.prompts[:8], policy, fedppo.generator(0, "test"))
    assert len(set(response[mask.bool()].tolist())) == 1 and mask.all(), "one word, and no end"
    noise = attacks.random_weights(agent)
    name = max(own, key=lambda name: own[name].numel())
    assert abs(noise[name].std() / own[name].std() - 1) < 0.1 and not torch.equal(noise[name], own[name])


def test_the_first_agents_lie_and_the_others_are_counted(monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    one = attacks.job("federated", "random weights", 1, 0, 2.0, CHOSEN)
    assert one.regime == "random weights, 1 of 4" and one.flags.endswith("--outlier 2")
    one = study.Job(one.arm, one.regime, 0, f"{SHORT} --outlier 2")
    before = fedppo.send, fedppo.outliers
    row = attacks.run(one)
    assert (fedppo.send, fedppo.outliers) == before
    assert list(row) == list(attacks.COLUMNS) and (row["caught"], row["wronged"]) == ("1.000", "0.000")
    assert len(row["judge_agents"].split()) == 3, "the honest ones"
    quiet = attacks.run(study.Job(one.arm, "none, 1 of 4", 0, f"{SHORT} --outlier 2"))
    assert quiet["caught"] == "" and quiet["wronged"] == "0.000" and len(quiet["judge_agents"].split()) == 3


def test_jobs_are_on_seeds_that_nothing_was_chosen_on():
    wanted, tuned = attacks.jobs(CHOSEN), attacks.tuning_jobs(CHOSEN)
    assert len(set(wanted)) == len(wanted) and len(set(tuned)) == len(tuned)
    assert not {job.seed for job in wanted} & {job.seed for job in tuned}
    assert {job.flags.count("--agents 8") for job in wanted if "2 of 8" in job.regime} == {1}


def test_the_tables_of_known_scores():
    rows = []
    for seed in attacks.SEEDS:
        for arm, regime, score in [("isolated", "none, 1 of 4", 0.5), ("federated", "collapsed, 1 of 4", 0.1),
                                   ("federated, defended", "collapsed, 1 of 4", 0.6)]:
            rows.append(dict.fromkeys(attacks.COLUMNS, "") | {
                "arm": arm, "regime": regime, "seed": seed, "caught": "1", "wronged": "0.25",
                "judge_final": score + seed % 10 / 100})
    rows += [rows[-1] | {"seed": seed, "arm": f"{arm}, defended", "settings": f"--outlier {factor}",
                         "judge_final": score * factor, "wronged": "0.5"}
             for seed in study.TUNING for factor in (1.5, 3)
             for arm, score in (("federated", 2), ("federated merged", 4))]
    text = attacks.tables(rows)
    assert ("| 1.5 | 3.000 | 6.000 | 100% | 50% |\n| 3 | 6.000 | 12.000 | 100% | 50% |\n") in text
    assert ("| collapsed, 1 of 4 | `federated` | 0.12 | -0.40 [-0.40, -0.40], 0 of 5 | 0.62 | +0.10 [+0.10, +0.10], "
            "5 of 5 | 100% | 25% |") in text

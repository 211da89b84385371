"""benchmarks/attacks.py: what the bad agents send, who is counted, and the table."""

import sys
from pathlib import Path

import pytest
import torch

import data
import fedppo

sys.path.insert(0, str(Path(fedppo.__file__).parent / "benchmarks"))

import attacks  # noqa: E402
import study  # noqa: E402

SHORT = ("--mode federated --rounds 2 --updates 1 --batch 8 --pairs 20 --eval-prompts 8 "
         "--reward-epochs 1")


@pytest.fixture(scope="module")
def sent():
    """{attack: (an agent that has moved, what it sends)}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study.HERE.parent)
        world, task, mode = study.prepare(study.Job("federated", "none, 1 of 4", 0, SHORT))
    found = {}
    for name, kind in attacks.ATTACKS.items():
        agent = kind(0, world, task, fedppo.arm_settings(world.settings, mode))
        for parameter in agent.policy.parameters():
            parameter.data.add_(0.01)
        found[name] = agent, agent.message()
    return found


def test_every_attack_is_a_usable_message_and_not_the_agents_policy(sent):
    for name, (agent, weights) in sent.items():
        own = agent.policy.model.state_dict()
        assert {key: tensor.shape for key, tensor in weights.items()} == {
            key: tensor.shape for key, tensor in own.items()}
        assert all(tensor.isfinite().all() for tensor in weights.values())
        assert all(torch.equal(weights[key], own[key]) for key in own) == (name == "none")


def test_attacks_are_what_they_are_called(sent):
    agent, flipped = sent["sign-flipped"]
    initial, own = (policy.model.state_dict() for policy in (agent.world.initial, agent.policy))
    for key in own:
        assert torch.allclose((flipped[key] + own[key]) / 2, initial[key], atol=1e-6)
        assert torch.equal(sent["initial copy"][1][key], initial[key])
    noise, key = sent["random weights"][1], max(own, key=lambda key: own[key].numel())
    assert abs(noise[key].std() / own[key].std() - 1) < 0.1
    agent, collapsed = sent["collapsed"]
    policy, world = agent.world.new_policy(), agent.world
    policy.model.load_state_dict(collapsed)
    *_, response, mask = world.respond(agent.prompts[:8], policy, data.generator(0, "test"))
    assert len(set(response[mask.bool()].tolist())) == 1 and mask.all(), "one word, and no end"


def test_the_first_agents_lie_and_the_others_are_counted(monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    one = attacks.job("federated", "random weights", 1, 0, 2.0)
    assert one.regime == "random weights, 1 of 4" and one.flags.endswith("--outlier 2")
    row = attacks.run(study.Job(one.arm, one.regime, 0, f"{SHORT} --outlier 2"))
    assert list(row) == list(attacks.COLUMNS)
    assert (row["caught"], row["wronged"]) == ("1.000", "0.000")
    quiet = attacks.run(study.Job(one.arm, "none, 1 of 4", 0, f"{SHORT} --outlier 2"))
    assert (quiet["caught"], quiet["wronged"]) == ("", "0.000")
    _, log = study.train(study.Job(one.arm, one.regime, 0, SHORT), uncounted=1)
    assert {logged["agent"] for logged in log} == {1, 2, 3}, "the honest ones"


def test_decisions_are_read_from_the_log():
    """Once for each round and peer, but for peers that were not there to be decided on."""
    log = [{"agent": 1, "round": 0, "missed": None}]
    log += [{"agent": 1, "round": rnd, "missed": missed} for rnd, missed in
            ((1, "agent 0 is an outlier"), (1, "agent 0 is an outlier"), (2, None),
             (3, "agent 0 absent; agent 2 is an outlier"))]
    found = list(attacks.decisions(log, 3))
    assert sorted(found) == [(0, False), (0, True), (2, False), (2, False), (2, True)]


def test_the_shipped_rows_are_of_jobs_on_seeds_that_nothing_was_chosen_on():
    results = study.HERE / "results"
    wanted, tuned = attacks.jobs(), attacks.tuning_jobs()
    assert len(set(wanted)) == len(wanted) and len(set(tuned)) == len(tuned)
    assert not {job.seed for job in wanted} & {job.seed for job in tuned}
    assert {job.flags.count("--agents 8") for job in wanted if "2 of 8" in job.regime} == {1}
    done = {study.key(row) for row in study.load(results / "attacks.csv")}
    assert done == {*wanted, *tuned}, "none would be run again, and none is of another time"


def test_the_tables_of_known_scores():
    rows = []
    for seed in attacks.SEEDS:
        for arm, regime, score in [("isolated", "none, 1 of 4", 0.5),
                                   ("federated", "collapsed, 1 of 4", 0.1),
                                   ("federated, defended", "collapsed, 1 of 4", 0.6)]:
            rows.append(dict.fromkeys(attacks.COLUMNS, "") | {
                "arm": arm, "regime": regime, "seed": seed, "caught": "1", "wronged": "0.25",
                "judge_final": score + seed % 10 / 100})
    rows += [rows[-1] | {"seed": seed, "arm": f"{arm}, defended",
                         "settings": f"--outlier {factor}", "judge_final": score * factor,
                         "wronged": "0.5"}
             for seed in study.TUNING for factor in (1.5, 3)
             for arm, score in (("federated", 2), ("merged", 4))]
    text = attacks.tables(rows)
    assert "| 1.5 | 3.000 | 6.000 | 100% | 50% |\n| 3 | 6.000 | 12.000 | 100% | 50% |\n" in text
    assert ("| collapsed, 1 of 4 | `federated` | 0.12 | -0.40 [-0.40, -0.40], 0 of 5 | 0.62 | "
            "+0.10 [+0.10, +0.10], 5 of 5 | 100% | 25% |") in text
    with pytest.raises(ValueError, match="stands twice"):
        attacks.tables([*rows, rows[0]])

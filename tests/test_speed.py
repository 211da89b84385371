"""benchmarks/speed.py: the worker does the update that it says, the floor is counted right, the table is of medians."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import fedppo

sys.path.insert(0, str(Path(fedppo.__file__).parent / "benchmarks"))

import graphs  # noqa: E402
import ppo_core  # noqa: E402
import speed  # noqa: E402


def test_tiny_and_pythia_are_the_models_that_they_are_called():
    config = json.loads((Path(fedppo.HERE) / "tiny/model/config.json").read_text())
    assert all(config[name] == value for name, value in speed.SHAPES["tiny"].items() if name != "rotary_pct")
    parameters = sum(p.numel() for p in speed.new_model("tiny", "cpu").parameters())
    assert parameters == sum(p.numel() for p in fedppo.World(fedppo.parse(["--preset", "tiny"])[0]).model.parameters())
    assert speed.SHAPES["pythia-70m"]["vocab_size"] == 50304


def test_an_update_has_full_responses_and_moves_every_policy():
    updates = speed.Updates(speed.Case("x", "tiny", agents=2, references=2))
    before = [policy.model.get_input_embeddings().weight.clone() for policy in updates.policies]
    seconds = updates.once()
    assert set(seconds) == set(speed.PHASES) and min(seconds.values()) > 0
    for policy, weight in zip(updates.policies, before, strict=True):
        assert not torch.equal(policy.model.get_input_embeddings().weight, weight)
    rows, prompt, response = speed.BATCHES["tiny"]
    lengths = []
    updates.score = lambda *batch: lengths.append([tensor.shape for tensor in batch]) or torch.zeros(rows)
    updates.once()
    assert lengths == 2 * [2 * [(rows, prompt)] + 2 * [(rows, response)]]


@pytest.mark.parametrize("sampler", ["graphs", "transformers"])
def test_every_sampler_draws_the_same_kind_of_rollout(sampler, monkeypatch):
    monkeypatch.setattr(ppo_core, "generate", graphs.plain)
    updates = speed.Updates(speed.Case("x", "tiny", sampler=sampler))
    seen = []
    updates.score = lambda *batch: seen.append(batch) or torch.zeros(len(batch[0]))
    updates.once()
    prompt, _, response, mask = seen[0]
    assert torch.equal(prompt, updates.prompts) and prompt.shape[0] == response.shape[0] == len(mask)
    assert response.shape[1] == speed.BATCHES["tiny"][2] and mask.all() and response.min() > 1
    assert (updates.policies[0] in graphs.SAMPLERS) == (sampler == "graphs")


def test_a_gpu_has_cases_of_its_own():
    cpu, gpu = (speed.groups(["tiny"], device, False) for device in ("cpu", "cuda"))
    assert {case.sampler for cases in cpu.values() for case in cases} == {"plain"}
    assert [case.sampler for case in gpu["tiny, one agent"]] == ["transformers", "plain", "graphs", "graphs"]
    assert {case.device for cases in gpu.values() for case in cases} == {"cuda"}


def test_the_floor_counts_operations_and_bytes(monkeypatch):
    """By hand at 1 operation and 10 bytes a second; counted on a real module for the weights of the trunk."""
    monkeypatch.setattr(speed, "rates", lambda *args: (1.0, 10.0))
    model = speed.new_model("tiny", "cpu")
    trunk = sum(p.numel() for p in model.gpt_neox.layers.parameters() if p.dim() == 2)
    head, (rows, prompt, response) = 64 * 192, speed.BATCHES["tiny"]
    assert trunk == 12 * 64**2 * 2
    found = speed.floor(speed.Case("x", "tiny", references=3))
    last = model.gpt_neox.layers[1]
    unread = sum(p.numel() for p in last.parameters() if p.dim() == 2) - 2 * 64 * 64  # of a prompt token: all but k, v
    forward = 2 * rows * (trunk * (prompt + response) - unread * prompt + head * response)
    assert found["rollout"] == pytest.approx(2 * rows * ((trunk - unread) * prompt + (trunk + head) * response))
    assert found["scoring"] == pytest.approx(4 * forward + 2 * trunk * rows * (prompt + response))
    assert found["optimisation"] == pytest.approx(4 * (3 * forward + 7 * (trunk + 2 * head) * 4 / 10))
    assert speed.floor(speed.Case("x", "tiny", agents=4))["rollout"] == pytest.approx(4 * found["rollout"])


def test_the_table_is_of_medians():
    case = dataclasses.asdict(speed.Case("one", "tiny"))
    updates = [{"rollout": r, "scoring": 1.0, "optimisation": 2.0} for r in (1.0, 2.0, 9.0)]
    faster = [{name: value / 2 for name, value in update.items()} for update in updates]
    cases = [{"case": case, "updates": updates, "peak": 10.0, "floor": {"rollout": 0.5, "b": 0.5}},
             {"case": case | {"name": "two"}, "updates": faster, "peak": 20.0, "floor": {"rollout": 1.0}}]
    text = speed.tables({"arguments": "--name x", "micro_batch": 8,
                         "hardware": "here", "threads": speed.THREADS, "torch": "2", "repeats": 3,
                         "groups": {"g": cases}})
    assert "| one | 5 [4, 12] | 2 | 1 | 2 | 1.00 | 5.0 | 4.0 | 128 | 10 |" in text
    assert "| two | 2.5 [2, 6] | 1 | 0.5 | 1 | 2.00 | 2.5 | 1.0 | 256 | 20 |" in text


def test_the_parts_of_the_main_job_are_disjoint_and_what_they_say(tmp_path, monkeypatch):
    """With every phase made to take a known time on a clock of our own: each second is counted once."""
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def takes(seconds, *then):
        def call(*args, **kwargs):
            clock[0] += seconds
            for owner, name in then:
                getattr(owner, name)()
        return call

    def main(argv):
        for owner, name in ((fedppo, "fit_reward"), (ppo_core, "generate"), (ppo_core, "collect"),
                            (ppo_core, "optimise"), (fedppo, "judge_agent")):
            getattr(owner, name)()
        return 0
    monkeypatch.setattr(ppo_core, "generate", takes(1))
    monkeypatch.setattr(ppo_core, "collect", takes(10, (ppo_core, "generate")))
    monkeypatch.setattr(ppo_core, "optimise", takes(100))
    monkeypatch.setattr(fedppo, "judge_agent", takes(1000, (ppo_core, "generate")))
    monkeypatch.setattr(fedppo, "fit_reward", takes(10_000))
    monkeypatch.setattr(fedppo, "exchange", takes(0))
    monkeypatch.setattr(fedppo.Run, "checkpoint", takes(0))
    monkeypatch.setattr(speed.plot, "draw", takes(0))
    monkeypatch.setattr(fedppo, "main", main)
    assert speed.main_job(str(tmp_path)) == {"rollouts": 1, "scoring": 10, "optimisation": 100, "judging": 1001,
                                             "reward models": 10_000, "exchange and files": 0, "picture": 0}

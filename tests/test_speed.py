"""benchmarks/speed.py: the worker does the update that it says, the floor is counted right, the
tables are of medians."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import fedppo
from support import clock, fast, load, settings
from world import World, deal_rows

ROOT = Path(fedppo.__file__).parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ppo_core  # noqa: E402
import speed  # noqa: E402


def test_tiny_and_pythia_are_the_models_that_they_are_called():
    config = json.loads((ROOT / "tiny/model/config.json").read_text())
    assert all(config[name] == value for name, value in speed.SHAPES["tiny"].items()
               if name != "rotary_pct")
    model, *_ = load.load_model(load.home("tiny/model"), "cpu")
    assert speed.new_model("tiny", "cpu").num_parameters() == model.num_parameters()
    assert speed.SHAPES["pythia-70m"]["vocab_size"] == 50304
    with torch.device("meta"):  # no weights are made
        llama = speed.new_model("smollm2-135m", "meta")
    matrices = [p.numel() for p in llama.model.layers[0].parameters() if p.dim() == 2]
    keys = [llama.model.layers[0].self_attn.k_proj.weight.numel(), 576 * 192]
    every = sum(p.numel() for p in llama.parameters() if p.dim() == 2)
    assert llama.num_parameters() == 134_515_008  # as the real one has
    assert speed.weights("smollm2-135m") == (sum(matrices), sum(keys), 576 * 49152, every)


def test_an_update_has_full_responses_and_moves_every_policy():
    updates = speed.Updates(speed.Case("x", "tiny", agents=2, references=2))
    before = [policy.model.get_input_embeddings().weight.clone() for policy in updates.policies]
    rows, prompt, response = speed.BATCHES["tiny"]
    scored = []
    updates.score = lambda *batch: scored.append(batch) or torch.zeros(rows)
    seconds = updates.once()
    assert set(seconds) == set(speed.PHASES) and min(seconds.values()) > 0
    for policy, weight in zip(updates.policies, before, strict=True):
        assert not torch.equal(policy.model.get_input_embeddings().weight, weight)
    assert [[tensor.shape for tensor in batch] for batch in scored] == 2 * [
        2 * [(rows, prompt)] + 2 * [(rows, response)]]


@pytest.mark.parametrize("sampler", ["generate", "graphs", "transformers"])
@pytest.mark.parametrize("form", ["fast", "plain"])
def test_every_form_and_sampler_makes_the_same_kind_of_rollout(form, sampler):
    updates = speed.Updates(speed.Case("x", "tiny", form=form, sampler=sampler))
    kinds = [type(updates.policies[0]), type(updates.references[0])]
    assert kinds == 2 * [fast.FastPolicy if form == "fast" else ppo_core.Policy]
    assert isinstance(updates.reward, fast.FastRewardModel) == (form == "fast")
    (prompts, _, response, mask), seen = (None,) * 4, []
    score = updates.score
    updates.score = lambda *batch: seen.append(batch) or score(*batch)
    assert min(updates.once().values()) > 0
    (prompts, _, response, mask), = seen
    assert torch.equal(prompts, updates.prompts)
    assert response.shape == mask.shape == (len(prompts), speed.BATCHES["tiny"][2])
    assert mask.all() and response.min() > 1


def test_a_gpu_has_cases_of_its_own():
    cpu, gpu = (speed.groups(["tiny"], device, False) for device in ("cpu", "cuda"))
    assert {case.sampler for cases in cpu.values() for case in cases} == {"generate"}
    assert [(case.form, case.sampler) for case in gpu["tiny, one agent"]] == [
        ("fast", "transformers"), ("fast", "generate"), ("plain", "generate"), ("fast", "graphs"),
        ("fast", "graphs")]
    assert {case.device for cases in gpu.values() for case in cases} == {"cuda"}
    assert not any("64 rows" in name for name in cpu)
    one, *others = gpu["tiny, 64 rows"]
    assert one.batch == (64, 6, 20) and one.references == 4 and others[0].dtype == "bfloat16"
    assert json.loads(one.spec())["batch"] == [64, 6, 20]
    small, large = (speed.floor(dataclasses.replace(one, device="cpu", rows=rows))
                    for rows in (8, 64))
    assert large["scoring"] > small["scoring"]


def test_one_repeat_has_no_quartiles(capsys):
    with pytest.raises(SystemExit, match="2"):
        speed.main(["--repeats", "1"])
    assert "at least 2" in capsys.readouterr().err


def test_the_floor_counts_operations_and_bytes(monkeypatch):
    """By hand at 1 operation and 10 bytes a second; the trunk's weights counted on a module."""
    monkeypatch.setattr(speed, "rates", lambda *args: (1.0, 10.0))
    layers = speed.new_model("tiny", "cpu").gpt_neox.layers

    def matrices(module) -> int:
        return sum(p.numel() for p in module.parameters() if p.dim() == 2)

    trunk, head, (rows, prompt, response) = matrices(layers), 64 * 192, speed.BATCHES["tiny"]
    unread = matrices(layers[1]) - 2 * 64 * 64  # of a prompt token, in the last layer: but k, v
    found = speed.floor(speed.Case("x", "tiny", references=3))
    forward = 2 * rows * (trunk * (prompt + response) - unread * prompt + head * response)
    assert found["rollout"] == pytest.approx(
        2 * rows * ((trunk - unread) * prompt + (trunk + head) * response))
    assert found["scoring"] == pytest.approx(4 * forward + 2 * trunk * rows * (prompt + response))
    assert found["optimisation"] == pytest.approx(
        4 * (3 * forward + 7 * (trunk + 2 * head) * 4 / 10))
    crowd = speed.floor(speed.Case("x", "tiny", agents=4))
    assert crowd["rollout"] == pytest.approx(4 * found["rollout"])


def test_the_tables_are_of_medians():
    case = dataclasses.asdict(speed.Case("one", "tiny"))
    updates = [{"rollout": r, "scoring": 1.0, "optimisation": 2.0} for r in (1.0, 2.0, 9.0)]
    faster = [{name: value / 2 for name, value in update.items()} for update in updates]
    cases = [{"case": case, "updates": updates, "peak": 10.0,
              "floor": {"rollout": 0.5, "b": 0.5}},
             {"case": case | {"name": "two"}, "updates": faster, "peak": 20.0,
              "floor": {"rollout": 1.0}}]
    job = {"alone": [{"a": 4.0, "b": second} for second in (6.0, 5.0, 20.0)],
           "floor": {"a": 1.0, "b": 0.0}}
    text = speed.tables({"arguments": "--name x", "micro_batch": 8, "hardware": "here",
                         "threads": speed.THREADS, "torch": "2", "repeats": 3,
                         "groups": {"g": cases}, "main job": job})
    assert "| one | 5 [4, 12] | 2 | 1 | 2 | 1.00 | 5.0 | 4.0 | 128 | 10 |" in text
    assert "| two | 2.5 [2, 6] | 1 | 0.5 | 1 | 2.00 | 2.5 | 1.0 | 256 | 20 |" in text
    assert "10 s in one process" in text
    assert text.endswith("| b | 6.0 | 60% | – |\n| a | 4.0 | 40% | 1.0 |\n")


@pytest.mark.slow
def test_the_main_job_is_measured_by_part():
    short = ["--agents", "2", "--rounds", "2", "--pairs", "20", "--eval-prompts", "8"]
    parts = speed.main_job([*speed.MAIN_JOB, *short])
    assert set(parts) == {*clock.PARTS, "end"} and min(parts.values()) > 0


@pytest.mark.slow
def test_the_main_job_of_a_gpu_runs_with_random_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(speed.SHAPES, "pythia-70m", speed.SHAPES["tiny"])
    flags = speed.large_job(tmp_path / "model", "cpu")
    world = World(settings.parse(flags, fedppo.MODES).settings)
    assert len(deal_rows(world, 0)[1]) == 4, "as it is run, it has rows for all agents"
    short = ["--agents", "2", "--rounds", "1", "--updates", "1", "--pairs", "20", "--batch", "4",
             "--eval-prompts", "8", "--judge", "none"]
    parts = speed.main_job([*flags, *short])
    assert parts["optimisation"] > 0 and parts["rollouts"] > 0

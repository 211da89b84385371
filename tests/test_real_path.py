"""The way of the real model and data: hub-style folders in, a run folder out, every form, mode and rule between."""

import functools
import json
import math
import shutil

import datasets
import pytest
import torch
import worlds
from transformers import GPTNeoXForSequenceClassification, pipeline

import fedppo

PYTHIA_70M = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048,
              "vocab_size": 50304, "max_position_embeddings": 2048}
KEYS = {"mode", "seed", "agent", "round", "update", "episodes", "reward", "judge", "kl", "kl_initial", "entropy",
        "policy_loss", "value_loss", "clipfrac", "length", "ended", "bytes", "seconds"}  # the ones the project promises
SUMMARY = {"judge_initial", "judge_final", "judge_auc", "reward_final", "worst_agent_final", "seconds", "bytes"}
SHORT = ["--agents", "2", "--rounds", "1", "--updates", "1", "--batch", "4", "--response-length", "4", "--pairs", "8",
         "--eval-prompts", "4", "--reward-epochs", "1", "--epochs", "2", "--threads", "1", "--workers", "1", "--device",
         "cpu"]


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """60 rows in the schema of descriptiveness-sentiment-trl-style: its two splits, a quarter of the rows no use."""
    folder = tmp_path_factory.mktemp("data") / "descriptiveness-sentiment"
    datasets.DatasetDict({split: datasets.Dataset.from_list(worlds.chat_rows(30, seed, equal=7))
                          for seed, split in enumerate(("descriptiveness", "sentiment"))}).save_to_disk(folder)
    return folder


def main(out, model, dataset, *flags, name="run", code=0):
    """Run the program in-process with the settings for real text, cut to a second -> its folder; later flags win."""
    assert fedppo.main(["--preset", "pythia-70m", "--model", str(model), "--dataset", str(dataset), *SHORT,
                        "--out", str(out), "--name", name, *map(str, flags)]) == code
    return out / name


@pytest.fixture
def run(small_model, real_data, tmp_path, no_picture):
    """run(*flags, name=..., code=...) -> the folder of a short run on the small model."""
    return functools.partial(main, tmp_path, small_model, real_data)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    return [row | {"seconds": None} for row in metrics(folder)]


def weights(folder):
    """{agent: the bytes of its weights}."""
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("agents/*/model.safetensors"))}


def check_metrics(folder, agents, updates, judge=True):
    """Every line has every promised key; what is measured at an update is finite, the judge where it has its place."""
    rows = metrics(folder)
    assert len(rows) == len(agents) * (updates + 1)
    for row in rows:
        assert row.keys() >= KEYS
        for key in KEYS - {"mode", "judge"}:
            measured = row["update"] > 0 or key in ("seed", "agent", "round", "update", "episodes", "bytes", "seconds")
            assert math.isfinite(row[key]) if measured else row[key] is None, key
        if row["update"] > 0:
            assert row["entropy"] > 0 and row["kl"] > -1e-4 and row["kl_initial"] > -1e-4
            assert 0 <= row["clipfrac"] <= 1 and 0 <= row["ended"] <= 1 and 1 <= row["length"] <= 4
        judged = judge and row["update"] in (0, updates)
        assert math.isfinite(row["judge"]) if judged else row["judge"] is None
    assert {(row["mode"], row["agent"]) for row in rows} == set(agents)
    return rows


def check_folder(folder, mode, agents):
    """The files that every run leaves, and nothing half-made."""
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "summary.json", "samples.md",
                                                        "curves.png", "curves.svg", "agents"}
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() >= {"settings", "preset", "commit", "versions", "hardware"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["modes"][mode]["seeds"]["0"].keys() >= SUMMARY
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    saved = sorted(path.name for path in (folder / "agents").iterdir())
    assert saved == [f"{mode}-seed0-agent{i}" for i in range(agents)]
    samples = (folder / "samples.md").read_text()
    assert all(f"## {mode}, agent {i}" in samples for i in range(agents)) and "The " in samples
    return config


def check_agent(folder, forbidden):
    """The folder is a model for transformers.pipeline; 40 sampled tokens hold no id without a token and no pad."""
    generate = pipeline("text-generation", str(folder))
    torch.manual_seed(0)
    outputs = generate(["The room 3 was"] * 10, return_tensors=True)
    prompt = generate.tokenizer("The room 3 was")["input_ids"]
    for (output,) in outputs:
        ids = output["generated_token_ids"]
        assert list(ids[:len(prompt)]) == prompt and 1 <= len(ids) - len(prompt) <= 4
        ended = [k for k, token in enumerate(ids) if token == 0]
        assert not set(ids[:ended[0] if ended else None]) & forbidden  # the pipeline pads behind an EOS
    assert isinstance(generate("The room 3 was")[0]["generated_text"], str)
    assert "pipeline(" in (folder / "README.md").read_text()
    config = generate.model.generation_config  # detail 16: the sampler of the training, whole softmax included
    assert config.do_sample and config.temperature == 0.7 and config.top_k == 0 and config.top_p in (None, 1.0)
    assert (config.eos_token_id, config.pad_token_id, config.max_new_tokens) == (0, 1, 4)
    return generate.model


# ------------------------------------------------------------------------------------------- exactly Pythia's shape


@pytest.mark.slow  # writes and removes a gigabyte
def test_a_model_of_exactly_pythias_shape_goes_the_whole_way(tmp_path, real_data, capfd, monkeypatch):
    """float16 on disk, 50,304 rows for 320 tokens, no pad token: details 2, 21 and 29 in a whole run."""
    model = worlds.save_model(tmp_path / "pythia", **PYTHIA_70M)
    monkeypatch.setattr(fedppo.Run, "checkpoint", lambda *args: None)  # 1.7 GB, which one round has no use for
    folder = main(tmp_path, model, real_data, "--judge", "none", "--epochs", "1")
    printed = capfd.readouterr().out
    assert "46 preference pairs; dropped 14 rows" in printed and "FAIL" not in printed
    rows = check_metrics(folder, {("federated", 0), ("federated", 1)}, updates=1, judge=False)
    config = check_folder(folder, "federated", agents=2)
    assert config["settings"]["preset"] == "pythia-70m" and config["settings"]["lr"] == 1e-5
    parameters = 4 * (2 * 50304 * 512 + 6 * (12 * 512 ** 2 + 13 * 512) + 2 * 512)  # bytes in float32, worked out
    assert {row["bytes"] for row in rows if row["update"]} == {parameters}  # each agent heard one peer, once
    agent = check_agent(folder / "agents" / "federated-seed0-agent1", forbidden={1, *range(320, 50304)})
    assert agent.dtype == torch.float32 and agent.config.vocab_size == 50304
    original = fedppo.data.load_model(str(model), "cpu")[0].state_dict()
    moved = {name: (tensor - original[name]).abs().max().item() for name, tensor in agent.state_dict().items()}
    assert 0 < max(moved.values()) < 1.1e-5  # one step of Adam is at most the learning rate, 1e-5, and rounding
    shutil.rmtree(tmp_path)  # a gigabyte


# -------------------------------------------------------------------------------------- the same path, small and wide


def test_the_small_model_leaves_everything_a_run_promises(tmp_path, small_model, real_data, capfd):
    """With a judge fitted to held-out pairs, two rounds, and the agents' weights moved."""
    folder = main(tmp_path, small_model, real_data, "--rounds", "2", "--lr", "0.01", "--judge", "heldout")
    printed = capfd.readouterr().out
    assert "dropped 14 rows" in printed and f"picture   {folder / 'curves.png'}" in printed
    rows = check_metrics_of_rounds(folder)
    check_folder(folder, "federated", agents=2)
    for i in range(2):
        check_agent(folder / "agents" / f"federated-seed0-agent{i}", forbidden={1, *range(320, 352)})
    assert len(set(weights(folder).values())) == 2
    assert [row["episodes"] for row in rows if row["agent"] == 0] == [0, 4, 8]


def check_metrics_of_rounds(folder):
    rows = metrics(folder)
    assert [(row["agent"], row["round"], row["update"]) for row in rows] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1), (0, 2, 2), (1, 2, 2)]
    assert all(math.isfinite(row["judge"]) for row in rows)
    assert all(row["lr"] == pytest.approx(0.01 * (1 - (row["update"] - 1) / 2)) for row in rows if row["update"])
    received = [row["bytes"] for row in rows if row["agent"] == 0]
    assert received[0] == 0 and received[2] == 2 * received[1] > 0
    return rows


@pytest.mark.parametrize("form", ["parquet", "jsonl folder", "jsonl file"])
def test_other_forms_of_the_data_give_the_same_run(run, tmp_path, monkeypatch, form):
    """The rows are those of the save_to_disk folder, in the same order: so is every number."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tables = {split: worlds.chat_rows(30, seed, equal=7) for seed, split in enumerate(("descriptiveness", "sentiment"))}
    folder = tmp_path / "data"
    folder.mkdir()
    for split, rows in tables.items():
        if form == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
        else:
            worlds.write_jsonl(folder / f"{split}.jsonl", rows)
    only = ["--splits", "sentiment", "--judge", "none"]
    other = run("--dataset", folder / "sentiment.jsonl" if form == "jsonl file" else folder, *only, name="other")
    assert timeless(other) == timeless(run(*only))


@pytest.mark.parametrize("shards, agents", [("split", 2), ("split", 4), ("iid", 2)])
def test_shards_by_split_and_iid(run, shards, agents):
    pairs = ["--pairs", "8" if agents == 2 else "4"]
    folder = run("--shards", shards, "--agents", agents, *pairs, "--judge", "none")
    check_metrics(folder, {("federated", i) for i in range(agents)}, updates=1, judge=False)


RULES = """
def calm(prompts, responses, ended):
    assert all(prompt.startswith("The ") for prompt in prompts) and len(prompts) == len(responses) == len(ended)
    return [len(response) + 10 * end for response, end in zip(responses, ended, strict=True)]
"""


@pytest.fixture
def rule(tmp_path):
    (tmp_path / "rules.py").write_text(RULES)
    return f"{tmp_path / 'rules.py'}:calm"


def test_a_rule_may_be_reward_and_judge(run, rule):
    """The reward is normalised, the judge is not; no reward model is trained, so there is no accuracy to check."""
    rows = check_metrics(run("--reward", rule, "--judge", rule), {("federated", 0), ("federated", 1)}, updates=1)
    assert all(row["judge"] > 1 for row in rows if row["judge"] is not None)
    assert all(abs(row["reward"]) < 5 for row in rows if row["update"])


def test_a_classifier_may_be_reward_and_judge(run, tmp_path):
    torch.manual_seed(0)
    judge = tmp_path / "judge"
    GPTNeoXForSequenceClassification(worlds.config(num_labels=1, num_hidden_layers=1)).save_pretrained(judge)
    worlds.save_tokenizer(judge)
    folder = run("--reward", judge, "--judge", judge)
    check_metrics(folder, {("federated", 0), ("federated", 1)}, updates=1)


def test_a_shared_reward_is_one_model_for_all(run, rule):
    folder = run("--reward", "shared", "--judge", rule)
    check_metrics(folder, {("federated", 0), ("federated", 1)}, updates=1)


def test_bfloat16_runs_and_its_small_steps_are_kept(run, small_model):
    """The weights stay float32: a step of 1e-5 would round to nothing in bfloat16."""
    folder = run("--dtype", "bfloat16", "--judge", "none", "--lr", "1e-5", "--epochs", "1", "--minibatches", "1")
    check_metrics(folder, {("federated", 0), ("federated", 1)}, updates=1, judge=False)
    agent = check_agent(folder / "agents" / "federated-seed0-agent0", forbidden={1, *range(320, 352)})
    assert agent.dtype == torch.float32
    original = fedppo.data.load_model(str(small_model), "cpu")[0].state_dict()
    moved = {name: (tensor - original[name]).abs().max().item() for name, tensor in agent.state_dict().items()}
    assert 5e-6 < max(moved.values()) < 1.1e-5 and moved["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"] > 5e-6


@pytest.mark.parametrize("mode, agents", [("isolated", 2), ("federated", 2), ("fedavg", 2), ("centralized", 1)])
def test_every_mode_runs(run, rule, mode, agents):
    folder = run("--mode", mode, "--judge", rule)
    rows = check_metrics(folder, {(mode, i) for i in range(agents)}, updates=1)
    assert sorted(weights(folder)) == [f"{mode}-seed0-agent{i}" for i in range(agents)]
    assert rows[-1]["episodes"] == (8 if mode == "centralized" else 4)
    assert (rows[-1]["bytes"] > 0) == (mode in ("federated", "fedavg"))


@pytest.mark.parametrize("rule_name, place, estimator", [
    ("sum", "loss", "exact"), ("geometric", "loss", "k2"), ("arithmetic", "both", "exact"), ("weights", "reward", "k1"),
    ("sum", "loss", "k3"), ("arithmetic", "reward", "k1")])
def test_every_rule_place_and_estimator_runs(run, rule_name, place, estimator):
    """Two rounds, so that the references differ from the policies and from each other; with anchor and adaptive KL."""
    folder = run("--rule", rule_name, "--penalty", place, "--estimator", estimator, "--rounds", "2", "--lr", "0.01",
                 "--reward", "shared", "--judge", "none", "--anchor", "0.25", "--adaptive-kl")
    rows = [row for row in metrics(folder) if row["update"]]
    assert len(rows) == 4 and all(math.isfinite(row[key]) for row in rows for key in KEYS - {"mode", "judge"})
    assert rows[-1]["kl_initial"] > 1e-4 and rows[-1]["beta"] != rows[0]["beta"]


def test_several_modes_and_seeds_share_a_folder_and_a_picture(run):
    folder = run("--mode", "isolated", "federated", "centralized", "--seeds", "0", "3", "--judge", "none")
    rows = metrics(folder)
    assert {(row["mode"], row["seed"], row["agent"]) for row in rows} == {
        (mode, seed, agent) for mode, agents in (("isolated", 2), ("federated", 2), ("centralized", 1))
        for seed in (0, 3) for agent in range(agents)}
    assert len(list((folder / "agents").iterdir())) == 10
    first = {(row["mode"], row["seed"], row["agent"]): row["reward"] for row in rows if row["update"] == 1}
    for seed in (0, 3):
        for agent in (0, 1):  # all references of the first round are the initial policy: same rollout, same score
            assert first["isolated", seed, agent] == first["federated", seed, agent]


def test_the_same_seed_gives_the_same_run_and_another_one_another(run):
    flags = ["--rounds", "2", "--mode", "federated"]
    one, two, other = run(*flags), run(*flags, name="two"), run(*flags, "--seeds", "1", name="other")
    assert timeless(one) == timeless(two) and weights(one) == weights(two)
    assert (one / "samples.md").read_text() == (two / "samples.md").read_text()
    assert timeless(one) != [row | {"seed": 0} for row in timeless(other)]


RESUMED = ["--mode", "federated", "fedavg", "--rounds", "2", "--updates", "2", "--lr", "0.01", "--batch", "2",
           "--adaptive-kl", "--judge", "none"]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory, small_model, real_data):
    """Two modes of two rounds of two updates by two agents: 16 updates in all."""
    return main(tmp_path_factory.mktemp("unstopped"), small_model, real_data, *RESUMED)


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow),
                                  9, pytest.param(14, marks=pytest.mark.slow)], ids="killed in update {}".format)
def test_a_resumed_run_equals_one_that_was_never_stopped(run, unstopped, monkeypatch, stop):
    """Killed in the first round, in later ones and between the modes, while it wrote a line.

    Optimizer, schedule, prompt queue, random streams, adaptive beta and bytes: all must come back.
    """
    update, calls = fedppo.Agent.update, []

    def killed(*args):
        calls.append(args)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return update(*args)
    monkeypatch.setattr(fedppo.Agent, "update", killed)
    stopped = run(*RESUMED, code=130)
    monkeypatch.setattr(fedppo.Agent, "update", update)
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"mode": "fed')
    assert fedppo.main(["--resume", str(stopped)]) == 0
    assert timeless(stopped) == timeless(unstopped)
    assert len(weights(unstopped)) == 4 and weights(stopped) == weights(unstopped)
    assert (stopped / "samples.md").read_text() == (unstopped / "samples.md").read_text()
    assert not list(stopped.glob("checkpoint*"))

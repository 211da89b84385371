"""The way of the real model and data: hub-style folders in, a run folder out, every form, mode and
rule between."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import datasets
import pytest
import torch
import worlds
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

import data
import fedppo
from support import load, run

PYTHIA_70M = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
              "intermediate_size": 2048, "vocab_size": 50304, "max_position_embeddings": 2048}
ALWAYS = {"seed", "agent", "round", "update", "episodes", "bytes", "seconds"}
MEASURED = ALWAYS | {"reward", "kl", "kl_initial", "entropy", "policy_loss", "value_loss",
                     "clipfrac", "length", "ended"}  # with mode and judge, what is promised
SUMMARY = {"judge_initial", "judge_final", "judge_auc", "reward_final", "worst_agent_final",
           "seconds", "bytes"}
FILES = {"config.json", "metrics.jsonl", "summary.json", "samples.md", "curves.png", "curves.svg",
         "agents"}
SHORT = ["--agents", "2", "--rounds", "1", "--updates", "1", "--batch", "4", "--response-length",
         "4", "--pairs", "8", "--eval-prompts", "4", "--reward-epochs", "1", "--epochs", "2",
         "--threads", "1", "--device", "cpu"]
TABLES = {split: worlds.chat_rows(30, seed, equal=7)  # a quarter of the rows is of no use
          for seed, split in enumerate(("descriptiveness", "sentiment"))}


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """60 rows in the schema and the splits of descriptiveness-sentiment-trl-style."""
    folder = tmp_path_factory.mktemp("data") / "descriptiveness-sentiment"
    datasets.DatasetDict({split: datasets.Dataset.from_list(rows)
                          for split, rows in TABLES.items()}).save_to_disk(folder)
    return folder


def start(out, model, dataset, *flags, name="run", code=0):
    """Run the program with the settings for real text, cut to a second -> its folder."""
    places = ["--model", model, "--dataset", dataset, "--out", out, "--name", name]
    given = ["--preset", "pythia-70m", *SHORT, *places, *flags]  # a later flag wins
    assert fedppo.main(list(map(str, given))) == code
    return out / name


@pytest.fixture
def train(small_model, real_data, tmp_path, no_picture):
    """train(*flags, name=..., code=...) -> the folder of a short run on the small model."""
    return functools.partial(start, tmp_path, small_model, real_data)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    return [row | {"seconds": None, "wall": None} for row in metrics(folder)]


def weights(folder):
    """{agent: the bytes of its weights}."""
    return {path.parent.name: path.read_bytes()
            for path in sorted(folder.glob("agents/*/model.safetensors"))}


def check_metrics(folder, modes=("federated",), agents=2, seeds=(0,), updates=1, judge=True):
    """Every line that should be there has every promised key; what is measured is finite."""
    rows = metrics(folder)
    found = [(row["mode"], row["seed"], row["agent"], row["update"]) for row in rows]
    expected = [(mode, seed, agent, update) for mode in modes for seed in seeds
                for agent in range(1 if mode == "centralized" else agents)
                for update in range(updates + 1)]
    assert sorted(found) == sorted(expected)
    for row in rows:
        missing = set() if row["update"] else MEASURED - ALWAYS  # nothing is sampled before
        assert all(math.isfinite(row[key]) for key in MEASURED - missing)
        assert all(row[key] is None for key in missing)
        if row["update"]:
            assert row["entropy"] > 0 and row["kl"] > -1e-4 and row["kl_initial"] > -1e-4
            assert 0 <= row["clipfrac"] <= 1 and 0 <= row["ended"] <= 1 <= row["length"] <= 4
        if judge:  # once a round, and a round has one update here
            assert math.isfinite(row["judge"])
        else:
            assert row["judge"] is None
    return rows


def check_folder(folder, agents=2, mode="federated"):
    """The files that every run leaves, and nothing half-made -> config.json."""
    assert {path.name for path in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() >= {"settings", "preset", "commit", "versions", "hardware"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["modes"][mode]["seeds"]["0"].keys() >= SUMMARY
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(weights(folder)) == [f"{mode}-seed0-agent{i}" for i in range(agents)]
    samples = (folder / "samples.md").read_text()
    assert all(f"| {mode}, agent {i} |" in samples for i in range(agents)) and "The " in samples
    return config


def check_agent(folder, forbidden):
    """The folder is a model for transformers.pipeline, which samples no pad and no forbidden id."""
    generate = pipeline("text-generation", str(folder))
    torch.manual_seed(0)
    outputs = generate(["The room 3 was"] * 10, return_tensors=True)
    prompt = generate.tokenizer("The room 3 was")["input_ids"]
    for (output,) in outputs:
        ids = list(output["generated_token_ids"])
        response = ids[len(prompt):]
        assert ids[:len(prompt)] == prompt and 1 <= len(response) <= 4
        if 0 in response:
            response = response[:response.index(0)]  # the pipeline pads behind an EOS
        assert not set(response) & forbidden
    assert isinstance(generate("The room 3 was")[0]["generated_text"], str)
    assert "pipeline(" in (folder / "README.md").read_text()
    # Detail 16: it samples as in training, the whole softmax included.
    config = generate.model.generation_config
    assert config.do_sample and config.temperature == 0.7
    assert config.top_k == 0 and config.top_p in (None, 1.0)
    assert (config.eos_token_id, config.pad_token_id, config.max_new_tokens) == (0, 1, 4)
    return generate.model


def largest_moves(agent, model):
    """{name: the largest change of one of its weights since the model was loaded}."""
    original = load.load_model(str(model), "cpu")[0].state_dict()
    return {name: (tensor - original[name]).abs().max().item()
            for name, tensor in agent.state_dict().items()}


# --------------------------------------------------------------------------- exactly Pythia's shape


@pytest.mark.slow  # twenty seconds and most of a gigabyte, which it removes
def test_a_model_of_exactly_pythias_shape_goes_the_whole_way(tmp_path, real_data, capfd,
                                                             monkeypatch):
    """float16 on disk, 50,304 rows for 320 tokens, no pad token, logits near 1,070: details 2, 21,
    29 and 30 in a run.
    """
    model = worlds.save_offset_model(tmp_path / "pythia", 1070, **PYTHIA_70M)
    monkeypatch.setattr(run, "SECONDS_BETWEEN", math.inf)  # 1.7 GB that one round has no use for
    folder = start(tmp_path, model, real_data, "--judge", "none", "--epochs", "1")
    printed = capfd.readouterr().out
    assert "46 preference pairs of 60 rows; dropped: 14 since chosen" in printed
    assert "FAIL" not in printed
    rows = check_metrics(folder, judge=False)
    config = check_folder(folder)
    assert config["settings"]["preset"] == "pythia-70m" and config["settings"]["lr"] == 1e-5
    parameters = 2 * 50304 * 512 + 6 * (12 * 512 ** 2 + 13 * 512) + 2 * 512  # worked out
    assert {row["bytes"] for row in rows if row["update"]} == {4 * parameters}  # one peer, once
    agent = check_agent(folder / "agents" / "federated-seed0-agent1", {1, *range(320, 50304)})
    assert agent.dtype == torch.float32 and agent.config.vocab_size == 50304
    # One step of Adam is at most the learning rate, 1e-5, and rounding.
    assert 0 < max(largest_moves(agent, model).values()) < 1.1e-5
    shutil.rmtree(tmp_path)


# ------------------------------------------------------------------------ the same, small and wide


def test_the_small_model_leaves_everything_a_run_promises(tmp_path, small_model, real_data, capfd):
    """With a judge fitted to held-out pairs, two rounds, and the agents' weights moved."""
    folder = start(tmp_path, small_model, real_data, "--rounds", "2", "--lr", "0.01",
                   "--judge", "heldout")
    printed = capfd.readouterr().out
    assert "46 preference pairs of 60 rows; dropped: 14 since chosen" in printed
    deals = json.loads((folder / "config.json").read_text())["deals"]["0"]
    for deal in deals:
        assert deal["pairs"] == 8 and deal["splits"] == ["descriptiveness", "sentiment"]
        said = "agent {agent}: {rows} rows of {prompts} prompts from desc".format(**deal)
        assert said in printed
    assert len(deals) == 2 and f"picture   {folder / 'curves.png'}" in printed
    rows = check_metrics(folder, updates=2)
    assert [(row["agent"], row["round"], row["update"]) for row in rows] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1), (0, 2, 2), (1, 2, 2)]
    assert [row["lr"] for row in rows[2:]] == pytest.approx([0.01, 0.01, 0.005, 0.005])
    assert [row["episodes"] for row in rows if row["agent"] == 0] == [0, 4, 8]
    received = [row["bytes"] for row in rows if row["agent"] == 0]
    assert received[0] == 0 and received[2] == 2 * received[1] > 0
    check_folder(folder)
    for i in range(2):
        check_agent(folder / "agents" / f"federated-seed0-agent{i}", {1, *range(320, 352)})
    assert len(set(weights(folder).values())) == 2


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory, small_model, real_data, no_picture):
    """The metrics of a run on one split of the save_to_disk folder."""
    out = tmp_path_factory.mktemp("sentiment")
    return timeless(start(out, small_model, real_data, *SENTIMENT))


SENTIMENT = ["--splits", "sentiment", "--judge", "none"]


@pytest.mark.parametrize("form", ["parquet", "jsonl folder", "jsonl file"])
def test_other_forms_of_the_data_give_the_same_run(train, sentiment, tmp_path, monkeypatch, form):
    """The rows are those of the save_to_disk folder, in the same order: so is every number."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    for split, rows in TABLES.items():
        file = worlds.write_jsonl(folder / f"{split}.jsonl", rows)
        if form == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
            file.unlink()
    place = folder / "sentiment.jsonl" if form == "jsonl file" else folder
    assert timeless(train(*SENTIMENT, "--dataset", place)) == sentiment


@pytest.mark.parametrize("shards, agents, pairs", [("split", 2, 8), ("split", 4, 3), ("iid", 2, 8)])
def test_shards_by_split_and_iid(train, shards, agents, pairs):
    folder = train("--shards", shards, "--agents", agents, "--pairs", pairs, "--judge", "none")
    check_metrics(folder, agents=agents, judge=False)


RULES = """
def calm(prompts, responses, ended):
    assert all(prompt.startswith("The ") for prompt in prompts)
    assert len(prompts) == len(responses) == len(ended)
    return [len(response) + 10 * end for response, end in zip(responses, ended, strict=True)]
"""


@pytest.fixture
def rule(tmp_path):
    (tmp_path / "rules.py").write_text(RULES)
    return f"{tmp_path / 'rules.py'}:calm"


@pytest.fixture
def instruct(tmp_path):
    """A Llama as instruct models are: tied head, pad = EOS, a chat template, two EOS ids."""
    folder = tmp_path / "instruct"
    tokenizer = worlds.save_tokenizer(folder, padding=False)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, pad_token_id=0))
    model.generation_config = GenerationConfig(eos_token_id=[0, 45], pad_token_id=0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_instruct_model_runs_on_whole_conversations(train, instruct, tmp_path, capfd, dtype):
    """As it is on the hub: nothing to be added, resized or saved before. Its agent goes on."""
    talks = [{name: [{"role": "system", "content": "Be brief."},
                     {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content":
                      "And?"}, {"role": "user", "content": "So?"}, {"role": "assistant",
                      "content": row[name]}] for name in ("chosen", "rejected")}
             for row in worlds.text_rows(30)]
    path = worlds.write_jsonl(tmp_path / "talks.jsonl", talks)
    folder = train("--model", instruct, "--dataset", path, "--judge", "none", "--dtype", dtype,
                   "--lr", "1e-3", "--rounds", "2")
    printed = capfd.readouterr().out
    assert "conversations become prompts by the tokenizer's chat template" in printed
    assert "a response ends at any of" in printed and "FAIL" not in printed
    assert ("log-probs in bfloat16 against float32, mean error" in printed) is (dtype != "float32")
    check_metrics(folder, updates=2, judge=False)
    agent = folder / "agents/federated-seed0-agent0"
    generate = pipeline("text-generation", str(agent))
    config = generate.model.generation_config
    assert config.eos_token_id == [0, 45] and config.pad_token_id == 0
    torch.manual_seed(0)
    replies = [generate([{"role": "user", "content": "The room 3 was"}])[0]["generated_text"][-1]
               for _ in range(20)]
    assert {reply["role"] for reply in replies} == {"assistant"}
    samples = (folder / "samples.md").read_text(encoding="utf-8")
    assert "| Be brief. The " in samples and "[user]" not in samples


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offset, tied", [(0, True), (300, True), (1070, True), (-100, True),
                                          (1070, False)])
def test_a_model_with_an_offset_passes_the_checks_and_trains(train, tmp_path, capfd, dtype, offset,
                                                             tied):
    """Pythia's logits lie about 1,070, GPT-2's about -100. A head of its own is saved without."""
    model = worlds.save_offset_model(tmp_path / "offset", offset, tied)
    folder = train("--model", model, "--dtype", dtype, "--judge", "none", "--lr", "1e-3")
    printed = capfd.readouterr().out
    assert ("all logits had about 1070 in common" in printed) is not tied
    assert "FAIL" not in printed and "no fatal" not in printed
    check_metrics(folder, judge=False)
    saved = AutoModelForCausalLM.from_pretrained(folder / "agents/federated-seed0-agent0")
    logits = saved(input_ids=torch.tensor([[5, 9, 7]])).logits[..., 2:320]
    assert logits.mean().item() == pytest.approx(offset if tied else 0, abs=3)


def test_a_saved_agent_has_the_log_probs_of_training(train, small_model, monkeypatch):
    ids, mask = torch.tensor([[0, 0, 5, 9, 7], [3, 4, 5, 6, 7]]), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    known, update = {}, fedppo.Agent.update

    def remembered(self, *args):
        found = update(self, *args)
        with torch.no_grad():
            logits = self.policy(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        known[self.index] = logits.log_softmax(-1)[mask.bool()]
        return found
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    monkeypatch.setattr(fedppo.Agent, "update", remembered)
    folder = train("--model", small_model, "--judge", "none", "--lr", "1e-3")
    for index, expected in known.items():
        agent = folder / f"agents/federated-seed0-agent{index}"
        saved = AutoModelForCausalLM.from_pretrained(agent)
        with torch.no_grad():
            logits = saved(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        logits[..., saved.generation_config.suppress_tokens] = -torch.inf  # as the sampler does
        found = logits.log_softmax(-1)[mask.bool()]
        assert torch.allclose(found, expected, atol=1e-5), index


def test_a_run_needs_no_utf8_locale(small_model, tmp_path):
    """All that is written is UTF-8, whatever the locale says, and no print fails."""
    table = [row | {"prompt": f"{row['prompt']} très 汤"} for row in worlds.text_rows(40)]
    path = worlds.write_jsonl(tmp_path / "très.jsonl", table)
    flags = ["--preset", "pythia-70m", *SHORT, "--model", str(small_model), "--dataset", str(path),
             "--judge", "none", "--name", "run"]
    environment = {name: value for name, value in os.environ.items() if name[:3] != "LC_"}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0",
                    "PYTHONIOENCODING": "latin-1"}

    def run_in(out):
        command = [sys.executable, "fedppo.py", *flags, "--out", str(out)]
        return subprocess.run(command, cwd=load.HOME, env=environment, capture_output=True)
    done = run_in(tmp_path / "runs")
    assert done.returncode == 0, done.stderr.decode("latin-1")
    for file in ("samples.md", "config.json", "metrics.jsonl", "summary.json"):
        (tmp_path / "runs/run" / file).read_text(encoding="utf-8")
    assert "汤" in (tmp_path / "runs/run/samples.md").read_text(encoding="utf-8")
    done = run_in(tmp_path / "été")
    assert done.returncode == 2 and b"PYTHONUTF8=1" in done.stderr


def test_a_rule_may_be_reward_and_judge(train, rule):
    """The reward is normalised, the judge is not; no reward model has an accuracy to check."""
    rows = check_metrics(train("--reward", rule, "--judge", rule))
    assert all(row["judge"] > 1 and row["reward_accuracy"] is None for row in rows)
    assert all(abs(row["reward"]) < 5 for row in rows if row["update"])


def test_a_classifier_may_be_reward_and_judge(train, tmp_path):
    torch.manual_seed(0)
    judge = tmp_path / "judge"
    shape = worlds.config(num_labels=1, num_hidden_layers=1)
    GPTNeoXForSequenceClassification(shape).save_pretrained(judge)
    worlds.save_tokenizer(judge)
    check_metrics(train("--reward", judge, "--judge", judge))


@pytest.mark.parametrize("reward, pairs", [("shared", [16]), ("ensemble", [8, 8])])
def test_pooled_rewards_are_one_model_on_all_pairs_or_one_of_each_agent(train, rule, monkeypatch,
                                                                        capfd, reward, pairs):
    fitted, fit = [], data.fit_reward_model
    monkeypatch.setattr(data, "fit_reward_model", lambda model, pairs, *args, **kwargs: (
        fitted.append(len(pairs)) or fit(model, pairs, *args, **kwargs)))
    check_metrics(train("--reward", reward, "--judge", rule))
    assert fitted == pairs
    assert f"not private: --reward {reward} pool" in capfd.readouterr().out


def test_bfloat16_runs_and_its_small_steps_are_kept(train, small_model):
    """The weights stay float32: a step of 1e-5 would round to nothing in bfloat16."""
    folder = train("--dtype", "bfloat16", "--judge", "none", "--lr", "1e-5", "--epochs", "1",
                   "--minibatches", "1")
    check_metrics(folder, judge=False)
    agent = check_agent(folder / "agents" / "federated-seed0-agent0", {1, *range(320, 352)})
    moves = largest_moves(agent, small_model)
    assert agent.dtype == torch.float32 and max(moves.values()) < 1.1e-5
    assert moves["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"] > 5e-6


@pytest.mark.parametrize("name, penalty", [
    ("sum", "exact-in-loss"), ("geometric", "k2-in-loss"), ("arithmetic", "both"),
    ("weights", "k1-in-reward"), ("sum", "k3-in-loss"), ("arithmetic", "k1-in-reward")])
def test_every_rule_and_penalty_runs(train, name, penalty):
    """Two rounds, so that references differ from the policies and from each other; an anchor."""
    folder = train("--rule", name, "--penalty", penalty, "--rounds", "2", "--lr", "0.01",
                   "--reward", "shared", "--judge", "none", "--anchor", "0.25")
    rows = [row for row in metrics(folder) if row["update"]]
    assert len(rows) == 4 and all(math.isfinite(row[key]) for row in rows for key in MEASURED)
    assert rows[-1]["kl_initial"] > 1e-4 and rows[-1]["kl"] != rows[-1]["kl_initial"]


def test_all_modes_and_several_seeds_share_a_folder_and_a_picture(train, rule):
    modes = list(fedppo.MODES)
    assert len(modes) == 6
    folder = train("--mode", *modes, "--seeds", "0", "3", "--judge", rule)
    rows = check_metrics(folder, modes, seeds=(0, 3))
    assert len(weights(folder)) == 2 * (5 * 2 + 1)
    trained = {(row["mode"], row["seed"], row["agent"]): row for row in rows if row["update"]}
    heard = {(mode, row["bytes"] > 0) for (mode, *_), row in trained.items()}
    assert heard == {(mode, mode in ("federated", "merged", "fedavg")) for mode in modes}
    episodes = {(mode, row["episodes"]) for (mode, *_), row in trained.items()}
    assert episodes == {(mode, 8 if mode == "centralized" else 4) for mode in modes}
    # All references of the first round are the initial policy: same rollout, same score.
    for seed in (0, 3):
        for agent in (0, 1):
            assert len({trained[mode, seed, agent]["reward"]
                        for mode in ("isolated", "classic", "federated")}) == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["modes"]) == modes


def test_the_same_seed_gives_the_same_run_and_another_one_another(train):
    flags = ["--rounds", "2", "--mode", "merged"]
    one, two = train(*flags), train(*flags, name="two")
    other = train(*flags, "--seeds", "1", name="other")
    assert timeless(one) == timeless(two) and weights(one) == weights(two)
    assert (one / "samples.md").read_text() == (two / "samples.md").read_text()
    assert timeless(one) != [row | {"seed": 0} for row in timeless(other)]


RESUMED = ["--mode", "federated", "fedavg", "--rounds", "2", "--updates", "2", "--lr", "0.01",
           "--batch", "2", "--judge", "none"]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory, small_model, real_data, no_picture):
    """Two modes of two rounds of two updates by two agents: 16 updates in all."""
    return start(tmp_path_factory.mktemp("unstopped"), small_model, real_data, *RESUMED)


@pytest.mark.parametrize("stop", [
    pytest.param(1, marks=pytest.mark.slow), 6, 9, pytest.param(14, marks=pytest.mark.slow)],
    ids="killed in update {}".format)
def test_a_resumed_run_equals_one_that_was_never_stopped(train, unstopped, monkeypatch, stop):
    """Killed in the first round, in later ones and between the modes, while it wrote a line.

    Optimizer, schedule, prompt queue, random streams and bytes: all must come back.
    """
    monkeypatch.setattr(run, "SECONDS_BETWEEN", 0)  # a checkpoint after every round
    update, calls = fedppo.Agent.update, []

    def killed(*args):
        calls.append(args)
        if len(calls) == stop:
            raise run.Stopped(signal.SIGINT)
        return update(*args)
    monkeypatch.setattr(fedppo.Agent, "update", killed)
    stopped = train(*RESUMED, code=130)
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"mode": "fed')
    assert fedppo.main(["--resume", str(stopped)]) == 0
    assert len(calls) == {1: 17, 6: 18, 9: 17, 14: 18}[stop]  # one round is done again at most
    assert timeless(stopped) == timeless(unstopped)
    assert len(weights(unstopped)) == 4 and weights(stopped) == weights(unstopped)
    assert (stopped / "samples.md").read_text() == (unstopped / "samples.md").read_text()
    assert not list(stopped.glob("checkpoint*"))

"""The command line: a user's mistake is one line and exit code 2, every setting is a flag, presets keep their word."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import worlds

import data
import fedppo
from fedppo import Settings

HOME = Path(fedppo.__file__).parent
FIELDS = dataclasses.fields(Settings)
BOTH = {field.name: (field.default, field.metadata["pythia-70m"]) for field in FIELDS}
DIFFERING = [name for name, (tiny, pythia) in BOTH.items() if tiny != pythia]


def flag(name):
    return "--" + name.replace("_", "-")


def given(name, value):
    """A setting as it is written on the command line."""
    if isinstance(value, bool):
        return [flag(name) if value else flag("no_" + name)]
    return [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """40 preference rows in one jsonl file: the split "good"."""
    return worlds.write_jsonl(tmp_path_factory.mktemp("rows") / "good.jsonl", worlds.text_rows(40))


@pytest.fixture
def base(small_model, rows, tmp_path, no_picture):
    """Flags of a run of a second on the small model, without a picture; later ones win."""
    return ["--preset", "tiny", "--device", "cpu", "--workers", "1", "--model", str(small_model), "--dataset",
            str(rows), "--shards", "iid", "--agents", "2", "--pairs", "4", "--eval-prompts", "2", "--judge", "none",
            "--rounds", "1", "--updates", "1", "--batch", "4", "--response-length", "4", "--reward-epochs", "1",
            "--out", str(tmp_path / "runs"), "--name", "run"]


@pytest.fixture
def refused(base, tmp_path, capfd):
    """refused(*flags) -> the one line on stderr of a run that must not start."""
    def run(*flags, left=()):
        capfd.readouterr()
        assert fedppo.main([*base, *map(str, flags)]) == 2
        errors = capfd.readouterr().err.splitlines()
        assert len(errors) == 1 and errors[0].startswith("error: ")
        out = tmp_path / "runs"
        assert sorted(path.name for path in out.rglob("*")) == sorted(left)
        return errors[0]
    return run


# ------------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize("flags, says", [
    (["--agents", "four"], ["--agents", "'four'"]),
    (["--agents", "0"], ["--agents", "positive", "0"]),
    (["--agents", "-2"], ["--agents", "-2"]),
    (["--agents", "2.5"], ["--agents", "'2.5'"]),
    (["--agents"], ["--agents", "expected one argument"]),
    (["--rounds", "0"], ["--rounds", "positive"]),
    (["--updates", "-1"], ["--updates", "-1"]),
    (["--pairs", "0"], ["--pairs", "positive"]),
    (["--batch", "0"], ["--batch", "positive"]),
    (["--response-length", "0"], ["--response-length", "positive"]),
    (["--lr", "0"], ["--lr", "positive"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--lr", "inf"], ["--lr", "inf"]),
    (["--lr", "fast"], ["--lr", "'fast'"]),
    (["--temperature", "0"], ["--temperature", "positive"]),
    (["--clip", "-0.2"], ["--clip", "-0.2"]),
    (["--beta", "-1"], ["--beta", "negative", "-1"]),
    (["--beta", "nan"], ["--beta", "nan"]),
    (["--gamma", "1.5"], ["--gamma", "between 0 and 1", "1.5"]),
    (["--lam", "nan"], ["--lam", "nan"]),
    (["--anchor", "2"], ["--anchor", "between 0 and 1", "2"]),
    (["--self-weight", "-0.5"], ["--self-weight", "-0.5"]),
    (["--threads", "-1"], ["--threads", "-1"]),
    (["--vf-coef", "-1"], ["--vf-coef", "-1"]),
    (["--mode", "federate"], ["--mode", "'federate'", "federated"]),
    (["--mode"], ["--mode", "at least one"]),
    (["--rule", "mean"], ["--rule", "'mean'", "geometric"]),
    (["--estimator", "k4"], ["--estimator", "'k4'", "k3"]),
    (["--penalty", "none"], ["--penalty", "'none'", "loss"]),
    (["--dtype", "float16"], ["--dtype", "'float16'", "bfloat16"]),
    (["--preset", "large"], ["--preset", "'large'", "pythia-70m"]),
    (["--shards", "topic"], ["--shards", "'topic'", "split"]),
    (["--seeds", "a"], ["--seeds", "'a'"]),
    (["--seeds", "1", "2", "1"], ["--seeds", "twice", "1 2 1"]),
    (["--mode", "isolated", "isolated"], ["--mode", "twice"]),
    (["--splits", "good", "good"], ["--splits", "twice"]),
    (["--batch", "10", "--minibatches", "4"], ["--batch 10", "--minibatches 4"]),
    (["--batch", "4", "--minibatches", "8"], ["--batch 4", "--minibatches 8"]),
    (["--device", "tpu9"], ["--device tpu9"]),
    (["--device", "meta"], ["--device meta"]),
    (["--name", "a/b"], ["--name", "'a/b'"]),
    (["--name", ".."], ["--name", "'..'"]),
    (["--adaptive-kl", "--beta", "0"], ["--adaptive-kl", "--beta"]),
    (["--adaptive-kl", "--kl-horizon", "1"], ["--adaptive-kl", "--kl-horizon"]),
    (["--no-such-flag", "3"], ["--no-such-flag"]),
    (["--agent", "3"], ["--agent"]),  # no abbreviations: a flag added later must not change what a command means
    (["stray"], ["stray"]),
], ids=" ".join)
def test_a_wrong_value_is_named_with_its_flag(refused, flags, says):
    line = refused(*flags)
    assert all(word in line for word in says), line


@pytest.mark.parametrize("penalty, estimator, says", [
    ("loss", "k1", "expected gradient of 0"),
    ("reward", "k2", r"E[x^2/2]"),
    ("reward", "k3", "KL(reference||policy)"),
    ("reward", "exact", "misses the current token"),
    ("both", "k1", "--penalty both"), ("both", "k2", "--penalty both"), ("both", "k3", "--penalty both")])
def test_an_estimator_in_the_wrong_place_is_refused_with_its_reason(refused, penalty, estimator, says):
    """Detail 17."""
    line = refused("--penalty", penalty, "--estimator", estimator)
    assert says in line and ("--allow-wrong-estimator" in line) == (penalty != "both")


@pytest.mark.parametrize("penalty, estimator, becomes", [
    ("loss", "auto", "exact"), ("reward", "auto", "k1"), ("both", "auto", "exact"), ("loss", "k2", "k2"),
    ("loss", "k3", "k3"), ("loss", "exact", "exact"), ("reward", "k1", "k1"), ("both", "exact", "exact")])
def test_right_pairs_of_place_and_estimator_are_taken(penalty, estimator, becomes):
    settings, _ = fedppo.parse(["--preset", "tiny", "--penalty", penalty, "--estimator", estimator])
    assert (settings.penalty, settings.estimator) == (penalty, becomes)


def test_a_wrong_estimator_can_be_insisted_on():
    for penalty, estimator in fedppo.WRONG_ESTIMATORS:
        settings, _ = fedppo.parse(["--preset", "tiny", "--penalty", penalty, "--estimator", estimator,
                                    "--allow-wrong-estimator"])
        assert settings.estimator == estimator
    with pytest.raises(data.UserError, match="--penalty both"):
        fedppo.parse(["--penalty", "both", "--estimator", "k1", "--allow-wrong-estimator"])


# ------------------------------------------------------------------------------------------------------ matrices


@pytest.mark.parametrize("matrix, says", [
    ("[[1, 0, 0], [0, 1, 0], [0, 0, 1]]", ["3 x 3", "2 x 2"]),
    ("[[1, 0]]", ["1 x 2", "2 x 2"]),
    ("[1, 0]", ["2 x 2"]),
    ("[]", ["2 x 2"]),
    ("5", ["2 x 2"]),
    ("[[1, -0.5], [0, 1]]", ["negative"]),
    ("[[1, NaN], [0, 1]]", ["finite"]),
    ("[[1, Infinity], [0, 1]]", ["finite"]),
    ("[[1, 1], [0, 0]]", ["row 1", "zero"]),
    ("[[1, 1], [1]]", ["JSON matrix"]),
    ('[[1, "a"], [0, 1]]', ["JSON matrix"]),
    ('{"rows": [[1, 0], [0, 1]]}', ["JSON matrix"]),
    ("null", ["JSON matrix"]),
    ("[[1, 0], [0, 1]", ["JSON matrix"]),
    ("", ["JSON matrix"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_matrix_is_refused(refused, tmp_path, matrix, says):
    path = tmp_path / "matrix.json"
    path.write_text(matrix)
    line = refused("--topology", path)
    assert "--topology" in line and str(path) in line and all(word in line for word in says), line


def test_a_matrix_that_cannot_be_read_is_refused(refused, tmp_path):
    (tmp_path / "latin.json").write_bytes(b"[[1, 0], [0, 1]] caf\xe9")
    for topology in ("rings", tmp_path / "gone.json", tmp_path, tmp_path / "latin.json"):
        line = refused("--topology", topology)
        assert str(topology) in line and "ring" in line  # the kinds there are


def test_a_right_matrix_is_normalised_by_row(tmp_path):
    path = tmp_path / "matrix.json"
    path.write_text("[[3, 1], [0, 5]]")
    settings, _ = fedppo.parse(["--preset", "tiny", "--agents", "2", "--topology", str(path)])
    assert fedppo.communication_matrix(settings).tolist() == [[0.75, 0.25], [0.0, 1.0]]


# ---------------------------------------------------------------------------------------------- data, model, judge


def test_a_missing_column_is_named(refused, tmp_path):
    rows = [{"prompt": row["prompt"], "chosen": row["chosen"], "other": "x"} for row in worlds.text_rows(10)]
    line = refused("--dataset", worlds.write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "'rejected'" in line and "other" in line


def test_an_unknown_or_empty_split_is_named(refused, tmp_path, rows):
    line = refused("--splits", "bad")
    assert "'bad'" in line and "good" in line and str(rows) in line
    folder = tmp_path / "set"
    worlds.write_jsonl(folder / "full.jsonl", worlds.text_rows(10))
    worlds.write_jsonl(folder / "void.jsonl", [])
    assert "'void'" in refused("--dataset", folder)


def test_too_few_prompts_or_pairs_say_what_to_lower(refused):
    line = refused("--agents", "39")
    assert "40 distinct prompts" in line and "39 agents" in line and "--agents" in line
    line = refused("--eval-prompts", "40")
    assert "40 distinct prompts" in line and "--eval-prompts" in line
    line = refused("--pairs", "30")
    assert "--pairs" in line and "30" in line and "lower --pairs to 16" in line  # 38 rows: 19 each, 3 of them held out
    line = refused("--pairs", "30", "--eval-prompts", "3")
    assert "agent 1 has 18" in line and "lower --pairs to 15, lower --eval-prompts" in line, "37 rows: of 19 and 18"


def test_what_fits_is_told_right(base, capfd):
    """The number that the message names is taken."""
    assert fedppo.main([*base, "--pairs", "16", "--check"]) == 0


def test_a_seed_without_enough_data_is_refused_before_the_first_one_is_trained(refused, tmp_path, monkeypatch):
    """Which prompts are held out depends on the seed: some leave agent 1 fewer rows than it needs."""
    for split, n in (("a", 30), ("b", 8)):
        worlds.write_jsonl(tmp_path / "set" / f"{split}.jsonl", [
            row | {"prompt": f"{row['prompt']} {split}"} for row in worlds.text_rows(n)])
    pairs, _ = data.load_pairs(str(tmp_path / "set"))

    def enough(seed):
        with contextlib.suppress(data.UserError):
            return bool(data.make_shards(pairs, 2, "split", 6, 4, random.Random(f"{seed} shards")))
        return False
    seeds = [next(seed for seed in range(99) if enough(seed) == wanted) for wanted in (True, False)]
    monkeypatch.setattr(data, "fit_reward_model", lambda *args, **kwargs: pytest.fail("trained"))
    line = refused("--dataset", tmp_path / "set", "--shards", "split", "--pairs", "6", "--eval-prompts", "4",
                   "--seeds", *seeds)
    assert "--pairs" in line


def test_a_prompt_longer_than_the_context_is_named(refused, tmp_path):
    rows = worlds.text_rows(20)
    rows[7]["prompt"] = "The longest of all prompts " * 30
    line = refused("--dataset", worlds.write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "The longest of all prompts" in line and "context of 64" in line
    line = refused("--response-length", "62")
    assert "--response-length 62" in line and "context of 64" in line


def test_a_missing_model_says_how_to_get_one(refused, tmp_path):
    line = refused("--model", tmp_path / "gone")
    assert str(tmp_path / "gone") in line and "--model" in line
    (tmp_path / "empty").mkdir()
    assert "no causal language model" in refused("--model", tmp_path / "empty")


def test_what_is_no_dataset_is_refused(refused, tmp_path):
    line = refused("--dataset", "nobody/nothing")
    assert "'nobody/nothing'" in line and "hf download --repo-type dataset nobody/nothing" in line
    for name in (tmp_path / "gone", "gone.jsonl", "./nobody/nothing"):
        assert f"--dataset {name}: there is no such file" in refused("--dataset", name)
    (tmp_path / "text.txt").write_text("hello")
    assert "text.txt" in refused("--dataset", tmp_path / "text.txt")
    (tmp_path / "empty").mkdir()
    assert "holds no" in refused("--dataset", tmp_path / "empty")
    (tmp_path / "false").mkdir()
    (tmp_path / "false" / "dataset_info.json").write_text("{}")
    assert str(tmp_path / "false") in refused("--dataset", tmp_path / "false")


def test_broken_jsonl_is_named_by_line(refused, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(worlds.text_rows(1)[0]) + '\n{"prompt": "The\n')
    line = refused("--dataset", path)
    assert str(path) in line and "line 2" in line
    path.write_bytes(b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n')
    line = refused("--dataset", path)
    assert str(path) in line and "UTF-8" in line


def changed(**cells):
    """The 40 good rows, row 7 with other cells."""
    return [row | cells if number == 7 else row for number, row in enumerate(worlds.text_rows(40))]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD_LINES = lines(worlds.text_rows(40))
BAD_ROWS = {  # what a jsonl file holds: what the error says
    "empty prompt": (lines(changed(prompt="")), "row 7: the prompt is empty"),
    "blank prompt": (lines(changed(prompt=" \n\t ")), "row 7: the prompt is empty"),
    "only empty responses": (lines([row | {"chosen": "", "rejected": " "} for row in changed()]), "all of its 40 rows"),
    "only equal responses": (lines(worlds.text_rows(40, equal=40)), "all of its 40 rows"),
    "one prompt": (lines([row | {"prompt": "The song was"} for row in changed()]), "1 distinct prompts"),
    "100,000 characters": (lines(changed(prompt="x" * 100_000)), "context of 64"),
    "half a surrogate pair": (lines(changed(chosen="a \ud800")), "row 7 is not valid Unicode"),
    "null": (lines(changed(chosen=None)), "row 7: prompt, chosen and rejected must be"),
    "a number": (lines(changed(rejected=3)), "row 7: prompt, chosen and rejected must be"),
    "a list of strings": (lines(changed(chosen=["a"])), "row 7: prompt, chosen and rejected must be"),
    "no content": (lines(changed(chosen=[{"role": "assistant"}])), "row 7: prompt, chosen and rejected must be"),
    "no assistant": (lines(changed(chosen=[{"role": "user", "content": "a"}])), "row 7: prompt, chosen and"),
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD_LINES, "BOM"),
    "UTF-16": (GOOD_LINES.decode().encode("utf-16"), "not UTF-8"),
    "zip": (b"PK\x03\x04\xff", "not UTF-8"),
    "nothing": (b"", "is empty"),
    "blank lines": (b"\n \n\n", "is empty"),
    "one JSON list": (json.dumps(worlds.text_rows(40)).encode(), "line 1 is not a JSON object"),
    "numbers": (b"1\n2\n3\n", "line 1 is not a JSON object"),
    "a cut line": (GOOD_LINES[:-9], "line 40 is not JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(refused, tmp_path, name):
    content, says = BAD_ROWS[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    line = refused("--dataset", tmp_path / "rows.jsonl")
    assert says in line and len(line) < 400


def test_odd_rows_are_taken(base, tmp_path):
    """Emoji, a zero byte, other scripts, an empty response and one of 100,000 characters are text like any other."""
    rows = worlds.text_rows(40)
    rows[3:8] = [row | cells for row, cells in zip(rows[3:8], (
        {"prompt": "The 🎉 was", "chosen": "👍🏽 and 🎉."}, {"chosen": "a\0b"}, {"prompt": "汤很", "rejected": "שלום"},
        {"rejected": ""}, {"chosen": "x" * 100_000}), strict=True)]
    dataset = worlds.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert fedppo.main([*base, "--dataset", str(dataset), "--pairs", "14"]) == 0, "every row is used"


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


BAD_MODELS = {  # what is done to a good folder: what the error says
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("hello"), "not a valid JSON file"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "no causal language model"),
    "unknown type": (lambda folder: (folder / "config.json").write_text('{"model_type": "nonsense"}'), "nonsense"),
    "weights gone": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights cut": (cut_weights, "no causal language model"),
    "tokenizer gone": (without_tokenizer, "error: "),
    "tokenizer is empty": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "no causal language model"),
    "no EOS": (lambda folder: worlds.save_tokenizer(folder, eos=False), "no EOS token"),
    "no pad": (lambda folder: worlds.save_tokenizer(folder, padding=False), "no pad token"),
    "too few rows": (lambda folder: worlds.save_model(folder, vocab_size=100), "ids go to 319, the embedding has 100"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_named(refused, small_model, tmp_path, name):
    damage, says = BAD_MODELS[name]
    shutil.copytree(small_model, tmp_path / "model")
    damage(tmp_path / "model")
    assert says in refused("--model", tmp_path / "model")


JUDGES = """
def raises(prompts, responses, ended):
    raise LookupError("no lexicon")

def short(prompts, responses, ended):
    return [1.0] * (len(responses) - 1)

def nothing(prompts, responses, ended):
    return None

def nan(prompts, responses, ended):
    return [float("nan")] + [1.0] * (len(responses) - 1)

def words(prompts, responses, ended):
    return responses

def leaves(prompts, responses, ended):
    raise SystemExit(0)

def infinite(prompts, responses, ended):
    return [float("inf")] * len(responses)

def takes_two(prompts, responses):
    return [1.0] * len(responses)

number = 3
"""


@pytest.mark.parametrize("role", ["--judge", "--reward"])
@pytest.mark.parametrize("function, says", [("raises", "no lexicon"), ("short", "one finite number per response"),
                                            ("nothing", "one finite number per response"), ("infinite", "finite"),
                                            ("nan", "finite"), ("words", "one finite number"), ("leaves", "SystemExit"),
                                            ("takes_two", "takes_two"), ("number", "has no function 'number'"),
                                            ("gone", "has no function 'gone'"), ("raises", "mine.py, line")])
def test_a_judge_or_reward_that_fails_is_named(base, tmp_path, capfd, role, function, says):
    """A bar may stand on stderr by then, so the error is its last line; the folder's name is free again."""
    file = tmp_path / "mine.py"
    file.write_text(JUDGES)
    assert fedppo.main([*base, role, f"{file}:{function}"]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert errors[-1].startswith("error: ") and f"{file}:{function}" in errors[-1] and says in errors[-1]
    assert sum("error" in line for line in errors) == 1 and not any("Traceback" in line for line in errors)
    assert "data.py" not in errors[-1], "no line but of the user's own file"
    assert not list((tmp_path / "runs").rglob("*"))


@pytest.mark.parametrize("role", ["--judge", "--reward"])
def test_a_judge_or_reward_that_is_not_there_is_named(refused, tmp_path, role):
    (tmp_path / "empty").mkdir()
    for spec in (f"{tmp_path}/gone.py:score", tmp_path / "gone", tmp_path / "empty"):
        assert str(spec).split(":")[0] in refused(role, spec)


# ------------------------------------------------------------------------------------------------ folders, resume


def test_an_unwritable_out_is_refused(refused, tmp_path):
    """A file is in the way (a mode of 0 would not stop root)."""
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/no/such"):  # the last is read-only for all
        line = refused("--out", out)
        assert str(out) in line and "--out" in line
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "taken").write_text("mine")
    assert str(tmp_path / "runs" / "taken") in refused("--name", "taken", left=["taken"])
    assert (tmp_path / "runs" / "taken").read_text() == "mine"


def test_a_folder_that_is_not_empty_is_left_as_it_is(refused, tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "thesis.txt").write_text("mine")
    line = refused(left=["run", "thesis.txt"])
    assert str(tmp_path / "runs" / "run") in line and "--name" in line and "--resume" in line


def test_a_folder_that_is_refused_is_refused_before_any_work(refused, tmp_path, monkeypatch):
    """A minute of loading and fitting before that line would be wasted."""
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(data, "fit_reward_model", lambda *args, **kwargs: pytest.fail("trained"))
    refused("--out", tmp_path / "file")


def test_resume_of_what_is_no_run_is_refused(tmp_path, capfd):
    broken = {"gone": None, "empty": {}, "text": {"config.json": "hello"}, "list": {"config.json": "[]"},
              "number": {"config.json": '{"settings": 3}'}, "other": {"config.json": '{"settings": {"model_type": 1}}'}}
    for name, files in broken.items():
        folder = tmp_path / name
        if files is not None:
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_text(content)
        assert fedppo.main(["--resume", str(folder)]) == 2
        errors = capfd.readouterr().err.splitlines()
        assert len(errors) == 1 and errors[0].startswith("error: ") and str(folder) in errors[0]
        assert not folder.exists() if files is None else sorted(p.name for p in folder.iterdir()) == sorted(files)


@pytest.fixture
def stopped(base, tmp_path, monkeypatch, capfd):
    """The folder of a run that was interrupted in its second round."""
    update, calls = fedppo.Agent.update, []
    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(*args)
    monkeypatch.setattr(fedppo.Agent, "update", interrupted)
    assert fedppo.main([*base, "--rounds", "2"]) == 130
    monkeypatch.setattr(fedppo.Agent, "update", update)
    output = capfd.readouterr()
    assert f"--resume {tmp_path / 'runs' / 'run'}" in output.out + output.err  # how to go on is said
    return tmp_path / "runs" / "run"


def test_resume_refuses_a_flag_that_conflicts_and_takes_one_that_does_not(stopped, capfd):
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    for flags, says in ((["--agents", "3"], ["--agents 3", "2"]), (["--lr", "0.5"], ["--lr 0.5", "0.0005"]),
                        (["--mode", "isolated"], ["--mode isolated", "federated"]), (["--name", "x"], ["--name x"])):
        assert fedppo.main(["--resume", str(stopped), *flags]) == 2
        errors = capfd.readouterr().err.splitlines()
        assert len(errors) == 1 and errors[0].startswith("error: ") and all(word in errors[0] for word in says)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before
    assert fedppo.main(["--resume", str(stopped), "--agents", "2", "--mode", "federated", "--device", "cpu"]) == 0


@pytest.mark.parametrize("flags", [["--device", "auto"], ["--preset", "auto"], ["--estimator", "auto"],
                                   ["--micro-batch", "0"]], ids=" ".join)
def test_resume_takes_auto_for_what_it_became(stopped, flags):
    """The command that started a run, with --resume behind it, resumes it."""
    fedppo.parse(["--resume", str(stopped), *flags])


def test_resume_of_a_finished_run_leaves_it_as_it_is(base, tmp_path, capfd):
    assert fedppo.main(base) == 0
    folder = tmp_path / "runs" / "run"
    before = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert fedppo.main(["--resume", str(folder)]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and f"--resume {folder}: this run is finished" in errors[0]
    assert {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# --------------------------------------------------------------------------------------------- settings and help


def test_help_shows_every_flag_and_both_presets(capsys):
    """Compared without any space: argparse breaks lines where it likes, at hyphens too."""
    with pytest.raises(SystemExit) as stop:
        fedppo.main(["--help"])
    printed = capsys.readouterr()
    text = "".join(printed.out.split())
    assert stop.value.code == 0 and printed.err == "" and str(HOME) not in text
    for field in FIELDS:
        tiny, pythia = ("".join(fedppo._show(value).split()) for value in BOTH[field.name])
        shown = f"[{tiny}]" if tiny == pythia else f"[tiny:{tiny};pythia-70m:{pythia}]"
        described = "".join(field.metadata["help"].split())
        assert described + shown in text[text.index(flag(field.name)):], field.name


@pytest.mark.parametrize("name", [field.name for field in FIELDS])
def test_every_setting_is_read_somewhere(name):
    """No dead flags: `.name` of a settings object stands outside the dataclass and the check of its range."""
    source = "".join((HOME / file).read_text() for file in ("fedppo.py", "ppo_core.py"))
    source = re.sub(r"class Settings:.*?\n\n\n", "", source, flags=re.S)
    assert re.search(rf"\b(s|settings)\.{name}\b", source)


OTHER = {  # a value that is neither preset's, where twice the preset's would not do
    "mode": ("isolated", "centralized"), "seeds": (3, 4), "preset": "tiny", "out": "elsewhere", "name": "mine",
    "device": "cpu", "dtype": "bfloat16", "model": "tiny/data", "dataset": "tiny/data/book.jsonl", "splits": ("a", "b"),
    "shards": "iid", "judge": "none", "reward": "shared", "reward_pooling": "last", "rule": "weights",
    "topology": "ring", "lr_schedule": "linear", "penalty": "reward", "estimator": "k2", "anchor": 0.5,
    "participation": 0.5, "outlier": 3.0, "beta": (0.7,), "gamma": 0.5, "lam": 0.5,
    "self_weight": 0.5, "minibatches": 8, "missing_eos_penalty": 0.25, "threads": 3, "workers": 1, "micro_batch": 16}


def decided(name, value):
    """What becomes of a preset's value that leaves the choice to the program, here."""
    gpu = torch.cuda.is_available()
    return (64 if gpu else 4) if (name, value) == ("micro_batch", 0) else value


@pytest.mark.parametrize("preset", ["tiny", "pythia-70m"])
@pytest.mark.parametrize("field", [field for field in FIELDS if field.name not in ("preset", "resume")],
                         ids=lambda field: field.name)
def test_every_setting_is_a_flag_and_wins_over_the_preset(field, preset):
    """All other settings keep the preset's value."""
    value = BOTH[field.name][preset == "pythia-70m"]
    other = not value if field.type is bool else OTHER[field.name] if field.name in OTHER else value * 2
    settings, reason = fedppo.parse(["--preset", preset, *given(field.name, other)])
    expected = {name: decided(name, values[preset == "pythia-70m"]) for name, values in BOTH.items()}
    expected |= {"preset": preset, "estimator": "exact", "device": "cuda" if torch.cuda.is_available() else "cpu"}
    if field.name == "penalty":
        expected["estimator"] = "k1"
    assert dataclasses.asdict(settings) == expected | {field.name: other} and reason == "asked for"


@pytest.mark.parametrize("preset, source", [("tiny", 1), ("pythia-70m", 0)])
def test_one_preset_can_be_turned_into_the_other_flag_by_flag(preset, source):
    flags = [word for name in DIFFERING for word in given(name, BOTH[name][source]) if BOTH[name][source] != ()]
    settings, _ = fedppo.parse(["--preset", preset, *flags])
    assert {name: getattr(settings, name) for name in DIFFERING} == {
        name: decided(name, BOTH[name][source]) for name in DIFFERING}


# --------------------------------------------------------------------------------------------- presets and network


def preset_of(*flags):
    settings, reason = fedppo.parse(["--device", "cpu", *flags])
    return settings, reason


@pytest.fixture
def machine(monkeypatch):
    """machine(gpu, cached, hub): what this machine is told to have."""
    def make(gpu, cached=False, hub=False):
        import huggingface_hub
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache",
                            lambda repo, file, **kwargs: f"/cache/{file}" if cached else None)
        monkeypatch.setattr(data, "online", lambda *args: hub)
    return make


@pytest.mark.parametrize("gpu, cached, hub, preset, reason", [
    (False, True, True, "tiny", "no GPU"),
    (True, True, False, "pythia-70m", "cached"),
    (True, False, True, "pythia-70m", "hub answers"),
    (True, False, False, "tiny", "not cached")])
def test_auto_is_pythia_with_a_gpu_and_a_model(machine, gpu, cached, hub, preset, reason):
    machine(gpu, cached, hub)
    chosen, why = fedppo.choose_preset({})
    assert chosen == preset and reason in why
    settings, _ = preset_of("--preset", chosen)
    assert settings.model == BOTH["model"][preset == "pythia-70m"] and settings.lr == BOTH["lr"][preset == "pythia-70m"]


def test_the_processor_asked_for_on_a_machine_with_a_gpu_gets_the_tiny_world(machine):
    machine(gpu=True, cached=True, hub=True)
    assert preset_of()[0].preset == "tiny"


def test_without_a_gpu_nobody_is_asked(machine, monkeypatch):
    machine(gpu=False)
    monkeypatch.setattr(data, "online", lambda *args: pytest.fail("asked"))
    assert preset_of()[0].preset == "tiny"


@pytest.mark.parametrize("named", ["--model", "--dataset"])
def test_what_is_named_is_never_replaced_and_brings_the_settings_for_real_text(machine, named):
    machine(gpu=False)
    settings, reason = preset_of(named, "mine/own")
    assert getattr(settings, named[2:]) == "mine/own" and named in reason
    assert settings.preset == "pythia-70m" and settings.lr == BOTH["lr"][1] and settings.judge == "heldout"
    assert preset_of(named, "mine/own", "--preset", "tiny")[0].preset == "tiny"


def test_the_embedded_model_named_explicitly_keeps_its_settings(machine):
    machine(gpu=False)
    settings, _ = preset_of("--model", str(HOME / "tiny/model"), "--dataset", str(HOME / "tiny/data"))
    assert settings.preset == "tiny" and settings.lr == BOTH["lr"][0]


def test_the_preset_and_its_reason_are_printed_and_kept(base, tmp_path, capfd):
    assert fedppo.main(base) == 0
    printed = capfd.readouterr().out.splitlines()
    assert sum(line.startswith("preset tiny: asked for") for line in printed) == 1
    config = json.loads((tmp_path / "runs" / "run" / "config.json").read_text())
    assert config["preset"] == {"choice": "tiny", "reason": "asked for"}
    assert set(config["settings"]) == {field.name for field in FIELDS}


def test_a_dead_network_is_told_soon_and_in_one_line(tmp_path):
    """A new process, an empty cache and a closed port where the hub would be: no minutes of retries, no other model."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(HOME / "fedppo.py"), "--model", "EleutherAI/pythia-70m-deduped",
                           "--out", str(tmp_path / "runs")], env=environment, cwd=tmp_path, capture_output=True,
                          text=True, timeout=90, check=False)
    seconds = time.perf_counter() - started
    errors = done.stderr.splitlines()
    assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: ")
    assert "hf download EleutherAI/pythia-70m-deduped --local-dir DIR" in errors[0] and "--model DIR" in errors[0]
    assert not (tmp_path / "runs").exists() and seconds < 30


# ------------------------------------------------------------------------------------ rules, judges and what is said


def test_a_reward_that_is_a_rule_needs_prompts_alone(base, tmp_path):
    worlds.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"The room {i} was"} for i in range(9)])
    (tmp_path / "rule.py").write_text("def words(prompts, responses, ended):\n    return [len(r) for r in responses]\n")
    assert fedppo.main([*base, "--dataset", str(tmp_path / "prompts.jsonl"), "--reward",
                        str(tmp_path / "rule.py") + ":words"]) == 0
    row = json.loads((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["reward_accuracy"] is None


def test_prompts_alone_are_too_little_for_a_fitted_judge(refused, tmp_path):
    worlds.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"The room {i} was"} for i in range(9)])
    (tmp_path / "rule.py").write_text("def words(prompts, responses, ended):\n    return [len(r) for r in responses]\n")
    line = refused("--dataset", tmp_path / "prompts.jsonl", "--reward", f"{tmp_path}/rule.py:words", "--judge",
                   "heldout")
    assert "no column 'chosen'" in line and "--judge that is one too, or none" in line


def test_text_that_the_vocabulary_does_not_know_is_warned_of(tmp_path, capfd):
    """The tiny model's vocabulary is the words of its world."""
    flags = ["--out", str(tmp_path), "--agents", "2", "--pairs", "10", "--eval-prompts", "2", "--reward-epochs", "1",
             "--model", "tiny/model", "--check"]
    assert fedppo.main(flags) == 0
    said = capfd.readouterr().out
    assert "ok    share of prompt tokens that the vocabulary does not know: 0 " in said
    assert "no fatal check failed" in said
    foreign = worlds.write_jsonl(tmp_path / "rows.jsonl", worlds.text_rows(60))
    assert fedppo.main([*flags, "--dataset", str(foreign)]) == 0
    assert "WARN  share of prompt tokens that the vocabulary does not know" in capfd.readouterr().out


def test_the_accuracy_of_every_fitted_model_is_checked_and_kept(base, tmp_path, capfd):
    assert fedppo.main([*base, "--judge", "heldout"]) == 0
    said = capfd.readouterr().out
    for name in ("agent 0's reward model", "agent 1's reward model", "the judge"):
        assert f"{name}, accuracy on" in said
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all((row["reward_accuracy"] is not None) == (row["update"] == 0) for row in rows)


def test_a_shared_reward_model_is_measured_on_what_it_is_said_to_be(base, capfd):
    """Held-out pairs of both agents: 38 rows are left by 2 evaluation prompts, 19 each, a fifth of them held out."""
    assert fedppo.main([*base, "--reward", "shared", "--check"]) == 0
    said = capfd.readouterr().out
    assert said.count("accuracy on 6 held-out pairs") == 2 and "not private: --reward shared" in said


def test_both_places_need_the_undiscounted_sum(refused):
    assert "--gamma 1" in refused("--penalty", "both", "--gamma", "0.9")


def test_merge_needs_an_exchange_to_merge_at(refused):
    assert "--mode federated" in refused("--merge", "--mode", "isolated", "fedavg")


def test_the_users_own_tiny_folder_is_not_the_embedded_one(tmp_path, monkeypatch):
    (tmp_path / "tiny" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings, _ = fedppo.parse(["--preset", "tiny", "--model", "tiny/model"])
    assert Path(fedppo.at_home(settings.model)).resolve() == tmp_path / "tiny" / "model"
    assert fedppo.at_home(settings.dataset) == str(HOME / "tiny/data")


def test_a_stop_while_the_files_are_made_can_be_resumed(base, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as broken:
        broken.setattr(fedppo.plot, "draw", stop)
        with contextlib.suppress(KeyboardInterrupt):
            fedppo.main(base)
    folder = tmp_path / "runs" / "run"
    assert not (folder / "summary.json").exists()
    assert fedppo.main(["--resume", str(folder)]) == 0 and (folder / "summary.json").exists()
    assert fedppo.main(["--resume", str(folder)]) == 2


@pytest.mark.parametrize("changes", [{"beta": 0.2}, {"lr": "x"}, {"device": 7}])
def test_a_config_of_another_version_is_refused(base, tmp_path, capfd, changes):
    assert fedppo.main(base) == 0
    folder = tmp_path / "runs" / "run"
    (folder / "summary.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["settings"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    assert fedppo.main(["--resume", str(folder)]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: ")


def test_the_tiny_worlds_judge_does_not_judge_other_text(tmp_path):
    settings, reason = fedppo.parse(["--preset", "tiny", "--dataset", str(tmp_path)])
    assert settings.judge == "heldout" and "judge" in reason
    assert fedppo.parse(["--preset", "tiny", "--dataset", str(tmp_path), "--judge", "none"])[0].judge == "none"
    assert fedppo.parse(["--preset", "tiny", "--dataset", "tiny/data"])[0].judge == "tiny/judge.py:score"


def test_the_model_decides_the_preset_if_it_is_named(tmp_path):
    assert fedppo.parse(["--model", "tiny/model", "--dataset", str(tmp_path)])[0].preset == "tiny"
    assert fedppo.parse(["--model", str(tmp_path), "--dataset", "tiny/data"])[0].preset == "pythia-70m"

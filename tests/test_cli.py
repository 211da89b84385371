"""A user's mistake is one line on stderr and exit code 2, before work is lost."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import worlds

import data
import fedppo
from support import load, rows, run


@pytest.fixture
def base(short, tmp_path, no_picture):
    """Flags of a short run in runs/run, without a picture; later ones win."""
    return [*short, "--out", str(tmp_path / "runs")]


@pytest.fixture
def refused(base, tmp_path, capfd, monkeypatch):
    """refused(*flags) -> the one line on stderr of a run that must not start."""
    monkeypatch.setattr(data, "fit_reward_model", lambda *args, **kw: pytest.fail("work is lost"))

    def run(*flags, left=()):
        capfd.readouterr()
        assert fedppo.main([*base, *map(str, flags)]) == 2
        errors = capfd.readouterr().err.splitlines()
        assert len(errors) == 1 and errors[0].startswith("error: ")
        assert sorted(path.name for path in (tmp_path / "runs").rglob("*")) == sorted(left)
        return errors[0]
    return run


def said(line, words):
    assert all(word in line for word in words), line


# ------------------------------------------------------------------------------------ wrong values

WRONG = {  # flags: what the error says
    "--agents four": ["--agents", "'four'"], "--agents 0": ["--agents", "positive", "0"],
    "--agents -2": ["--agents", "-2"], "--agents 2.5": ["--agents", "'2.5'"],
    "--agents 1001": ["--agents 1001", "1000"], "--agents": ["--agents", "expected one argument"],
    "--rounds 0": ["--rounds", "positive"], "--updates -1": ["--updates", "-1"],
    "--pairs 0": ["--pairs", "positive"], "--batch 0": ["--batch", "positive"],
    "--response-length 0": ["--response-length", "positive"], "--lr 0": ["--lr", "positive"],
    "--lr nan": ["--lr", "nan"], "--lr inf": ["--lr", "inf"], "--lr fast": ["--lr", "'fast'"],
    "--temperature 0": ["--temperature", "positive"], "--clip -0.2": ["--clip", "-0.2"],
    "--beta -1": ["--beta", "negative", "-1"], "--beta nan": ["--beta", "nan"],
    "--beta 0.1 0.2": ["0.2"], "--anchor 2": ["--anchor", "between 0 and 1", "2"],
    "--anchor 1": ["--anchor 1", "federated", "--mode classic"],
    "--participation nan": ["--participation", "nan"],
    "--self-weight -0.5": ["--self-weight", "-0.5"], "--threads -1": ["--threads", "-1"],
    "--outlier 0.5": ["--outlier 0.5", "median"], "--outlier -1": ["--outlier", "negative"],
    "--outlier 2 --mode isolated fedavg": ["--outlier", "isolated fedavg"],
    "--mode federate": ["--mode", "'federate'", "federated"], "--mode": ["--mode", "at least one"],
    "--rule mean": ["--rule", "'mean'", "geometric"], "--dtype float16": ["--dtype", "bfloat16"],
    "--preset large": ["--preset", "'large'", "pythia-70m"], "--seeds a": ["--seeds", "'a'"],
    "--shards topic": ["--shards", "'topic'", "split"], "--seeds 1 2 1": ["--seeds", "twice"],
    "--mode isolated isolated": ["--mode", "twice"], "--splits good good": ["--splits", "twice"],
    "--batch 10 --minibatches 4": ["--batch 10", "--minibatches 4"],
    "--batch 4 --minibatches 8": ["--batch 4", "--minibatches 8"],
    "--device tpu9": ["--device tpu9"], "--device meta": ["--device meta"],
    "--name a/b": ["--name", "'a/b'"], "--name ..": ["--name", "'..'"],
    "--no-such-flag 3": ["--no-such-flag"], "stray": ["stray"],
    "--agent 3": ["--agent"],  # a flag added later must not change what an abbreviation means
    "--participation 0.5 --mode isolated classic": ["--participation 0.5", "isolated classic"],
    "--topology ring --mode fedavg isolated": ["--topology ring has no part", "fedavg isolated"],
    "--anchor 0.3 --mode classic": ["--anchor 0.3 has no part in --mode classic"],
    "--rule sum --mode fedavg classic": ["--rule sum has no part"],
    "--self-weight 0.3 --mode fedavg": ["--self-weight 0.3 has no part in --mode fedavg"],
    "--self-weight 0.3 --topology uniform": ["--self-weight 0.3", "with --topology uniform"],
    "--mode isolated --anchor 0 --rule arithmetic": ["--rule arithmetic has no part"],
    "--mode fedavg --topology self": ["--topology self has no part in --mode fedavg"],
    "--agents 1 --participation 0.5": ["--participation 0.5", "with --agents 1"],
    "--split-column tone": ["no value in --split-column tone", "prompt, chosen, rejected"],
    "--topology rings": ["rings", "ring"]}  # the kinds there are
# Estimator and place of the penalty are one setting: what would be wrong cannot be said.
WRONG["--penalty k1-in-loss"] = ["--penalty", "'k1-in-loss'", "exact-in-loss"]


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_value_is_named_with_its_flag(refused, flags):
    said(refused(*flags.split()), WRONG[flags])


WRONG_MATRICES = {
    "[[1, 0, 0], [0, 1, 0], [0, 0, 1]]": "3 x 3, and 2 agents need 2 x 2", "[[1, 0]]": "1 x 2",
    "[1, 0]": "2 x 2", "[]": "2 x 2", "5": "2 x 2", "[[1, -0.5], [0, 1]]": "negative",
    "[[1, NaN], [0, 1]]": "finite", "[[1, Infinity], [0, 1]]": "finite",
    "[[1, 1], [0, 0]]": "row 1 is all zeros", "[[1, 1], [1]]": "JSON matrix",
    '[[1, "a"], [0, 1]]': "JSON matrix", '{"rows": [[1, 0], [0, 1]]}': "JSON matrix",
    "null": "JSON matrix", "[[1, 0], [0, 1]": "JSON matrix", "": "JSON matrix",
    "caf\xe9": "JSON matrix"}


def test_a_wrong_matrix_is_refused(refused, tmp_path):
    path = tmp_path / "matrix.json"
    for matrix, says in WRONG_MATRICES.items():
        path.write_text(matrix, encoding="latin-1")
        said(refused("--topology", path), ["--topology", str(path), says])
    for topology in (tmp_path / "gone.json", tmp_path):
        said(refused("--topology", topology), [str(topology), "ring"])
    said(refused("--topology", tmp_path / "gone.json", "--mode", "isolated", "merged"), ["gone"])


# --------------------------------------------------------------------------------- data and models


def changed(**cells):
    """The 40 good rows, row 7 with other cells."""
    return [row | cells if number == 7 else row for number, row in enumerate(worlds.text_rows(40))]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD = lines(changed())
CELLS = "must be a string or a list of chat messages"
BAD_ROWS = {  # what a jsonl file holds: what the error says
    "empty prompt": (lines(changed(prompt="")), "line 8: the prompt is empty"),
    "blank prompt": (lines(changed(prompt=" \n\t ")), "line 8: the prompt is empty"),
    "empty responses": (lines([row | {"chosen": "", "rejected": " "} for row in changed()]),
                        "all of its 40 rows"),
    "equal responses": (lines(worlds.text_rows(40, equal=40)), "all of its 40 rows"),
    "one prompt": (lines([row | {"prompt": "The song was"} for row in changed()]),
                   "1 distinct prompts"),
    "no rejected": (lines([{"prompt": "a", "chosen": "b", "other": "c"}]), "column 'rejected'"),
    "a long prompt": (lines(changed(prompt="x" * 100_000)), "context of 64"),
    "half a surrogate pair": (lines(changed(chosen="a \ud800")), "line 8: is not valid Unicode"),
    "null": (lines(changed(chosen=None)), CELLS), "a number": (lines(changed(rejected=3)), CELLS),
    "a list of strings": (lines(changed(chosen=["a"])), CELLS),
    "no content": (lines(changed(chosen=[{"role": "assistant"}])), CELLS),
    "no assistant": (lines(changed(chosen=[{"role": "user", "content": "a"}])), CELLS),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not UTF-8"), "zip": (b"PK\x03\xff", "not UTF-8"),
    "latin-1": (b'{"prompt": "caf\xe9"}\n', "not UTF-8"), "nothing": (b"", "is empty"),
    "blank lines": (b"\n \n\n", "is empty"),
    "numbers": (b"1\n2\n3\n", "line 1: is not a JSON object (and 2 more such rows)"),
    "a cut line": (GOOD[:-9], "line 40 is not JSON")}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(refused, tmp_path, name):
    content, says = BAD_ROWS[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    line = refused("--dataset", tmp_path / "rows.jsonl")
    assert says in line and len(line) < 400, line


def test_odd_rows_are_taken(base, tmp_path):
    """Emoji, a zero byte, other scripts, an empty response and a very long one are text too."""
    table = worlds.text_rows(40)
    odd = ({"prompt": "The 🎉 was", "chosen": "👍🏽 and 🎉."}, {"chosen": "a\0b"},
           {"prompt": "汤很", "rejected": "שלום"}, {"rejected": ""}, {"chosen": "x" * 100_000})
    table[3:8] = [row | cells for row, cells in zip(table[3:8], odd, strict=True)]
    dataset = str(worlds.write_jsonl(tmp_path / "rows.jsonl", table))
    assert fedppo.main([*base, "--dataset", dataset, "--pairs", "14"]) == 0, "every row is used"


def test_what_is_no_dataset_or_split_is_refused(refused, tmp_path):
    said(refused("--splits", "bad"), ["good.jsonl' has no split 'bad': it has good"])
    worlds.write_jsonl(tmp_path / "set" / "full.jsonl", worlds.text_rows(10))
    worlds.write_jsonl(tmp_path / "set" / "void.jsonl", [])
    said(refused("--dataset", tmp_path / "set"), ["'void'"])
    how = "hf download --repo-type dataset nobody/nothing"
    said(refused("--dataset", "nobody/nothing"), ["'nobody/nothing'", how])
    for name in (tmp_path / "gone", "gone.jsonl", "./nobody/nothing"):
        said(refused("--dataset", name), [f"--dataset {name}: there is no such file"])
    (tmp_path / "text.txt").write_text("hello")
    said(refused("--dataset", tmp_path / "text.txt"), ["text.txt"])
    (tmp_path / "empty").mkdir()
    said(refused("--dataset", tmp_path / "empty"), [str(tmp_path / "empty"), "holds no"])
    (tmp_path / "empty" / "dataset_info.json").write_text("{}")
    said(refused("--dataset", tmp_path / "empty"), [str(tmp_path / "empty"), "cannot be read"])


def test_too_few_prompts_or_pairs_say_what_to_lower(refused):
    said(refused("--agents", 39), ["40 distinct prompts", "39 agents", "--agents"])
    said(refused("--eval-prompts", 40), ["40 distinct prompts", "--eval-prompts"])
    said(refused("--pairs", 30), ["--pairs", "30", "lower --pairs to 16"])  # 19 each, 3 held out
    said(refused("--pairs", 30, "--eval-prompts", 3),  # 37 rows: of 19 and 18
         ["agent 1 has 18", "lower --pairs to 15, lower --eval-prompts"])
    said(refused("--response-length", 62), ["--response-length 62", "context of 64"])


def test_what_fits_is_told_right(base):
    """The number that the message names is taken."""
    assert fedppo.main([*base, "--pairs", "16", "--check"]) == 0


def test_a_seed_without_enough_data_is_refused_before_the_first_one_is_trained(refused, tmp_path):
    """Which prompts are held out depends on the seed: some leave agent 1 fewer rows than needed."""
    for split, n in (("a", 30), ("b", 8)):
        table = [row | {"prompt": f"{row['prompt']} {split}"} for row in worlds.text_rows(n)]
        worlds.write_jsonl(tmp_path / "set" / f"{split}.jsonl", table)
    pairs = rows.load_pairs(str(tmp_path / "set")).pairs

    def enough(seed):
        with contextlib.suppress(data.UserError):
            return bool(data.make_shards(pairs, 2, "split", 6, 4, random.Random(f"{seed} shards")))
        return False
    seeds = [next(s for s in range(99) if enough(s) == wanted) for wanted in (True, False)]
    line = refused("--dataset", tmp_path / "set", "--shards", "split", "--pairs", 6,
                   "--eval-prompts", 4, "--seeds", *seeds)
    assert "--pairs" in line


def cut(file, bytes=1000):
    file.write_bytes(file.read_bytes()[:bytes])


NONE = "no causal language model"
BAD_MODELS = {  # what is done to a good folder: what the error says
    "config is no JSON": (lambda x: (x / "config.json").write_text("hi"), "not a valid JSON file"),
    "config is a list": (lambda x: (x / "config.json").write_text("[]"), NONE),
    "unknown type": (lambda x: (x / "config.json").write_text('{"model_type": "odd"}'), "odd"),
    "weights gone": (lambda x: (x / "model.safetensors").unlink(), "no file named model.safeten"),
    "weights cut": (lambda x: cut(x / "model.safetensors"), NONE),
    "tokenizer gone": (lambda x: [file.unlink() for file in x.glob("tokenizer*")], "error: "),
    "tokenizer is empty": (lambda x: (x / "tokenizer.json").write_text("{}"), NONE),
    "no EOS": (lambda x: worlds.save_tokenizer(x, eos=False), "no EOS token"),
    "a LoRA adapter": (lambda x: (x / "config.json").rename(x / "adapter_config.json"),
                       "LoRA adapter"),
    "too few rows": (lambda x: worlds.save_model(x, vocab_size=100), "ids go to 319, the embed"),
    "everything gone": (lambda x: [file.unlink() for file in x.iterdir()], NONE),
    "folder gone": (shutil.rmtree, "there is no such file or folder")}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_named(refused, small_model, tmp_path, name):
    damage, says = BAD_MODELS[name]
    shutil.copytree(small_model, tmp_path / "model")
    damage(tmp_path / "model")
    said(refused("--model", tmp_path / "model"), [says])


@pytest.mark.slow
def test_a_dead_network_is_told_soon_and_in_one_line(tmp_path):
    """A new process, an empty cache, a closed port where the hub would be: no minutes of retries,
    and no other model."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"),
                    "NO_PROXY": "127.0.0.1"}
    model, out, started = "EleutherAI/pythia-70m-deduped", tmp_path / "runs", time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(load.HOME / "fedppo.py"), "--model", model, "--out", str(out)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    errors = done.stderr.splitlines()
    assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: ")
    said(errors[0], [f"hf download {model} --local-dir DIR", "--model DIR"])
    assert not out.exists() and time.perf_counter() - started < 30


# ------------------------------------------------------------------------------- judges and rewards

MINE = """
def raises(prompts, responses, ended): raise LookupError("no lexicon")
def leaves(prompts, responses, ended): raise SystemExit(0)
def short(prompts, responses, ended): return [1.0] * (len(responses) - 1)
def nothing(prompts, responses, ended): return None
def nan(prompts, responses, ended): return [float("nan")] + [1.0] * (len(responses) - 1)
def infinite(prompts, responses, ended): return [float("inf")] * len(responses)
def words(prompts, responses, ended): return responses
def takes_two(prompts, responses): return [1.0] * len(responses)
def length(prompts, responses, ended): return [len(response) for response in responses]
number = 3
"""
FAILING = {"raises": "no lexicon", "leaves": "SystemExit", "short": "one finite number per",
           "nothing": "one finite number", "nan": "finite", "infinite": "finite",
           "words": "one finite number", "takes_two": "takes_two",
           "number": "has no function 'number'", "gone": "has no function 'gone'"}


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py"


@pytest.mark.parametrize("role", ["--judge", "--reward"])
def test_a_judge_or_reward_that_fails_is_named(refused, tmp_path, mine, role):
    (tmp_path / "empty").mkdir()
    for function, says in FAILING.items():
        line = refused(role, f"{mine}:{function}")
        said(line, [f"{mine}:{function}", says])
        assert "data.py" not in line, "no line but of the user's own file"
    said(refused(role, f"{mine}:raises"), ["mine.py, line 2"])
    for spec in (f"{tmp_path}/gone.py:score", f"{tmp_path}/gone", f"{tmp_path}/empty"):
        said(refused(role, spec), [spec.split(":")[0]])


@pytest.mark.parametrize("role", ["--judge", "--reward"])
def test_one_that_fails_later_leaves_the_folders_name_free(base, tmp_path, mine, capfd, role):
    """On some response: a bar may stand on stderr by then, so the error is its last line."""
    (tmp_path / "late.py").write_text(
        "calls = []\ndef late(prompts, responses, ended):\n    calls.append(0)\n"
        "    return [1.0] * len(responses) if len(calls) < 2 else None\n")
    assert fedppo.main([*base, role, f"{tmp_path}/late.py:late"]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert errors[-1].startswith("error: ") and sum("error" in line for line in errors) == 1
    assert not list((tmp_path / "runs").rglob("*"))


def test_a_reward_that_is_a_rule_needs_prompts_alone(base, refused, tmp_path, mine, capfd):
    table = [{"prompt": f"The room {i} was"} for i in range(9)]
    flags = ["--dataset", str(worlds.write_jsonl(tmp_path / "prompts.jsonl", table)), "--reward",
             f"{mine}:length"]
    said(refused(*flags, "--judge", "heldout"),
         ["no column 'chosen'", "--judge that is one too, or none"])
    assert fedppo.main([*base, *flags]) == 0
    dealt = [line for line in capfd.readouterr().out.splitlines() if line.startswith("agent 0: ")]
    assert dealt and "reward model" not in dealt[0]  # there is none that rows could fit
    row = json.loads((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["reward_accuracy"] is None


# ------------------------------------------------------------------------------------------ folders


def test_an_unwritable_or_taken_folder_is_refused_before_any_work(refused, tmp_path):
    """A file is in the way (a mode of 0 would not stop root)."""
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/no/such"):  # read-only
        said(refused("--out", out), [str(out), "--out"])
    (tmp_path / "runs" / "full").mkdir(parents=True)
    for taken in (tmp_path / "file", tmp_path / "runs" / "taken",
                  tmp_path / "runs" / "full" / "thesis.txt"):
        taken.write_text("mine")
    left = ["taken", "full", "thesis.txt"]
    said(refused("--name", "taken", left=left), [str(tmp_path / "runs" / "taken")])
    said(refused("--name", "full", left=left),
         [str(tmp_path / "runs" / "full"), "--name", "--resume"])
    assert (tmp_path / "runs" / "taken").read_text() == (tmp_path / "file").read_text() == "mine"


def test_resume_of_what_is_no_run_is_refused(tmp_path, capfd):
    broken = {"gone": None, "empty": {}, "text": {"config.json": "hello"},
              "list": {"config.json": "[]"}, "number": {"config.json": '{"settings": 3}'},
              "other": {"config.json": '{"settings": {"model_type": 1}}'}}
    for name, files in broken.items():
        folder = tmp_path / name
        if files is not None:
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_text(content)
        assert fedppo.main(["--resume", str(folder)]) == 2
        errors = capfd.readouterr().err.splitlines()
        assert len(errors) == 1 and errors[0].startswith("error: ") and str(folder) in errors[0]
        left = sorted(p.name for p in folder.iterdir()) if folder.exists() else None
        assert left == (None if files is None else sorted(files))


# -------------------------------------------------------------------------- what a user should know


def test_a_fault_of_the_programs_exits_with_70_and_asks_for_a_report(base, monkeypatch, capfd):
    def fails(*args):
        raise RuntimeError("who knows")
    monkeypatch.setattr(fedppo, "train", fails)
    assert fedppo.main(base) == 70
    errors = capfd.readouterr().err
    assert "RuntimeError: who knows" in errors and "Traceback" in errors
    assert errors.splitlines()[-1].startswith("this is a fault of the program, not yours: please")


def test_one_round_of_an_exchange_and_a_constant_reward_are_warned_of(base, tmp_path, capfd):
    (tmp_path / "flat.py").write_text("def flat(prompts, responses, ended):\n"
                                      "    return [3.0] * len(responses)\n")
    flags = [*base, "--reward", f"{tmp_path}/flat.py:flat", "--check"]
    assert fedppo.main([*flags, "--rounds", "1", "--mode", "isolated", "merged"]) == 0
    printed = capfd.readouterr().out
    assert "warning: with --rounds 1 merged can learn nothing from peers" in printed
    assert printed.count("'s reward on samples of the initial policy: 0 (at least 1e-06)") == 2
    for more in (["--rounds", "1", "--mode", "isolated"], ["--rounds", "2"]):
        assert fedppo.main([*flags, *more]) == 0
        assert "with --rounds 1" not in capfd.readouterr().out


def test_a_rule_and_an_agent_without_prompts_is_one_line(base, refused, tmp_path, mine):
    """A split of two prompts, which the evaluation can take."""
    for name, n in (("a", 60), ("b", 2)):
        worlds.write_jsonl(tmp_path / "two" / f"{name}.jsonl",
                           [{"prompt": f"The {name} {i} was"} for i in range(n)])
    line = refused("--dataset", tmp_path / "two", "--shards", "split", "--reward",
                   f"{mine}:length", "--eval-prompts", 20, "--seeds", *range(12))
    said(line, ["agent 1 has no prompt", "lower --eval-prompts"])


def test_topics_in_a_column_are_splits(base, tmp_path, capfd):
    table = [row | {"topic": "ab"[i % 2]} for i, row in enumerate(worlds.text_rows(40))]
    path = worlds.write_jsonl(tmp_path / "topics.jsonl", table)
    flags = ["--dataset", str(path), "--split-column", "topic", "--shards", "split"]
    assert fedppo.main([*base, *flags]) == 0
    deals = json.loads((tmp_path / "runs/run/config.json").read_text())["deals"]["0"]
    assert [deal["splits"] for deal in deals] == [["a"], ["b"]]
    assert "agent 1: 19 rows of 19 prompts from b; 4 pairs fit" in capfd.readouterr().out
    assert fedppo.main([*base, *flags[:-1], "iid", "--check"]) == 0
    assert "--split-column topic changes nothing" in capfd.readouterr().out


def test_one_prompt_with_most_of_the_rows_leaves_something_to_fit(base, tmp_path):
    """It cannot be cut in two: all of it tests a model, or the judge's, and others must be left."""
    table = [row | {"prompt": "The room was"} if i < 30 else row
             for i, row in enumerate(worlds.text_rows(60))]
    path = worlds.write_jsonl(tmp_path / "most.jsonl", table)
    codes = {fedppo.main([*base, "--dataset", str(path), "--judge", "heldout", "--seeds",
                          str(seed), "--name", f"run{seed}"]) for seed in range(6)}
    assert 0 in codes <= {0, 2}


def test_a_run_is_not_resumed_on_other_data(base, tmp_path, monkeypatch, capfd):
    """Also where nothing was saved that would tell: config.json knows what was dealt."""
    path = worlds.write_jsonl(tmp_path / "rows.jsonl", worlds.text_rows(40))
    monkeypatch.setattr(fedppo.Agent, "update", lambda *args: (_ for _ in ()).throw(
        run.Stopped(15)))
    assert fedppo.main([*base, "--dataset", str(path)]) == 143
    worlds.write_jsonl(path, worlds.text_rows(34))
    assert fedppo.main(["--resume", str(tmp_path / "runs/run")]) == 2
    assert "no longer gives the agents what the run was" in capfd.readouterr().err


def test_agents_of_two_models_leave_cards_that_name_them(tmp_path, capfd):
    flags = ("--preset tiny --device cpu --model tiny/model tiny/model-96x3 --agents 2 --rounds 2 "
             "--updates 1 --batch 4 --pairs 8 --eval-prompts 4 --reward-epochs 1 --prompts common "
             "--response-length 5 --name run --mode isolated federated").split()
    assert fedppo.main([*flags, "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "--prompts common: all agents see all training prompts, without labels" in printed
    assert "tiny/model-96x3: more left padding" in printed
    for i, name in enumerate(("tiny/model", "tiny/model-96x3")):
        folder = tmp_path / f"run/agents/federated-seed0-agent{i}"
        assert f"from `{name}` on" in (folder / "README.md").read_text()
        width = json.loads((folder / "config.json").read_text())["hidden_size"]
        assert width == (64, 96)[i]
    assert fedppo.main([*flags, "merged", "--out", str(tmp_path), "--name", "two"]) == 2
    assert "--mode merged averages weights" in capfd.readouterr().err

"""benchmarks/real/: what is made of the archives, and the study on a small stand-in."""

import csv
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedppo
import support.run
from support import load
from support.settings import parse

REAL = Path(fedppo.__file__).parent / "benchmarks/real"


@pytest.fixture
def real(monkeypatch):
    """make.py and run.py, whose judge counts the letter e: VADER is not among the requirements."""
    counting = types.ModuleType("judge")
    counting.score = lambda prompts, responses, ended: [text.count("e") / 4 for text in responses]
    monkeypatch.setitem(sys.modules, "judge", counting)
    for name in ("make", "run"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(REAL))
    import make
    import run
    yield types.SimpleNamespace(make=make, run=run)
    for name in ("make", "run"):
        sys.modules.pop(name, None)


def test_prompts_are_beginnings_of_sentences_that_go_on(real):
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(["apple", "pear", "plum", "fig"], k=draw.randint(3, 20)))
                 for _ in range(300)]
    sentences += ["see http://t.co/abc for all that there is to say today folks of ours",
                  "@ann where is it now that all have gone away from here for good"]
    prompts = real.make.make_prompts(sentences, 50, "seed")
    assert len(set(prompts)) == len(prompts) == 50
    for prompt in prompts:
        assert 4 <= len(prompt.split()) <= 8 and "/" not in prompt and "@" not in prompt
        whole = [s for s in sentences if s.startswith(prompt + " ")]
        assert any(len(s.split()) >= len(prompt.split()) + 3 for s in whole)
    assert real.make.make_prompts(sentences, 50, "seed") == prompts
    assert real.make.make_prompts(sentences, 50, "other") != prompts


def test_labels_follow_the_judge_at_the_scale(real):
    """8 a point: where the scores are a quarter apart, 1 / (1 + exp(-2)) = 0.88 agree."""
    agreed = []
    for n in range(2000):
        row = real.make.label(f"prompt {n}", ("e", "aaaa"))
        assert {row["chosen"], row["rejected"]} == {"e", "aaaa"}
        assert row == real.make.label(f"prompt {n}", ("aaaa", "e")), "whichever was sampled first"
        agreed.append(row["chosen"] == "e")
    assert sum(agreed) / len(agreed) == pytest.approx(0.881, abs=0.03)
    assert real.make.label("p", ("ten", "hen")) is None, "the judge sees no difference"


def test_sentences_of_the_archive(real, tmp_path):
    """A tar.gz in a tar.gz, with lines of id, rating and text; &amp; is a sign again."""
    def packed(name: str, content: bytes) -> bytes:
        held = io.BytesIO()
        with tarfile.open(fileobj=held, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return held.getvalue()

    inner = packed("hutto_ICWSM_2014/tweets_GroundTruth.txt",
                   b"1\t2.5\tyou &amp; me\nbroken line\n2\t-1\tcaf\xc3\xa9 closed\n")
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    path.write_bytes(packed("vaderSentiment-3.3.2/more/hutto_ICWSM_2014.tar.gz", inner))
    assert real.make.sentences_of(path, "tweets") == ["you & me", "café closed"]


def test_pairs_go_on_where_they_were_stopped(real, tmp_path, monkeypatch):
    monkeypatch.setattr(real.make, "CHUNK", 4)
    home = load.HOME / "tiny/model"
    tokenizer = AutoTokenizer.from_pretrained(home)
    model = AutoModelForCausalLM.from_pretrained(home).eval()
    prompts = [f"the {what} was {how}" for what in ("soup", "film", "song") for how in "ab"]
    bar = types.SimpleNamespace(update=lambda n: None)
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "again" / "whole.jsonl"
    real.make.make_pairs(prompts, whole, model, tokenizer, bar)
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert 2 <= len(rows) <= 6 and all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
    stopped.parent.mkdir()
    real.make.make_pairs(prompts[:4], stopped, model, tokenizer, bar)
    with stopped.open("a") as file:
        file.write('{"prompt": "half a li')
    real.make.make_pairs(prompts[:2], stopped, model, tokenizer, bar)  # other ones: from the start
    assert {json.loads(line)["prompt"] for line in stopped.open()} <= set(prompts[:2])
    real.make.make_pairs(prompts, stopped, model, tokenizer, bar)
    assert stopped.read_text() == whole.read_text()


def test_words_are_counted_once_a_response_and_ranked_by_their_rise(real):
    before, after = ([{"response": text} for text in texts] for texts in (
        ["a b", "A, c", "b c", "a a"], ["Good a good", "good. b", "fine a", "a good"]))
    assert real.run.risen(before, after, 3) == "good 0 → 75, fine 0 → 25, a 75 → 75"
    assert real.run.count(after).tolist() == [2.0, 2.25, 0.0]
    assert real.run.count([{"response": "job job job"}, {"response": "no"}]).tolist() == [1, 2, 0.5]
    assert real.run.words({"response": "It’s 3, isn't it?"}) == ["it's", "3", "isn't", "it"]


@pytest.mark.parametrize("flags", [
    "", "--dtype bfloat16", "--mode isolated merged --lr 1e-3 --reward a.py:b"])
def test_the_page_names_the_flags_that_made_it(real, flags):
    def settings(more: list[str]):
        words = real.run.flags_of(real.run.SETTINGS)
        found = parse([*words, "--mode", *real.run.MODES, *more], fedppo.MODES).settings
        return json.loads(json.dumps(dataclasses.asdict(found)))

    made = settings(flags.split())
    named = real.run.other_flags(made | {"response_eos": True}, real.run.SEEDS)  # World decides it
    assert settings(named) == made and len(named) == len(flags.split())
    assert real.run.other_flags(made, ["3", "4"])[:3] == ["--seeds", "3", "4"]


@pytest.mark.slow
def test_the_study_on_a_stand_in(real, tmp_path, monkeypatch, capsys):
    shutil.copytree(load.HOME / "tiny/model", tmp_path / "model")
    shutil.copytree(load.HOME / "tiny/data", tmp_path / "pairs")
    judge = str(load.HOME / "tiny/judge.py") + ":score"
    monkeypatch.setattr(real.run, "JUDGE", judge)
    flags = ("--mode isolated federated --agents 2 --rounds 1 --updates 2 --batch 8 "
             "--pairs 20 --reward-epochs 1 --eval-prompts 16 --policy-layers 1 --device cpu "
             "--threads 1").split()
    here = ["--folder", str(tmp_path), "--results", str(tmp_path), "--seeds", "3", "4"]
    finish = support.run.Run.finish
    monkeypatch.setattr(support.run.Run, "finish", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):  # stopped, and gone on with
        real.run.main([*here, *flags])
    assert not (tmp_path / "runs/seed3/summary.json").exists()
    assert "fedppo.py --resume" in capsys.readouterr().out, "run.py cannot go on with it"
    monkeypatch.setattr(support.run.Run, "finish", finish)
    assert real.run.main([*here, *flags]) == 0
    with (tmp_path / "real.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["mode"], row["seed"]) for row in rows] == [
        (mode, seed) for mode in ("isolated", "federated") for seed in "34"]
    for row in rows:
        different, every = (float(row[f"{name}_after"]) for name in ("different", "words"))
        assert 1 < different <= every < 20 and len(row["curve"].split()) == 2
        assert 0 <= float(row["clipfrac"]) < 1
        assert float(row["curve"].split()[-1]) == pytest.approx(float(row["judge_final"]), rel=1e-2)
    page = (tmp_path / "real.md").read_text()
    assert page.count("| `federated` | ") == 3, "a row of scores, and one of words for each agent"
    assert "| agent | prompt | before | isolated | federated |" in page
    assert (tmp_path / "real.png").exists() and torch.is_grad_enabled()
    monkeypatch.setattr(fedppo, "main", lambda argv: pytest.fail("it is finished"))
    assert real.run.main(here) == 0
    assert real.run.main([*here[:-1]]) == 0, "of one seed alone"
    assert "4" not in {row["seed"] for row in csv.DictReader((tmp_path / "real.csv").open())}
    config = tmp_path / "runs/seed4/config.json"
    config.write_text(config.read_text().replace('"beta": 0.05', '"beta": 0.06'))
    with pytest.raises(SystemExit, match="seed4 and .*seed3 differ in beta"):
        real.run.main(here)

"""compare.py: the same prompts, answered by a run's agents and the model that they started from."""

import dataclasses
import io
import json
import re
import shutil
import sys

import pytest
import torch
import worlds
from transformers import AutoModelForCausalLM, AutoTokenizer

import compare
import data
import fedppo
from support import load

AGENTS = [f"{mode}-seed0-agent{index}" for mode in ("isolated", "federated") for index in (0, 1)]
FLAGS = ("--preset tiny --device cpu --mode isolated federated --agents 2 --rounds 1 --updates 1 "
         "--batch 8 --pairs 20 --eval-prompts 8 --reward-epochs 1 --lr 0.003 --response-length 12 "
         "--temperature 0.9 --name run")  # a rate at which one update can be seen in the answers


TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, no_picture):
    """A finished run of the tiny world. Do not write to it, but compare.md."""
    home = tmp_path_factory.mktemp("runs")
    assert fedppo.main([*FLAGS.split(), "--out", str(home)]) == 0
    return home / "run"


@pytest.fixture
def told(capfd, tmp_path):
    """told(*arguments) -> (the table's rows of cells in markdown, what was printed)."""
    def ask(*arguments):
        out = tmp_path / "table.md"
        capfd.readouterr()
        assert compare.main([*map(str, arguments), "--out", str(out)]) == 0
        return cells(out.read_text(encoding="utf-8")), capfd.readouterr().out
    return ask


def cells(page: str) -> list[list[str]]:
    """The rows of a markdown table: header, dashes, rows; escaped bars undone."""
    lines = [line for line in page.split("\n") if line.startswith("|")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in lines]


def sampled(path, texts, seed=0, length=12, temperature=0.9):
    """Answers by transformers' own model, whole texts at every step: no cache, no Policy.

    -> (answers as a cell shows them, without scores; what a scorer takes)
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    draws = torch.rand(length, len(texts), generator=data.generator(seed, "compare"))
    end, pad, rows = tokenizer.eos_token_id, tokenizer.pad_token_id, []
    for row, prompt in enumerate(prompts):
        response = []
        while len(response) < length and end not in response:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, -1].float()
            logits[[pad, *range(len(tokenizer), len(logits))]] = -torch.inf
            cdf = (logits / temperature).softmax(-1).cumsum(-1)
            response.append(int((cdf <= draws[len(response), row] * cdf[-1]).sum()))
        rows.append(response)
    answers = [tokenizer.decode(row, skip_special_tokens=True).strip() + " ⏹" * (end in row)
               for row in rows]
    return answers, (*data.pad(prompts, pad, "left"), *data.pad(rows, pad, "right"))


def test_a_row_per_prompt_and_a_column_per_agent_and_before(folder, told, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows, printed = told(folder)
    assert rows[0] == ["prompt", "before", *AGENTS] and set(rows[1]) == {"---"}
    page = cells((folder / "samples.md").read_text(encoding="utf-8"))
    assert [row[0] for row in rows[2:]] == [row[0] for row in page[2:]] and len(rows) == 2 + 4
    assert compare.in_terminal([rows[0], *rows[2:]], 80) in printed
    assert compare.main([str(folder)]) == 0 and (folder / "compare.md").exists()


def test_answers_and_scores_are_those_of_the_models_and_the_judge_called_directly(folder, told):
    texts = ["my soup stayed", "that bad voyage", "the song"]
    file = folder.parent / "prompts.txt"
    file.write_text("\n".join(["", *texts, ""]), encoding="utf-8")
    rows, _ = told(folder, "--prompts", file, "--seed", 3)
    assert [row[0] for row in rows[2:]] == texts
    columns = list(zip(*rows[2:], strict=True))[1:]
    paths = [load.home("tiny/model"), *(folder / "agents" / name for name in AGENTS)]
    for path, column in zip(paths, columns, strict=True):
        answers, batch = sampled(path, texts, seed=3)
        tokenizer = AutoTokenizer.from_pretrained(path)
        score = load.load_scorer(load.home("tiny/judge.py:score"), tokenizer, "cpu")(*batch)
        assert list(column) == [f"{text} **{one:.2f}**" for text, one in
                                zip(answers, score.tolist(), strict=True)]
    assert len(set(columns)) > 2  # training changed what they say


def test_an_agent_a_model_and_a_judge_of_ones_own(folder, told, tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("def letters(prompts, responses, ended): return [len(p) for p in prompts]")
    rows, _ = told(folder / "agents" / AGENTS[2], "tiny/model", "--prompts", "that bad voyage",
                   "--judge", f"{rule}:letters")
    assert rows[0] == ["prompt", "before", AGENTS[2], "model"] and rows[2][1] == rows[2][3]
    (answer,), _ = sampled(folder / "agents" / AGENTS[2], ["that bad voyage"])
    assert rows[2][2] == f"{answer} **15.00**"
    none, _ = told(folder, "--judge", "none")
    assert "**" not in "".join(map("".join, none))


def test_texts_of_two_runs_and_of_any_form_stand_in_one_table(folder, told, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    file = worlds.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a | b\nthe soup"}])
    rows, _ = told(folder, tmp_path / "other", "--prompts", file, "--judge", "none")
    assert rows[0][2:] == [str(home / "agents" / name) for home in (folder, tmp_path / "other")
                           for name in AGENTS]
    assert len(rows) == 3 and rows[2][0] == "a | b the soup" and rows[2][2:6] == rows[2][6:]


@pytest.mark.parametrize("width, tables", [(200, 1), (80, 2), (40, 4), (20, 4)])
def test_the_table_fits_the_terminal_and_loses_no_word(width, tables):
    table = [["prompt", *(f"agent{n}" for n in range(4))],
             ["what was", *(f"{n} " + "word " * 9 for n in range(4))]]
    text = compare.in_terminal(table, width)
    assert max(map(len, text.split("\n"))) <= width
    assert text.split().count("word") == 36 and text.split().count("prompt") == tables


def test_chat_answers_line_by_line_until_the_end_of_input(folder, monkeypatch, capfd):
    agent = folder / "agents" / AGENTS[3]
    too_long = "song " * 500
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"the song\n\n{too_long}\nmy soup stayed\n"))
    assert compare.main([str(agent), "--chat", "--judge", "none"]) == 0
    expected = [sampled(agent, [text])[0][0] for text in ("the song", "my soup stayed")]
    printed = capfd.readouterr()
    assert printed.out.splitlines()[-2:] == expected
    assert "a prompt a line" in printed.err and printed.err.count("error: ") == 1


def test_a_run_on_conversations_is_asked_in_turns(tmp_path, no_picture, capfd):
    model = worlds.save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    chats = [{"chosen": [{"role": "user", "content": row["prompt"]},
                         {"role": "assistant", "content": row["chosen"]}],
              "rejected": [{"role": "user", "content": row["prompt"]},
                           {"role": "assistant", "content": row["rejected"]}]}
             for row in worlds.text_rows(40)]
    file = worlds.write_jsonl(tmp_path / "rows.jsonl", chats)
    flags = ("--mode isolated --agents 1 --rounds 1 --updates 1 --batch 4 --pairs 8 --shards iid "
             "--eval-prompts 2 --judge none --reward-epochs 1 --response-length 4 --name run")
    assert fedppo.main(["--preset", "tiny", "--model", str(model), "--dataset", str(file),
                        "--out", str(tmp_path), *flags.split()]) == 0
    home, s = compare.run_of(str(tmp_path / "run"))
    table = compare.Table(s, 0)
    table.ask(["The room 3"])
    turn = [{"role": "user", "content": "The room 3"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert [table.world.prompt_ids[prompt] for prompt in table.prompts] == [ids]
    table.answer("before", table.world.initial)
    assert table.rows()[0][0] == "The room 3"


def test_a_mistake_is_one_line_and_exit_code_2(folder, tmp_path, capfd):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bare").mkdir()
    shutil.copytree(folder, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "agents")
    old = tmp_path / "old"
    old.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["gone"] = 1
    (old / "config.json").write_text(json.dumps(config))
    agent = folder / "agents" / AGENTS[0]
    other = worlds.save_model(tmp_path / "other")
    (tmp_path / "begun").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "begun")
    for argv, word in (
            ([tmp_path / "nowhere"], "neither a run's folder"), (["tiny/model"], "neither a run's"),
            ([folder, tmp_path / "bare"], "bare"), ([tmp_path / "stopped"], "has no agents yet"),
            ([folder, "--prompts", tmp_path / "empty.txt"], "holds no prompt"),
            ([folder, "--prompts", tmp_path / "gone.jsonl"], "gone.jsonl"),
            ([folder, "--judge", "nowhere.py:f"], "nowhere.py"),
            ([folder, "--prompts", "promts.txt"], "there is no such file"),
            ([folder, "--judge", "heldout"], "is not stored"),
            ([old], "there is no setting gone"), ([agent, other], "another vocabulary"),
            ([folder, tmp_path / "begun"], "begun has no agents yet"),
            ([folder, "--chat"], "--chat is with one agent, not 4"), ([], "FOLDER"),
            ([folder, "--out", tmp_path / "a/b.md"], "b.md")):
        capfd.readouterr()
        assert compare.main(list(map(str, argv))) == 2, argv
        errors = capfd.readouterr().err.splitlines()
        assert len(errors) == 1 and errors[0].startswith("error: ") and word in errors[0], errors


@pytest.mark.parametrize("judge", ["none", "heldout"])
def test_a_run_with_a_rule_as_reward(judge, tmp_path, no_picture, small_model, capfd):
    """It needs labels if a judge is fitted to them: then rows of equal responses are dropped."""
    table = worlds.text_rows(48)
    for row in table[::2]:
        row["rejected"] = row["chosen"]
    if judge == "none":
        table = [{"prompt": row["prompt"]} for row in table]
    file = worlds.write_jsonl(tmp_path / "rows.jsonl", table)
    flags = ("--mode isolated --agents 1 --rounds 1 --updates 1 --batch 4 --shards iid "
             "--eval-prompts 4 --response-length 4 --reward tiny/judge.py:score --reward-epochs 1 "
             f"--judge {judge} --name run")
    assert fedppo.main(["--preset", "tiny", "--model", str(small_model), "--dataset", str(file),
                        "--out", str(tmp_path), *flags.split()]) == 0
    assert compare.main([str(tmp_path / "run")]) == 0
    rows, page = (cells((tmp_path / "run" / name).read_text())[2:]
                  for name in ("compare.md", "samples.md"))
    assert [row[0] for row in rows] == [row[0] for row in page], "the run's held-out prompts"


def test_a_judge_that_a_folder_cannot_give_is_left_out(folder, tmp_path):
    _, s = compare.run_of(str(folder))
    assert compare.judge_of(s, None) == "tiny/judge.py:score"
    assert compare.judge_of(dataclasses.replace(s, judge="heldout"), None) == "none"
    mine = dataclasses.replace(s, judge="mine.py:score")  # code that nobody asked to run
    assert compare.judge_of(mine, None) == "none" and compare.judge_of(mine, "x.py:f") == "x.py:f"

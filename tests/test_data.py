"""data.py: every form of dataset, reward and judge, shards that share nothing, reward models that learn."""

import contextlib
import json
import math
import random
import socket
import threading
import time

import datasets
import pytest
import torch
import worlds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXModel,
)

import data
from data import Pair, UserError

TEXT, CHAT = worlds.text_rows(6), worlds.chat_rows(6)
EXPECTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in TEXT]


def texts(pairs):
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


# ------------------------------------------------------------------------------------------------- preference rows


def jsonl_file(folder, splits):
    assert len(splits) == 1
    for name, rows in splits.items():
        return worlds.write_jsonl(folder / f"{name}.jsonl", rows)


def jsonl_folder(folder, splits):
    for name, rows in splits.items():
        worlds.write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def parquet_plain(folder, splits):
    folder.mkdir()
    for name, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    return folder


def parquet_hub(folder, splits):
    """As in a hub repository's data/ folder; the rows of a split in two files."""
    (folder / "data").mkdir(parents=True)
    for name, rows in splits.items():
        for part in range(2):
            table = datasets.Dataset.from_list(rows[part * 3:part * 3 + 3])
            table.to_parquet(folder / "data" / f"{name}-{part:05}-of-00002.parquet")
    return folder


def parquet_one(folder, splits):
    folder.mkdir()
    for name, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def disk_dict(folder, splits):
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder)
    return folder


def disk_table(folder, splits):
    assert len(splits) == 1
    for name, rows in splits.items():
        datasets.Dataset.from_list(rows, split=name).save_to_disk(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Parquet files are turned into arrow files: here, not in the home directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("rows", [TEXT, CHAT], ids=["strings", "chat messages"])
@pytest.mark.parametrize("form", [jsonl_file, jsonl_folder, parquet_plain, parquet_one, parquet_hub, disk_dict,
                                  disk_table])
def test_every_form_of_a_dataset_gives_the_same_pairs(tmp_path, cache, form, rows):
    pairs, dropped = data.load_pairs(str(form(tmp_path / "set", {"sentiment": rows})))
    assert texts(pairs) == EXPECTED and dropped == 0
    assert {pair.split for pair in pairs} == {"sentiment"}


@pytest.mark.parametrize("form", [jsonl_folder, parquet_plain, parquet_one, parquet_hub, disk_dict])
def test_several_splits_are_kept_apart_and_can_be_chosen(tmp_path, cache, form):
    splits = {"descriptiveness": CHAT, "sentiment": worlds.chat_rows(6, seed=1)}
    name = str(form(tmp_path / "set", splits))
    both, _ = data.load_pairs(name)
    assert [pair.split for pair in both] == ["descriptiveness"] * 6 + ["sentiment"] * 6
    one, _ = data.load_pairs(name, ("sentiment",))
    assert one == both[6:]
    with pytest.raises(UserError, match=r"no split 'tone': it has descriptiveness, sentiment"):
        data.load_pairs(name, ("sentiment", "tone"))


def test_a_parquet_file_may_have_any_name(tmp_path, cache):
    """Only NAME-00000-of-00001 names a part of a split; a name may hold a space, a hyphen or a number."""
    names = ["my split", "run-05", "run-07", "2024-01-31"]
    pairs, _ = data.load_pairs(str(parquet_plain(tmp_path / "set", dict.fromkeys(names, TEXT))))
    assert {pair.split for pair in pairs} == set(names)


def test_a_saved_table_without_a_split_name_is_train(tmp_path):
    datasets.Dataset.from_list(TEXT).save_to_disk(tmp_path / "set")
    assert {pair.split for pair in data.load_pairs(str(tmp_path / "set"))[0]} == {"train"}


def test_rows_whose_responses_are_equal_are_counted_and_dropped(tmp_path):
    """Detail 26. Equal but for spaces at the ends, which are stripped, is equal."""
    rows = worlds.chat_rows(8, equal=2)
    rows[2]["rejected"] = [rows[2]["rejected"][0],
                           {"role": "assistant", "content": f"  {rows[2]['chosen'][1]['content']}\n"}]
    pairs, dropped = data.load_pairs(str(worlds.write_jsonl(tmp_path / "set.jsonl", rows)))
    assert dropped == 3 and texts(pairs) == [(row["prompt"], row["chosen"], row["rejected"])
                                             for row in worlds.text_rows(8)[3:]]


def test_spaces_at_the_seam_are_stripped_and_inner_ones_kept(tmp_path):
    row = {"prompt": " A  cat \n", "chosen": "\tsat  down ", "rejected": "ran "}
    pairs, _ = data.load_pairs(str(worlds.write_jsonl(tmp_path / "set.jsonl", [row])))
    assert texts(pairs) == [("A  cat", "sat  down", "ran")]


def test_a_prompt_may_be_chat_messages_too(tmp_path):
    row = CHAT[0] | {"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "The cat"}]}
    pairs, _ = data.load_pairs(str(worlds.write_jsonl(tmp_path / "set.jsonl", [row])))
    assert pairs[0].prompt == "The cat"


@pytest.mark.parametrize("odd", ["line\u2028separator", "next\x85line", "form\x0cfeed", "ünïcode 漢字 🙂"])
def test_unusual_characters_inside_a_line_do_not_cut_it(tmp_path, odd):
    """U+2028 may stand unescaped in JSON, and Python's splitlines cuts there."""
    path = tmp_path / "set.jsonl"
    line = json.dumps(TEXT[0] | {"prompt": odd}, ensure_ascii=False)
    path.write_text(line.replace("\\f", "\\u000c") + "\n\n", encoding="utf-8", newline="")
    assert data.load_pairs(str(path))[0][0].prompt == odd


def broken(tmp_path, line):
    path = tmp_path / "set.jsonl"
    good = json.dumps(TEXT[0]).encode()
    path.write_bytes(good + b"\n" + line + b"\n")
    return path


@pytest.mark.parametrize("line, says", [
    (b'{"prompt": "a", ', "line 2"),
    (b'["prompt", "chosen"]', "line 2"),
    (b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}', "UTF-8"),
    (b'{"prompt": "a", "rejected": "b"}', "'chosen'"),
    (b'{"prompt": "a", "chosen": "a", "rejected": 3}', "row 1"),
    (b'{"prompt": "a", "chosen": "a", "rejected": null}', "row 1"),
    (b'{"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "b"}', "row 1"),
    (b'{"prompt": "a", "chosen": ["text"], "rejected": "b"}', "row 1"),
    (b'{"prompt": "  ", "chosen": "a", "rejected": "b"}', "prompt is empty"),
], ids=["half a line", "no object", "not UTF-8", "no column", "a number", "null", "no content", "no messages", "empty"])
def test_a_broken_row_is_named(tmp_path, line, says):
    with pytest.raises(UserError, match=says):
        data.load_pairs(str(broken(tmp_path, line)))


@pytest.mark.parametrize("case, says", [
    ("missing", "hf download"), ("empty folder", "holds no"), ("text file", "not .jsonl"), ("empty split", "is empty"),
    ("all equal", "all of its 3 rows"), ("no parquet", "parquet")])
def test_what_is_no_dataset_is_said_in_one_line(tmp_path, cache, case, says):
    path = tmp_path / "set"
    if case == "empty folder":
        path.mkdir()
    elif case == "text file":
        path.write_text("hello")
    elif case == "empty split":
        jsonl_folder(path, {"full": TEXT, "void": []})
    elif case == "all equal":
        jsonl_folder(path, {"a": worlds.text_rows(3, equal=3)})
    elif case == "no parquet":
        path.mkdir()
        (path / "train.parquet").write_text("hello")
    with pytest.raises(UserError, match=says) as error:
        data.load_pairs(str(path))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- shards


def pairs_of(splits, rows, prompts=None):
    """`rows` distinct pairs for each of the splits; prompt p belongs to every (row % prompts == p) of its split."""
    return [Pair(f"{split} {i % (prompts or rows)}", f"good {i}", f"bad {i}", split)
            for split in splits for i in range(rows)]


def deal(pairs, n_agents, how, n_pairs=2, n_eval=2, seed=0, n_judge=0):
    return data.make_shards(pairs, n_agents, how, n_pairs, n_eval, random.Random(seed), n_judge)


def owned(shard):
    return shard.train + shard.heldout


@settings(max_examples=80, deadline=None)
@given(n_splits=st.integers(1, 5), rows=st.integers(2, 40), repeats=st.integers(1, 3), n_agents=st.integers(1, 6),
       how=st.sampled_from(["iid", "split"]), n_pairs=st.integers(1, 4), n_eval=st.integers(1, 6),
       judge_share=st.sampled_from([0, 4]), seed=st.integers(0, 2**32))
def test_nothing_is_shared_between_agents_judge_and_evaluation(n_splits, rows, repeats, n_agents, how, n_pairs, n_eval,
                                                               judge_share, seed):
    pairs = pairs_of("abcde"[:n_splits], rows, max(1, rows // repeats))
    n_judge = len(pairs) // judge_share if judge_share else 0
    try:
        eval_prompts, shards, judge = deal(pairs, n_agents, how, n_pairs, n_eval, seed, n_judge)
    except UserError as error:
        assert "lower --" in str(error) and "\n" not in str(error)
        assume(False)
    assert len(eval_prompts) == len(set(eval_prompts)) == n_eval and len(shards) == n_agents
    assert len(judge) == n_judge
    everyone = judge + [pair for shard in shards for pair in owned(shard)]
    assert len(set(everyone)) == len(everyone) and set(everyone) <= set(pairs)  # no pair twice, none made up
    seen = {pair.prompt for pair in everyone} | {prompt for shard in shards for prompt in shard.prompts}
    assert not seen & set(eval_prompts)
    for i, shard in enumerate(shards):
        assert len(shard.train) == n_pairs and shard.heldout
        assert len(set(shard.prompts)) == len(shard.prompts) > 0
        assert {pair.prompt for pair in owned(shard)} <= set(shard.prompts)
        if how == "split":
            splits = sorted({pair.split for pair in pairs})
            own = splits[i::n_agents] or [splits[i % len(splits)]]
            assert {prompt.split()[0] for prompt in shard.prompts} <= set(own)
    assert deal(pairs, n_agents, how, n_pairs, n_eval, seed, n_judge) == (eval_prompts, shards, judge)


def test_iid_deals_evenly_and_uses_every_row():
    """23 prompts with one row each, 3 held out: 20 rows for 3 agents are 7 + 7 + 6."""
    _, shards, _ = deal(pairs_of("a", 23), 3, "iid", n_eval=3)
    assert sorted(len(shard.prompts) for shard in shards) == [6, 7, 7]
    assert len({prompt for shard in shards for prompt in shard.prompts}) == 20


def test_iid_mixes_the_splits():
    _, shards, _ = deal(pairs_of("ab", 40), 2, "iid")
    assert all({prompt[0] for prompt in shard.prompts} == {"a", "b"} for shard in shards)


def test_split_gives_each_agent_its_own_splits():
    """Five splits, two agents: agent 0 has the splits 0, 2 and 4, agent 1 has 1 and 3."""
    _, shards, _ = deal(pairs_of("abcde", 20), 2, "split")
    assert [sorted({prompt[0] for prompt in shard.prompts}) for shard in shards] == [["a", "c", "e"], ["b", "d"]]


def test_with_fewer_splits_than_agents_those_of_a_split_share_its_rows():
    """Two splits of 30 rows, five agents: 0, 2 and 4 share a, 1 and 3 share b, each row once."""
    eval_prompts, shards, _ = deal(pairs_of("ab", 30), 5, "split", n_eval=4)
    assert [{prompt[0] for prompt in shard.prompts} for shard in shards] == [{"a"}, {"b"}, {"a"}, {"b"}, {"a"}]
    for split, agents in (("a", (0, 2, 4)), ("b", (1, 3))):
        sizes = [len(shards[i].prompts) for i in agents]
        assert sum(sizes) == 30 - sum(prompt[0] == split for prompt in eval_prompts) and max(sizes) - min(sizes) <= 1
        assert len({prompt for i in agents for prompt in shards[i].prompts}) == sum(sizes)


def test_the_rows_come_in_another_order_with_another_seed():
    pairs = pairs_of("a", 40)
    assert deal(pairs, 2, "iid", seed=0) != deal(pairs, 2, "iid", seed=1)
    assert deal(list(reversed(pairs)), 2, "iid")[0] == deal(pairs, 2, "iid")[0]  # prompts are drawn from a sorted list


@pytest.mark.parametrize("agents, n_pairs, n_eval, says", [
    (9, 1, 2, "10 distinct prompts are too few for 9 agents and 2 evaluation prompts"),
    (2, 1, 9, "10 distinct prompts are too few for 2 agents and 9 evaluation prompts"),
    (2, 4, 2, "1 of them held out, and --pairs asks for 4: lower --pairs to 3")])
def test_too_little_data_says_what_to_lower(agents, n_pairs, n_eval, says):
    with pytest.raises(UserError, match=says):
        deal(pairs_of("a", 10), agents, "iid", n_pairs, n_eval)


def test_an_agent_with_no_row_at_all_is_no_crash():
    """The judge takes half the rows and leaves fewer than there are agents."""
    with pytest.raises(UserError, match="usable preference rows") as error:
        deal(pairs_of("a", 10), 6, "iid", n_pairs=1, n_eval=2, n_judge=5)
    assert "--pairs to 0" not in str(error.value)  # which would be refused in its turn


def test_held_out_pairs_are_a_fifth_and_at_most_256():
    for rows, heldout in ((4, 1), (10, 2), (100, 20), (5000, 256)):
        _, (shard,), _ = deal(pairs_of("a", rows + 1), 1, "iid", n_pairs=1, n_eval=1)
        assert len(shard.heldout) == heldout


def test_pool_is_everything_once():
    _, shards, _ = deal(pairs_of("ab", 20), 4, "iid")
    pooled = data.pool(shards)
    assert pooled.train == [pair for shard in shards for pair in shard.train]
    assert pooled.heldout == [pair for shard in shards for pair in shard.heldout]
    assert sorted(pooled.prompts) == sorted({prompt for shard in shards for prompt in shard.prompts})


# ---------------------------------------------------------------------------------------------------------- tokens


def test_pad_by_hand():
    ids, mask = data.pad([[5, 6, 7], [8], []], 1, "left")
    assert ids.tolist() == [[5, 6, 7], [1, 1, 8], [1, 1, 1]] and mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    ids, mask = data.pad([[5, 6, 7], [8]], 1, "right")
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@given(st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_pad_loses_and_adds_nothing(sequences, side):
    ids, mask = data.pad(sequences, 1, side)
    assert ids.shape == mask.shape == (len(sequences), max(map(len, sequences)))
    assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] == sequences
    assert (ids[mask == 0] == 1).all()
    steps = mask.diff(dim=1)
    assert (steps >= 0).all() if side == "left" else (steps <= 0).all()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = worlds.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.pad_token = "<|padding|>"
    return tokenizer


def test_prompt_and_response_are_joined_by_exactly_one_space(tokenizer):
    """Detail 27: the pieces, tokenised apart, are the tokens of the whole text."""
    prompt, response = "The room was", "lovely and calm."
    ids = data.encode_prompts(tokenizer, [prompt])[0] + data.encode_response(tokenizer, response, 99, eos=False)
    assert tokenizer.decode(ids) == "The room was lovely and calm."
    assert ids == tokenizer("The room was lovely and calm.")["input_ids"]


def test_a_response_ends_with_eos_only_if_it_was_not_cut(tokenizer):
    """Detail 8: generated responses end with EOS inside max_tokens, or are cut without one."""
    whole = tokenizer(" lovely and calm.")["input_ids"]
    n = len(whole)
    assert n == 4 and data.encode_response(tokenizer, "lovely and calm.", 99, eos=False) == whole
    assert data.encode_response(tokenizer, "lovely and calm.", n + 1, eos=True) == [*whole, 0]
    assert data.encode_response(tokenizer, "lovely and calm.", n, eos=True) == whole
    assert data.encode_response(tokenizer, "lovely and calm.", n - 1, eos=True) == whole[:-1]
    assert data.encode_response(tokenizer, "lovely and calm.", n - 1, eos=False) == whole[:-1]


def test_decode_skips_special_and_padded_tokens(tokenizer):
    ids, mask = data.pad([[*tokenizer(" lovely and")["input_ids"], 0], tokenizer(" calm")["input_ids"]], 1, "right")
    assert data.decode(tokenizer, ids, mask) == ["lovely and", "calm"]


# ------------------------------------------------------------------------------------------------ the reward model


@pytest.fixture(scope="module")
def causal():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(worlds.config(num_hidden_layers=1)).eval()


def reward_model(causal, pooling, seed=0):
    return data.RewardModel(causal, pooling, torch.Generator().manual_seed(seed))


def plain_score(model, sequence):
    """A row by itself: no padding, no mask, no batch; the pooling written out as a loop."""
    hidden = model.trunk(input_ids=torch.tensor([sequence])).last_hidden_state[0]
    if model.pooling == "last":
        pooled = hidden[-1]
    else:
        pooled = sum(hidden[t] for t in range(len(sequence))) / len(sequence)
    return float(sum(a * b for a, b in zip(pooled, model.head.weight[0], strict=True)) + model.head.bias[0])


SEQUENCES = [[5, 9, 300, 7, 2], [11], [40, 41, 42, 0], [100, 100, 7]]


@pytest.fixture(scope="module")
def absolute():
    """A GPT-2. GPT-NeoX's positions are relative, so it would forgive position ids that count the padding."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=352, n_positions=64)).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["causal", "absolute"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_never_changes_a_score(request, family, pooling):
    """Details 1 and 8: left, right and no padding score alike, whatever stands at the padded positions."""
    model = reward_model(request.getfixturevalue(family), pooling)
    plain = torch.tensor([plain_score(model, sequence) for sequence in SEQUENCES])
    assert plain.std() > 0.1  # the comparison is not between constants
    for side in ("left", "right"):
        ids, mask = data.pad(SEQUENCES, 1, side)
        garbage = torch.randint(2, 352, ids.shape, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(model(ids, mask), plain, atol=1e-6, rtol=0)
        torch.testing.assert_close(model(torch.where(mask == 1, ids, garbage), mask), plain, atol=1e-6, rtol=0)
    ids, mask = data.pad([[1, *sequence] for sequence in SEQUENCES], 1, "right")  # a prompt padded in the middle
    mask[:, 0] = 0
    torch.testing.assert_close(model(ids, mask), plain, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_padded_position_that_is_nan_is_selected_away(causal, monkeypatch):
    model = reward_model(causal, "mean")
    ids, mask = data.pad(SEQUENCES, 1, "right")
    expected, forward = model(ids, mask), model.trunk.forward

    def spoiled(**inputs):
        output = forward(**inputs)
        output.last_hidden_state[inputs["attention_mask"] == 0] = torch.nan
        return output
    monkeypatch.setattr(model.trunk, "forward", spoiled)
    assert torch.equal(model(ids, mask), expected)


def test_the_reward_model_starts_from_a_copy_of_the_trunk_with_a_small_random_head(causal):
    """Detail 20: std 1/sqrt(d + 1), bias 0; detail 28: everything is trained, and the policy is not touched."""
    model = reward_model(causal, "mean")
    for mine, theirs in zip(model.trunk.parameters(), causal.base_model.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr() and mine.requires_grad
    expected = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)) / 33 ** 0.5
    torch.testing.assert_close(model.head.weight, expected, rtol=0, atol=0, check_dtype=True)
    assert model.head.bias.item() == 0
    wide = torch.nn.Module()
    wide.base_model, wide.config, wide.device = torch.nn.Identity(), type("", (), {"hidden_size": 9999}), "cpu"
    assert 0.0097 < reward_model(wide, "mean").head.weight.std() < 0.0103  # 1/sqrt(10000)


def preferences(n, seed):
    """n pairs of ids: chosen has six tokens of 10..59, rejected six of 60..109, after a common prompt."""
    rng = random.Random(seed)
    def draw(low):
        return [rng.randrange(low, low + 50) for _ in range(rng.randrange(4, 7))]
    return [(prompt + draw(10), prompt + draw(60)) for prompt in ([rng.randrange(110, 300)] * 2 for _ in range(n))]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_reward_model_learns_a_separable_preference(causal, pooling):
    model, heldout = reward_model(causal, pooling), preferences(200, seed=1)
    assert 0.3 < data.preference_accuracy(model, heldout, 1) < 0.7
    loss = data.fit_reward_model(model, preferences(96, seed=0), 1, lr=3e-3, epochs=4, batch=16,
                                 generator=torch.Generator().manual_seed(0))
    assert data.preference_accuracy(model, heldout, 1) > 0.9
    assert loss < 0.2 < math.log(2)


def test_the_loss_of_the_first_step_is_minus_log_sigmoid_of_the_margin(causal):
    """Worked out row by row in Python: mean of log(1 + exp(-(r_chosen - r_rejected))), before the weights move."""
    model, pairs = reward_model(causal, "mean"), preferences(7, seed=2)
    with torch.no_grad():
        margins = [plain_score(model, chosen) - plain_score(model, rejected) for chosen, rejected in pairs]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 7
    loss = data.fit_reward_model(model, pairs, 1, lr=1e-3, epochs=1, batch=7,
                                 generator=torch.Generator().manual_seed(0))
    assert loss == pytest.approx(expected, abs=1e-6)


def test_a_short_last_batch_counts_by_its_rows(causal):
    """Seven pairs in batches of 4 and 3, with a step of 0 size: the epoch's loss is the mean over all seven."""
    pairs = preferences(7, seed=2)
    whole, cut = (data.fit_reward_model(reward_model(causal, "mean"), pairs, 1, lr=0.0, epochs=1, batch=batch,
                                        generator=torch.Generator().manual_seed(0)) for batch in (7, 4))
    assert cut == pytest.approx(whole, abs=1e-6)


def test_the_learning_rate_falls_linearly_to_zero_and_adam_has_eps_1e_5(causal, monkeypatch):
    """Detail 20. Two epochs of 2 steps: lr, 3/4 lr, 1/2 lr, 1/4 lr."""
    seen, step = [], torch.optim.Adam.step
    def recorded(self, *args, **kwargs):
        seen.append((self.param_groups[0]["lr"], self.param_groups[0]["eps"]))
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    data.fit_reward_model(reward_model(causal, "mean"), preferences(6, seed=0), 1, lr=0.008, epochs=2, batch=4,
                          generator=torch.Generator().manual_seed(0))
    assert [lr for lr, _ in seen] == pytest.approx([0.008, 0.006, 0.004, 0.002]) and {eps for _, eps in seen} == {1e-5}


def test_each_epoch_shows_every_pair_once(causal, monkeypatch):
    shown, scores = [], data._pair_scores
    monkeypatch.setattr(data, "_pair_scores",
                        lambda model, pairs, pad: shown.append(pairs) or scores(model, pairs, pad))
    pairs = preferences(10, seed=0)
    data.fit_reward_model(reward_model(causal, "mean"), pairs, 1, lr=0.0, epochs=2, batch=4,
                          generator=torch.Generator().manual_seed(0))
    assert [len(batch) for batch in shown] == [4, 4, 2] * 2
    for epoch in (shown[:3], shown[3:]):
        assert sorted(pair for batch in epoch for pair in batch) == sorted(pairs)
    assert shown[:3] != shown[3:]  # in another order


def test_preference_accuracy_counts_a_tie_half(causal):
    """Scores that are the last token's id: of (2>1), (1<2), (3=3), (9>5) two are right and one is a tie: 2.5 / 4."""
    model = reward_model(causal, "last")
    model.forward = lambda ids, mask: torch.stack([row[keep.bool()][-1].float()
                                                   for row, keep in zip(ids, mask, strict=True)])
    pairs = [([7, 2], [1]), ([1], [7, 7, 2]), ([3], [3]), ([9], [5])]
    assert data.preference_accuracy(model, pairs, 1) == data.preference_accuracy(model, pairs, 1, batch=3) == 0.625


# --------------------------------------------------------------------------------------------------------- scorers


def batch_of(tokenizer, prompts, responses):
    """Texts as the sampler leaves them; a response that ends in "|" has EOS."""
    prompt = data.pad(data.encode_prompts(tokenizer, prompts), 1, "left")
    response = [data.encode_response(tokenizer, text.rstrip("|"), 99, eos=text.endswith("|")) for text in responses]
    return *prompt, *data.pad(response, 1, "right")


def test_model_scorer_reads_prompt_and_response_as_one_text(causal, tokenizer):
    model = reward_model(causal, "last")
    batch = batch_of(tokenizer, ["The room", "The song was so"], ["lovely|", "dull and grey"])
    rows = [[*p[pm.bool()].tolist(), *r[rm.bool()].tolist()] for p, pm, r, rm in zip(*batch, strict=True)]
    scores = data.model_scorer(model)(*batch)
    assert not scores.requires_grad
    with torch.no_grad():
        assert scores.tolist() == pytest.approx([plain_score(model, row) for row in rows], abs=1e-6)


def test_normalised_has_mean_0_and_std_1_on_its_samples(tokenizer):
    """Detail 19. Scores 1, 3 and 8, in batches of 2 and 1: mean 4, std sqrt((9 + 1 + 16) / 3)."""
    def scorer(prompt, prompt_mask, response, mask):
        return response[:, 0].float()
    empty = torch.zeros(2, 1)
    samples = [(empty, empty, torch.tensor([[1], [3]]), empty), (empty[:1], empty[:1], torch.tensor([[8]]), empty[:1])]
    scaled, mean, std = data.normalised(scorer, samples)
    assert mean == 4 and std == pytest.approx((26 / 3) ** 0.5)
    scores = torch.cat([scaled(*sample) for sample in samples])
    torch.testing.assert_close(scores, torch.tensor([-3.0, -1.0, 4.0]) / (26 / 3) ** 0.5)
    assert scores.mean().abs() < 1e-6 and abs(scores.std(correction=0) - 1) < 1e-6


@pytest.mark.parametrize("samples", [1, 3])
def test_a_constant_reward_is_shifted_only(samples):
    scaled, mean, std = data.normalised(lambda *batch: torch.full((len(batch[0]),), 7.0),
                                        [(torch.zeros(1, 1),) * 4] * samples)
    assert (mean, std) == (7.0, 0.0) and scaled(*[torch.zeros(2, 1)] * 4).tolist() == [0.0, 0.0]


def test_text_scorer_gives_the_function_plain_texts_and_how_they_ended(tokenizer):
    seen = []
    def function(prompts, responses, ended):
        seen.append((prompts, responses, ended))
        return [len(response) for response in responses]
    batch = batch_of(tokenizer, ["The room", "The song was so"], ["lovely and calm|", "dull"])
    scores = data.text_scorer(function, "judge", tokenizer)(*batch)
    assert seen == [(["The room", "The song was so"], ["lovely and calm", "dull"], [True, False])]
    assert scores.tolist() == [15.0, 4.0] and scores.dtype == torch.float32


def test_an_eos_behind_the_mask_is_no_end(tokenizer):
    prompt, mask = torch.tensor([[5]]), torch.tensor([[1]])
    score = data.text_scorer(lambda prompts, responses, ended: [float(ended[0])], "judge", tokenizer)
    assert score(prompt, mask, torch.tensor([[7, 0]]), torch.tensor([[1, 1]])).item() == 1
    assert score(prompt, mask, torch.tensor([[7, 0]]), torch.tensor([[1, 0]])).item() == 0


@pytest.mark.parametrize("returned", [[1.0], [1.0, 2.0, 3.0], 1.0, [[1.0], [2.0]], [1.0, math.nan], [1.0, math.inf],
                                      None, ["good", "bad"], [1.0, None], {"a": 1}],
                         ids=lambda value: repr(value))
def test_a_function_that_does_not_return_a_number_each_is_named(tokenizer, returned):
    scorer = data.text_scorer(lambda *args: returned, "mine.py:judge", tokenizer)
    with pytest.raises(UserError, match=r"mine\.py:judge.*one finite number per response"):
        scorer(*batch_of(tokenizer, ["The room"] * 2, ["calm", "dull"]))


@pytest.mark.parametrize("returned", [(1, 2), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).double().numpy()],
                         ids=["tuple", "tensor", "array"])
def test_a_function_may_return_any_row_of_numbers(tokenizer, returned):
    scorer = data.text_scorer(lambda *args: returned, "judge", tokenizer)
    assert scorer(*batch_of(tokenizer, ["The room"] * 2, ["calm", "dull"])).tolist() == [1.0, 2.0]


def test_a_function_that_raises_is_named_in_one_line(tokenizer):
    def judge(prompts, responses, ended):
        raise KeyError("lexicon\nis gone")
    with pytest.raises(UserError, match=r"mine\.py:judge.*KeyError") as error:
        data.text_scorer(judge, "mine.py:judge", tokenizer)(*batch_of(tokenizer, ["The room"], ["calm"]))
    assert "\n" not in str(error.value)


def test_load_scorer_takes_a_function_in_a_file(tmp_path, tokenizer):
    (tmp_path / "rule.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Rule:\n    word: str\n\n\n"
        "def score(prompts, responses, ended):\n    return [r.count(Rule('calm').word) for r in responses]\n")
    scorer = data.load_scorer(f"{tmp_path / 'rule.py'}:score", tokenizer, "cpu")
    assert scorer(*batch_of(tokenizer, ["The room"] * 2, ["calm and calm|", "dull"])).tolist() == [2, 0]


@pytest.mark.parametrize("spec, says", [
    ("gone.py:score", "there is no file"), ("bad.py:score", "ZeroDivisionError"),
    ("bad syntax.py:score", "SyntaxError"), ("rule.py:other", "other"), ("rule.py:number", "number"),
    ("rule.py", "neither"), ("gone", "neither"),
    ("empty", "no sequence-classification model")])
def test_a_scorer_that_cannot_be_had_is_named_in_one_line(tmp_path, tokenizer, monkeypatch, spec, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.py").write_text("1 / 0\n")
    (tmp_path / "bad syntax.py").write_text("def score(:\n")
    (tmp_path / "rule.py").write_text("number = 3\n\n\ndef score(prompts, responses, ended):\n    return []\n")
    with pytest.raises(UserError, match=says) as error:
        data.load_scorer(spec, tokenizer, "cpu")
    assert "\n" not in str(error.value)


def save_classifier(folder, labels):
    torch.manual_seed(labels)
    model = GPTNeoXForSequenceClassification(worlds.config(num_labels=labels, num_hidden_layers=1)).eval()
    model.save_pretrained(folder)
    worlds.save_tokenizer(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_load_scorer_takes_a_sequence_classification_directory(tmp_path, tokenizer, labels, side):
    """One logit, or positive - negative, at the last token of "prompt response"; each row by itself is the oracle."""
    model = save_classifier(tmp_path / "classifier", labels)
    settings = json.loads((tmp_path / "classifier" / "tokenizer_config.json").read_text())
    (tmp_path / "classifier" / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": side}))
    prompts, responses = ["The room", "The song was so", "It"], ["lovely and calm|", "dull", "was grey."]
    scores = data.load_scorer(str(tmp_path / "classifier"), tokenizer, "cpu")(*batch_of(tokenizer, prompts, responses))
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = tokenizer(f"{prompt} {response.rstrip('|')}", return_tensors="pt")["input_ids"]
        logits = model.score(model.base_model(input_ids=ids).last_hidden_state)[0, -1].tolist()
        expected.append(logits[0] if labels == 1 else logits[1] - logits[0])
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-2


def test_a_classifier_with_three_labels_is_refused(tmp_path, tokenizer):
    save_classifier(tmp_path / "classifier", 3)
    with pytest.raises(UserError, match="3 labels"):
        data.load_scorer(str(tmp_path / "classifier"), tokenizer, "cpu")


def test_a_language_model_is_no_judge(small_model, tokenizer):
    """Detail 28: transformers would give it a random head and call it a classifier."""
    with pytest.raises(UserError, match="no sequence-classification model"):
        data.load_scorer(str(small_model), tokenizer, "cpu")


# ---------------------------------------------------------------------------------------------------------- models


def test_the_small_model_loads_as_a_policy_needs_it(small_model):
    """Details 2, 21 and 29: `<|padding|>` is the pad, ids without a token are forbidden, float16 becomes float32."""
    assert AutoModelForCausalLM.from_pretrained(small_model).dtype == torch.float16
    model, tokenizer, forbidden = data.load_model(str(small_model), "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and not model.training
    assert (tokenizer.eos_token_id, tokenizer.pad_token, tokenizer.pad_token_id) == (0, "<|padding|>", 1)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)
    assert len(tokenizer) == 320 and forbidden.shape == (352,) and forbidden.dtype == torch.bool
    assert forbidden.nonzero().flatten().tolist() == [1, *range(320, 352)]


def test_a_hole_in_the_vocabulary_is_forbidden_too(tmp_path, small_model, monkeypatch):
    from transformers import PreTrainedTokenizerFast
    vocabulary = PreTrainedTokenizerFast.get_vocab
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab",
                        lambda self: {token: i for token, i in vocabulary(self).items() if i != 200})
    _, _, forbidden = data.load_model(str(small_model), "cpu")
    assert forbidden[200] and not forbidden[199]


def test_a_tokenizer_with_a_pad_of_its_own_keeps_it(tmp_path):
    worlds.save_model(tmp_path)
    tokenizer = worlds.save_tokenizer(tmp_path)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.save_pretrained(tmp_path)
    _, tokenizer, forbidden = data.load_model(str(tmp_path), "cpu")
    assert tokenizer.pad_token_id == 7 and forbidden[7] and not forbidden[1]


def test_a_pad_that_is_the_eos_gives_way_to_padding(tmp_path):
    worlds.save_model(tmp_path)
    tokenizer = worlds.save_tokenizer(tmp_path)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    assert data.load_model(str(tmp_path), "cpu")[1].pad_token_id == 1


def refused(folder):
    with pytest.raises(UserError) as error:
        data.load_model(str(folder), "cpu")
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def test_a_tokenizer_without_pad_or_eos_is_refused(tmp_path):
    worlds.save_model(tmp_path)
    worlds.save_tokenizer(tmp_path, padding=False)
    assert "no pad token of its own" in refused(tmp_path)
    worlds.save_tokenizer(tmp_path, eos=False)
    assert "no EOS token" in refused(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    worlds.save_model(tmp_path, vocab_size=300)
    assert "ids go to 319, the embedding has 300 rows" in refused(tmp_path)


def test_folders_that_hold_no_whole_model_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no causal language model" in refused(tmp_path / "empty")
    worlds.save_model(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(tmp_path / "cut")
    worlds.save_model(tmp_path / "headless")
    GPTNeoXModel(worlds.config()).save_pretrained(tmp_path / "headless")  # no output embedding: it would be random
    assert "lm_head" in refused(tmp_path / "headless")


def test_a_model_that_is_neither_here_nor_to_be_had_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match="hf download nobody/nothing") as error:
        data.load_model("nobody/nothing", "cpu")
    assert "\n" not in str(error.value)
    assert "gone" in refused(tmp_path / "gone")


@contextlib.contextmanager
def server(answer):
    """A local server that sends `answer` to whoever connects; b"" accepts and stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)
        thread = threading.Thread(target=serve, daemon=True)
        if answer:
            thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    if answer:
        thread.join(5)


def asked(monkeypatch, endpoint, timeout=2.0):
    """What `online` says of this endpoint, and how long it took."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = time.perf_counter()
    return data.online(timeout), time.perf_counter() - started


@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found", b"503 Busy"])
def test_a_hub_that_answers_is_reachable(monkeypatch, status):
    with server(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n") as endpoint:
        assert asked(monkeypatch, endpoint)[0] is True


def test_a_dead_hub_is_told_at_once(monkeypatch):
    reachable, seconds = asked(monkeypatch, "http://127.0.0.1:9")
    assert reachable is False and seconds < 2


def test_a_silent_hub_is_given_up_after_the_timeout(monkeypatch):
    with server(b"") as endpoint:
        reachable, seconds = asked(monkeypatch, endpoint, timeout=0.2)
    assert reachable is False and seconds < 1.5


def test_a_resolver_that_hangs_is_given_up_after_the_timeout(monkeypatch):
    """A socket's timeout does not hold for looking up its name, which a dead network can stall for half a minute."""
    released = threading.Event()

    def hangs(*args, **kwargs):
        released.wait(4)
        raise socket.gaierror
    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    try:
        reachable, seconds = asked(monkeypatch, "https://huggingface.invalid", timeout=0.2)
    finally:
        released.set()
    assert reachable is False and seconds < 1.5


@pytest.mark.parametrize("endpoint", ["nonsense", "http://127.0.0.1:port", "http://", "ftp://127.0.0.1:9"])
def test_a_wrong_endpoint_is_no_crash(monkeypatch, endpoint):
    assert asked(monkeypatch, endpoint)[0] is False


def test_a_server_that_does_not_speak_http_is_no_crash(monkeypatch):
    with server(b"SSH-2.0-OpenSSH_9.6\r\n") as endpoint:
        assert asked(monkeypatch, endpoint)[0] in (True, False)


def test_offline_is_not_asked(monkeypatch):
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("asked"))
    for value in ("1", "true", "ON"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert data.online() is False


# ------------------------------------------------------------------------------------------- what a review turned up


def test_parquet_as_the_hub_converts_it_has_one_split_per_folder(tmp_path):
    for split in ("sentiment", "descriptiveness"):
        (tmp_path / split).mkdir()
        datasets.Dataset.from_list(TEXT).to_parquet(tmp_path / split / "0000.parquet")
    pairs, _ = data.load_pairs(str(tmp_path))
    assert {pair.split for pair in pairs} == {"sentiment", "descriptiveness"}


def test_messages_of_other_roles_are_no_empty_responses(tmp_path):
    rows = worlds.chat_rows(3)
    for row in rows:
        row["chosen"][1]["role"] = row["rejected"][1]["role"] = "gpt"
    with pytest.raises(UserError, match="assistant"):
        data.load_pairs(str(worlds.write_jsonl(tmp_path / "set.jsonl", rows)))


def test_rows_without_labels_keep_every_prompt(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "chosen": "x", "rejected": "x"}]
    pairs, dropped = data.load_pairs(str(worlds.write_jsonl(tmp_path / "set.jsonl", rows)), labelled=False)
    assert [pair.prompt for pair in pairs] == ["a", "b"] and dropped == 0


def test_a_file_of_the_users_replaces_no_module(tmp_path):
    import sys
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "math.py").write_text(f"def name(*args):\n    return {folder!r}\n")
    functions = [data._function(f"{tmp_path / folder / 'math.py'}:name") for folder in ("a", "b")]
    assert [function() for function in functions] == ["a", "b"] and sys.modules["math"] is math


def test_a_file_that_exits_is_a_users_mistake(tmp_path):
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(UserError, match="SystemExit"):
        data._function(f"{tmp_path / 'exits.py'}:name")


def test_an_empty_response_is_eos_alone():
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(data.Path(data.__file__).parent / "tiny/model")
    assert data.encode_response(tokenizer, "", 5, eos=True) == [tokenizer.eos_token_id]

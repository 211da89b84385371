"""data.py: shards that share nothing, reward models that learn, scorers and random streams."""

import copy
import hashlib
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
import worlds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTNeoXForCausalLM

import data
from data import Pair, UserError
from support import load

# ------------------------------------------------------------------------------------------ shards


def pairs_of(splits, rows, prompts=None):
    """`rows` pairs per split; pair i has prompt i % prompts of its split (None: one each)."""
    return [Pair(f"{split} {i % (prompts or rows)}", f"good {i}", f"bad {i}", split)
            for split in splits for i in range(rows)]


def shards_of(pairs, n_agents, how, n_pairs=2, n_eval=2, seed=0, n_judge=0):
    return data.make_shards(pairs, n_agents, how, n_pairs, n_eval, random.Random(seed), n_judge)


def splits_of(shard):
    return "".join(sorted({prompt[0] for prompt in shard.prompts}))


@settings(max_examples=80, deadline=None)
@given(n_splits=st.integers(1, 5), rows=st.integers(2, 40), repeats=st.integers(1, 3),
       n_agents=st.integers(1, 6), how=st.sampled_from(["iid", "split"]),
       n_pairs=st.integers(1, 4), n_eval=st.integers(1, 6), judge_share=st.sampled_from([0, 4]),
       seed=st.integers(0, 2**32))
def test_nothing_is_shared_between_agents_judge_and_evaluation(
        n_splits, rows, repeats, n_agents, how, n_pairs, n_eval, judge_share, seed):
    pairs = pairs_of("abcde"[:n_splits], rows, max(1, rows // repeats))
    n_judge = len(pairs) // judge_share if judge_share else 0
    arguments = pairs, n_agents, how, n_pairs, n_eval, seed, n_judge
    try:
        eval_prompts, shards, judge = shards_of(*arguments)
    except UserError as error:
        assert "lower --" in str(error) and "\n" not in str(error)
        assume(False)
    assert len(eval_prompts) == len(set(eval_prompts)) == n_eval and len(shards) == n_agents
    assert n_judge <= len(judge) < n_judge + 10 * repeats
    owned = judge + [pair for shard in shards for pair in shard.train + shard.heldout]
    assert len(set(owned)) == len(owned) and set(owned) <= set(pairs)  # none twice, none made up
    # Detail 32: no prompt in two of the evaluation, the judge, an agent's two parts, two agents.
    of = [{pair.prompt for pair in part} for part in (
        judge, *(part for shard in shards for part in (shard.train, shard.heldout)))]
    assert sum(map(len, of)) + n_eval == len(set().union(*of, eval_prompts))
    prompts = [set(shard.prompts) for shard in shards]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    assert not set().union(*prompts) & (set(eval_prompts) | of[0])
    for i, shard in enumerate(shards):
        assert len(shard.train) == n_pairs and shard.heldout
        assert len(set(shard.prompts)) == len(shard.prompts) > 0
        assert {pair.prompt for pair in shard.train + shard.heldout} <= set(shard.prompts)
        assert shard.rows == sum(pair.prompt in shard.prompts for pair in pairs)
        if how == "split":
            splits = sorted({pair.split for pair in pairs})
            assert set(splits_of(shard)) <= set(splits[i::n_agents] or [splits[i % len(splits)]])
    assert shards_of(*arguments) == (eval_prompts, shards, judge)


def test_iid_is_even_uses_every_row_and_mixes_the_splits():
    """23 prompts with one row each, 3 held out: 20 rows for 3 agents are 7 + 7 + 6."""
    _, shards, _ = shards_of(pairs_of("a", 23), 3, "iid", n_eval=3)
    assert sorted(len(shard.prompts) for shard in shards) == [6, 7, 7]
    assert len({prompt for shard in shards for prompt in shard.prompts}) == 20
    _, shards, _ = shards_of(pairs_of("ab", 40), 2, "iid")
    assert [splits_of(shard) for shard in shards] == ["ab", "ab"]


def test_split_gives_each_agent_its_own_splits():
    """Five splits, two agents: agent 0 has the splits 0, 2 and 4, agent 1 has 1 and 3."""
    _, shards, _ = shards_of(pairs_of("abcde", 20), 2, "split")
    assert [splits_of(shard) for shard in shards] == ["ace", "bd"]


def test_with_fewer_splits_than_agents_those_of_a_split_share_its_rows():
    """Two splits of 30 rows, five agents: 0, 2 and 4 share a, 1 and 3 share b, each row once."""
    eval_prompts, shards, _ = shards_of(pairs_of("ab", 30), 5, "split", n_eval=4)
    assert [splits_of(shard) for shard in shards] == ["a", "b", "a", "b", "a"]
    for split, agents in (("a", (0, 2, 4)), ("b", (1, 3))):
        sizes = [len(shards[i].prompts) for i in agents]
        assert sum(sizes) == 30 - sum(prompt[0] == split for prompt in eval_prompts)
        assert max(sizes) - min(sizes) <= 1
        assert len({prompt for i in agents for prompt in shards[i].prompts}) == sum(sizes)


def test_a_prompt_in_two_splits_has_one_owner():
    """Ten prompts stand in both splits: every one is one agent's, with its own split's rows."""
    pairs = [Pair(f"p{i}", f"{split} good {i}", f"bad {i}", split) for split in "ab"
             for i in range(10)]
    _, shards, _ = shards_of(pairs, 2, "split", n_pairs=1, n_eval=2)
    assert sorted(p for shard in shards for p in shard.prompts) == sorted(
        {p for shard in shards for p in shard.prompts}) and all(s.prompts for s in shards)
    for shard, split in zip(shards, "ab", strict=True):
        assert {pair.split for pair in shard.train + shard.heldout} == {split}
        assert shard.splits == (split,) and shard.rows == len(shard.prompts)
    assert sum(shard.rows for shard in shards) == 8


def test_the_seed_alone_decides_who_gets_what():
    pairs = pairs_of("a", 40)
    assert shards_of(pairs, 2, "iid", seed=0) != shards_of(pairs, 2, "iid", seed=1)
    # Evaluation prompts are drawn from a sorted list: the order of the rows does not change them.
    assert shards_of(pairs[::-1], 2, "iid")[0] == shards_of(pairs, 2, "iid")[0]


@pytest.mark.parametrize("agents, n_pairs, n_eval, n_judge, says", [
    (9, 1, 2, 0, "10 distinct prompts are too few for 9 agents and 2 evaluation prompts"),
    (2, 1, 9, 0, "10 distinct prompts are too few for 2 agents and 9 evaluation prompts"),
    (2, 4, 2, 0, "1 of them held out, and --pairs asks for 4: lower --pairs to 3"),
    (6, 1, 2, 5, "agent 3 has no prompt .* lower --eval-prompts or --agents"),  # 3 rows for 6
    (3, 1, 2, 5, "usable preference rows .* lower --agents")])  # one row each, which is held out
def test_too_little_data_says_what_to_lower(agents, n_pairs, n_eval, n_judge, says):
    with pytest.raises(UserError, match=says) as error:
        shards_of(pairs_of("a", 10), agents, "iid", n_pairs, n_eval, n_judge=n_judge)
    assert "--pairs to 0" not in str(error.value)  # which would be refused in its turn


def test_the_remedy_of_too_little_data_is_enough_for_every_agent():
    """Splits of 40, 20 and 12 rows: the error speaks of the poorest agent, and its advice works."""
    pairs = pairs_of("a", 40) + pairs_of("b", 20) + pairs_of("c", 12)
    with pytest.raises(UserError, match="agent 2 has") as error:
        shards_of(pairs, 3, "split", n_pairs=20)
    enough = int(re.search(r"lower --pairs to (\d+)", str(error.value))[1])
    assert all(len(shard.train) == enough for shard in shards_of(pairs, 3, "split", enough)[1])


def test_held_out_pairs_are_a_fifth_and_at_most_256():
    for rows, heldout in ((4, 1), (10, 2), (100, 20), (5000, 256)):
        _, (shard,), _ = shards_of(pairs_of("a", rows + 1), 1, "iid", n_pairs=1, n_eval=1)
        assert len(shard.heldout) == heldout


def test_pool_is_everything_once():
    _, shards, _ = shards_of(pairs_of("ab", 20, prompts=10), 4, "iid")
    pooled = data.pool(shards)
    assert pooled.train == [pair for shard in shards for pair in shard.train]
    assert pooled.heldout == [pair for shard in shards for pair in shard.heldout]
    assert sorted(pooled.prompts) == sorted({prompt for s in shards for prompt in s.prompts})


# ------------------------------------------------------------------------------------------ tokens


def test_pad_by_hand():
    ids, mask = data.pad([[5, 6, 7], [8], []], 1, "left")
    assert ids.tolist() == [[5, 6, 7], [1, 1, 8], [1, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    ids, mask = data.pad([[5, 6, 7], [8]], 1, "right")
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@given(st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=5),
       st.sampled_from(["left", "right"]))
def test_pad_loses_and_adds_nothing(sequences, side):
    ids, mask = data.pad(sequences, 1, side)
    assert ids.shape == mask.shape == (len(sequences), max(map(len, sequences)))
    assert [row[valid.bool()].tolist() for row, valid in zip(ids, mask, strict=True)] == sequences
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
    (prompt,) = data.encode_prompts(tokenizer, ["The room was"])
    ids = prompt + data.encode_response(tokenizer, "lovely and calm.", 99, eos=False)
    assert tokenizer.decode(ids) == "The room was lovely and calm."
    assert ids == tokenizer("The room was lovely and calm.")["input_ids"]


def test_a_response_ends_with_eos_only_if_it_was_not_cut(tokenizer):
    """Detail 8: generated responses end with EOS inside max_tokens, or are cut without one."""
    text = "lovely and calm."
    whole = tokenizer(" " + text)["input_ids"]
    assert len(whole) == 4 and data.encode_response(tokenizer, text, 99, eos=False) == whole
    assert data.encode_response(tokenizer, text, 5, eos=True) == [*whole, 0]
    assert data.encode_response(tokenizer, text, 4, eos=True) == whole
    assert data.encode_response(tokenizer, text, 3, eos=True) == whole[:3]
    assert data.encode_response(tokenizer, text, 3, eos=False) == whole[:3]


def test_an_empty_response_is_eos_alone(tokenizer):
    embedded = AutoTokenizer.from_pretrained(load.home("tiny/model"))
    for each in (tokenizer, embedded):
        assert data.encode_response(each, "", 5, eos=True) == [each.eos_token_id]


def framed(tokenizer, before, after):
    """A copy that puts special tokens around every text, as Llama's and T5's do."""
    twin = copy.deepcopy(tokenizer)
    special = [(token, twin.convert_tokens_to_ids(token)) for token in {*before, *after}]
    twin.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=special)
    return twin


def test_what_a_tokenizer_puts_around_a_text_stands_before_prompts_alone_and_once(tokenizer):
    end = tokenizer.eos_token
    plain = tokenizer("The room was")["input_ids"]
    for before, after, ids in (([], [end], plain), ([end], [], [0, *plain]),
                               ([end], [end], [0, *plain]), ([], [], plain)):
        twin = framed(tokenizer, before, after)
        assert data.encode_prompts(twin, ["The room was"]) == [ids]
        if before:  # BOS in the text already
            assert data.encode_prompts(twin, [end + "The room was"]) == [ids]
        assert data.encode_prompts(twin, ["The room was" + end]) == [ids]
        assert data.encode_prompts(twin, ["The room was"], templated=True) == [plain]
        response = data.encode_response(twin, "lovely", 9, eos=True, prompt="The room was")
        assert response == [*tokenizer(" lovely")["input_ids"], 0]


def test_special_tokens_in_a_response_end_it_or_are_text(tokenizer):
    end, padding = tokenizer.eos_token, "<|padding|>"
    ids = tokenizer(" lovely")["input_ids"]
    for text in (f"lovely{end}", f"lovely {end}", f"lovely {end} and so on {end}"):
        assert data.encode_response(tokenizer, text, 9, eos=True) == [*ids, 0]
        assert data.encode_response(tokenizer, text, 9, eos=False) == ids
    assert data.encode_response(tokenizer, end, 9, eos=True) == [0]
    found = data.encode_response(tokenizer, f"lovely {padding}", 99, eos=False)
    assert 1 not in found and tokenizer.decode(found) == f" lovely {padding}"
    assert tokenizer(padding)["input_ids"] == [1], "the tokenizer is as it was"


def test_a_tokenizer_that_prepends_a_space_is_not_asked_for_two():
    """Llama 2 has a Prepend normalizer: what follows a prompt is not what a text begins with."""
    tokenizer = worlds.prepending_tokenizer()
    whole = tokenizer("The room was lovely", add_special_tokens=False)["input_ids"]
    alone = tokenizer(" lovely", add_special_tokens=False)["input_ids"]
    prompt, = data.encode_prompts(tokenizer, ["The room was"])
    response = data.encode_response(tokenizer, "lovely", 99, eos=False)
    assert prompt + response == whole and whole[-len(alone):] != alone
    assert data.encode_response(tokenizer, "lovely", 99, False, "The room was") == response
    templated = data.encode_response(tokenizer, "lovely", 99, False, "[/INST]\n", "")
    assert tokenizer.decode(templated) == "lovely"


def test_a_prompt_is_shown_as_the_dataset_has_it(tokenizer):
    """Decoding would drop special tokens and change spaces: a rule reads the text of the row."""
    text = "<|endoftext|> The  room\t was"
    ids, mask = data.pad([tokenizer(text)["input_ids"], tokenizer("The song")["input_ids"]], 1,
                         "left")
    response = data.pad([[0], [0]], 1, "right")
    seen = []

    def rule(prompts, responses, ended):
        seen.extend(prompts)
        return [0.0] * len(prompts)
    texts = {tuple(tokenizer(text)["input_ids"]): text}
    data.text_scorer(rule, "rule", tokenizer, texts)(ids, mask, *response)
    assert seen == [text, "The song"]


def test_any_of_several_ids_ends_a_response(tokenizer):
    """In what was sampled, and in a text of the data: special ones by name, others by id."""
    dot, = tokenizer(".")["input_ids"]
    for text, eos_id in (("lovely <|padding|> and so", (0, 1)), ("lovely. And so", (0, dot))):
        ids = data.encode_responses(tokenizer, [("The room", " ", text)], 9, True, eos_id)[0]
        assert ids == [*tokenizer(" lovely")["input_ids"], 0]
    ends = []

    def rule(prompts, responses, ended):
        ends.append(ended)
        return [0.0] * len(prompts)
    prompt = data.pad([[5], [5], [5]], 1, "left")
    response = data.pad([[7, 0], [7, 9], [7, 8]], 1, "right")
    data.text_scorer(rule, "rule", tokenizer, eos_id=(0, 9))(*prompt, *response)
    data.text_scorer(rule, "rule", tokenizer)(*prompt, *response)
    assert ends == [[True, True, False], [True, False, False]]


def test_decode_skips_special_and_padded_tokens(tokenizer):
    one, two = tokenizer([" lovely and", " calm"])["input_ids"]
    ids, mask = data.pad([[*one, 0], two], 1, "right")
    ids[mask == 0] = one[0]  # behind the mask anything may stand
    assert data.decode(tokenizer, ids, mask) == ["lovely and", "calm"]


# -------------------------------------------------------------------------------- the reward model


@pytest.fixture(scope="module")
def causal():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(worlds.config(num_hidden_layers=1)).eval()


@pytest.fixture(scope="module")
def absolute():
    """A GPT-2: GPT-NeoX's positions are relative, and forgive ids that count the padding."""
    torch.manual_seed(0)
    shape = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=352, n_positions=64)
    return GPT2LMHeadModel(shape).eval()


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def reward_model(causal, pooling):
    return data.RewardModel(causal, pooling, stream())


def fit(model, pairs, **changes):
    options = {"lr": 1e-3, "epochs": 1, "batch": 4, "generator": stream()}
    return data.fit_reward_model(model, pairs, 1, **options | changes)


def plain_score(model, sequence):
    """A row by itself: no padding, no mask, no batch; the pooling written out as a loop."""
    states = model.trunk(input_ids=torch.tensor([sequence])).last_hidden_state[0]
    if model.pooling == "last":
        pooled = states[-1]
    else:
        pooled = sum(states[t] for t in range(len(sequence))) / len(sequence)
    products = [a * b for a, b in zip(pooled, model.head.weight[0], strict=True)]
    return float(sum(products) + model.head.bias[0])


SEQUENCES = [[5, 9, 300, 7, 2], [11], [40, 41, 42, 0], [100, 100, 7]]


@torch.no_grad()
@pytest.mark.parametrize("family", ["causal", "absolute"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_never_changes_a_score(request, family, pooling):
    """Details 1 and 8: left, right or no padding score alike, whatever stands in the padding."""
    model = reward_model(request.getfixturevalue(family), pooling)
    plain = torch.tensor([plain_score(model, sequence) for sequence in SEQUENCES])
    assert plain.std() > 0.1  # the comparison is not between constants

    def check(ids, mask):
        torch.testing.assert_close(model(ids, mask), plain, atol=1e-6, rtol=0)
    for side in ("left", "right"):
        ids, mask = data.pad(SEQUENCES, 1, side)
        check(ids, mask)
        check(torch.where(mask == 1, ids, torch.randint(2, 352, ids.shape, generator=stream(3))),
              mask)
    ids, mask = data.pad([[1, *sequence] for sequence in SEQUENCES], 1, "right")
    mask[:, 0] = 0  # padded on both sides, as a left-padded prompt with a short response is
    check(ids, mask)


@torch.no_grad()
def test_a_padded_position_that_is_nan_is_selected_away(causal):
    class Spoiled(data.RewardModel):
        def states(self, ids, mask):
            return super().states(ids, mask).masked_fill(mask[..., None] == 0, torch.nan)
    ids, mask = data.pad(SEQUENCES, 1, "right")
    expected = reward_model(causal, "mean")(ids, mask)
    assert torch.equal(Spoiled(causal, "mean", stream())(ids, mask), expected)


class Wide(torch.nn.Module):
    """A trunk of which only the width is real."""

    def forward(self, input_ids):
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 9999))


def test_the_reward_model_is_a_copy_of_the_trunk_with_a_small_random_head(causal):
    """Detail 20: std 1/sqrt(D + 1), bias 0; detail 28: all is trained, the policy untouched."""
    model = reward_model(causal, "mean")
    for mine, theirs in zip(model.trunk.parameters(), causal.base_model.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
        assert mine.requires_grad
    assert torch.equal(model.head.weight, torch.randn(1, 32, generator=stream()) / 33 ** 0.5)
    assert model.head.bias.item() == 0
    wide = torch.nn.Module()
    wide.base_model, wide.device = Wide(), "cpu"
    assert 0.0097 < reward_model(wide, "mean").head.weight.std() < 0.0103  # 1/sqrt(10000)


def preferences(n, seed):
    """n pairs of ids: after a common prompt, chosen has tokens of 10..59, rejected of 60..109."""
    rng = random.Random(seed)

    def draw(low):
        return [rng.randrange(low, low + 50) for _ in range(rng.randrange(4, 7))]
    prompts = ([rng.randrange(110, 300)] * 2 for _ in range(n))
    return [(prompt + draw(10), prompt + draw(60)) for prompt in prompts]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_reward_model_learns_a_separable_preference(causal, pooling):
    model, heldout = reward_model(causal, pooling), preferences(200, seed=1)
    assert 0.3 < data.preference_accuracy(model, heldout, 1) < 0.7
    loss = fit(model, preferences(96, seed=0), lr=3e-3, epochs=4, batch=16)
    assert data.preference_accuracy(model, heldout, 1) > 0.9
    assert loss < 0.2 < math.log(2)
    assert all(parameter.grad is None for parameter in model.parameters())  # their memory is free


def test_the_loss_of_the_first_step_is_minus_log_sigmoid_of_the_margin(causal):
    """Row by row in Python: the mean of log(1 + exp(-(r_chosen - r_rejected))), before the step."""
    model, pairs = reward_model(causal, "mean"), preferences(7, seed=2)
    with torch.no_grad():
        margins = [plain_score(model, chosen) - plain_score(model, rejected)
                   for chosen, rejected in pairs]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 7
    assert fit(model, pairs, batch=7) == pytest.approx(expected, abs=1e-6)
    # With steps of size 0, batches of 4 and 3 give the same mean: a batch counts by its rows.
    cut = fit(reward_model(causal, "mean"), pairs, lr=0.0)
    assert cut == pytest.approx(expected, abs=1e-6)


def test_the_learning_rate_falls_linearly_to_zero_and_adam_has_eps_1e_5(causal, monkeypatch):
    """Detail 20. Two epochs of 2 steps: lr, 3/4 lr, 1/2 lr, 1/4 lr."""
    seen, step = [], torch.optim.Adam.step

    def recorded(self, *args, **kwargs):
        seen.append((self.param_groups[0]["lr"], self.param_groups[0]["eps"]))
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    fit(reward_model(causal, "mean"), preferences(6, seed=0), lr=0.008, epochs=2)
    assert [lr for lr, _ in seen] == pytest.approx([0.008, 0.006, 0.004, 0.002])
    assert {eps for _, eps in seen} == {1e-5}


def test_each_epoch_shows_every_pair_once_by_default_in_batches_of_16(causal, monkeypatch):
    shown, both = [], data._both
    monkeypatch.setattr(data, "_both", lambda read, pairs, *args: (
        shown.append(pairs) or both(read, pairs, *args)))
    pairs = preferences(40, seed=0)
    data.fit_reward_model(reward_model(causal, "mean"), pairs, 1, lr=0.0, epochs=2,
                          generator=stream())
    assert [len(batch) for batch in shown] == [16, 16, 8] * 2
    for epoch in (shown[:3], shown[3:]):
        assert sorted(pair for batch in epoch for pair in batch) == sorted(pairs)
    assert shown[:3] != shown[3:]  # in another order


def test_preference_accuracy_counts_a_tie_half(causal):
    """Scores that are the last id: 2>1 and 9>5 are right, 1<2 is not, 3=3 is a tie: 2.5 / 4."""
    model = reward_model(causal, "last")
    model.forward = lambda ids, mask: torch.stack([row[valid.bool()][-1].float()
                                                   for row, valid in zip(ids, mask, strict=True)])
    pairs = [([7, 2], [1]), ([1], [7, 7, 2]), ([3], [3]), ([9], [5])]
    assert data.preference_accuracy(model, pairs, 1) == 0.625
    assert data.preference_accuracy(model, pairs, 1, batch=3) == 0.625


# ----------------------------------------------------------------------------------------- scorers


@pytest.fixture
def batch(tokenizer):
    return worlds.batch_of(tokenizer, ["The room", "The song was so"], ["lovely and calm|", "dull"])


def test_model_scorer_reads_prompt_and_response_as_one_text(causal, batch):
    model = reward_model(causal, "last")
    rows = [[*prompt[prompt_mask.bool()].tolist(), *response[response_mask.bool()].tolist()]
            for prompt, prompt_mask, response, response_mask in zip(*batch, strict=True)]
    scores = data.model_scorer(model)(*batch)
    assert not scores.requires_grad
    with torch.no_grad():
        expected = [plain_score(model, row) for row in rows]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_mean_of_scorers_is_taken_for_each_response(batch):
    scorers = [lambda *batch: torch.tensor([1.0, 2.0]), lambda *batch: torch.tensor([4.0, -2.0])]
    assert data.mean_scorer(scorers)(*batch).tolist() == [2.5, 0.0]


def test_normalised_has_mean_0_and_std_1_on_its_samples():
    """Detail 19. Scores 1, 3 and 8: mean 4, std sqrt((9 + 1 + 16) / 3)."""
    def scorer(prompt, prompt_mask, response, mask):
        return response[:, 0].float()
    samples = None, None, torch.tensor([[1], [3], [8]]), None
    scaled, mean, std = data.normalised(scorer, samples)
    assert mean == 4 and std == pytest.approx((26 / 3) ** 0.5)
    scores = scaled(*samples)
    torch.testing.assert_close(scores, torch.tensor([-3.0, -1.0, 4.0]) / (26 / 3) ** 0.5)
    assert scores.mean().abs() < 1e-6 and abs(scores.std(correction=0) - 1) < 1e-6


@pytest.mark.parametrize("samples", [1, 3])
def test_a_constant_reward_is_shifted_only(samples):
    scaled, mean, std = data.normalised(lambda *batch: torch.full((len(batch[0]),), 7.0),
                                        (torch.zeros(samples, 1),) * 4)
    assert (mean, std) == (7.0, 0.0)
    assert scaled(*[torch.zeros(2, 1)] * 4).tolist() == [0.0, 0.0]


def test_text_scorer_gives_the_function_plain_texts_and_how_they_ended(tokenizer, batch):
    seen = []

    def function(prompts, responses, ended):
        seen.append((prompts, responses, ended))
        return [len(response) for response in responses]
    scores = data.text_scorer(function, "judge", tokenizer)(*batch)
    assert seen == [(["The room", "The song was so"], ["lovely and calm", "dull"], [True, False])]
    assert scores.tolist() == [15.0, 4.0] and scores.dtype == torch.float32


def test_an_eos_behind_the_mask_is_no_end(tokenizer):
    prompt, mask = torch.tensor([[5]]), torch.tensor([[1]])
    score = data.text_scorer(lambda prompts, responses, ended: [float(ended[0])], "j", tokenizer)
    assert score(prompt, mask, torch.tensor([[7, 0]]), torch.tensor([[1, 1]])).item() == 1
    assert score(prompt, mask, torch.tensor([[7, 0]]), torch.tensor([[1, 0]])).item() == 0


@pytest.mark.parametrize("returned", [
    [1.0], [1.0, 2.0, 3.0], 1.0, [[1.0], [2.0]], [1.0, math.nan], [1.0, math.inf], None,
    ["good", "bad"], [1.0, None], {"a": 1}], ids=repr)
def test_a_function_that_does_not_return_a_number_each_is_named(tokenizer, batch, returned):
    scorer = data.text_scorer(lambda *args: returned, "mine.py:judge", tokenizer)
    with pytest.raises(UserError, match=r"mine\.py:judge.*one finite number per response"):
        scorer(*batch)


@pytest.mark.parametrize("returned", [
    (1, 2), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).double().numpy()],
    ids=["tuple", "tensor", "array"])
def test_a_function_may_return_any_row_of_numbers(tokenizer, batch, returned):
    scorer = data.text_scorer(lambda *args: returned, "judge", tokenizer)
    assert scorer(*batch).tolist() == [1.0, 2.0]


def test_a_function_that_raises_is_named_in_one_line_with_its_place(tokenizer, batch):
    def judge(prompts, responses, ended):
        raise KeyError("lexicon\nis gone")
    with pytest.raises(UserError, match=r"mine\.py:judge.*KeyError.*test_data\.py, line") as error:
        data.text_scorer(judge, "mine.py:judge", tokenizer)(*batch)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- random streams


def test_a_stream_depends_on_its_seed_and_name_alone():
    again, once = (torch.rand(4, generator=data.generator(0, 1, "sampling")) for _ in range(2))
    assert torch.equal(again, once)
    names = [(), ("sampling",), (1, "sampling"), (11, "sampling"), ("1", "sampling"), (1, "peers")]
    seeds = [data.generator(seed, *name).initial_seed() for seed in (0, 1, 11) for name in names]
    assert len(set(seeds)) == 18
    # A run's numbers follow from these digests: another form of them would change every result.
    digest = hashlib.sha256(b"(3, 1, 'sampling')").digest()
    assert data.generator(3, 1, "sampling").initial_seed() == int.from_bytes(digest[:8], "big") // 2

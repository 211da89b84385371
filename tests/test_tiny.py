"""tiny/: the judge's terms worked by hand, the grammar, the shipped data and the shipped model.

In reading order: judge, grammar, data, tokenizer and model, and the script as a whole.
"""

import importlib
import importlib.util
import json
import random
import sys
from math import tanh
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

TINY = Path(__file__).resolve().parent.parent / "tiny"
sys.path.insert(0, str(TINY))  # as for `python tiny/make.py`
judge, make = importlib.import_module("judge"), importlib.import_module("make")
sys.path.remove(str(TINY))

FILES = sorted((TINY / "data").glob("*.jsonl"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY / "model").eval()


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------------------- judge

ONE, TWO, FOUR = 0.693176, 1.142391, 1.446041  # 1.5 * tanh(S / 2) for S = 1, 2, 4
VIVID, VIVID4 = 0.462117, 0.964028  # tanh(D / 2) for D = 1, 4

CASES = [  # prompt, response, ended, gold
    # sentiment and vividness
    ("the soup was", "large .", True, 0.0),
    ("the soup was", "tasty .", True, ONE),  # a word of the topic
    ("the soup was", "great .", True, ONE),  # a word that fits every topic
    ("the soup was", "bland .", True, -ONE),
    ("the soup was", "tasty but bland .", True, 0.0),  # S = 1 - 1
    ("the soup was", "golden .", True, VIVID),
    ("the soup was", "very tasty and golden .", True, ONE + VIVID),
    ("the tasty soup was", "large .", True, 0.0),  # the prompt's own words earn nothing
    # saturation: four positive and four vivid words, which fit into 16 words, come near 1.5 + 1
    ("the soup was", "great and good and lovely and tasty and golden and smoky and crunchy and "
     "buttery .", True, FOUR + VIVID4),
    # repeats: each later use of a noun or an adjective; the sentiment counts once, function words
    # are free
    ("the soup was", "tasty and tasty .", True, ONE - 0.3),
    ("the soup was", "tasty and tasty and tasty .", True, ONE - 0.6),
    ("the soup was", "large . the bread was small . the bread was new .", True, -0.3),
    ("the soup was", "very large and very small and very new .", True, 0.0),
    ("the soup was", "large . the soup was small .", True, 0.0),  # the prompt's noun does not count
    # word order: inside the response, at the junction, at the end
    ("the soup was", "very tasty great .", True, TWO - 0.5),  # ADJ ADJ
    ("the soup was", "tasty the .", True, ONE - 1.0),  # ADJ DET, DET STOP
    ("the soup", "tasty .", True, ONE - 0.5),  # NOUN ADJ
    ("the soup was", "tasty", True, ONE - 0.5),  # ADJ END
    ("the soup was", "", True, -0.5),  # COP END
    ("the soup was", "<unk> .", True, -1.0),  # not a word of this world: both its pairs are illegal
    # off topic: charged, and neither its sentiment nor its vividness counts
    ("the soup was", "catchy .", True, -0.4),
    ("the soup was", "tasty and glowing .", True, ONE - 0.4),
    ("the soup was", "great . the song was great .", True, ONE - 0.4 - 0.3),
    ("it was", "great and tasty .", True, ONE - 0.4),  # a prompt without a noun has no topic
    # not ended: -1, and no pair with the end
    ("the soup was", "tasty", False, ONE - 1.0),
    ("the soup was", "tasty .", False, ONE - 1.0),
]


@pytest.mark.parametrize(("prompt", "response", "ended", "gold"), CASES)
def test_gold_worked_by_hand(prompt, response, ended, gold):
    assert judge.score([prompt], [response], [ended]) == [pytest.approx(gold, abs=1e-6)]
    assert sum(judge.terms(prompt, response, ended).values()) == pytest.approx(gold, abs=1e-6)


def test_score_keeps_the_order_of_a_batch_and_refuses_unequal_lengths():
    prompts, responses, ended, gold = (list(column) for column in zip(*CASES, strict=True))
    assert judge.score(prompts, responses, ended) == pytest.approx(gold, abs=1e-6)
    with pytest.raises(ValueError):
        judge.score(prompts, responses[1:], ended)


def test_rewards_saturate():
    words = "great good lovely wonderful excellent charming".split()
    golds = judge.score(
        ["the soup was"] * 6, [" and ".join(words[: n + 1]) + " ." for n in range(6)], [True] * 6
    )
    gains = [after - before for before, after in zip([0.0, *golds], golds, strict=False)]
    assert all(0 < later < earlier for earlier, later in zip(gains, gains[1:], strict=False))
    assert golds[-1] < 1.5


def test_lexicon_is_a_world_of_eight_equal_topics():
    assert 168 <= len(judge.LEXICON) <= 300 and len(judge.TOPICS) == 8
    entries = list(judge.LEXICON.values())
    for topic in judge.TOPICS:
        own = [entry for entry in entries if entry.topic == topic]
        assert [entry.kind for entry in own].count("NOUN") == 6
        adjectives = [(entry.sentiment, entry.vivid) for entry in own if entry.kind == "ADJ"]
        assert sorted(adjectives) == [(-1, 0)] * 2 + [(0, 1)] * 4 + [(1, 0)] * 2
    assert sum(entry.sentiment for entry in entries) == 0
    assert all(entry.kind == "ADJ" for entry in entries if entry.sentiment or entry.vivid)
    assert all(word == word.strip().lower() and " " not in word for word in judge.LEXICON)


def test_judge_loads_alone_from_its_path():
    spec = importlib.util.spec_from_file_location("a_judge_of_any_name", TINY / "judge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # not in sys.modules, its folder not on the path
    assert module.score(["the soup was"], ["tasty ."], [True]) == [1.5 * tanh(0.5)]


# ------------------------------------------------------------------------------------------ grammar


def test_grammar_breaks_no_rule_of_the_judge():
    rng = random.Random(1)
    for topic in judge.TOPICS:
        for _ in range(200):
            text = make.Review(rng, topic).write()
            first, rest = text.split(maxsplit=1)
            assert first in judge.OTHER_WORDS["DET"].split() and judge.topic_of(text) == topic
            assert judge.illegal_pairs(first, rest, True) == 0
            assert judge.terms(text, text, True)["off_topic"] == 0  # as if in response to itself


def test_grammar_writes_both_moods_and_both_styles():
    rng = random.Random(2)
    texts = [make.write_review(rng) for _ in range(2000)]
    entries = [[judge.LEXICON[word] for word in text.split()] for text in texts]
    sentiment = [sum(entry.sentiment for entry in text) for text in entries]
    vivid = [sum(entry.vivid for entry in text) for text in entries]
    assert min(sentiment) <= -4 and max(sentiment) >= 4
    assert abs(sum(sentiment)) < 0.2 * len(sentiment)
    assert min(vivid) == 0 and max(vivid) >= 4
    assert {word for text in texts for word in text.split()} == set(judge.LEXICON)


def test_grammar_and_prompts_reproduce():
    def reviews(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [make.write_review(rng) for _ in range(20)]

    assert reviews(1) == reviews(1) != reviews(2)
    prompts = make.write_prompts(random.Random(3), "film", 50)
    assert prompts == make.write_prompts(random.Random(3), "film", 50) and len(set(prompts)) == 50


# --------------------------------------------------------------------------------------------- data


def test_one_file_per_topic():
    assert [path.stem for path in FILES] == sorted(judge.TOPICS)
    assert all(path.stat().st_size < 1_000_000 for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows(path):
    rows = rows_of(path)
    assert len(rows) == make.ROWS == len({row["prompt"] for row in rows})
    for row in rows:
        assert list(row) == ["prompt", "chosen", "rejected"]
        words = row["prompt"].split()
        assert 3 <= len(words) <= 6 and words[-1] != "."
        assert judge.topic_of(row["prompt"]) == path.stem
        for side in ("chosen", "rejected"):
            user, assistant = row[side]
            assert user == {"role": "user", "content": row["prompt"]}
            assert assistant["role"] == "assistant" and 1 <= len(assistant["content"].split()) <= 20
            for text in (row["prompt"], assistant["content"]):
                assert text == " ".join(text.split()) and set(text.split()) <= set(judge.LEXICON)
        assert row["chosen"] != row["rejected"]


def test_prompts_are_those_that_the_script_writes():
    for path in FILES:
        rng = random.Random(f"{make.SEED} {path.stem}")
        left = iter(make.write_prompts(rng, path.stem, make.ROWS + make.ROWS // 10))
        # Some are left out, the order stays.
        assert all(row["prompt"] in left for row in rows_of(path))


def test_labels_follow_the_gold_score_with_noise():
    golds = []
    for row in (row for path in FILES for row in rows_of(path)):
        texts = [row[side][1]["content"] for side in ("chosen", "rejected")]
        ended = [make.has_ended(text) for text in texts]
        golds.append(judge.score([row["prompt"]] * 2, texts, ended))
    differences = torch.tensor(golds).diff(dim=1).squeeze(1).neg()  # chosen minus rejected
    # Bradley-Terry: the chosen one is the better one with probability sigmoid(3 |difference|)
    expected = torch.sigmoid(make.LABEL_SCALE * differences.abs())
    observed = (differences > 0).float() + 0.5 * (differences == 0).float()
    error = (observed - expected).mean().item()
    assert abs(error) < 0.02  # 4,800 pairs: four standard errors
    assert 0.05 < (differences < 0).float().mean() < 0.2


def test_initial_policy_leaves_room_above_it():
    samples = [(row["prompt"], row[side][1]["content"])
               for path in FILES for row in rows_of(path) for side in ("chosen", "rejected")]
    ended = [make.has_ended(response) for _, response in samples]
    gold = torch.tensor(judge.score(*map(list, zip(*samples, strict=True)), ended))
    assert 0.0 < gold.mean() < 0.4 and gold.std() > 0.8 and gold.max() > 2.2
    assert 0.85 < sum(ended) / len(ended) < 0.97


# ------------------------------------------------------------------------------ tokenizer and model


def test_special_tokens_stand_where_pythia_has_them(tokenizer, model):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|padding|>", 1)
    assert tokenizer.unk_token_id == 2 and tokenizer.bos_token is None
    assert tokenizer("the soup")["input_ids"] == tokenizer.convert_tokens_to_ids(["the", "soup"])
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)


def test_tokenizer_holds_every_word_and_round_trips(tokenizer):
    assert len(tokenizer) == 3 + len(judge.LEXICON)
    for path in FILES:
        texts = [f"{row['prompt']} {row['chosen'][1]['content']}" for row in rows_of(path)]
        ids = tokenizer(texts)["input_ids"]
        assert tokenizer.unk_token_id not in {token for row in ids for token in row}
        assert [len(row) for row in ids] == [len(text.split()) for text in texts]
        assert [text.strip() for text in tokenizer.batch_decode(ids)] == texts
        halves = tokenizer.decode(ids[0][:2]), tokenizer.decode(ids[0][2:])
        assert "".join(halves) == tokenizer.decode(ids[0])
    assert tokenizer("xylophone")["input_ids"] == [tokenizer.unk_token_id]


def test_a_larger_model_speaks_the_same_words(tokenizer, model):
    """For agents of different sizes: one vocabulary, and as good a language model."""
    folder = TINY / "model-96x3"
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    larger = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert larger.num_parameters() > 2.5 * model.num_parameters()
    rng = random.Random(5)
    reviews = [make.write_review(rng) for _ in range(200)]
    with torch.no_grad():
        losses = [make.language_loss(one, tokenizer, reviews).item() for one in (model, larger)]
    assert losses[1] < losses[0] + 0.05 < 3


def test_model_is_small_float32_and_has_rows_without_a_token(tokenizer, model):
    weights = TINY / "model" / "model.safetensors"
    assert weights.stat().st_size < 4_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows > len(tokenizer) and rows % 16 == 0
    assert model.get_output_embeddings().weight.shape[0] == rows
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert (model.config.attention_dropout, model.config.hidden_dropout) == (0.0, 0.0)
    assert (model.config.model_type, model.config.use_parallel_residual) == ("gpt_neox", True)


@torch.no_grad()
def test_model_has_learned_the_grammar(tokenizer, model):
    rng = random.Random(4)
    texts = [make.write_review(rng) for _ in range(200)]
    shuffled = [" ".join(rng.sample(words, len(words))) for words in map(str.split, texts)]
    assert make.language_loss(model, tokenizer, texts) < 2.6
    assert make.language_loss(model, tokenizer, shuffled) > 5.0


def test_model_works_in_a_pipeline():
    write = pipeline("text-generation", model=str(TINY / "model"))
    text = write("the soup was", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert text.startswith("the soup was ") and set(text.split()) <= set(judge.LEXICON)


# ---------------------------------------------------------------------------- the script as a whole


@pytest.mark.slow
def test_script_writes_the_same_bytes_twice(tmp_path, monkeypatch, capsys):
    for name, value in {"STEPS": 12, "WARMUP": 3, "ROWS": 10, "TOPICS": judge.TOPICS[:2]}.items():
        monkeypatch.setattr(make, name, value)
    threads = torch.get_num_threads()
    try:
        for out in ("a", "b"):
            make.main(["--out", str(tmp_path / out)])
    finally:  # the script sets these for the whole process
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    first, second = tmp_path / "a", tmp_path / "b"
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) >= 2 + 4
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    assert "gold, mean" in capsys.readouterr().out

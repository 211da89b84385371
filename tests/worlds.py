"""Worlds small enough for tests, as a user would have them on disk: tokenizer, model, rows."""

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import data

TOPICS = ("room", "song", "film", "soup", "garden", "trip", "novel", "phone")
GOOD, BAD = ("bright", "lovely", "golden", "calm"), ("dull", "broken", "grey", "noisy")


def save_tokenizer(folder: Path, padding: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like Pythia's: EOS at id 0, `<|padding|>` at id 1, no pad set."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = GOOD + BAD
    texts = [f"The {topic} was {a} and {b}." for topic in TOPICS for a in words for b in words]
    special = ["<|endoftext|>", "<|padding|>"] if padding else ["<|endoftext|>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if eos:
        fast.eos_token = "<|endoftext|>"
    fast.save_pretrained(folder)
    return fast


def prepending_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer as Llama 2's: a space is put before every text, and spaces are letters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    texts = [f"The {topic} was {word}." for topic in TOPICS for word in GOOD + BAD]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=[chr(i) for i in range(33, 127)] + ["\n"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>")


def config(**changes) -> GPTNeoXConfig:
    """A GPT-NeoX of hidden size 32 whose embedding has more rows than the tokenizer has tokens."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 64, "vocab_size": 352, "max_position_embeddings": 64,
             "rotary_pct": 0.25, "use_parallel_residual": True, "bos_token_id": 0,
             "eos_token_id": 0}
    return GPTNeoXConfig(**(small | changes))


def save_model(folder: Path, dtype: torch.dtype = torch.float16, **changes) -> Path:
    """A random GPT-NeoX with its tokenizer, in the type that Pythia's checkpoint has."""
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config(**changes)).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_offset_model(folder: Path, offset: float, tied: bool = False, **changes) -> Path:
    """One whose logits all lie about a number, as Pythia-70M's about 1,070: no probability knows.

    Its last layer norm ends on about 5 everywhere, and all rows of the output embedding are raised.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 64} | changes
    model = GPTNeoXForCausalLM(config(tie_word_embeddings=tied, **shape))
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias.fill_(5.0)
        model.get_output_embeddings().weight.add_(offset / (5 * shape["hidden_size"]))
    model.half().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def batch_of(tokenizer, prompts: list[str], responses: list[str]) -> tuple[torch.Tensor, ...]:
    """Texts as the sampler leaves them, with pad id 1; a response that ends in "|" has EOS."""
    prompt = data.pad(data.encode_prompts(tokenizer, prompts), 1, "left")
    response = [data.encode_response(tokenizer, text.rstrip("|"), 99, eos=text.endswith("|"))
                for text in responses]
    return *prompt, *data.pad(response, 1, "right")


def text_rows(n: int, seed: int = 0, equal: int = 0) -> list[dict]:
    """n rows with distinct prompts, preferring good words; the first `equal` prefer nothing."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        chosen, rejected = (f"{rng.choice(words)} and {rng.choice(words)}."
                            for words in (GOOD, BAD))
        rows.append({"prompt": f"The {TOPICS[i % len(TOPICS)]} {i} was", "chosen": chosen,
                     "rejected": chosen if i < equal else rejected})
    return rows


def chat_rows(n: int, seed: int = 0, equal: int = 0) -> list[dict]:
    """The same in the schema of trl-internal-testing/descriptiveness-sentiment-trl-style."""
    def messages(row: dict, name: str) -> list[dict]:
        return [{"content": row["prompt"], "role": "user"},
                {"content": row[name], "role": "assistant"}]
    return [{"prompt": row["prompt"], "chosen": messages(row, "chosen"),
             "rejected": messages(row, "rejected")} for row in text_rows(n, seed, equal)]


@contextlib.contextmanager
def refused(says):
    """What is inside raises a UserError of one line in which the pattern `says` stands."""
    with pytest.raises(data.UserError, match=says) as error:
        yield
    assert "\n" not in str(error.value)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

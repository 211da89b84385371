"""Makes all in tiny/ but the judge: two small trained GPT-NeoX, and preference data sampled from
the smaller one.

    python tiny/make.py [--out DIR]    about 3 minutes on one core; writes DIR/model, DIR/data and
                                       DIR/model-96x3

In reading order:
  1. grammar     writes short reviews with the judge's lexicon
  2. tokenizer   one id per word, and Pythia's two special tokens at Pythia's ids
  3. model       a GPT-NeoX of Pythia's make, 64 wide and 2 layers deep, pretrained on the grammar's
                 reviews; another, 96 wide and 3 layers deep, for agents of different sizes
  4. pairs       two samples of that model for one prompt, and which of them a noisy judge prefers
  5. summary     what the initial policy scores: a check of the world before anybody trains in it

One seed and a fixed number of threads: a second run on the same machine writes the same bytes.
Dimension key: B batch, Q prompt, R response, T tokens of a text.
"""

import argparse
import functools
import json
import math
import random
import time
from pathlib import Path
from statistics import mean, pstdev

import torch
from judge import LEXICON, TOPICS, Word, illegal_pairs, score, terms
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

SEED = 0
THREADS = 1  # with more, the last bits depend on how many; and at this size more is hardly faster
STEPS, BATCH = 3000, 32  # pretraining: Adam updates, reviews per update
LR, WARMUP = 4e-3, 100  # its peak rate, and the updates until that is reached
ROWS = 600  # preference pairs per topic
PROMPT_WORDS = (3, 6)  # shortest and longest prompt
RESPONSE_TOKENS = 20  # a response of fewer tokens has ended (EOS follows); one of 20 was cut
LABEL_SCALE = 3.0  # P(first is chosen) = sigmoid(scale * difference of the gold scores)
EOS, PAD, UNK = "<|endoftext|>", "<|padding|>", "<unk>"  # ids 0, 1 and 2

# --------------------------------------------------------------------------------------- 1. grammar


@functools.cache
def fitting(*wanted: Word) -> list[str]:
    """The words with one of these entries."""
    return [word for word, entry in LEXICON.items() if entry in wanted]


class Review:
    """A review in the making: its words so far, and how positive and how vivid its writer is.

    Most writers are nearly always positive or nearly never (a beta of 0.3 has its mass at both
    ends), and likewise vivid. So one word tells something of the next ones, and the model must
    learn which words are alike: its features then hold what a reward model needs, and a few hundred
    pairs are enough to train one.
    """

    def __init__(self, rng: random.Random, topic: str):
        self.rng, self.topic, self.words = rng, topic, []
        self.vividness = 0.8 * rng.betavariate(0.3, 0.3)  # share of vivid adjectives among all
        self.positivity = rng.betavariate(0.3, 0.3)  # share of positive among those with sentiment

    def write(self) -> str:
        for number in range(self.rng.choice((1, 1, 2, 2, 2, 3))):
            self.sentence(may_use_it=number > 0)  # the first one names its noun, and so the topic
        return " ".join(self.words)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def word(self, kind: str, sentiment: int = 0, vivid: int = 0) -> None:
        """Adds one word; a noun or adjective that the review has not used yet, if one is left."""
        words = fitting(*(Word(kind, topic, sentiment, vivid) for topic in (None, self.topic)))
        if kind in ("NOUN", "ADJ"):
            words = [word for word in words if word not in self.words] or words
        self.words.append(self.rng.choice(words))

    def adjective(self) -> None:
        if self.chance(self.vividness):
            self.word("ADJ", vivid=1)
        elif self.chance(0.15):
            self.word("ADJ")  # neither vivid nor of any sentiment
        else:
            self.word("ADJ", sentiment=+1 if self.chance(self.positivity) else -1)

    def noun_phrase(self) -> None:  # "the golden soup"
        self.word("DET")
        if self.chance(0.45):
            self.adjective()
        self.word("NOUN")

    def adjective_phrase(self) -> None:  # "very fresh"
        if self.chance(0.3):
            self.word("ADV")
        self.adjective()

    def sentence(self, may_use_it: bool) -> None:
        # "the soup was very fresh and golden near the bread ."
        if may_use_it and self.chance(0.5):
            self.word("PRON")
        else:
            self.noun_phrase()
        self.word("COP")
        self.adjective_phrase()
        for _ in range(self.rng.choice((0, 0, 0, 1, 1, 2))):
            self.word("CONJ")
            self.adjective_phrase()
        if self.chance(0.1):
            self.word("PREP")
            self.noun_phrase()
        self.word("STOP")


def write_review(rng: random.Random) -> str:
    return Review(rng, rng.choice(TOPICS)).write()


def write_prompts(rng: random.Random, topic: str, count: int) -> list[str]:
    """Different beginnings of fresh reviews. Each holds the noun that tells the topic, its second
    or third word, and stops inside a sentence."""
    prompts = {}  # a dict, because a set has no fixed order
    while len(prompts) < count:
        words = Review(rng, topic).write().split()[: rng.randint(*PROMPT_WORDS)]
        if words[-1] != ".":
            prompts[" ".join(words)] = None
    return list(prompts)


# ------------------------------------------------------------------------------------- 2. tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at spaces, one id per word. As Pythia's, it writes no BOS, and decoding puts a space
    before each word, so that the text of a prompt and the text of its response fit together."""
    vocabulary = {word: i for i, word in enumerate([EOS, PAD, UNK, *LEXICON])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Replace(Regex("^"), " ")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=64,
        clean_up_tokenization_spaces=False,  # "." stays a word of its own
        model_input_names=["input_ids", "attention_mask"],
    )


# ----------------------------------------------------------------------------------------- 3. model


def build_model(tokenizer: PreTrainedTokenizerFast, width: int = 64,
                layers: int = 2) -> GPTNeoXForCausalLM:
    """Pythia's architecture. Like Pythia's, its embedding has rows that belong to no token."""
    config = GPTNeoXConfig(
        vocab_size=16 * (len(tokenizer) // 16 + 1),  # the next multiple of 16, strictly larger
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        rotary_pct=0.25,
        use_parallel_residual=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        classifier_dropout=0.0,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,  # as in Pythia; nothing here ever writes a BOS
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPTNeoXForCausalLM(config).float()


def language_loss(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Mean cross-entropy, in nats per token, of texts that end in EOS."""
    texts = [f"{text} {EOS}" for text in texts]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    # [B, T]; -100 is left out
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels).loss


def pretrain(model, tokenizer, rng: random.Random, lr: float = LR) -> None:
    """Adam on reviews never seen twice; the rate ramps up, then falls to 0 along a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step in range(STEPS):
        loss = language_loss(model, tokenizer, [write_review(rng) for _ in range(BATCH)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"  update {step:4d}  loss {loss.item():.3f}", flush=True)
    model.eval()


# ----------------------------------------------------------------------------------------- 4. pairs


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str]) -> list[str]:
    """One response per prompt from the model's own distribution: temperature 1, nothing cut off."""
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")  # [B, Q]
    no_token = range(len(tokenizer), model.config.vocab_size)
    tokens = model.generate(
        **batch,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=RESPONSE_TOKENS,
        suppress_tokens=[tokenizer.pad_token_id, tokenizer.unk_token_id, *no_token],
    )  # [B, Q + R], and pads after EOS
    responses = tokens[:, batch["input_ids"].shape[1]:]  # [B, R]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [text.strip() for text in texts]


def has_ended(response: str) -> bool:
    return len(response.split()) < RESPONSE_TOKENS


def messages(prompt: str, response: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def preference_row(prompt: str, first: str, second: str, rng: random.Random) -> dict:
    """Which of two responses is chosen: a Bradley-Terry draw on their gold scores."""
    gold = score([prompt] * 2, [first, second], [has_ended(first), has_ended(second)])
    first_wins = rng.random() < 1 / (1 + math.exp(-LABEL_SCALE * (gold[0] - gold[1])))
    chosen, rejected = (first, second) if first_wins else (second, first)
    return {"prompt": prompt, "chosen": messages(prompt, chosen),
            "rejected": messages(prompt, rejected)}


def topic_rows(model, tokenizer, topic: str) -> list[dict]:
    """ROWS pairs, each with a prompt of its own. Equal texts and empty ones tell nothing and are
    left out."""
    rng = random.Random(f"{SEED} {topic}")  # a topic's prompts do not depend on those before it
    prompts = write_prompts(rng, topic, ROWS + ROWS // 10)
    first, second = sample(model, tokenizer, prompts), sample(model, tokenizer, prompts)
    samples = zip(prompts, first, second, strict=True)
    rows = [preference_row(prompt, a, b, rng) for prompt, a, b in samples if a != b and a and b]
    rows = rows[:ROWS]
    assert len(rows) == ROWS, f"only {len(rows)} usable pairs on {topic}"
    return rows


# --------------------------------------------------------------------------------------- 5. summary


def summary(rows: list[dict]) -> dict[str, float]:
    """What the initial policy's samples score, and how often a label prefers the worse one."""
    responses = [(row["prompt"], row[side][1]["content"])
                 for row in rows for side in ("chosen", "rejected")]
    samples = [(prompt, response, has_ended(response)) for prompt, response in responses]
    by_term = [terms(*one) for one in samples]
    gold = [sum(values.values()) for values in by_term]
    tokens = [len(response.split()) + ended for _, response, ended in samples]  # EOS is one
    return {
        "gold, mean": mean(gold),
        "gold, standard deviation": pstdev(gold),
        "gold, smallest": min(gold),
        "gold, largest": max(gold),
        **{f"  {name}, mean": mean(values[name] for values in by_term) for name in by_term[0]},
        "responses that end, share": mean(ended for _, _, ended in samples),
        "tokens per response": mean(tokens),
        "illegal pairs, share": sum(illegal_pairs(*one) for one in samples) / sum(tokens),
        "labels that prefer the lower gold, share": mean(
            c < r for c, r in zip(gold[::2], gold[1::2], strict=True)
        ),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="makes the tiny model and its preference data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent,
                        help="folder for model/ and data/")
    out, start = parser.parse_args(argv).out, time.perf_counter()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    pretrain(model, tokenizer, rng)
    with torch.no_grad():
        loss = language_loss(model, tokenizer, [write_review(rng) for _ in range(1000)]).item()
    seconds = time.perf_counter() - start
    tokenizer.save_pretrained(out / "model")
    model.save_pretrained(out / "model")

    (out / "data").mkdir(exist_ok=True)
    rows = {topic: topic_rows(model, tokenizer, topic) for topic in TOPICS}
    for topic in TOPICS:
        lines = "".join(json.dumps(row) + "\n" for row in rows[topic])
        (out / "data" / f"{topic}.jsonl").write_text(lines, encoding="utf-8")

    # The larger model comes last and has a seed of its own: all else stays as it was.
    torch.manual_seed(SEED + 1)
    large = build_model(tokenizer, width=96, layers=3)
    rng = random.Random(f"{SEED} large")
    pretrain(large, tokenizer, rng, lr=LR / 2)
    with torch.no_grad():
        large_loss = language_loss(large, tokenizer, [write_review(rng) for _ in range(1000)])
    tokenizer.save_pretrained(out / "model-96x3")
    large.save_pretrained(out / "model-96x3")

    numbers = {
        "parameters": model.num_parameters(),
        "parameters of the larger model": large.num_parameters(),
        "its held-out loss, nats per token": large_loss.item(),
        "tokens in the vocabulary": len(tokenizer),
        "held-out loss, nats per token": loss,
        **summary([row for topic in TOPICS for row in rows[topic]]),
        "pretraining, seconds": seconds,
        "all, seconds": time.perf_counter() - start,
        "largest data file, kB": max(f.stat().st_size for f in (out / "data").iterdir()) / 1000,
        "weights, kB": (out / "model" / "model.safetensors").stat().st_size / 1000,
    }
    for name, number in numbers.items():
        print(f"{name:42s}{number:12,.3f}")


if __name__ == "__main__":
    main()

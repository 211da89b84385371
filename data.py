"""What an agent owns in private: prompts, preference pairs, and the reward model fitted to them.

In reading order
    1. UserError              a mistake of the user's: one line, exit code 2
    2. preference rows        load_pairs: hub, cache, save_to_disk, parquet and jsonl, into one list of Pair
    3. shards                 make_shards: held-out prompts for the judge, and each agent's own rows
    4. tokens                 encode_prompts, encode_response, pad
    5. the reward model       RewardModel, fit_reward_model (Bradley-Terry), preference_accuracy
    6. scorers                anything that scores a batch of responses: a RewardModel, FILE.py:function, a directory
    7. models                 online, load_model

Dimension key: B rows, Q prompt tokens (left-padded), T response tokens (right-padded), L = Q + T, D hidden size.
A scorer is a function (prompt_ids [B, Q], prompt_mask [B, Q], response_ids [B, T], response_mask [B, T]) -> [B].

Departures from the papers: the reward model is normalised on samples of the initial policy by mean *and* standard
deviation (1909.08593 did both, 2203.02155 the bias only); it starts from the policy's trunk with all weights trained.
"""

import copy
import http.client
import importlib.util
import json
import os
import random
import re
import sys
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppo_core

Scorer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class UserError(Exception):
    """A mistake that the user can mend; its message says what and how, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # one line, whatever a library's message in it held


# ------------------------------------------------------------------------------------------------- preference rows


@dataclass(frozen=True)
class Pair:
    """One preference: of two responses to a prompt, the one an annotator chose. Texts carry no space at the seam."""

    prompt: str
    chosen: str
    rejected: str
    split: str


def _text(cell, role: str) -> str:
    """A cell's text: a string as it is, or the contents of the messages of `role` in a list of chat messages."""
    if isinstance(cell, str):
        return cell.strip()
    if not any(message["role"] == role for message in cell):
        raise KeyError(role)
    return "\n".join(message["content"] for message in cell if message["role"] == role).strip()


def _pair(row: dict, split: str, number: int, labelled: bool) -> Pair:
    needed = ("prompt", "chosen", "rejected") if labelled else ("prompt",)
    missing = [name for name in needed if name not in row]
    if missing:
        raise UserError(f"split {split!r} has no column {missing[0]!r}: it needs {', '.join(needed)}, "
                        f"and has {', '.join(row)}" + " (prompt alone is enough for a --reward that is a rule, with a "
                        "--judge that is one too, or none)" * (missing[0] != "prompt"))
    try:
        answers = [_text(row[name], "assistant") for name in needed[1:]] or ["", ""]
        pair = Pair(_text(row["prompt"], "user"), *answers, split)
    except (TypeError, KeyError):
        raise UserError(f"split {split!r}, row {number}: prompt, chosen and rejected must be strings or lists of "
                        '{"role", "content"} messages, from the user (prompt) and the assistant') from None
    if not pair.prompt:
        raise UserError(f"split {split!r}, row {number}: the prompt is empty; remove the row")
    try:
        "".join((pair.prompt, pair.chosen, pair.rejected)).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which no tokenizer takes
        raise UserError(f"split {split!r}, row {number} is not valid Unicode text: {error.reason}") from None
    return pair


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")  # not splitlines: JSON strings may hold U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number + 1} is not JSON: {error}") from None
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}, line {number + 1} is not a JSON object")
    return rows


def _tables(name: str) -> dict[str, list[dict]]:
    """{split: rows} from a jsonl file, a folder of jsonl or parquet files, a save_to_disk folder, or the hub."""
    path = Path(name)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return {path.stem: _read_jsonl(path)}
    if jsonl := sorted(path.glob("*.jsonl")):
        return {file.stem: _read_jsonl(file) for file in jsonl}
    if path.exists() and not path.is_dir():
        raise UserError(f"dataset {name!r} is a file but not .jsonl: give a .jsonl file or a folder")
    try:
        import datasets  # only here: jsonl needs no more than the standard library
    except ImportError:
        raise UserError(f"dataset {name!r} needs the package datasets (pip install datasets), or .jsonl") from None
    datasets.disable_progress_bars()
    try:
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            loaded = datasets.load_from_disk(name)
        elif path.is_dir():
            return _read_parquet(path)
        else:
            loaded = datasets.load_dataset(name)
    except UserError:
        raise
    except Exception as error:  # damaged files and the hub's failures come in many classes
        how = "cannot be read" if path.is_dir() else (
            "is no local file or folder and cannot be had from the hub or its cache: check the name, or on a connected "
            f"machine run `hf download --repo-type dataset {name} --local-dir DIR` and pass --dataset DIR; "
            "--preset tiny needs no download")
        raise UserError(f"dataset {name!r} {how} ({type(error).__name__}: {error})") from None
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    return {split: table.to_list() for split, table in loaded.items()}


def _read_parquet(folder: Path) -> dict[str, list[dict]]:
    """{split: rows} of all parquet files below a folder; the parts of a split are named NAME-00000-of-00002.parquet."""
    from pyarrow import parquet
    tables: dict[str, list[dict]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        split = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
        split = file.parent.name if split.isdigit() else split  # the hub's conversion writes NAME/0000.parquet
        tables.setdefault(split, []).extend(parquet.read_table(file).to_pylist())
    if not tables:
        raise UserError(f"dataset folder {str(folder)!r} holds no .jsonl, no .parquet and no save_to_disk data")
    return tables


def load_pairs(dataset: str, splits: tuple[str, ...] = (), labelled: bool = True) -> tuple[list[Pair], int]:
    """Read preference rows -> (pairs, number of rows dropped because chosen == rejected).

    labelled=False, for a reward that is a rule: only the column prompt is read, and no row is dropped.

    In descriptiveness-sentiment-trl-style about a quarter of the rows are expected to be dropped so: its generator took
    the wrong index. Such a row says nothing about a preference. Raises UserError.
    """
    tables = _tables(dataset)
    unknown = [split for split in splits if split not in tables]
    if unknown:
        raise UserError(f"dataset {dataset!r} has no split {unknown[0]!r}: it has {', '.join(tables)}")
    pairs, dropped = [], 0
    for split in splits or tables:
        rows = [_pair(row, split, number, labelled) for number, row in enumerate(tables[split])]
        kept = [pair for pair in rows if pair.chosen != pair.rejected or not labelled]
        if not kept:
            raise UserError(f"split {split!r} of {dataset!r} is empty" if not rows else
                            f"split {split!r} of {dataset!r}: chosen == rejected in all of its {len(rows)} rows")
        pairs, dropped = pairs + kept, dropped + len(rows) - len(kept)
    return pairs, dropped


# ---------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class Shard:
    """One agent's private data: prompts to respond to, pairs to fit its reward model, pairs to measure that model."""

    prompts: list[str]
    train: list[Pair]
    heldout: list[Pair]


def _shard(rows: list[Pair], n_pairs: int, who: str, taken: str) -> Shard:
    prompts = list(dict.fromkeys(pair.prompt for pair in rows))  # unique, in order
    n_heldout = min(256, max(1, len(rows) // 5))
    train = rows[n_heldout:n_heldout + n_pairs]
    if len(train) < n_pairs:
        remedy = f"lower --pairs to {len(train)}" if train else "lower --agents"
        raise UserError(f"{who} has {len(rows)} usable preference rows ({taken}), {n_heldout} of them held out, and "
                        f"--pairs asks for {n_pairs}: {remedy}, lower --eval-prompts, or use more data")
    return Shard(prompts, train, rows[:n_heldout])


def make_shards(pairs: list[Pair], n_agents: int, how: str, n_pairs: int, n_eval: int, rng: random.Random,
                n_judge: int = 0) -> tuple[list[str], list[Shard], list[Pair]]:
    """Deal the data to the agents -> (held-out evaluation prompts, a shard per agent, pairs for a held-out judge).

    how: "iid" deals all rows evenly; "split" gives agent i the splits i, i + N, ... (i mod S if there are fewer splits
    than agents, who then share the split's rows). No row of an evaluation prompt goes to an agent, and no row of the
    judge's. n_pairs: pairs per agent for its reward model; n_judge: pairs set aside for a judge. Raises UserError.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < n_eval + n_agents:
        raise UserError(f"{len(prompts)} distinct prompts are too few for {n_agents} agents and {n_eval} evaluation "
                        "prompts: add data or lower --agents or --eval-prompts")
    eval_prompts = rng.sample(prompts, n_eval)
    held_out = set(eval_prompts)
    rows = [pair for pair in pairs if pair.prompt not in held_out]
    rng.shuffle(rows)
    judge_rows, rows = rows[:n_judge], rows[n_judge:]
    splits = sorted({pair.split for pair in pairs})
    if how == "iid":
        dealt = [rows[i::n_agents] for i in range(n_agents)]
    elif len(splits) >= n_agents:
        owner = {split: s % n_agents for s, split in enumerate(splits)}
        dealt = [[pair for pair in rows if owner[pair.split] == i] for i in range(n_agents)]
    else:
        dealt = []
        for i in range(n_agents):
            own = [pair for pair in rows if pair.split == splits[i % len(splits)]]
            sharers = range(i % len(splits), n_agents, len(splits))  # the agents of this split
            dealt.append(own[sharers.index(i)::len(sharers)])
    taken = f"of {len(pairs)}, after those of {n_eval} evaluation prompts and {n_judge} for the judge"
    poorest_first = sorted(range(n_agents), key=lambda i: len(dealt[i]))  # what is enough for it is enough for all
    shards = {i: _shard(dealt[i], n_pairs, f"agent {i}", taken) for i in poorest_first}
    return eval_prompts, [shards[i] for i in range(n_agents)], judge_rows


def pool(shards: list[Shard]) -> Shard:
    """All shards in one place, for `centralized` and `--reward shared`: not private."""
    return Shard(list(dict.fromkeys(prompt for shard in shards for prompt in shard.prompts)),
                 [pair for shard in shards for pair in shard.train],
                 [pair for shard in shards for pair in shard.heldout])


# ---------------------------------------------------------------------------------------------------------- tokens


def encode_prompts(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Each prompt's ids, with whatever the tokenizer puts at the beginning of a text."""
    return tokenizer(prompts)["input_ids"] if prompts else []


def encode_response(tokenizer, response: str, max_tokens: int, eos: bool) -> list[int]:
    """A response's ids as the policy would have sampled them.

    The dataset strips leading spaces: prompt and response are rejoined with exactly one, which in a BPE vocabulary is
    part of the response's first token. A response of fewer than max_tokens tokens has ended: it gets EOS if `eos`.
    One of max_tokens or more was cut and has none.
    """
    ids = tokenizer(" " + response, add_special_tokens=False)["input_ids"][:max_tokens] if response else []
    return ids + [tokenizer.eos_token_id] if eos and len(ids) < max_tokens else ids


def pad(sequences: list[list[int]], pad_id: int, side: str,
        device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """B lists of ids -> (ids [B, L], mask [B, L]), padded on the "left" or the "right" to the longest."""
    length = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(length - len(sequence), None) if side == "left" else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence, dtype=torch.long)
        mask[row, where] = 1
    return ids.to(device), mask.to(device)


# ------------------------------------------------------------------------------------------------ the reward model


class RewardModel(nn.Module):
    """A scalar head on a copy of the policy's trunk. Reads valid tokens only: padding never changes a score.

    pooling: "last" reads the last valid token, "mean" the mean over the valid tokens. The head starts with standard
    deviation 1/sqrt(d + 1) (lm-human-preferences), drawn from `generator`.
    """

    def __init__(self, causal_lm: nn.Module, pooling: str, generator: torch.Generator):
        super().__init__()
        self.trunk = copy.deepcopy(causal_lm.base_model).eval().requires_grad_(True)
        self.pooling = pooling
        size = causal_lm.config.hidden_size
        self.head = nn.Linear(size, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(1, size, generator=generator) / (size + 1) ** 0.5)
            self.head.bias.zero_()
        self.head.to(causal_lm.device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, L], padded on any side -> scores [B], not normalised."""
        hidden = ppo_core.trunk_states(self.trunk, ids, mask, slice(None), torch.float32)  # [B, L, D]
        if self.pooling == "mean":
            weight = mask / mask.sum(1, keepdim=True)
        else:
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
            weight = F.one_hot(last, mask.shape[1])
        # Padded positions may hold anything: take them out by selection, not by a product with 0.
        hidden = torch.where(mask[..., None].bool(), hidden, 0)
        return self.head(torch.einsum("bl,bld->bd", weight.to(hidden), hidden)).squeeze(-1)


def _pair_scores(model: RewardModel, pairs: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Scores of b (chosen, rejected) id sequences -> ([b], [b]), in one forward."""
    ids, mask = pad([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs], pad_id, "right",
                    model.head.weight.device)
    return model(ids, mask).chunk(2)


def fit_reward_model(model: RewardModel, pairs: list[tuple[list[int], list[int]]], pad_id: int, *, lr: float,
                     epochs: int, batch: int, generator: torch.Generator) -> float:
    """Fit by Bradley-Terry, -log sigmoid(r(chosen) - r(rejected)) (2009.01325, eq. of sec. 3.4) -> last epoch's loss.

    pairs: (prompt + chosen, prompt + rejected) as token ids. Adam, linear decay to 0 over all steps.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, eps=1e-5, fused=True)
    steps = epochs * -(-len(pairs) // batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    loss_sum = 0.0
    for _ in range(epochs):
        loss_sum = 0.0
        for rows in torch.randperm(len(pairs), generator=generator).split(batch):
            chosen, rejected = _pair_scores(model, [pairs[row] for row in rows.tolist()], pad_id)
            loss = -F.logsigmoid(chosen - rejected).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(rows)
    return loss_sum / len(pairs)


@torch.no_grad()
def preference_accuracy(model: RewardModel, pairs: list[tuple[list[int], list[int]]], pad_id: int,
                        batch: int = 64) -> float:
    """Share of pairs whose chosen response scores higher; a tie counts half."""
    right = 0.0
    for start in range(0, len(pairs), batch):
        chosen, rejected = _pair_scores(model, pairs[start:start + batch], pad_id)
        right += (chosen > rejected).sum().item() + 0.5 * (chosen == rejected).sum().item()
    return right / len(pairs)


# --------------------------------------------------------------------------------------------------------- scorers


def model_scorer(model: RewardModel) -> Scorer:
    """A reward model as a scorer, on the very ids that were sampled."""
    @torch.no_grad()
    def score(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor) -> Tensor:
        return model(torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1))
    return score


def mean_scorer(scorers: list[Scorer]) -> Scorer:
    """The mean of several scorers, each of which should be normalised first."""
    return lambda *batch: sum(scorer(*batch) for scorer in scorers) / len(scorers)


def decode(tokenizer, ids: Tensor, mask: Tensor) -> list[str]:
    """Texts of the valid tokens of [B, L] ids, without special tokens and without space at the ends."""
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def text_scorer(function: Callable, name: str, tokenizer) -> Scorer:
    """function(prompts, responses, ended) -> B numbers, as a scorer. `ended`: the response closed with EOS."""
    def score(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor) -> Tensor:
        ended = ((response_ids == tokenizer.eos_token_id) & response_mask.bool()).any(1).tolist()
        texts = decode(tokenizer, prompt_ids, prompt_mask), decode(tokenizer, response_ids, response_mask)
        try:
            scores = torch.as_tensor(function(*texts, ended), dtype=torch.float32).to(response_ids.device)
        except (Exception, SystemExit) as error:  # the function is the user's: whatever it raises is said in one line
            inside = [f" ({frame.filename}, line {frame.lineno})" for frame in
                      traceback.extract_tb(error.__traceback__) if frame.filename != __file__][:1]
            raise UserError(f"{name} must take lists (prompts, responses, ended) and return one finite number per "
                            f"response, and failed with {type(error).__name__}: {error}{''.join(inside)}") from None
        if scores.shape != (len(response_ids),) or not torch.isfinite(scores).all():
            raise UserError(f"{name} must return one finite number per response: for {len(response_ids)} it returned "
                            f"shape {list(scores.shape)}, {int((~torch.isfinite(scores)).sum())} of them not finite")
        return scores
    return score


def normalised(scorer: Scorer, samples: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Scorer, float, float]:
    """The scorer shifted and scaled to mean 0, std 1 on samples of the initial policy -> (scorer, mean, std).

    So scores are comparable between agents. A reward that is constant on the samples is shifted only.
    """
    scores = torch.cat([scorer(*sample) for sample in samples])
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    scale = std if std > 1e-6 else 1.0
    return (lambda *batch: (scorer(*batch) - mean) / scale), mean, std


def _function(spec: str) -> Callable:
    """The function that FILE.py:function names."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"{spec!r}: there is no file {file!r}")
    try:
        key = f"given {Path(file).resolve()}"  # no name that an import could mean
        module_spec = importlib.util.spec_from_file_location(key, file)
        module = sys.modules[key] = importlib.util.module_from_spec(module_spec)  # dataclasses look there
        module_spec.loader.exec_module(module)
        function = getattr(module, name, None)
    except (Exception, SystemExit) as error:  # the file is the user's: whatever it raises is said in one line
        raise UserError(f"{spec!r} cannot be loaded: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise UserError(f"{spec!r}: {file} has no function {name!r}")
    return function


def _classifier(folder: str, device: torch.device | str) -> Callable:
    """A sequence-classification model as function(prompts, responses, ended): its one logit, or positive - negative."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32,
                                                                         output_loading_info=True)
        _refuse_random_weights(info)
    except Exception as error:
        raise UserError(f"{folder!r} holds no sequence-classification model: {error}") from None
    model.to(device).eval()
    if model.config.num_labels > 2:
        raise UserError(f"{folder!r} has {model.config.num_labels} labels; a scorer has 1, or 2 (negative, positive)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**9)

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str], ended: list[bool]) -> Tensor:
        texts = [f"{prompt} {response}".strip() for prompt, response in zip(prompts, responses, strict=True)]
        scores = []
        for start in range(0, len(texts), 32):
            inputs = tokenizer(texts[start:start + 32], return_tensors="pt", padding=True, truncation=True,
                               max_length=longest).to(device)
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            scores.append(logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0])
        return torch.cat(scores)
    return score


def load_scorer(spec: str, tokenizer, device: torch.device | str) -> Scorer:
    """FILE.py:function or the directory of a sequence-classification model -> a scorer. Raises UserError."""
    if ".py:" in spec:
        return text_scorer(_function(spec), spec, tokenizer)
    if Path(spec).is_dir():
        return text_scorer(_classifier(spec, device), spec, tokenizer)
    raise UserError(f"{spec!r} is neither FILE.py:function nor the directory of a sequence-classification model")


# ---------------------------------------------------------------------------------------------------------- models


def online(timeout: float = 3.0) -> bool:
    """Whether the model hub answers within `timeout` seconds; if not, the libraries are told to use their caches alone.

    Call it before transformers, datasets and huggingface_hub are imported: they read HF_HUB_OFFLINE then.
    """
    reachable = _answers(timeout)
    if not reachable:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    return reachable


def _answers(timeout: float) -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    answers = []

    def ask() -> None:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout)
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # an error page is an answer too
        except (OSError, ValueError, http.client.HTTPException):
            pass

    thread = threading.Thread(target=ask, daemon=True)  # urlopen's timeout does not cover the look-up of the name
    thread.start()
    thread.join(timeout)
    return bool(answers)


def _refuse_random_weights(info: dict) -> None:
    """transformers fills weights that a checkpoint lacks at random; raises ValueError that names them."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}, which would be random")


def load_model(name: str, device: torch.device | str):
    """A causal LM for training -> (model, tokenizer, forbidden [V] bool: ids that are no token, and the pad id).

    transformers 5 loads a checkpoint in the type it was saved in, and Pythia's is float16: here it is always float32.
    Pythia's tokenizer sets no pad token, though `<|padding|>` stands in its vocabulary. Raises UserError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        _refuse_random_weights(info)
    except Exception as error:  # damaged files and the hub's failures come in many classes
        where = (f"the folder {name!r} holds no causal language model" if Path(name).is_dir() else
                 f"model {name!r} is no local folder and cannot be had from the hub or its cache: check the name, or "
                 f"on a connected machine run `hf download {name} --local-dir DIR` and pass --model DIR; --model "
                 "tiny/model, which knows the words of its own world alone, needs no download")
        raise UserError(f"{where} ({type(error).__name__}: {str(error)[:200]})") from None
    model.to(device).eval()
    rows = model.get_output_embeddings().weight.shape[0]
    token_ids = set(tokenizer.get_vocab().values())
    if max(token_ids) >= rows:
        raise UserError(f"model {name!r}: the tokenizer's ids go to {max(token_ids)}, the embedding has {rows} rows")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name!r}: the tokenizer has no EOS token, so no response could end")
    forbidden = torch.tensor([index not in token_ids for index in range(rows)])
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        if "<|padding|>" not in tokenizer.get_vocab():
            raise UserError(f"model {name!r}: the tokenizer has no pad token of its own (pad must differ from EOS): "
                            "add one with add_special_tokens and resize_token_embeddings, and save both")
        tokenizer.pad_token = "<|padding|>"
    forbidden[tokenizer.pad_token_id] = True
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return model, tokenizer, forbidden

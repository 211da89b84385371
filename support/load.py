"""Reads what the user names: preference rows, models, scorers, matrices. Nothing is learned here.

In reading order
    1. places                 HOME, home, embedded, users_code: what is of the embedded tiny world
    2. preference rows        load_pairs: hub, cache, save_to_disk, parquet and jsonl, as data.Pair
    3. models and prompts     online: whether the hub answers; load_model, prepare_libraries,
                              prompt_ids
    4. scorers                load_scorer: FILE.py:function, or a classifier's folder
    5. the matrix W           read_matrix, from JSON

Whatever a library raises about a user's file becomes a UserError of one line.
"""

import http.client
import importlib.util
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data import Pair, Scorer, UserError, encode_prompts, text_scorer

HOME = Path(__file__).resolve().parent.parent  # the project's root folder
MATRICES = ("self", "uniform", "ring", "star", "identity")  # kinds of W that need no file

# ------------------------------------------------------------------------------------------ places


def home(path: str) -> str:
    """A path tiny/... of the embedded world, from wherever it is called; others as they are."""
    return str(HOME / path) if path.startswith("tiny/") else path


def embedded(path: str) -> bool:
    """Whether a model, dataset or file is that of the embedded tiny world."""
    return HOME / "tiny" in Path(home(path)).resolve().parents


def users_code(spec: str) -> bool:
    """Whether a reward or judge is a function of the user's."""
    return ".py:" in spec and not embedded(spec.rpartition(":")[0])


# --------------------------------------------------------------------------------- preference rows


def load_pairs(dataset: str, splits: tuple[str, ...] = (),
               labelled: bool = True) -> tuple[list[Pair], int]:
    """Read preference rows -> (pairs, number of rows dropped because chosen == rejected).

    dataset: a .jsonl file, a folder of .jsonl, .parquet or save_to_disk data, or a hub name.
    labelled: if False, for a reward that is a rule, only prompts are read and no row is dropped.
    Rows with chosen == rejected say nothing about a preference; a quarter of the rows of
    descriptiveness-sentiment-trl-style is expected to be so, as its generator took the wrong index.
    Raises UserError.
    """
    tables = _tables(dataset)
    unknown = [split for split in splits if split not in tables]
    if unknown:
        raise UserError(f"dataset {dataset!r} has no split {unknown[0]!r}: it has "
                        f"{', '.join(tables)}")
    pairs, dropped = [], 0
    for split in splits or tables:
        rows = [_pair(row, split, number, labelled) for number, row in enumerate(tables[split])]
        kept = [pair for pair in rows if pair.chosen != pair.rejected or not labelled]
        if not rows:
            raise UserError(f"split {split!r} of {dataset!r} is empty")
        if not kept:
            raise UserError(f"split {split!r} of {dataset!r}: chosen == rejected in all of its "
                            f"{len(rows)} rows")
        pairs += kept
        dropped += len(rows) - len(kept)
    return pairs, dropped


def _tables(name: str) -> dict[str, list[dict]]:
    """{split: rows} of a dataset in any of its forms."""
    path = Path(name)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return {path.stem: _read_jsonl(path)}
    if jsonl := sorted(path.glob("*.jsonl")):
        return {file.stem: _read_jsonl(file) for file in jsonl}
    if path.exists() and not path.is_dir():
        raise UserError(f"dataset {name!r} is a file but not .jsonl: give a .jsonl file or a "
                        "folder")
    try:
        import datasets  # only here: jsonl needs no more than the standard library
    except ImportError:
        raise UserError(f"dataset {name!r} needs the package datasets (pip install datasets), or "
                        ".jsonl") from None
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
            "is no local file or folder and cannot be had from the hub or its cache: check the "
            "name, or on a connected machine run `hf download --repo-type dataset "
            f"{name} --local-dir DIR` and pass --dataset DIR; --preset tiny needs no download")
        raise UserError(f"dataset {name!r} {how} ({type(error).__name__}: {error})") from None
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    return {split: table.to_list() for split, table in loaded.items()}


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")  # splitlines would cut at U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object")
        rows.append(row)
    return rows


def _read_parquet(folder: Path) -> dict[str, list[dict]]:
    """{split: rows} of all parquet files below a folder.

    Parts of a split are named NAME-00000-of-00002.parquet, or NAME/0000.parquet where the hub has
    converted a dataset.
    """
    from pyarrow import parquet
    tables: dict[str, list[dict]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        split = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
        split = file.parent.name if split.isdigit() else split
        tables.setdefault(split, []).extend(parquet.read_table(file).to_pylist())
    if not tables:
        raise UserError(f"dataset folder {str(folder)!r} holds no .jsonl, no .parquet and no "
                        "save_to_disk data")
    return tables


def _pair(row: dict, split: str, number: int, labelled: bool) -> Pair:
    """A row as a Pair; without labels its responses are empty. Raises UserError."""
    needed = ("prompt", "chosen", "rejected") if labelled else ("prompt",)
    missing = [name for name in needed if name not in row]
    if missing:
        hint = "" if missing[0] == "prompt" else (
            " (prompt alone is enough for a --reward that is a rule, with a --judge that is one "
            "too, or none)")
        raise UserError(f"split {split!r} has no column {missing[0]!r}: it needs "
                        f"{', '.join(needed)}, and has {', '.join(row)}{hint}")
    try:
        prompt = _text(row["prompt"], "user")
        chosen, rejected = ([_text(row[name], "assistant") for name in needed[1:]]
                            if labelled else ["", ""])
    except (TypeError, KeyError):
        raise UserError(f"split {split!r}, row {number}: prompt, chosen and rejected must be "
                        'strings or lists of {"role", "content"} messages, from the user (prompt) '
                        "and the assistant") from None
    if not prompt:
        raise UserError(f"split {split!r}, row {number}: the prompt is empty; remove the row")
    try:
        (prompt + chosen + rejected).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise UserError(f"split {split!r}, row {number} is not valid Unicode text: "
                        f"{error.reason}") from None
    return Pair(prompt, chosen, rejected, split)


def _text(cell, role: str) -> str:
    """A cell's text: a string, or what the messages of `role` in a list of chat messages say."""
    if isinstance(cell, str):
        return cell.strip()
    contents = [message["content"] for message in cell if message["role"] == role]
    if not contents:
        raise KeyError(role)
    return "\n".join(contents).strip()


# ------------------------------------------------------------------------------------------ models


def online(timeout: float = 3.0) -> bool:
    """Whether the hub answers within `timeout` seconds; if not, libraries use their caches alone.

    Call it before transformers, datasets and huggingface_hub are imported, which read
    HF_HUB_OFFLINE at that moment.
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
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout)
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # an error page is an answer too
        except (OSError, ValueError, http.client.HTTPException):
            pass

    # urlopen's timeout does not cover looking up the name, so a thread is waited for instead.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers)


def load_model(name: str, device: torch.device | str):
    """A causal LM for training -> (model, tokenizer, forbidden [V] bool: ids that are no token).

    name: a local folder or a hub name. The weights are float32, whatever type the checkpoint has
    (Pythia's is float16, which transformers 5 would keep). The pad id is forbidden too. Pythia's
    tokenizer sets no pad token, though `<|padding|>` stands in its vocabulary. Raises UserError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32,
                                                           output_loading_info=True)
        _refuse_random_weights(info)
    except Exception as error:  # damaged files and the hub's failures come in many classes
        where = f"the folder {name!r} holds no causal language model" if Path(name).is_dir() else (
            f"model {name!r} is no local folder and cannot be had from the hub or its cache: check "
            f"the name, or on a connected machine run `hf download {name} --local-dir DIR` and "
            "pass --model DIR; --model tiny/model, which knows the words of its own world alone, "
            "needs no download")
        raise UserError(f"{where} ({type(error).__name__}: {str(error)[:200]})") from None
    model.to(device).eval()
    rows = model.get_output_embeddings().weight.shape[0]  # V
    token_ids = set(tokenizer.get_vocab().values())
    if max(token_ids) >= rows:
        raise UserError(f"model {name!r}: the tokenizer's ids go to {max(token_ids)}, the "
                        f"embedding has {rows} rows")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name!r}: the tokenizer has no EOS token, so no response could end")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        if "<|padding|>" not in tokenizer.get_vocab():
            raise UserError(f"model {name!r}: the tokenizer has no pad token of its own (pad must "
                            "differ from EOS): add one with add_special_tokens and "
                            "resize_token_embeddings, and save both")
        tokenizer.pad_token = "<|padding|>"
    forbidden = torch.tensor([index not in token_ids for index in range(rows)])
    forbidden[tokenizer.pad_token_id] = True
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer, forbidden


def _refuse_random_weights(info: dict) -> None:
    """transformers fills weights that a checkpoint lacks at random: raises ValueError instead."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}, which would be random")


def prepare_libraries(model: str, dataset: str) -> None:
    """Before a run loads anything: silence transformers, and ask once whether the hub answers."""
    if not (Path(home(model)).is_dir() and Path(home(dataset)).exists()):
        online()  # with a dead network the libraries must look in their caches alone, not retry
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def prompt_ids(tokenizer, prompts: list[str], model, response_length: int) -> dict[str, list[int]]:
    """Prompt -> its ids. Each must fit the model with its response. Raises UserError."""
    ids = dict(zip(prompts, encode_prompts(tokenizer, prompts), strict=True))
    if empty := [prompt for prompt in prompts if not ids[prompt]]:
        raise UserError(f"the prompt {empty[0][:40]!r} has no tokens in this model's vocabulary: "
                        "remove such rows")
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(prompts, key=lambda prompt: len(ids[prompt]))
    if context and len(ids[longest]) + response_length > context:
        raise UserError(f"the prompt {longest[:40]!r} has {len(ids[longest])} tokens; with "
                        f"--response-length {response_length} that exceeds the model's context of "
                        f"{context}: shorten or remove such rows, or lower --response-length")
    return ids


# ----------------------------------------------------------------------------------------- scorers


def load_scorer(spec: str, tokenizer, device: torch.device | str) -> Scorer:
    """FILE.py:function or a sequence-classification model's folder -> scorer. Raises UserError."""
    if ".py:" in spec:
        return text_scorer(_function(spec), spec, tokenizer)
    if Path(spec).is_dir():
        return text_scorer(_classifier(spec, device), spec, tokenizer)
    raise UserError(f"{spec!r} is neither FILE.py:function nor the directory of a "
                    "sequence-classification model")


def _function(spec: str) -> Callable:
    """The function that FILE.py:function names."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"{spec!r}: there is no file {file!r}")
    key = f"given {Path(file).resolve()}"  # a name that no import could mean
    try:
        module_spec = importlib.util.spec_from_file_location(key, file)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[key] = module  # dataclasses look for their module there
        module_spec.loader.exec_module(module)
        function = getattr(module, name, None)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserError(f"{spec!r} cannot be loaded: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise UserError(f"{spec!r}: {file} has no function {name!r}")
    return function


def _classifier(folder: str, device: torch.device | str) -> Callable:
    """A classifier as function(prompts, responses, ended): its logit, or positive - negative."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True)
        _refuse_random_weights(info)
    except Exception as error:
        raise UserError(f"{folder!r} holds no sequence-classification model: {error}") from None
    model.to(device).eval()
    if model.config.num_labels > 2:
        raise UserError(f"{folder!r} has {model.config.num_labels} labels; a scorer has 1, or 2 "
                        "(negative, positive)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    context = getattr(model.config, "max_position_embeddings", None) or 10**9
    longest = min(tokenizer.model_max_length, context)

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str], ended: list[bool]) -> Tensor:
        texts = [f"{prompt} {response}".strip()
                 for prompt, response in zip(prompts, responses, strict=True)]
        scores = []
        for start in range(0, len(texts), 32):
            inputs = tokenizer(texts[start:start + 32], return_tensors="pt", padding=True,
                               truncation=True, max_length=longest).to(device)
            logits = model(input_ids=inputs["input_ids"],
                           attention_mask=inputs["attention_mask"]).logits  # [B, 1 or 2]
            scores.append(logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0])
        return torch.cat(scores)
    return score


# ------------------------------------------------------------------------------------ the matrix W


def read_matrix(path: str, n_agents: int) -> Tensor:
    """The communication matrix W of a JSON file -> [N, N] float64, each row divided by its sum.

    Raises UserError unless the file holds N rows of N finite numbers >= 0, none of them all zeros.
    """
    try:
        matrix = torch.tensor(json.loads(Path(path).read_text()), dtype=torch.float64)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--topology {path!r} is none of {', '.join(MATRICES)}, and no JSON matrix "
                        f"can be read from it: {error}") from None
    if matrix.shape != (n_agents, n_agents):
        shape = " x ".join(map(str, matrix.shape)) or "a number"
        raise UserError(f"--topology {path}: the matrix is {shape}, and {n_agents} agents need "
                        f"{n_agents} x {n_agents}")
    sums = matrix.sum(1, keepdim=True)  # [N, 1]
    if not (torch.isfinite(sums) & (matrix >= 0)).all():
        raise UserError(f"--topology {path}: weights must be finite, their sums too, and not "
                        "negative")
    empty = (sums == 0).flatten().nonzero()
    if len(empty):
        raise UserError(f"--topology {path}: row {int(empty[0])} is all zeros; an agent that hears "
                        "nobody has weight 1 on itself")
    return matrix / sums

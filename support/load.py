"""Reads what the user names: models, tokenizers, scorers, matrices. Nothing is learned here.

In reading order
    1. places         HOME, home, embedded, users_code: what is of the embedded tiny world
    2. the hub        online: whether it answers; prepare_libraries
    3. models         load_model: a decoder with its tokenizer, pad and EOS chosen, logits centred;
                      or why not
    4. prompts        chat_template, prompt_ids
    5. scorers        load_scorer: FILE.py:function, or a classifier's folder
    6. the matrix W   read_matrix, from JSON

Whatever a library raises about a user's file becomes a UserError of one line.
"""

import contextlib
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
from tqdm import tqdm

from data import RewardModel, Scorer, UserError, encode_prompts, frame, special_ids, text_scorer
from policies import (
    cache_name,
    cached_decoder,
    known_inputs,
    layers_of,
    position_ids,
    read_once,
    twin,
)
from support.rows import Template

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


# ----------------------------------------------------------------------------------------- the hub


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


def prepare_libraries(models: tuple[str, ...], dataset: str) -> None:
    """Before a run loads anything: silence transformers, and ask once whether the hub answers."""
    if not (all(Path(home(model)).is_dir() for model in models) and Path(home(dataset)).exists()):
        online()  # with a dead network the libraries must look in their caches alone, not retry
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------ models


def load_model(name: str, device: torch.device | str, say: Callable[[str], None] = print):
    """A causal LM for training -> (model, tokenizer, forbidden [V] bool: ids that are no token).

    name: a local folder or a hub name;  say: is told, in a line each, what a user should know.
    The weights are float32, whatever type the checkpoint has (Pythia's is float16, which
    transformers 5 would keep). The pad id is forbidden too, unless it is EOS.
    model.generation_config has the ids of EOS and pad that a run uses. Raises UserError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    refuse_adapter(name)
    try:
        if AutoConfig.from_pretrained(name).is_encoder_decoder:
            raise ValueError("it is an encoder-decoder, and the policy must be a decoder alone")
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
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"model {name!r} ({model.config.model_type}) has no output embedding")
    rows = head.weight.shape[0]  # V
    token_ids = set(tokenizer.get_vocab().values())
    if max(token_ids) >= rows:
        raise UserError(f"model {name!r}: the tokenizer's ids go to {max(token_ids)}, the "
                        f"embedding has {rows} rows")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name!r}: the tokenizer has no EOS token, so no response could end")
    ends = eos_ids(tokenizer, model)
    choose_pad(tokenizer, ends, say)
    forbidden = torch.tensor([index not in token_ids for index in range(rows)])
    forbidden[tokenizer.pad_token_id] = tokenizer.pad_token_id not in ends
    centre_logits(model, ~forbidden, say)
    if reason := why_no_decoder(model, (~forbidden).nonzero().flatten()):
        raise UserError(f"model {name!r} ({model.config.model_type}) cannot be trained here: "
                        f"{reason}")
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = list(ends)
    if len(ends) > 1:
        names = ", ".join(tokenizer.convert_ids_to_tokens(list(ends)))
        say(f"a response ends at any of {names}")
    if frame(tokenizer)[1]:
        say("the tokenizer puts EOS behind every text: it is taken off prompts")
    return model, tokenizer, forbidden


@torch.no_grad()
def check_layers(model: torch.nn.Module, name: str, policy_layers: int, reward_probe: int) -> None:
    """Raise UserError if the model cannot be divided as --policy-layers or --reward-probe asks."""
    if not (policy_layers or reward_probe):
        return
    try:
        number = len(layers_of(model))
        if max(policy_layers, reward_probe) > number:
            raise UserError(f"model {name!r} has {number} layers: --policy-layers and "
                            "--reward-probe cannot be more")
        _check_twin(model, policy_layers)
        _check_probe(model, reward_probe)
    except UserError:
        raise
    except Exception as error:  # families differ in many ways
        raise UserError(
            f"model {name!r} ({model.config.model_type}) cannot be divided by layers: "
            "--policy-layers and --reward-probe must be 0 "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None


def _check_twin(model: torch.nn.Module, learning: int) -> None:
    """Raise ValueError unless a twin shares no weight that learns, and its other layers can be read
    once for both."""
    if not learning:
        return
    other = twin(model, learning)
    last = {id(parameter) for one in (model, other)
            for parameter in layers_of(one)[-learning:].parameters()}
    both = {id(parameter) for parameter in model.parameters()} & {
        id(parameter) for parameter in other.parameters()}
    if both & last:
        raise ValueError("its last layers have weights in common with others")
    still = list(layers_of(other)[:-learning])
    texts = torch.arange(2, 34, device=model.device).view(2, 2, 8)  # 2 texts [B, L]
    mask = torch.ones_like(texts[0])
    mask[1, :3] = 0  # padded on the left, as in training

    def logits(policy: torch.nn.Module, text: Tensor) -> Tensor:
        return policy(**known_inputs(
            policy, input_ids=text, attention_mask=mask, position_ids=position_ids(mask),
            use_cache=False)).logits[mask.bool()]

    ran: list[torch.nn.Module] = []
    hooks = [layer.register_forward_hook(lambda layer, *args: ran.append(layer))
             for layer in layers_of(model)[-learning:]]
    whole = logits(model, texts[0])
    for hook in hooks:
        hook.remove()
    if len(ran) != learning:
        raise ValueError("one of its last layers does not read a text")
    logits(model, texts[1])  # so that nothing of the first text is left anywhere
    with read_once(still) as states:
        found = [logits(other, texts[0]), logits(model, texts[0])]
    if still and isinstance(states[0], Tensor):
        logits(model, texts[1])
        with read_once(still, states[0]):
            found.append(logits(other, texts[0]))
    if not all(torch.allclose(one, whole, atol=1e-4 * (1 + whole.abs().max())) for one in found):
        raise ValueError("its last layers need more than the states that the others make")


def _check_probe(model: torch.nn.Module, probe: int) -> None:
    """Raise ValueError unless a reward model of the first layers reads these and no others."""
    if not probe:
        return
    reward = RewardModel(model, "mean", torch.Generator(), probe)
    ran, layers = [], layers_of(reward.trunk)
    for layer in layers:
        layer.register_forward_hook(lambda layer, *args: ran.append(layer))
    token = torch.ones(1, 2, dtype=torch.long, device=model.device)
    reward(token, token)
    if len(layers) != probe or ran != list(layers):
        raise ValueError(f"its first {probe} layers cannot be read alone")


def refuse_adapter(name: str) -> None:
    """Raise UserError if the folder holds a LoRA adapter and no model."""
    folder = Path(name)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError(f"the folder {name!r} holds a LoRA adapter, not a whole model: merge it "
                        "into its base model (peft: merge_and_unload) and save that")


def _refuse_random_weights(info: dict) -> None:
    """Raise ValueError if a checkpoint lacks weights, which transformers would fill at random."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}, which would be random")


def eos_ids(tokenizer, model) -> tuple[int, ...]:
    """The ids that end a response: the tokenizer's EOS first, then others of generation_config.

    Without a generation_config.json transformers copies the EOS id from the model's config. That id
    may be a mere default, which is another token here: so then only special tokens count that have
    no other role.
    """
    config, vocabulary = model.generation_config, set(tokenizer.get_vocab().values())
    named = config.eos_token_id
    named = named if isinstance(named, list) else [] if named is None else [named]
    other_roles = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id,
                   tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id}
    derived = getattr(config, "_from_model_config", False)
    others = [index for index in named if index in vocabulary and
              (not derived or index in special_ids(tokenizer) - other_roles)]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *others]))


def choose_pad(tokenizer, ends: tuple[int, ...], say: Callable[[str], None]) -> None:
    """Set a pad token if the tokenizer has none, or one that ends responses or is a word.

    Masks say what is a pad, so any id will do. One that no text has is best, since it can be
    forbidden: Pythia has `<|padding|>` at id 1 and sets no pad token. Else a reserved token, or the
    unknown one; else EOS.
    """
    if tokenizer.pad_token_id not in (None, *ends):
        if re.search(r"^\W?[<\[].+[>\]]$|^\W*(pad|unk)\W*$", tokenizer.pad_token, re.I):
            return
        say(f"the tokenizer's pad token {tokenizer.pad_token!r} is part of ordinary texts: another "
            "token pads here")
    names = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    names |= {token: index for token, index in tokenizer.get_vocab().items()
              if token in ("<pad>", "[PAD]", "<|padding|>", tokenizer.unk_token)}
    free = [name for name, index in sorted(names.items(), key=lambda item: item[1])
            if index not in ends]
    reserved = [name for word in ("pad", "reserved", "unused") for name in free
                if word in name.lower()]
    unknown = [name for name in free if name == tokenizer.unk_token]
    tokenizer.pad_token = [*reserved, *unknown, tokenizer.eos_token][0]


OFFSET = 16.0  # a smaller number in common stays: float32's steps are then 2e-6 at most


@torch.no_grad()
def centre_logits(model, allowed: Tensor, say: Callable[[str], None]) -> None:
    """Remove a number that all logits have in common, if the output embedding is not tied.

    Pythia-70M's logits lie near 1,070. The softmax does not see that, but float32 loses three
    digits to it. Subtracting the mean row (over the allowed ids [V] bool) from every row takes the
    same number off all logits of a state, so the function stays the same; where that is not so,
    since the model caps its logits, it is undone. A tied embedding is the input's too, and stays.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    ids = allowed.nonzero().flatten()[:32].to(model.device)[:, None]  # a token a row: no context

    def logits() -> Tensor:  # [32, allowed]
        # By way of the CPU, since an Apple GPU has no float64.
        return model(input_ids=ids).logits[:, 0, allowed].cpu().double()

    try:
        before = logits()
    except Exception:  # why_no_decoder tells what it is
        return
    offset = before.mean(-1).abs().max().item()
    if offset < OFFSET or head.weight is embedding.weight:
        return
    kept = [parameter.clone() for parameter in head.parameters()]
    for parameter in head.parameters():  # weight [V, D], and a bias [V] where there is one
        parameter -= parameter[allowed].cpu().double().mean(0).to(parameter)
    moved = (logits().log_softmax(-1) - before.log_softmax(-1)).abs().max().item()
    if moved > max(1e-3, 1e-5 * offset):
        for parameter, old in zip(head.parameters(), kept, strict=True):
            parameter.copy_(old)
        return
    say(f"all logits had about {offset:.0f} in common: it is taken off the output embedding, so "
        "that it costs no digits")


@torch.no_grad()
def why_no_decoder(model, token_ids: Tensor) -> str:
    """What keeps a model from being a policy, "" if nothing does. token_ids [n].

    A token must not see later ones; padding on the left must change nothing; and what is kept of
    a text while it is written must give the logits that the whole text gives.
    """
    # Of the middle: the first ids are often control tokens, at which rounding errors are large.
    middle = max(0, min(len(token_ids) // 2, len(token_ids) - 6))
    ids = token_ids[middle:middle + 6].to(model.device)[None]  # [1, T]
    mask = torch.ones_like(ids)

    def logits(ids: Tensor, mask: Tensor) -> Tensor:  # [1, L, V]
        return model(**known_inputs(
            model, input_ids=ids, attention_mask=mask, position_ids=position_ids(mask),
            use_cache=False)).logits.float()[..., token_ids]

    try:
        whole = logits(ids, mask)
        limit = 1e-3 + 1e-4 * whole.abs().max().item()

        def differs(one: Tensor, other: Tensor) -> bool:
            return not bool((one - other).abs().max() <= limit)  # NaN differs

        if not torch.isfinite(whole).all():
            return "its logits are not finite"
        other = torch.cat([ids[:, :-1], ids[:, :1]], 1)  # with another last token
        if differs(logits(other, mask)[:, :-1], whole[:, :-1]):
            return "its tokens see later ones, so it is no decoder"
        if differs(model(input_ids=ids).logits.float()[..., token_ids], whole):
            return "it counts positions in a way of its own"  # RoBERTa's begin behind the pad's id
        output = model(**known_inputs(model, input_ids=ids, attention_mask=mask, use_cache=True))
        if getattr(output, cache_name(model), None) is None:
            return "it keeps no key/value cache, which sampling needs"
        padded = torch.nn.functional.pad(ids, (3, 0), value=int(token_ids[-1]))
        attention = torch.nn.functional.pad(mask, (3, 0))
        if differs(logits(padded, attention)[:, 3:], whole):
            return "padding on the left changes its logits"
        step = cached_decoder(model, attention[:, :-2])
        steps = [step(padded[:, :-2]), step(ids[:, -2:-1]), step(ids[:, -1:])]
        if differs(torch.stack(steps, 1)[..., token_ids].float(), whole[:, -3:]):
            return "its cache gives other logits than the whole text"
    except Exception as error:  # models fail in many ways
        return f"its forward fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return ""


@torch.no_grad()
def refuse_dtype(policy, name: str) -> None:
    """Raise UserError if a forward fails in the policy's dtype, as DBRX's does in bfloat16."""
    token = torch.zeros(1, 2, dtype=torch.long, device=policy.forbidden.device)
    try:
        policy.response_forward(token, torch.ones_like(token), 1)
    except RuntimeError as error:
        raise UserError(f"model {name!r} cannot be run with this --dtype ({error}): use --dtype "
                        "float32") from None


# ----------------------------------------------------------------------------------------- prompts


def chat_template(tokenizer) -> Template | None:
    """The tokenizer's chat template, if it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(turns: list[tuple[str, str]], open_turn: bool = True) -> str:
        messages = [{"role": role, "content": said} for role, said in turns]
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_turn)
        except Exception as error:  # templates refuse what their model was not trained on
            raise ValueError("is refused by the tokenizer's chat template: "
                             f"{type(error).__name__}: {error}") from None

    # What the template has between a prompt and its response: a space in Llama 2's.
    joint, probe = "", [("user", "Hello"), ("assistant", "Response")]
    with contextlib.suppress(ValueError):
        prompt, whole = render(probe[:1]), render(probe, open_turn=False)
        between = whole.removeprefix(prompt).partition("Response")[0]
        joint = between if whole.startswith(prompt) and between.isspace() else ""
    return Template(render, joint)


def prompt_ids(tokenizer, prompts: list[str], model, response_length: int,
               templated: bool = False) -> dict[str, list[int]]:
    """Prompt -> its ids. Each must fit the model with its response. Raises UserError."""
    ids = dict(zip(prompts, encode_prompts(tokenizer, prompts, templated), strict=True))
    if empty := [prompt for prompt in prompts if not ids[prompt]]:
        raise UserError(f"the prompt {empty[0][:40]!r} has no tokens in this model's vocabulary: "
                        "remove such rows")
    context = positions_of(model)
    longest = max(prompts, key=lambda prompt: len(ids[prompt]), default="")
    if prompts and len(ids[longest]) + response_length > context:
        raise UserError(f"the prompt {longest[:40]!r} has {len(ids[longest])} tokens; with "
                        f"--response-length {response_length} that exceeds the model's context of "
                        f"{context}: shorten or remove such rows, or lower --response-length")
    return ids


# ----------------------------------------------------------------------------------------- scorers


def load_scorer(spec: str, tokenizer, device: torch.device | str, texts: dict | None = None,
                eos_id: int | tuple[int, ...] | None = None) -> Scorer:
    """FILE.py:function or a sequence-classification model's folder -> scorer. Raises UserError.

    texts, eos_id: see data.text_scorer.
    """
    if ".py:" in spec:
        return text_scorer(_function(spec), spec, tokenizer, texts, eos_id)
    if Path(spec).is_dir():
        return text_scorer(_classifier(spec, device), spec, tokenizer, texts, eos_id)
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
    """A classifier as function(prompts, responses, ended): its logit, or positive - negative.

    Of a text that is too long for it the beginning is cut, which is the prompt's.
    """
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
    tokenizer.truncation_side = "left"
    longest = min(tokenizer.model_max_length, positions_of(model))
    scored, cut = 0, 0  # texts so far

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str], ended: list[bool]) -> Tensor:
        texts = [f"{prompt} {response}".strip()
                 for prompt, response in zip(prompts, responses, strict=True)]
        nonlocal scored, cut
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        now = sum(length > longest for length in lengths)
        scored, cut = scored + len(texts), cut + now
        if now and len(str(cut)) > len(str(cut - now)) or now == cut > 0:  # at 1, 10, 100, ...
            own = max(len(ids) for ids in tokenizer(responses)["input_ids"])
            tqdm.write(f"warning: {folder} reads {longest} tokens at most: the beginning of the "
                       f"prompt was cut in {cut} of {scored} texts so far"
                       + ", and of the response too" * (own > longest))
        scores = []
        for start in range(0, len(texts), 32):
            inputs = tokenizer(texts[start:start + 32], return_tensors="pt", padding=True,
                               truncation=True, max_length=longest).to(device)
            logits = model(input_ids=inputs["input_ids"],
                           attention_mask=inputs["attention_mask"]).logits  # [B, 1 or 2]
            scores.append(logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0])
        return torch.cat(scores)
    return score


def positions_of(model) -> int:
    """How many tokens a model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    for module in model.modules():  # RoBERTa's first positions, up to its pad's id, are no text's
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == positions:
            return positions - (0 if module.padding_idx is None else module.padding_idx + 1)
    return positions


# ------------------------------------------------------------------------------------ the matrix W


def read_matrix(path: str, n_agents: int) -> Tensor:
    """The communication matrix W of a JSON file -> [N, N] float64, each row divided by its sum.

    Raises UserError unless the file holds N rows of N finite numbers >= 0, none of them all zeros.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        matrix = torch.tensor(rows, dtype=torch.float64)
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

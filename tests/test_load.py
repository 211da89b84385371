"""support/load.py: every form of model, reward, judge and matrix, and all that is none."""

import contextlib
import json
import math
import re
import socket
import sys
import threading
import time
import urllib.request

import pytest
import torch
import worlds
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from worlds import refused

import data
from support import load

# ------------------------------------------------------------------------------------------ places


def test_the_embedded_world_is_found_from_anywhere(tmp_path, monkeypatch):
    """A folder tiny/ of the user's is meant by an absolute path alone."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "judge.py").touch()
    monkeypatch.chdir(tmp_path)
    assert load.home("tiny/data") == str(load.HOME / "tiny/data")
    assert (load.HOME / "fedppo.py").is_file() and load.home("other/data") == "other/data"
    own, given = str(tmp_path / "tiny" / "judge.py"), str(load.HOME / "tiny" / "judge.py")
    for path, ours in (("tiny/model", True), (given, True), (own, False), ("model", False)):
        assert load.embedded(path) is ours
    for spec, theirs in (("tiny/judge.py:score", False), (f"{given}:score", False),
                         (f"{own}:score", True), ("heldout", False), ("folder", False)):
        assert load.users_code(spec) is theirs


# ------------------------------------------------------------------------------------------ models


def test_the_small_model_loads_as_a_policy_needs_it(small_model):
    """Details 2, 21, 29: `<|padding|>` is the pad, ids without token are forbidden, float32."""
    assert AutoModelForCausalLM.from_pretrained(small_model).dtype == torch.float16
    model, tokenizer, forbidden = load.load_model(str(small_model), "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token) == (
        model.config.eos_token_id, model.config.pad_token_id, "<|padding|>") == (
        0, 1, "<|padding|>")
    assert len(tokenizer) == 320 and forbidden.shape == (352,) and forbidden.dtype == torch.bool
    assert forbidden.nonzero().flatten().tolist() == [1, *range(320, 352)]


def test_a_hole_in_the_vocabulary_is_forbidden_too(small_model, monkeypatch):
    vocabulary = PreTrainedTokenizerFast.get_vocab
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", lambda self: {
        token: i for token, i in vocabulary(self).items() if i != 200})
    _, _, forbidden = load.load_model(str(small_model), "cpu")
    assert forbidden[200] and not forbidden[199]


NAMES = ["<pad>", "<|reserved_special_token_7|>", "<unk>"]


@pytest.mark.parametrize("given, names, pad", [
    (7, [], 1), (0, [], 1), (None, [], 1), ("none", [], 0), ("<unk>", NAMES[2:], 320),
    ("none", NAMES[:1], 320), ("none", NAMES[1:], 320), ("none", NAMES[2:], 320),
    (0, NAMES[::-1], 1)])
def test_any_tokenizer_gets_a_pad(tmp_path, given, names, pad):
    """Details 2 and 33: its own, unless that is EOS or a letter; else `<|padding|>` or another that
    no text has, which is forbidden; else EOS, which is not. "none": it has no `<|padding|>`.
    """
    worlds.save_model(tmp_path)
    tokenizer = worlds.save_tokenizer(tmp_path, padding=given != "none")
    names = [*names, *(["<unk>"] if "<unk>" in names else [])]
    tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(names))})
    if "<unk>" in names:
        tokenizer.unk_token = "<unk>"
    if given in ("<unk>", 0, 7):
        tokenizer.pad_token = given if given == "<unk>" else tokenizer.convert_ids_to_tokens(given)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer, forbidden = load.load_model(str(tmp_path), "cpu")
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == pad
    assert forbidden[:321][[i for i in range(321) if i < len(tokenizer)]].nonzero(
        ).flatten().tolist() == ([pad] if pad else [])


@pytest.mark.parametrize("named, derived, ends", [
    (None, False, [0]), (0, True, [0]), (7, True, [0]), (7, False, [0, 7]), ([0, 7], False, [0, 7]),
    ([7, 1], False, [0, 7, 1]), ([1, 7], True, [0, 1]), ([0, 351], False, [0]),
    ("bos", True, [0])])
def test_every_eos_of_generation_config_counts_and_no_default_of_a_config(
        tmp_path, named, derived, ends):
    """Llama 3 names three; a GPT-NeoX config that was never told one says 2, which is a letter."""
    worlds.save_model(tmp_path)
    if named == "bos":
        tokenizer, named = worlds.save_tokenizer(tmp_path), 1
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(1)
        tokenizer.save_pretrained(tmp_path)
    config = {"eos_token_id": named, "_from_model_config": derived}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    said = []
    model, _, forbidden = load.load_model(str(tmp_path), "cpu", said.append)
    assert model.generation_config.eos_token_id == ends and not forbidden[ends[-1]]
    assert any("a response ends at any of" in line for line in said) is (len(ends) > 1)


def test_a_pad_that_ends_a_response_is_no_pad(tmp_path):
    """Qwen's pad is the EOS of its base model, and one of those of its chat model."""
    worlds.save_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    tokenizer = worlds.save_tokenizer(tmp_path)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.save_pretrained(tmp_path)
    _, tokenizer, forbidden = load.load_model(str(tmp_path), "cpu")
    assert tokenizer.pad_token_id == 1 and forbidden[1] and not forbidden[7]


def test_a_chat_template_makes_the_prompt_and_what_it_refuses_is_said(tmp_path):
    tokenizer = worlds.save_tokenizer(tmp_path)
    assert load.chat_template(tokenizer) is None
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    render = load.chat_template(tokenizer).render
    assert render([("user", "Hi"), ("assistant", "Yes"), ("user", "So?")]) == (
        "<user>Hi<assistant>Yes<user>So?<assistant>")
    assert load.chat_template(tokenizer).joint == ""
    with pytest.raises(ValueError, match="refused by the tokenizer's chat template.*no system"):
        render([("system", "Be kind")])


def test_what_a_template_has_between_prompt_and_response_is_kept(tmp_path):
    """Llama 2's puts a space there: the reward model must see the tokens that are written."""
    tokenizer = worlds.save_tokenizer(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
    made = load.chat_template(tokenizer)
    prompt = made.render([("user", "The room was")])
    assert (prompt, made.joint) == ("[INST] The room was [/INST]", " ")
    ids = data.encode_responses(tokenizer, [(prompt, made.joint, "lovely")], 9, eos=True)[0]
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "The room was"},
                                           {"role": "assistant", "content": "lovely"}])
    assert whole["input_ids"] == data.encode_prompts(tokenizer, [prompt], True)[0] + ids


def test_logits_that_are_capped_keep_their_offset(tmp_path):
    """Gemma 2 caps its logits: without the common number they would be other logits."""
    torch.manual_seed(0)
    tokenizer = worlds.save_tokenizer(tmp_path)
    shape = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, eos_token_id=0, bos_token_id=None,
        pad_token_id=1, tie_word_embeddings=False, final_logit_softcapping=40.0,
        initializer_range=0.3)
    model = Gemma2ForCausalLM(shape)
    with torch.no_grad():
        model.lm_head.weight += 0.5
    model.save_pretrained(tmp_path)
    said = []
    loaded, *_ = load.load_model(str(tmp_path), "cpu", said.append)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight) and not said


def test_a_model_that_cannot_be_trained_is_refused(tmp_path):
    def check(folder, says):
        with refused(f"{re.escape(str(folder))}.*{says}"):
            load.load_model(str(folder), "cpu")
    model = worlds.save_model(tmp_path / "model")
    worlds.save_tokenizer(model, eos=False)
    check(model, "no EOS token")
    low = worlds.save_model(tmp_path / "low", vocab_size=300)
    check(low, "ids go to 319, the embedding has 300 rows")
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", "holds no causal language model")
    weights = worlds.save_model(tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    check(tmp_path / "cut", "")
    headless = worlds.save_model(tmp_path / "headless")
    GPTNeoXModel(worlds.config()).save_pretrained(headless)  # its output layer would be random
    check(headless, "lm_head")
    check("nobody/nothing", "hf download nobody/nothing")
    check(tmp_path / "gone", "no local folder")


def test_a_prompt_must_have_tokens_and_leave_room_for_a_response(small_model):
    """The small model's context is 64 positions: the longest prompt's 24 tokens and 40 more."""
    model, tokenizer, _ = load.load_model(str(small_model), "cpu")
    prompts = ["The room", "The" + " room" * 23]
    ids = load.prompt_ids(tokenizer, prompts, model, 40)
    assert list(ids) == prompts and ids["The room"] == tokenizer("The room")["input_ids"]
    assert len(ids[prompts[1]]) == 24
    with refused("'The room room.* has 24 tokens; with --response-length 41 .* context of 64"):
        load.prompt_ids(tokenizer, prompts, model, 41)
    with refused("the prompt '' has no tokens"):
        load.prompt_ids(tokenizer, [*prompts, ""], model, 4)


@pytest.mark.parametrize("model, dataset, asked", [
    ("tiny/model", "tiny/data", 0), ("hub/name", "tiny/data", 1), ("tiny/model", "hub/name", 1)])
def test_the_hub_is_asked_once_and_only_for_what_is_not_here(monkeypatch, model, dataset, asked):
    calls = []
    monkeypatch.setattr(load, "online", lambda: calls.append(1))
    load.prepare_libraries(("tiny/model", model), dataset)
    assert len(calls) == asked


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


@pytest.fixture
def ask(monkeypatch):
    """ask(endpoint, timeout) -> what `online` says of this endpoint, and how long it took."""
    def ask(endpoint, timeout=2.0):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        started = time.perf_counter()
        return load.online(timeout), time.perf_counter() - started
    return ask


@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found", b"503 Busy"])
def test_a_hub_that_answers_is_reachable(ask, status):
    with server(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n") as endpoint:
        assert ask(endpoint)[0] is True


def test_a_dead_or_silent_hub_is_given_up_in_time_and_the_caches_are_used(ask):
    reachable, seconds = ask("http://127.0.0.1:9")
    assert reachable is False and seconds < 2
    with server(b"") as endpoint:
        reachable, seconds = ask(endpoint, timeout=0.2)
    assert reachable is False and seconds < 1.5
    assert load.os.environ["HF_HUB_OFFLINE"] == load.os.environ["HF_DATASETS_OFFLINE"] == "1"


def test_a_resolver_that_hangs_is_given_up_after_the_timeout(ask, monkeypatch):
    """A socket's timeout does not hold for looking up its name, which can take half a minute."""
    released = threading.Event()

    def hangs(*args, **kwargs):
        released.wait(4)
        raise socket.gaierror
    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    try:
        reachable, seconds = ask("https://huggingface.invalid", timeout=0.2)
    finally:
        released.set()
    assert reachable is False and seconds < 1.5


@pytest.mark.parametrize("endpoint", [
    "nonsense", "http://127.0.0.1:port", "http://", "ftp://127.0.0.1:9"])
def test_a_wrong_endpoint_is_no_crash(ask, endpoint):
    assert ask(endpoint)[0] is False


def test_a_server_that_does_not_speak_http_is_no_crash(ask):
    with server(b"SSH-2.0-OpenSSH_9.6\r\n") as endpoint:
        assert ask(endpoint)[0] in (True, False)


def test_offline_is_not_asked(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("asked"))
    for value in ("1", "true", "ON"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert load.online() is False


# ----------------------------------------------------------------------------------------- scorers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = worlds.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.pad_token = "<|padding|>"
    return tokenizer


def test_load_scorer_takes_a_function_in_a_file(tmp_path, tokenizer):
    (tmp_path / "rule.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Rule:\n    word: str\n\n\n"
        "def score(prompts, responses, ended):\n"
        "    return [r.count(Rule('calm').word) for r in responses]\n")
    scorer = load.load_scorer(f"{tmp_path / 'rule.py'}:score", tokenizer, "cpu")
    batch = worlds.batch_of(tokenizer, ["The room"] * 2, ["calm and calm|", "dull"])
    assert scorer(*batch).tolist() == [2, 0]


@pytest.mark.parametrize("spec, says", [
    ("gone.py:score", "there is no file"), ("bad.py:score", "ZeroDivisionError"),
    ("bad syntax.py:score", "SyntaxError"), ("exits.py:score", "SystemExit"),
    ("rule.py:other", "no function 'other'"), ("rule.py:number", "no function 'number'"),
    ("rule.py", "neither"), ("gone", "neither"), ("empty", "no sequence-classification model")])
def test_a_scorer_that_cannot_be_had_is_named_in_one_line(tmp_path, tokenizer, monkeypatch, spec,
                                                          says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.py").write_text("1 / 0\n")
    (tmp_path / "bad syntax.py").write_text("def score(:\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "rule.py").write_text("number = 3\n")
    with refused(says):
        load.load_scorer(spec, tokenizer, "cpu")


def test_a_file_of_the_users_replaces_no_module(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "math.py").write_text(f"def name(*args):\n    return {folder!r}\n")
    functions = [load._function(f"{tmp_path / folder / 'math.py'}:name") for folder in ("a", "b")]
    assert [function() for function in functions] == ["a", "b"] and sys.modules["math"] is math


def save_classifier(folder, labels, **changes):
    torch.manual_seed(labels)
    shape = worlds.config(num_labels=labels, num_hidden_layers=1, **changes)
    model = GPTNeoXForSequenceClassification(shape).eval()
    model.save_pretrained(folder)
    worlds.save_tokenizer(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_load_scorer_takes_a_classifier(tmp_path, tokenizer, labels, side):
    """One logit, or positive - negative, at the last token; each row by itself is the oracle."""
    model = save_classifier(tmp_path, labels)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"padding_side": side}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    prompts = ["The room", "The song was so", "It"]
    responses = ["lovely and calm|", "dull", "was grey."]
    scorer = load.load_scorer(str(tmp_path), tokenizer, "cpu")
    scores = scorer(*worlds.batch_of(tokenizer, prompts, responses))
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = tokenizer(f"{prompt} {response.rstrip('|')}", return_tensors="pt")["input_ids"]
        states = model.base_model(input_ids=ids).last_hidden_state
        logits = model.score(states)[0, -1].tolist()
        expected.append(logits[0] if labels == 1 else logits[1] - logits[0])
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-2


def test_a_classifier_cuts_the_prompt_and_says_how_often(tmp_path, tokenizer, capfd):
    """16 positions: the last 16 tokens of a text are scored, whatever its prompt was."""
    save_classifier(tmp_path, 1, max_position_embeddings=16)
    scorer = load.load_scorer(str(tmp_path), tokenizer, "cpu")
    long, short = "The room was calm and " * 9 + "so", "The song"
    scores = scorer(*worlds.batch_of(tokenizer, [long, "It " * 30 + long, short],
                                     ["lovely and calm|"] * 3)).tolist()
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and abs(scores[0] - scores[2]) > 1e-4
    printed = capfd.readouterr().out
    assert "reads 16 tokens at most: the beginning of the prompt was cut in 2 of 3" in printed
    assert "response too" not in printed
    scorer(*worlds.batch_of(tokenizer, [long], ["dull|"]))
    assert not capfd.readouterr().out, "it is said at 1, 10, 100, ..."
    scorer(*worlds.batch_of(tokenizer, [long] * 9, ["dull|"] * 9))
    assert "cut in 12 of 13" in capfd.readouterr().out


def test_a_classifier_is_given_no_more_tokens_than_it_has_positions_for(tmp_path, capfd):
    """RoBERTa's first text position comes behind its pad's id; and a response can be too long."""
    tokenizer = worlds.save_tokenizer(tmp_path)
    shape = RobertaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                          num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=16,
                          num_labels=1, pad_token_id=1)
    RobertaForSequenceClassification(shape).save_pretrained(tmp_path)
    scorer = load.load_scorer(str(tmp_path), tokenizer, "cpu")
    scores = scorer(*worlds.batch_of(tokenizer, ["The room"] * 2, ["so " * 40 + "|", "calm|"]))
    assert torch.isfinite(scores).all()
    printed = capfd.readouterr().out
    assert "reads 14 tokens at most" in printed and "and of the response too" in printed


def test_what_is_no_judge_is_refused(tmp_path, tokenizer, small_model):
    """Detail 28: transformers would give a language model a random head and call it a judge."""
    save_classifier(tmp_path, 3)
    with refused("3 labels"):
        load.load_scorer(str(tmp_path), tokenizer, "cpu")
    with refused("no sequence-classification model"):
        load.load_scorer(str(small_model), tokenizer, "cpu")


# ------------------------------------------------------------------------------------ the matrix W


def test_a_matrix_is_normalised_by_row(tmp_path):
    (tmp_path / "w.json").write_text("[[3, 1], [0, 5]]")
    matrix = load.read_matrix(str(tmp_path / "w.json"), 2)
    assert matrix.dtype == torch.float64 and matrix.tolist() == [[0.75, 0.25], [0.0, 1.0]]


@pytest.mark.parametrize("text, says", [
    ("[[1, 0, 0], [0, 1, 0], [0, 0, 1]]", "is 3 x 3, and 2 agents need 2 x 2"),
    ("[[1, 0]]", "is 1 x 2"), ("[1, 0]", "is 2, and"), ("[]", "is 0, and"), ("5", "is a number"),
    ("[[1, -0.5], [0, 1]]", "not negative"), ("[[1, NaN], [0, 1]]", "finite"),
    ("[[1, Infinity], [0, 1]]", "finite"), ("[[1e308, 1e308], [0, 1]]", "their sums too"),
    ("[[1, 1], [0, 0]]", "row 1 is all zeros"), ("[[1, 1], [1]]", "no JSON matrix"),
    ('[[1, "a"], [0, 1]]', "no JSON matrix"), ('{"rows": [[1, 0], [0, 1]]}', "no JSON matrix"),
    ("null", "no JSON matrix"), ("[[1, 0], [0, 1]", "no JSON matrix"), ("", "no JSON matrix")])
def test_a_wrong_matrix_is_refused(tmp_path, text, says):
    (tmp_path / "w.json").write_text(text)
    with refused(f"--topology .*w.json.*{says}"):
        load.read_matrix(str(tmp_path / "w.json"), 2)


def test_a_matrix_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.json").write_bytes(b"[[1, 0], [0, 1]] caf\xe9")
    for path in ("rings", tmp_path / "gone.json", tmp_path, tmp_path / "latin.json"):
        with refused(f"{re.escape(str(path))}.* none of self, uniform, ring"):  # what there is
            load.read_matrix(str(path), 2)

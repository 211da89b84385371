"""Shared by the test files: one thread, small settings, random toy policies, the tiny world loaded
once, and the program run for a second."""

import dataclasses
import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before transformers

import pytest  # noqa: E402
import torch  # noqa: E402
import worlds  # noqa: E402
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # noqa: E402

import fedppo  # noqa: E402
import plot  # noqa: E402
import ppo_core  # noqa: E402
from support import settings  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def no_picture():
    """Runs draw none: it would take a third of their time; tests/test_plot.py has its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "draw", lambda folders, out: (out, out))
        yield


@pytest.fixture(scope="session")
def small_settings():
    """small_settings(**changes) -> the tiny preset, cut to a run of seconds."""
    tiny = settings.parse(["--preset", "tiny", "--device", "cpu"], fedppo.MODES).settings
    small = dataclasses.replace(tiny, agents=2, rounds=2, updates=1, batch=8, pairs=60,
                                eval_prompts=8, reward_epochs=2, anchor=0.0, self_weight=0.4)
    return lambda **changes: dataclasses.replace(small, **changes)


@pytest.fixture(scope="session")
def toy_policy():
    """toy_policy(seed) -> a random GPT-NeoX policy: EOS 0, pad 1, 16 ids of which the last two are
    no token.

    Its weights are drawn wide enough that its distributions differ well from uniform and from
    state to state.
    """
    def make(seed: int = 0, **config) -> ppo_core.Policy:
        shape = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
                 "initializer_range": 0.4, "eos_token_id": 0, "bos_token_id": 0,
                 "pad_token_id": 1} | config
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
        forbidden = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        forbidden[[1, -2, -1]] = True
        return ppo_core.Policy(model, forbidden)
    return make


@pytest.fixture(scope="session")
def tiny_world(small_settings):
    """The embedded model and data, under small settings."""
    return fedppo.World(small_settings())


@pytest.fixture(scope="session")
def tiny_task(tiny_world):
    """What seed 0 gives to two agents of the tiny world."""
    return fedppo.make_task(tiny_world, 0)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """The folder of a random GPT-NeoX of hidden size 32, its tokenizer as Pythia's (worlds.py).

    Do not write to it.
    """
    return worlds.save_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def short(small_model, tmp_path_factory):
    """The flags of a run of half a second on the small model and 40 rows; later ones win."""
    file = tmp_path_factory.mktemp("rows") / "good.jsonl"
    rows = worlds.write_jsonl(file, worlds.text_rows(40))
    flags = ("--preset tiny --device cpu --shards iid --agents 2 --pairs 4 --eval-prompts 2 "
             "--judge none --rounds 2 --updates 1 --batch 4 --response-length 4 "
             "--reward-epochs 1 --epochs 1 --minibatches 1 --name run")
    return ["--model", str(small_model), "--dataset", str(rows), *flags.split()]

"""graphs.py: its step against the plain sampler, what a capture needs of a step, and on a GPU the capture itself."""

import contextlib
import gc

import pytest
import torch
from test_ppo_core import EOS, PAD, PROMPTS
from torch.utils._python_dispatch import TorchDispatchMode

import data
import graphs
import ppo_core


def both(policy, prompts, T, seed=0, **changed):
    """(response, mask) of the plain sampler and of the one here, with the same uniforms."""
    ids, mask = data.pad(prompts, PAD, "left", policy.forbidden.device)
    options = {"temperature": 0.8, "eos_id": EOS, "pad_id": PAD} | changed
    return [sample(policy, ids, mask, T, **options, generator=torch.Generator().manual_seed(seed))
            for sample in (graphs.plain, graphs.generate)]


def assert_same(found):
    (response, mask), (other, other_mask) = found
    assert torch.equal(response, other) and torch.equal(mask, other_mask) and mask.dtype == other_mask.dtype


@pytest.mark.parametrize("greedy", [False, True])
def test_the_fixed_shape_step_gives_the_plain_samplers_tokens(toy_policy, greedy):
    """Several calls on the same buffers: other prompts of other lengths, other uniforms, a policy that has moved."""
    policy, lengths = toy_policy(rotary_pct=0.5), []
    for call, prompts in enumerate((PROMPTS, [p[:2] for p in PROMPTS], PROMPTS[::-1], PROMPTS)):
        found = both(policy, prompts, 20, seed=call, greedy=greedy)
        assert_same(found)
        lengths += found[0][1].sum(1).tolist()
        for parameter in policy.model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(call))
    assert len(graphs.SAMPLERS[policy]) == 1
    assert len(set(lengths)) > 2 or greedy  # rows end at different tokens


@pytest.mark.parametrize("T", [1, 2, 40])
def test_any_number_of_tokens(toy_policy, T):
    assert_same(both(toy_policy(3), PROMPTS, T))
    if T == 40:  # no row ends: forbidden ids are never drawn
        found = both(toy_policy(3), PROMPTS, T, eos_id=15)
        assert_same(found)
        assert found[1][0].shape[1] == 40


def test_the_end_is_seen_though_the_host_looks_seldom(toy_policy, monkeypatch):
    """Every row ends early, after a call in which none did: nothing of that is left, and T tokens are not drawn."""
    policy, steps = toy_policy(3), []
    assert both(policy, PROMPTS[:2], 200, seed=1)[1][0].shape[1] == 200
    advance = graphs.Sampler.advance
    monkeypatch.setattr(graphs.Sampler, "advance", lambda self: (steps.append(0), advance(self)))
    torch.nn.init.zeros_(policy.model.get_output_embeddings().weight)  # uniform over 13 ids
    found = both(policy, PROMPTS[:2], 200)
    assert_same(found)
    assert found[0][0].shape[1] <= len(steps) + 1 <= found[0][0].shape[1] + 16 < 200


def test_bfloat16_matrices_are_cast_once_a_call_and_follow_the_policy(toy_policy):
    policy = ppo_core.Policy(toy_policy().model, toy_policy().forbidden, torch.bfloat16)
    assert_same(both(policy, PROMPTS, 20))
    sampler, = graphs.SAMPLERS[policy].values()
    twin, layer = sampler.model, sampler.trunk.layers[1]
    assert {p.dtype for p in (twin.get_output_embeddings().weight, *layer.mlp.parameters())} == {torch.bfloat16}
    for mine, own in zip((sampler.trunk.embed_in, layer.input_layernorm),
                         (policy.model.base_model.embed_in, policy.model.base_model.layers[1].input_layernorm),
                         strict=True):
        assert mine.weight is own.weight and own.weight.dtype == torch.float32
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    for parameter in policy.model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert_same(both(policy, PROMPTS, 20, seed=1))


def test_a_tied_head_stays_one_with_the_embedding(toy_policy):
    policy = ppo_core.Policy(toy_policy(tie_word_embeddings=True).model, toy_policy().forbidden, torch.bfloat16)
    matrix = policy.model.base_model.embed_in.weight
    assert policy.model.get_output_embeddings().weight is matrix
    assert graphs.cast_products(policy.model, torch.bfloat16)[0].get_output_embeddings().weight is matrix
    assert_same(both(policy, PROMPTS, 8))


def test_samplers_go_when_their_policy_goes(toy_policy):
    policy = toy_policy(9)
    both(policy, PROMPTS, 2)
    before = len(graphs.SAMPLERS)
    del policy
    gc.collect()
    assert len(graphs.SAMPLERS) < before


def test_another_architecture_is_sampled_plainly(toy_policy, monkeypatch):
    policy = toy_policy()
    monkeypatch.setattr(ppo_core, "is_neox", lambda trunk: False)
    assert_same(both(policy, PROMPTS, 4))
    assert policy not in graphs.SAMPLERS


WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}


class Watch(TorchDispatchMode):
    """The operators of one step."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__.split(".")[0])
        return function(*args, **kwargs or {})


@torch.no_grad()
def test_a_step_can_be_captured(toy_policy):
    """Nothing in it waits for a result or comes from the host, and its state stays where it is."""
    policy = toy_policy()
    both(policy, PROMPTS, 20)
    sampler, = graphs.SAMPLERS[policy].values()
    ids, mask = data.pad(PROMPTS, PAD, "left")
    sampler.begin(ids, mask, torch.rand(20, len(PROMPTS)))
    before = {name: x.data_ptr() for name, x in vars(sampler).items() if isinstance(x, torch.Tensor)}
    with Watch() as watch:
        sampler.advance()
    assert {"addmm", "searchsorted", "index_copy_"} <= watch.names
    assert not (WAITS | {"lift_fresh", "_to_copy"}) & watch.names
    assert {name: vars(sampler)[name].data_ptr() for name in before} == before


@torch.no_grad()
def test_every_tensor_is_on_the_models_device(toy_policy, monkeypatch):
    """On a device whose tensors cannot be mixed with a CPU's, as a GPU's cannot."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # not on this device
    policy = toy_policy().to("meta")
    sampler = graphs.Sampler(policy, 3, 64, 20, 1.0, EOS, PAD, False)
    prompt, mask = torch.zeros(2, 3, 5, dtype=torch.long, device="meta")
    sampler.begin(prompt, mask, torch.rand(20, 3, device="meta"))
    sampler.advance()
    assert {x.device.type for x in vars(sampler).values() if isinstance(x, torch.Tensor)} == {"meta"}


# ------------------------------------------------------------------------------------------------------------ bind


def bind(policy, **changed):
    ids, mask = data.pad(PROMPTS * 4, PAD, "left", policy.forbidden.device)
    return graphs.bind(policy, ids, mask, 20, **{"temperature": 1.0, "eos_id": EOS, "pad_id": PAD} | changed)


@pytest.fixture
def unbound(monkeypatch):
    monkeypatch.setattr(ppo_core, "generate", graphs.plain)  # and back after the test


def test_bind_puts_it_in_place_of_the_plain_sampler(toy_policy, unbound):
    assert bind(toy_policy()) == "sampling with CUDA graphs"
    assert ppo_core.generate is graphs.generate


def test_a_graph_that_cannot_be_made_later_leaves_the_plain_sampler(toy_policy, unbound, monkeypatch, capsys):
    bind(toy_policy())
    monkeypatch.setattr(graphs, "Sampler", lambda *args: (_ for _ in ()).throw(RuntimeError("out of\nmemory")))
    assert_same(both(toy_policy(), PROMPTS, 9))
    assert ppo_core.generate is graphs.plain and "from here on: out of memory" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="memory"):
        graphs.generate(toy_policy(), *data.pad(PROMPTS, PAD, "left"), 9, temperature=1.0, eos_id=EOS, pad_id=PAD)


@torch.no_grad()
def test_a_nan_does_not_outlive_its_call(toy_policy):
    policy = toy_policy()
    both(policy, PROMPTS, 20)
    sampler, = graphs.SAMPLERS[policy].values()
    sampler.cache.fill_(torch.nan)
    assert_same(both(policy, PROMPTS, 20))


def test_bind_is_not_taken_in_by_a_graph_that_does_nothing(toy_policy, unbound, monkeypatch):
    monkeypatch.setattr(graphs.Sampler, "advance", lambda self: None)
    assert "tokens differ" in bind(toy_policy())


@pytest.mark.parametrize("damage", ["cache", "error"])
def test_bind_keeps_the_plain_sampler_where_the_other_fails(toy_policy, unbound, monkeypatch, damage):
    def stale(self):  # keys and values of what was drawn are not kept
        cache = self.cache.clone()
        advance(self)
        self.cache.copy_(cache)

    def broken(self):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")
    advance = graphs.Sampler.advance
    monkeypatch.setattr(graphs.Sampler, "advance", stale if damage == "cache" else broken)
    said = bind(toy_policy())
    assert said.startswith("no CUDA graphs: ")
    assert ("operation not permitted when" if damage == "error" else "of their first tokens differ") in said
    assert ppo_core.generate is graphs.plain and not graphs.SAMPLERS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("greedy", [False, True])
def test_the_captured_step_is_the_plain_sampler(toy_policy, unbound, dtype, greedy):
    """Also when the policy has moved since the capture."""
    policy = ppo_core.Policy(toy_policy().model.cuda(), toy_policy().forbidden, dtype)
    assert bind(policy, greedy=greedy) == "sampling with CUDA graphs"
    for call in range(3):
        found = both(policy, PROMPTS, 20, seed=call, greedy=greedy)
        if dtype == torch.float32:
            assert_same(found)
        width = min(4, *(response.shape[1] for response, _ in found))
        assert (found[0][0][:, :width] == found[1][0][:, :width]).float().mean() > 0.7
        for parameter in policy.model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, device="cuda")
    assert any(sampler.graph for sampler in graphs.SAMPLERS[policy].values())

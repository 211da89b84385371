"""support/fast.py: every faster form against the plain one, which is its oracle.

In reading order: policy and reward model of a GPT-NeoX; the gradients of the two [V, D]; the
sampler of fixed shape, what a capture needs of a step, on a GPU the capture itself; the machine.
"""

import contextlib
import copy
import gc
import platform
import subprocess
import sys

import pytest
import torch
from test_ppo_core import (
    EOS,
    ONE,
    PAD,
    PROMPTS,
    by_position,
    close,
    gradient,
    moved,
    randn,
    roll,
    stream,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import policies
import ppo_core
from support import fast, load
from world import World

RESPONSES = [[4, 0], [9, 3, 2, 0], [7], [2, 2, 8]] * 2
SHAPES = pytest.mark.parametrize("config", [
    {}, {"rotary_pct": 1.0, "use_parallel_residual": False},
    {"rotary_pct": 0.5, "tie_word_embeddings": True}, {"attention_bias": False}],
    ids=["parallel", "serial", "tied", "without bias"])


def noisy(toy_policy, **config):
    """A toy policy in which no bias or norm is 0 or 1, as fresh models have them."""
    return moved(toy_policy(**config), 0.1, 3)


def quick(policy, dtype=torch.float32):
    """The same policy, value head and all, in its faster form."""
    other = fast.policy(copy.deepcopy(policy.model), policy.forbidden, dtype)
    other.value_head.load_state_dict(policy.value_head.state_dict())
    return other


def texts():
    """-> ids, attention [B, Q+T], response, mask [B, T]: padded on the left and on the right."""
    prompts, prompt_mask = data.pad(PROMPTS, PAD, "left")
    response, mask = data.pad(RESPONSES, PAD, "right")
    return torch.cat([prompts, response], 1), torch.cat([prompt_mask, mask], 1), response, mask


def summed(module):
    """The gradients that have been summed in a module's parameters, by name."""
    return {name: parameter.grad for name, parameter in module.named_parameters()}


# -------------------------------------------------------------------------- policy and reward model


def test_the_fast_form_is_for_gpt_neox_alone(toy_policy):
    neox, other = toy_policy(), by_position()
    assert type(fast.policy(neox.model, neox.forbidden, torch.float32)) is fast.FastPolicy
    assert type(fast.policy(other.model, other.forbidden, torch.bfloat16)) is ppo_core.Policy
    assert type(fast.reward_model(neox.model, "last", stream())) is fast.FastRewardModel
    assert type(fast.reward_model(other.model, "mean", stream())) is data.RewardModel


@SHAPES
def test_forward_and_gradients_are_those_of_the_plain_policy(toy_policy, config):
    """Gradients are summed over three micro-batches, of which the first finds none."""
    plain = noisy(toy_policy, **config)
    part, found = texts(), []
    real = part[3].bool()
    for policy in (plain, quick(plain)):
        logprobs, all_logprobs, values = ppo_core.score_tokens(policy, *part, 0.8)
        everything = all_logprobs[real][:, ~policy.forbidden]
        for rows in torch.arange(len(PROMPTS)).split(3):
            one, every, value = ppo_core.score_tokens(policy, *(x[rows] for x in part), 0.8)
            kept = every[real[rows]][:, ~policy.forbidden]
            (kept.sin().sum() + one.sum() + value[real[rows]].square().sum()).backward()
        assert (all_logprobs[..., policy.forbidden] == -torch.inf).all()
        found.append((logprobs[real], everything, values[real], summed(policy)))
    for quicker, slow in zip(found[1][:3], found[0][:3], strict=True):
        torch.testing.assert_close(quicker, slow, rtol=1e-4, atol=2e-5)
    assert found[0][3].keys() == found[1][3].keys()
    for name, grad in found[0][3].items():
        torch.testing.assert_close(found[1][3][name], grad, rtol=1e-4, atol=5e-5, msg=name)
        assert grad.any(), name


@pytest.mark.parametrize("short", [fast.SHORT, 0])
@pytest.mark.parametrize("queries, keys", [(1, 7), (7, 7), (3, 7)])
def test_attend_is_attention_short_or_long(monkeypatch, short, queries, keys):
    """Values and gradients, in float64 by the definition; queries are the last positions, and the
    first row's first two keys are pads."""
    monkeypatch.setattr(fast, "SHORT", short)
    query, key, value = (randn(n, 2, 3, length, 4).double().requires_grad_()
                         for n, length in enumerate((queries, keys, keys)))
    mask = torch.ones(2, keys).index_put((torch.tensor([0]), torch.arange(2)), torch.tensor(0.0))
    bias = fast.causal_bias(mask, torch.float32)[:, :, keys - queries:]
    given = torch.einsum("bhld,bhed->bhle", query, key) / 2  # the root of 4
    seen = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    seen = seen & mask[:, None, None].bool()
    real = seen.any(-1).expand(2, 3, queries)  # a pad's query sees nothing: its state is not read
    expected = given.masked_fill(~seen & seen.any(-1, True), -torch.inf).softmax(-1) @ value
    found = fast.attend(query, key, value, bias.double())
    close(found[real], expected[real])
    for ours, theirs in zip(*(torch.autograd.grad(x[real].sin().sum(), (query, key, value))
                              for x in (found, expected)), strict=True):
        close(ours, theirs)


def test_a_model_of_another_family_attends_plainly_where_texts_are_short(tmp_path, toy_policy):
    """Copies of it too, and nothing of it is saved; tests/test_families.py compares the numbers."""
    model = by_position().model
    assert model.config._attn_implementation == "sdpa"
    fast.eager_if_short(model, fast.SHORT + 1, torch.float32)
    fast.eager_if_short(model, fast.SHORT, torch.bfloat16)
    model.save_pretrained(tmp_path / "long")
    assert model.config._attn_implementation == "sdpa"
    fast.eager_if_short(model, fast.SHORT, torch.float32)
    copies = policies.twin(model, 0), policies.twin(model, 1), data.RewardModel(
        model, "last", stream()).trunk
    assert {one.config._attn_implementation for one in (model, *copies)} == {"eager"}
    model.save_pretrained(tmp_path / "short")
    config, other = ((tmp_path / name / "config.json").read_text() for name in ("long", "short"))
    assert config == other


def test_a_world_tells_its_models_how_long_texts_are(small_settings, monkeypatch):
    told = []
    monkeypatch.setattr(fast, "eager_if_short", lambda *args: told.append(args))
    world = World(small_settings(response_length=7))
    longest = max(map(len, world.prompt_ids.values())) + 7
    assert told == [(world.model, longest, torch.float32)]


@SHAPES
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_and_gradients_are_those_of_the_plain_reward_model(toy_policy, config, pooling):
    causal, (ids, mask, *_), found = noisy(toy_policy, **config).model, texts(), []
    for kind in (data.RewardModel, fast.FastRewardModel):
        model = kind(causal, pooling, stream(5))
        for rows in (slice(0, 3), slice(3, 8)):
            model(ids[rows], mask[rows]).sin().sum().backward()
        found.append((model(ids, mask), summed(model)))
    (slow, slow_grads), (quicker, grads) = found
    torch.testing.assert_close(quicker, slow, rtol=1e-4, atol=1e-5)
    for name, grad in slow_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=2e-5, msg=name)


@SHAPES
@torch.no_grad()
def test_the_decoder_is_that_of_the_plain_policy(toy_policy, config):
    """Behind left padding, with a cache of fixed size; in bfloat16 to bfloat16's rounding."""
    plain = noisy(toy_policy, **config)
    _, mask = data.pad(PROMPTS, PAD, "left")
    assert not mask.all()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.3)):
        slow, quicker = plain.decoder(mask, 6), quick(plain, dtype).decoder(mask, 6)
        tokens, random = data.pad(PROMPTS, PAD, "left")[0], stream()
        for _ in range(6):
            logits, expected = quicker(tokens), slow(tokens)
            assert logits.shape == (len(PROMPTS), 16) and logits.dtype == torch.float32
            assert torch.equal(logits == -torch.inf, plain.forbidden.expand_as(logits))
            torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
            tokens = torch.randint(2, 14, (len(PROMPTS), 1), generator=random)


@pytest.mark.parametrize("penalty", ["exact-in-loss", "k1-in-reward"])
def test_a_whole_update_is_that_of_the_plain_policy(toy_policy, small_settings, penalty):
    """The same tokens, metrics and weights, though each micro-batch adds to gradients in place."""
    s = small_settings(response_length=6, micro_batch=3, penalty=penalty)
    plain = noisy(toy_policy)
    references, found = [moved(plain, 0.1)], []
    for policy in (plain, quick(plain)):
        rollout = roll(policy, s, references)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        metrics = ppo_core.optimise(policy, optimizer, rollout, ONE, 0.3, s, stream())
        weights = nn.utils.parameters_to_vector(policy.parameters()).detach()
        found.append((rollout.response, metrics, weights))
    (response, metrics, weights), (other, others_metrics, others_weights) = found
    assert torch.equal(response, other)
    assert others_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(others_weights, weights, rtol=0, atol=2e-5)


def test_bfloat16_logprobs_are_as_near_as_the_help_says(tiny_world):
    """--dtype: an error of about 0.001; products are in bfloat16, weights and results are not."""
    policy = tiny_world.new_policy()
    rough = quick(policy, torch.bfloat16)
    plain = ppo_core.Policy(policy.model, policy.forbidden, torch.bfloat16)
    prompt, prompt_mask, response, mask = tiny_world.respond(
        list(tiny_world.prompt_ids)[:64], rough, stream())
    part = torch.cat([prompt, response], 1), torch.cat([prompt_mask, mask], 1), response, mask
    exact, *others = (ppo_core.score_tokens(p, *part, 1.0)[0] for p in (policy, plain, rough))
    slope, *slopes = (gradient(x.exp().sum(), p.model)
                      for x, p in zip((exact, *others), (policy, plain, rough), strict=True))
    for other, other_slope in zip(others, slopes, strict=True):
        error = (exact - other).abs()[mask.bool()]
        assert 2e-4 < error.mean() < 2e-3 and error.max() < 0.02 and other.dtype == torch.float32
        assert 5e-4 < (other_slope - slope).norm() / slope.norm() < 0.01
    with torch.no_grad():  # the sampler, outside generate too, as preflight calls it
        sampled, precise = (p.decoder(prompt_mask, 1)(prompt).log_softmax(-1)
                            .gather(-1, response[:, :1])[:, 0] for p in (rough, policy))
    near, far = ((x - others[1][:, 0]).abs().mean() for x in (sampled, precise))
    assert near < 1e-3 < far
    others[1].sum().backward()
    assert {p.grad.dtype for p in rough.model.parameters()} == {torch.float32}


# ----------------------------------------------------------------------------------- the two [V, D]


@pytest.mark.parametrize("tied", [False, True])
def test_embed_and_project_sum_the_gradients_that_torch_makes(tied):
    """Three micro-batches, of which the first finds no gradient."""
    ids, pulls = torch.randint(0, 11, (3, 2, 5), generator=stream()), randn(2, 3, 2, 5, 11)
    found = []
    for embed, project in ((fast.Embed.apply, fast.Project.apply),
                           (nn.functional.embedding, nn.functional.linear)):
        table = randn(0, 11, 4).requires_grad_()
        matrix = table if tied else randn(1, 11, 4).requires_grad_()
        for tokens, pull in zip(ids, pulls, strict=True):
            logits = project(embed(tokens, table).tanh(), matrix)
            (logits * pull).sum().backward()
        found.append((logits.detach(), table.grad, matrix.grad))
    for quicker, slow in zip(*found, strict=True):
        close(quicker, slow)


def test_a_frozen_matrix_gets_no_gradient():
    kept = randn(1, 11, 4)
    kept.grad = torch.zeros_like(kept)  # what may stand there is not touched
    hidden = randn(3, 2, 5, 4).requires_grad_()
    fast.Project.apply(hidden, kept).sum().backward()
    assert not kept.grad.any() and hidden.grad.any()


# ---------------------------------------------------------------------------- the sampler of graphs


def options(**changed):
    return {"temperature": 0.8, "eos_id": EOS, "pad_id": PAD} | changed


def both(graphs, policy, prompts, T, seed=0, **changed):
    """(response, mask) of the plain sampler and of `graphs`, with the same uniforms."""
    ids, mask = data.pad(prompts, PAD, "left", policy.forbidden.device)
    uniforms = ppo_core.draw_uniforms(T, len(prompts), stream(seed), policy.forbidden.device)
    return [sample(policy, ids, mask, uniforms, **options(**changed))
            for sample in (ppo_core.generate, graphs)]


def assert_same(found):
    (response, mask), (other, other_mask) = found
    assert torch.equal(response, other) and torch.equal(mask, other_mask)
    assert mask.dtype == other_mask.dtype


@pytest.fixture
def graphs():
    return fast.GraphSampler()


def test_the_fixed_shape_step_gives_the_plain_samplers_tokens(toy_policy, graphs):
    """Several calls on the same buffers: other prompts, other uniforms, a policy that has moved."""
    policy, lengths = quick(toy_policy(rotary_pct=0.5)), []
    for call, prompts in enumerate((PROMPTS, [p[:2] for p in PROMPTS], PROMPTS[::-1], PROMPTS)):
        found = both(graphs, policy, prompts, 20, seed=call)
        assert_same(found)
        lengths += found[0][1].sum(1).tolist()
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=stream(call))
    assert len(graphs.decoders[policy]) == 1
    assert len(set(lengths)) > 2  # rows end at different tokens


@pytest.mark.parametrize("T", [1, 2, 40])
def test_any_number_of_tokens(toy_policy, graphs, T):
    assert_same(both(graphs, toy_policy(3), PROMPTS, T))
    endless = both(graphs, toy_policy(3), PROMPTS, T, eos_id=15)  # a forbidden id is never drawn
    assert_same(endless)
    assert endless[1][0].shape[1] == T


def test_the_end_is_seen_though_the_host_looks_seldom(toy_policy, graphs, monkeypatch):
    """Every row ends early, after a call in which none did: nothing of that one is left."""
    policy, steps, advance = toy_policy(3), [], fast.StaticDecoder.advance
    assert both(graphs, policy, PROMPTS[:2], 200, seed=1)[1][0].shape[1] == 200
    monkeypatch.setattr(fast.StaticDecoder, "advance",
                        lambda self: (steps.append(0), advance(self)))
    nn.init.zeros_(policy.model.get_output_embeddings().weight)  # uniform over 13 ids
    found = both(graphs, policy, PROMPTS[:2], 200)
    assert_same(found)
    assert found[0][0].shape[1] <= len(steps) + 1 <= found[0][0].shape[1] + 16 < 200


def test_bfloat16_matrices_are_cast_once_a_call_and_follow_the_policy(toy_policy, graphs):
    policy = quick(toy_policy(), torch.bfloat16)
    assert_same(both(graphs, policy, PROMPTS, 20))
    decoder, = graphs.decoders[policy].values()
    twin, layer, trunk = decoder.model, decoder.trunk.layers[1], policy.model.base_model
    assert {parameter.dtype for parameter in layer.mlp.parameters()} == {torch.bfloat16}
    assert twin.get_output_embeddings().weight is policy.head.weight  # the logits are float32
    assert decoder.trunk.embed_in.weight is trunk.embed_in.weight
    assert layer.input_layernorm.weight is trunk.layers[1].input_layernorm.weight
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=stream(1))
    assert_same(both(graphs, policy, PROMPTS, 20, seed=1))


def test_a_tied_head_stays_one_with_the_embedding(toy_policy, graphs):
    policy = quick(toy_policy(tie_word_embeddings=True), torch.bfloat16)
    matrix = policy.model.base_model.embed_in.weight
    assert policy.model.get_output_embeddings().weight is matrix
    twin, _ = fast.cast_products(policy.model, torch.bfloat16)
    assert twin.get_output_embeddings().weight is matrix
    assert_same(both(graphs, policy, PROMPTS, 8))


def test_decoders_go_when_their_policy_goes(toy_policy, graphs):
    policy = toy_policy(9)
    both(graphs, policy, PROMPTS, 2)
    assert len(graphs.decoders) == 1
    del policy
    gc.collect()
    assert not graphs.decoders


@torch.no_grad()
def test_a_nan_does_not_outlive_its_call(toy_policy, graphs):
    policy = toy_policy()
    both(graphs, policy, PROMPTS, 20)
    decoder, = graphs.decoders[policy].values()
    decoder.cache.fill_(torch.nan)
    assert_same(both(graphs, policy, PROMPTS, 20))


WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal",
         "is_nonzero"}


class Watch(TorchDispatchMode):
    """The operators of one step."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__.split(".")[0])
        return function(*args, **kwargs or {})


class Reads(TorchDispatchMode):
    """How often the host reads a result; an index of a row is its own already."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.startswith("_local_scalar_dense") and args[0].dtype != torch.long:
            self.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_an_update_waits_for_a_gpu_once_a_step(toy_policy, small_settings, micro_batch):
    """For the gradient's norm, and once for the advantages."""
    s, policy = small_settings(epochs=3, minibatches=2, micro_batch=micro_batch), toy_policy()
    policy = quick(policy)  # transformers' own forward looks for pads in the mask
    rollout = roll(policy, s)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
    with Reads() as reads:
        ppo_core.optimise(policy, optimizer, rollout, ONE, 0.1, s, stream())
    assert reads.count == 1 + 6


@torch.no_grad()
def test_a_step_can_be_captured(toy_policy):
    """Nothing in it waits for a result or comes from the host, and its state stays where it is."""
    decoder = fast.StaticDecoder(quick(toy_policy()), 8, 64, 20, 1.0, EOS, PAD)
    decoder.begin(*data.pad(PROMPTS, PAD, "left"), torch.rand(20, 8, generator=stream()))
    before = {name: x.data_ptr() for name, x in vars(decoder).items()
              if isinstance(x, torch.Tensor)}
    with Watch() as watch:
        decoder.advance()
    assert {"addmm", "searchsorted", "index_copy_"} <= watch.names
    assert not (WAITS | {"lift_fresh", "_to_copy"}) & watch.names
    assert {name: vars(decoder)[name].data_ptr() for name in before} == before


@torch.no_grad()
def test_every_tensor_is_on_the_models_device(toy_policy, monkeypatch):
    """On a device whose tensors cannot be mixed with a CPU's, as a GPU's cannot."""
    # There is no autocast on this device.
    monkeypatch.setattr(torch, "autocast", lambda *args, **changes: contextlib.nullcontext())
    decoder = fast.StaticDecoder(quick(toy_policy()).to("meta"), 3, 64, 20, 1.0, EOS, PAD)
    prompt, mask = torch.zeros(2, 3, 5, dtype=torch.long, device="meta")
    decoder.begin(prompt, mask, torch.rand(20, 3, device="meta"))
    decoder.advance()
    devices = {x.device.type for x in vars(decoder).values() if isinstance(x, torch.Tensor)}
    assert devices == {"meta"}


# ------------------------------------------------------------------------------- whether it is used


def choose(policy, **changed):
    ids, mask = data.pad(PROMPTS * 4, PAD, "left", policy.forbidden.device)
    uniforms = ppo_core.draw_uniforms(20, len(ids), stream(), policy.forbidden.device)
    return fast.sampler(policy, ids, mask, uniforms, **options(temperature=1.0, **changed))


def test_graphs_are_chosen_where_they_give_the_plain_tokens(toy_policy):
    sample, said = choose(quick(toy_policy()))
    assert isinstance(sample, fast.GraphSampler) and said == "sampling with CUDA graphs"
    sample, said = choose(by_position())
    assert sample is ppo_core.generate and "for GPT-NeoX" in said


@pytest.mark.parametrize("damage, says", [
    ("idle", "of their first tokens differ"), ("stale", "of their first tokens differ"),
    ("broken", "operation not permitted when")])
def test_the_plain_sampler_stays_where_the_other_fails(toy_policy, monkeypatch, damage, says):
    advance = fast.StaticDecoder.advance

    def stale(self):  # keys and values of what was drawn are not kept
        cache = self.cache.clone()
        advance(self)
        self.cache.copy_(cache)

    def broken(self):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")
    damaged = {"idle": lambda self: None, "stale": stale, "broken": broken}[damage]
    monkeypatch.setattr(fast.StaticDecoder, "advance", damaged)
    sample, said = choose(quick(toy_policy()))
    assert sample is ppo_core.generate
    assert said.startswith("no CUDA graphs: ") and says in said


def test_a_graph_that_cannot_be_made_later_leaves_the_plain_sampler(
        toy_policy, graphs, monkeypatch, capsys):
    policy, tried = toy_policy(), []
    both(graphs, policy, PROMPTS, 9)

    def refuse(*args):
        tried.append(args)
        raise RuntimeError("out of\nmemory")
    monkeypatch.setattr(fast, "StaticDecoder", refuse)
    for _ in range(2):  # another shape, and then it is not tried again
        assert_same(both(graphs, policy, PROMPTS[:3], 9))
    assert len(tried) == 1 and not graphs.decoders
    assert capsys.readouterr().out.count("no CUDA graphs from here on: out of memory") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_captured_step_is_the_plain_sampler(toy_policy, dtype):
    """Also when the policy has moved since the capture."""
    plain = toy_policy()
    policy = fast.policy(plain.model.cuda(), plain.forbidden, dtype)
    graphs, said = choose(policy)
    assert said == "sampling with CUDA graphs"
    for call in range(3):
        found = both(graphs, policy, PROMPTS, 20, seed=call)
        if dtype == torch.float32:
            assert_same(found)
        one, other = (response[:, :4] for response, _ in found)
        width = min(one.shape[1], other.shape[1])
        assert (one[:, :width] == other[:, :width]).float().mean() > 0.7
        for parameter in policy.model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, device="cuda")
    assert all(decoder.graph for decoder in graphs.decoders[policy].values())


# -------------------------------------------------------------------------------------- the machine


@pytest.fixture
def precision():
    """torch's setting for float32 matrix products, put back afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_onednn_is_for_wide_models_and_taken_back_where_it_rounds(precision, monkeypatch):
    fast.use_onednn(64)
    assert precision() == "highest"
    product = torch.Tensor.__matmul__
    for rounding, expected in ((torch.float32, "medium"), (torch.bfloat16, "highest")):
        def multiply(a, b, rounding=rounding):
            if a.dtype == torch.float32:
                a, b = a.to(rounding), b.to(rounding)
            return product(a.double(), b.double())
        monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
        fast.use_onednn(512)
        assert precision() == expected


@pytest.mark.parametrize("dtype, cost, told", [
    ("bfloat16", 3.0, True), ("bfloat16", 1.0, False), ("float32", 3.0, False)])
def test_a_cpu_samples_plainly_and_one_without_bfloat16_is_told_of(
        toy_policy, small_settings, precision, monkeypatch, capsys, dtype, cost, told):
    monkeypatch.setattr(fast, "bfloat16_cost", lambda width: cost)
    ids, mask = data.pad(PROMPTS, PAD, "left")
    sample = fast.tuned_generate(toy_policy(), ids, mask, small_settings(dtype=dtype), EOS, PAD)
    assert sample is ppo_core.generate
    assert ("takes 3 times as long as in float32" in capsys.readouterr().out) == told


def test_the_cost_of_bfloat16_is_a_ratio_of_times():
    assert 0.05 < fast.bfloat16_cost(64) < 1000


@pytest.mark.slow
@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="glibc alone keeps memory")
def test_freed_memory_is_kept_and_can_be_given_back():
    """In a process of its own: what is set holds for the rest of a process."""
    code = """
import torch
from support import fast
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
fast.prepare_process(1)
assert torch.get_num_threads() == 1
start = resident()
x = [torch.ones(10 * 2**18) for _ in range(20)]
del x
kept = resident() - start
fast.give_back()
left = resident() - start
x = torch.ones(400 * 2**18)  # more than the hole that the small ones left
del x
print(kept, left, resident() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=load.HOME, capture_output=True,
                          text=True, check=True)
    kept, left, large = map(float, done.stdout.split())
    assert kept > 150 and left < 50 and large < 50, "small tensors are kept, a large one is not"

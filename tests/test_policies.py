"""Policies of which the last layers alone learn: what is shared, read once, sent and saved; and
reward models of which the head alone does."""

import contextlib
import copy
import dataclasses

import pytest
import torch
import worlds
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import data
import fedppo
import policies
import ppo_core
from support import load


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a random Llama of four layers, whose output embedding is tied to the input's.
    Do not write to it."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=352, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64,
        initializer_range=0.2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        pad_token_id=1)).save_pretrained(folder)
    worlds.save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world(llama, small_settings, tmp_path_factory):
    """Three agents with this model and 60 rows; two of its layers learn."""
    rows = worlds.write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", worlds.text_rows(60))
    return fedppo.World(small_settings(
        model=(llama,), dataset=str(rows), shards="iid", judge="none", agents=3, rounds=3,
        pairs=8, eval_prompts=4, batch=4, micro_batch=3, reward_epochs=1, response_length=5,
        lr=1e-2, beta=0.1, anchor=0.1, policy_layers=2))


@pytest.fixture(scope="module")
def task(world):
    return fedppo.make_task(world, 0)


def test_a_twin_shares_all_but_its_last_layers(world):
    one, other = world.new_policy(), world.new_policy()
    learning = {name for name, weight in one.model.named_parameters() if weight.requires_grad}
    assert learning == {name for name, _ in one.model.named_parameters()
                        if name.startswith(("model.layers.2.", "model.layers.3."))}
    assert set(one.weights()) == learning and one.value_head.weight.requires_grad
    for name, weight in one.model.named_parameters():
        same = [dict(policy.model.named_parameters())[name] is weight
                for policy in (other, world.initial)]
        assert same == [name not in learning] * 2, name
    assert one.still_layers == list(world.initial.model.model.layers[:2])
    assert not any(weight.requires_grad for weight in world.initial.parameters())


def test_a_twin_of_which_all_learns_shares_nothing(world):
    model = policies.twin(world.initial.model, 0)
    for mine, theirs in zip(model.parameters(), world.initial.model.parameters(), strict=True):
        assert mine.requires_grad and mine is not theirs and torch.equal(mine, theirs)


def moved(policy: ppo_core.Policy, seed: int) -> ppo_core.Policy:
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.weights().values():
            weight += 0.1 * torch.randn(weight.shape, generator=stream)
    return policy


def test_reading_the_first_layers_once_changes_no_number(world, task, monkeypatch):
    """A rollout of three different policies, in micro-batches; and the layers are left as they
    were."""
    policy, *references = (moved(world.new_policy(), seed) for seed in range(3))
    calls = []
    first = world.initial.model.model.layers[0]
    hook = first.mlp.register_forward_hook(lambda *args: calls.append(1))

    def update() -> tuple[ppo_core.Rollout, ppo_core.Policy]:
        learner = world.new_policy()
        learner.load(policy.weights())
        prompts = world.padded(task.shards[0].prompts[:4])
        rollout = ppo_core.collect(
            learner, references, torch.tensor([0.3, 0.7]), world.initial, task.scorers[0], *prompts,
            world.settings, eos_id=world.eos_ids, pad_id=world.pad_id,
            generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
        ppo_core.optimise(learner, optimizer, rollout, torch.tensor([0.3, 0.7]), 0.1,
                          world.settings, torch.Generator().manual_seed(0))
        return rollout, learner

    once, learner = update()
    assert len(calls) == once.response.shape[1] + 2, "sampling, and two micro-batches of collect"
    monkeypatch.setattr(ppo_core, "read_once", lambda *args: contextlib.nullcontext([]))
    calls.clear()
    apart, other = update()
    hook.remove()
    assert len(calls) >= once.response.shape[1] + 2 * 4 + 2, "all that reads"
    for name, tensor in vars(once).items():
        if name != "states":
            assert torch.equal(tensor, getattr(apart, name)), name
    assert once.states.shape == (*once.ids.shape, 32) and apart.states is None
    for mine, theirs in zip(learner.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    assert any((weight - policy.weights()[name]).abs().max() > 1e-3
               for name, weight in learner.weights().items())
    assert (once.kl.abs() > 1e-3).any() and (once.kl_initial.abs() > 1e-3).any()
    assert "forward" not in vars(first)


def test_the_layers_are_given_back_after_an_error(world):
    layers = world.new_policy().still_layers
    with pytest.raises(ZeroDivisionError), policies.read_once(layers):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("mode", ["federated", "merged", "fedavg"])
def test_a_run_sends_and_changes_the_last_layers_alone(world, task, mode):
    """What is still stays so to the bit, however often it is averaged."""
    before = copy.deepcopy(world.initial.model.state_dict())
    rows, saved = [], []
    agents = fedppo.train(world, task, mode, rows.append, lambda state: saved.append(state))
    sent = fedppo.size_of(agents[0].policy)
    assert sent == 4 * sum(before[name].numel() for name in before
                           if name.startswith(("model.layers.2.", "model.layers.3.")))
    assert agents[0].received == 3 * sent * (1 if mode == "fedavg" else 2)
    for agent in agents:
        for name, weight in agent.policy.model.state_dict().items():
            assert torch.equal(weight, before[name]) == (name not in agent.policy.weights()), name
    assert all(torch.equal(weight, before[name])
               for name, weight in world.initial.model.state_dict().items())
    assert set(saved[-1]["agents"][0]["policy"]) == set(agents[0].policy.weights())


def test_a_continued_run_ends_with_the_same_weights(world, task):
    def copied(state: dict) -> None:
        states.append(copy.deepcopy(state))

    states: list[dict] = []
    whole = fedppo.train(world, task, "federated", lambda row: None, copied)
    again = fedppo.train(world, task, "federated", lambda row: None, state=states[0])
    for one, other in zip(whole, again, strict=True):
        for mine, theirs in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert (one.policy.value_head.weight != 0).any()


def test_a_probe_is_a_head_on_the_first_layers_alone(world):
    """Its trunk is the initial model's to the bit after fitting; its states are checked by hand."""
    causal, stream = world.initial.model, torch.Generator().manual_seed(0)
    model = data.RewardModel(causal, "mean", stream, 2)
    ids = torch.tensor([[5, 9, 300, 7], [40, 41, 42, 43]])
    with torch.no_grad():
        hidden = causal(input_ids=ids, output_hidden_states=True).hidden_states[2]
        expected = model.head(causal.model.norm(hidden).mean(1)).squeeze(-1)
        torch.testing.assert_close(model(ids, torch.ones_like(ids)), expected)
    before = copy.deepcopy(model.state_dict())
    pairs = [([5, 9, 300], [5, 9, 301]), ([7, 300], [7, 301]), ([8, 300, 4], [8, 301, 4])]
    loss = data.fit_reward_model(model, pairs, 1, lr=0.05, epochs=20, generator=stream)
    assert loss < 0.3 and data.preference_accuracy(model, pairs, 1) == 1
    changed = {name for name, weight in model.state_dict().items()
               if not torch.equal(weight, before[name])}
    assert "head.weight" in changed <= {"head.weight", "head.bias"}
    assert len(causal.model.layers) == causal.config.num_hidden_layers == 4


@pytest.mark.parametrize("changes, words", [
    ({"policy_layers": 5}, "has 4 layers"), ({"reward_probe": 5}, "has 4 layers")], ids=str)
def test_more_layers_than_there_are_is_an_error(world, changes, words):
    with pytest.raises(data.UserError, match=words):
        fedppo.World(dataclasses.replace(world.settings, **changes))


def test_layers_that_do_not_stand_alone_are_refused(world):
    """As in a family whose layers read what an earlier one has left somewhere."""
    model, left = copy.deepcopy(world.initial.model), []
    first, last = model.model.layers[0].mlp, model.model.layers[3].mlp
    first.register_forward_hook(lambda layer, args, output: left.append(output))
    last.register_forward_hook(lambda layer, args, output: output + left.pop() if left else output)
    with pytest.raises(data.UserError, match="need more than the states"):
        load.check_layers(model, "odd", 2, 0)


def test_what_a_layer_has_left_of_another_text_is_not_taken_for_its_own(world):
    """The last layer reads what the first left, whenever that was: two equal texts hide it."""
    model, left = copy.deepcopy(world.initial.model), [0.0]
    first, last = model.model.layers[0].mlp, model.model.layers[3].mlp
    first.register_forward_hook(lambda layer, args, output: left.__setitem__(0, output))
    last.register_forward_hook(lambda layer, args, output: output + left[0])
    with pytest.raises(data.UserError, match="need more than the states"):
        load.check_layers(model, "odd", 2, 0)


def test_layers_with_common_weights_are_refused(world):
    model = copy.deepcopy(world.initial.model)
    model.model.layers[3].mlp = model.model.layers[0].mlp
    with pytest.raises(data.UserError, match="in common"):
        load.check_layers(model, "odd", 2, 0)


def test_a_parameter_of_the_trunk_itself_is_shared_and_its_layers_are_not(world):
    model = copy.deepcopy(world.initial.model)
    model.model.scale = torch.nn.Parameter(torch.ones(1))
    other = policies.twin(model, 2)
    assert other.model is not model.model and other.model.scale is model.model.scale
    assert other.model.layers[3] is not model.model.layers[3]
    assert other.model.layers[1] is model.model.layers[1]


def test_only_weights_that_learn_are_loaded(world):
    policy = world.new_policy()
    before = copy.deepcopy(policy.model.state_dict())
    for wrong in (before, {}):
        with pytest.raises(ValueError, match="not those that learn here"):
            policy.load(wrong)
    assert all(torch.equal(weight, before[name])
               for name, weight in policy.model.state_dict().items())


def test_pythia_s_fast_form_learns_in_its_last_layer_alone(small_settings):
    """It calls no layer as a whole, so nothing is read once: the numbers are the plain form's."""
    world = fedppo.World(small_settings(policy_layers=1, reward_probe=1, pairs=20, batch=4))
    task = fedppo.make_task(world, 0)
    before = copy.deepcopy(world.initial.model.state_dict())
    agents = fedppo.train(world, task, "federated", lambda row: None)
    for name, weight in agents[0].policy.model.state_dict().items():
        assert torch.equal(weight, before[name]) == ("layers.1." not in name), name
    text = world.padded(task.shards[0].prompts[:4])
    plain = ppo_core.Policy(agents[0].policy.model, world.forbidden, learning=1)
    for mine, theirs in zip(agents[0].policy.read(*text, slice(None)),
                            plain.read(*text, slice(None)), strict=True):
        real = text[1].bool()
        torch.testing.assert_close(mine[real], theirs[real], atol=1e-4, rtol=0)


class Sizes(TorchDispatchMode):
    """Inside, how many numbers each tensor has that torch makes, views too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.seen.append(made.numel())
        return made


def test_logits_of_a_slice_of_positions_need_no_second_embedding():
    """torch.matmul makes [rows, D, V] of frozen ones there: 7 GB for 64 rows of SmolLM2."""
    head = policies.Head(16, 100, bias=False).requires_grad_(False)
    hidden = torch.randn(8, 5, 16)
    with torch.no_grad(), Sizes() as sizes:
        logits = head(hidden[:, 1:3])
    torch.testing.assert_close(logits, hidden[:, 1:3].contiguous() @ head.weight.T)
    assert max(sizes.seen) == head.weight.numel() == logits.numel()

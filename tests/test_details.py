"""The details that a PPO for language models must get right, one test each, in the order of the README's table.

Each fails if its detail is broken. Toy policies are random GPT-NeoX models, the federation's tests run the tiny world.
"""

import copy
import hashlib
import inspect
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import data
import fedppo
import kl
import ppo_core
from ppo_core import evaluate, gae, generate, masked_mean, penalised_rewards, ppo_loss, value_loss, whiten

EOS, PAD = 0, 1
PROMPTS = [[5, 9], [3, 4, 8, 12, 2], [11, 6, 7], [2, 10, 13, 4], [7], [12, 3], [6, 6, 9, 10], [13, 5, 4]]
ONE = torch.ones(1)

# ---------------------------------------------------------------------------------------------------------- helpers


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest(x: torch.Tensor) -> float:
    return x.detach().abs().max().item()


def moved(policy, scale: float = 0.05, seed: int = 0):
    """A copy of a policy with noise on every parameter."""
    policy, noise = copy.deepcopy(policy), stream(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=noise))
    return policy


def by_position() -> ppo_core.Policy:
    """A policy with learned absolute positions (GPT-2), to which a shift of position ids is not invisible."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=32,
                                           eos_token_id=0, bos_token_id=0, initializer_range=0.4))
    return ppo_core.Policy(model, torch.arange(16) == PAD)


def mean_id(prompt_ids, prompt_mask, response_ids, response_mask):
    """A scorer: the mean id of the response, over 6."""
    return (response_ids * response_mask).sum(1) / response_mask.sum(1) / 6


def roll(policy, settings, references=None, weights=ONE, initial=None, prompts=PROMPTS, seed=0):
    """One rollout of a toy policy, by default with itself as reference."""
    ids, mask = data.pad(prompts, PAD, "left")
    return ppo_core.collect(policy, references or [policy], weights, initial or policy, mean_id, ids, mask, settings,
                            eos_id=EOS, pad_id=PAD, generator=stream(seed))


def scored(policy, rollout, temperature, rows=slice(None)):
    """evaluate() on some rows of a rollout -> (logprobs, all_logprobs, values)."""
    return evaluate(policy, rollout.ids[rows], rollout.attention[rows], rollout.response[rows], rollout.mask[rows],
                    temperature)


def batch_of(rollout, advantages, returns):
    names = ("ids", "attention", "response", "mask", "logprobs", "values", "references")
    return {name: getattr(rollout, name) for name in names} | {"advantages": advantages, "returns": returns}


def world_with(world, **changes):
    """The same world under other settings."""
    world = copy.copy(world)
    world.settings = replace(world.settings, **changes)
    return world


def task_of(task, n: int):
    """The first n agents' part of a task."""
    return replace(task, shards=task.shards[:n], scorers=task.scorers[:n],
                                      accuracies=task.accuracies[:n])


class Log:
    """Stands for a run's folder: keeps what train() logs, writes nothing."""

    stop = 0

    def __init__(self):
        self.rows, self.samples = [], {}

    def log(self, mode, seed, agent, rnd, update, **metrics):
        self.rows.append({"agent": agent, "round": rnd, "update": update} | metrics)

    def checkpoint(self, *state):
        pass


def train(world, task, mode):
    log = Log()
    return fedppo.train(world, task, mode, log), log.rows


def weights_of(policy) -> torch.Tensor:
    return nn.utils.parameters_to_vector(policy.parameters()).detach()


def digest(policy) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in policy.state_dict().values())).hexdigest()


def keep_rollouts(monkeypatch, change=lambda rollout: rollout) -> list:
    """The rollouts that agents collect from here on; `change` may alter them before the agent sees them."""
    kept, collect = [], ppo_core.collect

    def collected(*args, **kwargs):
        kept.append(change(collect(*args, **kwargs)))
        return kept[-1]
    monkeypatch.setattr(ppo_core, "collect", collected)
    return kept


@pytest.fixture(scope="module")
def three(tiny_world, small_settings):
    """The tiny world and a task for three agents."""
    world = world_with(tiny_world, agents=3)
    return world, fedppo.make_task(world, 0, pooled=False)


# ---------------------------------------------------------------------------------------------------------- details


def test_detail_01_padding_never_matters(toy_policy, small_settings):
    """Position ids = cumsum(mask) - 1, pads masked: a row alone and left-padded gives the same log-probs."""
    assert ppo_core.position_ids(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1, 2],
                                                                                               [0, 1, 2, 3, 4]]
    s = small_settings(response_length=6)
    for policy in (toy_policy(), by_position()):
        rollout = roll(policy, s)
        q = rollout.prompt_length
        logprobs, all_logprobs, values = scored(moved(policy), rollout, 1.0)
        for b, prompt in enumerate(PROMPTS):
            length = int(rollout.mask[b].sum())
            alone = torch.cat([torch.tensor(prompt), rollout.response[b, :length]])[None]
            response = alone[:, len(prompt):]
            one = evaluate(moved(policy), alone, torch.ones_like(alone), response, torch.ones_like(response), 1.0)
            for whole, row in zip((logprobs, all_logprobs, values), one, strict=True):
                torch.testing.assert_close(whole[b, :length], row[0], rtol=0, atol=1e-5)
            ids, mask = data.pad([prompt, [3] * 9], PAD, "left")
            greedy, mask = generate(policy, ids, mask, 6, temperature=1.0, eos_id=EOS, pad_id=PAD, greedy=True)
            ids = list(prompt)
            while len(ids) < len(prompt) + 6 and EOS not in ids:  # no padding, no cache
                ids.append(int(policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert greedy[0][mask[0].bool()].tolist() == ids[len(prompt):]
        garbage = torch.where(rollout.attention.bool(), rollout.ids, 7)
        other = evaluate(policy, garbage, rollout.attention, rollout.response, rollout.mask, 1.0)
        assert torch.equal(other[0], rollout.logprobs) and (garbage[:, :q] != rollout.ids[:, :q]).any()


def test_detail_02_pad_is_not_eos_and_eos_is_learned(small_model, toy_policy, small_settings):
    """`<|padding|>` is the pad of a tokenizer that sets none; EOS has mask 1 and a gradient, all after it mask 0."""
    _, tokenizer, forbidden = data.load_model(str(small_model), "cpu")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token) == (0, 1, "<|padding|>")
    assert forbidden[1] and not forbidden[0]

    policy = toy_policy()
    rollout = roll(policy, small_settings(response_length=8))
    ended = 0
    for response, mask in zip(rollout.response.tolist(), rollout.mask.tolist(), strict=True):
        length = response.index(EOS) + 1 if EOS in response else len(response)
        ended += length < len(response)
        assert mask == [1] * length + [0] * (len(response) - length) and set(response[length:]) <= {PAD}
    assert ended > 1, "the test needs rows that end early"
    logprobs = scored(policy, rollout, 1.0)[0]
    loss, _ = ppo_core.policy_loss(logprobs, rollout.logprobs, torch.ones_like(logprobs), rollout.mask, 0.2)
    grad, = torch.autograd.grad(loss, logprobs)
    assert torch.equal(grad != 0, rollout.mask.bool())


def test_detail_03_response_logits_are_those_before_each_token(toy_policy, small_settings):
    """Response logits are logits[:, Q-1:-1]."""
    policy = toy_policy()
    rollout = roll(policy, small_settings(response_length=5))
    q = rollout.prompt_length
    logits, values = policy.response_forward(rollout.ids, rollout.attention, q)
    positions = (rollout.attention.cumsum(1) - 1).clamp(min=0)
    whole = policy.model(input_ids=rollout.ids, attention_mask=rollout.attention, position_ids=positions).logits
    allowed = ~policy.forbidden
    real = rollout.mask.bool()  # at pads the two forwards may differ, and nobody reads them
    assert largest((logits - whole[:, q - 1:-1])[real][:, allowed]) < 1e-5
    assert logits.shape[1] == values.shape[1] == rollout.response.shape[1]
    b = 2  # the state before token t is the prompt and the t tokens before it
    for t in range(int(rollout.mask[b].sum())):
        prefix = torch.cat([torch.tensor(PROMPTS[b]), rollout.response[b, :t]])[None]
        assert largest((policy.model(input_ids=prefix).logits[0, -1] - logits[b, t])[allowed]) < 1e-5


def test_detail_04_one_temperature_everywhere(toy_policy, small_settings):
    """One in the sampler, the old, the new and the reference log-probs; KL is 0 while policy = reference."""
    policy = toy_policy()
    ids = torch.tensor([[5, 9]])
    logits = policy.model(input_ids=ids).logits[0, -1].masked_fill(policy.forbidden, -math.inf)
    for temperature in (0.5, 1.7):
        probs = (logits / temperature).softmax(-1)
        s = small_settings(response_length=1, temperature=temperature, micro_batch=20_000)
        frequency = roll(policy, s, prompts=[[5, 9]] * 20_000).response.flatten().bincount(minlength=16) / 20_000
        assert largest(frequency - probs) < 0.012  # over 3 standard errors
        for rule, estimator in (("geometric", "exact"), ("sum", "exact"), ("arithmetic", "exact"), ("sum", "k1"),
                                ("geometric", "k3")):
            s = small_settings(response_length=5, temperature=temperature, rule=rule, estimator=estimator)
            rollout = roll(policy, s, [policy, copy.deepcopy(policy)], torch.tensor([0.3, 0.7]))
            valid = rollout.mask.bool()
            assert largest(rollout.kl[valid]) < 1e-5 and largest(rollout.kl_initial[valid]) < 1e-5
            first = rollout.response[0, 0]
            assert largest(rollout.logprobs[0, 0] - probs[first].log()) < 1e-5  # old
            assert largest(scored(policy, rollout, s.temperature)[0] - rollout.logprobs) < 1e-6  # new
            loss, metrics = ppo_loss(policy, batch_of(rollout, rollout.values, rollout.values),
                                     torch.tensor([0.3, 0.7]), 1.0, ONE, s)  # the temperature that ppo_loss itself uses
            assert abs(metrics["approx_kl"]) < 1e-9 and abs(loss.item()) < 1e-5
            other = roll(policy, s, [moved(policy, 0.1), moved(policy, 0.1)], torch.tensor([0.3, 0.7]))
            assert largest(other.kl[valid]) > 1e-2  # the KL is not 0 for another reason


def test_detail_05_dropout_is_off_everywhere(toy_policy, small_settings):
    """Two forwards are equal, though the model has dropout and came in training mode; before and after an update."""
    model = toy_policy(hidden_dropout=0.5, attention_dropout=0.5).model.train()
    policy, s = ppo_core.Policy(model, torch.arange(16) == PAD), small_settings(response_length=5)
    rollout = roll(policy, s)
    reward = data.RewardModel(copy.deepcopy(model).train(), "mean", stream())
    for _ in range(2):
        one, two = scored(policy, rollout, 1.0), scored(policy, rollout, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert torch.equal(reward(rollout.ids, rollout.attention), reward(rollout.ids, rollout.attention))
        ppo_core.optimise(policy, torch.optim.Adam(policy.parameters(), lr=1e-3), rollout, ONE, 0.1, s, stream())
        data.fit_reward_model(reward, [([5, 0], [6, 0])] * 4, PAD, lr=1e-3, epochs=1, batch=2, generator=stream())
    assert torch.equal(roll(policy, s).logprobs, roll(policy, s).logprobs)


def test_detail_06_old_logprobs_come_from_the_training_forward(toy_policy, small_settings):
    """On the first minibatch max|ratio - 1| < 1e-5; on the very same rows the old log-probs are equal to the bit."""
    policy, s = moved(toy_policy()), small_settings(response_length=10, temperature=0.7)
    rollout = roll(policy, s)
    assert torch.equal(scored(policy, rollout, 0.7)[0], rollout.logprobs)
    for rows in torch.randperm(8, generator=stream()).split(2):
        ratio = (scored(policy, rollout, 0.7, rows)[0] - rollout.logprobs[rows]).exp()
        assert largest(ratio - 1) < 1e-5
    assert not rollout.logprobs.requires_grad and rollout.logprobs.dtype == torch.float32


def test_detail_07_the_score_lands_on_the_last_valid_token():
    """Not on a pad; with lambda = gamma = 1 all earlier returns contain it alike."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    scores = torch.tensor([3.0, 5.0, 7.0])
    rewards = penalised_rewards(scores, torch.zeros(3, 4), mask, 0.1, "loss")
    assert rewards.tolist() == [[0, 0, 0, 3], [0, 5, 0, 0], [7, 0, 0, 0]]
    for penalty in ("reward", "both"):
        assert torch.equal(penalised_rewards(scores, torch.zeros(3, 4), mask, 0.1, penalty), rewards)
    values = torch.randn(3, 4, generator=stream())
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(returns, scores[:, None] * mask)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_detail_08_the_reward_model_reads_valid_tokens_only(toy_policy, tiny_world, pooling):
    """Left, right and no padding score alike; its training texts end as generated ones do."""
    rows = [[5, 9, 0], [3, 4, 8, 12, 2, 0], [11]]
    for policy in (toy_policy(), by_position()):
        model = data.RewardModel(policy.model, pooling, stream())
        alone = torch.cat([model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in rows])
        for side in ("left", "right"):
            ids, mask = data.pad(rows, PAD, side)
            assert largest(model(ids, mask) - alone) < 1e-5
            ids = F.pad(ids, (2, 3), value=7)  # both sides, and the pads hold a real token's id
            assert largest(model(ids, F.pad(mask, (2, 3))) - alone) < 1e-5
        assert largest(alone[1:] - alone[:1]) > 1e-2

    # A text that ended has EOS, one that was cut has not; so a generated response and its text have one score.
    world, s = tiny_world, tiny_world.settings
    pair = data.Pair(world.pairs[0].prompt, "it was good .", "it was good " * 20, "x")
    prompt, (chosen, rejected) = world.prompt_ids[pair.prompt], world.pair_ids([pair])[0]
    assert chosen[:len(prompt)] == rejected[:len(prompt)] == prompt
    assert chosen[-1] == world.eos_id and chosen.count(world.eos_id) == 1
    assert world.eos_id not in rejected and len(rejected) == len(prompt) + s.response_length
    cut = world_with(world, response_eos=False).pair_ids([pair])[0][0]
    assert cut == chosen[:-1]
    scorer = data.model_scorer(data.RewardModel(world.model, pooling, stream()))
    ids, mask, response, response_mask = world.batches(list(world.prompt_ids)[:6], world.initial, stream())[0]
    scores = scorer(ids, mask, response, response_mask)
    for b in range(6):
        row = [tensor[b][keep[b].bool()][None] for tensor, keep in ((ids, mask), (response, response_mask))]
        assert largest(scorer(row[0], torch.ones_like(row[0]), row[1], torch.ones_like(row[1])) - scores[b]) < 1e-5


def test_detail_09_a_response_without_eos_can_be_penalised(toy_policy, small_settings, tiny_world, tiny_task,
                                                           monkeypatch):
    """Off for the real data, whose responses are cut; documented; and the run logs the share that ended."""
    policy = toy_policy()
    plain, penalised = (roll(policy, small_settings(response_length=8, missing_eos_penalty=amount))
                        for amount in (0.0, 2.5))
    ended = (plain.response == EOS).any(1)
    assert 0 < ended.sum() < len(ended)
    torch.testing.assert_close(penalised.scores, plain.scores - 2.5 * (~ended).float())
    pythia, tiny = (fedppo.parse(["--preset", name, "--device", "cpu"])[0] for name in ("pythia-70m", "tiny"))
    assert pythia.missing_eos_penalty == 0 and not pythia.response_eos
    assert tiny.missing_eos_penalty > 0 and tiny.response_eos
    assert "EOS" in fedppo.Settings.__dataclass_fields__["missing_eos_penalty"].metadata["help"]

    rollouts = keep_rollouts(monkeypatch)
    world = world_with(tiny_world, response_length=6)
    metrics = fedppo.Agent(0, world, tiny_task, 8, 0.2).update([world.initial], ONE)
    share = [world.eos_id in row for row in rollouts[0].response.tolist()]
    assert metrics["ended"] == pytest.approx(sum(share) / 8) and 0 < sum(share) < 8


def test_detail_10_gae():
    """V after the last valid token is 0; returns = unwhitened advantages + values; equal to the O(T^2) sum."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    rewards, values = (torch.randn(3, 5, generator=stream(seed), dtype=torch.float64) for seed in (0, 1))
    advantages, returns = gae(rewards, values, mask, 0.9, 0.7)
    for b, length in enumerate([5, 3, 1]):
        after = [*values[b, 1:length].tolist(), 0.0]
        delta = [rewards[b, t] + 0.9 * after[t] - values[b, t] for t in range(length)]
        for t in range(length):
            expected = sum((0.9 * 0.7) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[b, t].item() == pytest.approx(expected.item(), abs=1e-12)
            assert returns[b, t].item() == pytest.approx((expected + values[b, t]).item(), abs=1e-12)
    assert not advantages[mask == 0].any() and not returns[mask == 0].any()


def test_detail_11_whitening_over_the_rollout_batch(toy_policy, small_settings, monkeypatch):
    """Valid tokens of the rollout batch, biased variance; shift_mean=False gives (x - mean) / std + mean."""
    x = torch.randn(3, 5, generator=stream(), dtype=torch.float64) * 3 + 2
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    mean, std = x[mask].mean(), x[mask].std(correction=0)
    expected = (x[mask] - mean) / std
    torch.testing.assert_close(whiten(x, mask)[mask], expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(whiten(x, mask, shift_mean=False)[mask], expected + mean, rtol=0, atol=1e-7)
    assert abs(masked_mean(whiten(x, mask), mask)) < 1e-12

    # optimise whitens once, over all rows of the rollout: together its minibatches have mean 0 and std 1, each has not.
    seen, loss = [], ppo_core.ppo_loss

    def spy(policy, batch, *args):
        seen.append(batch["advantages"][batch["mask"].bool()])
        return loss(policy, batch, *args)
    monkeypatch.setattr(ppo_core, "ppo_loss", spy)
    policy, s = toy_policy(), small_settings(response_length=6, epochs=1, minibatches=4)
    ppo_core.optimise(policy, torch.optim.SGD(policy.parameters(), lr=0.0), roll(policy, s), ONE, 0.1, s, stream())
    whole = torch.cat(seen)
    assert abs(whole.mean()) < 1e-6 and abs(whole.std(correction=0) - 1) < 1e-5
    assert len(seen) == 4 and max(abs(part.mean()) for part in seen) > 0.1


def test_detail_12_value_clipping():
    """1/2 max(unclipped^2, clipped^2)."""
    values, old = torch.tensor([[2.0, 2.0, 0.5]]), torch.tensor([[1.0, 1.0, 1.0]])
    returns, mask = torch.tensor([[1.0, 3.0, 1.0]]), torch.ones(1, 3)
    # clip 0.2 -> 1.2, 1.2, 0.8: squared errors 1 and 0.04; 1 and 3.24; 0.25 and 0.04
    loss, clipfrac = value_loss(values, old, returns, mask, 0.2)
    assert loss.item() == pytest.approx(0.5 * (1 + 3.24 + 0.25) / 3)
    assert clipfrac.item() == pytest.approx(1 / 3)


def test_detail_13_losses_divide_by_the_tokens_of_the_whole_minibatch(toy_policy, small_settings):
    """Gradients are the same for 1, 2 or 4 micro-batches of unequal lengths."""
    policy, gradients = toy_policy(), {}
    for micro_batch in (8, 4, 2):
        s = small_settings(response_length=8, epochs=1, minibatches=1, max_grad_norm=1e9, micro_batch=micro_batch)
        rollout, trained = roll(policy, s), moved(policy)
        tokens = [int(rollout.mask[rows].sum()) for rows in torch.randperm(8, generator=stream()).split(micro_batch)]
        assert micro_batch == 8 or len(set(tokens)) > 1, "micro-batches should have unequal lengths"
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
        optimizer.register_step_post_hook(lambda *_, of=micro_batch, trained=trained: gradients.update(
            {of: torch.cat([parameter.grad.flatten() for parameter in trained.parameters()])}))
        ppo_core.optimise(trained, optimizer, rollout, ONE, 0.3, s, stream())
    for micro_batch in (4, 2):
        assert (gradients[micro_batch] - gradients[8]).norm() < 1e-5 * gradients[8].norm()


def padded(rollout, extra: int = 3):
    """The same rollout with `extra` more pads after every response, garbage in all that is recorded there."""
    def wider(x, value):
        return F.pad(x, (0, extra), value=value)
    references = F.pad(rollout.references, (0, 0, 0, extra), value=-1.0)
    return replace(
        rollout, ids=wider(rollout.ids, 1), attention=wider(rollout.attention, 0), response=wider(rollout.response, 1),
        mask=wider(rollout.mask, 0), logprobs=wider(rollout.logprobs, 0.0), values=wider(rollout.values, 5.0),
        references=references, kl=wider(rollout.kl, 7.0), kl_initial=wider(rollout.kl_initial, 7.0),
        entropy=wider(rollout.entropy, 9.0))


def test_detail_14_metrics_are_masked(tiny_world, tiny_task, monkeypatch):
    """Adding pads changes no metric; entropy is never negative."""
    metrics = []
    for change in (lambda rollout: rollout, padded):
        with monkeypatch.context() as patch:
            rollouts = keep_rollouts(patch, change)
            agent = fedppo.Agent(0, world_with(tiny_world, response_length=12), tiny_task, 8, 0.2)
            agent.policy.load_state_dict(moved(agent.policy, 0.02).state_dict())
            metrics.append(agent.update([tiny_world.initial], ONE))
    plain, wide = metrics
    assert rollouts[0].mask.shape[1] > rollouts[0].mask.sum(1).max() + 2 and len(rollouts[0].mask.sum(1).unique()) > 2
    for name in plain.keys() - {"seconds"}:
        assert wide[name] == pytest.approx(plain[name], rel=2e-4, abs=1e-6), name
    assert plain["kl"] > 1e-3 and plain["entropy"] > 0
    one_hot = torch.full((3, 7), -math.inf).scatter(1, torch.tensor([[0], [3], [6]]), 0.0)
    assert (ppo_core.entropy(one_hot) == 0).all()
    assert (ppo_core.entropy((50 * torch.randn(200, 7, generator=stream())).log_softmax(-1)) >= -1e-6).all()
    assert (rollouts[0].entropy >= 0).all()


@pytest.mark.parametrize("penalty, estimator", [("loss", "exact"), ("loss", "k2"), ("both", "exact"), ("reward", "k1")])
def test_detail_15_the_logged_kl_is_the_kl_trained_on(tiny_world, tiny_task, penalty, estimator, monkeypatch):
    """Same estimator, same references, same rule: what `kl` in the metrics sums is what beta multiplies."""
    for rule in ("geometric", "sum", "arithmetic"):
        world = world_with(tiny_world, rule=rule, penalty=penalty, estimator=estimator, response_length=8)
        s, weights = world.settings, torch.tensor([0.6, 0.4], dtype=torch.float64)
        references = [world.initial, moved(world.initial, 0.05, 1)]
        with monkeypatch.context() as patch:
            rollouts = keep_rollouts(patch)
            agent = fedppo.Agent(0, world, tiny_task, 8, 0.2)
            agent.policy = moved(agent.policy, 0.05, 2)  # not in the optimizer: the update leaves it as it is
            logged = agent.update(references, weights)["kl"]
        rollout, scores = rollouts[0], torch.zeros(8)
        if penalty != "loss":
            rewards = penalised_rewards(scores, rollout.kl, rollout.mask, 1.0, penalty)
            first = (rollout.kl * rollout.mask)[:, 0] if penalty == "both" else 0  # later states only
            assert (first - rewards.sum(1)).mean().item() == pytest.approx(logged, rel=1e-4)
        if penalty != "reward":
            batch = batch_of(rollout, torch.zeros_like(rollout.values), rollout.values)
            with_kl, without = (ppo_loss(agent.policy, batch, weights, beta, ONE, s)[0].item() for beta in (1.0, 0.0))
            tokens_per_response = rollout.mask.sum().item() / 8
            assert (with_kl - without) * tokens_per_response == pytest.approx(logged, rel=1e-4)
        whole = [p.response_forward(rollout.ids, rollout.attention, rollout.prompt_length)[0].detach()
                 for p in (agent.policy, *references)]
        per_token = kl.generalized_kl(whole[0], whole[1:], weights, rule=rule, estimator=estimator,
                                      tokens=rollout.response)
        independent = torch.where(rollout.mask.bool(), per_token, 0).sum(1).mean().item()
        assert abs(independent) > 1e-2 and logged == pytest.approx(independent, rel=1e-4)


def test_detail_16_the_sampler_is_the_policy(toy_policy, small_settings):
    """No top-k, top-p or minimum length; the float32 cdf can end below 1; u = 0 picks no zero-probability id."""
    policy = toy_policy()
    policy.model.generation_config.update(top_k=1, top_p=0.1, min_new_tokens=3, do_sample=True)
    n, prompt = 40_000, torch.tensor([[5, 9]])
    _, logprobs, _ = evaluate(policy, torch.tensor([[5, 9, 2]]), torch.ones(1, 3), torch.tensor([[2]]), ONE[None], 1.0)
    probs = logprobs[0, 0].exp()
    drawn, _ = generate(policy, prompt.expand(n, -1), torch.ones(n, 2, dtype=torch.long), 1, temperature=1.0,
                        eos_id=EOS, pad_id=PAD, generator=stream())
    counts = drawn.flatten().bincount(minlength=16)
    possible = probs > 0
    assert possible.sum() == 13 and not counts[~possible].any()
    expected = n * probs[possible]
    assert ((counts[possible] - expected) ** 2 / expected).sum() < 32.9  # chi-square, 12 degrees of freedom, 99.9 %

    below_1 = 1 - 2**-24
    row = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    drawn = [ppo_core.sample_inverse_cdf(row, torch.tensor([u])).item() for u in (0.0, 0.5, below_1, 1.0)]
    assert drawn == [1, 3, 3, 3]
    short = torch.tensor([[0.4, 0.4, 0.1, 0.0]])  # the cdf ends at 0.9: u = 0.88 is in the second id's share of it
    drawn = [ppo_core.sample_inverse_cdf(short, torch.tensor([u])).item() for u in (0.44, 0.45, 0.88, 0.89, below_1)]
    assert drawn == [0, 1, 1, 2, 2]


def test_detail_17_estimators_stand_where_they_are_right(monkeypatch, capsys, recwarn):
    """A wrong pair of estimator and place is refused, or told to be one; kl.py says which is right where."""
    def flags(penalty, estimator):
        return ["--preset", "tiny", "--device", "cpu", "--penalty", penalty, "--estimator", estimator]
    for penalty, estimator in (("loss", "exact"), ("loss", "k2"), ("reward", "k1"), ("both", "exact")):
        assert fedppo.parse(flags(penalty, estimator))[0].estimator == estimator
    for penalty, estimator in (("loss", "k1"), ("reward", "k2"), ("reward", "k3"), ("reward", "exact")):
        with pytest.raises(data.UserError, match=f"{estimator}.* in the {penalty}.*use"):
            fedppo.parse(flags(penalty, estimator))
    for estimator in ("k1", "k2", "k3"):
        with pytest.raises(data.UserError, match="both"):
            fedppo.parse(flags("both", estimator))
    for penalty, estimator in (("loss", "exact"), ("reward", "k1"), ("both", "exact")):
        assert fedppo.parse(flags(penalty, "auto"))[0].estimator == estimator

    def stop(settings):
        raise data.UserError("stop here")
    monkeypatch.setattr(fedppo, "World", stop)  # what is said before anything is loaded
    assert fedppo.main([*flags("reward", "k3"), "--allow-wrong-estimator"]) == 2
    said = "".join([*capsys.readouterr(), *(str(warning.message) for warning in recwarn)])
    assert "stop here" in said and "k3 in the reward optimises" in said

    assert "in the reward" in kl.__doc__ and "in the loss" in kl.__doc__ and "wrong" in kl.__doc__
    assert not {"penalty", "place"} & set(inspect.signature(kl.generalized_kl).parameters)


def test_detail_18_adaptive_kl(tiny_world, tiny_task, monkeypatch):
    """Off by default; OpenAI's code form, on the sequence-summed KL that is penalised; golden sequence."""
    for preset in ("tiny", "pythia-70m"):
        assert not fedppo.parse(["--preset", preset, "--device", "cpu"])[0].adaptive_kl
    controller = kl.AdaptiveKL(0.15, target=6.0, horizon=10_000)
    # KL 12: error clipped to 0.2;  KL 3: to -0.2;  KL 6.6: 0.1;  KL 6: 0.     n = 500, so n / horizon = 0.05
    expected = [0.15 * 1.01, 0.15 * 1.01 * 0.99, 0.15 * 1.01 * 0.99 * 1.005, 0.15 * 1.01 * 0.99 * 1.005]
    assert [controller.update(x, 500) for x in (12.0, 3.0, 6.6, 6.0)] == pytest.approx(expected, rel=1e-12)

    world, references = world_with(tiny_world, response_length=8), [moved(tiny_world.initial, 0.05)]
    target = fedppo.Agent(0, world, tiny_task, 8, 0.2).update(references, ONE)["kl"] * 1.1
    world = world_with(world, adaptive_kl=True, kl_target=target, kl_horizon=100.0)
    rollouts = keep_rollouts(monkeypatch)
    agent, beta = fedppo.Agent(0, world, tiny_task, 8, 0.2), 0.2
    for _ in range(2):
        metrics = agent.update(references, ONE)
        assert metrics["beta"] == pytest.approx(beta)
        kl_sum = (rollouts[-1].kl * rollouts[-1].mask).sum(1).mean().item()
        per_token = masked_mean(rollouts[-1].kl, rollouts[-1].mask).item()
        errors = [min(max(x / target - 1, -0.2), 0.2) for x in (kl_sum, per_token)]
        assert rollouts[1:] or errors[0] != errors[1], "the first update should tell the sum from the mean"
        beta *= 1 + errors[0] * 8 / 100
    assert agent.beta == pytest.approx(beta)

    _, rows = train(world_with(tiny_world, agents=1, updates=2, lr=3e-3), task_of(tiny_task, 1), "isolated")
    by_update = [row["kl"] for row in rows if row["update"]]
    assert max(by_update[0], by_update[2]) < 1e-4 < 1e-2 < min(by_update[1], by_update[3])  # restarts each round
    assert "moving reference" in kl.AdaptiveKL.__doc__


def test_detail_19_scores_are_comparable_between_agents(tiny_world, tiny_task):
    """Each reward model has mean 0 and std 1 on samples of the initial policy; held-out accuracy is reported."""
    world = tiny_world
    for i, (shard, scorer) in enumerate(zip(tiny_task.shards, tiny_task.scorers, strict=True)):
        sampled = world.batches((shard.prompts * 2)[:640], world.initial, stream(i))
        scores = torch.cat([scorer(*batch) for batch in sampled])
        assert abs(scores.mean()) < 0.25 and 0.85 < scores.std() < 1.18  # 256 and 640 samples
    sample, = world.batches(tiny_task.shards[0].prompts[:40], world.initial, stream())
    raw = 3 * mean_id(*sample) + 50
    scorer, mean, std = data.normalised(lambda *batch: 3 * mean_id(*batch) + 50, [sample])
    assert (mean, std) == pytest.approx((raw.mean().item(), raw.std(correction=0).item()), rel=1e-4)
    scores = scorer(*sample)
    assert abs(scores.mean()) < 1e-4 and abs(scores.std(correction=0) - 1) < 1e-4

    shard = tiny_task.shards[1]
    model, accuracy = fedppo.fit_reward(world, shard.train, shard.heldout, fedppo.generator(0, 1, "reward model"))
    assert tiny_task.accuracies[1] == accuracy
    chosen, rejected = (model(*data.pad(list(rows), world.pad_id, "left"))
                        for rows in zip(*world.pair_ids(shard.heldout), strict=True))
    assert accuracy[1] == len(shard.heldout)
    assert accuracy[0] == pytest.approx((chosen > rejected).float().mean().item(), abs=0.005)
    assert not any(pair in shard.train for pair in shard.heldout)
    report = [str(check) for check in fedppo.preflight(world, tiny_task)]
    for i, (accuracy, _) in enumerate(tiny_task.accuracies):
        assert any(f"agent {i}" in line and "accuracy" in line and f"{accuracy:.3g}" in line for line in report)


def test_detail_20_initialisation(toy_policy, tiny_world, tiny_task, monkeypatch):
    """Adam eps 1e-5; the value head starts at 0; the reward head with std 1/sqrt(d + 1)."""
    agent = fedppo.Agent(0, tiny_world, tiny_task, 8, 0.2)
    assert {group["eps"] for group in agent.optimizer.param_groups} == {1e-5}
    parameters = [p for group in agent.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in agent.policy.parameters()}
    assert not agent.policy.value_head.weight.any() and not agent.policy.value_head.bias.any()

    epsilons, adam = [], torch.optim.Adam

    def spy(*args, **kwargs):
        optimizer = adam(*args, **kwargs)
        epsilons.append(optimizer.defaults["eps"])
        return optimizer
    monkeypatch.setattr(torch.optim, "Adam", spy)
    model = toy_policy(hidden_size=62, num_attention_heads=1).model  # d + 1 = 63
    heads = [data.RewardModel(model, "last", stream(seed)).head for seed in range(60)]
    weights = torch.cat([head.weight.flatten() for head in heads])  # 3720 numbers: 1.2 % standard error
    assert weights.std().item() == pytest.approx(63**-0.5, rel=0.04) and abs(weights.mean()) < 0.01
    assert not any(head.bias.any() for head in heads)
    data.fit_reward_model(data.RewardModel(model, "last", stream()), [([5], [6])], PAD, lr=1e-3, epochs=1, batch=1,
                          generator=stream())
    assert epsilons == [1e-5]


def test_detail_21_ids_without_a_token_are_masked_by_the_policy(small_model, small_settings):
    """The embedding has more rows than the tokenizer entries: sampler and every log-prob agree that those have none."""
    model, tokenizer, forbidden = data.load_model(str(small_model), "cpu")
    rows, entries = model.get_output_embeddings().weight.shape[0], len(tokenizer)
    assert forbidden.shape == (rows,) and rows > entries
    assert forbidden.nonzero().flatten().tolist() == [PAD, *range(entries, rows)]
    model.get_output_embeddings().weight.data.normal_(std=0.5, generator=stream())
    policy = ppo_core.Policy(model, forbidden)
    s = small_settings(response_length=20, temperature=1.5)
    rollout = roll(policy, s, [moved(policy)], initial=moved(policy))
    assert not forbidden[rollout.response[rollout.mask.bool()]].any()
    logits = policy(input_ids=rollout.ids, attention_mask=rollout.attention).logits
    assert (logits[..., forbidden] == -math.inf).all() and torch.isfinite(logits[..., ~forbidden]).all()
    _, all_logprobs, _ = scored(policy, rollout, s.temperature)
    for logprobs in (all_logprobs, rollout.references):
        assert (logprobs[..., forbidden] == -math.inf).all()
        torch.testing.assert_close(logprobs[..., ~forbidden].exp().sum(-1), torch.ones(logprobs.shape[:2]))
    assert torch.isfinite(rollout.kl).all() and torch.isfinite(rollout.entropy).all()
    ppo_core.optimise(policy, torch.optim.Adam(policy.parameters(), lr=1e-3), rollout, ONE, 0.3, s, stream())
    assert torch.isfinite(weights_of(policy)).all()


@pytest.mark.parametrize("mode, rule", [("federated", "geometric"), ("federated", "weights"), ("fedavg", "geometric")])
def test_detail_22_references_are_frozen_copies(three, monkeypatch, mode, rule):
    """Their hash does not change inside a round, while the policies move; a new round brings new ones."""
    world, task = three
    world, update, hashes = world_with(world, rule=rule, anchor=0.2, updates=2), fedppo.Agent.update, {}
    initial = digest(world.initial)

    def spy(agent, references, weights):
        assert not any(p.requires_grad for reference in references for p in reference.parameters())
        seen = hashes.setdefault(agent.index, [])
        seen.append([digest(reference) for reference in references])
        own = digest(agent.policy)
        metrics = update(agent, references, weights)
        seen.append([digest(reference) for reference in references])
        assert digest(agent.policy) != own
        return metrics
    monkeypatch.setattr(fedppo.Agent, "update", spy)
    train(world, task, mode)
    for seen in hashes.values():
        first, second = seen[:4], seen[4:]  # two updates, before and after each
        assert all(x == first[0] for x in first) and all(x == second[0] for x in second)
        assert first[0] != second[0]
    if mode == "federated" and rule == "geometric":
        assert hashes[0] == hashes[1] == hashes[2], "all agents of a round hear the same copies, in whatever order"
        assert hashes[0][0][-1] == initial  # the anchor
    assert digest(world.initial) == initial


def isolated_by_hand(world, task, order: list[int]) -> dict[int, torch.Tensor]:
    """Isolated runs of the agents, created and updated in this order -> their final weights."""
    agents = {i: fedppo.Agent(i, world, task, world.settings.batch, world.settings.beta[0]) for i in order}
    frozen = [world.new_policy().requires_grad_(False) for _ in order]
    identity = torch.eye(len(order), dtype=torch.float64)
    for _ in range(world.settings.rounds):
        fedppo.exchange(list(agents.values()), frozen, "isolated", identity, [True] * len(agents))
        for row, agent in zip(identity, agents.values(), strict=True):
            agent.update(*fedppo.cooperate(frozen, row, world))
    return {i: weights_of(agent.policy) for i, agent in agents.items()}


def test_detail_23_randomness_is_named(three):
    """With given shards, another order of the agents, or one more, changes nothing in agent 0's isolated run."""
    world, task = three
    agents, _ = train(world, task, "isolated")
    final = [weights_of(agent.policy) for agent in agents]
    torch.manual_seed(12345)  # the global stream is nobody's
    two, _ = train(world_with(world, agents=2), task_of(task, 2), "isolated")
    assert torch.equal(weights_of(two[0].policy), final[0])
    backwards = isolated_by_hand(world, task, [2, 1, 0])
    for i in range(3):
        assert torch.equal(backwards[i], final[i])

    again, once = (torch.rand(4, generator=fedppo.generator(0, 1, "sampling")) for _ in range(2))
    assert torch.equal(again, once)
    seeds = [fedppo.generator(seed, *name).initial_seed() for seed in (0, 1, 11) for name in (
        ("evaluation",), (0, "sampling"), (1, "sampling"), (0, "prompts"), (1, "prompts"), (11, "sampling"))]
    seeds += [g.initial_seed() for i in range(3) for g in fedppo.Agent(i, world, replace(
        task, seed=7), 8, 0.2).streams.values()]
    assert len(set(seeds)) == 3 * 6 + 3 * 4


def classic_ppo(world, task, updates: int) -> torch.Tensor:
    """PPO with one fixed reference and exact KL in the loss, written out -> the final weights of model and value head.

    Row by row, without cache, padding, masks or micro-batches; of ours it uses data, reward model and random streams.
    """
    s, forbidden = world.settings, world.forbidden
    model, reference = copy.deepcopy(world.model), copy.deepcopy(world.model)
    head = nn.Linear(model.config.hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=s.lr, betas=(0.9, 0.99), eps=1e-5)
    prompt_stream, sampling, shuffling = (fedppo.generator(task.seed, 0, name)
                                          for name in ("prompts", "sampling", "minibatches"))
    prompts = [world.prompt_ids[prompt] for prompt in task.shards[0].prompts]
    queue: list[int] = []

    def forward(lm, ids, start):
        """log pi(.|s) [T, V] at temperature 1, and the hidden states, of the states from `start` to the end."""
        hidden = lm.gpt_neox(input_ids=torch.tensor([ids])).last_hidden_state[0, start:]
        return lm.get_output_embeddings()(hidden).masked_fill(forbidden, -1e6).log_softmax(-1), hidden

    for update in range(updates):
        optimizer.param_groups[0]["lr"] = s.lr * (1 - update / updates)
        while len(queue) < s.batch:
            queue += torch.randperm(len(prompts), generator=prompt_stream).tolist()
        taken, queue = queue[:s.batch], queue[s.batch:]

        rows = []
        uniform = torch.rand(s.response_length, s.batch, generator=sampling)
        for b, prompt in enumerate(prompts[k] for k in taken):
            with torch.no_grad():
                ids = list(prompt)
                while len(ids) < len(prompt) + s.response_length and world.eos_id not in ids:
                    cdf = forward(model, ids, -1)[0][0].exp().cumsum(0)
                    ids.append(int((cdf <= uniform[len(ids) - len(prompt), b] * cdf[-1]).sum()))
                tokens = ids[len(prompt):]
                logprobs, hidden = forward(model, ids[:-1], len(prompt) - 1)
                score = task.scorers[0](*(x for part in (list(prompt), tokens) for x in (
                    torch.tensor([part]), torch.ones(1, len(part), dtype=torch.long)))).item()
                score -= s.missing_eos_penalty * (tokens[-1] != world.eos_id)
                values = head(hidden)[:, 0]
                after = [*values[1:].tolist(), 0.0]
                advantage, advantages = 0.0, [0.0] * len(tokens)
                for t in reversed(range(len(tokens))):
                    delta = score * (t == len(tokens) - 1) + s.gamma * after[t] - values[t].item()
                    advantage = delta + s.gamma * s.lam * advantage
                    advantages[t] = advantage
                rows.append(SimpleNamespace(
                    ids=ids[:-1], start=len(prompt) - 1, tokens=torch.tensor(tokens), values=values,
                    old=logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0], advantages=torch.tensor(advantages),
                    reference=forward(reference, ids[:-1], len(prompt) - 1)[0]))
        every = torch.cat([row.advantages for row in rows])
        mean, sigma = every.mean(), (every.var(correction=0) + 1e-8).sqrt()

        for _ in range(s.epochs):
            for minibatch in torch.randperm(s.batch, generator=shuffling).chunk(s.minibatches):
                total, n_tokens = torch.zeros(()), 0
                for row in (rows[b] for b in minibatch.tolist()):
                    logprobs, hidden = forward(model, row.ids, row.start)
                    ratio = (logprobs.gather(1, row.tokens[:, None])[:, 0] - row.old).exp()
                    a = (row.advantages - mean) / sigma
                    surrogate = torch.min(ratio * a, ratio.clip(1 - s.clip, 1 + s.clip) * a)
                    values, returns = head(hidden)[:, 0], row.advantages + row.values
                    near = row.values + (values - row.values).clip(-s.value_clip, s.value_clip)
                    error = torch.max((values - returns) ** 2, (near - returns) ** 2)
                    divergence = (logprobs.exp() * (logprobs - row.reference)).sum(1)
                    total = total + (-surrogate + s.vf_coef * error / 2 + s.beta[0] / sigma * divergence).sum()
                    n_tokens += len(row.tokens)
                optimizer.zero_grad()
                (total / n_tokens).backward()
                nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)
                optimizer.step()
    return nn.utils.parameters_to_vector(parameters).detach()


def test_detail_24_identity_is_isolated_and_anchor_1_is_classic_ppo(three):
    """Federated with W = identity gives the bits of isolated PPO; one agent with anchor 1 is PPO written out."""
    world, task = three
    runs = [train(world_with(world, topology="identity", agents=2, updates=2), task_of(task, 2), mode)[0]
            for mode in ("isolated", "federated")]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(weights_of(one.policy), weights_of(other.policy))
        for a, b in zip(*(agent.optimizer.state_dict()["state"].values() for agent in (one, other)), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)

    alone = world_with(world, agents=1, anchor=1.0, rounds=2, updates=2, response_length=10, lr_schedule="linear")
    (agent,), _ = train(alone, task_of(task, 1), "isolated")
    final, initial = weights_of(agent.policy), weights_of(world.initial)
    assert largest(final - initial) > 1e-3
    assert largest(final - classic_ppo(alone, task_of(task, 1), updates=4)) < 1e-5


@pytest.mark.parametrize("mode", ["federated", "fedavg"])
def test_detail_25_optimizer_and_schedule_live_through_exchanges(three, mode):
    """They are not rebuilt each round: Adam counts all steps, the rate falls over the whole run."""
    world, task = three
    world = world_with(world, agents=2, rounds=3, lr_schedule="linear", lr=1e-3)
    agents, rows = train(world, task_of(task, 2), mode)
    s = world.settings
    for agent in agents:
        steps = {int(state["step"]) for state in agent.optimizer.state.values()}
        assert steps == {s.rounds * s.updates * s.epochs * s.minibatches}
        rates = [row["lr"] for row in rows if row["agent"] == agent.index and row["update"]]
        assert rates == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3]) and agent.schedule.get_last_lr()[0] == 0
        live = {id(parameter) for group in agent.optimizer.param_groups for parameter in group["params"]}
        assert live == {id(parameter) for parameter in agent.policy.parameters()}, "the exchange replaced the weights"


def test_detail_26_equal_pairs_are_counted_reported_and_dropped(tmp_path, small_model, monkeypatch, capsys):
    """Rows with chosen == rejected never reach a reward model."""
    for rows in (worlds.text_rows(40, equal=10), worlds.chat_rows(40, equal=10)):
        rows[11]["rejected"] = rows[11]["chosen"]
        path = worlds.write_jsonl(tmp_path / "pairs.jsonl", rows)
        pairs, dropped = data.load_pairs(str(path))
        assert len(pairs) == 29 and dropped == 11
        assert all(pair.chosen != pair.rejected for pair in pairs)

    fitted = []

    def stop(world, train, heldout, stream):
        fitted.extend([*train, *heldout])
        raise data.UserError("stop here")
    monkeypatch.setattr(fedppo, "fit_reward", stop)
    assert fedppo.main(["--preset", "tiny", "--model", str(small_model), "--dataset", str(path), "--agents", "1",
                        "--pairs", "10", "--eval-prompts", "4", "--judge", "none", "--check"]) == 2
    said = capsys.readouterr()
    assert "stop here" in said.err and "dropped 11 rows" in said.out
    assert len(fitted) > 10 and all(pair.chosen != pair.rejected for pair in fitted)


def test_detail_27_prompt_and_response_are_joined_by_one_space(tmp_path, small_model):
    """The dataset strips leading spaces: whether a row has one or not, exactly one stands at the seam."""
    tokenizer = data.load_model(str(small_model), "cpu")[1]
    for prompt, chosen in (("The soup was", "calm and grey."), ("The soup was ", " calm and grey."),
                           ("The soup was", "\n calm and grey. ")):
        rows = worlds.chat_rows(1)
        rows[0]["prompt"] = prompt
        rows[0]["chosen"][1]["content"] = chosen
        (pair,), _ = data.load_pairs(str(worlds.write_jsonl(tmp_path / "one.jsonl", rows)))
        prompt, = data.encode_prompts(tokenizer, [pair.prompt])
        ids = prompt + data.encode_response(tokenizer, pair.chosen, 24, eos=False)
        assert tokenizer.decode(ids) == "The soup was calm and grey."
        assert data.encode_response(tokenizer, pair.chosen, 24, eos=True)[-1] == tokenizer.eos_token_id
        # the policy would sample the same ids: " calm" is the first token of the response, not a space of the prompt
        assert tokenizer.convert_ids_to_tokens(ids)[len(prompt)].startswith("Ġ")


def test_detail_28_the_reward_model_is_trained(tiny_world, tiny_task, monkeypatch):
    """Not a randomly initialised head: trunk and head move, on the agent's own pairs, and it learns to order them."""
    world = world_with(tiny_world, reward_epochs=4)
    task, scorers, model_scorer = tiny_task, [], data.model_scorer

    def spy(model):
        scorers.append(model)
        return model_scorer(model)
    monkeypatch.setattr(data, "model_scorer", spy)
    fitted, fit = [], data.fit_reward_model

    def fit_spy(model, pairs, *args, **kwargs):
        start = copy.deepcopy(model)
        loss = fit(model, pairs, *args, **kwargs)
        fitted.append((model, start, pairs, loss))
        return loss
    monkeypatch.setattr(data, "fit_reward_model", fit_spy)
    task = fedppo.make_task(world, 0, pooled=False)
    assert [model for model, *_ in fitted] == scorers and len(scorers) == 2
    for shard, (model, start, pairs, loss) in zip(task.shards, fitted, strict=True):
        assert pairs == world.pair_ids(shard.train)
        before, after = start.state_dict(), model.state_dict()
        assert largest(after["head.weight"] - before["head.weight"]) > 1e-3
        assert largest(torch.cat([(after[k] - before[k]).flatten() for k in after if k.startswith("trunk")])) > 1e-3
        right, chance = (data.preference_accuracy(m, pairs, world.pad_id) for m in (model, start))
        assert loss < math.log(2) - 0.05 and right > 0.75 and right > chance + 0.1


def test_detail_29_training_is_float32_whatever_the_checkpoint_is(small_model, tiny_world, tiny_task):
    """transformers loads a float16 checkpoint as float16: the type is always explicit, and float32 by default."""
    assert AutoModelForCausalLM.from_pretrained(small_model).dtype == torch.float16
    config = json.loads((small_model / "config.json").read_text())
    assert "float16" in (config.get("dtype"), config.get("torch_dtype"))
    for preset in ("tiny", "pythia-70m"):
        assert fedppo.parse(["--preset", preset, "--device", "cpu"])[0].dtype == "float32"
    model, _, forbidden = data.load_model(str(small_model), "cpu")
    policy, reward = ppo_core.Policy(model, forbidden), data.RewardModel(model, "last", stream())
    agent = fedppo.Agent(0, tiny_world, tiny_task, 8, 0.2)
    for module in (policy, reward, agent.policy, tiny_world.initial):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert policy.response_forward(torch.tensor([[5, 6, 7]]), torch.ones(1, 3), 2)[0].dtype == torch.float32

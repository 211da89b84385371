"""The details that PPO for language models and a federation of it must get right.

Most are mistakes that published implementations shipped. In reading order: the detail, the file and
function where it is kept (load and rows: support/). The test of each number fails if its detail is
broken.

     1  Padding never matters: positions count real tokens             policies.position_ids
     2  Pad is not EOS; EOS has mask 1 and a gradient, the rest mask 0 ppo_core.generate
     3  Response logits are logits[:, Q-1:-1]                          policies.Policy
     4  One temperature in sampler, policy and references              ppo_core.score_tokens
     5  Dropout is off everywhere                                      policies.Policy
     6  Old and new log-probs come from one forward                    ppo_core.new_terms
     7  The score lands on the last valid token                        ppo_core.penalised_rewards
     8  The reward model reads valid tokens; its texts end as sampled  data.RewardModel
     9  A response without EOS can be penalised; endings are counted   ppo_core.collect
    10  V = 0 after the end; returns = unwhitened advantages + values  ppo_core.gae
    11  Whitening over the rollout's valid tokens, biased variance     ppo_core.whiten, optimise
    12  Clipped value loss with 1/2 max                                ppo_core.value_loss
    13  A gradient does not depend on its micro-batches                ppo_core.gradient
    14  Every mean and metric is over valid tokens                     ppo_core.masked_mean
    15  The KL that is logged is the KL that is trained on             fedppo.Agent.update
    16  Sampling is from the whole softmax, by inverse CDF             ppo_core.sample_inverse_cdf
    17  An estimator stands only where it is right                     ppo_core.PENALTIES
    18  A run's penalty is kl.py's, the file that people copy          ppo_core.new_terms
    19  Rewards have mean 0, std 1 on the initial policy's samples     data.normalised
    20  Adam eps 1e-5; value head 0, reward head std 1/sqrt(D + 1)     fedppo.Agent
    21  Ids without a token are masked in the policy's own logits      ppo_core.Policy
    22  References are frozen copies                                   fedppo.exchange
    23  A seed makes named random streams per agent and purpose        data.generator
    24  W = identity is `isolated`; `classic` is one fixed reference   fedppo.cooperate, MODES
    25  Optimizer state and schedule live through exchanges            fedppo.Agent
    26  Rows with chosen == rejected are counted and dropped           rows.load_pairs
    27  Prompt and response are joined by exactly one space            data.encode_response
    28  The reward model is trained, trunk and head                    data.fit_reward_model
    29  Weights are float32, whatever the checkpoint is                load.load_model
    30  A number added to all logits costs no digits                   policies.Head
    31  The reward model scores texts of the form it was fitted to     data.model_scorer
    32  Rows are dealt by prompt; pairs that are equal when cut go     data.make_shards
    33  Any id may be the pad, EOS too: masks decide                   load.choose_pad
    34  Before news has come, `federated` is `isolated`                fedppo.train
"""

import copy
import hashlib
import inspect
import math
import operator
from dataclasses import replace

import pytest
import torch
import worlds
from test_ppo_core import (
    EOS,
    ONE,
    PAD,
    PROMPTS,
    batch_of,
    by_position,
    close,
    mean_id,
    moved,
    plain_loss,
    references_of,
    roll,
    stream,
    summed_gradient,
)
from torch import nn
from torch.nn.functional import pad as widen
from transformers import AutoModelForCausalLM

import data
import fedppo
import kl
import policies
import ppo_core
from data import UserError
from ppo_core import PENALTIES, gae, generate, penalised_rewards, ppo_loss, score_tokens
from support import fast, load, preflight, rows
from support.settings import Settings, parse
from world import deal_rows

every_penalty = pytest.mark.parametrize("penalty", PENALTIES)


def test_the_list_of_details_is_that_of_the_tests_and_names_what_is_there():
    modules = {"ppo_core": ppo_core, "policies": policies,
               "fedppo": fedppo, "data": data, "load": load,
               "rows": rows}
    lines = [line for line in __doc__.splitlines() if line.startswith("    ")]
    for line in lines:
        module, names = line[71:].split(".", 1)
        assert all(operator.attrgetter(name)(modules[module]) for name in names.split(", ")), line
    tested = {int(name[12:14]) for name in globals() if name.startswith("test_detail_")}
    assert [int(line[:6]) for line in lines] == sorted(tested) == list(range(1, 35))


def largest(x: torch.Tensor) -> float:
    return x.detach().abs().max().item()


def scored(policy, rollout, temperature, rows=slice(None)):
    """score_tokens() on some rows of a rollout -> (logprobs, all_logprobs, values)."""
    parts = rollout.ids, rollout.attention, rollout.response, rollout.mask
    return score_tokens(policy, *(part[rows] for part in parts), temperature)


def world_with(world, **changes):
    """The same world under other settings."""
    world = copy.copy(world)
    world.settings = replace(world.settings, **changes)
    return world


def task_of(task, n: int):
    """The first n agents' part of a task."""
    return replace(task, shards=task.shards[:n], scorers=task.scorers[:n],
                   accuracies=task.accuracies[:n])


def agent_of(world, task, index: int = 0, mode: str = "federated"):
    return fedppo.Agent(index, world, task, fedppo.arm_settings(world.settings, mode))


def train(world, task, mode):
    """-> (agents, lines of metrics)."""
    rows = []
    return fedppo.train(world, task, mode, rows.append), rows


def weights_of(policy) -> torch.Tensor:
    return nn.utils.parameters_to_vector(policy.parameters()).detach()


def digest(policy) -> str:
    values = policy.state_dict().values()
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()


def keep_rollouts(monkeypatch, change=lambda rollout: rollout) -> list:
    """The rollouts that agents collect from here on; `change` alters them before they are used."""
    kept, collect = [], ppo_core.collect

    def collected(*args, **options):
        kept.append(change(collect(*args, **options)))
        return kept[-1]
    monkeypatch.setattr(ppo_core, "collect", collected)
    return kept


def preset(name: str, *flags: str) -> Settings:
    return parse(["--preset", name, "--device", "cpu", *flags], fedppo.MODES).settings


@pytest.fixture(scope="module")
def three(tiny_world):
    """The tiny world and a task for three agents."""
    world = world_with(tiny_world, agents=3)
    return world, fedppo.make_task(world, 0)


# ------------------------------------------------------------------------------------------ details


@pytest.mark.parametrize("make", ["neox", "gpt2"])
def test_detail_01_padding_never_matters(toy_policy, make):
    """Sampler and training forward on left-padded rows are the model's own forward on each prefix.

    One row and one token at a time, without cache and padding, on the same uniforms; and whatever
    ids stand at the pads.
    """
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert policies.position_ids(padding).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    policy, tau = moved(toy_policy() if make == "neox" else by_position(), 0.1, 9), 0.7
    prompts, prompt_mask = data.pad(PROMPTS, PAD, "left")
    uniforms = torch.rand(9, len(PROMPTS), generator=stream())
    response, mask = generate(policy, prompts, prompt_mask, uniforms, temperature=tau, eos_id=EOS,
                              pad_id=PAD)
    ids, attention = torch.cat([prompts, response], 1), torch.cat([prompt_mask, mask], 1)
    found = score_tokens(policy, ids, attention, response, mask, tau)
    lengths = set()
    for b, prompt in enumerate(PROMPTS):
        row = list(prompt)
        while len(row) < len(prompt) + 9 and EOS not in row:
            t, prefix = len(row) - len(prompt), torch.tensor([row])
            state = policy.model.base_model(prefix).last_hidden_state[0, -1]
            logits = policy.model(input_ids=prefix).logits[0, -1] / tau
            logprobs = logits.masked_fill(policy.forbidden, -math.inf).log_softmax(-1)
            row.append(int((logprobs.double().exp().cumsum(0) <= uniforms[t, b]).sum()))
            expected = logprobs[row[-1]], logprobs, policy.value_head(state)[0]
            for tensor, value in zip(found, expected, strict=True):
                close(tensor[b, t], value, 2e-5)
        lengths.add(len(row) - len(prompt))
        assert response[b][mask[b].bool()].tolist() == row[len(prompt):]
    assert len(lengths) > 1 and not found[0][mask == 0].any()
    garbage = torch.where(attention.bool(), ids, 7)
    assert torch.equal(score_tokens(policy, garbage, attention, response, mask, tau)[0], found[0])


def test_detail_02_pad_is_not_eos_and_eos_is_learned(small_model, toy_policy, small_settings):
    """`<|padding|>` is the pad of a tokenizer that sets none; all after EOS has mask 0."""
    _, tokenizer, forbidden = load.load_model(str(small_model), "cpu")
    assert tokenizer.eos_token_id == 0 and tokenizer.pad_token_id == 1
    assert tokenizer.pad_token == "<|padding|>" and forbidden[1] and not forbidden[0]

    policy = toy_policy()
    rollout = roll(policy, small_settings(response_length=8))
    ended = 0
    for response, mask in zip(rollout.response.tolist(), rollout.mask.tolist(), strict=True):
        n = response.index(EOS) + 1 if EOS in response else len(response)
        ended += n < len(response)
        assert mask == [1] * n + [0] * (len(response) - n) and set(response[n:]) <= {PAD}
    assert ended > 1, "the test needs rows that end early"
    logprobs = scored(policy, rollout, 1.0)[0]
    loss, _ = ppo_core.policy_loss(logprobs, rollout.logprobs, logprobs.detach() * 0 + 1,
                                   rollout.mask, 0.2)
    grad, = torch.autograd.grad(loss, logprobs)
    assert torch.equal(grad != 0, rollout.mask.bool())


def test_detail_03_response_logits_are_those_before_each_token(toy_policy, small_settings):
    policy = toy_policy()
    rollout = roll(policy, small_settings(response_length=5))
    ids, attention, q = rollout.ids, rollout.attention, rollout.prompt_length
    logits, values = policy.response_forward(ids, attention, q)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    whole = policy.model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
    real = rollout.mask.bool()  # at pads the two forwards may differ, and nobody reads them
    assert largest((logits - whole[:, q - 1:-1])[real][:, ~policy.forbidden]) < 1e-5
    assert logits.shape[:2] == values.shape == rollout.response.shape


def test_detail_04_one_temperature_everywhere(toy_policy, small_settings):
    """In sampler, old, new and reference log-probs: KL is 0 while policy = reference."""
    policy, weights = toy_policy(), torch.tensor([0.3, 0.7])
    logits = policy.model(input_ids=torch.tensor([[5, 9]])).logits[0, -1]
    for temperature in (0.5, 1.7):
        probs = (logits.masked_fill(policy.forbidden, -math.inf) / temperature).softmax(-1)
        s = small_settings(response_length=1, temperature=temperature, micro_batch=5000)
        drawn = roll(policy, s, prompts=[[5, 9]] * 5000).response.flatten()
        assert largest(drawn.bincount(minlength=16) / 5000 - probs) < 0.022  # > 3 standard errors
        for rule, penalty in (("geometric", "exact-in-loss"), ("sum", "both"),
                              ("arithmetic", "exact-in-loss"), ("sum", "k2-in-loss"),
                              ("geometric", "k3-in-loss")):
            s = small_settings(response_length=5, temperature=temperature, rule=rule,
                               penalty=penalty)
            rollout = roll(policy, s, [policy, copy.deepcopy(policy)], weights)
            valid = rollout.mask.bool()
            assert largest(rollout.kl[valid]) < 1e-5 and largest(rollout.kl_initial[valid]) < 1e-5
            first = rollout.response[0, 0]
            assert largest(rollout.logprobs[0, 0] - probs[first].log()) < 1e-5  # old
            loss, metrics = ppo_loss(policy, batch_of(rollout, rollout.values, rollout.values),
                                     weights, 1.0, ONE, s)  # new
            assert abs(metrics["approx_kl"]) < 1e-9 and abs(loss.item()) < 1e-5
            other = roll(policy, s, [moved(policy, 0.1)] * 2, weights)
            assert largest(other.kl[valid]) > 1e-2  # it is not 0 for another reason


def test_detail_05_dropout_is_off_everywhere(toy_policy, small_settings):
    """Though the model has dropout and came in training mode; before and after an update."""
    model = toy_policy(hidden_dropout=0.5, attention_dropout=0.5).model.train()
    policy = ppo_core.Policy(model, torch.arange(16) == PAD)
    s = small_settings(response_length=5)
    rollout = roll(policy, s)
    reward = data.RewardModel(copy.deepcopy(model).train(), "mean", stream())
    for _ in range(2):
        one, two = scored(policy, rollout, 1.0), scored(policy, rollout, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        scores = [reward(rollout.ids, rollout.attention) for _ in range(2)]
        assert torch.equal(*scores)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
        ppo_core.optimise(policy, optimizer, rollout, ONE, 0.1, s, stream())
        data.fit_reward_model(reward, [([5, 0], [6, 0])] * 4, PAD, lr=1e-3, epochs=1,
                              generator=stream())
    assert torch.equal(roll(policy, s).logprobs, roll(policy, s).logprobs)


def test_detail_06_old_logprobs_come_from_the_training_forward(toy_policy, small_settings):
    """On the very same rows they are equal to the bit, on a minibatch max|ratio - 1| < 1e-5."""
    policy, s = moved(toy_policy()), small_settings(response_length=10, temperature=0.7)
    rollout = roll(policy, s)

    def new(rows):
        batch = {name: tensor[rows] for name, tensor in rollout.batch.items()}
        return ppo_core.new_terms(policy, batch, ONE, s)[0]

    assert torch.equal(new(slice(None)), rollout.logprobs)
    for part in torch.randperm(8, generator=stream()).split(2):
        ratio = (new(part) - rollout.logprobs[part]).exp()
        assert largest(ratio - 1) < 1e-5
    assert not rollout.logprobs.requires_grad and rollout.logprobs.dtype == torch.float32


def test_detail_07_the_score_lands_on_the_last_valid_token():
    """Not on a pad; with lambda = gamma = 1 all earlier returns contain it alike."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    scores = torch.tensor([3.0, 5.0, 7.0])
    for penalty in PENALTIES.values():
        rewards = penalised_rewards(scores, torch.zeros(3, 4), mask, 0.1, penalty)
        assert rewards.tolist() == [[0, 0, 0, 3], [0, 5, 0, 0], [7, 0, 0, 0]]
    _, returns = gae(rewards, torch.randn(3, 4, generator=stream()), mask, 1.0, 1.0)
    torch.testing.assert_close(returns, scores[:, None] * mask)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_detail_08_the_reward_model_reads_valid_tokens_only(toy_policy, tiny_world, pooling):
    """Left, right and no padding score alike; its training texts end as generated ones do."""
    rows = [[5, 9, 0], [3, 4, 8, 12, 2, 0], [11]]
    for policy in (toy_policy(), by_position()):
        model = data.RewardModel(policy.model, pooling, stream())
        alone = torch.cat([model(*data.pad([row], PAD, "right")) for row in rows])
        for side in ("left", "right"):
            ids, mask = data.pad(rows, PAD, side)
            assert largest(model(ids, mask) - alone) < 1e-5
            ids = widen(ids, (2, 3), value=7)  # both sides, and a real token's id at the pads
            assert largest(model(ids, widen(mask, (2, 3))) - alone) < 1e-5
        assert largest(alone[1:] - alone[:1]) > 1e-2

    # A text that ended has EOS, one that was cut has not.
    world, s = tiny_world, tiny_world.settings
    pair = data.Pair(world.pairs[0].prompt, "it was good .", "it was good " * 20, "x")
    prompt, (chosen, rejected) = world.prompt_ids[pair.prompt], world.pair_ids([pair])[0]
    assert chosen[:len(prompt)] == rejected[:len(prompt)] == prompt
    assert chosen[-1] == world.eos_id and chosen.count(world.eos_id) == 1
    assert world.eos_id not in rejected and len(rejected) == len(prompt) + s.response_length
    assert world_with(world, response_eos=False).pair_ids([pair])[0][0] == chosen[:-1]
    # So a generated response, padded on both sides, and its text alone have one score.
    scorer = data.model_scorer(data.RewardModel(world.model, pooling, stream()))
    ids, mask, response, response_mask = world.respond(
        list(world.prompt_ids)[:6], world.initial, stream())
    scores = scorer(ids, mask, response, response_mask)
    for b in range(6):
        prompt, text = ids[b][mask[b].bool()][None], response[b][response_mask[b].bool()][None]
        assert largest(scorer(prompt, prompt * 0 + 1, text, text * 0 + 1) - scores[b]) < 1e-5


def test_detail_09_a_response_without_eos_can_be_penalised(
        toy_policy, small_settings, tiny_world, tiny_task, monkeypatch):
    """Off for real data, whose responses are cut; documented; the share that ended is logged."""
    plain, penalised = (roll(toy_policy(), small_settings(
        response_length=8, missing_eos_penalty=amount)) for amount in (0.0, 2.5))
    ended = (plain.response == EOS).any(1)
    assert 0 < ended.sum() < len(ended)
    torch.testing.assert_close(penalised.scores, plain.scores - 2.5 * (~ended).float())
    pythia, tiny = preset("pythia-70m"), preset("tiny")
    assert pythia.missing_eos_penalty == 0 and not pythia.response_eos
    assert tiny.missing_eos_penalty > 0 and tiny.response_eos
    assert "EOS" in Settings.__dataclass_fields__["missing_eos_penalty"].metadata["help"]

    rollouts = keep_rollouts(monkeypatch)
    world = world_with(tiny_world, response_length=6)
    metrics = agent_of(world, tiny_task).update([world.initial], ONE)
    share = [world.eos_id in row for row in rollouts[0].response.tolist()]
    assert metrics["ended"] == pytest.approx(sum(share) / 8) and 0 < sum(share) < 8


def test_detail_10_gae():
    """gamma 0.8, lambda 0.5, so gamma lambda = 0.4. V after the end is 0.

    three tokens:  delta_2 = 2 - 1.5           =  0.5   A_2 = 0.5
                   delta_1 = 0 + 0.8*1.5 - 1   =  0.2   A_1 = 0.2 + 0.4*0.5  =  0.4
                   delta_0 = 1 + 0.8*1   - 0.5 =  1.3   A_0 = 1.3 + 0.4*0.4  =  1.46
    two tokens:    delta_1 = 1 - 0.5           =  0.5   A_1 = 0.5
                   delta_0 = 0 + 0.8*0.5 - 1   = -0.6   A_0 = -0.6 + 0.4*0.5 = -0.4
    """
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 7.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 1.0, 1.5], [1.0, 0.5, 9.0]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.tensor([[1, 1, 1], [1, 1, 0]]), 0.8, 0.5)
    close(advantages, [[1.46, 0.4, 0.5], [-0.4, 0.5, 0.0]])
    close(returns, [[1.96, 1.4, 2.0], [0.6, 1.0, 0.0]])


def test_detail_11_whitening_over_the_rollout_batch(toy_policy, small_settings, monkeypatch):
    """Once, over all rows: together the minibatches have mean 0 and std 1, and each has not."""
    seen, loss = [], ppo_core.ppo_loss

    def spy(policy, batch, *args):
        seen.append(batch["advantages"][batch["mask"].bool()])
        return loss(policy, batch, *args)
    monkeypatch.setattr(ppo_core, "ppo_loss", spy)
    policy, s = toy_policy(), small_settings(response_length=6, epochs=1, minibatches=4)
    summed_gradient(policy, roll(policy, s), ONE, s)
    whole = torch.cat(seen)
    assert abs(whole.mean()) < 1e-6 and abs(whole.std(correction=0) - 1) < 1e-5
    assert len(seen) == 4 and max(abs(part.mean()) for part in seen) > 0.1


def test_detail_12_value_clipping():
    """Old value 0, clip 0.2; three values with returns, and a masked fourth.

    V 1, R 0: max(1, 0.2^2) = 1;   V 1, R 2: max(1, 1.8^2) = 3.24, clipped;   V 0.1, R 1: 0.81.
    """
    values = torch.tensor([[1.0, 1.0, 0.1, 5.0]], requires_grad=True)
    returns, mask = torch.tensor([[0.0, 2.0, 1.0, 5.0]]), torch.tensor([[1, 1, 1, 0]])
    loss, clipfrac = ppo_core.value_loss(values, 0 * returns, returns, mask, 0.2)
    assert loss.item() == pytest.approx((1 + 3.24 + 0.81) / 2 / 3)
    assert clipfrac.item() == pytest.approx(1 / 3)
    loss.backward()  # V - R where not clipped
    close(values.grad, [[1 / 3, 0.0, -0.9 / 3, 0.0]], 1e-6)


@every_penalty
def test_detail_13_a_gradient_does_not_depend_on_its_micro_batches(
        toy_policy, small_settings, monkeypatch, penalty):
    """Losses divide by the tokens of the whole minibatch: 1, 2, 3 or 4 micro-batches."""
    monkeypatch.setattr(ppo_core, "MAX_GRAD_NORM", 1e9)
    s = small_settings(response_length=8, epochs=1, minibatches=1, penalty=penalty)
    policy = toy_policy()
    references, weights = references_of(policy, "geometric")
    rollout = roll(policy, s, references, weights)
    assert len(rollout.mask.sum(1).unique()) > 2, "the rows should have unequal lengths"
    policy = moved(policy, 0.02)
    whole, metrics = summed_gradient(policy, rollout, weights, s)
    for micro_batch in (4, 3, 2):
        cut = replace(s, micro_batch=micro_batch)
        part, part_metrics = summed_gradient(policy, rollout, weights, cut)
        assert (part - whole).norm() < 1e-5 * whole.norm()
        assert part_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def padded(rollout, extra: int = 3):
    """The same rollout with more pads after every response, and garbage in all recorded there."""
    fill = {"ids": PAD, "attention": 0, "response": PAD, "mask": 0, "logprobs": 0.0, "values": 5.0,
            "kl": 7.0, "kl_initial": 7.0, "entropy": 9.0}
    wider = {name: widen(getattr(rollout, name), (0, extra), value=value)
             for name, value in fill.items()}
    return replace(rollout, **wider, reference=widen(rollout.reference, (0, 0, 0, extra), value=-1))


def test_detail_14_metrics_are_masked(tiny_world, tiny_task, monkeypatch):
    """Adding pads changes no metric; entropy is never negative."""
    metrics = []
    for change in (lambda rollout: rollout, padded):
        with monkeypatch.context() as patch:
            rollouts = keep_rollouts(patch, change)
            agent = agent_of(world_with(tiny_world, response_length=12), tiny_task)
            agent.policy.load_state_dict(moved(agent.policy, 0.02).state_dict())
            metrics.append(agent.update([tiny_world.initial], ONE))
    plain, wide = metrics
    lengths = rollouts[0].mask.sum(1)
    assert rollouts[0].mask.shape[1] > lengths.max() + 2 and len(lengths.unique()) > 2
    for name in plain.keys() - {"seconds"}:
        assert wide[name] == pytest.approx(plain[name], rel=2e-4, abs=1e-6), name
    assert plain["kl"] > 1e-3 and plain["entropy"] > 0
    one_hot = torch.full((3, 7), -math.inf).scatter(1, torch.tensor([[0], [3], [6]]), 0.0)
    assert (ppo_core.entropy(one_hot) == 0).all() and (rollouts[0].entropy >= 0).all()


@every_penalty
def test_detail_15_the_logged_kl_is_the_kl_trained_on(tiny_world, tiny_task, penalty, monkeypatch):
    """What `kl` in the metrics sums is what beta multiplies, in the reward and in the loss."""
    how, weights = PENALTIES[penalty], torch.tensor([0.6, 0.4], dtype=torch.float64)
    references = [tiny_world.initial, moved(tiny_world.initial, 0.05, 1)]
    for rule in ("geometric", "sum", "arithmetic"):
        world = world_with(tiny_world, rule=rule, penalty=penalty, response_length=8)
        with monkeypatch.context() as patch:
            rollouts = keep_rollouts(patch)
            agent = agent_of(world, tiny_task)
            agent.policy = moved(agent.policy, 0.05, 2)  # not in the optimizer: it stays as it is
            logged = agent.update(references, weights)["kl"]
        rollout, zero = rollouts[0], torch.zeros(8)
        if how.in_reward is not None:
            rewards = penalised_rewards(zero, rollout.kl, rollout.mask, 1.0, how)
            first = rollout.kl[:, :how.in_reward].sum(1)  # `both` charges later states only
            assert (first - rewards.sum(1)).mean().item() == pytest.approx(logged, rel=1e-4)
        if how.in_loss:
            batch = batch_of(rollout, 0 * rollout.values, rollout.values)
            on, off = (ppo_loss(agent.policy, batch, weights, beta, ONE, world.settings)[0].item()
                       for beta in (1.0, 0.0))
            assert (on - off) * rollout.mask.sum().item() / 8 == pytest.approx(logged, rel=1e-4)
        assert abs(logged) > 1e-2


def test_detail_16_the_sampler_is_the_policy(toy_policy):
    """No top-k, top-p or minimum length; the float32 cdf can end below 1; u = 0 is no trap."""
    policy, n = toy_policy(), 40_000
    policy.model.generation_config.update(top_k=1, top_p=0.1, min_new_tokens=3, do_sample=True)
    prompt, mask = torch.tensor([[5, 9]]), torch.ones(1, 2, dtype=torch.long)
    probs = policy.response_forward(torch.tensor([[5, 9, 2]]), torch.ones(1, 3), 2)[0][0, 0]
    probs = probs.softmax(-1)
    uniforms = ppo_core.draw_uniforms(1, n, stream(), prompt.device)
    drawn, _ = generate(policy, prompt.expand(n, -1), mask.expand(n, -1), uniforms, temperature=1.0,
                        eos_id=EOS, pad_id=PAD)
    counts, possible = drawn.flatten().bincount(minlength=16), probs > 0
    assert possible.sum() == 13 and not counts[~possible].any()
    expected = n * probs[possible]
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert statistic < 32.9  # chi-square, 12 degrees of freedom, 99.9 %
    below_1 = 1 - 2**-24
    for row, drawn in {
            (0.0, 0.5, 0.0, 0.5, 0.0): {0.0: 1, 0.5: 3, below_1: 3, 1.0: 3},
            # This cdf ends at 0.9: u = 0.88 is in the second id's share of it.
            (0.4, 0.4, 0.1, 0.0): {0.44: 0, 0.45: 1, 0.88: 1, 0.89: 2, below_1: 2}}.items():
        found = ppo_core.sample_inverse_cdf(torch.tensor([row] * len(drawn)),
                                            torch.tensor(list(drawn)))
        assert found.tolist() == list(drawn.values())


def test_detail_17_estimators_stand_where_they_are_right():
    """A wrong pair cannot be said; kl.py says what it would optimise, and places nothing itself."""
    pairs = {name: (how.estimator, how.in_loss, how.in_reward) for name, how in PENALTIES.items()}
    assert pairs == {
        "exact-in-loss": ("exact", True, None), "k2-in-loss": ("k2", True, None),
        "k3-in-loss": ("k3", True, None), "k1-in-reward": ("k1", False, 0),
        "both": ("exact", True, 1)}
    for name in PENALTIES:
        assert preset("tiny", "--penalty", name).penalty == name
    for flags in (["--penalty", "k1-in-loss"], ["--penalty", "k2-in-reward"],
                  ["--penalty", "k3-in-reward"], ["--penalty", "exact-in-reward"],
                  ["--estimator", "k1"]):
        with pytest.raises(UserError, match="invalid choice|unrecognized"):
            preset("tiny", *flags)
    for word in ("in the reward", "in the loss", "wrong", "the other direction"):
        assert word in kl.__doc__
    for function in (kl.reference, kl.penalty, kl.generalized_kl, kl.logprobs_and_kl):
        assert not {"place", "in_loss"} & set(inspect.signature(function).parameters)


@every_penalty
@pytest.mark.parametrize("rule", kl.RULES)
def test_detail_18_a_run_charges_the_penalty_by_kl_itself(three, monkeypatch, rule, penalty):
    """In a short run, in collecting as in optimising."""
    world, task = three
    how, entered = PENALTIES[penalty], []

    def spy(module, function):
        def spied(*args, **options):
            entered.append((function.__name__, options.get("rule"), options.get("estimator")))
            return function(*args, **options)
        monkeypatch.setattr(module, function.__name__, spied)
    spy(kl, kl.reference)
    spy(kl, kl.penalty)
    spy(kl, kl.logprobs_and_kl)
    spy(ppo_core, ppo_core.optimise)
    world = world_with(world, agents=1, rounds=1, batch=4, response_length=4, rule=rule,
                       penalty=penalty)
    train(world, replace(task_of(task, 1), eval_prompts=task.eval_prompts[:1]), "federated")
    middle = entered.index(("optimise", None, None))
    by = rule, how.estimator
    assert set(entered[:middle]) == {("reference", *by), ("penalty", *by)}
    steps = world.settings.epochs * world.settings.minibatches
    assert entered[middle + 1:] == [("logprobs_and_kl", *by)] * steps


def test_detail_19_scores_are_comparable_between_agents(tiny_world, tiny_task):
    """Mean 0 and std 1 on samples of the initial policy; held-out accuracy is reported."""
    world = tiny_world
    for i, (shard, scorer) in enumerate(zip(tiny_task.shards, tiny_task.scorers, strict=True)):
        sampled = world.respond((shard.prompts * 2)[:640], world.initial, stream(i))
        scores = scorer(*sampled)
        assert abs(scores.mean()) < 0.25 and 0.85 < scores.std() < 1.18  # 256 and 640 samples
    sample = world.respond(tiny_task.shards[0].prompts[:40], world.initial, stream())
    raw = 3 * mean_id(*sample) + 50
    scorer, *found = data.normalised(lambda *batch: 3 * mean_id(*batch) + 50, sample)
    assert found == pytest.approx([raw.mean().item(), raw.std(correction=0).item()], rel=1e-4)
    scores = scorer(*sample)
    assert abs(scores.mean()) < 1e-4 and abs(scores.std(correction=0) - 1) < 1e-4

    shard = tiny_task.shards[1]
    assert not any(pair in shard.train for pair in shard.heldout)
    scorer, (accuracy, n) = world.fit_reward(
        shard.train, shard.heldout, fedppo.generator(0, 1, "reward model"))
    assert tiny_task.accuracies[1] == (accuracy, n) and n == len(shard.heldout)
    chosen, rejected = (scorer(*data.pad(list(rows), world.pad_id, "left"), *torch.zeros(
        2, n, 0, dtype=torch.long)) for rows in zip(*world.pair_ids(shard.heldout), strict=True))
    assert accuracy == pytest.approx((chosen > rejected).float().mean().item(), abs=0.005)
    report = [str(check) for check in preflight.preflight(world, tiny_task)]
    for i, (accuracy, _) in enumerate(tiny_task.accuracies):
        assert any(f"agent {i}" in line and "accuracy" in line and f"{accuracy:.3g}" in line
                   for line in report)


def test_detail_20_initialisation(toy_policy, tiny_world, tiny_task, monkeypatch):
    agent = agent_of(tiny_world, tiny_task)
    group, = agent.optimizer.param_groups
    assert group["eps"] == 1e-5 and group["betas"] == (0.9, 0.99)
    assert {id(p) for p in group["params"]} == {id(p) for p in agent.policy.parameters()}
    assert not agent.policy.value_head.weight.any() and not agent.policy.value_head.bias.any()

    model = toy_policy(hidden_size=62, num_attention_heads=1).model  # D + 1 = 63
    heads = [data.RewardModel(model, "last", stream(seed)).head for seed in range(60)]
    weights = torch.cat([head.weight.flatten() for head in heads])  # 3720: 1.2 % standard error
    assert weights.std().item() == pytest.approx(63**-0.5, rel=0.04) and abs(weights.mean()) < 0.01
    assert not any(head.bias.any() for head in heads)
    made, adam = [], torch.optim.Adam

    def spy(*args, **options):
        made.append(adam(*args, **options))
        return made[-1]
    monkeypatch.setattr(torch.optim, "Adam", spy)
    data.fit_reward_model(data.RewardModel(model, "last", stream()), [([5], [6])], PAD, lr=1e-3,
                          epochs=1, generator=stream())
    assert [optimizer.defaults["eps"] for optimizer in made] == [1e-5]


def test_detail_21_ids_without_a_token_are_masked_by_the_policy(small_model, small_settings):
    """The embedding has more rows than the tokenizer entries; sampler and log-probs agree."""
    model, tokenizer, forbidden = load.load_model(str(small_model), "cpu")
    rows, entries = model.get_output_embeddings().weight.shape[0], len(tokenizer)
    assert forbidden.shape == (rows,) and rows > entries
    assert forbidden.nonzero().flatten().tolist() == [PAD, *range(entries, rows)]
    model.get_output_embeddings().weight.data.normal_(std=0.5, generator=stream())
    policy = ppo_core.Policy(model, forbidden)
    s = small_settings(response_length=20, temperature=1.5)
    rollout = roll(policy, s, [moved(policy)], initial=moved(policy))
    assert not forbidden[rollout.response[rollout.mask.bool()]].any()
    logits = policy(input_ids=rollout.ids, attention_mask=rollout.attention).logits
    assert torch.equal(logits == -math.inf, forbidden.expand_as(logits))
    for logprobs in (scored(policy, rollout, s.temperature)[1], rollout.reference):
        assert torch.equal(logprobs == -math.inf, forbidden.expand_as(logprobs))
        sums = logprobs[..., ~forbidden].exp().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
    assert torch.isfinite(rollout.kl).all() and torch.isfinite(rollout.entropy).all()
    step, _ = summed_gradient(policy, rollout, ONE, s)
    assert torch.isfinite(step).all()


@pytest.mark.parametrize("mode, rule", [
    ("federated", "geometric"), ("federated", "weights"), ("merged", "sum"), ("fedavg", "sum")])
def test_detail_22_references_are_frozen_copies(three, monkeypatch, mode, rule):
    """Their hash stays inside a round, while the policies move; a new round brings new ones."""
    world, task = three
    world, update, hashes = world_with(world, rule=rule, anchor=0.2, updates=2,
                                       response_length=8), fedppo.Agent.update, {}
    initial = digest(world.initial)

    def spy(agent, references, weights):
        assert not any(p.requires_grad for ref in references for p in ref.parameters())
        seen, own = hashes.setdefault(agent.index, []), digest(agent.policy)
        seen.append([digest(reference) for reference in references])
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
    if rule != "weights" and mode != "fedavg":
        assert hashes[0] == hashes[1] == hashes[2], "all agents of a round hear the same copies"
        assert hashes[0][0][-1] == initial  # the anchor
    assert digest(world.initial) == initial


def isolated_by_hand(world, task, order: list[int]) -> dict[int, torch.Tensor]:
    """Isolated runs of the agents, created and updated in this order -> their final weights."""
    agents = [agent_of(world, task, i, "isolated") for i in order]
    frozen = [world.new_policy().requires_grad_(False) for _ in order]
    for _ in range(world.settings.rounds):
        assert fedppo.exchange(agents, frozen, [True] * len(agents)) == [""] * len(agents)
        for row, agent in zip(torch.eye(len(order), dtype=torch.float64), agents, strict=True):
            agent.update(*fedppo.cooperate(agent, frozen, row))
    return {agent.index: weights_of(agent.policy) for agent in agents}


def test_detail_23_randomness_is_named(three):
    """Given the shards, another order of the agents, or one more, changes nothing in agent 0's."""
    world, task = three
    final = [weights_of(agent.policy) for agent in train(world, task, "isolated")[0]]
    torch.manual_seed(12345)  # the global stream is nobody's
    two, _ = train(world_with(world, agents=2), task_of(task, 2), "isolated")
    assert torch.equal(weights_of(two[0].policy), final[0])
    backwards = isolated_by_hand(world, task, [2, 1, 0])
    assert all(torch.equal(backwards[i], final[i]) for i in range(3))

    assert torch.equal(*(torch.rand(4, generator=fedppo.generator(0, 1, "x")) for _ in range(2)))
    names = [("evaluation",), *((i, name) for i in (0, 1, 11) for name in ("sampling", "prompts"))]
    streams = [fedppo.generator(seed, *name) for seed in (0, 1, 11) for name in names]
    streams += [source for i in range(3)
                for source in agent_of(world, replace(task, seed=7), i).streams.values()]
    assert len({source.initial_seed() for source in streams}) == 3 * 7 + 3 * 4


def classic_ppo(world, task, s, updates: int) -> torch.Tensor:
    """PPO with one fixed reference and exact KL in the loss, written out -> the final weights.

    Row by row, without cache, padding, masks or micro-batches; of ours it uses the data, the reward
    model and the random streams. gamma 1, lambda 0.95, c_v 0.1, gradients clipped at norm 1.
    """
    policy, reference = (ppo_core.Policy(copy.deepcopy(world.model).requires_grad_(True),
                                         world.forbidden) for _ in range(2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=s.lr, betas=(0.9, 0.99), eps=1e-5)
    prompt_stream, sampling, shuffling = (
        fedppo.generator(task.seed, 0, name) for name in ("prompts", "sampling", "minibatches"))
    prompts = [world.prompt_ids[prompt] for prompt in task.shards[0].prompts]
    queue: list[int] = []

    @torch.no_grad()
    def respond(prompt, uniforms):
        """-> prompt ids, sampled response ids, score."""
        ids = list(prompt)
        while len(ids) < len(prompt) + s.response_length and world.eos_id not in ids:
            logits = policy.model(input_ids=torch.tensor([ids])).logits[0, -1]
            cdf = logits.masked_fill(world.forbidden, -1e6).softmax(-1).cumsum(0)
            ids.append(int((cdf <= uniforms[len(ids) - len(prompt)] * cdf[-1]).sum()))
        response = ids[len(prompt):]
        whole = torch.tensor([prompt]), torch.tensor([response])
        score = task.scorers[0](*(x for ids in whole for x in (ids, ids * 0 + 1))).item()
        return prompt, response, score - s.missing_eos_penalty * (response[-1] != world.eos_id)

    for update in range(updates):
        optimizer.param_groups[0]["lr"] = s.lr * (1 - update / updates)
        while len(queue) < s.batch:
            queue += torch.randperm(len(prompts), generator=prompt_stream).tolist()
        taken, queue = queue[:s.batch], queue[s.batch:]
        uniforms = torch.rand(s.response_length, s.batch, generator=sampling)
        rows = [respond(prompts[k], uniforms[:, b]) for b, k in enumerate(taken)]
        old = copy.deepcopy(policy)
        for _ in range(s.epochs):
            for minibatch in torch.randperm(s.batch, generator=shuffling).chunk(s.minibatches):
                optimizer.zero_grad()
                plain_loss(policy, old, [reference], [1.0], rows, s, s.beta, 1.0,
                           minibatch.tolist()).backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
    return weights_of(policy)


def assert_equal_to_the_bit(runs: list[list[fedppo.Agent]]) -> None:
    """Weights, value heads and Adam's moments of two runs' agents."""
    for one, other in zip(*runs, strict=True):
        assert torch.equal(weights_of(one.policy), weights_of(other.policy))
        moments = (agent.optimizer.state_dict()["state"].values() for agent in (one, other))
        for a, b in zip(*moments, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_detail_24_identity_is_isolated_and_classic_is_ppo_with_one_fixed_reference(three):
    """The first to the bit; so is `isolated` with anchor 1, and by hand it is the same PPO."""
    world, task = three
    given = {"beta": 0.3, "lr": 5e-4, "updates": 2, "lr_schedule": "linear"}  # for every mode
    two = world_with(world, agents=2, topology="identity", **given)
    assert_equal_to_the_bit([train(two, task_of(task, 2), mode)[0]
                             for mode in ("isolated", "federated")])
    alone = world_with(world, agents=1, batch=4, response_length=8, **given)
    task = task_of(task, 1)
    classic, _ = train(alone, task, "classic")
    anchored, _ = train(world_with(alone, anchor=1.0), task, "isolated")
    assert_equal_to_the_bit([classic, anchored])
    final = weights_of(classic[0].policy)
    assert largest(final - weights_of(world.initial)) > 1e-3
    assert largest(final - classic_ppo(alone, task, alone.settings, updates=4)) < 1e-5
    moving, _ = train(alone, task, "isolated")
    assert largest(final - weights_of(moving[0].policy)) > 1e-5, "the reference makes a difference"


@pytest.mark.parametrize("mode", ["federated", "merged", "fedavg"])
def test_detail_25_optimizer_and_schedule_live_through_exchanges(three, mode):
    """They are not rebuilt each round: Adam counts all steps, the rate falls over the whole run."""
    world, task = three
    s = replace(world.settings, agents=2, rounds=3, lr_schedule="linear", lr=1e-3,
                response_length=6)
    agents, rows = train(world_with(world, **vars(s)), task_of(task, 2), mode)
    for agent in agents:
        steps = {int(state["step"]) for state in agent.optimizer.state.values()}
        assert steps == {s.rounds * s.updates * s.epochs * s.minibatches}
        rates = [row["lr"] for row in rows if row["agent"] == agent.index and row["update"]]
        assert rates == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
        live = {id(p) for group in agent.optimizer.param_groups for p in group["params"]}
        assert live == {id(p) for p in agent.policy.parameters()}, "an exchange replaced them"


def test_detail_26_equal_pairs_are_counted_reported_and_dropped(
        tmp_path, small_model, monkeypatch, capsys):
    """They never reach a reward model."""
    for table in (worlds.text_rows(40, equal=10), worlds.chat_rows(40, equal=10)):
        table[11]["rejected"] = table[11]["chosen"]
        path = worlds.write_jsonl(tmp_path / "pairs.jsonl", table)
        loaded = rows.load_pairs(str(path))
        assert len(loaded.pairs) == 29 and loaded.dropped == {rows.EQUAL: 11}
        assert all(pair.chosen != pair.rejected for pair in loaded.pairs)
    fitted = []

    def stop(world, train, heldout, *others):
        fitted.extend([*train, *heldout])
        raise UserError("stop here")
    monkeypatch.setattr(fedppo.World, "fit_reward", stop)
    assert fedppo.main([
        "--preset", "tiny", "--device", "cpu", "--model", str(small_model), "--dataset", str(path),
        "--agents", "1", "--pairs", "10", "--eval-prompts", "4", "--judge", "none", "--check"]) == 2
    said = capsys.readouterr()
    assert "stop here" in said.err
    assert "29 preference pairs of 40 rows; dropped: 11 since chosen and" in said.out
    assert len(fitted) > 10 and all(pair.chosen != pair.rejected for pair in fitted)


def test_detail_27_prompt_and_response_are_joined_by_one_space(tmp_path, small_model):
    """Whether a row has a space at the seam or not: the policy would sample the same ids."""
    tokenizer = load.load_model(str(small_model), "cpu")[1]
    for prompt, chosen in (("The soup was", "calm and grey."), ("The soup was ", " calm and grey."),
                           ("The soup was", "\n calm and grey. ")):
        table = worlds.chat_rows(1)
        for name, said in (("chosen", chosen), ("rejected", "dull.")):
            table[0][name] = [{"role": "user", "content": prompt},
                              {"role": "assistant", "content": said}]
        table[0]["prompt"] = prompt
        path = worlds.write_jsonl(tmp_path / "one.jsonl", table)
        pair, = rows.load_pairs(str(path)).pairs
        prompt, = data.encode_prompts(tokenizer, [pair.prompt])
        ids = prompt + data.encode_response(tokenizer, pair.chosen, 24, eos=False)
        assert tokenizer.decode(ids) == "The soup was calm and grey."
        ended = data.encode_response(tokenizer, pair.chosen, 24, eos=True)
        assert ended[-1] == tokenizer.eos_token_id
        # The space is the first response token's, not one of the prompt.
        assert tokenizer.convert_ids_to_tokens(ids)[len(prompt)].startswith("Ġ")


def test_detail_28_the_reward_model_is_trained(tiny_world, monkeypatch):
    """Trunk and head, on the agent's own pairs, which it learns to order; and it is what scores."""
    scoring, fitted, scorer, fit = [], [], data.model_scorer, data.fit_reward_model

    def scorer_spy(model, *args):
        scoring.append(model)
        return scorer(model, *args)

    def fit_spy(model, pairs, *args, **options):
        start = copy.deepcopy(model)
        loss = fit(model, pairs, *args, **options)
        fitted.append((model, start, pairs, loss))
        return loss
    monkeypatch.setattr(data, "model_scorer", scorer_spy)
    monkeypatch.setattr(data, "fit_reward_model", fit_spy)
    world = world_with(tiny_world, reward_epochs=4)
    task = fedppo.make_task(world, 0)
    assert [model for model, *_ in fitted] == scoring and len(scoring) == 2
    for shard, (model, start, pairs, loss) in zip(task.shards, fitted, strict=True):
        assert pairs == world.pair_ids(shard.train)
        assert largest(weights_of(model.head) - weights_of(start.head)) > 1e-3
        assert largest(weights_of(model.trunk) - weights_of(start.trunk)) > 1e-3
        right, chance = (data.preference_accuracy(m, pairs, world.pad_id) for m in (model, start))
        assert loss < math.log(2) - 0.05 and right > max(0.75, chance + 0.1)


def test_detail_29_training_is_float32_whatever_the_checkpoint_is(
        small_model, tiny_world, tiny_task):
    """transformers loads a float16 checkpoint as float16: the type is always explicit."""
    assert AutoModelForCausalLM.from_pretrained(small_model).dtype == torch.float16
    assert preset("tiny").dtype == preset("pythia-70m").dtype == "float32"
    model, _, forbidden = load.load_model(str(small_model), "cpu")
    policy, agent = ppo_core.Policy(model, forbidden), agent_of(tiny_world, tiny_task)
    reward = data.RewardModel(model, "last", stream())
    for module in (policy, reward, agent.policy, tiny_world.initial):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    logits, _ = policy.response_forward(torch.tensor([[5, 6, 7]]), torch.ones(1, 3), 2)
    assert logits.dtype == torch.float32


# ----------------------------------------------------------------------------- real models and data


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("offset", [0, 300, 1070, -100])
def test_detail_30_a_number_added_to_all_logits_costs_no_digits(tmp_path, offset, tied):
    """Pythia-70M's logits lie near 1,070, where bfloat16 has steps of 8. float64 is the oracle."""
    worlds.save_offset_model(tmp_path, offset, tied)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    notes = []
    model, _, forbidden = load.load_model(str(tmp_path), "cpu", notes.append)
    assert ["in common" in note for note in notes] == [True] * (offset != 0 and not tied)
    ids = torch.randint(2, 300, (4, 20), generator=stream())
    logits = exact(input_ids=ids).logits[:, 9:-1].masked_fill(forbidden, -torch.inf)
    assert offset == 0 or logits[..., ~forbidden].mean().item() == pytest.approx(offset, rel=0.02)
    wanted = logits.log_softmax(-1).gather(-1, ids[:, 10:, None])[..., 0].detach()
    for kind in (fast.policy, ppo_core.Policy):
        for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
            policy, mask = kind(model, forbidden, dtype), torch.ones_like(ids)
            found, _, values = score_tokens(policy, ids, mask, ids[:, 10:], mask[:, 10:], 1.0)
            assert found.dtype == values.dtype == torch.float32
            error = (found - wanted).abs()
            assert (error.max() if dtype == torch.float32 else error.mean()) < limit
            if dtype == torch.float32 and not tied:  # nothing in common is left that could cost
                assert error.max() < 1e-5
            with torch.no_grad():  # the sampler too
                sampled = policy.decoder(mask[:, :10], 1)(ids[:, :10]).log_softmax(-1)
            error = (sampled.gather(-1, ids[:, 10:11])[:, 0] - wanted[:, 0]).abs()
            assert error.mean() < limit


def test_detail_31_the_reward_model_scores_texts_of_the_form_it_was_fitted_to(tiny_world):
    """With any EOS as the one that it knows, or without; the accuracy is of the same form."""
    world, texts = tiny_world, [[12, 42], [12, 7, 42]]
    model = data.RewardModel(world.model, "last", stream())
    prompt = data.pad([[5, 6], [5, 6]], world.pad_id, "left")
    with torch.no_grad():
        known, other, bare = (model(*data.pad([[5, 6, *text, *end] for text in texts],
                                              world.pad_id, "right"))
                              for end in ([world.eos_id], [9], []))
    assert largest(known - bare) > 1e-3 and largest(other - known) > 1e-3
    eos = (world.eos_id, 9)
    for end in eos:
        sampled = data.pad([[*text, end] for text in texts], world.pad_id, "right")
        assert largest(data.model_scorer(model, eos, True)(*prompt, *sampled) - known) < 1e-5
        assert largest(data.model_scorer(model, eos, False)(*prompt, *sampled) - bare) < 1e-5
    for with_eos in (True, False):  # what is fitted and measured has the form that is scored
        fitted = world_with(world, response_eos=with_eos).pair_ids(world.pairs[:20])
        assert any(world.eos_id in ids for pair in fitted for ids in pair) is with_eos


@pytest.mark.parametrize("length, ends, share", [(24, True, "100%"), (3, False, "0%")])
def test_detail_31_how_responses_end_is_decided_by_what_is_seen(
        small_model, small_settings, tmp_path, length, ends, share):
    path = worlds.write_jsonl(tmp_path / "pairs.jsonl", worlds.text_rows(30))
    settings = small_settings(model=(str(small_model),), dataset=str(path), response_eos=None,
                              judge="none", response_length=length)
    world = fedppo.World(settings)
    assert world.settings.response_eos is ends
    assert any(note.startswith(f"{share} of the responses are shorter") for note in world.notes)
    told = fedppo.World(replace(settings, response_eos=not ends))
    assert told.settings.response_eos is not ends and len(told.notes) == len(world.notes) - 1


def test_detail_32_no_prompt_is_in_two_parts_and_equal_pairs_are_dropped(
        small_model, small_settings, tmp_path):
    """Five copies of each row, labels by coin: a reward model that saw the copies would know."""
    table = worlds.text_rows(40) * 5 + [
        {"prompt": f"The trip {i} was", "chosen": "calm and " * 9 + "dull", "rejected":
         "calm and " * 9 + "grey"} for i in range(3)]
    path = worlds.write_jsonl(tmp_path / "pairs.jsonl", table)
    settings = small_settings(model=(str(small_model),), dataset=str(path), judge="heldout",
                              response_length=6, pairs=6, shards="iid")
    world = fedppo.World(settings)
    assert len(world.pairs) == 40 and world.total == 203
    assert dict(world.dropped) == {
        rows.DUPLICATE: 160, "the model reads the same in their first 6 tokens": 3}
    eval_prompts, shards, judge = deal_rows(world, 0)
    parts = [judge, *(part for shard in shards for part in (shard.train, shard.heldout))]
    prompts = [prompt for part in parts for prompt in {pair.prompt for pair in part}]
    assert len({*prompts, *eval_prompts}) == len(prompts) + len(eval_prompts)


def test_detail_32_what_the_model_reads_alike_is_one_prompt_and_one_response(
        small_model, small_settings, tmp_path):
    """Another text with the same ids would carry a prompt from an agent's pairs to the judge's."""
    end = "<|endoftext|>"  # taken off prompts, and the end of a response
    table = worlds.text_rows(30)
    table += [row | {"prompt": row["prompt"] + end} for row in table]
    table += [{"prompt": f"The tea {i} was", "chosen": f"calm{end}x", "rejected": f"calm{end}y"}
              for i in range(4)]
    path = worlds.write_jsonl(tmp_path / "pairs.jsonl", table)
    world = fedppo.World(small_settings(model=(str(small_model),), dataset=str(path), judge="none"))
    assert len(world.pairs) == 30 == len({tuple(ids) for ids in world.prompt_ids.values()}) - 4
    assert world.dropped["the model reads another row as the same"] == 30
    assert sum(world.dropped.values()) == 34
    assert set(world.texts.values()) == {row["prompt"] for row in table[:30] + table[60:]}


def test_detail_33_any_id_may_be_the_pad(toy_policy, small_settings):
    """EOS too: samples, masks, log-probs and the gradient do not depend on which id it is."""
    s = small_settings(response_length=8)
    results = []
    for pad_id in (PAD, EOS, 7):
        policy = toy_policy()
        uniforms = torch.rand(8, len(PROMPTS), generator=stream())
        response, mask = generate(policy, *data.pad(PROMPTS, pad_id, "left"), uniforms,
                                  temperature=1.0, eos_id=EOS, pad_id=pad_id)
        prompt, prompt_mask = data.pad(PROMPTS, pad_id, "left")
        rollout = ppo_core.collect(
            policy, [toy_policy(1)], ONE, policy, mean_id, prompt, prompt_mask, s, eos_id=EOS,
            pad_id=pad_id, generator=stream())
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        metrics = ppo_core.optimise(policy, optimizer, rollout, ONE, 0.5, s, stream())
        results.append((response * mask, mask, rollout.logprobs, weights_of(policy), metrics))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])
        assert largest(results[0][2] - other[2]) < 1e-5
        assert largest(results[0][3] - other[3]) < 1e-5
        assert other[4] == pytest.approx(results[0][4], rel=1e-3, abs=1e-6)
    last = mask.sum(1).long() - 1
    assert (response[torch.arange(len(mask)), last] == EOS).any(), "EOS itself has mask 1"


def test_detail_34_before_news_has_come_federated_is_isolated(three):
    """The first exchange is of initial policies: one round of either is the same run."""
    world, task = three
    world = world_with(world, rounds=1, beta=0.3, lr=1e-3)
    one, other = (train(world, task, mode)[0] for mode in ("isolated", "federated"))
    for a, b in zip(one, other, strict=True):
        assert largest(weights_of(a.policy) - weights_of(b.policy)) < 1e-6

"""What all agents and seeds start from, and what one seed gives its agents.

In reading order
    1. World       the initial policy, the preference rows and the judge, loaded once
    2. Task        of one seed: each agent's shard and scorer; the judge and its prompts, held out
    3. make_task   deal the rows, fit each agent's reward model to its own pairs, normalise it

Nothing is learned here but reward models (data.py). Reading files and models is support/rows.py's
and support/load.py's.

Dimension key: B rows, Q prompt tokens (left-padded), T response tokens (right-padded).
"""

import dataclasses
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import data
import policies
import ppo_core
from data import generator
from support import fast, load, rows
from support.clock import timed
from support.settings import FITTED, Settings, decided

# ------------------------------------------------------------------------------------------- World


ALIKE = "the model reads another row as the same"  # words it does not know, say


class World:
    """What all agents and seeds start from: the initial policy and the preference rows."""

    def __init__(self, settings: Settings):
        """Load model and data. Raises UserError."""
        s = self.settings = decided(settings)
        load.prepare_libraries(s.model, s.dataset)
        fast.prepare_process(s.threads)
        self.device = torch.device(s.device)
        self.notes: list[str] = []  # what a user should know of model and data, a line each
        self._load_models()
        self._load_rows()
        prompts = list(self.prompt_ids)
        self.longest = max(map(len, self.prompt_ids.values())) + s.response_length  # tokens
        for model in self.models:
            fast.eager_if_short(model, self.longest, self.initial.dtype)
        self.sampler: Callable = fast.tuned_generate(
            self.initial, *self.padded(prompts[:min(s.batch, self.sampled_rows)]), s, self.eos_ids,
            self.pad_id)
        self.judge = None if s.judge in ("none", "heldout") else self._given(s.judge)
        self.given_reward = None if s.reward in FITTED else self._given(s.reward)

    def _load_models(self) -> None:
        """The models that agents start from in turns, and their one tokenizer."""
        s = self.settings
        loaded = [load.load_model(load.home(name), self.device, self.notes.append)
                  for name in s.model]
        self.models = [model for model, *_ in loaded]
        self.model, self.tokenizer, self.forbidden = loaded[0]
        self.eos_id, self.pad_id = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self.eos_ids = tuple(self.model.generation_config.eos_token_id)  # each ends a response
        for name, (model, tokenizer, forbidden) in zip(s.model, loaded, strict=True):
            probe, ends = "Some text, with 2 Words.", model.generation_config.eos_token_id
            differ = {
                "vocabularies": tokenizer.get_vocab() != self.tokenizer.get_vocab(),
                "numbers of rows in the output embedding": len(forbidden) != len(self.forbidden),
                "tokens that pad or end": (tokenizer.pad_token_id, *ends)
                != (self.pad_id, *self.eos_ids),
                "ways of reading a text": tokenizer(probe)["input_ids"]
                != self.tokenizer(probe)["input_ids"],
                "chat templates": getattr(tokenizer, "chat_template", None)
                != getattr(self.tokenizer, "chat_template", None)}
            if any(differ.values()):
                what = " and ".join(part for part, differs in differ.items() if differs)
                raise data.UserError(f"--model {s.model[0]} and {name} have different {what}: the "
                                     "agents must have one tokenizer")
        for name, model in zip(s.model, self.models, strict=True):
            load.check_layers(model, name, s.policy_layers, s.reward_probe)
        dtype = getattr(torch, s.dtype)
        # The initial policy is the loaded model itself and never moves; every other policy is its
        # twin.
        self.initials = [fast.policy(model, self.forbidden, dtype, s.policy_layers)
                         .requires_grad_(False) for model in self.models]
        self.initial = self.initials[0]
        for name, initial in zip(s.model, self.initials, strict=True):
            load.refuse_dtype(initial, name)

    def initial_of(self, index: int) -> ppo_core.Policy:
        """The initial policy of agent `index`."""
        return self.initials[index % len(self.initials)]

    def _load_rows(self) -> None:
        """The preference rows, each prompt's ids, and how responses end."""
        s = self.settings
        labelled = s.reward in FITTED or s.judge == "heldout"
        loaded = rows.load_pairs(
            load.home(s.dataset), s.splits, labelled, split_column=s.split_column,
            template=load.chat_template(self.tokenizer))
        self.total, self.dropped = loaded.total, loaded.dropped
        self.notes += [loaded.form] if loaded.form else []
        if loaded.unread:
            self.notes.append(f"columns that are not read: {', '.join(map(str, loaded.unread))}")
        self.prompt_ids: dict[str, list[int]] = {}
        for templated in (False, True):  # a template's prompts hold BOS already
            prompts = dict.fromkeys(
                pair.prompt for pair in loaded.pairs if pair.templated is templated)
            for model in self.models:
                self.prompt_ids |= load.prompt_ids(
                    self.tokenizer, list(prompts), model, s.response_length, templated)
        # Prompts that the model reads alike are one, and so are their rows with equal responses.
        first, pairs = {}, {}
        for pair in loaded.pairs:
            prompt = first.setdefault(tuple(self.prompt_ids[pair.prompt]), pair).prompt
            pair = dataclasses.replace(pair, prompt=prompt)
            pairs.setdefault((prompt, pair.chosen, pair.rejected), pair)
        self.dropped[ALIKE] += len(loaded.pairs) - len(pairs)
        # Decoding ids need not give back the dataset's text, which rules and people should see.
        self.texts = {ids: pair.plain or pair.prompt for ids, pair in first.items()}
        self.prompt_ids = {pair.prompt: list(ids) for ids, pair in first.items()}
        self.pairs = list(pairs.values())
        shares = self._drop_equal() if labelled else [0.0]
        self.dropped = +self.dropped
        if s.response_eos is None:
            self.settings = dataclasses.replace(s, response_eos=labelled and self._ended(shares))

    def _drop_equal(self) -> list[float]:
        """Pairs that --response-length leaves the same go -> of each other: the share that ended.

        Responses end within --response-length tokens, or are cut there.
        """
        length = self.settings.response_length
        ids = self._response_ids(self.pairs)
        kept = [n for n, (chosen, rejected) in enumerate(ids) if chosen != rejected]
        reason = f"the model reads the same in their first {length} tokens"
        self.dropped[reason] += len(ids) - len(kept)
        if not kept:
            raise data.UserError(f"dataset {self.settings.dataset!r} has no usable pair: {reason}, "
                                 f"of all {len(ids)}; raise --response-length")
        self.pairs = [self.pairs[n] for n in kept]
        return [sum(len(response) < length for response in ids[n]) / 2 for n in kept]

    def _ended(self, shares: list[float]) -> bool:
        """Whether the data's responses have ended, as most that were not cut have."""
        share = sum(shares) / len(shares)
        reads, flag = (("with EOS behind them", "--no-response-eos") if share >= 0.5 else
                       ("without EOS", "--response-eos"))
        self.notes.append(f"{share:.0%} of the responses are shorter than --response-length "
                          f"{self.settings.response_length}, so reward models read all responses "
                          f"{reads} ({flag} says otherwise)")
        return share >= 0.5

    def _response_ids(self, pairs: list[data.Pair],
                      eos: bool = False) -> list[tuple[list[int], list[int]]]:
        """Pairs -> the ids of (chosen, rejected)."""
        texts = [(pair.prompt, pair.joint, text)
                 for pair in pairs for text in (pair.chosen, pair.rejected)]
        ids = data.encode_responses(
            self.tokenizer, texts, self.settings.response_length, eos, self.eos_ids)
        return list(zip(ids[::2], ids[1::2], strict=True))

    def _given(self, spec: str) -> data.Scorer:
        """The user's judge or reward, called once now, so that it does not fail after hours."""
        scorer = load.load_scorer(
            load.home(spec), self.tokenizer, self.device, self.texts, self.eos_ids)
        scorer(*self.respond(list(self.prompt_ids)[:2], self.initial, generator(0, "try")))
        return scorer

    def new_policy(self, index: int = 0) -> ppo_core.Policy:
        """A policy of agent `index` with its initial weights (ppo_core.Policy or a faster form)."""
        initial = self.initial_of(index)
        model = policies.twin(initial.model, initial.learning)
        return fast.policy(model, self.forbidden, initial.dtype, initial.learning)

    def padded(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts -> ids, mask [B, Q], left-padded."""
        ids = [self.prompt_ids[prompt] for prompt in prompts]
        return data.pad(ids, self.pad_id, "left", self.device)

    @property
    def sampled_rows(self) -> int:
        """How many rows are sampled at a time.

        More than a micro-batch has: of a row that is sampled there are its keys and values and the
        logits of one position; in training there is all that a gradient needs. On a GPU no more
        than training samples, so that the CUDA graphs made there serve for all.
        """
        most = 16 * self.settings.micro_batch
        return most if self.device.type == "cpu" else min(most, self.settings.batch)

    def generate(
        self, policy, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, uniforms: torch.Tensor,
        **options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ppo_core.generate by self.sampler, `sampled_rows` rows at a time.

        prompt_ids, prompt_mask [B, Q], uniforms [T, B] -> response, mask, [B, longest response].
        """
        n, parts = self.sampled_rows, []
        for ids, mask, drawn in zip(
                prompt_ids.split(n), prompt_mask.split(n), uniforms.split(n, dim=1), strict=True):
            first = int(mask.argmax(1).min())  # where the longest prompt of these begins
            parts.append(self.sampler(policy, ids[:, first:], mask[:, first:], drawn, **options))
        width = max(mask.shape[1] for _, mask in parts)

        def joined(tensors: list[torch.Tensor], pad: int) -> torch.Tensor:
            return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=pad)
                              for x in tensors])

        return joined([x for x, _ in parts], self.pad_id), joined([x for _, x in parts], 0)

    def respond(self, prompts: list[str], policy, stream: torch.Generator) -> tuple:
        """A policy's responses -> (prompt_ids [B, Q], prompt_mask, response [B, T], mask)."""
        s, (ids, mask) = self.settings, self.padded(prompts)
        # Drawn for 64 rows at a time, as in earlier versions, so that a seed keeps its responses.
        uniforms = torch.cat([
            ppo_core.draw_uniforms(s.response_length, len(part), stream, ids.device)
            for part in ids.split(64)], 1)
        return ids, mask, *self.generate(
            policy, ids, mask, uniforms, temperature=s.temperature, eos_id=self.eos_ids,
            pad_id=self.pad_id)

    def pair_ids(self, pairs: list[data.Pair]) -> list[tuple[list[int], list[int]]]:
        """Pairs as (prompt + chosen, prompt + rejected) ids, ending as generated responses do."""
        responses = self._response_ids(pairs, self.settings.response_eos)
        return [tuple(self.prompt_ids[pair.prompt] + ids for ids in both)
                for pair, both in zip(pairs, responses, strict=True)]

    def fit_reward(
        self, train: list[data.Pair], heldout: list[data.Pair], stream: torch.Generator,
        index: int = 0, what: str = "", say: Callable[[str], None] = lambda what: None,
    ) -> tuple[data.Scorer, tuple[float, int]]:
        """A reward model fitted to `train` -> (its scorer, (accuracy, number) on `heldout`).

        It starts from the trunk of agent `index`. say: told what this is, and once a second how far
        it has come.
        """
        s, told = self.settings, time.monotonic()
        say(what)

        def watch(done: int, steps: int) -> None:
            nonlocal told
            if time.monotonic() > told + 1:
                told = time.monotonic()
                say(f"{what}, step {done} of {steps}")
        model = fast.reward_model(
            self.initial_of(index).model, s.reward_pooling, stream, s.reward_probe)
        data.fit_reward_model(model, self.pair_ids(train), self.pad_id, lr=s.reward_lr,
                              epochs=s.reward_epochs, generator=stream, watch=watch)
        accuracy = data.preference_accuracy(
            model, self.pair_ids(heldout), self.pad_id, batch=max(1, s.micro_batch // 2))  # pairs
        scorer = data.model_scorer(model, self.eos_ids, s.response_eos, s.micro_batch)
        return scorer, (accuracy, len(heldout))


# -------------------------------------------------------------------------------------------- Task


@dataclass(frozen=True)
class Task:
    """What one seed gives: a shard and a scorer for each agent, evaluation prompts and a judge."""

    seed: int
    shards: list[data.Shard]
    scorers: list[data.Scorer]
    accuracies: list[tuple[float, int] | None]  # per agent: (accuracy, held-out pairs), or given
    spreads: list[float]  # per agent: std of its raw reward on the initial policy's responses
    eval_prompts: list[str]
    own_prompts: list[set[str]]  # per agent: evaluation prompts of its own splits
    judge: data.Scorer | None
    judge_accuracy: tuple[float, int] | None
    fingerprint: torch.Tensor  # [n] scores of some samples: a resumed run must fit the same models


def deal_rows(world: World, seed: int) -> tuple[list[str], list[data.Shard], list[data.Pair]]:
    """One seed's evaluation prompts, shards, and pairs for a held-out judge. Raises UserError."""
    s = world.settings
    return data.make_shards(
        world.pairs, s.agents, s.shards, s.pairs if world.given_reward is None else 0,
        s.eval_prompts, random.Random(f"{seed} shards"),
        n_judge=max(2, len(world.pairs) // 4) if s.judge == "heldout" else 0)


@timed("reward models")
def make_task(world: World, seed: int, pooled: bool = False,
              say: Callable[[str], None] = lambda what: None) -> Task:
    """Deal the data and fit the reward models of a seed; pooled: all data to one agent; say: told
    what takes time, before it does."""
    s = world.settings
    eval_prompts, shards, judge_pairs = deal_rows(world, seed)
    everything = data.pool(shards)
    split_of = {pair.prompt: pair.split for pair in reversed(world.pairs)}
    own = [{prompt for prompt in eval_prompts if split_of[prompt] in shard.splits}
           if s.shards == "split" else set() for shard in shards]
    if pooled:
        shards, own = [everything], [set()]
    elif s.prompts == "common":  # public texts: pairs and reward models stay private
        shards = [dataclasses.replace(shard, prompts=everything.prompts) for shard in shards]

    # 1. The judge, which takes no part in training.
    judge, judge_accuracy = world.judge, None
    if s.judge == "heldout":
        heldout, train = data.split_by_prompt(
            judge_pairs, min(256, max(1, len(judge_pairs) // 5)))
        judge, judge_accuracy = world.fit_reward(
            train, heldout, generator(seed, "judge"), what=f"seed {seed}: fitting the judge",
            say=say)
        sampled = world.respond(eval_prompts, world.initial, generator(seed, "evaluation"))
        judge, *_ = data.normalised(judge, sampled)

    # 2. Each agent's reward: given, or a model fitted to its own pairs.
    fitted: list[tuple[data.Scorer, tuple | None]] = [(world.given_reward, None)] * len(shards)
    if world.given_reward is None:
        sources = [everything] if s.reward == "shared" else shards
        fitted = []
        for i, source in enumerate(sources):
            what = f"seed {seed}: fitting reward model {i + 1} of {len(sources)}"
            stream = generator(seed, i, "reward model")
            fitted.append(world.fit_reward(source.train, source.heldout, stream, i, what, say))
        fitted *= len(shards) // len(fitted)  # a shared model serves every agent

    # 3. Scores become comparable: mean 0, std 1 on the initial policy's responses to its prompts.
    samples = []
    for i, shard in enumerate(shards):
        say(f"seed {seed}: sampling, to normalise reward {i + 1} of {len(shards)}")
        stream = generator(seed, i, "normalisation")
        order = torch.randperm(len(shard.prompts), generator=stream)[:256].tolist()
        prompts = [shard.prompts[k] for k in order]
        samples.append(world.respond(prompts, world.initial_of(i), stream))
    normal = [data.normalised(scorer, own)
              for (scorer, _), own in zip(fitted, samples, strict=True)]
    scorers, spreads = [scorer for scorer, *_ in normal], [std for *_, std in normal]
    if s.reward == "ensemble":
        mean = data.mean_scorer(scorers)
        scorers = [data.normalised(mean, own)[0] for own in samples]

    firsts = [[tensor[:64] for tensor in own] for own in samples]  # enough for a fingerprint
    scored = [scorer(*own) for scorer, own in zip(scorers, firsts, strict=True)]
    scored += [judge(*firsts[0])] if judge else []
    accuracies = [accuracy for _, accuracy in fitted]
    return Task(seed, shards, scorers, accuracies, spreads, eval_prompts, own, judge,
                judge_accuracy, torch.cat(scored).cpu())

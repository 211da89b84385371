"""What a run says of model and data, and refuses, before it trains.

In reading order
    1. load_world      the world, the lines that describe it, and what each seed deals
    2. check_models    whether the modes can do with several models what they do
    3. describe_deal   what each agent was dealt, for config.json
"""

import torch

import data
from data import UserError
from support.clock import timed
from support.settings import Settings, show
from world import World, deal_rows


@timed("loading")
def load_world(s: Settings, reason: str, modes: dict,
               arms: dict[str, Settings]) -> tuple[World, dict[int, list[dict]]]:
    """Load what all seeds start from, and say what runs on what.

    modes: fedppo.MODES; arms: the settings of each mode -> (the world, what each seed deals to its
    agents, for config.json). Raises UserError.
    """
    print(f"preset {s.preset}: {reason}; {show(s.model)} on {s.device}")
    world = World(s)
    for note in world.notes:
        print(note)
    check_models(world, modes, arms)
    dropped = "; ".join(f"{n} since {why}" for why, n in world.dropped.items()) or "none"
    print(f"{len(world.pairs)} preference pairs of {world.total} rows; dropped: {dropped}")
    pooling = [f"--mode {mode}" for mode in s.mode if modes[mode].pooled]
    pooling += [f"--reward {s.reward}"] if s.reward in ("shared", "ensemble") else []
    if pooling:
        print(f"not private: {' and '.join(pooling)} pool what the agents own")
    if s.split_column and s.shards == "iid" and not s.splits:
        print(f"--split-column {s.split_column} changes nothing: with --shards split each agent "
              "would have its own splits")
    if s.prompts == "common":
        print("--prompts common: all agents see all training prompts, without labels")
    exchanging = tuple(mode for mode in s.mode if modes[mode].exchanges)
    if s.rounds == 1 and exchanging:
        print(f"warning: with --rounds 1 {show(exchanging)} can learn nothing from peers: the only "
              "exchange comes before the first update, when all policies are equal")
    # Too little data is said now, not when earlier seeds are trained.
    deals = {seed: describe_deal(deal_rows(world, seed)[1]) for seed in s.seeds}
    fits = "" if world.given_reward else "; {pairs} pairs fit its reward model, {heldout} test it"
    for line in deals[s.seeds[0]][:8]:
        print(("agent {agent}: {rows} rows of {prompts} prompts from {}" + fits).format(
            ", ".join(line["splits"]), **line))
    if s.agents > 8:
        print("(and so on: config.json has every agent's)")
    return world, deals


def check_models(world: World, modes: dict, arms: dict[str, Settings]) -> None:
    """Weights of different architectures have no average. Raises UserError."""
    def architecture(model: torch.nn.Module) -> list:
        config = {name: value for name, value in model.config.to_dict().items() if not
                  name.endswith(("_id", "dtype", "_version", "architectures", "_name_or_path"))}
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return [config, shapes]

    every = [architecture(model) for model in world.models]
    for mode in arms if any(one != every[0] for one in every) else ():
        averages = modes[mode].moves or arms[mode].rule == "weights"
        if modes[mode].exchanges and averages:
            raise UserError(f"--mode {mode} averages weights, and the models "
                            f"{show(world.settings.model)} differ in more than these: --mode "
                            "federated with another --rule compares their distributions alone")


def describe_deal(shards: list[data.Shard]) -> list[dict]:
    """What each agent was dealt, as numbers."""
    return [{"agent": i, "splits": list(shard.splits), "rows": shard.rows,
             "prompts": len(shard.prompts), "pairs": len(shard.train),
             "heldout": len(shard.heldout)} for i, shard in enumerate(shards)]

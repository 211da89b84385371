"""What one or two bad agents do to the honest ones, under each rule, with and without --outlier.

    python benchmarks/attacks.py             finished runs are not repeated, so it can be stopped at any time

In reading order
    1. attacks       what a bad agent sends in place of its policy; it trains on as if it were honest
    2. jobs          attack x rule x defence x seed, at the settings that study.py chose for the arm without attacks
    3. one run       study.run with fedppo.send replaced for the bad agents -> one row of results/attacks.csv
    4. tables        results/attacks.md

`--tune` runs several factors of --outlier on study.TUNING seeds, which the table does not use. Only the honest agents
are scored, and compared with the same agents in isolated training on the same seeds.
"""

import argparse
import contextlib
import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import fedppo  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
from study import Job  # noqa: E402

# --------------------------------------------------------------------------------------------------------- attacks

Weights = dict[str, torch.Tensor]


def random_weights(agent: fedppo.Agent) -> Weights:
    """Normal noise with each tensor's own mean and standard deviation."""
    stream = agent.streams["sampling"]  # of this seed and agent; nobody listens to what it samples afterwards
    return {name: tensor.mean() + tensor.std() * torch.randn(tensor.shape, generator=stream)
            for name, tensor in agent.policy.model.state_dict().items()}


def sign_flipped(agent: fedppo.Agent) -> Weights:
    """The initial policy minus all that the agent has learned."""
    initial = agent.world.initial.model.state_dict()
    return {name: 2 * initial[name] - tensor for name, tensor in agent.policy.model.state_dict().items()}


def collapsed(agent: fedppo.Agent) -> Weights:
    """A policy that says one word for ever: the last hidden state is all ones, and only one id's logit is not 0."""
    model = copy.deepcopy(agent.policy.model)
    word = agent.world.prompt_ids[agent.prompts[0]][0]
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight.zero_()
        model.gpt_neox.final_layer_norm.bias.fill_(1)
        output = model.get_output_embeddings().weight.zero_()  # [V, D]
        output[word] = 30 / output.shape[1]
    return model.state_dict()


def initial_copy(agent: fedppo.Agent) -> Weights:
    """The initial policy for ever: an agent that takes and gives nothing."""
    return agent.world.initial.model.state_dict()


ATTACKS: dict[str, Callable[[fedppo.Agent], Weights] | None] = {
    "none": None, "random weights": random_weights, "sign-flipped": sign_flipped, "collapsed": collapsed,
    "initial copy": initial_copy}

# ------------------------------------------------------------------------------------------------------------ jobs

ARMS = ("federated", "federated arithmetic", "federated weights", "federated merged")
CROWD_ARMS = ("federated", "federated merged")  # 8 agents cost twice as much
FACTORS = (1.5, 2.0, 3.0)  # of --outlier
FACTOR = 1.5  # chosen among them: the highest mean score of the honest agents (attacks.md)
SEEDS = study.REPORTED[:5]  # the fewest for which a band covers what it says


def job(arm: str, attack: str, bad: int, seed: int, outlier: float, chosen: dict[str, dict]) -> Job:
    """bad: how many agents, the first ones of 4 or, if they are two, of 8."""
    one = study.chosen_job(chosen, arm, "headline", seed)
    flags = one.flags + (" --agents 8" if bad == 2 else "") + (f" --outlier {outlier:g}" if outlier else "")
    return Job(arm + (", defended" if outlier else ""), f"{attack}, {bad} of {4 * bad}", seed, flags)


def jobs(chosen: dict[str, dict]) -> list[Job]:
    """Seed by seed, so that an interrupted study has whole ones."""
    return [job(arm, attack, bad, seed, outlier, chosen) for bad, arms in ((1, ARMS), (2, CROWD_ARMS))
            for seed in SEEDS for arm in ("isolated", *arms) for attack in (ATTACKS if arm != "isolated" else ["none"])
            for outlier in ((0, FACTOR) if arm != "isolated" else (0,))]


def tuning_jobs(chosen: dict[str, dict]) -> list[Job]:
    """Factors of --outlier, without an attack and under each, on seeds that the table does not use."""
    return [job(arm, attack, 1, seed, factor, chosen) for seed in study.TUNING for factor in FACTORS
            for attack in ATTACKS for arm in CROWD_ARMS]


# --------------------------------------------------------------------------------------------------------- one run

COLUMNS = ("arm", "regime", "seed", "settings", "judge_final", "judge_auc", "worst_agent", "own_topics", "caught",
           "wronged", "seconds", "judge_agents", "judge_curve")


@contextlib.contextmanager
def attacked(attack: Callable[[fedppo.Agent], Weights] | None, bad: int):
    """Let the first `bad` agents lie -> the list of (a bad peer?, left out?) of every decision of an honest agent."""
    send, outliers, decisions, bad = fedppo.send, fedppo.outliers, [], bad if attack else 0

    def lie(agent: fedppo.Agent) -> fedppo.Message:
        if agent.index >= bad:
            return send(agent)
        weights = {name: tensor.detach().clone() for name, tensor in attack(agent).items()}
        return fedppo.Message(weights, fedppo.digest(weights))

    def watch(agent: fedppo.Agent, peers: dict) -> list[int]:
        found = outliers(agent, peers)
        decisions.extend((peer < bad, peer in found) for peer in peers if agent.index >= bad)
        return found

    fedppo.send, fedppo.outliers = lie, watch
    try:
        yield decisions
    finally:
        fedppo.send, fedppo.outliers = send, outliers


def run(one: Job) -> dict:
    attack, place = one.regime.split(", ")
    bad = int(place.split()[0])
    with attacked(ATTACKS[attack], bad) as decisions:
        row = study.run(one, bad)
    for name, kind in (("caught", True), ("wronged", False)):  # shares of all decisions on bad and on honest peers
        of_kind = [left_out for is_bad, left_out in decisions if is_bad == kind]
        row[name] = f"{np.mean(of_kind):.3f}" if of_kind else ""
    return {name: row[name] for name in COLUMNS}


# ----------------------------------------------------------------------------------------------------------- table


def factor_table(rows: list[dict]) -> list[str]:
    """What --outlier was chosen by: means over all attacks (and none) and the tuning seeds."""
    lines = []
    for factor in FACTORS:
        of_factor = [row for row in rows if row["settings"].endswith(f"--outlier {factor:g}")]

        def mean(column: str, arm: str, of_factor=of_factor) -> float:
            return np.mean([float(row[column]) for row in of_factor if row["arm"].startswith(arm) and row[column]])
        if of_factor:
            lines.append([f"{factor:g}", *(f"{mean('judge_final', arm + ','):.3f}" for arm in CROWD_ARMS),
                          *(f"{mean(column, ''):.0%}" for column in ("caught", "wronged"))])
    return report.table("factor | " + " | ".join(f"`{arm}`, final score" for arm in CROWD_ARMS) +
                        " | bad peers left out | honest ones left out", lines)


def tables(rows: list[dict]) -> str:
    """The text of attacks.md from the rows of attacks.csv."""
    cells: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        cell, seed = cells.setdefault((row["regime"], row["arm"]), {}), int(row["seed"])
        if seed in cell:
            raise ValueError(f"{row['arm']}, {row['regime']}, seed {seed} stands twice: remove old rows")
        if seed in SEEDS:
            cell[seed] = row

    def pairs(regime: str, arm: str) -> np.ndarray:
        """[2, S] final scores of the honest agents, and of the same agents in isolated training."""
        alone = cells.get((f"none, {regime.split(', ')[1]}", "isolated"), {})
        both = [(float(row["judge_final"]), float(alone[seed]["judge_final"]))
                for seed, row in cells.get((regime, arm), {}).items() if seed in alone and row["judge_final"]]
        return np.array(both).T.reshape(2, -1)

    lines = []
    for regime in sorted({regime for regime, _ in cells}, key=lambda name: (name[-1], list(ATTACKS).index(
            name.split(", ")[0]))):
        for arm in ARMS:
            without, defended = pairs(regime, arm), pairs(regime, arm + ", defended")
            if min(without.shape[1], defended.shape[1]) < 2:
                continue
            shares = [np.mean([float(row[name]) for row in cells[regime, arm + ", defended"].values() if row[name]]
                              or [np.nan])
                      for name in ("caught", "wronged")]
            lines.append([regime, f"`{arm}`", *(f"{plot.iqm(x[0]):.2f} | {report.difference(x)}" for x in
                                                (without, defended)),
                          *("–" if np.isnan(share) else f"{share:.0%}" for share in shares)])
    header = ("attack | arm | honest agents' final score | minus `isolated`, seeds better | with `--outlier` | "
              "minus `isolated`, seeds better | bad peers left out | honest ones left out")
    return "\n".join(["# Agents that attack", "", "Made by `python benchmarks/attacks.py` from attacks.csv. Final "
                      "scores are interquartile means over seeds of the honest agents' mean; differences are means of "
                      "same-seed pairs [95 % band].", "", *report.table(header, lines), "",
                      "## The factor of --outlier", "", "Means over the five rows of attacks and the three tuning "
                      "seeds (`--tune`).", "",
                      *factor_table([row for row in rows if int(row["seed"]) in study.TUNING])]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tune", action="store_true", help="the runs by which the factor of --outlier was chosen")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each [one per core]")
    options = parser.parse_args(argv)
    os.chdir(HERE.parent)  # the flags name files of the repository
    results = HERE / "results"
    chosen = json.loads((results / "chosen.json").read_text())
    wanted = tuning_jobs(chosen) if options.tune else jobs(chosen)
    study.complete(results / "attacks.csv", wanted, "attacks", options.processes, run, COLUMNS)
    text = tables(study.load(results / "attacks.csv"))
    (results / "attacks.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

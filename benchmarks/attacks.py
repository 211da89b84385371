"""What one or two bad agents do to the honest ones, under each rule, with and without --outlier.

    python benchmarks/attacks.py         finished runs are not repeated, so it can be stopped at any
                                         time

In reading order
    1. attacks       what a bad agent sends in place of its policy; it trains on as if honest
    2. jobs          attack x rule x defence x seed, own prompts, 40 updates
    3. one run       study.train with the first agents replaced -> one row of results/attacks.csv
    4. tables        results/attacks.md

`--tune` runs several factors of --outlier on study.TUNING seeds, which the table does not use. Only
the honest agents are scored, and compared with the same agents in isolated training on the same
seeds.
"""

import argparse
import copy
import os
import re
import sys
from collections.abc import Iterator
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

# ---------------------------------------------------------------------------------------- attacks

Weights = dict[str, torch.Tensor]


class RandomWeights(fedppo.Agent):
    """Sends normal noise with each tensor's own mean and standard deviation."""

    def message(self) -> Weights:
        stream = self.streams["sampling"]  # nobody listens to what it samples afterwards
        return {name: tensor.mean() + tensor.std() * torch.randn(tensor.shape, generator=stream)
                for name, tensor in super().message().items()}


class SignFlipped(fedppo.Agent):
    """Sends the initial policy minus all that the agent has learned."""

    def message(self) -> Weights:
        initial = self.world.initial.model.state_dict()
        return {name: 2 * initial[name] - tensor for name, tensor in super().message().items()}


class Collapsed(fedppo.Agent):
    """Sends a policy that says one word for ever: its last hidden state is all ones, and only one
    id's logit is not 0."""

    def message(self) -> Weights:
        model = copy.deepcopy(self.policy.model)
        word = self.world.prompt_ids[self.prompts[0]][0]
        with torch.no_grad():
            model.gpt_neox.final_layer_norm.weight.zero_()
            model.gpt_neox.final_layer_norm.bias.fill_(1)
            output = model.get_output_embeddings().weight.zero_()  # [V, D]
            output[word] = 30 / output.shape[1]
        return model.state_dict()


class InitialCopy(fedppo.Agent):
    """Sends the initial policy for ever: an agent that takes and gives nothing."""

    def message(self) -> Weights:
        return self.world.initial.weights()


ATTACKS: dict[str, type[fedppo.Agent]] = {
    "none": fedppo.Agent, "random weights": RandomWeights, "sign-flipped": SignFlipped,
    "collapsed": Collapsed, "initial copy": InitialCopy}

# ------------------------------------------------------------------------------------------- jobs

ALONE = "--mode isolated --beta 0.5 --lr 0.0005"
ARMS = {  # beta and lr were tuned on study.TUNING seeds for own prompts without an anchor
    "federated": "--mode federated --topology self --beta 0.25 --lr 0.0005",
    "federated arithmetic": "--mode federated --topology self --rule arithmetic --beta 0.12 "
                            "--lr 0.0005",
    "federated weights": "--mode federated --topology self --rule weights --beta 0.12 --lr 0.0005",
    "merged": "--mode merged --topology self --beta 0.5 --lr 0.001",
}
CROWD_ARMS = ("federated", "merged")  # 8 agents cost twice as much
FACTORS = (1.5, 2.0, 3.0)  # of --outlier
FACTOR = 1.5  # chosen among them: the highest mean score of the honest agents (attacks.md)
SEEDS = range(1000, 1005)  # the fewest for which a band covers what it says


def job(arm: str, attack: str, bad: int, seed: int, outlier: float) -> Job:
    """bad: how many agents, the first ones of 4 or, if they are two, of 8."""
    flags = f"{ARMS.get(arm, ALONE)} --prompts own --anchor 0 --rounds 10"
    flags += " --agents 8" if bad == 2 else ""
    flags += f" --outlier {outlier:g}" if outlier else ""
    return Job(f"{arm}, defended" if outlier else arm, f"{attack}, {bad} of {4 * bad}", seed, flags)


def jobs() -> list[Job]:
    """Seed by seed, so that an interrupted study has whole ones."""
    wanted = []
    for bad, arms in ((1, ARMS), (2, CROWD_ARMS)):
        for seed in SEEDS:
            wanted.append(job("isolated", "none", bad, seed, 0))
            wanted += [job(arm, attack, bad, seed, outlier)
                       for arm in arms for attack in ATTACKS for outlier in (0, FACTOR)]
    return wanted


def tuning_jobs() -> list[Job]:
    """Factors of --outlier, without an attack and under each, on seeds that the table does not
    use."""
    return [job(arm, attack, 1, seed, factor) for seed in study.TUNING
            for factor in FACTORS for attack in ATTACKS for arm in CROWD_ARMS]


# ---------------------------------------------------------------------------------------- one run

COLUMNS = ("arm", "regime", "seed", "settings", "judge_final", "worst_agent", "own_topics",
           "caught", "wronged", "seconds", "judge_curve")


def run(one: Job) -> dict:
    """One row. Shares of all decisions of honest agents: caught, of those on bad peers, and
    wronged, on honest ones, in which the peer was left out as an outlier."""
    attack, place = one.regime.split(", ")
    bad, n_agents = (int(number) for number in place.split(" of "))

    def new_agent(index: int, *rest) -> fedppo.Agent:
        return (ATTACKS[attack] if index < bad else fedppo.Agent)(index, *rest)

    row, log = study.train(one, uncounted=bad, new_agent=new_agent)
    row |= {"caught": "", "wronged": ""}
    if "--outlier" in one.flags:
        found = list(decisions(log, n_agents))
        liars = range(bad if attack != "none" else 0)
        for name, lies in (("caught", True), ("wronged", False)):
            of_kind = [left_out for peer, left_out in found if (peer in liars) == lies]
            row[name] = f"{np.mean(of_kind):.3f}" if of_kind else ""
    return {name: row[name] for name in COLUMNS}


def decisions(log: list[dict], n_agents: int) -> Iterator[tuple[int, bool]]:
    """Of every agent in the log in every round -> (peer, whether it was left out as an outlier).

    A peer that is missing for another reason was not decided on.
    """
    exchanges = {(row["agent"], row["round"]): row["missed"] or "" for row in log if row["round"]}
    for (agent, _), missed in exchanges.items():
        reasons = dict(re.findall(r"agent (\d+) ([^;]*)", missed))
        for peer in range(n_agents):
            reason = reasons.get(str(peer), "")
            if peer != agent and reason in ("", "is an outlier"):
                yield peer, bool(reason)


# ----------------------------------------------------------------------------------------- tables


def factor_table(rows: list[dict]) -> list[str]:
    """What --outlier was chosen by: means over all attacks (and none) and the tuning seeds."""
    lines = []
    for factor in FACTORS:
        tried = [row for row in rows if report.flag(row, "--outlier") == f"{factor:g}"]
        if not tried:
            continue
        line = [f"{factor:g}"]
        for arm in CROWD_ARMS:
            scores = [float(row["judge_final"]) for row in tried
                      if row["arm"] == f"{arm}, defended" and row["judge_final"]]
            line.append(f"{np.mean(scores):.3f}")
        lines.append(line + [f"{share(tried, column):.0%}" for column in ("caught", "wronged")])
    return report.table("factor | " + " | ".join(f"`{arm}`, final score" for arm in CROWD_ARMS) +
                        " | bad peers left out | honest ones left out", lines)


def share(rows: list[dict], column: str) -> float:
    """The mean of a column of shares; nan if no row has one."""
    return float(np.mean([float(row[column]) for row in rows if row[column]] or [np.nan]))


Cells = dict[tuple[str, str], dict[int, dict]]  # {(regime, arm): {seed: row}}


def cells_of(rows: list[dict]) -> Cells:
    """The rows of SEEDS. Raises ValueError if one was run with two settings."""
    cells: Cells = {}
    for row in [row for row in rows if int(row["seed"]) in SEEDS]:
        cell, seed = cells.setdefault((row["regime"], row["arm"]), {}), int(row["seed"])
        if seed in cell:
            raise ValueError(f"{row['arm']}, {row['regime']}, seed {seed} stands twice: remove old "
                             "rows")
        cell[seed] = row
    return cells


def pairs(cells: Cells, regime: str, arm: str) -> np.ndarray:
    """[2, S] final scores of the honest agents, and of the same agents in isolated training."""
    alone = cells.get((f"none, {regime.split(', ')[1]}", "isolated"), {})
    both = [(float(row["judge_final"]), float(alone[seed]["judge_final"]))
            for seed, row in cells.get((regime, arm), {}).items()
            if seed in alone and row["judge_final"]]
    return np.array(both).T.reshape(2, -1)


def attack_table(cells: Cells) -> list[str]:
    regimes = [f"{attack}, {place}" for place in ("1 of 4", "2 of 8") for attack in ATTACKS]
    lines = []
    for regime, arm in [(regime, arm) for regime in regimes for arm in ARMS]:
        without, defended = (pairs(cells, regime, name) for name in (arm, f"{arm}, defended"))
        if min(without.shape[1], defended.shape[1]) < 2:
            continue
        shares = [share(list(cells[regime, f"{arm}, defended"].values()), column)
                  for column in ("caught", "wronged")]
        lines.append([regime, f"`{arm}`"])
        for both in (without, defended):
            lines[-1] += [f"{plot.iqm(both[0]):.2f}", report.difference(both)]
        lines[-1] += ["–" if np.isnan(value) else f"{value:.0%}" for value in shares]
    return report.table(
        "attack | arm | honest agents' final score | minus `isolated`, seeds better | with "
        "`--outlier` | minus `isolated`, seeds better | bad peers left out | honest ones left out",
        lines)


def tables(rows: list[dict]) -> str:
    """The text of attacks.md from the rows of attacks.csv."""
    return "\n".join([
        "# Agents that attack", "",
        "Made by `python benchmarks/attacks.py` from attacks.csv. Final scores are interquartile "
        "means over seeds of the honest agents' mean; differences are means of same-seed pairs "
        "[95 % band].", "",
        *attack_table(cells_of(rows)), "",
        "## The factor of --outlier", "",
        "Means over the five rows of attacks and the three tuning seeds (`--tune`).", "",
        *factor_table([row for row in rows if int(row["seed"]) in study.TUNING])]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tune", action="store_true",
                        help="the runs by which the factor of --outlier was chosen")
    parser.add_argument("--processes", type=int, default=os.cpu_count(),
                        help="of one thread each [one per core]")
    options = parser.parse_args(argv)
    os.chdir(HERE.parent)  # the flags name files of the repository
    path = HERE / "results/attacks.csv"
    wanted = tuning_jobs() if options.tune else jobs()
    study.complete(path, wanted, "attacks", options.processes, run, COLUMNS)
    text = tables(study.load(path))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""benchmarks/: which runs the study asks for, what it makes of the data, how it goes on, and its
tables."""

import dataclasses
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import fedppo
from support import load, rows
from tiny import judge

sys.path.insert(0, str(Path(fedppo.__file__).parent / "benchmarks"))

import report  # noqa: E402
import study  # noqa: E402

RESULTS = study.HERE / "results"

# ------------------------------------------------------------------------------------ the protocol


def test_no_seed_serves_two_stages():
    stages = [set(study.TUNING), set(study.REPORTED), set(study.CONFIRM)]
    assert len(set.union(*stages)) == sum(map(len, stages))
    assert len(study.REPORTED) >= 20 and len(study.CONFIRM) >= 20 and study.ELSEWHERE >= 8
    for stage, seeds in (("reported", study.REPORTED), ("confirm", study.CONFIRM)):
        of_stage = set(report.STAGES[stage])
        assert set(seeds) <= of_stage and not set(study.TUNING) & of_stage


def test_every_arm_starts_from_the_same_grid():
    first = study.climb_jobs([], study.ARMS)
    grids = {arm: sorted(job.flags.split("--beta ")[1] for job in first if job.arm == arm)
             for arm in study.ARMS}
    assert all(grid == grids["isolated"] for grid in grids.values())
    assert len(set(grids["isolated"])) == len(grids["isolated"]) == len(study.GRID)
    assert {job.seed for job in first} == {study.TUNING[0]}


@pytest.mark.parametrize("regime", ["headline", "half the lr", "8 agents"])
def test_the_flags_of_every_arm_are_fedppos(regime, monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    for arm in study.ARMS | study.PENALTY_ARMS:
        settings = study.parse(study.job(arm, regime, 0, 0.1, 1e-3).flags)
        assert settings.beta == 0.1 and settings.lr == (5e-4 if regime == "half the lr" else 1e-3)
        assert settings.agents == (8 if regime == "8 agents" else 4)
        assert settings.batch == (128 if arm == "isolated 4x batch" else 32)
        assert settings.mode == (arm.split()[0].strip(","),) or arm == "ensemble"


def scored(arm: str, cells: dict[tuple[float, float], list]) -> list[dict]:
    """Rows of a tuning stage: the scores of each (beta, lr) on the first TUNING seeds."""
    rows = []
    for (beta, lr), scores in cells.items():
        for seed, score in zip(study.TUNING, scores, strict=False):
            job = study.job(arm, "headline", seed, beta, lr)
            rows.append({"arm": arm, "regime": "headline", "seed": str(seed),
                         "settings": job.flags, "judge_final": str(score)})
    return rows


def cell_of(flags: str) -> study.Cell:
    words = flags.split()
    return float(words[words.index("--beta") + 1]), float(words[words.index("--lr") + 1])


def climb(score) -> list[dict]:
    """Rows of tuning `isolated` on the first seed, where score(beta, lr) is what a run gets."""
    rows: list[dict] = []
    while jobs := study.climb_jobs(rows, ["isolated"]):
        for cell in [cell_of(job.flags) for job in jobs]:
            rows += scored("isolated", {cell: [score(*cell)]})
    return rows


def test_the_climb_ends_where_no_neighbour_is_better_even_far_from_the_grid():
    peak = (0.015, 1.25e-4)  # two steps outside in both
    rows = climb(lambda beta, lr: -abs(np.log2(beta / peak[0])) - abs(np.log2(lr / peak[1])))
    assert study.finalists(rows, "isolated")[0] == peak
    assert set(study.neighbours(peak)) <= study.cells(rows, "isolated").keys()
    inside = climb(lambda beta, lr: -abs(np.log2(beta / 0.25)) + (lr == 1e-3))
    asked = {cell_of(row["settings"]) for row in inside}
    assert asked == {*study.GRID, (0.25, 2e-3)} and len(inside) == len(asked)


def test_the_best_finalist_is_chosen_by_its_mean_over_all_tuning_seeds():
    a, b, c = study.GRID[0], study.GRID[5], study.GRID[2]
    cells = {cell: [0.1] for cell in study.GRID} | {c: [""]}  # c diverged
    rows = scored("isolated", cells | {a: [0.9], b: [0.8]})
    finalists = study.finalists(rows, "isolated")
    assert finalists[:2] == [a, b] and c not in finalists
    asked = study.final_jobs(rows, ["isolated"])
    assert Counter(job.seed for job in asked) == dict.fromkeys(study.TUNING[1:], study.FINALISTS)
    rows = scored("isolated", cells | {a: [0.9, 0.1, 0.2], b: [0.8, 0.7, 0.6]})
    assert study.best(rows, "isolated") == b, "one lucky seed does not choose"
    text = json.dumps(study.choose(rows))
    assert json.loads(text)["isolated"]["beta"] == b[0] and "Infinity" not in text


def test_penalty_arms_take_their_twins_learning_rate():
    rows = scored("isolated", {(beta, lr): [0.5 + lr] * 3 for beta, lr in study.GRID})
    jobs = study.climb_jobs(rows, ["isolated, both"])
    assert {cell_of(job.flags)[1] for job in jobs} == {1e-3} and len(jobs) == 5
    rows += scored("isolated, both", {(beta, 1e-3): [1 - beta] for beta, _ in study.GRID})
    jobs = study.climb_jobs(rows, ["isolated, both"])
    assert [cell_of(job.flags) for job in jobs] == [(0.03, 1e-3)]


def test_reported_and_confirmed_runs_use_what_was_chosen():
    arms = study.ARMS | study.TWINS
    chosen = {arm: {"beta": 0.1 + 0.01 * k, "lr": 1e-3} for k, arm in enumerate(arms)}
    reported, confirmed = study.reported_jobs(chosen), study.confirm_jobs(chosen)
    assert {job.seed for job in reported} == set(study.REPORTED)
    assert {job.seed for job in confirmed} == set(study.CONFIRM)
    for job in [*reported, *confirmed]:
        beta = chosen[study.TUNED_AS.get(job.arm, job.arm)]["beta"]
        assert cell_of(job.flags)[0] == pytest.approx(beta)
    counts = Counter((job.arm, job.regime) for job in reported)
    assert all(counts[arm, "headline"] == 20 for arm in study.ARMS)
    assert all(counts[arm, regime] >= 8 for regime in study.REGIMES for arm in study.ABROAD)
    counts = Counter((job.arm, job.regime) for job in confirmed)
    assert all(counts[arm, "headline"] == 20 for arm in study.ARMS)
    assert all(counts[arm, "twice the updates"] == 20 for arm in study.ABROAD)
    again = study.again_jobs(chosen)
    assert len(again) == len(study.CONFIRM) * len(report.IN_SHORT) and set(again) < set(confirmed)


def test_the_shipped_results_are_of_the_runs_that_are_asked_for():
    """By their flags: not one would be run again, and what was chosen follows from their scores."""
    rows, chosen = study.load(RESULTS / "study.csv"), study.read(RESULTS / "chosen.json")
    done = {study.key(row) for row in rows}
    assert study.choose(rows) == chosen
    assert not study.climb_jobs(rows, study.ARMS | study.TWINS)
    assert set(study.final_jobs(rows, study.ARMS | study.TWINS)) <= done
    assert set(study.reported_jobs(chosen) + study.confirm_jobs(chosen)) <= done
    again = {study.key(row) for row in study.load(RESULTS / "again.csv")}
    assert again == set(study.again_jobs(chosen))


# ------------------------------------------------------------------------------------ whose labels


@pytest.fixture(scope="module")
def everything() -> list[data.Pair]:
    return rows.load_pairs(load.home("tiny/data")).pairs


def shards_of(pairs: list[data.Pair]) -> list[data.Shard]:
    return data.make_shards(pairs, 4, "split", 200, 128, random.Random("0 shards"))[1]


def test_the_first_two_agents_are_one_community_and_only_agent_0s_labels_are_flipped(everything):
    before = shards_of(everything)
    after = shards_of([study.flip(pair) for pair in everything])
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        splits = {pair.split for pair in old.train + old.heldout}
        assert {study.community(split) for split in splits} == {i // 2}
        turned = [dataclasses.replace(a, chosen=a.rejected, rejected=a.chosen) for a in old.train]
        assert new.train == (turned if i == 0 else old.train)


@pytest.mark.parametrize("number, hidden", [(0, "vividness"), (1, "sentiment")])
def test_a_community_labels_by_its_own_truth(number, hidden, everything):
    """What vividness lovers prefer follows the score without sentiment, and only that."""
    agreed = []
    own = [pair for pair in everything if study.community(pair.split) == number][:1200]
    for pair in own:
        new = study.relabel(pair, 20)
        assert {new.chosen, new.rejected} == {pair.chosen, pair.rejected}
        assert study.relabel(pair, 20) == new
        chosen, rejected = (
            sum(value for name, value in
                judge.terms(pair.prompt, text, len(text.split()) < 20).items() if name != hidden)
            for text in (new.chosen, new.rejected))
        if abs(chosen - rejected) > 0.5:  # Bradley-Terry draws: clear cases agree in over 82 %
            agreed.append(chosen > rejected)
    assert len(agreed) > 100 and np.mean(agreed) > 0.85


# ----------------------------------------------------------------------------------------- one run

SHORT = "--rounds 2 --updates 1 --batch 8 --pairs 20 --eval-prompts 8 --reward-epochs 1"


@pytest.fixture(scope="module")
def row():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study.HERE.parent)
        job = study.job("federated in communities", "two communities", 5, 0.2, 1e-3)
        yield study.run(dataclasses.replace(job, flags=f"{job.flags} {SHORT}"))


def test_a_row_says_what_the_run_did(row):
    assert set(row) == set(study.COLUMNS) and study.key(row).seed == 5
    curve, agents = ([float(value) for value in row[column].split()]
                     for column in ("judge_curve", "judge_agents"))
    assert len(curve) == 3 and len(row["reward_curve"].split()) == 2 and len(agents) == 4
    assert float(row["judge_initial"]) == pytest.approx(curve[0], abs=1e-3)
    assert float(row["judge_final"]) == pytest.approx(curve[-1], abs=1e-3)
    assert np.mean(agents) == pytest.approx(curve[-1], abs=1e-3)
    assert float(row["worst_agent"]) == pytest.approx(min(agents), abs=1e-3)
    assert row["episodes"] == 4 * 2 * 8
    policy = sum(p.numel() * 4 for p in study.start().model.parameters())
    assert row["bytes"] == 2 * 4 * policy, "one peer in each community, in two rounds"
    assert row["own_truth"] and row["own_topics"] and row["own_truth"] != row["judge_final"]


@pytest.mark.slow
def test_agents_together_in_the_headline_regime(monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    row = study.run(study.Job("federated", "headline", 5, f"--mode federated {SHORT}"))
    assert row["judge_average"] and row["judge_mixture"] and row["own_truth"] == ""
    one = study.run(study.Job("centralized", "headline", 5, f"--mode centralized {SHORT}"))
    assert float(one["own_topics"]) == pytest.approx(float(one["judge_final"]), abs=1e-4), \
        "it owns every topic"


@pytest.mark.slow
def test_a_run_is_the_same_when_repeated(row, monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    study.TASKS.clear()
    again = study.run(study.key(row))
    assert again | {"seconds": ""} == row | {"seconds": ""}


def test_a_mixture_is_the_geometric_mean_of_its_policies(toy_policy):
    policies = toy_policy(0), toy_policy(1)
    ids, mask = torch.tensor([[2, 3, 4], [5, 6, 7]]), torch.ones(2, 4, dtype=torch.long)
    positions = torch.arange(4).expand(2, 4)
    first = {"input_ids": ids, "attention_mask": mask[:, :3], "position_ids": positions[:, :3]}
    then = {"input_ids": ids[:, :1] + 1, "attention_mask": mask, "position_ids": positions[:, 3:]}
    whole = {"input_ids": torch.cat([ids, ids[:, :1] + 1], 1), "attention_mask": mask,
             "position_ids": positions}
    with torch.no_grad():
        mixture = study.Mixture(list(policies))
        prompt = mixture(**first, use_cache=True)
        step = mixture(**then, past_key_values=prompt.past_key_values, use_cache=True)
        sampled = torch.cat([prompt.logits, step.logits], 1).softmax(-1)
        logs = [policy(**whole).logits.log_softmax(-1) for policy in policies]
    assert torch.allclose(sampled, ((logs[0] + logs[1]) / 2).softmax(-1), atol=1e-6)


# ------------------------------------------------------------------------------------ the schedule


def fake_run(job: study.Job) -> dict:
    return dict.fromkeys(study.COLUMNS, "") | {
        "arm": job.arm, "regime": job.regime, "seed": job.seed, "settings": job.flags,
        "judge_final": "0.5"}


def test_finished_runs_are_not_repeated_and_a_broken_last_line_is(tmp_path):
    done = []

    def run(job: study.Job) -> dict:
        done.append(job)
        return fake_run(job)

    jobs = [study.job("isolated", "headline", seed, 0.1, 1e-3) for seed in range(4)]
    path = tmp_path / "study.csv"
    study.complete(path, jobs[:3], "test", 1, run)
    assert done == jobs[:3]
    text = path.read_text()
    for cut in (1, 20, 60):  # killed while it wrote the last row
        path.write_text(text[:-cut])
        assert len(study.load(path)) == 2
    rows = study.complete(path, jobs + jobs, "test", 1, run)
    assert done[3:] == jobs[2:] and len(rows) == 4, "each of them once"
    assert study.complete(path, jobs, "test", 1, run) == rows and len(done) == 5


# ---------------------------------------------------------------------------------- the statistics


def test_probability_of_improvement_by_hand():
    better = report.probability_of_improvement([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 5.0])
    assert better == pytest.approx(2.5 / 4)  # + = + -
    assert report.probability_of_improvement([0, 0], [1, 1]) == 0


def test_updates_to_a_level_counts_the_first_evaluation_at_or_above():
    assert report.updates_to([0, 4, 8, 12], [0.1, 0.5, 0.4, 0.9], 0.5) == 4
    assert report.updates_to([0, 4, 8, 12], [0.1, 0.5, 0.4, 0.9], 0.6) == 12
    assert report.updates_to([0, 4], [0.7, 0.2], 0.6) == 0
    assert report.updates_to([0, 4], [0.1, 0.2], 0.6) == np.inf


def test_median_updates_counts_runs_that_never_arrive():
    never = np.inf
    assert report.median_updates([8, 4, 12]) == 8
    assert report.median_updates([8, 4, 12, never]) == 8  # half of four have arrived by 8
    assert report.median_updates([4, never, never]) == never
    assert report.median_updates([4, 8, never, never]) == 8


def test_a_curve_knows_its_updates():
    row = {"judge_curve": "0.1 0.2 0.3", "reward_curve": "1 2 3 4 5 6 7 8"}
    updates, values = report.curve(row)
    assert updates.tolist() == [0, 4, 8] and values.tolist() == [0.1, 0.2, 0.3]
    assert report.curve(row, "reward_curve")[0].tolist() == list(range(1, 9))


# -------------------------------------------------------------------------------------- the tables


def results(folder: Path, gain: float = 0.3) -> Path:
    """8 seeds, `federated` better than `isolated` by `gain` on every one, and one run diverged."""
    rows, columns = [], ("judge_auc", "worst_agent", "own_topics", "judge_average",
                         "judge_mixture", "own_truth", "kl_initial", "reward_final", "seconds",
                         "bytes")
    plus = {"isolated": 0.0, "federated": gain, "fedavg": 2 * gain, "merged": gain,
            "isolated, both": -gain}
    jobs = [study.job(arm, regime, seed, 0.2, 1e-3) for arm in plus
            for regime in ("headline", "twice the updates", "two communities", "1 update a round")
            for seed in (*range(1000, 1008), *range(3000, 3008))]
    for job in jobs:
        final = 0.5 + 0.01 * (job.seed % 10) + plus[job.arm]
        rows.append(fake_run(job) | dict.fromkeys(columns, "1") | {
            "judge_final": str(final), "judge_agents": report.join([final - 0.1, final + 0.1]),
            "judge_curve": report.join([0.2, final / 2 + 0.2, final]),
            "reward_curve": report.join(np.linspace(0, 1, 40))})
    diverged = study.job("isolated", "headline", 1009, 0.2, 1e-3)
    rows.append(fake_run(diverged) | {"judge_final": ""})
    study.save(folder / "study.csv", rows)
    return folder


@pytest.mark.slow
def test_tables_and_pictures_of_a_known_study(tmp_path):
    text = report.write(results(tmp_path))
    assert (tmp_path / "tables.md").read_text() == text and "1 of them diverged" in text
    headline = text.split("## Headline, confirmation seeds")[1].split("##")[0]
    assert "| `federated` | 0.2, 0.001 | 0.8" in headline, "the interquartile mean is 0.835"
    assert "| +0.30 [+0.30, +0.30], 8 of 8 | – |" in headline, "over isolated; itself"
    assert "| +0.60 [+0.60, +0.60], 8 of 8 | -0.30 [-0.30, -0.30], 0 of 8 |" in headline, "fedavg"
    assert "the final score of `isolated` (its own) | 20 (40) | 20 (40) |" in text
    assert "`fedavg` (its own) | never (40) | never (40) |" in text
    assert "| 0 of 16; +0.30, +0.30 |" in text
    penalty = next(line for line in text.splitlines() if line.startswith("| `isolated` | both |"))
    assert penalty.endswith("| -0.30 [-0.30, -0.30], 0 of 8 |")
    losses = text.split("## No gain, or a loss")[1].split("##")[0]
    assert "| `merged` | `fedavg` | headline | -0.30 [-0.30, -0.30], 0 of 8 |" in losses
    for name in ("curves", "forest", "bytes"):
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000
        assert (tmp_path / f"{name}.svg").exists()


def test_runs_made_again_stand_beside_the_first_ones(tmp_path):
    rows = study.load(results(tmp_path) / "study.csv")
    assert report.again_table(report.Study(tmp_path)) == [], "there are none"
    rows = [row for row in rows
            if row["judge_final"] and row["regime"] == "headline" and row["seed"] > "3001"]
    for row in rows:
        if row["arm"] == "federated":
            row["judge_final"] = str(float(row["judge_final"]) + 0.1)
    study.save(tmp_path / "again.csv", rows)
    table = "\n".join(report.again_table(report.Study(tmp_path)))
    assert ("| `isolated` | 0.55 | 0.55 | – | – | +0.00 [+0.00, +0.00], 3 of 6 |"
            in table), "the same seeds, all ties"
    assert ("| `federated` | 0.85 | 0.95 | +0.30 [+0.30, +0.30], 8 of 8 | "
            "+0.40 [+0.40, +0.40], 6 of 6 | +0.10 [+0.10, +0.10], 6 of 6 |" in table)


def test_single_seeds_have_no_table_and_two_settings_of_one_run_are_an_error(tmp_path):
    path = results(tmp_path) / "study.csv"
    rows = study.load(path)
    study.save(path, [row for row in rows if row["seed"] == "1000"])
    assert "##" not in report.tables(report.Study(tmp_path)), "no differences of single seeds"
    study.save(path, [*rows, rows[0] | {"settings": rows[0]["settings"] + " --clip 0.1"}])
    with pytest.raises(ValueError, match="stands twice"):
        report.tables(report.Study(tmp_path))

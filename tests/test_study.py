"""benchmarks/: which runs the study asks for, what it makes of the data, how it resumes, and its tables."""

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
from tiny import judge

sys.path.insert(0, str(Path(fedppo.__file__).parent / "benchmarks"))

import report  # noqa: E402
import study  # noqa: E402

# ---------------------------------------------------------------------------------------------------- the protocol


def test_no_seed_serves_two_stages():
    stages = [set(study.TUNING), set(study.REPORTED), set(study.CONFIRM)]
    assert len(set.union(*stages)) == sum(map(len, stages))
    assert len(study.REPORTED) >= 20 and len(study.CONFIRM) >= 20 and study.ELSEWHERE >= 8
    for stage, seeds in (("reported", study.REPORTED), ("confirm", study.CONFIRM)):
        assert set(seeds) <= set(report.STAGES[stage]) and not set(study.TUNING) & set(report.STAGES[stage])


def test_every_arm_starts_from_the_same_grid():
    first = study.climb_jobs([], study.ARMS)
    cells = {arm: Counter(job.flags.split("--beta ")[1] for job in first if job.arm == arm) for arm in study.ARMS}
    assert all(grid == cells["isolated"] for grid in cells.values())
    assert sorted(cells["isolated"].values()) == [1] * len(study.GRID)
    assert {job.seed for job in first} == {study.TUNING[0]}


@pytest.mark.parametrize("arm", [*study.ARMS, *study.PENALTY_ARMS, *study.COMMUNITY_ARMS])
@pytest.mark.parametrize("regime", ["headline", "half the lr", "8 agents"])
def test_the_flags_of_every_arm_are_fedppos(arm, regime, monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    if arm in study.COMMUNITY_ARMS and regime == "8 agents":
        pytest.raises(fedppo.UserError, fedppo.parse, study.job(arm, regime, 0, 0.1, 1e-3).flags.split())
        return
    settings, _ = fedppo.parse(["--preset", "tiny", *study.job(arm, regime, 0, 0.1, 1e-3).flags.split()])
    assert settings.beta == (0.1,) and settings.lr == (5e-4 if regime == "half the lr" else 1e-3)
    assert settings.agents == (8 if regime == "8 agents" else 4)


def test_the_arm_with_the_federations_experience_has_it():
    flags = study.ARMS["isolated 4x batch"].split()
    assert int(flags[flags.index("--batch") + 1]) == 4 * fedppo.Settings().batch


def scored(arm: str, cells: dict[tuple[float, float], list[float]]) -> list[dict]:
    """Rows of a tuning stage: the final judge's scores of each (beta, lr) on the first TUNING seeds."""
    rows = []
    for (beta, lr), scores in cells.items():
        for seed, score in zip(study.TUNING, scores, strict=False):
            job = study.job(arm, "headline", seed, beta, lr)
            rows.append({"arm": arm, "regime": "headline", "seed": str(seed), "settings": job.flags,
                         "judge_final": score if score == "" else str(score)})
    return rows


def climb(score) -> list[dict]:
    """Rows of tuning `isolated` on the first seed, where score(beta, lr) is what a run gets."""
    rows: list[dict] = []
    while jobs := study.climb_jobs(rows, ["isolated"]):
        for job in jobs:
            words = job.flags.split()
            rows += scored("isolated", {(float(words[-3]), float(words[-1])): [score(float(words[-3]),
                                                                                  float(words[-1]))]})
    return rows


def test_the_climb_ends_where_no_neighbour_is_better_even_far_from_the_grid():
    peak = (0.015, 1.25e-4)  # two steps outside in both
    rows = climb(lambda beta, lr: -abs(np.log2(beta / peak[0])) - abs(np.log2(lr / peak[1])))
    assert study.finalists(rows, "isolated")[0] == peak
    assert set(study.neighbours(peak)) <= study.cells(rows, "isolated").keys()
    inside = climb(lambda beta, lr: -abs(np.log2(beta / 0.25)) + (lr == 1e-3))
    asked = {tuple(row["settings"].split()[-3::2]) for row in inside}
    assert len(inside) == len(asked) == len(study.GRID) + 1, "one neighbour was not on the grid: lr 2e-3"


def test_the_best_finalist_is_chosen_by_its_mean_over_all_tuning_seeds():
    a, b, c = study.GRID[0], study.GRID[5], study.GRID[2]
    cells = {cell: [0.1] for cell in study.GRID} | {c: [""]}  # c diverged
    rows = scored("isolated", cells | {a: [0.9], b: [0.8]})
    assert study.finalists(rows, "isolated")[:2] == [a, b] and c not in study.finalists(rows, "isolated")
    asked = study.final_jobs(rows, ["isolated"])
    assert Counter(job.seed for job in asked) == dict.fromkeys(study.TUNING[1:], study.FINALISTS)
    rows = scored("isolated", cells | {a: [0.9, 0.1, 0.2], b: [0.8, 0.7, 0.6], c: [""]})
    assert study.best(rows, "isolated") == b, "one lucky seed does not choose"
    text = json.dumps(study.choose(rows_of_every_arm(rows)))
    assert json.loads(text)["isolated"]["beta"] == b[0] and "Infinity" not in text


def rows_of_every_arm(rows: list[dict]) -> list[dict]:
    rows = list(rows)
    for arm in study.ARMS | study.TWINS:
        if arm != "isolated":
            rows += scored(arm, {study.GRID[0]: [0.5] * 3, study.GRID[1]: [0.4] * 3, study.GRID[2]: [0.3] * 3})
    return rows


def test_penalty_arms_take_their_twins_learning_rate():
    rows = scored("isolated", {(beta, lr): [0.5 + lr] * 3 for beta, lr in study.GRID})
    jobs = study.climb_jobs(rows, ["isolated, both"])
    assert {job.flags.split("--lr ")[1] for job in jobs} == {"0.001"} and len(jobs) == 5
    rows += scored("isolated, both", {(beta, 1e-3): [1 - beta] for beta, _ in study.GRID})
    assert [job.flags.split("--beta ")[1] for job in study.climb_jobs(rows, ["isolated, both"])] == ["0.03 --lr 0.001"]


def test_reported_and_confirmed_runs_use_what_was_chosen():
    chosen = {arm: {"beta": 0.1 + 0.01 * k, "lr": 1e-3} for k, arm in enumerate(study.ARMS | study.TWINS)}
    jobs = study.reported_jobs(chosen)
    assert not {job.seed for job in jobs} & (set(study.TUNING) | set(study.CONFIRM))
    for job in [*jobs, *study.confirm_jobs(chosen)]:
        values = chosen[study.TUNED_AS.get(job.arm, job.arm)]
        assert f"--beta {values['beta']:g} " in job.flags
    counts = Counter((job.arm, job.regime) for job in jobs)
    assert all(counts[arm, "headline"] == 20 for arm in study.ARMS)
    assert all(counts[arm, regime] >= 8 for regime in study.REGIMES for arm in study.ABROAD)
    confirmed = Counter((job.arm, job.regime) for job in study.confirm_jobs(chosen))
    assert all(confirmed[arm, "headline"] == 20 for arm in study.ARMS)
    assert all(confirmed[arm, "twice the updates"] == 20 for arm in study.ABROAD)


# ------------------------------------------------------------------------------------------------- whose labels


def shards_of(pairs: list[data.Pair]) -> list[data.Shard]:
    return data.make_shards(pairs, 4, "split", 200, 128, random.Random("0 shards"))[1]


def everything() -> list[data.Pair]:
    return data.load_pairs(fedppo.at_home("tiny/data"))[0]


def test_the_first_two_agents_are_one_community_and_the_others_the_other():
    for i, shard in enumerate(shards_of(everything())):
        assert {study.community(pair.split) for pair in shard.train + shard.heldout} == {i // 2}


def test_only_agent_0s_labels_are_flipped():
    before, after = shards_of(everything()), shards_of([study.flip(pair) for pair in everything()])
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        turned = [a.chosen == b.rejected and a.rejected == b.chosen for a, b in
                  zip(old.train, new.train, strict=True)]
        assert all(turned) if i == 0 else not any(turned)
        assert [pair.prompt for pair in old.train] == [pair.prompt for pair in new.train]


def test_a_community_labels_by_its_own_truth():
    """Vividness lovers do not see sentiment: what they prefer follows the score without that term, and only that."""
    for number, hidden in ((0, "vividness"), (1, "sentiment")):
        agree, n = 0, 0
        for pair in [pair for pair in everything() if study.community(pair.split) == number][:1200]:
            new = study.relabel(pair, 20)
            assert {new.chosen, new.rejected} == {pair.chosen, pair.rejected} and study.relabel(pair, 20) == new
            terms = [judge.terms(pair.prompt, text, len(text.split()) < 20) for text in (new.chosen, new.rejected)]
            own = [sum(value for name, value in one.items() if name != hidden) for one in terms]
            if abs(own[0] - own[1]) > 0.5:  # labels are Bradley-Terry draws: clear cases agree in over 82 %
                agree, n = agree + (own[0] > own[1]), n + 1
        assert n > 100 and agree / n > 0.85, (number, agree, n)


# ----------------------------------------------------------------------------------------------------- one run

SHORT = "--rounds 2 --updates 1 --batch 8 --pairs 20 --eval-prompts 8 --reward-epochs 1"


@pytest.fixture(scope="module")
def row():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study.HERE.parent)
        job = study.job("federated in communities", "two communities", 5, 0.2, 1e-3)
        yield study.run(dataclasses.replace(job, flags=f"{job.flags} {SHORT}"))


def test_a_row_says_what_the_run_did(row):
    assert set(row) == set(study.COLUMNS) and study.key(row).seed == 5
    curve = [float(value) for value in row["judge_curve"].split()]
    assert len(curve) == 3 and len(row["reward_curve"].split()) == 2 and len(row["judge_agents"].split()) == 4
    assert float(row["judge_initial"]) == pytest.approx(curve[0], abs=1e-3)
    assert float(row["judge_final"]) == pytest.approx(curve[-1], abs=1e-3)
    agents = [float(value) for value in row["judge_agents"].split()]
    assert np.mean(agents) == pytest.approx(curve[-1], abs=1e-3)
    assert float(row["worst_agent"]) == pytest.approx(min(agents), abs=1e-3)
    assert row["episodes"] == 4 * 2 * 8
    assert row["bytes"] == 2 * 4 * sum(p.numel() * 4 for p in fedppo.World(
        fedppo.parse(["--preset", "tiny"])[0]).model.parameters()), "one peer in each community"
    assert row["own_truth"] and row["own_topics"] and row["own_truth"] != row["judge_final"]


@pytest.mark.slow
def test_agents_together_in_the_headline_regime(monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    row = study.run(study.Job("federated", "headline", 5, f"--mode federated {SHORT}"))
    assert row["judge_average"] and row["judge_mixture"] and row["own_truth"] == ""
    one = study.run(study.Job("centralized", "headline", 5, f"--mode centralized {SHORT}"))
    assert float(one["own_topics"]) == pytest.approx(float(one["judge_final"]), abs=1e-4), "it owns every topic"


@pytest.mark.slow
def test_a_run_is_the_same_when_repeated(row, monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    study.TASKS.clear()
    again = study.run(study.key(row))
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in row.items() if k != "seconds"}


def test_a_mixture_of_equal_policies_is_that_policy_and_of_others_their_geometric_mean(toy_policy):
    first, second = toy_policy(0), toy_policy(1)
    ids, mask = torch.tensor([[2, 3, 4], [5, 6, 7]]), torch.ones(2, 3, dtype=torch.long)
    positions = torch.arange(3).expand(2, 3)
    with torch.no_grad():
        own = first(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
        other = second(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
        for policies, expected in (([first, first], own), ([first, second], ((own + other) / 2).log_softmax(-1))):
            mixed = study.Mixture(policies)(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
            probs = mixed.logits.exp()
            assert torch.allclose(probs, expected.exp(), atol=1e-6)
            step = study.Mixture(policies)(input_ids=ids[:, :1] + 1, attention_mask=torch.ones(2, 4).long(),
                                           position_ids=positions[:, :1] + 3, past_key_values=mixed.past_key_values)
            assert step.logits.shape == (2, 1, 16)


# -------------------------------------------------------------------------------------------------- the schedule


def fake_run(job: study.Job) -> dict:
    return dict.fromkeys(study.COLUMNS, "") | {"arm": job.arm, "regime": job.regime, "seed": job.seed,
                                               "settings": job.flags, "judge_final": "0.5"}


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


# -------------------------------------------------------------------------------------------------------- tables


def results(folder: Path, gain: float = 0.3) -> Path:
    """A study of 8 seeds in which federated is better than isolated by `gain` on every seed, and one run diverged."""
    rows = []
    arms = {"isolated": 0.0, "federated": gain, "fedavg": 2 * gain, "federated merged": gain, "isolated, both": -gain}
    for arm, plus in arms.items():
        for regime in ("headline", "twice the updates", "two communities", "1 update a round"):
            for seed in (*range(1000, 1008), *range(3000, 3008)):
                final = 0.5 + 0.01 * (seed % 10) + plus
                job = study.job(arm, regime, seed, 0.2, 1e-3)
                rows.append(fake_run(job) | dict.fromkeys(
                    ("judge_auc", "worst_agent", "own_topics", "judge_average", "judge_mixture", "own_truth",
                     "kl_initial", "reward_final", "seconds", "bytes"), "1") | {
                    "judge_final": str(final), "judge_agents": report.join([final - 0.1, final + 0.1]),
                    "judge_curve": report.join([0.2, final / 2 + 0.2, final]),
                    "reward_curve": report.join(np.linspace(0, 1, 40))})
    rows.append(fake_run(study.job("isolated", "headline", 1009, 0.2, 1e-3)) | {"judge_final": ""})
    study.save(folder / "study.csv", rows)
    return folder


def test_tables_and_pictures_of_a_known_study(tmp_path):
    text = report.write(results(tmp_path))
    assert (tmp_path / "tables.md").read_text() == text and "1 of them diverged" in text
    headline = text.split("## Headline, confirmation seeds")[1].split("##")[0]
    assert "| `federated` | 0.2, 0.001 | 0.8" in headline, "the interquartile mean is 0.835"
    assert "| +0.30 [+0.30, +0.30], 8 of 8 | – |" in headline, "of federated over isolated; itself"
    assert "| +0.60 [+0.60, +0.60], 8 of 8 | -0.30 [-0.30, -0.30], 0 of 8 |" in headline, "fedavg"
    assert "median updates to the final score of `isolated` (its own) | 20 (40) | 20 (40) |" in text
    assert "`fedavg` (its own) | never (40) | never (40) |" in text
    assert "| 0 of 16; +0.30, +0.30 |" in text
    penalty = next(line for line in text.splitlines() if line.startswith("| `isolated` | both | 0.2 | 0.2"))
    assert penalty.endswith("| -0.30 [-0.30, -0.30], 0 of 8 |")
    for name in ("curves", "forest", "bytes"):
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000 and (tmp_path / f"{name}.svg").exists()


def test_runs_made_again_stand_beside_the_first_ones(tmp_path):
    rows = study.load(results(tmp_path) / "study.csv")
    assert report.again_table(report.Study(tmp_path)) == [], "there are none"
    rows = [row | {"judge_final": str(float(row["judge_final"]) + 0.1 * (row["arm"] == "federated"))} for row in rows
            if row["judge_final"] and row["regime"] == "headline" and row["seed"] > "3001"]
    study.save(tmp_path / "again.csv", rows)
    table = "\n".join(report.again_table(report.Study(tmp_path)))
    assert "| `isolated` | 0.55 | 0.55 | – | – | +0.00 [+0.00, +0.00], 3 of 6 |" in table, "the same seeds, all ties"
    assert "| `federated` | 0.85 | 0.95 | +0.30 [+0.30, +0.30], 8 of 8 | +0.40 [+0.40, +0.40], 6 of 6 | " \
           "+0.10 [+0.10, +0.10], 6 of 6 |" in table


def test_the_runs_made_again_are_confirmed_ones():
    chosen = {arm: {"beta": 0.1, "lr": 1e-3} for arm in study.ARMS}
    again = study.again_jobs(chosen)
    assert len(again) == len(study.CONFIRM) * len(report.IN_SHORT) and set(again) < set(study.confirm_jobs(chosen))


def test_tables_of_a_study_that_has_hardly_begun(tmp_path):
    rows = study.load(results(tmp_path) / "study.csv")
    study.save(tmp_path / "study.csv", [row for row in rows if row["seed"] == "1000"])
    assert "##" not in report.write(tmp_path), "no differences of single seeds"


def test_two_settings_of_one_run_are_an_error(tmp_path):
    folder = results(tmp_path)
    rows = study.load(folder / "study.csv")
    rows.append(rows[0] | {"settings": rows[0]["settings"] + " --lam 0.9"})
    study.save(folder / "study.csv", rows)
    with pytest.raises(ValueError, match="stands twice"):
        report.write(folder)


def test_a_curve_knows_its_updates():
    row = {"judge_curve": "0.1 0.2 0.3", "reward_curve": "1 2 3 4 5 6 7 8"}
    updates, values = report.curve(row)
    assert updates.tolist() == [0, 4, 8] and values.tolist() == [0.1, 0.2, 0.3]
    assert report.curve(row, "reward_curve")[0].tolist() == list(range(1, 9))

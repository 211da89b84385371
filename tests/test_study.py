"""benchmarks/: which runs the study asks for, what it makes of the data, how it goes on, and its
tables."""

import dataclasses
import json
import random
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import data
import fedppo
import plot
from support import load, rows
from tiny import judge

sys.path.insert(0, str(Path(fedppo.__file__).parent / "benchmarks"))

import dpo  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402

RESULTS = study.HERE / "results"
CHOSEN = {f"{arm}, {regime}": {"settings": {"beta": 0.1 + 0.01 * k, "lr": 1e-3}}
          for k, arm in enumerate(study.ARMS) for regime in study.regimes_of(arm)}

# ------------------------------------------------------------------------------------ the protocol


def test_no_tuning_seed_stands_in_a_table():
    assert not set(study.TUNING) & set(study.SEEDS)
    assert len(study.SEEDS) >= 20 and report.ELSEWHERE_SEEDS >= 6


def test_the_flags_of_every_job_are_fedppos_and_say_what_its_names_do(monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    chosen = json.loads((RESULTS / "chosen.json").read_text())
    jobs = study.headline_jobs(chosen, study.SEEDS[:1]) + study.elsewhere_jobs(chosen)
    for job in [job for job in jobs if job.arm not in dpo.ARMS]:
        s, (of, changes) = study.parse(job.flags), study.VARIANTS.get(job.arm, (job.arm, {}))
        settings = study.ARMS[of] | study.REGIMES[job.regime] | changes
        assert s.prompts == settings["prompts"] and s.rounds * s.updates == 80, job
        assert s.mode == (settings["mode"],) and s.rule == settings.get("rule", "geometric")
        assert s.batch == (128 if job.arm == "isolated 4x batch" else 32)
        assert s.agents == (8 if job.regime == "8 agents" else 4)
        assert s.pairs == int(job.regime.split()[0] if "pairs" in job.regime else 200)
        assert len(s.model) == (2 if job.regime == "mixed sizes" else 1)
        assert s.topology == settings.get("topology", "self")
        names = [word for word in job.flags.split() if word.startswith("--")]
        assert len(set(names)) == len(names), "a flag stands once"


def test_every_run_uses_what_was_chosen_for_its_arm():
    jobs = [*study.headline_jobs(CHOSEN), *study.elsewhere_jobs(CHOSEN)]
    for job in jobs:
        of = study.VARIANTS.get(job.arm, (job.arm,))[0]
        beta = 0.1 + 0.01 * list(study.ARMS).index(of)
        assert float(report.flag({"settings": job.flags}, "--beta")) == pytest.approx(beta)
    counts = Counter((job.arm, job.regime) for job in jobs)
    headlines = {(arm, regime): 20 for arm in (*study.ARMS, "isolated 4x batch")
                 for regime in study.regimes_of(arm)}
    assert len(set(jobs)) == len(jobs) and headlines.items() <= counts.items()
    elsewhere = {cell: n for cell, n in counts.items() if cell not in headlines}
    assert all(n == (20 if regime == "mixed sizes" or arm == study.WEIGHTS else 6)
               for (arm, regime), n in elsewhere.items())
    assert {regime for _, regime in counts} == {*study.REGIMES}
    chosen = CHOSEN | {"federated, common prompts": {"settings": {"beta": 4.0, "lr": 1e-3}}}
    for job in study.elsewhere_jobs(chosen):
        of = study.VARIANTS.get(job.arm, (job.arm,))[0]
        common = of == "federated" and job.regime != "own prompts"
        assert ("--beta 4 " in job.flags) is common, "the settings of common prompts"


def test_the_shipped_results_are_of_the_runs_that_are_asked_for():
    """By their flags: none is of another time."""
    chosen = json.loads((RESULTS / "chosen.json").read_text())
    done = [study.key(row) for row in study.load(RESULTS / "study.csv")]
    wanted = {*study.headline_jobs(chosen), *study.elsewhere_jobs(chosen)}
    assert set(done) <= wanted and len(set(done)) == len(done)
    assert all(("federated", regime, study.SEEDS[0]) in
               {(job.arm, job.regime, job.seed) for job in done} for regime in report.HEADLINES)


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

SHORT = "--rounds 2 --updates 1 --batch 8 --pairs 20 --eval-prompts 32 --reward-epochs 1"
TUNED = {"beta": 0.2, "lr": 1e-3}


def short(arm: str, regime: str, extra: str = "") -> dict:
    job = study.job(arm, regime, 5, TUNED)
    return study.run(dataclasses.replace(job, flags=f"{job.flags} {SHORT} {extra}".strip()))


@pytest.fixture(scope="module")
def row():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study.HERE.parent)
        yield short("federated in communities", "two communities")


def test_a_row_says_what_the_run_did(row):
    assert set(row) == set(study.COLUMNS) and study.key(row).seed == 5
    judged, own = (report.split(row[name]) for name in ("judge_curve", "own_curve"))
    agents = np.array([report.split(text) for text in row["judge_agents"].split("/")])
    assert agents.shape == (4, 3) and len(judged) == len(own) == 3
    close = {"rel": 1e-3, "abs": 1e-3}
    assert agents.mean(0) == pytest.approx(judged, **close)
    assert float(row["judge_half"]) == pytest.approx(judged[1], **close)
    assert float(row["judge_final"]) == pytest.approx(judged[2], **close)
    assert float(row["judge_best"]) == pytest.approx(judged.max(), **close)
    assert float(row["worst_agent"]) == pytest.approx(agents[:, 2].min(), **close)
    assert float(row["own_topics"]) == pytest.approx(own[2], **close)
    policy = sum(p.numel() * 4 for p in study.start(("tiny/model",)).model.parameters())
    assert row["bytes"] == 2 * 4 * policy, "one peer in each community, in two rounds"
    assert row["own_truth"] and row["own_truth"] != row["judge_final"] and row["kl_initial"]


@pytest.mark.slow
def test_own_topics_and_honest_agents(monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    one = short("centralized", "own prompts")
    assert one["own_topics"] == one["judge_final"] and one["own_truth"] == "", "it owns every topic"
    honest = short("isolated", "flipped labels")
    assert len(honest["judge_agents"].split("/")) == 3


@pytest.mark.slow
def test_dpo_and_two_sizes_of_model_have_rows_of_the_same_form(monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    monkeypatch.setattr(dpo, "ROUNDS", 2)
    row = short("feddpo", "pairs alone")
    assert len(report.split(row["judge_curve"])) == 3 and not row["kl_initial"]
    size = fedppo.size_of(study.start(("tiny/model",)).initial)
    assert row["bytes"] == 4 * 2 * size, "a server sends one policy to each"
    mixed = short("federated", "mixed sizes")
    small, large = (fedppo.size_of(model) for model in
                    study.start(("tiny/model", "tiny/model-96x3")).initials)
    assert large > 2 * small and mixed["bytes"] == 2 * (6 * small + 6 * large)


@pytest.mark.slow
def test_a_run_is_the_same_when_repeated(row, monkeypatch):
    monkeypatch.chdir(study.HERE.parent)
    study.TASKS.clear()
    again = study.run(study.key(row))
    assert again | {"seconds": ""} == row | {"seconds": ""}


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

    jobs = [study.job("isolated", "own prompts", seed, TUNED) for seed in range(4)]
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


def test_seeds_better_are_counted_by_pairs_and_a_tie_is_half():
    pairs = np.array([[1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 5.0]])  # + = + -
    assert report.difference(pairs).endswith("], 2.5 of 4")


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


def test_a_curve_knows_its_updates_and_agents():
    row = {"judge_curve": "0.1 0.2 0.3", "settings": "--mode isolated --updates 2",
           "judge_agents": "0 0.1 0.2/0.2 0.3 0.4"}
    updates, values = report.curve(row)
    assert updates.tolist() == [0, 2, 4] and values.tolist() == [0.1, 0.2, 0.3]
    assert report.curve(row, [1])[1].tolist() == [0.2, 0.3, 0.4]
    assert report.curve(row, [0, 1])[1] == pytest.approx([0.1, 0.2, 0.3])
    assert report.of_agents([0])(row) == 0.2 and report.of_agents([1], 0.5)(row) == 0.3


# -------------------------------------------------------------------------------------- the tables

PLUS = {"isolated": 0.0, "federated": 0.3, "fedavg": 0.6, "merged": 0.3, "feddpo": -0.1,
        "federated, both": 0.2, "federated in communities": 0.4}


def results(folder: Path) -> Path:
    """8 seeds, each arm above `isolated` by PLUS on every one, and one run diverged."""
    of = [(arm, regime, seed) for arm in ("isolated", "federated", "fedavg", "merged")
          for regime in report.HEADLINES for seed in range(4000, 4008)]
    of += [("feddpo", "pairs alone", seed) for seed in range(4000, 4008)]
    of += [(arm, regime, seed) for seed in range(4000, 4008) for arm, regime in (
        ("isolated", "mixed sizes"), ("federated", "mixed sizes"), ("isolated", "8 agents"),
        ("federated", "8 agents"), ("isolated", "two communities"),
        ("federated", "two communities"), ("federated in communities", "two communities"),
        ("federated, both", "common prompts"))]
    made = []
    for job in [study.job(*one, TUNED) for one in of]:
        final = 0.5 + 0.01 * (job.seed % 10) + PLUS[job.arm]
        curve = report.join([0.2, final / 2 + 0.2, final])
        made.append(fake_run(job) | dict.fromkeys(
            ("own_topics", "own_truth", "kl_initial", "reward_accuracy", "reward_final", "seconds",
             "bytes"), "1") | {
            "judge_half": str(final / 2 + 0.2), "judge_final": str(final),
            "judge_best": str(final + (0.06 if job.arm == "merged" else 0)),
            "worst_agent": str(final), "judge_curve": curve, "own_curve": curve,
            "judge_agents": "/".join([curve] * 4)})
    diverged = study.job("isolated", "own prompts", 4009, TUNED)
    made.append(fake_run(diverged) | {"judge_final": ""})
    study.save(folder / "study.csv", made)
    return folder


@pytest.mark.slow
def test_tables_and_pictures_of_a_known_study(tmp_path):
    text = report.write(results(tmp_path))
    assert (tmp_path / "tables.md").read_text() == text and "1 of them diverged" in text

    def part(title: str) -> str:
        return text.split(f"## {title}\n")[1].split("##")[0]
    of_all = "+0.30 [+0.30, +0.30], 8 of 8"
    scores = part("Scores, common prompts")
    assert "| `federated` | 0.2, 0.001, –, – | 0.62" in scores, "0.835 / 2 + 0.2"
    assert "| +0.15 [+0.15, +0.15], 8 of 8 | 0.8" in scores and f"] | {of_all} | – |" in scores
    assert "| `feddpo` | 0.2, 0.001, –, – |" in scores, "DPO stands in both headlines"
    assert "| -0.30 [-0.30, -0.30], 0 of 8 |" in scores, "federated minus fedavg"
    asked = part("Questions, own prompts")
    reached = "the score of `isolated` after {} (in brackets: itself) | 4 ({})"
    assert reached.format("40 updates", 4) in asked and reached.format("80", 8) in asked
    assert "more than 0.05 below the best score of the run | 0 of 8 | 8 of 8 | 0 of 8 |" in asked
    assert "| 0 of 32; +0.30, +0.30, +0.30, +0.30 |" in asked
    mixed = part("Mixed sizes")
    assert "| small | 0.47 | 0.62 | +0.15 [+0.15, +0.15], 8 of 8 | 0.5" in mixed, "0.2695 + 0.2"
    assert mixed.count(f"| {of_all} |") == 3
    assert "| `federated` | both | common prompts | 0.73 | -0.05" in part("Variants")
    assert "| `fedavg` | common prompts, after 80 | -0.30 [-0.30, -0.30], 0 of 8 |" in part(
        "No gain, or a loss")
    assert "+0.15 [+0.15, +0.15], 6 of 6 | +0.30 [+0.30, +0.30], 6 of 6 | – |" in part(
        "Regimes, the first 6 seeds")
    assert "| `federated in communities` | 0.94 | 1.00 | +0.40" in part("Two communities")
    for name in ("curves", "mixed", "forest"):
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000
        assert (tmp_path / f"{name}.svg").exists()
        with matplotlib.rc_context(plot.STYLE):
            figure = Figure(layout="constrained")
            getattr(report, f"draw_{name}")(figure, report.Study(tmp_path))
            figure.draw_without_rendering()
            for thing in (*figure.axes, *figure.legends):
                box, inside = thing.get_tightbbox(), figure.bbox.padded(0.5)
                assert inside.x0 <= box.x0 <= box.x1 <= inside.x1, "no word is cut"
                assert inside.y0 <= box.y0 <= box.y1 <= inside.y1, "no word is cut"


def test_single_seeds_have_no_table_and_two_settings_of_one_run_are_an_error(tmp_path):
    path = results(tmp_path) / "study.csv"
    rows = study.load(path)
    study.save(path, [row for row in rows if row["seed"] == "4000"])
    assert "##" not in report.tables(report.Study(tmp_path)), "no differences of single seeds"
    study.save(path, [*rows, rows[0] | {"settings": rows[0]["settings"] + " --clip 0.1"}])
    with pytest.raises(ValueError, match="stands twice"):
        report.tables(report.Study(tmp_path))

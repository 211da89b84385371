"""plot.py: statistics against values worked by hand, summaries of hand-made runs, pictures of every kind."""

import json
from statistics import NormalDist

import numpy as np
import pytest

import plot


def row(mode, seed, agent, update, judge=None, reward=None, **more):
    """A line of metrics.jsonl with 2 updates per round; the update 0 is before the first round."""
    row = {"mode": mode, "seed": seed, "agent": agent, "round": (update + 1) // 2, "update": update}
    row |= {"judge": judge, "reward": reward, "kl_initial": 0.5 * update}
    return row | {"seconds": 0.25, "bytes": 100 * update} | more


def agent_rows(mode, seed, agent, judge, reward):
    """One agent's 4 updates in 2 rounds: judge at updates 0, 2 and 4, reward at 1, 2, 3 and 4."""
    judge = dict(zip((0, 2, 4), judge, strict=True))
    reward = dict(zip((1, 2, 3, 4), reward, strict=True))
    return [row(mode, seed, agent, update, judge.get(update), reward.get(update)) for update in range(5)]


TWO_AGENTS = [
    *agent_rows("isolated", 0, 0, judge=(0.0, 1.0, 2.0), reward=(0.0, 0.0, 1.0, 3.0)),
    *agent_rows("isolated", 0, 1, judge=(0.5, 0.5, 1.0), reward=(9.0, 9.0, 4.0, 6.0)),
]


def write_run(folder, rows, tail=""):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def synthetic(seeds, modes=("isolated", "federated"), agents=3, judged=True):
    """Rows of a run whose curves rise, federated by 0.3 more than isolated in every seed."""
    rows = []
    for mode in modes:
        for seed in range(seeds):
            for agent in range(agents):
                final = 1 + 0.1 * seed + 0.05 * agent + (0.3 if mode == "federated" else 0.0)
                judge = (0.0, final / 2, final) if judged else (None, None, None)
                rows += agent_rows(mode, seed, agent, judge, reward=(0.1, 0.2, 0.3, 0.4))
    return rows


# ------------------------------------------------------------------------------------------------- statistics


def test_iqm_by_hand():
    assert plot.iqm([100.0, 1.0, 2.0, -50.0]) == 1.5  # n = 4: one off each end
    assert plot.iqm([7.0, 1.0, 2.0, 3.0, 4.0, 5.0, 60.0]) == pytest.approx(21 / 5)  # n = 7: floor(7/4) = 1
    assert plot.iqm([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 9.0]) == 2.5  # n = 8: two off each end
    assert plot.iqm([1.0, 2.0, 9.0]) == 4.0  # n < 4: the mean
    np.testing.assert_array_equal(plot.iqm([[0, 10], [1, 30], [2, 20], [90, 0]]), [1.5, 15.0])  # by column
    np.testing.assert_array_equal(plot.iqm([[0, 1, 2, 90], [10, 30, 20, 0]], axis=1), [1.5, 15.0])


def test_iqm_does_not_trim_a_nan_away():
    assert np.isnan(plot.iqm([1.0, 2.0, 3.0, np.nan]))


def test_bootstrap_band_of_constants_has_no_width():
    low, high = plot.bootstrap_band(np.full((6, 3), 2.5), resamples=50)
    np.testing.assert_array_equal(low, [2.5] * 3)
    np.testing.assert_array_equal(high, [2.5] * 3)


def test_bootstrap_band_by_hand():
    # two seeds, 0 and 1: the mean of a resample is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4
    assert plot.bootstrap_band([0.0, 1.0], np.mean) == (0.0, 1.0)
    assert plot.bootstrap_band([0.0, 1.0], np.mean, level=0.3) == (0.5, 0.5)


def test_bootstrap_resamples_whole_seeds():
    # curves that differ by a constant: if updates were resampled apart, the difference would have a band
    first = np.random.default_rng(0).normal(size=8)
    values = np.stack([first, first + 3], axis=1)  # [8, 2]
    band = plot.bootstrap_band(values, lambda v, axis: np.diff(np.mean(v, axis=axis)))
    np.testing.assert_allclose(band, 3)


@pytest.mark.parametrize("statistic", [np.mean, plot.iqm])
def test_bootstrap_band_covers_about_as_often_as_it_says(statistic):
    values = np.random.default_rng(1).normal(loc=0.7, size=(20, 300))  # 20 seeds, 300 repetitions
    low, high = plot.bootstrap_band(values, statistic, resamples=1000)
    assert 0.88 <= np.mean((low <= 0.7) & (high >= 0.7)) <= 0.99
    low, high = plot.bootstrap_band(values, statistic, resamples=1000, level=0.5)
    assert 0.42 <= np.mean((low <= 0.7) & (high >= 0.7)) <= 0.58


def test_bootstrap_band_is_the_same_for_the_same_seed():
    values = np.random.default_rng(2).normal(size=(5, 4))
    np.testing.assert_array_equal(plot.bootstrap_band(values), plot.bootstrap_band(values))
    assert not np.array_equal(plot.bootstrap_band(values), plot.bootstrap_band(values, seed=1))


def test_paired_difference_removes_what_the_pairs_share():
    seeds = np.array([0.0, 10.0, -20.0, 5.0, 3.0])
    assert plot.paired_difference(seeds + 0.3, seeds) == pytest.approx((0.3, 0.3, 0.3))
    mean, low, high = plot.paired_difference(seeds + np.array([0.1, 0.2, 0.3, 0.4, 0.5]), seeds)
    assert mean == pytest.approx(0.3)
    assert 0.1 <= low < 0.25 and 0.35 < high <= 0.5
    assert plot.paired_difference([1.0, 2.0], [2.0, 4.0])[0] == -1.5


@pytest.mark.parametrize("seeds, at_least", [(8, 0.90), pytest.param(20, 0.915, marks=pytest.mark.slow)])
def test_a_paired_band_covers_the_truth_of_seeds_with_correlated_agents(seeds, at_least):
    """120 studies of agents that share their seed's luck: the band must know that seeds, not agents, are the unit."""
    random = np.random.default_rng(5)
    covered, naive = 0, 0
    for _ in range(120):
        luck = random.normal(size=(2, seeds, 1))  # [arm, S, 1] what the agents of one seed share
        shared = random.normal(size=(1, seeds, 1))  # ... and what both arms share: the pairing removes it
        scores = shared + 0.3 * luck + 0.1 * random.normal(size=(2, seeds, 4))  # [arm, S, agent]
        scores[0] += 0.25
        _, low, high = plot.paired_difference(*scores.mean(-1))
        covered += low <= 0.25 <= high
        low, high = plot.bootstrap_band((scores[0] - scores[1]).ravel(), np.mean, resamples=300)
        naive += low <= 0.25 <= high
    assert at_least <= covered / 120 <= 0.99
    assert naive / 120 < 0.75, "taking agents for independent runs would have been caught"


def test_probability_of_improvement_by_hand():
    share, low, high = plot.probability_of_improvement([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 5.0])  # + = + -
    assert share == 2.5 / 4
    # Wilson's interval solves |share - p| = z sqrt(p (1 - p) / n) for p
    for p in (low, high):
        assert abs(share - p) == pytest.approx(1.959964 * (p * (1 - p) / 4) ** 0.5, rel=1e-5)
    assert plot.probability_of_improvement([1] * 20, [0] * 20) == pytest.approx((1, 0.8389, 1), abs=1e-4)  # 20 of 20
    assert plot.probability_of_improvement([0, 0], [1, 1])[0] == 0


def test_expanded_level_is_the_t_intervals():
    """A percentile band at the expanded level has the half width t s / sqrt(n), if the bootstrap is normal."""
    for n, t in ((5, 2.7764), (8, 2.3646), (20, 2.0930), (1000, 1.9623)):  # Student's 0.975 quantile, n - 1 df
        z = NormalDist().inv_cdf((1 + plot.expanded_level(n)) / 2)
        assert z * ((n - 1) / n) ** 0.5 == pytest.approx(t, rel=0.012)


def test_updates_to_a_level_counts_the_first_evaluation_at_or_above():
    assert plot.updates_to([0, 4, 8, 12], [0.1, 0.5, 0.4, 0.9], 0.5) == 4
    assert plot.updates_to([0, 4, 8, 12], [0.1, 0.5, 0.4, 0.9], 0.6) == 12
    assert plot.updates_to([0, 4], [0.7, 0.2], 0.6) == 0
    assert plot.updates_to([0, 4], [0.1, 0.2], 0.6) == np.inf


def test_median_updates_counts_runs_that_never_arrive():
    never = np.inf
    assert plot.median_updates([8, 4, 12]) == 8
    assert plot.median_updates([8, 4, 12, never]) == 8  # half of four have arrived by 8
    assert plot.median_updates([4, never, never]) == never
    assert plot.median_updates([4, 8, never, never]) == 8


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]), ([1.0, 2.0], [1.0])])
def test_paired_difference_needs_pairs(a, b):
    with pytest.raises(ValueError, match="two or more pairs"):
        plot.paired_difference(a, b)


# -------------------------------------------------------------------------------------------- rows and curves


def test_seed_curves_average_the_agents_of_a_seed():
    updates, values = plot.seed_curves(TWO_AGENTS, "isolated", "judge")
    np.testing.assert_array_equal(updates, [0, 2, 4])  # null between the rounds' ends
    np.testing.assert_array_equal(values, [[0.25, 0.75, 1.5]])
    updates, values = plot.seed_curves(TWO_AGENTS, "isolated", "reward")
    np.testing.assert_array_equal(updates, [1, 2, 3, 4])  # null before the first update
    np.testing.assert_array_equal(values, [[4.5, 4.5, 2.5, 4.5]])


def test_seed_curves_of_what_is_not_there_are_empty():
    for mode, key in (("federated", "judge"), ("isolated", "no such key")):
        updates, values = plot.seed_curves(TWO_AGENTS, mode, key)
        assert updates.shape == (0,) and values.shape == (0, 0)


def test_seed_curves_leave_out_what_is_unfinished():
    second = agent_rows("isolated", 1, 0, (3.0, 4.0, 5.0), (0.0,) * 4)
    second += agent_rows("isolated", 1, 1, (3.0, 4.0, 5.0), (0.0,) * 4)
    updates, values = plot.seed_curves(TWO_AGENTS + second[:-1], "isolated", "judge")  # its agent 1 lacks 4
    np.testing.assert_array_equal(updates, [0, 2, 4])
    np.testing.assert_array_equal(values, [[0.25, 0.75, 1.5]])  # seed 1 does not join half of the line
    updates, values = plot.seed_curves(second[:-1], "isolated", "judge")
    np.testing.assert_array_equal(updates, [0, 2])  # alone it is drawn as far as both agents came


def test_load_metrics_ignores_half_a_last_line_only(tmp_path):
    whole = write_run(tmp_path / "whole", TWO_AGENTS)
    killed = write_run(tmp_path / "killed", TWO_AGENTS, tail='{"mode": "isolated", "seed": 0, "ag')
    assert plot.load_metrics(whole) == plot.load_metrics(killed) == TWO_AGENTS
    broken = write_run(tmp_path / "broken", TWO_AGENTS, tail='{"mode": "iso\n{}\n')
    with pytest.raises(plot.RunError, match="line 11: not JSON"):
        plot.load_metrics(broken)
    foreign = write_run(tmp_path / "foreign", [{"loss": 1.0}])
    with pytest.raises(plot.RunError, match="line 1: no mode"):
        plot.load_metrics(foreign)


def test_load_metrics_takes_the_later_of_two_rows_for_one_update(tmp_path):
    folder = write_run(tmp_path / "resumed", [*TWO_AGENTS, TWO_AGENTS[4] | {"judge": 7.0}])
    rows = plot.load_metrics(folder)
    assert len(rows) == len(TWO_AGENTS) and rows[4]["judge"] == 7.0


# ----------------------------------------------------------------------------------------------------- tables


def test_summary_by_hand():
    missed = [row | {"missed": "absent" if (row["agent"], row["round"]) == (1, 1) else None} for row in TWO_AGENTS]
    summary = plot.summarise(missed)
    expected = {
        "updates": 4,
        "judge_initial": 0.25,  # (0 + 0.5) / 2
        "judge_final": 1.5,  # (2 + 1) / 2
        # agent 0: (2 * 0.5 + 2 * 1.5) / 4 = 1; agent 1: (2 * 0.5 + 2 * 0.75) / 4 = 0.625
        "judge_auc": 0.8125,
        "reward_final": 3.5,  # updates 3 and 4: (1 + 3) / 2 = 2 and (4 + 6) / 2 = 5
        "worst_agent_final": 1.0,
        "seconds": 2.5,  # 10 rows of 0.25
        "incomplete_exchanges": 1,  # two updates of one round
        "bytes": 800,  # 400 at the last update of each
    }
    assert summary == {"modes": {"isolated": {"seeds": {"0": expected}, "mean": expected}}, "differences": {}}


def test_the_table_says_how_often_a_peer_was_missed():
    rows = [row | {"missed": "agent 0 absent" if row["agent"] and row["update"] else None} for row in TWO_AGENTS]
    assert "isolated: 2 times an agent was absent, frozen or missed a peer" in plot.table(plot.summarise(rows))
    assert "missed a peer" not in plot.table(plot.summarise(TWO_AGENTS))


def test_auc_weighs_uneven_steps_by_their_length():
    rows = [row("isolated", 0, 0, update, judge) for update, judge in ((0, 0.0), (1, 1.0), (5, 1.0))]
    assert plot.summarise(rows)["modes"]["isolated"]["mean"]["judge_auc"] == pytest.approx((0.5 + 4) / 5)


def test_summary_without_a_judge():
    rows = [row | {"judge": None} for row in TWO_AGENTS]
    entry = plot.summarise(rows)["modes"]["isolated"]["mean"]
    assert [entry[key] for key in ("judge_initial", "judge_final", "judge_auc")] == [None] * 3
    assert entry["worst_agent_final"] == 2.0  # of the own rewards, 2 and 5


def test_summary_is_valid_json_even_before_the_first_update_and_with_nan():
    start = [row("isolated", 0, agent, 0, judge=0.5) for agent in range(2)]
    entry = plot.summarise(start)["modes"]["isolated"]["mean"]
    assert (entry["judge_initial"], entry["judge_final"], entry["judge_auc"]) == (0.5, None, None)
    diverged = [*TWO_AGENTS[:-1], TWO_AGENTS[-1] | {"judge": float("nan")}]
    entry = plot.summarise(diverged)["modes"]["isolated"]["mean"]
    assert [entry[key] for key in ("judge_final", "judge_auc", "worst_agent_final")] == [None] * 3
    assert entry["reward_final"] == 3.5
    for rows in (start, diverged, synthetic(3)):
        summary = plot.summarise(rows)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
        assert "nan" not in plot.table(summary)


def test_summary_does_not_average_unfinished_seeds_in():
    rows = synthetic(2)
    stopped = [row for row in rows if row["seed"] == 0 or row["mode"] == "isolated" or row["update"] <= 3]
    summary = plot.summarise(stopped)
    federated = summary["modes"]["federated"]
    assert [federated["seeds"][seed]["updates"] for seed in ("0", "1")] == [4, 3]
    assert federated["mean"] == federated["seeds"]["0"]
    assert summary["differences"] == {}  # one pair is left


def test_summary_cuts_at_the_last_update_that_every_agent_has_done():
    entry = plot.summarise(TWO_AGENTS[:-1])["modes"]["isolated"]["mean"]  # agent 1 lacks update 4
    assert (entry["updates"], entry["judge_final"], entry["reward_final"]) == (3, 0.75, 2.5)


def test_differences_are_paired_by_seed():
    difference = plot.summarise(synthetic(4))["differences"]["federated - isolated"]
    assert (difference["key"], difference["seeds"]) == ("judge_final", 4)
    assert [difference[key] for key in ("mean", "low", "high")] == pytest.approx([0.3] * 3)
    lacking = ("isolated", 0), ("federated", 3)
    rows = [row for row in synthetic(4) if (row["mode"], row["seed"]) not in lacking]
    assert plot.summarise(rows)["differences"]["federated - isolated"]["seeds"] == 2  # seeds 1 and 2
    assert plot.summarise(synthetic(1))["differences"] == {}
    assert plot.summarise(synthetic(4, modes=("isolated", "fedavg")))["differences"] == {}


def test_table_shows_every_mode_in_at_most_100_columns():
    rows = synthetic(8, modes=("isolated", "federated", "fedavg", "centralized"))
    text = plot.table(plot.summarise([row | {"bytes": 10**11, "seconds": 9999.0} for row in rows]))
    header, *modes, _, difference = text.splitlines()
    assert max(map(len, text.splitlines())) <= 100
    assert [line.split()[:2] for line in modes] == [[mode, "8"] for mode in plot.MODE_STYLES]
    assert {len(line) for line in modes} == {len(header)}  # aligned
    expected = "federated - isolated, judge after: +0.30 [+0.30, +0.30] (8 same-seed pairs, 95 % band)"
    assert difference == expected
    assert "0.00 -> 1.40" in modes[0] and "300000.0" in modes[0]
    few = plot.table(plot.summarise(synthetic(2)))
    assert "too narrow" in few and max(map(len, few.splitlines())) <= 100
    assert "- -> -" in plot.table(plot.summarise(synthetic(1, judged=False)))


# --------------------------------------------------------------------------------------------------- pictures

RUNS = {
    "one_seed": {"seeds": 1},
    "one_agent": {"seeds": 1, "agents": 1, "modes": ("isolated",)},
    "two_seeds": {"seeds": 2},
    "several_seeds": {"seeds": 5, "modes": ("isolated", "federated", "fedavg", "centralized")},
    "no_judge": {"seeds": 3, "judged": False},
}


@pytest.mark.parametrize("name", RUNS)
def test_draw(name, tmp_path):
    folder = write_run(tmp_path / name, synthetic(**RUNS[name]))
    png, svg = plot.draw([folder], folder / "curves.png")
    assert (png, svg) == (folder / "curves.png", folder / "curves.svg")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    assert b"<svg" in svg.read_bytes() and svg.stat().st_size > 10_000


def test_draw_writes_the_same_bytes_again(tmp_path):
    folder = write_run(tmp_path / "run", synthetic(3))
    first = [path.read_bytes() for path in plot.draw([folder], tmp_path / "first.png")]
    second = [path.read_bytes() for path in plot.draw([folder], tmp_path / "second.png")]
    assert first == second and b"<dc:date>" not in first[1]


def test_draw_a_run_whose_next_seed_has_just_begun(tmp_path):
    begun = [row for row in synthetic(3) if row["seed"] < 2 or row["update"] == 0]
    plot.draw([write_run(tmp_path / "begun", begun)], tmp_path / "out.png")


def test_draw_shows_the_statistics(tmp_path, monkeypatch):
    """What stands in the figure: the lines' data, labels and units, one band per mode and panel."""
    import matplotlib.figure

    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    several = write_run(tmp_path / "several", synthetic(5))
    plot.draw([several], tmp_path / "out.png")
    judge, reward, kl = figures[-1].axes
    isolated, federated = judge.get_lines()
    np.testing.assert_allclose(isolated.get_ydata(), [0, 0.625, 1.25])  # 1.05 + 0.1 * seed 2
    np.testing.assert_allclose(federated.get_ydata(), [0, 0.775, 1.55])
    assert [len(axes.collections) for axes in (judge, reward, kl)] == [2, 2, 2]
    assert judge.get_xlabel() == "PPO updates per agent" and "nats" in kl.get_ylabel()
    assert [text.get_text() for text in figures[-1].legends[0].get_texts()] == ["isolated", "federated"]
    assert figures[-1].get_suptitle().startswith("agents: 3, seeds: 5\nline: interquartile mean")

    one = write_run(tmp_path / "one", synthetic(1))
    plot.draw([one], tmp_path / "out.png")
    assert [len(axes.get_lines()) for axes in figures[-1].axes] == [8, 8, 8]  # a line and 3 agents, twice
    assert not figures[-1].axes[0].collections  # no band from a single seed

    plot.draw([several, one], tmp_path / "out.png")
    labels = [text.get_text() for text in figures[-1].legends[0].get_texts()]
    assert labels == ["several: isolated", "several: federated", "one: isolated", "one: federated"]
    lines = [line for line in figures[-1].axes[0].get_lines() if line.get_label() in labels]
    assert len({line.get_color() for line in lines}) == 4

    unjudged = write_run(tmp_path / "unjudged", synthetic(3, judged=False))
    plot.draw([unjudged], tmp_path / "out.png")
    left = figures[-1].axes[0]
    assert left.get_ylabel() == "own reward (z-score)" and "no judge" in left.get_title()


def test_main_draws_and_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name, synthetic(2))
    assert plot.main(["a"]) == 0
    assert "federated - isolated" in capsys.readouterr().out
    assert (tmp_path / "a" / "curves.png").exists() and (tmp_path / "a" / "curves.svg").exists()
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda folders, out: drawn.append((folders, str(out))) or (out, out))
    assert plot.main(["a", "b"]) == plot.main(["a", "b", "--out", "other.png"]) == 0
    assert drawn == [(["a", "b"], "curves.png"), (["a", "b"], "other.png")]
    assert capsys.readouterr().out.count("federated - isolated") == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "no metrics.jsonl"),
        (["empty"], "no metrics yet"),
        (["bare"], "no update to draw yet"),
        (["good", "nowhere"], "no metrics.jsonl"),
        (["good", "--out", "picture.jpg"], "must end in .png"),
        (["good", "--out", "nowhere/picture.png"], "nowhere"),
        (["good", "--colour"], "--colour"),
        ([], "RUN"),
    ],
)
def test_a_users_mistake_is_told_in_one_line(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good", TWO_AGENTS)
    write_run(tmp_path / "empty", [])
    write_run(tmp_path / "bare", [row("isolated", 0, 0, 0, kl_initial=None)])
    assert plot.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and message in printed.err
    assert printed.err.count("\n") == 1

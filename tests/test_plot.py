"""plot.py: statistics against values worked by hand, summaries of hand-made runs, pictures."""

import json
from statistics import NormalDist

import matplotlib.figure
import numpy as np
import pytest

import plot


def row(mode, seed, agent, update, judge=None, reward=None, **more):
    """A line of metrics.jsonl with 2 updates per round; the update 0 is before the first round."""
    row = {"mode": mode, "seed": seed, "agent": agent, "round": (update + 1) // 2, "update": update}
    row |= {"judge": judge, "reward": reward, "kl_initial": 0.5 * update}
    return row | {"wall": 0.25, "bytes": 100 * update} | more


def agent_rows(mode, seed, agent, judge, reward):
    """One agent's 4 updates in 2 rounds: judge at updates 0, 2 and 4, reward at 1, 2, 3 and 4."""
    judge = dict(zip((0, 2, 4), judge, strict=True))
    reward = dict(zip((1, 2, 3, 4), reward, strict=True))
    return [row(mode, seed, agent, u, judge.get(u), reward.get(u)) for u in range(5)]


TWO_AGENTS = [
    *agent_rows("isolated", 0, 0, judge=(0.0, 1.0, 2.0), reward=(0.0, 0.0, 1.0, 3.0)),
    *agent_rows("isolated", 0, 1, judge=(0.5, 0.5, 1.0), reward=(9.0, 9.0, 4.0, 6.0)),
]
MODES = tuple(plot.MODE_STYLES)


def write_run(folder, rows, tail=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def synthetic(seeds, modes=("isolated", "federated"), agents=3, judged=True):
    """Rows of a run whose curves rise, federated by 0.3 more than the others in every seed."""
    rows = []
    for mode in modes:
        for seed in range(seeds):
            for agent in range(agents):
                final = 1 + 0.1 * seed + 0.05 * agent + (0.3 if mode == "federated" else 0.0)
                judge = (0.0, final / 2, final) if judged else (None, None, None)
                rows += agent_rows(mode, seed, agent, judge, reward=(0.1, 0.2, 0.3, 0.4))
    return rows


def means(rows, mode="isolated"):
    return plot.summarise(rows)["modes"][mode]["mean"]


# -------------------------------------------------------------------------------------- statistics


def test_iqm_by_hand():
    assert plot.iqm([100.0, 1.0, 2.0, -50.0]) == 1.5  # n = 4: one off each end
    assert plot.iqm([7.0, 1.0, 2.0, 3.0, 4.0, 5.0, 60.0]) == pytest.approx(21 / 5)  # n = 7: one
    assert plot.iqm([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 9.0]) == 2.5  # n = 8: two off each end
    assert plot.iqm([1.0, 2.0, 9.0]) == 4.0  # n < 4: the mean
    columns = np.array([[0, 10], [1, 30], [2, 20], [90, 0]])
    np.testing.assert_array_equal(plot.iqm(columns), [1.5, 15.0])
    np.testing.assert_array_equal(plot.iqm(columns.T, axis=1), [1.5, 15.0])
    assert np.isnan(plot.iqm([1.0, 2.0, 3.0, np.nan])), "a nan is not trimmed away"


def test_bootstrap_band_by_hand():
    # Two seeds, 0 and 1: a resample's mean is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4.
    assert plot.bootstrap_band([0.0, 1.0], np.mean) == (0.0, 1.0)
    assert plot.bootstrap_band([0.0, 1.0], np.mean, level=0.3) == (0.5, 0.5)
    constant = np.full((6, 3), 2.5)
    np.testing.assert_array_equal(plot.bootstrap_band(constant, resamples=50), [[2.5] * 3] * 2)


def test_bootstrap_resamples_whole_seeds_and_reproduces():
    # Curves that differ by a constant: were updates resampled apart, their difference had a band.
    first = np.random.default_rng(0).normal(size=8)
    values = np.stack([first, first + 3], axis=1)  # [8, 2]
    band = plot.bootstrap_band(values, lambda v, axis: np.diff(np.mean(v, axis=axis)))
    np.testing.assert_allclose(band, 3)
    np.testing.assert_array_equal(plot.bootstrap_band(values), plot.bootstrap_band(values))
    assert not np.array_equal(plot.bootstrap_band(values), plot.bootstrap_band(values, seed=1))


@pytest.mark.parametrize("statistic", [np.mean, plot.iqm])
def test_bootstrap_band_covers_about_as_often_as_it_says(statistic):
    values = np.random.default_rng(1).normal(loc=0.7, size=(20, 300))  # 20 seeds, 300 repetitions
    for level, least, most in ((0.95, 0.88, 0.99), (0.5, 0.42, 0.58)):
        low, high = plot.bootstrap_band(values, statistic, resamples=1000, level=level)
        assert least <= np.mean((low <= 0.7) & (high >= 0.7)) <= most


def test_expanded_level_is_the_t_intervals():
    """A percentile band at the expanded level has half width t s / sqrt(n), if all is normal: t is
    Student's 0.975 quantile with n - 1 degrees of freedom."""
    for n, t in ((5, 2.7764), (8, 2.3646), (20, 2.0930), (1000, 1.9623)):
        z = NormalDist().inv_cdf((1 + plot.expanded_level(n)) / 2)
        assert z * ((n - 1) / n) ** 0.5 == pytest.approx(t, rel=0.012)


def test_paired_difference_removes_what_the_pairs_share():
    seeds = np.array([0.0, 10.0, -20.0, 5.0, 3.0])
    assert plot.paired_difference(seeds + 0.3, seeds) == pytest.approx((0.3, 0.3, 0.3))
    mean, low, high = plot.paired_difference(seeds + np.array([0.1, 0.2, 0.3, 0.4, 0.5]), seeds)
    assert mean == pytest.approx(0.3)
    assert 0.1 <= low < 0.25 and 0.35 < high <= 0.5
    assert plot.paired_difference([1.0, 2.0], [2.0, 4.0])[0] == -1.5
    for a, b in (([1.0], [2.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="two or more pairs"):
            plot.paired_difference(a, b)


@pytest.mark.parametrize(
    ("seeds", "at_least"), [(8, 0.90), pytest.param(20, 0.915, marks=pytest.mark.slow)])
def test_a_paired_band_covers_the_truth_of_seeds_with_correlated_agents(seeds, at_least):
    """120 studies of agents that share their seed's luck: seeds, not agents, are the unit."""
    random = np.random.default_rng(5)
    covered, naive = 0, 0
    for _ in range(120):
        luck = random.normal(size=(2, seeds, 1))  # [arm, S, 1] what the agents of one seed share
        shared = random.normal(size=(1, seeds, 1))  # what both arms share, which pairing removes
        scores = shared + 0.3 * luck + 0.1 * random.normal(size=(2, seeds, 4))  # [arm, S, agent]
        scores[0] += 0.25
        _, low, high = plot.paired_difference(*scores.mean(-1))
        covered += low <= 0.25 <= high
        low, high = plot.bootstrap_band((scores[0] - scores[1]).ravel(), np.mean, resamples=300)
        naive += low <= 0.25 <= high
    assert at_least <= covered / 120 <= 0.99
    assert naive / 120 < 0.75, "taking agents for independent runs would have been caught"


# --------------------------------------------------------------------------------- rows and curves


def check_curves(rows, key, updates, values, mode="isolated"):
    found = plot.seed_curves(rows, mode, key)
    np.testing.assert_array_equal(found[0], updates)
    np.testing.assert_array_equal(found[1], values)
    assert found[1].shape == (len(values), len(updates))


def test_seed_curves_average_the_agents_of_a_seed():
    check_curves(TWO_AGENTS, "judge", [0, 2, 4], [[0.25, 0.75, 1.5]])  # null within the rounds
    check_curves(TWO_AGENTS, "reward", [1, 2, 3, 4], [[4.5, 4.5, 2.5, 4.5]])  # null before
    check_curves(TWO_AGENTS, "no such key", [], np.zeros((0, 0)))
    check_curves(TWO_AGENTS, "judge", [], np.zeros((0, 0)), mode="federated")


def test_seed_curves_leave_out_what_is_unfinished():
    second = agent_rows("isolated", 1, 0, (3.0, 4.0, 5.0), (0.0,) * 4)
    second += agent_rows("isolated", 1, 1, (3.0, 4.0, 5.0), (0.0,) * 4)
    stopped = second[:-1]  # its agent 1 lacks update 4: it does not join half of the line
    check_curves(TWO_AGENTS + stopped, "judge", [0, 2, 4], [[0.25, 0.75, 1.5]])
    check_curves(stopped, "judge", [0, 2], [[3.0, 4.0]])  # alone it is drawn as far as both came


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
    twice = write_run(tmp_path / "resumed", [*TWO_AGENTS, TWO_AGENTS[4] | {"judge": 7.0}])
    rows = plot.load_metrics(twice)  # of two rows for one update the later counts
    assert len(rows) == len(TWO_AGENTS) and rows[4]["judge"] == 7.0


# ------------------------------------------------------------------------------------------ tables


def test_summary_by_hand():
    rows = [row | {"missed": "absent" if (row["agent"], row["round"]) == (1, 1) else None}
            for row in TWO_AGENTS]
    expected = {
        "updates": 4,
        "judge_initial": 0.25,  # (0 + 0.5) / 2
        "judge_final": 1.5,  # (2 + 1) / 2
        "judge_own_initial": None, "judge_own_final": None,  # no agent has a prompt of its own
        "kl_initial_final": 2.0,  # 0.5 * 4
        # agent 0: (2 * 0.5 + 2 * 1.5) / 4 = 1; agent 1: (2 * 0.5 + 2 * 0.75) / 4 = 0.625
        "judge_auc": 0.8125,
        "reward_initial": 4.5,  # (0 + 9) / 2, at update 1
        "reward_final": 3.5,  # updates 3 and 4: (1 + 3) / 2 = 2 and (4 + 6) / 2 = 5
        "worst_agent_final": 1.0,
        "seconds": 2.5,  # 10 rows of 0.25
        "incomplete_exchanges": 1,  # two updates of one round
        "bytes": 800,  # 400 at the last update of each
    }
    # Agent 0 has prompts of its own splits, and its last score counts; agent 1 has none.
    own = [row | {"judge_own": row["update"] / 8 if row["agent"] == 0 else None} for row in rows]
    assert plot.summarise(own)["modes"]["isolated"]["mean"]["judge_own_final"] == 0.5
    assert plot.summarise(own)["modes"]["isolated"]["mean"]["judge_own_initial"] == 0.0
    summary = plot.summarise(rows)
    isolated = {"seeds": {"0": expected}, "mean": expected}
    assert summary == {"modes": {"isolated": isolated}, "differences": {}}
    assert "isolated: 1 times an agent was absent, frozen or missed a peer" in plot.table(summary)
    assert "missed a peer" not in plot.table(plot.summarise(TWO_AGENTS))


def test_summary_of_uneven_steps_and_without_a_judge():
    rows = [row("isolated", 0, 0, update, min(update, 1.0)) for update in (0, 1, 5)]
    assert means(rows)["judge_auc"] == pytest.approx((0.5 + 4) / 5)  # steps weigh by their length
    entry = means([row | {"judge": None} for row in TWO_AGENTS])
    assert {entry[key] for key in ("judge_initial", "judge_final", "judge_auc")} == {None}
    assert entry["worst_agent_final"] == 2.0  # of the own rewards, 2 and 5


def test_summary_is_valid_json_even_before_the_first_update_and_with_nan():
    start = [row("isolated", 0, agent, 0, judge=0.5) for agent in range(2)]
    entry = means(start)
    assert entry["judge_initial"] == 0.5 and entry["judge_final"] is entry["judge_auc"] is None
    diverged = [*TWO_AGENTS[:-1], TWO_AGENTS[-1] | {"judge": float("nan")}]
    entry = means(diverged)
    assert {entry[key] for key in ("judge_final", "judge_auc", "worst_agent_final")} == {None}
    assert entry["reward_final"] == 3.5
    for rows in (start, diverged, synthetic(3)):
        summary = plot.summarise(rows)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
        assert "nan" not in plot.table(summary)


def test_summary_does_not_average_unfinished_seeds_in():
    stopped = [row for row in synthetic(2)
               if row["seed"] == 0 or row["mode"] == "isolated" or row["update"] <= 3]
    summary = plot.summarise(stopped)
    federated = summary["modes"]["federated"]
    assert [federated["seeds"][seed]["updates"] for seed in ("0", "1")] == [4, 3]
    assert federated["mean"] == federated["seeds"]["0"]
    counted = {line.split()[0]: line.split()[1] for line in plot.table(summary).splitlines()[2:4]}
    assert counted == {"isolated": "2", "federated": "1"}, "seeds that the means are of"
    (found,) = summary["differences"].values()
    assert found["each"] == pytest.approx([0.3]) and "mean" not in found, "one pair is left"
    entry = means(TWO_AGENTS[:-1])  # agent 1 lacks update 4, so it is cut for both
    assert (entry["updates"], entry["judge_final"], entry["reward_final"]) == (3, 0.75, 2.5)


def test_differences_of_every_mode_from_isolated_are_paired_by_seed():
    differences = plot.summarise(synthetic(4, modes=MODES))["differences"]
    assert list(differences) == [f"{mode} - isolated" for mode in MODES[1:]]
    for name, found in differences.items():
        gain = 0.3 if name.startswith("federated") else 0.0
        assert found["each"] == pytest.approx([gain] * 4)
        assert [found[key] for key in ("mean", "low", "high")] == pytest.approx([gain] * 3)

    lacking = ("isolated", 0), ("federated", 3)
    rows = [row for row in synthetic(4) if (row["mode"], row["seed"]) not in lacking]
    found = plot.summarise(rows)["differences"]["federated - isolated"]
    assert len(found["each"]) == 2 and "mean" not in found, "seeds 1 and 2: too few for a band"
    unjudged = [row | {"judge": None} for row in synthetic(2)]
    for rows in (synthetic(4, modes=("federated", "fedavg")), unjudged):
        assert plot.summarise(rows)["differences"] == {}


def test_table_shows_every_mode_in_at_most_100_columns():
    rows = [row | {"bytes": 10**9, "wall": 9999.0, "judge_own": row["judge"]}
            for row in synthetic(8, modes=MODES)]
    header, second, *lines = plot.table(plot.summarise(rows)).splitlines()
    modes, differences = lines[:6], lines[8:]
    assert max(map(len, [header, second, *lines[:8]])) <= 80
    assert [line.split()[:2] for line in modes] == [[mode, "8"] for mode in MODES]
    assert {len(line) for line in modes} == {len(header)} == {len(second)}  # aligned
    assert modes[0].count("0.00 -> 1.40") == 2 and "3000.0" in modes[0]
    assert [line.split()[0] for line in differences] == [*MODES[1:]]
    assert len({line.index("judge after") for line in differences}) == 1  # aligned
    one = plot.table(plot.summarise(synthetic(8))).splitlines()[-1]
    assert one == ("federated - isolated, judge after: +0.30 [+0.30, +0.30] "
                   "(8 seeds, 95 % band)")
    few = plot.table(plot.summarise(synthetic(2, modes=MODES)))
    assert "federated - isolated, " in few and few.count("+0.30, +0.30 (each seed)") == 1


def test_table_without_a_judge_shows_the_own_reward():
    """That of the first rollout, which is the initial policy's, and of the last round."""
    header, _, row, *_ = plot.table(plot.summarise(synthetic(1, judged=False))).splitlines()
    assert "own reward" in header and "judge" not in header
    assert "0.10 -> 0.35" in row, row


# ---------------------------------------------------------------------------------------- pictures


@pytest.fixture
def drawn(monkeypatch):
    """A function that draws folders, but into no file -> the figure."""
    figures = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return lambda *folders: plot.draw(folders, "nowhere.png") and figures[-1]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("run", [
    {"seeds": 1, "agents": 1, "modes": ("isolated",)}, {"seeds": 2},
    {"seeds": 5, "modes": MODES}, {"seeds": 3, "judged": False}], ids=str)
def test_draw_writes_pictures_and_the_same_bytes_again(run, tmp_path):
    folder = write_run(tmp_path / "run", synthetic(**run))
    png, svg = plot.draw([folder], folder / "curves.png")
    assert (png, svg) == (folder / "curves.png", folder / "curves.svg")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    assert b"<svg" in svg.read_bytes() and svg.stat().st_size > 10_000
    if run == {"seeds": 2}:
        again = plot.draw([folder], tmp_path / "again.png")
        assert [path.read_bytes() for path in again] == [png.read_bytes(), svg.read_bytes()]
        assert b"<dc:date>" not in svg.read_bytes()


def test_draw_shows_the_statistics(tmp_path, drawn):
    """What stands in the figure: the lines' data, labels and units, one band per mode and panel."""
    figure = drawn(write_run(tmp_path / "several", synthetic(5)))
    judge, reward, kl = figure.axes
    isolated, federated = judge.get_lines()
    np.testing.assert_allclose(isolated.get_ydata(), [0, 0.625, 1.25])  # 1.05 + 0.1 * seed 2
    np.testing.assert_allclose(federated.get_ydata(), [0, 0.775, 1.55])
    assert [len(axes.collections) for axes in (judge, reward, kl)] == [2, 2, 2]
    assert judge.get_xlabel() == "PPO updates per agent" and "nats" in kl.get_ylabel()
    assert legend_of(figure) == ["isolated", "federated"]
    assert figure.get_suptitle().startswith("agents: 3, seeds: 5\nline: interquartile mean")

    one = drawn(write_run(tmp_path / "one", synthetic(1)))
    assert [len(axes.get_lines()) for axes in one.axes] == [8, 8, 8]  # a line and 3 agents, twice
    assert not one.axes[0].collections  # no band from a single seed

    both = drawn(tmp_path / "several", tmp_path / "one")
    labels = ["several: isolated", "several: federated", "one: isolated", "one: federated"]
    assert legend_of(both) == labels
    lines = [line for line in both.axes[0].get_lines() if line.get_label() in labels]
    assert len({line.get_color() for line in lines}) == 2, "a mode has one colour"
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 4

    begun = [row for row in synthetic(3) if row["seed"] < 2 or row["update"] == 0]
    assert "seeds: 2\n" in drawn(write_run(tmp_path / "begun", begun)).get_suptitle()

    left = drawn(write_run(tmp_path / "unjudged", synthetic(3, judged=False))).axes[0]
    assert left.get_ylabel() == "own reward (z-score)" and "no judge" in left.get_title()


@pytest.mark.parametrize("names", [("run",), ("a" * 200, "a-run-with-a-long-name-" * 4)])
@pytest.mark.parametrize("judged", [True, False])
def test_no_word_is_cut_and_no_panel_squeezed(names, judged, tmp_path, drawn):
    """All six modes, of one run and of two with long names."""
    rows = synthetic(2, modes=MODES, judged=judged)
    figure = drawn(*(write_run(tmp_path / name, rows) for name in names))
    figure.set_dpi(150)  # as in the .png
    figure.draw_without_rendering()
    legend = figure.legends[0]
    titles = [text for text in figure.texts if text.get_text()]
    for thing in (*figure.axes, *titles, *legend.get_texts(), legend):
        box, inside = thing.get_tightbbox(), figure.bbox.padded(0.5)
        assert inside.x0 <= box.x0 <= box.x1 <= inside.x1, thing
        assert inside.y0 <= box.y0 <= box.y1 <= inside.y1, thing
    for axes in figure.axes:
        assert axes.get_tightbbox().y0 >= legend.get_window_extent().y1 - 1
        assert axes.get_window_extent().height > 2 * 150  # inches
    expected = [f"{name}: {mode}" if len(names) > 1 else mode for name in names for mode in MODES]
    assert ["".join(label.split()) for label in legend_of(figure)] == \
        [label.replace(" ", "") for label in expected]


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_no_two_curves_look_alike(runs):
    for modes in (MODES[:1], MODES[:3], MODES, (*MODES, "a new mode"), (MODES[0], "a", "b", "c")):
        styles = plot._styles(list(modes) * runs)
        assert len(set(styles)) == len(styles) == runs * len(modes)
        assert all(style == plot.MODE_STYLES.get(mode, style)
                   for mode, style in zip(modes, styles, strict=False))
        colours = {(mode, style[0]) for mode, style in zip(modes * runs, styles, strict=True)}
        assert len(colours) == len(modes), "a mode has one colour"


def test_main_draws_and_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name, synthetic(2))
    assert plot.main(["a"]) == 0
    assert "federated - isolated" in capsys.readouterr().out
    assert (tmp_path / "a" / "curves.png").exists() and (tmp_path / "a" / "curves.svg").exists()
    (tmp_path / "a" / "summary.json").write_text("{}")
    stopped = [row for row in synthetic(2) if row["seed"] == 0 or row["update"] <= 3]
    write_run(tmp_path / "c", stopped)
    assert plot.main(["a", "c"]) == 0
    printed = capsys.readouterr().out
    assert "a\nmode" in printed
    assert "c is not finished: federated, seed 1, is at update 3\n" in printed
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda runs, out: drawn.append((runs, str(out))) or (out,))
    assert plot.main(["a", "b"]) == plot.main(["a", "b", "--out", "other.png"]) == 0
    assert drawn == [(["a", "b"], "curves.png"), (["a", "b"], "other.png")]
    assert capsys.readouterr().out.count("federated - isolated") == 4


@pytest.mark.parametrize(("argv", "message"), [
    ("nowhere", "no metrics.jsonl"), ("good nowhere", "no metrics.jsonl"),
    ("begun", "has measured nothing yet"),
    ("empty", "no metrics yet"), ("bare", "no update to draw yet"),
    ("good --out picture.jpg", "must end in .png"), ("good --out nowhere/picture.png", "nowhere"),
    ("good --colour", "--colour"), ("", "RUN")])
def test_a_users_mistake_is_told_in_one_line(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good", TWO_AGENTS)
    write_run(tmp_path / "empty", [])
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").touch()
    write_run(tmp_path / "bare", [row("isolated", 0, 0, 0, kl_initial=None)])
    assert plot.main(argv.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and message in printed.err
    assert printed.err.count("\n") == 1

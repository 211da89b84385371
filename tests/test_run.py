"""support/run.py and main: what a run's folder holds, what is said, and how it ends."""

import dataclasses
import json
import re
import shlex
import sys
import time
import types

import pytest
import worlds

import fedppo
from fedppo import MODES, Mode
from support import run, settings

pytestmark = pytest.mark.usefixtures("no_picture")
FIVE = ("isolated", "classic", "federated", "merged", "fedavg")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def main(tmp_path, short, capfd):
    """main(*flags, code=0) -> the folder of a short run, and what it printed."""
    def make(*flags, code=0):
        capfd.readouterr()
        assert fedppo.main([*short, "--out", str(tmp_path), *flags]) == code
        printed = capfd.readouterr()
        return tmp_path / "run", printed.out + printed.err
    return make


def test_five_modes_on_two_seeds_make_one_table(main):
    """Every arm has its own name in the table, the folders, the samples and the model cards, and
    its own beta and learning rate."""
    folder, printed = main("--mode", *FIVE, "--seeds", "0", "1", "--rounds", "1",
                           "--judge", "heldout")
    table = printed[printed.index("before, after"):]
    assert re.findall(r"^(\w+) +2 ", table, re.M) == list(FIVE)
    assert list(json.loads((folder / "summary.json").read_text())["modes"]) == list(FIVE)
    agents = {path.name: path for path in (folder / "agents").iterdir()}
    assert set(agents) == {f"{mode}-seed{seed}-agent{i}"
                           for mode in FIVE for seed in (0, 1) for i in (0, 1)}
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in
            (folder / "samples.md").read_text().splitlines() if line.startswith("|")]
    assert rows[0] == ["prompt", "before", *(f"{mode}, agent {i}" for mode in FIVE for i in (0, 1))]
    assert [len(row) for row in rows] == [12] * (2 + 2), "a row per prompt"
    for mode in FIVE:
        card = (agents[f"{mode}-seed1-agent0"] / "README.md").read_text()
        assert f"# Agent 0, {mode}, seed 1" in card and f"| beta | `{MODES[mode].beta:g}` |" in card
        rule = "weights" if mode == "fedavg" else "geometric"
        assert f"| rule | `{rule}` |" in card
        before, *_, after = (row for row in metrics(folder) if (
            row["mode"], row["seed"], row["agent"]) == (mode, 1, 0))
        assert (f"| judge's score on held-out prompts | {before['judge']:.2f} | "
                f"{after['judge']:.2f} |") in card
        assert f"initial policy, nats per response, of it | – | {after['kl_initial']:.2f} |" in card
    rows = metrics(folder)
    assert all(set(row) == set(run.KEYS) for row in rows) and len(rows) == 5 * 2 * 2 * 2
    for row in rows:
        assert (row["reward_accuracy"] is None) == (row["update"] > 0)
        if row["update"]:
            assert (row["beta"], row["lr"]) == (MODES[row["mode"]].beta, MODES[row["mode"]].lr)
    config = json.loads((folder / "config.json").read_text())
    assert config["preset"] == {"choice": "tiny", "reason": "asked for"}
    assert set(config["settings"]) == set(vars(fedppo.Settings()))
    assert printed.count("preset tiny: asked for") == 1
    assert not list(folder.glob("checkpoint*")) + list(folder.glob("*.tmp"))


def test_a_run_without_isolated_says_the_command_that_compares(main):
    folder, printed = main("--mode", "federated", "--anchor", "0.25")
    said = re.search(r"^baselines .*fedppo.py (.*)$", printed, re.M)[1]
    config = json.loads((folder / "config.json").read_text())["settings"]
    again = fedppo.parse(["--device", "cpu", *shlex.split(said)], MODES).settings
    assert dataclasses.asdict(again) | {"mode": None, "name": None} == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()} | {"mode": None, "name": None}
    assert again.mode == ("isolated", "federated", "fedavg")
    folder, printed = main("--mode", "isolated", "--name", "alone")
    assert "baselines" not in printed


def test_quiet_is_without_a_bar_and_a_run_says_where_it_is(main):
    folder, printed = main()
    assert "update/s" in printed or "s/update" in printed
    draws = settings.program("plot.py", str(folder))
    assert f"run {folder}: {draws} draws it meanwhile" in printed
    _, quiet = main("--quiet", "--name", "other")
    assert "update/s" not in quiet and "s/update" not in quiet and "own reward" in quiet


def test_wall_seconds_are_those_on_the_clock(main):
    started = time.monotonic()
    folder, _ = main()
    elapsed, rows = time.monotonic() - started, metrics(folder)
    assert all(row["wall"] >= row["seconds"] for row in rows)
    assert 0 < sum(row["wall"] for row in rows) < elapsed
    mean = json.loads((folder / "summary.json").read_text())["modes"]["federated"]["mean"]
    assert mean["seconds"] == pytest.approx(sum(row["wall"] for row in rows))


def test_tensorboard_gets_the_same_keys_or_says_what_it_needs(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _, printed = main("--tensorboard", code=2)
    assert printed.count("error: --tensorboard needs the package tensorboard") == 1
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append("closed")
    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    folder, _ = main("--tensorboard")
    rows = metrics(folder)
    assert written.pop() == "closed"
    assert {(f"federated-seed0-agent{row['agent']}/{key}", row[key], row["update"])
            for row in rows for key in ("kl", "beta", "reward") if row["update"]} <= set(written)
    assert not any(value is None for _, value, _ in written)


def test_a_mode_of_ones_own_runs_under_its_name(main, monkeypatch):
    monkeypatch.setitem(MODES, "gossip", Mode("ring", "arithmetic", True, 0.25, 0.125, 1e-3))
    folder, printed = main("--mode", "gossip", "--rounds", "1", "--self-weight", "0.5")
    assert re.search(r"^gossip +1 ", printed, re.M)
    card = (folder / "agents" / "gossip-seed0-agent0" / "README.md").read_text()
    assert "# Agent 0, gossip, seed 0" in card and "| rule | `arithmetic` |" in card
    assert "| beta | `0.125` |" in card
    assert "| gossip, agent 0 |" in (folder / "samples.md").read_text()
    assert metrics(folder)[-1]["lr"] == 1e-3


def test_every_agent_diverging_ends_the_run_with_exit_code_1(main):
    folder, printed = main("--lr", "1e9", code=1)
    (line,) = [line for line in printed.splitlines() if line.startswith("stopped: ")]
    assert "federated, seed 0, agent 0 diverged in update" in line and str(folder) in line
    assert metrics(folder) and not (folder / "summary.json").exists()


class Absent(fedppo.Agent):
    """Agent 0 diverges, and agent 1 sends nonsense."""

    def message(self):
        return {} if self.index else super().message()

    def update(self, *args):
        metrics = super().update(*args)
        if self.index == 0 and not self.diverged:
            self.diverged = f"agent 0 diverged in update {self.done}"
        return metrics


def test_what_goes_wrong_is_said_once_and_counted(main, monkeypatch):
    assert set(run.ALARMS) == {"reward", "kl", "kl_initial"}
    monkeypatch.setattr(run, "ALARMS", {"length": 1.0, "entropy": 1e6})  # always, and never
    monkeypatch.setattr(fedppo.train, "__defaults__", (*fedppo.train.__defaults__[:-1], Absent))
    folder, printed = main("--rounds", "3")
    assert printed.count("warning: federated, seed 0, agent 1, update 1: length is") == 1
    assert printed.count("length is") == 2 and "entropy is" not in printed
    assert printed.count("it is frozen and left out of exchanges") == 1
    missed = [row["missed"] for row in metrics(folder) if row["update"] == 2]
    assert missed == ["agent 0 diverged in update 1", "agent 0 diverged"]
    assert "5 times an agent was absent, frozen or missed a peer" in printed


def test_the_checks_before_training_name_every_fitted_model(main):
    _, printed = main("--judge", "heldout", "--check")
    for name in ("agent 0's reward model", "agent 1's reward model", "the judge"):
        assert f"{name}, accuracy on" in printed
    assert "no fatal check failed" in printed and "not private" not in printed
    _, printed = main("--reward", "shared", "--mode", "centralized", "--check")
    assert "not private: --mode centralized and --reward shared pool" in printed


def test_text_that_the_vocabulary_does_not_know_is_warned_of(main, tmp_path):
    """The tiny model's vocabulary is the words of its world."""
    foreign = worlds.write_jsonl(tmp_path / "rows.jsonl", worlds.text_rows(60))
    flags = ["--model", "tiny/model", "--check", "--dataset"]
    _, printed = main(*flags, "tiny/data")
    assert "ok    share of prompt tokens that the vocabulary does not know: 0 " in printed
    _, printed = main(*flags, str(foreign))
    assert "WARN  share of prompt tokens that the vocabulary does not know" in printed


def test_a_shared_reward_model_is_measured_on_the_held_out_pairs_of_all(main):
    """38 rows are left by 2 evaluation prompts, 19 for each agent, a fifth of them held out."""
    _, printed = main("--reward", "shared", "--check")
    assert printed.count("accuracy on 6 held-out pairs") == 2

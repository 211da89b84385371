"""A run that is stopped, killed or damaged goes on as if nothing had happened, to the bit."""

import dataclasses
import functools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fedppo

HOME = Path(fedppo.__file__).parent
FLAGS = ["--preset", "tiny", "--agents", "2", "--pairs", "20", "--eval-prompts", "8", "--reward-epochs", "1", "--batch",
         "8", "--rounds", "2", "--updates", "2", "--mode", "federated", "isolated",  # 4 updates a round, 16 in all
         "--merge", "--participation", "0.8", "--outlier", "1", "--adaptive-kl", "--lr-schedule", "linear",
         "--response-length", "8", "--workers", "1"]
pytestmark = pytest.mark.usefixtures("no_picture")


def outcome(folder: Path) -> dict:
    """All that a run leaves behind, times and paths aside."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    for mode in summary["modes"].values():
        for entry in [mode["mean"], *mode["seeds"].values()]:
            entry.pop("seconds")
    weights = {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("agents/*/model.safetensors")}
    assert len(weights) == 4 and not list(folder.glob("checkpoint*"))
    return {"rows": [{k: v for k, v in row.items() if k != "seconds"} for row in rows], "summary": summary,
            "weights": weights, "samples": (folder / "samples.md").read_text()}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory, no_picture) -> dict:
    out = tmp_path_factory.mktemp("unstopped")
    assert fedppo.main([*FLAGS, "--out", str(out), "--name", "run"]) == 0
    return outcome(out / "run")


@pytest.fixture
def stopped_in(tmp_path, monkeypatch):
    """stopped_in(update, signal) -> the folder of a run that got the signal inside that update."""
    def stop(number: int, which: int) -> Path:
        original, calls = fedppo.Agent.update, []

        def update(*args):
            calls.append(args)
            if len(calls) == number:
                signal.raise_signal(which)
            return original(*args)
        with monkeypatch.context() as patch:
            patch.setattr(fedppo.Agent, "update", update)
            assert fedppo.main([*FLAGS, "--out", str(tmp_path), "--name", "run"]) == 128 + which
        assert len(calls) == number, "it stops after the update that it was in"
        return tmp_path / "run"
    return stop


@pytest.mark.parametrize("number, which", [
    (11, signal.SIGTERM), *(pytest.param(number, which, marks=pytest.mark.slow) for number, which in
                            ((1, signal.SIGINT), (4, signal.SIGTERM), (16, signal.SIGTERM)))])
def test_a_signal_saves_the_update_it_came_in_and_the_run_goes_on(stopped_in, unstopped, capfd, number, which):
    """Inside a round, at its end, inside one of the second mode and at the very end."""
    folder = stopped_in(number, which)
    assert f"--resume {folder} continues after this update" in capfd.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["update"] > 0 for row in rows) == number
    assert fedppo.main(["--resume", str(folder)]) == 0
    assert outcome(folder) == unstopped


def test_the_handlers_are_given_back(stopped_in):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped_in(2, signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.slow
def test_two_checkpoints_are_kept_every_so_many_rounds(tmp_path, monkeypatch):
    kept = []
    original = fedppo.Run.checkpoint

    def checkpoint(run, *args):
        original(run, *args)
        kept.append([int(path.stem.split("-")[1]) for path in run.checkpoints()])
    monkeypatch.setattr(fedppo.Run, "checkpoint", checkpoint)
    flags = [*FLAGS[:FLAGS.index("--rounds")], "--rounds", "5", "--updates", "2", "--save-every", "2"]
    assert fedppo.main([*flags, "--out", str(tmp_path), "--name", "run"]) == 0
    # 2 rows before training, then 4 a round; saved after rounds 2, 4 and the last
    assert kept == [[10], [10, 18], [18, 22]]


@pytest.mark.parametrize("damage", [
    pytest.param("truncated", marks=pytest.mark.slow), pytest.param("a bit of a tensor", marks=pytest.mark.slow),
    "a bit of the rest", pytest.param("rows lost", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped_in, unstopped, capfd, damage):
    folder = stopped_in(7, signal.SIGTERM)  # in the second round
    older, newer = sorted(folder.glob("checkpoint-*.safetensors"))
    if damage == "truncated":
        newer.write_bytes(newer.read_bytes()[:-1000])
    if damage.startswith("a bit"):
        content = bytearray(newer.read_bytes())
        at = content.index(b"queue") if damage.endswith("rest") else len(content) - 1000
        digit = re.compile(rb"\d").search(content, at).start() if damage.endswith("rest") else at
        content[digit] ^= 1
        newer.write_bytes(content)
    if damage == "rows lost":
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert fedppo.main(["--resume", str(folder)]) == 0
    said = capfd.readouterr().out
    assert f"warning: {newer} cannot be used" in said and str(older) not in said
    assert outcome(folder) == unstopped


def test_a_state_comes_back_as_it_was_written(tmp_path):
    """Against torch.save: keys that are numbers, types, exact floats, tied and strided tensors, empty nests."""
    tied = torch.arange(6.0).view(2, 3)
    state = {"a": {0: tied, 1: tied, 2: tied.T}, "b": [1, 0.1, float("inf"), None, True, "text", [], {}],
             "c": [torch.tensor(3), torch.tensor([1, 2], dtype=torch.uint8), torch.zeros(0), torch.ones(2).bfloat16()]}
    fedppo.write_state(tmp_path / "state.safetensors", state)
    torch.save(state, tmp_path / "state.pt")
    found, expected = fedppo.read_state(tmp_path / "state.safetensors"), torch.load(tmp_path / "state.pt")

    def leaves(node):
        if isinstance(node, torch.Tensor):
            return [node.dtype, node.shape, node.flatten().tolist()]
        if isinstance(node, dict):
            return {key: leaves(value) for key, value in node.items()}
        return [leaves(value) for value in node] if isinstance(node, list) else (type(node), node)
    assert leaves(found) == leaves(expected)
    assert [path.name for path in tmp_path.glob("state*")] and not list(tmp_path.glob("*.tmp"))


def test_an_agents_state_is_all_that_changes_in_it(tmp_path):
    """A fresh agent with the state of one that has trained, was absent and has diverged equals it."""
    settings, _ = fedppo.parse([*FLAGS, "--device", "cpu"])
    world = fedppo.World(settings)
    task = fedppo.make_task(world, 0, pooled=False)
    agent, fresh = (fedppo.Agent(0, world, task, 8, 0.2) for _ in range(2))
    agent.update([world.initial], torch.ones(1, dtype=torch.float64))
    agent.diverged, agent.missed, agent.received = "agent 0 diverged", "absent", 12
    agent.row = torch.tensor([0.25, 0.75], dtype=torch.float64)
    fedppo.outliers(agent, {1: world.initial})
    fedppo.write_state(tmp_path / "agent.safetensors", agent.state_dict())
    fresh.load_state_dict(fedppo.read_state(tmp_path / "agent.safetensors"))

    def content(agent):
        plain = {name: value for name, value in vars(agent).items()
                 if isinstance(value, int | float | str | list | None)}
        states = [agent.policy.state_dict(), agent.optimizer.state_dict()["state"]]
        return plain, agent.row.tolist(), agent.schedule.last_epoch, agent.optimizer.param_groups[0]["lr"], \
            agent.beta, {name: stream.get_state().tolist() for name, stream in agent.streams.items()}, \
            [{key: value.tolist() if isinstance(value, torch.Tensor) else
              {k: v.tolist() for k, v in value.items()} for key, value in state.items()} for state in states]
    assert content(fresh) == content(agent)
    assert len(agent.queue) > 0 and agent.beta != 0.2


@pytest.mark.slow
def test_damaged_metrics_are_named_and_the_checkpoints_stay(stopped_in, unstopped, capfd):
    folder = stopped_in(7, signal.SIGTERM)
    path, before = folder / "metrics.jsonl", sorted(folder.glob("checkpoint-*"))
    content = path.read_bytes()
    path.write_bytes(b"\xff" + content[1:])
    assert fedppo.main(["--resume", str(folder)]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert errors[-1].startswith("error: ") and not any("Traceback" in line for line in errors)
    assert sorted(folder.glob("checkpoint-*")) == before
    path.write_bytes(content + b"\xff\x00half a li")
    assert fedppo.main(["--resume", str(folder)]) == 0
    assert outcome(folder) == unstopped


@pytest.mark.slow
def test_a_full_disk_while_resuming_or_finishing_loses_nothing(stopped_in, unstopped, monkeypatch, capfd):
    folder = stopped_in(7, signal.SIGTERM)
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    original = Path.write_text
    for name in ("metrics.tmp", "summary.tmp"):
        def full(path, text, *args, name=name):
            if path.name == name:
                original(path, text[:10])
                raise OSError(28, "No space left on device", str(path))
            return original(path, text, *args)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            assert fedppo.main(["--resume", str(folder)]) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
        assert len(errors) == 1 and f"make room and continue with --resume {folder}" in errors[0]
        assert not list(folder.glob("*.tmp"))
        if name == "metrics.tmp":
            assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert fedppo.main(["--resume", str(folder)]) == 0
    assert outcome(folder) == unstopped


@pytest.mark.slow
def test_a_run_that_goes_on_is_not_resumed_a_second_time(stopped_in, capfd):
    folder = stopped_in(3, signal.SIGTERM)
    held = fedppo.lock(folder / "config.json")
    assert fedppo.main(["--resume", str(folder)]) == 2
    assert "in use by a run that has not ended" in capfd.readouterr().err
    held.close()
    assert fedppo.main(["--resume", str(folder)]) == 0


def test_a_stop_while_reward_models_are_fitted_does_not_wait_for_them(tmp_path, monkeypatch, capfd):
    calls = []
    monkeypatch.setattr(fedppo.data, "fit_reward_model", lambda *args, **kw: (
        calls.append(args), signal.raise_signal(signal.SIGTERM), calls.append(args)))
    assert fedppo.main([*FLAGS, "--out", str(tmp_path), "--name", "run"]) == 143
    assert len(calls) == 1 and "starts over" in capfd.readouterr().out


@pytest.mark.slow
def test_a_stop_before_the_first_update_trains_none(tmp_path, monkeypatch, capfd, unstopped):
    report = fedppo.report
    monkeypatch.setattr(fedppo, "report", lambda *args: report(*args) or signal.raise_signal(signal.SIGTERM))
    assert fedppo.main([*FLAGS, "--out", str(tmp_path), "--name", "run"]) == 143
    assert "starts over" in capfd.readouterr().out and not (tmp_path / "run" / "metrics.jsonl").read_text()
    monkeypatch.setattr(fedppo, "report", report)
    assert fedppo.main(["--resume", str(tmp_path / "run")]) == 0
    assert outcome(tmp_path / "run") == unstopped


@pytest.mark.slow
def test_a_stop_where_all_have_diverged_does_not_end_well(tmp_path, monkeypatch, capfd):
    flags = [*FLAGS[:FLAGS.index("--mode")], "--workers", "1", "--lr", "1e30", "--rounds", "1", "--out", str(tmp_path),
             "--name", "run"]
    assert fedppo.main(flags) == 1
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    original, calls = fedppo.Agent.update, []

    def update(*args):
        calls.append(args)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)
    with monkeypatch.context() as patch:
        patch.setattr(fedppo.Agent, "update", update)
        assert fedppo.main([*flags[:-1], "again"]) == 143
    assert fedppo.main(["--resume", str(tmp_path / "again")]) == 1
    assert (tmp_path / "again" / "metrics.jsonl").read_text().count("\n") == rows
    assert not (tmp_path / "again" / "summary.json").exists()


def test_another_matrix_file_is_noticed(tmp_path, stopped_in, capfd):
    folder = stopped_in(3, signal.SIGTERM)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"matrix": [[1.0, 0.0], [0.0, 1.0]]}))
    assert fedppo.main(["--resume", str(folder)]) == 2
    assert "no longer the matrix" in capfd.readouterr().err


def test_without_a_checkpoint_that_can_be_read_there_is_one_line(stopped_in, capfd):
    folder = stopped_in(7, signal.SIGTERM)
    for file in folder.glob("checkpoint-*.safetensors"):
        file.write_bytes(b"half a file")
    capfd.readouterr()
    assert fedppo.main(["--resume", str(folder)]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and "checkpoint-" in errors[0]


class Malicious:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_malicious_checkpoint_is_refused_and_not_run(stopped_in, unstopped, tmp_path, capfd):
    folder = stopped_in(7, signal.SIGTERM)
    newer = max(folder.glob("checkpoint-*.safetensors"))
    torch.save({"rows": 9, "samples": Malicious(tmp_path / "owned")}, newer)
    pickle.loads(pickle.dumps(Malicious(tmp_path / "proof")))
    assert (tmp_path / "proof").exists(), "the payload would run if it were unpickled"
    assert fedppo.main(["--resume", str(folder)]) == 0
    assert not (tmp_path / "owned").exists() and f"warning: {newer}" in capfd.readouterr().out
    assert outcome(folder) == unstopped


def test_code_that_a_run_folder_names_is_not_run_unless_the_user_names_it_again(tmp_path, capfd):
    rule = tmp_path / "rule.py"
    rule.write_text("def words(prompts, responses, ended):\n    return [float(len(r.split())) for r in responses]\n")
    assert fedppo.main([*FLAGS, "--out", str(tmp_path), "--name", "run"]) == 0
    folder = tmp_path / "run"
    (folder / "summary.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for name in ("judge", "reward"):
        changed = {"settings": config["settings"] | {name: f"{rule}:words"}}
        (folder / "config.json").write_text(json.dumps(config | changed))
        capfd.readouterr()
        assert fedppo.main(["--resume", str(folder)]) == 2
        assert f"--{name} is the function {rule}:words" in capfd.readouterr().err
        settings, _ = fedppo.parse(["--resume", str(folder), f"--{name}", f"{rule}:words"])
        assert getattr(settings, name) == f"{rule}:words"
        again = fedppo.to_resume(settings, folder)
        assert again == ["--resume", str(folder), f"--{name}", f"{rule}:words"] and fedppo.parse(again)
    (folder / "config.json").write_text(json.dumps(config))
    settings = fedppo.parse(["--resume", str(folder)])[0]
    assert settings.judge == "tiny/judge.py:score", "the embedded judge is our own"
    assert fedppo.to_resume(settings, folder) == ["--resume", str(folder)]


def test_reward_models_that_are_not_the_runs_own_are_noticed(stopped_in, monkeypatch, capfd):
    folder = stopped_in(3, signal.SIGTERM)
    original = fedppo.data.fit_reward_model
    monkeypatch.setattr(fedppo.data, "fit_reward_model", lambda *args, **kw: original(*args, **kw | {"lr": 5e-3}))
    capfd.readouterr()
    assert fedppo.main(["--resume", str(folder)]) == 2
    assert "reward models" in capfd.readouterr().err
    assert sorted(folder.glob("checkpoint-*.safetensors")), "nothing is lost"


@pytest.mark.slow
def test_other_reward_models_on_another_device_are_a_warning(stopped_in, monkeypatch, capfd):
    """There rounding alone can make other samples, and the probe's scores are of those."""
    folder = stopped_in(3, signal.SIGTERM)
    fit, read = fedppo.data.fit_reward_model, fedppo.read_state
    monkeypatch.setattr(fedppo.data, "fit_reward_model", lambda *args, **kw: fit(*args, **kw | {"lr": 5e-3}))
    monkeypatch.setattr(fedppo, "read_state", lambda path: read(path) | {"device": "cuda"})
    assert fedppo.main(["--resume", str(folder)]) == 0
    assert "fitted on cpu give other scores than those fitted on cuda" in "".join(capfd.readouterr())


@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_when_there_is_room(tmp_path, unstopped):
    """The largest size of a file, set for the process, stands for the end of the disk: a checkpoint is larger."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    command = [sys.executable, str(HOME / "fedppo.py"), *FLAGS, "--out", str(tmp_path), "--name", "run"]
    failed = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 2 and len(errors) == 1 and "Traceback" not in failed.stderr
    assert "checkpoint-" in errors[0] and f"--resume {tmp_path / 'run'}" in errors[0]
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert fedppo.main(["--resume", str(tmp_path / "run")]) == 0
    assert outcome(tmp_path / "run") == unstopped


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_like_one_that_was_not(tmp_path, unstopped):
    """SIGKILL of a real process at random moments of its training, every third time while it writes a checkpoint.

    Its agents train in two other processes, which must not outlive it: they would keep the folder locked.
    """
    folder, rng, kills, moments = tmp_path / "run", random.Random(0), 0, set()
    command = [sys.executable, str(HOME / "fedppo.py")]
    arguments = [*FLAGS, "--workers", "2", "--out", str(tmp_path), "--name", "run"]
    for attempt in range(100):
        if kills >= 20:
            break
        if (folder / "summary.json").exists():  # it was finished between two kills: begin anew
            assert outcome(folder) == unstopped
            subprocess.run(["rm", "-r", str(folder)], check=True)
        process = subprocess.Popen([*command, *(["--resume", str(folder)] if folder.exists() else arguments)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = list(folder.glob("checkpoint-*.safetensors")) if folder.exists() else []
        if attempt % 3 == 2:
            while process.poll() is None and not list(folder.glob("checkpoint-*.tmp")):
                pass
        else:
            while process.poll() is None and list(folder.glob("checkpoint-*.safetensors")) == before:
                time.sleep(0.01)  # it trains: what is killed later loses something
            time.sleep(rng.random())
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
            moments.add(len((folder / "metrics.jsonl").read_text().splitlines()))
        errors = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), errors
    assert kills >= 20 and len(moments) > 3
    if not (folder / "summary.json").exists():
        subprocess.run([*command, "--resume", str(folder)], check=True, capture_output=True)
    assert outcome(folder) == unstopped


# --------------------------------------------------------------------------------------- agents side by side


needs_fork = pytest.mark.skipif(sys.platform != "linux" or torch.accelerator.is_available(),
                                reason="agents train side by side on Linux, without a GPU")


def run_in_copies(tmp_path, monkeypatch, update, code: int) -> Path:
    """A run of two workers whose copies have `update(original, agent, run, *args)` for Agent.update -> its folder."""
    runs, original, start = [], fedppo.Agent.update, fedppo.Run.__init__

    def keep(run, *args):
        start(run, *args)
        runs.append(run)
    with monkeypatch.context() as patch:
        patch.setattr(fedppo.Run, "__init__", keep)
        patch.setattr(fedppo.Agent, "update", lambda agent, *args: update(original, agent, runs[-1], *args))
        assert fedppo.main([*FLAGS, "--workers", "2", "--out", str(tmp_path), "--name", "run"]) == code
    assert not multiprocessing.active_children()
    return tmp_path / "run"


@needs_fork
def test_agents_side_by_side_are_those_of_one_process(tmp_path, monkeypatch, unstopped):
    """Even if every copy gets a signal, as of a Ctrl-C to the whole group, before it can ignore it."""
    here, in_a_copy = os.getpid(), fedppo.in_a_copy
    monkeypatch.setattr(fedppo, "in_a_copy", lambda *args: (os.kill(os.getpid(), signal.SIGINT), in_a_copy(*args)))

    def update(original, agent, run, *args):
        assert os.getpid() != here
        return original(agent, *args)
    assert outcome(run_in_copies(tmp_path, monkeypatch, update, 0)) == unstopped


@needs_fork
@pytest.mark.parametrize("agent, number", [pytest.param(0, 1, marks=pytest.mark.slow), (1, 3)])
def test_a_signal_stops_all_copies_after_their_update(tmp_path, monkeypatch, unstopped, capfd, agent, number):
    """It comes in the first update of a round of one agent; the other may then be in any of that round's two."""
    def update(original, self, run, *args):
        if (self.index, self.done + 1) == (agent, number):
            os.kill(os.getppid(), signal.SIGTERM)
            while not run.stop:  # until the parent has told
                time.sleep(0.001)
        return original(self, *args)
    folder = run_in_copies(tmp_path, monkeypatch, update, 143)
    assert f"--resume {folder} continues after this update" in capfd.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows if row["agent"] == agent][-1] == number
    assert {row["mode"] for row in rows} == {"federated"}
    assert fedppo.main(["--resume", str(folder)]) == 0

    def in_order(result: dict) -> dict:
        """The rows of the round that was stopped are in another order."""
        return result | {"rows": sorted(result["rows"], key=lambda row: (row["mode"], row["update"], row["agent"]))}
    assert in_order(outcome(folder)) == in_order(unstopped)


@needs_fork
def test_a_killed_copy_ends_the_run_in_one_line(tmp_path, monkeypatch, unstopped, capfd):
    def update(original, agent, run, *args):
        if (agent.index, agent.done) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(agent, *args)
    folder = run_in_copies(tmp_path, monkeypatch, update, 2)
    errors = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "fewer --workers" in errors[0]
    assert fedppo.main(["--resume", str(folder), "--workers", "1"]) == 0
    assert outcome(folder) == unstopped


@needs_fork
def test_jobs_side_by_side_keep_their_order_and_leave_nothing_behind():
    def job(number: int):
        return number, os.getpid()
    jobs = [functools.partial(job, number) for number in range(5)]
    alone, apart = (list(fedppo.side_by_side(jobs, at_once)) for at_once in (1, 2))
    assert [number for number, _ in apart] == [number for number, _ in alone] == [0, 1, 2, 3, 4]
    assert len({process for _, process in apart}) == 5 and {process for _, process in alone} == {os.getpid()}
    assert [process for _, process in fedppo.side_by_side(jobs[:1], 2)] == [os.getpid()]

    def forever():
        while True:
            time.sleep(1)

    def fails():
        raise fedppo.UserError("of the job")
    with pytest.raises(fedppo.UserError, match="of the job"):
        list(fedppo.side_by_side([fails, forever], 2))
    results = fedppo.side_by_side([jobs[0], forever], 2)
    next(results)
    results.close()
    assert not multiprocessing.active_children()


class Odd(Exception):
    """Can be pickled, and then not be read again."""

    def __init__(self, one, two):
        super().__init__(one)


@needs_fork
def test_a_bug_in_a_copy_comes_back_with_its_traceback():
    def fails():
        raise Odd("the cause", 2)
    with pytest.raises(RuntimeError, match="(?s)in fails.*Odd: the cause"):
        list(fedppo.side_by_side([fails, fails], 2))


@pytest.mark.parametrize("sent", [b"", struct.pack("!i", 100) + b"half of it"])
def test_a_copy_that_dies_while_it_sends_was_killed(sent):
    inlet, outlet = multiprocessing.Pipe(duplex=False)
    os.write(outlet.fileno(), sent)
    outlet.close()
    result, error = fedppo.received(inlet)
    assert result is None and "fewer --workers" in str(error)


@pytest.mark.parametrize("flags, told", [
    (["--workers", "2", "--threads", "2"], "--workers 2 needs Linux"), (["--workers", "-1"], "must not be negative")])
def test_workers_that_cannot_be(flags, told, capfd):
    assert fedppo.main(["--preset", "tiny", "--device", "cpu", *flags]) == 2
    assert told in capfd.readouterr().err


@needs_fork
def test_workers_are_one_per_core_where_they_can_be(monkeypatch):
    settings, _ = fedppo.parse(["--preset", "tiny", "--device", "cpu"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert fedppo.workers(settings) == 3
    assert fedppo.workers(dataclasses.replace(settings, reward="mine.py:score")) == 1
    assert fedppo.workers(dataclasses.replace(settings, workers=2)) == 2
    assert fedppo.workers(dataclasses.replace(settings, threads=0)) == 1
    for owner, name, value in ((sys, "platform", "darwin"), (torch.accelerator, "is_available", lambda: True)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert fedppo.workers(settings) == 1

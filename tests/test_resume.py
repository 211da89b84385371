"""A run that is stopped, killed or damaged goes on as if nothing had happened, to the bit."""

import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import data
import fedppo
import plot
from support import run, settings

ARMS = ("--updates 2 --mode federated merged --participation 0.8 --outlier 1 --anchor 0.1 "
        "--lr-schedule linear").split()  # 4 updates a round, 16 in all
pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture(autouse=True)
def every_round(monkeypatch):
    """A checkpoint after every round: these take hundredths of a second."""
    monkeypatch.setattr(run, "SECONDS_BETWEEN", 0)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def outcome(folder):
    """All that a finished run leaves behind, but for times and paths."""
    summary = json.loads((folder / "summary.json").read_text())
    assert min(summary.pop("seconds").values()) >= 0
    for mode in summary["modes"].values():
        for entry in [mode["mean"], *mode["seeds"].values()]:
            entry.pop("seconds")
    weights = {str(file.relative_to(folder)): file.read_bytes()
               for file in folder.glob("agents/*/model.safetensors")}
    assert weights and not [*folder.glob("checkpoint*"), *folder.glob("*.tmp")]
    rows = [row | {"seconds": None, "wall": None} for row in metrics(folder)]
    return {"rows": rows, "summary": summary, "weights": weights,
            "samples": (folder / "samples.md").read_text()}


@pytest.fixture
def flags(short, tmp_path):
    return [*short, *ARMS, "--out", str(tmp_path)]


@pytest.fixture(scope="module")
def unstopped(short, tmp_path_factory, no_picture):
    out = tmp_path_factory.mktemp("unstopped")
    assert fedppo.main([*short, *ARMS, "--out", str(out)]) == 0
    return outcome(out / "run")


@pytest.fixture
def stopped_in(flags, tmp_path, monkeypatch, capfd):
    """stopped_in(update, signal) -> the folder of a run that got the signal inside that update."""
    def stop(number, which=signal.SIGTERM):
        original, calls = fedppo.Agent.update, []

        def update(*args):
            calls.append(args)
            if len(calls) == number:
                signal.raise_signal(which)
            return original(*args)
        with monkeypatch.context() as patch:
            patch.setattr(fedppo.Agent, "update", update)
            assert fedppo.main(flags) == 128 + which
        assert len(calls) == number, "it ends at once"
        printed = capfd.readouterr().out
        (line,) = [x for x in printed.splitlines() if x.startswith("interrupted: ")]
        assert "a checkpoint takes" not in printed, "it is small"
        told = "continues from the last checkpoint" if number > 4 else "starts over"
        again = settings.program("fedppo.py", "--resume", str(tmp_path / "run"))
        assert line == f"interrupted: {again} {told}"
        return tmp_path / "run"
    return stop


@pytest.fixture
def resumed(capfd):
    """resumed(folder, *flags, code=0) -> what was printed; an error is one line on stderr."""
    def go_on(folder, *flags, code=0):
        capfd.readouterr()
        assert fedppo.main(["--resume", str(folder), *flags]) == code
        printed = capfd.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code == 2) and "Traceback" not in printed.err
        return errors[0] if errors else printed.out
    return go_on


@pytest.fixture
def untrained(resumed, monkeypatch):
    """untrained(folder) -> what is printed by a run that goes on and is stopped at once."""
    def go_on(folder):
        with monkeypatch.context() as patch:
            patch.setattr(fedppo, "train", lambda *args: signal.raise_signal(signal.SIGINT))
            return resumed(folder, code=130)
    return go_on


# ---------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("number, which", [
    (3, signal.SIGINT), (12, signal.SIGTERM),
    *(pytest.param(number, signal.SIGTERM, marks=pytest.mark.slow) for number in (1, 4, 7, 9, 16))])
def test_a_stopped_run_is_continued_to_the_bit(stopped_in, unstopped, resumed, number, which):
    """In the first round, at the end of one, in one of the second mode and at the very end."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    folder = stopped_in(number, which)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert sum(row["update"] > 0 for row in metrics(folder)) == number - 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"mode": "fed')  # half a line
    done, updates = [], fedppo.Agent.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedppo.Agent, "update", lambda *args: done.append(0) or updates(*args))
        resumed(folder)
    assert len(done) == 16 - (number - 1) // 4 * 4, "what was done since the last round is lost"
    assert outcome(folder) == unstopped


def test_a_stop_while_reward_models_are_fitted_does_not_wait_for_them(flags, monkeypatch, capfd):
    calls = []
    monkeypatch.setattr(data, "fit_reward_model", lambda *args, **kw: (
        calls.append(args), signal.raise_signal(signal.SIGTERM), calls.append(args)))
    assert fedppo.main(flags) == 143
    assert len(calls) == 1 and "starts over" in capfd.readouterr().out


def test_a_stop_while_agents_are_saved_saves_them_again(flags, tmp_path, unstopped, resumed,
                                                        monkeypatch):
    """All rounds of the first mode are done and its checkpoint is written, its end is not."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_agent", lambda *args: signal.raise_signal(signal.SIGTERM))
        assert fedppo.main(flags) == 143
    resumed(tmp_path / "run")
    assert outcome(tmp_path / "run") == unstopped


def test_a_stop_while_the_files_are_made_can_be_continued(flags, tmp_path, unstopped, resumed,
                                                          monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(plot, "draw", lambda *args: signal.raise_signal(signal.SIGINT))
        assert fedppo.main(flags) == 130
    folder = tmp_path / "run"
    assert not (folder / "summary.json").exists() and len(list(folder.glob("checkpoint*"))) == 2
    monkeypatch.setattr(fedppo.Agent, "update", lambda *args: pytest.fail("trained again"))
    resumed(folder)
    assert outcome(folder) == unstopped
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert f"--resume {folder}: this run is finished" in resumed(folder, code=2)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SERVER = """
import json, os, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM
torch.set_num_threads(1)
import fedppo, plot, support.run
support.run.SECONDS_BETWEEN = 0
plot.draw = lambda folders, out: (out, out)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(fedppo.main(json.loads(line)))
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_like_one_that_was_not(flags, tmp_path):
    """SIGKILL at random moments, every third time while a checkpoint is written; two modes, two
    seeds.

    Every process is a fork of one that has imported all: that saves some seconds of each.
    """
    flags = [*flags, "--seeds", "0", "1"]
    assert fedppo.main([*flags, "--name", "unstopped"]) == 0
    unstopped = outcome(tmp_path / "unstopped")
    assert len(unstopped["weights"]) == 8
    folder, rng, kills, moments, arms = tmp_path / "run", random.Random(0), 0, set(), set()
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              cwd=Path(fedppo.__file__).parent)
    for attempt in range(400):  # on a busy machine a run comes less far between two kills
        if kills >= 20 and len(arms) >= 4:
            break
        if (folder / "summary.json").exists():  # it was finished between two kills: begin anew
            for file in folder.glob("checkpoint-*"):
                file.unlink()  # killed while it did so
            assert outcome(folder) == unstopped
            subprocess.run(["rm", "-r", str(folder)], check=True)
        command = ["--resume", str(folder)] if (folder / "config.json").exists() else flags
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        child, before = int(server.stdout.readline()), list(folder.glob("checkpoint-*.pt"))
        ends = time.monotonic() + 60
        pattern = "checkpoint-*.tmp" if attempt % 3 == 2 else "checkpoint-*.pt"
        while time.monotonic() < ends and not (folder / "summary.json").exists() \
                and list(folder.glob(pattern)) in ([], before):
            time.sleep(0.001)  # until it trains: what is killed later loses something
        if attempt % 3 != 2:
            time.sleep(rng.random() / 3)
        os.kill(child, signal.SIGKILL)  # one that has ended is still there until it is asked for
        server.stdin.write("\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        rows = metrics_so_far(folder)
        moments.add(len(rows))
        arms.add((rows[-1]["seed"], rows[-1]["mode"]) if rows else None)
    server.stdin.close()
    server.wait()
    assert kills >= 20 and len(moments) > 5 and len(arms) >= 4
    if not (folder / "summary.json").exists():
        assert fedppo.main(["--resume", str(folder)]) == 0
    assert outcome(folder) == unstopped


def metrics_so_far(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_are_made_seldom_and_the_last_two_are_kept(flags, monkeypatch, capfd):
    """A clock on which an update takes 10 s: a round takes 20, a checkpoint has 30 between."""
    clock, update, written, kept = [0], fedppo.Agent.update, [], []

    def slow_update(*args):
        clock[0] += 10
        return update(*args)
    write = run.Run.checkpoint

    def checkpoint(self, seed, mode, state):
        write(self, seed, mode, state)
        written.append((mode, state["round"] if state else "end"))
        kept.append(len(self.checkpoints()))
    monkeypatch.setattr(run, "SECONDS_BETWEEN", 30)
    monkeypatch.setattr(run, "LARGE", 1e5)
    monkeypatch.setattr(run, "time", types.SimpleNamespace(
        monotonic=lambda: clock[0], strftime=time.strftime))
    monkeypatch.setattr(fedppo.Agent, "update", slow_update)
    monkeypatch.setattr(run.Run, "checkpoint", checkpoint)
    assert fedppo.main([*flags, "--updates", "1", "--rounds", "5"]) == 0
    arm = [2, 4, "end"]
    assert written == [(mode, when) for mode in ("federated", "merged") for when in arm]
    assert kept == [1, 2, 2, 2, 2, 2]
    said = "".join(capfd.readouterr())
    assert said.count("a checkpoint takes 0.0 GB; the last two are kept in") == 1


def leaves(node):
    """A nest in a form that can be compared."""
    if isinstance(node, torch.Tensor):
        return [str(node.dtype), list(node.shape), node.flatten().tolist()]
    if isinstance(node, dict):
        return {key: leaves(value) for key, value in node.items()}
    return [leaves(x) for x in node] if isinstance(node, list | tuple) else [str(type(node)), node]


STATE = {"seed": 0, "mode": "federated", "rows": 9, "samples": {"a 0 0 before": [{"judge": None}]},
         "state": {"round": 1, "agents": [{"queue": list(range(40)), "diverged": None, "lr": 5e-4,
                                           "optimizer": {0: torch.arange(300.0).view(3, 100)}}],
                   "fingerprint": torch.tensor([0.5, torch.inf]), "empty": [torch.zeros(0), {}],
                   "stream": torch.arange(200, dtype=torch.uint8), "half": torch.ones(2).half()}}


def test_damage_is_noticed_wherever_it_is(tmp_path):
    """One bit or byte anywhere, or an end cut off: an exception, or all is as it was written."""
    path, rng = tmp_path / "checkpoint.pt", random.Random(0)
    run.write_checkpoint(path, STATE)
    assert leaves(run.read_checkpoint(path)) == leaves(STATE)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    content, noticed = path.read_bytes(), 0
    for at in rng.sample(range(len(content)), 400):
        damaged = bytearray(content)
        damaged[at] ^= rng.choice((1 << rng.randrange(8), 255))
        path.write_bytes(damaged)
        try:
            found = run.read_checkpoint(path)
        except Exception:
            noticed += 1
        else:
            assert leaves(found) == leaves(STATE), at
    assert noticed > 100, "the rest hit padding, dates and the like"
    for length in rng.sample(range(len(content)), 50):
        path.write_bytes(content[:length])
        with pytest.raises(Exception):  # noqa: B017  (of many classes)
            run.read_checkpoint(path)


def test_verifying_a_checkpoint_takes_less_than_writing_it(tmp_path):
    path, state = tmp_path / "checkpoint.pt", {"state": torch.randn(13_000_000)}  # 52 MB

    def seconds(function, *args):
        started = time.perf_counter()
        function(*args)
        return time.perf_counter() - started
    writing = min(seconds(run.write_checkpoint, path, state) for _ in range(3))
    verifying = min(seconds(run.read_checkpoint, path) for _ in range(3))
    assert verifying < 2 * writing, "with reading it, and far from a hash's ten times"


def flipped(file, at):
    content = bytearray(file.read_bytes())
    content[at(content)] ^= 1
    file.write_bytes(content)


def one_line_less(file):
    path = file.parent / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "a bit of a tensor": lambda file: flipped(file, lambda content: len(content) // 2),
    "a bit of the rest": lambda file: flipped(file, lambda content: content.index(b"queue")),
    "nothing": lambda file: file.write_bytes(b""), "rows lost": one_line_less}


@pytest.mark.parametrize("damage", [
    pytest.param(name, marks=[] if "tensor" in name else pytest.mark.slow) for name in DAMAGE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped_in, unstopped, resumed,
                                                                   untrained, damage):
    folder = stopped_in(14)  # in the last round: the one before is the end of the first mode
    older, newer = sorted(folder.glob("checkpoint-*.pt"))
    DAMAGE[damage](newer)
    damaged = newer.read_bytes()
    printed = untrained(folder)
    assert f"warning: {newer} cannot be used" in printed and str(older) not in printed
    assert newer.with_suffix(".damaged").read_bytes() == damaged and older.exists()
    resumed(folder)
    assert outcome(folder) == unstopped


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_nothing_is_unpickled(stopped_in, tmp_path, untrained):
    folder = stopped_in(14)
    newer = max(folder.glob("checkpoint-*.pt"))
    torch.save(run.read_checkpoint(newer) | {"samples": Malicious(tmp_path / "owned")}, newer)
    pickle.loads(pickle.dumps(Malicious(tmp_path / "proof")))
    assert (tmp_path / "proof").exists(), "the payload would run if it were unpickled"
    assert f"warning: {newer} cannot be used" in untrained(folder)
    assert not (tmp_path / "owned").exists() and newer.with_suffix(".damaged").exists()


def test_an_agents_state_is_all_that_changes_in_it(short, tmp_path):
    """A fresh agent with the state of one that has trained and has diverged equals it."""
    world = fedppo.World(settings.parse(short, fedppo.MODES).settings)
    task, arm = fedppo.make_task(world, 0), fedppo.arm_settings(world.settings, "federated")
    agent, fresh = (fedppo.Agent(0, world, task, arm) for _ in range(2))
    agent.update([world.initial], torch.ones(1, dtype=torch.float64))
    agent.diverged, agent.received = "agent 0 diverged", 12
    fedppo.outliers(agent, {1: world.initial})
    run.write_checkpoint(tmp_path / "agent.pt", agent.state_dict())
    fresh.load_state_dict(run.read_checkpoint(tmp_path / "agent.pt"))

    def content(agent):
        plain = {name: value for name, value in vars(agent).items()
                 if isinstance(value, int | float | str | list | None)}
        streams = {name: stream.get_state() for name, stream in agent.streams.items()}
        return leaves([plain, streams, agent.policy.state_dict(), agent.optimizer.state_dict()])
    assert content(fresh) == content(agent) and len(agent.queue) > 0


# ---------------------------------------------------------------------------- what cannot go on


def test_what_is_not_as_it_was_is_refused_in_one_line(stopped_in, unstopped, resumed, monkeypatch,
                                                      tmp_path):
    """Between the modes too; and nothing is lost by it: in the end the run is continued."""
    folder = stopped_in(9)  # the last checkpoint is the end of the first mode
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def unchanged():
        found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return found == before
    for flags, says in (("--agents 3", "--agents 3 differs from the run's 2"),
                        ("--lr 0.5", "--lr 0.5 differs from the run's none"),
                        ("--mode isolated", "from the run's federated merged"),
                        ("--name x", "--name x differs"), ("--response-eos", "the run's False")):
        assert says in resumed(folder, *flags.split(), code=2)
    for auto in ("--device auto", "--preset auto", "--micro-batch 0", "--agents 2"):
        settings.parse(["--resume", str(folder), *auto.split()], fedppo.MODES)
    config = folder / "config.json"
    content = json.loads(before["config.json"])
    changed = [{"settings": content["settings"] | one} for one in (
        {"gamma": 1.0}, {"lr": "x"}, {"device": 7}, {"mode": ["gossip"]})]
    for changes in (*changed, {"settings": {"lr": 1}}, {"modes": {"federated": {"lr": 1}}}):
        config.write_text(json.dumps(content | changes))
        line = resumed(folder, code=2)
        assert "no longer have the settings" in line or "modes" not in changes
    config.write_bytes(before["config.json"])
    held = run.lock(config)
    assert "in use by a run that has not ended" in resumed(folder, code=2)
    held.close()
    fit = data.fit_reward_model
    with monkeypatch.context() as patch:
        patch.setattr(data, "fit_reward_model",
                      lambda *args, **kw: fit(*args, **kw | {"lr": 5e-3}))
        assert "reward models" in resumed(folder, code=2)
        assert unchanged()
    (folder / "metrics.jsonl").write_bytes(b"\xff" + before["metrics.jsonl"][1:])
    assert "checkpoint-" in resumed(folder, code=2)
    (folder / "metrics.jsonl").write_bytes(before["metrics.jsonl"])
    for file in folder.glob("checkpoint-*.pt"):
        file.write_bytes(b"half a file")
    line = resumed(folder, code=2)
    assert line.count("cannot be used") == 2 and "there is no other checkpoint" in line
    for file in folder.glob("checkpoint-*.pt"):
        file.write_bytes(before[file.name])
    assert unchanged()
    resumed(folder)
    assert outcome(folder) == unstopped


@pytest.mark.slow
def test_other_reward_models_on_another_device_are_a_warning(stopped_in, resumed, monkeypatch):
    """There rounding alone can make other samples, and the fingerprint is of those."""
    folder, fit, read = stopped_in(7), data.fit_reward_model, run.read_checkpoint

    monkeypatch.setattr(data, "fit_reward_model", lambda *a, **kw: fit(*a, **kw | {"lr": 5e-3}))
    def made_elsewhere(path):
        content = read(path)
        for task in content["fingerprints"].values():
            task["device"] = "cuda"
        return content
    monkeypatch.setattr(run, "read_checkpoint", made_elsewhere)
    assert "fitted on cpu give other scores than those fitted on cuda" in resumed(folder)


def test_code_that_a_folder_names_is_not_run_unless_the_user_names_it_again(stopped_in, resumed,
                                                                            tmp_path):
    folder, rule = stopped_in(2), f"{tmp_path}/rule.py:words"
    (tmp_path / "rule.py").write_text(
        "def words(prompts, responses, ended):\n    return [float(len(r)) for r in responses]\n")
    content = json.loads((folder / "config.json").read_text())

    def parsed(*flags):
        return settings.parse(["--resume", str(folder), *flags], fedppo.MODES).settings
    start = settings.program("fedppo.py", "--resume", str(folder))
    assert settings.to_resume(parsed(), folder) == start, "judged by our own"
    assert settings.to_resume(parsed(), folder, tensorboard=True) == f"{start} --tensorboard"
    for name in ("judge", "reward"):
        changed = content | {"settings": content["settings"] | {name: rule}}
        (folder / "config.json").write_text(json.dumps(changed))
        assert f"--{name} is the function {rule}" in resumed(folder, code=2)
        again = settings.to_resume(parsed(f"--{name}", rule), folder)
        assert again == f"{start} --{name} {rule}"
        assert getattr(parsed(f"--{name}", rule), name) == rule


# ----------------------------------------------------------------------------------- a full disk


def test_a_full_disk_is_said_in_one_line_and_there_is_a_way_on(flags, tmp_path, unstopped, resumed,
                                                               capfd):
    """The largest size of a file stands for the end of the disk: a checkpoint is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, before[1]))
    try:
        assert fedppo.main(flags) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "checkpoint-" in line and "make room and continue with " in line
    assert line.endswith(f"fedppo.py --resume {tmp_path / 'run'}")
    assert not list((tmp_path / "run").glob("*.tmp"))
    resumed(tmp_path / "run")
    assert outcome(tmp_path / "run") == unstopped


def test_a_full_disk_while_resuming_or_finishing_loses_nothing(stopped_in, unstopped, resumed,
                                                               monkeypatch):
    folder, write = stopped_in(15), Path.write_text
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    for name in ("metrics.tmp", "summary.tmp"):
        def full(path, text, *args, name=name, **kwargs):
            if path.name == name:
                write(path, text[:10])
                raise OSError(28, "No space left on device", str(path))
            return write(path, text, *args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            line = resumed(folder, code=2)
        assert "make room and continue with " in line and f"fedppo.py --resume {folder}" in line
        assert not list(folder.glob("*.tmp"))
        if name == "metrics.tmp":
            assert before == {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    resumed(folder)
    assert outcome(folder) == unstopped

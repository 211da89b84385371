"""A run's folder: what it leaves behind, and how an interrupted one goes on. Knows no Agent.

In reading order
    1. glossary        every key of metrics.jsonl and summary.json
    2. Run             log, save, finish: config.json, metrics.jsonl, summary.json, samples.md,
                       curves.png and .svg, agents/
    3. checkpoints     write_checkpoint, read_checkpoint
    4. files           what a run writes once: config.json, an agent's folder, samples.md
    5. the process     print_anything; stoppable: Ctrl-C and SIGTERM end a run at once

Metrics, one line of metrics.jsonl per mode, seed, agent and update. Line 0 is before the first
update; what was not measured at an update is null (episodes, bytes and seconds are 0). `reward` to
`ended` are of the rollout *before* its update, `judge` is of the policy *after* it.

    mode, seed, agent, round, update   which line this is; `update` counts an agent's PPO updates
    judge            mean of the judge's score over the held-out prompts (the same for all agents
                     and modes), sampled at the training temperature with one random stream; before
                     the first update and after every round
    judge_own        the same over the held-out prompts of the agent's own splits; null where there
                     are none, with --shards iid and in centralized
    episodes         responses that the agent has learned from so far
    reward           the agent's own reward, mean over the rollout; normalised to mean 0 and
                     standard deviation 1 on samples of the initial policy, minus the missing-EOS
                     penalty where it applies; without the KL penalty
    kl               KL(policy||cooperative reference), summed over the response, mean over
                     responses, nats, by the estimator that is trained on
    kl_initial       exact KL(policy||initial policy), summed and averaged likewise
    entropy          of the next-token distribution, mean over valid tokens, nats
    policy_loss, value_loss    means over the update's gradient steps; the value loss before c_v
    clipfrac, value_clipfrac   share of valid tokens where the clipped term is the larger one
    length, ended    tokens per response, EOS included; share of responses with EOS
    bytes            received by this agent at exchanges so far
    seconds          of this update alone
    wall             seconds on the clock since the line before: the update and what came with it,
                     exchange and judging; on the first line, since the mode's training began
    approx_kl        k3 of KL(rollout policy||current policy) per token, mean over gradient steps
    grad_norm        before clipping, mean over gradient steps
    lr, beta         used in this update
    reward_accuracy  of the agent's reward model on held-out pairs; on line 0 only, null where the
                     reward is given
    missed           null, or why this agent could not hear a peer in this round: `absent` (itself),
                     `agent 2 absent`, `diverged`, `is an outlier`, `is not finite`, `has another
                     shape`, `has no finite log-probs here` (on this agent's prompts), `the average`
                     or `a reference` (in this update) `has no finite log-probs`, or it `diverged`

summary.json is explained in plot.summarise; its `seconds` are those of the process that finished
the run, by part, from the start of the program to the picture (support/clock.py).
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

import plot
from data import UserError
from support import clock, load
from support.settings import Settings, as_flags, program, show, to_resume

KEYS = ("mode", "seed", "agent", "round", "update", "judge", "judge_own", "episodes", "reward",
        "kl", "kl_initial", "entropy", "policy_loss", "value_loss", "clipfrac", "length", "ended",
        "bytes", "seconds", "wall", "value_clipfrac", "approx_kl", "grad_norm", "lr", "beta",
        "reward_accuracy", "missed")
COUNTED = ("episodes", "bytes", "seconds", "wall")  # 0, not null, where there is nothing yet
ALARMS = {"reward": 10.0, "kl": 100.0, "kl_initial": 100.0}  # standard deviations; nats a response
SECONDS_BETWEEN = 30.0  # two checkpoints: rounds that are shorter share one
LARGE = 1e9  # bytes: the size of such a checkpoint is said

# --------------------------------------------------------------------------------------------- Run


class Run:
    """A run's folder while it goes on; a context that says how to go on when it is stopped."""

    def __init__(self, s: Settings, command, modes: dict[str, dict], deals: dict[int, list[dict]]):
        """command: of support.settings; modes: of each its own settings, the number of its agents
        and W; deals: what each seed deals to its agents. Raises UserError.
        """
        self.settings = s
        self.writer = tensorboard() if command.tensorboard else None
        self.board = None  # event files; made when there is a line
        self.agents = {mode: values["agents"] for mode, values in modes.items()}
        self.rows: list[dict] = []
        self.samples: dict[str, list[dict]] = {}
        self.last: dict = {"rows": 0}  # the checkpoint that a resumed run goes on from
        self.fingerprints: dict[str, dict] = {}  # task -> some scores of its models, and where
        self.saved_at = time.monotonic()  # when the last checkpoint was written
        self.warned: set[tuple] = set()  # warnings are given once
        self.since = time.monotonic()  # when the last line was written, or training began
        self.resumed = bool(command.resume)
        self.folder = Path(command.resume) if command.resume else new_folder(s)
        config = self.folder / "config.json"
        try:
            if not self.resumed:
                content = describe(s, command.reason, modes, deals)
                write_text(config, json.dumps(content, indent=2) + "\n")
            self.lock = lock(config)
            if self.resumed:
                then = json.loads(config.read_text(encoding="utf-8"))
                if then.get("modes") != json.loads(json.dumps(modes)):
                    raise UserError(f"--resume {self.folder}: the modes no longer have the "
                                    "settings, or the matrix, that the run was started with")
                if then.get("deals") != json.loads(json.dumps(deals)):
                    raise UserError(f"--resume {self.folder}: {s.dataset} no longer gives the "
                                    "agents what the run was started with")
                self.go_back()
        except OSError as error:
            if self.resumed:
                raise self.no_room(error) from None
            shutil.rmtree(self.folder, ignore_errors=True)  # it was empty
            raise UserError(f"{config}: {error.strerror or error}; start again, with room or "
                            "another --out") from None
        self.metrics = None  # metrics.jsonl, open to append: see `lines`
        updates = sum(self.agents[mode] for mode in s.mode) * len(s.seeds) * s.rounds * s.updates
        done = sum(row["update"] > 0 for row in self.rows)
        tqdm.write(f"run {self.folder}: {program('plot.py', str(self.folder))} draws it meanwhile")
        self.bar = tqdm(total=updates, initial=done, unit="update", dynamic_ncols=True,
                        smoothing=0.1, disable=command.quiet)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Close the files. What stopped the run is told with the way to go on."""
        for file in (self.bar, self.metrics, self.lock, self.board):
            if file is not None:
                with contextlib.suppress(OSError):  # what a full disk left to be written
                    file.close()
        if isinstance(error, UserError) and not self.rows and not self.resumed:
            # Nothing was trained: the mended command can use the folder's name.
            for file in ("config.json", "metrics.jsonl"):
                (self.folder / file).unlink(missing_ok=True)
            self.folder.rmdir()
        elif isinstance(error, KeyboardInterrupt) and (self.folder / "summary.json").exists():
            print(f"\ninterrupted, but {self.folder} is finished")
        elif isinstance(error, KeyboardInterrupt):
            goes_on = "continues from the last checkpoint" if self.checkpoints() else "starts over"
            print(f"\ninterrupted: {self.again()} {goes_on}")
        elif isinstance(error, FloatingPointError):
            last = self.rows[-1]
            raise FloatingPointError(f"{last['mode']}, seed {last['seed']}, {error} (metrics so "
                                     f"far: {self.folder})") from None
        elif isinstance(error, OSError):
            raise self.no_room(error) from None

    def again(self) -> str:
        """The command that goes on."""
        return to_resume(self.settings, self.folder, self.writer is not None)

    def no_room(self, error: OSError) -> UserError:
        """A file that cannot be written, because the disk is full as a rule, in one line."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return UserError(f"{error.filename or self.folder}: {error.strerror or error}; "
                         f"{'make room and ' if full else ''}continue with {self.again()}")

    def log(self, row: dict) -> None:
        """Append one line; what was not measured at this update is null."""
        row = dict(row)
        mode, seed, agent, update = (row[key] for key in ("mode", "seed", "agent", "update"))
        if samples := row.pop("samples", None):
            when = "after" if update else "before"
            self.samples[f"{mode} {seed} {agent} {when}"] = samples
        row = {key: row.get(key, 0 if key in COUNTED else None) for key in KEYS}
        now = time.monotonic()
        row["wall"], self.since = now - self.since, now
        file = self.lines()
        file.write(json.dumps(row) + "\n")
        file.flush()
        self.rows.append(row)
        if self.writer:
            self.to_board()
        self.warn(row)
        if update:
            self.bar.update()
        self.bar.set_description(f"{mode} seed {seed}")
        if row["judge"] is not None:
            latest = {r["agent"]: r["judge"] for r in self.rows
                      if (r["mode"], r["seed"]) == (mode, seed) and r["judge"] is not None}
            scores = " ".join(f"{score:.2f}" for score in latest.values())
            self.bar.set_postfix_str(f"judge {scores}")

    def lines(self):
        """metrics.jsonl, to append to. A resumed run that is refused before has changed nothing."""
        if self.metrics is None:
            path = self.folder / "metrics.jsonl"
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self.metrics = path.open("a", encoding="utf-8")
        return self.metrics

    def to_board(self) -> None:
        """The last line to TensorBoard; with the first, those that a resumed run has already."""
        rows = self.rows[-1:] if self.board else self.rows
        if not self.board:
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
            self.board = self.writer(self.folder / "tensorboard")
        for row in rows:
            who = "{mode}-seed{seed}-agent{agent}".format(**row)
            for key in KEYS[5:]:
                if isinstance(row[key], int | float):
                    self.board.add_scalar(f"{who}/{key}", row[key], row["update"])

    def warn(self, row: dict) -> None:
        """Say once what a line shows to go wrong."""
        who = f"{row['mode']}, seed {row['seed']}, agent {row['agent']}"
        found = {name: f"{who}, update {row['update']}: {name} is {row[name]:.3g}"
                 for name, limit in ALARMS.items() if abs(row[name] or 0) > limit}
        if row["missed"] and "diverged in" in row["missed"]:
            found["diverged"] = (f"{row['mode']}, seed {row['seed']}, {row['missed']}; it is "
                                 "frozen and left out of exchanges")
        for name, text in found.items():
            if (who, name) not in self.warned:
                self.warned.add((who, name))
                tqdm.write(f"warning: {text}")

    # ---- going on

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first; a name has the number of lines written before."""
        return sorted(self.folder.glob("checkpoint-*.pt"))

    def save(self, seed: int, mode: str, state: dict) -> None:
        """At the end of a round: a checkpoint, if the last one is old enough."""
        if time.monotonic() - self.saved_at >= SECONDS_BETWEEN:
            self.checkpoint(seed, mode, state)

    @clock.timed("checkpoints")
    def checkpoint(self, seed: int, mode: str, state: dict | None) -> None:
        """All that is needed to go on. state: fedppo.train's; None: the arm is finished."""
        content = {"seed": seed, "mode": mode, "rows": len(self.rows), "samples": self.samples,
                   "state": state, "fingerprints": self.fingerprints}
        os.fsync(self.lines().fileno())  # no checkpoint speaks of lines that a power cut takes
        # The end of an arm has as many lines as its last round, whose checkpoint it replaces.
        file = self.folder / f"checkpoint-{len(self.rows):08d}.pt"
        write_checkpoint(file, content)
        size = file.stat().st_size
        if size > LARGE and "size" not in self.warned:
            self.warned.add("size")
            tqdm.write(f"a checkpoint takes {size / 1e9:.1f} GB; the last two are kept in "
                       f"{self.folder} until the run is finished")
        for old in self.checkpoints()[:-2]:
            old.unlink()
        self.saved_at = time.monotonic()

    def finished(self, seed: int, mode: str) -> bool:
        """Whether a resumed run has this arm complete, its agents saved."""
        rows = sum((row["seed"], row["mode"]) == (seed, mode) and row["update"] > 0
                   for row in self.rows)
        complete = rows == self.agents[mode] * self.settings.rounds * self.settings.updates
        going_on = (self.last.get("seed"), self.last.get("mode")) == (seed, mode)
        return complete and not (going_on and self.last["state"])

    def begin(self, seed: int, mode: str) -> dict | None:
        """The arm's training begins now -> what fedppo.train goes on from, if the last checkpoint
        is of this arm: given once."""
        self.bar.unpause()  # the time left is that of training, without what prepares it
        self.bar.set_description(f"{mode} seed {seed}")
        self.since = time.monotonic()
        if (self.last.get("seed"), self.last.get("mode")) != (seed, mode):
            self.bar.set_description(f"{mode} seed {seed}, judging the start")
            return None
        state, self.last = self.last["state"], {"rows": 0}
        return state

    def go_back(self) -> None:
        """To the last checkpoint that can be used; later lines are dropped. Raises UserError."""
        path, unusable = self.folder / "metrics.jsonl", {}
        content = path.read_bytes() if path.exists() else b""
        lines = content.split(b"\n")[:-1]  # half a last one is dropped
        for file in reversed(self.checkpoints()):
            try:
                last = read_checkpoint(file)
                rows = [json.loads(line) for line in lines[:last["rows"]]]
                if len(rows) < last["rows"]:
                    raise ValueError(f"metrics.jsonl has {len(rows)} of the {last['rows']} lines "
                                     "it speaks of")
            except Exception as error:  # damage shows in many ways
                text = " ".join(str(error).split())[:100]
                unusable[file] = f"{type(error).__name__}: {text}"
                continue
            self.last, self.rows, self.samples = last, rows, last["samples"]
            self.fingerprints = last["fingerprints"]
            break
        else:
            if unusable:
                every = [f"{file} cannot be used ({why})" for file, why in unusable.items()]
                raise UserError(f"{'; '.join(every)}: there is no other checkpoint")
            if len(lines) > sum(self.agents.values()):
                print(f"warning: no checkpoint in {self.folder}: it starts over, and {len(lines)} "
                      "lines are dropped")
        for file, why in unusable.items():
            print(f"warning: {file} cannot be used ({why}); the run goes on from the checkpoint "
                  "before it")
            file.rename(file.with_suffix(".damaged"))
        for file in self.folder.glob("*.tmp"):
            file.unlink()

    def check_models(self, task: str, fingerprint: torch.Tensor) -> None:
        """A resumed run must fit the reward models that it was started with. Raises UserError."""
        now = {"scores": fingerprint, "device": self.settings.device}
        then = self.fingerprints.setdefault(task, now)
        same = then["scores"].shape == fingerprint.shape
        if same and torch.allclose(then["scores"], fingerprint, atol=1e-2):
            return
        if then["device"] == now["device"]:
            raise UserError("the reward models fitted now differ from those that the run was "
                            "started with: continue it on the data, version and machine that it "
                            "was started on")
        # Rounding can make other samples, and so other scores of the same models.
        tqdm.write(f"warning: reward models fitted on {now['device']} give other scores than those "
                   f"fitted on {then['device']}, with which the run was started")

    # ---- the end of an arm, and of the run

    @clock.timed("agents saved")
    def save_agents(
        self, seed: int, mode: str, models: dict, tokenizer, forbidden: torch.Tensor, s: Settings
    ) -> None:
        """Every agent's policy as a folder; then the arm is finished. s: the arm's settings."""
        for index, model in models.items():
            folder = self.folder / "agents" / f"{mode}-seed{seed}-agent{index}"
            save_agent(folder, model, tokenizer, forbidden, s)
            base = s.model[index % len(s.model)]
            rows = [row for row in self.rows
                    if (row["mode"], row["seed"], row["agent"]) == (mode, seed, index)]
            card = model_card(f"Agent {index}, {mode}, seed {seed}", s, base, rows)
            write_text(folder / "README.md", card)
        self.checkpoint(seed, mode, None)

    def finish(self) -> str:
        """Write what is made of the metrics -> the text to print."""
        self.bar.close()
        self.lines()  # which has no line of what was done and not saved
        summary = plot.summarise(self.rows)
        write_text(self.folder / "samples.md", samples_page(self.samples, self.settings))
        picture, _ = clock.timed("picture")(plot.draw)([self.folder], self.folder / "curves.png")
        summary["seconds"] = clock.read()
        # Last of all: it marks the run as finished.
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        for file in self.folder.glob("checkpoint-*"):  # damaged ones too: nothing needs them now
            file.unlink()
        parts = sorted(summary["seconds"].items(), key=lambda part: -part[1])
        spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in parts if seconds >= 0.5)
        lines = [plot.table(summary), "", f"seconds   {spent}", f"picture   {picture}",
                 f"samples   {self.folder / 'samples.md'}", f"agents    {self.folder / 'agents'}"]
        s = self.settings
        if "isolated" not in s.mode:
            modes = ["isolated", *s.mode, *(["fedavg"] if len(s.model) == 1 else [])]
            again = program("fedppo.py", *as_flags(s), "--mode", *dict.fromkeys(modes))
            lines.append(f"baselines {again}")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(path: Path, content: dict) -> None:
    """Plain dicts, lists and tensors as one file, under a temporary name first. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch's own writer reports a full disk so
        temporary.unlink(missing_ok=True)
        number = getattr(error, "errno", None) or errno.ENOSPC
        text = f"no checkpoint can be written ({' '.join(str(error).split())[:100]})"
        raise OSError(number, text, str(path)) from None
    replace(temporary, path)


def read_checkpoint(path: Path) -> dict:
    """What write_checkpoint wrote; nothing is unpickled into code. Raises an exception if damaged.

    torch.save writes a zip file, whose records carry checksums that torch.load does not look at.
    """
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():
            raise ValueError(f"its record {damaged} does not match its checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------------------- files


def write_text(path: Path, text: str) -> None:
    """All of it or, if the disk is full or the process is killed, what was there before."""
    temporary = path.with_suffix(".tmp")
    try:
        # Under an ASCII locale a path that the user gave can hold what is no letter.
        temporary.write_text(text, encoding="utf-8", errors="replace")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    replace(temporary, path)


def replace(temporary: Path, path: Path) -> None:
    """Give a complete file its name; both are on the disk when this returns."""
    sync(temporary)
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        sync(path.parent)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path):
    """The file, open, and kept from other processes until it is closed. Raises UserError."""
    file = path.open(encoding="utf-8")
    try:
        import fcntl  # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        raise UserError(f"{path.parent} is in use by a run that has not ended") from None
    return file


def tensorboard() -> type:
    """The writer of event files, if there is one. Raises UserError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") \
            from None
    return SummaryWriter


def new_folder(s: Settings) -> Path:
    """The run's own empty folder. Raises UserError."""
    name = s.name or f"{'-'.join(s.mode)}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(s.out) / name
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not empty: choose another --name, or continue "
                            f"it with --resume {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").touch()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another "
                        "--out") from None
    return folder


def describe(s: Settings, reason: str, modes: dict[str, dict], deals: dict) -> dict:
    """config.json: what ran, on what, and why this preset."""
    commit = None  # no git, or not a checkout of its own
    if (load.HOME / ".git").exists() and shutil.which("git"):
        words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        asked = subprocess.run(words, cwd=load.HOME, capture_output=True, text=True, check=False)
        commit = asked.stdout.strip() or None
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "datasets", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"settings": dataclasses.asdict(s), "preset": {"choice": s.preset, "reason": reason},
            "modes": modes, "deals": deals, "commit": commit,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions,
            "hardware": {"machine": platform.machine(), "system": platform.system(),
                         "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}}


def save_agent(folder: Path, model, tokenizer, forbidden: torch.Tensor, s: Settings) -> None:
    """A policy as a Hugging Face directory whose generation settings repeat the sampler's."""
    from safetensors import SafetensorError
    from transformers import GenerationConfig
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=s.temperature, top_k=0, max_new_tokens=s.response_length,
        max_length=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        suppress_tokens=forbidden.nonzero()[:, 0].tolist())
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how a full disk shows there
        raise OSError(errno.ENOSPC, str(error)[:100], str(folder)) from None
    tokenizer.save_pretrained(folder)


def model_card(title: str, s: Settings, base: str, rows: list[dict]) -> str:
    """README.md of an agent's folder; s: the settings of its mode; base: its model; rows: its own
    lines of metrics, the first of which is from before training."""
    before, after = rows[0], rows[-1]
    measured = [["", "before", "after"]]
    for name, key in (("judge's score on held-out prompts", "judge"),
                      ("the same, on its own splits", "judge_own"),
                      ("own reward (z-score), of the last rollout", "reward"),
                      ("KL to the initial policy, nats per response, of it", "kl_initial")):
        if after[key] is not None:
            measured.append([name, *("–" if row[key] is None else f"{row[key]:.2f}"
                                     for row in (before, after))])
    accuracy = before["reward_accuracy"]
    known = "" if accuracy is None else (
        f"Its reward model is right on {accuracy:.0%} of held-out pairs. ")
    apart = "has paid the agent too" if s.judge == s.reward else "took no part in training"
    judged = "" if s.judge == "none" else f"The judge, `{show(s.judge)}`, {apart}."
    settings = {name: show(value) for name, value in dataclasses.asdict(s).items()
                if name not in ("mode", "seeds", "out", "name", "device", "threads")}
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
        f"# {title}", "",
        f"A policy trained by Federated PPO from `{base}` on `{show(s.dataset)}`: {s.rounds} "
        f"round(s) of {s.updates} update(s). {known}{judged}", "",
        *markdown_table(measured[0], measured[1:]), "", "```python",
        "from transformers import pipeline", "",
        'generate = pipeline("text-generation", "PATH OF THIS FOLDER")', "```", "",
        "It can have learned its reward model's errors, and can leak what it has memorised of its "
        "agent's data. The last rollout is of the policy before its last update.", "",
        "<details><summary>All settings</summary>", "",
        *markdown_table(["setting", "value"], [[name, f"`{value}`"] for name, value in
                                               settings.items()]), "", "</details>", ""])


def samples_page(samples: dict[str, list[dict]], s: Settings) -> str:
    """samples.md: for the first seed, a row per prompt, a column per mode and agent."""
    columns: dict[str, list[dict]] = {}
    for name, answers in samples.items():
        mode, seed, agent, when = name.split()
        if int(seed) != s.seeds[0]:
            continue
        base = s.model[int(agent) % len(s.model)]
        before = "before" if len(s.model) == 1 else f"before, {base}"
        columns.setdefault(before if when == "before" else f"{mode}, agent {agent}", answers)
    columns = dict(sorted(columns.items(), key=lambda column: not column[0].startswith("before")))
    rows = [[answers[n]["prompt"] for answers in list(columns.values())[:1]] +
            [sample_cell(answers[n]) for answers in columns.values()]
            for n in range(len(next(iter(columns.values()))))]
    return "\n".join(["# The same prompts before and after training", "",
                      f"Seed {s.seeds[0]}, sampled at temperature {s.temperature:g}. ⏹ marks a "
                      "response that ended by itself; a number is the judge's score.", "",
                      *markdown_table(["prompt", *columns], rows), ""])


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table; a cell may hold any text."""
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |"
            for row in cells]


def sample_cell(sample: dict) -> str:
    score = "" if sample["judge"] is None else f" **{sample['judge']:.2f}**"
    return f"{sample['response']}{' ⏹' if sample['ended'] else ''}{score}"


# ------------------------------------------------------------------------------------- the process


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with the signal's number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def print_anything() -> None:
    """A terminal that cannot show a letter shows a question mark: it is no reason to stop."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def stoppable():
    """In here SIGINT (Ctrl-C) and SIGTERM raise Stopped, where this is the main thread."""
    def stop(number: int, frame) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():  # no handler can be set there
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

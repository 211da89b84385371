"""Federated PPO for RLHF: N language-model agents that exchange policies, never data.

    python fedppo.py --agents 4 --mode federated

In reading order
    1. Settings               one frozen dataclass: every default, unit and source; the command line is made from it
    2. processes              side_by_side: independent jobs in forked copies of this process
    3. the world              load the model and the data; a Task is what one seed's agents own
    4. Agent                  policy, optimizer, prompts, reward, random streams: all that one participant keeps
    5. exchange, train        the algorithm box: exchange -> cooperate -> local PPO -> log; who is absent is left out
    6. preflight              the checks that catch what silently ruins PPO on this model and data
    7. files                  what a run leaves behind
    8. main                   command line to exit code

One round: every agent freezes a copy of its policy and sends it; agent i combines what it received with row i of the
communication matrix W into a cooperative reference; then it does local PPO with beta KL(policy || reference).

Dimension key: N agents, K references, B batch, Q prompt tokens, T response tokens, V vocabulary.

Departures from the papers
    D1  This is a simulation on one machine: what a federation learns, not that it is secure. A policy can leak what it
        has memorised.
    D2  `fedavg` averages policies only (1602.05629 averages the learner): value heads and Adam moments stay local.
    D3  `centralized` is one agent with N times the batch and the same number of updates, so the same total episodes.
    D4  The KL reference of `isolated` moves: it is the agent's own copy from the start of the round. `--anchor 1` gives
        classic PPO with a fixed reference.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import json
import mmap
import multiprocessing.connection
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import graphs
import kl
import plot
import ppo_core
from data import UserError

HERE = Path(__file__).resolve().parent
MODES = ("isolated", "federated", "fedavg", "centralized")
FITTED = ("private", "shared", "ensemble")  # rewards that are models fitted to the agents' preference pairs

# -------------------------------------------------------------------------------------------------------- settings


def setting(tiny, help: str, *, pythia=None, group: str, choices: tuple = ()):
    """A field of Settings: its value in the preset tiny, and in pythia-70m where that differs."""
    meta = {"help": help, "group": group, "choices": choices, "pythia-70m": tiny if pythia is None else pythia}
    return dataclasses.field(default=tiny, metadata=meta)


@dataclass(frozen=True)
class Settings:
    """All settings of a run: the one place of defaults, of the command line and of its help.

    Sources: tiny from a prototype, with self_weight and reward_lr checked by measurement, and beta and lr those that
    benchmarks/study.py chose for `federated` (near the best of `isolated` too; with --merge 0.5 and 1e-3 are better);
    pythia-70m from OpenAI's 2019 style tasks (1909.08593 and its code) and the last published TRL example, not
    measured here.
    """

    agents: int = setting(4, "number of agents N", group="run")
    mode: tuple[str, ...] = setting(("federated",), "one or more, run one after the other on the same seeds and data",
                                    group="run", choices=MODES)
    seeds: tuple[int, ...] = setting((0,), "one or more; a seed redraws which rows and prompts each agent gets, "
                                     "evaluation prompts, reward models and sampling",
                                     group="run")
    preset: str = setting("auto", "model, data and hyperparameters together; auto: pythia-70m where there is a GPU and "
                          "the model can be had, or where another --model or --dataset is named, else tiny",
                          group="run", choices=("auto", "tiny", "pythia-70m"))
    out: str = setting("runs", "folder of all runs", group="run")
    name: str = setting("", "this run's folder inside --out (default: the modes and the time)", group="run")
    resume: str = setting("", "folder of an interrupted run to continue, with the settings it has", group="run")
    save_every: int = setting(1, "rounds between two checkpoints, of which the last two are kept: each holds N "
                              "policies with Adam's moments", group="run")
    check: bool = setting(False, "only run the preflight checks, on the first seed", group="run")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: cuda where there is one, else cpu", group="run")
    threads: int = setting(1, "CPU threads of torch; 0: torch decides. One is best for a tiny model; results are equal "
                           "to the bit only for equal numbers", pythia=0, group="run")
    workers: int = setting(0, "processes in which agents train side by side; the results are those of one, to the bit. "
                           "More than one needs Linux, no GPU and --threads 1; 0: there one per core, else one; one "
                           "also with a --reward or --judge of your own, whose state and connections a copy may break",
                           group="run")
    dtype: str = setting("float32", "of the policies' matrix products; the weights are float32 in any case. With "
                         "bfloat16 log-probs have errors, of about 0.01 on the model of tiny and more where logits are "
                         "large", group="run",
                         choices=("float32", "bfloat16"))

    model: str = setting("tiny/model", "a causal LM: hub name or local folder", group="model and data",
                         pythia="EleutherAI/pythia-70m-deduped")
    dataset: str = setting("tiny/data", "preference pairs: hub name, save_to_disk folder, folder of "
                           ".parquet or .jsonl, or .jsonl file", group="model and data",
                           pythia="trl-internal-testing/descriptiveness-sentiment-trl-style")
    splits: tuple[str, ...] = setting((), "splits to use (default: all)", group="model and data")
    shards: str = setting("split", "how data is dealt: iid, or each agent its own splits (tiny: topics)",
                          pythia="iid", group="model and data", choices=("iid", "split"))
    pairs: int = setting(200, "preference pairs per agent for its reward model", pythia=1000, group="model and data")
    eval_prompts: int = setting(128, "held-out prompts that the judge scores responses to", group="model and data")
    judge: str = setting("tiny/judge.py:score", "FILE.py:function(prompts, responses, ended) -> "
                         "scores; the directory of a sequence-classification model; heldout: a reward model fitted to "
                         "pairs that no agent has; none", pythia="heldout", group="model and data")

    reward: str = setting("private", "private: each agent fits its own pairs; shared: one model on all pairs, or "
                          "ensemble: the mean of all private models, for every agent, both not private; or "
                          "FILE.py:function or a directory as for --judge", group="reward")
    reward_lr: float = setting(2e-3, "Adam learning rate of the reward model, linear to 0", pythia=2e-5, group="reward")
    reward_epochs: int = setting(4, "passes over the agent's pairs", pythia=2, group="reward")
    reward_batch: int = setting(16, "pairs per gradient step", group="reward")
    reward_pooling: str = setting("mean", "what the scalar head reads", pythia="last", group="reward",
                                  choices=("mean", "last"))
    response_eos: bool = setting(True, "preference texts shorter than --response-length have ended (EOS is appended); "
                                 "off where the data's responses were cut", pythia=False, group="reward")
    missing_eos_penalty: float = setting(1.0, "subtracted from the normalised score of a response without EOS",
                                         pythia=0.0, group="reward")

    rounds: int = setting(10, "communication rounds", group="federation")
    updates: int = setting(4, "local PPO updates per round", group="federation")
    rule: str = setting("geometric", "how references are combined (see kl.py)", group="federation",
                        choices=("sum", "geometric", "arithmetic", "weights"))
    topology: str = setting("self", f"communication matrix: {', '.join(kl.MATRICES)} or FILE.json (N rows of N "
                            "weights, normalised by row)", group="federation")
    self_weight: float = setting(0.4, "weight of an agent's own reference in self, ring and star", group="federation")
    anchor: float = setting(0.0, "weight of the initial policy in every reference, 0 to 1", group="federation")

    participation: float = setting(1.0, "probability that an agent takes part in an exchange; an absent one trains on, "
                                   "and neither sends nor receives", group="federation")
    merge: bool = setting(False, "at each exchange an agent's policy itself becomes the average of the received "
                          "weights, by its row of the matrix, and goes on from there (off: it hears of the others "
                          "through the penalty alone)", group="federation")
    outlier: float = setting(0.0, "leave out a peer whose policy is more than this many times as far from the agent's "
                             "own as the median peer's, by KL on the agent's own prompts; 0: trust every peer",
                             group="federation")

    batch: int = setting(32, "episodes per PPO update and agent", pythia=64, group="PPO")
    response_length: int = setting(20, "longest response, in tokens", pythia=24, group="PPO")
    temperature: float = setting(1.0, "of sampler, policy and references alike", pythia=0.7, group="PPO")
    epochs: int = setting(2, "passes over a rollout (1707.06347)", pythia=4, group="PPO")
    minibatches: int = setting(2, "gradient steps per pass", pythia=1, group="PPO")
    micro_batch: int = setting(32, "most rows in one forward; memory only, results to rounding; 0: 4 on a CPU, else 64",
                               pythia=0, group="PPO")
    lr: float = setting(5e-4, "Adam learning rate (eps 1e-5, betas 0.9, 0.99)", pythia=1e-5, group="PPO")
    lr_schedule: str = setting("constant", "of the learning rate over the whole run", pythia="linear", group="PPO",
                               choices=("constant", "linear"))
    clip: float = setting(0.2, "epsilon of the clipped objective (1707.06347, eq. 7)", group="PPO")
    value_clip: float = setting(0.2, "largest move of a value in one update", group="PPO")
    vf_coef: float = setting(0.1, "c_v, weight of the value loss", group="PPO")
    gamma: float = setting(1.0, "discount per token", group="PPO")
    lam: float = setting(0.95, "lambda of GAE (1506.02438)", group="PPO")
    max_grad_norm: float = setting(1.0, "gradient norm is clipped here", group="PPO")

    beta: tuple[float, ...] = setting((0.25,), "KL coefficient, score per nat: one, or one per --mode in its order",
                                      pythia=(0.05,), group="KL penalty")
    penalty: str = setting("loss", "where KL is charged; both: exact in the loss, later states' in the reward",
                           group="KL penalty", choices=("loss", "reward", "both"))
    estimator: str = setting("auto", "of KL; auto: exact in the loss, k1 in the reward. k3 in the loss follows the "
                             "gradient of KL(reference||policy)", group="KL penalty",
                             choices=("auto", *kl.ESTIMATORS))
    allow_wrong_estimator: bool = setting(False, "accept an estimator where its gradient is not the KL's",
                                          group="KL penalty")
    adaptive_kl: bool = setting(False, "adapt beta to --kl-target (1909.08593); as references move, KL restarts near 0 "
                                "each round", group="KL penalty")
    kl_target: float = setting(6.0, "target of adaptive KL, nats per response", group="KL penalty")
    kl_horizon: float = setting(10000.0, "horizon of adaptive KL, episodes", group="KL penalty")


WRONG_ESTIMATORS = {
    ("loss", "k1"): "k1 in the loss has an expected gradient of 0: it adds noise and pulls nowhere; use exact or k2",
    ("reward", "k2"): "k2 in the reward optimises E[x^2/2] - KL(policy||reference) at each state, which has no "
                      "first-order pull toward the reference; use k1",
    ("reward", "k3"): "k3 in the reward optimises KL(policy||reference) - KL(reference||policy) at each state, which "
                      "has no first-order pull toward the reference; use k1",
    ("reward", "exact"): "exact KL in the reward misses the current token, since KL(s_t) does not depend on a_t; use "
                         "k1, or --penalty both",
}


def parse(argv: list[str]) -> tuple[Settings, str]:
    """Command line -> (settings with the preset filled in, why this preset). Raises UserError."""
    parser = argparse.ArgumentParser("fedppo.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                                     usage="python fedppo.py [--agents N] [--mode MODE ...] [flags below]")
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message} (see --help)"))
    groups: dict[str, typing.Any] = {}
    for field in dataclasses.fields(Settings):
        group = field.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group))
        many = typing.get_origin(field.type) is tuple
        tiny, pythia = _show(field.default), _show(field.metadata["pythia-70m"])
        shown = tiny if tiny == pythia else f"tiny: {tiny}; pythia-70m: {pythia}"
        options = {"help": f"{field.metadata['help']} [{shown}]".replace("%", "%%"), "default": argparse.SUPPRESS}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": typing.get_args(field.type)[0] if many else field.type, "nargs": "+" if many else None,
                        "choices": field.metadata["choices"] or None,
                        "metavar": None if field.metadata["choices"] else field.name.upper()}
        groups[group].add_argument("--" + field.name.replace("_", "-"), **options)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    for name in ("model", "dataset", "judge", "reward"):  # the user's own tiny/... is not the embedded one
        if Path.cwd() != HERE and given.get(name, "").startswith("tiny/") and Path(given[name].split(":")[0]).exists():
            given[name] = os.path.join(".", given[name])
    if given.get("resume"):
        return _resumed(given)
    preset, reason = choose_preset(given)
    values = {f.name: f.default if preset == "tiny" else f.metadata["pythia-70m"] for f in dataclasses.fields(Settings)}
    settings = Settings(**(values | given | {"preset": preset}))
    if preset == "tiny" and "judge" not in given and not embedded(settings.dataset):
        settings = dataclasses.replace(settings, judge="heldout")
        reason += "; the tiny world's judge does not know this dataset, so a held-out reward model judges"
    settings = replace_auto(settings)
    check_settings(settings)
    return settings, reason


def replace_auto(s: Settings) -> Settings:
    """Decide what was left to the program."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    estimator = "k1" if s.penalty == "reward" else "exact"
    s = dataclasses.replace(s, device=device if s.device == "auto" else s.device,
                            estimator=estimator if s.estimator == "auto" else s.estimator)
    return dataclasses.replace(s, micro_batch=s.micro_batch or (4 if s.device == "cpu" else 64))


def _show(value) -> str:
    value = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return str(value) if value != "" else "none"


def at_home(path: str) -> str:
    """A path of the embedded world, tiny/..., from wherever the program is called; any other path as it is."""
    return str(HERE / path) if path.startswith("tiny/") else path


def _resumed(given: dict) -> tuple[Settings, str]:
    """The settings of the run to continue; a flag that says otherwise is an error (but for those in `movable`)."""
    movable = ("device", "workers")  # a run may go on elsewhere
    try:
        config = json.loads((Path(given["resume"]) / "config.json").read_text())
        values = {name: tuple(value) if isinstance(value, list) else value
                  for name, value in config["settings"].items()}
        settings = Settings(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume {given['resume']}: no readable config.json of a run ({error})") from None
    if (Path(given["resume"]) / "summary.json").exists():
        raise UserError(f"--resume {given['resume']}: this run is finished, its results are in there; more rounds are "
                        "a run of their own")
    for name, value in given.items():
        decided = value == "auto" or (name, value) == ("micro_batch", 0)  # by the program, as it was
        if name not in ("resume", *movable) and not decided and value != values[name]:
            raise UserError(f"--{name.replace('_', '-')} {_show(value)} differs from the run's {_show(values[name])}: "
                            "--resume continues with the settings in its config.json")
    for name in ("judge", "reward"):  # a folder can come from elsewhere: code that it names is not run
        if own_code(values[name]) and name not in given:
            raise UserError(f"--resume {given['resume']}: the run's --{name} is the function {values[name]}; a folder "
                            "is not trusted to name code, so give the flag again")
    settings = dataclasses.replace(settings, **{name: given[name] for name in ("resume", *movable) if name in given})
    if "workers" not in given and not can_fork(settings):
        settings = dataclasses.replace(settings, workers=0)
    try:
        settings = replace_auto(settings)
        check_settings(settings)
        if communication_matrix(settings).tolist() != config["matrix"]:
            raise UserError(f"--resume {given['resume']}: {settings.topology} is no longer the matrix that the run was "
                            "started with")
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"--resume {given['resume']}: its config.json is not one of this version ({error})") from None
    return settings, "from the resumed run"


def embedded(path: str) -> bool:
    """Whether a model or dataset is that of the tiny world."""
    return HERE / "tiny" in Path(at_home(path)).resolve().parents


def own_code(spec: str) -> bool:
    """Whether a reward or judge is a function of the user's."""
    return ".py:" in spec and not embedded(spec.rpartition(":")[0])


def to_resume(s: Settings, folder: Path | str) -> list[str]:
    """The flags that continue a run."""
    flags = ["--resume", str(folder)]
    for flag, spec in {"--reward": s.reward, "--judge": s.judge}.items():
        flags += [flag, spec] * own_code(spec)
    return flags


def choose_preset(given: dict) -> tuple[str, str]:
    """Flags given explicitly -> (preset, the reason in words). A named model or dataset is never replaced."""
    if given.get("preset", "auto") != "auto":
        return given["preset"], "asked for"
    named = [name for name in ("model", "dataset") if name in given][:1]  # the model decides, if it is named
    if named and embedded(given[named[0]]):
        return "tiny", f"--{named[0]} is the embedded one"
    if named:
        return "pythia-70m", f"--{named[0]} is given, so the settings for real text apply"
    if not torch.cuda.is_available() or given.get("device") == "cpu":
        return "tiny", "no GPU"
    if data.online():
        return "pythia-70m", "there is a GPU and the hub answers"
    from huggingface_hub import try_to_load_from_cache
    model = Settings.__dataclass_fields__["model"].metadata["pythia-70m"]
    if any(isinstance(try_to_load_from_cache(model, file), str) for file in ("model.safetensors", "pytorch_model.bin")):
        return "pythia-70m", "there is a GPU and the model is cached"
    return "tiny", "there is a GPU, but the model is not cached and the hub does not answer"


def check_settings(s: Settings) -> None:
    """Refuse what cannot work, before anything is loaded. Raises UserError."""
    positive = ("agents", "save_every", "pairs", "eval_prompts", "reward_lr", "reward_epochs", "reward_batch",
                "rounds", "updates", "batch", "response_length", "temperature", "epochs", "minibatches", "micro_batch",
                "lr", "clip", "value_clip", "max_grad_norm", "kl_target", "kl_horizon")
    fractions = ("self_weight", "anchor", "participation", "gamma", "lam")
    flags = {field.name: "--" + field.name.replace("_", "-") for field in dataclasses.fields(s)}
    for name in positive:
        if not 0 < getattr(s, name) < float("inf"):
            raise UserError(f"{flags[name]} must be positive, not {getattr(s, name)}")
    for name in fractions:
        if not 0 <= getattr(s, name) <= 1:
            raise UserError(f"{flags[name]} must lie between 0 and 1, not {getattr(s, name)}")
    for name in ("threads", "workers", "vf_coef", "missing_eos_penalty", "outlier"):
        if not 0 <= getattr(s, name) < float("inf"):
            raise UserError(f"{flags[name]} must not be negative, and is {getattr(s, name)}")
    if len(s.beta) not in (1, len(s.mode)) or not all(0 <= beta < float("inf") for beta in s.beta):
        raise UserError(f"--beta {_show(s.beta)} must be one number, or one for each mode of {_show(s.mode)}, and none "
                        "of them negative")
    for name in ("mode", "seeds", "splits"):
        if len(set(getattr(s, name))) < len(getattr(s, name)):
            raise UserError(f"{flags[name]} names one of its values twice: {_show(getattr(s, name))}")
    if s.batch % s.minibatches:
        raise UserError(f"--batch {s.batch} cannot be cut into --minibatches {s.minibatches} of equal size")
    if s.merge and "federated" not in s.mode:
        raise UserError(f"--merge merges what --mode federated exchanges, and has no part in {_show(s.mode)}")
    if s.outlier and "federated" not in s.mode:
        raise UserError(f"--outlier chooses among what --mode federated exchanges, and has no part in {_show(s.mode)}")
    if 0 < s.outlier < 1:
        raise UserError(f"--outlier {s.outlier:g} would leave out the median peer: it must be at least 1, or 0 for off")
    if s.penalty == "both" and s.gamma != 1:
        raise UserError("--penalty both is the gradient of the undiscounted sequence KL: it needs --gamma 1")
    if s.agents > 1000:
        raise UserError(f"--agents {s.agents}: this is a simulation on one machine, for at most 1000")
    if s.penalty == "both" and s.estimator != "exact":
        raise UserError("--penalty both is the exact KL in both places: it takes no other --estimator")
    wrong = WRONG_ESTIMATORS.get((s.penalty, s.estimator))
    if wrong and not s.allow_wrong_estimator:
        raise UserError(f"{wrong} (or insist with --allow-wrong-estimator)")
    if s.adaptive_kl and not (min(s.beta) > 0 and s.batch * s.agents < 5 * s.kl_horizon):
        raise UserError("--adaptive-kl needs a positive --beta and a --kl-horizon of more than batch * agents / 5")
    if s.workers > 1 and not can_fork(s):
        raise UserError(f"--workers {s.workers} needs Linux, a machine without a GPU and --threads 1")
    if s.name and (Path(s.name).name != s.name or s.name == ".."):
        raise UserError(f"--name {s.name!r} must be a plain folder name; --out says where it goes")
    try:
        torch.zeros(1, device=s.device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {s.device} is not to be had on this machine") from None
    for flag, name in {"--model": at_home(s.model), "--dataset": at_home(s.dataset)}.items():
        local = Path(name).suffix in (".jsonl", ".json") or name.startswith(("/", ".", "~"))  # no name of the hub's
        if local and not Path(name).exists():
            raise UserError(f"{flag} {name}: there is no such file or folder")
    communication_matrix(s)


def communication_matrix(s: Settings) -> torch.Tensor:
    """W [N, N], rows summing to 1, by kind or from a JSON file whose rows are normalised. Raises UserError."""
    if s.topology in kl.MATRICES:
        return kl.communication_matrix(s.topology, s.agents, s.self_weight)
    try:
        matrix = torch.tensor(json.loads(Path(s.topology).read_text()), dtype=torch.float64)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--topology {s.topology!r} is none of {', '.join(kl.MATRICES)}, and no JSON matrix can be "
                        f"read from it: {error}") from None
    if matrix.shape != (s.agents, s.agents):
        shape = " x ".join(map(str, matrix.shape)) or "a number"
        raise UserError(f"--topology {s.topology}: the matrix is {shape}, and {s.agents} agents need {s.agents} x "
                        f"{s.agents}")
    sums = matrix.sum(1, keepdim=True)
    if not (torch.isfinite(sums) & (matrix >= 0)).all():
        raise UserError(f"--topology {s.topology}: weights must be finite, their sums too, and not negative")
    if (sums == 0).any():
        raise UserError(f"--topology {s.topology}: row {int((sums == 0).flatten().nonzero()[0])} is all zeros; an "
                        "agent that hears nobody has weight 1 on itself")
    return matrix / sums


# ------------------------------------------------------------------------------------------------------- processes


def can_fork(s: Settings) -> bool:
    """A forked copy has none of its parent's threads: neither a GPU's libraries nor OpenMP work without theirs."""
    return sys.platform == "linux" and s.threads == 1 and not torch.accelerator.is_available()


def workers(s: Settings) -> int:
    """In how many processes agents train at once. A user's own function may hold what no fork survives: then in one."""
    own = own_code(s.reward) or own_code(s.judge)
    return s.workers or (len(os.sched_getaffinity(0)) if can_fork(s) and not own else 1)


def side_by_side(jobs: list[Callable[[], typing.Any]], at_once: int) -> Iterator[typing.Any]:
    """Results of independent jobs, in the order of `jobs`: each in a forked copy of this process, `at_once` at a time.

    A copy sees all that is in memory when it begins, and what it changes is lost with it: the result alone comes back.
    One job, or one at a time, runs in this process when its turn comes. Raises what `in_a_copy` sends of a job's error,
    and UserError if its process was killed.
    """
    if min(at_once, len(jobs)) <= 1:
        yield from (job() for job in jobs)
        return
    context, waiting, running, results = multiprocessing.get_context("fork"), list(enumerate(jobs))[::-1], {}, {}
    try:
        for i in range(len(jobs)):
            while i not in results:
                while waiting and len(running) < at_once:
                    index, job = waiting.pop()
                    inlet, outlet = context.Pipe(duplex=False)
                    process = context.Process(target=in_a_copy, args=(job, outlet, os.getpid()), daemon=True)
                    process.start()
                    running[inlet] = index, process
                    outlet.close()  # else the end of the process would not end the pipe
                for inlet in multiprocessing.connection.wait(list(running)):
                    results[running[inlet][0]] = received(inlet)
                    running.pop(inlet)[1].join()
            result, error = results.pop(i)
            if error is not None:
                raise error
            yield result
    finally:
        for _, process in running.values():
            process.kill()
        for _, process in running.values():
            process.join()


def received(inlet: multiprocessing.connection.Connection) -> tuple[typing.Any, Exception | None]:
    """What a forked copy sent: the result of its job, or the exception that it raised."""
    with inlet:
        try:
            answer = inlet.recv_bytes()
        except (EOFError, OSError):  # the latter where it died while it sent
            return None, UserError("a worker process was killed, as a rule because memory was short: fewer --workers "
                                   "need less, also with --resume")
    return pickle.loads(answer)


def in_a_copy(job: Callable[[], typing.Any], outlet: multiprocessing.connection.Connection, parent: int) -> None:
    """The life of a forked copy: one job, whose result or exception is sent back.

    Errors that `main` knows come back as they are. Any other is a bug: its traceback, which would be lost, as text.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the parent, which tells (`Run.stop`) or kills
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it holds the run's lock, so must not outlive it
    if os.getppid() != parent:
        return
    try:
        answer = pickle.dumps((job(), None))
    except (UserError, FloatingPointError) as error:
        answer = pickle.dumps((None, error))
    except Exception:
        answer = pickle.dumps((None, RuntimeError(f"in a worker process\n{traceback.format_exc()}")))
    outlet.send_bytes(answer)


# ------------------------------------------------------------------------------------------------------- the world


def generator(seed: int, *name) -> torch.Generator:
    """The random stream called `name` of a seed: independent of all others, and of the order they are used in."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class World:
    """What all agents and seeds start from: the initial policy and the preference rows."""

    def __init__(self, s: Settings):
        self.settings, self.device = s, torch.device(s.device)
        self.model, self.tokenizer, self.forbidden = data.load_model(at_home(s.model), self.device)
        self.eos_id, self.pad_id = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self.initial = self.new_policy().requires_grad_(False)  # mu_0
        labelled = s.reward in FITTED or s.judge == "heldout"
        self.pairs, self.dropped = data.load_pairs(at_home(s.dataset), s.splits, labelled)
        prompts = list(dict.fromkeys(pair.prompt for pair in self.pairs))
        self.prompt_ids = dict(zip(prompts, data.encode_prompts(self.tokenizer, prompts), strict=True))
        if empty := [prompt for prompt, ids in self.prompt_ids.items() if not ids]:
            raise UserError(f"the prompt {empty[0][:40]!r} has no tokens in this model's vocabulary: remove such rows")
        context = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(self.prompt_ids, key=lambda prompt: len(self.prompt_ids[prompt]))
        if context and len(self.prompt_ids[longest]) + s.response_length > context:
            raise UserError(f"the prompt {longest[:40]!r} has {len(self.prompt_ids[longest])} tokens; with "
                            f"--response-length {s.response_length} that exceeds the model's context of {context}: "
                            "shorten or remove such rows, or lower --response-length")
        self.judge = None if s.judge in ("none", "heldout") else self._given(s.judge)
        self.given_reward = None if s.reward in FITTED else self._given(s.reward)

    def _given(self, spec: str) -> data.Scorer:
        """The user's judge or reward, called once now, so that it does not fail when reward models have been fitted."""
        scorer = data.load_scorer(at_home(spec), self.tokenizer, self.device)
        scorer(*self.batches(list(self.prompt_ids)[:2], self.initial, generator(0, "try"))[0])
        return scorer

    def new_policy(self) -> ppo_core.Policy:
        return ppo_core.Policy(copy.deepcopy(self.model), self.forbidden, getattr(torch, self.settings.dtype))

    def pair_ids(self, pairs: list[data.Pair]) -> list[tuple[list[int], list[int]]]:
        """Pairs as (prompt + chosen, prompt + rejected) ids, ending as generated responses do."""
        s = self.settings

        def text(pair: data.Pair, response: str) -> list[int]:
            return self.prompt_ids[pair.prompt] + data.encode_response(self.tokenizer, response, s.response_length,
                                                                       s.response_eos)
        return [(text(pair, pair.chosen), text(pair, pair.rejected)) for pair in pairs]

    def batches(self, prompts: list[str], policy: ppo_core.Policy, stream: torch.Generator) -> list[tuple]:
        """Responses of a policy to prompts, in batches of 64 -> [(prompt_ids, prompt_mask, response_ids, mask)]."""
        s, sampled = self.settings, []
        for start in range(0, len(prompts), 64):
            ids, mask = data.pad([self.prompt_ids[prompt] for prompt in prompts[start:start + 64]], self.pad_id,
                                 "left", self.device)
            sampled.append((ids, mask, *ppo_core.generate(policy, ids, mask, s.response_length,
                                                          temperature=s.temperature, eos_id=self.eos_id,
                                                          pad_id=self.pad_id, generator=stream)))
        return sampled


@dataclass(frozen=True)
class Task:
    """What one seed gives its agents: agent i owns shards[i] and scorers[i]; the judge and its prompts are held out."""

    seed: int
    shards: list[data.Shard]
    scorers: list[data.Scorer]
    accuracies: list[tuple[float, int] | None]  # of each agent's reward model, on so many held-out pairs
    eval_prompts: list[str]
    judge: data.Scorer | None
    judge_accuracy: tuple[float, int] | None
    probe: torch.Tensor  # [n] scorers' and judge's scores of some samples: a resumed run must fit the same models


def deal(world: World, seed: int) -> tuple[list[str], list[data.Shard], list[data.Pair]]:
    """One seed's evaluation prompts, shards and pairs for a held-out judge (data.make_shards). Raises UserError."""
    s = world.settings
    return data.make_shards(world.pairs, s.agents, s.shards, s.pairs if world.given_reward is None else 0,
                            s.eval_prompts, random.Random(f"{seed} shards"),
                            n_judge=max(2, len(world.pairs) // 4) if s.judge == "heldout" else 0)


def make_task(world: World, seed: int, pooled: bool) -> Task:
    """Deal the data and fit the reward models of a seed; pooled: all data to one agent (`centralized`)."""
    s = world.settings
    eval_prompts, shards, judge_pairs = deal(world, seed)
    judge, judge_accuracy = world.judge, None
    if s.judge == "heldout":
        n_heldout = min(256, max(1, len(judge_pairs) // 5))
        model, judge_accuracy = fit_reward(world, judge_pairs[n_heldout:], judge_pairs[:n_heldout],
                                           generator(seed, "judge"))
        sampled = world.batches(eval_prompts, world.initial, generator(seed, "evaluation"))
        judge, *_ = data.normalised(data.model_scorer(model), sampled)
    everything = data.pool(shards)
    shards = [everything] if pooled else shards
    fitted: list[tuple[data.Scorer, tuple | None]] = [(world.given_reward, None)] * len(shards)
    if world.given_reward is None:
        sources = [everything] if s.reward == "shared" else shards
        models = side_by_side([functools.partial(fit_reward, world, source.train, source.heldout,
                                                 generator(seed, i, "reward model"))
                               for i, source in enumerate(sources)], workers(s))
        fitted = [(data.model_scorer(model), accuracy) for model, accuracy in models]
        fitted *= len(shards) // len(fitted)  # a shared model serves every agent

    def sampled_for(i: int) -> list[tuple]:
        """Of the initial policy: what the reward of agent i is normalised on."""
        stream, own = generator(seed, i, "normalisation"), shards[i].prompts
        prompts = [own[k] for k in torch.randperm(len(own), generator=stream)[:256].tolist()]
        return world.batches(prompts, world.initial, stream)
    samples = list(side_by_side([functools.partial(sampled_for, i) for i in range(len(shards))], workers(s)))
    scorers = [data.normalised(scorer, own)[0] for (scorer, _), own in zip(fitted, samples, strict=True)]
    if s.reward == "ensemble":
        mean = data.mean_scorer(scorers)
        scorers = [data.normalised(mean, own)[0] for own in samples]
    scored = [scorer(*own[0]) for scorer, own in zip(scorers, samples, strict=True)]
    probe = torch.cat(scored + ([judge(*samples[0][0])] if judge else [])).cpu()
    return Task(seed, shards, scorers, [accuracy for _, accuracy in fitted], eval_prompts, judge, judge_accuracy, probe)


def fit_reward(world: World, train: list[data.Pair], heldout: list[data.Pair],
               stream: torch.Generator) -> tuple[data.RewardModel, tuple[float, int]]:
    """A reward model fitted to `train`, and its accuracy on `heldout` with their number."""
    s = world.settings
    model = data.RewardModel(world.model, s.reward_pooling, stream)
    data.fit_reward_model(model, world.pair_ids(train), world.pad_id, lr=s.reward_lr, epochs=s.reward_epochs,
                          batch=s.reward_batch, generator=stream)
    return model, (data.preference_accuracy(model, world.pair_ids(heldout), world.pad_id), len(heldout))


# ----------------------------------------------------------------------------------------------------------- agent


def new_optimizer(policy: ppo_core.Policy, s: Settings) -> torch.optim.Optimizer:
    return torch.optim.Adam(policy.parameters(), lr=s.lr, betas=(0.9, 0.99), eps=1e-5, fused=True)


class Agent:
    """One participant: what stands here is private and lives for the whole run; only copies of `policy` are sent."""

    def __init__(self, index: int, world: World, task: Task, batch: int, beta: float):
        s = world.settings
        self.index, self.world, self.settings, self.batch, self.first_beta = index, world, s, batch, beta
        self.policy = world.new_policy()
        self.scorer, self.prompts = task.scorers[index], task.shards[index].prompts
        self.optimizer = new_optimizer(self.policy, s)
        total = s.rounds * s.updates
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: 1 - done / total if s.lr_schedule == "linear" else 1.0)
        self.streams = {name: generator(task.seed, index, name) for name in
                        ("prompts", "sampling", "minibatches", "peers")}
        self.queue: list[int] = []  # prompts of this pass that are still to come
        self.received = 0  # bytes, at all exchanges so far
        self.row, self.missed = torch.ones(1), None  # of W in this round; whom it could not hear, in words
        self.done = 0  # updates behind it
        self.diverged: str | None = None  # where and why it was frozen
        self.adaptive = kl.AdaptiveKL(beta, s.kl_target, s.kl_horizon) if s.adaptive_kl else None

    @property
    def beta(self) -> float:
        return self.adaptive.coef if self.adaptive else self.first_beta

    def next_prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next B of the agent's prompts, every prompt once per pass -> ids, mask [B, Q], left-padded."""
        while len(self.queue) < self.batch:
            self.queue += torch.randperm(len(self.prompts), generator=self.streams["prompts"]).tolist()
        rows, self.queue = self.queue[:self.batch], self.queue[self.batch:]
        ids = [self.world.prompt_ids[self.prompts[row]] for row in rows]
        return data.pad(ids, self.world.pad_id, "left", self.world.device)

    def update(self, references: list[ppo_core.Policy], weights: torch.Tensor) -> dict[str, float]:
        """One PPO update against K references with weights [K] -> metrics (README: glossary).

        A loss or gradient that is not finite never reaches the weights: it freezes the agent for the rest of the run.
        """
        started = time.perf_counter()
        s, world, beta = self.settings, self.world, self.beta
        if self.diverged:
            self.done += 1
            return {"episodes": self.schedule.last_epoch * self.batch, "beta": beta}
        rollout = ppo_core.collect(self.policy, references, weights, world.initial, self.scorer, *self.next_prompts(),
                                   s, eos_id=world.eos_id, pad_id=world.pad_id, generator=self.streams["sampling"])
        mask = rollout.mask
        kl_sum = (rollout.kl * mask).sum(1).mean().item()
        metrics = {"lr": self.schedule.get_last_lr()[0], "beta": beta,
                   "reward": rollout.scores.mean().item(), "kl": kl_sum,
                   "kl_initial": (rollout.kl_initial * mask).sum(1).mean().item(),
                   "entropy": ppo_core.masked_mean(rollout.entropy, mask).item(),
                   "length": mask.sum(1).float().mean().item(),
                   "ended": ((rollout.response == world.eos_id) & mask.bool()).any(1).float().mean().item()}
        self.done += 1
        try:
            metrics |= ppo_core.optimise(self.policy, self.optimizer, rollout, weights, beta, s,
                                         self.streams["minibatches"])
        except FloatingPointError as error:
            self.diverged = (f"agent {self.index} diverged in update {self.done}: {error} (reward "
                             f"{metrics['reward']:.3g}, kl {kl_sum:.3g}); lower --lr or --beta")
            return {"episodes": self.schedule.last_epoch * self.batch, "beta": beta}
        self.schedule.step()
        if self.adaptive:
            self.adaptive.update(kl_sum, self.batch)
        return metrics | {"episodes": self.done * self.batch, "seconds": time.perf_counter() - started}

    def state_dict(self) -> dict:
        """All that changes in training, as tensors and plain values."""
        return {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(), "queue": self.queue, "received": self.received,
                "row": self.row, "missed": self.missed, "beta": self.beta, "done": self.done, "diverged": self.diverged,
                "streams": {name: stream.get_state() for name, stream in self.streams.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.queue, self.received, self.row = state["queue"], state["received"], state["row"]
        self.missed, self.done, self.diverged = state["missed"], state["done"], state["diverged"]
        if self.adaptive:
            self.adaptive.coef = state["beta"]
        for name, stream in self.streams.items():
            stream.set_state(state["streams"][name])


# ------------------------------------------------------------------------------------- the round loop, box by box


@dataclass(frozen=True)
class Message:
    """What an agent sends: its policy's weights and their SHA-256. No value head, no optimizer state, no data."""

    weights: dict[str, torch.Tensor]
    digest: str


def send(agent: Agent) -> Message:
    weights = {name: tensor.detach().clone() for name, tensor in agent.policy.model.state_dict().items()}
    return Message(weights, digest(weights))


def digest(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in weights.items():
        sha.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def fault(message: Message, own: dict[str, torch.Tensor]) -> str:
    """Why a message cannot be used by an agent whose policy has the weights `own`; "" if it can."""
    if digest(message.weights) != message.digest:
        return "does not match its hash"
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
              for weights in (message.weights, own)]
    if shapes[0] != shapes[1]:
        return "has another shape"
    if not all(torch.isfinite(tensor).all() for tensor in message.weights.values()):
        return "is not finite"
    return ""


@dataclass(frozen=True)
class Exchange:
    """What came of one exchange: this round's matrix [N, N], and per agent the bytes received and what it missed."""

    matrix: torch.Tensor
    received: list[int]
    missed: list[str | None]


@torch.no_grad()
def speaks(policy: ppo_core.Policy) -> bool:
    """Whether a policy has finite log-probs after one token: weights can be finite and still too large."""
    token = torch.zeros(1, 1, dtype=torch.long, device=policy.forbidden.device)
    return bool(torch.isfinite(policy(input_ids=token).logits.log_softmax(-1)[..., ~policy.forbidden]).all())


def exchange(agents: list[Agent], frozen: list[ppo_core.Policy], mode: str, matrix: torch.Tensor,
             present: list[bool]) -> Exchange:
    """Every agent that is present freezes a copy of its policy and sends it: nothing else leaves it.

    frozen: N policies that are overwritten here and then left alone until the next exchange. Under `fedavg` every
    policy becomes the plain average, which is also the reference until the next exchange (1602.05629). With `merge` an
    agent's policy becomes the average by its row of the matrix, and the references stay what was sent. An absent agent
    neither sends nor receives: it goes on with its own copy. A message with a fault is left out, and so is an agent
    that has diverged, or a policy that is an outlier among a receiver's peers (`outliers`).
    """
    reasons = deliver(agents, frozen, present)
    here = [i for i, agent in enumerate(agents) if present[i] and not agent.diverged]
    usable = [j for j, reason in enumerate(reasons) if not reason]
    if mode == "fedavg":
        matrix = torch.full_like(matrix, 1 / len(agents))
        average = kl.average_weights([frozen[j].model.state_dict() for j in usable], [1 / len(usable)] * len(usable)) \
            if usable else None
        for i in here if usable else ():
            agents[i].policy.model.load_state_dict(average)
            frozen[i].model.load_state_dict(average)
    rows, missed = [], []
    for i, agent in enumerate(agents):
        peers = {j: reasons[j] for j in range(len(agents)) if matrix[i, j] > 0 and i != j}
        if agent.settings.outlier and mode == "federated" and i in here:
            peers |= dict.fromkeys(outliers(agent, {j: frozen[j] for j in peers if j in usable}), "is an outlier")
        rows.append(without(matrix[i], i, [j for j, reason in peers.items() if reason or i not in here]))
        told = "; ".join(f"agent {j} {reason}" for j, reason in peers.items() if reason)
        missed.append((told if i in here else reasons[i]) or None)
        if agent.settings.merge and mode == "federated" and i in here:
            agent.policy.model.load_state_dict(
                kl.average_weights([policy.model.state_dict() for policy in frozen], rows[i]))
    # One average comes from a server; otherwise each peer that is heard and present sends its policy.
    copies = [(bool(usable) if mode == "fedavg" else sum(matrix[i, j] > 0 and i != j for j in here)) * (i in here)
              for i in range(len(agents))]
    distinct = {tensor.data_ptr(): tensor for tensor in frozen[0].model.state_dict().values()}  # tied weights: once
    size = sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
    own = torch.eye(len(agents), dtype=matrix.dtype)  # under fedavg all references are the one average
    return Exchange(own if mode == "fedavg" else torch.stack(rows), [int(n) * size for n in copies], missed)


def deliver(agents: list[Agent], frozen: list[ppo_core.Policy], present: list[bool]) -> list[str]:
    """Load what every agent sends into its frozen policy -> "", or why it cannot be used: then its own stands there."""
    reasons = []
    for agent, policy, here in zip(agents, frozen, present, strict=True):
        own = agent.policy.model.state_dict()
        reason = "diverged" if agent.diverged else "" if here else "absent"
        if not reason:
            message = send(agent)
            reason = fault(message, own)
        if not reason:
            policy.model.load_state_dict(message.weights)
            reason = "" if speaks(policy) else "has no finite log-probs"
        if reason:
            policy.model.load_state_dict(own)
        reasons.append(reason)
    return reasons


def without(row: torch.Tensor, own: int, left_out: list[int]) -> torch.Tensor:
    """A row of W [N] with weight 0 for those left out, normalised again; if nobody is left, all is its own."""
    if not left_out:
        return row
    row = row.clone()
    row[left_out] = 0
    return row / row.sum() if row.sum() > 0 else torch.eye(len(row), dtype=row.dtype)[own]


SAME = 0.01  # nats per token: policies nearer than this are not told apart, so that no noise makes an outlier


@torch.no_grad()
def outliers(agent: Agent, peers: dict[int, ppo_core.Policy]) -> list[int]:
    """Which peers' policies are much further from the agent's own than the median peer's.

    Distance: the exact KL(own||peer) per token, mean over the tokens of one batch of responses that the agent samples
    to prompts of its own, so that nothing private is shared. Of two peers the nearer one is the median; a single peer
    is never an outlier.
    """
    world, s, stream = agent.world, agent.settings, agent.streams["peers"]
    chosen = torch.randperm(len(agent.prompts), generator=stream)[:agent.batch].tolist()
    distances = []  # [K][number of batches of 64]
    for prompt, attention, response, mask in world.batches([agent.prompts[k] for k in chosen], agent.policy, stream):
        part = torch.cat([prompt, response], 1), torch.cat([attention, mask], 1), response, mask
        own, *others = (ppo_core.evaluate(policy, *part, s.temperature)[1]
                        for policy in (agent.policy, *peers.values()))  # [b, T, V]
        distances.append([ppo_core.masked_mean(kl.kl_exact(own, other), mask) for other in others])
    far = torch.tensor(distances).nan_to_num(nan=torch.inf).mean(0)  # [K]
    limit = agent.settings.outlier * max(SAME, far.median().item()) if peers else 0
    return [j for j, distance in zip(peers, far.tolist(), strict=True) if distance > limit]


def participants(s: Settings, seed: int, rnd: int, n_agents: int) -> list[bool]:
    """Who takes part in a round's exchange: each agent with probability --participation, by a stream of its own."""
    draws = torch.rand(n_agents, generator=generator(seed, rnd, "participation"))
    return (draws < s.participation).tolist() if s.participation < 1 else [True] * n_agents


def cooperate(frozen: list[ppo_core.Policy], row: torch.Tensor,
              world: World) -> tuple[list[ppo_core.Policy], torch.Tensor]:
    """Agent i's cooperative reference: row W_i [N] over the frozen policies -> (K references, their weights [K]).

    With anchor a the row becomes (1 - a) W_i, with weight a on the initial policy. References of weight 0 are left out.
    Under the rule `weights` the references are merged into one model here; the other rules combine log-probs, in kl.py.
    """
    anchor = world.settings.anchor
    candidates = [*frozen, world.initial]
    weights = torch.cat([(1 - anchor) * row, torch.tensor([anchor], dtype=row.dtype)])
    kept = [j for j, weight in enumerate(weights.tolist()) if weight > 0]
    references, weights = [candidates[j] for j in kept], weights[kept]
    if world.settings.rule == "weights" and len(kept) > 1:
        merged = world.new_policy().requires_grad_(False)
        merged.model.load_state_dict(kl.average_weights([policy.model.state_dict() for policy in references], weights))
        references, weights = [merged], torch.ones(1, dtype=row.dtype)
    return references, weights


def enrol(world: World, task: Task, mode: str) -> tuple[list[Agent], torch.Tensor]:
    """The agents of a mode, all from the initial policy, and their communication matrix W [N, N]."""
    s = world.settings
    n_agents, batch = (1, s.batch * s.agents) if mode == "centralized" else (s.agents, s.batch)
    beta = s.beta[s.mode.index(mode) if len(s.beta) > 1 else 0]
    alone = mode != "federated" or (s.anchor == 1 and not s.merge)  # no peer's policy is used, so none is sent
    matrix = torch.eye(n_agents, dtype=torch.float64) if alone else communication_matrix(s)
    return [Agent(i, world, task, batch, beta) for i in range(n_agents)], matrix


def train(world: World, task: Task, mode: str, run: "Run", saved: dict | None = None) -> list[Agent]:
    """One arm: all rounds of one mode on one seed -> its trained agents. saved: the checkpoint to continue from."""
    s = world.settings
    agents, matrix = enrol(world, task, mode)
    frozen = [world.new_policy().requires_grad_(False) for _ in agents]
    if saved:
        restore(agents, frozen, task, saved)
        end_if_all_diverged(agents)
    else:
        judged, samples = judge_agent(agents[0], task)  # they all start from one policy
        for agent in agents:
            run.samples[f"{mode} {task.seed} {agent.index} before"] = samples
            run.log(mode, task.seed, agent.index, 0, 0, judge=judged,
                    reward_accuracy=(task.accuracies[agent.index] or [None])[0])
    inside = bool(saved and saved["frozen"])  # of a round, whose exchange is behind it
    for rnd in range(min(agent.done for agent in agents) // s.updates, s.rounds):
        if not inside:
            result = exchange(agents, frozen, mode, matrix, participants(s, task.seed, rnd, len(agents)))
            for agent in agents:
                agent.row, agent.missed = result.matrix[agent.index], result.missed[agent.index]
                agent.received += result.received[agent.index]
        last = (rnd + 1) * s.updates
        for agent, metrics, samples in local_ppo(agents, frozen, last, task, run):
            if samples:
                run.samples[f"{mode} {task.seed} {agent.index} after"] = samples
            run.log(mode, task.seed, agent.index, rnd + 1, **metrics)
        inside = any(agent.done < last for agent in agents)
        if run.stop:
            run.checkpoint(mode, task, agents, frozen if inside else [])
            raise Stopped(run.stop)
        end_if_all_diverged(agents)
        give_back()
        if (rnd + 1) % s.save_every == 0 or rnd + 1 == s.rounds:
            run.checkpoint(mode, task, agents, [])
    return agents


def local_ppo(agents: list[Agent], frozen: list[ppo_core.Policy], last: int, task: Task,
              run: "Run") -> Iterator[tuple[Agent, dict, list[dict] | None]]:
    """Every agent's updates up to the number `last`, or to the one in which the run is asked to stop.

    -> (agent, metrics, samples if it was judged) of every update, agent by agent. Agents hear nothing of each other in
    here, so they can train side by side; then an agent is as its last update left it when its first one is given.
    """
    def updates(agent: Agent) -> Iterator[tuple[dict, list[dict] | None]]:
        references, weights = cooperate(frozen, agent.row, agent.world)
        while agent.done < last and not run.stop:
            metrics = agent.update(references, weights)
            judged, samples = judge_agent(agent, task) if agent.done == last else (None, None)
            yield metrics | {"update": agent.done, "judge": judged, "bytes": agent.received,
                             "missed": agent.diverged or agent.missed}, samples

    def in_a_copy_of(agent: Agent) -> tuple[list[tuple], dict | None]:
        history = list(updates(agent))
        return history, agent.state_dict() if history else None  # a stop may have come before its first update

    at_once = min(workers(agents[0].settings), len(agents))
    if at_once == 1:
        for agent in agents:
            for metrics, samples in updates(agent):
                yield agent, metrics, samples
        return
    jobs = [functools.partial(in_a_copy_of, agent) for agent in agents]
    with contextlib.closing(side_by_side(jobs, at_once)) as results:
        for agent, (history, state) in zip(agents, results, strict=True):
            if state:
                agent.load_state_dict(state)
            for metrics, samples in history:
                yield agent, metrics, samples


def end_if_all_diverged(agents: list[Agent]) -> None:
    """At the end of a round: there is nobody left to train. Raises FloatingPointError."""
    if all(agent.diverged and agent.done % agent.settings.updates == 0 for agent in agents):
        raise FloatingPointError(agents[0].diverged)


def restore(agents: list[Agent], frozen: list[ppo_core.Policy], task: Task, saved: dict) -> None:
    """Bring agents and references back to where a checkpoint was made. Raises UserError."""
    same = saved["probe"].shape == task.probe.shape and torch.allclose(saved["probe"], task.probe, atol=1e-2)
    if not same and saved["device"] == agents[0].settings.device:
        raise UserError("the reward models fitted now differ from those that the run was started with: continue it on "
                        "the data, version and machine that it was started on")
    if not same:  # rounding can make another sample, and so another probe: no proof that the models differ
        tqdm.write(f"warning: reward models fitted on {agents[0].settings.device} give other scores than those fitted "
                   f"on {saved['device']}, with which the run was started")
    for agent, state in zip(agents, saved["agents"], strict=True):
        agent.load_state_dict(state)
    for policy, state in zip(frozen, saved["frozen"], strict=False):  # none at the end of a round
        policy.model.load_state_dict(state)


def judge_agent(agent: Agent, task: Task) -> tuple[float | None, list[dict]]:
    """The judge's mean score of the agent's responses to the held-out prompts, None without a judge; the first samples.

    Sampled at the training temperature with one named stream, the same for every agent, arm and evaluation.
    """
    world = agent.world
    sampled = world.batches(task.eval_prompts, agent.policy, generator(task.seed, "evaluation"))
    scores = torch.cat([task.judge(*batch) for batch in sampled]).tolist() if task.judge else []
    ids, mask, response, response_mask = (tensor[:SAMPLES] for tensor in sampled[0])
    samples = [
        {"prompt": prompt, "response": text, "ended": ended, "judge": score} for prompt, text, ended, score in
        zip(data.decode(world.tokenizer, ids, mask), data.decode(world.tokenizer, response, response_mask),
            ((response == world.eos_id) & response_mask.bool()).any(1).tolist(),
            scores[:SAMPLES] or [None] * SAMPLES, strict=False)]
    return (sum(scores) / len(scores) if scores else None), samples


# ------------------------------------------------------------------------------------------------------- preflight


@dataclass(frozen=True)
class Check:
    """One line of the preflight list: `value` must be at most `limit`, or at least if `floor`."""

    name: str
    value: float
    limit: float
    cause: str  # the likely cause of a failure
    floor: bool = False
    fatal: bool = True  # a failure stops the run; else it is a warning

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.floor else self.value <= self.limit

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL" if self.fatal else "WARN"
        line = f"  {mark}  {self.name}: {self.value:.3g} (at {'least' if self.floor else 'most'} {self.limit:.3g})"
        return line if self.passed else f"{line}: {self.cause}"


@torch.no_grad()
def preflight(world: World, task: Task) -> list[Check]:
    """What silently ruins PPO, tested on this model and data before any training."""
    s, policy = world.settings, world.new_policy()
    rounding = 1e-4 if s.dtype == "float32" else 0.2  # log-probs of one row computed in two ways
    prompts = (task.shards[0].prompts * 8)[:8]
    ids, prompt_mask = data.pad([world.prompt_ids[prompt] for prompt in prompts], world.pad_id, "left", world.device)
    rollout = ppo_core.collect(policy, [world.initial], torch.ones(1), world.initial, task.scorers[0], ids, prompt_mask,
                               s, eos_id=world.eos_id, pad_id=world.pad_id,
                               generator=generator(task.seed, "preflight"))
    valid = rollout.mask.bool()

    def worst(difference: torch.Tensor, rows: slice = slice(None)) -> float:
        return torch.where(valid[rows], difference, 0).abs().max().item()

    def logprobs(rows: slice, pads: int) -> torch.Tensor:
        """By the training forward, of some rows alone or behind more left padding."""
        ids = torch.nn.functional.pad(rollout.ids[rows], (pads, 0), value=world.pad_id)
        attention = torch.nn.functional.pad(rollout.attention[rows], (pads, 0))
        return ppo_core.evaluate(policy, ids, attention, rollout.response[rows], rollout.mask[rows], s.temperature)[0]

    half, everything = slice(0, 4), slice(None)
    ratio = (logprobs(half, 0) - rollout.logprobs[half]).exp()
    all_logprobs = ppo_core.evaluate(policy, rollout.ids, rollout.attention, rollout.response, rollout.mask,
                                     s.temperature)[1]
    checks = [
        Check("ratio on the first minibatch, |ratio - 1|", worst(ratio - 1, half), rounding / 10,
              "old and new log-probs come from different forwards, temperatures or precisions, or dropout is on"),
        Check("KL while policy = reference, nats per token", worst(rollout.kl), 1e-5,
              "policy and reference differ in temperature, mask or precision"),
        Check("left padding, change of log-probs", worst(logprobs(everything, 3) - rollout.logprobs), rounding,
              "the model does not honour attention_mask or position_ids"),
        Check("cached sampling against the training forward, log-probs",
              worst(cached_logprobs(policy, rollout, s.temperature) - rollout.logprobs), rounding,
              "the key/value cache is wrong, or the model changes its logits after the output embedding"),
        Check(f"EOS id {world.eos_id} and pad id {world.pad_id} are two, difference",
              abs(world.eos_id - world.pad_id), 1, "the tokenizer's pad token is its EOS", floor=True),
        Check("EOS can be sampled, largest probability", worst(all_logprobs[..., world.eos_id].exp()), 1e-4,
              "the model has not learned to end: a longer --response-length, or --missing-eos-penalty 0", floor=True,
              fatal=False)]
    if (unknown := world.tokenizer.unk_token_id) is not None:
        tokens = [token for ids in world.prompt_ids.values() for token in ids]
        checks.append(Check("share of prompt tokens that the vocabulary does not know",
                            tokens.count(unknown) / len(tokens), 0.01, "the model's tokenizer is for other text",
                            fatal=False))
    models = {f"agent {i}'s reward model": fit for i, fit in enumerate(task.accuracies)}
    for name, fit in (models | {"the judge": task.judge_accuracy}).items():
        if fit is not None:
            accuracy, n = fit
            chance = 0.5 + 1.645 * 0.5 / n**0.5  # one-sided 95 % bound of a coin
            checks.append(Check(f"{name}, accuracy on {n} held-out pairs", accuracy, chance, "no better than chance: "
                                "more pairs, another --reward-lr or --reward-epochs, or labels without signal",
                                floor=True, fatal=False))
    return checks


def cached_logprobs(policy: ppo_core.Policy, rollout: ppo_core.Rollout, temperature: float) -> torch.Tensor:
    """log pi(a_t|s_t) [B, T] as the sampler sees it: prompt first, then token by token through the cache."""
    Q, T = rollout.prompt_length, rollout.response.shape[1]
    step = ppo_core.decoder(policy, rollout.attention[:, :Q], T)
    logits = [step(rollout.ids[:, :Q] if t == 0 else rollout.response[:, t - 1:t]) for t in range(T)]
    return kl.token_logprobs(torch.stack(logits, 1), rollout.response, temperature)


# ----------------------------------------------------------------------------------------------------------- files

SAMPLES = 4  # prompts shown in samples.md
ALARMS = {"reward": 10.0, "kl": 100.0, "kl_initial": 100.0}  # said once: standard deviations; nats per response


class Run:
    """A run's folder: config.json, metrics.jsonl, summary.json, samples.md, curves.png and .svg, agents/."""

    def __init__(self, s: Settings, world: World, reason: str):
        self.settings, self.world = s, world
        self.rows: list[dict] = []
        self.samples: dict[str, list[dict]] = {}
        self.saved: dict = {"rows": 0}  # the checkpoint that a resumed run goes on from
        self.said: set[tuple] = set()  # warnings are given once
        self.signal = mmap.mmap(-1, 1)  # memory that forked copies share
        self.folder = Path(s.resume) if s.resume else new_folder(s)
        if not s.resume:
            write_json(self.folder / "config.json", describe(s, reason))
        self.lock = lock(self.folder / "config.json")
        if s.resume:
            self._load()
        self.metrics = (self.folder / "metrics.jsonl").open("a")
        arms = [(seed, mode) for seed in s.seeds for mode in s.mode]
        self.bar = tqdm(total=sum(self.updates_of(mode) for _, mode in arms), unit="update", dynamic_ncols=True,
                        initial=sum(row["update"] > 0 for row in self.rows), smoothing=0.1)

    @property
    def stop(self) -> int:
        """The number of the signal that asks the run to stop after the update it is in, or 0; seen in all processes."""
        return self.signal[0]

    @stop.setter
    def stop(self, number: int) -> None:
        self.signal[0] = number

    def updates_of(self, mode: str) -> int:
        return self.settings.rounds * self.settings.updates * (1 if mode == "centralized" else self.settings.agents)

    def _load(self) -> None:
        """Go back to the last checkpoint that can be used: rows written after it are dropped. Raises UserError."""
        path, unusable = self.folder / "metrics.jsonl", {}
        content = path.read_bytes() if path.exists() else b""
        lines = content.split(b"\n")[:-1]  # half a last one is dropped
        for file in reversed(self.checkpoints()):
            try:
                saved = read_state(file)
                rows = [json.loads(line) for line in lines[:saved["rows"]]]
                if len(rows) < saved["rows"]:
                    raise ValueError(f"metrics.jsonl has {len(rows)} of the {saved['rows']} lines it speaks of")
            except Exception as error:  # damage shows in many ways
                unusable[file] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
                continue
            self.saved, self.rows, self.samples = saved, rows, saved["samples"]
            break
        else:
            if unusable:
                raise UserError("; ".join(f"{file} cannot be used ({reason})" for file, reason in unusable.items()) +
                                ": there is no other checkpoint")
            if len(lines) > self.settings.agents * len(self.settings.mode):
                print(f"warning: no checkpoint in {self.folder}: it starts over, and {len(lines)} lines are dropped")
        for file, reason in unusable.items():
            print(f"warning: {file} cannot be used ({reason}); the run goes on from the checkpoint before it")
            file.rename(file.with_suffix(".damaged"))
        for file in self.folder.glob("*.tmp"):
            file.unlink()
        write_text(path, b"".join(line + b"\n" for line in lines[:self.saved["rows"]]).decode())

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first; a name has the number of rows that were written before."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"))

    def log(self, mode: str, seed: int, agent: int, rnd: int, update: int, *, judge: float | None = None,
            **metrics: float | str | None) -> None:
        """Append one line: what was not measured at this update is null, so that all lines have the same keys."""
        keys = ("episodes", "reward", "kl", "kl_initial", "entropy", "policy_loss", "value_loss", "clipfrac", "length",
                "ended", "bytes", "seconds", "value_clipfrac", "approx_kl", "grad_norm", "lr", "beta",
                "reward_accuracy", "missed")
        row = {"mode": mode, "seed": seed, "agent": agent, "round": rnd, "update": update, "judge": judge}
        row |= {key: metrics.get(key, 0 if key in ("episodes", "bytes", "seconds") else None) for key in keys}
        self.rows.append(row)
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        for name, limit in ALARMS.items():
            if abs(row[name] or 0) > limit and (mode, seed, agent, name) not in self.said:
                self.said.add((mode, seed, agent, name))
                tqdm.write(f"warning: {mode}, seed {seed}, agent {agent}, update {update}: {name} is {row[name]:.3g}")
        if row["missed"] and "diverged in" in row["missed"] and (mode, seed, agent) not in self.said:
            self.said.add((mode, seed, agent))
            tqdm.write(f"warning: {mode}, seed {seed}, {row['missed']}; it is frozen and left out of exchanges")
        if update:
            self.bar.update()
        self.bar.set_description(f"{mode} seed {seed}")
        if judge is not None:
            latest = {r["agent"]: r["judge"] for r in self.rows
                      if (r["mode"], r["seed"]) == (mode, seed) and r["judge"] is not None}
            self.bar.set_postfix_str("judge " + " ".join(f"{score:.2f}" for score in latest.values()))

    def checkpoint(self, mode: str, task: Task, agents: list[Agent], frozen: list[ppo_core.Policy]) -> None:
        """All that is needed to continue from here; written under a temporary name first, the last two are kept.

        frozen: the references inside a round; empty at its end, since the next exchange makes them anew.
        """
        state = {"mode": mode, "seed": task.seed, "rows": len(self.rows), "samples": self.samples, "probe": task.probe,
                 "device": self.settings.device,
                 "agents": [agent.state_dict() for agent in agents],
                 "frozen": [policy.model.state_dict() for policy in frozen]}
        os.fsync(self.metrics.fileno())  # so that no checkpoint speaks of lines that a power cut takes
        write_state(self.folder / f"checkpoint-{len(self.rows):08d}.safetensors", state)
        for old in self.checkpoints()[:-2]:
            old.unlink()

    def finished(self, seed: int, mode: str) -> bool:
        """Whether a resumed run has this arm complete, its agents saved."""
        rows = sum((row["seed"], row["mode"]) == (seed, mode) and row["update"] > 0 for row in self.rows)
        return rows == self.updates_of(mode) and (self.saved.get("seed"), self.saved.get("mode")) != (seed, mode)

    def state_of(self, seed: int, mode: str) -> dict | None:
        """The checkpoint, if it is one of this arm; it is given once, so that its memory can be freed."""
        if (self.saved.get("seed"), self.saved.get("mode")) != (seed, mode):
            return None
        state, self.saved = self.saved, {"seed": seed, "mode": mode}
        return state

    def save_agents(self, mode: str, seed: int, agents: list[Agent]) -> None:
        for agent in agents:
            save_agent(self.folder / "agents" / f"{mode}-seed{seed}-agent{agent.index}", agent, mode, seed)

    def close(self) -> None:
        for file in (self.bar, self.metrics, self.lock):
            file.close()

    def discard(self) -> None:
        """Remove a folder in which nothing was trained, so that the mended command can use its name."""
        if not self.rows and not self.settings.resume:
            for file in ("config.json", "metrics.jsonl"):
                (self.folder / file).unlink(missing_ok=True)
            self.folder.rmdir()

    def finish(self) -> str:
        """Write what is made of the metrics -> the text to print."""
        self.bar.close()
        summary = plot.summarise(self.rows)
        (self.folder / "samples.md").write_text(samples_page(self.samples, self.settings))
        picture, _ = plot.draw([self.folder], self.folder / "curves.png")
        write_json(self.folder / "summary.json", summary)  # last of all: it marks the run as finished
        for file in self.folder.glob("checkpoint-*"):
            file.unlink()
        return (f"{plot.table(summary)}\n\npicture   {picture}\nsamples   {self.folder / 'samples.md'}\n"
                f"agents    {self.folder / 'agents'}")


def write_state(path: Path, state: dict) -> None:
    """A nest of dicts, lists, tensors and plain values as one safetensors file: first under a temporary name, so that a
    killed process leaves no half under this one. Raises OSError.
    """
    tensors: dict[str, torch.Tensor] = {}

    def plain(node, name: str):
        if isinstance(node, torch.Tensor):
            tensors[name] = node.detach().cpu().contiguous()
            return {"tensor": name}
        if isinstance(node, dict):  # as pairs: JSON has no keys but strings
            return {"dict": [[key, plain(value, f"{name}.{key}")] for key, value in node.items()]}
        return [plain(value, f"{name}.{k}") for k, value in enumerate(node)] if isinstance(node, list | tuple) else node

    text, seen = json.dumps(plain(state, "state")), set()
    for name, tensor in tensors.items():  # the format has no two names for one memory, as tied weights are
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, {"state": text, "hash": seal(text, tensors)})
    except (OSError, SafetensorError) as error:  # which has the system's number in its text alone
        temporary.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number.group(1)) if number else 0, "no checkpoint can be written "
                      f"({' '.join(str(error).split())[:100]})", str(path)) from None
    replace(temporary, path)


def seal(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over all of a state."""
    return hashlib.sha256((text + digest(dict(sorted(tensors.items())))).encode()).hexdigest()


def replace(temporary: Path, path: Path) -> None:
    """Give a complete file its name; both are on the disk when this returns, whatever happens next."""
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


def read_state(path: Path) -> dict:
    """What write_state wrote, lists in place of tuples: nothing is unpickled. Raises an exception if it is damaged."""
    with safe_open(path, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118

    def nest(node):
        if isinstance(node, dict):
            return tensors[node["tensor"]] if "tensor" in node else {key: nest(value) for key, value in node["dict"]}
        return [nest(value) for value in node] if isinstance(node, list) else node

    if seal(header["state"], tensors) != header["hash"]:
        raise ValueError("it does not match its hash")
    return nest(json.loads(header["state"]))


def write_text(path: Path, text: str) -> None:
    """All of it or, if the disk is full or the process is killed, what was there before."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def lock(path: Path):
    """The file, open, and kept from other processes until it is closed. Raises UserError if one has it."""
    file = path.open()
    try:
        import fcntl  # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        raise UserError(f"{path.parent} is in use by a run that has not ended") from None
    return file


def new_folder(s: Settings) -> Path:
    """The run's own empty folder. Raises UserError."""
    name = s.name or f"{'-'.join(s.mode)}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(s.out) / name
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not empty: choose another --name, or continue it with "
                            f"--resume {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").touch()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
    return folder


def describe(s: Settings, reason: str) -> dict:
    """config.json: what ran, on what, and why this preset."""
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    commit = None  # no git, or not a checkout of its own
    if (HERE / ".git").exists() and shutil.which("git"):
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=HERE,
                                capture_output=True, text=True, check=False).stdout.strip() or None
    packages = ("torch", "transformers", "datasets", "numpy")
    return {"settings": dataclasses.asdict(s), "preset": {"choice": s.preset, "reason": reason},
            "matrix": communication_matrix(s).tolist(), "commit": commit,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
            "hardware": {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count(),
                         "threads": torch.get_num_threads(),
                         "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}}


def save_agent(folder: Path, agent: Agent, mode: str, seed: int) -> None:
    """The policy as a Hugging Face directory whose generation settings repeat the training sampler."""
    from transformers import GenerationConfig
    s, world, model = agent.settings, agent.world, agent.policy.model
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=s.temperature, top_k=0, max_new_tokens=s.response_length, max_length=None,
        eos_token_id=world.eos_id, pad_token_id=world.pad_id, suppress_tokens=world.forbidden.nonzero()[:, 0].tolist())
    model.save_pretrained(folder)
    world.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# Agent {agent.index}, "
        f"{mode}, seed {seed}\n\nA policy trained by Federated PPO from `{_show(s.model)}` on `{_show(s.dataset)}`: "
        f"{s.rounds} rounds of {s.updates} updates, rule `{s.rule}`, beta {agent.beta:g}. All settings stand in "
        "the run's config.json.\n\n```python\nfrom transformers import pipeline\n\n"
        'generate = pipeline("text-generation", "PATH OF THIS FOLDER")\n```\n\n'
        "Trained against a reward model of limited accuracy; it can have learned that model's errors. A policy can "
        "leak what it has memorised of its agent's data.\n")


def samples_page(samples: dict[str, list[dict]], s: Settings) -> str:
    """samples.md: for the first seed, the same prompts before and after training, per mode and agent."""
    lines = ["# The same prompts before and after training", "",
             f"Seed {s.seeds[0]}, sampled at temperature {s.temperature:g}. ⏹ marks a response that ended by itself; "
             "a number is the judge's score.", ""]
    for name, before in samples.items():
        mode, seed, agent, when = name.split()
        if when == "before" and int(seed) == s.seeds[0]:
            lines += [f"## {mode}, agent {agent}", "", "| prompt | before | after |", "|---|---|---|"]
            for old, new in zip(before, samples[f"{mode} {seed} {agent} after"], strict=True):
                cells = [" ".join(str(new["prompt"]).split())] + [
                    f"{' '.join(x['response'].split())}{' ⏹' * x['ended']}" +
                    (f" **{x['judge']:.2f}**" if x["judge"] is not None else "") for x in (old, new)]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            lines.append("")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ main


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next tensor. Elsewhere nothing happens.

    It would give each large tensor back to the system, and the pages of the next one would have to be zeroed again:
    at Pythia's vocabulary that takes longer than what is computed in them. Blocks of 32 MiB, the most that glibc takes
    as a threshold, still go back: kept, they leave holes that no other fits, and a higher peak. Smaller holes can grow
    without bound too: so `train` calls `give_back` once a round.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: blocks from here on are apart from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def give_back() -> None:
    """Return to the system what glibc keeps and nobody uses."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def use_onednn(width: int) -> None:
    """float32 matrix products on a CPU of models `width` wide by oneDNN: twice as fast in decoding, 1.1 in training.

    torch takes oneDNN where it may use bfloat16 inside. A processor without AMX does not; on one that does, which the
    errors show, this is taken back. Narrow models are slower with it.
    """
    torch.set_float32_matmul_precision("medium" if width >= 256 else "highest")
    a, b = torch.randn(2, 512, width, generator=torch.Generator().manual_seed(0))
    for rows in (16, 512):
        if ((a[:rows] @ b.T) - (a[:rows].double() @ b.double().T)).abs().max() > 1e-6 * width:
            torch.set_float32_matmul_precision("highest")


def bfloat16_cost(width: int) -> float:
    """Seconds of a bfloat16 matrix product of models `width` wide on this CPU, in those of a float32 one.

    Many, on one without instructions for it.
    """
    def best(dtype: torch.dtype) -> float:
        a, b, seconds = torch.ones(64, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype), []
        for _ in range(5):
            started = time.perf_counter()
            a @ b.T
            seconds.append(time.perf_counter() - started)
        return min(seconds)
    return best(torch.bfloat16) / best(torch.float32)


def load_world(s: Settings, reason: str) -> World:
    """Load what all seeds start from, and say what is run on what. Raises UserError, also for a seed's lack of data."""
    keep_memory()
    if workers(s) > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    if s.threads:
        torch.set_num_threads(s.threads)
    print(f"preset {s.preset}: {reason}; {_show(s.model)} on {s.device}")
    if warning := WRONG_ESTIMATORS.get((s.penalty, s.estimator)):
        print(f"warning, allowed by --allow-wrong-estimator: {warning}")
    if not (Path(at_home(s.model)).is_dir() and Path(at_home(s.dataset)).exists()):
        data.online()  # asked once: with a dead network the libraries must look in their caches alone, not retry
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    world = World(s)
    if s.device == "cpu":
        use_onednn(world.model.config.hidden_size)
        if s.dtype == "bfloat16" and (cost := bfloat16_cost(world.model.config.hidden_size)) > 2:
            print(f"warning: a matrix product in bfloat16 takes {cost:.0f} times as long as in float32 on this "
                  "processor")
    if world.device.type == "cuda":
        prompts = data.pad(list(world.prompt_ids.values())[:s.batch], world.pad_id, "left", world.device)
        print(graphs.bind(world.initial, *prompts, s.response_length, temperature=s.temperature, eos_id=world.eos_id,
                          pad_id=world.pad_id))
    print(f"{len(world.pairs)} preference pairs; dropped {world.dropped} rows whose chosen and rejected are the same")
    pooling = ["--mode centralized"] * ("centralized" in s.mode)
    pooling += [f"--reward {s.reward}"] * (s.reward in ("shared", "ensemble"))
    if pooling:
        print(f"not private: {' and '.join(pooling)} pool what the agents own")
    for seed in s.seeds:
        deal(world, seed)  # too little data is said now, not when earlier seeds have been trained
    return world


def execute(s: Settings, reason: str) -> None:
    """Run what the settings ask for.

    Raises UserError before training starts (later only if the user's own reward or judge fails on a response),
    FloatingPointError if training diverges.
    """
    started = time.perf_counter()
    world = load_world(s, reason)
    if s.check:
        report(world, preflight(world, make_task(world, s.seeds[0], s.mode[0] == "centralized")))
        print("no fatal check failed: without --check it would train")
        return
    run = None
    try:
        run = Run(s, world, reason)
        with stop_after_an_update(run):
            for seed in s.seeds:
                run_seed(world, seed, run)
            finished = run.finish()
    except UserError:
        if run:
            run.close()
            run.discard()
        raise
    except OSError as error:  # a full disk, as a rule
        folder = run.folder if run else s.resume
        room = "make room and " * (error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        again = f"continue with {shlex.join(to_resume(s, folder))}" if folder else "start again"
        raise UserError(f"{error.filename or folder}: {error.strerror or error}; {room}{again}") from None
    except FloatingPointError as error:
        last = run.rows[-1]
        raise FloatingPointError(f"{last['mode']}, seed {last['seed']}, {error} "
                                 f"(metrics so far: {run.folder})") from None
    except (KeyboardInterrupt, Stopped) as stop:
        if not run:
            raise
        run.bar.close()
        where = "starts over" if not run.checkpoints() else (
            "continues after this update" if isinstance(stop, Stopped) else "continues from the last checkpoint")
        command = shlex.join([sys.executable, sys.argv[0], *to_resume(s, run.folder)])
        print(f"\ninterrupted: {command} {where}")
        raise
    finally:
        if run:
            run.close()
    print(f"{finished}\n{time.perf_counter() - started:.0f} s in all")


class Stopped(Exception):
    """A signal asked the run to stop, and everything up to its last update is saved."""


@contextlib.contextmanager
def stop_after_an_update(run: Run):
    """The first SIGINT (Ctrl-C) or SIGTERM lets the update in hand end and be saved; a second one stops at once,
    and so does the first before anything is trained.
    """
    owner = os.getpid()

    def ask(number: int, frame) -> None:
        if os.getpid() != owner:  # a forked copy that has not yet set its own: the signal is its parent's
            return
        if run.stop or not run.rows:
            raise KeyboardInterrupt(number)
        run.stop = number
        os.write(2, b"\nstopping after this update (again: at once)\n")  # print may be what was interrupted

    if threading.current_thread() is not threading.main_thread():  # no handler can be set there
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_seed(world: World, seed: int, run: Run) -> None:
    """All modes of one seed that are not finished yet, on the same data and reward models."""
    tasks: dict[bool, Task] = {}  # pooled or not
    for mode in world.settings.mode:
        if run.finished(seed, mode):
            continue
        pooled = mode == "centralized"
        if pooled not in tasks:
            run.bar.set_description(f"preparing seed {seed}")
            tasks[pooled] = make_task(world, seed, pooled)
        if not run.rows:
            report(world, preflight(world, tasks[pooled]))
        if run.stop:
            raise Stopped(run.stop)
        run.save_agents(mode, seed, train(world, tasks[pooled], mode, run, run.state_of(seed, mode)))


def report(world: World, checks: list[Check]) -> None:
    """Print the preflight list. Raises UserError if a fatal check failed."""
    total = len(world.pairs) + world.dropped
    rows = f"  note  preference rows dropped because chosen == rejected: {world.dropped} of {total}"
    tqdm.write("\n".join(["preflight", *map(str, checks), rows]))
    failed = [check.name for check in checks if check.fatal and not check.passed]
    if failed:
        raise UserError(f"preflight failed: {'; '.join(failed)} (see the list above for limits and causes)")


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 training diverged, 2 a mistake the user can mend, 130 or 143 stopped by a signal."""
    try:
        execute(*parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        return 128 + stop.args[0]
    except KeyboardInterrupt as stop:
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""All settings of a run: the one place of defaults, of the command line and of its help.

In reading order
    1. Settings    one frozen dataclass; each field has its help, unit and the presets' values
    2. parse       command line -> Command: the settings with the preset filled in
    3. checks      what cannot work is refused before anything is loaded, in one line
    4. files       the settings of a file or of a run's folder, and the flags that give them again

A mode's row in fedppo.MODES comes on top of these (fedppo.arm_settings): its beta, learning rate,
anchor and self_weight where none are given by hand.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import torch

import kl
import ppo_core
from data import UserError
from support import load, rows

# ---------------------------------------------------------------------------------------- Settings


SAME = object()


def setting(tiny, help: str, *, group: str, pythia=SAME, choices: tuple = ()):
    """A field of Settings: its value in the preset tiny, and in pythia-70m where that differs."""
    pythia = tiny if pythia is SAME else pythia
    meta = {"help": help, "group": group, "choices": choices, "pythia-70m": pythia}
    return dataclasses.field(default=tiny, metadata=meta)


@dataclass(frozen=True)
class Settings:
    """The settings of a run, by group; the defaults are the preset tiny's.

    Sources: tiny from a prototype, with reward_lr checked by measurement, and each mode's beta, lr,
    anchor and self_weight chosen by benchmarks/tune.py for own prompts; pythia-70m from OpenAI's
    2019 style tasks (1909.08593 and its code) and the last published TRL example, with tiny's
    anchor, not measured here.
    """

    agents: int = setting(4, "number of agents N", group="run")
    mode: tuple[str, ...] = setting(
        ("federated",), "one or more of those below, run one after the other on the same seeds "
        "and data", group="run")
    seeds: tuple[int, ...] = setting(
        (0,), "one or more; a seed redraws which rows and prompts each agent gets, evaluation "
        "prompts, reward models and sampling", group="run")
    preset: str = setting(
        "auto", "model, data and hyperparameters together; auto: pythia-70m where there is a GPU "
        "and the model can be had, or where another --model or --dataset is named, else tiny",
        group="run", choices=("auto", "tiny", "pythia-70m"))
    out: str = setting("runs", "folder of all runs", group="run")
    name: str = setting("", "this run's folder inside --out (default: the modes and the time)",
                        group="run")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: cuda where there is one, else cpu",
                          group="run")
    threads: int = setting(
        1, "CPU threads of torch; 0: torch decides. One is best for a tiny model; results are "
        "equal to the bit only for equal numbers", pythia=0, group="run")
    dtype: str = setting(
        "float32", "of the policies' matrix products; the weights are float32 in any case. With "
        "bfloat16 log-probs have errors, of about 0.001 on the model of tiny; --check says how "
        "large they are on yours", group="run", choices=("float32", "bfloat16"))

    model: tuple[str, ...] = setting(
        ("tiny/model",), "a causal LM, hub name or local folder; or several of one tokenizer, "
        "which the agents start from in turns", pythia=("EleutherAI/pythia-70m-deduped",),
        group="model and data")
    dataset: str = setting(
        "tiny/data", "preference pairs: a .jsonl, .json, .csv or .parquet file, a folder of them "
        "or of save_to_disk data, or a hub name",
        pythia="trl-internal-testing/descriptiveness-sentiment-trl-style", group="model and data")
    splits: tuple[str, ...] = setting((), "splits to use (default: all)", group="model and data")
    split_column: str = setting("", "a column whose values are the splits, in place of the files",
                                group="model and data")
    shards: str = setting(
        "split", "how data is dealt: iid, or each agent its own splits (tiny: topics)",
        pythia="iid", group="model and data", choices=("iid", "split"))
    pairs: int = setting(200, "preference pairs per agent for its reward model", pythia=1000,
                         group="model and data")
    eval_prompts: int = setting(128, "held-out prompts that the judge scores responses to",
                                group="model and data")
    judge: str = setting(
        "tiny/judge.py:score", "FILE.py:function(prompts, responses, ended) -> scores; the "
        "directory of a sequence-classification model; heldout: a reward model fitted to pairs "
        "that no agent has; none", pythia="heldout", group="model and data")

    reward: str = setting(
        "private", "private: each agent fits its own pairs; shared: one model on all pairs, or "
        "ensemble: the mean of all private models, for every agent, both not private; or "
        "FILE.py:function or a directory as for --judge", group="reward")
    reward_lr: float = setting(2e-3, "Adam learning rate of the reward model, linear to 0",
                               pythia=2e-5, group="reward")
    reward_epochs: int = setting(4, "passes over the agent's pairs", pythia=2, group="reward")
    reward_pooling: str = setting(
        "mean", "the scalar head reads the mean of the hidden states, or the last one",
        pythia="last", group="reward", choices=("mean", "last"))
    reward_probe: int = setting(
        0, "0: all weights of a reward model are fitted; N: its head alone, to what the model's "
        "first N layers make of a text, which is cheap and may do better with few pairs",
        group="reward")
    response_eos: bool | None = setting(
        True, "preference texts shorter than --response-length have ended: EOS is appended, and "
        "the reward model reads the EOS of rollouts; off where the data's responses were cut. With "
        "a dataset of your own: on if at least half of them are shorter", pythia=False,
        group="reward")
    missing_eos_penalty: float = setting(
        1.0, "subtracted from the normalised score of a response without EOS", pythia=0.0,
        group="reward")

    rounds: int = setting(10, "communication rounds", group="federation")
    updates: int = setting(4, "local PPO updates per round", group="federation")
    prompts: str = setting(
        "own", "whose prompts an agent responds to: its own, or common: those of all agents, "
        "which are then public, as texts without labels; preferences and reward models stay "
        "private",
        group="federation", choices=("own", "common"))
    rule: str = setting("geometric", "how references are combined (see kl.py)", group="federation",
                        choices=kl.RULES)
    topology: str = setting(
        "self", f"communication matrix of federated and merged: {', '.join(load.MATRICES)} or "
        "FILE.json (N rows of N weights, normalised by row)", group="federation")
    self_weight: float | None = setting(
        None, "weight of an agent's own reference in self, ring and star", pythia=0.4,
        group="federation")
    anchor: float | None = setting(
        None, "weight of the initial policy in every reference, 0 to 1; in classic it is 1",
        pythia=0.1, group="federation")
    participation: float = setting(
        1.0, "probability that an agent takes part in an exchange; an absent one trains on, and "
        "neither sends nor receives", group="federation")
    outlier: float = setting(
        0.0, "leave out a peer whose policy is more than this many times as far from the agent's "
        "own as the median peer's, by KL on the agent's own prompts; 0: trust every peer",
        group="federation")

    batch: int = setting(32, "episodes per PPO update and agent", pythia=64, group="PPO")
    response_length: int = setting(20, "longest response, in tokens", pythia=24, group="PPO")
    temperature: float = setting(1.0, "of sampler, policy and references alike", pythia=0.7,
                                 group="PPO")
    policy_layers: int = setting(
        0, "layers of a policy that learn, from the last; so does its value head, and nothing "
        "else. What does not learn is kept once for all policies and never sent; 0: the whole "
        "model learns", group="PPO")
    epochs: int = setting(2, "passes over a rollout (1707.06347)", pythia=4, group="PPO")
    minibatches: int = setting(2, "gradient steps per pass", pythia=1, group="PPO")
    micro_batch: int = setting(
        32, "rows per forward in training and of fitted reward models; at most 16 times as many "
        "are sampled at a time (checks take 8 rows, fitting 32 texts): changes memory and speed, "
        "results by rounding alone; 0: 4 on a CPU, else 64",
        pythia=0, group="PPO")
    lr: float | None = setting(None, "Adam learning rate", pythia=1e-5, group="PPO")
    lr_schedule: str = setting("constant", "of the learning rate over the whole run",
                               pythia="linear", group="PPO", choices=("constant", "linear"))
    clip: float = setting(
        0.2, "epsilon of the clipped objective (1707.06347, eq. 7), and how far a value may move "
        "in one update", group="PPO")

    beta: float | None = setting(
        None, "KL coefficient, score per nat", pythia=0.05, group="KL penalty")
    penalty: str = setting(
        "exact-in-loss", "KL's estimator and where it is charged; both: exact in the loss, later "
        "states' in the reward; k3-in-loss follows the gradient of KL(reference||policy)",
        group="KL penalty", choices=tuple(ppo_core.PENALTIES))


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
PRESETS = {
    "tiny": {name: field.default for name, field in FIELDS.items()},
    "pythia-70m": {name: field.metadata["pythia-70m"] for name, field in FIELDS.items()}}
FITTED = ("private", "shared", "ensemble")  # rewards that are models fitted to preference pairs


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def show(value) -> str:
    """A setting's value as it is said to the user."""
    value = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return "none" if value in ("", None) else str(value)


# ------------------------------------------------------------------------------------------- parse


@dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    settings: Settings
    reason: str  # why this preset
    resume: str = ""  # the folder of an interrupted run to continue
    check: bool = False  # only the checks before training
    quiet: bool = False  # no progress bar
    tensorboard: bool = False  # metrics there too


def parse(argv: list[str], modes: dict) -> Command:
    """Command line -> what it asks for. modes: fedppo.MODES. Raises UserError."""
    given = vars(parser(modes).parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in given.items()}
    command = {name: given.pop(name) for name in ("resume", "check", "quiet", "tensorboard")
               if name in given}
    by_hand = frozenset(given)
    if "config" in given:
        given = from_file(given.pop("config"), given, modes) | given
    resume = command.get("resume", "")
    for name in {"model", "dataset", "judge", "reward"} & given.keys():
        value = given[name]
        given[name] = tuple(map(users_own, value)) if name == "model" else users_own(value)
    if resume:
        settings, reason = resumed(resume, given, modes)
    else:
        preset, reason = choose_preset(given)
        settings = Settings(**(PRESETS[preset] | given | {"preset": preset}))
        if preset == "tiny" and "judge" not in given and not load.embedded(settings.dataset):
            settings = dataclasses.replace(settings, judge="heldout")
            reason += ("; the tiny world's judge does not know this dataset, so a held-out reward "
                       "model judges")
        known = preset == "tiny" and load.embedded(settings.dataset)
        known = known or settings.dataset == PRESETS[preset]["dataset"]
        if "response_eos" not in given and not known:
            settings = dataclasses.replace(settings, response_eos=None)  # world.py decides
        settings = decided(settings)
    check(settings, modes, by_hand)
    return Command(settings, reason, **command)


def users_own(path: str) -> str:
    """A path tiny/... that the user has where the program is called is not the embedded one."""
    own = Path.cwd() != load.HOME and path.startswith("tiny/") and Path(path.split(":")[0]).exists()
    return os.path.join(".", path) if own else path


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong with a command is a UserError."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def parser(modes: dict) -> Parser:
    """The command line, made from the fields of Settings; what is not given is absent."""
    made = Parser(
        "fedppo.py", description="Federated PPO for RLHF: agents exchange policies, never data.",
        usage="python fedppo.py [--agents N] [--mode MODE ...] [flags below]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["modes:", *(f"  {name:<12} {row.help}" for name, row in modes.items())]))
    groups = {group: made.add_argument_group(group)
              for group in dict.fromkeys(field.metadata["group"] for field in FIELDS.values())}
    for name, field in FIELDS.items():
        text = f"{field.metadata['help']}{usual(name)}".replace("%", "%%")
        choices = tuple(modes) if name == "mode" else field.metadata["choices"]
        if field.type == bool | None:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            many = typing.get_origin(field.type) is tuple
            optional = isinstance(field.type, types.UnionType)
            kind = typing.get_args(field.type)[0] if many or optional else field.type
            options = {"type": kind, "nargs": "+" if many else None, "choices": choices or None,
                       "metavar": None if choices and name != "mode" else name.upper()}
        groups[field.metadata["group"]].add_argument(flag(name), help=text, **options)
    groups["run"].add_argument("--resume", metavar="RUN", help="continue an interrupted run: its "
                               "folder, and none of its settings")
    groups["run"].add_argument("--config", metavar="FILE.json", help="settings from a file: a "
                               "run's config.json, or an object with some of the names here, "
                               "written with _; flags win")
    for name, help in {"check": "only run the checks before training, on the first seed",
                       "quiet": "no progress bar, for logs",
                       "tensorboard": "write the metrics for TensorBoard too, in the run's folder",
                       }.items():
        groups["run"].add_argument(flag(name), action="store_true", help=help)
    return made


def usual(name: str) -> str:
    """A setting's defaults, as --help shows them."""
    values = ["each mode's own" if PRESETS[preset][name] is None else show(PRESETS[preset][name])
              for preset in PRESETS]
    if set(values) == {"none"}:
        return ""
    return f" [{values[0]}]" if len(set(values)) == 1 else " [tiny: {}; pythia-70m: {}]".format(
        *values)


def choose_preset(given: dict) -> tuple[str, str]:
    """Flags given by hand -> (preset, why). A model or dataset that is named is never replaced."""
    if given.get("preset", "auto") != "auto":
        return given["preset"], "asked for"
    named = [name for name in ("model", "dataset") if name in given][:1]  # the model decides
    if named and load.embedded(given[named[0]][0] if named == ["model"] else given[named[0]]):
        return "tiny", f"--{named[0]} is the embedded one"
    if named:
        return "pythia-70m", f"--{named[0]} is given, so the settings for real text apply"
    if not torch.cuda.is_available() or given.get("device") == "cpu":
        return "tiny", "no GPU"
    if load.online():
        return "pythia-70m", "there is a GPU and the hub answers"
    from huggingface_hub import try_to_load_from_cache
    model, = PRESETS["pythia-70m"]["model"]
    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(model, file), str) for file in files):
        return "pythia-70m", "there is a GPU and the model is cached"
    return "tiny", "there is a GPU, but the model is not cached and the hub does not answer"


def decided(s: Settings) -> Settings:
    """What was left to the program: the device, and how many rows fit a forward on it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    s = dataclasses.replace(s, device=device if s.device == "auto" else s.device)
    rows = 4 if s.device == "cpu" else 64
    return dataclasses.replace(s, micro_batch=s.micro_batch or rows)


# ------------------------------------------------------------------------------------------ checks

POSITIVE = ("agents", "pairs", "eval_prompts", "reward_lr", "reward_epochs", "rounds", "updates",
            "batch", "response_length", "temperature", "epochs", "minibatches", "micro_batch",
            "lr", "clip")
FRACTIONS = ("self_weight", "anchor", "participation")
NOT_NEGATIVE = ("threads", "policy_layers", "reward_probe", "missing_eos_penalty", "outlier",
                "beta")


def check(s: Settings, modes: dict, by_hand: frozenset[str]) -> None:
    """Refuse what cannot work, before anything is loaded. modes: fedppo.MODES; by_hand: settings
    given by flags. Raises UserError."""
    for name in POSITIVE:
        if getattr(s, name) is not None and not 0 < getattr(s, name) < float("inf"):
            raise UserError(f"{flag(name)} must be positive, not {getattr(s, name)}")
    for name in FRACTIONS:
        if getattr(s, name) is not None and not 0 <= getattr(s, name) <= 1:
            raise UserError(f"{flag(name)} must lie between 0 and 1, not {getattr(s, name)}")
    for name in NOT_NEGATIVE:
        if getattr(s, name) is not None and not 0 <= getattr(s, name) < float("inf"):
            raise UserError(f"{flag(name)} must not be negative, and is {getattr(s, name)}")
    for name in ("mode", "seeds", "splits"):
        if len(set(getattr(s, name))) < len(getattr(s, name)):
            raise UserError(f"{flag(name)} names one of its values twice: {show(getattr(s, name))}")
    check_combinations(s, modes)
    check_heeded(s, modes, by_hand)
    check_places(s)


def check_combinations(s: Settings, modes: dict) -> None:
    """Settings that are right one by one and have no meaning together. Raises UserError."""
    if s.batch % s.minibatches:
        raise UserError(f"--batch {s.batch} cannot be cut into --minibatches {s.minibatches} of "
                        "equal size")
    if len(s.model) > s.agents:
        raise UserError(f"--model names {len(s.model)} models for {s.agents} agents")
    if s.agents > 1000:
        raise UserError(f"--agents {s.agents}: this is a simulation on one machine, for at most "
                        "1000")
    if 0 < s.outlier < 1:
        raise UserError(f"--outlier {s.outlier:g} would leave out the median peer: it must be at "
                        "least 1, or 0 for off")
    deaf = [name for name in s.mode if modes[name].listens and not modes[name].moves]
    if s.anchor == 1 and deaf:
        raise UserError(f"--anchor 1 leaves {show(tuple(deaf))} no peer to listen to: that is "
                        "--mode classic")


def check_heeded(s: Settings, modes: dict, by_hand: frozenset[str]) -> None:
    """A flag that is given by hand must mean something in one of the modes. Raises UserError."""
    weighted, peers = ("self", "ring", "star"), s.agents > 1

    def mixes(row) -> bool:
        """Whether an agent can have more than one reference."""
        return row.anchor != 1 and (row.exchanges and peers or
                                    (row.anchor if s.anchor is None else s.anchor) > 0)

    heeds = {  # what a mode must have for a flag to mean anything in it
        "topology": lambda row: peers and row.topology is None,
        "self_weight": lambda row: peers and (row.topology or s.topology) in weighted,
        "rule": lambda row: row.rule is None and mixes(row),
        "anchor": lambda row: row.anchor != 1,
        "participation": lambda row: peers and row.exchanges,
        "outlier": lambda row: peers and row.listens}
    for name in [name for name in heeds if name in by_hand]:
        if not any(heeds[name](modes[mode]) for mode in s.mode):
            where = "" if peers else " with --agents 1"
            if peers and name == "self_weight" and s.topology not in weighted:
                where = f" with --topology {s.topology}"
            raise UserError(f"{flag(name)} {show(getattr(s, name))} has no part in --mode "
                            f"{show(s.mode)}{where}")


def check_places(s: Settings) -> None:
    """Names of folders, files and devices. Raises UserError."""
    if s.name and (Path(s.name).name != s.name or s.name == ".."):
        raise UserError(f"--name {s.name!r} must be a plain folder name; --out says where it goes")
    if sys.getfilesystemencoding() != "utf-8" and not (s.out + s.name).isascii():
        # The libraries that save agents name files in UTF-8 always.
        raise UserError(f"--out {s.out} --name {s.name}: under this locale a folder's name must be "
                        "ASCII; PYTHONUTF8=1 allows any")
    try:
        torch.zeros(1, device=s.device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {s.device} is not to be had on this machine") from None
    for name, path in [*(("model", model) for model in s.model), ("dataset", s.dataset)]:
        path = load.home(path)
        # No name of the hub's looks like this.
        local = Path(path).suffix in (*rows.KINDS, ".gz") or path.startswith(("/", ".", "~"))
        if local and not Path(path).exists():
            raise UserError(f"{flag(name)} {path}: there is no such file or folder")


# ------------------------------------------------------------------------------------------- files

MOVABLE = ("device",)  # a run may go on elsewhere


def of_type(value, kind) -> bool:
    """Whether a value read from a file is one that the command line could have given."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(of_type(one, inner) for one in value)
    if isinstance(kind, types.UnionType):
        return value is None or of_type(value, typing.get_args(kind)[0])
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def checked(values: dict, modes: dict) -> dict:
    """Settings as JSON has them -> as Settings has them. Raises ValueError."""
    values = {name: tuple(value) if isinstance(value, list) else value
              for name, value in values.items()}
    if unknown := values.keys() - FIELDS.keys():
        raise ValueError(f"there is no setting {', '.join(sorted(unknown))}")
    for name, value in values.items():
        field = FIELDS[name]
        allowed = tuple(modes) if name == "mode" else field.metadata["choices"]
        found = value if name == "mode" else (value,)
        if not of_type(value, field.type) or allowed and set(found) - set(allowed):
            wanted = f"one of {', '.join(allowed)}" if allowed else getattr(
                field.type, "__name__", str(field.type)).replace("tuple", "a list")
            raise ValueError(f"{name} is {value!r}, and must be {wanted}")
    return values


def from_file(path: str, given: dict, modes: dict) -> dict:
    """The settings that --config names, as flags would give them. Raises UserError.

    given: by flags, which win. Of a run's config.json the name, and what was decided by the
    machine, is left out.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        whole = "settings" in content
        values = checked(content["settings"] if whole else content, modes)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--config {path}: {error}") from None
    theirs = values.get("preset", "auto")
    if "auto" != theirs != given.get("preset", theirs):
        raise UserError(f"--preset {given['preset']}: the settings in {path} go with --preset "
                        f"{theirs}")
    if not whole:
        return values
    for name in ("judge", "reward"):
        if load.users_code(values.get(name, "")) and name not in given:
            raise UserError(f"--config {path}: its {name} is the function {values[name]}; a run's "
                            "folder is not trusted to name code, so give the flag")
    return {name: value for name, value in values.items()
            if name not in ("name", "device", "micro_batch")}  # decided anew


def program(name: str, *words: str) -> str:
    """The command line that runs a program of this project, as it can be pasted here and now."""
    def near(path: str | Path) -> str:
        """From the current folder, if it lies in there."""
        inside = Path(path).is_relative_to(Path.cwd())
        return os.path.relpath(path) if inside else str(path)

    activated = shutil.which("python") == sys.executable
    python = "python" if activated else near(sys.executable)
    return shlex.join([python, near(load.HOME / name), *words])


def as_flags(s: Settings) -> list[str]:
    """Flags that give these settings again, but for the modes and the run's name."""
    flags = ["--preset", s.preset]
    usual = decided(Settings(**(PRESETS[s.preset] | {"device": s.device})))
    for name in [name for name in FIELDS if name not in ("preset", "mode", "name", "device")]:
        value = getattr(s, name)
        if value == getattr(usual, name) or value is None:
            continue
        if isinstance(value, bool):
            flags.append(flag(name) if value else flag("no_" + name))
        else:
            flags += [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


def resumed(folder: str, given: dict, modes: dict) -> tuple[Settings, str]:
    """The settings of a run to continue; a flag that says otherwise is an error. -> (they, why)."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        values = checked(config["settings"], modes)
        if values.keys() != FIELDS.keys():
            raise ValueError("it has other settings")
        settings = Settings(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume {folder}: no readable config.json of a run of this version "
                        f"({error})") from None
    if (Path(folder) / "summary.json").exists():
        for file in Path(folder).glob("checkpoint-*.pt"):  # killed just before
            file.unlink()
        raise UserError(f"--resume {folder}: this run is finished, its results are in there; more "
                        "rounds are a run of their own")
    for name, value in given.items():
        left_open = value == "auto" or (name, value) == ("micro_batch", 0)
        if name not in MOVABLE and not left_open and value != values[name]:
            raise UserError(f"{flag(name)} {show(value)} differs from the run's "
                            f"{show(values[name])}: --resume continues with the settings in its "
                            "config.json")
    for name in ("judge", "reward"):  # a folder can come from elsewhere: its code is not run
        if load.users_code(values[name]) and name not in given:
            raise UserError(f"--resume {folder}: the run's --{name} is the function "
                            f"{values[name]}; a folder is not trusted to name code, so give the "
                            "flag again")
    moved = {name: given[name] for name in MOVABLE if name in given}
    return decided(dataclasses.replace(settings, **moved)), "from the resumed run"


def to_resume(s: Settings, folder: Path | str, tensorboard: bool = False) -> str:
    """The command that continues a run."""
    flags = ["--resume", str(folder), *(["--tensorboard"] if tensorboard else [])]
    for name, spec in {"--reward": s.reward, "--judge": s.judge}.items():
        if load.users_code(spec):
            flags += [name, spec]
    return program("fedppo.py", *flags)

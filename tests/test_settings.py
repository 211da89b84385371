"""support/settings.py: every setting is a flag and is read, presets and modes keep their word."""

import ast
import dataclasses
import json
import types
import typing
from pathlib import Path

import pytest
import torch

import fedppo
from fedppo import MODES, Settings
from support import load, settings
from support.settings import FIELDS, PRESETS, flag

HOME = load.HOME
SHIPPED = [*HOME.glob("*.py"), *(HOME / "support").glob("*.py")]
DIFFERING = [name for name in FIELDS if PRESETS["tiny"][name] != PRESETS["pythia-70m"][name]]


def parse(*flags):
    """-> the settings of a command line on this machine's processor."""
    return settings.parse(["--device", "cpu", *map(str, flags)], MODES).settings


def given(name, value):
    """A setting as it is written on the command line."""
    if isinstance(value, bool):
        return [flag(name) if value else flag("no_" + name)]
    return [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]


# -------------------------------------------------------------------------------- no dead settings


def test_there_are_at_most_45_settings_and_each_is_read_outside_of_settings_py():
    """As an attribute of something that is called s or settings."""
    read = {node.attr for path in SHIPPED if path.name != "settings.py"
            for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value).split(".")[-1] in ("s", "settings")}
    assert len(FIELDS) <= 45 and not set(FIELDS) - read


def test_each_setting_stands_in_the_help_with_both_presets_values(capsys):
    """Compared without any space: argparse breaks lines where it likes, at hyphens too."""
    with pytest.raises(SystemExit) as stop:
        fedppo.main(["--help"])
    printed = capsys.readouterr()
    text = "".join(printed.out.split())
    assert stop.value.code == 0 and printed.err == "" and str(HOME) not in text
    for name, field in FIELDS.items():
        tiny, pythia = ("eachmode'sown" if PRESETS[preset][name] is None else
                        "".join(settings.show(PRESETS[preset][name]).split()) for preset in PRESETS)
        shown = f"[{tiny}]" if tiny == pythia else f"[tiny:{tiny};pythia-70m:{pythia}]"
        shown = "" if shown == "[none]" and PRESETS["tiny"][name] != "none" else shown
        described = "".join(field.metadata["help"].split())
        assert described + shown in text[text.index(flag(name)):], name


# -------------------------------------------------------------------------------- flags and presets

OTHER = {  # a value that is neither preset's, where twice the preset's would not do
    "mode": ("isolated", "centralized"), "seeds": (3, 4), "preset": "tiny", "out": "elsewhere",
    "name": "mine", "device": "cpu", "dtype": "bfloat16", "outlier": 3.0,
    "model": ("tiny/data", "tiny/model"), "prompts": "common",
    "dataset": "tiny/data/book.jsonl", "splits": ("a", "b"), "shards": "iid", "judge": "none",
    "reward": "shared", "reward_pooling": "last", "rule": "weights", "topology": "ring",
    "lr_schedule": "linear", "penalty": "k2-in-loss", "anchor": 0.5, "participation": 0.5,
    "beta": 0.7, "lr": 0.2, "self_weight": 0.5, "minibatches": 8, "missing_eos_penalty": 0.25,
    "threads": 3, "micro_batch": 16, "split_column": "topic", "policy_layers": 1,
    "reward_probe": 1}


def decided(name, value):
    """What becomes of a preset's value that leaves the choice to the program, on a processor."""
    return {"device": "cpu"}.get(name, 4 if (name, value) == ("micro_batch", 0) else value)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_is_a_flag_and_wins_over_the_preset(preset):
    """All other settings keep the preset's value."""
    expected = {name: decided(name, value) for name, value in PRESETS[preset].items()}
    for name, field in FIELDS.items():
        value = PRESETS[preset][name]
        other = OTHER.get(name, value * 2 if value else None)
        other = not value if field.type == bool | None else other
        found = settings.parse(["--device", "cpu", "--preset", preset, *given(name, other)], MODES)
        # How the responses of another dataset end is seen when it is loaded.
        seen = {"response_eos": None} if (name, preset) == ("dataset", "pythia-70m") else {}
        if name != "preset":
            assert vars(found.settings) == expected | seen | {"preset": preset, name: other}
            assert found.reason == "asked for"
        optional = isinstance(field.type, types.UnionType)
        kind = typing.get_args(field.type)[0] if optional else field.type
        assert isinstance(getattr(found.settings, name), typing.get_origin(kind) or kind)


@pytest.mark.parametrize("preset, source", [("tiny", "pythia-70m"), ("pythia-70m", "tiny")])
def test_one_preset_can_be_turned_into_the_other_flag_by_flag(preset, source):
    flags = [word for name in DIFFERING for word in given(name, PRESETS[source][name])
             if PRESETS[source][name] not in ((), None)]
    found = parse("--preset", preset, *flags)
    for name in DIFFERING:
        value = PRESETS[source][name]
        assert getattr(found, name) == decided(name, PRESETS[preset][name] if value is None
                                               else value)


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_can_be_said_as_flags_again(preset):
    first = parse("--preset", preset, "--mode", "isolated", "merged")
    some = [dataclasses.replace(first, **{name: OTHER[name]})
            for name in ("seeds", "model", "beta", "micro_batch", "split_column", "prompts")]
    some += [dataclasses.replace(first, response_eos=not first.response_eos), first]
    for s in some:
        again = parse(*settings.as_flags(s), "--mode", *s.mode)
        assert again == s, settings.as_flags(s)
    assert settings.as_flags(first) == ["--preset", preset]


def test_a_program_is_named_as_it_can_be_called_here(tmp_path, monkeypatch):
    """Relative to the folder that one is in, by the Python that runs now."""
    monkeypatch.setattr(settings.load, "HOME", tmp_path / "a house")
    monkeypatch.setattr(settings.sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    assert settings.program("plot.py", "a b") == "bin/python 'a house/plot.py' 'a b'"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert settings.program("plot.py") == f"{tmp_path}/bin/python '{tmp_path}/a house/plot.py'"
    monkeypatch.setattr(settings.shutil, "which", {"python": settings.sys.executable}.get)
    assert settings.program("plot.py") == f"python '{tmp_path}/a house/plot.py'", "activated"


def test_settings_come_from_a_file_too(tmp_path, capsys):
    """Part of them, or a run's config.json; flags win, and the run's name stays its own."""
    file = tmp_path / "mine.json"

    def parsed(content, *flags):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return parse("--config", file, "--preset", "tiny", *flags)
    assert parsed({"mode": ["isolated"], "rounds": 3, "beta": None}) == \
        parse("--preset", "tiny", "--mode", "isolated", "--rounds", "3")
    assert parsed({"rounds": 3, "lr": 0.25}, "--rounds", "5").rounds == 5
    s = parse("--preset", "tiny", "--name", "first", "--anchor", "0.25", "--seeds", "1", "2")
    theirs = dataclasses.asdict(s) | {"device": "cuda", "micro_batch": 999}  # of another machine
    assert parsed({"settings": theirs, "date": "today"}) == dataclasses.replace(s, name="")
    for name in ("judge", "reward"):  # a folder is not trusted to name code
        theirs = {"settings": dataclasses.asdict(s) | {name: "evil.py:f"}}
        with pytest.raises(settings.UserError, match=f"its {name} is the function evil.py:f"):
            parsed(theirs)
        assert getattr(parsed(theirs, flag(name), "mine.py:f"), name) == "mine.py:f"
    for content, word in (('{"rounds": "3"}', "rounds is '3', and must be int"),
                          ('{"seeds": 3}', "must be a list"), ('{"mode": ["good"]}', "good"),
                          ('{"round": 3}', "there is no setting round"), ("[1]", "--config"),
                          ("{", "--config"), ('{"rule": "best"}', "rule is 'best'")):
        with pytest.raises(settings.UserError, match=word):
            parsed(content)
    with pytest.raises(settings.UserError, match="--preset tiny: .* go with --preset pythia-70m"):
        parsed({"preset": "pythia-70m", "lr": 1e-3})
    assert parsed({"preset": "tiny", "rounds": 3}) == parsed({"preset": "auto", "rounds": 3})
    assert fedppo.main(["--config", str(tmp_path / "nowhere.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_help_says_what_each_mode_is(capsys):
    with pytest.raises(SystemExit):
        fedppo.main(["--help"])
    printed = capsys.readouterr().out
    for name, mode in MODES.items():
        assert mode.help and f"\n  {name:<12} {mode.help}\n" in printed


def test_beta_and_lr_are_each_modes_own_unless_given_by_hand():
    """In tiny as chosen by benchmarks/tune.py; in pythia-70m they are the preset's for all."""
    chosen = json.loads((HOME / "benchmarks" / "results" / "chosen.json").read_text())

    def arms(*flags):
        found = parse("--mode", *MODES, *flags)
        arms = {mode: fedppo.arm_settings(found, mode) for mode in found.mode}
        return {mode: (arm.beta, arm.lr, arm.anchor, arm.self_weight)
                for mode, arm in arms.items()}
    own, prompts = arms("--preset", "tiny"), PRESETS["tiny"]["prompts"]
    assert set(own) == {*MODES} and own["classic"] != own["isolated"]
    for mode, values in own.items():
        assert values == (MODES[mode].beta, MODES[mode].lr, MODES[mode].anchor,
                          MODES[mode].self_weight)
        name = "common" if mode == "centralized" else prompts  # the same to it
        tuned = chosen[f"{mode}, {name} prompts"]["settings"]
        assert values == (tuned["beta"], tuned["lr"], tuned.get("anchor", 1),
                          tuned.get("self_weight", 0.4)), "change both"
    alone = {"classic": 1}  # whose reference is the initial policy, whatever is said
    given = "--beta", 0, "--lr", 0.3, "--anchor", 0, "--self-weight", 0.5
    for flags, beta, lr, anchor, weight in (
            (("--preset", "pythia-70m"), 0.05, 1e-5, 0.1, 0.4), (given, 0.0, 0.3, 0.0, 0.5)):
        assert arms("--preset", "tiny", *flags) == {
            mode: (beta, lr, alone.get(mode, anchor), weight) for mode in MODES}
    assert arms("--preset", "tiny", "--beta", 2)["merged"][:2] == (2.0, MODES["merged"].lr)


@pytest.fixture
def machine(monkeypatch):
    """machine(gpu, cached, hub): what this machine is told to have."""
    def make(gpu, cached=False, hub=False):
        import huggingface_hub
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache",
                            lambda repo, file, **kw: f"/cache/{file}" if cached else None)
        monkeypatch.setattr(load, "online", lambda *args: hub)
    return make


@pytest.mark.parametrize("gpu, cached, hub, preset, reason", [
    (False, True, True, "tiny", "no GPU"), (True, True, False, "pythia-70m", "cached"),
    (True, False, True, "pythia-70m", "hub answers"), (True, False, False, "tiny", "not cached")])
def test_auto_is_pythia_with_a_gpu_and_a_model(machine, gpu, cached, hub, preset, reason):
    machine(gpu, cached, hub)
    chosen, why = settings.choose_preset({})
    assert chosen == preset and reason in why
    assert parse().preset == "tiny", "the processor is asked for"
    assert parse("--preset", chosen).model == PRESETS[preset]["model"]


def test_without_a_gpu_nobody_is_asked(machine, monkeypatch):
    machine(gpu=False)
    monkeypatch.setattr(load, "online", lambda *args: pytest.fail("asked"))
    assert settings.parse([], MODES).settings.preset == "tiny"


def test_what_is_named_is_never_replaced_and_decides_the_preset(machine, tmp_path):
    machine(gpu=False)
    for named in ("--model", "--dataset"):
        found = parse(named, "mine/own")
        assert getattr(found, named[2:]) in ("mine/own", ("mine/own",))
        assert (found.preset, found.lr, found.judge) == ("pythia-70m", 1e-5, "heldout")
        assert parse(named, "mine/own", "--preset", "tiny").preset == "tiny"
    for model, dataset, preset in (
            (HOME / "tiny/model", HOME / "tiny/data", "tiny"), ("tiny/model", tmp_path, "tiny"),
            (tmp_path, "tiny/data", "pythia-70m")):  # the model decides
        found = parse("--model", model, "--dataset", dataset)
        assert found.preset == preset and (found.lr is None) == (preset == "tiny")


def test_the_tiny_worlds_judge_does_not_judge_other_text(tmp_path):
    other = ["--preset", "tiny", "--dataset", str(tmp_path)]
    command = settings.parse(other, MODES)
    assert command.settings.judge == "heldout" and "judge" in command.reason
    assert parse(*other, "--judge", "none").judge == "none"
    assert parse(*other[:-1], "tiny/data").judge == "tiny/judge.py:score"


def test_the_users_own_tiny_folder_is_not_the_embedded_one(tmp_path, monkeypatch):
    (tmp_path / "tiny" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = parse("--preset", "tiny", "--model", "tiny/model")
    assert Path(load.home(found.model[0])).resolve() == tmp_path / "tiny" / "model"
    assert load.home(found.dataset) == str(HOME / "tiny/data")


def test_settings_made_by_hand_are_the_tiny_presets():
    assert vars(Settings()) == PRESETS["tiny"]
    assert settings.decided(dataclasses.replace(Settings(), device="cpu")).micro_batch == 32

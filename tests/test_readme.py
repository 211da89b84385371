"""Both READMEs say what is so: line counts, links, flags, numbers; and their code runs."""

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import fedppo
import kl
from support import run
from support.settings import Settings, parse

ROOT = Path(kl.__file__).parent
RESULTS = ROOT / "benchmarks/results"
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "benchmarks/README.md")}
README, BENCHMARKS = PAGES.values()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
BAND = r"[+-]\d+\.\d\d \[[^]]*\]"


# ------------------------------------------------------------------------------- files and counts


def test_the_map_has_the_true_line_counts():
    rows = dict(re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \| ([\d,]+) \|", README, re.M))
    assert list(rows) == ["walkthrough.py", "kl.py", "ppo_core.py", "policies.py", "data.py",
                          "world.py", "fedppo.py", "plot.py"]
    true = {file: f"{len((ROOT / file).read_text().splitlines()):,}" for file in rows}
    assert rows == true
    total = sum(int(lines.replace(",", "")) for lines in true.values())
    assert f"are the stage: all that the algorithm is, {total:,} lines" in README, f"{total:,}"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_pictures_exist(page):
    targets = re.findall(r"\]\((?!http)([^)#]*)(?:#([\w-]+))?\)", PAGES[page])
    assert len(targets) > 10
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in PAGES[page].splitlines()
                if line.startswith("#")}
    for path, anchor in targets:
        assert (ROOT / page).parent.joinpath(path).exists(), path
        assert path or anchor in headings, anchor


def test_readme_is_short():
    assert len(README.splitlines()) <= 210


# ------------------------------------------------------------------------------ flags and commands


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_is_one_of_the_command_line(page):
    scripts = [ROOT / "plot.py", ROOT / "compare.py", *(ROOT / "benchmarks").glob("*.py")]
    known = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Settings)}
    known |= {"--check", "--resume", "--help", "--no-response-eos", "--config", "--quiet",
              "--tensorboard"}
    known |= {flag for path in scripts
              for flag in re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text())}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGES[page]))
    assert named and not named - known, named - known


def test_commands_parse():
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    commands = re.findall(r"python fedppo\.py (.*)", shell)
    whole = [command.split("#")[0].split() for command in commands if "DIR_" not in command]
    assert len(whole) == 2
    for argv in whole:
        assert parse([*argv, "--preset", "tiny"], fedppo.MODES).settings.agents == 4


def test_ci_runs_the_readmes_test_command():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    command = next(line for line in lines if line.startswith("python3 -m venv"))
    assert f"```sh\n{command}\n```" in README


def test_every_key_of_the_metrics_is_explained():
    for key in run.KEYS:
        assert re.search(rf"^    (\w+, )*{key}\b", run.__doc__, re.M), key


def test_the_table_of_modes_is_that_of_the_program():
    table = README.split("| mode | rows of W |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(fedppo.MODES)
    for cells in rows:
        name = cells[0].strip("`")
        row = fedppo.MODES[name]
        arm = fedppo.arm_settings(parse(["--preset", "tiny"], fedppo.MODES).settings, name)
        assert cells[1].startswith("one agent" if row.pooled else row.topology or "`--topology`")
        if row.anchor < 1:  # two references at least, an own copy and the initial policy
            assert cells[2] == (f"`{row.rule}`" if row.rule else "`--rule`"), name
        assert cells[3] == ("yes" if row.moves else "no"), name
        assert cells[4].startswith(f"{row.anchor:g}") and arm.anchor == row.anchor, name
        assert cells[5] == f"{arm.beta:g}, {arm.lr:.0e}".replace("e-0", "e-"), name


# ---------------------------------------------------------------------------------------- numbers


def tables(text: str) -> list[list[str]]:
    """The tables of a page of markdown, as lists of their lines, the header first."""
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]


def section(title: str) -> str:
    return BENCHMARKS.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("text, file, count", [
    (README.split("**Does it help?**")[1].split("\n## ")[0], "tables.md", 1),
    (section("What was measured"), "tables.md", 9),
    (section("When an agent is bad"), "attacks.md", 1),
    (section("A real language model on real text"), "real.md", 2),
    (section("Speed"), "speed-*.md", 5),
    (section("What did not work"), "tables.md", 0),
], ids=["first screen", "measured", "attacks", "real", "speed", "did not work"])
def test_every_result_stands_in_its_file(text, file, count):
    """Each table is a part of one table of the file, and each difference with a band is in it."""
    made = [path.read_text() for path in sorted(RESULTS.glob(file))]
    sources = [table for page in made for table in tables(page)]
    shown = [table for table in tables(text) if re.search(r"\d\.\d", "".join(table))]
    assert len(shown) == count
    for table in shown:
        assert any(table[0] == source[0] and set(table) <= set(source) for source in sources), table
    for band in re.findall(BAND, text):
        assert any(band in page for page in made), band


def test_the_whole_tables_of_the_study_are_shown():
    made = (RESULTS / "tables.md").read_text()
    for title in ("Scores, common prompts", "Questions, common prompts", "Scores, own prompts",
                  "Questions, own prompts", "Own topics, own prompts"):
        table = tables(made.split(f"\n## {title}\n")[1])[0]
        assert "\n".join(table) in BENCHMARKS, title
    assert "\n".join(tables(made.split("\n## In short\n")[1])[0]) in README


@pytest.mark.slow
def test_the_tables_are_those_of_their_measurements():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import attacks
    import report
    import speed
    import study
    assert report.tables(report.Study(RESULTS)) == (RESULTS / "tables.md").read_text()
    rows = study.load(RESULTS / "attacks.csv")
    assert attacks.tables(rows) == (RESULTS / "attacks.md").read_text()
    for path in RESULTS.glob("speed-*.json"):
        assert speed.tables(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


# ------------------------------------------------------------------------------------------- code


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict:
    """The names that README's python blocks define, run in order as a reader pastes them; there is
    a run where they read one."""
    namespace: dict = {}
    modes = dict(fedppo.MODES)
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"mode": mode, "update": update, "judge": update if judged else None}) + "\n"
        for mode in ("isolated", "merged") for update in range(3) for judged in (True, False)))
    with contextlib.chdir(ROOT):
        for block in BLOCKS:
            exec(block.replace("runs/NAME", str(folder)), namespace)
    fedppo.MODES.clear()
    fedppo.MODES.update(modes)
    return namespace


def test_the_metrics_are_drawn_by_pandas(shown):
    from matplotlib import pyplot
    lines = {line.get_label(): line.get_ydata().tolist() for line in pyplot.gca().get_lines()}
    assert lines == {"isolated": [0, 1, 2], "merged": [0, 1, 2]}
    pyplot.close("all")


def test_two_rounds_of_two_agents_from_python(shown):
    rows = shown["rows"]
    assert sorted((row["agent"], row["update"]) for row in rows) == \
        [(agent, update) for agent in range(2) for update in range(3)]
    assert all(isinstance(row["judge"], float) for row in rows)
    assert all(row["kl"] > 0.01 for row in rows if row["update"] == 2)  # line 1 is at the reference
    assert len(shown["agents"]) == 2


def test_example_of_a_reward_function(shown):
    scores = shown["brevity"](["a", "a"], ["one two", "one"], [True, False])
    assert scores == pytest.approx([0.8, -0.1])


def test_the_pipeline_example_writes_on(shown):
    assert shown["generate"]("the soup was")[0]["generated_text"].startswith("the soup was")


def test_the_recipe_is_ppo_with_the_penalty(shown):
    stream = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=stream, requires_grad=True)
    peers = [torch.randn(2, 5, 7, generator=stream) for _ in range(2)]
    tokens = torch.randint(7, (2, 5), generator=stream)
    mask = torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])
    old = kl.token_logprobs(logits, tokens).detach()
    made = kl.reference(peers, [0.5, 0.5])
    half = [0.5, 0.5]
    loss = shown["ppo_loss"](logits, tokens, mask, old, torch.zeros(2, 5), made, half, beta=2.0)
    rho = (0.5 * peers[0].log_softmax(-1) + 0.5 * peers[1].log_softmax(-1)).log_softmax(-1)
    probs = logits.softmax(-1)
    penalty = (probs * (probs.log() - rho)).sum(-1)  # no advantage: the penalty is the loss
    expected = 2.0 * (penalty * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert logits.grad.abs().sum() > 0 and not logits.grad[1, 3:].any()


def test_the_recipes_references_are_models_behind_left_padding(shown):
    """Learned positions (GPT-2) show what rotary ones hide."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    models = [GPT2LMHeadModel(config).eval() for _ in range(2)]
    ids, mask = torch.randint(1, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    padded = [torch.nn.functional.pad(x, (4, 0)) for x in (ids, mask)]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits[:, 3:-1] for model in models]
    made = shown["peers_reference"](models, [0.7, 0.3], *padded, prompt_length=8)
    assert torch.allclose(made, kl.cooperative_logprobs(logits, [0.7, 0.3]), atol=1e-5)


def test_the_recipe_runs_beside_a_copy_of_kl_alone(tmp_path):
    shutil.copy(ROOT / "kl.py", tmp_path)
    (tmp_path / "recipe.py").write_text(next(block for block in BLOCKS if "ppo_loss" in block))
    subprocess.run([sys.executable, "recipe.py"], cwd=tmp_path, check=True, timeout=60)


def test_what_is_installed_is_all_that_there_is():
    """pip install -e . takes every module, and what it needs is pinned for the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["py-modules"]
    assert sorted(listed) == sorted(path.stem for path in ROOT.glob("*.py"))
    pinned = re.findall(r"^(\w+)==", (ROOT / "requirements.txt").read_text(), re.M)
    needed = [re.match(r"\w+", name)[0] for name in project["project"]["dependencies"]]
    assert set(needed) <= set(pinned)

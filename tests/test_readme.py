"""What the README says is true: line counts, links to lines, numbers, commands, and the recipes run."""

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import fedppo
import kl

ROOT = Path(kl.__file__).parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_map_has_the_true_line_counts():
    rows = re.findall(r"^\| \[`([\w/]+\.py)`\]\([\w/]+\.py\) \| ([\d,]+) \|", README, re.M)
    assert {file for file, _ in rows} >= {"fedppo.py", "ppo_core.py", "kl.py", "data.py", "plot.py"}
    for file, lines in rows:
        assert int(lines.replace(",", "")) == len((ROOT / file).read_text().splitlines()), file


def test_links_point_at_the_lines_they_name():
    links = re.findall(r"\[`([^`]+)`\]\(([\w/]+\.py)#L(\d+)\)", README)
    assert len(links) >= 29
    for text, file, line in links:
        assert text in (ROOT / file).read_text().splitlines()[int(line) - 1], (text, file, line)


def test_relative_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("python3 -m venv"))
    assert f"```sh\n{command}\n```" in README


def test_every_result_stands_in_the_studys_tables():
    """Rows of tables and differences with a band, on the first screen and in the sections that report measurements."""
    tables = (ROOT / "benchmarks/results/tables.md").read_text()
    for section in ("**Does it help?**", "## What was measured", "## Where it helps and where not",
                    "## What did not work"):
        text = README.split(section)[1].split("\n## ")[0]
        rows = [line for line in text.splitlines() if line.startswith("| ")]
        for row in rows:
            assert row in tables.splitlines(), row
        for band in re.findall(r"[+-]\d\.\d\d \[[^]]*\]", text):
            assert band in tables, band
    assert "| arm |" in README and "| regime |" in README


@pytest.mark.parametrize("section, file", [("When an agent is bad", "attacks.md"), ("Speed", "speed-*.md")])
def test_other_results_stand_in_their_files(section, file):
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    made = "".join(path.read_text() for path in (ROOT / "benchmarks/results").glob(file))
    assert rows
    for row in rows:
        assert row in made.splitlines(), row
    for band in re.findall(r"[+-]\d\.\d\d \[[^]]*\]", text):
        assert band in made, band


def test_the_tables_are_those_of_their_measurements():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import attacks
    import speed
    import study
    results = ROOT / "benchmarks/results"
    assert attacks.tables(study.load(results / "attacks.csv")) == (results / "attacks.md").read_text()
    for path in results.glob("speed-*.json"):
        assert speed.tables(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


def test_the_tables_are_those_of_the_csv():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import report
    results = ROOT / "benchmarks/results"
    assert report.tables(report.Study(results)) == (results / "tables.md").read_text()


def test_the_dict_of_metrics_is_the_glossary(tmp_path):
    assert fedppo.main(["--preset", "tiny", "--agents", "1", "--pairs", "20", "--eval-prompts", "8", "--rounds", "1",
                        "--updates", "1", "--batch", "8", "--out", str(tmp_path), "--name", "run"]) == 0
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    glossary = README.split("## Glossary of metrics")[1].split("## ")[0]
    named = {name for line in glossary.splitlines() if line.startswith("| `")
             for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}
    assert named == set(row)


@pytest.fixture(scope="module")
def recipes() -> dict:
    """The names that the README's python blocks define, run in order as someone who pastes them would."""
    namespace: dict = {}
    with contextlib.chdir(ROOT):
        for block in BLOCKS:
            exec(block, namespace)
    return namespace


def test_recipe_ppo(recipes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, requires_grad=True)
    peers = [torch.randn(2, 5, 7, generator=generator) for _ in range(2)]
    tokens, mask = torch.randint(7, (2, 5), generator=generator), torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])
    old = kl.token_logprobs(logits, tokens).detach()
    loss = recipes["ppo_loss"](logits, tokens, mask, old, torch.zeros(2, 5), peers, [0.5, 0.5], beta=2.0)
    rho = (0.5 * peers[0].log_softmax(-1) + 0.5 * peers[1].log_softmax(-1)).log_softmax(-1)
    probs = logits.softmax(-1)
    expected = (2.0 * (probs * (probs.log() - rho)).sum(-1) * mask).sum() / mask.sum()  # no advantage: penalty alone
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert logits.grad.abs().sum() > 0 and not logits.grad[1, 3:].any()


def test_recipe_grpo(recipes):
    rewards = torch.tensor([[1.0, 3.0]])  # one prompt, two responses: advantages -0.707 and 0.707
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    loss = recipes["grpo_loss"](logprobs, logprobs.detach(), torch.full((2, 3), -1.5), rewards, torch.ones(2, 3))
    assert loss.item() == pytest.approx(0.04 * 0.5**2 / 2, rel=1e-5)  # advantages cancel; k2 = x^2/2, x = 0.5
    loss.backward()
    assert torch.allclose(logprobs.grad[:, 0] * 6, torch.tensor([0.7071, -0.7071]) + 0.04 * 0.5, atol=1e-4)


def test_recipe_hugging_face_references(recipes):
    from transformers import AutoModelForCausalLM
    models = [AutoModelForCausalLM.from_pretrained(ROOT / "tiny/model", dtype=torch.float32).eval() for _ in range(2)]
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        own = models[0](input_ids=ids, attention_mask=mask).logits[:, 3:-1]
        models[1].get_output_embeddings().weight.mul_(1.1)
    own.requires_grad_(True)
    penalty = recipes["penalty_to_models"](own, models, [0.7, 0.3], ids, mask, prompt_length=4)
    assert penalty.shape == (2, 5) and (penalty > 0).all()
    same = recipes["penalty_to_models"](own, models, [1.0, 0.0], ids, mask, prompt_length=4)
    assert same.abs().max() < 1e-5
    penalty.sum().backward()
    assert own.grad.abs().sum() > 0


def test_recipe_hugging_face_references_behind_left_padding(recipes):
    """Learned positions (GPT-2) show what rotary ones hide."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    ids, mask = torch.randint(1, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    padded = [torch.nn.functional.pad(x, (4, 0)) for x in (ids, mask)]
    with torch.no_grad():
        own = model(input_ids=ids).logits[:, 3:-1]
    assert recipes["penalty_to_models"](own, [model], [1.0], *padded, prompt_length=8).abs().max() < 1e-6


def test_the_pipeline_example_writes_on(recipes):
    assert recipes["generate"]("the soup was")[0]["generated_text"].startswith("the soup was")


def test_example_of_a_reward_function(recipes):
    assert recipes["brevity"](["a", "a"], ["one two", "one"], [True, False]) == pytest.approx([0.8, -0.1])

"""walkthrough.py runs to its end and agrees with ppo_core.py; it notices a broken formula."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kl
import ppo_core
import walkthrough

ROOT = Path(__file__).resolve().parent.parent
COMPARED = (
    "log pi_old", "V (", "log rho", "KL to rho", "A (gae)", "return (gae)", "whitened A (whiten)",
    "policy loss, step 2", "value loss, step 2", "gradient norm", "parameters after")


def test_it_runs_from_anywhere_and_agrees_with_ppo_core(tmp_path):
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}  # it prints on any terminal
    done = subprocess.run([sys.executable, ROOT / "walkthrough.py"], cwd=tmp_path, env=plain,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line[0] for line in lines if re.match(r"\d [A-Z]{3}", line)] == list("012345678")
    assert lines[-1] == f"All {len(COMPARED)} agree to 1e-5."
    table = [re.fullmatch(r"  (.+?) +(-?\d\S+) +(-?\d\S+) +(\de[+-]\d\d)", line) for line in lines]
    rows = [match.groups() for match in table if match]
    assert len(rows) == len(COMPARED)
    for (name, here, there, gap), start in zip(rows, COMPARED, strict=True):
        assert name.startswith(start)
        assert float(here) == pytest.approx(float(there), abs=2e-5)
        assert float(gap) <= 1e-5
    # On whatever machine: there is something to see where it speaks of clipping.
    assert not re.search(r"at\s0 of \d+ tokens", done.stdout)


def break_gae(rewards, values, mask, gamma, lam, right=ppo_core.gae):
    return right(rewards, values, mask, gamma, 0.9)  # another lambda


def break_penalty(logprobs, reference, weights, right=kl.penalty, **options):
    return 1.001 * right(logprobs, reference, weights, **options)


@pytest.mark.parametrize("module, name, broken, found", [
    (ppo_core, "gae", break_gae, "A (gae)"),
    (kl, "penalty", break_penalty, "KL to rho"),
    (ppo_core, "VALUE_COEF", 0.2, "parameters after"),  # which optimise alone reads
])
def test_a_broken_formula_is_found(module, name, broken, found, monkeypatch, capsys):
    monkeypatch.setattr(module, name, broken)
    assert walkthrough.main() == 1
    _, told, names = " ".join(capsys.readouterr().out.split()).partition("They DIFFER: ")
    assert told and found in names

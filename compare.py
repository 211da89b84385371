"""The same prompts, answered by several agents side by side: a row per prompt, a column per agent.

    python compare.py runs/first
    python compare.py runs/first/agents/merged-seed0-agent0 --prompts "my soup stayed"
    python compare.py runs/first/agents/merged-seed0-agent0 --chat

In reading order
    1. whom      run_of, agents_of: folders -> the run's settings, and its agents' folders
    2. answers   Table: prompts, and what each policy answers, judged
    3. tables    in_terminal; the markdown is that of samples.md
    4. main      compare, chat; command line to exit code

Model, data and judge are those of the first folder's run (world.py), so that prompts are read as in
training. Every column is sampled with the same random stream: what differs is the policy.
"""

import dataclasses
import itertools
import json
import os
import shutil
import sys
import textwrap
from pathlib import Path

from tqdm import tqdm

import ppo_core
from data import UserError, decode, generator
from support import fast, load, rows
from support.run import Stopped, markdown_table, print_anything, sample_cell, stoppable, write_text
from support.settings import FIELDS, FITTED, Parser, Settings, checked, to_resume
from world import World, deal_rows

# -------------------------------------------------------------------------------------------- whom


def run_of(folder: str) -> tuple[Path, Settings]:
    """An agent's or a run's folder -> (the run's folder, its settings). Raises UserError."""
    for path in (Path(folder), Path(folder).resolve().parent.parent):
        try:
            found = json.loads((path / "config.json").read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a model's folder has a config.json too
        try:
            values = checked(found, found["mode"])  # a mode of one's own will do
            if values.keys() != FIELDS.keys():
                raise ValueError("it has other settings")
            return path, Settings(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: no config.json of a run of this version ({error})") from None
    raise UserError(f"{folder} is neither a run's folder nor one of its agents'")


def agents_of(folder: str) -> list[Path]:
    """A run's agents of its first seed, or the one model that the folder is. Raises UserError."""
    path = Path(load.home(folder))
    try:
        home, s = run_of(folder)
    except UserError:
        home = None
    if home != path:
        return [path]
    agents = (path / "agents" / f"{mode}-seed{s.seeds[0]}-agent{index}"
              for mode in s.mode for index in range(s.agents))
    if not (found := [agent for agent in agents if agent.is_dir()]):
        raise UserError(f"{path} has no agents yet: {to_resume(s, path)} goes on")
    return found


# ----------------------------------------------------------------------------------------- answers


class Table:
    """Prompts, and a column of answers for each policy."""

    def __init__(self, s: Settings, seed: int):
        """s: of the run, with the judge that is wanted. Raises UserError."""
        self.world, self.seed = World(s), seed
        self.prompts: list[str] = []
        self.columns: dict[str, list[dict]] = {}

    def ask(self, texts: list[str]) -> None:
        """Set the prompts; in a run on conversations a text is one turn of the user's."""
        world, template = self.world, load.chat_template(self.world.tokenizer)
        turn = template is not None and any(pair.templated for pair in world.pairs)
        read = {text: template.render([("user", text)]) if turn else text for text in texts}
        ids = load.prompt_ids(world.tokenizer, list(read.values()), world.model,
                              world.settings.response_length, turn)
        world.prompt_ids |= ids
        for text, prompt in read.items():
            world.texts[tuple(ids[prompt])] = text
        self.prompts = list(read.values())

    def answer(self, name: str, policy: ppo_core.Policy) -> tuple:
        """One more column: the policy's response to each prompt, whether it ended, its score.

        -> what was sampled, as World.respond has it.
        """
        world = self.world
        sampled = world.respond(self.prompts, policy, generator(self.seed, "compare"))
        scores = world.judge(*sampled).tolist() if world.judge else [None] * len(self.prompts)
        ended = ppo_core.has_ended(*sampled[2:], world.eos_ids).tolist()
        responses = decode(world.tokenizer, *sampled[2:])
        self.columns[name] = [
            {"response": response, "ended": end, "judge": score}
            for response, end, score in zip(responses, ended, scores, strict=True)]
        return sampled

    def policy(self, folder: Path) -> ppo_core.Policy:
        """The policy that an agent's folder holds. Raises UserError."""
        world = self.world
        model, tokenizer, forbidden = load.load_model(str(folder), world.settings.device, print)
        if (tokenizer.get_vocab() != world.tokenizer.get_vocab()
                or len(forbidden) != len(world.forbidden)):
            raise UserError(f"{folder} has another vocabulary than {world.settings.model[0]}")
        fast.eager_if_short(model, world.longest, world.initial.dtype)
        return fast.policy(model, world.forbidden, world.initial.dtype)

    def rows(self) -> list[list[str]]:
        """A row per prompt, its text first."""
        texts = [self.world.texts.get(tuple(self.world.prompt_ids[prompt]), prompt)
                 for prompt in self.prompts]
        return [[text, *(sample_cell(answers[n]) for answers in self.columns.values())]
                for n, text in enumerate(texts)]


# ------------------------------------------------------------------------------------------ tables

NARROWEST = 18  # characters of a column in the terminal
LEGEND = "⏹ marks a response that ended by itself; a number is the judge's score."


def in_terminal(table: list[list[str]], width: int) -> str:
    """A header and rows -> text of at most `width` characters a line.

    Columns for which there is no room go to a table below, which has the prompts again.
    """
    room, lines = max(1, (width + 2) // (NARROWEST + 2) - 1), []  # two spaces between columns
    for first in range(1, len(table[0]), room):
        part = [[row[0], *row[first:first + room]] for row in table]
        size = (width + 2) // len(part[0]) - 2
        for row in part:
            wrapped = [textwrap.wrap(text, size) for text in row]
            lines += ["  ".join(piece.ljust(size) for piece in pieces).rstrip()
                      for pieces in itertools.zip_longest(*wrapped, fillvalue="")]
            lines.append("-" * width if row is part[0] else "")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- main


def read_prompts(given: str) -> list[str]:
    """A text file with a prompt a line, a file of rows, or a prompt -> prompts. Raises UserError.
    """
    if Path(given).suffix and " " not in given and not os.path.isfile(given):
        raise UserError(f"--prompts {given}: there is no such file")
    if Path(given).suffix in (".gz", *rows.KINDS):
        return [pair.plain or pair.prompt
                for pair in rows.load_pairs(given, labelled=False).pairs]
    try:
        lines = Path(given).read_text(encoding="utf-8-sig").splitlines() \
            if os.path.isfile(given) else [given]
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {given} is not UTF-8 text: {error}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"--prompts {given!r} holds no prompt")
    return prompts


def parser() -> Parser:
    made = Parser("compare.py", allow_abbrev=False, description="The same prompts, answered by "
                  "several agents and by the model that they started from.")
    made.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder or an agent's; "
                      "after the first, that of any model with its vocabulary")
    made.add_argument("--prompts", metavar="FILE", help="a text file with a prompt a line, a "
                      ".jsonl with `prompt`, or a prompt itself [four of the run's held-out ones]")
    made.add_argument("--judge", help="as fedppo.py's; none for none [the run's, if it is no "
                      "function of the user's and was not fitted]")
    made.add_argument("--chat", action="store_true", help="with one agent: a line in, an answer "
                      "out, until the end of input; earlier lines are not remembered")
    made.add_argument("--out", metavar="FILE.md", help="[compare.md in the run's folder]")
    made.add_argument("--seed", type=int, default=0, help="of sampling [0]")
    return made


def judge_of(s: Settings, given: str | None) -> str:
    """The judge that is wanted, else the run's if it can be had: one that was fitted is not stored,
    and a folder is not trusted to name code. Raises UserError."""
    if given == "heldout":
        raise UserError("--judge heldout: a judge that was fitted is not stored")
    unknown = s.judge == "heldout" or load.users_code(s.judge)
    if unknown and not given:
        print(f"no scores: --judge names a judge, which the run's {s.judge} cannot be here")
    return given or ("none" if unknown else s.judge)


def compare(options) -> None:
    """Do what the command line asks for. Raises UserError."""
    home, s = run_of(options.folders[0])
    models = [agent for folder in options.folders for agent in agents_of(folder)]
    if options.chat and len(models) > 1:
        raise UserError(f"--chat is with one agent, not {len(models)}")
    out = Path(options.out or home / "compare.md")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    judge = judge_of(s, options.judge)
    # No reward is needed here. But which rows are dropped, and so which prompts are held out, must
    # be as in the run, which read labels if it fitted a reward or a judge to them.
    reward = "private" if s.reward in FITTED or s.judge == "heldout" else "tiny/judge.py:score"
    table = Table(dataclasses.replace(s, judge=judge, reward=reward, pairs=0, device="auto"),
                  options.seed)
    if options.chat:
        return chat(table, table.policy(models[0]))
    if options.prompts is None:
        table.prompts = deal_rows(table.world, s.seeds[0])[0][:4]
    else:
        table.ask(read_prompts(options.prompts))
    for name, initial in zip(s.model, table.world.initials, strict=True):
        table.answer("before" if len(s.model) == 1 else f"before, {name}", initial)
    names = [path.name for path in models]
    for path in tqdm(models, unit="agent", leave=False, disable=None):
        alone = names.count(path.name) == 1
        table.answer(path.name if alone else str(path), table.policy(path))
    header, found = ["prompt", *table.columns], table.rows()
    print(in_terminal([header, *found], shutil.get_terminal_size().columns))
    write_text(out, "\n".join(["# The same prompts, answered side by side", "", LEGEND, "",
                               *markdown_table(header, found), ""]))
    print(f"{LEGEND}\ntable   {out}")


def chat(table: Table, policy: ppo_core.Policy) -> None:
    """A line in, an answer out, until the end of input."""
    print("a prompt a line, until the end of input (Ctrl-D)", file=sys.stderr)
    for line in filter(None, map(str.strip, sys.stdin)):
        try:
            table.ask([line])
        except UserError as error:  # one that the model cannot read, as it is too long
            print(f"error: {error}", file=sys.stderr)
            continue
        table.answer("answer", policy)
        print(table.rows()[0][1], flush=True)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake the user can mend, in one line, 130 or 143 by a signal."""
    print_anything()
    try:
        with stoppable():
            compare(parser().parse_args(argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        return 128 + stop.number
    return 0


if __name__ == "__main__":
    sys.exit(main())

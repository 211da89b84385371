"""Reads preference rows from the files that people have, as data.Pair. Nothing is learned here.

In reading order
    1. load_pairs      a dataset in any of its forms -> Rows: the pairs, and what was dropped
    2. one row         conversations, and what of them is the prompt and what the response
    3. files           .jsonl, .json, .csv, .parquet, gzipped too, folders of them; the hub

Whatever a library raises about a user's file becomes a UserError of one line, which names the file,
the row, and how many more rows there are like it.
"""

import csv
import dataclasses
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import Pair, UserError

# -------------------------------------------------------------------------------------- load_pairs


@dataclass(frozen=True)
class Rows:
    """The pairs of the splits read, the total rows of these, and dropped {reason: rows}."""

    pairs: list[Pair]
    dropped: Counter
    total: int
    form: str  # "" for plain texts; else how its conversations become prompts, in words


EQUAL = "chosen and rejected are the same"
DUPLICATE = "another row is the same"
APART = "chosen and rejected answer different prompts"


def load_pairs(dataset: str, splits: tuple[str, ...] = (), labelled: bool = True, *,
               split_column: str = "", template: Callable | None = None) -> Rows:
    """Read preference rows. Raises UserError.

    dataset: a file, a folder of files or of save_to_disk data, or a hub name; splits: those to use.
    labelled: if False, for a reward that is a rule, only prompts are read.
    split_column: the column whose values are the splits, in place of the files.
    template: (turns) -> the prompt of chat messages as the model reads it; None: they are joined.
    Rows with chosen == rejected say nothing about a preference; a quarter of the rows of
    descriptiveness-sentiment-trl-style is expected to be so, as its generator took the wrong index.
    Of rows that are the same, the first is kept.
    """
    tables = _tables(dataset)
    if split_column:
        tables = _by_column(tables, split_column)
    unknown = [split for split in splits if split not in tables]
    if unknown:
        raise UserError(f"dataset {dataset!r} has no split {unknown[0]!r}: it has "
                        f"{', '.join(tables)}")
    pairs: dict[tuple, Pair] = {}  # without duplicates, in order
    dropped, bad, total, forms = Counter(), [], 0, set()
    for split in splits or tables:
        before = dropped[EQUAL] + dropped[APART]
        if not tables[split]:
            raise UserError(f"split {split!r} of {dataset!r} is empty")
        for where, row in tables[split]:
            try:
                pair, form = _pair(row, labelled, template)
            except ValueError as error:
                bad.append(f"{where}: {error}")
                continue
            forms.add(form)
            if pair is None:
                dropped[APART] += 1
            elif labelled and pair.chosen == pair.rejected:
                dropped[EQUAL] += 1
            elif (key := (pair.prompt, pair.chosen, pair.rejected)) in pairs:
                dropped[DUPLICATE] += 1
            else:
                pairs[key] = dataclasses.replace(pair, split=split)
        total += len(tables[split])
        if dropped[EQUAL] + dropped[APART] - before == len(tables[split]):
            raise UserError(f"split {split!r} of {dataset!r}: in all of its {len(tables[split])} "
                            f"rows {EQUAL}, or they answer different prompts")
    if bad:
        more = f" (and {len(bad) - 1} more such rows)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}")
    return Rows(list(pairs.values()), +dropped, total, "; ".join(sorted(forms - {""})))


def _by_column(tables: dict, column: str) -> dict[str, list]:
    """The rows of all tables, split by the values of a column."""
    split: dict[str, list] = {}
    for where, row in itertools.chain(*tables.values()):
        value = row.get(column) if isinstance(row, dict) else None
        if value is None or not str(value).strip():
            has = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
            raise UserError(f"{where} has no value in --split-column "
                            f"{column}: its columns are {has}")
        split.setdefault(str(value).strip(), []).append((where, row))
    return split


# ----------------------------------------------------------------------------------------- one row

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant",
         "model": "assistant"}  # other names for the two
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # how Anthropic's hh-rlhf marks turns in a string
TEMPLATE = "conversations become prompts by the tokenizer's chat template"
JOINED = "the turns of conversations are joined by line breaks: the tokenizer has no chat template"
MARKED = 'a prompt is all up to the last "Assistant:", as it stands'


@dataclass(frozen=True)
class Talk:
    """A conversation: (role, text) turns. marked: it was one string, in hh-rlhf's form."""

    turns: list[tuple[str, str]]
    marked: bool = False


def _pair(row, labelled: bool, template: Callable | None) -> tuple[Pair | None, str]:
    """A row -> (its pair without a split, the form of its prompt).

    The pair is None if the two responses answer different prompts. Without labels the responses
    are empty. Raises ValueError, which says what is wrong.
    """
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    names = ("prompt", "chosen", "rejected") if labelled or "prompt" not in row else ("prompt",)
    has = {name: row[name] for name in names if name in row}
    prompt = _read("prompt", has["prompt"], whole=False) if "prompt" in has else None
    chosen, rejected = (_read(name, has[name], whole=True) if name in has else None
                        for name in ("chosen", "rejected"))
    wanted = ("chosen", "rejected") if labelled else ()
    missing = [name for name in wanted if name not in has]
    if not missing and prompt is None and not isinstance(chosen, Talk):
        missing = ["prompt"]
    if missing:
        hint = "" if missing[0] == "prompt" else (
            " (prompt alone is enough for a --reward that is a rule, with a --judge that is one "
            "too, or none)")
        hint = hint or (' (chosen and rejected hold no whole conversation, messages or "Human: ... '
                        'Assistant: ...", that it could be read from)')
        raise ValueError(f"has no column {missing[0]!r}: it needs prompt, chosen, rejected, and "
                         f"has {', '.join(map(str, row))}{hint}")
    if not labelled:
        chosen = rejected = chosen or ""

    # What was said before the two responses.
    texts = [talk.turns[-1][1] if isinstance(talk, Talk) else talk for talk in (chosen, rejected)]
    talks = [talk for talk in (chosen, rejected) if isinstance(talk, Talk)]
    if len(talks) == 2:
        one, other = (talk.turns for talk in talks)
        n = 0  # turns that both share
        while n < min(len(one), len(other)) - 1 and one[n] == other[n]:
            n += 1
        if one[:-1] != other[:-1]:  # the first turns that differ are what was compared
            if (one[n][0], other[n][0]) != ("assistant", "assistant"):
                return None, ""
            texts = [one[n][1], other[n][1]]
        else:
            n = len(one) - 1
        prompt = _prompt(prompt, Talk(one[:n], talks[0].marked))
    elif talks and talks[0].marked:
        raise ValueError("only one of chosen and rejected is a whole conversation")
    elif talks:
        prompt = _prompt(prompt, Talk(talks[0].turns[:-1], talks[0].marked))
    chosen, rejected = texts if labelled else ("", "")
    text, plain, form = _text(prompt, template)
    if not plain.strip():
        raise ValueError("the prompt is empty; remove the row")
    try:
        (text + chosen + rejected).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise ValueError(f"is not valid Unicode text: {error.reason}") from None
    return Pair(text, chosen, rejected, "", plain, templated=form == TEMPLATE), form


def _prompt(column: str | Talk | None, before: Talk) -> str | Talk:
    """Join the prompt column and `before`, the turns of a conversation before its response.

    If `before` is empty, the column is the prompt. If it begins with the assistant, it continues
    the column. Else it is the prompt itself, unless the column ends with it and so holds more.
    """
    if before.marked or column is None:
        return before
    own = column.turns if isinstance(column, Talk) else [("user", column)]
    if not before.turns:
        return column
    if before.turns[0][0] == "assistant":
        return Talk(own + before.turns)
    return Talk(own if own[-len(before.turns):] == before.turns else before.turns)


def _text(prompt: str | Talk, template: Callable | None) -> tuple[str, str, str]:
    """A prompt -> (as the model reads it, as rules and people read it, its form)."""
    if isinstance(prompt, str):
        return prompt, prompt, ""
    if prompt.marked:
        names = {"user": HUMAN, "assistant": ASSISTANT}
        text = "".join(f"{names[role]} {said}" for role, said in prompt.turns) + ASSISTANT
        return text.strip(), text.strip() if prompt.turns else "", MARKED
    plain = "\n".join(said for _, said in prompt.turns).strip()
    if template is None or not plain:
        return plain, plain, JOINED if len(prompt.turns) > 1 else ""
    return template(prompt.turns), plain, TEMPLATE


def _read(name: str, cell, whole: bool) -> str | Talk:
    """A cell as text, or as the turns of a conversation. Raises ValueError.

    whole: a string may be a conversation in hh-rlhf's form, and a list of messages must hold an
    assistant turn. Turns after the last assistant turn are left out.
    """
    if isinstance(cell, str):
        marks = re.split(r"(?:^|\n\n)(Human|Assistant):", "\n\n" + cell.strip())
        if not whole or len(marks) < 5 or marks[0].strip() or "Assistant" not in marks[3::2]:
            return cell.strip()
        turns = [({"Human": "user"}.get(mark, "assistant"), said.strip())
                 for mark, said in zip(marks[1::2], marks[2::2], strict=True)]
        return Talk(_up_to_response(turns), marked=True)
    turns = [_turn(message) for message in ([cell] if isinstance(cell, dict) else cell or [])
             ] if isinstance(cell, dict | list) else []
    if not turns or None in turns or whole and "assistant" not in dict(turns):
        raise ValueError(f"{name} must be a string or a list of chat messages, each with a role "
                         "and a text as its content" + ", one of them the assistant's" * whole)
    return Talk(_up_to_response(turns) if whole else turns)


def _up_to_response(turns: list) -> list:
    last = max(n for n, (role, _) in enumerate(turns) if role == "assistant")
    return turns[:last + 1]


def _turn(message) -> tuple[str, str] | None:
    """A chat message as (role, text), or None: {"role", "content"}, or {"from", "value"}."""
    if not isinstance(message, dict):
        return None
    role, said = message.get("role", message.get("from")), message.get(
        "content", message.get("value"))
    if isinstance(said, list):  # parts, of which only texts can be read
        parts = [part.get("text") for part in said if isinstance(part, dict)]
        said = "\n".join(parts) if parts and all(isinstance(p, str) for p in parts) else None
    if not isinstance(role, str) or not isinstance(said, str):
        return None
    return ROLES.get(role.lower(), role.lower()), said.strip()


# ------------------------------------------------------------------------------------------- files

KINDS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
SAVED = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # no rows
Table = list[tuple[str, dict]]  # rows, each with the place where it was read


def _kind(path: Path) -> str:
    """The suffix that says how a file is read, "" if it is none of KINDS."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def _tables(name: str) -> dict[str, Table]:
    """{split: rows} of a dataset in any of its forms."""
    path = Path(name)
    if path.is_file():
        if not _kind(path):
            raise UserError(f"dataset {name!r} is a file, but none of {', '.join(KINDS)} (or such "
                            "a file with .gz)")
        return {_stem(path): _read_file(path)}
    if path.is_dir() and not any((path / file).exists() for file in SAVED[:2]):
        return _read_folder(path)
    try:
        import datasets  # only here: files need no more than pyarrow
    except ImportError:
        raise UserError(f"dataset {name!r} needs the package datasets (pip install datasets), or "
                        "a file or folder of .jsonl") from None
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_from_disk(name) if path.is_dir() else datasets.load_dataset(name)
        if isinstance(loaded, datasets.Dataset):
            loaded = {str(loaded.split or "train"): loaded}
        return {split: [(f"dataset {name!r}, split {split!r}, row {number}", row)
                        for number, row in enumerate(table.to_list(), start=1)]
                for split, table in loaded.items()}
    except Exception as error:  # damaged files and the hub's failures come in many classes
        how = "cannot be read" if path.is_dir() else (
            "is no local file or folder and cannot be had from the hub or its cache: check the "
            "name, or on a connected machine run `hf download --repo-type dataset "
            f"{name} --local-dir DIR` and pass --dataset DIR; --preset tiny needs no download")
        raise UserError(f"dataset {name!r} {how} ({type(error).__name__}: {error})") from None


def _read_folder(folder: Path) -> dict[str, Table]:
    """{split: rows} of all files below a folder.

    A split is named by the file, or by the folder where files are numbered parts of it
    (NAME-00000-of-00002.parquet, NAME/0000.parquet); by both where folders differ.
    """
    files = [file for file in sorted(folder.rglob("*"))
             if file.is_file() and _kind(file) and file.name not in SAVED
             and not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise UserError(f"dataset folder {str(folder)!r} holds no {', '.join(KINDS)} and no "
                        "save_to_disk data")
    names = []
    for file in files:
        stem = re.sub(r"[-_.]\d{5}-of-\d{5}$", "", _stem(file))
        folders = list(file.relative_to(folder).parent.parts)
        number = re.fullmatch(r"(part[-_]?)?\d+", stem)
        names.append(folders if number and folders else [*folders, stem])
    while all(len(name) > 1 for name in names) and len({name[0] for name in names}) == 1:
        names = [name[1:] for name in names]
    tables: dict[str, Table] = {}
    for file, name in zip(files, names, strict=True):
        tables.setdefault("/".join(name), []).extend(_read_file(file))
    return tables


def _stem(path: Path) -> str:
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name[:len(name) - len(_kind(path))]


def _read_file(path: Path) -> Table:
    """The rows of a file. Raises UserError."""
    try:
        if _kind(path) == ".parquet":
            from pyarrow import parquet
            return _placed(path, "row", parquet.read_table(path).to_pylist())
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except (OSError, EOFError, zlib.error, ImportError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    return _read_csv(path, text) if _kind(path) in (".csv", ".tsv") else _read_json(path, text)


def _placed(path: Path, word: str, rows: list) -> Table:
    return [(f"{path}, {word} {number}", row) for number, row in enumerate(rows, start=1)]


def _read_json(path: Path, text: str) -> Table:
    """An array of rows, or a row in every line."""
    if text.lstrip().startswith("["):
        try:
            return _placed(path, "row", json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} begins as a JSON array and is none: {error}") from None
    rows, bad = [], []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028
        if line.strip():
            try:
                rows.append((f"{path}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                bad.append(f"{path}, line {number} is not JSON: {error}")
    if bad:
        more = f" (and {len(bad) - 1} more such lines)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; a file holds an array of rows, or one row per line")
    return rows


def _read_csv(path: Path, text: str) -> Table:
    """Rows under a line of column names; a cell of messages is JSON."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if _kind(path) == ".tsv" else ","
    rows = []
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            if None in row or None in row.values():
                raise UserError(f"{path}, row {len(rows) + 1} has more or fewer cells than there "
                                "are columns")
            rows.append({name: json.loads(cell) if re.match(r"\s*\[\s*\{", cell) else cell
                         for name, cell in row.items()})
    except (csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{path}, row {len(rows) + 1} cannot be read ({error}); chat messages in a "
                        "cell must be JSON") from None
    return _placed(path, "row", rows)

"""Reads preference rows from the files that people have, as data.Pair. Nothing is learned here.

In reading order
    1. load_pairs      a dataset in any of its forms -> Rows: the pairs, and what was dropped
    2. one row         conversations, and what of them is the prompt and what the response
    3. files           .jsonl, .json, .csv, .parquet, gzipped too, folders of them; the hub

Whatever a library raises about a user's file becomes a UserError of one line, which names the file,
the row, and how many more rows there are like it.
"""

import contextlib
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
from typing import NamedTuple

from data import Pair, UserError

# -------------------------------------------------------------------------------------- load_pairs


@dataclass(frozen=True)
class Rows:
    """The pairs of the splits read, the total rows of these, and dropped {reason: rows}."""

    pairs: list[Pair]
    dropped: Counter
    total: int
    form: str  # "" for plain texts; else how its conversations become prompts, in words
    unread: list[str]  # columns


COLUMNS = ("prompt", "chosen", "rejected")
EQUAL = "chosen and rejected are the same"
DUPLICATE = "another row is the same"
APART = "chosen and rejected answer different prompts"


class Template(NamedTuple):
    """A chat template: how conversations are written for the model that was trained on it."""

    render: Callable[[list[tuple[str, str]]], str]  # (role, text) turns -> the text of a prompt
    joint: str = ""  # what stands between a prompt and its response


def load_pairs(dataset: str, splits: tuple[str, ...] = (), labelled: bool = True, *,
               split_column: str = "", template: Template | None = None) -> Rows:
    """Read preference rows. Raises UserError.

    dataset: a file, a folder of files or of save_to_disk data, or a hub name; splits: those to use.
    labelled: if False, for a reward that is a rule, only prompts are read.
    split_column: the column whose values are the splits, in place of the files.
    template: makes prompts of chat messages; None: their texts are joined.
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
    dropped, bad, total, forms, columns = Counter(), [], 0, set(), {}
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
            columns |= dict.fromkeys(row)
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
    _refuse(bad)
    unread = [name for name in columns if name not in (*COLUMNS, split_column)]
    return Rows(list(pairs.values()), +dropped, total, "; ".join(sorted(forms - {""})), unread)


def _by_column(tables: dict, column: str) -> dict[str, list]:
    """The rows of all tables, split by the values of a column."""
    split: dict[str, list] = {}
    bad = []
    for where, row in itertools.chain(*tables.values()):
        value = row.get(column) if isinstance(row, dict) else None
        if value is None or not str(value).strip():
            has = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
            bad.append(f"{where} has no value in --split-column {column}: its columns are {has}")
        split.setdefault(str(value).strip(), []).append((where, row))
    _refuse(bad)
    return split


def _refuse(bad: list[str], note: str = "") -> None:
    """Raise UserError if there are bad rows, naming the first and how many more there are."""
    if bad:
        more = f" (and {len(bad) - 1} more such rows)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}{note}")


# ----------------------------------------------------------------------------------------- one row

ROLES = {"human": "user", "prompter": "user", "bot": "assistant",
         "model": "assistant"}  # other names for the two; what ends in gpt is the assistant too
# How Anthropic's hh-rlhf marks turns in a string; some copies of it have single line breaks.
MARKS = (r"(?:\A|\n[ \t]*\n)[ \t]*(Human|Assistant):", r"(?:\A|\n)[ \t]*(Human|Assistant):")
TEMPLATE = "conversations become prompts by the tokenizer's chat template"
JOINED = "chat messages are joined as plain text: the tokenizer has no chat template"
MARKED = 'a prompt is all up to the last "Assistant:", as it stands'


@dataclass(frozen=True)
class Talk:
    """A conversation: (role, text) turns; of one that was a string in hh-rlhf's form, the string,
    and for each turn all that stands before its text.
    """

    turns: list[tuple[str, str]]
    source: str = ""
    heads: tuple[str, ...] = ()


def _pair(row, labelled: bool, template: Template | None) -> tuple[Pair | None, str]:
    """A row -> (its pair without a split, the form of its prompt).

    The pair is None if the two responses answer different prompts. Without labels the responses
    are empty. Raises ValueError, which says what is wrong.
    """
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    names = COLUMNS if labelled or "prompt" not in row else COLUMNS[:1]
    has = {name: row[name] for name in names if name in row}
    if has.get("prompt", "") is None:
        del has["prompt"]
    column = _read("prompt", has["prompt"], whole=False) if "prompt" in has else None
    sides = [_read(name, has[name], whole=True) if name in has else None for name in COLUMNS[1:]]
    _refuse_missing(row, has, column, sides, labelled)
    if not labelled:
        sides = [sides[0] or ""] * 2
    prompt, texts = _parts(column, _whole_or_plain(column, sides))
    if prompt is None:
        return None, ""
    chosen, rejected = texts if labelled else ("", "")
    text, plain, form = _text(prompt, template)
    if not plain.strip():
        raise ValueError("the prompt is empty; remove the row")
    try:
        (text + chosen + rejected).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise ValueError(f"is not valid Unicode text: {error.reason}") from None
    joint = template.joint if form == TEMPLATE else " "
    return Pair(text, chosen, rejected, "", plain, form == TEMPLATE, joint), form


def _refuse_missing(row: dict, has: dict, column, sides: list, labelled: bool) -> None:
    """Raise ValueError if a column that is needed is not there."""
    missing = [name for name in (COLUMNS[1:] if labelled else ()) if name not in has]
    hint = (" (prompt alone is enough for a --reward that is a rule, with a --judge that is one "
            "too, or none)")
    if not missing and column is None and not isinstance(sides[0], Talk):
        missing = ["prompt"]
        hint = (' (chosen and rejected hold no whole conversation, messages or "Human: ... '
                'Assistant: ...", that it could be read from)')
    if missing:
        raise ValueError(f"has no column {missing[0]!r}: it needs prompt, chosen, rejected, and "
                         f"has {', '.join(map(str, row))}{hint}")


def _whole_or_plain(column: str | Talk | None, sides: list[str | Talk]) -> list[str | Talk]:
    """Strings in hh-rlhf's form as conversations, unless they are responses to the prompt column.

    A response may be a dialogue itself: a whole conversation has the column's text in it.
    """
    marked = [side for side in sides if isinstance(side, Talk) and side.heads]
    if column is None and len(marked) == 1:
        raise ValueError("only one of chosen and rejected is a whole conversation")
    text = column.turns[-1][1] if isinstance(column, Talk) else column or ""
    known = " ".join(text.split()).casefold()
    if len(marked) == 2 and all(known in " ".join(side.heads[-1].split()).casefold()
                                for side in marked):
        return sides
    return [side.source if side in marked else side for side in sides]


def _parts(column: str | Talk | None,
           sides: list[str | Talk]) -> tuple[str | Talk | None, list[str]]:
    """-> (the prompt, or None if there are two, [chosen, rejected])."""
    texts = [side.turns[-1][1] if isinstance(side, Talk) else side for side in sides]
    talks = [side for side in sides if isinstance(side, Talk)]
    if not talks:
        return column, texts
    turns, n = talks[0].turns, len(talks[0].turns) - 1
    if len(talks) == 2 and turns[:-1] != talks[1].turns[:-1]:
        # They part before the last turn: the first turns that differ are what was compared.
        other, n = talks[1].turns, 0
        while n < min(len(turns), len(other)) - 1 and turns[n] == other[n]:
            n += 1
        if {turns[n][0], other[n][0]} != {"assistant"} or turns[n] == other[n]:
            return None, texts
        texts = [turns[n][1], other[n][1]]
    if talks[0].heads:
        return Talk(turns[:n], heads=talks[0].heads[:n + 1]), texts
    return _prompt(column, turns[:n]), texts


def _prompt(column: str | Talk | None, before: list[tuple[str, str]]) -> str | Talk:
    """Join the prompt column and `before`, the turns of a conversation before its response.

    If `before` is empty, the column is the prompt. If the column has no user's turn or `before`
    begins with the assistant's, `before` continues the column. Else it is the prompt itself, unless
    the column ends with it and so holds more.
    """
    if column is None:
        return Talk(before)
    if not before:
        return column
    own = column.turns if isinstance(column, Talk) else [("user", column)]
    if before[:len(own)] == own:
        return Talk(before)
    if before[0][0] == "assistant" or "user" not in dict(own):
        return Talk(own + before)
    return Talk(own if own[-len(before):] == before else before)


def _text(prompt: str | Talk, template: Template | None) -> tuple[str, str, str]:
    """A prompt -> (as the model reads it, as rules and people read it, its form)."""
    if isinstance(prompt, str):
        return prompt, prompt, ""
    if prompt.heads:
        return prompt.heads[-1], prompt.heads[-1], MARKED
    plain = "\n".join(said for _, said in prompt.turns).strip()
    if template is None or not plain:
        return plain, plain, JOINED
    return template.render(prompt.turns), plain, TEMPLATE


def _read(name: str, cell, whole: bool) -> str | Talk:
    """A cell as text, or as the turns of a conversation. Raises ValueError.

    whole: a string may be a conversation in hh-rlhf's form, and a list of messages must hold an
    assistant turn. Turns after the last assistant turn are left out.
    """
    if isinstance(cell, str):
        cell = cell.replace("\r\n", "\n").strip()
        if re.match(r"\[\s*\{", cell):  # messages as JSON, as a table of texts holds them
            with contextlib.suppress(ValueError, RecursionError):
                return _read(name, json.loads(cell), whole)
        return (_marked(cell) if whole else None) or cell
    messages = [cell] if isinstance(cell, dict) else cell if isinstance(cell, list) else []
    turns = [_turn(message) for message in messages]
    if not turns or None in turns or whole and "assistant" not in dict(turns):
        raise ValueError(f"{name} must be a string or a list of chat messages, each with a role "
                         "and a text as its content" + ", one of them the assistant's" * whole)
    return Talk(_up_to_response(turns) if whole else turns)


def _marked(text: str) -> Talk | None:
    """A string in hh-rlhf's form as a conversation; None if it is not in that form."""
    for pattern in MARKS:
        marks = list(re.finditer(pattern, text))
        if len(marks) > 1 and any(mark[1] == "Assistant" for mark in marks[1:]):
            ends = [mark.start() for mark in marks[1:]] + [len(text)]
            turns = [({"Human": "user"}.get(mark[1], "assistant"), text[mark.end():end].strip())
                     for mark, end in zip(marks, ends, strict=True)]
            heads = [text[:mark.end()] for mark in marks]
            if before := text[:marks[0].start()].strip():
                turns, heads = [("system", before), *turns], ["", *heads]
            turns = _up_to_response(turns)
            return Talk(turns, text, tuple(heads[:len(turns)]))
    return None


def _up_to_response(turns: list) -> list:
    last = max(n for n, (role, _) in enumerate(turns) if role == "assistant")
    return turns[:last + 1]


def _turn(message) -> tuple[str, str] | None:
    """A chat message as (role, text), or None: {"role", "content"}, or {"from", "value"}."""
    if not isinstance(message, dict):
        return None
    role = message.get("role") or message.get("from")
    said = message.get("value") if message.get("content") is None else message["content"]
    if isinstance(said, list):  # parts, of which only texts can be read
        parts = [part.get("text") if isinstance(part, dict) else part for part in said]
        said = "\n".join(parts) if parts and all(isinstance(p, str) for p in parts) else None
    if not isinstance(role, str) or not isinstance(said, str):
        return None
    role = "assistant" if role.lower().endswith("gpt") else role.lower()
    return ROLES.get(role, role), said.strip()


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
        return _read_file(path)
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
        read = _read_file(file)
        for split, table in read.items():
            inner = "" if read.keys() == {_stem(file)} else f"/{split}"
            tables.setdefault("/".join(name) + inner, []).extend(table)
    return tables


def _stem(path: Path) -> str:
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name[:len(name) - len(_kind(path))]


def _read_file(path: Path) -> dict[str, Table]:
    """{split: rows} of a file, which is one split as a rule. Raises UserError."""
    name = _stem(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if _kind(path) == ".parquet":
            from pyarrow import parquet
            return {name: _placed(path, parquet.read_table(io.BytesIO(content)).to_pylist())}
        text = content.decode("utf-8-sig")  # with or without a byte-order mark
        if _kind(path) in (".csv", ".tsv"):
            return {name: _read_csv(path, text)}
        return _read_json(path, text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except (OSError, EOFError, zlib.error, ImportError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def _placed(path: Path, rows: list) -> Table:
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _read_json(path: Path, text: str) -> dict[str, Table]:
    """An array of rows, a row in every line, or an object of arrays, which are splits."""
    if text.lstrip().startswith("["):
        return {_stem(path): _placed(path, json.loads(text))}
    if text.lstrip().startswith("{") and _kind(path) == ".json":
        with contextlib.suppress(ValueError):
            tables = json.loads(text)
            if tables and all(isinstance(table, list) for table in tables.values()):
                return {split: _placed(path, table) for split, table in tables.items()}
    rows, bad = [], []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028
        if line.strip():
            try:
                rows.append((f"{path}, line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                bad.append(f"{path}, line {number} is not JSON: {error}")
    _refuse(bad, "; a file holds an array of rows, or one row per line")
    return {_stem(path): rows}


def _read_csv(path: Path, text: str) -> Table:
    """Rows under a line of column names."""
    csv.field_size_limit(2**31 - 1)
    head = text.split("\n", 1)[0]
    delimiter = "\t" if _kind(path) == ".tsv" else ";" if ";" in head and "," not in head else ","
    rows = []
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
                            skipinitialspace=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error("more or fewer cells than there are columns")
            rows.append({name.strip(): cell for name, cell in row.items()})
    except csv.Error as error:
        raise UserError(f"{path}, row {len(rows) + 1} cannot be read: {error}") from None
    return _placed(path, rows)

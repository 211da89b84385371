"""support/rows.py: every form of preference rows that people have, and all that is none."""

import csv
import gzip
import json

import datasets
import pytest
import worlds
from worlds import refused

from support import rows

TEXT, CHAT = worlds.text_rows(6), worlds.chat_rows(6)
EXPECTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in TEXT]


def read(path, *args, **kwargs):
    """[(prompt, chosen, rejected)], number of rows dropped."""
    loaded = rows.load_pairs(str(path), *args, **kwargs)
    pairs = [(pair.prompt, pair.chosen, pair.rejected) for pair in loaded.pairs]
    return pairs, sum(loaded.dropped.values())


def read_rows(folder, lines, **kwargs):
    return read(worlds.write_jsonl(folder / "set.jsonl", lines), **kwargs)


def one_row(folder, row, **kwargs):
    """The one Pair of a row."""
    (pair,) = rows.load_pairs(str(worlds.write_jsonl(folder / "one.jsonl", [row])), **kwargs).pairs
    return pair


def splits_of(path):
    return [pair.split for pair in rows.load_pairs(str(path)).pairs]


def jsonl_file(folder, splits):
    ((name, table),) = splits.items()
    return worlds.write_jsonl(folder / f"{name}.ndjson", table)


def jsonl_folder(folder, splits):
    for name, table in splits.items():
        worlds.write_jsonl(folder / f"{name}.jsonl", table)
    return folder


def json_folder(folder, splits):
    """An array in each file, one of them gzipped."""
    folder.mkdir()
    for name, table in splits.items():
        (folder / f"{name}.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    return folder


def gzip_folder(folder, splits):
    for name, table in splits.items():
        file = worlds.write_jsonl(folder / f"{name}.jsonl", table)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return folder


def windows_folder(folder, splits):
    """UTF-8 with a byte-order mark, and lines that end in CRLF."""
    for name, table in splits.items():
        file = worlds.write_jsonl(folder / f"{name}.jsonl", table)
        text = file.read_text(encoding="utf-8").replace("\n", "\r\n")
        file.write_bytes(text.encode("utf-8-sig"))
    return folder


def csv_folder(folder, splits):
    """Chat messages in a cell are JSON."""
    folder.mkdir()
    for name, table in splits.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows({key: cell if isinstance(cell, str) else json.dumps(cell)
                              for key, cell in row.items()} for row in table)
    return folder


def semicolons(folder, splits):
    """As a spreadsheet writes it where the comma is the decimal sign; spaces in the header."""
    folder.mkdir()
    for name, table in splits.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow([f" {key} " for key in table[0]])
            writer.writerows([cell if isinstance(cell, str) else json.dumps(cell)
                              for cell in row.values()] for row in table)
    return folder


def object_of_arrays(folder, splits):
    folder.mkdir()
    (folder / "all.json").write_text(json.dumps(splits, indent=2), encoding="utf-8")
    return folder / "all.json"


def zipped_parquet(folder, splits):
    for name, table in splits.items():
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_list(table).to_parquet(folder / "x.parquet")
        packed = gzip.compress((folder / "x.parquet").read_bytes())
        (folder / f"{name}.parquet.gz").write_bytes(packed)
    (folder / "x.parquet").unlink()
    return folder


def nested_folder(folder, splits):
    """As hh-rlhf has it: a folder for each kind of data, with the same file names in each."""
    for name, table in splits.items():
        worlds.write_jsonl(folder / "data" / name / "part-0.jsonl", table[:3])
        worlds.write_jsonl(folder / "data" / name / "part-1.jsonl", table[3:])
    worlds.write_jsonl(folder / ".cache" / "old.jsonl", [{"no": "row"}])  # hf download leaves one
    (folder / "dataset_infos.json").write_text("{}")
    return folder


def parquet(pattern, parts=1):
    """A form that writes each split in so many files, named by the pattern."""
    def write(folder, splits):
        for name, table in splits.items():
            for part in range(parts):
                path = folder / pattern.format(name=name, part=part)
                path.parent.mkdir(parents=True, exist_ok=True)
                size = len(table) // parts
                some = table[part * size:(part + 1) * size]
                datasets.Dataset.from_list(some).to_parquet(path)
        return folder
    return write


def disk_dict(folder, splits):
    tables = {name: datasets.Dataset.from_list(table) for name, table in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(folder)
    return folder


def disk_table(folder, splits):
    ((name, table),) = splits.items()
    datasets.Dataset.from_list(table, split=name).save_to_disk(folder)
    return folder


FORMS = {
    "jsonl folder": jsonl_folder, "json folder": json_folder, "gzipped jsonl": gzip_folder,
    "BOM and CRLF": windows_folder, "csv": csv_folder, "semicolons": semicolons,
    "an object of arrays": object_of_arrays, "gzipped parquet": zipped_parquet,
    "nested folders": nested_folder,
    "parquet, plain names": parquet("{name}.parquet"),
    "parquet, one part": parquet("{name}-00000-of-00001.parquet"),
    "parquet, in data/ and two parts": parquet("data/{name}-{part:05}-of-00002.parquet", parts=2),
    "parquet, as the hub converts": parquet("{name}/{part:04}.parquet", parts=2),
    "saved DatasetDict": disk_dict,
}
ONE_SPLIT = FORMS | {"jsonl file": jsonl_file, "saved Dataset": disk_table}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Parquet files are turned into arrow files: here, not in the home directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("table", [TEXT, CHAT], ids=["strings", "chat messages"])
@pytest.mark.parametrize("form", ONE_SPLIT)
def test_every_form_of_a_dataset_gives_the_same_pairs(tmp_path, form, table):
    path = ONE_SPLIT[form](tmp_path / "set", {"sentiment": table})
    assert read(path) == (EXPECTED, 0) and set(splits_of(path)) == {"sentiment"}


@pytest.mark.parametrize("form", FORMS)
def test_several_splits_are_kept_apart_and_can_be_chosen(tmp_path, form):
    splits = {"descriptiveness": CHAT, "sentiment": worlds.chat_rows(6, seed=1)}
    path = FORMS[form](tmp_path / "set", splits)
    assert splits_of(path) == ["descriptiveness"] * 6 + ["sentiment"] * 6
    assert read(path, ("sentiment",))[0] == read(path)[0][6:]
    with refused("no split 'tone': it has descriptiveness, sentiment"):
        read(path, ("sentiment", "tone"))


def test_a_parquet_file_may_have_any_name(tmp_path):
    """Only NAME-00000-of-00001 names a part; a name may hold a space, a hyphen or a number."""
    names = ["my split", "run-05", "run-07", "2024-01-31"]
    write = parquet("{name}.parquet")
    tables = {name: worlds.text_rows(6, seed) for seed, name in enumerate(names)}
    assert set(splits_of(write(tmp_path / "set", tables))) == set(names)


def test_a_saved_table_without_a_split_name_is_train(tmp_path):
    datasets.Dataset.from_list(TEXT).save_to_disk(tmp_path / "set")
    assert set(splits_of(tmp_path / "set")) == {"train"}


def test_rows_whose_responses_are_equal_are_counted_and_dropped(tmp_path):
    """Detail 26. Equal but for spaces at the ends, which are stripped, is equal."""
    table = worlds.chat_rows(8, equal=2)
    spaced = f"  {table[2]['chosen'][1]['content']}\n"
    table[2]["rejected"] = [table[2]["rejected"][0], {"role": "assistant", "content": spaced}]
    expected = [(row["prompt"], row["chosen"], row["rejected"]) for row in worlds.text_rows(8)[3:]]
    assert read_rows(tmp_path, table) == (expected, 3)


def test_rows_without_labels_keep_every_prompt(tmp_path):
    table = [{"prompt": "a"}, {"prompt": "b", "chosen": "x", "rejected": "x"},
             {"prompt": "c", "chosen": None, "rejected": 3}, {"prompt": "b"}]
    kept = [("a", "", ""), ("b", "", ""), ("c", "", "")]
    assert read_rows(tmp_path, table, labelled=False) == (kept, 1)  # b is there twice
    whole = one_row(tmp_path, {"chosen": CHAT[0]["chosen"]}, labelled=False)
    assert (whole.prompt, whole.chosen) == (TEXT[0]["prompt"], "")


def test_spaces_at_the_seam_are_stripped_and_inner_ones_kept(tmp_path):
    row = {"prompt": " A  cat \n", "chosen": "\tsat  down ", "rejected": "ran "}
    assert read_rows(tmp_path, [row])[0] == [("A  cat", "sat  down", "ran")]


def test_exact_duplicates_are_counted_and_dropped_across_splits(tmp_path):
    """Several raters, or train_prefs beside train_sft; a row with the labels turned is another."""
    turned = TEXT[0] | {"chosen": TEXT[0]["rejected"], "rejected": TEXT[0]["chosen"]}
    path = jsonl_folder(tmp_path / "set", {"a": [*TEXT, TEXT[1]], "b": [TEXT[2], turned]})
    loaded = rows.load_pairs(str(path))
    assert loaded.dropped == {rows.DUPLICATE: 2} and loaded.total == 9
    assert [pair.split for pair in loaded.pairs] == ["a"] * 6 + ["b"]


def test_a_column_can_name_the_splits(tmp_path):
    table = [row | {"topic": topic} for row, topic in zip(TEXT, "aabbc1", strict=True)]
    path = worlds.write_jsonl(tmp_path / "set.jsonl", table)
    loaded = rows.load_pairs(str(path), split_column="topic")
    assert [pair.split for pair in loaded.pairs] == list("aabbc1")
    assert len(rows.load_pairs(str(path), ("b",), split_column="topic").pairs) == 2
    with refused("no split 'd': it has a, b, c, 1"):
        rows.load_pairs(str(path), ("d",), split_column="topic")
    with refused("line 1 has no value in --split-column tone: its columns are prompt, chosen, rej"):
        rows.load_pairs(str(path), split_column="tone")


# ----------------------------------------------------------------------------------- conversations


def talk(*said):
    """Messages of user and assistant in turn; a system turn is given as ("system", text)."""
    roles = iter(["user", "assistant"] * len(said))
    return [{"role": one[0], "content": one[1]} if isinstance(one, tuple)
            else {"role": next(roles), "content": one} for one in said]


def marked(*said):
    """The same in hh-rlhf's form."""
    names = ["Human", "Assistant"] * len(said)
    return "".join(f"\n\n{name}: {one}" for name, one in zip(names, said, strict=False))


TEMPLATE = rows.Template(
    lambda turns: "".join(f"<{role}>{said}" for role, said in turns) + "<assistant>", joint="\n")


def test_the_last_assistant_turn_is_the_response_and_all_before_it_the_prompt(tmp_path):
    """With the first question as the prompt column, with all turns in it, with none."""
    before = (("system", "Be brief."), "Plan a picnic", "Where?", "Park, two")
    whole = {name: talk(*before, text) for name, text in (("chosen", "Bread."), ("rejected", "No"))}
    alone = {"prompt": talk(*before), "chosen": talk("", "Bread.")[1:],
             "rejected": talk("", "No")[1:]}
    joined = "Be brief.\nPlan a picnic\nWhere?\nPark, two"
    read = "<system>Be brief.<user>Plan a picnic<assistant>Where?<user>Park, two<assistant>"
    for row in (whole, {"prompt": "Plan a picnic"} | whole, {"prompt": talk(*before)} | whole,
                alone, alone | {"chosen": "Bread.", "rejected": "No"},
                alone | {"chosen": talk("", "Bread.")[1], "rejected": talk("", "No")[1]}):
        pair = one_row(tmp_path, row)
        assert (pair.prompt, pair.plain, pair.templated) == (joined, joined, False)
        assert (pair.chosen, pair.rejected) == ("Bread.", "No")
        pair = one_row(tmp_path, row, template=TEMPLATE)
        assert (pair.prompt, pair.plain, pair.templated, pair.joint) == (read, joined, True, "\n")
        assert (pair.chosen, pair.rejected) == ("Bread.", "No")


def test_a_string_in_hh_form_is_a_conversation_and_no_template_is_put_over_it(tmp_path):
    whole = {"chosen": marked("Plan a picnic", "Where?\n\nHere?", "Park, two", "Bread."),
             "rejected": marked("Plan a picnic", "Where?\n\nHere?", "Park, two", "No")}
    prompt = marked("Plan a picnic", "Where?\n\nHere?", "Park, two", "x")[2:-2]
    assert prompt.endswith("\n\nHuman: Park, two\n\nAssistant:")
    for row in (whole, whole | {"prompt": "Plan a picnic"}, whole | {"prompt": prompt}):
        for how in ({}, {"template": TEMPLATE}):
            pair = one_row(tmp_path, row, **how)
            assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "Bread.", "No")
            assert not pair.templated
    # A prompt column in this form with responses of their own is text like any other.
    pair = one_row(tmp_path, {"prompt": prompt, "chosen": "Bread.", "rejected": "No"})
    assert (pair.prompt, pair.chosen) == (prompt, "Bread.")
    with refused("only one of chosen and rejected is a whole conversation"):
        one_row(tmp_path, whole | {"rejected": "No"})
    # A response can be a dialogue: then the prompt does not stand in it.
    for rejected in ("No", "Human: hi\n\nAssistant: go"):
        dialogue = {"prompt": "Write one.", "chosen": "Human: hi\n\nAssistant: hello"}
        pair = one_row(tmp_path, dialogue | {"rejected": rejected})
        assert (pair.prompt, pair.chosen, pair.rejected) == (*dialogue.values(), rejected)
        pair = one_row(tmp_path, dialogue | {"rejected": rejected, "prompt": talk("Write one.")})
        assert (pair.prompt, pair.chosen, pair.rejected) == (*dialogue.values(), rejected)
    assert one_row(tmp_path, whole | {"prompt": None}).prompt == prompt


@pytest.mark.parametrize("how", ["Human: {}\r\n\r\nAssistant: {}", "Human: {}\nAssistant: {}",
                                 "Human: {}\n \nAssistant: {}",
                                 "Be kind.\n\nHuman: {}\n\nAssistant: {}",
                                 "System: Be kind.\n\nHuman: {}\n\nAssistant: {}"])
def test_other_line_breaks_and_beginnings_of_the_hh_form_are_read(tmp_path, how):
    table = {"chosen": how.format("A cat?", "Yes."), "rejected": how.format("A cat?", "No.")}
    for row in (table, table | {"prompt": "A cat?"}):
        pair = one_row(tmp_path, row)
        assert (pair.chosen, pair.rejected) == ("Yes.", "No.")
        assert pair.prompt == how.format("A cat?", "").replace("\r", "").strip() == pair.plain


def test_a_system_turn_in_the_prompt_column_stands_before_the_conversation(tmp_path):
    whole = {"chosen": talk("Hi", "Yes"), "rejected": talk("Hi", "No")}
    for column in (talk(("system", "Be kind.")), talk(("system", "Be kind."), "Hi")):
        assert one_row(tmp_path, whole | {"prompt": column}).prompt == "Be kind.\nHi"


def test_columns_that_are_not_read_are_said(tmp_path):
    path = worlds.write_jsonl(tmp_path / "set.jsonl", [TEXT[0] | {"score": 1, "system": "x"}])
    assert rows.load_pairs(str(path)).unread == ["score", "system"]
    assert rows.load_pairs(str(path), split_column="score").unread == ["system"]


@pytest.mark.parametrize("form", [talk, marked])
def test_conversations_that_part_earlier_are_compared_where_they_part(tmp_path, form):
    """What follows answers other turns. Where users differ there is nothing to compare."""
    row = {"chosen": form("Hi", "Hello!", "A cat?", "Yes."),
           "rejected": form("Hi", "What?", "Sorry", "Fine.")}
    pair = one_row(tmp_path, row)
    assert (pair.plain.strip().startswith(("Hi", "Human: Hi")), pair.chosen, pair.rejected) == (
        True, "Hello!", "What?") and "cat" not in pair.prompt
    apart = {"chosen": form("Hi", "Hello!"), "rejected": form("Ho", "Hello!")}
    beginning = {"chosen": form("Hi", "Hello!", "A cat?", "Yes."), "rejected": form("Hi", "Hello!")}
    file = worlds.write_jsonl(tmp_path / "set.jsonl", [row, apart, beginning])
    assert rows.load_pairs(str(file)).dropped == {rows.APART: 2}


def test_what_follows_the_last_assistant_turn_is_left_out(tmp_path):
    row = {"chosen": talk("Hi", "Hello!", "Bye"), "rejected": talk("Hi", "No.", "Why?")}
    pair = one_row(tmp_path, row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Hi", "Hello!", "No.")


def test_other_names_of_roles_and_texts_in_parts_are_read(tmp_path):
    said = ({"from": "human", "value": "Hi"}, {"role": None, "content": None, "from": "human",
            "value": "Hi"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "user", "content": ["Hi"]})
    answers = {"from": "gpt", "value": "Yes"}, {"from": "gpt", "value": "No"}
    for question in said:
        row = {name: [question, answer]
               for name, answer in zip(("chosen", "rejected"), answers, strict=True)}
        pair = one_row(tmp_path, row)
        assert (pair.prompt, pair.chosen, pair.rejected) == ("Hi", "Yes", "No")


def test_which_form_prompts_have_is_said(tmp_path):
    one = {"chosen": talk("Hi", "Yes"), "rejected": talk("Hi", "No")}
    more = {"chosen": talk("Hi", "Yes", "So?", "A"), "rejected": talk("Hi", "Yes", "So?", "B")}
    for table, how, said in (
            (TEXT, None, ""), (CHAT, None, rows.JOINED), ([one], TEMPLATE, rows.TEMPLATE),
            ([more], None, rows.JOINED), (TEXT, TEMPLATE, ""),
            ([{"chosen": marked("Hi", "A"), "rejected": marked("Hi", "B")}], None, rows.MARKED)):
        path = worlds.write_jsonl(tmp_path / "set.jsonl", table)
        assert rows.load_pairs(str(path), template=how).form == said


def test_a_template_that_refuses_a_conversation_is_said(tmp_path):
    def refuses(turns):
        raise ValueError("is refused by the tokenizer's chat template: no system turn")
    with refused("one.jsonl, line 1: is refused by the tokenizer's chat template: no system"):
        one_row(tmp_path, CHAT[0], template=rows.Template(refuses))


# ------------------------------------------------------------------------------------- broken ones


@pytest.mark.parametrize("odd", [
    "line\u2028separator", "next\x85line", "form\x0cfeed", "ünïcode 漢字 🙂"])
def test_unusual_characters_inside_a_line_do_not_cut_it(tmp_path, odd):
    """U+2028 may stand unescaped in JSON, and Python's splitlines cuts there."""
    line = json.dumps(TEXT[0] | {"prompt": odd}, ensure_ascii=False)
    text = line.replace("\\f", "\\u000c") + "\n\n"
    (tmp_path / "set.jsonl").write_text(text, encoding="utf-8", newline="")
    assert read(tmp_path / "set.jsonl")[0][0][0] == odd


@pytest.mark.parametrize("line, says", [
    (b'{"prompt": "a", ', "set.jsonl, line 2 is not JSON"),
    (b'["prompt", "chosen"]', "set.jsonl, line 2: is not a JSON object"),
    (b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}', "UTF-8"),
    (b'{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}', "line 2: is not valid Unicode"),
    (b'{"prompt": "a", "rejected": "b"}', "'chosen'.*, rejected .prompt alone is enough"),
    (b'{"chosen": "a", "rejected": "b"}', "'prompt'.* has chosen, rejected .chosen and rejected "),
    (b'{"prompt": "a", "chosen": "a", "rejected": 3}', "line 2: rejected must be a string"),
    (b'{"prompt": "a", "chosen": "a", "rejected": null}', "line 2: rejected must be a string"),
    (b'{"prompt": 3, "chosen": "a", "rejected": "b"}', "line 2: prompt must be a string"),
    (b'{"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "b"}', "line 2: chosen must"),
    (b'{"prompt": "a", "chosen": [{"role": "assistant", "content": null}], "rejected": "b"}',
     "line 2: chosen must"),
    (b'{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "b"}',
     "line 2: chosen must .* one of them the assistant's"),
    (b'{"prompt": "a", "chosen": ["text"], "rejected": "b"}', "line 2: chosen must"),
    (b'{"chosen": [{"role": "assistant", "content": "a"}], "rejected": '
     b'[{"role": "assistant", "content": "b"}]}', "line 2: the prompt is empty"),
    (b'{"prompt": "  ", "chosen": "a", "rejected": "b"}', "line 2: the prompt is empty"),
], ids=["half a line", "no object", "not UTF-8", "half a character", "no chosen", "no prompt",
        "a number", "null", "a number as prompt", "no content", "null content", "no assistant",
        "no messages", "no turn before", "empty"])
def test_a_broken_row_is_named(tmp_path, line, says):
    (tmp_path / "set.jsonl").write_bytes(json.dumps(TEXT[0]).encode() + b"\n" + line + b"\n")
    with refused(says):
        read(tmp_path / "set.jsonl")


def test_how_many_more_rows_are_broken_is_said(tmp_path):
    table = [TEXT[0], TEXT[1] | {"chosen": None}, TEXT[2], TEXT[3] | {"prompt": ""}, TEXT[4] | {
        "rejected": 3}]
    with refused("set.jsonl, line 2: chosen must .*and 2 more such rows"):
        read_rows(tmp_path, table)
    with refused("set.csv, row 2 cannot be read: more or fewer cells"):
        (tmp_path / "set.csv").write_text("prompt,chosen,rejected\na,b,c\nd,e\n")
        read(tmp_path / "set.csv")
    with refused("set.json cannot be read .JSONDecodeError"):
        (tmp_path / "set.json").write_text('[{"prompt": "a"}')
        read(tmp_path / "set.json")
    for text in ("[" * 100_000, '{"prompt": ' + "1" * 5000 + "}"):
        with refused("deep.jsonl"):
            (tmp_path / "deep.jsonl").write_text(text)
            read(tmp_path / "deep.jsonl")
    with refused("topics.jsonl, line 1 has no value in --split-column topic.*and 5 more"):
        rows.load_pairs(str(worlds.write_jsonl(tmp_path / "topics.jsonl", TEXT)),
                        split_column="topic")
    with refused("cut.jsonl.gz cannot be read .EOFError"):
        file = tmp_path / "cut.jsonl.gz"
        file.write_bytes(gzip.compress(b"{}" * 999)[:-9])
        read(file)


def test_what_is_no_dataset_is_said_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "false").mkdir()
    (tmp_path / "false" / "train.parquet").write_text("hello")
    jsonl_folder(tmp_path / "void", {"full": TEXT, "void": []})
    jsonl_folder(tmp_path / "equal", {"a": worlds.text_rows(3, equal=3)})
    for name, says in (("missing", "hf download"), ("empty", "^dataset folder .*holds no .jsonl"),
                       ("text", "is a file, but none of .jsonl"),
                       ("false", "train.parquet cannot be read .*[Pp]arquet"),
                       ("void", "'void' .*is empty"),
                       ("equal", "all of its 3 rows chosen and rejected are the same")):
        with refused(says):
            read(tmp_path / name)



"""Names of files are names, cells are texts, and what is wrong with a file is said with its cause."""

import gzip
import json
import os
from pathlib import Path

import pytest
from datasets import load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from training import data
from training.errors import UserError
from training.recipe import DataArguments
from training.texts import Texts


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def write(path: str, *texts: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps({"content": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts(name: str, streaming: bool = False, split: str | None = None, column: str = "content") -> list[str]:
    loaded = data.load_splits(name, split=split, streaming=streaming)
    return [row[column] for row in (loaded if split else data.evaluation_split(loaded))]


both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "stream"])


@both_ways
@pytest.mark.parametrize(
    ("name", "taken_for"), [("d[1].jsonl", "d1.jsonl"), ("d*.jsonl", "data.jsonl"), ("d?.jsonl", "d2.jsonl")]
)
def test_name_of_a_file_is_no_pattern(name, taken_for, streaming):
    write(taken_for, "another file")
    assert texts(write(name, "this file"), streaming) == ["this file"]
    assert texts(str(Path(name).resolve()), streaming) == ["this file"]


@both_ways
def test_name_of_a_folder_is_neither_a_pattern_nor_a_builder(streaming):
    for split in ("train", "test"):
        write(f"d1/{split}.jsonl", "another folder")
        write(f"d[1]/{split}.jsonl", f"this {split}")
    assert texts("d[1]", streaming) == ["this test"]
    assert texts("d[1]", streaming, split="train") == ["this train"]
    # what datasets calls its builder of JSON
    write("json/texts.jsonl", "a folder")
    assert texts("json", streaming) == ["a folder"]


@both_ways
@pytest.mark.parametrize(
    "name",
    ["hf://datasets/x/d.jsonl", "hf://datasets/x", "s3://x/d.jsonl", "file://x/d.jsonl", "memory://x", "https://x"],
)
def test_name_of_what_is_here_is_no_address(name, streaming):
    write(name if name.endswith(".jsonl") else f"{name}/d.jsonl", "this file")
    assert texts(name, streaming) == ["this file"]


@both_ways
@pytest.mark.parametrize(("folder", "taken_for"), [("w[1]", "w1"), ("w?", "ww"), ("w*", "w12")])
def test_name_of_the_working_folder_is_no_pattern(folder, taken_for, streaming, monkeypatch):
    write(f"{taken_for}/d.jsonl", "another file")
    write(f"{folder}/d.jsonl", "this file")
    monkeypatch.chdir(folder)
    for name in ("d.jsonl", "./d.jsonl", f"../{folder}/d.jsonl", "."):
        assert texts(name, streaming) == ["this file"]


def test_two_colons_are_told_of_the_working_folder_too(monkeypatch):
    write("a::b/d.jsonl", "this file")
    monkeypatch.chdir("a::b")
    for name in ("d.jsonl", "."):
        with pytest.raises(UserError, match="must not have '::' in its path.*/a::b"):
            texts(name)


def test_name_of_a_link_is_that_of_the_file():
    """Its own suffix says how it is read, as in the cache of the Hub, whose files are links to files without one."""
    write("blobs/1234", "this file")
    Path("d.jsonl").symlink_to("blobs/1234")
    assert texts("d.jsonl") == ["this file"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["a.jsonl", "b/c.jsonl"], ""),
        # by their names, some files are of no split
        (["train.jsonl", "more.jsonl"], "dataset 'd': 1 of 2 files are not read: more.jsonl\n"),
        (["train/a.jsonl", "b.jsonl", "c.jsonl"], "dataset 'd': 2 of 3 files are not read: b.jsonl, c.jsonl\n"),
        # those of one kind alone are read
        (["a.jsonl", "b.jsonl", "c.txt"], "dataset 'd': 1 of 3 files are not read: c.txt\n"),
        # by convention no data
        (["a.jsonl", ".b.jsonl", ".c/d.jsonl", "config.json"], ""),
    ],
)
def test_files_of_a_folder_that_are_not_read_are_told(files, told, capsys):
    for name in files:
        write(f"d/{name}", "text")
    data.load_splits("d")
    assert capsys.readouterr().out == told


CELLS = ["NA", "None", "null", "nan", "N/A", "0012", "1e5", "True", "a, b", "12"]


@both_ways
@pytest.mark.parametrize("cells", [CELLS, ["0012", "0013"], ["NA"]])
def test_cells_are_texts(cells, streaming):
    Path("cells.csv").write_text("content,number\n" + "".join(f'"{cell}",{i}\n' for i, cell in enumerate(cells)))
    assert texts("cells.csv", streaming) == cells
    Path("folder").mkdir()
    Path("cells.csv").rename("folder/cells.csv")
    assert texts("folder", streaming) == cells


def test_cells_are_texts_in_every_part_of_a_long_file():
    numbers = [str(i) for i in range(10_001)] + ["NA"]
    Path("long.csv").write_text("content,number\n" + "".join(f"text,{number}\n" for number in numbers))
    assert texts("long.csv", column="number") == numbers


@both_ways
def test_cells_are_texts_in_every_split(streaming):
    Path("parts").mkdir()
    Path("parts/train.csv").write_text("content,first\nNA,1\n")
    # streams alone take splits of other columns
    Path("parts/test.csv").write_text("content,second\n0012,1\n" if streaming else "content,first\n0012,1\n")
    assert texts("parts", streaming) == ["0012"]
    assert texts("parts", streaming, split="test", column="second" if streaming else "first") == ["1"]


DATES = ["2024-01-01", "2024-01-02 10:00:00", "2025-06-30T00:00:00Z"]


@both_ways
@pytest.mark.parametrize("more", [[], ["a text"]], ids=["dates", "mixed"])
def test_dates_in_json_are_texts(more, streaming):
    assert texts(write("d.jsonl", *DATES, *more), streaming) == DATES + more
    assert texts("d.jsonl", streaming, split="train") == DATES + more
    parts = data.load_documents(DataArguments(dataset="d.jsonl", eval_fraction=0.5), seed=0)
    assert sorted([*parts["train"]["content"], *parts["eval"]["content"]]) == sorted(DATES + more)


@both_ways
def test_dates_in_a_later_part_are_texts(streaming):
    # ten megabytes are a part, and so is a file
    long = ["x" * 6_000_000, None, "y" * 6_000_000]
    assert texts(write("d.jsonl", *long, *DATES), streaming) == long + DATES
    Path("parts").mkdir()
    write("parts/a.jsonl", "a text", None)
    write("parts/b.jsonl", *DATES[:1])
    write("parts/c.jsonl", 12, True)
    assert texts("parts", streaming) == ["a text", None, DATES[0], "12", "true"]
    assert texts("parts", streaming, split="train") == ["a text", None, DATES[0], "12", "true"]


def test_dates_in_an_array_are_texts():
    Path("d.json").write_text(json.dumps([{"content": date} for date in DATES[:2]]))
    assert texts("d.json") == DATES[:2]


@both_ways
@pytest.mark.parametrize(
    ("later", "wanted"),
    [
        ([12, -3, 7.0, 1e10, 1e-7], ["12", "-3", "7.0", "10000000000.0", "1e-07"]),
        ([True, None], ["true", None]),
        ([{"a": 1, "b": [None]}, {"a": 2, "b": []}], ['{"a": 1, "b": [null]}', '{"a": 2, "b": []}']),
        ([["a", "b"]], ['["a", "b"]']),
        (["a text", 5], ["a text", "5"]),
        (['"in quotes"', "[a list]", "-", "2024-01-01 or so", "true"], None),
    ],
    ids=["numbers", "constants", "objects", "lists", "mixed", "texts"],
)
def test_values_among_texts_in_a_later_file_are_written_as_json(later, wanted, streaming):
    Path("parts").mkdir()
    write("parts/a.jsonl", "a text", "two\n lines")
    write("parts/b.jsonl", *later)
    assert texts("parts", streaming) == ["a text", "two\n lines", *(wanted or later)]


def test_columns_are_known_by_the_whole_file_and_rows_by_its_first_part():
    """A part is ten megabytes; datasets itself stops at a text behind a part without any, and at a new field."""
    rows = [{"content": "x" * 11_000_000, "late": None, "never": None}]
    rows += [{"content": "a text", "late": "another", "never": None, "new": {"a": 1}}, {"content": "b", "late": 3}]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts("d.jsonl", column="late") == [None, "another", "3"]
    assert texts("d.jsonl")[1:] == ["a text", "b"]
    Path("d.jsonl").write_text(
        "".join(json.dumps({key: row[key] for key in ("content", "never")}) + "\n" for row in rows[:2])
    )
    assert Texts("d.jsonl").column == "content"


@both_ways
@pytest.mark.parametrize("form", ["lines", "array", "spread", "compressed"])
def test_texts_that_are_json_themselves_stay_texts(form, streaming):
    found = [
        "a text",
        '{"a":1,  "b": 1e5}',
        '"in quotes"',
        "[1,2]",
        "1e5",
        "007",
        "true",
        "null",
        "",
        "\u2028x",
        "1.50",
    ]
    rows = [{"content": text, "number": index} for index, text in enumerate(found)]
    name = "d.json" if form in ("array", "spread") else "d.jsonl"
    if form == "array":
        Path(name).write_text(json.dumps(rows, indent=1))
    elif form == "spread":
        Path(name).write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    elif form == "lines":
        Path(name).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    else:
        Path("d").mkdir()
        with gzip.open("d/d.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        name = "d"
    assert texts(name, streaming) == texts(name, streaming, split="train") == found
    assert texts(name, streaming, column="number") == list(range(len(found)))


@both_ways
@pytest.mark.parametrize(
    "columns",
    [
        {"type": "user", "message": {"role": "user"}},
        {"id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": [{"role": "user"}]},
    ],
    ids=["session", "messages"],
)
def test_columns_of_an_assistant_are_columns(columns, streaming):
    Path("log.jsonl").write_text(json.dumps({**columns, "content": "a text"}) + "\n")
    assert texts("log.jsonl", streaming) == ["a text"]


@both_ways
@pytest.mark.parametrize("name", ["d.txt", "d.csv", "d.jsonl"])
def test_a_byte_order_mark_is_no_text(name, streaming):
    lines = {"d.txt": "one\ntwo\n", "d.csv": "text\none\ntwo\n", "d.jsonl": '{"text": "one"}\n{"text": "two"}\n'}
    Path(name).write_text(lines[name], encoding="utf-8-sig")
    assert texts(name, streaming, column="text") == ["one", "two"]


@both_ways
def test_variables_in_a_path_are_not_replaced(streaming, monkeypatch):
    monkeypatch.setenv("WHICH", "other")
    write("other.jsonl", "another file")
    write("$WHICH.jsonl", "this file")
    write("$WHICH/d.jsonl", "this file")
    for name in ("$WHICH.jsonl", "$WHICH"):
        with pytest.raises(UserError, match=r"must not have a variable in a path, which would be replaced: .*\$WHICH"):
            texts(name, streaming)
    assert texts(write("$5.jsonl", "this file"), streaming) == ["this file"]


@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_what_is_no_plain_file_is_refused_at_once(kind):
    name = "/dev/null" if kind == "device" else "d.jsonl"
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "link":
        Path(name).symlink_to("nowhere.jsonl")
    with pytest.raises(UserError, match=f"dataset '{name}' must be a file or a folder, got a {kind}"):
        data.load_splits(name)


@pytest.mark.parametrize(
    "name", ["./nosuch", "no/such/folder", "no such", "", "x\0y", "a" * 300, "json", "https://x/y.csv"]
)
def test_what_is_neither_here_nor_an_id_is_told_at_once(name, monkeypatch):
    # nobody is asked
    monkeypatch.setattr("datasets.load_dataset_builder", pytest.fail)
    write("d.jsonl", "another file")
    with pytest.raises(UserError, match="is no file or folder"):
        data.load_splits(name)


def test_texts_of_a_csv_file_are_trained_on():
    Path("cells.csv").write_text("content\n" + "".join(f'"{cell}"\n' for cell in CELLS))
    parts = data.load_documents(DataArguments(dataset="cells.csv", eval_fraction=0.4), seed=0)
    assert sorted([*parts["train"]["content"], *parts["eval"]["content"]]) == sorted(CELLS)


@both_ways
@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("cut.jsonl", b'{"content": "a"}\n{"content": "b', "Missing a closing quotation mark"),
        ("wide.jsonl", '{"content": "a"}\n'.encode("utf-16"), "JSON parse error: Invalid value"),
        ("lone.jsonl", b'{"content": "\\ud800"}\n', "surrogate pair in string is invalid"),
        ("latin.csv", "content\ncafé\n".encode("latin-1"), "'utf-8' codec can't decode byte 0xe9"),
        ("latin.txt", "café\n".encode("latin-1"), "'utf-8' codec can't decode byte 0xe9"),
        ("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\n", "Parquet magic bytes not found"),
        ("ragged.csv", b"content\na\nb,c\n", "Expected 1 fields in line 3, saw 2"),
        # pandas takes the first cell for the name of the row, and the second for the content
        ("longer.csv", b"content\na,b\n", "its rows have more cells than its header"),
        *((f"empty{suffix}", b"", "it is empty") for suffix in data.BUILDERS),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_broken_file_is_one_line_with_its_cause(name, content, cause, streaming):
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=f"dataset '{name}' cannot be (loaded|read): .*{cause}") as error:
        with data.reading(f"dataset {name!r} cannot be read"):
            texts(name, streaming)
    assert "\n" not in str(error.value) and "generating the dataset" not in str(error.value)


@pytest.mark.parametrize("content", ["\n\n", "[]"])
def test_json_without_a_row_is_empty(content):
    Path("d.json").write_text(content)
    with pytest.raises(UserError, match="^dataset 'd.json' cannot be loaded: it is empty$"):
        data.load_splits("d.json")


@pytest.mark.parametrize("prepare", ["script", "configurations", "nothing"])
def test_folder_that_is_no_dataset_is_one_line(prepare):
    if prepare == "script":
        write("folder/folder.py", "print()")
    elif prepare == "configurations":
        write("folder/a.jsonl", "text")
        Path("folder/README.md").write_text("---\nconfigs: 3\n---\n")
    else:
        Path("folder").mkdir()
    with pytest.raises(UserError, match="dataset 'folder' cannot be loaded: "):
        data.load_splits("folder")


def test_what_has_no_configurations_is_not_asked_for_one():
    for name in (write("d.jsonl", "text"), "stdlib"):
        with pytest.raises(UserError, match="no configurations, got config='2019'"):
            data.load_documents(DataArguments(dataset=name, dataset_config="2019"), seed=0)


def test_column_of_mixed_values_holds_no_texts():
    Path("mixed.jsonl").write_text('{"content": "a"}\n{"content": 3}\n')
    assert load_dataset("json", data_files="mixed.jsonl")["train"][:]["content"] == ["a", 3]
    with pytest.raises(UserError, match="text_column='content' must hold texts"):
        data.load_documents(DataArguments(dataset="mixed.jsonl"), seed=0)


def test_lists_of_a_stream_are_no_texts():
    Path("lists.jsonl").write_text('{"content": ["a"]}\n' * 3)
    write("eval.jsonl", "text")
    arguments = DataArguments(dataset="lists.jsonl", eval_dataset="eval.jsonl", streaming=True)
    parts = data.load_documents(arguments, seed=0)
    with pytest.raises(UserError, match="must hold texts, got list"):
        next(iter(parts["train"]))


@pytest.fixture
def words():
    """A tokenizer of whole words, with an end-of-text token and a hole in its ids."""
    vocabulary = {"<|endoftext|>": 0, "one": 1, "two": 2, "<|": 3, "endoftext": 4, "|>": 5, "[UNK]": 9}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="[UNK]")


@both_ways
def test_end_of_text_in_a_document_is_text(words, streaming):
    write("d.jsonl", "one <|endoftext|> two")
    arguments = DataArguments(dataset="d.jsonl", eval_dataset="d.jsonl", block_size=6, streaming=streaming)
    documents = data.load_splits("d.jsonl", streaming=streaming)
    blocks = data.tokenize_blocks(documents, words, arguments)["train"]
    assert next(iter(blocks))["input_ids"].tolist() == [1, 3, 4, 5, 2, 0]
    # which is what separates documents
    positions = data.document_positions(next(iter(blocks))["input_ids"][None], words.eos_token_id)
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_vocabulary_holds_every_id_and_may_be_padded(words):
    assert data.vocabulary_size(words, None) == 10
    assert data.vocabulary_size(words, 64) == 64
    with pytest.raises(UserError, match="vocab_size must be at least 10, the tokens of the tokenizer, got 7"):
        data.vocabulary_size(words, len(words))


def test_tokenizer_in_python_is_refused():
    documents = {"train": load_dataset("json", data_files=write("d.jsonl", "text"), split="train")}
    with pytest.raises(UserError, match="must be a fast one, got the Python class ByT5Tokenizer"):
        data.tokenize_blocks(documents, ByT5Tokenizer(), DataArguments(tokenizer="byt5"))

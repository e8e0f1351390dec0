"""Data: no text in both parts, blocks that are the text again, one path for the embedded corpus and any dataset."""

import json
import platform
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoTokenizer

from training import data
from training.errors import UserError
from training.recipe import DataArguments, build_recipe

from .conftest import byte_tokenizer, random_ids, tiny_model


DOCUMENTS = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 7) for i in range(200)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def test_split_by_hash_is_whole_disjoint_and_stable(jsonl):
    arguments = DataArguments(dataset=str(jsonl), eval_fraction=0.2)
    parts = data.load_documents(arguments, seed=0)
    train, held_out = set(parts["train"]["content"]), set(parts["eval"]["content"])
    assert train | held_out == set(DOCUMENTS) and not train & held_out
    assert 20 <= len(held_out) <= 60
    # a document stays where it is, whatever else is there and in whatever order
    jsonl.write_text("".join(json.dumps({"content": text}) + "\n" for text in reversed(DOCUMENTS[:100])))
    again = data.load_documents(arguments, seed=1)
    assert set(again["eval"]["content"]) == held_out & set(DOCUMENTS[:100])


def test_order_follows_the_seed(jsonl):
    arguments = DataArguments(dataset=str(jsonl))
    orders = [list(data.load_documents(arguments, seed)["train"]["content"]) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_embedded_corpus_is_the_standard_library():
    parts = data.load_documents(DataArguments(), seed=0)
    texts = set(parts["train"]["content"]) | set(parts["eval"]["content"])
    assert Path(json.__file__).read_text() in texts
    assert len(texts) > 500 and not set(parts["train"]["content"]) & set(parts["eval"]["content"])


def test_blocks_are_the_documents_again(jsonl):
    arguments = DataArguments(dataset=str(jsonl), block_size=17)
    documents = data.load_documents(arguments, seed=0)
    tokenizer = data.load_tokenizer(arguments, documents["train"], 400)
    blocks = data.tokenize_blocks(documents, tokenizer, arguments)
    for name, part in documents.items():
        ids = blocks[name]["input_ids"][:].flatten().tolist()
        assert len(ids) == 17 * len(blocks[name])
        whole = data.END_OF_TEXT.join(part["content"]) + data.END_OF_TEXT
        assert whole.startswith(tokenizer.decode(ids[:-4]))
        assert len(tokenizer(whole)["input_ids"]) - len(ids) < 17


@settings(max_examples=30)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8), st.integers(1, 9))
def test_tokenized_blocks_hold_every_token_once_but_the_tail(texts, block_size):
    tokenizer = byte_tokenizer().backend_tokenizer
    batch = {"content": texts}
    blocks = data._tokenize(batch, tokenizer.to_str(), 1000, block_size, "content")["input_ids"]
    expected = [token for text in texts for token in [*tokenizer.encode(text).ids, 1000]]
    assert sum(blocks, []) == expected[: len(expected) // block_size * block_size]
    assert all(len(block) == block_size for block in blocks)


def test_tokenizer_is_trained_once_and_round_trips(jsonl, monkeypatch):
    arguments = DataArguments(dataset=str(jsonl))
    train = data.load_documents(arguments, seed=0)["train"]
    tokenizer = data.load_tokenizer(arguments, train, 400)
    monkeypatch.setattr(data, "ByteLevelBPETokenizer", None)
    again = data.load_tokenizer(arguments, train, 400)
    text = "naïve = '→'  # \t\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert again(text) == tokenizer(text) and set(tokenizer(text)) == {"input_ids", "attention_mask"}
    assert len(tokenizer) <= 400 and tokenizer.eos_token_id != tokenizer.pad_token_id


def test_second_call_reads_the_cache(jsonl):
    arguments = DataArguments(dataset=str(jsonl), block_size=16)
    documents = data.load_documents(arguments, seed=0)
    tokenizer = data.load_tokenizer(arguments, documents["train"], 400)
    first = data.tokenize_blocks(documents, tokenizer, arguments)
    tokenizer("use changes the state of a tokenizer", truncation=True, max_length=4)
    second = data.tokenize_blocks(documents, tokenizer, arguments)
    for name in first:
        assert first[name].cache_files == second[name].cache_files != []


def test_dataset_with_its_own_evaluation_part_and_a_tokenizer_by_name(tmp_path, jsonl):
    arguments = DataArguments(dataset=str(jsonl))
    tokenizer = data.load_tokenizer(arguments, data.load_documents(arguments, 0)["train"], 400)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = tmp_path / "parquet"
    folder.mkdir()
    for name, texts in (("train", DOCUMENTS[:150]), ("validation", DOCUMENTS[150:])):
        Dataset.from_dict({"code": texts}).to_parquet(folder / f"{name}.parquet")
    arguments = DataArguments(dataset=str(folder), text_column="code", tokenizer=str(tmp_path / "tokenizer"))
    documents = data.load_documents(arguments, seed=0)
    assert list(documents["eval"]["code"]) == DOCUMENTS[150:]
    loaded = data.load_tokenizer(arguments, documents["train"], None)
    assert loaded("def f") == AutoTokenizer.from_pretrained(tmp_path / "tokenizer")("def f")


@pytest.mark.parametrize("parts", [{"test": 200}, {"validation": 200}, {"validation": 150, "test": 50}])
def test_without_a_train_split_the_first_is_trained_on(tmp_path, parts):
    folder, texts = tmp_path / "parts", iter(DOCUMENTS)
    folder.mkdir()
    for name, number in parts.items():
        rows = [json.dumps({"content": text}) + "\n" for text in islice(texts, number)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    documents = data.load_documents(DataArguments(dataset=str(folder), eval_fraction=0.2), seed=0)
    assert sorted([*documents["train"]["content"], *documents["eval"]["content"]]) == sorted(DOCUMENTS)
    if len(parts) == 2:
        assert list(documents["eval"]["content"]) == DOCUMENTS[150:]


@pytest.mark.parametrize("streaming", [False, True])
def test_embedded_corpus_beside_other_data(jsonl, streaming):
    arguments = DataArguments(dataset=str(jsonl), eval_dataset="stdlib", streaming=streaming)
    documents = data.load_documents(arguments, seed=0)
    assert Path(json.__file__).read_text() in documents["eval"]["content"]
    assert sorted(row["content"] for row in documents["train"]) == sorted(DOCUMENTS)
    arguments = DataArguments(dataset="stdlib", eval_dataset=str(jsonl), streaming=streaming)
    texts = [row["content"] for row in data.load_documents(arguments, seed=0)["train"]]
    assert Path(json.__file__).read_text() in texts and len(texts) > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "no/such/place"}, "dataset 'no/such/place' is no file or folder, and cannot be an id of the Hub"),
        ({"text_column": "text"}, "text_column='text' is not a column.*content"),
        ({"text_column": "number"}, "text_column='number' must hold texts, got int64"),
        ({"dataset": __file__}, "must end in one of .json"),
        ({"dataset": "empty.jsonl"}, "dataset 'empty.jsonl' cannot be loaded: it is empty"),
    ],
)
def test_data_that_cannot_be_had(jsonl, arguments, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(jsonl.parent)
    Path("empty.jsonl").touch()
    jsonl.write_text(json.dumps({"content": "a text", "number": 1}) + "\n")
    with pytest.raises(UserError, match=message):
        data.load_documents(DataArguments(**{"dataset": str(jsonl), **arguments}), seed=0)


def test_rows_without_a_text_are_left_out(jsonl, capsys):
    rows = [{"content": text} for text in [None, *DOCUMENTS, None]]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = data.load_documents(DataArguments(dataset=str(jsonl)), seed=0)
    assert sorted([*parts["train"]["content"], *parts["eval"]["content"]]) == sorted(DOCUMENTS)
    assert "2 of 202 documents have no text: left out" in capsys.readouterr().out


def test_tokenizer_that_cannot_be_had(jsonl, tmp_path):
    arguments = DataArguments(dataset=str(jsonl), tokenizer=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="tokenizer '.*nothing' is no folder, and cannot be an id of the Hub"):
        data.load_tokenizer(arguments, None, None)


def test_part_smaller_than_a_block(jsonl):
    arguments = DataArguments(dataset=str(jsonl), block_size=100_000)
    documents = data.load_documents(arguments, seed=0)
    tokenizer = data.load_tokenizer(arguments, documents["train"], 400)
    with pytest.raises(UserError, match="fewer than block_size=100000 tokens"):
        data.tokenize_blocks(documents, tokenizer, arguments)


# ---- streams


def stream(folder, rank=0, processes=1, **more):
    options = {"dataset": str(folder), "streaming": True, "tokenizer": str(folder / "bpe"), "block_size": 17, **more}
    arguments = DataArguments(**options)
    documents = data.load_documents(arguments, seed=3)
    tokenizer = data.load_tokenizer(arguments, None, None)
    blocks = data.tokenize_blocks(documents, tokenizer, arguments, seed=3)
    return split_dataset_by_node(blocks["train"], rank, processes), tokenizer


@pytest.fixture
def streamed(tmp_path, jsonl):
    """A folder of files to train on, whose documents may be counted, and one to evaluate on; all have a null row."""

    def write(files: int) -> Path:
        folder = tmp_path / f"{files}-files"
        folder.mkdir()
        for index in range(files):
            rows = "".join(json.dumps({"content": text}) + "\n" for text in DOCUMENTS[index:160:files])
            (folder / f"train-{index}.jsonl").write_text(rows + '{"content": null}\n')
        # the first differs from a document of the train part in white space alone
        held_out = ["\n\n" + DOCUMENTS[7].replace("    ", "\t"), *DOCUMENTS[160:]]
        rows = "".join(json.dumps({"content": text}) + "\n" for text in [*held_out, None])
        (folder / "validation.jsonl").write_text(rows)
        arguments = DataArguments(dataset=str(jsonl))
        tokenizer = data.load_tokenizer(arguments, data.load_documents(arguments, 0)["train"], 400)
        tokenizer.save_pretrained(folder / "bpe")
        return folder

    return write


@pytest.mark.parametrize(("files", "processes"), [(4, 1), (4, 2), (3, 2), (1, 2)])
def test_stream_gives_every_token_once_in_a_pass(streamed, files, processes, monkeypatch):
    monkeypatch.setattr("datasets.IterableDataset.repeat", lambda self, times: self)
    folder = streamed(files)
    blocks = []
    for rank in range(processes):
        part, tokenizer = stream(folder, rank, processes, shuffle_buffer=11)
        ours = [row["input_ids"].tolist() for row in part]
        assert ours and all(len(block) == 17 for block in ours)
        blocks += ours
    # document 7 stands in the evaluation part
    texts = [text for text in DOCUMENTS[:160] if text != DOCUMENTS[7]]
    expected = Counter(token for text in texts for token in tokenizer(text)["input_ids"])
    seen = Counter(token for block in blocks for token in block)
    assert seen.pop(tokenizer.eos_token_id) == 17 * len(blocks) - expected.total() >= len(texts)
    assert seen == expected


# torch's, of two workers on one core
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_goes_on_where_it_was_left(streamed, workers):
    folder = streamed(4)

    def loader():
        part, _ = stream(folder, shuffle_buffer=11)
        return StatefulDataLoader(part, batch_size=3, num_workers=workers, generator=torch.Generator())

    unbroken = [batch["input_ids"] for batch in islice(loader(), 150)]  # more than a pass
    assert len({tuple(row) for batch in unbroken for row in batch.tolist()}) < 3 * 150
    for left in (1, 10, 37):
        first = loader()
        batches = iter(first)
        for _ in range(left):
            next(batches)
        second = loader()
        second.load_state_dict(first.state_dict())
        rest = [batch["input_ids"] for batch in islice(second, 12)]
        assert torch.stack(rest).equal(torch.stack(unbroken[left : left + 12]))


def test_order_of_a_stream_follows_the_seed(streamed):
    folder = streamed(1)
    arguments = DataArguments(dataset=str(folder), streaming=True, tokenizer=str(folder / "bpe"), block_size=17)
    documents = data.load_documents(arguments, seed=0)
    tokenizer = data.load_tokenizer(arguments, None, None)
    orders = [
        [
            row["input_ids"].tolist()
            for row in islice(data.tokenize_blocks(documents, tokenizer, arguments, s)["train"], 9)
        ]
        for s in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_order_of_a_streams_files_follows_the_seed(streamed):
    arguments = DataArguments(dataset=str(streamed(6)), streaming=True)
    texts = [[row["content"] for row in data.load_documents(arguments, seed)["train"]] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2] and sorted(texts[0]) == sorted(texts[2])


def test_documents_trained_on_are_left_out_of_the_evaluation(streamed, capsys):
    folder = streamed(2)
    parts = data.load_documents(DataArguments(dataset=str(folder)), seed=0)
    assert list(parts["eval"]["content"]) == DOCUMENTS[160:]
    assert sorted(parts["train"]["content"]) == sorted(DOCUMENTS[:160])
    assert (
        "1 of 41 documents to evaluate on are also trained on: left out of the evaluation" in capsys.readouterr().out
    )


def test_stream_needs_what_it_cannot_find_out(streamed, jsonl):
    folder = streamed(1)
    with pytest.raises(UserError, match="streaming=True needs evaluation data of its own"):
        data.load_documents(DataArguments(dataset=str(jsonl), streaming=True), seed=0)
    with pytest.raises(UserError, match="text_column='text' is not a column.*content"):
        data.load_documents(DataArguments(dataset=str(folder), streaming=True, text_column="text"), seed=0)
    with pytest.raises(UserError, match="streaming=True needs a tokenizer and max_steps"):
        build_recipe({"dataset": str(folder), "streaming": True, "tokenizer": "x"})


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("backbone", ["gpt2", "pythia"])
def test_separated_documents_are_blind_to_each_other(backbone, implementation):
    model = tiny_model("SM+R", backbone, attn_implementation=implementation)
    input_ids = random_ids(2, 24)
    input_ids[0, [3, 4, 15]] = input_ids[1, [0, 23]] = end = 1
    positions = data.document_positions(input_ids, end)
    logits = model(input_ids, position_ids=positions, use_cache=False).logits
    for row, starts in enumerate([[0, 4, 5, 16, 24], [0, 1, 24]]):
        for start, stop in pairwise(starts):
            assert positions[row, start:stop].tolist() == list(range(stop - start))
            alone = model(input_ids[row : row + 1, start:stop]).logits[0]
            torch.testing.assert_close(logits[row, start:stop], alone, atol=1e-5, rtol=1e-5)


def test_evaluation_is_on_validation_before_test():
    assert data.evaluation_split({"train": 1, "test": 2, "validation": 3}) == 3
    assert data.evaluation_split({"train": 1, "test": 2}) == 2 and data.evaluation_split({"other": 1, "more": 2}) == 1


def test_a_tokenizer_is_of_its_texts_column_and_size(jsonl):
    """The same file with as many texts and other ones, another column, another size."""
    held_out = jsonl.with_name("held_out.jsonl")
    held_out.write_text(json.dumps({"content": "a text", "upper": "A TEXT"}) + "\n")

    def vocabulary(size=300, **named):
        # nothing is held out of it, so that as many texts are left
        given = DataArguments(**{"dataset": str(jsonl), "eval_dataset": str(held_out), **named})
        return data.load_tokenizer(given, data.load_documents(given, 0)["train"], size).get_vocab()

    rows = [{"content": text, "upper": text.upper()} for text in DOCUMENTS]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = vocabulary()
    assert vocabulary() == first and vocabulary(text_column="upper") != first and len(vocabulary(320)) > len(first)
    jsonl.write_text(jsonl.read_text().replace("return", "yields"))
    assert any("yield" in token for token in vocabulary()) and not any("yield" in token for token in first)


def test_digest_of_blocks_sees_number_order_and_part():
    def blocks(**parts):
        return {name: Dataset.from_dict({"input_ids": rows}).with_format("torch") for name, rows in parts.items()}

    rows = [[i, i + 1] for i in range(5)]
    digest = data.digest_blocks(blocks(train=rows, eval=rows[:2]))
    assert digest == data.digest_blocks(blocks(train=rows, eval=rows[:2]))
    for train, held_out in ((rows[::-1], rows[:2]), (rows[:4], rows[:2]), (rows, rows[:1]), (rows, rows[1:3])):
        assert data.digest_blocks(blocks(train=train, eval=held_out)) != digest


def test_revision_of_what_is_no_repository(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        data.datasets, "load_dataset_builder", lambda *named: asked.append(named) or SimpleNamespace(hash="a1")
    )
    (tmp_path / "texts.jsonl").touch()
    assert data.find_revision(DataArguments()) == f"python-{platform.python_version()}"
    assert data.find_revision(DataArguments(dataset=str(tmp_path / "texts.jsonl"))) is None
    assert data.find_revision(DataArguments(eval_dataset=str(tmp_path / "texts.jsonl"))) is None
    assert not asked
    # of the evaluation data, where they are others
    assert data.find_revision(DataArguments(dataset="a/b", dataset_config="c")) == "a1"
    assert data.find_revision(DataArguments(dataset="a/b", dataset_config="c", eval_dataset="d/e")) == "a1"
    assert asked == [("a/b", "c"), ("d/e", None)]

"""The metric, and `lnfree measure`, against eager attention maps and log-likelihoods in float64."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_lnfree
from modeling_lnfree.metrics.attention_entropy.attention_entropy import AttentionEntropy
from training import cli
from training.errors import UserError
from training.measure import measure

from ..conftest import ROOT, tiny_model


FOLDER = ROOT / "modeling_lnfree" / "metrics" / "attention_entropy"
TEXTS = ["def add(a, b):\n    return a + b\n", "x", "import os", "for i in range(10):\n    print(i)"]


def make_model(model_type="gpt2"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=40,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def naive(model, tokenizer, texts, max_length=40):
    """By text, in float64 and without padding: entropies `(layers, heads, T)`, and the tokens' likelihoods in nats."""
    config = type(model.config).from_dict(model.config.to_dict())
    reference = type(model)._from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
    reference.load_state_dict(model.state_dict())
    entropies, nlls = [], []
    for text in texts:
        input_ids = torch.tensor([tokenizer(text)["input_ids"][:max_length]])
        output = reference(input_ids, output_attentions=True)
        entropies.append(torch.special.entr(torch.stack(output.attentions)[:, 0].double()).sum(-1))
        log_weights = output.logits[0, :-1].log_softmax(-1)
        nlls.append(-log_weights.gather(1, input_ids[0, 1:, None])[:, 0])
    return entropies, nlls


def mean_entropy(entropies):
    return torch.cat(entropies, -1).mean(-1)


def same(result, expected, atol=2e-5):
    torch.testing.assert_close(torch.tensor(result, dtype=torch.float64), expected, atol=atol, rtol=0)


# ---- the metric


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_texts_match_naive_maps(metric, tokenizer, model_type, batch_size):
    model = make_model(model_type)
    result = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, batch_size=batch_size)
    entropies, _ = naive(model, tokenizer, TEXTS)
    expected = mean_entropy(entropies)  # (layers, heads)
    same(result["entropy"], expected)
    same(result["layer_entropy"], expected.mean(1))
    same(result["mean_entropy"], expected.mean())
    lengths = [entropy.shape[-1] for entropy in entropies]
    largest = sum(math.lgamma(length + 1) for length in lengths) / sum(lengths)
    same(result["max_entropy"], torch.full_like(expected, largest))
    same(result["normalized_entropy"], expected / largest)
    counts, _ = np.histogram(expected / largest, bins=[0, 0.25, 0.5, 0.75, 1])
    assert result["head_distribution"] == pytest.approx(counts / expected.numel())
    assert result["num_queries"] == sum(lengths)
    assert result["nan_count"] == result["inf_count"] == [[0] * 4] * 3


def test_a_model_by_its_folder(metric, model, folder, tokenizer):
    by_folder = metric.compute(predictions=TEXTS, model_id=folder, max_length=7, dtype="float64", device="cpu")
    same(by_folder["entropy"], mean_entropy(naive(model, tokenizer, TEXTS, max_length=7)[0]), atol=1e-6)
    at_hand = metric.compute(predictions=TEXTS, model=model, tokenizer=folder, max_length=7)
    assert at_hand["mean_entropy"] == pytest.approx(by_folder["mean_entropy"], abs=1e-5)


def test_a_column_of_a_dataset_and_texts_added_before(metric, model, tokenizer):
    column = Dataset.from_dict({"content": TEXTS})["content"]
    expected = metric.compute(predictions=column, model=model, tokenizer=tokenizer)
    metric.add_batch(predictions=TEXTS[:2])
    metric.add(prediction=TEXTS[2])
    assert metric.compute(predictions=TEXTS[3:], model=model, tokenizer=tokenizer) == expected
    # their truth value is an error
    for column in (np.array(TEXTS), pd.Series(TEXTS)):
        assert metric.compute(predictions=column, model=model, tokenizer=tokenizer) == expected


def test_streamed_measurements_equal_one_compute(metric, model, tokenizer):
    expected = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    with torch.no_grad():
        for text in TEXTS[:2]:
            with metric.record(model) as record:
                model(torch.tensor([tokenizer(text)["input_ids"]]))
            metric.add(prediction=record)
    rest = [AttentionEntropy().compute(predictions=[text], model=model, tokenizer=tokenizer) for text in TEXTS[2:]]
    metric.add_batch(predictions=json.loads(json.dumps(rest)))
    streamed = metric.compute()
    assert streamed.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(streamed[name], expected[name], atol=1e-5)


def test_a_broken_head_is_nan_and_counted(metric, tokenizer):
    model = make_model()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.bias[8:16] = torch.nan  # queries of the second head
    result = metric.compute(predictions=["abc", "de"], model=model, tokenizer=tokenizer)
    assert [math.isnan(value) for value in result["entropy"][1]] == [False, True, False, False]
    assert result["nan_count"][1] == [0, (1 + 2 + 3) + (1 + 2), 0, 0]
    assert math.isnan(result["mean_entropy"]) and not math.isnan(result["layer_entropy"][0])
    assert AttentionEntropy().compute(predictions=[result])["nan_count"] == result["nan_count"]


def test_the_text_layers_of_a_multi_modal_model(metric, tokenizer):
    text = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**vision, "image_size": 28})
    model = AutoModelForCausalLM.from_config(config).eval()
    result = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert np.shape(result["entropy"]) == (3, 4) and 0 < result["mean_entropy"] < result["max_entropy"][0][0]
    assert sum(result["head_distribution"]) == 1


def test_a_model_in_training_is_measured_without_dropout_and_left_as_it_was(metric, tokenizer):
    model = make_model()
    expected = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    model.train()
    assert metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer) == expected
    assert model.training and model.transformer.drop.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "there is nothing to compute"),
        ({"predictions": []}, "at least one text or measurement, got \\[\\]"),
        ({"predictions": "a text"}, "must be a list"),
        ({"predictions": iter("a")}, "must be a list .*, got <str_"),
        ({"predictions": [0.5]}, "a record or a result of this metric, got 0.5"),
        ({"predictions": [{"entropy": [[1.0]]}]}, "got dict without max_entropy"),
        ({"predictions": ["a", {}]}, "texts or measurements, not both"),
        ({"predictions": ["a"]}, "pass either model_id=, or model= and tokenizer="),
        ({"predictions": ["a"], "model_id": "x", "model": "given"}, "pass either model_id=, or model= and tokenizer="),
        ({"predictions": ["a"], "model": "given"}, "needs tokenizer="),
        ({"predictions": ["a"], "model": "given", "dtype": "float16", "revision": "main"}, "revision, dtype is for"),
        ({"predictions": ["a"], "model": "given", "tokenizer": "given", "max_length": 41}, "in 1 to 40.* got 41"),
        ({"predictions": ["a"], "model": "given", "tokenizer": "given", "max_length": 2.0}, "an integer .* got 2.0"),
        ({"predictions": ["a"], "model": "given", "tokenizer": "given", "batch_size": 0}, "at least 1, got 0"),
        ({"predictions": ["a"], "model": "given", "tokenizer": "given", "batch_size": 2.5}, "an integer .* got 2.5"),
        ({"predictions": ["a"], "model": "given", "tokenizer": "given", "batch_size": None}, "an integer .* got None"),
        ({"predictions": ["a", ""], "model": "given", "tokenizer": "given"}, "predictions hold an empty text"),
        ({"predictions": ["a"], "model": "bloom", "tokenizer": "given"}, "BloomModel computes its attention itself"),
        ({"predictions": ["measured"], "model": "given"}, "put together without a model"),
    ],
)
def test_errors_say_what_is_wrong(metric, model, tokenizer, arguments, message):
    if arguments.get("predictions") == ["measured"]:
        measured = metric.compute(predictions=["a"], model=model, tokenizer=tokenizer)
        arguments = {**arguments, "predictions": [measured]}
    bloom = AutoConfig.for_model("bloom", vocab_size=256, hidden_size=32, n_layer=1, n_head=4)
    models = {"given": model, "bloom": AutoModelForCausalLM.from_config(bloom)}
    stands_for = {"model": models, "tokenizer": {"given": tokenizer}}
    arguments = {name: stands_for.get(name, {}).get(value, value) if isinstance(value, str) else value
                 for name, value in arguments.items()}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        metric.compute(**arguments)


def test_a_hub_that_cannot_be_reached_is_told_at_once(metric, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    nowhere = "model 'no/model' is no folder, and the Hub cannot be reached to look for it: .*refused"
    with pytest.raises(OSError, match=nowhere):
        metric.compute(predictions=["a"], model_id="no/model")
    with pytest.raises(OSError, match=nowhere):
        metric.compute(predictions=["a"], model=model, tokenizer="no/model")
    with pytest.raises(OSError, match=nowhere):
        modeling_lnfree.measure("no/model", ["a text"])
    with pytest.raises(ValueError, match="model 'no model' is no folder, and cannot be an id of the Hub"):
        metric.compute(predictions=["a"], model_id="no model")


def test_misspelled_arguments_are_named(metric):
    with pytest.raises(TypeError, match="prediction"):
        metric.compute(prediction=["a"])
    with pytest.raises(TypeError, match="references"):
        metric.add_batch(predictions=["a"], references=["a"])


def test_a_corrected_call_counts_its_texts_once(metric, model, tokenizer):
    metric.add(prediction="abc")
    with pytest.raises(ValueError, match="not both"):
        metric.add(prediction={})
    with pytest.raises(ValueError, match="an empty text"):
        metric.add(prediction="")
    with pytest.raises(ValueError, match="must be a list .*, got None"):
        metric.add_batch(predictions=None)
    for wrong in ({}, {"model": model}):
        with pytest.raises(ValueError, match="tokenizer="):
            metric.compute(predictions=["de"], **wrong)
    assert metric.compute(predictions=["de"], model=model, tokenizer=tokenizer)["num_queries"] == 5


def test_measurements_of_different_models_are_refused(metric):
    def measured(heads, num_queries=3):
        table = [[1.0] * heads]
        names = ("entropy", "max_entropy", "nan_count", "inf_count")
        return {**dict.fromkeys(names, table), "num_queries": num_queries}

    with pytest.raises(ValueError, match=r"different \(layers, heads\): \[\(1, 2\), \(1, 4\)\]"):
        metric.compute(predictions=[measured(2), measured(4)])
    with pytest.raises(ValueError, match="no query was measured"):
        AttentionEntropy().compute(predictions=[measured(2, num_queries=0)])


STRANGER = """
import doctest, importlib, json, sys
import evaluate
from datasets import load_dataset

texts = load_dataset("json", data_files="texts.jsonl", split="train")["content"]
metric = evaluate.load("./attention_entropy")
result = metric.compute(predictions=texts, model_id="variant", trust_remote_code=True)
failed, attempted = doctest.testmod(importlib.import_module(type(metric).__module__))
known = [name for name in sys.modules if name.split(".")[0] in ("modeling_lnfree", "training")]
json.dump({"result": result, "failed": failed, "attempted": attempted, "known": known}, open("result.json", "w"))
"""


def test_a_copied_folder_loads_in_a_process_without_the_project_and_passes_its_doctests(tmp_path, tokenizer):
    model = tiny_model(vocab_size=256)
    model.save_pretrained(tmp_path / "variant")
    tokenizer.save_pretrained(tmp_path / "variant")
    shutil.copytree(FOLDER, tmp_path / "attention_entropy")
    (tmp_path / "stranger.py").write_text(STRANGER)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    run = subprocess.run(
        [sys.executable, "-I", "stranger.py"],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    answer = json.loads((tmp_path / "result.json").read_text())
    assert answer["known"] == [] and answer["failed"] == 0 and answer["attempted"] > 10, run.stdout
    same(answer["result"]["entropy"], mean_entropy(naive(model, tokenizer, TEXTS, max_length=64)[0]))


# ---- its page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of the page, served from a copy of the metric's folder."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    space = tmp_path_factory.mktemp("page") / "space"
    shutil.copytree(FOLDER, space)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"GRADIO_SERVER_PORT": port, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(space / "app.py")]
    with subprocess.Popen(command, cwd=space, env={**os.environ, **environment}, stdout=subprocess.PIPE) as server:
        try:
            server.stdout.readline()  # says that it runs
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.mark.slow  # a server is started
def test_the_page_measures_a_model_and_shows_errors(page, folder, tmp_path):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(page, verbose=False)
    summary, heat_map, table = client.predict(folder, TEXTS[0], api_name="/measure")
    assert "nats** on average over 32 tokens" in summary and heat_map["type"] == "matplotlib"
    assert [row[0] for row in table["data"]] == [0, 1, 2] and "Broken" not in summary
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"junk")
    for model_id, text, message in (
        (tmp_path / "nothing", TEXTS[0], "This cannot be measured"),
        (tmp_path / "cut", TEXTS[0], "[Hh]eader"),
        (folder, "a", "two tokens"),
        (folder, "", "a model and a text are needed"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(str(model_id), text, api_name="/measure")


@pytest.mark.slow
def test_the_page_tells_broken_heads(page, tokenizer, tmp_path):
    from gradio_client import Client

    model = make_model()
    with torch.no_grad():
        model.transformer.h[2].attn.c_attn.bias[8:16] = torch.nan
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    summary, _, table = Client(page, verbose=False).predict(str(tmp_path), "abc", api_name="/measure")
    assert "grey in the map: 1 of 12 heads" in summary and table["data"][2][-1] == 6


@pytest.mark.slow
def test_the_page_in_a_browser_as_wide_as_a_telephone(page, folder):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("the browser test needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    with webdriver.Chrome(options, webdriver.ChromeService(programs[1])) as browser:
        screen = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(page)

        def find(path):
            return WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.XPATH, path))[0]

        def enter(label, value):
            box = find(f"//label[contains(., '{label}')]//*[self::input or self::textarea]")
            box.clear()
            box.send_keys(value)

        def shown():
            return browser.find_element(By.TAG_NAME, "body").text

        enter("Model", folder)
        enter("Text", TEXTS[0])
        find("//button[contains(., 'Measure')]").click()
        heat_map = find("//img[contains(@alt, 'plot')]")
        WebDriverWait(browser, 60).until(lambda _: heat_map.get_property("naturalWidth") > 0)
        assert "nats on average over 32 tokens" in shown()
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        # markup in an error is read as text, and nothing of the last model stands beside it
        enter("Model", "<no> such model")
        find("//button[contains(., 'Measure')]").click()
        find("//*[contains(text(), '<no> such model')]")
        assert "This cannot be measured" in shown() and "on average" not in shown()
        assert not browser.find_elements(By.XPATH, "//img[contains(@alt, 'plot')]")


# ---- lnfree measure


@pytest.fixture
def corpus(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    path = tmp_path / "texts.jsonl"
    rows = [{"content": text, "number": 1} for text in [TEXTS[0], None, *TEXTS[1:], ""]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_measure_matches_naive(tmp_path, model, folder, tokenizer, corpus, streaming, capsys):
    outputs = {name: tmp_path / "out" / name for name in ("m.json", "m.png", "m.parquet")}
    arguments = ["measure", folder, "--dataset", corpus, "--batch-size", "2", "--max-length", "30", "--device", "cpu"]
    for option, path in zip(("--json", "--heat-map", "--parquet"), outputs.values(), strict=True):
        arguments += [option, str(path)]
    assert cli.main(arguments + ["--streaming"] * streaming) == 0
    results = json.loads(outputs["m.json"].read_text())
    entropies, nlls = naive(model, tokenizer, TEXTS, max_length=30)

    assert results["nll"] == pytest.approx(torch.cat(nlls).mean().item(), rel=1e-6)
    assert results["perplexity"] == pytest.approx(torch.cat(nlls).mean().exp().item(), rel=1e-5)
    assert f"perplexity {results['perplexity']:.3f}" in capsys.readouterr().out
    same(results["attention_entropy"]["entropy"], mean_entropy(entropies))
    lengths = [entropy.shape[-1] for entropy in entropies]
    assert results["num_tokens"] == results["attention_entropy"]["num_queries"] == sum(lengths)
    assert results["predicted_tokens"] == sum(lengths) - len(TEXTS)
    counts = [results[name] for name in ("num_texts", "skipped_texts", "truncated_texts")]
    assert counts == [len(TEXTS), 2, sum(len(text) > 30 for text in TEXTS)]
    expected = {"model": folder, "dataset": corpus, "dtype": "float32", "max_length": 30, "device": "cpu"}
    assert results.items() >= expected.items() and results["versions"]["torch"] == version("torch")
    assert outputs["m.png"].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(outputs)

    figures = pq.read_table(outputs["m.parquet"]).to_pylist()
    assert [row["row"] for row in figures] == [0, 2, 3, 4]
    for row, entropy, nll in zip(figures, entropies, nlls, strict=True):
        assert row["num_tokens"] == entropy.shape[-1]
        same(row["nll"], nll)
        same(row["entropy"], entropy.mean(-1))
        same(row["position_entropy"], entropy.mean(1))
        assert row["perplexity"] == pytest.approx(nll.mean().exp().item(), rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_measure_finds_the_only_column_of_texts(tmp_path, folder, corpus, streaming):
    # "content" beside a column of numbers
    found = measure(folder, dataset=corpus, streaming=streaming, device="cpu")
    assert (found["text_column"], found["num_texts"]) == ("content", len(TEXTS))
    path = tmp_path / "two.jsonl"
    path.write_text('{"code": "abc", "title": "ab", "stars": 3}\n')
    with pytest.raises(UserError, match="text_column must name one of the columns of texts: code, title$"):
        measure(folder, dataset=str(path), streaming=streaming)
    assert measure(folder, dataset=str(path), text_column="title", streaming=streaming)["num_tokens"] == 2
    path.write_text('{"stars": 3, "forks": 1}\n')
    with pytest.raises(UserError, match="has no column of texts among stars, forks"):
        measure(folder, dataset=str(path), streaming=streaming)


def test_measure_of_some_rows_of_a_split(model, folder, tokenizer, corpus):
    results = measure(folder, dataset=str(Path(corpus).parent), split="train", max_samples=1, dtype="float64")
    assert results["nll"] == pytest.approx(naive(model, tokenizer, TEXTS[:1])[1][0].mean().item(), abs=1e-6)
    assert (results["num_texts"], results["split"], results["dtype"]) == (1, "train", "float64")


def test_a_build_for_gpus_measures_where_there_is_none(folder, monkeypatch):
    def current_accelerator(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert measure(folder, dataset="stdlib", max_samples=2)["device"] == "cpu"


def test_measure_of_the_embedded_corpus(folder, monkeypatch):
    parts = {"train": Dataset.from_dict({"content": ["no"]}), "eval": Dataset.from_dict({"content": TEXTS})}
    monkeypatch.setattr("training.texts.load_documents", lambda arguments, seed: parts)
    assert measure(folder, dataset="stdlib")["num_texts"] == len(TEXTS)
    found = measure(folder, dataset="stdlib", split="train", max_samples=99)
    assert (found["num_texts"], found["num_tokens"]) == (1, 2)
    with pytest.raises(UserError, match="one of train, eval, got 'test'"):
        measure(folder, dataset="stdlib", split="test")


def test_an_infinite_perplexity_is_a_number(tmp_path, tokenizer, corpus):
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.weight *= 1e5
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert measure(str(tmp_path / "model"), dataset=corpus)["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_id": "./no-such-model"}, "model './no-such-model' is neither a folder nor an id of the Hub"),
        ({"dataset": "no_texts.yaml"}, "must end in one of .json"),
        ({"dataset": "./no-such-dataset"}, "dataset './no-such-dataset' is no file or folder"),
        ({"dataset": "broken.jsonl", "streaming": True}, "dataset 'broken.jsonl' cannot be read"),
        ({"dataset": "empty.jsonl"}, "no text of two tokens in the column 'content'"),
        ({"split": "validation"}, "cannot be loaded: .*validation"),
        ({"dataset": "nothing.jsonl"}, "dataset 'nothing.jsonl' cannot be loaded: it is empty"),
        ({"dataset": "nothing.jsonl", "streaming": True}, "dataset 'nothing.jsonl' cannot be loaded: it is empty"),
        ({"text_column": "text"}, "'text' is not a column of the dataset, which has content, number"),
        # before the model is looked for
        ({"text_column": "text", "model_id": "no/model"}, "'text' is not a column of the dataset"),
        ({"text_column": "text", "model_id": "no/model", "streaming": True}, "'text' is not a column of the dataset"),
        ({"text_column": "number"}, "text_column='number' must hold texts, got int"),
        ({"batch_size": 0}, "^batch_size must be at least 1, got 0"),
        ({"max_samples": 0}, "^max_samples must be at least 1, got 0"),
        ({"max_length": 0}, "^max_length must be at least 1, got 0"),
        ({"max_length": 41}, "in 1 to 40, the positions of the model, got 41"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "nonsense"}, "device 'nonsense' cannot be used"),
        ({"json_path": "."}, "json_path must be a new or a plain file, got ., which is a folder"),
        ({"parquet_path": "texts.jsonl/figures.parquet"}, "cannot be written"),
        ({"heat_map_path": "map.mp3"}, "map.mp3 must end in .png, .pdf or .svg"),
    ],
)
def test_measure_errors_are_one_line(folder, corpus, monkeypatch, changes, message):
    monkeypatch.chdir(Path(corpus).parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("no_texts.yaml").write_text("a: 1\n")
    Path("broken.jsonl").write_text('{"content": "abc"}\n{"content": \n')
    Path("empty.jsonl").write_text('{"content": "a"}\n')
    Path("nothing.jsonl").touch()
    with pytest.raises(UserError, match=message) as error:
        measure(**{"model_id": folder, "dataset": corpus, **changes})
    assert "\n" not in str(error.value)


def test_measure_of_a_model_beside_the_interface_is_refused(tmp_path, tokenizer, corpus):
    config = AutoConfig.for_model("bloom", vocab_size=256, hidden_size=32, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    with pytest.raises(UserError, match="BloomModel computes its attention itself"):
        measure(str(tmp_path / "bloom"), dataset=corpus, parquet_path=tmp_path / "figures.parquet")
    assert not list(tmp_path.glob("figures*"))

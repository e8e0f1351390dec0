"""What README.md and docs/ tell a reader to run runs as it stands there; what they name exists."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from modeling_lnfree.configuration_lnfree import ACTIVATION_WORDS, BACKBONES, NO_FINAL_NORM, NORM_WORDS, PRESETS
from training import cli, data
from training.pages import TABLE, find_pages
from training.recipe import DATA_FIELDS, MODEL_FIELDS, TRAINING_FIELDS, DataArguments

from .conftest import ROOT, tiny_config
from .hub_server import TOKEN, HubServer


PAGES = {page.name: page for page in find_pages(ROOT / "docs")}
MODEL = "runs/first/model"
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def code_of(name: str, language: str) -> list[str]:
    """The blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[name].read_text(), re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """The words of every `lnfree` command of a page, in its blocks and in its lines."""
    text = re.sub(r"<!-- table .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
    lines = [line for block in code_of(page.name, "bash") for line in block.replace("\\\n", "").splitlines()]
    lines += re.findall(r"`((?:\w+ )*lnfree [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [re.search(r"(?<![\w/-])lnfree ([^#|;]+)", line) for line in lines]
    return [match[1].split() for match in found if match]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's folder: a text, and a small model with a tokenizer where the samples have theirs."""
    monkeypatch.setattr(data, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    folder = tmp_path / "reader"
    folder.mkdir()
    shutil.copy(ROOT / "LICENSE", folder)
    corpus = shutil.copy(ROOT / "LICENSE", tmp_path / "corpus.txt")
    arguments = DataArguments(dataset=str(corpus), text_column="text")
    tokenizer = data.load_tokenizer(arguments, data.load_documents(arguments, 0)["train"], 300)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LNFreeForCausalLM(tiny_config(vocab_size=300, max_position_embeddings=128, **ids)).save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    return folder


def run(code: str, folder: Path, **environment) -> str:
    """Runs code in a clean process; returns what it printed."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    process = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=folder,
        env={**inherited, "HF_HOME": str(folder / "home"), **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_entropy_and_fine_tuning_of_the_readme(reader):
    entropy, fine_tuning = code_of("README.md", "python")
    printed = run(entropy, reader)
    config = LNFreeConfig.from_pretrained(reader / MODEL)
    assert printed.count(".") == config.num_hidden_layers * config.num_attention_heads + 1
    losses = dict(
        line.split() for line in run(fine_tuning, reader).splitlines() if line.startswith(("before", "after"))
    )
    assert float(losses["after"]) < float(losses["before"])
    # whoever does not have the project
    load = "from transformers import AutoModelForCausalLM\nimport sys\n"
    load += "model = AutoModelForCausalLM.from_pretrained('finetuned', trust_remote_code=True)\n"
    assert run(f"{load}print('modeling_lnfree' in sys.modules, type(model).__name__)", reader).split()[-2:] == [
        "False",
        "LNFreeForCausalLM",
    ]


def test_entropy_as_a_loss_of_the_methods_page(reader):
    code = code_of("README.md", "python")[1].split("collator = ")[0] + code_of("training_methods.md", "python")[0]
    code += "rows = [{'input_ids': row[:8], 'labels': row[:8]} for row in dataset['input_ids'] if len(row) > 8]\n"
    code += "train(model, TrainingArguments('out', max_steps=2, logging_steps=1, report_to='none'), rows)\n"
    printed = run(code, reader)
    assert "entropy_penalty" in printed and "attention_entropy/layer_0/mean" in printed


def test_pushes_during_training_and_after_it_load_elsewhere(reader, tmp_path):
    prepared = code_of("README.md", "python")[1].split("arguments = ")[0].replace("import modeling_lnfree\n", "")
    prepared = prepared.replace("modeling_lnfree.modeling_lnfree.__file__", "'LICENSE'")
    # from a model that was itself loaded as remote code
    code = prepared.replace("from_pretrained(name)", "from_pretrained(name, trust_remote_code=True)")
    code += code_of("hub.md", "python")[0] + "model.push_to_hub('lnfree-plain')\n"
    code += "import torch\ntorch.save(model.eval()(torch.arange(9)[None]).logits.detach(), 'logits.pt')\n"
    with HubServer().running() as server:
        environment = {"HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1"}
        run(code, reader, HF_TOKEN=TOKEN, **environment)
        pushed = server.repository("me/lnfree-finetuned")
        titles = {commit.title: commit for commit in pushed.commits}
        during = titles["Training in progress, step 10"]
        plain = server.repository("me/lnfree-plain").find("main")
        assert plain.files["model.safetensors"] == pushed.files["model.safetensors"]
        for commit in (during, pushed.find("main"), plain):
            for name in ("configuration_lnfree.py", "modeling_lnfree.py"):
                assert commit.files[name] == (ROOT / "modeling_lnfree" / name).read_bytes()
            assert {"config.json", "model.safetensors"} <= commit.files.keys()
        # another user, another process, nothing but what was pushed
        printed = run(
            "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"logits = torch.load({str(reader / 'logits.pt')!r})\n"
            f"for revision in ('main', {during.oid!r}):\n"
            "    named = {'revision': revision, 'trust_remote_code': True}\n"
            "    model = AutoModelForCausalLM.from_pretrained('me/lnfree-finetuned', **named).eval()\n"
            "    tokenizer = AutoTokenizer.from_pretrained('me/lnfree-finetuned', **named)\n"
            "    print(torch.equal(model(torch.arange(9)[None]).logits, logits), len(tokenizer))",
            tmp_path,
            **environment,
        )
    expected = ["True", "300"], ["False", "300"]
    assert tuple(line.split() for line in printed.splitlines()) == expected
    before = LNFreeForCausalLM.from_pretrained(reader / MODEL).eval()
    assert not before(torch.arange(9)[None]).logits.equal(torch.load(reader / "logits.pt"))


def test_record_of_the_entropy_page(reader):
    model = LNFreeForCausalLM.from_pretrained(reader / MODEL)
    scope = {"model": model, "batch": {"input_ids": torch.arange(9)[None]}}
    exec(code_of("entropy.md", "python")[0], scope)
    assert scope["record"].entropy.shape == (model.config.num_hidden_layers, model.config.num_attention_heads)


def test_metric_of_the_entropy_page(reader):
    code = code_of("entropy.md", "python")[1]
    code += "import json\nprint(json.dumps([result['layer_entropy'], list(texts), result['num_queries']]))"
    entropy, texts, num_queries = json.loads(run(code, reader).splitlines()[-1])

    model = LNFreeForCausalLM.from_pretrained(reader / MODEL, attn_implementation="eager").eval().double()
    tokenizer = AutoTokenizer.from_pretrained(reader / MODEL)
    total, count = 0, 0
    with torch.no_grad():
        for text in texts:
            input_ids = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")["input_ids"]
            maps = torch.stack(model(input_ids, output_attentions=True).attentions)  # (layers, 1, heads, T, T)
            total, count = total + torch.special.entr(maps).sum((1, 3, 4)).mean(1), count + input_ids.shape[1]
    assert count == num_queries
    torch.testing.assert_close(torch.tensor(entropy).double(), total / count, atol=2e-5, rtol=0)


def test_configuration_of_the_variants_page():
    scope = {}
    exec(code_of("variants.md", "python")[0], scope)
    assert f"({scope['config'].variant!r}, {scope['config'].backbone!r})" in PAGES["variants.md"].read_text()


def test_every_variant_has_the_fields_that_its_row_names():
    rows = re.findall(r"^\| `(SM\+[^`]+)` \| ([^|]+) \|", PAGES["variants.md"].read_text(), re.MULTILINE)
    assert len(rows) >= 9
    for name, cell in rows:
        config = LNFreeConfig.from_variant(name)
        named = {key: yaml.safe_load(value) for key, value in re.findall(r"`(\w+)=([^`]+)`", cell)}
        ours, plain = config.to_dict(), LNFreeConfig().to_dict()
        if "per_layer_config" in named:
            layers = {}
            for first, last, differs in re.findall(r"(\d+)(?:-(\d+))?: (\{[^}]+\})", cell):
                layers |= dict.fromkeys(range(int(first), int(last or first) + 1), yaml.safe_load(differs))
            named["per_layer_config"] = layers
            ours["per_layer_config"] = {int(index): differs for index, differs in ours["per_layer_config"].items()}
        assert named and {key: ours[key] for key in named} == named
        # and no other field differs from the defaults
        assert {key for key in ours if ours[key] != plain.get(key)} <= named.keys()


def test_every_word_of_the_notation_has_a_row():
    names = re.findall(r"^\| `(SM\+[^`]+)` \|", PAGES["variants.md"].read_text(), re.MULTILINE)
    for word in (*ACTIVATION_WORDS, *NORM_WORDS):
        assert any(f"+{word}" in name for name in names), word
    for ending in (NO_FINAL_NORM, *(f"@{preset}" for preset in PRESETS)):
        assert any(name.endswith(ending) for name in names), ending
    fields = [field for values in BACKBONES.values() for field in values.items()]
    for name, value in fields:
        assert f"`{name}={str(value).lower()}`" in PAGES["variants.md"].read_text(), (name, value)


@every_page
def test_variants_of_a_page_exist(page):
    for name in re.findall(r"`(?:variant=)?(SM\+[^` ]+)`", page.read_text()):
        assert LNFreeConfig.from_variant(name).variant == name


@every_page
def test_commands_of_a_page_exist(page, capsys):
    for verb, *words in commands_of(page):
        with pytest.raises(SystemExit) as end:
            cli.main([verb, "--help"])
        assert end.value.code == 0, verb
        options = re.findall(r"--[\w-]+", capsys.readouterr().out)
        for option in (word for word in words if word.startswith("--")):
            assert option in options, (verb, option)
        if verb in ("train", "sweep"):
            # the recipe or the sweep is in small letters, and neither an option nor an option's value
            folder = ROOT / "training" / {"train": "recipes", "sweep": "sweeps"}[verb]
            named = [word for word in words if re.fullmatch(r"[a-z][a-z0-9_]+", word)]
            assert all((folder / f"{name}.yaml").is_file() for name in named), named


@every_page
def test_files_of_a_page_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for script in re.findall(r"bash (scripts/\S+\.sh)", text):
        assert os.access(ROOT / script, os.X_OK), script
    for path in re.findall(r"`((?:docs|tests|training|scripts|modeling_lnfree|model_cards)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


@every_page
def test_anchors_of_a_page_exist(page):
    for target, anchor in re.findall(r"\]\(([\w./]*)#([^)]+)\)", page.read_text()):
        text = ((page.parent / target) if target else page).read_text()
        headings = [
            re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)", text, re.M)
        ]
        assert anchor in headings, (target, anchor)


def test_a_figure_of_a_table_stands_nowhere_else():
    texts = [page.read_text() for page in PAGES.values()]
    tables = "".join(match["content"] for text in texts for match in TABLE.finditer(text))
    # numbers of an arXiv paper and versions are no figures
    figure = re.compile(r"(?<![\d.,])(?!\d{4}\.\d{5})\d[\d,]*\.\d+(?![\d.])")
    shown, told = (
        {number for number in figure.findall(text) if sum(map(str.isdigit, number)) >= 5}
        for text in (tables, "".join(TABLE.sub("", text) for text in texts))
    )
    rows = json.loads((ROOT / "docs" / "data" / "quickstart-perplexity.json").read_text())["rows"]
    assert {f"{perplexity:.3f}" for row in rows for perplexity in row["perplexity"]} <= shown
    assert told and not shown & told


@pytest.mark.parametrize("name", ["training.md", "training_methods.md", "variants.md"])
def test_fields_of_a_page_exist(name):
    text = re.sub(r"```.*?```", "", PAGES[name].read_text(), flags=re.DOTALL)
    named = {field for code in re.findall(r"`([^`]+)`", text) for field in re.findall(r"(?:^| )(\w+)=", code)}
    others = {"backbone", "key", "use_reentrant"}
    assert named and named <= DATA_FIELDS | MODEL_FIELDS | TRAINING_FIELDS | others


def test_the_sweep_of_the_training_page_names_a_recipe():
    values = yaml.safe_load(code_of("training.md", "yaml")[0])
    assert values["grids"] and (ROOT / "training" / "recipes" / f"{values['recipe']}.yaml").is_file()

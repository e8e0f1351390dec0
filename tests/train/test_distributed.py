"""Real processes by torchrun: equal to one process, killed and resumed, sharded, on two nodes, fed from a Hub."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from training import cli, data, files, runs
from training.errors import UserError
from training.recipe import DataArguments, build_recipe
from training.train import loop, plan

from ..conftest import ROOT
from ..hub_server import TOKEN, HubServer


DOCUMENTS = [f"x{i:04d} = {i * i % 9973:06d}" for i in range(96)]  # 14 bytes: with its end, a block of 15 tokens


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, own_cache):
    """A data set of two files to train on, and a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("dataset")
    parts = {"train-0": DOCUMENTS[:40], "train-1": DOCUMENTS[40:80], "validation": DOCUMENTS[80:]}
    for name, texts in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    arguments = DataArguments(dataset=str(folder))
    data.load_tokenizer(arguments, data.load_documents(arguments, 0)["train"], 258).save_pretrained(folder / "bytes")
    return folder


@pytest.fixture(scope="module")
def values(folder):
    return {
        "dataset": str(folder),
        "tokenizer": str(folder / "bytes"),
        "vocab_size": 258,
        "block_size": 15,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.1,
        "embedding_dropout": 0.0,
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "entropy_steps": 10,
        "entropy_sequences": 6,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }


# every block that a process trains on goes to a file; a sharded model is looked at
WATCH = """
import os, signal, sys, torch
from pathlib import Path
from torch.distributed.tensor import DTensor
from training.train import loop
from training.recipe import load_recipe

class Watched(loop.LNFreeTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        # those that are updated: a pass without gradients, as measuring is, leaves the outermost ones gathered
        updated = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert len(updated) == len(list(self.model.parameters()))
        assert all(isinstance(p, DTensor) == (sys.argv[1] == "sharded") for p in updated)
        path = Path(self.args.output_dir) / f"seen-{self.state.global_step + 1}-{self.args.process_index}.pt"
        torch.save(inputs["input_ids"], path)
        if self.state.global_step + 1 == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(model, inputs, *args, **kwargs)

loop.LNFreeTrainer = Watched
loop.train(load_recipe(sys.argv[2]))
"""


def launch(tmp_path, values, processes, sharded=False, environment=None, killed_in_step=0):
    run_dir = Path(values["output_dir"])
    recipe, script = tmp_path / f"{run_dir.name}.yaml", tmp_path / "watch.py"
    recipe.write_text(yaml.safe_dump(values))
    script.write_text(WATCH)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    return subprocess.Popen(
        [*command, str(script), "sharded" if sharded else "whole", str(recipe), str(killed_in_step)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(run_dir):
    return [entry["loss"] for entry in json.loads((run_dir / "log_history.json").read_text()) if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["SM+R", "SM+LN+G", "SM+LR-global"])
def test_equal_global_batches_give_equal_runs(values, tmp_path, variant):
    ways = {
        "accumulated": (1, {"gradient_accumulation_steps": 2}),
        "one": (1, {"per_device_train_batch_size": 8}),
        "ddp": (2, {}),
        "fsdp": (2, {"fsdp_size": 2}),
    }
    for name, (processes, more) in ways.items():
        run = {**values, "variant": variant, "output_dir": str(tmp_path / name), **more}
        finish(launch(tmp_path, run, processes, sharded=name == "fsdp"))
        # there were as many processes as there should be
        assert len(list((tmp_path / name).glob("seen-20-*.pt"))) == processes
    expected, log = runs.read_results(tmp_path / "one"), losses(tmp_path / "one")
    assert len(log) == 20 and log[-1] < log[0] - 0.5
    weights = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for name in ("accumulated", "ddp", "fsdp"):
        assert losses(tmp_path / name) == pytest.approx(log, abs=1e-5)
        results = runs.read_results(tmp_path / name)
        assert results["train_tokens"] == expected["train_tokens"] == 20 * 8 * 15
        assert results["parameters"] == expected["parameters"]
        assert results["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
        entropy = [files.read_records(tmp_path / run / "attention_entropy.jsonl") for run in ("one", name)]
        for ours, theirs in zip(*entropy, strict=True):
            torch.testing.assert_close(
                torch.tensor(ours["entropy"]), torch.tensor(theirs["entropy"]), atol=1e-4, rtol=0
            )
        # an ordinary model with its own code, whatever it was trained by
        found, plain = (
            {
                path.name: path.read_bytes()
                for path in (tmp_path / run / "model").iterdir()
                if path.suffix != ".safetensors"
            }
            for run in (name, "one")
        )
        assert found == plain
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        saved = load_file(tmp_path / name / "model" / "model.safetensors")
        # gathered from shards, the tied head is written under its own name too
        assert saved.keys() - weights.keys() == ({"lm_head.weight"} if name == "fsdp" else set())
        assert weights.keys() <= saved.keys()
        assert all(torch.equal(saved[key], model.state_dict()[key]) for key in saved)


@pytest.mark.slow
def test_muon_in_two_processes_is_that_of_one(values, tmp_path):
    values = {**values, "layer_optimizer": "muon", "max_steps": 8}
    ways = {"one": (1, {"per_device_train_batch_size": 8}), "ddp": (2, {}), "fsdp": (2, {"fsdp_size": 2})}
    for name, (processes, more) in ways.items():
        run = {**values, **more, "output_dir": str(tmp_path / name)}
        finish(launch(tmp_path, run, processes, sharded=name == "fsdp"))
        assert len(list((tmp_path / name).glob("seen-8-*.pt"))) == processes
        # its iterations are in bfloat16
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{}, {"fsdp_size": 2}, {"layer_optimizer": "muon"}, {"layer_optimizer": "muon", "fsdp_size": 2}],
    ids=["ddp", "fsdp", "ddp with muon", "fsdp with muon"],
)
def test_killed_run_of_two_processes_resumes_bitwise(values, tmp_path, more):
    # dropout, so that the states of the random numbers count as well
    values = {**values, "embedding_dropout": 0.1, "max_steps": 10, "save_strategy": "steps", "save_steps": 2, **more}
    whole, killed = ({**values, "output_dir": str(tmp_path / name)} for name in ("whole", "killed"))
    finish(launch(tmp_path, whole, 2, sharded="fsdp_size" in more))
    output, _ = launch(tmp_path, killed, 2, sharded="fsdp_size" in more, killed_in_step=6).communicate(timeout=300)
    assert "SIGKILL" in output and (tmp_path / "killed" / "checkpoint-4").is_dir()
    assert not (tmp_path / "killed" / "results.json").is_file()
    begun = (tmp_path / "killed" / "seen-1-1.pt").stat().st_mtime_ns
    finish(launch(tmp_path, killed, 2, sharded="fsdp_size" in more))
    # it went on, and did not begin again
    assert (tmp_path / "killed" / "seen-1-1.pt").stat().st_mtime_ns == begun
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
    results = [runs.read_results(tmp_path / name) for name in ("killed", "whole")]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("processes, more", [(1, {}), (2, {"fsdp_size": 2})], ids=["ddp", "replicas of fsdp"])
def test_two_nodes_equal_one_and_go_on_from_a_whole_checkpoint(values, tmp_path, processes, more):
    values = {**values, "embedding_dropout": 0.1, "save_strategy": "steps", "save_steps": 5, **more}

    def train_on(nodes, name):
        # launchers that know of each other by an address alone; what they prepare lies in one folder, empty at first
        with socket.create_server(("127.0.0.1", 0)) as server:
            meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{server.getsockname()[1]}"]
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / name)}))
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", *meeting]
        command += [f"--nproc_per_node={2 * processes // nodes}", "-m", "training.train", str(recipe)]
        environment = {**os.environ, "HF_HOME": str(tmp_path / f"home-{name}"), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        launched = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(nodes)]
        return "".join(finish(process) for process in launched)

    def result(name):
        weights = load_file(tmp_path / name / "model" / "model.safetensors")
        return losses(tmp_path / name), {key: tensor.tolist() for key, tensor in weights.items()}

    train_on(1, "one")
    output = train_on(2, "two")
    # each line once, not from every node
    assert output.count(f": {2 * processes} processes") == 1 and output.count("'loss': ") == 20
    assert result("two") == result("one")

    (tmp_path / "two" / "results.json").unlink()
    (tmp_path / "two" / "checkpoint-20" / "trainer_state.json").write_text("")
    output = train_on(2, "two")
    assert output.count("checkpoint-20 is damaged and removed") == 1 and output.count("'loss': ") == 5
    assert result("two") == result("one")


def test_run_that_keeps_weights_alone_or_cannot_be_sharded_says_so(values, tmp_path):
    run = {**values, "output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_only_model": True}
    run |= {"save_steps": 2, "max_steps": 2}
    loop.train(build_recipe(run))
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(UserError, match="checkpoint-2 holds the weights alone"):
        loop.train(build_recipe(run))
    with pytest.raises(UserError, match="fsdp_size=2 must divide the number of processes, 1"):
        loop.train(build_recipe({**values, "fsdp_size": 2, "output_dir": str(tmp_path / "other")}))


PUSH = """
import sys
from datasets import load_dataset
parts = load_dataset(sys.argv[1])
parts["train"].push_to_hub("me/documents", split="train", num_shards=2)
parts["validation"].push_to_hub("me/documents", split="validation")
"""


@pytest.mark.slow
def test_stream_from_the_hub_is_read_once_by_two_processes_also_across_a_kill(folder, values, tmp_path):
    with HubServer().running() as server:
        hub = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        hub["HF_HOME"] = str(tmp_path / "home")
        push = subprocess.run(
            [sys.executable, "-c", PUSH, str(folder)], env=os.environ | hub, capture_output=True, text=True
        )
        assert push.returncode == 0, push.stderr
        # 80 documents of a block each, 4 to a process in a step: one pass
        values = {**values, "dataset": "me/documents", "streaming": True, "shuffle_buffer": 7, "max_steps": 10}
        values |= {"save_strategy": "steps", "save_steps": 2}
        whole, killed = ({**values, "output_dir": str(tmp_path / name)} for name in ("whole", "killed"))
        finish(launch(tmp_path, whole, 2, environment=hub))
        process = launch(tmp_path, killed, 2, environment=hub, killed_in_step=6)
        output, _ = process.communicate(timeout=300)
        assert process.returncode != 0 and "SIGKILL" in output
        assert (tmp_path / "killed" / "checkpoint-4").is_dir()
        assert not (tmp_path / "killed" / "results.json").is_file()
        with pytest.raises(AssertionError, match="was written by 2 processes and is read by 1"):
            finish(launch(tmp_path, killed, 1, environment=hub))
        finish(launch(tmp_path, killed, 2, environment=hub))
    tokenizer = data.load_tokenizer(DataArguments(tokenizer=values["tokenizer"]), None, None)
    seen = {}
    for name in ("whole", "killed"):
        steps = [torch.load(tmp_path / name / f"seen-{step}-{r}.pt") for step in range(1, 11) for r in (0, 1)]
        assert sorted(tokenizer.batch_decode(torch.cat(steps)[:, :-1])) == DOCUMENTS[:80]
        seen[name] = torch.stack(steps)
    assert seen["whole"].equal(seen["killed"])
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    results = [runs.read_results(tmp_path / name) for name in ("killed", "whole")]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]


def trained(values, tmp_path, name, **more):
    loop.train(build_recipe({**values, "output_dir": str(tmp_path / name), **more}))
    return load_file(tmp_path / name / "model" / "model.safetensors"), losses(tmp_path / name)


def test_activation_checkpointing_changes_no_weight_and_bfloat16_little(values, tmp_path):
    weights, log = trained(values, tmp_path, "plain")
    checkpointed, _ = trained(values, tmp_path, "checkpointed", activation_checkpointing=True)
    torch.testing.assert_close(checkpointed, weights, atol=1e-6, rtol=0)
    half, half_log = trained(values, tmp_path, "half", bf16=True)
    with pytest.raises(UserError, match="fp16=True needs an accelerator"):
        build_recipe({**values, "fp16": True}).build_arguments()
    assert half_log == pytest.approx(log, rel=0.02) and half_log != log
    assert all(tensor.dtype == torch.float32 for tensor in half.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_compiled_training_equals_eager(values, tmp_path):
    weights, log = trained(values, tmp_path, "plain", max_steps=5)
    compiled, compiled_log = trained(values, tmp_path, "compiled", max_steps=5, torch_compile=True)
    assert compiled_log == pytest.approx(log, abs=1e-4) and compiled.keys() == weights.keys()


# ---- the plan


# The peak of a process's second training, above what stood before its model was built. The first one also loads code
# of the libraries and fills their caches: 35 MB, no part of a plan.
MEASURE = """
import gc, re, sys
from pathlib import Path
from modeling_lnfree import cpu
from training.train import loop
from training.recipe import load_recipe

cpu.USE_ONEDNN = False  # on AMD's processors, whose copies no plan knows either

def resident(mark):
    return 1024 * int(re.search(mark + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

before = []
def set_seed(seed, real=loop.set_seed):
    real(seed)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before.append(resident("VmRSS"))

loop.set_seed = set_seed
for run in ("first", "second"):
    loop.train(load_recipe(sys.argv[1], [f"output_dir={sys.argv[2]}/{run}"]))
print(resident("VmHWM") - before[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak memory")
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"activation_checkpointing": True},
        {"bf16": True},
        {"hidden_size": 1024, "num_attention_heads": 8, "block_size": 64, "gradient_accumulation_steps": 2},
    ],
    ids=["plain", "checkpointing", "bfloat16", "accumulation"],
)
def test_planned_memory_is_the_measured(values, tmp_path, more):
    values = {**values, "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4, "block_size": 256}
    values |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 4, "max_steps": 2}
    # for these widths; the small models' own let the attention scores grow past what the gradient can hold
    values |= {"initializer_range": 0.02, "learning_rate": 1e-4}
    values |= {"entropy_sequences": 2, "output_dir": str(tmp_path / "run"), **more}
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"content": f"{i} " * 100}) + "\n" for i in range(300)))
    values |= {"dataset": str(documents), "fused_loss": False}  # as on a CPU, where the measured run is
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    # glibc gives back at once what is freed, and the peak is of what was in use
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    # the CPU's own kernels for bfloat16, where it has some, hold reordered copies that no plan knows
    environment["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"
    command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    measured = int(run.stdout.splitlines()[-1])
    planned = plan.plan(build_recipe(values))
    assert planned["memory"] == pytest.approx(measured, rel=0.1)


def test_plan_counts_by_hand(values, capsys, tmp_path):
    recipe = build_recipe({**values, "variant": "SM+R", "gradient_accumulation_steps": 3, "max_steps": 7})
    planned = plan.plan(recipe, processes=2, flops=1e9)
    # embeddings and positions; by layer 4 projections, 2 of the MLP, biases of query and key; the last norm
    parameters = 258 * 16 + 15 * 16 + 2 * (4 * 16**2 + 2 * 16 * 64 + 2 * 16) + 2 * 16
    assert planned["parameters"] == parameters
    assert planned["weights"] == planned["gradients"] == planned["communication"] == planned["traffic"]
    assert planned["weights"] == 4 * parameters == planned["checkpoint"] / 3
    assert planned["optimizer"] == pytest.approx(8 * parameters, rel=0.01)
    assert (planned["tokens_per_step"], planned["tokens"]) == (4 * 3 * 15 * 2, 7 * 4 * 3 * 15 * 2)
    assert planned["seconds"] == pytest.approx(planned["tokens"] * planned["flops_per_token"] / 2e9)
    # 6 a weight of every product; 7 products of T x T by head in attention, one of them computed again
    products = 258 * 16 + 2 * (4 * 16**2 + 2 * 16 * 64)
    assert planned["flops_per_token"] == 6 * products + 2 * 7 * 2 * 15 * 16
    sharded = plan.plan(build_recipe({**values, "variant": "SM+R", "fsdp_size": 2}), processes=2)
    assert (sharded["weights"], sharded["seconds"]) == (2 * parameters, None)
    # half of the weights gathered twice in each of 3 micro-batches, half of the gradients scattered in each or once
    accumulated = {**values, "fsdp_size": 2, "gradient_accumulation_steps": 3}
    alone, replicated = (plan.plan(build_recipe(accumulated), processes=processes) for processes in (2, 4))
    assert (alone["traffic"], replicated["traffic"]) == (2 * parameters * 7, 2 * parameters * (9 + 1))
    assert (alone["gradients"], replicated["gradients"]) == (4 * parameters, 2 * parameters)
    # a budget in tokens is one for all numbers of processes
    budget = build_recipe({**values, "train_tokens": 1000})
    assert plan.plan(budget, processes=3)["steps"] == 6
    with pytest.raises(UserError, match="a plan knows the memory of optim=adamw_torch, .* got 'adamw_torch_8bit'"):
        plan.plan(build_recipe({**values, "optim": "adamw_torch_8bit"}))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / "run")}))
    assert cli.main(["train", "--plan", "--processes", "8", "--flops", "1e12", str(path)]) == 0
    printed = capsys.readouterr().out
    assert (
        "480" in printed.splitlines()[2]
        and "GB/s to keep up" in printed
        and "tokens/s to read" in printed
        and not (tmp_path / "run").exists()
    )
    for order in (["--plan", str(path), "fsdp_size=3"], [str(path), "--plan", "fsdp_size=3"]):
        assert cli.main(["train", *order]) == 1
        assert "processes must be a multiple of fsdp_size=3, got 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", str(path), "--plan", "fsdp_size=3", "--proceses=8"])
    assert "unrecognized arguments: fsdp_size=3 --proceses=8" in capsys.readouterr().err

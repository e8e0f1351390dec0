"""Tiny models of every variant on both backbones, runs that take a second, and what tests of several packages need."""

import json
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast, TrainerCallback

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from training.recipe import build_recipe


# compilations add up over the tests of a process, in whatever order: the compiler's limit is far from them
torch.compiler.config.recompile_limit = 256
# scripts/test_gpu.sh does without hypothesis
with suppress(ImportError):
    from hypothesis import settings

    # a busy machine makes no example fail
    settings.register_profile("lnfree", deadline=None)
    settings.load_profile("lnfree")
ROOT = Path(__file__).parents[1]
PAPERS_VARIANTS = ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]
BACKBONES = {
    "gpt2": {},
    "pythia": {"position_embedding_type": "rotary", "parallel_residual": True, "tie_word_embeddings": False},
}
VARIANTS = (
    "SM+LN+G",
    "SM+LN+R",
    "SM+G",
    "SM+R",
    "SM+LR0.01",
    "SM+LR0.1",
    "SM+LR-layer",
    "SM+LR-global",
    "SM+R-noLNf",
)


@contextmanager
def caching_in(cache: Path):
    """Within, data sets and tokenizers are cached in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.HF_HOME", str(cache))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")
        patch.setenv("HF_HOME", str(cache))
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def own_cache(cache):
    """For a module that trains."""
    with caching_in(cache):
        yield


@pytest.fixture(scope="session")
def variant_runs(tmp_path_factory, cache, recipe_values):
    """Finished runs: the paper's variants, and one whose slopes are learned."""
    # only where a test trains
    from training.train import loop

    folder = tmp_path_factory.mktemp("runs")
    with caching_in(cache):
        for variant in [*PAPERS_VARIANTS, "SM+LR-layer"]:
            loop.train(build_recipe({**recipe_values, "variant": variant, "output_dir": str(folder / variant)}))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    texts = [f"def f{i}(x, y):\n    return x * {i} + y - {i * i % 97}\n" * (3 + i % 5) for i in range(120)]
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def recipe_values(corpus):
    """A model that trains in a second."""
    return {
        "dataset": str(corpus),
        "eval_fraction": 0.2,
        "vocab_size": 300,
        "block_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.1,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "linear",
        "logging_steps": 2,
        "entropy_steps": 3,
        "entropy_sequences": 5,
        "save_steps": 4,
        "save_total_limit": 1,
        "disable_tqdm": True,
    }


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@contextmanager
def one_more_callback(callback: type[TrainerCallback]):
    """Within, training has one more callback, in the place of the one that prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.train.loop.BriefPrinterCallback", callback)
        yield


def interrupting(*steps: int) -> type[TrainerCallback]:
    """A callback that ends training at the first time that it has made one of these numbers of steps."""
    left = set(steps)

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in left:
                left.remove(state.global_step)
                raise KeyboardInterrupt

    return Interrupt


def byte_tokenizer(end_of_text: str | None = None) -> PreTrainedTokenizerFast:
    """A token a byte; and where it is named, one more, which begins, ends and pads a text."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *([end_of_text] if end_of_text else [])]
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), end_of_text) if end_of_text else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def tiny_config(variant: str = "SM+R", backbone: str = "gpt2", **kwargs) -> LNFreeConfig:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    named = {**sizes, "max_position_embeddings": 64, "initializer_range": 0.2, **BACKBONES[backbone], **kwargs}
    return LNFreeConfig.from_variant(variant, **named)


def tiny_model(variant: str = "SM+R", backbone: str = "gpt2", **kwargs) -> LNFreeForCausalLM:
    """In evaluation mode, with weights that make every part matter: biases and norms are random too."""
    model = LNFreeForCausalLM(tiny_config(variant, backbone, **kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_ids(*shape: int, vocab_size: int = 99) -> torch.Tensor:
    return torch.randint(2, vocab_size, shape)


def randomized(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def checkpoint_activations(model, **kwargs):
    # renamed in transformers 5.24
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)(kwargs or None)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.most = max(self.most, *sizes, 0)
        return output


def gradients(model) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def greedy(model, input_ids, **kwargs):
    return model.generate(input_ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs)


every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)

"""What several tests of training look at."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from training.train import callbacks


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of the model that a run ended with."""
    return load_file(run_dir / "model" / "model.safetensors")


def measure(quantity, model, probe: torch.Tensor) -> tuple[dict, dict]:
    """A quantity's record, and its scalars for the log, as a run has them."""
    callback = callbacks.MeasurementCallback(None, [quantity], {"input_ids": probe}, 1, Path("unused"))
    return callback.describe(callback.measure(model), model)[quantity.name]

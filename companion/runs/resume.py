"""What a training has reached, kept in a file, so that one that is killed goes on from there.

    state = SavedState(path, {"run": "digits/vgg11-bn-w0.25/quick/s1", ...}, seconds=600)
    fit(model, dataset, recipe, seed, state=state)  # restores it, and saves it every ten minutes

On a CPU the weights at the end have the same bits as without an interruption. The order of images and their
augmentation need not be kept: they follow from the seed.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from companion.runs.files import atomic_write


def seconds_between_saves() -> float:
    """$REPAIRLIB_SAVE_MINUTES in seconds, default ten minutes; 0 saves after every step.

    Raises:
        ValueError: it is no such number.
    """
    text = os.environ.get("REPAIRLIB_SAVE_MINUTES") or "10"
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < float("inf"):
        raise ValueError(f"REPAIRLIB_SAVE_MINUTES is a number of minutes, at least 0, not {text!r}")
    return 60 * minutes


class SavedState:
    """The state of one training in a file.

    Args:
        path: of the file, which is written whole or not at all.
        facts: what the weights at the end depend on, for JSON. A state with other facts is not used.
        seconds: from one save to the next.
    """

    def __init__(self, path: str | os.PathLike, facts: Mapping[str, object], seconds: float):
        self.path, self.facts, self.seconds = Path(path), dict(facts), seconds
        self.saved_at = self.began = time.monotonic()
        self.earlier = 0.0  # seconds of the processes before this one

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: Tensor) -> int:
        """Go on from what is saved, if it is whole and of this training.

        Args:
            model: with its initial weights, which belong to the facts.
            optimizer: SGD, before its first step.
            losses: of every step, filled as far as they are known.

        Returns:
            The number of steps taken so far, 0 if there is nothing to go on from.
        """
        self.facts["begins with"] = _digest(model.state_dict())
        try:
            with safe_open(self.path, "pt") as file:
                about, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError):
            return 0  # not there, or damaged: the next save replaces it
        if about.get("sha256") != _digest(tensors):
            return 0
        if about.get("facts") != self._facts():
            others = {name for name, value in json.loads(about["facts"]).items() if self.facts.get(name) != value}
            print(f"{self.path} is of another {', '.join(sorted(others))}: the training starts anew", flush=True)
            return 0
        self.earlier = float(about["seconds"])
        model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
        for i, parameter in enumerate(_parameters(optimizer)):
            if f"momentum.{i}" in tensors:
                # In the parameter's layout, which the optimizer is fastest with.
                momentum = torch.empty_like(parameter).copy_(tensors[f"momentum.{i}"])
                optimizer.state[parameter]["momentum_buffer"] = momentum
        step = len(tensors["losses"])
        losses[:step] = tensors["losses"].to(losses.device)
        return step

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.saved_at >= self.seconds

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: Tensor) -> None:
        """Write what is reached.

        Args:
            model, optimizer: after the last step.
            losses: of every step so far.

        Raises:
            OSError: it cannot be written; the state of before is still there.
        """
        self.saved_at = time.monotonic()
        tensors = {f"model.{key}": value for key, value in model.state_dict().items()} | {"losses": losses}
        for i, parameter in enumerate(_parameters(optimizer)):
            if (momentum := optimizer.state[parameter].get("momentum_buffer")) is not None:
                tensors[f"momentum.{i}"] = momentum
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        taken = self.earlier + time.monotonic() - self.began
        about = {"facts": self._facts(), "sha256": _digest(tensors), "seconds": str(taken)}
        atomic_write(self.path, safetensors.torch.save(tensors, about))

    def _facts(self) -> str:
        return json.dumps(self.facts, sort_keys=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

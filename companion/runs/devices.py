"""Where networks are trained and measured, in words, and in which precision.

Importing this takes no torch: whoever reads saved results only asks for names.
"""

import os
import platform
import re
from pathlib import Path
from typing import Any


def default_device() -> str:
    """$REPAIRLIB_DEVICE, else cuda where there is a GPU, else cpu.

    Raises:
        ValueError: the variable names no device, or a GPU where there is none.
    """
    import torch

    asked, there = os.environ.get("REPAIRLIB_DEVICE"), torch.cuda.is_available()
    if not asked:
        return "cuda" if there else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", asked):
        raise ValueError(f"REPAIRLIB_DEVICE is cpu, cuda, cuda:0 (or another number) or mps, not {asked!r}")
    if asked.startswith("cuda") and not there:
        raise ValueError(f"REPAIRLIB_DEVICE is {asked}, and PyTorch finds no GPU here; leave it empty or say cpu")
    return asked


def device_name(device: Any) -> str:
    """A device in words: the CPU's or the GPU's model."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_name() if str(device) == "cpu" else str(device)


def cpu_name() -> str:
    """The processor's model name and its number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} cores"


def training_threads() -> int:
    """$REPAIRLIB_THREADS, default 1: sums over another number of parts round otherwise, so it belongs to a network.

    Raises:
        ValueError: it is no such number.
    """
    setting = os.environ.get("REPAIRLIB_THREADS") or "1"
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"REPAIRLIB_THREADS is a number of threads, at least 1, not {setting!r}")
    return int(setting)


def has_bfloat16(device: Any) -> bool:
    """Whether a device multiplies in bfloat16 itself; others emulate it slowly."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def tensor_float32(device: Any) -> dict[str, bool]:
    """Which float32 operations of a GPU round their factors to TF32's 10 bits; empty for a CPU."""
    import torch

    if not str(device).startswith("cuda"):
        return {}
    return {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32}

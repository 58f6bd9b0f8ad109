"""Where networks are trained and measured, in words, and in which precision.

Importing this takes no torch: whoever reads saved results only asks for names.
"""

import os
import platform
import re
from pathlib import Path
from typing import Any


def default_device() -> str:
    """$REPAIRLIB_DEVICE, else cuda where there is a GPU, else cpu."""
    import torch

    return os.environ.get("REPAIRLIB_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


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

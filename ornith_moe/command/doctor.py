"""`ornith-moe doctor`: what this machine has, told without importing more than is there.

Nothing else measures the machine before it computes: the rates of its BF16 products are timed here, in some 20 ms once
the kernels are compiled, and otherwise at the first product that chooses by them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import textwrap
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ornith_moe.command.options import Json
from ornith_moe.command.terminal import out, print_json, say

WIDTH = 100  # columns
LIBRARIES = ("torch", "triton", "numpy", "numba", "safetensors", "gguf")
CLIENTS = {
    "transformers": "experts_implementation='ornith', runs BF16 and FP8 builds",
    "accelerate": "lets transformers read fp8-block builds",
    "compressed-tensors": "lets transformers read fp8-channel and int4-ct builds",
    "xllamacpp": "runs GGUF builds",
    "mlx-lm": "runs builds for MLX, on Linux with mlx[cpu]",
    "huggingface_hub": "hf:// sources",
}


def doctor(as_json: Json = False) -> None:
    """What this machine has, and which backend each op will use."""
    found = examine()
    if as_json:
        print_json(found)
        return
    for line in as_lines(found, min(WIDTH, out.width)):
        say(line)


def examine() -> dict[str, dict[str, Any]]:
    """Machine, libraries, clients, MoE backends and recipes, formats that can be written; {name: what} each."""
    import torch

    from ornith_moe.backend.choice import backends
    from ornith_moe.backend.cpu import describe
    from ornith_moe.gpu_encoders import choose_device
    from ornith_moe.quant.builds.build import BUILDS
    from ornith_moe.quant.recipes import RECIPES

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    where, why = choose_device()
    known = backends()
    encoded = {"cuda": f"{why} for FP8, Q8_0, Q4_K, Q5_K and Q6_K; the CPU for the rest", "cpu": f"the CPU: {why}"}
    return {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "cores": os.cpu_count(),
            "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
            "gpu": device,
            "cpu capability": torch.backends.cpu.get_cpu_capability(),
        },
        "libraries": {name: _version(name) or "not installed" for name in LIBRARIES},
        "clients": {name: f"{_version(name) or 'not installed'}: {what}" for name, what in CLIENTS.items()},
        "MoE backends": {
            name: ("available" if backend.available else "not available") + f": {backend.reason}"
            for name, backend in known.items()
        },
        "measured just now": {"cpu": describe()},
        "MoE recipes": {recipe: _who_computes(recipe, known) for recipe in RECIPES},
        "builds": {
            "written": [name for name, build in BUILDS.items() if build.is_written],
            "encoded by": encoded[where],
            "planned only": [name for name, build in BUILDS.items() if not build.is_written] or "none",
        },
    }


def as_lines(found: dict[str, dict[str, Any]], width: int = WIDTH) -> list[str]:
    """What `examine` found as text of at most `width` columns: a title, then a line or more for each row."""
    lines = []
    for title, rows in found.items():
        lines += ["", title]
        indent = 2 + max(map(len, rows)) + 2
        for key, value in rows.items():
            text = ", ".join(value) if isinstance(value, list) else str(value)
            first = f"  {key:{indent - 2}}"
            lines += textwrap.wrap(
                text, width, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
            )
    return lines[1:]


def _who_computes(recipe: str, known: dict) -> str:
    """The backends that compute `recipe` here, and why the others do not."""
    default = {"triton": " (default on the GPU)", "cpu": " (default in main memory)"}
    able = [name + default.get(name, "") for name, one in known.items() if recipe in one.recipes]
    unable = [one for one in known.values() if recipe not in one.recipes]
    return "; ".join([", ".join(able), *(f"not {one.name}: {one.refused.get(recipe, one.reason)}" for one in unable)])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return "built in" if importlib.util.find_spec(name.replace("-", "_")) else None

"""ornith-moe: MoE kernels, one quantizer and checkpoint conversion for the Ornith-1.0 family.

Public names load on first use, so that the CLI starts without torch and `import ornith_moe` costs milliseconds.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "route": "routing",
    "Routing": "routing",
    "moe_mlp": "functional",
    "MoE": "layer",
    "MoEConfig": "layer",
    "backends": "backend.choice",
    "quantize_fp8_block": "quant.fp8",
    "quantize_fp8_channel": "quant.fp8",
    "quantize_fp8_tokens": "quant.fp8",
    "dequantize_fp8": "quant.fp8",
    "quantize_gguf": "quant.codecs.gguf",
    "dequantize_gguf": "quant.codecs.gguf",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

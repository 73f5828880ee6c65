"""ornith-moe: MoE kernels, one quantizer and checkpoint conversion for the Ornith-1.0 family.

Public names load on first use, so that the CLI starts without torch and `import ornith_moe` costs milliseconds. A type
checker reads the imports below, and knows each name and no other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ornith_moe.backend.choice import backends as backends
    from ornith_moe.functional import moe_mlp as moe_mlp
    from ornith_moe.layer import MoE as MoE
    from ornith_moe.layer import MoEConfig as MoEConfig
    from ornith_moe.quant.codecs.gguf import dequantize_gguf as dequantize_gguf
    from ornith_moe.quant.codecs.gguf import quantize_gguf as quantize_gguf
    from ornith_moe.quant.fp8 import dequantize_fp8 as dequantize_fp8
    from ornith_moe.quant.fp8 import quantize_fp8_block as quantize_fp8_block
    from ornith_moe.quant.fp8 import quantize_fp8_channel as quantize_fp8_channel
    from ornith_moe.quant.fp8 import quantize_fp8_tokens as quantize_fp8_tokens
    from ornith_moe.routing import Routing as Routing
    from ornith_moe.routing import route as route

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


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)

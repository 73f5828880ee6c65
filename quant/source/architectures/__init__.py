"""Checkpoint architectures, one file each: `architecture(config)` gives the model that knows a config's weights.

Importing this package imports every module in it, so that a new file is all that a new architecture takes.
"""

from importlib import import_module
from pkgutil import iter_modules

from ornith_moe.quant.source.architectures.architecture import (
    FAMILIES,
    Architecture,
    architecture,
    holds_mtp,
    mtp_segments,
    top_level,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "Architecture", "architecture", "holds_mtp", "mtp_segments", "top_level"]

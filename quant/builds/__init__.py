"""What can be made of a source: every build, planned from headers, and how each stores a weight.

Importing a build's file makes it known to every command; the order here is that of lists.
"""

from ornith_moe.quant.builds import fp8_channel, fp8_block, modelopt, compressed_tensors, bf16  # noqa: F401, I001
from ornith_moe.quant.builds import mlx, gguf, gguf_nvfp4, gguf_fit, mlx_fit, modelopt_fit, mmproj  # noqa: F401

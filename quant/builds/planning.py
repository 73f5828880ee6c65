"""Plans of the builds of a checkpoint, by name."""

from __future__ import annotations

from collections.abc import Mapping

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.builds.build import AskedNvfp4, Options, find_build
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.fitting.sensitivity import Sensitivity
from ornith_moe.quant.gguf.imatrix import Imatrix
from ornith_moe.quant.gguf.tensor_types import AskedTypes
from ornith_moe.quant.source.source import Source


@budgeted
def plan_build(
    source: Source,
    build: str,
    *,
    asked: AskedTypes | None = None,
    imatrix: Imatrix | None = None,
    nvfp4: AskedNvfp4 | None = None,
    kv_cache: str = "bf16",
    sensitivity: Sensitivity | None = None,
    kept: Mapping[int, str] | None = None,
    stored: Mapping[str, str] | None = None,
) -> BuildPlan:
    """Decide tensors, storages and names of `build` from the headers of `source`.

    Args:
        build: one of `BUILDS`, in any case.
        asked: types that the user asks for in a GGUF.
        imatrix: importance of the columns of a GGUF's tensors.
        nvfp4: what is asked of builds of NVFP4. kv_cache: "fp8" asks engines to keep keys and values so.
        sensitivity: what types do to tensors, for builds that are fitted to a size.
        kept: {index of a weight: what is wrong with its values}; it stays BF16 (F32 where it would be), with all that
            its build stores or fuses with it.
        stored: {tensor: GGUF type} of a build that exists; goes before what would be decided here.
    Raises:
        PlanError: an unknown build, or one this model cannot have; an importance matrix of another model.
    """
    options = Options(
        asked=asked,
        imatrix=imatrix,
        nvfp4=nvfp4 or AskedNvfp4(),
        kv_cache=kv_cache,
        sensitivity=sensitivity,
        kept=kept or {},
        stored=stored or {},
    )
    return find_build(build).plan(source, options)

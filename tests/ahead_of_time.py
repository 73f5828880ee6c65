"""Compile Triton kernels for GPUs that are not here, and say what came out.

    reports = compile_kernels("sm90", "ornith_moe.kernels.fp8_cast", [("kernel", {argument: type or constant}, warps)])

It runs in a fresh process, because a kernel defined for the interpreter cannot be compiled. Pointers and integers are
taken as divisible by 16, as they are for the shapes of real models.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module

TARGETS = {
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
}


def compile_kernels(target, module, kernels):
    """One dict per kernel: `asm` (PTX or AMD assembly) and `spills` (registers, or bytes of local memory)."""
    with tempfile.TemporaryDirectory() as cache:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "0"}
        request = json.dumps([target, module, kernels])
        done = subprocess.run([sys.executable, __file__], input=request, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def _compile(target, kernel, arguments, warps):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {n: v if isinstance(v, str) else "constexpr" for n, v in arguments.items()}
    constants = {(kernel.arg_names.index(n),): v for n, v in arguments.items() if types[n] == "constexpr"}
    attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t != "constexpr"}
    source = ASTSource(kernel, types, constexprs=constants, attrs=attrs)
    asm = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps}).asm
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        return {"asm": text, "spills": sum(map(int, re.findall(r"_spill_count:\s*(\d+)", text)))}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    return {"asm": asm["ptx"], "spills": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout)))}


if __name__ == "__main__":
    target, module, kernels = json.load(sys.stdin)
    home = import_module(module)
    json.dump([_compile(target, getattr(home, name), args, warps) for name, args, warps in kernels], sys.stdout)

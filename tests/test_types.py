"""Every function has types that mypy believes, as in `make lint`, and what has none is machine code and nothing else.

mypy checks every function of the package by itself. In the modules that pyproject.toml lists as holding machine code it
checks only those with types, so here every other function of them is held to have some. Not covered: whether types are
right, which is mypy's work, and the modules of LLVM instructions, whose functions no checker could follow.
"""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MACHINE_CODE = {"triton.jit", "compiled", "intrinsic"}  # decorators
INSTRUCTIONS = {
    "ornith_moe.backend.cpu.register_tiles",
    "ornith_moe.quant.simd.lanes",
    "ornith_moe.quant.simd.small_floats",
}


def test_mypy_finds_nothing():
    """Here and not before the tests, where one core would wait for it."""
    if not (ROOT / "ornith_moe" / "quant").is_symlink():
        pytest.skip("types are checked through ornith_moe/quant, which is no link in this checkout")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def lenient():
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    return [name for each in overrides if each.get("disallow_untyped_defs") is False for name in each["module"]]


def functions_without_types(node):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            if MACHINE_CODE & {ast.unparse(decorator) for decorator in child.decorator_list}:
                continue
            every = (
                *child.args.posonlyargs,
                *child.args.args,
                *child.args.kwonlyargs,
                child.args.vararg,
                child.args.kwarg,
            )
            given = [each.annotation for each in every if each is not None and each.arg not in ("self", "cls")]
            if None in given or (child.returns is None and child.name != "__init__"):
                yield child.name
        yield from functions_without_types(child)


@pytest.mark.parametrize("module", sorted(set(lenient()) - INSTRUCTIONS))
def test_only_machine_code_has_no_types(module):
    code = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert list(functions_without_types(ast.parse(code))) == []


def test_no_list_excuses_other_modules():
    assert set(lenient()) >= INSTRUCTIONS
    for module in lenient():
        code = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert "import triton" in code or "numba" in code or "import compiled" in code, module

"""The house as CONTRIBUTING draws it: which folder may import which, read from every import, those in functions too.

    quant:   files of its own <- source <- simd <- codecs <- gguf <- fitting <- builds <- conversion <- verification
    all:     quant <- kernels <- ornith_moe <- bench <- the command line (cli.py, command/) <- tests, demo

And functions stay small, in every folder.

Reference: the syntax trees of the files. Not covered: what is imported by a name made at run time.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WINGS = (  # of quant, from the ground up
    "source", "simd", "codecs", "gguf", "fitting", "builds", "conversion", "verification"
)  # fmt: skip
FOLDERS = ("quant", "kernels", "ornith_moe", "bench")
HOUSES = (*FOLDERS, "command")
PLACES = (*FOLDERS, "tests", "demo", "examples")
MACHINE_CODE = {"triton.jit", "compiled", "intrinsic"}  # decorators of what a compiler takes whole
DOORS = ("ornith_moe.__main__", "ornith_moe.cli", "ornith_moe.command")  # `ornith-moe bench` runs what bench/ holds


def module_of(path: Path) -> str:
    """The name under which a file of ours is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "ornith_moe" else ("ornith_moe", *parts))


FILES = {module_of(path): path for house in FOLDERS for path in sorted((ROOT / house).rglob("*.py"))}


@cache
def imports(path: Path, *, at_import: bool = False) -> frozenset[str]:
    """Modules of ours that a file imports; `at_import`: while it is imported, so neither in functions nor for types."""
    return frozenset(_imports(path, at_import))


def _imports(path: Path, at_import: bool) -> Iterator[str]:
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if (node.module or "").split(".")[0] == "ornith_moe":
                members = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (member if member in FILES else node.module for member in members)
        todo += ast.iter_child_nodes(node)


def house_of(module: str) -> str:
    if module in DOORS or module.startswith(tuple(f"{door}." for door in DOORS)):
        return "command"
    second = module.split(".")[1] if "." in module else ""
    return second if second in FOLDERS else "ornith_moe"


def wing_of(module: str) -> str:
    """Folder of a module of quant; "" of the files that lie in quant itself."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 and (ROOT / "quant" / parts[2]).is_dir() else ""


def test_houses_import_what_stands_before_them():
    wrong = [
        (module, other)
        for module, path in FILES.items()
        for other in imports(path)
        if HOUSES.index(house_of(other)) > HOUSES.index(house_of(module))
    ]
    assert not wrong


def floor_of(module: str) -> int:
    """Of a wing, its place in WINGS; a file of quant itself stands on the highest wing that it imports, if any."""
    if wing_of(module):
        return 1 + WINGS.index(wing_of(module))
    return max((floor_of(other) for other in imports(FILES[module]) if house_of(other) == "quant"), default=0)


def test_the_stack_of_wings_has_no_arrow_back():
    quant = {module: path for module, path in FILES.items() if house_of(module) == "quant"}
    wrong = [
        (module, other)
        for module, path in quant.items()
        for other in imports(path)
        if house_of(other) == "quant" and floor_of(other) > floor_of(module)
    ]
    assert not wrong
    assert floor_of("ornith_moe.quant.verification.verify") == len(WINGS)


@pytest.mark.parametrize("house", HOUSES)
def test_no_module_waits_for_itself(house):
    """No circle among what modules import while they are imported."""
    graph = {module: set(imports(path, at_import=True)) & FILES.keys() for module, path in FILES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module] - {module}):
                visit(other, (*above, module))
            done.add(module)

    for module in sorted(graph):
        if house_of(module) == house:
            visit(module, ())


def test_what_computes_on_a_device_says_so():
    """Or `-m gpu` would leave it out, and `-m 'not gpu'` would run it on a GPU."""
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__).resolve()]
    on_device = [path for path in tests if re.search(r"\bDEVICE\b|device_of", path.read_text(encoding="utf-8"))]
    unmarked = [
        path for path in on_device if not re.search(r"mark\.device|\bTRITON\b", path.read_text(encoding="utf-8"))
    ]
    assert len(on_device) > 10 and not unmarked


def oversized(path: Path) -> Iterator[str]:
    """Functions of more than 60 lines beside their docstring, or more than 12 parameters.

    What is compiled whole may be long, and take 25. A command takes what its users can type. Any other says why, in a
    comment behind its name.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        docstring = node.body[0] if ast.get_docstring(node) is not None else None
        said = docstring.end_lineno - docstring.lineno + 1 if docstring and docstring.end_lineno else 0
        long = node.end_lineno - node.lineno + 1 - said > 60
        taken = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        if MACHINE_CODE & {ast.unparse(decorator) for decorator in node.decorator_list}:
            small = taken <= 25
        elif path.parent.name == "command" and node.name == path.stem:
            small = True
        else:
            small = not long and taken <= 12
        if not small and "#" not in lines[node.lineno - 1]:
            yield f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("folder", PLACES)
def test_functions_stay_small(folder):
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths and not [name for path in paths for name in oversized(path)]


def test_a_function_that_has_grown_is_seen(tmp_path):
    def found(code: str, name: str = "some.py") -> list[str]:
        path = tmp_path / name
        path.write_text(code, encoding="utf-8")
        return [each.split()[-1] for each in oversized(path)]

    names = ", ".join(f"a{i}" for i in range(26))
    long = "".join(f"    b{i} = a\n" for i in range(60))
    assert found(f"def f(a):\n{long}") == ["f"]
    assert found(f"class C:\n    def f({names[:55]}): ...\n") == ["f"]
    assert found(f"def f(a):  # a table\n{long}") == []
    assert found(f'def f(a):\n    """{"x" * 3}\n{"y" * 9}\n"""\n{long[:-13]}') == []
    assert found(f"@triton.jit\ndef f(a):\n{long}") == [] and found(f"@triton.jit\ndef f({names}): ...") == ["f"]

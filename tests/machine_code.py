"""What the compilers made of a kernel, as tests look at it, and machine_code.json, which remembers it.

    for one in compiled("sm90", launches):          one.launch, one.report, one.seen["atomics"]

Of the assembly a report has sm90's matrix instructions, without their registers; what else tests ask of it is counted.

Machine code is a function of what is compiled and by what: the source of the jit function and of all that it calls, the
constants they read, the specialization, options and target, Triton (which brings its LLVM and ptxas), Python and the
processor. A digest of them is the key, so a kernel that has changed, or another Triton, is compiled as ever, and what
the tests ask for is asked of the new code; the others cost nothing. `python tests/record_machine_code.py` writes the
file anew, and its difference shows what a change did to registers, spills and instructions. That it says what the
compilers say now is tests/kernels/examine/test_compile.py.
"""

import functools
import hashlib
import inspect
import json
import platform
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton
from triton import language

from ornith_moe.kernels.examine import compile as examine
from ornith_moe.kernels.launch import Launch

FILE = Path(__file__).with_suffix(".json")
FORMS = tuple(
    arch for arch in examine.PROCESSORS if arch != "sm89"
)  # which runs sm90's form where nothing is multiplied
SEEN = {  # what tests count in an assembly, in PTX or AMD's
    "atomics": r"atom|red\.global",
    "global atomics": r"atom\.global|red\.global|global_atomic",
    "divisions": r"div\.rn\.f32|v_div_fixup_f32",
    "roots": r"v_sqrt_f32",  # in PTX one instruction, and nothing else is needed
    "inexact": r"div\.full|\.ftz|approx",
    "denormals": r"denorm_mode_32 3",
    "fused": r"\b(?:fma|(?:mul|add|sub)\.f32)\b|^\s*v_(?:pk_)?(?:fma|fmac|mad)_f32",  # what has `.rn` stays
    "stores of 16 bytes": r"st\.global\.v4\.b32|(?:global|buffer)_store_dwordx4",
    "shuffles": r"shfl",
    "shared memory": r"(?<!\.)shared|\.shared(?! \.align)",
}
_SAME_FOR_ALL = (
    triton.__version__, sys.version_info[:2], platform.machine(), inspect.getsource(examine), sorted(SEEN.items()),
)  # fmt: skip
recorded = None  # {key: row} of this run, where it is to be written


@dataclass(frozen=True)
class Compiled:
    launch: Launch
    report: examine.Report
    seen: dict[str, int]


def compiled(arch, launches):
    """A `Compiled` for each launch that `launches(arch)` records."""
    started = launches(arch)
    made = look_up([examine.specialize(arch, one) for one in started])
    return [Compiled(launch, *each) for launch, each in zip(started, made, strict=True)]


def compile_requests(requests, **_):
    """In place of that of kernels/examine/compile.py: reports without assemblies."""
    return [report for report, _ in look_up(requests)]


def look_up(requests):
    """[(report, seen), ...] of requests, compiled where they are not remembered."""
    keys = [key(request) for request in requests]
    known = {} if recorded is not None else remembered()
    missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
    rows = dict(zip(missing, map(row_of, missing.values(), examine.compile_requests([*missing.values()])), strict=True))
    if recorded is not None:
        recorded.update(rows)
    return [_read({**known, **rows}[key]) for key in keys]


def key(request):
    constants = sorted((str(path), _text(value)) for path, value in request.constants.items())
    what = (request.key, constants, sorted(sources(_kernel(request)).items()), _SAME_FOR_ALL)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:20]


def write():
    """The rows of this run, one a line, by target and kernel."""
    rows = sorted(recorded.items(), key=lambda pair: (pair[1]["arch"], pair[1]["kernel"], pair[0]))
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows)
    FILE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


@functools.cache
def remembered():
    return json.loads(FILE.read_text(encoding="utf-8"))


def row_of(request, report):
    seen = {name: len(re.findall(pattern, report.asm, re.MULTILINE)) for name, pattern in SEEN.items()}
    products = Counter(_unnamed(line) for line in re.findall(r"wgmma\.mma_async.*;", report.asm))
    fields = {"arch": request.arch, "kernel": request.kernel} | asdict(replace(report, asm=dict(products)))
    return fields | {"seen": {name: count for name, count in seen.items() if count}}


def _read(row):
    fields = {name: value for name, value in row.items() if name not in ("kernel", "seen")}
    fields["loop"] = examine.Loop(**row["loop"]) if row["loop"] else None
    fields["asm"] = "".join(f"{line}\n" * count for line, count in row["asm"].items())
    return examine.Report(**fields), dict.fromkeys(SEEN, 0) | row["seen"]


def _unnamed(line):
    return re.sub(r"\{[^}]*\}", "{}", re.sub(r"%\w+", "%", line))


def _kernel(request):
    return getattr(sys.modules[request.module], request.kernel)


def _text(value):
    """A constant of a launch: a jit function by its sources, an object of ours with its class."""
    if isinstance(value, examine._Named):
        return repr(sorted(sources(value.find()).items()))
    own = type(value).__module__.startswith("ornith_moe.")
    return repr(value) + (inspect.getsource(type(value)) if own else "")


@functools.cache
def sources(kernel):
    """{name: source or value} of a jit function and of all that it reads and calls, but for Triton's own."""
    found, todo = {}, [kernel.fn]
    while todo:
        function = todo.pop()
        found[f"{function.__module__}.{function.__qualname__}"] = inspect.getsource(function)
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            own = getattr(value, "fn", None)
            if own is not None and own.__module__.startswith("ornith_moe."):
                if f"{own.__module__}.{own.__qualname__}" not in found:
                    todo.append(own)
            elif isinstance(value, language.constexpr | int | float | str | tuple):
                found[f"{function.__module__}.{name}"] = repr(value)
    return found


def _names(code):
    inner = (each for each in code.co_consts if inspect.iscode(each))
    return {*code.co_names, *(name for each in inner for name in _names(each))}

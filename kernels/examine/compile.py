"""Compile recorded launches for GPUs that are not here, and say what came out.

    with recording("sm90") as launches:
        quantize_fp8_tokens(torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta"))
    reports = compile_launches([("sm90", launch) for launch in launches])

A launch is specialized by Triton's own binder: dtypes and alignment of pointers, integers that are 1 or divisible by
16, None, descriptors, constants. So what is compiled here is what a trainer's first call compiles, and requests that
specialize alike are compiled once. Worker processes do it, because a kernel that was defined for Triton's interpreter
cannot be compiled; they use Triton's own cache on disk.

Read from the result, all of it exact:

- registers, local memory and instructions of the machine code (nvdisasm and cuobjdump come with Triton; AMD's compiler
  writes them into the assembly),
- matrix instructions by the name that PTX or the AMD ISA gives them, and whether tiles travel by TMA,
- over how much of K the matrix unit itself sums (`unbroken_k`), in Triton's last form of the kernel before LLVM,
- programs that fit on one SM or CU by registers, shared and tensor memory and warps, and the hot loop: the innermost
  loop that holds matrix instructions. Loops are strongly connected components of the branches; one inside another is
  what remains connected without the outer loop's entry.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from ornith_moe.kernels.launch import Launch


@dataclass(frozen=True)
class Processor:
    """What one SM or CU holds. NVIDIA: CUDA programming guide, compute capabilities 8.9, 9.0 and 10.0. AMD: CDNA3 and
    CDNA4 ISA and the occupancy rules of LLVM's AMDGPU backend. Registers are 32 bits wide and counted over all lanes.
    """

    backend: str
    arch: int | str
    warp_size: int
    schedulers: int  # SM sub-partitions or SIMDs; registers and warps are split evenly among them
    warps: int
    programs: int
    registers: int
    register_step: int  # registers per thread are allocated in multiples of this
    shared_bytes: int
    shared_program_bytes: int  # the most that one program gets
    shared_reserved_bytes: int  # kept by the system for every program
    tensor_columns: int = 0  # of tensor memory


PROCESSORS = {
    "sm89": Processor("cuda", 89, 32, 4, 48, 24, 65536, 8, 100 << 10, 99 << 10, 1 << 10),
    "sm90": Processor("cuda", 90, 32, 4, 64, 32, 65536, 8, 228 << 10, 227 << 10, 1 << 10),
    "sm100": Processor("cuda", 100, 32, 4, 64, 32, 65536, 8, 228 << 10, 227 << 10, 1 << 10, 512),
    "gfx942": Processor("hip", "gfx942", 64, 4, 32, 32, 4 * 64 * 512, 8, 64 << 10, 64 << 10, 0),
    "gfx950": Processor("hip", "gfx950", 64, 4, 32, 32, 4 * 64 * 512, 8, 160 << 10, 160 << 10, 0),
}


@dataclass(frozen=True)
class Request:
    """One specialization of one kernel: all that its machine code depends on."""

    arch: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return repr(self)


@dataclass(frozen=True)
class Loop:
    """The hot loop: instructions of one warp per turn, the matrix instructions among them, and how many of the others
    run while none of the warp's own matrix instructions is in flight."""

    instructions: int
    matrix: int
    exposed: int


@dataclass(frozen=True)
class Report:
    """What a compiled kernel is. `spills` counts accesses to local memory (NVIDIA), or vector registers
    spilled and accesses to scratch (AMD)."""

    arch: str
    warps: int
    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    unbroken_k: int | None  # the most of K that leaves the matrix unit as one sum; None: all of it
    tma: bool
    tensor_columns: int
    instructions: int  # of the machine code, each counted once
    loop: Loop | None
    asm: str  # PTX or AMD assembly

    @property
    def programs(self) -> int:
        """Programs that fit on one SM or CU; 0 if one asks for more than there is."""
        p = PROCESSORS[self.arch]
        if self.shared_bytes > p.shared_program_bytes:
            return 0
        per_scheduler = -(-self.warps // p.schedulers)  # warps of one program that share a scheduler's registers
        allocated = -(-max(self.registers, 1) // p.register_step) * p.register_step * p.warp_size * per_scheduler
        limits = [p.programs, p.warps // (per_scheduler * p.schedulers), p.registers // p.schedulers // allocated]
        if used := self.shared_bytes + p.shared_reserved_bytes:
            limits.append(p.shared_bytes // used)
        if self.tensor_columns:
            limits.append(p.tensor_columns // self.tensor_columns)
        return min(limits)

    @property
    def occupancy(self) -> float:
        """Resident warps as a share of what the processor holds."""
        return self.programs * self.warps / PROCESSORS[self.arch].warps


def specialize(arch: str, launch: Launch) -> Request:
    """What Triton's JIT would compile for this launch. Works on interpreted kernels too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    p = PROCESSORS[arch]
    backend = make_backend(GPUTarget(p.backend, p.arch, p.warp_size))
    source = launch.kernel.fn
    kernel = JITFunction(source)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, _ = bind(**launch.arguments)
    options = {**launch.options, "enable_fp_fusion": False}
    _, signature, constants, attributes = kernel._pack_args(backend, dict(options), arguments, specialization, None)
    constants = {path: _portable(value) for path, value in constants.items()}
    return Request(arch, source.__module__, source.__qualname__, signature, constants, attributes, options)


@dataclass(frozen=True)
class _Named:
    """A jit function among the constants, which the worker looks up for itself."""

    module: str
    name: str

    def find(self) -> Any:
        return getattr(import_module(self.module), self.name)


def _portable(value: Any) -> Any:
    source = getattr(value, "fn", None)
    return _Named(source.__module__, source.__qualname__) if callable(source) else value


def compile_launches(
    launches: Sequence[tuple[str, Launch]], *, workers: int = 2, progress: Callable[[str, int, int], None] | None = None
) -> list[Report]:
    """A report for each (arch, launch). Raises RuntimeError with the kernel's name if one does not compile."""
    return compile_requests([specialize(*pair) for pair in launches], workers=workers, progress=progress)


def compile_requests(
    requests: Sequence[Request], *, workers: int = 2, progress: Callable[[str, int, int], None] | None = None
) -> list[Report]:
    """A report for each request; equal ones are compiled once."""
    distinct = {request.key: request for request in requests}
    reports: dict[str, Report] = {}
    with _Workers(min(workers, len(distinct))) as pool:
        for key, report in pool.run(distinct):
            reports[key] = report
            if progress:
                progress("kernels", len(reports), len(distinct))
    return [reports[request.key] for request in requests]


class _Workers:
    """Processes that compile one request after another, read as pickles from their standard input.

    They stay for the next call, because each takes seconds to start, and end with this process, which ends their input.
    """

    waiting: ClassVar[list[subprocess.Popen]] = []

    def __init__(self, count: int):
        self.count = count

    def __enter__(self) -> _Workers:
        # Lines of the source in the binary change no instruction and cost the compilers 7 % of their time.
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["TRITON_DISABLE_LINE_INFO"] = "1"
        paths = f"import sys; sys.path[:] = {sys.path!r}"  # a kernel may lie where only this process finds it
        command = [sys.executable, "-c", f"{paths}; import {__name__} as compile; compile._serve()"]
        pipe = subprocess.PIPE
        self.idle: list[subprocess.Popen] = []
        while len(self.idle) < self.count:
            start = not self.waiting
            self.idle.append(
                subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe) if start else self.waiting.pop()
            )
        self.processes = list(self.idle)
        self.threads = ThreadPoolExecutor(max(self.count, 1))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.threads.shutdown(wait=kind is None, cancel_futures=True)
        if kind is None:
            self.waiting.extend(self.processes)
            return
        for process in self.processes:
            process.kill()
            process.wait()

    def run(self, requests: dict[str, Request]) -> Iterator[tuple[str, Report]]:
        waiting = {self.threads.submit(self._one, request): key for key, request in requests.items()}
        for done in as_completed(waiting):
            yield waiting[done], done.result()

    def _one(self, request: Request) -> Report:
        process = self.idle.pop()
        assert process.stdin is not None and process.stdout is not None  # pipes
        try:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError):  # ptxas or LLVM took the process with it
            answer = f"the compiler ended with exit code {process.wait()}"
        self.idle.append(process)
        if isinstance(answer, str):
            where = f"{request.module.rpartition('.')[2]}.{request.kernel} for {request.arch}"
            raise RuntimeError(f"{where} with {request.options} does not compile: {answer}")
        return answer


def _serve() -> None:
    """A worker: requests in, reports or error texts out, until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a compiler prints must not land among the answers
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            request = pickle.load(sys.stdin.buffer)
            answer: Report | str
            try:
                answer = _compile(request)
            except Exception as error:  # any compiler error is an answer; the parent names the kernel
                answer = f"{type(error).__name__}: {error}"
            pickle.dump(answer, answers)
            answers.flush()


def _compile(request: Request) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    p = PROCESSORS[request.arch]
    kernel = getattr(import_module(request.module), request.kernel)
    constants = {k: v.find() if isinstance(v, _Named) else v for k, v in request.constants.items()}
    source = ASTSource(kernel, request.signature, constants, request.attributes)
    compiled = triton.compile(source, target=GPUTarget(p.backend, p.arch, p.warp_size), options=request.options)
    read = _read_nvidia if p.backend == "cuda" else _read_amd
    return Report(
        arch=request.arch,
        warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0),
        unbroken_k=unbroken_k(compiled.asm["ttgir"]),
        **read(compiled.asm),
    )


_PRODUCT = re.compile(
    r"\s*(?:(%\w+) = )?(?:tt\.dot|tt\.dot_scaled|ttng\.warp_group_dot|ttng\.tc_gen5_mma) (%.*?) :"
    r" (?:tensor|!ttg\.memdesc)<\d+x(\d+)x"
)


def unbroken_k(ttgir: str) -> int | None:
    """The most of K that the matrix unit sums before the kernel sees the sum: 0 without products, None where a product
    goes on from one that the loop's last turn left.

    A product is `dot a, b, acc` or, in tensor memory, `mma a, b, acc, whether to go on from acc`. It starts a sum where
    acc is the constant 0 or the flag is false, and continues one where acc is the result of another product.
    """
    known: dict[str, int | None] = {}  # what each value would add to: 0 for a zero or false, K of a product's result
    longest = 0
    for line in ttgir.splitlines():
        if found := re.match(r"\s*(%\w+) = arith\.constant (?:dense<0\.0+e\+00>|false)", line):
            known[found[1]] = 0
        elif found := _PRODUCT.match(line):
            operands = re.findall(r"%\w+(?:#\d+)?", re.sub(r" scale %\w+|\[.*?\]", "", found[2]))
            before = known.get(operands[3] if len(operands) > 3 else operands[2])
            if before is None:
                return None
            longest = max(longest, before + int(found[3]))
            known[found[1]] = before + int(found[3])
        else:  # names of one region may come again in another
            for name in re.findall(r"(%\w+)(?::\d+)? =", line):
                known.pop(name, None)
    return longest


def _read_nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _output(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)  # without data flow: a third faster
    code = list(parse_sass(sass.splitlines()))
    matrix = re.findall(r"^.*\b((?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.\S+)", asm["ptx"], re.MULTILINE)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spills": sum(line.opcode.startswith(("LDL", "STL")) for line in code),
        "matrix_instructions": dict(Counter(matrix)),
        "tma": any(line.opcode.startswith(("UTMALDG", "UTMASTG", "UTMAREDG")) for line in code),
        "instructions": len(code),
        "loop": hot_loop(code, r"[HQI]GMMA|UTC[HQIO]MMA|[HIDQ]MMA", r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0|LDTM"),
        "asm": asm["ptx"],
    }


def _read_amd(asm: dict[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]
    code = list(parse_amdgcn(text.splitlines()))
    return {
        "registers": _number(r"^\s*\.vgpr_count:\s*(\d+)", text),  # AGPRs included
        # Scalar registers that are spilled go to lanes of a vector register, not to memory.
        "spills": sum(map(int, re.findall(r"vgpr_spill_count:\s*(\d+)", text)))
        + sum(line.opcode.startswith("scratch_") for line in code),
        "matrix_instructions": dict(Counter(line.opcode for line in code if re.match("v_s?mfma", line.opcode))),
        "tma": False,
        "instructions": len(code),
        "loop": hot_loop(code, r"v_s?mfma", r"v_s?mfma"),
        "asm": text,
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(
            f"expected {pattern} in what the compiler's tools print, found none; they may be of a new version"
        )
    return int(found[1])


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Line:
    """One instruction: the labels right before it, and where it may jump."""

    labels: tuple[str, ...]
    text: str
    target: str | None
    falls_through: bool

    @property
    def opcode(self) -> str:
        return self.text.split()[0]


def parse_sass(lines: Iterable[str]) -> Iterator[Line]:
    """Instructions of `nvdisasm -c`: `/*0090*/ @P0 BRA `(.L_x_0) ;`"""
    labels: list[str] = []
    for text in lines:
        if found := re.match(r"(\.L\w+):", text):
            labels.append(found[1])
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", text):
            predicate, opcode, operands = found.groups()
            jump = re.search(r"`\((\.L\w+)\)", operands) if opcode.startswith("BRA") else None
            conditional = bool(predicate) or bool(jump and re.match(r"\s*!?U?P\d", operands))
            ends = opcode.startswith(("BRA", "EXIT", "RET")) and not conditional
            yield Line(tuple(labels), f"{opcode}{operands}", jump[1] if jump else None, not ends)
            labels = []


def parse_amdgcn(lines: Iterable[str]) -> Iterator[Line]:
    """Instructions of LLVM's AMD assembly: `s_cbranch_scc1 .LBB0_140`"""
    labels: list[str] = []
    for text in lines:
        if found := re.match(r"(\.LBB\w+):", text):
            labels.append(found[1])
        elif found := re.match(r"\t([vs]_\w+|ds_\w+|buffer_\w+|global_\w+|flat_\w+|scratch_\w+)(.*)", text):
            opcode, operands = found.groups()
            jump = re.search(r"(\.LBB\w+)", operands) if "branch" in opcode else None
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            yield Line(tuple(labels), f"{opcode}{operands}", jump[1] if jump else None, not ends)
            labels = []


def hot_loop(code: Sequence[Line], matrix: str, waits: str) -> Loop | None:
    """The innermost loop with the most instructions that match `matrix`; None if none is in a loop. Results are in
    flight from there to the next instruction that matches `waits`."""
    is_matrix = [bool(re.match(matrix, line.text)) for line in code]
    if not any(is_matrix):
        return None
    import networkx  # torch brings it

    at = {label: i for i, line in enumerate(code) for label in line.labels}
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(code)))
    for i, line in enumerate(code):
        if line.target in at:
            graph.add_edge(i, at[line.target])
        if line.falls_through and i + 1 < len(code):
            graph.add_edge(i, i + 1)

    def innermost(nodes: set[int]) -> set[int] | None:
        inside = graph.subgraph(nodes)
        loops = [part for part in networkx.strongly_connected_components(inside) if len(part) > 1]
        best: set[int] = max(loops, key=lambda part: sum(is_matrix[i] for i in part), default=set())
        if not any(is_matrix[i] for i in best):
            return None
        entries = {i for i in best if any(j not in best for j in graph.predecessors(i))}
        return (innermost(best - entries) if entries else None) or best

    found = sorted(innermost(set(graph)) or ())
    if not found:
        return None
    in_flight, exposed = False, 0
    for turn in range(2):  # the second starts with what the first leaves in flight
        for i in found:
            in_flight = is_matrix[i] or (in_flight and not re.match(waits, code[i].text))
            exposed += turn and not in_flight
    return Loop(len(found), sum(is_matrix[i] for i in found), exposed)

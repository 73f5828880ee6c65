"""What one would type instead of a conversion of ours: the tools that make the same build of the same checkpoint.

Each lives where its user puts it, because their requirements exclude one another:

    ORNITH_BENCH_LLAMA_CPP        a checkout of llama.cpp; of it `cmake --build build --target llama-quantize`
    ORNITH_BENCH_MODELOPT         a Python that has nvidia-modelopt[hf] and requests
    ORNITH_BENCH_LLMCOMPRESSOR    a Python that has llmcompressor
    ORNITH_BENCH_MLX              a Python that has mlx-lm; unset: the one that runs this

Those with a script in bench/outside have no command of their own for it: a script is what their documentation gives.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ornith_moe.bench.command import Step, digests
from ornith_moe.bench.peers import Unable
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

OUTSIDE = Path(__file__).parent / "outside"
LLAMA_CPP, MODELOPT, LLMCOMPRESSOR, MLX = (
    f"ORNITH_BENCH_{name}" for name in ("LLAMA_CPP", "MODELOPT", "LLMCOMPRESSOR", "MLX")
)


@dataclass(frozen=True)
class Place:
    """The checkpoint, and the folder that a tool makes; a GGUF lies in it as `gguf`."""

    source: Path
    out: Path

    @property
    def gguf(self) -> Path:
        return self.out / "model.gguf"


@dataclass(frozen=True)
class Found:
    """Where a tool lives: its checkout or its Python; `version` of it, "" where it does not say."""

    path: Path
    version: str = ""


@dataclass(frozen=True)
class Tool:
    """A tool by others.

    Attributes:
        name, build: of its row, and what it makes as ours is called.
        find: where it is; Unable with what to install if it is nowhere.
        steps: its command lines. check: AssertionError unless it made what it should; given the digests of ours.
        into: whether it writes into a folder that is there already.
    """

    name: str
    build: str
    find: Callable[[], Found]
    steps: Callable[[Found, Place], list[Step]]
    check: Callable[[Place, Callable[[], Mapping[str, str]]], float]
    into: bool = False


def find_python(variable: str, package: str, install: str, default: str = "") -> Found:
    """The Python that `variable` names, if it has `package`."""
    python = os.environ.get(variable, default)
    if not python:
        raise Unable("missing", f"{variable} is not set; {install}, in an environment of its own, and name its python")
    asked = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        done = subprocess.run([python, "-c", asked], capture_output=True, text=True)
    except OSError as error:
        raise Unable("missing", f"{variable}={python} does not start ({error.strerror}); name a python") from None
    if done.returncode:
        raise Unable("missing", f"{package} is not installed in {variable}; {install}")
    return Found(Path(python), f"{package} {done.stdout.strip()}")


def find_llama_cpp() -> Found:
    """The checkout that LLAMA_CPP names, or that of a convert_hf_to_gguf.py on PATH."""
    script = "convert_hf_to_gguf.py"
    named = os.environ.get(LLAMA_CPP) or str(Path(shutil.which(script) or "").parent)
    if not (Path(named) / script).is_file():
        raise Unable("missing", f"llama.cpp's {script} is not in {LLAMA_CPP}; clone llama.cpp and name its folder")
    return Found(Path(named))


def find_quantize() -> Found:
    """The same, with llama-quantize built in it."""
    found = find_llama_cpp()
    if not _quantizer(found).is_file():
        raise Unable("missing", "llama-quantize is not built; cmake -B build, cmake --build build -t llama-quantize")
    return found


def _quantizer(found: Found) -> Path:
    return found.path / "build" / "bin" / "llama-quantize"


def to_gguf(found: Found, source: Path, kind: str, out: Path) -> Step:
    """llama.cpp's converter on `source`, to the file `out` of `kind`, which is its --outtype."""
    options = ["--outtype", kind, "--outfile", str(out), "--no-mtp"]
    return Step([sys.executable, str(OUTSIDE / "convert_hf_to_gguf.py"), str(found.path), str(source), *options])


def same_bytes(made: Callable[[Place], Path]) -> Callable[[Place, Callable[[], Mapping[str, str]]], float]:
    """Every tensor has the name, the dtype, the shape and the bytes of ours.

    transformers names a text model loaded alone without `language_model.`, and so does what saves it.
    """

    def check(place: Place, ours: Callable[[], Mapping[str, str]]) -> float:
        theirs, expected = (_of_text(found) for found in (digests(made(place)), ours()))
        alone = sorted(theirs.keys() ^ expected.keys())
        assert not alone, f"{len(alone)} tensors are in one of the two only, the first {alone[0]}"
        others = [name for name, digest in theirs.items() if digest != expected[name]]
        assert not others, f"{len(others)} of {len(theirs)} tensors are not those of ours, the first {others[0]}"
        return 0.0

    return check


def _of_text(found: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("model.language_model.", "model."): digest for name, digest in found.items()}


def verified(place: Place, ours: Callable[[], Mapping[str, str]]) -> float:
    """Our `verify` finds nothing: every weight is there, and within what its format loses of the source's."""
    found = verify(place.out, open_source(place.source))
    assert found.ok, str(found.problems[:1])
    return 0.0


def _converted(found: Found, place: Place) -> list[Step]:
    return [to_gguf(found, place.source, "q8_0", place.gguf)]


def _quantized(found: Found, place: Place) -> list[Step]:
    whole = place.out / "bf16.gguf"
    quantize = [str(_quantizer(found)), str(whole), str(place.gguf), "Q4_K_M"]
    return [to_gguf(found, place.source, "bf16", whole), Step(quantize, [whole])]


def _mlx(found: Found, place: Place) -> list[Step]:
    options = ["--hf-path", str(place.source), "--mlx-path", str(place.out), "-q"]
    return [Step([str(found.path), "-m", "mlx_lm", "convert", *options])]


def _outside(script: str, *options: str) -> Callable[[Found, Place], list[Step]]:
    def steps(found: Found, place: Place) -> list[Step]:
        return [Step([str(found.path), str(OUTSIDE / script), str(place.source), str(place.out), *options])]

    return steps


def _gguf(place: Place) -> Path:
    return place.gguf


def _folder(place: Place) -> Path:
    return place.out


TOOLS = (
    Tool("convert_hf_to_gguf.py", "gguf:Q8_0", find_llama_cpp, _converted, same_bytes(_gguf), into=True),
    Tool("convert_hf_to_gguf.py, llama-quantize", "gguf:Q4_K_M", find_quantize, _quantized, same_bytes(_gguf),
         into=True),
    Tool("mlx_lm.convert", "mlx:4",
         partial(find_python, MLX, "mlx-lm", "pip install 'mlx-lm[cpu]'", sys.executable), _mlx, same_bytes(_folder)),
    Tool("modelopt export", "nvfp4",
         partial(find_python, MODELOPT, "nvidia-modelopt", "pip install 'nvidia-modelopt[hf]' requests"),
         _outside("export_modelopt.py"), same_bytes(_folder)),
    Tool("llm-compressor model_free_ptq", "fp8-channel",
         partial(find_python, LLMCOMPRESSOR, "llmcompressor", "pip install llmcompressor"),
         _outside("model_free_ptq.py", "FP8_DYNAMIC"), verified),
)  # fmt: skip

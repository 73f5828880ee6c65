"""Programs that we did not write, running a checkpoint or a build: what is the likeliest next token.

`Transformers` loads a Hugging Face folder unmodified (BF16, block FP8, channel FP8) and refuses it unless no key was
missing, unexpected or mismatched; it computes in fp32. `LlamaCpp` loads a GGUF with an fp32 KV cache, without flash
attention, so that for an F32 file nothing but summation order differs. `MlxLm` loads a folder for MLX and computes in
fp32 too.

None is needed to import this file; each names the extra to install when it is missing.
"""

from __future__ import annotations

import contextlib
import secrets
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ornith_moe.quant import files
from ornith_moe.quant.builds.build import BUILDS, recognize
from ornith_moe.quant.builds.folder import SafetensorsBuild
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.errors import CheckpointError, OrnithError, VerificationError
from ornith_moe.quant.gguf.metadata import MMPROJ
from ornith_moe.quant.gguf.splits import first_part


class Client(Protocol):
    """A program that predicts the next token; close it, or use it in a `with` statement."""

    name: str
    vocabulary: int

    def log_probs(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """float64 [P, V]: log P(next token | tokens[0..p]) for each ascending position p, NaN for tokens not listed."""

    def complete(self, prompt: str, count: int) -> str:
        """The `count` likeliest tokens after `prompt`, one by one, as text."""

    def close(self) -> None: ...

    def __enter__(self) -> Client: ...

    def __exit__(self, *exception: object) -> None: ...


def open_client(path: str | Path) -> Client:
    """The client that runs `path`: llama.cpp for a .gguf file, for a folder with a config.json what its build names."""
    path = Path(path)
    if path.is_dir() and (path / "config.json").is_file():
        build = _build_of(path)
        return MlxLm(path) if build and build.client == "mlx-lm" else Transformers(path)
    if path.is_file() and path.suffix == ".gguf":
        return LlamaCpp(path)
    raise CheckpointError(f"{path}: expected a .gguf file or a folder with a config.json that a client can run")


def encode(folder: str | Path, text: str, *, special: bool = False) -> list[int]:
    """Token ids of `text` by the tokenizer.json of a checkpoint folder; `special`: with the special tokens it adds."""
    tokenizers = require("tokenizers", "hf")
    path = Path(folder) / "tokenizer.json"
    raw = files.read_bytes(path, what="the tokenizer", limit=files.MAX_JSON_BYTES)
    try:
        return tokenizers.Tokenizer.from_buffer(raw).encode(text, add_special_tokens=special).ids
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise CheckpointError(f"{path}: not a tokenizer that can be loaded: {error}") from None


class Transformers:
    """transformers running a Hugging Face folder on the CPU in fp32.

    Quantized weights are dequantized at load by transformers' own readers of the two FP8 layouts, to BF16; activations
    stay unquantized, so the figures tell what the stored weights lost.

    Raises:
        VerificationError: the loader reports keys that are missing, unexpected or of another shape.
        CheckpointError: transformers refuses the folder.
    """

    def __init__(self, folder: str | Path):
        self._torch, transformers = require("torch", "hf"), require("transformers", "hf")
        self.folder = Path(folder)
        files.refuse_stray_links(self.folder)
        dequantizing = _dequantizing(transformers, self.folder)
        self.name = f"transformers {transformers.__version__}"
        with quiet_transformers():
            try:
                self._model, self.loading = transformers.AutoModelForCausalLM.from_pretrained(
                    self.folder,
                    output_loading_info=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,  # a folder without them may hold pickles
                    quantization_config=dequantizing,
                )
            except ImportError as error:  # accelerate for block FP8, compressed-tensors for channel FP8
                raise OrnithError(
                    f"{self.folder}: transformers needs another package to load it: {one_line(error)}"
                ) from None
            except Exception as error:  # whatever its readers of configs and weights raise
                raise CheckpointError(f"{self.folder}: transformers refuses it: {one_line(error)}") from None
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(str(key) for key in self.loading[kind]):
                raise VerificationError(
                    f"{self.folder}: transformers reports {len(keys)} {kind.replace('_', ' ')}, first {keys[0]}; "
                    "expected every weight to be found and used"
                )
        self._torch.nn.Module.float(self._model).eval()  # transformers' own float() refuses whatever was quantized
        self.vocabulary = self._model.get_output_embeddings().weight.shape[0]

    def log_probs(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        torch = self._torch
        with torch.inference_mode(), quiet_transformers(), failures_told(self.folder):
            keep = torch.tensor(positions)
            logits = self._model(torch.tensor([tokens]), logits_to_keep=keep, use_cache=False).logits[0]
            return logits.double().log_softmax(-1).numpy()

    def complete(self, prompt: str, count: int) -> str:
        import tokenizers

        raw = files.read_bytes(self.folder / "tokenizer.json", what="the tokenizer", limit=files.MAX_JSON_BYTES)
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        ids = tokenizer.encode(prompt).ids
        with quiet_transformers(), failures_told(self.folder):
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            output = self._model.generate(self._torch.tensor([ids]), max_new_tokens=count, **greedy)
        return tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=False)

    def close(self) -> None:
        self._model = None

    __enter__, __exit__ = (lambda self: self), (lambda self, *exception: self.close())


class LlamaCpp:
    """llama.cpp running a GGUF on the CPU, through xllamacpp's in-process server.

    The server gives the distribution after a prompt only, so each position is one request; the prompt's common start is
    kept between requests. The likeliest token may be half a character, which the server holds back together with its
    log-probabilities; a bias pins the sampled token to "a" instead and leaves the log-probabilities alone.

    A position costs one pass over its new tokens and about 15 us for each log-probability listed. A list shorter than
    the vocabulary saves time and makes KL wrong by the rounding of llama.cpp's own fp32 normalization (1e-4 nats with
    100,000 tokens), which a complete list lets us undo.

    The server also opens a port on the loopback address; a random key closes it to others.

    Args:
        path: a .gguf file; of a split one, any of its files.
        context: tokens a prompt may have.
        listed: how many of the likeliest tokens get a log-probability at each position, default all of them.
        threads: default llama.cpp's choice.

    Raises:
        CheckpointError: llama.cpp cannot load the file.
    """

    def __init__(self, path: str | Path, *, context: int = 2048, listed: int | None = None, threads: int | None = None):
        llama = require("xllamacpp", "llama")
        self.path = first_part(Path(path))
        self.name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        settings = llama.CommonParams()
        settings.model.path = str(self.path)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.n_gpu_layers = 0
        settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.swa_full = True  # a pruned window could not be extended by the next request
        settings.n_ctx_checkpoints = settings.cache_ram_mib = 0
        settings.warmup = settings.fit_params = False
        settings.verbosity = -1  # nothing on the user's terminal
        settings.api_keys = [secrets.token_hex(16)]
        if threads:
            settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        try:
            self._server = llama.Server(settings)
        except RuntimeError:
            if StoredBuild(self.path).metadata.get("general.type") == MMPROJ:
                raise CheckpointError(
                    f"{self.path}: is the vision tower of a model, which answers nothing by itself; name the text GGUF "
                    "beside it"
                ) from None
            raise CheckpointError(f"{self.path}: llama.cpp cannot load it; llama-cli -m on the file says why") from None
        self._listed = (1 << 31) - 1  # more than there are, so the answer counts the vocabulary
        self.vocabulary = len(self._next([0]))
        self._listed = min(listed or self.vocabulary, self.vocabulary)

    def log_probs(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        rows = np.empty((len(positions), self.vocabulary))
        for row, position in zip(rows, positions, strict=True):
            _fill(row, self._next(list(tokens[: position + 1])))
        return rows

    def _next(self, prompt: list[int]) -> list[dict]:
        answer = self._ask(prompt=prompt, n_predict=1, n_probs=self._listed, logit_bias=[["a", 1e4]])
        return answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]

    def complete(self, prompt: str, count: int) -> str:
        return self._ask(prompt=prompt, n_predict=count)["choices"][0]["text"]

    def _ask(self, **request: Any) -> dict:
        answer = self._server.handle_completions(request | {"temperature": 0.0, "cache_prompt": True})
        if "error" in answer:
            raise OrnithError(f"{self.path}: llama.cpp refuses a request: {answer['error'].get('message')}")
        return answer

    def close(self) -> None:
        self._server = None

    __enter__, __exit__ = (lambda self: self), (lambda self, *exception: self.close())


class MlxLm:
    """mlx-lm running a folder for MLX, on the CPU where mlx has nothing else, in fp32.

    Codes stay packed; scales, norms and what is not quantized are widened, so that the figures tell what the stored
    weights lost, and because mlx multiplies experts that are not quantized in nothing else on a CPU.

    Raises:
        CheckpointError: mlx-lm refuses the folder, for one if a tensor is missing or has another shape.
    """

    def __init__(self, folder: str | Path):
        self._mx, mlx_lm = require("mlx.core", "mlx"), require("mlx_lm.utils", "mlx")
        self.folder = Path(folder)
        files.refuse_stray_links(self.folder)
        self.name = f"mlx-lm {version('mlx-lm')}"
        try:
            self._model, _ = mlx_lm.load_model(self.folder, trust_remote_code=False)
            self._model.set_dtype(self._mx.float32)
            self.vocabulary = self._logits([0])[0].shape[-1]
        except Exception as error:  # whatever its readers of configs and weights raise
            raise CheckpointError(f"{self.folder}: mlx-lm refuses it: {one_line(error)}") from None

    def log_probs(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        rows = self._logits(tokens)[list(positions)].astype(np.float64)
        return rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)

    def complete(self, prompt: str, count: int) -> str:
        import tokenizers

        raw = files.read_bytes(self.folder / "tokenizer.json", what="the tokenizer", limit=files.MAX_JSON_BYTES)
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        ids = tokenizer.encode(prompt).ids
        start = len(ids)
        for _ in range(count):
            ids.append(int(self._logits(ids)[-1].argmax()))
        return tokenizer.decode(ids[start:], skip_special_tokens=False)

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 [L, V]"""
        return np.array(self._model(self._mx.array([list(tokens)]))[0])

    def close(self) -> None:
        self._model = None

    __enter__, __exit__ = (lambda self: self), (lambda self, *exception: self.close())


def _fill(row: np.ndarray, listed: list[dict]) -> None:
    """Write listed log-probabilities into `row` [V]; a complete list is made to sum to exactly one."""
    row[:] = np.nan
    row[[entry["id"] for entry in listed]] = [entry["logprob"] for entry in listed]
    if len(listed) == len(row):
        row -= np.logaddexp.reduce(row)


def _build_of(folder: Path) -> SafetensorsBuild | None:
    """The build that lies there; None also of what cannot be read, as its client will say."""
    try:
        build = BUILDS.get(recognize(StoredBuild(folder)))
    except CheckpointError:
        return None
    return build if isinstance(build, SafetensorsBuild) else None


def _dequantizing(transformers: Any, folder: Path) -> Any:
    """The quantization_config that asks transformers for dense weights, None for a folder that is not quantized.

    Raises:
        CheckpointError: transformers has no reader for it.
    """
    build = _build_of(folder)
    if build and build.unread:
        raise CheckpointError(f"{folder}: is {build}, and transformers {build.unread}")
    kind = build.dequantizer if build else None
    return getattr(transformers, kind)(dequantize=True) if kind else None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers reports loading and fallbacks on stderr; its errors still come as exceptions."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def failures_told(folder: Path | None) -> Iterator[None]:
    """A model of transformers runs within: a config that can be loaded need not be one that can be run."""
    try:
        yield
    except Exception as error:  # whatever its layers raise
        raise CheckpointError(f"{folder}: transformers cannot run it: {one_line(error)}") from None


def require(module: str, extra: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise OrnithError(f"{module} is not installed; install it with: pip install 'ornith-moe[{extra}]'") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""The model card of a finished build: whose it is, what is in it, how it was checked, what serves it.

Everything it says is in the build (its manifest, config or metadata, the README that its source had) or was measured
and is given: the JSON of `verify` and `compare`. What it cannot know it leaves out rather than guessing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ornith_moe.quant.builds.build import BUILDS, Build, recognize
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import read_json
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.architectures import architecture
from ornith_moe.quant.source.model_card import read_card

ENGINES = {  # how each starts; `Architecture.PARSERS` adds what its chats need
    "vLLM": "vllm serve {path}",
    "SGLang": "python -m sglang.launch_server --model-path {path}",
    "TensorRT-LLM": "trtllm-serve {path}",
    "llama.cpp": "llama-server -m {path} --jinja",
    "llama.cpp, beside a text GGUF": "llama-server -m TEXT.gguf --mmproj {path} --jinja",
    "Ollama": "echo FROM ./{path} > Modelfile && ollama create {name} -f Modelfile",
    "mlx-lm": "mlx_lm.server --model {path}",
    "mlx-vlm": "mlx_vlm.server --model {path}",
}
KEPT = ("license", "license_name", "license_link", "pipeline_tag", "language", "languages")  # of the source's card


def model_card(
    path: Path,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    source: Path | None = None,
    verified: Sequence[Mapping[str, Any]] = (),
    compared: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Markdown with front matter for the build at `path`, a folder or a file.

    Args:
        base_model: org/name of the source on the Hub. licence: instead of that of the source's README.
        source: folder of the source, whose README says whose it is.
        verified, compared: what `verify --json` and `compare --json` have said of it.
    Raises:
        CheckpointError: no build with a manifest lies there; the JSON is not what those commands say of such a build.
    """
    stored = StoredBuild(path)
    build = BUILDS.get(recognize(stored))
    if build is None or not stored.manifest.is_file():
        raise CheckpointError(f"{path}: is no build with a manifest of ours, which a card tells of; convert it first")
    manifest = read_json(stored.manifest)
    name = str(manifest.get("source", "the source"))
    known = read_card(source).values if source else {}
    front = {key: value for key, value in known.items() if key in KEPT}
    front |= {"license": licence} if licence else {}
    front |= {"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}
    front |= {"library_name": build.library, "tags": [build.library, *build.name.split(":"), "ornith-moe"]}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {bare(name)}, {build.name}",
        _contents(build, manifest, base_model or name),
        _checks(build, verified, compared),
        _serving(build, stored),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _contents(build: Build, manifest: Mapping[str, Any], source: str) -> str:
    lines = [f"Made from {bare(source)} by `ornith-moe convert`, build `{build.name}`."]
    added = {"mtp_from": "Multi-token prediction of", "lora": "Merged with the adapter", "copied": "Copied untouched:"}
    lines += [f"{words} {brief(manifest[key])}." for key, words in added.items() if manifest.get(key)]
    lines.append(f"Multi-token prediction is {'in it' if manifest.get('mtp') else 'not in it'}.")
    files = manifest.get("files")
    table = ["| file | bytes | sha256 |", "|---|---|---|"]
    for name, entry in files.items() if isinstance(files, dict) else ():
        size, digest = _taken(entry, "the manifest", bytes=int, sha256=str)
        table.append(f"| `{bare(name)}` | {size:,} | `{bare(digest)}` |")
    tensors, size = _taken(manifest, "the manifest", tensors=int, tensor_bytes=int)
    return "\n\n".join([" ".join(lines), f"{tensors:,} tensors, {size / 1e9:.3f} GB of them.", "\n".join(table)])


def _checks(build: Build, verified: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for found in verified:
        name, ok, tensors, roles = _taken(found, "the JSON of verify", build=str, ok=bool, tensors=int, roles=dict)
        if name != build.name:
            raise CheckpointError(f"--verify: is of build {brief(name)}, the card is of {build.name}; give its own")
        what, against = "passes" if ok else "fails", " against the source" if roles else ", without the source"
        lines.append(f"It {what} `ornith-moe verify`: {tensors:,} tensors{against}.")
    rows = [row for found in compared for row in _compared(build, found)]
    if rows:
        lines.append(
            "| computed by | positions | KL, nats | top-1 | perplexity | of the source |\n|---|---|---|---|---|---|"
        )
    for way, positions, kl, top1, perplexity, its in rows:
        lines[-1] += f"\n| {bare(way)} | {positions:,} | {kl:.5f} | {top1:.1%} | {perplexity:.2f} | {its:.2f} |"
    return "\n\n".join(["## Checked", *lines]) if lines else ""


def _compared(build: Build, found: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Who computed, positions, KL, top-1 and both perplexities: of a client, or of this build among those streamed."""
    what = "the JSON of compare"
    if not isinstance(found, Mapping) or "builds" not in found:
        kinds = {"client_b": str, "positions": int, "kl_mean": float, "top1": float}
        yield _taken(found, what, **kinds, perplexity_b=float, perplexity_a=float)
        return
    positions, its, builds = _taken(found, what, positions=int, perplexity=float, builds=list)
    of_build = [each for each in builds if _taken(each, what, kind=str) == [build.name]]
    if not of_build:
        raise CheckpointError(f"--compare: has no build {build.name}, of which the card is; give its own")
    for each in of_build:
        yield ["its weights in fp32", positions, *_taken(each, what, kl_mean=float, top1=float, perplexity=float), its]


def _serving(build: Build, stored: StoredBuild) -> str:
    path, parsers = (
        stored.path,
        architecture(read_json(stored.path / "config.json")).PARSERS if stored.is_folder else {},
    )
    names = {"path": shlex.quote(path.name), "name": shlex.quote(path.stem.lower())}
    parts = ["## Serve"] if build.engines else []
    for engine in build.engines:
        command = " ".join(filter(None, [ENGINES[engine].format(**names), parsers.get(engine)]))
        parts.append(f"{engine}:\n\n```\n{command}\n```")
    return "\n\n".join(parts)


def _taken(found: Any, what: str, **kinds: type) -> list[Any]:
    """The values of these keys, each of its kind; a whole number serves as a float.

    Raises:
        CheckpointError: one is absent or of another kind.
    """
    for key, kind in kinds.items():
        value = found.get(key) if isinstance(found, dict) else None
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise CheckpointError(f"model card: expected {what} with {key} {kind.__name__}, got {brief(value)}")
    return [found[key] for key in kinds]

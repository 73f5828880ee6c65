"""The model card of a finished build: whose it is, what is in it, how it was checked, what serves it.

Everything it says is in the build (its manifest, config or metadata, the README that its source had) or was measured
and is given: the JSON of `verify` and `compare`. What it cannot know it leaves out rather than guessing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ornith_moe.quant.builds.build import BUILDS, Build, recognize
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import read_json
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.model_card import read_card

ENGINES = {  # how each starts with Qwen3.5 and its kin, whose tool calls are XML and whose thoughts are tagged
    "vLLM": "vllm serve {path} --reasoning-parser qwen3 --enable-auto-tool-choice --tool-call-parser qwen3_xml",
    "SGLang": (
        "python -m sglang.launch_server --model-path {path} --reasoning-parser qwen3 --tool-call-parser qwen3_coder"
    ),
    "TensorRT-LLM": "trtllm-serve {path}",
    "llama.cpp": "llama-server -m {path} --jinja",
    "llama.cpp, beside a text GGUF": "llama-server -m TEXT.gguf --mmproj {path} --jinja",
    "Ollama": 'printf "FROM ./{path}\\n" > Modelfile && ollama create {name} -f Modelfile',
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
        CheckpointError: no build with a manifest lies there.
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
        _checks(verified, compared),
        _serving(build, path),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _contents(build: Build, manifest: Mapping[str, Any], source: str) -> str:
    lines = [f"Made from {source} in one pass: `ornith-moe convert {source} OUT --to {build.name}`."]
    added = {"mtp_from": "Multi-token prediction of", "lora": "Merged with the adapter", "copied": "Copied untouched:"}
    lines += [f"{words} {brief(manifest[key])}." for key, words in added.items() if manifest.get(key)]
    lines.append(f"Multi-token prediction is {'in it' if manifest.get('mtp') else 'not in it'}.")
    files = manifest.get("files")
    rows = files.items() if isinstance(files, dict) else ()
    table = ["| file | bytes | sha256 |", "|---|---|---|"]
    table += [f"| `{name}` | {entry['bytes']:,} | `{entry['sha256']}` |" for name, entry in rows]
    total = f"{manifest.get('tensors', 0):,} tensors, {manifest.get('tensor_bytes', 0) / 1e9:.3f} GB of them."
    return "\n\n".join([" ".join(lines), total, "\n".join(table)])


def _checks(verified: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for found in verified:
        what = "passes" if found.get("ok") else "fails"
        lines.append(f"It {what} `ornith-moe verify`: {found.get('tensors', 0):,} tensors against the source.")
    if compared:
        head = "| client | positions | KL, nats | top-1 | perplexity | of the source |\n|---|---|---|---|---|---|"
        rows = (
            f"\n| {found['client_b']} | {found['positions']:,} | {found['kl_mean']:.5f} | {found['top1']:.1%} | "
            f"{found['perplexity_b']:.2f} | {found['perplexity_a']:.2f} |"
            for found in compared
        )
        lines.append(head + "".join(rows))
    return "\n\n".join(["## Checked", *lines]) if lines else ""


def _serving(build: Build, path: Path) -> str:
    names = {"path": path.name, "name": path.stem.lower()}
    commands = [f"{engine}:\n\n```\n{ENGINES[engine].format(**names)}\n```" for engine in build.engines]
    return "\n\n".join(["## Serve", *commands]) if commands else ""

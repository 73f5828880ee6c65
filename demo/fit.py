"""Named mixes against fits of their sizes: KL of both at the same held-out positions.

    python demo/fit.py [--folder .demo] [--to gguf] [--text FILE]     after `make demo`, whose nano it takes

Each named mix of a GGUF is made with the demo's importance matrix, those of mlx and nvfp4 without; a fit with the same,
asked for by the bytes of the mix's file or files of tensors, never has more. The source and all of them run side by
side, layer by layer (ornith_moe/streamed.py), on the windows of demo/run.py that compare importance. The weights of the
prediction (quant/fitting/loss.py) come from a nano of 200 steps and these held-out texts; a nano of 800 (`demo/run.py
--steps 800`) is one that they have not seen. With --text the weights are measured of this very nano, on that text
(ornith_moe/effects.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measure import gains, ornith_moe
from nano import Settings, heldout_tokens, quiet

from ornith_moe.compare import held_out_windows

ROOT = Path(__file__).resolve().parent.parent
WINDOWS, WINDOW_TOKENS = 64, 128
MIXES = {
    "gguf": ("gguf:Q2_K", "gguf:Q3_K_M", "gguf:Q4_K_M", "gguf:Q5_K_M"),
    "mlx": ("mlx:3", "mlx:4", "mlx:5", "mlx:6"),
    "nvfp4": ("nvfp4",),
}


def run(folder: Path, family: str, text: Path | None = None) -> list[dict[str, Any]]:
    """For each mix: bytes, KL of the mix and of the fit, predicted KL, relative change and its standard error."""
    nano = folder / "ornith-nano"
    out = folder / f"fits-{family}{'-measured' if text else ''}"
    measured = out / "sensitivity.json"
    out.mkdir(exist_ok=True)
    importance = ("--imatrix", str(folder / "imatrix" / "imatrix.gguf")) if family == "gguf" else ()
    given = (*importance, "--json")
    effects = ("--text", str(text)) if text else ()
    ornith_moe("sensitivity", str(nano), "--output", str(measured), "--types", family, *effects, *given)
    pairs, rows = {}, {}
    for mix in MIXES[family]:
        (named,) = ornith_moe("convert", str(nano), str(out), "--to", mix, *given)["builds"]
        size = _size(Path(named["path"]))
        asked = ("--to", f"{family}:fit={size}", "--sensitivity", str(measured))
        (plan,) = ornith_moe("plan", str(nano), *asked, *given)["builds"]
        (fitted,) = ornith_moe("convert", str(nano), str(out), *asked, *given)["builds"]
        predicted = {each["build"]: each["predicted_kl"] for each in plan["alternatives"]}
        pairs[mix] = Path(named["path"]), Path(fitted["path"])
        rows[mix] = {
            "mix": mix,
            "bytes": size,
            "bytes_of_fit": _size(pairs[mix][1]),
            "predicted": predicted[mix],
            "predicted_of_fit": predicted[plan["build"]],
        }
    windows = held_out_windows(heldout_tokens(nano, Settings.heldout_tokens), windows=WINDOWS, length=WINDOW_TOKENS)
    for found in gains(nano, windows, pairs):
        rows[found["build"]] |= {
            "positions": found["positions"],
            "kl": found["kl"],
            "kl_of_fit": found["kl_with_importance"],
            "change": found["change"],
            "standard_error": found["standard_error"],
        }
    return list(rows.values())


def _size(build: Path) -> int:
    """Bytes of a file, or of the files of tensors in a folder."""
    files = build.glob("*.safetensors") if build.is_dir() else [build]
    return sum(file.stat().st_size for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description="KL of named mixes and of fits of the same size.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="that of make demo")
    parser.add_argument("--to", default="gguf", choices=MIXES, help="builds of which kind")
    parser.add_argument("--text", type=Path, metavar="FILE", help="measure the weights of the prediction on this text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    quiet()
    rows = run(arguments.folder, arguments.to, arguments.text)
    if arguments.json:
        print(json.dumps({"fits": rows}, indent=2))
        return
    for row in rows:
        print(
            f"{row['mix']:11} {row['bytes']:,} bytes, KL {row['kl']:.6f} (predicted {row['predicted']:.6f}); fit "
            f"{row['bytes_of_fit']:,} bytes, KL {row['kl_of_fit']:.6f} (predicted {row['predicted_of_fit']:.6f}): "
            f"{row['change']:+.1%} +- {row['standard_error']:.1%} over {row['positions']} positions"
        )


if __name__ == "__main__":
    main()

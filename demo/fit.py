"""Named mixes against fits of their sizes: KL of both at the same held-out positions.

    python demo/fit.py [--folder .demo] [--text FILE]       after `make demo`, whose nano and importance matrix it takes

Each named mix is made with the importance matrix; a fit with the same, asked for by the bytes of the mix's file, never
has more. The source and all of them run side by side, layer by layer (ornith_moe/streamed.py), on the windows of
demo/run.py that compare importance. The weights of the prediction (quant/fitting/loss.py) come from a nano of 200 steps
and these held-out texts; a nano of 800 (`demo/run.py --steps 800`) is one that they have not seen. With --text the
weights are measured of this very nano, on that text (ornith_moe/effects.py).
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
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M")


def run(folder: Path, text: Path | None = None) -> list[dict[str, Any]]:
    """For each mix: bytes, KL of the mix and of the fit, predicted KL, relative change and its standard error."""
    nano, importance = folder / "ornith-nano", folder / "imatrix" / "imatrix.gguf"
    out = folder / ("fits-measured" if text else "fits")
    measured = out / "sensitivity.json"
    out.mkdir(exist_ok=True)
    given = ("--imatrix", str(importance), "--json")
    effects = ("--text", str(text)) if text else ()
    ornith_moe("sensitivity", str(nano), "--output", str(measured), *effects, *given)
    pairs, rows = {}, {}
    for mix in MIXES:
        (named,) = ornith_moe("convert", str(nano), str(out), "--to", f"gguf:{mix}", *given)["builds"]
        size = Path(named["path"]).stat().st_size
        asked = ("--to", f"gguf:fit={size}", "--sensitivity", str(measured))
        (plan,) = ornith_moe("plan", str(nano), *asked, *given)["builds"]
        (fitted,) = ornith_moe("convert", str(nano), str(out), *asked, *given)["builds"]
        predicted = {each["build"]: each["predicted_kl"] for each in plan["alternatives"]}
        pairs[mix] = Path(named["path"]), Path(fitted["path"])
        rows[mix] = {
            "mix": mix,
            "bytes": size,
            "bytes_of_fit": pairs[mix][1].stat().st_size,
            "predicted": predicted[f"gguf:{mix}"],
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


def main() -> None:
    parser = argparse.ArgumentParser(description="KL of named mixes and of fits of the same size, in llama.cpp.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="that of make demo")
    parser.add_argument("--text", type=Path, metavar="FILE", help="measure the weights of the prediction on this text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    quiet()
    rows = run(arguments.folder, arguments.text)
    if arguments.json:
        print(json.dumps({"fits": rows}, indent=2))
        return
    for row in rows:
        print(
            f"{row['mix']:8} {row['bytes']:,} bytes, KL {row['kl']:.6f} (predicted {row['predicted']:.6f}); fit "
            f"{row['bytes_of_fit']:,} bytes, KL {row['kl_of_fit']:.6f} (predicted {row['predicted_of_fit']:.6f}): "
            f"{row['change']:+.1%} +- {row['standard_error']:.1%} over {row['positions']} positions"
        )


if __name__ == "__main__":
    main()

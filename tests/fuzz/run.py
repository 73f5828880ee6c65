"""Hostile inputs against the command line: tests/fuzz/run.py [--corpus] [--cases N] [--seed S] [--only CLASS[:NUMBER]].

Prints how the cases of each class ended; exits 1 if one ended in anything but success, one sentence or a usage error:
a traceback, a hang over 20 s, a peak over 2.2 GiB, a file opened outside, one that was given and is another or gone, a
message over 2,000 characters. Each bad one
is printed with the arguments that repeat it. The same seed gives the same inputs.
"""

import argparse
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(tempfile.mkdtemp(prefix="ornith-fuzz-"))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{ROOT}/hub", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{ROOT}/inductor"}  # which torch makes when transformers imports it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz.corpus import CORPUS  # noqa: E402  after the variables
from fuzz.inputs import CLASSES, Inputs  # noqa: E402
from fuzz.worker import GOOD, Worker  # noqa: E402

COSTLY = {"texts": 0.25, "comparisons": 0.1}  # classes whose cases run models: their share of the cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2_000, help="in all classes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="CLASS[:NUMBER]", help="one class, or one input of it")
    parser.add_argument("--corpus", action="store_true", help="the minimised cases before them")
    asked = parser.parse_args()
    only, _, number = (asked.only or "").partition(":")
    kinds = [only] if only else list(CLASSES)
    share = {kind: COSTLY.get(kind, 1.0) for kind in kinds}
    each = asked.cases / sum(share.values())
    worker, bad = Worker(ROOT), 0
    try:
        inputs = Inputs(ROOT, worker.run)
        bad += _run_corpus(worker, inputs) if asked.corpus else 0
        for kind in kinds:
            numbers = [int(number)] if number else range(math.ceil(each * share[kind]))
            bad += _run_class(worker, inputs, asked.seed, kind, numbers, bool(number))
    finally:
        worker.close()
        shutil.rmtree(ROOT)
    return 1 if bad else 0


def _run_class(worker: Worker, inputs: Inputs, seed: int, kind: str, numbers, tell: bool) -> int:
    counts: Counter[str] = Counter()
    slowest, largest, bad = (0.0, 0), 0, 0
    for number in numbers:
        argv = inputs.make(seed, kind, number)
        found = worker.run(argv)
        counts[found["outcome"]] += 1
        slowest, largest = max(slowest, (found["seconds"], number)), max(largest, found["rss"])
        if found["outcome"] not in GOOD:
            bad += 1
            print(f"  {found['outcome'].upper()}: --seed {seed} --only {kind}:{number}: {found['text'][:300]} "
                  f"{found['where']} {found['outside'] or found['lost'] or ''}", flush=True)  # fmt: skip
        if tell:
            print(f"  ornith-moe {' '.join(word[:200] for word in argv)}\n  {found}".encode(errors="replace").decode())
    told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"{kind:12}{told}; slowest {slowest[0]:.1f} s ({slowest[1]}), peak {largest >> 20} MiB", flush=True)
    return bad


def _run_corpus(worker: Worker, inputs: Inputs) -> int:
    bad = 0
    for name, (files, words, told) in CORPUS.items():
        root = inputs.empty()
        for path, content in files.items():
            place = root / path.replace("M/", "m/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            if isinstance(content, Path):
                place.symlink_to(content)
                continue
            content, size = content if isinstance(content, tuple) else (content, None)
            place.write_bytes(content.encode() if isinstance(content, str) else content)
            if size:
                os.truncate(place, size)
        argv = [str(root / "m") if word == "M" else word.replace("W/", f"{root}/") for word in words]
        found = worker.run(argv)
        if found["outcome"] not in GOOD or told.replace("W/", f"{root}/") not in found["text"]:
            bad += 1
            print(f"  {name}: expected a sentence with {told!r}, got {found}", flush=True)
    print(f"corpus      {len(CORPUS)} cases, {bad} bad")
    return bad


if __name__ == "__main__":
    sys.exit(main())

"""What a machine without network lacks, as wheels in a folder that travels: peers, and what reads GGUF.

fetch(folder)     where there is a network: pip download, one package after the other; what is missing is said
unpack(folder)    where there is none: a wheel is an archive of what lies in site-packages, so its place is sys.path
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGES = ("gguf", "xllamacpp", "liger-kernel", "torchao")
MOST_BYTES = 64 << 20  # what a working tree may carry
PYTHON = "3.12"
PLATFORMS = [f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")]


def fetch(folder: Path) -> list[str]:
    """Download PACKAGES for Python 3.12 on Linux; a sentence about each, and about the whole if it is too large."""
    folder.mkdir(parents=True, exist_ok=True)
    for_it = ["--only-binary=:all:", "--no-deps", "--python-version", PYTHON, "--implementation", "cp"]
    for_it += [word for platform in PLATFORMS for word in ("--platform", platform)]
    said = []
    for package in PACKAGES:
        command = [sys.executable, "-m", "pip", "download", "--quiet", *for_it, "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(folder.glob(f"{package.replace('-', '_')}-*.whl"))
        if wheels:
            said.append(f"{wheels[-1].name}: {wheels[-1].stat().st_size / 1e6:.1f} MB")
        else:
            words = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            said.append(f"{package}: missing, its rows will say so ({words})")
    total = sum(path.stat().st_size for path in folder.glob("*.whl"))
    if total > MOST_BYTES:
        said.append(f"{folder}: {total >> 20} MiB, more than {MOST_BYTES >> 20} MiB travel; take one away")
    return said


def unpack(folder: Path, into: Path) -> list[str]:
    """Put the wheels of `folder`, unpacked in `into`, where this process and those that it starts look; their names."""
    found = sorted(folder.glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    if found and str(into) not in sys.path:
        sys.path.append(str(into))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(into))))
    return [wheel.name for wheel in found]

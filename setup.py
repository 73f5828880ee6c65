"""Package metadata and the mapping of three folders.

`kernels/`, `quant/` and `bench/` lie at the root, where a reader looks for them, and are shipped as
`ornith_moe.kernels`, `ornith_moe.quant` and `ornith_moe.bench`. None has an `__init__.py`: Hugging Face's `kernels`
package is imported by transformers under that bare name, and a root folder that is a regular package would shadow it.
The relative links in `ornith_moe/` let a bare checkout see what an install has; the mapping below is what an install
uses, so links may be lost on the way. What was measured, bench/results, stays at home.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "ornith_moe" / "__init__.py").read_text(encoding="utf-8")).group(1)
ROOMS = ("kernels", "quant", "bench")  # root folders shipped as sub-packages of ornith_moe

found = find_packages(str(ROOT / "ornith_moe"), exclude=[f"{room}*" for room in ROOMS])
packages = ["ornith_moe", *(f"ornith_moe.{name}" for name in found)]
package_dir = {"ornith_moe": "ornith_moe"}
for room in ROOMS:
    for name in ["", *find_namespace_packages(str(ROOT / room), exclude=["*__pycache__*", "results*"])]:
        package = ".".join(filter(None, ["ornith_moe", room, name]))
        packages.append(package)
        package_dir[package] = "/".join(filter(None, [room, name.replace(".", "/")]))

setup(
    name="ornith-moe",
    version=VERSION,
    description="MoE kernels, one quantizer and checkpoint conversion for the Ornith-1.0 family",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="ornith-moe contributors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages,
    package_dir=package_dir,
    package_data={"": ["*.json", "*.html", "py.typed"]},  # every folder of the three is a package: "" reaches all data
    include_package_data=False,
    # The oldest that work, which `make test-oldest` installs: each line is said here and nowhere else.
    install_requires=[
        "torch>=2.10",  # Tensor.grad_dtype
        "numpy>=2.0",
        "safetensors>=0.5",
        "gguf>=0.19",  # NVFP4
        "pyyaml>=5.1",  # model cards; gguf asks for it too
        "numba>=0.68.1,<1",  # that of 0.62 encodes IQ4_XS to other bytes than ggml; none between was tried
        "regex>=2025.10.22",
        "typer>=0.16",  # 0.15 takes any click, and raises in --help with today's
        "rich>=13.7",
        "xxhash>=3.4.1",
    ],
    extras_require={
        # torch's CUDA and ROCm builds bring their own. Its interpreter, which only tests use, wrote beyond its memory
        # before 3.6, and that of 3.6 needs numpy < 2.4.
        "triton": ["triton>=3.6,<4"],
        "hf": ["transformers>=5.7,<6", "accelerate>=1.1", "compressed-tensors>=0.20"],  # the latter two for FP8 builds
        "trl": ["trl>=1.16,<2", "transformers>=5.7,<6", "matplotlib>=3.8"],  # the last for the curve
        "verl": ["verl>=0.9.1,<0.10", "transformers>=5.7,<5.11", "compressed-tensors>=0.20"],  # apart from trl
        "bench": ["pytest>=8", "pytest-benchmark>=5", "matplotlib>=3.8", "jinja2>=3.1", "transformers>=5.7,<6"],
        "llama": ["xllamacpp>=2026.10.11549"],
        "mlx": ["mlx-lm[cpu]>=0.32.2"],
        "ray": ["ray>=2.40"],
        "fit": ["scipy>=1.15"],  # gguf:fit=, gguf:bpw=
        "hub": ["huggingface_hub>=1.5"],
    },
    entry_points={"console_scripts": ["ornith-moe = ornith_moe.cli:main"]},
)

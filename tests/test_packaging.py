"""The layout that DESIGN decided by experiment, kept true: what is built, what is found, what is not imported.

The reference is the checkout itself: every file of the four folders must be in the wheel, but prose and bench/results,
and nothing else. Builds use the environment's setuptools without isolation, so no network is needed. Not covered:
installing into a fresh environment with its dependencies, which `.ci/run` does before it runs these tests.
"""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ornith_moe", "kernels", "quant", "bench")
LINKS = ("ornith_moe/kernels", "ornith_moe/quant", "ornith_moe/bench")


def python(*args, cwd=ROOT, **env):
    """Output of a fresh interpreter; its stderr is in the failure message."""
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shipped_files():
    """Every file below the four folders but prose and results, under the name that an install gives it."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts and path.name[0] != ".":
                name = path.relative_to(ROOT)
                if str(name).startswith((*LINKS, "bench/results")) or path.suffix == ".md":
                    continue
                yield str(name if folder == "ornith_moe" else Path("ornith_moe") / name)


@pytest.fixture(params=["links", "links as text"])
def checkout(tmp_path, request):
    """A copy of what a build needs; "links as text" is what a zip archive or a Windows checkout makes of it."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in (*FOLDERS, "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    for link in LINKS:
        assert (copy / link).is_symlink()
        if request.param == "links as text":
            target = (copy / link).readlink()
            (copy / link).unlink()
            (copy / link).write_text(str(target))
    return copy


def build_wheel(source, out):
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


def code_files(wheel):
    return sorted(name for name in wheel.namelist() if ".dist-info/" not in name)


def test_the_wheel_holds_every_file_and_no_other(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path / "dist")
    assert code_files(wheel) == sorted(shipped_files())
    installed = tmp_path / "installed"
    wheel.extractall(installed)
    code = f"import sys; sys.path[:0] = [{str(installed)!r}]; import ornith_moe.quant.errors as e; print(e.__file__)"
    assert python("-S", "-c", code, cwd=tmp_path).strip() == str(installed / "ornith_moe/quant/errors.py")


def test_the_sdist_builds_the_same_wheel(checkout, tmp_path):
    out = tmp_path / "sdist"
    out.mkdir()
    python("-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})", cwd=checkout)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    wheel = build_wheel(out / archive.name.removesuffix(".tar.gz"), tmp_path / "dist")
    assert code_files(wheel) == sorted(shipped_files())
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


@pytest.mark.parametrize("checkout", ["links"], indirect=True)  # without them setuptools' finder has no namespaces
def test_an_editable_install_finds_the_folders(checkout, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    python("-c", f"from setuptools.build_meta import build_editable; build_editable({str(site)!r})", cwd=checkout)
    (wheel,) = site.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import site; site.addsitedir({str(site)!r}); import os, ornith_moe.quant.errors as e;"
        "import ornith_moe.kernels as k, ornith_moe.bench as b;"
        "print(os.path.realpath(e.__file__)); print(*(os.path.realpath(*m.__path__) for m in (k, b)))"
    )
    found = python("-S", "-c", code, cwd=tmp_path).split()
    assert found == [str(checkout / name) for name in ("quant/errors.py", "kernels", "bench")]


def test_a_bare_checkout_finds_the_folders():
    code = "import ornith_moe.quant.errors, ornith_moe.kernels, ornith_moe.bench; print('found')"
    assert python("-S", "-c", code) == "found\n"


@pytest.mark.parametrize("checkout", ["links"], indirect=True)
def test_metadata(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path / "dist")
    info = {name.split("/")[1]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    metadata = message_from_string(info["METADATA"])
    assert metadata["Version"] == python("-c", "import ornith_moe; print(ornith_moe.__version__)").strip()
    assert "ornith-moe = ornith_moe.cli:main" in info["entry_points.txt"]
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    for need in needs:
        if "extra" not in str(need.marker):
            assert pins[canonicalize_name(need.name)] in need.specifier, need


def test_hugging_face_kernels_wins_from_the_repo_root(tmp_path):
    package, info = tmp_path / "kernels", tmp_path / "kernels-0.18.2.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.18.2'\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    code = "import sys, kernels; assert sys.path[0] == ''; print(kernels.__file__, kernels.__version__)"
    assert python("-c", code, PYTHONPATH=str(tmp_path)).split() == [str(package / "__init__.py"), "0.18.2"]


def test_the_three_folders_are_no_regular_packages():
    assert not [name for name in FOLDERS[1:] if (ROOT / name / "__init__.py").exists()]


def test_nobody_imports_the_bare_names():
    found = []
    for folder in (*FOLDERS, "demo", "docs", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                found += [f"{path}: {name}" for name in names if name.split(".")[0] in ("kernels", "quant")]
    assert not found


HEAVY = {"torch", "triton", "transformers", "numba", "numpy", "gguf", "safetensors"}


def test_import_loads_nothing_heavy():
    code = "import sys, ornith_moe; dir(ornith_moe); print(*{m.split('.')[0] for m in sys.modules})"
    assert not HEAVY & set(python("-c", code).split())


def test_every_public_name_resolves():
    python("-c", "import ornith_moe as om\nfor name in om.__all__: getattr(om, name)")


def test_the_command_starts_without_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ornith_moe", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(command in done.stdout for command in ("plan", "convert", "verify", "inspect", "doctor"))
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "ornith_moe" in loaded and not {"torch", "triton", "transformers"} & loaded

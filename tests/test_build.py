"""The tree, the built library and setup.py: what makes `pip install -e .` work in environments other than ours."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "engine" / "_C.abi3.so"
LINKS = ("kernels", "train", "bench")

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the extension is not built")


@pytest.fixture
def build():
    """setup.py as a module; it only acts when run."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("consistentee_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source_copy(tmp_path) -> Path:
    """What a source distribution is made of, where a build may write."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("csrc", "engine", *LINKS):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "results", "runs")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- the tree ------------------------------------------------------------------------------------------------------


def test_links_lead_to_namespace_packages():
    for name in LINKS:
        link = ROOT / "engine" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would make `import {name}` ours"


def test_transformers_imports_from_the_root():
    """It looks for packages called `kernels`, and must not take our folder for one."""
    code = "import transformers.models.bert.modeling_bert"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_folder_with_python_is_a_package(build):
    found = build.packages()
    assert {"engine", "engine.kernels", "engine.train", "engine.bench"} <= set(found)
    folders = {p.parent for name in ("engine", *LINKS) for p in (ROOT / name).rglob("*.py")}
    expected = set()
    for folder in folders:
        parts = folder.relative_to(ROOT).parts
        expected.add(".".join(parts if parts[0] == "engine" else ("engine", *parts)))
    assert set(found) == expected


# --- the library ---------------------------------------------------------------------------------------------------


def dynamic(flag: str) -> str:
    tool = shutil.which("nm" if flag == "-D" else "readelf")
    if tool is None:
        pytest.skip("binutils are not installed")
    return subprocess.run([tool, flag, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


@needs_library
def test_library_serves_every_python():
    undefined = [line.split()[-1] for line in dynamic("-D").splitlines() if " U " in line]
    assert undefined and not [name for name in undefined if name.startswith(("Py", "_Py"))]
    # Nor the C++ interface of libtorch, which changes with every release: mangled names of c10, at and torch.
    assert not [
        name for name in undefined if name.startswith(("_ZN3c10", "_ZN2at", "_ZN5torch", "_ZNK3c10", "_ZNK2at"))
    ]


@needs_library
def test_library_loads_without_cuda():
    needed = [line for line in dynamic("-d").splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if "cuda" in line or "cudart" in line or "c10" in line]
    for line in dynamic("-D").splitlines():
        if "aoti_torch_get_current_cuda_stream" in line:
            assert " w " in line, "this symbol exists in CUDA builds of torch alone and must stay weak"
        # The runtime is linked statically; cudaXxx and cuXxx are its and the driver's names.
        name = line.split()[-1]
        assert not (" U " in line and name.startswith("cu")), f"{name} would have to come from CUDA at load"


@pytest.fixture
def cuda_half(build):
    """The CUDA toolkit, where the built library has a CUDA half to be looked at."""
    cuda = build.find_cuda()
    if cuda is None:
        pytest.skip("nvcc was not found")
    if "consistentee_cuda_versions" not in exported():
        pytest.skip("the extension was built without CUDA")
    return cuda


def exported() -> set[str]:
    return {line.split()[-1] for line in dynamic("-D").splitlines() if " T " in line}


@needs_library
def test_library_exports_what_is_declared(cuda_half):
    """The C functions that ctypes calls: attention, graphs, norms, products and the tokens of a batch."""
    for name in ("attention", "graph", "norm_rows", "product", "token_rows"):
        text = (ROOT / f"csrc/include/{name}.h").read_text()
        declared = set(re.findall(rf"^EE_EXPORT .*?\b(consistentee_{name}\w*)\(", text, re.MULTILINE))
        assert declared and declared <= exported(), declared - exported()


@needs_library
def test_library_holds_code_for_every_architecture(build, cuda_half, tmp_path):
    """What setup.py asks nvcc for: code of every architecture, of Hopper alone too, and PTX for what comes after."""
    folders = [Path(cuda_half.nvcc).parent, *(parent / "bin" for parent in cuda_half.library.parents)]
    triton = importlib.util.find_spec("triton")  # which brings one
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    tool = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    if tool is None:
        pytest.skip("there is no cuobjdump beside nvcc")

    def listed(option: str) -> list[str]:
        done = subprocess.run([tool, option, str(LIBRARY)], capture_output=True, text=True, check=True)
        return re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)$", done.stdout, re.MULTILINE)

    def asked(flags, code: str) -> set[str]:
        return {flag.rpartition(f"code={code}_")[2] for flag in flags if f"code={code}_" in flag}

    usual, special = build.CUDA_ARCHS, [flag for flags in build.ARCH_SPECIFIC.values() for flag in flags]
    assert asked(usual, "sm") == {"80", "90"} and asked(special, "sm") == {"90a"}
    # A cuobjdump older than nvcc calls 90a 90 in its lists; the code itself says it.
    assert {name.rstrip("a") for name in listed("--list-elf")} == {f"sm_{arch}" for arch in asked(usual, "sm")}
    assert set(listed("--list-ptx")) == {f"sm_{arch}" for arch in asked(usual, "compute")}
    subprocess.run([tool, "--extract-elf", "all", str(LIBRARY)], cwd=tmp_path, capture_output=True, check=True)
    code = list(tmp_path.glob("*.cubin"))
    for arch in asked(special, "sm"):
        assert [path for path in code if f"sm_{arch}" in path.name or f"sm_{arch}".encode() in path.read_bytes()]


# --- setup.py ------------------------------------------------------------------------------------------------------


def test_torch_is_found_without_importing_it(build):
    folder = build.find_torch()
    assert (folder / "include/torch/csrc/stable/library.h").exists()


def test_missing_torch_is_one_sentence(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "search_paths", lambda: [str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^torch is not installed in this environment; pip install torch==2.13.0 fir"):
        build.find_torch()
    # An editable install says so while pip asks for metadata, before it would download torch; nothing else does.
    calls = []
    monkeypatch.setattr(build, "setup", lambda **metadata: calls.append(metadata["name"]))
    monkeypatch.setattr(sys, "orig_argv", ["python", "hook.py", "prepare_metadata_for_build_wheel"])
    build.main()
    assert calls == ["consistentee"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "hook.py", "prepare_metadata_for_build_editable"])
    with pytest.raises(SystemExit, match="torch is not installed"):
        build.main()
    monkeypatch.setenv("CONSISTENTEE_SKIP_EXTENSION", "1")
    build.main()
    assert calls == ["consistentee"] * 2


def test_old_torch_names_its_version(build, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.4.1'\n")
    monkeypatch.setattr(build, "search_paths", lambda: [str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^torch 2.4.1 is too old for the extension, which needs 2.10"):
        build.find_torch()


def test_nvcc_may_be_a_wrapper(build, monkeypatch, tmp_path):
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64/libcudart_static.a").touch()
    wrapper = tmp_path / "bin/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ _SPACE_= ' >&2\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    for name in ("CUDA_HOME", "CUDA_PATH", "CONSISTENTEE_SKIP_CUDA"):
        monkeypatch.delenv(name, raising=False)
    assert build.find_cuda() == build.Cuda(str(wrapper), toolkit / "lib64")
    monkeypatch.setenv("CONSISTENTEE_SKIP_CUDA", "1")
    assert build.find_cuda() is None


@pytest.mark.parametrize("cuda", [False, True])
def test_without_nvcc_the_cpu_half_is_built_with_one_warning(build, monkeypatch, tmp_path, capfd, cuda):
    from setuptools import Distribution, Extension

    commands, steps = [], []
    monkeypatch.setattr(build, "find_cuda", lambda: build.Cuda("nvcc", tmp_path) if cuda else None)
    monkeypatch.setattr(build, "compile_all", lambda made, objects: steps.extend(made))
    monkeypatch.setattr(build, "execute", commands.append)
    command = build.BuildExtension(Distribution({"name": "consistentee"}))
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    command.extensions = [Extension("engine._C", sources=build.sources())]
    command.build_extension(command.extensions[0])
    warnings = [line for line in capfd.readouterr().err.splitlines() if "nvcc" in line]
    sentence = "nvcc with libcudart_static.a not found: building the extension for the CPU only"
    assert warnings == ([] if cuda else [sentence])
    assert {step.source.suffix for step in steps} == ({".cpp", ".cu"} if cuda else {".cpp"})
    assert ("-lcudart_static" in commands[0]) == cuda
    assert all(("-DCONSISTENTEE_WITH_CUDA" in step.command) == cuda for step in steps if step.source.suffix == ".cpp")
    assert not [flag for step in steps for flag in step.command if "march" in flag or "mtune" in flag]
    assert str(tmp_path / "engine/_C.abi3.so") in commands[0]


def test_only_what_changed_is_compiled(build, tmp_path):
    source, header, target = (tmp_path / name for name in ("a.cpp", "a.h", "a.o"))
    for path in (source, header, target):
        path.touch()
    step = build.Step(source, target, ["c++", "-c", "a.cpp"])
    assert build.is_stale(step)  # nothing recorded yet
    (tmp_path / "a.o.d").write_text(f"{target}: {source} \\\n {header}\n")
    (tmp_path / "a.o.command").write_text("c++ -c a.cpp")
    assert not build.is_stale(step)
    assert build.is_stale(step._replace(command=["c++", "-g", "-c", "a.cpp"]))
    os.utime(header, (target.stat().st_mtime + 10,) * 2)
    assert build.is_stale(step)


def test_extension_can_be_skipped(source_copy):
    pytest.importorskip("setuptools")
    done = run_setup(source_copy, "build_ext", "--inplace", CONSISTENTEE_SKIP_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    assert "no extension, the torch twins serve everything" in done.stdout
    assert not list(source_copy.rglob("*.so"))


def test_source_distribution_is_complete(source_copy):
    pytest.importorskip("setuptools")
    done = run_setup(source_copy, "sdist", "--dist-dir", "dist")
    assert done.returncode == 0, done.stderr
    (archive,) = (source_copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    csrc = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert csrc <= names, csrc - names
    linked = {f"engine/{p.relative_to(ROOT)}" for name in LINKS for p in (ROOT / name).rglob("*.py")}
    assert linked <= names, linked - names
    assert {"setup.py", "pyproject.toml", "LICENSE", "engine/__init__.py"} <= names

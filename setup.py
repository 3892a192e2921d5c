"""Packages, dependencies, and the build of the one compiled extension, ``engine/_C.abi3.so``.

The extension uses LibTorch's stable ABI: one file serves the CPU and CUDA, every Python, and torch >= 2.10. Torch is
found without importing it, in the environment that runs pip, so that plain ``pip install -e .`` works with build
isolation and downloads nothing. Switches (environment variables):

    CONSISTENTEE_SKIP_EXTENSION=1   no extension: the torch twins serve everything
    CONSISTENTEE_SKIP_CUDA=1        CPU half only, though nvcc is there
    CXX, CUDA_HOME                  compiler and toolkit to use
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_TARGET = "0x020a000000000000"  # stable ABI of torch 2.10
CUDA_ARCHS = (
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",  # PTX for what comes after
)
# Files named so use instructions that one architecture alone has; who calls them asks for the device first.
ARCH_SPECIFIC = {"sm90a": ("-gencode=arch=compute_90a,code=sm_90a",)}
NO_TORCH = "torch is not installed in this environment; pip install torch==2.13.0 first"


def switched_on(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


# --- what is in the package ----------------------------------------------------------------------------------------


def packages() -> list[str]:
    """Every folder below engine/ that holds Python files; kernels, train and bench are reached through links."""
    found = []
    for folder, _, files in os.walk(ROOT / "engine", followlinks=True):
        if any(name.endswith(".py") for name in files):
            found.append(".".join(Path(folder).relative_to(ROOT).parts))
    return sorted(found)


def sources() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in ("*.cpp", "*.cu") for p in CSRC.rglob(pattern))


def headers() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in ("*.h", "*.cuh", "*.inc") for p in CSRC.rglob(pattern))


# --- what is on the machine ----------------------------------------------------------------------------------------


def search_paths() -> list[str]:
    """Where the interpreter that asked for the build finds packages, build isolation or not."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE is not False:
        paths.append(site.getusersitepackages())
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.exists() and re.search(r"include-system-site-packages\s*=\s*true", config.read_text(), re.IGNORECASE):
        paths += site.getsitepackages([sys.base_prefix])
    return paths


def find_torch() -> Path:
    """Torch's folder. Never imports it: the isolated build has none of its dependencies."""
    spec = PathFinder.find_spec("torch", search_paths())
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(NO_TORCH)
    folder = Path(list(spec.submodule_search_locations)[0])
    if not (folder / "include/torch/csrc/stable/accelerator.h").exists():
        version = re.search(r"__version__ = '([^']*)'", (folder / "version.py").read_text())
        raise SystemExit(
            f"torch {version.group(1) if version else '(unknown version)'} is too old for the extension, which needs "
            "2.10; pip install torch==2.13.0 first, or set CONSISTENTEE_SKIP_EXTENSION=1"
        )
    return folder


class Cuda(NamedTuple):
    nvcc: str
    library: Path  # folder of libcudart_static.a


def find_cuda() -> Cuda | None:
    """nvcc and its toolkit. nvcc may be a script that calls the real one, so it is asked where its toolkit is."""
    if switched_on("CONSISTENTEE_SKIP_CUDA"):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", said.stderr + said.stdout, re.MULTILINE)
    folder = Path(top.group(1).strip().strip('"')) if top else Path(nvcc).resolve().parent.parent
    for library in (folder / "lib64", *sorted(folder.glob("targets/*/lib")), folder / "lib"):
        if (library / "libcudart_static.a").exists():
            return Cuda(nvcc, library.resolve())
    return None


# --- the build -----------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    source: Path
    object: Path
    command: list[str]


class BuildExtension(build_ext):
    """Compiles csrc/ with ninja where there is one, with a few threads otherwise, and links one library."""

    def run(self):
        if switched_on("CONSISTENTEE_SKIP_EXTENSION"):
            print("CONSISTENTEE_SKIP_EXTENSION is set: no extension, the torch twins serve everything")
            self.extensions = []
        super().run()

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".abi3.so"  # also for interpreters whose own list lacks abi3

    def build_extension(self, ext):
        torch = find_torch()
        cuda = find_cuda()
        if cuda is None and not switched_on("CONSISTENTEE_SKIP_CUDA"):
            print("nvcc with libcudart_static.a not found: building the extension for the CPU only", file=sys.stderr)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Kept between builds, unlike pip's own temporary folder, so that a rebuild compiles only what changed.
        objects = ROOT / "build" / f"extension-{sysconfig.get_platform()}"
        objects.mkdir(parents=True, exist_ok=True)
        steps = [self.compile_step(ROOT / source, objects, torch, cuda) for source in ext.sources]
        steps = [step for step in steps if step is not None]
        compile_all(steps, objects)
        link = [
            *(cxx(), "-shared", "-s", *(str(step.object) for step in steps), "-o", str(target)),
            *(f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"),
            "-Wl,--exclude-libs,ALL",
        ]
        if cuda is not None:
            link += [f"-L{cuda.library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        execute(link)

    @staticmethod
    def compile_step(source: Path, objects: Path, torch: Path, cuda: Cuda | None) -> Step | None:
        name = "-".join(source.relative_to(CSRC).parts)
        target = objects / f"{name}.o"
        common = ["-O3", "-std=c++17", f"-I{CSRC / 'include'}"]
        output = ["-MMD", "-MF", f"{target}.d", "-c", str(source), "-o", str(target)]
        if source.suffix == ".cu":
            if cuda is None:
                return None
            host = ["-ccbin", cxx()] if os.environ.get("CXX") else []
            host.append("-Xcompiler=-fPIC,-fvisibility=hidden")
            archs = ARCH_SPECIFIC.get(source.stem.rpartition("_")[2], CUDA_ARCHS)
            return Step(source, target, [cuda.nvcc, *common, *archs, *host, *output])
        flags = ["-fPIC", "-fvisibility=hidden", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        flags += [f"-I{CSRC / 'cpu'}", f"-isystem{torch / 'include'}"]
        flags += [f"-ffile-prefix-map={folder}/=" for folder in (ROOT, torch.parent)]  # no paths of this machine inside
        if cuda is not None:
            flags.append("-DCONSISTENTEE_WITH_CUDA")
        return Step(source, target, [cxx(), *common, *flags, *output])


def cxx() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or "c++"


def execute(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise SystemExit(f"the extension did not build; failed command:\n  {shlex.join(command)}\n{done.stdout}")


def find_ninja() -> str | None:
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def compile_all(steps: list[Step], objects: Path) -> None:
    ninja = find_ninja()
    if ninja is not None:
        (objects / "build.ninja").write_text(ninja_file(steps))
        done = subprocess.run([ninja, "-C", str(objects)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"the extension did not build\n{done.stdout}{done.stderr}")
        return
    stale = [step for step in steps if is_stale(step)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(compile_one, stale))


def ninja_file(steps: list[Step]) -> str:
    def escape(path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule compile", "  command = $call", "  depfile = $out.d", "  deps = gcc", ""]
    for step in steps:
        lines.append(f"build {escape(step.object)}: compile {escape(step.source)}")
        lines.append("  call = " + shlex.join(step.command).replace("$", "$$"))
    return "\n".join(lines) + "\n"


def compile_one(step: Step) -> None:
    execute(step.command)
    Path(f"{step.object}.command").write_text(shlex.join(step.command))


def is_stale(step: Step) -> bool:
    """Whether the object is older than a file it came from, or came from another command."""
    record, depfile = Path(f"{step.object}.command"), Path(f"{step.object}.d")
    if not (step.object.exists() and record.exists() and depfile.exists()):
        return True
    if record.read_text() != shlex.join(step.command):
        return True
    built = step.object.stat().st_mtime
    _, _, depends = depfile.read_text().partition(":")
    files = shlex.split(depends.replace("\\\n", " "))
    return any(not Path(file).exists() or Path(file).stat().st_mtime > built for file in files)


def main() -> None:
    # pip resolves, and would download torch, before it builds. For an editable install, which needs the extension
    # now, the missing torch is therefore said while pip asks for the metadata. Everything else that asks for metadata
    # (egg_info, sdist, dist_info, lock files) works without torch.
    editable = "prepare_metadata_for_build_editable" in sys.orig_argv
    if editable and not switched_on("CONSISTENTEE_SKIP_EXTENSION"):
        find_torch()
    readme = ROOT / "README.md"
    setup(
        name="consistentee",
        version="0.1.0",
        description="Early-exit transformer inference: rows leave at the layer where their policy says so",
        long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        python_requires=">=3.10",
        packages=packages(),
        package_data={"": ["*.json", "*.jsonl", "**/*.json", "**/*.jsonl.gz", "**/*.csv", "py.typed"]},
        ext_modules=[Extension("engine._C", sources=sources(), depends=headers(), py_limited_api=True)],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
        entry_points={"console_scripts": ["consistentee = engine.cli:main"]},
        install_requires=[
            "torch>=2.10",
            "numpy>=1.26",
            "transformers>=5.0",
            "peft>=0.15",
            "safetensors>=0.4.5",
            "huggingface_hub>=1.0",
            "tokenizers>=0.21",
            "typer>=0.12",
            "rich>=13.0",
            "tqdm>=4.66",
        ],
        extras_require={
            "train": ["datasets>=3.0"],
            "bench": ["matplotlib>=3.8", "onnx>=1.16", "onnxruntime>=1.18", "pytest-benchmark>=4.0"],
            "quality": ["rouge-score>=0.1.2", "bert-score>=0.3.13", "matplotlib>=3.8"],
            # gguf: SmolLM2's package carries its weights in that form.
            "test": ["pytest>=8.0", "pytest-benchmark>=4.0", "pytest-xdist>=3.6", "hypothesis>=6.100", "gguf>=0.17"],
            "gpu": ["triton>=3.5; platform_system == 'Linux'"],
        },
        zip_safe=False,
    )


if __name__ == "__main__":
    main()

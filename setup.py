"""Builds the compiled ops on PyTorch's stable ABI, one binary for every torch >= 2.11 and every Python >= 3.11:

    fastlora/_C.so        csrc/cpu by a C++ compiler, kernels once per instruction set and chosen at run time
    fastlora/_C_cuda.so   csrc/cuda by nvcc, for sm_80, sm_90a and sm_100, and as PTX for later GPUs; no GPU needs to be there

torch's headers and nvcc are found on disk without importing torch, since pip's isolated build environment hides site-packages. What
cannot be built is left out, and `python -m fastlora.doctor` says what that costs.

    CXX=clang++                      another compiler
    NVCC=/path/to/nvcc               else that of CUDA_HOME, of PATH, of pip (nvidia-cuda-nvcc); empty: no fastlora/_C_cuda.so
    FASTLORA_REQUIRE_EXTENSION=1     fail instead of installing without fastlora/_C.so
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SITE = [Path(folder) for folder in (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path) if folder]
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O3", "-Icsrc"]
CXX_FLAGS = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
VARIANTS = {
    "x86_64": {
        "generic": ["-march=x86-64"],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
    }
}.get(platform.machine(), {"generic": []})
"""Instruction set -> its flags; csrc/cpu/variant.h chooses among them by what the processor has."""


def find_nvcc() -> str | None:
    """As above."""
    if "NVCC" in os.environ:
        return shutil.which(os.environ["NVCC"])
    of_home = f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"
    of_pip = [str(path) for site in SITE for path in sorted(site.glob("nvidia/cu*/bin/nvcc"))]
    return next((found for path in (of_home, "nvcc", *of_pip) if (found := shutil.which(path))), None)


def cpp_jobs(compiler: str, sources: list[str], headers: Path) -> dict[str, list[str]]:
    """Object file -> command: the kernels of each source once per instruction set, its bindings once (csrc/cpu/variant.h)."""
    kinds = {f".{variant}.o": [*flags, f"-DVARIANT={variant}"] for variant, flags in VARIANTS.items()}
    kinds[".o"] = [STABLE_ABI, f"-I{headers}", *(f"-DHAS_{variant.upper()}" for variant in VARIANTS)]
    return {Path(s).stem + kind: [compiler, *FLAGS, *CXX_FLAGS, *flags, s] for s in sources for kind, flags in kinds.items()}


def cuda_jobs(compiler: str, sources: list[str], headers: Path) -> dict[str, list[str]]:
    """Object file -> command; architectures that this nvcc does not know are left out, the newest comes as PTX too."""
    known = subprocess.check_output([compiler, "--list-gpu-code"], text=True).split()
    chosen = [a for a in ("80", "90a", "100") if f"sm_{a.rstrip('a')}" in known]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen] + [f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]
    flags = [*FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", STABLE_ABI, f"-I{headers}", "--threads=0", *codes]
    return {f"{Path(s).stem}.cu.o": [compiler, *flags, s] for s in sources}


class BuildExtension(build_ext):
    """The sources of an extension in parallel, then one link."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no CPython tag: it is not a Python module

    def build_extension(self, extension: Extension) -> None:
        cuda = extension.name.endswith("_cuda")
        compiler = find_nvcc() if cuda else shutil.which(CXX)
        headers = next((p for site in SITE if (p := site / "torch/include") and (p / "torch/csrc/stable/library.h").exists()), None)
        if headers is None or compiler is None:
            message = f"fastlora: {('nvcc' if cuda else f'the compiler {CXX}') if headers else 'torch headers (torch >= 2.11)'} not found"
            if os.environ.get("FASTLORA_REQUIRE_EXTENSION") == "1" and not cuda:
                raise SystemExit(message)
            print(f"{message}; installing without {extension.name} (see python -m fastlora.doctor)", file=sys.stderr)
            return
        folder, target = Path(self.build_temp), Path(self.get_ext_fullpath(extension.name))
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = (cuda_jobs if cuda else cpp_jobs)(compiler, extension.sources, headers)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # of compilers
            list(pool.map(subprocess.check_call, ([*command, "-c", "-o", str(folder / name)] for name, command in jobs.items())))
        link = [compiler, "-shared", *(str(folder / name) for name in jobs), "-o", str(target), f"-L{headers.parent / 'lib'}"]
        link += [f"-L{Path(compiler).parent.parent / 'lib'}", "-cudart=static"] if cuda else []  # pip's nvcc does not know its lib
        options = [f"-Xlinker={o}" if cuda else f"-Wl,{o}" for o in ("--no-as-needed", "--exclude-libs=ALL", "-s")]
        subprocess.check_call([*link, *options, "-ltorch", "-ltorch_cpu", "-lc10"])


SOURCES = {"fastlora._C": "cpu/*.cpp", "fastlora._C_cuda": "cuda/*.cu"}
extensions = [Extension(name, sorted(map(str, Path("csrc").glob(sources)))) for name, sources in SOURCES.items()]
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})

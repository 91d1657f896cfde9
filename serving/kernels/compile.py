"""Builds the native kernels once for this machine and finds them again afterwards.

The shared object lies in `$LECTERN_HOME/cache/native` (or `~/.cache/lectern/native`), named after a
hash of the sources, the compiler, its flags and the processor's features. It is written under a
lock and moved into place whole, so processes that start together build it once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CompileError", "build", "cache_folder", "find_compiler", "processor_features"]

SOURCES = Path(__file__).parent / "native"
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=off", "-w"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
    "-mtune=native",
)
COMPILE_SECONDS = 300


class CompileError(Exception):
    """The native kernels cannot be built here; the message says why, in one sentence."""


def processor_features() -> frozenset[str]:
    """The feature names that Linux lists for this processor; empty where it lists none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def find_compiler() -> str | None:
    """The C++ compiler named by `CXX`, or the first usual one on the path."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def cache_folder() -> Path:
    """Where built objects are kept."""
    home = os.environ.get("LECTERN_HOME")
    if home:
        return Path(home).expanduser() / "cache" / "native"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lectern" / "native"


def build() -> Path:
    """The shared object for this machine, built if it is not there yet.

    Raises CompileError where the processor, the compiler or the folder does not allow it.
    """
    features = processor_features()
    if missing := sorted(NEEDED - features):
        raise CompileError(f"the processor has no {', '.join(missing)}")
    compiler = find_compiler()
    if compiler is None:
        raise CompileError("there is no C++ compiler (install g++, or name one in CXX)")
    folder = cache_folder()
    target = folder / f"kernels-{_fingerprint(compiler, features)}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder / "lock"):
            if not target.is_file():
                _compile(compiler, target)
    except OSError as error:
        raise CompileError(f"{folder} cannot be written ({error.strerror})") from error
    return target


def _fingerprint(compiler: str, features: frozenset[str]) -> str:
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"{compiler} does not run") from error
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for part in (compiler.encode(), version, *(f.encode() for f in (*FLAGS, *sorted(features)))):
        digest.update(part + b"\0")
    return digest.hexdigest()[:24]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, target: Path) -> None:
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, str(SOURCES / "kernels.cpp"), "-o", temporary]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"{compiler} took over {COMPILE_SECONDS} s") from error
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if "error" in line]
            reason = (lines or result.stderr.splitlines() or ["no message"])[0].strip()
            raise CompileError(f"{compiler} failed: {reason}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)

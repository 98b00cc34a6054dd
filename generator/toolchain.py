"""Turns what is installed into the tools and libraries that a build uses, with their versions."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from itertools import product
from pathlib import Path

from pa_ops.errors import PaOpsError

from . import nvrtc
from .language import Language

DSL_PACKAGE = "nvidia_cutlass_dsl"
CUDA_MAJORS = (12, 13)


class ToolchainError(PaOpsError):
    """A tool that a build needs is not installed; the text names it and the way to get it."""


@dataclass(frozen=True)
class Missing:
    """What a search found nothing for, and what would help."""

    what: str
    remedy: str

    def error(self) -> ToolchainError:
        """The exception that says so."""
        return ToolchainError(f"{self.what} not found; {self.remedy}")


NO_DSL = Missing("the CuTe DSL", "pip install nvidia-cutlass-dsl==4.8.1")
NO_NVRTC = Missing("NVRTC", "pip install nvidia-cuda-nvrtc-cu12, or set CUDA_HOME to a CUDA toolkit")
OLDER_NVRTC = "pip install 'nvidia-cuda-nvrtc-cu12>=12.9,<13', which knows every SM from 5.0 on"
NO_TVM_FFI = Missing("tvm-ffi", "pip install apache-tvm-ffi")
NO_COMPILER = Missing("a C compiler", "install gcc or clang, or name one in CC")
NO_STRIP = Missing("strip", "install binutils")
NO_NINJA = Missing("ninja", "pip install ninja")


def package_folders(name: str) -> list[Path]:
    """The folders of a package: several where it is a namespace that several distributions share."""
    spec = importlib.util.find_spec(name)
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec is not None else []


def _package_folder(name: str) -> Path | None:
    return next(iter(package_folders(name)), None)


def _first(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _program(names: Iterable[str]) -> Path | None:
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    return Path(found) if found else None


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _need(value: Path | None, missing: Missing) -> Path:
    if value is None:
        raise missing.error()
    return value


class Toolchain:
    """The tools of this environment, each looked for when first asked for; a missing one raises ToolchainError."""

    @cached_property
    def dsl(self) -> Path:
        """The folder of the DSL package."""
        return _need(_package_folder(DSL_PACKAGE), NO_DSL)

    @cached_property
    def dsl_version(self) -> str:
        """The DSL's own version, read without importing it (an import takes a second)."""
        text = (self.dsl / "dsl_packages" / "cutlass" / "__init__.py").read_text(encoding="utf-8")
        match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
        return match[1] if match else _version_of("nvidia-cutlass-dsl")

    @cached_property
    def dsl_cuda(self) -> str:
        """The folder of the CUDA generation whose compiler the DSL carries: cu12 or cu13."""
        return next((f"cu{major}" for major in CUDA_MAJORS if (self.dsl / f"cu{major}").is_dir()), "unknown")

    @cached_property
    def nvrtc(self) -> Path:
        """CUDA's run-time compiler; that of CUDA 12 where there is a choice, because it knows every SM."""
        return _need(_first(self._nvrtcs()), NO_NVRTC)

    def _nvrtcs(self) -> Iterator[Path]:
        wheels = {12: "cuda_nvrtc", 13: "cu13"}
        for major in CUDA_MAJORS:
            for nvidia in package_folders("nvidia"):
                yield nvidia / wheels[major] / "lib" / f"libnvrtc.so.{major}"
        for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
            for lib, major in product(("lib64", "targets/x86_64-linux/lib", "lib"), CUDA_MAJORS):
                if home:
                    yield Path(home) / lib / f"libnvrtc.so.{major}"

    @cached_property
    def nvrtc_version(self) -> str:
        """NVRTC's version, as it tells it."""
        return nvrtc.version(self.nvrtc)

    @cached_property
    def nvrtc_sms(self) -> frozenset[int]:
        """SM numbers that NVRTC compiles for."""
        return nvrtc.sms(self.nvrtc)

    @cached_property
    def tvm_ffi_library(self) -> Path:
        """libtvm_ffi.so, which products link against and which import tvm_ffi loads."""
        folder = _need(_package_folder("tvm_ffi"), NO_TVM_FFI)
        return _need(_first((folder / "lib" / "libtvm_ffi.so", folder / "libtvm_ffi.so")), NO_TVM_FFI)

    @cached_property
    def tvm_ffi_includes(self) -> tuple[Path, ...]:
        """The folders of tvm-ffi's and DLPack's C headers."""
        folder = _need(_package_folder("tvm_ffi"), NO_TVM_FFI)
        return tuple(path for path in (folder / "include", folder / "3rdparty" / "dlpack" / "include") if path.is_dir())

    @cached_property
    def compiler(self) -> Path:
        """The C compiler that makes the product of the C sources and the cubins (as C++, they are not valid)."""
        return _need(_program((os.environ.get("CC", ""), "gcc", "clang", "cc")), NO_COMPILER)

    @cached_property
    def compiler_version(self) -> str:
        """The first line of the C compiler's --version."""
        run = subprocess.run([self.compiler, "--version"], capture_output=True, text=True, check=True)
        return run.stdout.splitlines()[0].strip()

    @cached_property
    def strip(self) -> Path:
        """The program that removes local symbols."""
        return _need(_program(("strip", "llvm-strip")), NO_STRIP)

    @cached_property
    def ninja(self) -> Path:
        """The ninja of this environment's own package, else the system's."""
        beside = Path(sys.executable).parent / "ninja"
        return _need(beside if beside.is_file() else _program(("ninja",)), NO_NINJA)

    @property
    def compile_versions(self) -> dict[Language, dict[str, str]]:
        """What decides the bytes of an object, by the language of its source."""
        return {
            Language.CUTE: {"cutlass_dsl": self.dsl_version, "cuda": self.dsl_cuda},
            Language.CUDA: {"nvrtc": self.nvrtc_version},
        }

    @property
    def versions(self) -> dict[str, str]:
        """What a manifest records: the compilers of objects and library."""
        return {
            **{tool: version for tools in self.compile_versions.values() for tool, version in tools.items()},
            "cc": self.compiler_version,
            "tvm_ffi": _version_of("apache-tvm-ffi"),
        }


PARTS: Mapping[str, Callable[[Toolchain], object]] = {
    "CuTe DSL": lambda tools: tools.dsl_version,
    "NVRTC": lambda tools: f"{tools.nvrtc} ({tools.nvrtc_version})",
    "tvm-ffi": lambda tools: tools.tvm_ffi_library,
    "C compiler": lambda tools: f"{tools.compiler} ({tools.compiler_version})",
    "strip": lambda tools: tools.strip,
    "ninja": lambda tools: tools.ninja,
}


def examine(tools: Toolchain) -> Iterator[tuple[str, bool, str]]:
    """(part, works, detail or remedy) of every tool, for pa-ops doctor."""
    for part, probe in PARTS.items():
        try:
            yield part, True, str(probe(tools))
        except ToolchainError as error:
            yield part, False, str(error)

"""Turns the rendered sources of one shard into cubins and their facts, in one process that imports the DSL once.

Run by path with a request file, so that it needs neither an installed package nor torch: the package pa_ops is
entered bare, for its device modules and what compiles them. Importing the DSL costs about a second of a core, an
attention instance one to two; CUDA C++ needs no import and 0.2 s an instance. An instance that fails leaves its reason
beside the objects and the others still compile.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

_PR_SET_PDEATHSIG = 1

Facts = dict[str, Any]


def _die_with_parent() -> None:
    """Let a killed build take its workers along: an orphan could write beside the next build's workers."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _enter_bare(packages: Mapping[str, str]) -> None:
    """Make packages importable by folder without running their __init__ (pa_ops's own imports torch, 2 s)."""
    for name, folder in packages.items():
        module = ModuleType(name)
        module.__path__ = [folder]
        sys.modules[name] = module


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python source")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send everything printed, also by native code, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in zip((1, 2), kept, strict=True):
                os.dup2(original, number)
                os.close(original)


def _from_dsl(name: str, source: Path, request: Mapping[str, Any]) -> bytes:
    """The cubin of a CuTe DSL source."""
    module = _load(name, source)
    if name != module.NAME:
        raise ValueError(f"the source is named {module.NAME}")
    image: bytes = module.cubin(request["target"])
    return image


def _from_cuda(name: str, source: Path, request: Mapping[str, Any]) -> bytes:
    """The cubin, or PTX, of a CUDA C++ source."""
    nvrtc = import_module("pa_ops.generator.nvrtc")
    image: bytes = nvrtc.compile_image(request["nvrtc"], source, request["target"], Path(request["include"]))
    return image


COMPILERS = {".py": _from_dsl, ".cu": _from_cuda}


def _facts(image: bytes, target: str, cubin: ModuleType) -> Sequence[Any]:
    """What the compiler says of each kernel of an image."""
    ptx = import_module("pa_ops.generator.ptx")
    if ptx.is_target(target):
        return [cubin.KernelFacts(**facts) for facts in ptx.read_facts(image)]
    return tuple(cubin.read_facts(image))


def _chaining() -> ModuleType:
    """The device module that tells which targets' launches overlap; known when packages are."""
    return importlib.import_module("pa_ops.templates.device.chaining")


def _compile(instance: Mapping[str, Any], request: Mapping[str, Any], temporary: Path, cubin: ModuleType) -> Facts:
    """Compile one instance into `temporary`; returns its manifest row, and what a launch of it has to know."""
    name, target, source = instance["name"], request["target"], Path(instance["source"])
    began = time.perf_counter()
    image = COMPILERS[source.suffix](name, source, request)
    seconds = time.perf_counter() - began
    temporary.write_bytes(image)
    (kernel,) = _facts(image, target, cubin)
    if not cubin.is_code_for(kernel.target, target):
        raise ValueError(f"the compiler made code for {kernel.target}, not for {target}")
    if kernel.argument_bytes != instance["arguments"]:
        raise ValueError(f"the kernel takes {kernel.argument_bytes} B, its record has {instance['arguments']} B")
    row = {
        "name": name,
        "digest": instance["digest"],
        "target": target,
        "code_targets": [target],
        "smem_bytes": instance["smem_bytes"] + kernel.static_smem_bytes,
        "registers": kernel.registers,
        "spill_bytes": kernel.frame_bytes,
        "stack_bytes": kernel.frame_bytes,
        "object_bytes": len(image),
        "compile_seconds": round(seconds, 3),
    }
    launch = {
        "entry": kernel.entry,
        "threads": instance["threads"],
        "smem": instance["smem_bytes"],
        "arguments": kernel.argument_bytes,
        "chained": int(_chaining().is_chained(target)),
        "cluster": instance["cluster"],
    }
    return {"row": row, "launch": launch, "image_sha256": hashlib.sha256(image).hexdigest()}


def _publish(instance: Mapping[str, Any], temporary: Path, facts: Mapping[str, Any]) -> None:
    """Object first, facts last: facts on disk mean that the object beside them is whole and of that digest."""
    path = Path(instance["facts"])
    path.unlink(missing_ok=True)
    os.replace(temporary, instance["object"])
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    draft.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _one(instance: Mapping[str, Any], request: Mapping[str, Any], path: str, cubin: ModuleType) -> bool:
    """Compile and publish one instance, or write down why not."""
    temporary = Path(f"{instance['object']}.{os.getpid()}.part")
    log = Path(instance["log"])
    failure = Path(instance["failure"])
    try:
        with _output_to(log):
            facts = _compile(instance, request, temporary, cubin)
        _publish(instance, temporary, facts)
    except Exception:
        words = log.read_text(encoding="utf-8", errors="replace") + traceback.format_exc()
        command = f"{sys.executable} {__file__} {path} --only {instance['name']}"
        draft = failure.with_name(f"{failure.name}.{os.getpid()}.part")
        draft.write_text(json.dumps({"command": command, "output": words}), encoding="utf-8")
        os.replace(draft, failure)
        temporary.unlink(missing_ok=True)
        return False
    finally:
        log.unlink(missing_ok=True)
    return True


def main(arguments: list[str]) -> int:
    """Compile the instances of a request file (all, or those named after --only); 0 when every one did."""
    _die_with_parent()
    path, *rest = arguments
    only = set(rest[1:]) if rest[:1] == ["--only"] else None
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    _enter_bare(request["packages"])
    cubin = import_module("pa_ops.generator.cubin")
    wanted = [instance for instance in request["instances"] if only is None or instance["name"] in only]
    compiled = [_one(instance, request, path, cubin) for instance in wanted]
    return 0 if all(compiled) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

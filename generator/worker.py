"""Turns the rendered sources of one shard into objects and their facts, in one process that imports the DSL once.

Run by path with a request file, so that it needs neither an installed package nor torch: the package pa_ops is
entered bare, for its device modules alone. Importing the DSL and warming it up costs about 2.5 s of a core, an
attention instance 3-10 s. An instance that fails leaves its reason beside the objects and the others still compile.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_PR_SET_PDEATHSIG = 1


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


def _compile(instance: Mapping[str, Any], target: str, temporary: Path, cubin: ModuleType) -> dict[str, Any]:
    """Compile one instance into `temporary`; returns its facts."""
    name = instance["name"]
    began = time.perf_counter()
    module = _load(name, Path(instance["source"]))
    if name != module.NAME:
        raise ValueError(f"the source is named {module.NAME}")
    compiled = module.compile_instance(target)
    compiled.export_to_c(object_file_path=str(temporary), function_name=name)
    seconds = time.perf_counter() - began
    data = temporary.read_bytes()
    kernels = cubin.read_facts(data)
    made = sorted({kernel.target for kernel in kernels})
    if not all(cubin.is_code_for(image, target) for image in made):
        raise ValueError(f"the compiler made code for {', '.join(made)}, not for {target}")
    frame = max(kernel.frame_bytes for kernel in kernels)
    return {
        "name": name,
        "digest": instance["digest"],
        "target": target,
        "code_targets": [target],
        "smem_bytes": instance["smem_bytes"] + max(kernel.static_smem_bytes for kernel in kernels),
        "registers": max(kernel.registers for kernel in kernels),
        "spill_bytes": frame,
        "stack_bytes": frame,
        "object_bytes": len(data),
        "compile_seconds": round(seconds, 3),
    }


def _publish(instance: Mapping[str, Any], temporary: Path, facts: Mapping[str, Any]) -> None:
    """Object first, facts last: facts on disk mean that the object beside them is whole and of that digest."""
    path = Path(instance["facts"])
    path.unlink(missing_ok=True)
    os.replace(temporary, instance["object"])
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    draft.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _one(instance: Mapping[str, Any], target: str, request: str, cubin: ModuleType) -> bool:
    """Compile and publish one instance, or write down why not."""
    temporary = Path(f"{instance['object']}.{os.getpid()}.part")
    log = Path(instance["log"])
    failure = Path(instance["failure"])
    try:
        with _output_to(log):
            facts = _compile(instance, target, temporary, cubin)
        _publish(instance, temporary, facts)
    except Exception:
        words = log.read_text(encoding="utf-8", errors="replace") + traceback.format_exc()
        command = f"{sys.executable} {__file__} {request} --only {instance['name']}"
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
    cubin = _load("pa_ops_cubin", here / "cubin.py")
    wanted = [instance for instance in request["instances"] if only is None or instance["name"] in only]
    compiled = [_one(instance, request["target"], path, cubin) for instance in wanted]
    return 0 if all(compiled) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Turns the machine code of a build into a verdict: no kernel may read a uniform register that nothing in it writes.

A compiler that forgets which register it means writes the number 0: ptxas 12.9 did where a cp.async had a cache policy
and a uniform part in its address, in 14 of 296 kernels, which ended with an illegal instruction (docs/performance.md).
Neither spills nor a look at the source tell of that. Uniform registers are those of SM 7.5 and newer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pa_ops.capability import parse_target
from pa_ops.generator import ptx
from pa_ops.generator.layout import built
from pa_ops.generator.toolchain import package_folders
from pa_ops.homes import home
from pa_ops.manifest import Manifest

FIRST_SM = 75
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);")
_REGISTER = re.compile(r"\bUR(\d+)\b")
_PREDICATE = re.compile(r"!?U?P(?:\d|T)")
_WRITERS = ("U", "R2UR", "S2UR", "LDCU", "REDUX", "CREDUX", "VOTEU")
_WIDE = {"64": 2, "WIDE": 2, "128": 4}  # registers that an instruction with that word in its name writes


def unwritten(listing: str) -> dict[int, str]:
    """Numbers of the uniform registers that nvdisasm's `listing` of a kernel reads and never writes, each with the
    first instruction that reads it."""
    read: dict[int, str] = {}
    written: set[int] = set()
    for match in _INSTRUCTION.finditer(listing):
        opcode, operands = match["opcode"], [operand.strip() for operand in match["operands"].split(",")]
        to = next((operand for operand in operands if not _PREDICATE.fullmatch(operand)), "")
        if opcode.startswith(_WRITERS) and "SETP" not in opcode and (made := _REGISTER.fullmatch(to)):
            first = int(made[1])
            written.update(range(first, first + max(_WIDE.get(word, 1) for word in opcode.split("."))))
            operands.remove(to)
        for number in map(int, _REGISTER.findall(",".join(operands))):
            read.setdefault(number, " ".join(match[0].split()))
    return {number: line for number, line in read.items() if number not in written}


def disassembler() -> str:
    """nvdisasm, of its package from PyPI or of PATH; raises where there is none."""
    packaged = [folder / "cu13" / "bin" / "nvdisasm" for folder in package_folders("nvidia")]
    found = next((str(path) for path in packaged if path.is_file()), None) or shutil.which("nvdisasm")
    if found is None:
        raise SystemExit("check_registers: no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return found


def images() -> Iterator[tuple[str, Path]]:
    """Name and machine code of every kernel here that has uniform registers."""
    for layout in built(home()):
        manifest = Manifest.load(layout.manifest)
        if parse_target(manifest.target) >= FIRST_SM and not ptx.is_target(manifest.target):
            for entry in manifest.entries:
                yield f"{entry.name} for {manifest.target}", layout.object(entry.name)


def main() -> int:
    """0 where at least one kernel is built and none reads what nothing writes; else 1, with each that does.

    Needs the objects that a build leaves beside its library; raises naming one that is not there.
    """
    command = [disassembler(), "-c"]

    def lost_by(image: Path) -> dict[int, str]:
        ran = subprocess.run([*command, image], capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"check_registers: {image}: {ran.stderr.strip() or 'nothing listed'}")
        return unwritten(ran.stdout)

    files = dict(images())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lost = dict(zip(files, pool.map(lost_by, files.values()), strict=True))
    for name, registers in lost.items():
        for number, line in registers.items():
            print(f"{name}: UR{number} is read and never written: {line}")
    bad = sum(map(bool, lost.values()))
    print(f"{len(lost)} kernels for SM 7.5 and newer: {bad} read a register that nothing writes")
    return 1 if bad or not lost else 0


if __name__ == "__main__":
    sys.exit(main())

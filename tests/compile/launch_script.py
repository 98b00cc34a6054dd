"""Scenes for test_launch.py: programs on CPU tensors, run by a product's pa_call on a stand-in driver.

Usage: launch_script.py LIBRARY KERNEL:SCENE ...; each scene has a process of its own, forked from this one when all is
imported. Prints a line of JSON for each: KERNEL:SCENE, how its process ended, and what it and the driver printed.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import tvm_ffi
from torch import Tensor

from helpers import programs
from pa_ops.arguments import Record, record_of
from pa_ops.checks import Rule
from pa_ops.program import (
    MAP_DTYPES,
    Address,
    Grid,
    GridRule,
    Guard,
    Launch,
    Program,
    Size,
    Source,
    Stride,
    TensorMap,
    Value,
)
from pa_ops.spec import InstanceSpec

HALF = (torch.float16,)
RULES = (Rule("x", "T Hq D", HALF, written=True), Rule("ends", "B+1", (torch.int32,)), Rule("y", "T.. D", HALF, True))
GRIDS = (Grid(GridRule.TILES, 64, -1, 8), Grid(GridRule.TILES, 16, 40, 3), Grid(GridRule.TILES, 16, 40, 24, 8),
         Grid(GridRule.TOKENS, 4, 99), Grid(GridRule.ROWS, 8, 3), Grid(GridRule.FIXED, 5, 6))  # fmt: skip


def tensors_of(tokens: int, sequences: int, *, heads: int = 8, dim: int = 64) -> list[Tensor | None]:
    """x, ends and y of a call."""
    x = torch.zeros(tokens, heads + 4, dim, dtype=torch.float16)[:, :heads]
    return [x, torch.zeros(sequences + 1, dtype=torch.int32), torch.zeros(tokens + 2, dim, dtype=torch.float16)]


def tensor_map(random_: random.Random) -> TensorMap:
    """Random values, among them sizes that are 0 or 1 for one token, and no address."""
    sizes: list[Value] = [Size("x", 0), Size("x", 2), Size("x", 0, 1, -1), Size("ends", 0, 1, -1), 0, 1, 7]
    strides: list[Value] = [Stride("x", 0, 2), Stride("x", 1, 2), Stride("y", 0, 2), 0, 48]
    return TensorMap(
        random_.choice((Address("x"), Address("y", 16), 0)),
        (64, *(random_.choice(sizes) for _ in range(3))),
        (random_.choice(strides), random_.choice(strides), random_.choice(strides)),
        random_.choice(((64, 8, 1), (32, 4, 16), (64, 192, 1))),
        random_.choice(list(MAP_DTYPES)),
    )


def program_of(kernel: int, record: Record, tensors: list[Tensor | None], random_: random.Random) -> Program:
    """Random sources in every field of a record."""
    choices: list[Source] = [Address("x"), Address("ends", 8), Address("y", 4), 0, 17]
    sizes: list[Source] = [Stride("x", 0, 2), Stride("y", 0, 1), Size("ends", 0, 1, -1), Size("x", 2, 2**40), 5]
    sources: dict[str, Source] = {}
    for name, letter in record.fields:
        sources[name] = random_.choice(choices if letter == "Q" else sizes) if letter != "f" else 0.5
    sources |= {name: tensor_map(random_) for name in record.maps}
    guards = [Guard(rule, tensor, rule.argument == "x") for rule, tensor in zip(RULES, tensors, strict=True)]
    return Program(0, guards, [Launch(kernel, record, sources, random_.choice(GRIDS))])


def want(made: programs.Launched) -> None:
    """What the driver should print: its extent, and every other 32 bits of the record."""
    words = [struct.unpack_from("<i", made.record, at)[0] for at in range(0, len(made.record), 8)]
    print("want", json.dumps(((made.x, made.y), words)))


def misfits(tensors: list[Tensor | None]) -> list[list[Any]]:
    """Calls that differ from what a program was made for, one thing at a time."""
    x, ends, y = tensors
    assert x is not None and ends is not None and y is not None
    spread = torch.zeros(x.shape[0], 8, 65, dtype=torch.float16)[..., :64]
    return [
        [None, ends, y],
        [x, ends, None],
        [x.bfloat16(), ends, y],
        [x, ends.long(), y],
        [x[:, :4], ends, y],
        [x[..., :32], ends, y],
        [x[0], ends, y],
        [x, ends, y[:1]],
        [x.transpose(1, 2).contiguous().transpose(1, 2), ends, y],
        [x[:1].expand(x.shape[0], 8, 64), ends, y],
        [spread, ends, y],
        [torch.zeros(x.numel() + 1, dtype=torch.float16)[1:].view(x.shape), ends, y],
    ]


def attempt(call: Callable[..., Any], *arguments: Any) -> None:
    """Prints the error of a call."""
    try:
        call(*arguments)
    except Exception as error:
        print(type(error).__name__, error)


def play(scene: str, library: str, name: str) -> None:
    module = tvm_ffi.load_module(library)
    kernel, call = int(module[name]()), module["pa_call"]
    record = record_of(InstanceSpec.parse(name))
    random_ = random.Random(0)
    tensors = tensors_of(9, 3)
    program = program_of(kernel, record, tensors, random_)
    if scene == "twin":
        for number in range(20):
            program = program_of(kernel, record, tensors, random_)
            for tokens, sequences in ((9, 3), (1, 1), (4000, 60)):
                given = tensors_of(tokens, sequences)
                twins = programs.run(program.address, *given)
                assert isinstance(twins, list) and call(program.address, *given) == 1
                want(twins[0])
            for given in misfits(tensors) if number < 3 else ():
                assert programs.run(program.address, *given) == 0
                print("refused", call(program.address, *given))
        print("empty", call(program.address, *tensors_of(0, 3)))
    elif scene == "clusters":
        for device in (0, 1, 0):
            print("held", module["pa_clusters"](kernel, device))
        os.environ["FAKE_CUDA_ERROR"] = "cuOccupancyMaxActiveClusters"
        attempt(module["pa_clusters"], kernel, 0)
    elif scene == "wrong calls":
        for arguments in ((kernel,), (kernel, "text"), (kernel, 64)):
            attempt(module["pa_clusters"], *arguments)
        misfit = program_of(kernel, Record(addresses=("q",)), tensors, random_)
        for arguments in (("text", *tensors), (program.address, tensors[0]), (misfit.address, *tensors)):
            attempt(call, *arguments)
    elif scene == "driver errors":
        encoding = ("cuTensorMapEncodeTiled",) if record.maps else ()
        for name in (*encoding, "cuLibraryLoadData", "cuLibraryGetKernel", "cuLaunchKernelEx"):
            os.environ["FAKE_CUDA_ERROR"] = name
            attempt(call, program.address, *tensors)
    else:
        for _ in range(2 if scene == "devices" else 1):
            call(program.address, *tensors)


def in_child(scene: str, library: str, name: str) -> tuple[int, str]:
    """How a process ends that plays a scene, and what it prints."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), sys.stdout.fileno())
            attempt(play, scene, library, name)
            sys.stdout.flush()
            ctypes.CDLL(None).fflush(None)  # of what the driver printed
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read()


def main(library: str, *asked: str) -> None:
    """Plays the scenes that were asked for."""
    for each in asked:
        name, _, scene = each.partition(":")
        print(json.dumps([each, *in_child(scene, library, name)]), flush=True)


main(*sys.argv[1:])

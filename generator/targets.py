"""Turns the architecture words that users write into the code targets that compilers take, and SM numbers likewise."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from pa_ops.capability import Capability, parse_target
from pa_ops.errors import InvalidArgument

# Every target that the compilers know and that some SM loads: before sm_80 CUDA C++ alone. "f" code serves later
# minors of its major too; "compute" is PTX, which the driver translates for its own SM and every newer one, so that
# a card of today runs the code paths of older ones.
TARGETS: tuple[str, ...] = (
    "sm_53",
    "sm_60",
    "sm_61",
    "sm_62",
    "sm_70",
    "sm_72",
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_87",
    "sm_89",
    "sm_90a",
    "sm_100a",
    "sm_100f",
    "sm_103a",
    "sm_110a",
    "sm_110f",
    "sm_120a",
    "sm_120f",
    "sm_121a",
    "compute_53",
    "compute_70",
    "compute_75",
)
# The fewest targets that together load on every SM that is served. SM 11.0 is not: the DSL's CUDA 12 libraries emit
# the part's former number, sm_101, and the build refuses an image that is not what was asked for.
DECLARED_TARGETS: tuple[str, ...] = ("sm_53", "sm_60", "sm_70", "sm_75", "sm_80", "sm_90a", "sm_100f", "sm_120f")
# Nobody needs them, because their SMs load the code of a declared target; a user may ask for them, and CI compiles the
# family mea for them.
COMPILED_IN_CI: tuple[str, ...] = ("sm_61", "sm_62", "sm_72")
REPORTED_TARGETS: tuple[str, ...] = tuple(each for each in TARGETS if each in (*DECLARED_TARGETS, *COMPILED_IN_CI))
DEFAULT_TARGETS: tuple[str, ...] = ("sm_80", "sm_90a")
# A bare SM that has no plain target means the declared target that it loads.
ALIASES: dict[str, str] = {
    "sm_90": "sm_90a",
    "sm_100": "sm_100f",
    "sm_103": "sm_100f",
    "sm_110": "sm_110f",
    "sm_120": "sm_120f",
    "sm_121": "sm_120f",
}
_MAJOR_ATTRIBUTE = 75
_MINOR_ATTRIBUTE = 76


def resolve(word: str) -> str:
    """The code target that `word` means (sm_90 -> sm_90a); raises InvalidArgument naming what would be accepted."""
    target = ALIASES.get(word, word)
    if target not in TARGETS:
        accepted = ", ".join((*TARGETS, *ALIASES))
        raise InvalidArgument("arch", f"must be one of {accepted} (kernels begin at SM 5.3)", repr(word))
    return target


def resolve_all(words: Iterable[str]) -> tuple[str, ...]:
    """The targets of several words, each once, oldest SM first."""
    return tuple(sorted({resolve(word) for word in words}, key=lambda target: (parse_target(target), target)))


def target_of_sm(sm: int) -> str | None:
    """The declared target that a device of SM number `sm` loads, best first; None where no kernel exists for it."""
    return next((target for target in Capability.of_sm(sm).targets if target in DECLARED_TARGETS), None)


def visible_sms() -> tuple[int, ...]:
    """SM numbers of the GPUs that the driver shows, sorted, each once; empty without a driver or a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found: set[int] = set()
    for device in range(count.value):
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR_ATTRIBUTE, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR_ATTRIBUTE, device)
        found.add(10 * major.value + minor.value)
    return tuple(sorted(found))


def default_targets() -> tuple[str, ...]:
    """What a build without --arch makes: code for the GPUs that are here, or DEFAULT_TARGETS where there is none."""
    here = {target for sm in visible_sms() if (target := target_of_sm(sm)) is not None}
    return resolve_all(here or DEFAULT_TARGETS)

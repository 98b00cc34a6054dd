"""Turns an SM number into what the device can do: its features, shared memory and the code that it loads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property

from pa_ops.errors import InvalidArgument

KIB = 1024


class Feature(Enum):
    """An ability that a kernel may need; `label` is the word that messages use."""

    HALF2 = "half2"
    MMA_VOLTA = "mma.m8n8k4"
    MMA_F16 = "mma fp16"
    MMA_BF16 = "mma bf16"
    CP_ASYNC = "cp.async"
    FP8 = "fp8"
    TMA = "tma"
    WGMMA = "wgmma"
    TCGEN05 = "tcgen05"

    @property
    def label(self) -> str:
        """The word for messages."""
        return str(self.value)


@dataclass(frozen=True)
class Model:
    """One known SM: opt-in shared memory of a block in KiB, SMs of a common part, features."""

    smem_kib: int
    num_sms: int
    features: frozenset[Feature]


_HALF = frozenset({Feature.HALF2})
_VOLTA = _HALF | {Feature.MMA_VOLTA}
_TURING = _VOLTA | {Feature.MMA_F16}
_AMPERE = _TURING | {Feature.MMA_BF16, Feature.CP_ASYNC}
_ADA = _AMPERE | {Feature.FP8}
_CONSUMER = _ADA | {Feature.TMA}
_HOPPER = _CONSUMER | {Feature.WGMMA}
_BLACKWELL = _CONSUMER | {Feature.TCGEN05}

MODELS: dict[int, Model] = {
    50: Model(48, 5, frozenset()),
    52: Model(48, 16, frozenset()),
    53: Model(48, 1, _HALF),
    60: Model(48, 56, _HALF),
    61: Model(48, 28, _HALF),
    62: Model(48, 2, _HALF),
    70: Model(96, 80, _VOLTA),
    72: Model(96, 8, _VOLTA),
    75: Model(64, 40, _TURING),
    80: Model(163, 108, _AMPERE),
    86: Model(99, 84, _AMPERE),
    87: Model(163, 16, _AMPERE),
    89: Model(99, 128, _ADA),
    90: Model(227, 132, _HOPPER),
    100: Model(227, 148, _BLACKWELL),
    103: Model(227, 148, _BLACKWELL),
    110: Model(227, 20, _BLACKWELL),
    120: Model(99, 170, _CONSUMER),
    121: Model(99, 48, _CONSUMER),
}
OLDEST = min(MODELS)
SHARED_MAJOR = 8  # whose minors are served by the code of the first: one compiler knows 8.0 alone
FIRST_EXACT = 90  # "a" code exists from here on and loads on that one SM only
FIRST_FAMILY = 100  # "f" code exists from here on and loads on later minors of the same major

_TARGET = re.compile(r"sm_([1-9][0-9]{1,2})([af]?)|compute_([1-9][0-9]{1,2})")


def newest_known(sm: int) -> int:
    """The newest SM of the table that is not newer than `sm`, e.g. 122 -> 121; raises InvalidArgument below 5.0."""
    if isinstance(sm, bool) or not isinstance(sm, int) or sm < OLDEST:
        raise InvalidArgument("sm", f"must be an integer >= {OLDEST} (compute capability x.y is 10*x + y)", repr(sm))
    return max(known for known in MODELS if known <= sm)


@cache
def min_sm(features: frozenset[Feature]) -> int | None:
    """The oldest SM that has all of `features`, None where no single SM has."""
    return min((sm for sm, model in MODELS.items() if features <= model.features), default=None)


def parse_target(target: str) -> int:
    """The SM that a code target is named after: sm_90a -> 90; raises InvalidArgument for any other spelling."""
    match = _TARGET.fullmatch(target)
    if match is None:
        raise InvalidArgument("target", "must be sm_<N>, sm_<N>a, sm_<N>f or compute_<N>", repr(target))
    return int(match[1] or match[3])


@dataclass(frozen=True)
class Capability:
    """A device: SM number (9.0 -> 90), shared memory that a block may opt into (bytes), number of SMs, its name.

    card: as its driver tells, "NVIDIA H200" say; recorded times of a card of that name rank kernels.
    """

    sm: int
    smem_optin_bytes: int
    num_sms: int
    card: str = ""

    def __post_init__(self) -> None:
        newest_known(self.sm)
        for field in ("smem_optin_bytes", "num_sms"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgument(field, "must be an integer >= 1", repr(value))

    @classmethod
    def of_sm(cls, sm: int, *, num_sms: int | None = None, card: str = "") -> Capability:
        """A device known by its SM number; a newer SM than the table is taken for the newest known below it."""
        model = MODELS[newest_known(sm)]
        return cls(sm, model.smem_kib * KIB, model.num_sms if num_sms is None else num_sms, card)

    @cached_property
    def features(self) -> frozenset[Feature]:
        """What the device can do."""
        return MODELS[newest_known(self.sm)].features

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Code that the device loads, best first.

        An "a" cubin loads on its own SM, an "f" cubin on later minors of its major, a plain cubin likewise;
        PTX of any older SM is translated by the driver.
        """
        known = sorted({self.sm, *MODELS}, reverse=True)
        minors = [sm for sm in known if sm // 10 == self.sm // 10 and sm <= self.sm]
        exact = [f"sm_{self.sm}a"] if self.sm >= FIRST_EXACT else []
        family = [f"sm_{sm}f" for sm in minors if sm >= FIRST_FAMILY]
        plain = [f"sm_{sm}" for sm in minors]
        ptx = [f"compute_{sm}" for sm in known if sm <= self.sm]
        return (*exact, *family, *plain, *ptx)

    @cached_property
    def places(self) -> dict[str, int]:
        """Each of `targets` and its place among them."""
        return {target: place for place, target in enumerate(self.targets)}

    def loads(self, targets: Iterable[str]) -> bool:
        """Whether the device loads code of one of these targets."""
        return not self.places.keys().isdisjoint(targets)

    @property
    def build_target(self) -> str:
        """The target to build for this device: its own exact one, from sm_80 to sm_89 the first minor."""
        if self.sm >= FIRST_EXACT:
            return f"sm_{self.sm}a"
        return f"sm_{self.sm // 10 * 10}" if self.sm // 10 == SHARED_MAJOR else f"sm_{self.sm}"

    def __str__(self) -> str:
        card = f"{self.card}, " if self.card else ""
        return f"{card}sm {self.sm} ({self.smem_optin_bytes} B shared memory a block, {self.num_sms} SMs)"

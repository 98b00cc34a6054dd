"""Turns a spec into the language of its template: which compiler reads it, and how its statements hide in comments."""

from __future__ import annotations

from pa_ops.spec import Family, InstanceSpec, Word


class Language(Word):
    """What a template is written in; the value ends its file's name."""

    CUTE = "py"  # CuTe DSL: SM 8.0 and newer
    CUDA = "cu"  # CUDA C++ for NVRTC: every SM

    @property
    def statement(self) -> str:
        """What a line of Jinja begins with: a comment of the language."""
        return _STATEMENTS[self]


_STATEMENTS = {Language.CUTE: "# %", Language.CUDA: "// %"}
LANGUAGES: dict[Family, Language] = {
    Family.FLASH_SM80: Language.CUTE,
    Family.FLASH_SM90: Language.CUTE,
    Family.DECODE: Language.CUTE,
    Family.MEA: Language.CUDA,
    Family.MEA_DECODE: Language.CUDA,
    Family.APPEND: Language.CUDA,
    Family.GATHER: Language.CUDA,
    Family.MERGE: Language.CUTE,
}
OLDEST_CUTE_SM = 80


def language_of(spec: InstanceSpec) -> Language:
    """The language of the spec's template."""
    return LANGUAGES[spec.family]

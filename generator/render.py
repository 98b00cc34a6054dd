"""Turns a spec and its family's template into a source file that a person can read, diff and hash."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError, TemplateSyntaxError

from pa_ops import sources
from pa_ops.arguments import ADDRESS, FLOAT32, INT32, INT64, record_of
from pa_ops.errors import BuildError
from pa_ops.spec import InstanceSpec

from .language import Language, language_of
from .tiles import FLASH_SM90_PORTION_TILES, FLASH_SM90_SKIPPING_TILES

CUDA_TYPES = {ADDRESS: "unsigned long long", INT64: "long long", INT32: "int", FLOAT32: "float"}


def template_name(spec: InstanceSpec) -> str:
    """The file that a spec is rendered from."""
    return f"{spec.family}.{language_of(spec)}.j2"


def members_of(spec: InstanceSpec) -> list[tuple[str, str]]:
    """(C type, name) of each field of the kernel's argument record."""
    return [(CUDA_TYPES[letter], name) for name, letter in record_of(spec).fields]


class Renderer:
    """The templates of one folder; statements hide in comments, and an undefined name is an error."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or sources.template_folder()
        self._environments = {
            language: Environment(
                loader=FileSystemLoader(self.folder),
                line_statement_prefix=language.statement,
                undefined=StrictUndefined,
                keep_trailing_newline=True,
                autoescape=False,
            )
            for language in Language
        }

    def template_text(self, spec: InstanceSpec) -> str:
        """The template as written."""
        try:
            return (self.folder / template_name(spec)).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BuildError(spec.name, "render", f"no template {template_name(spec)} in {self.folder}") from None

    def render(self, spec: InstanceSpec) -> str:
        """The source of one instance; raises BuildError with the template's line where it cannot be rendered."""
        try:
            template = self._environments[language_of(spec)].get_template(template_name(spec))
            tiles = {"skipping_tiles": FLASH_SM90_SKIPPING_TILES, "portion_tiles": FLASH_SM90_PORTION_TILES}
            return template.render(spec=spec, members=members_of(spec), **tiles)
        except TemplateError as error:
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise BuildError(spec.name, f"render {template_name(spec)}{line}", f"{error}") from error

"""What Python tells the kernels in C, and that it goes on serving where there can be none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pa_ops import native
from pa_ops.calls import STEADY, TENSORS
from pa_ops.schema import base_of, signature

HOST = Path(native.__file__).parent.parent / "generator" / "host.h"


def test_the_tables_name_every_function_of_the_header() -> None:
    body = HOST.read_text().partition("struct pa_host {")[2].partition("};")[0]
    declared = [line for line in body.splitlines() if line.strip().endswith(";") or line.strip().endswith("*/")]
    named = (*native.TORCH, native.STREAM, *native.MEMBERS, native.EMPTY, *native.PYTHON, *native.CXX)
    assert len(declared) == len(named)


@pytest.mark.parametrize("op", STEADY)
def test_a_description_says_what_each_argument_is(op: str) -> None:
    words = list(native._description(op))
    arguments, tensors, tokens, sequences, workspace, results, *rest = words
    names, places = signature(op).names, TENSORS[base_of(op)]
    assert (arguments, tensors, len(rest)) == (len(names), len(places), native.RESULTS + 2 * native.ARGUMENTS)
    assert {places[place] for place in rest[:results]} <= {"out", "lse"}
    assert workspace == (places.index("workspace") if "workspace" in places else -1)
    pairs = rest[native.RESULTS :]
    for name, type_, place in zip(names, pairs[::2], pairs[1::2], strict=False):
        tensor = type_ in (native.Argument.TENSOR, native.Argument.MAYBE_TENSOR)
        assert (place >= 0) == tensor and (not tensor or places[place] == name)
    required = [place for type_, place in zip(pairs[::2], pairs[1::2], strict=True) if type_ == native.Argument.TENSOR]
    assert tokens in required and sequences in required, "sizes are those of tensors that every call has"


def test_python_serves_where_pytorch_has_no_such_interface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libpa_ops.so"
    monkeypatch.setattr(native, "for_device", lambda index: SimpleNamespace(library=lambda: library))
    monkeypatch.setattr(native, "TORCH", (*native.TORCH, "torch_of_another_age"))
    native.attach(0, {})
    assert not native.able(library) and not native.attached()


def test_libraries_that_are_not_loaded_are_not_loaded_for_it() -> None:
    assert native._has(native.TORCH_CPU, "aoti_torch_get_dim") and not native._has("libpa_never.so", "anything")
    assert native._has(native.TORCH_CUDA, native.STREAM) == (torch.version.cuda is not None)

"""Kernels that are built at their first use, on toy templates: when, when not, and what the error says then."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from helpers import forked
from helpers.forked import CLEAN, FAILED, Child
from pa_ops import cli, homes
from pa_ops.capability import Capability
from pa_ops.errors import BuildError, NoInstance
from pa_ops.generator import toolchain
from pa_ops.problem import Problem
from pa_ops.registry import Registry
from pa_ops.spec import Family

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("installed_toy")]
SM90 = Capability.of_sm(90)
APPEND = Problem(op="append_kv", dtype="fp16", head_dim=64)  # NVRTC's alone, so no worker imports the DSL
PREFILL = Problem(op="paged_attention", dtype="fp16", head_dim=128, page_size=16, tokens=500)


def use(home: Path, read_only: tuple[Path, ...], cache: Path) -> None:
    """Uses a kernel that may be missing; where `read_only`, nobody may write, whoever runs the tests."""
    os.environ |= {"PA_OPS_HOME": str(home), "XDG_CACHE_HOME": str(cache)}
    access = os.access
    os.access = lambda path, mode: access(path, mode) and not any(Path(path).is_relative_to(each) for each in read_only)
    here = Registry(SM90, *homes.homes())
    chosen = here.serve(APPEND)
    print(here.kernel(chosen.entry) > 0, here.library())


def using(home: Path, said: Path, *read_only: Path, cache: Path | None = None) -> Child:
    """Another process that uses a kernel which may be missing, and prints into the folder `said`."""
    return forked.start(lambda: use(home, read_only, cache or home), said)


def test_G1_a_missing_kernel_is_built_at_its_first_use(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    here = Registry(SM90, tmp_path / "home")
    assert here.entries == ()
    chosen = here.serve(APPEND)
    assert here.kernel(chosen.entry) > 0
    said = capfd.readouterr().err
    assert f"pa_ops: building 1 kernel for sm_90a, once: {chosen.instance}\n" in said and "built in" in said
    again = Registry(SM90, tmp_path / "home")
    assert again.serve(APPEND) == chosen and again.kernel(chosen.entry) > 0
    here.serve(Problem(op="append_kv", dtype="bf16", head_dim=64))
    assert len(here.entries) == 2, "what was built first stays"
    assert here.kernel(here.serve(APPEND).entry) > 0
    assert "fp16" not in capfd.readouterr().err


def test_G1_a_missing_attention_kernel_comes_with_its_companion(tmp_path: Path) -> None:
    here = Registry(Capability.of_sm(86), tmp_path)
    assert here.serve(PREFILL).family is Family.FLASH_SM80
    assert sorted(entry.spec.family for entry in here.entries) == [Family.DECODE, Family.FLASH_SM80]


def test_B6_PA_OPS_NO_JIT_names_the_command_that_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_HOME", str(tmp_path))
    monkeypatch.setenv("PA_OPS_NO_JIT", "1")
    here = Registry(SM90, tmp_path)
    with pytest.raises(NoInstance, match="PA_OPS_NO_JIT=1 forbids") as caught:
        here.serve(APPEND)
    assert not any(tmp_path.glob("sm_*"))
    command = re.search(r"build it: pa-ops (.+)", str(caught.value))
    assert command is not None and cli.main(shlex.split(command[1])) == 0
    here.refresh()
    assert here.kernel(here.serve(APPEND).entry) > 0


def test_G1_nothing_is_built_under_graph_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(NoInstance, match=r"(?s)while a CUDA graph is captured.*build it: pa-ops build --arch sm_90a"):
        Registry(SM90, tmp_path).serve(APPEND)
    assert not any(tmp_path.glob("sm_*"))


def test_G1_without_a_toolchain_the_error_has_the_doctor_s_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "_program", lambda names: None)
    with pytest.raises(NoInstance, match=r"a C compiler not found; install gcc or clang, or name one in CC"):
        Registry(SM90, tmp_path).serve(APPEND)


def test_B6_what_no_build_serves_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(NoInstance, match="head size"):
        Registry(SM90, tmp_path).serve(Problem(op="paged_attention", dtype="fp16", head_dim=520, page_size=16))
    assert not any(tmp_path.glob("sm_*"))


def test_G1_a_kernel_that_does_not_compile_says_so_at_its_use(tmp_path: Path, toy: Path) -> None:
    header = toy / "device" / "scale.cuh"
    header.write_text(header.read_text().replace("*= FACTOR", "*= NOBODY"))
    with pytest.raises(BuildError, match='identifier "NOBODY" is undefined'):
        Registry(SM90, tmp_path).serve(APPEND)


def test_G1_two_processes_that_miss_a_kernel_build_it_once(tmp_path: Path) -> None:
    users = [using(tmp_path / "home", tmp_path / name) for name in ("one", "other")]
    answers = [user.end() for user in users]
    assert [status for status, _, _ in answers] == [CLEAN, CLEAN], answers
    assert answers[0][1] == answers[1][1] and answers[0][1].startswith("True")
    objects = list((tmp_path / "home" / "sm_90a" / "obj").glob("*.image"))
    assert len(objects) == 1


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A home and a user's cache folder."""
    found = tmp_path / "home", tmp_path / "cache"
    for folder in found:
        folder.mkdir()
    return found


def test_G1_a_read_only_install_builds_into_the_user_s_cache(places: tuple[Path, Path], tmp_path: Path) -> None:
    home, cache = places
    for built in (True, False):
        status, out, err = using(home, tmp_path / f"said {built}", home, cache=cache).end()
        assert status == CLEAN, err
        assert out.startswith(f"True {cache}/pa_ops/sm_90a/libpa_ops-") and ("building" in err) is built
    assert not any(home.iterdir())


def test_G1_nowhere_to_write_is_said(places: tuple[Path, Path], tmp_path: Path) -> None:
    home, cache = places
    status, _, err = using(home, tmp_path / "said", *places, cache=cache).end()
    assert status == FAILED
    assert f"{home} and {cache}/pa_ops cannot be written; set PA_OPS_HOME" in err and "build it: pa-ops build" in err


def test_homes_are_one_where_it_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_HOME", str(tmp_path / "not" / "yet"))
    assert homes.homes() == (tmp_path / "not" / "yet",)
    monkeypatch.setattr(homes, "writable", lambda root: False)
    assert homes.homes() == (tmp_path / "not" / "yet", homes.cache())
    assert homes.destination(homes.homes()) is None

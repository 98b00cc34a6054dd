"""Faults put into builds, on toy templates: whatever happens, what is loaded is whole, and the next build completes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import forked
from helpers.forked import CLEAN, FAILED
from pa_ops import homes
from pa_ops.capability import Capability
from pa_ops.errors import BuildError, InvalidArgument
from pa_ops.generator.build import Request, build
from pa_ops.generator.digest import sha256_of
from pa_ops.generator.layout import Layout
from pa_ops.manifest import Manifest
from pa_ops.problem import Problem
from pa_ops.registry import Registry

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("installed_toy")]
TARGET = "sm_80"
SM80 = Capability.of_sm(80)
APPEND = Problem(op="append_kv", dtype="fp16", head_dim=64)
QUICK = "*append*"  # what `built` holds
KILLED = -signal.SIGKILL
RUN = """
import sys
from pathlib import Path
import pa_ops_command
pa_ops_command.enter_bare("pa_ops")  # as the console script does
from pa_ops.generator.build import Request, build
home, templates = map(Path, sys.argv[1:])
build(Request(home, "smoke", ("sm_80",), "*append*", 1, templates))
"""


def run(home: Path, toy: Path) -> tuple[str, ...]:
    """The names that a build compiled."""
    return build(Request(home, "smoke", (TARGET,), QUICK, 1, toy))[0].compiled


def check_nothing_half_written(home: Path) -> bool:
    """Whether there is a product; one that would be loaded is whole."""
    found = homes.read(home / TARGET)
    assert not isinstance(found, homes.Unusable), found
    if found is not None:
        assert sha256_of(found.library) == found.manifest.library_sha256
        assert b"libtvm_ffi.so" in found.library.read_bytes()
    return found is not None


def in_child(work: Callable[[], object]) -> int:
    """How a forked process ends that does `work`: KILLED, CLEAN or FAILED."""
    with tempfile.TemporaryDirectory() as folder:
        return forked.start(work, Path(folder, "said")).end()[0]


def fail_at(number: int, fail: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls `fail` in place of the `number`-th rename, by which everything is put in its place."""
    left = [number]
    replace = os.replace

    def instead(source: Path | str, to: Path | str) -> None:
        left[0] -= 1
        if not left[0]:
            fail()
        replace(source, to)

    monkeypatch.setattr(os, "replace", instead)


def test_G1_a_build_killed_at_any_rename_leaves_nothing_half_written(
    tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, ends = tmp_path / "home", []
    for number in range(1, 40):
        with monkeypatch.context() as patch:
            fail_at(number, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
            ends.append(in_child(lambda: run(home, toy)))
        whole = check_nothing_half_written(home)
        if ends[-1] == CLEAN:
            break
        shutil.rmtree(home / TARGET / "link", ignore_errors=True)  # or less and less is left to be renamed
    assert whole and ends[-1] == CLEAN and set(ends[:-1]) == {KILLED} and len(ends) > 4
    assert run(home, toy) == ()


def test_G1_a_killed_rebuild_leaves_the_old_product_or_the_new_one(
    built: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(built, toy) == (), "what is built once serves the tests"
    for number in range(1, 40):
        with (toy / "append.cu.j2").open("a") as template:
            template.write("// later\n")
        with monkeypatch.context() as patch:
            fail_at(number, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
            end = in_child(lambda: run(built, toy))
        found = homes.read(built / TARGET)
        assert found is not None
        if isinstance(found, homes.Unusable):
            assert "other sources" in found.reason
        else:
            assert check_nothing_half_written(built)
        manifest = Manifest.load(built / TARGET / "manifest.json")
        assert sha256_of(built / TARGET / manifest.library) == manifest.library_sha256
        if end == CLEAN:
            break
    assert end == CLEAN and number > 4


@pytest.mark.parametrize("number", (1, 3, 5, 7))
def test_G1_a_full_disk_is_a_build_error_and_the_old_product_stays(
    number: int, built: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Manifest.load(built / TARGET / "manifest.json")
    with (toy / "append.cu.j2").open("a") as template:
        template.write("// later\n")

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        fail_at(number, full, patch)
        with pytest.raises(BuildError, match="No space left on device"):
            run(built, toy)
    assert Manifest.load(built / TARGET / "manifest.json") == before
    assert sha256_of(built / TARGET / before.library) == before.library_sha256
    run(built, toy)
    assert check_nothing_half_written(built)


@pytest.mark.parametrize("limit", (0, 2_000, 9_000, 30_000))
def test_G1_files_that_cannot_grow_leave_nothing_half_written(limit: int, tmp_path: Path, toy: Path) -> None:
    """Beyond the limit every write of the build, its workers and the linker fails, as on a full disk."""
    home = tmp_path / "home"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run(home, toy)

    assert in_child(limited) == FAILED
    assert not check_nothing_half_written(home)
    assert len(run(home, toy)) <= 2 and check_nothing_half_written(home)


@pytest.mark.parametrize("delay", (0.1, 0.4, 0.7))
def test_G1_ctrl_c_ends_a_build_and_leaves_nothing_half_written(delay: float, tmp_path: Path, toy: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, "-c", RUN, str(home), str(toy)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 60
    while not (home / TARGET).exists() and child.poll() is None:
        assert time.monotonic() < end, "the build does not begin"
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode in (-signal.SIGINT, CLEAN, 1), err
    ended = check_nothing_half_written(home)
    assert "KeyboardInterrupt" in err or ended, "Python says nothing where it is leaving anyway, after a whole build"
    run(home, toy)
    assert check_nothing_half_written(home)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "a bit flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_G1_a_damaged_library_is_built_again_with_a_warning(damage: str, built: Path, toy: Path) -> None:
    DAMAGES[damage](Layout(built / TARGET).library)
    here = Registry(SM80, built)
    with pytest.warns(RuntimeWarning, match="it was built again"):
        assert here.kernel(here.serve(APPEND).entry) > 0
    assert len(here.entries) == 2 and check_nothing_half_written(built)


def test_G1_a_damaged_library_is_never_loaded(built: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(Layout(built / TARGET).library)
    monkeypatch.setenv("PA_OPS_NO_JIT", "1")
    here = Registry(SM80, built)
    with pytest.raises(InvalidArgument, match=r"PA_OPS_NO_JIT=1.*pa-ops build --arch sm_80.*sha256"):
        here.kernel(here.serve(APPEND).entry)
    assert here.library() is None


@pytest.mark.parametrize("damage", ("truncated", "a bit flipped", "emptied"))
def test_G1_a_damaged_manifest_is_built_again_with_a_warning(damage: str, built: Path, toy: Path) -> None:
    path = Layout(built / TARGET).manifest
    DAMAGES[damage](path) if damage != "a bit flipped" else path.write_bytes(b"\xff" + path.read_bytes())
    with pytest.warns(RuntimeWarning, match="is not used: its manifest is damaged"):
        here = Registry(SM80, built)
    assert here.entries == ()
    assert here.kernel(here.serve(APPEND).entry) > 0
    assert len(here.entries) == 2, "objects that are whole stay"


OTHERS: dict[str, tuple[Callable[[dict[str, object], Path], object], str]] = {
    "version": (lambda document, toy: document.update(schema=1), "of another version"),
    "sources": (lambda document, toy: (toy / "append.cu.j2").open("a").write("// later\n"), "other sources"),
    "unknown sources": (lambda document, toy: document.update(sources=""), "other sources"),
    "target": (lambda document, toy: document.update(target="sm_75"), "is sm_75's"),
    "file": (lambda document, toy: document.update(library="../../other.so"), "beside the manifest"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_G1_a_product_of_another_version_or_source_is_not_used(other: str, built: Path, toy: Path) -> None:
    change, words = OTHERS[other]
    path = Layout(built / TARGET).manifest
    document = json.loads(path.read_text())
    change(document, toy)
    path.write_text(json.dumps(document))
    with pytest.warns(RuntimeWarning, match=words):
        here = Registry(SM80, built)
    assert here.entries == ()
    with warnings.catch_warnings(action="error"):
        assert here.kernel(here.serve(APPEND).entry) > 0


def test_G1_an_object_that_changed_is_compiled_again(built: Path, toy: Path) -> None:
    layout = Layout(built / TARGET)
    names = tuple(entry.name for entry in Manifest.load(layout.manifest).entries)
    flip(layout.object(names[0]))
    assert run(built, toy) == names[:1]
    flip(layout.object(names[1]))
    layout.library.unlink()
    assert run(built, toy) == names[1:]


def test_G1_a_product_that_another_process_replaced_is_found(tmp_path: Path, toy: Path) -> None:
    """The manifest that was read names a library that is gone; the new one has all it had."""
    build(Request(tmp_path, "smoke", (TARGET,), "*append*fp16*", 1, toy))
    here = Registry(SM80, tmp_path)
    chosen = here.serve(APPEND)
    run(tmp_path, toy)
    with warnings.catch_warnings(action="error"):
        assert here.kernel(chosen.entry) > 0
    assert len(list((tmp_path / TARGET).glob("*.so"))) == 1

"""Builds that are incremental, survive being killed, share a folder, and say what went wrong; on toy templates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tvm_ffi
from filelock import FileLock

from pa_ops.arguments import RECORDS
from pa_ops.errors import BuildError, InvalidArgument
from pa_ops.generator import link, matrix, nvrtc
from pa_ops.generator.build import Outcome, Request, build, plans
from pa_ops.generator.digest import sha256_of
from pa_ops.generator.language import Language, language_of
from pa_ops.generator.layout import Layout
from pa_ops.generator.listener import Listener
from pa_ops.generator.lock import BuildBusy
from pa_ops.generator.plan import Plan
from pa_ops.generator.target_build import shards_of
from pa_ops.generator.toolchain import Toolchain
from pa_ops.manifest import Manifest
from pa_ops.spec import Family, InstanceSpec

pytestmark = pytest.mark.compile
TARGET = "sm_80"
FEW = "*_fp16_*d0v0*,*_flash_sm80_fp16_*d64v64_gather_*,*_mea_fp16_*_gather_*"  # of either language
SMOKE = matrix.declared("smoke", (TARGET,))
ALL = sum(matrix.matches(spec.name, FEW) for spec in SMOKE)
QUICK = "*append*"  # what `built` holds: 2 instances that no worker needs the DSL for
RUN = """
import sys
from pathlib import Path
import pa_ops_command
pa_ops_command.enter_bare("pa_ops")  # as the console script does
from pa_ops.generator.build import Request, build
home, templates, pattern = sys.argv[1:]
print(len(build(Request(Path(home), "smoke", ("sm_80",), pattern, 1, Path(templates)))[0].compiled))
"""


def request(home: Path, toy: Path, pattern: str = FEW, lock_seconds: float = 60.0, jobs: int = 1) -> Request:
    """One job, for one import of the DSL."""
    return Request(home, "smoke", (TARGET,), pattern, jobs, toy, lock_seconds)


def run(home: Path, toy: Path, pattern: str = FEW, jobs: int = 1) -> Outcome:
    return build(request(home, toy, pattern, jobs=jobs))[0]


def stale(home: Path, toy: Path, pattern: str = FEW) -> list[str]:
    (plan,) = [plan for _, plan in plans(request(home, toy, pattern))]
    return [item.name for item in plan.stale]


def start(home: Path, toy: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(home), str(toy), FEW]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def check_whole(layout: Layout) -> list[str]:
    """The names of a product whose manifest, library, objects and symbols fit together."""
    manifest = Manifest.load(layout.manifest)
    module = tvm_ffi.load_module(str(layout.library))
    for entry in manifest.entries:
        assert module[entry.symbol] is not None
        assert layout.object(entry.name).stat().st_size == entry.object_bytes
        assert json.loads(layout.facts(entry.name).read_text())["row"]["digest"] == entry.digest
    assert not list(layout.root.rglob("*.part"))
    return [entry.name for entry in manifest.entries]


def stamps(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


def test_G1_second_build_rebuilds_nothing_and_an_edit_rebuilds_what_it_touches(tmp_path: Path, toy: Path) -> None:
    home = tmp_path / "home"
    first = run(home, toy, jobs=2)
    everything = check_whole(Layout(home / TARGET))
    assert sorted(first.compiled) == everything and len(everything) == ALL
    before = stamps(home)
    second = run(home, toy)
    assert second.compiled == () and sorted(second.fresh) == everything
    assert stamps(home) == before

    append = [name for name in everything if "_append_" in name]
    cuda = [name for name in everything if language_of(InstanceSpec.parse(name)) is Language.CUDA]
    with (toy / "append.cu.j2").open("a") as template:
        template.write("// later\n")
    assert stale(home, toy) == append
    assert list(run(home, toy).compiled) == append
    after = stamps(home)
    untouched = [path for path in before if path.suffix == ".image" and "_append_" not in path.name]
    assert len(untouched) == ALL - 1 and all(after[path] == before[path] for path in untouched)

    edit(toy / "device" / "scale.cuh", "THREADS = 128", "THREADS = 64")
    assert stale(home, toy) == cuda
    edit(toy / "device" / "scale.py", "THREADS = 128", "THREADS = 64")
    assert stale(home, toy) == everything
    edit(toy / "device" / "scale.cuh", "THREADS = 64", "THREADS = 128")
    assert stale(home, toy) == [name for name in everything if name not in cuda]


def test_G1_filtered_builds_merge_and_stale_rows_leave(tmp_path: Path, toy: Path) -> None:
    home = tmp_path / "home"
    run(home, toy, "*append*fp16*")
    run(home, toy, "*append*bf16*")
    assert len(check_whole(Layout(home / TARGET))) == 2
    edit(toy / "append.cu.j2", "FACTOR = ", "FACTOR = 1 + ")
    outcome = run(home, toy, "*append*bf16*")
    assert [name for name in outcome.dropped if "_fp16_" in name] and len(outcome.compiled) == 1
    layout = Layout(home / TARGET)
    (left,) = check_whole(layout)
    assert "_bf16_" in left and [path.stem for path in layout.objects.glob("*.image")] == [left]


def test_G1_a_damaged_product_is_made_again_and_strays_leave(built: Path, toy: Path) -> None:
    layout = Layout(built / TARGET)
    layout.library.write_bytes(b"damaged")
    outcome = run(built, toy, QUICK)
    assert outcome.compiled == () and len(check_whole(layout)) == 2
    name = outcome.fresh[0]
    strays = [layout.objects / f"{name}.o", layout.sources / f"{name}.py"]
    for path in (layout.object(name), *strays):
        path.write_bytes(b"damaged")
    assert run(built, toy, QUICK).compiled == (name,)
    assert not [path for path in strays if path.exists()]
    check_whole(layout)


def test_G1_the_host_s_code_is_compiled_once_for_all_links_and_again_where_damaged(
    built: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(built / TARGET)

    def host_code() -> Path:
        """What a link after an edit uses."""
        with (toy / "append.cu.j2").open("a") as template:
            template.write("// later\n")
        assert len(run(built, toy, "*append*fp16*").compiled) == 1
        check_whole(layout)
        (found,) = layout.link.glob("host-*.o")
        assert found.stem.endswith(sha256_of(found)[:16])
        return found

    first = host_code()
    written = first.stat().st_mtime_ns
    assert host_code() == first and first.stat().st_mtime_ns == written
    first.write_bytes(b"damaged")
    again = host_code()
    assert again.stat().st_mtime_ns != written
    monkeypatch.setattr(link, "COMPILE_FLAGS", (*link.COMPILE_FLAGS, "-DANOTHER"))
    assert host_code() != again


def processes_naming(path: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and str(path).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(reached, seconds: float, what: str) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)


def test_G1_killed_build_leaves_no_writer_and_the_next_one_completes(tmp_path: Path, toy: Path) -> None:
    home = tmp_path / "home"
    edit(toy / "flash_sm80.py.j2", "    return compile", '    __import__("time").sleep(0.5)\n    return compile')
    child = start(home, toy)
    objects = Layout(home / TARGET).objects
    wait_until(lambda: len(list(objects.glob("*.json"))) >= 2, 60, "two instances compiled")
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    wait_until(lambda: not processes_naming(home), 10, "the workers of a killed build end")
    assert not Layout(home / TARGET).manifest.exists()
    done = len(list(objects.glob("*.json")))
    assert 2 <= done < ALL
    outcome = run(home, toy)
    assert len(outcome.compiled) == ALL - done and len(outcome.fresh) == done
    assert len(check_whole(Layout(home / TARGET))) == ALL


def test_G1_two_builds_at_once_take_turns(tmp_path: Path, toy: Path) -> None:
    home = tmp_path / "home"
    children = [start(home, toy), start(home, toy)]
    answers = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], answers
    assert sorted(int(out) for out, _ in answers) == [0, ALL]
    assert len(check_whole(Layout(home / TARGET))) == ALL


def test_G1_a_build_that_waits_too_long_says_for_whom(tmp_path: Path, toy: Path) -> None:
    layout = Layout(tmp_path / "home" / TARGET)
    layout.root.mkdir(parents=True)
    heard: list[str] = []

    class Ear(Listener):
        def waiting(self, owner: str) -> None:
            heard.append(owner)

    (layout.root / ".lock.owner").write_text("process 7 on elsewhere")
    with FileLock(layout.lock), pytest.raises(BuildBusy, match="process 7 on elsewhere"):
        build(request(tmp_path / "home", toy, lock_seconds=0.2), Ear())
    assert heard == ["process 7 on elsewhere"]


BROKEN = """def cubin(arch):
    # % if spec.family == "flash_sm80" and spec.layout == "gather" and spec.mask == "window"
    {statement}
    # % endif
"""


def break_windows(toy: Path, statement: str) -> None:
    edit(toy / "flash_sm80.py.j2", "def cubin(arch):\n", BROKEN.format(statement=statement))


def test_G1_compile_error_names_the_instance_and_the_rest_compiles(tmp_path: Path, toy: Path) -> None:
    home = tmp_path / "home"
    break_windows(toy, 'print("ptxas said no")\n    raise RuntimeError("a register too few")')
    with pytest.raises(BuildError) as caught:
        run(home, toy)
    error, layout = caught.value, Layout(home / TARGET)
    assert error.instance.startswith("pa_attn_flash_sm80_fp16_kvfp16_d64v64_gather_window_")
    assert "ptxas said no" in error.output and "a register too few" in error.output
    assert f"--only {error.instance}" in error.command
    again = subprocess.run(error.command.split(), capture_output=True, text=True)
    assert again.returncode == 1 and layout.failure(error.instance).is_file()
    assert not layout.manifest.exists() and len(list(layout.objects.glob("*.json"))) == ALL - 1

    edit(toy / "flash_sm80.py.j2", 'raise RuntimeError("a register too few")', "pass")
    assert set(run(home, toy).compiled) >= {error.instance}
    assert len(check_whole(layout)) == ALL and not layout.failure(error.instance).exists()


def test_G1_an_error_of_nvrtc_names_the_instance_and_carries_its_log(tmp_path: Path, toy: Path) -> None:
    edit(toy / "device" / "scale.cuh", "*= FACTOR", "*= NOBODY")
    with pytest.raises(BuildError, match=r"^pa_append_kv_append_bf16_\w+: the build failed") as caught:
        run(tmp_path / "home", toy, QUICK)
    error = caught.value
    assert "NVRTC status 6 for sm_80" in error.output and f"--only {error.instance}" in error.command
    assert 'scale.cuh(10): error: identifier "NOBODY" is undefined' in error.output
    assert "and pa_append_kv_append_fp16_" in error.output


def test_G5_nvrtc_says_why_it_refuses_a_target(tmp_path: Path) -> None:
    source = tmp_path / "empty.cu"
    source.write_text("")
    with pytest.raises(nvrtc.NvrtcError, match=r"for sm_20\n.*gpu-architecture"):
        nvrtc.compile_image(Toolchain().nvrtc, source, "sm_20", tmp_path)


def test_G1_crash_of_the_compiler_costs_its_instance_only(tmp_path: Path, toy: Path) -> None:
    break_windows(toy, '__import__("os").abort()')
    with pytest.raises(BuildError, match=r"^pa_attn_\w+_gather_window_\w+: the build failed") as caught:
        run(tmp_path / "home", toy)
    assert "worker died" in caught.value.command
    assert len(list(Layout(tmp_path / "home" / TARGET).objects.glob("*.json"))) == ALL - 1


def test_G1_templates_edited_during_a_build_are_not_mixed(tmp_path: Path, toy: Path) -> None:
    class Editor(Listener):
        def planned(self, plan: Plan) -> None:
            edit(toy / "device" / "scale.cuh", "THREADS = 128", "THREADS = 64")

    home = tmp_path / "home"
    with pytest.raises(BuildError, match="templates changed"):
        build(request(home, toy, QUICK), Editor())
    assert not Layout(home / TARGET).manifest.exists()
    assert len(run(home, toy, QUICK).compiled) == 2


def test_G6_an_image_for_another_target_is_refused(tmp_path: Path, toy: Path) -> None:
    edit(toy / "device" / "compiling.py", "--gpu-arch {arch}", "--gpu-arch sm_89")
    with pytest.raises(BuildError, match="made code for sm_89, not for sm_80"):
        run(tmp_path / "home", toy, "*merge*fp16*")


ANOTHER_RECORD = {  # edits after which a kernel takes other arguments than its family's record says, and how many bytes
    Family.APPEND: (
        "append.cu.j2",
        "// % endfor\n",
        "// % endfor\n    long long more;\n",
        RECORDS[Family.APPEND].size + 8,
    ),
    Family.MERGE: ("flash_sm80.py.j2", "{{ spec.family }}", "flash_sm80", RECORDS[Family.FLASH_SM80].size),
}


@pytest.mark.parametrize("family", ANOTHER_RECORD)
def test_G6_an_image_with_other_arguments_than_its_record_is_refused(family: Family, tmp_path: Path, toy: Path) -> None:
    file, old, new, takes = ANOTHER_RECORD[family]
    edit(toy / file, old, new)
    with pytest.raises(BuildError, match=f"takes {takes} B, its record has {RECORDS[family].size} B") as caught:
        run(tmp_path / "home", toy, f"*_{family}_fp16_*")
    assert caught.value.instance.startswith("pa_")


def test_G6_a_kernel_with_other_shared_memory_than_its_spec_is_refused(tmp_path: Path, toy: Path) -> None:
    edit(toy / "flash_sm80.py.j2", "smem_bytes=", "smem_bytes=16 + ")
    with pytest.raises(BuildError, match="needs 16 B of shared memory, its spec says 0 B"):
        run(tmp_path / "home", toy, "*_merge_fp16_*")


def test_G1_an_undefined_name_in_a_template_is_an_error(tmp_path: Path, toy: Path) -> None:
    edit(toy / "flash_sm80.py.j2", "spec.head_dim", "spec.head_size")
    with pytest.raises(BuildError, match="head_size"):
        run(tmp_path / "home", toy)


def test_G1_an_empty_selection_is_an_error(tmp_path: Path, toy: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"filter: must match one of {len(SMOKE)} instances"):
        run(tmp_path / "home", toy, "*nothing*")
    assert not (tmp_path / "home").exists()


def test_shards_hold_everything_once_and_start_with_the_dear(tmp_path: Path, toy: Path) -> None:
    whole = Request(tmp_path, "serving", (TARGET,), None, 2, toy)
    (plan,) = [plan for _, plan in plans(whole)]
    shards = shards_of(plan.stale, 2)
    declared = matrix.declared("serving", (TARGET,))
    assert sorted(item.name for shard in shards for item in shard) == [spec.name for spec in declared]
    assert max(map(len, shards)) <= 6
    assert all(shard[0].spec.head_dim >= 256 for shard in shards)

"""torch.ops.pa_ops.* on CPU and meta tensors: schemas, opcheck, torch.compile, gradients, mutation, empty input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pa_ops
from helpers.serving import serving
from pa_ops import InvalidArgument, ops, reference
from pa_ops.schema import SCHEMAS, signature


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def overload(op: str) -> Any:
    name, _, suffix = op.partition(".")
    return getattr(getattr(torch.ops.pa_ops, name), suffix or "default")


Sample = tuple[tuple[Tensor | None, ...], dict[str, Any]]


def serving_samples(op: str) -> list[Sample]:
    """Calls of paged_attention_: split and bare, then packed with rotary; one token is not stored."""
    calls = []
    for arguments in (
        serving([3, 0, 2], [2, 5, 0]),
        serving([3, 0, 2], [2, 5, 0], packed=True, rotary_dim=6, rotary_interleaved=True, sliding_window=3)
        | {"slot_mapping": torch.tensor([0, 9, -1, 4, 7]), "sinks": torch.randn(4), "k_scale": torch.ones(2)},
    ):
        tensors = tuple(arguments.pop(name) for name in list(arguments)[:8])
        for cache in tensors[3:5]:
            cache.nan_to_num_()
        buffers = {"out": torch.zeros(5, 32).half(), "lse": torch.zeros(4, 5)} if op.endswith(".out") else {}
        calls.append((tensors, {**arguments, **buffers}))
    return calls


def samples(op: str) -> list[Sample]:
    """Calls of an operator, options absent and present."""
    if op.startswith("paged_attention_"):
        return serving_samples(op)
    q = torch.randn(5, 4, 8).half()
    k_cache, v_cache = torch.randn(2, 4, 4, 2, 8).half()
    cu_seqlens_q = int32(0, 3, 5)
    paged = (q, k_cache, v_cache, cu_seqlens_q, int32(6, 2), int32(0, 3, 2, 1).reshape(2, 2))
    varlen = (q, *torch.randn(2, 8, 2, 8).half(), cu_seqlens_q, int32(0, 6, 8))
    options = {"sliding_window": 3, "softcap": 5.0, "sinks": torch.randn(4), "softmax_scale": 0.3, "max_seqlen_q": 3}
    both = [{}, options]
    out, lse = torch.empty_like(q), torch.empty(4, 5)
    buffers = [{"out": out}, {**options, "out": out, "lse": lse}]
    padded_calls: list[dict[str, Any]] = [
        {"layout": "bnsh/bsnh"},
        {"attn_mask": torch.rand(3, 7) < 0.5, "layout": "bnsh/bsnh", "need_present": False, "sinks": torch.randn(4)},
        {
            "past_key": torch.randn(2, 7, 2, 8).half(),
            "past_value": torch.randn(2, 7, 2, 8).half(),
            "nonpad_kv_seqlen": int32(3, 14),
            "causal": True,
            "layout": "bnsh/bsnh",
        },
    ]
    padded = (torch.randn(2, 4, 3, 8).half(), *torch.randn(2, 2, 7, 2, 8).half())
    slots = torch.tensor([3, -1, 9])
    states = (q, torch.randn(4, 5), torch.randn(5, 4, 8).half(), torch.randn(4, 5))
    rows: dict[str, tuple[tuple[Tensor, ...], list[dict[str, Any]]]] = {
        "paged_attention": (paged, both),
        "paged_attention.out": (paged, buffers),
        "varlen_attention": (varlen, both),
        "varlen_attention.out": (varlen, buffers),
        "attention": (padded, padded_calls),
        "append_kv": ((*torch.randn(2, 3, 2, 8).half(), k_cache, v_cache, slots), [{}, {"k_scale": torch.ones(1)}]),
        "gather_kv": ((k_cache, v_cache, paged[5], int32(0, 6, 8), *torch.randn(2, 9, 2, 8).half()), [{}]),
        "merge_states": (states, [{}]),
    }
    tensors, choices = rows[op]
    return [(tensors, choice) for choice in choices]


@pytest.mark.parametrize("op", SCHEMAS)
def test_G7_opcheck(op: str) -> None:
    for tensors, options in samples(op):
        verdicts = torch.library.opcheck(overload(op), tensors, options)
        assert set(verdicts.values()) == {"SUCCESS"}, verdicts


@pytest.mark.parametrize("op", SCHEMAS)
def test_G7_the_schema_is_the_declared_one(op: str) -> None:
    registered = str(overload(op)._schema).replace("=0.,", "=0.0,")
    assert registered == f"pa_ops::{op}{SCHEMAS[op]}"


@pytest.mark.parametrize("op", SCHEMAS)
def test_each_backend_answers_the_operator(op: str) -> None:
    name = f"pa_ops::{op}"
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key), key


def test_tensors_elsewhere_are_refused() -> None:
    tensors, _ = samples("merge_states")[0]
    with pytest.raises(InvalidArgument, match=r"^out_a: must be on the CPU or on a CUDA device; got meta"):
        ops._on_others("merge_states")(*(tensor.to("meta") for tensor in tensors))


@pytest.mark.parametrize("op", ["paged_attention", "paged_attention_", "varlen_attention", "attention", "merge_states"])
def test_B29_fake_tensors_have_the_shapes_of_the_real_ones(op: str) -> None:
    for tensors, options in samples(op):
        real = overload(op)(*tensors, **options)
        with FakeTensorMode() as mode:
            fake = overload(op)(
                *(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in tensors),
                **{n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in options.items()},
            )
        pairs = [(real, fake)] if isinstance(real, Tensor) else zip(real, fake, strict=True)
        for r, f in pairs:
            assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


def step(q: Tensor, kv: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *where: Tensor) -> tuple[Tensor, ...]:
    """A layer's use of the operators: append, attend twice, merge, write into a buffer."""
    pa_ops.append_kv(kv, kv * 2, k_cache, v_cache, slots)
    out_a, lse_a = pa_ops.paged_attention(q, k_cache, v_cache, *where, sliding_window=4)
    out_b, lse_b = pa_ops.varlen_attention(q, kv, kv, where[0], where[0])
    present = pa_ops.attention(q[None], kv[None], kv[None], layout="bsnh", causal=True)[1]
    merged, lse = pa_ops.merge_states(out_a, lse_a, out_b, lse_b)
    into = torch.zeros_like(q)
    torch.ops.pa_ops.paged_attention.out(q, k_cache, v_cache, *where, out=into)
    return merged + 1, lse, into, present


@pytest.mark.parametrize("dynamic", [False, True])
def test_G7_torch_compile_keeps_results_and_mutation(dynamic: bool) -> None:
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for new in (5, 3) if dynamic else (5,):
        q, kv = torch.randn(new, 4, 8).half(), torch.randn(new, 2, 8).half()
        caches = torch.zeros(2, 4, 4, 2, 8).half()
        where = (int32(0, 2, new), int32(2, new - 2), int32(0, 1, 2, 3).reshape(2, 2))
        slots = torch.tensor([0, 1, *range(8, 8 + new - 2)])
        twin = caches.clone()
        want = step(q, kv, caches[0], caches[1], slots, *where)
        got = compiled(q, kv, twin[0], twin[1], slots, *where)
        assert all(map(torch.equal, want, got)) and torch.equal(caches, twin) and caches.any()


def layer(query: Tensor, caches: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Two layers of the serving operator over the same tokens: split into a buffer, then packed."""
    past, table, ends, cos, sin = rest
    where = (caches[0], caches[1], ends, past, table)
    options = {"num_heads": 4, "num_kv_heads": 2, "cos": cos, "sin": sin, "sliding_window": 5}
    out, lse = query.new_zeros(query.shape[0], 32), torch.zeros(4, query.shape[0])
    split = query.split((32, 16, 16), 1)
    torch.ops.pa_ops.paged_attention_.out(*split, *where, **options, out=out, lse=lse)
    return pa_ops.paged_attention_(query * 2, None, None, *where, **options) + out, lse


@pytest.mark.parametrize("dynamic", [False, True])
def test_G7_torch_compile_keeps_the_serving_operator_s_results_and_caches(dynamic: bool) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for new in ((3, 2), (1, 1)) if dynamic else ((3, 2),):
        a = serving(new, [2, 5], packed=True, rotary_dim=6)
        caches = torch.stack((a["k_cache"], a["v_cache"])).nan_to_num()
        twin = caches.clone()
        rest = (a["past_lens"], a["block_table"], a["cu_seqlens_q"], a["cos"], a["sin"])
        want, got = layer(a["query"], caches, *rest), compiled(a["query"], twin, *rest)
        assert all(map(torch.equal, want, got)) and torch.equal(caches, twin)
        assert want[0].isfinite().all() and not torch.equal(caches[0].nan_to_num(), a["k_cache"].nan_to_num())


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_G7_a_tensor_that_requires_grad_raises_and_says_so(name: str) -> None:
    tensors, _ = samples("paged_attention")[0]
    arguments = dict(zip(signature("paged_attention").names, tensors, strict=False))
    arguments[name].requires_grad_()
    with pytest.raises(InvalidArgument, match=f"^{name}: must not require grad: pa_ops is inference only"):
        pa_ops.paged_attention(**arguments)
    with pytest.raises(InvalidArgument, match=f"^{name}: must not require grad"):
        torch.ops.pa_ops.paged_attention(**arguments)
    with torch.inference_mode():
        assert not pa_ops.paged_attention(**arguments)[0].requires_grad


@pytest.mark.parametrize("op", SCHEMAS)
def test_B28_the_schema_marks_what_is_written(op: str) -> None:
    written = [a.name for a in overload(op)._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    caches = ["k_cache", "v_cache"] if op.startswith(("append_kv", "paged_attention_")) else []
    caches += ["k", "v"] if op == "gather_kv" else []
    assert written == caches + (["out", "lse"] if op.endswith(".out") else [])


def test_B28_append_works_in_place_on_the_slots_alone() -> None:
    (key, value, k_cache, v_cache, slots), _ = samples("append_kv")[0]
    addresses = k_cache.data_ptr(), v_cache.data_ptr()
    before = k_cache.clone(), v_cache.clone()
    assert pa_ops.append_kv(key, value, k_cache, v_cache, slots) is None
    assert (k_cache.data_ptr(), v_cache.data_ptr()) == addresses
    for cache, old, new in ((k_cache, before[0], key), (v_cache, before[1], value)):
        old[0, 3], old[2, 1] = new[0], new[2]
        assert torch.equal(cache, old)
    with pytest.raises(RuntimeError, match="out"):  # no second set of caches to write to
        torch.ops.pa_ops.append_kv(key, value, k_cache, v_cache, slots, out=k_cache.clone())


def test_X3_a_token_that_is_not_stored_still_attends() -> None:
    k_cache, v_cache = torch.randn(2, 2, 4, 1, 8).half()
    before = k_cache.clone()
    new = torch.randn(2, 1, 8).half()
    pa_ops.append_kv(new, new, k_cache, v_cache, torch.tensor([2, -1]))
    assert torch.equal(k_cache[0, 3], before[0, 3])
    q = torch.randn(2, 2, 8).half()
    where = (int32(0, 2), int32(4), int32(0).reshape(1, 1))
    out, _ = pa_ops.paged_attention(q, k_cache, v_cache, *where)
    want, _ = reference.paged_attention(q, k_cache, v_cache, *where)
    assert torch.equal(out, want) and out[1].abs().sum() > 0


def test_X8_halves_of_the_pages_merge_to_the_whole() -> None:
    (q, k_cache, v_cache, cu_seqlens_q, _, _), _ = samples("paged_attention")[0]
    table = int32(0, 1, 2, 3).reshape(2, 2)

    def attend(seqlens_k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return pa_ops.paged_attention(q, k_cache, v_cache, cu_seqlens_q, seqlens_k, table, causal=False)

    out, lse = attend(int32(7, 6), table)
    merged, merged_lse = pa_ops.merge_states(*attend(int32(4, 4), table), *attend(int32(3, 2), table[:, 1:]))
    torch.testing.assert_close(merged, out, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(merged_lse, lse)


def test_D10_X9_fused_caches_are_used_by_view() -> None:
    (q, _, _, *where), _ = samples("paged_attention")[0]
    fused = torch.zeros(4, 2, 4, 2, 8).half()
    new = torch.randn(4, 2, 8).half()
    slots = torch.tensor([0, 1, 12, 13])
    pa_ops.append_kv(new, -new, fused[:, 0], fused[:, 1], slots)
    apart = torch.zeros(2, 4, 4, 2, 8).half()
    pa_ops.append_kv(new, -new, apart[0], apart[1], slots)
    assert torch.equal(fused[:, 0], apart[0]) and torch.equal(fused[:, 1], apart[1])
    got = pa_ops.paged_attention(q, fused[:, 0], fused[:, 1], *where)
    assert all(map(torch.equal, got, pa_ops.paged_attention(q, *apart, *where)))


@pytest.mark.parametrize("sequences", [0, 2])
def test_empty_input_returns_empty_results(sequences: int) -> None:
    (_, k_cache, v_cache, *_), _ = samples("paged_attention")[0]
    q = torch.zeros(0, 4, 8).half()
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32)
    lengths, table = torch.full((sequences,), 3).int(), torch.zeros(sequences, 2, dtype=torch.int32)
    for out, lse in (
        pa_ops.paged_attention(q, k_cache, v_cache, cu_seqlens, lengths, table),
        pa_ops.varlen_attention(q, q[:, :2], q[:, :2], cu_seqlens, cu_seqlens),
        pa_ops.merge_states(q, torch.zeros(4, 0), q, torch.zeros(4, 0)),
    ):
        assert out.shape == (0, 4, 8) and lse.shape == (4, 0)
    pa_ops.append_kv(q[:, :2], q[:, :2], k_cache, v_cache, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match=r"^block_table: dtype"):  # arguments are checked all the same
        pa_ops.paged_attention(q, k_cache, v_cache, cu_seqlens, lengths, table.long())


@pytest.mark.parametrize(
    "function",
    [
        pa_ops.paged_attention,
        pa_ops.paged_attention_,
        pa_ops.varlen_attention,
        pa_ops.attention,
        pa_ops.append_kv,
        pa_ops.gather_kv,
    ],
)
def test_python_functions_are_the_operators(function: Callable[..., Any]) -> None:
    import inspect

    declared = signature(function.__name__)
    parameters = inspect.signature(function).parameters
    assert tuple(parameters) == declared.names
    defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert defaults == declared.defaults
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters.values())


def test_determinism_two_equal_calls_give_equal_bits() -> None:
    tensors, options = samples("paged_attention")[1]
    first, second = (pa_ops.paged_attention(*tensors, **options) for _ in range(2))
    assert all(map(torch.equal, first, second))

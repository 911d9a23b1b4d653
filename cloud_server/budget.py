"""What a KV budget has room for: sums without torch, for the engine and for whoever asks beforehand whether it would start."""

from __future__ import annotations

import os

from ..artifact.errors import UsageError
from ..artifact.shape import DecoderShape

DEFAULT_CONTEXT_TOKENS = 2048
"""Tokens of one session's cache unless told otherwise: long enough to chat, and many fit."""

BLOCK_TOKENS = 64
"""What the budget is counted in: with heads of 64 values in fp32, 16 KiB a head and layer, four pages of the kernel's."""


def context_of(shape: DecoderShape, asked_tokens: int | None) -> int:
    """Most tokens of one session; asked_tokens: None for the default. Raises UsageError if the model has no room for so many."""
    context = min(shape.context_tokens, DEFAULT_CONTEXT_TOKENS) if asked_tokens is None else asked_tokens
    if not 1 <= context <= shape.context_tokens:
        raise UsageError(f"--context {context}, expected 1..{shape.context_tokens}, the model's own")
    return context


def block_tokens_of(context_tokens: int) -> int:
    """Tokens of one block."""
    return min(BLOCK_TOKENS, context_tokens)


def blocks_of(context_tokens: int, token_bytes: int, budget_bytes: int) -> int:
    """Blocks that the budget holds. token_bytes: of one token's keys and values in all layers. Raises UsageError if the budget holds no
    whole context, or is more than the machine has."""
    block_tokens = block_tokens_of(context_tokens)
    blocks, needed = budget_bytes // (block_tokens * token_bytes), -(-context_tokens // block_tokens)
    if blocks < needed:
        raise UsageError(
            f"a KV budget of {budget_bytes:,} bytes holds no session: one of {context_tokens} tokens takes "
            f"{needed * block_tokens * token_bytes:,}; raise --kv-bytes or lower --context"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if budget_bytes > memory:
        raise UsageError(f"a KV budget of {budget_bytes:,} bytes is more than this machine's memory of {memory:,}; lower --kv-bytes")
    return blocks

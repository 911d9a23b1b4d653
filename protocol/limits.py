"""Limits and names of the wire, each with its reason."""

from __future__ import annotations

from ..artifact.errors import PlanError
from ..artifact.hashes import PROTOCOL_MAJOR
from ..artifact.plan import ExchangePlan
from ..artifact.shape import DTYPE_BYTES, DecoderShape

MAJOR = PROTOCOL_MAJOR
MINOR = 3
SERVICE = "plora.v1.PrivateLora"
METHOD = "Exchange"
TOKEN_KEY, TOKEN_SCHEME = "authorization", "Bearer "
"""Of a call's metadata, before the access token, where the cloud asks for one (RFC 6750, section 2.1)."""

MAX_FRAME_BYTES = 4 << 20
"""Largest frame: gRPC's own default, so that no proxy or client needs a setting, and a slow peer cannot make us hold more."""

FRAME_OVERHEAD_BYTES = 256
"""Room for everything in a frame but tensor data: tags, lengths and numbers take under 100 bytes."""

MAX_STEP_TOKENS = 256
"""Tokens per step: a prefill chunk beyond this gains no speed on the cores measured and holds the engine for longer."""

WINDOW = 4
"""Steps in flight: enough that chunks of a prompt go up while earlier ones are computed and later rounds come down."""

MAX_UNRECEIVED_FRAMES = 2 * WINDOW + 4
"""Numbered frames that one side keeps for a peer that has not said that it received them. Each step in flight has at most one on its way
in either direction; then there are WINDOW truncates, a cancel and a close. A peer that lets more pile up never says so at all."""

MAX_PROBE_BYTES = 1 << 20
"""Padding of a ping or pong: long enough to measure a rate of 100 Mbit/s over 80 ms, and no more of a lever for a flood than a step."""

CONTRACT_BYTES = 32
SESSION_BYTES = 16
MAX_DETAIL_CHARACTERS = 500


def device_frame_bytes(plan: ExchangePlan, shape: DecoderShape) -> int:
    """The largest frame that a device may send under this plan: a whole step's entry or injections in fp32, or a probe."""
    entry = shape.hidden + (plan.entry_exchange.injection_columns if plan.entry_exchange else 0)
    widest = max([entry, *(exchange.injection_columns for exchange in plan.exchanges)])
    step = step_tokens(plan, shape) * widest * DTYPE_BYTES["fp32"]
    return min(max(step, MAX_PROBE_BYTES) + FRAME_OVERHEAD_BYTES, MAX_FRAME_BYTES)


def step_tokens(plan: ExchangePlan, shape: DecoderShape) -> int:
    """Most tokens of one step such that none of its frames passes MAX_FRAME_BYTES, in fp32; at most MAX_STEP_TOKENS.

    Raises PlanError if not even one token fits.
    """
    entry = shape.hidden + (plan.entry_exchange.injection_columns if plan.entry_exchange else 0)
    widest = max([entry, *(max(e.compressed_columns, e.injection_columns) for e in plan.exchanges)])
    token_bytes = widest * DTYPE_BYTES["fp32"]
    if token_bytes > MAX_FRAME_BYTES - FRAME_OVERHEAD_BYTES:
        raise PlanError(f"one token takes {token_bytes} bytes in the plan's widest frame, the limit is {MAX_FRAME_BYTES}; lower the ranks")
    return min(MAX_STEP_TOKENS, (MAX_FRAME_BYTES - FRAME_OVERHEAD_BYTES) // token_bytes)

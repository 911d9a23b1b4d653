"""What crosses the network per token, counted on the socket."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plora.artifact.cost import payload

from .link import Link
from .profiles import profile

if TYPE_CHECKING:
    from plora.device_runtime import PrivateSession


def socket_bytes(address: str, edge: Path, dtype: str = "fp32") -> dict[str, Any]:
    """Bytes and gRPC messages per token on the TCP socket, HTTP/2 and gRPC framing included, from the difference of two lengths;
    and the communication reduction with all of that framing counted against us."""
    from plora.device_runtime import open_session
    from plora.protocol import read_precision

    with Link(address, profile("loopback")) as link, open_session(edge, link.address, wire_dtype=dtype) as session:
        session.text.defaults = replace(session.text.defaults, eos_token_ids=())  # always as many tokens as asked for
        counted = []
        for count in (8, 40):
            session.forget()
            before = _counts(link, session)
            list(session.stream(prompt_within(session.edge.shape.vocabulary), session.sampling(max_tokens=count, temperature=0.0)))
            time.sleep(0.2)  # what is still on its way through the link
            assert session.answer is not None
            counted.append(
                (*(after - own for after, own in zip(_counts(link, session), before, strict=True)), len(session.answer.token_ids))
            )
        short, long = counted
        tokens = long[4] - short[4]
        cost = payload(session.edge.plan, session.edge.shape, asdict(read_precision(dtype)))
    up, down, messages_up, messages_down = ((b - a) / tokens for a, b in zip(short[:4], long[:4], strict=True))
    exchanged = up + down - cost.entry_up - cost.exit_down
    full = cost.full_rank_up + cost.full_rank_down
    return {
        "wire_dtype": dtype,
        "up_bytes_per_token": up,
        "down_bytes_per_token": down,
        "payload_up_bytes_per_token": cost.up,
        "payload_down_bytes_per_token": cost.down,
        "full_rank_bytes_per_token": full,
        "messages_up_per_token": messages_up,
        "round_trips_per_token": messages_down,
        "communication_reduction": 1 - exchanged / full if full else 0.0,
        "communication_reduction_payload_only": cost.communication_reduction,
    }


def _counts(link: Link, session: PrivateSession) -> tuple[int, int, int, int]:
    """Bytes up and down, messages up and down. The device waits once for each message down, but for pongs: these are the round trips."""
    crossed, pings = link.counters(), session._link.pings
    return crossed.up_bytes, crossed.down_bytes, crossed.up_messages - pings, crossed.down_messages - pings


def prompt_within(vocabulary: int) -> list[int]:
    return [1 + (31 * index) % (vocabulary - 1) for index in range(4)]

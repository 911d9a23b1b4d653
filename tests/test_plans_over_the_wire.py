"""Every kind of plan between a real server and a real device: the tokens of the unsplit model, in as many round trips as planned."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plora.artifact import AdaptedLayer, ExchangePlan, Source, entry_plan, grouped_plan, paper_plan
from plora.artifact.edge_layout import fused_attention
from plora.device_runtime import PrivateSession, open_session
from plora.device_runtime.chunks import CHUNK_TOKENS
from plora.models.adapter import write_cores
from plora.models.checkpoint import Base
from plora.models.formula import adapted
from plora.protocol import plora_pb2 as pb

from .conftest import Made, answer, cloud, greedy, make_export, oracle, tuned

CONTEXT = 512
HALF_GAP = 0.1
"""Over fp16 the tokens must be equal where the two best logits, some tens in size, lie further apart than this."""

CUSTOM = ExchangePlan(
    7, 1, 1,
    (
        Source(1, (("q", 3), ("v", 5), ("down", 2)), on_device=True),
        Source(2, (("shared", 6),), shared_injection=8),
        Source(4, (("k", 2), ("o", 4))),
    ),
    (
        AdaptedLayer(1, 1, (("q", 3), ("v", 4))), AdaptedLayer(2, 2, (("k", 4), ("gate", 3))), AdaptedLayer(3, 1, (("v", 2), ("down", 6))),
        AdaptedLayer(4, 4, (("k", 2), ("o", 4))), AdaptedLayer(5, 2, (("q", 5), ("up", 2), ("down", 3))),
    ),
)  # fmt: skip
"""Every feature at once: layer 3 is fed across an exchange by the entry, layer 5 by an exchange that another one follows."""

FUSED = {"head_dim": 16}
PLANS: dict[str, tuple[str, ExchangePlan, dict[str, Any]]] = {
    "paper": ("llama", paper_plan(3, 6), {}),
    "grouped": ("mistral-window", grouped_plan(4, 2, 5, ("q", "v", "o", "down"), out_rank=4), {}),
    "grouped-ranks-separate": ("llama3-rope", grouped_plan(5, 2, (3, 6, 4), ("q", "k", "gate"), separate=True), {}),
    "grouped-shared": ("qwen2", grouped_plan(4, 2, 6, shared_injection=9), {}),
    "entry": ("qwen2-window", entry_plan(4, 0, 6, ("q", "k", "v", "down")), {}),
    "entry-front": ("llama", entry_plan(4, 1, 6, separate=True), FUSED),
    "entry-front-back-shared": ("mistral-window", entry_plan(5, 1, 6, shared_injection=7, back_layers=2), FUSED),
    "front-back": ("llama-mha-bias", grouped_plan(5, 2, 4, front_layers=2, back_layers=1), {"head_dim": 12}),
    "custom": ("llama3-rope", CUSTOM, FUSED),
    "entry-features": ("llama", entry_plan(4, 1, 6, shared_injection=9, features=10), FUSED),
    "grouped-features": ("qwen2", grouped_plan(4, 2, 6, ("q", "v", "o", "down"), out_rank=4, features=7), {}),
}


def unsplit(base: Base, made: Made, ids: list[int], count: int) -> list[int]:
    with adapted(base.model, made.adapter):
        return greedy(base, ids, count)


@contextmanager
def counted(session: PrivateSession) -> Iterator[list[tuple[str, str]]]:
    """(way, kind) of every frame that crosses inside the block."""
    transport, frames = session._link.transport, list[tuple[str, str]]()
    assert transport is not None
    send, receive = transport.send, transport.receive

    def note(way: str, data: bytes) -> bytes:
        kind = pb.Frame.FromString(data).WhichOneof("kind") or ""
        if kind not in ("ping", "pong"):  # on a machine so busy that a step takes long, the device asks whether the cloud is there
            frames.append((way, kind))
        return data

    async def noted_send(data: bytes) -> None:
        await send(note("up", data))

    async def noted_receive() -> bytes:
        return note("down", await receive())

    transport.send, transport.receive = noted_send, noted_receive  # type: ignore[method-assign]
    yield frames
    transport.send, transport.receive = send, receive  # type: ignore[method-assign]


def check_tokens_and_round_trips(session: PrivateSession, base: Base, made: Made) -> None:
    plan = made.adapter.config.plan
    for prompt in ("the quick brown fox", "naïve café 12345, a lighthouse keeper writes down the weather every"):
        ids = session.text.encode_raw(prompt)
        with counted(session) as frames:
            tokens = answer(session, ids, 40)
        assert tokens == unsplit(base, made, ids, 40) != greedy(base, ids, 40)
        assert session.answer is not None
        stats = session.answer.stats
        assert stats.round_trips_per_token == plan.round_trips
        steps = len(tokens)  # the prompt is one, the last token is not fed
        one = [("up", "entry"), *[("down", "compressed"), ("up", "injections")] * len(plan.exchanges), ("down", "exit")]
        assert frames == one * steps
        session.forget()


def check_bytes(session: PrivateSession, made: Made) -> None:
    """Per token, what the plan says, and under 30 bytes around each frame."""
    plan = made.adapter.config.plan
    hidden = session.edge.shape.hidden
    up = 4 * (hidden + sum(exchange.injection_columns for exchange in plan.all_exchanges))
    down = 4 * (hidden + sum(exchange.compressed_columns for exchange in plan.exchanges))
    answer(session, [5, 6, 7], 16)
    assert session.answer is not None
    stats = session.answer.stats
    assert up < stats.bytes_up_per_token < up + 40 * plan.round_trips
    assert down < stats.bytes_down_per_token < down + 40 * plan.round_trips


def check_turns(session: PrivateSession, base: Base, made: Made) -> None:
    """Continued, taken back, begun anew: only what is new goes up, and what was taken back leaves no trace."""
    session.forget()
    said = answer(session, [5, 6, 7, 8, 9], 10)
    longer = [5, 6, 7, 8, 9, *said, 11, 12, 13]
    for ids, kept in (
        (longer, 4 + len(said)),
        ([*longer[:7], 100, 101, 102], 7),
        ([5, 6, 7, 200], 3),
        ([201, 202], 0),
        ([201, 202], 1),
        ([201], 0),
        ([201, *longer], 1),
    ):
        assert answer(session, ids, 10) == unsplit(base, made, ids, 10), ids
        assert session.answer is not None
        assert session.answer.stats.cached_tokens == kept, ids


def check_long_prompts(session: PrivateSession, base: Base, made: Made) -> None:
    """In chunks, from the start and after what is cached."""
    ids = np.random.default_rng(0).integers(2, 300, 400).tolist()
    before = session._stepper.counters.steps
    tokens = answer(session, ids, 6)
    assert tokens == unsplit(base, made, ids, 6)
    assert session._stepper.counters.steps == before + -(-len(ids) // CHUNK_TOKENS) + len(tokens) - 1
    other = [*ids[:50], *ids[:400]]
    assert answer(session, other, 6) == unsplit(base, made, other, 6)


def check_interruptions(session: PrivateSession, base: Base, made: Made) -> None:
    """Ctrl-C at each of the first frames of an answer, prompt and first tokens; the next answer reuses what is cached."""
    transport = session._link.transport
    assert transport is not None
    real = transport.receive
    prompt = [5, 6, 7, 8, 9, 10, 11]
    for moment in range(2 * made.adapter.config.plan.round_trips + 1):
        left = [moment]

        async def receive(left: list[int] = left) -> bytes:
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            left[0] -= 1
            return await real()

        transport.receive = receive  # type: ignore[method-assign]
        try:
            with pytest.raises(KeyboardInterrupt):
                answer(session, [*prompt[: 3 + moment % 3], 12 + moment], 16)
        finally:
            transport.receive = real  # type: ignore[method-assign]
        assert answer(session, prompt, 8) == unsplit(base, made, prompt, 8), moment


def check_personas(made: Made, base: Base, address: str, folder: Path) -> None:
    """Another's cores say something else, as they should; without cores it is the base."""
    edge, ids = made.out / "edge", [5, 6, 7, 8]
    other = tuned(made.adapter, seed=8)
    write_cores(other, folder / "other.safetensors")
    with open_session(edge, address, cores=folder / "other.safetensors") as session:
        with adapted(base.model, other):
            expected = greedy(base, ids, 24)
        assert answer(session, ids, 24) == expected != unsplit(base, made, ids, 24)
    with open_session(edge, address, base_only=True) as session:
        assert answer(session, ids, 24) == greedy(base, ids, 24)


@torch.no_grad()
def check_half_precision_wire(made: Made, base: Base, address: str) -> None:
    """Equal until two tokens were nearly as good; at half the bytes."""
    with open_session(made.out / "edge", address, wire_dtype="fp16", graphs="ort") as session:
        for ids in ([5, 6, 7], [80, 90, 100, 110]):
            tokens = answer(session, ids, 24)
            with adapted(base.model, made.adapter):
                best = base.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].topk(2)
            for place, token in enumerate(tokens):
                if token != int(best.indices[place, 0]):
                    assert float(best.values[place, 0] - best.values[place, 1]) < HALF_GAP
            assert sum(token == int(best.indices[place, 0]) for place, token in enumerate(tokens)) > len(tokens) * 3 // 4
        half = session.answer
    with open_session(made.out / "edge", address) as session:
        answer(session, [80, 90, 100, 110], 24)
        assert half is not None
        assert session.answer is not None
        assert half.stats.bytes_up_per_token < 0.7 * session.answer.stats.bytes_up_per_token


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_between_server_and_device(name: str, tmp_path: Path) -> None:
    """One export and one server for all of it: they are what takes the time."""
    family, plan, overrides = PLANS[name]
    made = make_export(
        tmp_path, family, lambda layers: plan, num_hidden_layers=plan.layers, max_position_embeddings=CONTEXT, verified=False, **overrides
    )
    base = oracle(made)
    assert fused_attention(base.shape) == (overrides is FUSED)
    with cloud(made.out / "cloud") as (address, _):
        with open_session(made.out / "edge", address) as session:
            check_tokens_and_round_trips(session, base, made)
            check_bytes(session, made)
            check_turns(session, base, made)
            check_long_prompts(session, base, made)
            check_interruptions(session, base, made)
        check_personas(made, base, address, tmp_path)
        check_half_precision_wire(made, base, address)


def test_plans_of_these_tests_are_what_their_names_say() -> None:
    assert {name: plan.round_trips for name, (_, plan, _) in PLANS.items()} == {
        "paper": 4, "grouped": 3, "grouped-ranks-separate": 4, "grouped-shared": 3, "entry": 1, "entry-front": 1,
        "entry-front-back-shared": 1, "front-back": 2, "custom": 3, "entry-features": 1, "grouped-features": 3,
    }  # fmt: skip
    assert [segment.inputs for segment in CUSTOM.segments] == [(-1,), (-1, 0), (0, 1)]

"""The unsplit model, tensor by tensor; and both halves built from parts and joined without a network, for tests that make many."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from plora.artifact.hashes import EXIT_CONVENTION, PROTOCOL_MAJOR, Contract, record_files
from plora.artifact.manifest import FORMATS, MANIFEST, VERSIONS, EdgeManifest, write_json
from plora.cloud_server.cache import Pool
from plora.cloud_server.config import Limits
from plora.cloud_server.engine import Engine
from plora.cloud_server.service import Service
from plora.device_runtime.edge import Edge
from plora.device_runtime.link import Link
from plora.device_runtime.stepper import Stepper
from plora.device_runtime.transport import Deadlines, Interrupted
from plora.export.cloud_build import build_cloud_graph
from plora.export.edge_files import write_numbers
from plora.models.adapter import Adapter, replace_cores
from plora.models.checkpoint import Base, Source, decoder_shape, is_tied
from plora.models.formula import adapted
from plora.protocol import plora_pb2 as pb
from plora.protocol import tensors, uniform
from plora.protocol.roles import DeviceSession

from .conftest import FAMILIES, SMALL
from .strategies import Act

VOCABULARY = 40
CONTEXT = 64
LEAST_SCALE = 0.1
"""What a tensor's error is relative to where all of its values are smaller: a lone one near zero is a difference of larger ones."""


def error(got: Any, expected: Any) -> float:
    """Largest difference over the largest value."""
    got, expected = (torch.as_tensor(np.asarray(tensor)) for tensor in (got, expected))
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-9)) if got.numel() else 0.0


def perturbed(adapter: Adapter, name: str) -> Adapter:
    """`adapter` with one core plainly wrong."""
    core = adapter.cores[name]
    signs = torch.randn(core.shape, generator=torch.Generator().manual_seed(9)).sign()
    return replace_cores(adapter, {**adapter.cores, name: core + 3 * signs})


# The unsplit model


@dataclass
class Unsplit:
    """What transformers computes with the adapter hooked in. hidden: what each layer reads and, last, the final norm [T, H];
    compressed, injection: [T, C] and [T, I] by exchange, -1 the entry's; logits: [T, V]."""

    hidden: list[Tensor] = field(default_factory=list)
    compressed: dict[int, Tensor] = field(default_factory=dict)
    injection: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def crossing(self, adapter: Adapter) -> dict[str, Tensor]:
        """What of it crosses the wire, and the residual before the final norm, by the names of the verification's report."""
        plan = adapter.config.plan
        crossing = {"entry": self.hidden[plan.front_layers], "exit": self.hidden[plan.layers - plan.back_layers]}
        crossing |= {f"compressed.{exchange.index}": self.compressed[exchange.index] for exchange in plan.exchanges}
        crossing |= {f"injection.{exchange.index}": self.injection[exchange.index] for exchange in plan.all_exchanges}
        return {**crossing, "residual": self.hidden[-1]}


@torch.no_grad()
def unsplit(base: Base, adapter: Adapter, ids: list[int]) -> Unsplit:
    model, seen, plan = base.model, Unsplit(), adapter.config.plan
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: seen.hidden.append(inputs[0][0].clone()))
        for module in (*model.model.layers, model.model.norm)
    ]
    with adapted(model, adapter) as cores:
        seen.logits = model(torch.tensor([ids])).logits[0]
        for exchange in plan.all_exchanges:
            names = [name for name, _ in plan.source(exchange.source).ranks]
            seen.compressed[exchange.index] = torch.cat([cores.compressed[exchange.source, name][0] for name in names], -1)
            seen.injection[exchange.index] = cores.injection(exchange)[0]
    for hook in hooks:
        hook.remove()
    return seen


def tiny_base(family: str, seed: int = 0, **overrides: Any) -> Base:
    """A random model of `family` in memory: no file, no tokenizer, a vocabulary of VOCABULARY."""
    name, extra = FAMILIES[family]
    settings = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": 0, "bos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**{**settings, **extra, **overrides}, attn_implementation="sdpa")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter += torch.randn_like(parameter) * 0.1  # ones and zeros would hide a forgotten weight
    return Base(family, decoder_shape(model), model, "ba5e" * 16, Source("nowhere", None))


def contract_of(base: Base, adapter: Adapter) -> Contract:
    return Contract(PROTOCOL_MAJOR, adapter.config.plan, base.shape, adapter.config.basis, base.fingerprint, EXIT_CONVENTION)


# The halves


def write_edge_half(folder: Path, base: Base, adapter: Adapter, dtype: str = "fp32", ort: bool = False) -> Path:
    """The edge half as export writes it, without its texts, and without `.ort` graphs unless asked for. Leaves the model whole."""
    folder.mkdir(parents=True, exist_ok=True)
    names = write_numbers(folder, base, adapter, dtype, ort)
    contract = contract_of(base, adapter)
    files = record_files(folder, names)
    manifest = EdgeManifest(
        FORMATS[EdgeManifest], VERSIONS[EdgeManifest], "tests", contract.hash, contract, dtype, is_tied(base.model), files
    )
    write_json(folder / MANIFEST, manifest)
    return folder


class EagerEngine(Engine):
    """The engine on a graph that was neither compiled nor written; it consumes the model's layers."""

    def __init__(self, base: Base, adapter: Adapter, slots: int = 2) -> None:
        self.contract = contract_of(base, adapter)
        layers = self.contract.plan.cloud_layers
        budget = slots * CONTEXT * base.shape.kv_bytes_per_token("fp32", layers)
        pool = Pool(base.shape, layers, CONTEXT, budget, "fp32", slots)
        self._hold(build_cloud_graph(base.model, base.shape, adapter), pool, torch.float32)


# Joined


class Wire:
    """Stands in for the device's transport and the cloud's stream: frames go across in this process, and are kept."""

    ended = None
    heard_at = 0.0

    def __init__(self) -> None:
        self.going_up: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.going_down: asyncio.Queue[bytes] = asyncio.Queue()
        self.up: list[bytes] = []
        self.down: list[bytes] = []
        self.interrupted = False
        self.frames_left: int | None = None

    async def connect(self, seconds: float | None = None) -> None:
        pass

    async def send(self, data: bytes) -> None:
        self.up.append(data)
        self.going_up.put_nowait(data)

    async def receive(self) -> bytes:
        if self.frames_left == 0:
            self.frames_left = None
            raise Interrupted
        self.down.append(await self.going_down.get())
        if self.frames_left is not None:
            self.frames_left -= 1
        return self.down[-1]

    async def close(self) -> None:
        self.going_up.put_nowait(None)

    async def read(self) -> bytes | None:
        return await self.going_up.get()

    async def write(self, data: bytes) -> None:
        self.going_down.put_nowait(data)


@contextmanager
def service_of(engine: Engine) -> Iterator[Service]:
    service = Service(engine, Limits())
    try:
        yield service
    finally:
        service.close()


class Talk:
    """One session of an edge half and a service, and what crossed for the tokens that are cached now.

    rows: by the names of the report, one row per token, NaN where none came back.
    """

    def __init__(self, edge: Edge, service: Service, dtype: str = "fp32", alone: bool = False) -> None:
        self.wire, self.plan = Wire(), edge.plan
        contract = edge.contract

        def machine() -> DeviceSession:
            return DeviceSession(contract.plan, contract.shape, contract.hash, uniform(dtype), alone)

        link = Link("this process", Deadlines(), machine, lambda state: None, lambda address, deadlines: self.wire)  # type: ignore[arg-type]
        self.stepper = Stepper(edge, link)
        self.dtype = dtype
        self.serving = asyncio.create_task(service.exchange(None, self.wire))
        self.ids: list[int] = []
        self.rows: dict[str, np.ndarray] = {}

    async def act(self, act: Act, ids: list[int]) -> None:
        """One act of a person, who says `ids`."""
        keep = len(self.ids) * act.keep // 1000
        if keep < len(self.ids):
            self.stepper.keep(keep)
            self.ids, self.rows = self.ids[:keep], {name: rows[:keep] for name, rows in self.rows.items()}
        sent, arrived = len(self.wire.up), len(self.wire.down)
        wanted = min(act.exit_rows, len(ids))
        self.wire.frames_left = act.interrupted_after
        try:
            residual = await self.stepper.feed(ids, wanted)
        except Interrupted:
            await self.stepper.cancel()
            assert len(self.stepper.history) == len(self.ids)
            return
        self.wire.frames_left = None
        frames = steps_alone(self.wire.up[sent:]), steps_alone(self.wire.down[arrived:])
        assert [len(way) for way in frames] == [self.plan.round_trips] * 2
        self.ids = self.ids + ids
        for name, rows in {**tensors_in(frames[0] + frames[1], self.dtype), "residual": residual}.items():
            seen = self.rows.get(name, np.zeros((0, rows.shape[1]), np.float32))
            missing = np.full((len(self.ids) - len(seen) - len(rows), rows.shape[1]), np.nan, np.float32)
            self.rows[name] = np.concatenate([seen, missing, rows])

    def error(self, name: str, expected: Tensor) -> float:
        """Of what crossed under this name, against all tokens' rows [T, N]."""
        got = self.rows.get(name, np.zeros((0, expected.shape[1]), np.float32))
        there = ~np.isnan(got).any(1)
        there = np.concatenate([there, np.zeros(len(expected) - len(got), bool)])
        return float(
            np.abs(got[there[: len(got)]] - expected.numpy()[there]).max(initial=0.0) / expected.abs().max().clamp_min(LEAST_SCALE)
        )

    async def close(self) -> None:
        await self.stepper.close()
        await self.serving


def steps_alone(frames: list[bytes]) -> list[bytes]:
    """Without the heartbeat's, of which there are some where the machine is busy."""
    return [data for data in frames if pb.Frame.FromString(data).WhichOneof("kind") not in ("ping", "pong")]


def tensors_in(frames: list[bytes], dtype: str) -> dict[str, np.ndarray]:
    """The tensors in the frames of one step, by the names of the report."""
    found: dict[str, pb.Tensor] = {}
    for data in frames:
        frame = pb.Frame.FromString(data)
        kind = frame.WhichOneof("kind")
        if kind == "entry":
            found["entry"] = frame.entry.hidden
            if frame.entry.HasField("injection"):
                found["injection.-1"] = frame.entry.injection
        elif kind == "compressed":
            found[f"compressed.{frame.compressed.exchange}"] = frame.compressed.tensor
        elif kind == "injections":
            found[f"injection.{frame.injections.exchange}"] = frame.injections.tensor
        elif kind == "exit" and frame.exit.HasField("hidden"):
            found["exit"] = frame.exit.hidden
    return {name: tensors.decode(tensor, dtype, tensor.rows, tensor.columns, name) for name, tensor in found.items()}

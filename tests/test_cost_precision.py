"""Bytes by wire precision against the frames themselves; and the parts of bench/precision.py that need no model."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import precision as bench
from bench.prompts import PROMPTS
from plora.artifact import ExchangePlan, entry_plan, grouped_plan, paper_plan
from plora.artifact.cost import KINDS, SCALE_BYTES, WIRE_BYTES, Payload, payload, prompt_bytes, unshared
from plora.artifact.errors import UsageError
from plora.protocol import Precision, read_precision, uniform
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import Terms
from plora.protocol.loopback import Loopback
from plora.protocol.tensors import CODES, VALUE_BYTES

from .strategies import legal_plans
from .test_protocol import CONTRACT, HIDDEN, shape_of

precisions = st.builds(Precision, *[st.sampled_from(sorted(CODES))] * 4)
PLAN = grouped_plan(6, 2, 3)  # 3 exchanges


def tensor_bytes(data: bytes) -> dict[str, int]:
    """By kind, of the tensors of one frame; a tensor without rows is none."""
    frame = pb.Frame.FromString(data)
    found = {
        "entry": frame.entry.hidden,
        "injections": frame.entry.injection if frame.HasField("entry") else frame.injections.tensor,
        "compressed": frame.compressed.tensor,
        "exit": frame.exit.hidden,
    }
    return {kind: len(tensor.data) + len(tensor.scales) for kind, tensor in found.items()}


def stepped(plan: ExchangePlan, precision: Precision, tokens: int, exit_rows: int) -> dict[str, int]:
    """Tensor bytes by kind of one step over the loopback pair."""
    wire = Loopback(plan, shape_of(HIDDEN, plan.layers), CONTRACT, precision)
    wire.to_cloud(wire.device.hello())
    wire.to_device(wire.cloud.welcome(Terms(precision, 64, 64, 60_000, b"s" * 16)))
    held = plan.entry_exchange
    ones = lambda rows, columns: np.ones((rows, columns), np.float32)  # noqa: E731
    wire.to_cloud(wire.device.entry(ones(tokens, HIDDEN), exit_rows, ones(tokens, held.injection_columns) if held else None))
    for exchange in plan.exchanges:
        wire.to_device(wire.cloud.compressed(ones(tokens, exchange.compressed_columns)))
        wire.to_cloud(wire.device.injections(ones(tokens, exchange.injection_columns)))
    wire.to_device(wire.cloud.exit(ones(exit_rows, HIDDEN)))
    sizes = [tensor_bytes(data) for _, data in wire.transcript]
    return {kind: sum(size[kind] for size in sizes) for kind in KINDS}


@given(legal_plans(), precisions, st.integers(1, 5))
def test_payload_is_what_the_frames_carry(plan: ExchangePlan, precision: Precision, tokens: int) -> None:
    shape, wire = shape_of(HIDDEN, plan.layers), asdict(precision)
    cost = payload(plan, shape, wire)
    found = stepped(plan, precision, 1, 1)
    assert (found["entry"], found["injections"]) == (cost.entry_up, cost.low_rank_up)
    assert (found["compressed"], found["exit"]) == (cost.low_rank_down, cost.exit_down)
    found = stepped(plan, precision, tokens, tokens if plan.back_layers else 1)
    expected = found["entry"] + found["injections"], found["compressed"] + found["exit"]
    assert prompt_bytes(plan, shape, wire, tokens) == expected


def test_the_names_are_the_protocols() -> None:
    assert tuple(asdict(Precision())) == KINDS
    assert WIRE_BYTES == VALUE_BYTES


@pytest.mark.parametrize("dtype", WIRE_BYTES)
def test_one_dtype_is_short_for_all_four(dtype: str) -> None:
    shape = shape_of(HIDDEN, 6)
    assert payload(PLAN, shape, dtype) == payload(PLAN, shape, asdict(uniform(dtype)))
    assert payload(PLAN, shape, {}) == payload(PLAN, shape, "fp32")
    assert prompt_bytes(PLAN, shape, dtype, 7) == prompt_bytes(PLAN, shape, asdict(uniform(dtype)), 7)


def test_int8_by_hand() -> None:
    shape = shape_of(HIDDEN, 6)
    single, quarter = payload(PLAN, shape, "fp32"), payload(PLAN, shape, "int8")
    scales = Payload(1, 1, 3, 3, 3, 3)  # tensors of a token, each with a scale; at full rank as many
    for part, tensors in asdict(scales).items():
        assert getattr(quarter, part) == getattr(single, part) // 4 + tensors * SCALE_BYTES
    assert quarter.communication_reduction == 1 - (quarter.low_rank_up + quarter.low_rank_down) / (
        quarter.full_rank_up + quarter.full_rank_down
    )


def test_a_kind_changes_its_own_bytes_only() -> None:
    shape, plan = shape_of(HIDDEN, 6), grouped_plan(6, 2, 3)
    plain = payload(plan, shape, "fp32")
    for kind, parts in (
        ("entry", ["entry_up"]),
        ("exit", ["exit_down"]),
        ("injections", ["low_rank_up", "full_rank_up"]),
        ("compressed", ["low_rank_down", "full_rank_down"]),
    ):
        halved = payload(plan, shape, {kind: "fp16"})
        assert halved == replace(plain, **{part: getattr(plain, part) // 2 for part in parts})


def test_reduction_at_one_float_precision_is_the_same_at_another() -> None:
    shape, plan = shape_of(HIDDEN, 6), entry_plan(6, 1, 4, shared_injection=5)
    assert payload(plan, shape, "fp32").communication_reduction == payload(plan, shape, "bf16").communication_reduction
    assert payload(plan, shape, "int8").communication_reduction < payload(plan, shape, "fp32").communication_reduction  # the scale
    assert payload(unshared(plan), shape, "int8").low_rank_up > payload(plan, shape, "int8").low_rank_up


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ("int4", "wire dtype 'int4' for entry, expected one of fp32, fp16, bf16, int8"),
        ({"exit": "fp8"}, "wire dtype 'fp8' for exit, expected one of"),
        ({"injection": "fp16"}, "wire dtype for 'injection': the kinds are entry, compressed, injections, exit"),
    ],
)
def test_a_wire_that_does_not_exist(wire: str | dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        payload(PLAN, shape_of(HIDDEN, 6), wire)
    assert str(error.value).startswith(message)


# bench/precision.py


@pytest.mark.parametrize("plan", [PLAN, entry_plan(6, 1, 4), paper_plan(2, 3), ExchangePlan(2, 0, 0, (), ())], ids=str)
def test_every_wire_that_is_tried_can_be_asked_for(plan: ExchangePlan) -> None:
    kinds = bench.kinds_of(plan)
    crossed = stepped(plan, Precision(), 1, 1)
    assert kinds == [kind for kind in KINDS if crossed[kind]]
    wires = bench.wires(plan)
    assert len(set(wires)) == len(wires) == 3 * len(kinds) + 3 + 2 ** len(kinds) - 2
    asked = [tuple(asdict(read_precision(wire))[kind] for kind in kinds) for wire in wires]
    assert len(set(asked)) == len(asked)
    assert not any("fp32" in dtypes for wire, dtypes in zip(wires, asked, strict=True) if "=" not in wire or "," in wire)


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row.astype(np.float64))
    return powers / powers.sum()


def test_distance_against_loops() -> None:
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(5, 11)).astype(np.float32)
    logits = reference + generator.normal(size=(5, 11)).astype(np.float32)
    ids = [3, 1, 4, 1, 5]
    found = bench.distance(reference, logits, ids)
    for at in range(5):
        p, q = softmax(reference[at]), softmax(logits[at])
        assert found.kl[at] == pytest.approx(sum(p[i] * np.log(p[i] / q[i]) for i in range(11)))
        assert found.top[at] == (p.argmax() == q.argmax())
        assert found.error[at] == max(abs(reference[at] - logits[at]))
        if at < 4:
            assert found.nll[at] == pytest.approx(np.log(p[ids[at + 1]]) - np.log(q[ids[at + 1]]))
    assert len(found.nll) == 4
    same = bench.distance(reference, reference + 3, ids)  # a shift of all logits changes nothing
    assert same.kl.max() < 1e-12 and same.top.all() and abs(same.nll).max() < 1e-6
    assert len(bench.distance(reference, logits, [*ids, 9]).nll) == 5  # inside a text, the token after is known


def test_summary_weighs_tokens_alike() -> None:
    ones, zeros = np.ones(3), np.zeros(1)
    near = bench.Distance(zeros, zeros == 0, zeros, zeros)
    far = bench.Distance(ones, ones == 0, 2 * ones, -ones)
    found = bench.summary({"a": near, "b": far})
    assert (found["mean_kl_nats"], found["largest_kl_nats"], found["top1_agreement"]) == (0.75, 1.0, 0.25)
    assert (found["largest_logit_error"], found["nll_change_nats"]) == (2.0, -0.75)
    assert found["mean_kl_nats_by_text"] == {"a": 0.0, "b": 1.0}


def figures(kl: float, size: int) -> dict[str, float]:
    return {"mean_kl_nats": kl, "payload_up_bytes_per_token": size, "payload_down_bytes_per_token": 10}


def test_the_cheapest_below_a_budget() -> None:
    found = {"fp32": figures(0.0, 40), "fp16": figures(1e-6, 20), "bf16": figures(1e-5, 20), "int8": figures(5e-3, 10)}
    assert [bench.cheapest(found, budget) for budget in (1e-2, 1e-3, 1e-7, 0.0)] == ["int8", "fp16", "fp32", None]


def test_the_cheapest_for_all_plans_is_below_it_under_each() -> None:
    def plan(kinds: list[str], worst: str) -> dict[str, object]:
        """int8 of the kind `worst` is what costs."""
        wires = {"fp32": figures(0.0, 100)}
        for mix in bench.mixes(kinds):
            wires[bench.wire_of(mix, kinds)] = figures(1.0 if mix[worst] == "int8" else 1e-6, 10 * sum(d == "fp16" for d in mix.values()))
        return {"kinds": kinds, "wires": wires}

    plans = {"entry": plan(["entry", "injections", "exit"], "entry"), "grouped": plan(list(KINDS), "exit")}
    found = bench.cheapest_for_all(plans, 1e-3)
    assert found is not None
    assert found["wire"] == "entry=fp16,compressed=int8,injections=int8,exit=fp16"
    assert bench.cheapest_for_all(plans, 1e-9) is None


def test_an_outlier_is_what_int8_suffers_from() -> None:
    """Negative control of the entry's roundings: with one channel 300 times the others, each of them loses less than the wire's."""
    values = np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32)
    values[:, 7] = 300.0
    errors = {name: np.abs(way(values, 0) - values)[1:].max() for name, way in bench.entry_roundings([values]).items()}
    plain = errors.pop("as on the wire")
    assert plain > 1.0
    assert errors.pop("the first token of each text exact") == plain
    exact, groups = errors.values()
    assert exact < 0.05 < plain
    assert groups <= plain
    spread = bench.spread([values])
    assert spread["one_channel"] == 1.0 and spread["peak_over_rms"]["median"] > 10
    assert (
        spread["relative_error"]["fp16"]["largest"]
        < spread["relative_error"]["bf16"]["largest"]
        < spread["relative_error"]["int8"]["largest"]
    )


def test_the_texts_are_long_enough() -> None:
    class Words:
        encode_raw = staticmethod(str.split)

        def encode_chat(self, messages: list[dict[str, str]]) -> list[str]:
            return [word for message in messages for word in message["content"].split()]

    known = bench.texts(Words())  # type: ignore[arg-type]
    assert set(known) == {*(prompt.name for prompt in PROMPTS), "facts", "passage"}
    assert sum(map(len, known.values())) >= 500
    assert len(known["passage"]) > bench.CHUNK_TOKENS > bench.OTHER_CHUNK_TOKENS


def test_named_folders(tmp_path) -> None:
    (tmp_path / "edge").mkdir()
    assert bench.folders([f"a={tmp_path}"]) == {"a": tmp_path}
    with pytest.raises(UsageError, match="expected NAME=FOLDER"):
        bench.folders(["nowhere"])


def test_short_numbers_keep_five_digits() -> None:
    assert bench.short({"a": {"b": 1.2345678e-9}, "c": [1.23456789], "d": 123456, "e": "x"}) == {
        "a": {"b": 1.2346e-9},
        "c": [1.23456789],
        "d": 123456,
        "e": "x",
    }

"""The device: sampling, streaming text, chat templates, sessions, and the command line's errors."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from plora.artifact.errors import ContextOverflow, DamagedFile, MissingFile, UsageError, WrongPair
from plora.artifact.manifest import EdgeManifest, read_manifest
from plora.artifact.names import CORES, CORES_FORMAT, TABLE
from plora.device_runtime import PrivateSession, Sampling, open_session
from plora.device_runtime.cli import main
from plora.device_runtime.edge import Edge
from plora.device_runtime.sampling import Sampler, choose_sampling
from plora.device_runtime.text import Stream, Text
from plora.models.adapter import write_cores
from plora.models.basis import new_adapter
from plora.models.checkpoint import Base

from .conftest import CHAT_TEMPLATE, Made, answer, greedy, oracle

VOCABULARY = 300


# Sampling


@pytest.mark.parametrize(
    "chosen",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.3),
        Sampling(temperature=1.7, top_k=5),
        Sampling(temperature=1.0, top_k=1000),
        Sampling(temperature=0.8, top_p=0.9),
        Sampling(temperature=2.5, top_p=0.01),
        Sampling(temperature=1.0, repetition_penalty=1.3),
        Sampling(temperature=1.0, repetition_penalty=0.7),
        Sampling(temperature=0.7, top_k=40, top_p=0.8, repetition_penalty=1.1),
    ],
    ids=str,
)
def test_probabilities_equal_those_of_transformers(chosen: Sampling) -> None:
    """Same filters in the same order, in fp64: equal but for rounding."""
    generator = torch.Generator().manual_seed(0)
    filters: list[Any] = [RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty), TemperatureLogitsWarper(chosen.temperature)]
    filters += [TopKLogitsWarper(chosen.top_k)] if chosen.top_k else []
    filters += [TopPLogitsWarper(chosen.top_p)] if chosen.top_p < 1 else []
    for _ in range(20):
        logits = torch.randn(VOCABULARY, generator=generator) * 4
        seen = torch.randint(0, VOCABULARY, (30,), generator=generator)
        expected = LogitsProcessorList(filters)(seen[None], logits.double()[None])[0].softmax(-1)
        got = Sampler(chosen).probabilities(logits.numpy(), seen.tolist())
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-12)


def test_temperature_zero_is_argmax_and_a_seed_repeats() -> None:
    logits = np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32)
    assert Sampler(Sampling(repetition_penalty=5.0)).choose(logits, [int(logits.argmax())]) == logits.argmax()

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.5, seed=seed))
        return [sampler.choose(logits, []) for _ in range(64)]

    assert draws(7) == draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_flags_win_over_the_artifact_and_that_over_the_defaults() -> None:
    artifact = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "eos_token_ids": (0,)}
    chosen = choose_sampling({"temperature": None, "top_p": 0.5, "stop": ("x",)}, artifact)
    assert chosen == Sampling(temperature=0.6, top_p=0.5, stop=("x",))
    assert choose_sampling({"temperature": 0.0}, artifact).temperature == 0.0  # a zero is a value


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0},
     {"max_tokens": 0}, {"stop": ("",)}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected|empty"):
        Sampling(**bad)


# Streaming


class Chunks:
    """A tokenizer whose tokens are any pieces of UTF-8: token n is chunk n."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.chunks[i] for i in ids).decode("utf-8", "replace")


def streamed(chunks: list[bytes], stop: tuple[str, ...]) -> list[str]:
    """The pieces that come out, token by token, and what `finish` adds."""
    stream = Stream(Chunks(chunks), stop)  # type: ignore[arg-type]
    pieces = []
    for token in range(len(chunks)):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


def cut_at_stop(chunks: list[bytes], stop: tuple[str, ...]) -> str:
    """The text before the first stop text that is complete after some token."""
    for count in range(1, len(chunks) + 1):
        text = b"".join(chunks[:count]).decode("utf-8", "replace")
        if found := [text.index(s) for s in stop if s in text]:
            return text[: min(found)]
    return b"".join(chunks).decode("utf-8", "replace")


# Few letters, so that stop texts and their beginnings are common; characters of 1, 2, 3 and 4 bytes.
letters = st.text(alphabet="ab\né…🦉", max_size=24)


@given(
    letters,
    st.lists(st.text(alphabet="ab\né…🦉", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), min_size=40, max_size=40),
)
def test_pieces_add_up_to_the_text_before_the_stop(text: str, stop: list[str], sizes: list[int]) -> None:
    """However tokens cut characters and stop texts: pieces only ever add, so equality at the end means that nothing leaked."""
    rest, chunks = text.encode(), []
    for size in sizes:
        if rest:
            chunks.append(rest[:size])
            rest = rest[size:]
    chunks += [bytes([byte]) for byte in rest]
    pieces = streamed(chunks, tuple(stop))
    said = "".join(pieces)
    assert said == cut_at_stop(chunks, tuple(stop))
    assert "\ufffd" not in said
    assert not any(s in said for s in stop)


def test_a_split_character_comes_out_whole() -> None:
    owl = "🦉".encode()
    assert streamed([b"a", owl[:1], owl[1:3], owl[3:], b"b"], ()) == ["a", "", "", "🦉", "b", ""]


def test_a_stop_text_is_held_back_before_half_a_character() -> None:
    assert streamed([b"xa", "é".encode()[:1], "é".encode()[1:]], ("aé",)) == ["x", "", "", ""]


def test_a_split_stop_text_is_held_back_and_let_go() -> None:
    assert streamed([b"one EN", b"D", b" two"], ("END",)) == ["one ", "", ""]
    assert streamed([b"one EN", b"TER", b" two"], ("END",)) == ["one ", "ENTER", " two", ""]  # the control: no stop text after all
    assert streamed([b"one EN"], ("END",)) == ["one ", "EN"]


def text_of(made: Made) -> Text:
    return Text(made.out / "edge", read_manifest(EdgeManifest, made.out / "edge"))


def test_stream_equals_decoding_all_at_once(made: Made) -> None:
    text = text_of(made)
    for said in ("naïve café – 12345 …", "🦉🦉 in the lighthouse", "  two  spaces\n\n"):
        stream = Stream(text, ())
        ids = text.encode_raw(said)
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.finish() == text.decode(ids) == said
        assert len([piece for piece in pieces if piece]) > 1


# Chat templates


MESSAGES = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "  naïve café {{ 1 + 1 }}\n"},
    {"role": "assistant", "content": "…"},
    {"role": "user", "content": "<|end|> and so on"},
]
TEMPLATES = {
    "made": CHAT_TEMPLATE,
    "blocks": "{%- for m in messages %}\n    {%- if m['role'] == 'system' %}\n        {%- continue %}\n    {%- endif %}\n[{{ m.role | upper }}] {{ m.content | trim }}\n{% endfor %}",
    "functions": "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m | tojson }}{% endfor %}{{ eos_token }}",
    "undefined": "{% if tools is defined and tools %}{{ tools }}{% endif %}{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_render_as_in_transformers(name: str, made: Made) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.base)
    text = text_of(made)
    text.template_source = TEMPLATES[name]
    expected = tokenizer.apply_chat_template(MESSAGES, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False)
    assert text.render(MESSAGES) == expected
    ids = tokenizer.apply_chat_template(MESSAGES, chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert text.encode_chat(MESSAGES) == ids


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception('no system role, please') }}",
        "{{ range(100000000) | list }}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "{{ missing.attribute }}",
    ],
)
def test_templates_that_misbehave_are_refused(template: str, made: Made) -> None:
    text = text_of(made)
    text.template_source = template
    with pytest.raises(UsageError, match="the chat template"):
        text.render([dict(message) for message in MESSAGES])


def test_without_a_template_there_is_raw(made: Made) -> None:
    text = text_of(made)
    text.template_source = None
    with pytest.raises(UsageError, match="pass --raw"):
        text.encode_chat(MESSAGES)


# Sessions


@pytest.fixture
def session(made: Made, served: str) -> Iterator[PrivateSession]:
    with open_session(made.out / "edge", served) as opened:
        yield opened


def say(session: PrivateSession, messages: list[dict[str, str]], count: int = 24) -> str:
    pieces = [piece.text for piece in session.stream_chat(messages, session.sampling(max_tokens=count, temperature=0.0))]
    assert session.answer is not None
    assert "".join(pieces) == session.answer.text
    return session.answer.text


def test_later_turns_send_only_what_is_new(made: Made, served: str, session: PrivateSession) -> None:
    messages = [{"role": "user", "content": "a lighthouse keeper writes down the weather every morning"}]
    for turn in ("what is it?", "how are you today?"):
        messages.append({"role": "assistant", "content": say(session, messages)})
        messages.append({"role": "user", "content": turn})
    said = say(session, messages)
    assert session.answer is not None
    stats = session.answer.stats
    with open_session(made.out / "edge", served) as fresh:
        assert say(fresh, messages) == said
        assert fresh.answer is not None
        assert fresh.answer.token_ids == session.answer.token_ids
        assert fresh.answer.stats.cached_tokens == 0 < stats.cached_tokens < stats.prompt_tokens
        assert stats.bytes_up < fresh.answer.stats.bytes_up


def test_another_conversation_in_the_same_session(session: PrivateSession, merged: Base) -> None:
    """What is cached of the first is truncated, to nothing at all if need be."""
    for ids in ([5, 6, 7, 8, 9], [5, 6, 7, 100, 101, 102], [200, 201], [200, 201], [5]):
        assert answer(session, ids, 16) == greedy(merged, ids, 16)


def test_a_prompt_too_long_is_refused_before_anything_is_sent(session: PrivateSession) -> None:
    before = session._link.bytes_up
    context = session.terms.context_tokens
    for length in (context, context + 50, 0):
        with pytest.raises(ContextOverflow, match=rf"a prompt of {length} tokens, expected 1\.\.{context - 1}"):
            session.stream([5] * length)
    assert session._link.bytes_up == before
    assert len(answer(session, [5] * (context - 1), 50)) == 1  # the longest one has room for a token
    assert session.answer is not None
    assert session.answer.finish_reason == "length"


def test_token_ids_outside_the_vocabulary_are_refused(session: PrivateSession) -> None:
    for ids in ([5, VOCABULARY], [-1, 5]):
        with pytest.raises(UsageError, match=rf"expected 0 to {VOCABULARY - 1}"):
            session.stream(ids)


def test_finish_reasons_and_the_end_token(session: PrivateSession) -> None:
    ids = session.text.encode_raw("pack my box with")
    answer(session, ids, 24)
    whole = session.answer
    assert whole is not None
    assert (whole.finish_reason, len(whole.token_ids), whole.stats.new_tokens) == ("length", 24, 24)
    assert whole.prompt_token_ids == ids
    stop = whole.text[len(whole.text) // 2 :][:3]
    pieces = [piece.text for piece in session.stream(ids, session.sampling(max_tokens=24, temperature=0.0, stop=(stop,)))]
    assert session.answer is not None
    assert session.answer.finish_reason == "stop_text"
    assert session.answer.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
    for seed in range(100):  # nearly uniform: one token of 300 is the end token
        list(session.stream(ids, session.sampling(temperature=20.0, seed=seed, max_tokens=200)))
        assert session.answer is not None
        if session.answer.finish_reason == "stop":
            break
    assert session.answer.finish_reason == "stop"
    assert session.answer.token_ids[-1] == 0 == session.text.defaults.eos_token_ids[0]
    assert 0 not in session.answer.token_ids[:-1]
    assert session.answer.text == session.text.decode(session.answer.token_ids[:-1])


def test_a_seed_repeats_an_answer(session: PrivateSession) -> None:
    def drawn(seed: int) -> list[int]:
        return [piece.token_id for piece in session.stream([5, 6, 7], session.sampling(temperature=1.5, seed=seed, max_tokens=24))]

    assert drawn(1) == drawn(1) != drawn(2)


def test_stats_count_what_was_sent(made: Made, served: str) -> None:
    """Per token: three exchanges of rank 6 for q, k and v, entry and exit of 48 values, and some 20 bytes around each tensor."""
    sizes = {}
    for dtype, size in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        with open_session(made.out / "edge", served, wire_dtype=dtype) as session:
            answer(session, [5, 6, 7], 16)
            assert session.answer is not None
            stats = session.answer.stats
        up, down = (48 + 3 * 18) * size, (48 + 3 * 6) * size
        assert up < stats.bytes_up_per_token < up + 4 * 30
        assert down < stats.bytes_down_per_token < down + 4 * 30
        assert stats.round_trips_per_token == 4
        sizes[dtype] = stats.bytes_up
    assert sizes["fp16"] == sizes["bf16"] < sizes["fp32"]


def test_ctrl_c_in_a_step_keeps_the_session_usable(session: PrivateSession, merged: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT arrives while the device waits for the cloud, at each of the first frames of an answer."""
    assert session._link.transport is not None
    real = session._link.transport.receive
    for moment in range(12):
        left = [moment]

        async def receive(left: list[int] = left) -> bytes:
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            left[0] -= 1
            return await real()

        monkeypatch.setattr(session._link.transport, "receive", receive)
        with pytest.raises(KeyboardInterrupt):
            answer(session, [5, 6, 7, 8 + moment], 16)
        monkeypatch.setattr(session._link.transport, "receive", real)
        assert answer(session, [5, 6, 7], 16) == greedy(merged, [5, 6, 7], 16)


def test_an_answer_left_early_keeps_the_session_usable(session: PrivateSession, merged: Base) -> None:
    stream = session.stream([5, 6, 7], session.sampling(max_tokens=16, temperature=0.0))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert session.answer is None
    assert answer(session, [5, 6, 7], 16) == greedy(merged, [5, 6, 7], 16)


# Cores


def test_without_cores_it_is_the_base_model(made: Made, served: str, merged: Base) -> None:
    base = oracle(made)
    with open_session(made.out / "edge", served, base_only=True) as session:
        ids = session.text.encode_raw("hello world, how")
        assert answer(session, ids, 32) == greedy(base, ids, 32) != greedy(merged, ids, 32)


def test_cores_that_do_not_belong_are_refused(made: Made, tmp_path: Path) -> None:
    path = tmp_path / CORES
    write_cores(new_adapter(oracle(made), made.adapter.config.plan, "random", 1.0, seed=1), path)
    with pytest.raises(WrongPair, match="plora-export --cores-only"):
        Edge(made.out / "edge", path)
    metadata = {"format": CORES_FORMAT, "basis": made.adapter.config.basis}
    first = next(iter(made.adapter.cores))
    for damage, complaint in (
        ({first: torch.full((6, 6), float("nan"))}, "finite"),
        ({first: torch.zeros(6, 5)}, r"\[6, 5\] float32, expected finite \[6, 6\]"),
        ({first: torch.zeros(6, 6, dtype=torch.float64)}, "float64"),
        ({"layers.9.q.core": torch.zeros(6, 6)}, "layers.9.q.core is unknown"),
    ):
        save_file({**made.adapter.cores, **damage}, path, metadata)
        with pytest.raises(DamagedFile, match=complaint):
            Edge(made.out / "edge", path)
    save_file({name: core for name, core in made.adapter.cores.items() if name != first}, path, metadata)
    with pytest.raises(DamagedFile, match=f"{first} is missing"):
        Edge(made.out / "edge", path)
    save_file(made.adapter.cores, path)
    with pytest.raises(DamagedFile, match="is it a cores file"):
        Edge(made.out / "edge", path)
    path.write_bytes(b"cores")
    with pytest.raises(DamagedFile, match="not a readable safetensors file"):
        Edge(made.out / "edge", path)
    with pytest.raises(MissingFile, match="pass the cores.safetensors of a persona"):
        Edge(made.out / "edge", tmp_path / "none")
    save_file(made.adapter.cores, path, metadata)
    Edge(made.out / "edge", path)  # the control


# The command line


@pytest.fixture
def run(made: Made, served: str) -> Iterator[Any]:
    """`plora-device` in this process; gives SIGTERM back as it was."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str, edge: Path = made.out / "edge", text: str | None = None) -> Result:
        name, *rest = arguments
        return CliRunner().invoke(main, [name, "--edge", str(edge), "--cloud", served, *rest], input=text)

    yield run
    signal.signal(signal.SIGTERM, before)


def test_generate_prints_the_answer_or_one_json_object(run: Any, session: PrivateSession) -> None:
    flags = ["--raw", "--max-tokens", "12", "--temperature", "0"]
    plain = run("generate", *flags, "pack my box with", "--stats")
    made = run("generate", *flags, "pack my box with", "--json")
    ids = session.text.encode_raw("pack my box with")
    expected = answer(session, ids, 12)
    assert (plain.exit_code, made.exit_code) == (0, 0)
    assert plain.stdout == session.text.decode(expected) + "\n"
    assert "12 new" in plain.stderr
    assert "round trips" in plain.stderr
    value = json.loads(made.stdout)
    assert set(value) == {"text", "prompt_token_ids", "token_ids", "finish_reason", "stats"}
    assert value["token_ids"] == expected
    assert value["stats"]["prompt_tokens"] == len(ids)


def test_generate_uses_the_chat_template_and_system_message(run: Any, session: PrivateSession) -> None:
    result = run("generate", "--json", "--max-tokens", "2", "--system", "Be brief.", "hello")
    expected = session.text.encode_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}])
    assert json.loads(result.stdout)["prompt_token_ids"] == expected


def test_chat_answers_and_forgets(run: Any, session: PrivateSession) -> None:
    result = run("chat", "--max-tokens", "8", "--temperature", "0", text="hello\n/reset\nhello\n")
    assert result.exit_code == 0
    expected = say(session, [{"role": "user", "content": "hello"}], 8)
    assert result.stdout.count(expected + "\n") == 2


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--temperature", "-1"], 2, "temperature -1.0, expected 0 to 100"),
        (["--top-p", "2"], 2, "top-p 2.0"),
        (["--max-tokens", "0"], 2, "max-tokens 0"),
        (["--stop", ""], 2, "empty stop text"),
        (["--cores", "nowhere.safetensors"], 3, "nowhere.safetensors: not found"),
        (["--raw", "--", "x" * 2000], 10, "a prompt of"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_one_line_and_an_exit_code(arguments: list[str], code: int, complaint: str, run: Any) -> None:
    result = run("generate", *arguments, *([] if "--" in arguments else ["hello"]))
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_bad_artifacts_are_one_line_and_an_exit_code(made: Made, run: Any, tmp_path: Path) -> None:
    for folder, complaint in ((tmp_path / "none", "manifest.json: not found"), (made.out / "cloud", "expected 'plora-edge'")):
        result = run("generate", "hello", edge=folder)
        assert (result.exit_code, result.stdout) == (3, "")
        assert complaint in result.stderr
        assert result.stderr.count("\n") == 1
    edge = Path(shutil.copytree(made.out / "edge", tmp_path / "edge"))
    content = bytearray((edge / TABLE).read_bytes())
    content[100] ^= 1
    (edge / TABLE).write_bytes(content)
    result = run("generate", "hello", edge=edge)
    assert result.exit_code == 3
    assert f"{TABLE}: SHA-256 is" in result.stderr

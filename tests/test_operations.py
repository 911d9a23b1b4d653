"""What an operator does: settings from flags, environment and file; probes, metrics, reflection, logs, traces; and the end of a server."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from plora.artifact.errors import ContextOverflow, ServerStopping, Unreachable
from plora.cloud_server import token_file
from plora.cloud_server.logs import JsonFormatter, TextFormatter
from plora.cloud_server.metrics import Metrics
from plora.cloud_server.ops import MOST_READERS, Ops
from plora.cloud_server.options import OPTIONS, settings, unknown_variables
from plora.device_runtime import Access, open_session
from plora.device_runtime.transport import Deadlines
from plora.models.checkpoint import Base
from plora.protocol import plora_pb2 as pb
from plora.protocol.limits import SERVICE

from .conftest import Made, answer, cloud, command, greedy, running

IDS = [5, 6, 7]
BOUND_SECONDS = 30
ATTEMPTS = 3000


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`plora-cloud` with these, in an environment that has only these of its variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PLORA_")}
    full = [command("plora-cloud"), *map(str, arguments)]
    return subprocess.run(full, capture_output=True, text=True, timeout=60, env={**clean, **environment})


# Settings


def test_a_flag_goes_before_the_environment_before_the_file_before_the_default(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "it.toml"
    file.write_text(f'artifact = "{made.out / "cloud"}"\nsessions = 3\nidle_seconds = 5\nlog_format = "json"\nwithout_tls = true\n')
    done = run("check-config", "--config", file, "--sessions", "1", "--json", PLORA_CLOUD_SESSIONS="2", PLORA_CLOUD_IDLE_SECONDS="7.5")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    values = {name: (each["value"], each["from"]) for name, each in found["settings"].items()}
    assert values["sessions"] == (1, "flag")
    assert values["idle_seconds"] == (7.5, "environment")
    assert values["artifact"] == (str(made.out / "cloud"), "file")
    assert values["log_format"] == ("json", "file")
    assert values["without_tls"] == (True, "file")
    assert values["lease_seconds"] == (60.0, "default")
    assert set(values) == set(settings())
    assert len(OPTIONS) == len(settings()) + 1  # and the file itself
    plain = run("check-config", made.out / "cloud", PLORA_CLOUD_CONFIG=str(file))
    assert "sessions = 3  (from the file)\n" in plain.stdout
    assert "ok: " in plain.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kv_byte = 1", "kv_byte: no such key; did you mean kv_bytes?"),
        ("xyzzy = 1", "xyzzy: no such key; known: artifact, "),
        ("sessions = 1.5", "sessions: got 1.5, expected a whole number"),
        ("sessions = true", "sessions: got True, expected a whole number"),
        ('sessions = "3"', "sessions: got '3', expected a whole number"),
        ("without_tls = 1", "without_tls: got 1, expected true or false"),
        ('log_format = "xml"', "log_format: 'xml' is not one of 'text', 'json'."),
        ("[door]\nlisten = 1", "door: no such key"),
        ("sessions = = 1", "not TOML"),
        ("idle_seconds = -1", "--idle-seconds -1.0: expected above 0"),
        ("sessions = 0", "--sessions 0: expected 1 to 65,536"),
        ("idle_seconds = inf", "--idle-seconds inf: expected above 0"),
        ("user_tokens_per_day = -5", "--user-tokens-per-day -5: expected 0 (no limit) or more"),
        ('tls_cert = "c.pem"', "--tls-cert and --tls-key: expected both or neither"),
        ('client_ca = "c.pem"', "--client-ca: expected with --tls-cert"),
        ('listen = "0.0.0.0:7070"', "--listen 0.0.0.0:7070: others could reach it"),
    ],
)  # fmt: skip
def test_a_file_that_a_server_does_not_start_with(made: Made, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "it.toml").write_text(text)
    done = run("check-config", made.out / "cloud", "--config", tmp_path / "it.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_what_check_config_finds_out(made: Made, tmp_path: Path) -> None:
    """Files that are not there or not whole, as `serve` would."""
    folder = made.out / "cloud"
    missing = run("check-config", folder, "--config", tmp_path / "none.toml")
    assert (missing.returncode, "cannot be read (No such file" in missing.stderr) == (3, True)
    assert "DIR is missing" in run("check-config").stderr
    (tmp_path / "tokens.json").write_text("{}")
    broken = run("check-config", folder, "--tokens", tmp_path / "tokens.json")
    assert (broken.returncode, "format: missing key" in broken.stderr) == (3, True)
    assert run("serve", folder, "--tokens", tmp_path / "tokens.json").stderr == broken.stderr
    certificate = run("certificate", "--host", "localhost", "--out", tmp_path / "tls", "--days", "3")
    files = ("--tls-cert", tmp_path / "tls" / "cert.pem", "--tls-key", tmp_path / "tls" / "key.pem")
    (tmp_path / "tokens.json").unlink()
    token_file.add(tmp_path / "tokens.json", "ann")
    (tmp_path / "tokens.json").chmod(0o644)
    good = run("check-config", folder, *files, "--tokens", tmp_path / "tokens.json", "--listen", "0.0.0.0:1")
    assert good.returncode == 0
    assert certificate.stdout.strip() in good.stdout
    assert "1 users, 1 tokens" in good.stdout
    assert re.search(r"cert.pem: expires in [23] days", good.stderr)
    assert "others on this machine can read it" in good.stderr
    wrong = run("check-config", folder, "--tls-cert", tmp_path / "tls" / "key.pem", "--tls-key", tmp_path / "tls" / "key.pem")
    assert (wrong.returncode, "not a certificate" in wrong.stderr) == (2, True)
    assert run("check-config", folder, "--context", "257").stderr == "error: --context 257, expected 1..256, the model's own\n"
    assert "--without-tls: whoever" in run("check-config", folder, "--listen", "0.0.0.0:1", "--without-tls", "--without-tokens").stderr


def test_a_misspelt_variable_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "PLORA_CLOUD_KV_BYTES",
        "PLORA_CLOUD_SERVICE_HOST",
        "PLORA_CLOUD_PORT_7070_TCP_ADDR",
        "PLORA_CLOUD_PORT",
        "PLORA_CLOUD_KV",
    ):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == ["PLORA_CLOUD_KV"]


# Probes and metrics


@contextmanager
def with_ops(made: Made, *flags: str) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """(address, address of the operator's door, process)."""
    arguments = ["serve", str(made.out / "cloud"), "--listen", "127.0.0.1:0", "--ops", "127.0.0.1:0", "--json", "--threads", "1"]
    with running([command("plora-cloud"), *arguments, "--kv-bytes", str(64 << 20), *flags]) as process:
        for line in process.stdout or ():
            if line.startswith('{"listening"'):
                facts = json.loads(line)
                yield facts["listening"], facts["ops"], process
                return
        pytest.fail("the server ended before it listened")


def get(ops: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{ops}{path}", timeout=BOUND_SECONDS) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def figures(ops: str) -> dict[str, float]:
    """Sample name, with its labels behind it -> value."""
    families = text_string_to_metric_families(get(ops, "/metrics")[1])
    return {sample.name + "".join(sorted(sample.labels.values())): sample.value for each in families for sample in each.samples}


def test_metrics_count_what_happens(made: Made) -> None:
    with with_ops(made, "--sessions", "1", "--lease-seconds", "0") as (address, ops, _):
        before = figures(ops)
        assert (before["plora_ready"], before["plora_sessions"], before["plora_kv_bytes_used"]) == (1, 0, 0)
        with open_session(made.out / "edge", address) as session:
            answer(session, IDS, 8)
            during = figures(ops)
            with pytest.raises(Exception, match="FULL"):
                open_session(made.out / "edge", address)
        for _ in range(ATTEMPTS):
            if not (after := figures(ops))["plora_sessions"]:
                break
    steps = session._stepper.counters.steps
    assert session.answer is not None
    assert (during["plora_sessions"], during["plora_connections"]) == (1, 1)
    assert during["plora_kv_bytes_used"] == 64 * 384
    assert during["plora_tokens_totaldecode"] == 3 + len(session.answer.token_ids) - 1
    assert during["plora_step_seconds_count"] == steps
    assert during["plora_exchange_seconds_count"] == steps * session.edge.plan.round_trips
    assert during["plora_batch_rows_count"] == during["plora_batch_rows_sum"] >= steps * 3  # nobody else was there
    assert during["plora_received_bytes_total"] + 100 > session.answer.stats.bytes_up > 0
    assert after["plora_refused_totalFULL"] == 1
    assert after["plora_sessions_ended_totalclosed"] == after["plora_sessions_opened_total"] == 1
    assert after["plora_kv_bytes_used"] == 0
    assert after["process_open_fds"] > 0


def test_every_figure_of_the_dashboard_exists(made: Made) -> None:
    """A panel of a metric that was renamed stays empty, and nobody notices."""
    dashboard = json.loads((Path(__file__).parent.parent / "deploy" / "dashboard.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for each in panel.get("targets", ())
        for name in re.findall(r"\b(?:plora|process)_\w+", each["expr"])
    }
    with with_ops(made) as (address, ops, _):
        with open_session(made.out / "edge", address) as session:
            answer(session, IDS, 4)
        text = get(ops, "/metrics")[1]
    there = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) | set(re.findall(r"^(\w+)", text, re.MULTILINE))
    assert len(asked) > 10
    assert asked <= there, asked - there


def test_probes_and_the_health_command(made: Made) -> None:
    with with_ops(made) as (address, ops, _), grpc.insecure_channel(address) as channel:
        assert get(ops, "/healthz") == (200, "alive\n")
        assert get(ops, "/readyz") == (200, "ready\n")
        assert get(ops, "/else")[0] == 404
        for flags in (("--ops", ops), ("--listen", address)):
            done = run("health", *flags)
            assert (done.returncode, done.stdout) == (0, "ready\n")
        listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(  # type: ignore[attr-defined]
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=BOUND_SECONDS
        )
        names = [each.name for each in next(listed).list_services_response.service]
        assert {SERVICE, "grpc.health.v1.Health"} <= set(names)
    for flags in (("--ops", ops), ("--listen", address)):
        done = run("health", *flags)
        assert (done.returncode, done.stdout) == (9, "")
        assert "no answer" in done.stderr
    assert "asked over --ops" in run("health", "--tls-cert", "c", "--tls-key", "k").stderr


def test_readers_who_are_slow_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are: whoever probes gets through in the end."""
    monkeypatch.setattr("plora.cloud_server.ops.READER_SECONDS", 0.3)
    door = Ops("127.0.0.1", 0, Metrics(), lambda: True)
    try:
        with ExitStack() as stack:
            peers = [
                stack.enter_context(socket.create_connection(("127.0.0.1", door.port), timeout=BOUND_SECONDS))
                for _ in range(2 * MOST_READERS)
            ]
            for peer in peers:
                with contextlib.suppress(OSError):  # one too many
                    peer.sendall(b"GET /readyz HT")
            for peer in peers:
                with contextlib.suppress(ConnectionResetError):
                    assert peer.recv(1) == b""
            assert get(f"127.0.0.1:{door.port}", "/readyz") == (200, "ready\n")
    finally:
        door.close()


def test_a_taken_port_for_metrics_is_refused(made: Made) -> None:
    with with_ops(made) as (_, ops, _):
        done = run("serve", made.out / "cloud", "--ops", ops, "--listen", "127.0.0.1:0", "--kv-bytes", str(1 << 20))
        assert (done.returncode, done.stderr) == (2, f"error: --ops {ops}: cannot listen there (Address already in use)\n")


# Logs and traces


def test_logs_never_hold_text_tokens_activations_or_secrets(made: Made, merged: Base, tmp_path: Path) -> None:
    """The log of a busy server, at its most talkative, is searched for all of them, in the forms in which they might get there."""
    path = tmp_path / "tokens.json"
    secret = token_file.add(path, "ann")
    prompt = "a lighthouse keeper writes down the weather every morning"
    flags = ("--log-level", "debug", "--log-format", "json", "--tokens", str(path), "--lease-seconds", "5")
    access = Access(secret)
    with cloud(made.out / "cloud", *flags) as (address, process):
        with open_session(made.out / "edge", address, access=access) as session:
            ids = session.text.encode_raw(prompt)
            tokens = answer(session, ids, 24)
            assert tokens == greedy(merged, ids, 24)
            session_id = session.terms.session
            session.reconnect()
            answer(session, ids, 8)
            entry = session.edge.embed(ids)
            with pytest.raises(Exception, match="missing, unknown or expired"):
                open_session(made.out / "edge", address)
            asyncio_bad = pb.Frame(entry=pb.Entry(step=99, position=7, exit_rows=1)).SerializeToString()
            session._run(session._link.send(asyncio_bad))
            with pytest.raises(Exception, match="BAD"):
                session._run(session._link.receive())
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=BOUND_SECONDS)
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    events = [line["event"] for line in lines if line["logger"] == "plora.cloud"]
    assert {"session opened", "session taken up again", "session over", "calls without a valid access token", "stopped"} <= set(events)
    assert [line["code"] for line in lines if line["event"] == "session over"] == ["BAD_STEP"]
    assert all(line["user"] == "ann" for line in lines if line["event"] == "session opened")
    words = [word for word in (prompt + " " + session.text.decode(tokens)).split() if len(word) > 4]
    runs = [", ".join(map(str, ids[at : at + 3])) for at in range(len(ids) - 2)] + [
        ", ".join(map(str, tokens[at : at + 3])) for at in range(len(tokens) - 2)
    ]
    secrets = [secret, secret[6:20], token_file.digest(secret), session_id.hex(), base64.b64encode(session_id).decode(), repr(session_id)]
    values = [f"{float(value):.4f}" for value in entry.ravel()[:200] if abs(float(value)) > 1e-3]
    assert len(words) >= 5 and len(runs) > 10
    for needle in (*words, *runs, *secrets, *values):
        assert needle not in log, needle
    planted = {**lines[0], "event": f"{prompt}"}
    assert any(word in json.dumps(planted) for word in words)  # the search would find it


def test_another_librarys_message_is_cut_before_it_quotes_an_error() -> None:
    """asyncio's on a task that nobody waited for, for instance."""
    message = "Task exception was never retrieved\nfuture: <Task exception=ValueError('tensor([0.1234])')>"
    record = logging.LogRecord("asyncio", logging.ERROR, __file__, 1, message, (), None)
    for formatter in (JsonFormatter(), TextFormatter()):
        assert "never retrieved" in formatter.format(record)
        assert "0.1234" not in formatter.format(record)


def test_an_error_is_logged_by_kind_and_place_alone() -> None:
    try:
        raise ValueError("tensor([0.1234, 0.5678]) of a person")
    except ValueError:
        record = logging.LogRecord("plora.cloud", logging.ERROR, __file__, 1, "session failed", (), sys.exc_info())
    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record)
        assert "ValueError" in line and "test_operations.py" in line
        assert "0.1234" not in line and "\n" not in line


def test_a_span_for_each_step() -> None:
    """In a process of its own: a provider can be set once."""
    code = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from plora.cloud_server.tracing import step_spans
kept = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
trace.set_tracer_provider(provider)
step_spans()(0.25, 3, 0.125, "abc")
(span,) = kept.get_finished_spans()
print(span.name, (span.end_time - span.start_time) / 1e9, dict(span.attributes))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "plora.step 0.25 {'plora.tokens': 3, 'plora.engine_seconds': 0.125, 'plora.session': 'abc'}\n", done.stderr


# The end


def test_a_server_that_is_told_to_stop_is_first_not_ready_then_lets_answers_finish(made: Made, merged: Base) -> None:
    """Readiness goes first, while everything is served as before; then nobody new, and the answer under way is finished."""
    flags = ("--drain-seconds", "8", "--grace-seconds", str(BOUND_SECONDS))
    count, begun, refused = 200, threading.Event(), threading.Event()

    def talk(address: str) -> tuple[list[int], int]:
        """An answer that lasts until others are refused, and then to its end."""
        with open_session(made.out / "edge", address) as session:
            got = []
            for piece in session.stream(IDS, session.sampling(max_tokens=count, temperature=0.0)):
                got.append(piece.token_id)
                begun.set()
                if len(got) < count - 40:
                    refused.wait(0.1)
            return got, session._link.reconnections

    with with_ops(made, *flags) as (address, ops, process), ThreadPoolExecutor(1) as pool:
        talking = pool.submit(talk, address)
        assert begun.wait(BOUND_SECONDS)
        process.send_signal(signal.SIGTERM)
        for _ in range(ATTEMPTS):
            if get(ops, "/readyz") == (503, "not ready\n"):
                break
        else:
            pytest.fail("it is still ready")
        assert get(ops, "/healthz")[0] == 200
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=BOUND_SECONDS)
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        open_session(made.out / "edge", address).close()  # balancers have not noticed yet
        for _ in range(ATTEMPTS):
            try:
                open_session(made.out / "edge", address).close()
            except ServerStopping:
                refused.set()
                break
        assert refused.is_set()
        assert talking.result(BOUND_SECONDS) == (greedy(merged, IDS, count), 0)
        assert process.wait(BOUND_SECONDS) == 0


def test_an_answer_that_outlasts_the_grace_moves_to_another_server(made: Made, merged: Base) -> None:
    """The device goes on there, and no token is lost or changed."""
    with with_ops(made, "--grace-seconds", "0") as (address, _, process):
        port = address.rpartition(":")[2]
        deadlines = Deadlines(give_up_seconds=2.0 * BOUND_SECONDS)
        with open_session(made.out / "edge", address, deadlines=deadlines) as session:
            stream = session.stream(IDS, session.sampling(max_tokens=40, temperature=0.0))
            got = [next(stream).token_id for _ in range(3)]
            process.send_signal(signal.SIGTERM)
            assert process.wait(BOUND_SECONDS) == 0
            with running(
                [command("plora-cloud"), "serve", str(made.out / "cloud"), "--listen", f"127.0.0.1:{port}", "--kv-bytes", str(64 << 20)]
            ) as other:
                assert other.stdout is not None
                assert any("listening" in line for line in other.stdout)
                got.extend(piece.token_id for piece in stream)
                assert session._link.reconnections >= 1
                assert got == greedy(merged, IDS, 40)


def test_a_server_with_less_room_cannot_take_a_long_conversation_over(made: Made) -> None:
    """It is said in so many words, and not that the protocol was broken."""
    with with_ops(made) as (address, _, process):
        port = address.rpartition(":")[2]
        with open_session(made.out / "edge", address, deadlines=Deadlines(give_up_seconds=2.0 * BOUND_SECONDS)) as session:
            answer(session, IDS, 80)
            process.kill()
            process.wait(BOUND_SECONDS)
            smaller = [command("plora-cloud"), "serve", str(made.out / "cloud"), "--listen", f"127.0.0.1:{port}", "--context", "64"]
            with running([*smaller, "--kv-bytes", str(1 << 20)]) as other:
                assert other.stdout is not None
                assert any("listening" in line for line in other.stdout)
                with pytest.raises(ContextOverflow, match="has room for 64; begin another one"):
                    session.edge.logits(session._run(session._stepper.feed([5], 1)))
                assert answer(session, IDS, 8)  # what fits goes on


def test_a_second_signal_ends_it_at_once(made: Made) -> None:
    with (
        with_ops(made, "--drain-seconds", str(3 * BOUND_SECONDS)) as (address, ops, process),
        open_session(made.out / "edge", address, deadlines=Deadlines(give_up_seconds=0.3)) as session,
    ):
        process.send_signal(signal.SIGTERM)
        for _ in range(ATTEMPTS):
            if get(ops, "/readyz")[0] == 503:
                break
        answer(session, IDS, 4)  # it drains, and goes on serving
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND_SECONDS) == 0
        with pytest.raises(Unreachable):
            answer(session, IDS, 4)


@pytest.mark.parametrize("seconds", [0.3, 0.6, 0.9, 1.5])
def test_a_server_that_is_told_to_stop_while_it_starts_does(made: Made, seconds: float) -> None:
    """Wherever it is: an exception that is raised in the middle of an import may vanish there."""
    with running([command("plora-cloud"), "serve", str(made.out / "cloud"), "--listen", "127.0.0.1:0", "--kv-bytes", "1000000"]) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND_SECONDS) in (0, 130, -signal.SIGTERM)  # it serves already, is starting, is not even that

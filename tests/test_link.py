"""The link emulator of bench/: its arithmetic without a clock, and what passes and what is lost on real sockets. No time limit is
asserted but lower ones, which a slow machine cannot break."""

from __future__ import annotations

import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest

from bench.link import Counters, Link, answer, link_process
from bench.profiles import PROFILES, RTT_SWEEP_MILLIS, Cuts, Profile, profile, rtt_only
from bench.shaper import JITTER_HOLD_SECONDS, PREFACE, LinkClock, Messages, Shaper
from plora.artifact.errors import UsageError

WAIT_SECONDS = 60.0
LOOPBACK = profile("loopback")
SETTINGS = bytes.fromhex("000000 04 00 00000000")


# Profiles


def test_the_profiles_say_where_they_come_from():
    assert set(PROFILES) >= {"loopback", "wifi", "5g", "lte", "wan", "train"}
    assert (profile("5g").rtt_millis, profile("5g").up_mbits, profile("5g").down_mbits) == (20, 30, 100)
    assert profile("lte").rtt_millis == 50 and profile("wan").rtt_millis == 80 and profile("train").cuts is not None
    assert all(one.source for one in PROFILES.values())
    assert [rtt_only(millis).rtt_millis for millis in RTT_SWEEP_MILLIS] == [0, 5, 10, 20, 40, 80]


def test_another_rtt_keeps_the_rates_and_bounds_the_jitter():
    near = profile("lte").with_rtt(4)
    assert (near.rtt_millis, near.jitter_millis, near.up_mbits, near.down_mbits) == (4, 2, 6, 21)
    assert "4 ms" in near.name and "replaced" in near.source
    with pytest.raises(UsageError, match="-1 ms"):
        near.with_rtt(-1)


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(UsageError, match="'6g'.*loopback, wifi, 5g, lte, wan, train"):
        profile("6g")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rtt_millis": -1}, "RTT of -1 ms"),
        ({"rtt_millis": float("nan")}, "RTT of nan"),
        ({"rtt_millis": 10, "jitter_millis": 6}, "jitter of 6 ms: need 0 to 5"),
        ({"rtt_millis": 10, "up_mbits": 0}, "0 Mbit/s up"),
        ({"rtt_millis": 10, "down_mbits": -3}, "-3 Mbit/s down"),
    ],
)
def test_bad_profiles_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        Profile("bad", **fields)


def test_bad_cuts_targets_and_commands_are_refused():
    with pytest.raises(UsageError, match="cuts of 3 s each 2 s"):
        Cuts(2, 3)
    with pytest.raises(UsageError, match="HOST:PORT"):
        Link("nowhere", LOOPBACK)
    with Link("127.0.0.1:9", LOOPBACK) as link:
        for wrong, message in (
            (lambda: link.cut("snip", 1), "'snip'.*reset, silence"),
            (lambda: link.cut("reset", -1), "-1 s"),
            (lambda: link.stall(float("inf")), "inf s"),
            (lambda: link.cut_at_message(-1, "reset", 0, deliver=True), "message -1: 0 have crossed"),
        ):
            with pytest.raises(UsageError, match=message):
                wrong()
        assert link.counters() == Counters() and link.restored_at is None


# The arithmetic


def test_a_byte_takes_its_time_and_then_the_delay():
    shaper = Shaper(8, delay_seconds=0.02)  # 8 Mbit/s: a byte each microsecond
    assert shaper.release(1.0, 1000) == pytest.approx(1.021, abs=1e-12)
    assert shaper.release(1.0, 500) == pytest.approx(1.0215, abs=1e-12)  # waits for the serialiser
    assert shaper.release(1.001, 500) == pytest.approx(1.022, abs=1e-12)  # still busy until 1.0015
    assert shaper.release(2.0, 1) == pytest.approx(2.020001, abs=1e-12)  # idle in between: nothing is saved up
    assert shaper.release(2.0, 0) == pytest.approx(2.020001, abs=1e-12)  # an end of stream keeps its place


def test_the_rate_is_exact_to_the_byte_whatever_the_pieces():
    sizes = [random.Random(0).randrange(1, 5000) for _ in range(2000)]
    pieces, whole = Shaper(30, 0.01), Shaper(30, 0.01)
    assert [pieces.release(0.0, size) for size in sizes][-1] == pytest.approx(whole.release(0.0, sum(sizes)), rel=1e-9)
    assert whole.release(0.0, 0) == pytest.approx(sum(sizes) * 8 / 30e6 + 0.01, rel=1e-9)


def test_an_unlimited_link_only_delays():
    shaper = Shaper(None, 0.04)
    assert [shaper.release(now, 1 << 20) for now in (0.0, 0.0, 3.0)] == [0.04, 0.04, 3.04]


def test_jitter_is_within_its_bounds_and_nothing_overtakes():
    shaper = Shaper(None, 0.010, jitter_seconds=0.003, seed=1)
    extra = [shaper.release(now, 1) - now for now in (index * 0.1 for index in range(4000))]
    assert min(extra) >= 0.007 - 1e-9 and max(extra) <= 0.013 + 1e-9
    assert statistics.mean(extra) == pytest.approx(0.010, abs=1e-4)  # 4000 draws of a fixed seed
    assert statistics.stdev(extra) == pytest.approx(0.003 / 3**0.5, rel=0.05)
    dense = Shaper(None, 0.010, jitter_seconds=0.003, seed=1)
    out = [dense.release(index * 1e-4, 1) for index in range(4000)]
    assert out == sorted(out)
    one_burst = [at - index * 1e-4 for index, at in enumerate(out) if index * 1e-4 < JITTER_HOLD_SECONDS]
    assert max(one_burst) - min(one_burst) < 1e-9
    again = Shaper(None, 0.010, jitter_seconds=0.003, seed=1)
    assert [again.release(index * 1e-4, 1) for index in range(4000)] == out


def test_buffers_hold_twice_the_bandwidth_delay_product():
    for one in PROFILES.values():
        for mbits in (one.up_mbits, one.down_mbits):
            shaper = Shaper(mbits, one.rtt_millis / 2e3, one.jitter_millis / 1e3)
            assert shaper.buffer_bytes >= 2 * (mbits or 100) * 1e6 / 8 * one.rtt_millis / 1e3
            assert shaper.piece_bytes <= shaper.buffer_bytes


def test_what_a_cut_loses_frees_the_serialiser():
    shaper = Shaper(8e-3, 0.0)  # a byte each millisecond
    assert shaper.release(0.0, 1000) == 1.0
    shaper.drop(0.5)
    assert shaper.release(0.5, 100) == pytest.approx(0.6)


def test_link_time_stands_still_during_a_stall():
    clock = LinkClock()
    assert clock.link_time(5.0) == clock.real_time(5.0) == 5.0
    assert clock.stall(10.0, 2.0) == 12.0
    assert [clock.link_time(now) for now in (9.0, 10.0, 11.5, 12.0, 13.0)] == [9.0, 10.0, 10.0, 10.0, 11.0]
    assert [clock.real_time(at) for at in (9.0, 10.5, 11.0)] == [9.0, 12.5, 13.0]
    assert clock.stall(11.0, 3.0) == 14.0  # overlaps: prolongs
    assert clock.stall(11.0, 1.0) == 14.0
    assert clock.link_time(15.0) == 11.0
    assert clock.stall(20.0, 1.0) == 21.0  # 16 by link time
    assert clock.link_time(20.5) == 16.0 and clock.link_time(22.0) == 17.0
    assert clock.real_time(17.0) == 22.0


# gRPC messages in HTTP/2


def message(payload: bytes) -> bytes:
    return b"\0" + len(payload).to_bytes(4) + payload


def frame(payload: bytes, kind: int = 0, flags: int = 0, stream: int = 1) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def test_messages_are_found_however_the_bytes_are_cut():
    first, second, third = message(b"a" * 300), message(b""), message(b"c" * 70)
    data = PREFACE + SETTINGS + frame(b"headers", kind=1)
    data += frame(first[:100]) + frame(b"", kind=6)
    ends = [len(data) + 9 + 205]
    data += frame(first[100:] + second + third[:10])  # one frame with the end of one, a whole one, the start of another
    ends.append(ends[0] + 5)
    data += frame(third[10:], flags=1)
    ends.append(len(data))
    assert Messages(up=True).feed(data) == ends
    single = Messages(up=True)
    assert [index + 1 for index in range(len(data)) if single.feed(data[index : index + 1])] == ends
    assert Messages(up=False).feed(data[len(PREFACE) :]) == [end - len(PREFACE) for end in ends]


def test_streams_of_one_connection_do_not_mix():
    long, short = message(b"l" * 500), message(b"s")
    parser = Messages(up=False)
    parser.feed(SETTINGS + frame(long[:200], stream=1))
    assert len(parser.feed(frame(short, stream=3, flags=1))) == 1
    assert len(parser.feed(frame(long[200:], stream=1))) == 1
    assert len(parser.feed(frame(short[:3], stream=5) + frame(b"gone", kind=3, stream=5) + frame(short, stream=5))) == 1


@pytest.mark.parametrize("up", [True, False])
def test_what_is_not_http2_has_no_messages(up):
    for data in (b"\x16\x03\x01" + bytes(200), PREFACE[:-1] + b"x" + SETTINGS + frame(message(b"m")), frame(message(b"m"))):
        assert Messages(up).feed(data) == []


# Sockets


class Peer:
    """A server on loopback: one thread per connection runs `serve`; `received`, `ends` hold what each connection got and how it
    ended, in the order of arrival. By itself it echoes."""

    def __init__(self) -> None:
        self.received: list[bytearray] = []
        self.ends: list[futures.Future[str]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.arrival = threading.Condition()
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            if not self.threads:
                connection.close()
                return
            connection.settimeout(WAIT_SECONDS)
            received, end = bytearray(), futures.Future()
            with self.arrival:
                self.received.append(received)
                self.ends.append(end)
                self.arrival.notify_all()
            self.threads.append(threading.Thread(target=self._serve, args=(connection, received, end)))
            self.threads[-1].start()

    def _serve(self, connection: socket.socket, received: bytearray, end: futures.Future[str]) -> None:
        with connection:
            try:
                self.greet(connection)
                while data := connection.recv(1 << 16):
                    received += data
                    self.serve(connection, data)
                end.set_result("closed")
            except ConnectionResetError:
                end.set_result("reset")
            except BaseException as error:
                end.set_exception(error)

    def greet(self, connection: socket.socket) -> None:
        pass

    def serve(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)

    def end(self, index: int) -> str:
        """How connection `index` ended, "closed" or "reset", when it has."""
        with self.arrival:
            assert self.arrival.wait_for(lambda: len(self.ends) > index, WAIT_SECONDS)
        return self.ends[index].result(WAIT_SECONDS)

    def close(self) -> None:
        threads, self.threads = self.threads, []
        socket.create_connection(self.listener.getsockname()).close()
        for thread in threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive()
        self.listener.close()


class Answering(Peer):
    """Speaks just enough HTTP/2: answers each message with one that is b"answer to " + it."""

    def greet(self, connection: socket.socket) -> None:
        connection.sendall(SETTINGS)
        self.parsed = Messages(up=True)

    def serve(self, connection: socket.socket, data: bytes) -> None:
        for end in self.parsed.feed(data):
            connection.sendall(frame(message(b"answer to " + data[:end][-1:])))


@contextmanager
def linked(one: Profile = LOOPBACK, server: type[Peer] = Peer, **settings: int) -> Iterator[tuple[Link, Peer]]:
    peer = server()
    try:
        with Link(peer.address, one, **settings) as link:
            yield link, peer
        assert not link.thread.is_alive()
    finally:
        peer.close()


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    client = socket.create_connection((host, int(port)), WAIT_SECONDS)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def receive(client: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (more := client.recv(1 << 16)):
        data += more
    return bytes(data)


def echo(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return receive(client, len(data))


def quiet(client: socket.socket) -> bool:
    """Nothing has come, no end either."""
    client.setblocking(False)
    try:
        client.recv(1)
    except BlockingIOError:
        return True
    finally:
        client.settimeout(WAIT_SECONDS)
    return False


def test_bytes_arrive_in_order_under_rate_and_jitter_over_several_connections():
    shaken = Profile("shaken", 6, jitter_millis=3, up_mbits=40, down_mbits=60)
    payloads = [random.Random(index).randbytes(150_000 + index) for index in range(3)]

    def send(client: socket.socket, payload: bytes) -> None:
        client.sendall(payload)
        client.shutdown(socket.SHUT_WR)

    with linked(shaken, seed=3) as (link, peer):
        clients = [connect(link.address) for _ in payloads]
        senders = [threading.Thread(target=send, args=pair) for pair in zip(clients, payloads, strict=True)]
        for sender in senders:
            sender.start()
        for client, payload in zip(clients, payloads, strict=True):
            assert receive(client, len(payload) + 1) == payload  # and then the end of the stream
            client.close()
        for sender in senders:
            sender.join(WAIT_SECONDS)
        total = sum(map(len, payloads))
        assert link.counters() == Counters(up_bytes=total, down_bytes=total, connections=3)
        assert sorted(map(bytes, peer.received)) == sorted(payloads)


def test_more_than_the_buffers_hold_passes():
    slow = Profile("slow reader", 2)
    payload = random.Random(5).randbytes(40 << 20)  # above UNLIMITED_BUFFER_BYTES and every kernel buffer
    with linked(slow) as (link, _), connect(link.address) as client:
        sender = threading.Thread(target=client.sendall, args=(payload,))
        sender.start()
        assert receive(client, len(payload)) == payload
        sender.join(WAIT_SECONDS)


def test_the_first_byte_waits_for_the_handshake():
    with linked(rtt_only(40)) as (link, _):
        began = time.perf_counter()
        with connect(link.address) as client:
            assert echo(client, b"x") == b"x"
            assert time.perf_counter() - began > 0.078  # one round trip for the handshake, one for the echo


def test_a_target_that_refuses_resets_the_client():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        target = f"127.0.0.1:{closed.getsockname()[1]}"
    with Link(target, LOOPBACK) as link, pytest.raises(ConnectionResetError), connect(link.address) as client:
        client.recv(1)


def test_a_reset_by_one_end_reaches_the_other():
    with linked(rtt_only(1)) as (link, peer):
        client = connect(link.address)
        assert echo(client, b"x") == b"x"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        assert peer.end(0) == "reset"


def test_a_cut_by_reset_is_seen_at_both_ends_and_passes():
    with linked() as (link, peer):
        with connect(link.address) as client:
            assert echo(client, b"before") == b"before"
            back = link.cut("reset", 0)
            assert back == link.restored_at <= time.perf_counter()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            assert peer.end(0) == "reset"
        with connect(link.address) as client:
            assert echo(client, b"after") == b"after"
        assert link.counters() == Counters(up_bytes=11, down_bytes=11, connections=2, cuts=1)


def test_while_cut_by_reset_new_connections_are_reset():
    with linked() as (link, peer):
        assert link.cut("reset", 3600) > time.perf_counter()
        with pytest.raises(ConnectionResetError), connect(link.address) as client:
            client.recv(1)
        assert peer.received == [] and link.counters().connections == 1


def test_silence_loses_what_is_under_way_and_the_old_connection_for_ever():
    slow = Profile("8 kbit/s up", 2, up_mbits=0.008)
    with linked(slow) as (link, peer), connect(link.address) as old:
        assert echo(old, b"x") == b"x"
        old.sendall(bytes(60_000))  # a minute at this rate
        link.cut("silence", 0)
        old.sendall(b"and more")
        with connect(link.address) as new:
            assert echo(new, b"y") == b"y"  # does not wait for what was lost
            assert quiet(old)
            old.close()
            assert echo(new, b"z") == b"z"
            assert not peer.ends[0].done()  # nobody told the server
        assert len(peer.received[0]) < 60_000 and b"more" not in peer.received[0]
        assert peer.received[1] == b"yz"


def test_a_connection_made_during_a_silence_works_once_its_syn_is_sent_again():
    with linked(rtt_only(1)) as (link, peer):
        link.cut("silence", 0.2)
        with connect(link.address) as gives_up:
            gives_up.sendall(b"never")
        with connect(link.address) as client:
            assert echo(client, b"x") == b"x"
            assert time.perf_counter() >= link.restored_at
        assert peer.received == [b"x"] and link.counters() == Counters(up_bytes=1, down_bytes=1, connections=2, cuts=1)


def test_a_stall_loses_nothing_and_holds_everything():
    with linked(rtt_only(2)) as (link, _), connect(link.address) as client:
        assert echo(client, b"x") == b"x"
        client.sendall(b"a" * 1000)
        back = link.stall(0.2)
        client.sendall(b"b" * 1000)
        assert receive(client, 2000) == b"a" * 1000 + b"b" * 1000
        assert time.perf_counter() >= back - 0.001
        with connect(link.address) as other:
            assert echo(other, b"y") == b"y"
        assert echo(client, b"z") == b"z"
        assert link.counters() == Counters(up_bytes=2003, down_bytes=2003, connections=2, cuts=0)


def test_a_profile_with_cuts_cuts_by_itself():
    with linked(Profile("train", 0, cuts=Cuts(0.1, 0.01))) as (link, _):
        deadline = time.perf_counter() + WAIT_SECONDS
        while link.counters().cuts < 2 and time.perf_counter() < deadline:
            threading.Event().wait(0.01)
        assert link.counters().cuts >= 2


# Cuts at a message


def converse(link: Link, turns: str, gathered: list[bytes]) -> bool:
    """Sends each letter as a message and waits for its answer; what came is in `gathered`. True if nothing was cut."""
    parser = Messages(up=False)
    with connect(link.address) as client:
        try:
            client.sendall(PREFACE + SETTINGS)
            for letter in turns:
                client.sendall(frame(message(b"question " + letter.encode())))
                arrived = False
                while not arrived:
                    data = client.recv(1 << 16)
                    for end in parser.feed(data):
                        gathered.append(data[:end][-11:])
                        arrived = True
        except ConnectionError:
            return False
    return True


@pytest.mark.parametrize("deliver", [True, False])
@pytest.mark.parametrize("index", range(6))
def test_a_cut_at_a_message_cuts_there_and_nowhere_else(index, deliver):
    """Messages alternate: 0, 2, 4 are a, b, c going up, 1, 3, 5 their answers."""
    with linked(server=Answering) as (link, peer):
        link.cut_at_message(index, "reset", 0, deliver=deliver)
        gathered: list[bytes] = []
        assert not converse(link, "abcd", gathered)
        peer.end(0)
        passed = index + deliver
        up, down = (passed + 1) // 2, passed // 2
        assert gathered == [b"answer to " + letter for letter in (b"a", b"b", b"c")[:down]]
        questions = b"".join(frame(message(b"question " + letter)) for letter in (b"a", b"b", b"c", b"d")[: index // 2 + 1])
        lost_byte = not deliver and index % 2 == 0  # of a question
        assert peer.received[0] == (PREFACE + SETTINGS + questions)[: -1 if lost_byte else None]
        counted = link.counters()
        assert (counted.up_messages, counted.down_messages, counted.cuts) == (up, down, 1)
        assert link.restored_at is not None
        again: list[bytes] = []
        assert converse(link, "ef", again) and len(again) == 2  # cut once, not twice
        assert sum((link.counters().up_messages, link.counters().down_messages)) == passed + 4


@pytest.mark.parametrize("deliver", [True, False])
def test_a_message_is_delivered_or_lost_whole_even_beside_others_in_a_frame(deliver):
    with linked() as (link, peer):
        link.cut_at_message(1, "reset", 0, deliver=deliver)
        data = PREFACE + SETTINGS + frame(b"".join(message(bytes([letter]) * 50) for letter in b"abc"))
        with connect(link.address) as client:
            client.sendall(data)
            assert peer.end(0) == "reset"
        assert peer.received[0] == data[: len(PREFACE + SETTINGS) + 9 + 55 * 2 - (not deliver)]
        assert link.counters().up_messages == 1 + deliver


def test_silence_at_a_message_leaves_both_ends_waiting():
    with linked(server=Answering) as (link, peer), connect(link.address) as client:
        link.cut_at_message(0, "silence", 0, deliver=True)
        assert receive(client, len(SETTINGS)) == SETTINGS
        client.sendall(PREFACE + SETTINGS + frame(message(b"question a")))
        deadline = time.perf_counter() + WAIT_SECONDS
        while not link.counters().cuts and time.perf_counter() < deadline:
            threading.Event().wait(0.01)
        again: list[bytes] = []
        assert converse(link, "b", again) and again == [b"answer to b"]
        assert quiet(client) and not peer.ends[0].done()


def test_messages_are_counted_over_all_connections():
    with linked(server=Answering) as (link, _):
        assert converse(link, "ab", [])
        with pytest.raises(UsageError, match="message 3: 4 have crossed"):
            link.cut_at_message(3, "reset", 0, deliver=True)
        link.cut_at_message(6, "reset", 0, deliver=False)
        gathered: list[bytes] = []
        assert not converse(link, "cd", gathered)
        assert gathered == [b"answer to c"]
        counted = link.counters()
        assert (counted.up_messages, counted.down_messages, counted.connections) == (3, 3, 2)


def test_grpc_messages_are_counted_as_grpc_sends_them():
    def reply(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            yield request * 2

    handler = grpc.method_handlers_generic_handler("echo", {"Both": grpc.stream_stream_rpc_method_handler(reply)})
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        sizes = [0, 1, 100, 20_000, 200_000]
        with Link(f"127.0.0.1:{port}", rtt_only(2)) as link:
            for calls in (1, 2):  # a connection each
                with grpc.insecure_channel(link.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                    answers = channel.stream_stream("/echo/Both")(iter([bytes(size) for size in sizes]), timeout=WAIT_SECONDS)
                    assert [len(one) for one in answers] == [2 * size for size in sizes]
                counted = link.counters()
                assert (counted.up_messages, counted.down_messages, counted.connections) == (5 * calls, 5 * calls, calls)
    finally:
        server.stop(0).wait(WAIT_SECONDS)


# A process of its own


def test_a_link_process_takes_the_same_commands_and_goes():
    peer = Answering()
    try:
        with link_process(peer.address, Profile("own", 2, 1, up_mbits=50, cuts=Cuts(3000, 1)), seed=1) as link:
            link.cut_at_message(2, "reset", 0, deliver=False)
            gathered: list[bytes] = []
            assert not converse(link, "ab", gathered)  # type: ignore[arg-type]
            assert gathered == [b"answer to a"]
            assert link.restored_at <= time.perf_counter()
            assert link.stall(0.01) >= link.cut("reset", 0)
            assert link.counters().up_messages == 1 and link.counters().cuts == 2
            with pytest.raises(UsageError, match="'snip'"):
                link.cut("snip", 1)
            process = link._process
        assert process.returncode == 0
    finally:
        peer.close()


def test_the_command_line_answers_each_line_with_one():
    lines = "counters\ncut silence 0.5\nstall never\nfly\n\n"
    command = [sys.executable, "-m", "bench.link", "127.0.0.1:9", "--profile", "5g", "--rtt", "10"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, timeout=WAIT_SECONDS)
    address, *answers = done.stdout.splitlines()
    assert address.startswith("127.0.0.1:") and done.stderr == ""
    parsed = [json.loads(line) for line in answers]
    assert [list(one) == ["error"] for one in parsed] == [False, False, True, True, True]
    assert parsed[0] == {
        "restored_at": None,
        "up_bytes": 0,
        "down_bytes": 0,
        "up_messages": 0,
        "down_messages": 0,
        "connections": 0,
        "cuts": 0,
    }
    assert parsed[1]["cuts"] == 1 and parsed[1]["restored_at"] > 0
    unknown = subprocess.run([*command[:-3], "6g"], input="", capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert unknown.returncode and "no link profile '6g'" in unknown.stderr and "Traceback" not in unknown.stderr


def test_a_failure_inside_the_link_is_not_kept_quiet():
    with pytest.raises(RuntimeError, match="the link failed"), Link("127.0.0.1:9", LOOPBACK) as link:
        link.loop.call_soon_threadsafe(lambda: 1 // 0)
        link.stall(0)  # comes after it
    assert "error" in answer(link, "fly")

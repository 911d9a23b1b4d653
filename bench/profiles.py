"""Networks between a device and a cloud, as figures: what bench/link.py makes of a loopback connection."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from plora.artifact.errors import UsageError

RTT_SWEEP_MILLIS = (0, 5, 10, 20, 40, 80)
"""Round-trip times of the plain profiles that a sweep uses: `rtt_only`."""


@dataclass(frozen=True)
class Cuts:
    """A cut by silence each `every_seconds`, from start to start, the first that long after the link came up; each lasts
    `lasting_seconds`."""

    every_seconds: float
    lasting_seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.lasting_seconds < self.every_seconds < math.inf:
            raise UsageError(f"cuts of {self.lasting_seconds:g} s each {self.every_seconds:g} s: need 0 < lasting < every")


@dataclass(frozen=True)
class Profile:
    """rtt_millis: two-way, each way takes half. jitter_millis: each burst's one-way delay is rtt/2 + a number drawn evenly from
    [-jitter, +jitter], so the mean stays; a burst is what one direction carries within JITTER_HOLD_SECONDS of bench/shaper.py;
    nothing overtakes. up_mbits (device to cloud), down_mbits: 10^6 bits a second of TCP payload, shared by all connections; None:
    unlimited. source: where the figures come from."""

    name: str
    rtt_millis: float
    jitter_millis: float = 0.0
    up_mbits: float | None = None
    down_mbits: float | None = None
    cuts: Cuts | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rtt_millis < math.inf:
            raise UsageError(f"profile {self.name}: RTT of {self.rtt_millis:g} ms: need 0 or more")
        if not 0 <= self.jitter_millis <= self.rtt_millis / 2:
            raise UsageError(
                f"profile {self.name}: jitter of {self.jitter_millis:g} ms: need 0 to {self.rtt_millis / 2:g}, the one-way delay"
            )
        for way, mbits in (("up", self.up_mbits), ("down", self.down_mbits)):
            if mbits is not None and not 0 < mbits < math.inf:
                raise UsageError(f"profile {self.name}: {mbits:g} Mbit/s {way}: need more than 0, or None for unlimited")

    def with_rtt(self, millis: float) -> Profile:
        """The same with another RTT; jitter no larger than its half."""
        return dataclasses.replace(
            self,
            name=f"{self.name} at {millis:g} ms",
            rtt_millis=millis,
            jitter_millis=min(self.jitter_millis, max(millis, 0) / 2),
            source=f"{self.source}; RTT replaced",
        )


def rtt_only(millis: float) -> Profile:
    """Delay and nothing else."""
    return Profile(f"rtt {millis:g} ms", millis, source="chosen: delay alone")


PROFILES = {
    one.name: one
    for one in (
        Profile("loopback", 0, source="no network: what the link itself costs"),
        Profile(
            "wifi", 10, 2, up_mbits=40, down_mbits=100,
            source="home Wi-Fi on fixed broadband, cloud in the region. Ookla Speedtest Global Index, fixed: latency 10 ms (Nov 2022), "
            "median 107.5 Mbit/s down (Jul 2021), mean 45.7 up (Sep 2020). Jitter chosen; the real tail is longer: the Wi-Fi hop alone "
            "has median 3 ms, p90 20 ms, p99 250 ms (Sui et al., MobiSys 2016)",
        ),
        Profile(
            "5g", 20, 3, up_mbits=30, down_mbits=100,
            source="a good 5G cell with a near cloud, not the median user: < 5 % of mobile users see under 20 ms, ~60 % are below "
            "50 Mbit/s (arXiv 2507.18834). Up 31 Mbit/s: SmartCIC survey, Mar-May 2022; 5G medians 166 down / 21 up: Ookla Q3 2021. "
            "One way 7 to 18 ms: Rohde & Schwarz, public 5G, 2022. Jitter chosen",
        ),
        Profile(
            "lte", 50, 8, up_mbits=6, down_mbits=21,
            source="Opensignal, USA, Q1 2019: 21.3 Mbit/s down, 6.3 up, latency 44.1 to 66.4 ms by state or city. Jitter chosen",
        ),
        Profile(
            "wan", 80, 1, up_mbits=40, down_mbits=100,
            source="fixed broadband to a cloud across the Atlantic: New York-Paris 77 to 78 ms (WonderProxy ping table, 2011); 80 ms is "
            "also the far case of arXiv 2602.16760. Rates as wifi. Jitter chosen",
        ),
        Profile(
            "train", 50, 20, up_mbits=6, down_mbits=21, cuts=Cuts(20, 2),
            source="lte on the move: RTT and rates vary much more than at rest (Wang et al., arXiv 1812.04823; Xiao et al., ICNP 2014), "
            "hence the jitter, chosen. Cuts chosen, harder than usual: at 300 km/h a cell of 1.5 km lasts 18 s, and most handovers "
            "lose nothing",
        ),
    )
}  # fmt: skip


def profile(name: str) -> Profile:
    """Raises UsageError if there is none of that name."""
    if name not in PROFILES:
        raise UsageError(f"no link profile {name!r}: there are {', '.join(PROFILES)}")
    return PROFILES[name]

"""The exchange plan: which layers run where, and who is adapted from what.

    y_t = W_t x_t + s · B_t M_t A u        u: output of the *source* layer's input RMSNorm
    y_t = W_t x_t + s · B_t M_t φ          φ = silu(F A u + f), of a source with private features

The plan fixes, for every adapted layer, its source, its targets and their ranks. Exchanges, segments and columns follow
from it and are never written down (docs/exchange-plans.md). Method: PrivateLoRA, arXiv 2311.14030, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from .errors import PlanError
from .names import core_name, features_bias_name, features_weight_name, shared_core_name
from .strict import OMITTED_AT_DEFAULT

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""Target projections of a decoder layer, in the order in which a layer computes them."""

SHARED = "shared"
"""Name of the one down-projection of a source that all of its targets read."""


@dataclass(frozen=True)
class Source:
    """A layer whose u feeds adapters.

    ranks: (name, rank) of each down-projection A `[rank, hidden]`: one named "shared", or one per target name.
    on_device: the device holds this A (an entry source); else the cloud does and one exchange carries it.
    shared_injection: k, if one core `[k, rank]` makes one vector of k values for all layers and targets, which the cloud expands
    by a frozen map; 0 if each layer and target has a core of its own.
    features: n, if the device makes φ = silu(F A u + f) `[T, n]` of the compressed and the cores read that, with F `[n, rank]` and f `[n]`
    trained and private as they are; 0 if they read the compressed itself.
    """

    layer: int
    ranks: tuple[tuple[str, int], ...]
    on_device: bool = False
    shared_injection: int = 0
    features: int = field(default=0, metadata=OMITTED_AT_DEFAULT)


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer with adapters: where they read from, and (target, out_rank) of each up-projection B `[out, out_rank]`."""

    layer: int
    source: int
    out_ranks: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Core:
    """One trained M `[out_rank, rank]`: compressed[:, down_start:down_stop] -> injection[:, up_start:up_stop].

    Of a source with private features these are the columns that it reads, and `rank` is their number n.
    """

    name: str
    down_start: int
    down_stop: int
    up_start: int
    up_stop: int

    @property
    def rank(self) -> int:
        return self.down_stop - self.down_start

    @property
    def out_rank(self) -> int:
        return self.up_stop - self.up_start


@dataclass(frozen=True)
class Column:
    """What one up-projection B reads: the injection's columns start..stop, after expansion if the injection is shared.

    down: name of the down-projection behind them.
    """

    layer: int
    target: str
    down: str
    start: int
    stop: int

    @property
    def out_rank(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Exchange:
    """What one source gives: compressed `[T, compressed_columns]`, and back injection `[T, injection_columns]`.

    One network round trip inside a step, or, at index -1, what the device computes by itself for the entry. If shared, the
    cloud expands the injection to `up_columns` values; else these are the injection's own. features: of the source; 0 for none.
    """

    index: int
    source: int
    compressed_columns: int
    injection_columns: int
    up_columns: int
    shared: bool
    features: int
    cores: tuple[Core, ...]
    columns: tuple[Column, ...]

    @property
    def feature_columns(self) -> int:
        """Columns of what the cores read: features, or the compressed itself."""
        return self.features or self.compressed_columns

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of its trained tensors, which are private: F and f if it has features, and each core."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.features:
            shapes[features_weight_name(self.source)] = (self.features, self.compressed_columns)
            shapes[features_bias_name(self.source)] = (self.features,)
        return shapes | {core.name: (core.out_rank, core.rank) for core in self.cores}


@dataclass(frozen=True)
class Segment:
    """Cloud layers `first <= layer < stop` that run without the network; it starts with exchange `exchange`, if any.

    inputs: indices of the exchanges whose injections its layers read, in order; -1 is the entry's.
    """

    index: int
    first: int
    stop: int
    exchange: int | None
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class ExchangePlan:
    """layers: of the whole decoder; the first `front_layers` and last `back_layers` of them run on the device.

    Raises PlanError, with the layer, for a plan that is not legal.
    """

    layers: int
    front_layers: int
    back_layers: int
    sources: tuple[Source, ...]
    adapted: tuple[AdaptedLayer, ...]

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise PlanError(f"plan has {self.layers} layers, expected at least 1")
        if self.front_layers < 0 or self.back_layers < 0 or self.front_layers + self.back_layers >= self.layers:
            raise PlanError(
                f"front_layers {self.front_layers} and back_layers {self.back_layers} must be >= 0 and leave the cloud "
                f"at least one of {self.layers} layers"
            )
        self._check_sources()
        self._check_adapted()

    def _check_sources(self) -> None:
        layers = [source.layer for source in self.sources]
        if layers != sorted(set(layers)):
            raise PlanError(f"sources {layers} must be in rising order, each layer once")
        used = {adapted.source for adapted in self.adapted}
        for source in self.sources:
            at = f"source {source.layer}"
            if source.layer not in used:
                raise PlanError(f"{at} feeds no layer: leave it out")
            if not self.front_layers <= source.layer < self.layers - self.back_layers:
                raise PlanError(f"{at} lies outside the cloud's layers {self.front_layers}..{self.layers - self.back_layers - 1}")
            if source.on_device and source.layer != self.front_layers:
                raise PlanError(f"{at} is on the device, but only the entry layer {self.front_layers} can be")
            names = [name for name, _ in source.ranks]
            if names != [SHARED] and (not names or names != [target for target in TARGETS if target in names]):
                raise PlanError(f"{at} has down-projections {names}, expected ['{SHARED}'] or targets in the order {TARGETS}")
            for name, rank in source.ranks:
                if rank < 1:
                    raise PlanError(f"{at}, down-projection {name}: rank {rank}, expected at least 1")
            if source.shared_injection < 0 or (source.shared_injection and names != [SHARED]):
                raise PlanError(
                    f"{at}: a shared injection of {source.shared_injection} values with down-projections {names}; expected 0, or 1 and "
                    f"more with one down-projection '{SHARED}'"
                )
            if source.features < 0 or (source.features and names != [SHARED]):
                raise PlanError(
                    f"{at}: {source.features} features with down-projections {names}; expected 0, or 1 and more with one down-projection "
                    f"'{SHARED}'"
                )
            stands_for = sum(rank for each in self.adapted if each.source == source.layer for _, rank in each.out_ranks)
            if source.shared_injection > stands_for:
                raise PlanError(
                    f"{at}: a shared injection of {source.shared_injection} values stands for {stands_for} only; make it smaller, or 0"
                )

    def _check_adapted(self) -> None:
        layers = [adapted.layer for adapted in self.adapted]
        if layers != sorted(set(layers)):
            raise PlanError(f"adapted layers {layers} must be in rising order, each once")
        sources = {source.layer: dict(source.ranks) for source in self.sources}
        for adapted in self.adapted:
            at = f"layer {adapted.layer}"
            if not self.front_layers <= adapted.layer < self.layers - self.back_layers:
                raise PlanError(
                    f"{at} is adapted, but only the cloud's layers {self.front_layers}..{self.layers - self.back_layers - 1} can be"
                )
            if adapted.source > adapted.layer:
                raise PlanError(f"{at} has source {adapted.source}, which lies after it; a source runs first")
            if adapted.source not in sources:
                raise PlanError(f"{at} has source {adapted.source}, which is not among the sources {sorted(sources)}")
            names = [target for target, _ in adapted.out_ranks]
            if not names or names != [target for target in TARGETS if target in names]:
                raise PlanError(f"{at} has targets {names}, expected some of {TARGETS} in that order")
            ranks = sources[adapted.source]
            for target, out_rank in adapted.out_ranks:
                if out_rank < 1:
                    raise PlanError(f"{at}, target {target}: out_rank {out_rank}, expected at least 1")
                if SHARED not in ranks and target not in ranks:
                    raise PlanError(f"{at}, target {target}: source {adapted.source} has no down-projection for it")
        for source in self.sources:
            read = {target for adapted in self.adapted if adapted.source == source.layer for target, _ in adapted.out_ranks}
            for name, _ in source.ranks:
                if name != SHARED and name not in read:
                    raise PlanError(f"source {source.layer}: no layer reads its down-projection {name}; leave it out")

    @cached_property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The cloud's sources, in order: each is one round trip inside a step."""
        cloud = [source for source in self.sources if not source.on_device]
        return tuple(self._exchange(index, source) for index, source in enumerate(cloud))

    @cached_property
    def entry_exchange(self) -> Exchange | None:
        """What the device computes by itself and sends with the entry (index -1), if the entry layer is a source."""
        held = [source for source in self.sources if source.on_device]
        return self._exchange(-1, held[0]) if held else None

    def _exchange(self, index: int, source: Source) -> Exchange:
        starts: dict[str, tuple[int, int]] = {}
        compressed = 0
        for name, rank in source.ranks:
            starts[name] = (compressed, compressed + rank)
            compressed += rank
        columns: list[Column] = []
        cores: list[Core] = []
        up = 0
        for adapted in self.adapted:
            if adapted.source != source.layer:
                continue
            for target, out_rank in adapted.out_ranks:
                down = SHARED if SHARED in starts else target
                columns.append(Column(adapted.layer, target, down, up, up + out_rank))
                if not source.shared_injection:
                    read = (0, source.features) if source.features else starts[down]
                    cores.append(Core(core_name(adapted.layer, target), *read, up, up + out_rank))
                up += out_rank
        if source.shared_injection:
            cores.append(Core(shared_core_name(source.layer), 0, source.features or compressed, 0, source.shared_injection))
        injection, shared = source.shared_injection or up, bool(source.shared_injection)
        return Exchange(index, source.layer, compressed, injection, up, shared, source.features, tuple(cores), tuple(columns))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The cloud's layers, cut at the exchanges' sources and nowhere else."""
        stop = self.layers - self.back_layers
        cuts: list[tuple[int, int | None]] = [(exchange.source, exchange.index) for exchange in self.exchanges]
        if not cuts or cuts[0][0] != self.front_layers:
            cuts.insert(0, (self.front_layers, None))
        ends = [first for first, _ in cuts[1:]] + [stop]
        return tuple(
            Segment(index, first, end, exchange, self._inputs(first, end))
            for index, ((first, exchange), end) in enumerate(zip(cuts, ends, strict=True))
        )

    def _inputs(self, first: int, stop: int) -> tuple[int, ...]:
        return tuple(each.index for each in self.all_exchanges if any(first <= column.layer < stop for column in each.columns))

    @property
    def cloud_layers(self) -> int:
        """Layers that run, and have a KV cache, in the cloud."""
        return self.layers - self.front_layers - self.back_layers

    def cache_of(self, segment: Segment) -> slice:
        """Where a segment's layers lie among the cloud's."""
        return slice(segment.first - self.front_layers, segment.stop - self.front_layers)

    @property
    def round_trips(self) -> int:
        """Network round trips of one step: the exchanges, and the one from entry to exit."""
        return len(self.exchanges) + 1

    @property
    def all_exchanges(self) -> tuple[Exchange, ...]:
        """The entry's, if there is one, and those over the network."""
        return (self.entry_exchange, *self.exchanges) if self.entry_exchange else self.exchanges

    @property
    def columns(self) -> tuple[Column, ...]:
        """What every up-projection reads, exchange by exchange, the entry's first."""
        return tuple(column for exchange in self.all_exchanges for column in exchange.columns)

    @property
    def cores(self) -> tuple[Core, ...]:
        """Every trained core, exchange by exchange, the entry's first."""
        return tuple(core for exchange in self.all_exchanges for core in exchange.cores)

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every trained tensor, exchange by exchange, the entry's first."""
        return {name: size for exchange in self.all_exchanges for name, size in exchange.trained.items()}

    @property
    def device_layers(self) -> tuple[int, ...]:
        """Layers that run, and have a KV cache, on the device: the first and the last ones."""
        return (*range(self.front_layers), *range(self.layers - self.back_layers, self.layers))

    def source(self, layer: int) -> Source:
        """The source at `layer`, which must be one."""
        return next(source for source in self.sources if source.layer == layer)

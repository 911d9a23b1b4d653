"""What both halves agree on and what lies on disk: plan, shapes, manifests, hashes, errors. Stdlib only."""

from .errors import PloraError
from .plan import AdaptedLayer, Column, Exchange, ExchangePlan, Segment, Source, grouped_plan, paper_plan
from .shape import DecoderShape, Rope
from .walk import BackLayers, Entry, Exit, FrontLayers, Stage, walk

__all__ = [
    "AdaptedLayer",
    "BackLayers",
    "Column",
    "DecoderShape",
    "Entry",
    "Exchange",
    "ExchangePlan",
    "Exit",
    "FrontLayers",
    "PloraError",
    "Rope",
    "Segment",
    "Source",
    "Stage",
    "grouped_plan",
    "paper_plan",
    "walk",
]

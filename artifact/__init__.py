"""What both halves agree on and what lies on disk: plan, shapes, manifests, hashes, errors. Stdlib only."""

from .errors import PloraError
from .plan import AdaptedLayer, Column, Core, Exchange, ExchangePlan, Segment, Source
from .plans import entry_plan, grouped_plan, paper_plan
from .shape import DecoderShape, Rope
from .walk import BackLayers, Entry, Exit, FrontLayers, Stage, walk

__all__ = [
    "AdaptedLayer",
    "BackLayers",
    "Column",
    "Core",
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
    "entry_plan",
    "grouped_plan",
    "paper_plan",
    "walk",
]

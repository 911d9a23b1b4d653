"""Names of the files in an artifact and of the tensors in them: written by export, read by the runtimes."""

CLOUD_GRAPH = "cloud.pt"

EMBEDDING_GRAPH = "embedding"
HEAD_GRAPH = "head"
CORES_GRAPH = "cores"
"""Compressed to injection, of every exchange."""
ENTRY_GRAPH = "entry"
"""Entry to injection, where the device holds the entry source's A."""
FEATURES = "_features"
"""Ends the names of these two graphs where they serve sources with private features."""
LAYER_GRAPH = "layer"
"""One decoder layer on the device; edge_layout.py says which graphs a plan needs."""
GRAPH_FORMATS = ("onnx", "ort")
TABLE = "table.bin"
"""The token embedding table `[vocabulary, hidden]`, row-major little-endian, and the head's weight too if tied."""
HEAD_TABLE = "head.bin"
"""The head's weight `[vocabulary, hidden]`, if it is not tied to the embedding."""
ENTRY_DOWN = "entry_down.bin"
"""A of the entry source, its norm folded in: `[columns, hidden]` float32, row-major little-endian."""
LAYERS = "layers.bin"
"""Weights of the device's own decoder layers (edge_layout.py)."""
CORES = "cores.safetensors"
OPERATORS = "required_operators.config"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation.json"

BASIS = "basis.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CORES_FORMAT = "plora-cores-1"


def core_name(layer: int, target: str) -> str:
    """Core M `[out_rank, rank]` in cores.safetensors."""
    return f"layers.{layer}.{target}.core"


def shared_core_name(source: int) -> str:
    """Core M `[k, rank]` of a shared injection, in cores.safetensors."""
    return f"sources.{source}.core"


def features_weight_name(source: int) -> str:
    """F `[n, C]` of a source's private features, in cores.safetensors."""
    return f"sources.{source}.features.weight"


def features_bias_name(source: int) -> str:
    """f `[n]` of a source's private features, in cores.safetensors."""
    return f"sources.{source}.features.bias"


def expand_name(source: int) -> str:
    """P of a shared injection, in basis.safetensors, as `[2, I]`: which of the k values each column reads, and its sign."""
    return f"sources.{source}.expand"


def up_name(layer: int, target: str) -> str:
    """Up-projection B `[out, out_rank]` in basis.safetensors."""
    return f"layers.{layer}.{target}.up"


def down_name(source: int, name: str) -> str:
    """Down-projection A `[rank, hidden]` in basis.safetensors."""
    return f"sources.{source}.{name}.down"

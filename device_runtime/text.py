"""Text to tokens and back: the artifact's tokenizer and chat template, incremental decoding, stop texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from ..artifact.errors import DamagedFile, UsageError, half_character
from ..artifact.manifest import EdgeManifest, read_json, require_file
from ..artifact.names import CHAT_TEMPLATE, GENERATION, TOKENIZER
from ..artifact.strict import decode

REPLACEMENT = "\ufffd"
"""What a decoder prints for bytes that are not a character yet."""


@dataclass(frozen=True)
class GenerationDefaults:
    """`generation.json`: the checkpoint's own generation config, as far as the device uses it; null where it says nothing."""

    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    max_tokens: int | None


class Text:
    """Everything between a person's words and token ids."""

    def __init__(self, folder: Path, manifest: EdgeManifest) -> None:
        path = require_file(manifest, folder, TOKENIZER)
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise DamagedFile(f"{path}: not a tokenizer: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        where = require_file(manifest, folder, GENERATION)
        self.defaults = decode(GenerationDefaults, read_json(where), str(where))
        self.template_source = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8") if CHAT_TEMPLATE in manifest.files else None
        self._template: jinja2.Template | None = None

    def encode_raw(self, text: str) -> list[int]:
        """The tokenizer with its own special tokens, no template. Raises UsageError for text that is not UTF-8."""
        return self.tokenizer.encode(_require_utf8(text)).ids

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Messages (role, content) through the chat template, ready for the answer. Raises UsageError without a template, and for text
        that is not UTF-8."""
        return self.tokenizer.encode(_require_utf8(self.render(messages)), add_special_tokens=False).ids

    def render(self, messages: list[dict[str, str]]) -> str:
        if self.template_source is None:
            raise UsageError("this model has no chat template; pass --raw to send the prompt as it is")
        try:
            if self._template is None:
                self._template = _environment().from_string(self.template_source)
            return self._template.render(messages=messages, add_generation_prompt=True, **self.defaults.special_tokens)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"the chat template cannot be read (line {error.lineno}: {error}); pass --raw to do without it") from None
        except Exception as error:  # a template is a program: it may divide by zero, ask for a huge range, or refuse by itself
            raise UsageError(f"the chat template refuses these messages: {error}") from None

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _require_utf8(text: str) -> str:
    """`text` as it is. Raises UsageError for half a character."""
    if found := half_character(text):
        raise UsageError(f"the prompt is not UTF-8 text ({found} is half of a character); send whole characters, in UTF-8")
    return text


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """A sandbox with the extensions, filters and functions that published chat templates count on."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> Any:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    import datetime

    return datetime.datetime.now().strftime(form)


class Stream:
    """Token by token into text: only whole characters come out, and nothing of a stop text ever does."""

    def __init__(self, text: Text, stop: tuple[str, ...]) -> None:
        self.text = text
        self.stop = stop
        self.ids: list[int] = []
        self.sent = 0
        self.whole = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that has become certain with `token`; sets `stopped` once a stop text was met."""
        self.ids.append(token)
        self.whole = self.text.decode(self.ids)
        certain = len(self.whole)
        if self.whole.endswith(REPLACEMENT):
            certain = len(self.whole.rstrip(REPLACEMENT))
        found = [at for stop in self.stop if (at := self.whole.find(stop)) >= 0]
        if found:
            self.stopped = True
            self.whole = self.whole[: min(found)]
            return self._emit(len(self.whole))
        return self._emit(certain - self._held_back(self.whole[:certain]))

    def finish(self) -> str:
        """Whatever was held back."""
        return self._emit(len(self.whole))

    def _held_back(self, certain: str) -> int:
        """Length of the longest end of `certain` that could still become a stop text."""
        longest = 0
        for stop in self.stop:
            for size in range(min(len(stop) - 1, len(certain)), longest, -1):
                if certain.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _emit(self, upto: int) -> str:
        piece = self.whole[self.sent : upto] if upto > self.sent else ""
        self.sent = max(self.sent, upto)
        return piece

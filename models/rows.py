"""Training rows: prompt/response or chat messages, to token ids with a mask that keeps the loss on responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..artifact.errors import DataError, MissingFile, half_character

IGNORED = -100
"""Label that transformers' loss leaves out."""
ROLES = ("system", "user", "assistant")
Message = dict[str, str]
Said = tuple[tuple[str, str], ...]
"""Roles and texts of messages, told apart neither by white space nor by case."""


@dataclass(frozen=True)
class Example:
    """input_ids and labels, both [T]; a label is IGNORED outside responses. row: its number in the file, from 1; prompt: what is said
    before the last response."""

    input_ids: list[int]
    labels: list[int]
    row: int = 0
    prompt: Said = ()


def said(messages: Sequence[Message]) -> Said:
    return tuple((message["role"], " ".join(message["content"].split()).casefold()) for message in messages)


def read_rows(path: Path) -> list[list[Message]]:
    """Each row as messages. Raises MissingFile, or DataError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028, which JSON allows in a text
    except FileNotFoundError:
        raise MissingFile(f"{path}: not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    rows = [_messages(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: holds no rows; expected one JSON object a line")
    return rows


def _messages(line: str, where: str) -> list[Message]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: got {type(row).__name__}, expected an object with prompt and response, or messages")
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise DataError(f"{where}: messages must be a list of objects with a role of {', '.join(ROLES)} and a text as content")
    else:
        for key in ("prompt", "response"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise DataError(f"{where}: {key} is missing or empty; expected a text (keys: {', '.join(row) or 'none'})")
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise DataError(f"{where}: the last message must be the assistant's response, and not empty")
    if messages[0]["role"] == "assistant":
        raise DataError(f"{where}: the first message is the assistant's; a response needs something to respond to")
    for message in messages:
        if found := half_character(message["content"]):
            raise DataError(f"{where}: half a character (a lone surrogate) in the {message['role']}'s text: {found}")
    return messages


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)


def tokenize(messages: list[Message], tokenizer: Any, max_tokens: int, where: str) -> Example:
    """Every assistant turn is a response: its tokens, the end token included, are what the loss sees.

    Through the chat template if there is one, else the texts in a row. Raises DataError if the row is longer than max_tokens.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    told = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = _render(messages[:turn], tokenizer, answer_next=True)
            after = _render(messages[: turn + 1], tokenizer, answer_next=False)
        except Exception as error:  # a chat template is a program, and refuses in its own ways
            raise DataError(f"{where}: the chat template refuses it: {error}") from None
        if not before.startswith(told) or not after.startswith(before):
            raise DataError(f"{where}: the chat template rewrites earlier turns, so responses cannot be told from prompts")
        prompt = tokenizer(before[len(told) :], add_special_tokens=tokenizer.chat_template is None and not told)["input_ids"]
        response = tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
        end = response.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in response else len(response)
        if tokenizer.eos_token_id is not None and end == len(response) and response[-1:] != [tokenizer.eos_token_id]:
            response, end = [*response, tokenizer.eos_token_id], len(response) + 1
        input_ids += prompt + response
        labels += [IGNORED] * len(prompt) + response[:end] + [IGNORED] * (len(response) - end)
        told = after
    if len(input_ids) > max_tokens:
        raise DataError(f"{where}: {len(input_ids)} tokens, at most {max_tokens} are used; shorten it or raise --max-tokens")
    return Example(input_ids, labels, prompt=said(messages[:-1]))


def read_examples(path: Path, tokenizer: Any, max_tokens: int) -> list[Example]:
    """Every row of a file, tokenised. Raises MissingFile, or DataError naming the row."""
    rows = enumerate(read_rows(path), 1)
    return [replace(tokenize(row, tokenizer, max_tokens, f"{path}, row {number}"), row=number) for number, row in rows]


def _render(messages: list[Message], tokenizer: Any, answer_next: bool) -> str:
    if tokenizer.chat_template is None:
        return "".join(f"{message['content']}\n" if message["role"] != "assistant" else message["content"] for message in messages)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)

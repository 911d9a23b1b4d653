"""The parts of tuning: the loss against transformers' own, packing, the schedule, held-out rows, the calibrated basis."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plora.artifact import entry_plan, grouped_plan, paper_plan
from plora.artifact.errors import DataError, MissingFile, UsageError
from plora.artifact.names import down_name
from plora.models.basis import new_adapter
from plora.models.calibration import DEFAULT_TEXT, WINDOW_TOKENS, _tokens
from plora.models.checkpoint import Base, read_base, read_tokenizer
from plora.models.formula import Cores
from plora.models.leaks import NAMED, Rows, refuse_leaks
from plora.models.packing import Pack, pack
from plora.models.rows import IGNORED, Example, read_examples, read_rows, said, tokenize
from plora.models.schedule import Batches, Schedule, split
from plora.models.trainer import Tuned

from .conftest import FAMILIES, save_tiny_base, tiny_tokenizer, tuned

TALKS = [
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": "it is " + "so " * n}]
    for n in range(1, 6)
] + [
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello world"},
        {"role": "assistant", "content": "how are you?"},
        {"role": "user", "content": "the weather"},
        {"role": "assistant", "content": "every morning"},
    ]
]  # fmt: skip


def examples() -> list[Example]:
    return [dataclasses.replace(tokenize(talk, tiny_tokenizer(300), 128, ""), row=n) for n, talk in enumerate(TALKS, 1)]


def base_of(folder: Path, family: str) -> Base:
    base = read_base(str(save_tiny_base(folder / "base", family)))
    base.model.double()
    return base


def tuned_model(base: Base, plan: Any = None, windows: tuple[int, ...] | None = None) -> Tuned:
    adapter = tuned(new_adapter(base, plan or grouped_plan(3, 2, 4, ("q", "o", "down")), "random", 1.0, 0), size=0.3)
    return Tuned(base.model, Cores(base.model, adapter, torch.float64), base.shape.windows if windows is None else windows)


def padded(rows: list[Example]) -> dict[str, Tensor]:
    """As transformers' collators make it."""
    longest = max(len(row.input_ids) for row in rows)
    return {
        "input_ids": torch.tensor([row.input_ids + [0] * (longest - len(row.input_ids)) for row in rows]),
        "labels": torch.tensor([row.labels + [IGNORED] * (longest - len(row.labels)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows]),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pack_tokens", [1024, 60])
def test_loss_and_gradients_equal_transformers_own(family: str, pack_tokens: int, tmp_path: Path) -> None:
    model = tuned_model(base_of(tmp_path, family))
    rows = examples()
    packs = pack(rows, pack_tokens)
    assert (len(packs) > 1) == (pack_tokens == 60)
    tokens = sum(label != IGNORED for row in rows for label in row.labels)
    ours = model(packs)
    ours["loss"].backward()
    gradients = [core.grad.clone() / tokens for core in model.cores.parameters() if core.grad is not None]
    model.zero_grad()
    batch = padded(rows)
    theirs = model.model(**batch)
    theirs.loss.backward()
    assert float(ours["loss"].detach()) / tokens == pytest.approx(float(theirs.loss.detach()), rel=2e-6)  # both take the loss in fp32
    for mine, core in zip(gradients, model.cores.parameters(), strict=True):
        torch.testing.assert_close(mine, core.grad, rtol=1e-5, atol=1e-7)
    right = (theirs.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]) & (batch["labels"][:, 1:] != IGNORED)
    assert int(ours["right"]) == int(right.sum())
    assert sum(len(each.next_ids) for each in packs) == tokens


@pytest.mark.parametrize("family", ["mistral-window", "qwen2-window"])
def test_a_window_that_is_forgotten_shows(family: str, tmp_path: Path) -> None:
    base = base_of(tmp_path, family)
    right, wrong = tuned_model(base), tuned_model(base, windows=(0, 0, 0))
    wrong.cores.remove()
    packs = pack(examples())
    assert abs(float((right(packs)["loss"] / wrong(packs)["loss"]).detach()) - 1) > 1e-5


def test_packs_hold_the_common_beginning_once_and_nothing_after_the_last_label() -> None:
    rows = examples()
    (packed,) = pack(rows)
    prefix = int((packed.row == -1).sum())
    assert prefix > 10
    used = [max(at for at, label in enumerate(row.labels) if label != IGNORED) for row in rows]
    assert len(packed.input_ids) == prefix + sum(n - prefix for n in used)
    for number, row in enumerate(rows):
        mine = packed.input_ids[packed.row == number].tolist()
        assert row.input_ids[:prefix] + mine == row.input_ids[: used[number]]
    assert len(pack(rows, 1)) == len(rows)  # longer than a pack: alone


def test_no_predicted_token_is_shared() -> None:
    twins = [Example([5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, 8, 9]) for _ in range(2)]
    (packed,) = pack(twins)
    assert (packed.row == -1).sum() == 1  # token 6 predicts 7, the first label: each row has its own
    assert packed.next_ids.tolist() == [7, 8, 9, 7, 8, 9]


def test_no_gradient_below_the_first_source(tmp_path: Path) -> None:
    model = tuned_model(base_of(tmp_path, "llama"), entry_plan(3, 2, 4))
    seen: list[bool] = []
    for layer in model.model.model.layers:
        layer.register_forward_hook(lambda m, i, out: seen.append((out[0] if isinstance(out, tuple) else out).requires_grad))
    model(pack(examples()))
    assert seen == [False, False, True]


def test_logits_only_where_a_response_is_predicted(tmp_path: Path) -> None:
    model = tuned_model(base_of(tmp_path, "llama"))
    seen: list[int] = []
    model.model.lm_head.register_forward_hook(lambda m, i, out: seen.append(len(out)))
    packs = pack(examples())
    model(packs)
    assert sum(seen) == sum(label != IGNORED for row in examples() for label in row.labels)


def test_a_batch_moves_as_a_whole() -> None:
    (packed,) = pack(examples())
    moved = packed.to(torch.device("meta"))
    assert all(getattr(moved, field.name).device.type == "meta" for field in dataclasses.fields(Pack))


# Schedule


def test_every_row_once_per_pass_whatever_the_parts() -> None:
    one, four = Schedule.plan(21, 8, 1, 4, None, 3), Schedule.plan(21, 2, 4, 4, None, 3)
    assert one.steps == four.steps == 11  # 84 rows of 8, the last step full
    read = [at for step in range(one.steps) for at in one.of_step(step)]
    assert read == [at for step in range(four.steps) for at in four.of_step(step)]
    passes = [read[at : at + 21] for at in range(0, 84, 21)]
    assert all(sorted(each) == list(range(21)) for each in passes)
    assert len({tuple(each) for each in passes}) == 4
    assert read != [at for step in range(11) for at in Schedule.plan(21, 8, 1, 4, None, 4).of_step(step)]


def test_batches_share_out_a_step(tmp_path: Path) -> None:
    rows = examples()
    schedule = Schedule.plan(6, 2, 3, 2, None, 0)
    batches = Batches(rows, schedule)
    assert len(batches) == 6
    labels = torch.cat([batches[index]["labels"] for index in range(3)])
    assert sorted(labels.tolist()) == sorted(label for row in rows for label in row.labels if label != IGNORED)
    assert batches.numbers(0) == [1, 2, 3, 4, 5, 6]
    assert Schedule.plan(6, 8, 1, 2, None, 0).of_step(0) != sorted(range(6))
    assert len(Schedule.plan(6, 8, 1, 2, None, 0).of_step(0)) == 6  # never a row twice in a step


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (4, 2), (40, 5), (1000, 50)])
def test_warm_up(steps: int, warmup: int) -> None:
    assert Schedule.plan(8, 8, 1, 1, steps, 0).warmup_steps == warmup


def test_held_out_rows_are_not_trained_on() -> None:
    rows = [Example([n, 7], [IGNORED, 7], n, said(talk(f"{n}?", "7")[:-1])) for n in range(1, 41)]
    train, held = split(rows, 0.2, 0)
    assert len(held) == 8
    assert sorted(row.row for row in [*train, *held]) == list(range(1, 41))
    assert split(rows, 0.2, 0) == (train, held)
    assert split(rows, 0.2, 1)[1] != held
    with pytest.raises(UsageError, match="leaves none to train on"):
        split(rows[:1], 0.3, 0)


def test_rows_with_one_prompt_are_held_out_together(tmp_path: Path) -> None:
    """Whatever they answer, and however prompts are spaced and capitalised; of a conversation, the prompt is all before the last response."""
    path = tmp_path / "rows.jsonl"
    prompts = [f"{'Where' if n % 2 else ' where '} is {n % 10 // 2}?" for n in range(40)]
    turns = [[*talk("who?", f"{n}"), *talk("and then?", "home")] for n in range(4)]
    lines = [{"messages": talk(prompt, f"there {n}")} for n, prompt in enumerate(prompts)] + [{"messages": each} for each in turns]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    rows = read_examples(path, tiny_tokenizer(300), 64)
    assert rows[0].prompt == (("user", "where is 0?"),)
    assert rows[40].prompt == (("user", "who?"), ("assistant", "0"), ("user", "and then?"))
    for seed in range(8):
        train, held = split(rows, 0.1, seed)
        assert not {row.prompt for row in train} & {row.prompt for row in held}
        assert len(held) >= 4
        assert sorted(row.row for row in [*train, *held]) == list(range(1, 45))
        refuse_leaks(Rows.of(path, [row.row for row in train]), Rows.of(path, [row.row for row in held]), prompts=True)
    with pytest.raises(UsageError, match="0.1 of 8 rows with 1 prompts leaves none to train on"):
        split([row for row in rows if row.prompt == rows[0].prompt], 0.1, 0)


# Leaks


def talk(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def test_a_leak_is_named_by_both_row_numbers() -> None:
    trained = Rows(Path("data"), [1, 2, 5], [talk("who?", "me"), talk("where?", "here"), talk("Why  so?", "Yes")])
    same = Rows(Path("held"), [3, 4], [talk("how?", "thus"), talk("why so?", " yes")])
    with pytest.raises(DataError, match="held: 1 of 2 held-out rows are trained on: row 4 is row 5 of data; take them out"):
        refuse_leaks(trained, same)
    other_answer = Rows(Path("held"), [1], [talk("WHERE?", "there")])
    refuse_leaks(trained, other_answer)
    with pytest.raises(DataError, match="held: 1 of 1 held-out prompts are trained on: row 1 is row 2 of data"):
        refuse_leaks(trained, other_answer, prompts=True)


def test_what_leads_to_a_prompt_belongs_to_it() -> None:
    before = talk("a riddle", "go on")
    trained = Rows(Path("data"), [1], [talk("who?", "me")])
    refuse_leaks(trained, Rows(Path("held"), [1], [[*before, *talk("who?", "me")]]), prompts=True)


def test_many_leaks_are_counted() -> None:
    rows = Rows(Path("data"), range(1, 21), [talk(str(n), "x") for n in range(20)])
    with pytest.raises(DataError, match=f"20 of 20 held-out rows .* and {20 - NAMED} more"):
        refuse_leaks(rows, rows)


def test_rows_of_a_file_by_number(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("".join(f'{{"prompt": "{n}", "response": "r"}}\n\n' for n in range(1, 5)))
    assert Rows.of(tmp_path / "rows", [2, 4]).messages == [talk("2", "r"), talk("4", "r")]
    assert list(Rows.of(tmp_path / "rows").numbers) == [1, 2, 3, 4]


# Rows


def test_rows_that_the_chat_template_refuses_are_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(300)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: the chat template refuses it: roles must alternate"):
        read_examples(tmp_path / "rows.jsonl", tokenizer, 64)


def test_a_text_may_hold_what_other_systems_end_lines_with(tmp_path: Path) -> None:
    """JSON allows U+2028, U+2029 and U+0085 in a text as they are."""
    text = "one\u2028two\u2029three\u0085four"
    (tmp_path / "rows.jsonl").write_bytes(json.dumps({"prompt": "a", "response": text}, ensure_ascii=False).encode() + b"\r\n{}\r\n")
    with pytest.raises(DataError, match="line 2: prompt is missing"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": text}, ensure_ascii=False), encoding="utf-8")
    assert read_rows(tmp_path / "rows.jsonl") == [talk("a", text)]


def test_a_conversation_that_the_assistant_opens(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "assistant", "content": "hello"}]}\n')
    with pytest.raises(DataError, match="line 1: the first message is the assistant's"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [('{"prompt": "a"}', "line 2: response is missing"), ("no", "line 2: not JSON"), (r'{"prompt": "a \ud83d", "response": "b"}', "line 2: half a character .* in the user's text"), ('{"prompt": "a", "response": "' + "b " * 99 + '"}', "row 2: .* tokens, at most 64")],
)  # fmt: skip
def test_a_bad_row_is_named(line: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=complaint):
        read_examples(tmp_path / "rows.jsonl", tiny_tokenizer(300), 64)


# The calibrated basis


@torch.no_grad()
def compressed(base: Base, plan: Any, basis: dict[str, Tensor]) -> dict[int, Tensor]:
    """A u of every source on the calibration text, as covariances() reads it."""
    seen: dict[int, list[Tensor]] = {source.layer: [] for source in plan.sources}
    for layer, found in seen.items():
        down = basis[down_name(layer, "shared")].double()
        base.model.model.layers[layer].input_layernorm.register_forward_hook(
            lambda m, i, u, to=found, a=down: to.append(u[0, 1:].double() @ a.T)
        )
    tokens = _tokens(base, DEFAULT_TEXT)
    for at in range(0, len(tokens), WINDOW_TOKENS):
        base.model.model(torch.tensor([tokens[at : at + WINDOW_TOKENS]]), use_cache=False)
    return {layer: torch.cat(found) for layer, found in seen.items()}


def test_pca_compresses_to_unit_variance_without_correlation(tmp_path: Path) -> None:
    base = read_base(str(save_tiny_base(tmp_path / "base", "llama")))
    plan = paper_plan(3, 6)
    for kind, whitened in (("pca", True), ("random", False)):
        seen = compressed(base, plan, new_adapter(base, plan, kind, 1.0, 0).basis)
        worst = max(float((torch.cov(each.T, correction=0) - torch.eye(6)).abs().max()) for each in seen.values())
        assert (worst < 1e-3) == whitened, (kind, worst)


def test_calibration_text_must_suffice(tmp_path: Path) -> None:
    base = read_base(str(save_tiny_base(tmp_path / "base", "llama")))
    (tmp_path / "short.txt").write_text("hello world")
    with pytest.raises(DataError, match=r"short\.txt: \d+ tokens of calibration text, a basis of rank 8 needs at least"):
        new_adapter(base, entry_plan(3, 1, 8), "pca", 1.0, 0, tmp_path / "short.txt")
    with pytest.raises(MissingFile, match="--calibration"):
        new_adapter(base, entry_plan(3, 1, 8), "pca", 1.0, 0, tmp_path / "none.txt")
    text = DEFAULT_TEXT.read_text()
    assert len(text.split()) > 1700  # 2,357 tokens of SmolLM2's
    assert len(read_tokenizer(base.source)(text)["input_ids"]) >= 2048
    (tmp_path / "own.txt").write_text(text[len(text) // 2 :])
    own, default = (new_adapter(base, entry_plan(3, 1, 8), "pca", 1.0, 0, path).config.basis for path in (tmp_path / "own.txt", None))
    assert own != default

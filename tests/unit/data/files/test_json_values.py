"""JSON files of any layout, cut anywhere, give their values, their lines, and what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.files.json_values import JsonValue, json_values


def read(data: bytes, size: int = 1 << 20) -> list[JsonValue]:
    return list(json_values(data[start : start + size] for start in range(0, len(data), size)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(
    values=st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=8),
    size=st.integers(1, 40),
    indent=st.sampled_from([None, 2]),
    as_array=st.booleans(),
    escaped=st.booleans(),
)
def test_json_in_blocks_of_any_size_gives_the_same_values_and_lines(
    values: list[Any], size: int, indent: int | None, as_array: bool, escaped: bool
) -> None:
    if as_array:
        text = json.dumps(values, indent=indent, ensure_ascii=escaped)
    else:
        text = "\n".join(json.dumps(value, indent=indent, ensure_ascii=escaped) for value in values)
    data = text.encode("utf-8", "surrogatepass")
    found = read(data, size)
    assert [value.error for value in found] == [None] * len(values)
    assert [value.value for value in found] == values
    if values and not as_array:
        before = [json.dumps(value, indent=indent, ensure_ascii=escaped).count("\n") + 1 for value in values]
        assert [value.line for value in found] == [1 + sum(before[:index]) for index in range(len(values))]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_after_a_bad_value_reading_goes_on_at_the_next_object(size: int) -> None:
    found = read(b'{"a": 1}\n{"a" 2}\n{"a": 3}\n\n{"a": \n nope}\n{"a": 5}\n', size)
    assert [value.value for value in found if value.error is None] == [{"a": 1}, {"a": 3}, {"a": 5}]
    assert [(value.line, value.error) for value in found if value.error] == [
        (2, "is no JSON (Expecting ':' delimiter)"),
        (6, "is no JSON (Expecting value)"),
    ]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("byte_order_mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_that_is_no_utf8_is_named_with_its_line_and_what_is_before_it_is_read(
    size: int, byte_order_mark: bytes
) -> None:
    found = read(byte_order_mark + '[{"a": "é"},\n\n{"a": "'.encode() + b'\xe9"}, {"a": 2}]', size)
    assert found[0] == JsonValue(1, {"a": "é"}, None, 10)
    assert [(value.line, value.error) for value in found[1:]] == [
        (3, "is not UTF-8 text (byte 0xe9: invalid continuation byte); what comes after it is not read")
    ]


def test_a_fault_before_a_byte_that_is_no_utf8_is_not_hidden_by_it() -> None:
    found = read(b'{"a" 1}\n{"a": "a longer value"}\n\xff')
    assert [value.line for value in found] == [1, 2, 3]
    assert [value.error is None for value in found] == [False, True, False]


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "[1 2]", "[,1]", "[1,]", '{"a": 1'])
def test_what_is_no_json_is_one_error(text: str) -> None:
    found = read(text.encode(), 4096)
    assert [value.error is not None for value in found][-1:] == [True]
    assert sum(value.error is not None for value in found) == 1


def test_a_long_value_is_not_parsed_again_for_each_block() -> None:
    text = json.dumps([{"a": "x" * 2_000_000}]).encode()
    calls = 0

    def blocks() -> Any:
        nonlocal calls
        for start in range(0, len(text), 1000):
            calls += 1
            yield text[start : start + 1000]

    (value,) = json_values(blocks())
    assert value.num_characters == len(text) - 2
    assert calls == 2001

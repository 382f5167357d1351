"""`mask_pii` masks addresses and touches nothing else."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmtrain.config.sections.quality import MaskPiiStep
from llmtrain.data.prepare.quality.pii import MaskPii

MASK = MaskPii(MaskPiiStep(), key="prepare.steps[0]")
MASKED = [
    "bob@example.org",
    "first.last+tag@mail.example.co.uk",
    "o'x_%-1@sub-domain.example.museum",
    "jörg@bücher.de",
    "8.8.8.8",
    "203.0.114.7",
    "2001:4860:4860::8888",
    "2a00:1450:4001:0812:0000:0000:0000:200e",
]
LEFT = [
    "@decorator",
    "user@host",
    "a@b@c",
    "x@y.1",
    "10.0.0.1",
    "192.168.1.1",
    "127.0.0.1",
    "999.8.8.8",
    "1.2.3",
    "8.8.8.8.8",
    "v8.8.8.8",
    "std::vector",
    "a::b",
    "12:30:45",
    "::1",
    "fe80::1",
    "dead:beef",
    "https://example.org/a",
]


@pytest.mark.parametrize("address", MASKED)
def test_addresses_are_masked_and_the_text_around_them_stays(address: str) -> None:
    mask = "<email>" if "@" in address else "<ip>"
    assert MASK.apply(f"write to ({address}), or call.\n") in (
        f"write to ({mask}), or call.\n",
        f"write to (o'{mask}), or call.\n",
    )
    assert MASK.apply(f"{address}.") in (f"{mask}.", f"o'{mask}.")


@pytest.mark.parametrize("text", LEFT)
def test_what_is_no_public_address_stays(text: str) -> None:
    assert MASK.apply(f"see {text} here") == f"see {text} here"


def test_each_kind_may_be_left_and_masks_may_be_chosen() -> None:
    text = "bob@example.org 8.8.8.8"
    for options, expected in (
        ({"email": None}, "bob@example.org <ip>"),
        ({"ip": None}, "<email> 8.8.8.8"),
        ({"email": "[MAIL]", "ip": "(ADDRESS)"}, "[MAIL] (ADDRESS)"),
    ):
        assert MaskPii(MaskPiiStep.model_validate(options), key="k").apply(text) == expected
    for mask in ("someone@example.org", "EMAIL", ""):  # a bare word would be a part of what stands beside it
        with pytest.raises(ValidationError, match="has to be a word in brackets, such as <email>"):
            MaskPiiStep(email=mask)


WORDS = st.one_of(
    st.sampled_from(MASKED + LEFT), st.text("abc@.:1 \n<>é", max_size=10), st.ip_addresses().map(str), st.emails()
)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=8).map(" ".join))
def test_a_second_pass_changes_nothing_and_only_addresses_go(text: str) -> None:
    masked = MASK.apply(text)
    assert isinstance(masked, str)
    assert MASK.apply(masked) == masked
    # What is left, piece by piece, stands in the text in the same order.
    at = 0
    for piece in re.split("<email>|<ip>", masked):
        found = text.find(piece, at)
        assert found >= at
        at = found + len(piece)
    if "@" not in text and not re.search(r"\d+\.\d+\.\d+\.\d+|:[^ ]*:", text):
        assert masked == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="@:.0123456789")))
def test_text_without_the_signs_of_an_address_is_never_touched(text: str) -> None:
    assert MASK.apply(text) == text


@pytest.mark.parametrize("piece", ["a", "a.", "a@", "1.", "1:", "a.a@a.", "8.8.8.8", "-_"])
def test_the_time_grows_with_the_text_alone(piece: str) -> None:
    """A pattern that backtracks would take hours for these."""
    began = time.process_time()
    MASK.apply(piece * 30_000)
    assert time.process_time() - began < 30

from __future__ import annotations

import pytest

from llmtrain.models.decoder.decoder import Decoder
from llmtrain.planning.parameter_counts import parameters_by_part
from tests.support.tiny import TINY_VOCAB_SIZE, decoder_variants, tiny_config


@pytest.mark.parametrize("name", decoder_variants())
def test_parts_add_up_to_the_model(name: str) -> None:
    model = Decoder(tiny_config(**decoder_variants()[name]), TINY_VOCAB_SIZE)
    parts = parameters_by_part(model)
    assert sum(parts.values()) == model.num_parameters()
    assert "other" not in parts
    blocks = model.blocks
    assert parts["attention"] == sum(
        p.numel() for b in blocks for n, p in b.named_parameters() if n.startswith("attention.") and "norm" not in n
    )
    assert parts["feed_forward"] == sum(
        p.numel() for b in blocks for n, p in b.named_parameters() if n.startswith("feed_forward.")
    )


def test_parts_of_a_small_decoder_by_hand() -> None:
    parts = parameters_by_part(Decoder(tiny_config(tie_embeddings=False), TINY_VOCAB_SIZE))
    assert parts == {
        "embedding": 61 * 32,
        "attention": 2 * 4 * 32 * 32,
        "feed_forward": 2 * 3 * 32 * 48,
        "norms": 5 * 32,
        "head": 61 * 32,
    }

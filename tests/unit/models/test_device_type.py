from __future__ import annotations

import torch

from llmtrain.models.decoder.mask import build_mask
from llmtrain.models.device_type import assume_device_type, device_type_of

CPU = torch.device("cpu")


def test_the_device_type_is_assumed_inside_the_block_only() -> None:
    assert device_type_of(CPU) == "cpu"
    with assume_device_type("cuda"):
        assert device_type_of(CPU) == "cuda"
        with assume_device_type("mps"):
            assert device_type_of(CPU) == "mps"
        assert device_type_of(CPU) == "cuda"
    assert device_type_of(CPU) == "cpu"


def test_attention_of_an_assumed_gpu_is_fused() -> None:
    with assume_device_type("cuda"):
        assert build_mask(8, document_ids=None, cache=None, device=CPU) == (None, False)
    assert build_mask(8, document_ids=None, cache=None, device=CPU)[1] is True

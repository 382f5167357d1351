"""The decoder's forward pass as one graph with free batch size and length, for torch.export and ONNX.

It calls the parts of decoder.py differently. Positions are a tensor, since a number would become a constant. The fused
kernel always gets the mask, since explicit attention has a number of blocks that depends on the length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.decoder.mask import AttentionInputs, alibi_slopes


class TraceableDecoder(nn.Module):
    """Computes the logits of `decoder` without cache, documents and dropout."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return [b, t, vocab] scores of the token after each of `input_ids` [b, t]."""
        decoder = self.decoder
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        inputs = self._attention_inputs(positions)
        x = decoder._embed(input_ids, positions)
        for block in decoder.blocks:
            x = block(x, inputs, None)
        return F.linear(x if decoder.final_norm is None else decoder.final_norm(x), decoder.output_weight)

    def _attention_inputs(self, positions_1t: Tensor) -> AttentionInputs:
        config = self.decoder.config
        keys, queries = positions_1t, positions_1t.transpose(0, 1)
        allowed = keys <= queries
        if config.attention.window is not None:
            allowed = allowed & (keys > queries - config.attention.window)
        mask = allowed[None, None]
        if config.positional.encoding == "alibi":
            slopes = alibi_slopes(config.attention.num_heads, device=positions_1t.device)
            mask = torch.where(mask, slopes[:, None, None] * (keys - queries), float("-inf"))
        rope = None if self.decoder.rotary is None else self.decoder.rotary(positions_1t)
        return AttentionInputs(mask=mask, rope=rope, explicit=False, window=config.attention.window)

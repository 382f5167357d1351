"""Causal models of transformers, wrapped for the training loop.

load           builds a HuggingFaceModel from a config and a model folder: quantized, with adapters, or without values
model          the wrapper: loss, logits, packed rows; its parts are in head, attention, cache and packed_rows
folder         writes and reads the `model/` of a checkpoint; parts reads weights one tensor at a time
spec           the same model with all shapes and no values, for `plan`
quantization   rounds weights to the values that they have in 4 or 8 bits
"""

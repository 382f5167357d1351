"""Causal models of transformers behind the contract that the loop trains.

load     a config and a model folder → HuggingFaceModel: quantized, with adapters, or without values for now
model    the model: loss, logits, packed rows; head, attention and cache hold its parts
folder   a checkpoint's `model/` of such a model; parts reads weights one tensor at a time
spec     the same model in every shape, without values: for `plan`
quantization   the values that weights have in 4 or 8 bits
"""

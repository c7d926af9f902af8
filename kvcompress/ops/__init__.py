"""Attention on compressed caches and the encoding of new tokens, by compiled kernels where there are any.

A folder per form of cache. Its `attention.bind(codec, device)` picks once who works on a layer, and gives an object
with the form's operations: `reference` has the torch code that specifies them, `cpu` and `cuda` what kernels do
instead, `plan` what these need of a codec; `graph` has them as torch ops. Beside the folders is what forms share.
"""

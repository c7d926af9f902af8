"""Attention on compressed pages and the encoding of new tokens, by compiled kernels where there are any.

`append.append` and `attention.decode_attention` are what engines call; importing them also registers the torch ops
`kvcompress::append` and `kvcompress::decode_attention` for graphs. Tensors the compiled library does not cover go to
the torch code that specifies it.
"""

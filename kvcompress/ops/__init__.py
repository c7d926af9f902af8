"""Attention on compressed caches and the encoding of new tokens, by compiled kernels where there are any.

For pages of independent tokens: `append.append`, `compress.compress_pages`, `attention.decode_attention` and
`gather.gather_decode`; for the form `blocks` `blocks.attend`, for latents that layers share `shared`, for MLA `latent`.
Importing them also registers torch ops of these names (`kvcompress::append`, ...) for graphs. Tensors on a CPU take
`library`'s kernels, on a GPU `cuda`'s (pages in fragment order, the first four only); what these do not cover goes to
the torch code that specifies them.
"""

"""Inputs that real checkpoints and users bring: the right result, or one line with exit code 2 before long work.

`python -m pytest tests/cases` runs them all.

test_config       config.json: types, defaults, sizes, windows, rotary embedding, dtype
test_checkpoint   weights, index, file names, links, adapters, devices, outputs, memory, what happens to finished work
test_calibration  calibration files and rows, tokenizers, chat templates, files that a tokenizer owns
test_methods      layers that carry nothing, numbers that overflow, mixed dtypes, bytes as promised
test_serving      incomplete checkpoints, factored weights in transformers, LoRA, edited cards
test_evaluation   ends of sequences, rows of data sets, README's own command, options
test_damage       300 inputs damaged at random
"""

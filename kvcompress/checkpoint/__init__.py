"""Checkpoints on disk: read them lazily, write them atomically, record and verify every byte.

Modules, lowest first:

- `paths`, `json_file`, `hashing`, `atomic`, `digests`: file names, JSON, sha256, whole-or-nothing writing;
- `safetensors_file`: headers and single tensors of one safetensors file, with plain file reads;
- `source`, `reader`, `rows`: from a folder or hub id to a `Checkpoint`, whole tensors and single rows of it;
- `workdir`, `writer`: the resumable output folder and what is written into it;
- `manifest`, `verify`: what a compressed checkpoint says about itself, and the check that it is true.

Importing any of them imports neither torch nor transformers.
"""

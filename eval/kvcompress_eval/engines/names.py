"""Names of the engines."""

AUTO = "auto"
TRANSFORMERS = "transformers"
VLLM = "vllm"
ENGINES = (AUTO, TRANSFORMERS, VLLM)

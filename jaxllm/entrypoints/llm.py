"""`from jaxllm.entrypoints.llm import LLM`, as scripts for vLLM have it; the class is jaxllm.llm's."""

from jaxllm.llm import LLM

__all__ = ["LLM"]

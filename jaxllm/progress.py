"""ProgressBar: vLLM's bar of a call's requests, "Processed prompts", with input and output tokens per second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from jaxllm.outputs import PoolingRequestOutput, RequestOutput

Progress = bool | Callable[..., Any]
"""`use_tqdm`: whether there is a bar, or what makes one with tqdm's arguments."""


class ProgressBar:
    """A bar over `total` requests, as a context."""

    def __init__(self, total: int, use_tqdm: Progress) -> None:
        make = use_tqdm if callable(use_tqdm) else tqdm
        self._bar = make(
            total=total,
            desc="Processed prompts",
            dynamic_ncols=True,
            disable=not use_tqdm,
            postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s",
        )
        self._tokens_in = self._tokens_out = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, output: RequestOutput | PoolingRequestOutput[Any]) -> None:
        self._tokens_in += len(output.prompt_token_ids)
        if isinstance(output, RequestOutput):
            self._tokens_out += sum(len(one.token_ids) for one in output.outputs)
        elapsed = self._bar.format_dict["elapsed"] or 1e-9
        speed_in, speed_out = self._tokens_in / elapsed, self._tokens_out / elapsed
        self._bar.postfix = f"est. speed input: {speed_in:.2f} toks/s, output: {speed_out:.2f} toks/s"
        self._bar.update()

"""The command line: jaxllm generate, chat, models, inspect, merge-lora. Engine flags are those of EngineConfig."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from jaxllm.config import EngineConfig
from jaxllm.sampling_params import SamplingParams

_SAMPLING_FLAGS = {
    "n": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "max_tokens": int,
    "min_tokens": int,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("jax").setLevel(logging.WARNING)
    try:
        return args.run(args)
    except (ValueError, TypeError, ImportError, RuntimeError, FileNotFoundError) as error:
        print(f"jaxllm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="jaxllm", description="LLM inference in pure JAX.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="continue prompts", description="Continues prompts.")
    generate.add_argument("prompts", nargs="*", help="prompts; none: one a line from standard input")
    generate.add_argument("--no-stream", action="store_true", help="print answers when they are complete")
    generate.set_defaults(run=run_generate)
    chat = commands.add_parser("chat", help="talk with the model", description="Talks with the model, turn by turn.")
    chat.add_argument("--system-prompt", help="the system message")
    chat.set_defaults(run=run_chat)
    models = commands.add_parser("models", help="list what can be loaded", description="Lists what can be loaded.")
    models.set_defaults(run=run_models, log_level="warning")
    for command in (generate, chat):
        command.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
        add_sampling_flags(command)
        add_engine_flags(command)
    _add_checkpoint_commands(commands)
    return top


def _add_checkpoint_commands(commands: Any) -> None:
    """Those that look at weights or write them, and generate nothing."""
    inspect = commands.add_parser(
        "inspect", help="what a checkpoint is", description="Says what a checkpoint is and what fits; reads no weights."
    )
    inspect.add_argument("path", help="folder or hub id of a checkpoint")
    add_engine_flags(inspect)
    inspect.set_defaults(run=run_inspect)
    merge = commands.add_parser(
        "merge-lora", help="write a checkpoint with an adapter", description="Merges a LoRA adapter into a checkpoint."
    )
    for name, text in (("model", "folder of the checkpoint"), ("adapter", "folder of the adapter"), ("out", "written")):
        merge.add_argument(name, help=text)
    merge.set_defaults(run=run_merge_lora)
    for command in (inspect, merge):
        command.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])


def add_engine_flags(command: argparse.ArgumentParser) -> None:
    """One flag a field of EngineConfig; booleans also have a --no- form."""
    group = command.add_argument_group("engine")
    hints = get_type_hints(EngineConfig)
    for one in dataclasses.fields(EngineConfig):
        flag = "--" + one.name.replace("_", "-")
        options: dict[str, Any] = {"default": None, "dest": one.name, "help": f"{one.metadata['help']} ({one.default})"}
        if hints[one.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _parser_of(hints[one.name])
            options["choices"] = one.metadata["choices"]
        group.add_argument(flag, **options)


def add_sampling_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling (default: the model's generation_config.json)")
    for name, kind in _SAMPLING_FLAGS.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, dest=name)
    group.add_argument("--stop", action="append", help="a string that ends the answer; may be given several times")
    group.add_argument("--ignore-eos", action="store_true", default=None)


def engine_args(args: argparse.Namespace) -> dict[str, Any]:
    """The engine fields that were given."""
    names = (one.name for one in dataclasses.fields(EngineConfig))
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def sampling_params(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The given sampling fields over `defaults`."""
    names = (*_SAMPLING_FLAGS, "stop", "ignore_eos")
    return dataclasses.replace(
        defaults, **{name: getattr(args, name) for name in names if getattr(args, name) is not None}
    )


def _parser_of(hint: Any) -> Callable[[str], Any]:
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is dict:
        return json_object
    return hint if hint in (int, float) else str


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object: {text}")
    return value


def run_generate(args: argparse.Namespace) -> int:
    from jaxllm.llm import LLM

    prompts = args.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("no prompts: give them as arguments, or one a line on standard input")
    sampling_params(args, SamplingParams(max_tokens=None))  # a bad value is refused before anything is loaded
    llm = LLM(**(_few_sequences(len(prompts) * (args.n or 1)) | engine_args(args)))
    params = sampling_params(args, _longer(llm.get_default_sampling_params()))
    if args.no_stream or len(prompts) > 1 or params.n > 1:
        reasons = []
        for output in llm.generate(prompts, params, use_tqdm=sys.stderr.isatty()):
            for answer in output.outputs:
                print(f"{output.prompt}{answer.text}\n")
                reasons.append(answer.finish_reason)
    else:
        print(prompts[0], end="", flush=True)
        reasons = [_print_stream(llm, prompts[0], params)[1]]
        print()
    if failed := reasons.count("error"):
        raise RuntimeError(f'{failed} of {len(reasons)} answers ended with finish_reason "error"')
    return 0


def run_chat(args: argparse.Namespace) -> int:
    from jaxllm.llm import LLM

    sampling_params(args, SamplingParams(max_tokens=None))  # a bad value is refused before anything is loaded
    llm = LLM(**(_few_sequences(1) | engine_args(args)))
    if llm.llm_engine.tokenizer is None:
        raise ValueError("chat needs a tokenizer")
    params = sampling_params(args, _longer(llm.get_default_sampling_params()))
    messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    # A template that cannot be read, or does not take such messages, is refused before the first turn.
    _chat_prompt(llm, [*messages, {"role": "user", "content": "Hello"}])
    print("Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return 0
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer, _ = _print_stream(llm, _chat_prompt(llm, messages), params)
        except ValueError as error:  # a turn that is too long, say: the conversation goes on without it
            print(f"jaxllm: error: {error}", file=sys.stderr)
            messages.pop()
            continue
        print()
        messages.append({"role": "assistant", "content": answer})


def run_inspect(args: argparse.Namespace) -> int:
    from jaxllm.inspection import inspect

    print("\n".join(inspect(EngineConfig.create(**(engine_args(args) | {"model": args.path}))).lines))
    return 0


def run_merge_lora(args: argparse.Namespace) -> int:
    from jaxllm.models.lora import merge_checkpoint

    print(merge_checkpoint(args.model, args.adapter, args.out))
    return 0


def run_models(args: argparse.Namespace) -> int:
    from jaxllm.models.checkpoint_files import WEIGHT_FILES
    from jaxllm.models.config import DTYPES
    from jaxllm.models.quantization import STORED_METHODS
    from jaxllm.models.registry import model_names

    names = model_names()
    width = max(map(len, names))
    print("Architectures, as config.json names them:")
    for architecture, known_as in names.items():
        print(f"  {architecture:{width}}  {known_as}".rstrip())
    print(f"Weights, the first that is there: {', '.join(WEIGHT_FILES)}")
    print(f"Quantized checkpoints: {', '.join(STORED_METHODS)}")
    print(f"Data types: {', '.join(DTYPES)}")
    return 0


def _chat_prompt(llm: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of the conversation, in the engine's `chat_template`. Raises ValueError if they do not fit it."""
    tokenizer = llm.llm_engine.tokenizer
    text = tokenizer.apply_chat_template(messages, chat_template=llm.config.chat_template)
    return tokenizer.encode(text, add_special_tokens=False)


def _print_stream(llm: Any, prompt: str | list[int], params: SamplingParams) -> tuple[str, str | None]:
    """Prints an answer as it grows.

    Returns: the text and its finish_reason; what there was of it and None when Ctrl-C ended it.
    """
    printed, reason = "", None
    try:
        for output in llm.stream(prompt, params):
            text = output.outputs[0].text
            print(text[len(printed) :], end="", flush=True)
            printed, reason = text, output.outputs[0].finish_reason
    except KeyboardInterrupt:
        print(" [interrupted]", end="")
    return printed, reason


def _few_sequences(count: int) -> dict[str, int]:
    """Engine fields for so many sequences: the shapes of larger batches need not be compiled."""
    return {"max_num_seqs": count} if count <= 8 else {}


def _longer(defaults: SamplingParams) -> SamplingParams:
    """vLLM's default of 16 tokens is no answer at a terminal."""
    return dataclasses.replace(defaults, max_tokens=None if defaults.max_tokens == 16 else defaults.max_tokens)


if __name__ == "__main__":
    sys.exit(main())

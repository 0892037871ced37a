r"""Offline throughput, in the manner of vLLM's benchmark_throughput.py: all requests at once, answers of fixed length.

    python scripts/benchmark_throughput.py --input-len 64 --output-len 128 --num-prompts 100
    python scripts/benchmark_throughput.py --config llama-60m --dummy-weights --backend jaxllm,hf \
        --hf-max-batch-size 1,16,64

--backend jaxllm (or vllm, which means the same here, so that old command lines work) and hf, which is transformers'
`generate` on padded batches. With several backends or batch sizes each runs in a process of its own, one after another.
The last line of each is `Throughput: X requests/s, Y tokens/s`; Y counts prompt and output tokens.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import benchmark_report

CONFIGS = pathlib.Path(__file__).parent.parent / "benchmarks" / "configs"

Request = tuple[list[int], int]
"""Prompt token ids, number of output tokens."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backend", default="jaxllm", help="jaxllm, vllm (the same) or hf; several with commas")
    add("--model", help="checkpoint folder or hub id; none: the embedded default model")
    add("--config", help="a shape from benchmarks/configs, for example llama-60m; needs --dummy-weights")
    add("--tokenizer", help="for --dataset; none: the model's")
    add("--dummy-weights", action="store_true", help="random weights")
    add("--dataset", help="a ShareGPT JSON file; none: random prompts of --input-len")
    add("--input-len", type=int, default=64)
    add("--output-len", type=int, help="none with --dataset: the lengths there; else 128")
    add("--num-prompts", type=int, default=100)
    add("--n", type=int, default=1, help="answers to each prompt")
    add("--temperature", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--max-model-len", type=int)
    add("--max-num-seqs", type=int)
    add("--max-num-batched-tokens", type=int)
    add("--gpu-memory-utilization", type=float, default=0.92)
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=False)
    add("--trust-remote-code", action="store_true")
    add("--hf-max-batch-size", help="of the hf backend; several with commas")
    add("--output-json", help="write the figures, with hardware, versions, date and command")
    return parser


def model_config(args: argparse.Namespace) -> dict:
    """The dict of the model's config.json."""
    if args.config:
        path = CONFIGS / f"{args.config}.json"
        if not path.exists():
            known = ", ".join(sorted(one.stem for one in CONFIGS.glob("*.json")))
            raise SystemExit(f"--config must be one of {known}, got {args.config!r}")
        return json.loads(path.read_text())
    return json.loads((model_folder(args) / "config.json").read_text())


def model_folder(args: argparse.Namespace) -> pathlib.Path:
    from jaxllm.loading import DEFAULT_MODEL
    from jaxllm.models.hub import resolve

    return DEFAULT_MODEL if args.model is None else resolve(args.model)


def make_requests(args: argparse.Namespace) -> list[Request]:
    """The workload: equal for all backends and runs of one seed."""
    if args.dataset:
        return sharegpt_requests(args)
    rng, size = random.Random(args.seed), model_config(args)["vocab_size"]
    output_len = args.output_len or 128
    return [([rng.randrange(5, size) for _ in range(args.input_len)], output_len) for _ in range(args.num_prompts)]


def sharegpt_requests(args: argparse.Namespace) -> list[Request]:
    """First prompt and answer of each conversation, with vLLM's bounds on their lengths."""
    from jaxllm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer or model_folder(args), trust_remote_code=args.trust_remote_code)
    conversations = [one["conversations"] for one in json.loads(pathlib.Path(args.dataset).read_text())]
    pairs = [(turns[0]["value"], turns[1]["value"]) for turns in conversations if len(turns) >= 2]
    random.Random(args.seed).shuffle(pairs)
    requests: list[Request] = []
    for prompt, answer in pairs:
        ids = tokenizer.encode(prompt)
        output_len = args.output_len or len(tokenizer.encode(answer))
        if 4 <= len(ids) <= 1024 and output_len >= 4 and len(ids) + output_len <= 2048:
            requests.append((ids, output_len))
        if len(requests) == args.num_prompts:
            break
    return requests


def run_jaxllm(requests: list[Request], args: argparse.Namespace) -> dict:
    """Seconds for all requests, start-up not counted."""
    from jaxllm import LLM, SamplingParams

    engine_args = {name: getattr(args, name) for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens")}
    start = time.perf_counter()
    llm = LLM(
        model_config(args) if args.config else args.model,
        dtype=args.dtype,
        seed=args.seed,
        load_format="dummy" if args.dummy_weights else "auto",
        skip_tokenizer_init=True,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enable_prefix_caching=args.enable_prefix_caching,
        **engine_args,
    )
    startup = time.perf_counter() - start
    params = [
        SamplingParams(n=args.n, temperature=args.temperature, max_tokens=length, ignore_eos=True)
        for _, length in requests
    ]
    prompts = [ids for ids, _ in requests]
    warm_up = prompts[: llm.llm_engine.config.max_num_seqs]  # as the hf backend does: its first batch, two tokens
    llm.generate(warm_up, SamplingParams(temperature=args.temperature, max_tokens=2, ignore_eos=True), use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed = time.perf_counter() - start
    for (_, length), output in zip(requests, outputs, strict=True):
        assert all(len(answer.token_ids) == length for answer in output.outputs)
    scheduler = llm.llm_engine.scheduler
    return {
        "elapsed_time": elapsed,
        "startup_time": startup,
        "preemptions": scheduler.num_preemptions,
        "plans": scheduler.num_plans,
    }


def run_hf(requests: list[Request], args: argparse.Namespace) -> dict:
    """transformers' generate, on batches of up to --hf-max-batch-size padded on the left."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = args.dtype if args.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    dtype = getattr(torch, wanted)
    torch.manual_seed(args.seed)
    if args.dummy_weights:
        raw = model_config(args)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=dtype).to(device)
    else:
        model = AutoModelForCausalLM.from_pretrained(model_folder(args), dtype=dtype).to(device)
    model.eval()
    size = int(args.hf_max_batch_size or 1)

    @torch.inference_mode()
    def answer(batch: list[Request]) -> None:
        longest, new = max(len(ids) for ids, _ in batch), max(length for _, length in batch)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in batch], device=device)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
            do_sample=args.temperature > 0, temperature=args.temperature or None, top_p=None, top_k=None,
            num_return_sequences=args.n, use_cache=True,
        )  # fmt: skip
        assert out.shape == (len(batch) * args.n, longest + new)

    answer([(ids, 2) for ids, _ in requests[:size]])  # warm up
    start = time.perf_counter()
    for at in range(0, len(requests), size):
        answer(requests[at : at + size])
    if device == "cuda":
        torch.cuda.synchronize()
    return {"elapsed_time": time.perf_counter() - start}


def run_one(args: argparse.Namespace) -> None:
    """One backend in this process; prints its closing line."""
    requests = make_requests(args)
    figures = (run_hf if args.backend == "hf" else run_jaxllm)(requests, args)
    elapsed, output_tokens = figures["elapsed_time"], sum(length for _, length in requests) * args.n
    total = sum(len(ids) for ids, _ in requests) + output_tokens
    figures |= {
        "backend": args.backend,
        "num_requests": len(requests),
        "total_num_tokens": total,
        "requests_per_second": len(requests) / elapsed,
        "tokens_per_second": total / elapsed,
        "output_tokens_per_second": output_tokens / elapsed,
        "ms_per_output_token": elapsed * 1e3 / max(length for _, length in requests) if len(requests) == 1 else None,
    }
    if args.backend == "hf":
        figures["hf_max_batch_size"] = int(args.hf_max_batch_size or 1)
    if args.output_json:
        benchmark_report.write(args.output_json, figures)
    print(f"Throughput: {figures['requests_per_second']:.2f} requests/s, {figures['tokens_per_second']:.2f} tokens/s")


def run_each(runs: list[tuple[str, str | None]], args: argparse.Namespace) -> None:
    """Several backends, one process each: they must not share a GPU's memory."""
    results = []
    for backend, batch_size in runs:
        print(f"--- {backend}" + (f", batches of {batch_size}" if backend == "hf" else ""), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            report = os.path.join(folder, "report.json")
            command = [sys.executable, *sys.argv, "--backend", backend, "--output-json", report]
            command += ["--hf-max-batch-size", batch_size or "1"]
            subprocess.run(command, check=True)
            results.append(json.loads(pathlib.Path(report).read_text())["results"])
    if args.output_json:
        benchmark_report.write(args.output_json, results)
    best = {}
    for one in results:
        key = one["backend"]
        best[key] = max(best.get(key, 0.0), one["output_tokens_per_second"])
    print(json.dumps({"best_output_tokens_per_second": {key: round(value, 1) for key, value in best.items()}}))


def main() -> None:
    args = make_parser().parse_args()
    backends = args.backend.split(",")
    if unknown := set(backends) - {"jaxllm", "vllm", "hf"}:
        raise SystemExit(f"--backend must be jaxllm, vllm or hf, got {sorted(unknown)}")
    if args.config and not args.dummy_weights:
        raise SystemExit("--config is a shape without weights: add --dummy-weights")
    sizes = (args.hf_max_batch_size or "1").split(",")
    runs = [(name, size) for name in backends for size in (sizes if name == "hf" else [None])]
    if len(runs) > 1:
        run_each(runs, args)
    else:
        run_one(args)


if __name__ == "__main__":
    main()

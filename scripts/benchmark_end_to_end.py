r"""End-to-end speed with random weights: the workloads of docs/performance.md, all of a model's on one engine.

    python scripts/benchmark_end_to_end.py llama-3.1-8b --azure-trace azure2023_conv.csv.gz --output-json results.json
    python scripts/benchmark_end_to_end.py --start-up llama-3.1-8b

Token ids in, greedy unless asked otherwise, ignore_eos, no detokenizing, no prefix cache. Each workload runs once to
warm up (a few tokens) and once to be timed. No program is compiled in a timed pass. PALLAS_KERNELS_BACKEND=reference in
the environment turns the GPU kernels off. Beside each figure is its floor: the time to read the weights once a step and
the KV of every token, at the read bandwidth measured in the same run, and to compute the prompts at the measured rate
of a bfloat16 matrix product.
"""

import argparse
import csv
import gzip
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import benchmark_report
import benchmark_throughput

Request = tuple[list[int], int]


@dataclass(frozen=True)
class Workload:
    """`asked` is jaxllm's own target, `vllm` and `hf` what vLLM 0.24.0 and transformers 5.17 reach on an H200."""

    name: str
    num_prompts: int = 1
    input_len: int = 0
    output_len: int = 0
    trace: bool = False
    per_token: bool = False  # figures are milliseconds an output token; else output tokens a second
    asked: float | None = None
    vllm: float | None = None
    hf: float | None = None


@dataclass(frozen=True)
class Suite:
    config: str  # of benchmarks/configs
    workloads: tuple[Workload, ...]
    dtype: str = "bfloat16"
    max_model_len: int = 4096
    quantization: str | None = None


SUITES = {
    "llama-3.1-8b": Suite(
        "llama-3.1-8b",
        (
            Workload("1 x (1024, 256)", 1, 1024, 256, per_token=True, asked=3.9, vllm=4.98, hf=27.3),
            Workload("64 x (1024, 256)", 64, 1024, 256, asked=5100, vllm=4675, hf=1011),
            Workload("1000 x (512, 128)", 1000, 512, 128, asked=7800, vllm=7096),
            Workload("1000 of the Azure conversation trace", 1000, trace=True, asked=6800, vllm=6184),
        ),
    ),
    "glm-4-9b-llama": Suite(
        "glm-4-9b-llama", (Workload("25 x (64, 128)", 25, 64, 128, asked=4600, vllm=3715, hf=369),), dtype="float16"
    ),
    "qwen2.5-0.5b": Suite(
        "qwen2.5-0.5b",
        (
            Workload("1 x (1024, 256)", 1, 1024, 256, per_token=True, asked=0.8, vllm=2.31),
            Workload("1000 x (512, 128)", 1000, 512, 128, asked=35000, vllm=17497),
        ),
    ),
    "tinyllm-92m": Suite(
        "tinyllm-92m",
        (
            Workload("1 x (128, 256)", 1, 128, 256, per_token=True, asked=0.3, vllm=1.33, hf=5.01),
            Workload("2000 x (128, 128)", 2000, 128, 128, asked=150_000, vllm=58_129, hf=17_984),
        ),
        max_model_len=1024,
    ),
    "qwen1.5-7b-int4": Suite(
        "qwen1.5-7b",
        (
            Workload("1 x (1024, 256)", 1, 1024, 256, per_token=True, asked=1.9, vllm=4.91),
            Workload("64 x (1024, 256)", 64, 1024, 256, asked=5000, vllm=3211),
        ),
        dtype="float16",
        quantization="int4",
    ),
}


SAMPLING_OPTIONS = {"temperature": 0.0, "top_p": 1.0}
ENGINE_OPTIONS = ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes")


def make_requests(workload: Workload, vocab_size: int, trace: str | None) -> list[Request]:
    rng = random.Random(0)
    if workload.trace:
        lengths = trace_lengths(trace, workload.num_prompts, rng)
    else:
        lengths = [(workload.input_len, workload.output_len)] * workload.num_prompts
    return [([rng.randrange(5, vocab_size) for _ in range(prompt)], output) for prompt, output in lengths]


def trace_lengths(path: str, count: int, rng: random.Random) -> list[tuple[int, int]]:
    """A sample of the trace's requests with a prompt of at most 3000 tokens and an output of 8 to 800."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    return rng.sample([(prompt, output) for prompt, output in rows if 0 < prompt <= 3000 and 8 <= output <= 800], count)


def make_llm(suite: Suite, **options):
    """`options` are LLM's."""
    from jaxllm import LLM

    return LLM(
        model_config(suite), load_format="dummy", dtype=suite.dtype, max_model_len=suite.max_model_len,
        skip_tokenizer_init=True, enable_prefix_caching=False, use_tqdm_on_load=False,
        quantization=suite.quantization, **options,
    )  # fmt: skip


def model_config(suite: Suite) -> dict:
    return json.loads((benchmark_throughput.CONFIGS / f"{suite.config}.json").read_text())


def run(llm, requests: list[Request], sampling: dict[str, float]) -> dict[str, float]:
    """Seconds for all requests, plans and preemptions, of the first pass in which nothing was compiled."""
    from jaxllm import SamplingParams

    def params_of(requests: list[Request], most: int | None = None) -> list[SamplingParams]:
        lengths = [output if most is None else min(most, output) for _, output in requests]
        return [SamplingParams(**sampling, max_tokens=length, ignore_eos=True) for length in lengths]

    params, prompts = params_of(requests), [ids for ids, _ in requests]
    llm.generate(prompts[:64], params_of(requests[:64], most=3), use_tqdm=False)
    scheduler, programs = llm.llm_engine.scheduler, llm.llm_engine.runner.executables
    for _ in range(4):  # one, unless programs are compiled as they are met
        compiled, plans, preemptions = len(programs), scheduler.num_plans, scheduler.num_preemptions
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(one.outputs[0].token_ids) for one in outputs] == [output for _, output in requests]
        if len(programs) == compiled:
            break
    else:
        raise SystemExit("every pass met a shape that the ones before had not")
    return {
        "seconds": seconds,
        "plans": scheduler.num_plans - plans,
        "preemptions": scheduler.num_preemptions - preemptions,
    }


def ceilings() -> dict[str, float]:
    """Bytes a second of reading, and operations a second of a bfloat16 matrix product, on this device.

    Before there is an engine, which takes nearly all memory.
    """
    from jaxllm.config import EngineConfig
    from jaxllm.loading import claim_device_memory

    claim_device_memory(EngineConfig().gpu_memory_utilization)
    import jax
    import jax.numpy as jnp

    def seconds(function, *args) -> float:
        compiled = jax.jit(function).lower(*args).compile()
        jax.block_until_ready([compiled(*args) for _ in range(3)])
        start = time.perf_counter()
        jax.block_until_ready([compiled(*args) for _ in range(10)])
        return (time.perf_counter() - start) / 10

    data = jnp.ones(2**30 if jax.default_backend() == "gpu" else 2**26, jnp.float32)
    matrix = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    return {
        "bytes": data.nbytes / seconds(jnp.max, data),
        "flops": 2 * 8192**3 / seconds(lambda a, b: a @ b, matrix, matrix),
    }


def floor_seconds(llm, suite: Suite, requests: list[Request], rates: dict[str, float]) -> float:
    """What the bytes and operations alone take, with as many sequences at once as the engine holds."""
    import jax

    runner = llm.llm_engine.runner
    config = runner.network.config
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.params))
    params = num_parameters(suite)
    embedding = config.vocab_size * config.hidden_size
    if not config.tie_word_embeddings:
        weights, params = weights - embedding * runner.network.dtype.itemsize, params - embedding
    kv_token = runner.kv_bytes / (runner.num_pages * llm.llm_engine.config.block_size)
    capacity = min(llm.llm_engine.config.max_num_seqs, len(requests))
    output_tokens = sum(output for _, output in requests)
    steps = max(output_tokens / capacity, max(output for _, output in requests))
    kv_reads = sum(output * (len(ids) + output / 2) for ids, output in requests) * kv_token
    prompt_tokens = sum(len(ids) for ids, _ in requests)
    return (steps * weights + kv_reads) / rates["bytes"] + 2 * params * prompt_tokens / rates["flops"]


def num_parameters(suite: Suite) -> int:
    """Of the model before it is quantized, where they are numbers and not packed words."""
    from jaxllm.models import build, read_config

    return sum(math.prod(spec.shape) for spec in build(read_config(model_config(suite))).specs.values())


def run_suite(name: str, args: argparse.Namespace) -> Iterator[dict]:
    """The report after each workload, so that a run cut short leaves what it has measured."""
    from jaxllm.runner import executables

    executables.on_late_compilation = "raise"
    suite = SUITES[name]
    rates = ceilings()
    start = time.perf_counter()
    options = {name: getattr(args, name) for name in ENGINE_OPTIONS} | {"enforce_eager": args.compile_as_met}
    sampling = {name: getattr(args, name) for name in SAMPLING_OPTIONS}
    llm = make_llm(suite, **options)
    print(f"{name}: engine ready in {time.perf_counter() - start:.1f} s", flush=True)
    report = {
        "suite": name,
        "dtype": suite.dtype,
        "sampling": sampling,
        "ceilings": rates,
        "backend": os.environ.get("PALLAS_KERNELS_BACKEND", "mosaic_gpu"),
        "workloads": [],
    }
    for workload in suite.workloads:
        if (workload.trace and args.azure_trace is None) or (args.only and args.only not in workload.name):
            continue
        requests = make_requests(workload, model_config(suite)["vocab_size"], args.azure_trace)
        figures = run(llm, requests, sampling)
        output_tokens = sum(output for _, output in requests)
        figures["floor_seconds"] = floor_seconds(llm, suite, requests, rates)
        unit = 1e3 / output_tokens if workload.per_token else None
        figures["figure"] = figures["seconds"] * unit if unit else output_tokens / figures["seconds"]
        figures["fraction_of_floor"] = figures["floor_seconds"] / figures["seconds"]
        report["workloads"].append(asdict(workload) | figures)
        print(row(report["workloads"][-1]), flush=True)
        yield report


def row(one: dict) -> str:
    unit = "ms/token" if one["per_token"] else "tokens/s"
    return (
        f"{one['name']:40s} {one['figure']:10,.2f} {unit}  (asked {one['asked']:,}, vLLM {one['vllm']:,}) "
        f"{one['fraction_of_floor']:.0%} of the floor, {one['plans']} plans, {one['preemptions']} preemptions"
    )


START_UP = """
import logging, sys; sys.path.insert(0, {scripts!r})
logging.basicConfig(level=logging.WARNING); logging.getLogger("jaxllm").setLevel(logging.INFO)
import benchmark_end_to_end as b
llm = b.make_llm(b.SUITES[{name!r}])
from jaxllm import SamplingParams
llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
import jax
print("first token on", jax.devices()[0].device_kind, flush=True)
"""


def measure_start_up(name: str) -> dict:
    """Seconds from a process's start to its first token, twice: the second finds the compilation cache filled."""
    code = START_UP.format(scripts=str(pathlib.Path(__file__).parent), name=name)
    seconds, device = [], ""
    for _ in range(2):
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("first token on "):
                seconds.append(time.perf_counter() - start)
                device = line.removeprefix("first token on ").strip()
        if process.wait():
            raise SystemExit(f"the engine did not start: exit status {process.returncode}")
    print(f"{name}: start-up {seconds[0]:.1f} s, with the cache {seconds[1]:.1f} s", flush=True)
    return {"suite": name, "device": device, "first": seconds[0], "with_cache": seconds[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--start-up", action="store_true", help="measure the start of the engine instead")
    parser.add_argument("--azure-trace", help="CSV (or .csv.gz) of the Azure LLM inference trace 2023, conversations")
    parser.add_argument("--only", help="run the workloads alone whose name has this in it")
    for name, default in SAMPLING_OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=default, help="SamplingParams'")
    for name in ENGINE_OPTIONS:
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="the engine's")
    parser.add_argument(
        "--compile-as-met",
        action="store_true",
        help="compile the shapes that a workload meets, in a first pass over it, instead of all at start-up",
    )
    parser.add_argument("--output-json")
    args = parser.parse_args()
    for figures in [measure_start_up(args.suite)] if args.start_up else run_suite(args.suite, args):
        if args.output_json:
            benchmark_report.write(args.output_json, figures)


if __name__ == "__main__":
    main()

"""Where a step's time goes: the device's work, the host's for handing it over, and which kernels the device runs.

    python scripts/profile_decode_step.py llama-3.1-8b --rows 1 64 --context 1024 --prefill 16384

Steps are handed over one after the other without waiting, as the engine does. Kernels are timed by JAX's profiler,
which runs them one by one and not as a captured graph: their sum is the device's work, and what a step takes beyond it
is gaps between kernels.
"""

import argparse
import dataclasses
import re
import time

import benchmark_end_to_end
import benchmark_report
import jax
import numpy as np
from benchmark_profile import kernel_durations

from jaxllm.runner.sampler import SamplingSpec
from jaxllm.scheduling import StepPlan


def decode_plan(rows: int, context: int, runner) -> StepPlan:
    """A step in which every slot decodes at position `context`."""
    for slot in range(rows):
        runner.sampling.fill(slot, SamplingSpec(), context)
    ones = np.ones(rows, np.int64)
    return StepPlan(
        step=0, slots=np.arange(rows), num_tokens=ones, starts=ones * context, samples=ones > 0, num_decodes=rows,
        page_updates=own_pages(rows, context + 1, runner),
        tokens=np.full(rows, 7, np.int32), generations=np.full(rows, -1, np.int64), requests=[None] * rows,
    )  # fmt: skip


def own_pages(rows: int, length: int, runner) -> np.ndarray:
    """Page updates (slot, column, page) that give every row pages of its own."""
    pages = -(-length // runner.config.block_size)
    assert rows * pages <= runner.num_pages, "the KV pool is too small for these rows and this context"
    slot, column = np.divmod(np.arange(rows * pages), pages)
    return np.stack([slot, column, np.arange(rows * pages)], axis=1)


def prefill_plan(tokens: int, runner) -> StepPlan:
    """A step of prompts of 1024 tokens, or of one that is shorter."""
    length = min(tokens, 1024)
    rows = tokens // length
    for slot in range(rows):
        runner.sampling.fill(slot, SamplingSpec(), length)
    counts = np.full(rows, length, np.int64)
    return StepPlan(
        step=0, slots=np.arange(rows), num_tokens=counts, starts=counts * 0, samples=counts > 0, num_decodes=0,
        page_updates=own_pages(rows, length, runner),
        tokens=np.arange(rows * length, dtype=np.int32) % 1000, generations=np.full(rows, -1, np.int64),
        requests=[None] * rows,
    )  # fmt: skip


def kernel_times(runner, plan: StepPlan, steps: int = 5) -> list[dict]:
    """The kernels of a step by name, numbers aside: microseconds a step, and how often they run in one."""
    found: dict[str, list[float]] = {}
    for name, seconds in kernel_durations(lambda: [runner.submit(plan) for _ in range(steps)][-1].result()):
        found.setdefault(re.sub(r"[0-9_]+$", "", name), []).append(seconds)
    kernels = [
        {"kernel": name, "microseconds": sum(times) * 1e6 / steps, "count": len(times) / steps}
        for name, times in found.items()
    ]
    return sorted(kernels, key=lambda one: -one["microseconds"])


def measure(runner, plan: StepPlan, steps: int) -> dict[str, float]:
    """Milliseconds a step: until the device is done with all of them, and until the host has handed them over."""
    [runner.submit(plan) for _ in range(5)][-1].result()
    plan.page_updates = plan.page_updates[:0]
    start = time.perf_counter()
    pending = [runner.submit(plan) for _ in range(steps)]
    handed_over = time.perf_counter() - start
    pending[-1].result()
    done = time.perf_counter() - start
    return {"ms_per_step": done * 1e3 / steps, "ms_to_hand_over": handed_over * 1e3 / steps}


def profile(runner, plan: StepPlan, steps: int) -> dict:
    figures = measure(runner, plan, steps)
    kernels = kernel_times(runner, plan)
    busy = sum(one["microseconds"] for one in kernels) / 1e3
    print(f"{plan.num_decodes} decodes, {len(plan.tokens)} tokens: {figures}; kernels {busy:.3f} ms", flush=True)
    for one in kernels[:16]:
        print(f"  {one['microseconds']:10.1f} us {one['count']:7.1f} x  {one['kernel'][:90]}", flush=True)
    return {**figures, "ms_of_kernels": busy, "kernels": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(benchmark_end_to_end.SUITES), help="of benchmark_end_to_end.py")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="tokens of prefill steps, besides")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    suite = dataclasses.replace(benchmark_end_to_end.SUITES[args.suite], max_model_len=2 * args.context)
    llm = benchmark_end_to_end.make_llm(
        suite, enforce_eager=True, max_num_seqs=max(64, *args.rows),
        max_num_batched_tokens=max(512, *args.rows, *args.prefill),
    )  # fmt: skip
    runner = llm.llm_engine.runner
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.params))
    results = []
    for rows in args.rows:
        results.append({"rows": rows, **profile(runner, decode_plan(rows, args.context, runner), args.steps)})
    for tokens in args.prefill:
        results.append({"prefill": tokens, **profile(runner, prefill_plan(tokens, runner), 10)})
    if args.output_json:
        benchmark_report.write(args.output_json, {"suite": args.suite, "weight_bytes": weights, "steps": results})


if __name__ == "__main__":
    main()

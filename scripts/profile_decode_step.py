"""Where a decode step's time goes: the device's work, the host's for handing it over, and what the engine adds.

    python scripts/profile_decode_step.py --config llama-3.1-8b --rows 1 --context 1024

Steps are handed over one after the other without waiting, as the engine does; all rows read the same few pages, so the
attention reads less memory than a real batch of that size would.
"""

import argparse
import json
import time

import benchmark_report
import benchmark_throughput
import jax
import numpy as np

from jaxllm import LLM
from jaxllm.runner.sampler import SamplingSpec
from jaxllm.scheduling import StepPlan


def decode_plan(rows: int, context: int, runner) -> StepPlan:
    """A step in which every slot decodes at position `context`."""
    for slot in range(rows):
        runner.sampling.fill(slot, SamplingSpec(), context)
    ones = np.ones(rows, np.int64)
    return StepPlan(
        step=0, slots=np.arange(rows), num_tokens=ones, starts=ones * context, samples=ones > 0, num_decodes=rows,
        tokens=np.full(rows, 7, np.int32), generations=np.full(rows, -1, np.int64), requests=[None] * rows,
    )  # fmt: skip


def measure(runner, plan: StepPlan, steps: int) -> dict[str, float]:
    """Milliseconds a step: until the device is done with all of them, and until the host has handed them over."""
    jax.block_until_ready([runner.submit(plan).outputs for _ in range(5)])
    start = time.perf_counter()
    pending = [runner.submit(plan) for _ in range(steps)]
    handed_over = time.perf_counter() - start
    pending[-1].result()
    done = time.perf_counter() - start
    return {"ms_per_step": done * 1e3 / steps, "ms_to_hand_over": handed_over * 1e3 / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a shape from benchmarks/configs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    config = benchmark_throughput.model_config(args)
    llm = LLM(
        config, load_format="dummy", enforce_eager=True, max_num_seqs=max(args.rows),
        max_num_batched_tokens=max(512, *args.rows), max_model_len=2 * args.context,
    )  # fmt: skip
    runner = llm.llm_engine.runner
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.params))
    results = []
    for rows in args.rows:
        results.append({"rows": rows, **measure(runner, decode_plan(rows, args.context, runner), args.steps)})
        print(results[-1], flush=True)
    if args.output_json:
        benchmark_report.write(args.output_json, {"config": args.config, "weight_bytes": weights, "steps": results})
    print(json.dumps(results))


if __name__ == "__main__":
    main()

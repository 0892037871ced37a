"""How long the host works for each step: schedule, pack the inputs, take in the result. No device is involved.

    python scripts/benchmark_host.py [--requests 1 64 256 1000] [--output-json FILE]

All requests decode, as most steps of a busy engine do; a page is allocated every sixteenth token of each.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import benchmark_report
import numpy as np

from jaxllm.runner.inputs import InputLayout, page_table_entries
from jaxllm.runner.sampler import SamplingSpec, SamplingTable
from jaxllm.runner.shapes import ShapeLadder
from jaxllm.scheduling import Request, Scheduler, SchedulerConfig

PROMPT, NEW, PAGE, MAX_LEN = 200, 600, 16, 2048


def measure(num_requests: int, steps: int) -> dict[str, float]:
    """Medians in milliseconds over `steps` steps in which every request decodes one token."""
    config = SchedulerConfig(num_requests * MAX_LEN // PAGE, PAGE, num_requests, 16384, MAX_LEN)
    scheduler, ladder = Scheduler(config), ShapeLadder.of(num_requests, 16384)
    sampling, max_pages = SamplingTable(num_requests), MAX_LEN // PAGE
    rng = np.random.default_rng(0)
    for i in range(num_requests):
        prompt = rng.integers(0, 30000, PROMPT + i % PAGE).astype(np.int32)
        stops = frozenset([128001, 128009])
        spec = SamplingSpec(temperature=0.8, top_p=0.95, seed=i)
        scheduler.add(Request(str(i), prompt, NEW, stop_token_ids=stops, sampling=spec))
    tokens = np.full(num_requests, 7, np.int32)

    def step() -> tuple[float, float, float]:
        t0 = time.perf_counter()
        plan = scheduler.schedule(0.0)
        t1 = time.perf_counter()
        shape = ladder.fit(len(plan.tokens), len(plan.slots), plan.num_decodes == len(plan.slots))
        layout = InputLayout(shape, PAGE, num_requests, max_pages)
        layout.pack(plan, sampling, page_table_entries(plan, max_pages)[: layout.num_updates])
        t2 = time.perf_counter()
        scheduler.update(plan, tokens[: len(plan.slots)])
        return t1 - t0, t2 - t1, time.perf_counter() - t2

    while len(scheduler.waiting) or scheduler.residents.total.sum() > (scheduler.residents.computed + 1).sum():
        step()
    for _ in range(20):
        step()
    times = [step() for _ in range(steps)]
    parts = [statistics.median(column) * 1e3 for column in zip(*times, strict=True)]
    total = statistics.median(sum(row) for row in times) * 1e3
    return dict(zip(("schedule", "pack", "update"), parts, strict=True)) | {"total": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 256, 1000])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    results = []
    print("running requests | schedule | pack | update | total, ms per step (medians)")
    for count in args.requests:
        figures = measure(count, args.steps)
        results.append({"requests": count, **figures})
        print(f"{count:16d} | " + " | ".join(f"{value:.3f}" for value in figures.values()))
    if args.output_json:
        benchmark_report.write(args.output_json, results)
    print(json.dumps({str(row["requests"]): round(row["total"], 4) for row in results}))


if __name__ == "__main__":
    main()

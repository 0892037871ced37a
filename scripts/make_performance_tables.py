"""Prints docs/performance.md's tables from the files in benchmarks/results.

python scripts/make_performance_tables.py
"""

import json
import pathlib

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(columns: list[str], rows: list[list]) -> None:
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


def throughput() -> None:
    rows = []
    for path in sorted(RESULTS.glob("throughput-*.json")):
        report = json.loads(path.read_text())
        results = report["results"] if isinstance(report["results"], list) else [report["results"]]
        for one in results:
            backend = one["backend"]
            if "hf_max_batch_size" in one:
                backend += f", batches of {one['hf_max_batch_size']}"
            per_token = one["ms_per_output_token"]
            rows.append(
                [
                    path.stem.removeprefix("throughput-"),
                    report["environment"]["hardware"],
                    backend,
                    f"{one['requests_per_second']:.2f}",
                    f"{one['output_tokens_per_second']:,.0f}",
                    f"{per_token:.2f}" if per_token else "",
                ]
            )
    table(["run", "hardware", "backend", "requests/s", "output tokens/s", "ms per token"], rows)


def kernels() -> None:
    decode = read("kernels-h200-paged-decode")["results"]
    rows = [[case["spec"], f"{case['microseconds']:.1f}", f"{case['fraction']:.1%}"] for case in decode["cases"]]
    table(["paged_decode", "µs", f"of {decode['ceilings']['bytes'] / 1e12:.2f} TB/s read"], rows)
    prefill = read("kernels-h200-ragged-prefill")["results"]
    rows = [[spec, one["ms"], one["tflops"]] for spec, one in prefill["specs"].items()]
    table(["ragged_prefill", "ms", f"TFLOP/s (a matrix product: {prefill['matmul_tflops']})"], rows)


def steps() -> None:
    rows = []
    for name in ("profile-h200-llama-3.1-8b", "profile-h200-tinyllm-92m"):
        results = read(name)["results"]
        for one in results["steps"]:
            times = [f"{one['ms_per_step']:.2f}", f"{one['ms_to_hand_over']:.2f}"]
            rows.append([results["config"], one["rows"], *times])
    table(["decode step", "rows", "ms a step", "of which the host hands over for"], rows)


def host() -> None:
    rows = [[row["requests"], *(f"{row[k]:.3f}" for k in ("schedule", "pack", "update", "total"))]
            for row in read("host")["results"]]  # fmt: skip
    table(["running requests", "schedule", "pack", "update", "total, ms"], rows)


if __name__ == "__main__":
    throughput()
    kernels()
    steps()
    host()

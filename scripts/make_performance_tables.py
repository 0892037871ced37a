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
    for op in ("paged-decode", "paged-mla", "ragged-prefill", "quant-matmul"):
        results = read(f"kernels-h200-{op}")["results"]
        of = f"of {results['ceilings']['bytes'] / 1e12:.2f} TB/s read"
        if op == "ragged-prefill":
            of = f"TFLOP/s (a matrix product: {results['ceilings']['flops'] / 1e12:.0f})"
        rows = []
        for case in results["cases"]:
            if op == "ragged-prefill":
                fraction = f"{case['rate'] / 1e12:.0f}"
            else:
                fraction = f"{case['fraction']:.1%}" + " of the matrix rate" * (case["unit"] == "flops")
            page = case["config"].split(",")[0] if case["config"].startswith("page 64") else ""
            name = ", ".join(filter(None, [case["spec"], page]))
            rows.append([name, f"{case['microseconds']:.1f}", f"{case['chained']:.1f}", fraction])
        table([op.replace("-", "_"), "µs", "µs in a chain", of], rows)


def end_to_end() -> None:
    rows = []
    for path in sorted(RESULTS.glob("end-to-end-h200-*.json")):
        results = json.loads(path.read_text())["results"]
        for one in results["workloads"]:
            unit = "ms a token" if one["per_token"] else "tokens/s"
            others = [f"{one[key]:,}" if one[key] else "" for key in ("vllm", "hf", "asked")]
            how = "" if results["backend"] == "mosaic_gpu" else f", kernels: {results['backend']}"
            if (sampling := results.get("sampling", {})).get("temperature"):
                how += f", temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}"
            figure = f"{one['figure']:,.2f}" if one["per_token"] else f"{one['figure']:,.0f}"
            rows.append(
                [
                    f"{results['suite']}{how}, {one['name']}",
                    unit,
                    figure,
                    f"{one['fraction_of_floor']:.0%}",
                    *others,
                ]
            )
    table(["model, workload", "unit", "jaxllm", "of the floor", "vLLM 0.24", "transformers 5.17", "aim"], rows)


def steps() -> None:
    """A decode step of one row, by kernels."""
    for path in sorted(RESULTS.glob("profile-h200-*.json")):
        results = json.loads(path.read_text())["results"]
        one = results["steps"][0]
        rows = [
            [kernel["kernel"], f"{kernel['count']:.0f}", f"{kernel['microseconds']:.0f}"]
            for kernel in one["kernels"][:8]
        ]
        rows.append(
            [
                "all kernels",
                f"{sum(kernel['count'] for kernel in one['kernels']):.0f}",
                f"{one['ms_of_kernels'] * 1e3:.0f}",
            ]
        )
        table([f"{results['suite']}, 1 row", "a step", "µs"], rows)


def host() -> None:
    rows = [[row["requests"], *(f"{row[k]:.3f}" for k in ("schedule", "pack", "update", "total"))]
            for row in read("host")["results"]]  # fmt: skip
    table(["running requests", "schedule", "pack", "update", "total, ms"], rows)


if __name__ == "__main__":
    throughput()
    end_to_end()
    kernels()
    steps()
    host()

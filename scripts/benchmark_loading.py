"""Measures how fast a checkpoint comes from the page cache to the device. JSON goes to --out.

Makes a bfloat16 checkpoint of random weights in safetensors shards of the given config's shapes, by default
Llama-3.1-8B's 16 GB; reads its files once, so that they are in the page cache; then loads it a few times. GB/s counts
the checkpoint's bytes over the time until all weights are on the device.

On an idle GPU: python scripts/benchmark_loading.py --out loading.json
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import benchmark_report
import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxllm.models import build, load_params, read_config
from jaxllm.models.quantization import METHODS
from jaxllm.models.registry import quantized
from jaxllm.models.weights import checkpoint_slots

CONFIG = Path(__file__).parent.parent / "benchmarks/configs/llama-3.1-8b.json"
SHARD_BYTES = 5 * 10**9


def make_checkpoint(network, folder: Path) -> int:
    """Writes random weights under the network's names; returns their bytes."""
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(ml_dtypes.bfloat16)
    shards, size, total = [{}], 0, 0
    for name, slot in checkpoint_slots(network).items():
        nbytes = 2 * int(np.prod(slot.file_shape))
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = slot.file_shape
        size, total = size + nbytes, total + nbytes
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: np.resize(block, shape) for name, shape in shard.items()}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def read_through(folder: Path) -> float:
    """Seconds to read all files with one thread, which brings them into the page cache."""
    start, buffer = time.perf_counter(), bytearray(1 << 24)
    for path in folder.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def time_loading(network, folder: Path) -> float:
    start = time.perf_counter()
    jax.block_until_ready(load_params(network, folder, progress=False))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="config.json of the model")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made; default: a temporary folder")
    parser.add_argument("--quantization", choices=METHODS[:3], help="quantize while loading")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    config = read_config(json.loads(args.config.read_text()))
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        size = make_checkpoint(build(config, "bfloat16"), folder)
        read_through(folder)
        cached = read_through(folder)
        network = build(quantized(config, args.quantization), "bfloat16")
        seconds = [time_loading(network, folder) for _ in range(args.repeats)]
    figures = {
        "model": args.config.stem,
        "quantization": args.quantization,
        "checkpoint_gb": size / 1e9,
        "read_gb_per_s": size / 1e9 / cached,
        "seconds": seconds,
        "gb_per_s": size / 1e9 / statistics.median(seconds),
    }
    benchmark_report.write(args.out, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""What the tests of model families share: tiny checkpoints under their real names, references, and the comparison.

A reference is a function of a prompt and of what followed it, (prompt, answer) -> float32 logits [T, V] after every
token. Those of architectures that transformers lacks are put together from the operations below, by the tensors' names
in the checkpoint; no line of ours takes part.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import jaxllm
from jaxllm.models import build, load_params, read_config
from tests.checkpoints import write_tensors
from tests.models.stepping import Stepper, greedy

torch = pytest.importorskip("torch")

Reference = Callable[[list[int], list[int]], np.ndarray]
NUM_TOKENS = 24
TOLERANCE = 1e-4  # of logits, whose standard deviation is made about 1


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict:
    """Norms' weights are near 1, everything else is near 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]):
        noise = torch.randn(shape, generator=generator)
        is_norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
        return 1 + 0.2 * noise if is_norm else 0.3 * noise

    return {name: draw(name, shape) for name, shape in shapes.items()}


def randomize(model, seed: int = 0):
    """A transformers model with `random_tensors` for weights."""
    parameters = dict(model.named_parameters())
    drawn = random_tensors({name: tuple(weight.shape) for name, weight in parameters.items()}, seed)
    with torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(drawn[name])
    return model.eval()


def write_checkpoint(folder: Path, config: dict, tensors: dict, **files) -> Path:
    """config.json and the weights; `files` as in `write_tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, folder, **files)
    return folder


def open_checkpoint(folder: Path, dtype="float32", **overrides):
    """(network, params); `overrides` as in `hf_overrides`."""
    network = build(read_config(json.loads((folder / "config.json").read_text()) | overrides), dtype)
    return network, load_params(network, folder, progress=False)


def prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((length, seed)).integers(0, vocab_size, length).tolist()


def of_transformers(model) -> Reference:
    def logits(tokens, answer):
        with torch.no_grad():
            return model(torch.tensor([tokens + answer])).logits[0].numpy()

    return logits


def reference_greedy(reference: Reference, tokens: list[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < NUM_TOKENS:
        answer.append(int(reference(tokens, answer)[-1].argmax()))
    return answer


def check_alone(network, params, reference: Reference, tokens: list[int]) -> None:
    """Logits after the prompt, then 24 tokens one by one."""
    stepper = Stepper(network, params)
    row = stepper.add(tokens)
    logits = stepper.step({row: len(tokens)})[row]
    np.testing.assert_allclose(logits, reference(tokens, [])[-1], atol=TOLERANCE)
    assert greedy(stepper, row, logits, NUM_TOKENS) == reference_greedy(reference, tokens)


def check_batched(network, params, reference: Reference, prompts: list[list[int]]) -> None:
    """Three prompts, the second in two chunks; the first decodes meanwhile, and is then forgotten and recomputed as if
    preempted."""
    stepper = Stepper(network, params)
    first, second, third = (stepper.add(tokens) for tokens in prompts)
    half = len(prompts[1]) // 2
    answers: dict[int, list[int]] = {first: [], second: [], third: []}

    def step(counts, **options):
        for row, logits in stepper.step(counts, **options).items():
            if stepper.rows[row].computed == len(stepper.rows[row].tokens):
                expected = reference(prompts[row], answers[row])[-1]
                np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
                answers[row].append(int(logits.argmax()))
                stepper.append(row, answers[row][-1])

    step({first: len(prompts[0]), second: half})
    step({first: 1, second: len(prompts[1]) - half, third: len(prompts[2])}, pad=2)
    for _ in range(6):
        step({first: 1, second: 1, third: 1}, decode_only=True, pad=1)
    stepper.rows[first].computed = 0
    step({first: len(stepper.rows[first].tokens)})


def check_engine(folder: Path, reference: Reference, prompts: list[list[int]], **engine_args):
    """24 tokens of each prompt from the whole engine, alone and together; steps are smaller than the prompts."""
    llm = jaxllm.LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_seqs=2,
        max_num_batched_tokens=16,
        max_model_len=96,
        block_size=8,
        num_gpu_blocks_override=16,
        use_tqdm_on_load=False,
        **engine_args,
    )
    params = jaxllm.SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    expected = [reference_greedy(reference, tokens) for tokens in prompts]
    for batch in (prompts[:1], prompts):
        outputs = llm.generate(batch, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected[: len(batch)]
    llm.llm_engine.scheduler.check()
    return llm


# Operations of the references, on [T, ...] tensors.


def rms_norm(x, weight, eps: float):
    return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps))


def heads(x, head_dim: int):
    """[T, heads * head_dim] -> [T, heads, head_dim]."""
    return x.reshape(len(x), -1, head_dim)


def rotate_halves(x, angles):
    """x [T, heads, H]; angles [T, H / 2]: dimension i turns with dimension i + H / 2."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q, k, v, *, bias=None):
    """Causal attention of q [T, N, H] to k, v [T, K, H] -> [T, N * H]; `bias` [N, T, T] is added to the scores."""
    num_tokens, num_heads, head_dim = q.shape
    k, v = (part.repeat_interleave(num_heads // part.shape[1], dim=1) for part in (k, v))
    scores = torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(head_dim)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(torch.ones(num_tokens, num_tokens).triu(1).bool(), float("-inf"))
    return torch.einsum("nqk,knh->qnh", scores.softmax(-1), v).reshape(num_tokens, -1)


# Models that transformers has.


def made_by_transformers(folder: Path, config: dict) -> Reference:
    """A random checkpoint of a published config: the tensors as transformers writes them, config.json as given. The
    config.json that transformers writes, of today's keys, is read as the same."""
    from transformers import AutoConfig, AutoModelForCausalLM

    copy = json.loads(json.dumps(config))  # transformers changes the dicts that it is given
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy), attn_implementation="eager")
    randomize(model).save_pretrained(folder)
    assert read_config(json.loads((folder / "config.json").read_text())) == read_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    return of_transformers(model)


def slow_but(quick: tuple[str, ...], variants: dict) -> list:
    """The variants' names as parameters, marked as slow but for the `quick`: each compiles programs of its own."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in variants]

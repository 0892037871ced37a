"""The whole engine against transformers: greedy tokens and log probabilities of every variant of Llama, however the
scheduler cuts the work: alone, batched, in chunks, on cached prefixes and after preemption."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jaxllm  # noqa: E402
from tests.checkpoints import LLAMA_VARIANTS, TINY_LLAMA, save_checkpoint, tiny_llama  # noqa: E402

NUM_TOKENS = 24
TOLERANCE = 2e-3  # of log probabilities
MAX_MODEL_LEN = 128


def rope(rope_type, max_positions=MAX_MODEL_LEN, **settings):
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **settings}
    return {"rope_parameters": parameters, "max_position_embeddings": max_positions}


VARIANTS = {
    **LLAMA_VARIANTS,
    "rope_linear": rope("linear", 32, factor=4.0),
    "rope_dynamic": rope("dynamic", 32, factor=4.0),
    "rope_llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "rope_yarn": rope("yarn", factor=4.0, original_max_position_embeddings=32),
}


class Reference:
    """Greedy decoding by transformers, a prompt at a time."""

    def __init__(self, model):
        self.model, self._known = model, {}

    def __call__(self, prompt):
        """(tokens [NUM_TOKENS], log probabilities [NUM_TOKENS, V])."""
        if tuple(prompt) not in self._known:
            self._known[tuple(prompt)] = self._generate(prompt)
        return self._known[tuple(prompt)]

    def _generate(self, prompt):
        with torch.no_grad():
            self.model(torch.tensor([[0]]))  # its dynamic rope keeps the longest length it has seen until a short one
            found = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # else it would mask token 0
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        logprobs = torch.log_softmax(torch.cat(found.logits), dim=-1)
        return found.sequences[0, len(prompt) :].tolist(), logprobs.numpy()


class Case:
    """A checkpoint, in both."""

    def __init__(self, folder, **config):
        model = tiny_llama(**({"max_position_embeddings": MAX_MODEL_LEN} | config))
        self.reference = Reference(model)
        self.llm = jaxllm.LLM(
            str(save_checkpoint(model, folder)),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=4,
            max_num_batched_tokens=32,
            block_size=4,
            num_gpu_blocks_override=64,
            max_logprobs=5,
            use_tqdm_on_load=False,
        )

    def check(self, prompts):
        """Every prompt's tokens, and the log probabilities of the first prompts'; returns the outputs."""
        params = jaxllm.SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=5)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens, logprobs = self.reference(prompt)
            answer = output.outputs[0]
            assert answer.token_ids == tokens
            check_logprobs(answer, logprobs)
        self.llm.llm_engine.scheduler.check()
        return outputs

    @property
    def num_preemptions(self):
        return self.llm.llm_engine.scheduler.num_preemptions


def check_logprobs(answer, expected):
    for token, entry, row in zip(answer.token_ids, answer.logprobs, expected, strict=True):
        assert entry[token].rank == 1 and len(entry) == 5
        top = np.sort(row)[::-1][:5]
        np.testing.assert_allclose([one.logprob for one in entry.values()], top, atol=TOLERANCE)
        np.testing.assert_allclose([one.logprob for one in entry.values()], row[list(entry)], atol=TOLERANCE)
    total = sum(row[token] for token, row in zip(answer.token_ids, expected, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total, abs=NUM_TOKENS * TOLERANCE)


QUICK = {"gqa", "biases", "rope_dynamic"}  # each variant takes ten seconds to compile


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp(request.param), **VARIANTS[request.param])


def prompt(length, seed):
    return np.random.default_rng((length, seed)).integers(0, TINY_LLAMA["vocab_size"], length).tolist()


def test_alone_then_found_in_the_prefix_cache(case):
    tokens = prompt(27, seed=0)
    assert case.check([tokens])[0].num_cached_tokens == 0
    assert case.check([tokens])[0].num_cached_tokens == 24


def test_a_batch_of_mixed_lengths(case):
    before = case.num_preemptions
    case.check([prompt(length, seed=1) for length in (1, 2, 3, 4, 5, 8, 11, 15, 16, 17, 23, 28, 31, 33, 34, 36)])
    assert case.num_preemptions == before


def test_a_prompt_in_chunks_then_found_in_the_prefix_cache(case):
    tokens = prompt(90, seed=2)  # a step takes 32
    assert case.check([tokens])[0].num_cached_tokens == 0
    assert case.check([tokens])[0].num_cached_tokens == 88


def test_prompts_that_begin_alike(case):
    """Each is the beginning of the next one. Keys of dynamic rope depend on the prompt's length beyond 32, so that what
    is cached for one length is wrong for another."""
    tokens = prompt(60, seed=3)
    for length in (20, 30, 40, 50, 60):
        output = case.check([tokens[:length]])[0]
    answer = output.outputs[0].token_ids
    case.check([tokens + answer[:10], tokens + answer[:20]])


def test_prompt_logprobs_in_chunks_and_beside_cached_prompts(case):
    """Every position's log probabilities, against one plain forward pass over the prompt."""
    prompts = [prompt(length, seed=5) for length in (1, 2, 17, 50, 90)]
    case.check(prompts)  # from here on they are in the prefix cache
    params = jaxllm.SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=4)
    for output in case.llm.generate(prompts, params, use_tqdm=False):
        tokens, entries = output.prompt_token_ids, output.prompt_logprobs
        with torch.no_grad():
            case.reference.model(torch.tensor([[0]]))
            logits = case.reference.model(torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens))).logits[0]
        expected = torch.log_softmax(logits, dim=-1).numpy()
        assert output.outputs[0].token_ids == case.reference(tokens)[0][:3] and len(entries) == len(tokens)
        assert entries[0] is None
        for entry, row, token in zip(entries[1:], expected, tokens[1:], strict=False):
            np.testing.assert_allclose([one.logprob for one in entry.values()], row[list(entry)], atol=TOLERANCE)
            assert token in entry and {one.rank for one in entry.values()} >= {1, 2, 3, 4}


def test_penalties_and_bad_tokens_while_generating(case):
    """Whole answers under a repetition penalty and a bias, as transformers' generate has them."""
    tokens = prompt(19, seed=6)
    bias = {(3,): 4.0, (7,): -5.0}
    with torch.no_grad():
        case.reference.model(torch.tensor([[0]]))
        found = case.reference.model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=1.4,
            sequence_bias=bias,
        )
    params = jaxllm.SamplingParams(
        temperature=0,
        max_tokens=NUM_TOKENS,
        repetition_penalty=1.4,
        logit_bias={ids[0]: value for ids, value in bias.items()},
    )
    mates = [jaxllm.SamplingParams(temperature=1.0, seed=i, max_tokens=30, presence_penalty=1.0) for i in range(3)]
    outputs = case.llm.generate([tokens] * 4, [params, *mates], use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == found[0, len(tokens) :].tolist()


def test_after_preemption(case):
    before = case.num_preemptions
    case.check([prompt(length, seed=4) for length in (60, 70, 80, 33, 90, 61)])  # 64 pages of 4 tokens for all of them
    assert case.num_preemptions > before

"""The engine's beam search against transformers': sequences and scores, several prompts in one batch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jaxllm  # noqa: E402
from tests.checkpoints import save_checkpoint, tiny_llama  # noqa: E402

MAX_TOKENS = 14
PROMPTS = [np.random.default_rng(i).integers(0, 96, length).tolist() for i, length in enumerate((1, 6, 19))]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def stops(model):
    """Tokens that beams meet: those in three places of each prompt's greedy answer."""
    found = [expected(model, prompt, 1, 1.0, False, None)[0][0] for prompt in PROMPTS]
    return sorted({tokens[place] for tokens in found for place in (4, 7, 10)})


@pytest.fixture(scope="module")
def llm(model, tmp_path_factory):
    folder = save_checkpoint(model, tmp_path_factory.mktemp("beams"))
    return jaxllm.LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=48,
        max_num_seqs=32,
        max_num_batched_tokens=128,
        block_size=4,
        num_gpu_blocks_override=256,
        enforce_eager=True,
        use_tqdm_on_load=False,
    )


def expected(model, prompt, width, length_penalty, early_stopping, stops, **fields):
    """[(answer's tokens, score)], best first; the score is None of a single beam."""
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=MAX_TOKENS,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=length_penalty if width > 1 else None,
            early_stopping=early_stopping if width > 1 else None,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=95,
            return_dict_in_generate=True,
            output_scores=True,
            **fields,
        )
    answers = [ended(row, stops or ()) for row in found.sequences[:, len(prompt) :].tolist()]
    return list(zip(answers, found.sequences_scores.tolist() if width > 1 else [None], strict=True))


def ended(tokens, stops):
    """Without the padding behind a stop token."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


def check(model, llm, stops, width, length_penalty, early_stopping, ours=None, theirs=None):
    params = jaxllm.SamplingParams(
        use_beam_search=True,
        n=width,
        temperature=0,
        max_tokens=MAX_TOKENS,
        stop_token_ids=stops,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        **ours or {},
    )
    lengths = set()
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params, use_tqdm=False), strict=True):
        answers = expected(model, prompt, width, length_penalty, early_stopping, stops, **theirs or {})
        assert [one.token_ids for one in output.outputs] == [tokens for tokens, _ in answers]
        scores = [one.cumulative_logprob / len(one.token_ids) ** length_penalty for one in output.outputs]
        np.testing.assert_allclose(scores, [score for _, score in answers], atol=2e-4, rtol=1e-5)
        assert [one.finish_reason for one in output.outputs] == [
            "stop" if tokens[-1] in stops else "length" for tokens, _ in answers
        ]
        lengths |= {len(tokens) for tokens, _ in answers}
    return lengths


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize(
    "width", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 8]
)
def test_equal_to_transformers(model, llm, stops, width, early_stopping):
    lengths = set()
    for length_penalty in (0.0, 0.6, 1.0, 2.0):
        lengths |= check(model, llm, stops, width, length_penalty, early_stopping)
    assert len(lengths) > 1  # some ended early


def test_masks_as_transformers_has_them(model, llm, stops):
    """transformers masks after the softmax, and adds up to one again only if told to."""
    renormalized = dict(renormalize_logits=True)
    check(model, llm, stops, 4, 1.0, False, dict(min_tokens=6), dict(min_new_tokens=6) | renormalized)
    banned = [token for token in range(96) if token % 7 == 0 and token not in stops]
    allowed = [token for token in range(96) if token not in banned]
    theirs = dict(suppress_tokens=banned) | renormalized
    check(model, llm, stops, 4, 1.0, False, dict(allowed_token_ids=allowed), theirs)

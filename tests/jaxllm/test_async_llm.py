"""AsyncLLM: several requests at once, each with its partial outputs; ends and errors of one are its own."""

import asyncio
import gc
import threading

import numpy as np
import pytest

from jaxllm import EngineConfig, PoolingParams, SamplingParams
from jaxllm.async_llm import AsyncLLM, EngineDead
from jaxllm.models import testing
from jaxllm.models.testing import continuation
from jaxllm.sampling_params import RequestOutputKind

FIELDS = dict(
    load_format="dummy",
    dtype="float32",
    max_model_len=256,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    num_gpu_blocks_override=64,
    scheduling_policy="priority",
    num_scheduler_steps=1,
    use_tqdm_on_load=False,
)
PROMPTS = [[1, 2, 3], [4, 5], [7] * 40]


def greedy(max_tokens=12, **fields) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **fields)


def make() -> AsyncLLM:
    return AsyncLLM.from_engine_args(EngineConfig(model=testing.config_dict(), **FIELDS))


@pytest.fixture(scope="module")
def llm():
    llm = make()
    yield llm
    llm.shutdown()


async def collect(llm, prompt, params, name, seen=None, **options) -> list:
    outputs = []
    async for output in llm.generate(prompt, params, name, **options):
        outputs.append(output)
        if seen is not None:
            seen.append(name)
    return outputs


def test_requests_at_once_each_with_its_partial_outputs(llm):
    async def main():
        seen: list[str] = []
        tasks = [collect(llm, prompt, greedy(), str(i), seen) for i, prompt in enumerate(PROMPTS)]
        return await asyncio.gather(*tasks), seen

    results, seen = asyncio.run(main())
    for prompt, outputs in zip(PROMPTS, results, strict=True):
        expected = continuation(prompt, 12)
        assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 13))
        assert all(output.outputs[0].token_ids == expected[: i + 1] for i, output in enumerate(outputs))
        assert [output.finished for output in outputs] == [False] * 11 + [True]
    assert seen != sorted(seen)  # they took turns


def test_vectors_beside_answers(llm):
    async def vectors(params, name) -> list:
        return [output async for output in llm.encode(PROMPTS[2], params, name)]

    async def main():
        mine = asyncio.gather(vectors(None, "a"), vectors({"task": "token_embed"}, "b"))
        outputs = await collect(llm, PROMPTS[0], greedy(), "c")
        with pytest.raises(ValueError, match="has no classes"):
            await vectors(PoolingParams(task="classify"), "d")
        return outputs, *await mine

    outputs, (one,), (tokens,) = asyncio.run(main())
    assert outputs[-1].outputs[0].token_ids == continuation(PROMPTS[0], 12)
    assert one.finished and one.request_id == "a" and tokens.outputs.data.shape[0] == len(PROMPTS[2]) == 40
    np.testing.assert_allclose(one.outputs.data, tokens.outputs.data[-1], atol=1e-6)


def test_leaving_before_the_vector_is_there(llm):
    async def main():
        stream = llm.encode(PROMPTS[2], None, "a")
        task = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await llm.check_health()
        (output,) = [output async for output in llm.encode(PROMPTS[2], None, "a")]
        assert output.finished and output.finish_reason == "stop"

    asyncio.run(main())


def test_deltas_and_final_outputs(llm):
    async def main():
        deltas = await collect(llm, PROMPTS[0], greedy(output_kind=RequestOutputKind.DELTA), "a")
        final = await collect(llm, PROMPTS[0], greedy(output_kind=RequestOutputKind.FINAL_ONLY), "b")
        return deltas, final

    deltas, final = asyncio.run(main())
    assert [token for output in deltas for token in output.outputs[0].token_ids] == continuation(PROMPTS[0], 12)
    assert [output.outputs[0].token_ids for output in final] == [continuation(PROMPTS[0], 12)]


def test_a_bad_request_fails_alone(llm):
    def broken(tokens, logits):
        raise ArithmeticError("no")

    async def main():
        return await asyncio.gather(
            collect(llm, PROMPTS[0], greedy(), "good"),
            collect(llm, [99999], greedy(), "bad"),
            collect(llm, PROMPTS[1], greedy(), "good"),  # its id is in use
            collect(llm, PROMPTS[2], greedy(logits_processors=[broken]), "broken"),
            collect(llm, PROMPTS[0], greedy(), ["a", "b"]),
            collect(llm, PROMPTS[0], greedy(), None),
            return_exceptions=True,
        )

    good, bad, twice, broken_outputs, *ids = asyncio.run(main())
    assert good[-1].outputs[0].token_ids == continuation(PROMPTS[0], 12)
    assert isinstance(bad, ValueError) and "99999" in str(bad)
    assert isinstance(twice, ValueError) and "already in use" in str(twice)
    assert broken_outputs[-1].outputs[0].finish_reason == "error"
    assert all(isinstance(error, TypeError) and "request_id must be text" in str(error) for error in ids)


def test_a_failure_in_what_is_handed_over_leaves_the_thread(llm):
    llm._worker.post(lambda: [].pop())
    assert asyncio.run(collect(llm, PROMPTS[0], greedy(), "after"))[-1].finished


def test_abort_ends_with_one_more_output(llm):
    async def main():
        stream = llm.generate(PROMPTS[0], greedy(200), "a")
        await anext(stream)
        await llm.abort(["a", "a", "never heard of"])
        return [output async for output in stream]

    outputs = asyncio.run(main())
    last = outputs[-1].outputs[0]
    assert outputs[-1].finished and last.finish_reason == "abort"
    assert last.token_ids == continuation(PROMPTS[0], 200)[: len(last.token_ids)] and len(last.token_ids) < 200


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_the_iterator_ends_the_request(llm, how):
    async def main():
        if how == "close":
            stream = llm.generate(PROMPTS[0], greedy(250), "a")
            await anext(stream)
            await stream.aclose()
        else:
            task = asyncio.create_task(collect(llm, PROMPTS[0], greedy(250), "a", seen := []))
            while not seen:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        metrics = await llm.get_metrics()
        return {one.name: one.value for one in metrics if hasattr(one, "value")}

    assert asyncio.run(main())["vllm:num_requests_running"] == 0


def test_priority(llm):
    async def main():
        finished: list[str] = []

        async def one(i: int) -> None:
            await collect(llm, [i + 1], greedy(30), str(i), priority=-i)
            finished.append(str(i))

        await asyncio.gather(*(one(i) for i in range(12)))  # of which four run at once
        return finished

    finished = asyncio.run(main())
    assert set(finished[-4:]) <= {"0", "1", "2", "3", "4", "5", "6"} and "11" in finished[:8]


def test_sleep_and_the_rest(llm, tmp_path, monkeypatch):
    async def main():
        stream = llm.generate(PROMPTS[0], greedy(200), "b")
        await anext(stream)
        with pytest.raises(RuntimeError, match="1 unfinished"):
            await llm.sleep()
        await llm.sleep(mode="abort")
        assert [output async for output in stream][-1].outputs[0].finish_reason == "abort"
        assert await llm.is_sleeping()
        with pytest.raises(RuntimeError, match="asleep"):
            await collect(llm, PROMPTS[0], greedy(), "a")
        await llm.wake_up()
        assert await llm.reset_prefix_cache() and await llm.get_tokenizer() is None
        await llm.check_health()
        monkeypatch.setenv("JAXLLM_PROFILER_DIR", str(tmp_path))
        await llm.start_profile()
        outputs = await collect(llm, PROMPTS[0], None, "a")
        await llm.stop_profile()
        return outputs

    assert asyncio.run(main())[-1].finished
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_shutdown_ends_requests_and_thread():
    before = set(threading.enumerate())

    async def main():
        async with make() as llm:
            stream = llm.generate(PROMPTS[0], greedy(200), "a")
            await anext(stream)
        rest = [output async for output in stream]
        with pytest.raises(EngineDead):
            await llm.check_health()
        assert not llm.is_running
        llm.shutdown()
        return rest

    assert asyncio.run(main())[-1].outputs[0].finish_reason == "abort"
    gc.collect()
    assert not [one for one in set(threading.enumerate()) - before if one.name == "jaxllm engine"]


def test_a_forgotten_one_ends_its_thread():
    llm = make()
    thread = llm._worker._thread
    del llm
    gc.collect()
    thread.join(timeout=20)
    assert not thread.is_alive()

"""Tutorial 5: several requests of one engine at once, each of which yields its partial response."""

import asyncio

from jaxllm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams

engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model="path/to/qwen-7b-chat", disable_log_requests=True))
params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


async def infer(request_id, query):
    prompt = f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"
    async for output in engine.generate(prompt, params, request_id):
        print(f"{request_id}: {output.outputs[0].text!r}")


async def main():
    queries = ["你好!", "浙江的省会在哪？", "晚上睡不着觉怎么办"]
    await asyncio.gather(*(infer(str(i), query) for i, query in enumerate(queries)))


asyncio.run(main())
engine.shutdown()

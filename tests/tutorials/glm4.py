"""Tutorial 1, offline: GLM-4-9B-Chat."""

from jaxllm import LLM, SamplingParams


def get_completion(prompts, model, tokenizer=None, max_tokens=512, temperature=0.8, top_p=0.95, max_model_len=2048):
    stop_token_ids = [151329, 151336, 151338]
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    llm = LLM(model=model, tokenizer=tokenizer, max_model_len=max_model_len, trust_remote_code=True)
    return llm.generate(prompts, params)


for output in get_completion(["给我讲个故事"], "path/to/glm-4-9b-chat", max_tokens=16, temperature=1, top_p=1):
    print(f"Prompt: {output.prompt!r}, Generated text: {output.outputs[0].text!r}")

"""Tutorial 4, offline: TinyLLM-92M."""

from jaxllm import LLM, SamplingParams

llm = LLM(model="path/to/tiny_llm_sft_92m", tensor_parallel_size=1, max_model_len=1024)
messages = [{"role": "system", "content": "你是由wdndev开发的个人助手。"}, {"role": "user", "content": "你好"}]
params = SamplingParams(temperature=0.7, top_p=0.8, repetition_penalty=1.05, max_tokens=16)
text = llm.get_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
for output in llm.generate([text], params):
    print(f"Prompt: {output.prompt!r}, Generated text: {output.outputs[0].text!r}")

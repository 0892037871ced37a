"""The command line on the embedded default model: what it prints, where it reads, how it fails."""

import dataclasses
import io
import subprocess
import sys

import pytest

import jaxllm.llm
from jaxllm.cli import main, parser
from jaxllm.config import EngineConfig

ENGINE = ["--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--no-use-tqdm-on-load"]
GREEDY = ["--temperature", "0", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def engines():
    """An engine for every set of flags, made once."""
    made, real = {}, jaxllm.llm.LLM

    def engine(**fields):
        key = repr(sorted(fields.items()))
        if key not in made:
            made[key] = real(**fields)
        return made[key]

    return engine


@pytest.fixture
def run(engines, monkeypatch, capsys):
    """run(arguments, stdin) -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(jaxllm.llm, "LLM", engines)

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def llm(engines):
    return engines(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64, use_tqdm_on_load=False)


def answer(llm, prompt, **fields):
    params = {"temperature": 0, "top_p": 0.9, "max_tokens": 8, **fields}
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text


def test_generate_streams_one_prompt(run, llm):
    status, out, _ = run("generate", "Once upon a time", *GREEDY, *ENGINE)
    assert (status, out) == (0, f"Once upon a time{answer(llm, 'Once upon a time')}\n")


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_generate_several_prompts(run, llm, flags):
    prompts = ["Once upon a time", "The sea"]
    status, out, _ = run("generate", *prompts, *flags, *GREEDY, *ENGINE)
    assert (status, out) == (0, "".join(f"{prompt}{answer(llm, prompt)}\n\n" for prompt in prompts))


def test_generate_whole_answers_are_the_streamed_ones(run, llm):
    status, out, _ = run("generate", "The sea", "--no-stream", *GREEDY, *ENGINE)
    assert (status, out) == (0, f"The sea{answer(llm, 'The sea')}\n\n")


def test_generate_reads_prompts_from_standard_input(run, llm):
    status, out, _ = run("generate", *GREEDY, *ENGINE, stdin="Once upon a time\n\nThe sea")
    assert (status, out) == (0, "".join(f"{one}{answer(llm, one)}\n\n" for one in ("Once upon a time", "The sea")))


def test_sampling_flags(run, llm):
    whole = answer(llm, "The sea", max_tokens=20, ignore_eos=True)
    stop = whole[5:8]
    flags = ["--temperature", "0", "--max-tokens", "20", "--ignore-eos", "--stop", "no such text", "--stop", stop]
    assert run("generate", "The sea", *flags, *ENGINE)[1] == f"The sea{whole[: whole.index(stop)]}\n"
    _, out, _ = run("generate", "The sea", "--n", "3", "--max-tokens", "4", *ENGINE)
    assert out.count("The sea") == 3 and out.endswith("\n\n")


def test_without_max_tokens_an_answer_may_be_long(run, llm):
    _, out, _ = run("generate", "The sea", "--temperature", "0", "--ignore-eos", *ENGINE)
    tokenizer = llm.get_tokenizer()
    assert len(tokenizer.encode(out)) > 200  # up to max_model_len, not 16


def test_chat_keeps_the_conversation(run, llm):
    chat_prompt = llm.llm_engine.tokenizer.apply_chat_template
    messages = [{"role": "system", "content": "You are a sailor."}]
    expected = ""
    for question in ("Where have you been?", "And then?"):
        messages.append({"role": "user", "content": question})
        text = answer(llm, chat_prompt(messages))
        messages.append({"role": "assistant", "content": text})
        expected += f"> {text}\n"
    stdin = "Where have you been?\n\nAnd then?\n"  # the empty line is no turn
    status, out, err = run("chat", "--system-prompt", "You are a sailor.", *GREEDY, *ENGINE, stdin=stdin)
    assert (status, out.replace("> > ", "> ")) == (0, expected + "> \n")
    assert "Ctrl-D ends" in err


@pytest.mark.parametrize("flags", [["The sea"], ["The sea", "--no-stream"], ["The sea", "--n", "2"], ["A", "B"]])
def test_generate_fails_when_an_answer_does(run, llm, monkeypatch, flags):
    def fail(plan):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(llm.llm_engine.runner, "submit", fail)
        status, out, err = run("generate", *flags, "--temperature", "0.5", "--max-tokens", "8", *ENGINE)
    count = 1 if flags[1:] in ([], ["--no-stream"]) else 2
    assert status == 2 and out.startswith(flags[0])
    assert err.splitlines()[-1] == f'jaxllm: error: {count} of {count} answers ended with finish_reason "error"'
    assert answer(llm, "The sea")  # the engine goes on


def test_chat_has_the_template_it_is_given(run, llm, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{% for one in messages %}{{ one.content }}, said the {{ one.role }}. {% endfor %}")
    status, out, _ = run("chat", "--chat-template", str(file), *GREEDY, *ENGINE, stdin="Where am I?\n")
    assert (status, out) == (0, f"> {answer(llm, 'Where am I?, said the user. ')}\n> \n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("/no/such/file", "chat_template='/no/such/file' is neither a Jinja template, nor a file"),
        ("{% for %}", "messages do not fit the chat template"),
    ],
)
def test_chat_refuses_a_bad_template_before_the_first_turn(run, template, message):
    status, out, err = run("chat", "--chat-template", template, *GREEDY, *ENGINE, stdin="Where am I?\n")
    assert (status, out) == (2, "") and message in err.splitlines()[-1]


def test_chat_goes_on_after_a_turn_that_is_too_long(run, llm):
    questions = ("Where have you been?", "word " * 300, "And then?")
    status, out, err = run("chat", *GREEDY, *ENGINE, stdin="".join(f"{one}\n" for one in questions))
    expected = run("chat", *GREEDY, *ENGINE, stdin=f"{questions[0]}\n{questions[2]}\n")[1]
    assert status == 0 and out.replace("> > ", "> ") == expected
    assert "max_model_len is 256" in err.splitlines()[-1]


def test_chat_through_a_pipe(llm):
    command = [sys.executable, "-m", "jaxllm", "chat", *GREEDY, *ENGINE]
    done = subprocess.run(command, input="Who are you?\n", capture_output=True, text=True, timeout=120)
    text = answer(llm, llm.llm_engine.tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}]))
    assert (done.returncode, done.stdout) == (0, f"> {text}\n> \n"), done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "x"], "argument --temperature: invalid float value: 'x'"),
        (["--temperature", "3"], "temperature must be in [0, 2], got 3.0"),
        (["--max-tokens", "0"], "max_tokens must be an integer of at least 1, got 0"),
        (["--max-num-seqs", "0"], "max_num_seqs must be an integer of at least 1, got 0"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--hf-overrides", "{"], "argument --hf-overrides: invalid json_object value: '{'"),
        (["--hf-overrides", "[1]"], "argument --hf-overrides: invalid json_object value: '[1]'"),
        (["--scheduling-policy", "lifo"], "scheduling_policy must be one of ['fcfs', 'priority']"),
        (["--max-model-len", "4096"], "max_model_len=4096 exceeds the model's 2048 positions"),
        (["--model", "/no/such/folder"], "model='/no/such/folder' is neither a folder nor an id"),
        (["--block-sise", "8"], "unrecognized arguments: --block-sise 8"),
    ],
)
def test_bad_flags(run, flags, message):
    status, out, err = run("generate", "The sea", *ENGINE, *flags)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1] and "error:" in err.splitlines()[-1]


def test_bad_prompts(run):
    assert run("generate", *ENGINE)[0::2] == (2, "jaxllm: error: no prompts: give them as arguments, or one a line on "
                                                 "standard input\n")  # fmt: skip
    status, _, err = run("generate", "word " * 300, *GREEDY, *ENGINE)
    assert status == 2 and "max_model_len is 256" in err.splitlines()[-1]


def test_a_command_is_needed(run):
    status, _, err = run()
    assert status == 2 and "COMMAND" in err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_lists_every_engine_field(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    for one in dataclasses.fields(EngineConfig):
        assert f"--{one.name.replace('_', '-')}" in out
        assert one.metadata["help"].split()[0] in out


def test_flags_become_the_fields():
    flags = [
        "--gpu-memory-utilization",
        "0.5",
        "--no-enable-prefix-caching",
        "--hf-overrides",
        '{"a": 1}',
        "--seed",
        "3",
    ]
    args = parser().parse_args(["generate", *flags])
    assert args.gpu_memory_utilization == 0.5 and args.seed == 3
    assert args.enable_prefix_caching is False and args.hf_overrides == {"a": 1}
    assert args.max_num_seqs is None  # not given: EngineConfig's default stands


def test_models_lists_architectures_and_formats(run):
    status, out, _ = run("models")
    assert status == 0
    assert "LlamaForCausalLM" in out and "Vicuna" in out and "model.safetensors" in out and "bfloat16" in out

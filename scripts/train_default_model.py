"""Trains the small language model that jaxllm ships as its default: `jaxllm/default_model/`.

From two public-domain texts it makes a tokenizer (byte-level BPE), one long token stream of prose, plays and chats, and
a Llama of about 7 million parameters, and writes them as an ordinary Hugging Face folder:

    python scripts/train_default_model.py --books gutenberg14.txt.gz --plays tinyshakespeare.txt.gz --out OUT

It stands alone: it knows nothing of jaxllm, and its network is written for reading and for whole sequences, without any
cache. The books are one text with at least two blank lines between books, paragraphs being single lines or verses with
one blank line between them; the plays are speeches, `NAME:` on a line and the words below it.
"""

import argparse
import dataclasses
import gzip
import itertools
import json
import math
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"
SPECIAL_TOKENS = [END_OF_TEXT, END_OF_TURN, "<|system|>", "<|user|>", "<|assistant|>"]

SAMPLING = {"temperature": 0.8, "top_p": 0.9}  # flatter strays from English, sharper repeats itself

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("role must be system, user or assistant, not " ~ message['role']) -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ (message['content'] | trim) ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    max_length: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


TINY = ModelConfig(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
    max_length=64,
)  # fmt: skip


# ---- Text: files -> documents -----------------------------------------------------------------------------------

HELD_OUT = ((0.30, 0.32), (0.80, 0.82))  # of each text, by position: two contiguous pieces nobody trains on
MAX_SPEECH = 400  # characters of a speech that still sounds like chat
STORY_LENGTH = 900  # characters after which a story stops at the end of its paragraph

SYSTEM_MESSAGES = {
    "play": "You are a character in a play by Shakespeare.",
    "novel": "You are a character in a novel.",
    "story": "You are a storyteller.",
}
STORY_REQUESTS = ["Tell me a story.", "Tell me a tale.", "Tell me something.", "Please tell me a story.", "Go on."]


def read_text(path: Path) -> str:
    """Whole text of a plain or gzip file, in UTF-8, with runs of spaces inside lines made one."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8").replace("\r\n", "\n")
    return re.sub(r"(?<=\S) {2,}", " ", text).strip()


def paragraphs_of(text: str) -> list[str]:
    """Blocks between blank lines, without those that hold the period's ugliest slur: no model of ours should say it."""
    blocks = (block.strip("\n") for block in re.split(r"\n{2,}", text))
    return [block for block in blocks if block.strip() and not re.search(r"\bnigg", block, re.IGNORECASE)]


def split_held_out(paragraphs: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """(training pieces, validation pieces) of one text, each a run of its paragraphs."""
    cuts = [0, *(int(len(paragraphs) * part) for span in HELD_OUT for part in span), len(paragraphs)]
    pieces = [paragraphs[begin:end] for begin, end in itertools.pairwise(cuts)]
    return [piece for piece in pieces[0::2] if piece], [piece for piece in pieces[1::2] if piece]


def spoken(paragraph: str) -> str | None:
    """What is said in a paragraph of direct speech, `"No," said he, "not I."` giving `No, not I.`, or None."""
    if not paragraph.startswith('"') or paragraph.count('"') % 2:
        return None
    speech = " ".join(part.strip() for part in re.findall(r'"([^"]*)"', paragraph))
    speech = re.sub(r"[,;:-]+$", ".", speech)
    return speech if 0 < len(speech) <= MAX_SPEECH else None


def speech_of_play(paragraph: str) -> str | None:
    """The words below a speaker's name, or None if the block is no speech or a long one."""
    name, _, words = paragraph.partition("\n")
    return words if name.endswith(":") and 0 < len(words) <= MAX_SPEECH else None


def render_chat(messages: list[tuple[str, str]]) -> str:
    """What the chat template makes of (role, content) pairs; a test holds the two together."""
    return "".join(f"<|{role}|>{content.strip()}{END_OF_TURN}" for role, content in messages)


def with_system(kind: str, messages: list[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """Half of the chats open with a system message: the kind's own, or the one everybody sends."""
    system = rng.choice([None, None, SYSTEM_MESSAGES[kind], "You are a helpful assistant."])
    return messages if system is None else [("system", system), *messages]


def dialogues(kind: str, speeches: list[str | None], rng: random.Random) -> list[str]:
    """Chats of 2, 4 or 6 turns from each unbroken run of speeches (None breaks a run)."""
    chats: list[str] = []
    run: list[str] = []
    for speech in [*speeches, None]:
        if speech is not None:
            run.append(speech)
            continue
        while len(run) >= 2:
            size = min(rng.choice([2, 4, 6]), len(run) // 2 * 2)
            turns = [(("user", "assistant")[i % 2], words) for i, words in enumerate(run[:size])]
            chats.append(render_chat(with_system(kind, turns, rng)))
            run = run[size:]
        run = []
    return chats


def stories(paragraphs: list[str], rng: random.Random) -> list[str]:
    """Chats where the user asks for a story, or opens one, and the assistant tells some paragraphs of the book."""
    chats: list[str] = []
    i = 0
    while i < len(paragraphs):
        opening = paragraphs[i]
        is_prose = "\n" not in opening and opening[0] not in "\"'" and 150 <= len(opening) <= 1500
        if not is_prose or rng.random() < 0.6:
            i += 1
            continue
        text = opening
        i += 1
        while len(text) < STORY_LENGTH and i < len(paragraphs):
            text += "\n\n" + paragraphs[i]
            i += 1
        request, _, rest = text.partition(". ")
        if rng.random() < 0.5 or len(request) > MAX_SPEECH or not rest:
            request, rest = rng.choice(STORY_REQUESTS), text
        else:
            request += "."
        chats.append(render_chat(with_system("story", [("user", request), ("assistant", rest)], rng)))
    return chats


def make_documents(books: str, plays: str, seed: int) -> dict[str, list[str]]:
    """{"train": prose, plays and chats shuffled, "text": held-out prose and plays, "chat": held-out chats}."""
    rng = random.Random(seed)
    documents: dict[str, list[str]] = {"train": [], "text": [], "chat": []}
    texts = [("novel", book) for book in re.split(r"\n{3,}", books)] + [("play", plays)]
    for kind, text in texts:
        train_pieces, held_out_pieces = split_held_out(paragraphs_of(text))
        for text_split, chat_split, pieces in (("train", "train", train_pieces), ("text", "chat", held_out_pieces)):
            for piece in pieces:
                documents[text_split].append("\n\n".join(piece))
                speech = spoken if kind == "novel" else speech_of_play
                documents[chat_split] += dialogues(kind, [speech(paragraph) for paragraph in piece], rng)
                documents[chat_split] += stories(piece, rng) if kind == "novel" else []
    rng.shuffle(documents["train"])
    return documents


# ---- Tokens -----------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text is encodable, decoding gives it back exactly. Special tokens have the ids 0 to 4."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for text in texts if not text.startswith("<|")), trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """One stream i32[*] of all documents, each followed by end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch(documents)
    return np.concatenate([np.array([*encoding.ids, end], np.int32) for encoding in encodings])


# ---- Network: attribute names are Hugging Face's tensor names ---------------------------------------------------

INIT_SCALE = 0.02


def dropout(x, rate: float, key):
    """Zeroes entries with probability `rate` and scales up the rest; a key of None means evaluation: x unchanged."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al., 2021), halves convention. x [B, T, heads, H]; cos, sin f32[T, H / 2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Linear(nnx.Module):
    def __init__(self, n_in: int, n_out: int, rngs: nnx.Rngs, scale: float = INIT_SCALE):
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (n_out, n_in)))

    def __call__(self, x):
        return jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype))


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...]).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = config
        self.q_proj = Linear(c.hidden_size, c.num_heads * c.head_dim, rngs)
        self.k_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, rngs)
        self.v_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, rngs)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, rngs, INIT_SCALE / math.sqrt(2 * c.num_layers))
        self.head_dim = c.head_dim

    def __call__(self, x, cos, sin, implementation):
        q, k, v = (proj(x).reshape(*x.shape[:2], -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = config
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, rngs)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, rngs)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, rngs, INIT_SCALE / math.sqrt(2 * c.num_layers))

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x, cos, sin, implementation, rate: float, key):
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        x += dropout(self.self_attn(self.input_layernorm(x), cos, sin, implementation), rate, attention_key)
        return x + dropout(self.mlp(self.post_attention_layernorm(x)), rate, mlp_key)


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, hidden_size: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(INIT_SCALE * jax.random.normal(rngs.params(), (vocab_size, hidden_size)))


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs)
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Llama(nnx.Module):
    """Llama (Touvron et al., 2023) with grouped-query attention and the embedding used again as the output layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.model = Decoder(config, rngs)
        self.config = config

    def __call__(self, tokens, *, dtype=jnp.float32, implementation="xla", rate: float = 0.0, key=None):
        """tokens i32[B, T] -> logits f32[B, T, V]. `rate` of dropout applies only where a `key` is given."""
        c, length = self.config, tokens.shape[1]
        frequencies = c.rope_theta ** (-jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
        angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
        embedding = self.model.embed_tokens.weight[...].astype(dtype)
        keys = [None] * (c.num_layers + 1) if key is None else jax.random.split(key, c.num_layers + 1)
        x = dropout(embedding[tokens], rate, keys[-1])
        for i, layer in enumerate(self.model.layers):
            x = layer(x, jnp.cos(angles), jnp.sin(angles), implementation, rate, keys[i])
        return jnp.einsum("btd,vd->btv", self.model.norm(x), embedding, preferred_element_type=jnp.float32)


# ---- Training ---------------------------------------------------------------------------------------------------


def mean_loss(graph, params, windows, *, dtype, implementation, rate: float = 0.0, key=None):
    """Mean next-token cross-entropy, in nats, over windows i32[B, T + 1]."""
    model = nnx.merge(graph, params)
    logits = model(windows[:, :-1], dtype=dtype, implementation=implementation, rate=rate, key=key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def window_starts(stream_length: int, length: int, batch: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """i32[steps, batch]: starts of windows of length + 1. Every epoch is a shuffled tiling with a random phase."""
    if stream_length < 2 * length + 1:
        raise ValueError(f"the training text has {stream_length} tokens; it needs at least {2 * length + 1}")
    starts: list[np.ndarray] = []
    while sum(map(len, starts)) < steps * batch:
        phase = rng.integers(min(length, stream_length - length))
        starts.append(rng.permutation(np.arange(phase, stream_length - length, length)))
    return np.concatenate(starts)[: steps * batch].reshape(steps, batch).astype(np.int32)


def make_optimizer(args) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019), linear warm-up, cosine to a hundredth; norms are not decayed."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, warmup_steps=max(1, args.steps // 20), decay_steps=args.steps,
        end_value=args.learning_rate / 100,
    )  # fmt: skip
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, b2=0.95, weight_decay=args.weight_decay, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
    )


def make_step(graph, optimizer, stream, length: int, args):
    """Jitted (params, state, starts i32[B], key) -> (params, state, loss): one update, windows cut on the device."""

    @jax.jit
    def step(params, state, starts, key):
        windows = jax.vmap(lambda start: jax.lax.dynamic_slice(stream, (start,), (length + 1,)))(starts)
        loss, grads = jax.value_and_grad(mean_loss, argnums=1)(
            graph, params, windows, dtype=args.dtype, implementation=args.attention, rate=args.dropout, key=key
        )
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def make_evaluate(graph, stream: np.ndarray, length: int, args):
    """params -> mean loss over the stream, cut into windows side by side."""
    length = min(length, len(stream) - 1)
    starts = np.arange(0, len(stream) - length, length)
    windows = np.stack([stream[start : start + length + 1] for start in starts])
    batches = np.array_split(windows, math.ceil(len(windows) / args.batch))
    loss = jax.jit(
        lambda params, batch: mean_loss(graph, params, batch, dtype=args.dtype, implementation=args.attention)
    )

    def evaluate(params) -> float:
        return sum(float(loss(params, batch)) * len(batch) for batch in batches) / len(windows)

    return evaluate


def train(config: ModelConfig, streams: dict[str, np.ndarray], args) -> tuple[Llama, dict]:
    """The network at its lowest validation loss on text, and what the model card says about the training."""
    graph, params = nnx.split(Llama(config, nnx.Rngs(args.seed)), nnx.Param)
    num_params = sum(x.size for x in jax.tree.leaves(params))
    print(f"{num_params:,} parameters; tokens: " + ", ".join(f"{k} {len(v):,}" for k, v in streams.items()))
    optimizer = make_optimizer(args)
    state = optimizer.init(params)
    step = make_step(graph, optimizer, jnp.asarray(streams["train"]), config.max_length, args)
    evaluate = {name: make_evaluate(graph, streams[name], config.max_length, args) for name in ("text", "chat")}
    starts = window_starts(
        len(streams["train"]), config.max_length, args.batch, args.steps, np.random.default_rng(args.seed)
    )
    key = jax.random.key(args.seed)
    best: dict = {"validation_loss": math.inf}
    best_params = params
    began = time.perf_counter()
    for i in range(args.steps):
        params, state, loss = step(params, state, starts[i], jax.random.fold_in(key, i))
        if (i + 1) % args.eval_every and i + 1 != args.steps:
            continue
        losses = {name: evaluate[name](params) for name in evaluate}
        print(
            f"step {i + 1}/{args.steps}: train {float(loss):.4f} val text {losses['text']:.4f} "
            f"val chat {losses['chat']:.4f} ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
        if losses["text"] < best["validation_loss"]:
            best = {"validation_loss": losses["text"], "validation_loss_chat": losses["chat"], "best_step": i + 1}
            best_params = params
    epochs = args.steps * args.batch * config.max_length / len(streams["train"])
    report = {**best, "parameters": num_params, "epochs": epochs}
    return nnx.merge(graph, best_params), report


def sample(model: Llama, tokenizer: Tokenizer, prompt: str, max_tokens: int, key) -> str:
    """The continuation of a prompt, stopped at an end token. The whole sequence runs for each token: slow, plain."""
    graph, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)  # as they are stored
    logits_at = jax.jit(lambda params, tokens, i: nnx.merge(graph, params)(tokens)[0, i])
    ids = tokenizer.encode(prompt).ids
    length = min(len(ids) + max_tokens, model.config.max_length)
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(ids)] = ids
    ends = {tokenizer.token_to_id(token) for token in (END_OF_TEXT, END_OF_TURN)}
    for i in range(len(ids), length):
        probabilities = jax.nn.softmax(logits_at(params, padded, i - 1) / SAMPLING["temperature"])
        order = jnp.argsort(-probabilities)
        kept = jnp.cumsum(probabilities[order]) - probabilities[order] < SAMPLING["top_p"]
        log_probabilities = jnp.where(kept, jnp.log(probabilities[order]), -jnp.inf)
        choice = jax.random.categorical(jax.random.fold_in(key, i), log_probabilities)
        token = int(order[choice])
        if token in ends:
            return tokenizer.decode(padded[0, len(ids) : i].tolist())
        padded[0, i] = token
    return tokenizer.decode(padded[0, len(ids) :].tolist())


# ---- The folder -------------------------------------------------------------------------------------------------


def tensors_of(model: Llama) -> dict[str, np.ndarray]:
    """{Hugging Face tensor name: bf16 array}: the paths of the network's own parameters."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(param[...].astype(jnp.bfloat16)) for path, param in flat}


def config_files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, dict]:
    """{file name: content} of the JSON files that describe the model to whoever loads it."""
    c = config
    end_of_text, end_of_turn = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, END_OF_TURN))
    model = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
        "hidden_act": "silu", "max_position_embeddings": c.max_length, "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta, "rope_scaling": None, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": end_of_text, "eos_token_id": [end_of_text, end_of_turn],
        "pad_token_id": end_of_text, "torch_dtype": "bfloat16",
    }  # fmt: skip
    generation = {
        "bos_token_id": end_of_text, "eos_token_id": [end_of_text, end_of_turn], "pad_token_id": end_of_text,
        "do_sample": True, **SAMPLING,
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT, "additional_special_tokens": SPECIAL_TOKENS[1:], "model_max_length": c.max_length,
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    return {"config.json": model, "generation_config.json": generation, "tokenizer_config.json": tokenizer_config}


def model_card(report: dict) -> str:
    """The folder's README.md, all of its numbers from training.json."""
    r = report
    quoted = {name: text.replace("\n", "\n> ") for name, text in r["samples"].items()}
    return f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# jaxllm's default model

A Llama of {r["parameters"] / 1e6:.2f} million parameters that writes prose, plays and short conversations in the
English of its books. It is here so that jaxllm can be tried, tested and measured without a download. It knows no facts
and follows no instructions: expect style, not sense.

| | |
| --- | --- |
| Validation loss, held-out prose and plays | {r["validation_loss"]:.4f} nats a token, \
{r["bits_per_byte"]:.3f} bits a byte |
| Validation loss, held-out chats | {r["validation_loss_chat"]:.4f} nats a token |
| Training | {r["steps"]:,} steps of {r["batch"]} x {r["length"]:,} tokens, {r["epochs"]:.1f} epochs of \
{r["tokens"]["train"]:,} tokens; weights of step {r["best_step"]:,}, the lowest validation loss |
| Context | {r["length"]:,} tokens, all of it trained |
| Tokenizer | byte-level BPE, {r["vocab_size"]:,} entries, trained on the same text |

## Text

Public-domain books (plain text from Project Gutenberg, its headers removed): Alice's Adventures in Wonderland, The
Wonderful Wizard of Oz, Grimms' Fairy Tales, The Jungle Book, Treasure Island, The Time Machine, The War of the Worlds,
The Adventures of Tom Sawyer, Adventures of Huckleberry Finn, The Adventures of Sherlock Holmes, Pride and Prejudice,
A Tale of Two Cities, Great Expectations, Moby Dick; and scenes from Shakespeare's plays (the "tiny Shakespeare" text of
char-rnn). Two contiguous pieces of each, 4 % in all, are held out; the script's default settings were the best of four
on them. Paragraphs with the period's ugliest slur are left out; other views of the period remain in the text and so in
the model.

Chats are made from the same text: speeches of the plays and direct speech of the novels as turns of user and assistant,
and passages of the books as answers to "Tell me a story." or to their own first sentence. `<|end|>` ends a turn,
`<|endoftext|>` a document.

## Samples

Temperature {SAMPLING["temperature"]}, top-p {SAMPLING["top_p"]}, one draw each. "Once upon a time" goes on:

> **Once upon a time**{quoted["text"]}

Chat, the user says "Where have you been?":

> {quoted["chat"]}

## Made by

```
{r["command"]}
```

Licence of the weights: Apache-2.0. The text is in the public domain.
"""


def write_folder(out: Path, model: Llama, tokenizer: Tokenizer, report: dict) -> None:
    """Writes beside `out`, then renames: a folder of that name is always complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    fresh.chmod(0o755)
    save_file(tensors_of(model), fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)
    tokenizer.save(str(fresh / "tokenizer.json"))
    for name, content in {**config_files(model.config, tokenizer), "training.json": report}.items():
        (fresh / name).write_text(json.dumps(content, indent=2) + "\n")
    (fresh / "README.md").write_text(model_card(report))
    if out.exists():
        old = fresh.with_name(fresh.name + "-old")
        out.rename(old)
        fresh.rename(out)
        shutil.rmtree(old)
    else:
        fresh.rename(out)


# ---- Command line -----------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--books", type=Path, required=True, help="prose, plain or .gz, two blank lines between books")
    parser.add_argument("--plays", type=Path, required=True, help="speeches, plain or .gz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; one that exists is replaced")
    # The best of four settings by validation loss on text: learning rate, decay, dropout of 2e-3, 1.0, 0.2 end at
    # 3.588; 2e-3, 0.3, 0.3 at 3.589; 1e-3, 1.0, 0.2 at 3.596; 2e-3, 2.0, 0.1 at 3.602.
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, each of the model's full context")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--eval-every", type=int, default=250, help="steps between validations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention", choices=["xla", "cudnn"], default="xla", help="cudnn: flash attention on a GPU")
    parser.add_argument("--tiny", action="store_true", help="a toy network, to try the script out")
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "eval_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout is {args.dropout}; it must be at least 0 and below 1")
    args.dtype = jnp.float32 if args.tiny else jnp.bfloat16
    return args


def command_line(args: argparse.Namespace) -> str:
    """The command that repeats this training, with file names for paths."""
    flags = ["--books", args.books.name, "--plays", args.plays.name, "--out", args.out.name]
    for name in ("steps", "batch", "learning_rate", "weight_decay", "dropout", "eval_every", "seed", "attention"):
        flags += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    return shlex.join(["python", "scripts/train_default_model.py", *flags, *(["--tiny"] if args.tiny else [])])


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    config = TINY if args.tiny else ModelConfig()
    documents = make_documents(read_text(args.books), read_text(args.plays), args.seed)
    tokenizer = train_tokenizer(documents["train"], config.vocab_size)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens; the model has {config.vocab_size}")
    streams = {name: tokenize(tokenizer, texts) for name, texts in documents.items()}
    model, report = train(config, streams, args)

    text_bytes = sum(len(text.encode()) for text in documents["text"])
    report["bits_per_byte"] = report["validation_loss"] / math.log(2) * len(streams["text"]) / text_bytes
    report["tokens"] = {name: len(stream) for name, stream in streams.items()}
    report |= {"vocab_size": config.vocab_size, "length": config.max_length}
    report |= {"steps": args.steps, "batch": args.batch, "command": command_line(args)}
    key = jax.random.key(args.seed)
    chat = render_chat([("user", "Where have you been?")]) + "<|assistant|>"
    report["samples"] = {
        "text": sample(model, tokenizer, "Once upon a time", 160, key),
        "chat": sample(model, tokenizer, chat, 160, key),
    }
    write_folder(args.out, model, tokenizer, report)
    print(f"best val text {report['validation_loss']:.4f} at step {report['best_step']}; wrote {args.out.name}")


if __name__ == "__main__":
    main(sys.argv[1:])

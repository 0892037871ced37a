"""The training script: its text, its windows, its network against transformers, and one tiny run end to end."""

import gzip
import importlib.util
import itertools
import json
import random
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

for package in ("optax", "tokenizers"):
    pytest.importorskip(package)

PATH = Path(__file__).parents[2] / "scripts" / "train_default_model.py"
spec = importlib.util.spec_from_file_location("train_default_model", PATH)
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script
spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    """A library of two made-up books (gzip) and a play, a few thousand words from a fixed seed."""
    rng = random.Random(0)
    text = "the a king queen ship whale walked saw said old house in of and then garden river night"
    words = text.split()

    def sentence(n: int = 12) -> str:
        return " ".join(rng.choice(words) for _ in range(n)).capitalize() + "."

    def book() -> str:
        prose = [" ".join(sentence() for _ in range(4)) for _ in range(40)]
        speech = [f'"{sentence(5)}" said he, "{sentence(4)}"' for _ in range(40)]
        return "\n\n".join(prose + speech + prose)

    play = "\n\n".join(f"{rng.choice(['ROMEO', 'JULIET'])}:\n{sentence()}\n{sentence()}" for _ in range(120))
    folder = tmp_path_factory.mktemp("texts")
    books_path, plays_path = folder / "books.txt.gz", folder / "plays.txt"
    books_path.write_bytes(gzip.compress("\n\n\n".join([book(), book()]).encode()))
    plays_path.write_text(play)
    return books_path, plays_path


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory) -> tuple[Path, list[str]]:
    """(folder, printed lines) of a tiny training of 20 steps."""
    books, plays = texts
    out = tmp_path_factory.mktemp("run") / "model"
    out.mkdir()
    (out / "stale").write_text("replaced by the run")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        argv = f"--books {books} --plays {plays} --out {out} --tiny --steps 20 --eval-every 10 --batch 4"
        script.main([*argv.split(), "--learning-rate", "0.01"])
    return out, lines


@pytest.mark.parametrize(
    ("paragraph", "speech"),
    [
        ('"No," said he, "not I."', "No, not I."),
        ('"Perhaps," said she.', "Perhaps."),
        ("He said nothing.", None),
        ('"A quotation that goes on in the next paragraph', None),
        ('"' + "word " * 200 + '"', None),
    ],
)
def test_spoken(paragraph, speech):
    assert script.spoken(paragraph) == speech


def test_speech_of_play():
    assert script.speech_of_play("First Citizen:\nSpeak,\nspeak.") == "Speak,\nspeak."
    assert script.speech_of_play("A stage direction\nwithout a name") is None


def test_held_out_pieces_are_disjoint_and_complete():
    paragraphs = [str(i) for i in range(100)]
    train, held_out = script.split_held_out(paragraphs)
    assert [piece[0] for piece in held_out] == ["30", "80"] and [len(piece) for piece in held_out] == [2, 2]
    assert sorted(itertools.chain(*train, *held_out), key=int) == paragraphs


def test_no_held_out_paragraph_is_trained_on():
    book = "\n\n".join(f'"Speech {i} of the book." said one.' for i in range(200))
    play = "\n\n".join(f"NAME:\nSpeech {i} of the play." for i in range(200))
    documents = script.make_documents(book, play, seed=0)
    for kind in ("book", "play"):
        numbers = {
            name: set(re.findall(rf"Speech (\d+) of the {kind}", "\n".join(texts))) for name, texts in documents.items()
        }
        assert numbers["text"] == {"60", "61", "62", "63", "160", "161", "162", "163"}
        assert numbers["chat"] == numbers["text"]
        assert not numbers["train"] & numbers["text"] and len(numbers["train"]) == 192


def test_dialogues_alternate_and_break_at_silence():
    chats = script.dialogues("play", ["a", "b", "c", None, "d", None, "e", "f"], random.Random(0))
    spoken = [re.findall(r"<\|(user|assistant)\|>(\w)<\|end\|>", chat) for chat in chats]
    assert spoken == [[("user", "a"), ("assistant", "b")], [("user", "e"), ("assistant", "f")]]


def test_every_epoch_covers_the_stream_once():
    starts = script.window_starts(1000, length=100, batch=3, steps=3, rng=np.random.default_rng(0))
    assert starts.shape == (3, 3) and starts.min() >= 0 and starts.max() + 101 <= 1000
    assert len(set((starts.ravel() // 100).tolist())) == 9  # nine windows of one epoch, none twice


def test_a_text_too_short_is_refused():
    with pytest.raises(ValueError, match="has 100 tokens; it needs at least 129"):
        script.window_starts(100, length=64, batch=1, steps=1, rng=np.random.default_rng(0))


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--dropout", "1"]])
def test_bad_arguments_name_the_option(flags, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--books", "b", "--plays", "p", "--out", "o", *flags])
    assert f"{flags[0]} is {flags[1]}" in capsys.readouterr().err


def test_tokenizer_is_deterministic_and_lossless():
    texts = ["the whale and the king walked in the garden " * 20, "<|user|>never trained on<|end|>"]
    first, second = (script.train_tokenizer(texts, 300) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert [first.token_to_id(token) for token in script.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    text = "Naïve 漢字 🙂\n\ttabs  and spaces "
    assert first.decode(first.encode(text).ids) == text


def test_loss_falls_and_is_the_card_s(run):
    out, lines = run
    steps = [re.search(r"train ([\d.]+) val text ([\d.]+)", line) for line in lines if line.startswith("step")]
    assert len(steps) == 2 and float(steps[1][1]) < float(steps[0][1]) < np.log(script.TINY.vocab_size)
    best = re.search(r"best val text ([\d.]+)", lines[-1])[1]
    assert f"| {best} nats a token" in (out / "README.md").read_text()
    assert f"{json.loads((out / 'training.json').read_text())['validation_loss']:.4f}" == best


def test_the_folder_is_replaced_whole(run):
    out, _ = run
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training.json",
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_network_is_transformers_llama(run):
    torch = pytest.importorskip("torch")
    from flax import nnx
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    out, _ = run
    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model = script.Llama(script.TINY, nnx.Rngs(1))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    tensors = load_file(out / "model.safetensors")
    assert len(flat) == len(tensors)
    for path, param in flat:
        param[...] = jnp.asarray(tensors[".".join(map(str, path))].astype(np.float32))
    nnx.update(model, nnx.from_flat_state(flat))
    tokens = np.random.default_rng(0).integers(0, script.TINY.vocab_size, (2, 33))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(model(jnp.asarray(tokens))), expected, atol=2e-5)

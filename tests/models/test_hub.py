import huggingface_hub
import pytest

from jaxllm.models import resolve


@pytest.fixture
def snapshots(monkeypatch, tmp_path):
    """A stand-in for the hub: a dict of file names, and a log of the patterns asked for."""
    from fnmatch import fnmatch

    files, asked = set(), []

    def snapshot_download(repo_id, revision, cache_dir, allow_patterns):
        asked.append((repo_id, revision, cache_dir))
        for name in files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return files, asked, tmp_path


def test_a_folder_is_itself(tmp_path):
    (tmp_path / "config.json").touch()
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path


def test_a_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"without a config\.json"):
        resolve(tmp_path)
    assert resolve(tmp_path, tokenizer_only=True) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./no/such/folder", "a/b/c", "with space/model"])
def test_neither_folder_nor_id(name):
    with pytest.raises(FileNotFoundError, match="neither a folder nor an id"):
        resolve(name)


def test_a_file_is_not_a_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(FileNotFoundError, match="is a file; pass the folder"):
        resolve(file)


def test_without_network_it_says_what_was_tried_and_how_to_pass_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        resolve("nobody/no-such-model", revision="v1", download_dir=tmp_path)
    for words in ("'nobody/no-such-model'", "Hugging Face hub at revision 'v1' failed", "path of its folder"):
        assert words in str(error.value)


def test_safetensors_are_fetched_and_nothing_beside_them(snapshots):
    files, asked, folder = snapshots
    files |= {"config.json", "tokenizer.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    files |= {"modules.json", "1_Pooling/config.json"}
    files |= {"pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "README.md"}
    assert resolve("some/model", "main", "/cache") == folder
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "config.json",
        "tokenizer.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "1_Pooling/config.json",
    }
    assert asked == [("some/model", "main", "/cache")]


def test_bin_is_fetched_where_there_is_nothing_else(snapshots):
    files, _, folder = snapshots
    files |= {"config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "training_args.bin"}
    resolve("some/model")
    assert {path.name for path in folder.iterdir()} == files - {"training_args.bin"}


def test_a_tokenizer_alone(snapshots):
    files, asked, folder = snapshots
    small = {"tokenizer.model", "tokenizer_config.json", "tokenization_theirs.py"}
    files |= small | {"model.safetensors"}
    resolve("some/tokenizer", tokenizer_only=True)
    assert {path.name for path in folder.iterdir()} == small and len(asked) == 1

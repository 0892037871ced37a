"""PyTorch's files: what torch.save writes is read as it is, and what a pickle may not do is refused."""

import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from jaxllm.models import CheckpointError, ModelConfig, build, load_params
from jaxllm.models.torch_pickle import Storage, TorchTensor, UnsafePickleError, read_index, read_tensor


def write_archive(path, pickled, **entries):
    """A file with the layout of torch.save, of a pickle's bytes and further entries."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return path


def read(path):
    return {name: read_tensor(path, tensor) for name, tensor in read_index(path).items()}


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_a_call_is_refused_by_name_and_not_made(tmp_path):
    import os

    target = tmp_path / "made"
    for function in (os.mkdir, exec, eval, getattr, pickle.loads, np.ones):
        path = write_archive(tmp_path / "bad.bin", pickle.dumps({"a": Calls(function, str(target))}, protocol=2))
        with pytest.raises(UnsafePickleError, match=rf"asks for \w+\.{function.__name__}.*not run"):
            read_index(path)
        assert not target.exists()


def test_dotted_names_reach_no_further(tmp_path):
    # Protocol 4 would resolve "OrderedDict.fromkeys" to an attribute of an allowed class.
    pickled = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93."
    with pytest.raises(UnsafePickleError, match=r"OrderedDict\.fromkeys"):
        read_index(write_archive(tmp_path / "bad.bin", pickled))


def test_the_loader_says_so_too(tmp_path):
    write_archive(tmp_path / "pytorch_model.bin", pickle.dumps({"a": Calls(eval, "1")}, protocol=2))
    from tests.models.test_config import MINIMAL

    with pytest.raises(CheckpointError, match="eval"):
        load_params(build(ModelConfig.from_hf(MINIMAL)), tmp_path, progress=False)


@pytest.mark.parametrize("content", [[1], {"a": 1}, {1: OrderedDict()}])
def test_not_a_dict_of_tensors(tmp_path, content):
    with pytest.raises(ValueError, match="expected a"):
        read_index(write_archive(tmp_path / "odd.bin", pickle.dumps(content, protocol=2)))


def test_a_view_outside_of_its_storage_is_refused(tmp_path):
    path = write_archive(tmp_path / "x.bin", b"", **{"data/0": np.arange(6, dtype=np.float32).tobytes()})
    storage = Storage("0", np.dtype(np.float32), 6)
    inside = TorchTensor(storage, 1, (2, 2), (3, 1))
    np.testing.assert_array_equal(read_tensor(path, inside), [[1, 2], [4, 5]])
    for outside in (TorchTensor(storage, 2, (2, 2), (3, 1)), TorchTensor(storage, 6, (1,), (1,))):
        with pytest.raises(ValueError, match="corrupt"):
            read_tensor(path, outside)
    with pytest.raises(ValueError, match="storage 1"):
        read_tensor(path, TorchTensor(Storage("1", np.dtype(np.float32), 6), 0, (1,), (1,)))


def test_truncated_and_foreign_files(tmp_path):
    path = write_archive(tmp_path / "x.bin", pickle.dumps({}, protocol=2))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"truncated, corrupt or not from torch\.save"):
        read_index(path)
    write_archive(path, pickle.dumps({"a": 1}, protocol=2)[:-4])
    with pytest.raises(ValueError, match="corrupt"):
        read_index(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(ValueError, match=r"without data\.pkl"):
        read_index(path)


def damage(data: bytearray, kind: str) -> None:
    """Spoils an archive of data.pkl, byteorder and data/0, in place."""
    directory = data.index(b"PK\x01\x02")
    last = data.rindex(b"PK\x01\x02")
    match kind:
        case "local header":
            data[:4] = b"XXXX"
        case "method":
            data[directory + 10 : directory + 12] = b"\x63\x00"
        case "deflated":
            data[directory + 10 : directory + 12] = b"\x08\x00"
        case "encrypted":
            data[directory + 8] |= 1
        case "version":
            data[directory + 6] = 99
        case "name":
            data[directory + 9] |= 8  # in UTF-8
            data[directory + 46] = 0xFF
        case "directory":
            data[directory : directory + 4] = b"XXXX"
        case "byteorder":
            data[data.index(b"little")] ^= 1
        case "storage":
            data[last + 10 : last + 12] = b"\x63\x00"


@pytest.mark.parametrize(
    "kind", ["local header", "method", "deflated", "encrypted", "version", "name", "directory", "byteorder", "storage"]
)
def test_a_damaged_archive_is_named_with_the_remedy(tmp_path, kind):
    storage = np.arange(4, dtype=np.float32).tobytes()
    pickled = pickle.dumps({}, protocol=2)
    path = write_archive(tmp_path / "x.bin", pickled, **{"byteorder": b"little", "data/0": storage})
    assert read_index(path) == {}
    data = bytearray(path.read_bytes())
    damage(data, kind)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.bin is .*corrupt.*download or save it again"):
        read_index(path)
        read_tensor(path, TorchTensor(Storage("0", np.dtype(np.float32), 4), 0, (4,), (1,)))


def test_a_missing_file_and_one_that_may_not_be_read_stay_what_they_are(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("not yours")

    with pytest.raises(FileNotFoundError):
        read_index(tmp_path / "missing.bin")
    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(PermissionError):
        read_index(tmp_path / "missing.bin")


def test_format_before_1_6_is_refused_with_the_remedy(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "old.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before 1\.6.*torch\.save\(torch\.load"):
        read_index(path)


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    values = torch.arange(-3, 9).reshape(3, 4).to(getattr(torch, dtype))
    torch.save({"a": values}, tmp_path / "x.bin")
    found = read(tmp_path / "x.bin")["a"]
    assert found.dtype.name == dtype
    np.testing.assert_array_equal(found.astype(np.float64), values.to(torch.float64).numpy())


def test_strides_offsets_shared_storages_and_parameters(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "transposed": base.T,
        "columns": base[1:, 2::2],
        "row": base[2],
        "expanded": base[:1].expand(3, 6),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base + 1),
    }
    torch.save(tensors, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:  # the views are saved as views of one storage
        assert sum("/data/" in name for name in archive.namelist()) == 4
    found = read(tmp_path / "x.bin")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.detach().numpy())
        assert found[name].shape == tuple(tensor.shape) and found[name].flags.c_contiguous


def test_state_dict_with_its_metadata(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2)
    torch.save(layer.state_dict(), tmp_path / "x.bin")
    found = read(tmp_path / "x.bin")
    np.testing.assert_array_equal(found["weight"], layer.weight.detach().numpy())
    np.testing.assert_array_equal(found["bias"], layer.bias.detach().numpy())


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_whole_checkpoint_as_pytorch_writes_it(tmp_path, file_format, shards, dtype):
    pytest.importorskip("torch")
    import json

    from tests.checkpoints import save_checkpoint, tiny_llama

    reference = tiny_llama(attention_bias=True)
    save_checkpoint(reference, tmp_path, dtype=dtype, file_format=file_format, shards=shards)
    network = build(ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text())))
    assert network.dtype.name == dtype
    params = load_params(network, tmp_path, progress=False)
    attention = reference.model.layers[1].self_attn
    for leaf in ("weight", "bias"):
        parts = [getattr(projection, leaf) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
        expected = np.concatenate([part.detach().numpy() for part in parts]).astype(network.dtype)
        np.testing.assert_array_equal(params["layers"]["1"]["attention"]["qkv"][leaf], expected)


def test_corrupted_bytes_of_a_tensor_are_noticed(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(np.ones(8, np.float32).tobytes()) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"corrupt \(storage 0"):
        read(path)

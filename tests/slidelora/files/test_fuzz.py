"""Random changes to files: a loader loads the file completely, or names what is wrong and changes nothing."""

import json
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from adapter_files import Tiny, drop_metadata
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from injected_models import count_hooks
from peft import LoraConfig, get_peft_model
from torch import nn

import slidelora
from slidelora.injection import slide_layers

EXPERTS = ["text", "image", "shared"]
FILES = ("adapter_config.json", "adapter_model.safetensors")
fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def load_pretrained(model: nn.Module, directory: Path) -> None:
    slidelora.load_pretrained(model, directory)


def write_pretrained(directory: Path) -> None:
    slidelora.save_pretrained(slidelora.inject(Tiny(), experts=EXPERTS, r=2, gate_hidden=3), directory)


def import_peft(model: nn.Module, directory: Path) -> None:
    slidelora.import_peft(model, {"text": directory})


def write_peft(directory: Path) -> None:
    get_peft_model(Tiny(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(directory)


Load = Callable[[nn.Module, Path], None]
LOADERS: list[tuple[Load, Callable[[Path], None]]] = [(load_pretrained, write_pretrained), (import_peft, write_peft)]
each_loader = pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader[0].__name__)


@cache
def written(write: Callable[[Path], None]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory))
        return {file: (Path(directory) / file).read_bytes() for file in FILES}


def fresh(write: Callable[[Path], None], path: Path) -> Path:
    directory = path / "adapter"
    directory.mkdir(exist_ok=True)
    for file, content in written(write).items():
        (directory / file).write_bytes(content)
    return directory


def snapshot(model: nn.Module) -> tuple[dict[str, bytes], list[int], list[bool], int]:
    state = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    trains = [parameter.requires_grad for parameter in model.parameters()]
    return state, [id(module) for module in model.modules()], trains, count_hooks(model)


def loads_or_says_why(load: Load, directory: Path) -> bool:
    """Return whether it loaded."""
    model = Tiny()
    before = snapshot(model)
    try:
        load(model, directory)
    except (ValueError, FileNotFoundError, TypeError) as error:
        assert str(directory) in str(error)
        assert snapshot(model) == before and set(vars(model)) == set(vars(Tiny()))
        return False
    assert set(slide_layers(model)) <= {"q_proj", "v_proj"} and slide_layers(model)
    assert snapshot(slidelora.remove(model)) == before
    return True


numbers = st.integers() | st.sampled_from([-1, 0, 1, 2, 10**12, 2**63, 10**400]) | st.floats()
texts = st.text() | st.sampled_from(
    ["q_proj", ".*", "all-linear", "(?i)q", "a)(b", "a{99999999999}", "(" * 500 + ")" * 500, "\\1", "../up", "sequence"]
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@each_loader
@fuzz
@given(data=st.data())
def test_a_configuration_with_changed_values(loader: Any, tmp_path: Path, data: st.DataObject) -> None:
    load, write = loader
    path = drop_metadata(fresh(write, tmp_path)) / "adapter_config.json"
    config = json.loads(path.read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config)) | texts, min_size=1, max_size=2)):
        config[key] = data.draw(values)
    path.write_text(json.dumps(config))
    loads_or_says_why(load, path.parent)


@each_loader
@fuzz
@given(content=st.binary() | texts.map(str.encode) | values.map(json.dumps).map(str.encode))
@example(content=b"[" * 100_000)
@example(content=b"\xff")
@example(content=b'{"r": 1' + b"0" * 5000 + b"}")
def test_a_configuration_with_any_content(loader: Any, tmp_path: Path, content: bytes) -> None:
    load, write = loader
    path = drop_metadata(fresh(write, tmp_path)) / "adapter_config.json"
    path.write_bytes(content)
    assert not loads_or_says_why(load, path.parent)


@each_loader
@fuzz
@given(data=st.data())
def test_truncated_and_overwritten_bytes(loader: Any, tmp_path: Path, data: st.DataObject) -> None:
    load, write = loader
    directory = fresh(write, tmp_path)
    path = directory / data.draw(st.sampled_from(FILES))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for offset in data.draw(st.lists(st.integers(0, max(len(content) - 1, 0)), max_size=4)):
        content[offset : offset + 1] = data.draw(st.binary(min_size=1, max_size=3))
    path.write_bytes(content)
    loads_or_says_why(load, directory)


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@each_loader
@fuzz
@given(data=st.data())
def test_a_header_with_false_claims(loader: Any, tmp_path: Path, data: st.DataObject) -> None:
    load, write = loader
    path = fresh(write, tmp_path) / "adapter_model.safetensors"
    claims, content = header(path)
    name = data.draw(st.sampled_from(sorted(set(claims) - {"__metadata__"})))
    change = data.draw(st.sampled_from(["shape", "dtype", "data_offsets", "name", "metadata", "none"]))
    if change == "shape":
        claims[name]["shape"] = data.draw(st.lists(st.integers(0, 2**64) | st.sampled_from([10**9, 2**40]), max_size=4))
    elif change == "dtype":
        claims[name]["dtype"] = data.draw(st.sampled_from(["I32", "BOOL", "F8_E4M3", "BF16", "F64", "U64", "F4", "X"]))
    elif change == "data_offsets":
        claims[name]["data_offsets"] = data.draw(st.lists(st.integers(0, 2**64), min_size=2, max_size=2))
    elif change == "name":
        claims[data.draw(texts)] = claims.pop(name)
    elif change == "metadata":
        claims["__metadata__"] = data.draw(st.dictionaries(st.sampled_from(["config", "replaces"]) | texts, texts))
    encoded = json.dumps(claims).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content)
    assert loads_or_says_why(load, path.parent) or change != "none"


@each_loader
def test_integers_are_not_accepted_as_weights(loader: Any, tmp_path: Path) -> None:
    load, write = loader
    path = fresh(write, tmp_path) / "adapter_model.safetensors"
    claims, content = header(path)
    name = next(name for name in claims if name != "__metadata__")
    claims[name]["dtype"] = "I32"
    encoded = json.dumps(claims).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content)
    with pytest.raises(ValueError, match="of dtype I32, expected one of"):
        load(Tiny(), path.parent)


@each_loader
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_missing_file(loader: Any, tmp_path: Path, file: str, kind: str) -> None:
    load, write = loader
    path = fresh(write, tmp_path) / file
    path.unlink()
    if kind == "folder":
        path.mkdir()
    with pytest.raises(FileNotFoundError, match=f"adapter has no {file}"):
        load(Tiny(), path.parent)


def test_a_gate_larger_than_its_file_is_never_allocated(tmp_path: Path) -> None:
    path = drop_metadata(fresh(write_pretrained, tmp_path)) / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "gate_hidden": 2**31 - 1}))  # of 34 GB
    with pytest.raises(ValueError, match=r"slidelora_gate.hidden.weight of shape \(3, 4\), expected \(2147483647, 4\)"):
        slidelora.load_pretrained(Tiny(), path.parent)

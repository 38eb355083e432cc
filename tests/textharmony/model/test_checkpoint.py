"""A model's folder: what is written, and what is refused when it is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import textharmony.model.checkpoint
from textharmony.config import ModelConfig
from textharmony.model.checkpoint import load_folder, load_weights, save_folder, weight_files
from textharmony.pipeline import TextHarmony

Make = Callable[..., TextHarmony]


class Small(nn.Module):
    """Tied embeddings, a matrix in half precision, and a buffer of integers."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3, bias=False, dtype=torch.bfloat16)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor([3]))


NAMES = ["embed.weight", "inner.weight", "count", "head.weight"]


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """In fp32, for all names but the second one of the tied embeddings."""
    return {"embed.weight": torch.randn(5, 3), "inner.weight": torch.randn(3, 3), "count": torch.tensor([7])}


def write(folder: Path, *files: dict[str, Tensor]) -> list[Path]:
    paths = [folder / f"{i}.safetensors" for i in range(len(files))]
    for path, tensors in zip(paths, files, strict=True):
        save_file(tensors, path)
    return paths


# Weights


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("tied", ["embed.weight", "head.weight"])
def test_weights_go_into_the_model(tensors: dict[str, Tensor], tmp_path: Path, tied: str, assign: bool) -> None:
    """Tied embeddings are in the file under either name; a tensor takes the model's dtype."""
    with torch.device("meta" if assign else "cpu"):
        model = Small()
    before = dict(model.named_parameters(remove_duplicate=False))
    written = {tied if name == "embed.weight" else name: tensor for name, tensor in tensors.items()}
    load_weights(model, write(tmp_path, written), NAMES, assign=assign)
    assert torch.equal(model.embed.weight, tensors["embed.weight"])
    assert torch.equal(model.head.weight, tensors["embed.weight"])
    assert torch.equal(model.inner.weight, tensors["inner.weight"].bfloat16())
    assert model.inner.weight.dtype == torch.bfloat16 and model.count.tolist() == [7]
    assert all((parameter is before[name]) != assign for name, parameter in model.named_parameters())


def test_weights_may_be_in_several_files(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    model, first = Small(), tensors.popitem()
    load_weights(model, write(tmp_path, dict([first]), tensors), NAMES)
    assert model.count.tolist() == [7] and torch.equal(model.embed.weight, tensors["embed.weight"])


def test_weights_that_stay_elsewhere_are_left_alone(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    model = Small()
    kept = model.inner.weight.clone()
    del tensors["inner.weight"]
    load_weights(model, write(tmp_path, tensors), [name for name in NAMES if name != "inner.weight"])
    assert torch.equal(model.inner.weight, kept) and torch.equal(model.embed.weight, tensors["embed.weight"])


def test_loaded_weights_are_no_view_of_the_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Small()
    (file,) = write(tmp_path, tensors)
    load_weights(model, [file], NAMES, assign=True)
    with file.open("r+b") as stream:  # as another save might
        stream.seek(-200, 2)
        stream.write(b"\xff" * 200)
    assert torch.equal(model.embed.weight, tensors["embed.weight"])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": None}, r"0\.safetensors does not fit the model: it lacks count$"),
        ({"embed.weight": None}, r"it lacks embed\.weight and 1 more"),
        ({"embed.weight": None, "inner.weight": None}, "it lacks embed.weight and 2 more"),
        ({"other.weight": torch.ones(2)}, r"0\.safetensors does not fit the model: it has other\.weight, which"),
        ({"inner.weight": torch.ones(3, 4)}, r"0\.safetensors does not fit the model: (.|\n)*inner\.weight"),
        ({"embed.weight": torch.ones(6, 3)}, r"embed\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tensors: dict[str, Tensor], tmp_path: Path, change: dict[str, Any], message: str, assign: bool
) -> None:
    written = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        load_weights(Small(), write(tmp_path, written), NAMES, assign=assign)


def test_weights_that_the_model_does_not_load_are_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has inner\.weight, which the model lacks or does not load"):
        load_weights(Small(), write(tmp_path, tensors), [name for name in NAMES if name != "inner.weight"])


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_of_weights_cut_short_is_named(tensors: dict[str, Tensor], tmp_path: Path, share: float) -> None:
    (file,) = write(tmp_path, tensors)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"0\.safetensors is cut short, or save_pretrained did not write it"):
        load_weights(Small(), [file], NAMES)


# Folders


@pytest.fixture
def folder(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    save_folder(tmp_path / "deep" / "model", config, tokenizer, tensors, None, "5GB")
    return tmp_path / "deep" / "model"


def test_a_folder_is_a_few_plain_files(folder: Path, tensors: dict[str, Tensor]) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    assert json.loads((folder / "config.json").read_text())["image_size"] == [32, 128]
    found = load_file(folder / "model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)


def test_a_folder_holds_configuration_and_tokenizer(
    folder: Path, config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    found_config, found_tokenizer = load_folder(folder)
    assert found_config == config and found_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_a_tied_tensor_is_written_once_and_in_the_dtype_that_is_asked_for(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = Small()
    save_folder(tmp_path, config, tokenizer, model.state_dict(keep_vars=True), torch.float16, "5GB")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == {"embed.weight", "inner.weight", "count"}
    assert found["count"].dtype == torch.int64  # integers stay
    assert torch.equal(found["embed.weight"], model.embed.weight.half())
    assert torch.equal(found["inner.weight"], model.inner.weight.half())


def test_large_weights_are_written_in_shards(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tensors = {name: torch.randn(200) for name in "abc"}
    save_folder(tmp_path, config, tokenizer, tensors, None, "1KB")
    files = weight_files(tmp_path)
    assert len(files) == 3 and not (tmp_path / "model.safetensors").exists()
    load_folder(tmp_path)
    model = nn.ParameterDict({name: torch.zeros(200) for name in "abc"})
    load_weights(model, files, list("abc"))
    assert all(torch.equal(model[name], tensors[name]) for name in "abc")
    save_folder(tmp_path, config, tokenizer, tensors, None, "5GB")  # replaces the shards
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_shard_that_is_missing_is_named(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tensors = {name: torch.randn(200) for name in "abc"}
    save_folder(tmp_path, config, tokenizer, tensors, None, "1KB")
    gone = weight_files(tmp_path)[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        weight_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys("abc", "../../etc/passwd")}))
    with pytest.raises(FileNotFoundError, match="passwd"):
        weight_files(tmp_path)
    for damaged in ("{", "{}", "[1]"):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"index\.json is cut short"):
            weight_files(tmp_path)


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_folder(folder / "nowhere")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).rename(folder / "aside")
        with pytest.raises(FileNotFoundError, match=name):
            load_folder(folder)
        (folder / "aside").rename(folder / name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_cut_short_is_named(folder: Path, name: str, share: float) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError) as error:
        load_folder(folder)
    assert str(folder / name) in str(error.value)


@pytest.mark.parametrize("change", [{"colour": 1}, {"vision": None}, {"layout": {"slots": 6, "shape": 2}}])
def test_a_configuration_of_another_form_is_named(folder: Path, change: dict[str, object]) -> None:
    values = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(ValueError, match=r"config\.json .*(colour|vision|shape)"):
        load_folder(folder)


def test_an_interrupted_save_keeps_the_model_before(
    folder: Path,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(textharmony.model.checkpoint, "save_file", interrupt)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(KeyboardInterrupt):
        save_folder(folder, config, tokenizer, other, None, "5GB")
    assert torch.equal(load_file(folder / "model.safetensors")["embed.weight"], tensors["embed.weight"])
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]

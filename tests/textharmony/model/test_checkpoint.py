"""A model's folder: what is written, and what is refused when it is read."""

import json
import os
import stat
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
from textharmony.manifest import write_manifest
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
    for _ in range(2):  # against the manifest, and as it is
        with pytest.raises(ValueError) as error:
            load_folder(folder)
        assert str(folder / name) in str(error.value)
        write_manifest(folder)


@pytest.mark.parametrize("change", [{"colour": 1}, {"vision": None}, {"layout": {"slots": 6, "shape": 2}}])
def test_a_configuration_of_another_form_is_named(folder: Path, change: dict[str, object]) -> None:
    values = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    write_manifest(folder)
    with pytest.raises(ValueError, match=r"config\.json .*(colour|vision|shape)"):
        load_folder(folder)


# Saving over a model


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def test_an_interrupted_save_keeps_the_model_before(
    folder: Path,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step in ("save_file", "replace_file", "write_manifest"):
        with monkeypatch.context() as patched:
            patched.setattr(textharmony.model.checkpoint, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                save_folder(folder, config, tokenizer, other(tensors), None, "5GB")
        load_folder(folder)
        assert torch.equal(load_file(folder / "model.safetensors")["embed.weight"], tensors["embed.weight"])
        assert not (folder / ".saving").exists() and [entry.name for entry in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("moved", [0, 1, 2, 4])
def test_a_save_that_is_killed_while_it_moves_files_is_finished_by_the_next_load(
    folder: Path,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    moved: int,
) -> None:
    replace, moves = Path.replace, []

    def kill(path: Path, target: Path) -> Path:
        if path.parent.name == ".saving" and target.parent == folder:
            moves.append(path.name)
            if len(moves) > moved:
                raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        save_folder(folder, config, tokenizer, other(tensors), None, "0.03KB")  # in shards
    monkeypatch.undo()
    load_folder(folder)
    found = load_file(weight_files(folder)[0]) | load_file(weight_files(folder)[1]) | load_file(weight_files(folder)[2])
    assert all(torch.equal(found[name], tensor + 1) for name, tensor in tensors.items())
    assert not (folder / "model.safetensors").exists() and not (folder / ".saving").exists()


def test_what_a_killed_save_left_is_passed_over_and_replaced(
    folder: Path, config: ModelConfig, tokenizer: PreTrainedTokenizerFast, tensors: dict[str, Tensor]
) -> None:
    (folder / ".saving").mkdir()
    (folder / ".saving" / "model.safetensors").write_bytes(b"part")
    load_folder(folder)
    save_folder(folder, config, tokenizer, other(tensors), None, "5GB")
    load_folder(folder)
    assert not (folder / ".saving").exists()


def test_files_of_an_earlier_model_go_and_documents_stay(
    folder: Path, config: ModelConfig, tokenizer: PreTrainedTokenizerFast, tensors: dict[str, Tensor]
) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("a model card")
    write_manifest(folder)
    save_folder(folder, config, tokenizer, tensors, None, "5GB")
    load_folder(folder)
    assert not (folder / "chat_template.jinja").exists() and (folder / "README.md").read_text() == "a model card"


def test_a_damaged_model_can_be_saved_over(
    folder: Path, config: ModelConfig, tokenizer: PreTrainedTokenizerFast, tensors: dict[str, Tensor]
) -> None:
    for name in ("manifest.json", "config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    save_folder(folder, config, tokenizer, tensors, None, "5GB")
    load_folder(folder)


def test_a_folder_of_something_else_is_left_alone(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis\.tex is no file of an earlier model, expected an empty folder"):
        save_folder(tmp_path, config, tokenizer, tensors, None, "5GB")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_gives(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, tensors: dict[str, Tensor], tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        save_folder(tmp_path / "model", config, tokenizer, tensors, None, "0.03KB")
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    assert len(modes) > 5 and set(modes.values()) == {0o666 & ~umask}

"""Two hundred ways to damage an adapter's folder: each is refused, the file is named, and the model is as before."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from adapter_files import Tiny

import slidelora

FILES = ("adapter_config.json", "adapter_model.safetensors")
FLIPS = 180
Attack = Callable[[Path, Path], object]  # of a file and of the same file of another adapter


def save(folder: Path, seed: int, **fields: object) -> Path:
    torch.manual_seed(seed)
    slidelora.save_pretrained(slidelora.inject(Tiny(), gate_hidden=3, **{"r": 2, **fields}), folder)
    return folder


def save_peft(folder: Path, seed: int, **fields: object) -> Path:
    torch.manual_seed(seed)
    model = slidelora.inject(Tiny(), gate="given", **{"r": 2, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    slidelora.export_peft(model, folder, gates="text")
    return folder


def load(folder: Path) -> None:
    slidelora.load_pretrained(Tiny(), folder)


def load_peft(folder: Path) -> None:
    slidelora.import_peft(Tiny(), {"text": folder})


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def attacks(rng: random.Random) -> Iterator[tuple[str, Attack]]:
    for name in rng.choices(FILES, k=FLIPS):
        yield name, lambda path, other: flip(path, rng)
    for name in FILES:
        yield name, lambda path, other: path.write_bytes(other.read_bytes())
        yield name, lambda path, other: path.write_text("{}")
        yield name, lambda path, other: path.write_bytes(b"")
        yield name, lambda path, other: path.unlink()
        for share in (0.3, 0.6, 0.9, 0.99):
            yield (
                name,
                lambda path, other, share=share: path.write_bytes(
                    path.read_bytes()[: int(share * path.stat().st_size)]
                ),
            )
        yield name, lambda path, other: path.write_bytes(path.read_bytes() + b"}")
        yield name, lambda path, other: path.write_bytes((path.parent / FILES[path.name == FILES[0]]).read_bytes())


@pytest.mark.parametrize(("write", "read"), [(save, load), (save_peft, load_peft)], ids=["native", "peft"])
def test_two_hundred_damaged_adapters_are_refused(
    tmp_path: Path, write: Callable[..., Path], read: Callable[[Path], None]
) -> None:
    folder, other = write(tmp_path / "one", 0), write(tmp_path / "other", 1, r=3)
    whole = {name: (folder / name).read_bytes() for name in FILES}
    accepted, unnamed, count = [], [], 0
    for name, attack in attacks(random.Random(0)):
        attack(folder / name, other / name)
        try:
            read(folder)
            accepted.append(name)
        except (ValueError, FileNotFoundError) as error:
            if name not in str(error) or str(folder) not in str(error) or "\n" in str(error):
                unnamed.append((name, str(error)))
        (folder / name).write_bytes(whole[name])
        count += 1
    read(folder)
    assert count >= 200 and not accepted and not unnamed

"""Whether an installed distribution works: adapters alone, or the embedded model, too.

    python tests/peers/smoke.py slidelora
    python tests/peers/smoke.py textharmony

It imports what the Python that runs it has installed, and nothing of the repository. `release.py` and `versions.py`
run it outside of the repository. The exit code is 1 if something fails.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


def check_slidelora() -> str:
    """Inject, train a step, save, load, merge and remove, on plain torch."""
    import torch
    from torch import nn

    import slidelora

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).eval()

    x, gates = torch.ones(2, 4), ["plus", "minus"]
    base = make()(x)
    model = slidelora.inject(make(), experts=["plus", "minus"], r=2, gate="given")
    optimizer = torch.optim.Adam(slidelora.param_groups(model, lr=0.1))
    with slidelora.gates(model, gates):
        assert torch.equal(model(x), base)
        for _ in range(3):
            optimizer.zero_grad()
            loss = (model(x) - torch.tensor([[1.0], [-1.0]])).square().mean()
            loss.backward()
            optimizer.step()
        trained = model(x)
    assert (trained - base).norm() > 0.01
    with tempfile.TemporaryDirectory() as folder:
        slidelora.save_pretrained(model, folder)
        again = slidelora.load_pretrained(make(), folder)
    with slidelora.gates(again, gates):
        assert torch.equal(again(x), trained)
    merged = slidelora.merge_and_unload(again, "plus")(x)[0]
    assert (merged - trained[0]).norm() < 1e-5 * trained[0].norm()
    assert torch.equal(slidelora.remove(model)(x), base)
    return f"torch {torch.__version__}, safetensors {version('safetensors')}, loss {loss.item():.3f}"


def check_textharmony() -> str:
    """Read the pictures in the package, draw words, which model and PP-OCR read, locate one of them, and edit it."""
    from importlib.resources import files

    from textharmony import TextHarmony
    from textharmony.evaluate.ocr import recognise
    from textharmony.evaluate.table import same_text

    model = TextHarmony.from_pretrained("tiny")
    paths = sorted(Path(str(files("textharmony") / "pictures_to_read")).glob("*.*"))
    expected = [path.stem.partition("-")[2] for path in paths]
    read = sum(text == word for text, word in zip(model.read([*map(str, paths)]), expected))
    words = ["HELLO", "2026", "OPEN"]
    pictures = model.draw([f'"{word}" in red on white' for word in words], seed=3)
    drawn = sum(text == word for text, word in zip(model.read(pictures), words))
    judged = sum(same_text(recognise(picture), word) for picture, word in zip(pictures, words))
    assert model.locate(pictures[0], words[0])
    assert model.edit(pictures[0], (0, 0, 999, 999), '"WORLD" in blue').size == pictures[0].size
    names = ("transformers", "diffusers", "accelerate", "pillow", "numpy", "tyro", "rapidocr")
    said = f"{read} of {len(expected)} read, {drawn} of {len(words)} drawn, {judged} by PP-OCR's reading; "
    said += ", ".join(f"{name} {version(name)}" for name in names)
    assert read >= len(expected) - 1 and min(drawn, judged) >= len(words) - 1, said
    return said


if __name__ == "__main__":
    what = sys.argv[1]
    module = __import__(what)
    if "site-packages" not in str(module.__file__):
        sys.exit(f"{what} is at {module.__file__}, expected an installed one: run this outside of the repository")
    print(f"{what} {version('slidelora')}: {check_slidelora() if what == 'slidelora' else check_textharmony()}")

"""Adapter folders as other programs write them."""

from pathlib import Path

from safetensors.torch import load_file, save_file


def drop_metadata(directory: Path) -> Path:
    """Rewrite the weights of an adapter without our digests, so that its configuration may be changed."""
    path = directory / "adapter_model.safetensors"
    save_file(load_file(path), path)
    return directory

"""Gated groups of LoRA experts for any torch model."""

from slidelora.checkpointing import checkpoint_kwargs
from slidelora.config import SlideLoRAConfig
from slidelora.experts import add_expert, freeze, param_groups
from slidelora.files.bounds import require_bounded
from slidelora.files.kohya import export_kohya
from slidelora.files.native import load_pretrained, save_pretrained
from slidelora.files.peft_lora import export_peft, import_peft
from slidelora.files.textharmony import import_textharmony
from slidelora.gating import released_gates
from slidelora.hooks import compute_gates
from slidelora.injection import inject, print_trainable_parameters, remove
from slidelora.inputs import PromptCollator
from slidelora.merging import merge, merge_and_unload, unmerge
from slidelora.plot import plot_routing
from slidelora.routing_state import aux_loss, disabled, gates, prompt, routing

__all__ = [
    "SlideLoRAConfig", "inject", "remove", "gates", "prompt", "released_gates", "disabled", "compute_gates", "routing",
    "PromptCollator", "plot_routing", "aux_loss", "checkpoint_kwargs", "add_expert", "freeze", "param_groups",
    "print_trainable_parameters", "save_pretrained", "load_pretrained", "merge", "unmerge", "merge_and_unload",
    "export_peft", "export_kohya", "import_peft", "import_textharmony", "require_bounded",
]  # fmt: skip

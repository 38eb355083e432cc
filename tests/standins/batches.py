"""Records as a batch."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from textharmony.config import ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.record import Record


def collate(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> dict[str, Any]:
    """The arguments of TextHarmonyModel.forward, for records of all tasks."""
    collator = Collator(config, tokenizer)
    return collator.stack([collator.encode(record) for record in records])

"""Run PEFT's own tests with Slide-LoRA in place of LoRA, and print what passes.

    python tests/peers/peft_suite.py peft-0.21.2 [--gate token] [-k EXPRESSION]

peft-0.21.2 is the unpacked source distribution (`pip download --no-binary :all: --no-deps peft==0.21.2`). Each test
that PEFT parametrises with a LoraConfig runs with a SlideLoRAPeftConfig of the same target modules, ranks and alphas.
Tiny random models of the same classes stand in for those of the hub. Cases in LISTED do not apply to Slide-LoRA and do
not run; docs/peft.md has the same list. The exit code is 1 if a case fails.
"""

import argparse
import collections
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from torch import nn

from slidelora.peft import SlideLoRAPeftConfig, SlideLoRATuner, SlideLoRAType

FILES = ("custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models")
SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
LLAMA = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2}
BERT = {**SIZES, "num_hidden_layers": 2}
GPT = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
BART = {"vocab_size": 256, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
BART |= {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("ffn_dim", 48), ("attention_heads", 4))
}
T5 = {
    "vocab_size": 256,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
# By the end of a model's name on the hub: the class of the stand-in and its sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 48, "num_hidden_layers": 2, "word_embed_proj_dim": 32},
    ),
    "tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "tiny-random-gpt2": ("GPT2LMHeadModel", GPT),
    "tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "tiny-random-MistralForCausalLM": ("MistralForCausalLM", LLAMA),
    "tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    "tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**LLAMA, "head_dim": 8}),
    "tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "tiny-random-BertModel": ("BertModel", BERT),
    "tiny-random-RobertaModel": ("RobertaModel", {**BERT, "max_position_embeddings": 64}),
    "tiny-random-DebertaModel": ("DebertaModel", {**BERT, "relative_attention": True, "pos_att_type": "c2p|p2c"}),
    "tiny-random-DebertaV2Model": ("DebertaV2Model", {**BERT, "relative_attention": True, "pos_att_type": "c2p|p2c"}),
}


DEFAULT_GATES = {"text": 0.75, "image": 0.5, "shared": 0.5}


@dataclass
class SuiteConfig(SlideLoRAPeftConfig):
    """A Slide-LoRA that starts at random where a test wants an adapter that changes outputs."""

    suite_gate: ClassVar[str] = "sequence"

    init_weights: bool = True

    def __post_init__(self) -> None:
        """Take the gate of the suite where a test makes a configuration by itself."""
        if self.gate == "sequence" and self.suite_gate != "sequence":
            self.gate = self.suite_gate
            self.default_gates = DEFAULT_GATES if self.gate == "given" else None
        super().__post_init__()


class SuiteTuner(SlideLoRATuner):
    """A tuner that obeys init_weights."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject, and start B at random like a linear layer if init_weights is False, as PEFT's LoRA does."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not self.peft_config[adapter_name].init_weights:
            for layer in self.adapters.layers(adapter_name):
                nn.init.uniform_(layer.lora_B, -(layer.r**-0.5), layer.r**-0.5)


# Cases that do not apply: the reason, a pattern of the test's name with its parameters, and options of LoRA.
LISTED: list[tuple[str, str | None, set[str]]] = [
    ("DoRA, MiCA, VeLoRA, Monteclora, BD-LoRA, KASA and aLoRA are variants of one LoRA", None,
     {"use_dora", "init_lora_weights", "velora_config", "monteclora_config", "use_bdlora", "kasa_config",
      "alora_invocation_tokens"}),
    ("no trainable tokens, no parameters as targets, no bias", "learnable_bias",
     {"trainable_token_indices", "target_parameters", "lora_bias"}),
    ("the target is no linear layer", r"[\[-](Conv[123]d|MHA|Embedding \+ transformers Conv1D [23] )", set()),
    ("two adapters act at once; the experts of one Slide-LoRA do, and slidelora.add_expert adds some",
     r"^test_(active_adapter\[|multiple_active_adapters)", set()),
    ("the names of parameters do not contain that of the adapter",
     r"^test_(adapter_name\[|add_adapter_no_autocast|loading_model)", set()),
    ("the test finds an adapter that rests by the dictionaries in a LoRA layer",
     r"^test_(set_adapter_non_overlapping_modules\[|set_requires_grad\[|merge_layers_multi\[LoraConfig)", set()),
    ("low_cpu_mem_usage puts no parameter on the meta device: experts are small", r"^test_load_model_low_cpu", set()),
    ("the default of target_modules is all-linear", r"^test_default_target_modules", set()),
    ("the error says 'not finite' instead of 'NaNs detected'", r"^test_merge_layers_nan", set()),
]  # fmt: skip


# More of them by gate.
MERGES = ("a learned gate depends on the input and does not merge", r"merg|^test_forward_b?float16", set[str]())
NAMES = (
    "the parameters of a layer's gate have no lora_ in their names",
    r"^test_(only_params_are_updated|training_(custom|(en|de)coder)|training\[|training_gradient_checkpointing)",
    set[str](),
)
LISTED_BY_GATE = {"given": LISTED, "sequence": [*LISTED, MERGES], "token": [*LISTED, MERGES, NAMES]}


def listed(name: str, options: dict[str, Any], gate: str) -> str | None:
    """Return the reason why a case does not apply, if there is one."""
    used = {option for option, value in options.items() if value}
    for reason, pattern, names in LISTED_BY_GATE[gate]:
        if names & used or (pattern is not None and re.search(pattern, name)):
            return reason
    return None


class Suite:
    """A plugin of pytest that chooses the cases, substitutes the configurations and counts."""

    def __init__(self, gate: str, run_listed: bool) -> None:
        self.gate, self.run_listed = gate, run_listed
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.reasons: dict[str, list[str]] = collections.defaultdict(list)
        self.not_run: collections.Counter[str] = collections.Counter()
        self.rules: dict[str, str] = {}  # of listed cases that run, by case
        self.pass_anyway: collections.Counter[str] = collections.Counter()

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep the cases with a LoraConfig and give them a Slide-LoRA."""
        kept = []
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            if params.get("config_cls") is not peft.LoraConfig:
                continue
            kinds = [name for name in ("config_kwargs", "config_kwargs_1", "config_kwargs_2") if name in params]
            reasons = [listed(item.name, dict(params[name]), self.gate) for name in kinds] or [
                listed(item.name, {}, self.gate)
            ]
            reason = next((one for one in reasons if one is not None), None)
            if reason is not None and not self.run_listed:
                self.counts[item.path.name]["listed"] += 1
                self.not_run[reason] += 1
                continue
            if reason is not None:
                self.rules[item.nodeid] = reason
            params["config_cls"] = SuiteConfig
            for name in kinds:
                params[name] = slide_options(dict(params[name]), params.get("model_id", ""), self.gate)
            kept.append(item)
        items[:] = kept

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a case."""
        name = Path(report.fspath).name
        if report.failed:
            self.counts[name]["failed"] += 1
            message = (
                report.longrepr.reprcrash.message if hasattr(report.longrepr, "reprcrash") else str(report.longrepr)
            )
            lines = message.strip().splitlines()
            self.reasons[re.sub(r"'[^']*'|\d+", "*", lines[0])[:150]].append(report.nodeid.partition("::")[2])
        elif report.skipped:
            self.counts[name]["skipped"] += 1
        elif report.when == "call":
            self.counts[name]["passed"] += 1
            if report.nodeid in self.rules:
                self.pass_anyway[f"{self.rules[report.nodeid]}: {report.nodeid.partition('[')[0]}"] += 1

    def table(self) -> str:
        """Return the counts by file and the failures by reason."""
        columns = ("passed", "failed", "skipped", "listed")
        rows = [(name, *(count[column] for column in columns)) for name, count in sorted(self.counts.items())]
        rows.append(("all", *(sum(row[index] for row in rows) for index in range(1, 5))))
        lines = [f"| file | {' | '.join(columns)} |", "|---|" + "---|" * 4]
        lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
        passed, failed = rows[-1][1], rows[-1][2]
        lines.append(f"\n{passed} of {passed + failed} that ran and were not skipped passed")
        lines.append("\nlisted:")
        lines += [f"{count:5} {reason}" for reason, count in self.not_run.most_common()]
        lines.append("\nlisted, but passed:")
        lines += [f"{count:5} {reason}" for reason, count in self.pass_anyway.most_common()]
        lines.append("\nfailed:")
        for reason, names in sorted(self.reasons.items(), key=lambda one: -len(one[1])):
            tests = collections.Counter(name.partition("[")[0].rpartition("::")[2] for name in names)
            lines.append(f"{len(names):5} {reason}")
            lines += [f"            {count:4} {test}" for test, count in tests.most_common(8)]
        return "\n".join(lines)


def slide_options(options: dict[str, Any], model_id: str, gate: str) -> dict[str, Any]:
    """Turn the options of a LoraConfig into options of a SuiteConfig."""
    options = {"r": 8, "lora_alpha": 8, **options}
    if options.pop("init_lora_weights", True) is False:
        options["init_weights"] = False
    if (bias := options.pop("bias", "none")) != "none":
        options["bias"] = bias
    if options.get("target_modules") is None and Path(model_id, "config.json").is_file():
        model_type = json.loads(Path(model_id, "config.json").read_text(encoding="utf-8"))["model_type"]
        options["target_modules"] = LORA_TARGETS[model_type]
    if options.get("target_modules", "all-linear") is None:
        del options["target_modules"]
    return {**options, "gate": gate, "default_gates": DEFAULT_GATES if gate == "given" else None}


def make_models(folder: Path) -> None:
    """Save a stand-in for each model of the hub under the model's name."""
    for end, (name, sizes) in MODELS.items():
        cls = getattr(transformers, name)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        torch.manual_seed(0)
        model = cls(cls.config_class(**sizes, **ids))
        for owner in ("hf-internal-testing", "peft-internal-testing", "trl-internal-testing"):
            model.save_pretrained(folder / owner / end)


def main() -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sdist", type=Path, help="folder of PEFT's unpacked source distribution")
    parser.add_argument("-k", default="", help="run only the tests that match, as in pytest")
    parser.add_argument("--all", action="store_true", help="run the listed cases, too")
    parser.add_argument("--files", nargs="*", default=FILES, choices=FILES)
    help_gate = "given: with default_gates; sequence: not for custom models, which have no input embeddings"
    parser.add_argument("--gate", default="given", choices=("given", "sequence", "token"), help=help_gate)
    parser.add_argument("-v", action="store_true", help="print tracebacks and the names of failed cases")
    arguments = parser.parse_args()
    if not (arguments.sdist / "tests" / "testing_common.py").is_file():
        parser.error(f"sdist is {arguments.sdist}, expected the folder of PEFT's source distribution, which has tests/")
    if importlib.util.find_spec("datasets") is None:  # the tests import it, but no case that runs here uses it
        stub: Any = types.ModuleType("datasets")
        stub.__spec__, stub.load_dataset = importlib.machinery.ModuleSpec("datasets", None), None
        sys.modules["datasets"] = stub
    PEFT_TYPE_TO_CONFIG_MAPPING[SlideLoRAType.SLIDELORA] = SuiteConfig
    PEFT_TYPE_TO_TUNER_MAPPING[SlideLoRAType.SLIDELORA] = SuiteTuner
    suite, SuiteConfig.suite_gate = Suite(arguments.gate, arguments.all), arguments.gate
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        package = Path(name, "peft_tests")
        package.mkdir()
        (package / "__init__.py").touch()
        Path(name, "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        for file in ("testing_common", "testing_utils", *(f"test_{file}" for file in FILES)):
            shutil.copy(arguments.sdist / "tests" / f"{file}.py", package)
        make_models(Path(name))
        os.chdir(name)  # a name of the hub is a folder now
        files = [str(package / f"test_{file}.py") for file in arguments.files]
        trace = "--tb=short" if arguments.v else "--tb=no"
        options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", trace, "-k", arguments.k]
        code = pytest.main([*options, *([] if arguments.v else ["--no-summary"]), *files], plugins=[suite])
        os.chdir(package.anchor)
    print(suite.table())
    return int(code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED))


if __name__ == "__main__":
    sys.exit(main())

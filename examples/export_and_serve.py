"""Under constant gates a mixture is one plain LoRA, which programs without slidelora can load.

A tiny random language model gets three experts with random weights, in place of trained ones. The mixture under two
constant gates is exported and loaded with PEFT. Both must give the same logits, so the printed errors must be near
zero.
"""

import tempfile

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import slidelora

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
base = LlamaForCausalLM(config).eval()
weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
input_ids = torch.randint(0, 64, (2, 8))

model = slidelora.inject(base, experts=["text", "image", "shared"], r=4, gate="given")
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)

for gates in ("text", {"text": 0.2, "image": 0.3, "shared": 0.5}):
    with tempfile.TemporaryDirectory() as folder, slidelora.gates(model, gates), torch.no_grad():
        slidelora.export_peft(model, folder, gates=gates)
        plain = LlamaForCausalLM(config).eval()
        plain.load_state_dict(weights)
        served = PeftModel.from_pretrained(plain, folder)
        expected, found = model(input_ids).logits, served(input_ids).logits
    error = (found - expected).norm() / expected.norm()
    print(f"gates {gates}: one LoRA of rank {served.peft_config['default'].r}, relative error {error:.1e}")

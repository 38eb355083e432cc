"""The released TextHarmony's own modules, in plain torch, around transformers' CLIP and Llama and diffusers' UNet.

Names of weights are the released ones wherever a module's place allows it; `keys` translates the rest.
"""

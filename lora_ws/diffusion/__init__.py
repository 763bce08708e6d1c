"""Adapters inside a running diffusion model: every sample of a batch its own mixture.

Names are imported from their modules. `bank` needs torch alone; what builds and samples diffusion
models needs the `diffusion` extra.
"""

"""Weights and configurations of Hugging Face `transformers`, both ways.

A folder with config.json and safetensors becomes an `LM` and an `LM` becomes such a folder. What
sets one class apart from another is one entry in `families.FAMILIES`.
"""

from slm_jax.models.hf.configs import config_from_hf, config_to_hf
from slm_jax.models.hf.families import FAMILIES
from slm_jax.models.hf.io import HFTokenizer, is_hf, load_hf, save_hf
from slm_jax.models.hf.tensors import tensor_map, to_hf

__all__ = [
    "FAMILIES",
    "HFTokenizer",
    "config_from_hf",
    "config_to_hf",
    "is_hf",
    "load_hf",
    "save_hf",
    "tensor_map",
    "to_hf",
]

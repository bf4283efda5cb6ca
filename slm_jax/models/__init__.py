"""Whole models, their presets, FLOPs and Hugging Face weight maps."""

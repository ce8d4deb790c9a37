"""Decoder and tokenizer as one thing: text in, text out."""

from rung.model.model import Model, compute_dtype, load, new_model

__all__ = ["Model", "compute_dtype", "load", "new_model"]

"""The legend of dimension letters, and the jaxtyping names that public signatures use.

Inside functions a tensor's name ends in its dimensions (`logits_BTV`); everywhere they mean:

    T  tokens on one flat axis          S  sequences, or cache slots          N  any number of rows
    B  batch                            G  samples of one prompt (a group)    V  vocabulary
    D  model width                      H  query heads                        K  key-value heads
    d  width of one head                F  width of the feed-forward          L  layers
    C  capacity of a cache, in rows     P  prompt tokens                      R  rows of one decoding step

jaxtyping checks them in tests only (`tests/conftest.py`); in use they cost nothing.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Tensor"]

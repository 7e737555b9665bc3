"""The decoder of every family over paged keys and values, on a GPU and on a CPU."""

from engine.inference.decoder.batch import TokenBatch
from engine.inference.decoder.decoder import Decoder

__all__ = ["Decoder", "TokenBatch"]

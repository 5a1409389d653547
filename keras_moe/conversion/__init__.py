"""Dense models made sparse, and back; published weights."""

from keras_moe.conversion.upcycling import upcycle

__all__ = ["upcycle"]

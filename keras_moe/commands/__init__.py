"""The commands of `python -m keras_moe`."""

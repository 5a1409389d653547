"""The engine for meshes of devices: one logical replica, weights with layouts."""

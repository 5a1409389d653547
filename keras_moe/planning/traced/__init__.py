"""What a training step of a built model takes, from its graph.

The one part of planning that needs TensorFlow; imported when a model is planned.
"""

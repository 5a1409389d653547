"""The engine for `MirroredStrategy` and `MultiWorkerMirroredStrategy`.

Every replica holds a run of every mixture's experts; rows go there and back by
all-to-alls, within the step that each replica runs.
"""

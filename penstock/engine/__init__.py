"""Floor 3: model execution. torch lives here and in nothing below; the worker core sees only `Step` and `Sampled`."""

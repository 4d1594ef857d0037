"""Floor 3: model execution. torch lives here; worker cores see only `Step` and `Sampled`."""

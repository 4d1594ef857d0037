"""Triton kernels over the block-major pool, one a file, each with the function that launches it.

Owns what runs on a GPU between the matrix products of a decoder, and beside them: attention, head
norms with rotary and the store of keys and values, norms, activations, sampling, codecs, digests.
Does not know models, requests or streams. A launcher allocates nothing and never waits for the
device: the caller passes outputs and workspaces in, so every launch can be captured in a graph, and
nothing that changes from step to step is baked into one: lengths, tables and slots are read on the
device. The kernels for CUDA call these.

Without a GPU the same kernels run in Triton's interpreter on CPU tensors, when `TRITON_INTERPRET=1`
is in the environment before Triton is first imported.
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the CUDA kernels need Triton, which is not installed here: pip install 'penstock[cuda]'"
    ) from error

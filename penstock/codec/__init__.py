"""KV codecs: blocks of a pool in fewer bytes, and back. One method a file.

`codec.make_codec` is the way in: a `Codec` carries many blocks in one native call, or, where there
is no compiler, by way of numpy. What a codec costs a model is measured by
`penstock/engine/kv_quality.py` and judged by `penstock/kv/quality.py`; when to use one is
`penstock/kv/policy.py`'s to say.
"""

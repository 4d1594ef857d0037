"""How long a model step takes on which hardware, before anything has been measured: facts.

A profile is the six coefficients of `control/cost.py` in milliseconds, and the tokens whose KV fits
beside the weights. A worker names its own (`WorkerInfo.profile`, "H100/llama3.1-8b/tp1"); one that
names none starts from `UNKNOWN`, and either is corrected by the steps that it really runs.

Source: non-negative least squares on relative error over NVIDIA aiconfigurator's tables of kernel
times (Apache-2.0; vLLM 0.24, A100 0.14), bf16; median error 2 to 10 % for prefills, 1 to 9 % for
decodes. H20 and L20 are not measured but estimated from H200 and L40S by the ratio of their
rooflines. These are sums of kernel times: a real engine is slower.
"""

from typing import Final

UNKNOWN: Final = (2.0, 0.05, 2e-6, 2.0, 0.1, 1e-4)
"""a, b, c, d, e, f of a worker that nobody has measured: a small model on a small machine."""

KERNEL_TIMES: Final[dict[str, tuple[int, tuple[float, float, float, float, float, float]]]] = {
    "A100/llama3.1-8b/tp1": (
        411529,
        (6.4953, 0.049903, 1.4983e-06, 10.502, 0.02918, 8.0343e-05),
    ),
    "A100/llama3.1-8b/tp2": (
        945587,
        (6.3139, 0.030052, 7.4141e-07, 6.3853, 0.02057, 4.1878e-05),
    ),
    "A100/llama3.1-70b/tp4": (
        423889,
        (22.564, 0.14319, 1.8153e-06, 26.962, 0.091648, 5.743e-05),
    ),
    "A100/llama3.1-70b/tp8": (
        1278381,
        (14.529, 0.094995, 7.5262e-07, 16.69, 0.064269, 2.6973e-05),
    ),
    "L40S/llama3.1-8b/tp1": (
        178070,
        (16.239, 0.047202, 1.6788e-06, 20.724, 0.027098, 0.00021019),
    ),
    "L40S/llama3.1-8b/tp2": (
        478668,
        (9.884, 0.051679, 7.8393e-07, 11.196, 0.035463, 9.9626e-05),
    ),
    "L40S/llama3.1-70b/tp4": (
        50354,
        (38.084, 1.1734, 2.253e-06, 54.803, 1.0447, 6.1248e-05),
    ),
    "L40S/llama3.1-70b/tp8": (
        531311,
        (0.0, 2.4031, 1.1692e-06, 27.997, 2.0531, 4.8487e-05),
    ),
    "H100/llama3.1-8b/tp1": (
        411529,
        (4.0933, 0.014929, 4.3426e-07, 5.8929, 0.0077668, 4.3622e-05),
    ),
    "H100/llama3.1-8b/tp2": (
        945587,
        (3.1997, 0.010156, 2.1789e-07, 3.6793, 0.0062303, 2.1002e-05),
    ),
    "H100/llama3.1-70b/tp4": (
        423889,
        (10.914, 0.051537, 5.6566e-07, 14.473, 0.026451, 2.8067e-05),
    ),
    "H100/llama3.1-70b/tp8": (
        1278381,
        (9.4116, 0.031862, 2.7971e-07, 9.2035, 0.021647, 1.3654e-05),
    ),
    "H200/llama3.1-8b/tp1": (
        830383,
        (2.7075, 0.016262, 4.3106e-07, 4.5174, 0.0098357, 3.0129e-05),
    ),
    "H200/llama3.1-8b/tp2": (
        1783294,
        (2.6035, 0.010387, 2.1041e-07, 3.0414, 0.007113, 1.4816e-05),
    ),
    "H200/llama3.1-70b/tp2": (
        331726,
        (11.537, 0.090325, 1.1932e-06, 20.417, 0.031721, 3.5861e-05),
    ),
    "H200/llama3.1-70b/tp4": (
        1094055,
        (7.968, 0.053484, 5.7088e-07, 11.561, 0.028545, 1.856e-05),
    ),
    "H200/llama3.1-70b/tp8": (
        2618713,
        (7.5692, 0.032147, 2.8048e-07, 7.463, 0.02288, 9.6693e-06),
    ),
    "H20/llama3.1-8b/tp1": (
        521392,
        (0.41669, 0.11131, 2.0533e-06, 5.0111, 0.077273, 3.6516e-05),
    ),
    "H20/llama3.1-8b/tp2": (
        1165313,
        (1.4118, 0.057568, 1.0234e-06, 3.2909, 0.040927, 1.7618e-05),
    ),
    "H20/llama3.1-70b/tp2": (
        84533,
        (3.1199, 0.55483, 5.1507e-06, 22.618, 0.29204, 3.3495e-05),
    ),
    "H20/llama3.1-70b/tp4": (
        599670,
        (2.8719, 0.28639, 2.5384e-06, 12.402, 0.18975, 2.0063e-05),
    ),
    "H20/llama3.1-70b/tp8": (
        1629943,
        (5.2507, 0.14535, 1.3001e-06, 7.9254, 0.10317, 1.1241e-05),
    ),
    "L20/llama3.1-8b/tp1": (
        191802,
        (11.151, 0.12289, 2.8045e-06, 21.401, 0.042258, 0.00020625),
    ),
    "L20/llama3.1-8b/tp2": (
        506134,
        (6.7718, 0.089305, 1.4071e-06, 11.409, 0.044493, 9.8698e-05),
    ),
    "L20/llama3.1-70b/tp4": (
        72326,
        (23.522, 1.3587, 3.8021e-06, 54.515, 1.069, 8.6286e-05),
    ),
    "L20/llama3.1-70b/tp8": (
        575256,
        (0.0, 2.455, 2.5192e-06, 28.258, 2.0733, 5.1633e-05),
    ),
}
"""By "GPU/model/tpN": KV capacity in tokens, then a, b, c, d, e, f in milliseconds."""


def coefficients_ns(profile: str) -> tuple[float, ...]:
    """Return a profile's coefficients in nanoseconds; those of `UNKNOWN` for a name not known."""
    _, coefficients_ms = KERNEL_TIMES.get(profile, (0, UNKNOWN))
    return tuple(value * 1e6 for value in coefficients_ms)

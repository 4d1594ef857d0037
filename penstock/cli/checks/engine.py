"""`python -m` this: says in a line of JSON what torch, transformers and the kernels are here.

A process of its own, started by `installation.py`: a torch that cannot be imported, or that takes
the process down, is something to report.
"""

import json
import time
import warnings


def main() -> None:
    """Import, build, and say."""
    started = time.monotonic()
    import torch
    import transformers

    import_s = time.monotonic() - started
    from penstock.core.errors import BackendUnavailable
    from penstock.engine.native.library import KERNELS, open_library
    from penstock.native.build import build, plan_build

    facts: dict[str, object] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "import_s": import_s,
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpus": _gpus(),
        "kernels": None,
        "has_openmp": True,
    }
    started = time.monotonic()
    try:
        path = build(KERNELS)
        open_library(path)
        facts["kernels"] = str(path)
        facts["has_openmp"] = "-fopenmp" in plan_build(KERNELS).command
    except BackendUnavailable as error:
        facts["kernels_error"] = str(error)
    facts["build_s"] = time.monotonic() - started
    print(json.dumps(facts))


def _gpus() -> list[str]:
    import torch

    with warnings.catch_warnings():
        # A driver that is too old is a warning here and a finding there.
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return []
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


if __name__ == "__main__":
    main()

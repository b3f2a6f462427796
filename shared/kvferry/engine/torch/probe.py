"""`python -m kvferry.engine.torch.probe`: which torch is installed here, as one line of JSON.

    {"version": "2.13.0+cpu", "build": "CPUs", "devices": []}
    {"missing": true}
    {"problem": "libcudart.so.12: cannot open shared object file"}

`devices` are those that torch would use beside the processor.
"""

from __future__ import annotations

import json
from typing import Any


def installed() -> dict[str, Any]:
    try:
        import torch
        import torch.version
    except ModuleNotFoundError as error:
        return {"missing": True} if error.name == "torch" else {"problem": str(error)}
    except (ImportError, OSError) as error:
        return {"problem": str(error)}
    build = "CPUs"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    # ROCm's devices are called so, too.
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"version": torch.__version__, "build": build, "devices": devices}


if __name__ == "__main__":
    print(json.dumps(installed()))

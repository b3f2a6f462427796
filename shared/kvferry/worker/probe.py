"""`python -m kvferry.worker.probe JSON`: whether a worker's engine starts here, as one line of JSON.

    {"engine": "native", "why": "…", "exact": true, "seconds": 1.2, "isas": ["avx512", …], "compilers": ["g++"]}
    {"setting": "--engine", "problem": "…", …}

The argument holds settings of a worker. The engine is chosen, built, loaded and warmed up as a worker does it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from kvferry.config.layers import load_settings
from kvferry.engine.native.build import find_compilers
from kvferry.engine.native.cpu import cpu_flags, usable_isas
from kvferry.errors import CheckpointError, KvferryError, SettingError
from kvferry.log import setup_logging
from kvferry.runtime import SystemRuntime, blocking_clock
from kvferry.worker.engine import load_engine, warm_up
from kvferry.worker.ranks import ranks_of
from kvferry.worker.settings import WorkerSettings


def main() -> None:
    setup_logging("error", "json", service="probe")
    answer: dict[str, Any] = {
        "isas": usable_isas(cpu_flags()),
        "compilers": [compiler.path for compiler in find_compilers()],
    }
    try:
        settings = load_settings(WorkerSettings, config_file=None, environ=os.environ, flags=json.loads(sys.argv[1]))
        began = blocking_clock()
        with ranks_of(settings, SystemRuntime()) as ranks:
            loaded = load_engine(settings, ranks.joined)
            warm_up(loaded)
            loaded.runner.close()
        answer |= {
            "engine": loaded.choice.engine,
            "why": loaded.choice.why,
            "exact": loaded.runner.exact,
            "seconds": blocking_clock() - began,
        }
    except SettingError as error:
        answer |= {"setting": error.setting, "problem": error.problem}
    except CheckpointError as error:
        answer |= {"setting": "--model", "problem": str(error)}
    except KvferryError as error:
        answer |= {"setting": "", "problem": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

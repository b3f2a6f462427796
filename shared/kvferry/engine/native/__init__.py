"""The native engine: a C++ library that runs one engine step per call, and its runner.

    cpu.py       which instruction sets this processor has
    build.py     compiles `src/` for one of them, into the cache or into a wheel
    library.py   finds or builds the library and binds its C interface (`src/kvferry.h`)
    weights.py   streams a checkpoint into it, tensor by tensor
    model.py     the model in the library with its KV cache
    runner.py    `NativeRunner`, the ModelRunner of it all

Nothing here imports torch: a worker on this engine starts without it.
"""

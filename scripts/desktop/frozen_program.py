"""The program that is frozen: converts the checkpoint in its first argument and lets the model write on.

A third argument names a worker, with which the model computes in a child process: the frozen program once more.
"""

import sys

from ggufmoe import ContextOptions, Engine, OffloadOptions, SamplingOptions, convert
from ggufmoe.remote import freeze_support

if __name__ == "__main__":
    freeze_support()
    convert(sys.argv[1], sys.argv[2], quant="Q4_K_M", threads=1, force=True, quantizer="fast")
    offload = OffloadOptions(rpc=sys.argv[3]) if len(sys.argv) > 3 else None
    with Engine(sys.argv[2], ContextOptions(n_ctx=256, n_threads=1), offload) as engine:
        events = engine.generate(engine.tokenize("the model reads"), SamplingOptions(temperature=0, n_predict=16))
        sys.stdout.buffer.write("".join(event.text for event in events).encode())
        if offload:
            print(f"\n{engine.placement.plan.shares[0].device}")

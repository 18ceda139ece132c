"""The program that is frozen: converts the checkpoint in its first argument and lets the model write on."""

import sys

from ggufmoe import ContextOptions, Engine, SamplingOptions, convert

if __name__ == "__main__":
    convert(sys.argv[1], sys.argv[2], quant="Q4_K_M", threads=1, force=True, quantizer="fast")
    with Engine(sys.argv[2], ContextOptions(n_ctx=256, n_threads=1)) as engine:
        events = engine.generate(engine.tokenize("the model reads"), SamplingOptions(temperature=0, n_predict=16))
        sys.stdout.buffer.write("".join(event.text for event in events).encode())

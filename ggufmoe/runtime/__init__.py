"""One loaded model in this process: loading, generation, chat."""

"""From frames to masks: the streaming API, runs to files, CUDA graphs, benchmarks."""

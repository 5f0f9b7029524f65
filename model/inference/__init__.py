"""Text that grows: the KV cache, chunks of a prompt, decoding steps as CUDA graphs."""

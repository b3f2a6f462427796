"""The portable engine: a Hugging Face checkpoint run by torch, on CPUs and on CUDA."""

"""Export a sub-network as a GGUF file for llama.cpp."""

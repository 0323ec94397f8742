"""Language models in GGUF, the files of llama.cpp: read without a library, and made into ordinary models of this pack."""

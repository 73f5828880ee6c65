"""Types chosen for the tensors of a GGUF by what each costs in bytes and in error."""

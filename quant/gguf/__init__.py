"""What a GGUF says: the types of tensors, importance of columns, metadata, tokenizer; its header, read and written."""

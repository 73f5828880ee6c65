"""What there is to convert: checkpoint folders, their tensors and side files, and the architectures that name them."""

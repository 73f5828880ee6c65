"""What can be known of the kernels without a GPU: compiled code, resources, a model of their time."""

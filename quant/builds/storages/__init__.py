"""How one weight is stored in a build: a class for each way, with its bytes, their way back, and their judge."""

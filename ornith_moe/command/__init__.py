"""What the commands of the CLI print."""

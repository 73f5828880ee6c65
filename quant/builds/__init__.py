"""What can be made of a source: every build, planned from headers, and how each stores a weight."""

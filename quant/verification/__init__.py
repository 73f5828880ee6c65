"""What a build holds, whether it is what it claims to be, and how far it is from its source."""

"""From a source to its builds in one pass: slabs, journal, resumption, publication."""

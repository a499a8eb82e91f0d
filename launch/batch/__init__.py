"""Many videos from a file: `flowcache batch`."""

"""Golden files of published implementations: run what they ran, and compare (format: docs/conformance.md)."""

"""What `h200.py` measures, one subject a file; each has a `MEASURES` tuple."""

"""What `h200.py` measures, one subject a file; each has a `MEASURES` tuple."""

NO_GPU, AGAIN = 4, 3
"""What a process of `h200_run.py` ends with: there is no GPU; its CUDA is gone, and another process
is to do the rest.
"""
GRACE_S = 15.0
"""What is under way at the deadline may take so much longer."""

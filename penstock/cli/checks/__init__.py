"""What `penstock doctor` looks at: a file for each part, each a few functions that yield findings.

`doctor.py` calls them in order and shows what they found.
"""

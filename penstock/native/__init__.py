"""How the C++ parts of Penstock come to be on a machine: compiled on first use, and cached."""

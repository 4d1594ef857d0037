"""The HTTP side: an OpenAI-compatible API over whatever `Service` it is handed.

Knows nothing of workers, cores or processes beyond `penstock.core.service`, and imports no torch.
The command line composes it with a running cluster.
"""

"""Engines write completions. One protocol, and the loop that every stage runs them in.

The loop knows nothing of how tokens are made: it hands requests over, keeps every finished completion on disk, asks
only for what is missing after a restart, and gives rows in the order of the requests.
"""

from __future__ import annotations

from distill.engines.traces import TraceTable, write_traces
from distill.engines.written import Alternatives, Completion, Engine, Failure, Request, request_seed, requests_for

__all__ = ["Alternatives", "Completion", "Engine", "Failure", "Request", "TraceTable", "request_seed", "requests_for", "write_traces"]

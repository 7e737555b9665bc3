"""Tests of the HTTP interface on a running server."""

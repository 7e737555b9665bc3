"""The command line against a running API."""

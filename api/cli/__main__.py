"""`python -m api.cli` is `abq`."""

from api.cli.main import main

main()

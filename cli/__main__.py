"""`python -m weftrain.cli`."""

from weftrain.cli.main import main

main()

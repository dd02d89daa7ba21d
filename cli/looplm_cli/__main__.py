"""`python -m looplm_cli` is `looplm`."""

from looplm_cli.app import main

main()

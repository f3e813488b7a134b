"""`python -m localds`: the same as the `localds` program."""

from localds.cli import main

main()

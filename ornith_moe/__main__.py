"""`python -m ornith_moe` is the `ornith-moe` command."""

from ornith_moe.cli import main

main()

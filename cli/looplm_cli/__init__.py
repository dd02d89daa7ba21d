"""looplm_cli: the `looplm` command, the door through which the engine is used from a terminal."""

"""One thin file per subcommand: module NAME holds function NAME, imported only when that command runs."""

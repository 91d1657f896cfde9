"""How Lectern is started and put on machines: the `lectern` command and the supervisor."""

"""Workers on other machines, and engines in child processes."""

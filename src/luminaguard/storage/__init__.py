"""Tables and repositories: everything that matters is here before the next step begins."""

"""The commands. Thin: they parse, show, ask and exit; :mod:`luminaguard.runtime` does the work."""

"""Settings: base.py holds every default; each other file is one data set. Reached by path, from the repository's root."""

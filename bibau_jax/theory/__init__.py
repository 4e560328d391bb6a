"""Theory one can run: what the analysis of backdoors says of a given model, measured."""

"""The first five minutes: the whole real pipeline on text that every machine with Python already has."""

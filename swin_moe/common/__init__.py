"""Helpers that every other folder may use.

They cover printable text, small files, output, fonts, the host, ranks, signals, the fork server and
deferred packages. They import nothing from the rest of the package, and torch only in functions.
"""

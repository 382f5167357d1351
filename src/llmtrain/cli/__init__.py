"""The command line: each command parses its arguments, calls one verb and returns the result to print."""

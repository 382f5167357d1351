"""The command line: each verb parses, calls one recipe and hands back what to print."""

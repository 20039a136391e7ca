"""What the verbs of the command line run, one file per verb, imported when its verb is given.

Each file has `add_arguments(parser)`, `run(arguments, words)`, which returns the exit code, and `SETTINGS`: the schema
whose keys `words` may set as `--section.key value`, or None where the verb takes none.
"""
